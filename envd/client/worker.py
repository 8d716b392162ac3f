"""The env worker that existing trainers have, without the trainer: same method names, same return shapes, no torch.

It speaks the legacy routes, so it works against the older servers as well (dialects A, B
and C). What differs: a failure of the infrastructure raises a typed error with its cause instead of turning into a
reward, unless `silent_errors` asks for the old values.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeGuard, TypeVar

import anyio
from anyio.from_thread import start_blocking_portal

from ..errors import BootFailed, EnvdError, GuestMisbehaved, InfraError, ServerUnreachable, StillBooting
from .answers import Answer
from .client import Client
from .transport import Deadline, Resend

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

T = TypeVar("T")
Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant", "content": [part, …]}; a part is {"type": "text", "text": str} or
{"type": "image", "image": "data:image/jpeg;base64,…", "min_pixels": int, "max_pixels": int}."""

IMAGE_PREFIX = "data:image/jpeg;base64,"
"""What trainers expect, whatever the bytes are: PNG mostly. Whoever decodes goes by the bytes."""
MIN_PIXELS, MAX_PIXELS = 3136, 2_116_800
"""For an image part that comes without them."""
ANSWER_LIMIT = 512 * 1024 * 1024
"""Bytes. Every answer carries all screenshots so far, one to three megabytes each."""
IN_THREAD_BYTES = 256 * 1024
"""Answers above this are decoded in a thread, since they would hold up the loop."""


class Observation(TypedDict):
    """What reset and step return. `obs_messages` is the history so far; None once the episode is done."""

    env_idx: int
    obs_messages: list[Message] | None
    is_done: bool
    format_reward: float


class RemoteEnvWorker:
    """One env of a server, driven by one caller. Close it with `async with` or `aclose`.

    worker_idx         comes back as `env_idx`; what the server says there is ignored, as trainers do
    remote_server_url  default ENVD_URL, else http://127.0.0.1:15001
    slot_id            the env on the server; default `worker_idx`, so that workers of one server never share an env
    silent_errors      answer a failure with the old values: (None, done, 0.0) for reset, (None, done, -1.0) for step,
                       0.0 for evaluate. They look like the model's doing: leave this off if you can mask an episode
    *_timeout          seconds for the whole call. Reset waits on when the server answers that it is still booting
    patience           seconds during which a server that stopped answering is tried again
    max_steps, config  accepted so that a trainer's call stays as it is; the server counts steps
    """

    def __init__(
        self,
        worker_idx: int,
        remote_server_url: str | None = None,
        slot_id: int | None = None,
        *,
        silent_errors: bool = False,
        reset_timeout: float = 3900.0,
        step_timeout: float = 300.0,
        evaluate_timeout: float = 300.0,
        patience: float = 60.0,
        token: str | None = None,
        max_steps: int | None = None,
        config: object = None,
    ) -> None:
        self.worker_idx = worker_idx
        self.slot_id = worker_idx if slot_id is None else slot_id
        self.max_steps = max_steps
        self.config = config
        self.silent_errors = silent_errors
        self._reset_timeout = reset_timeout
        self._step_timeout = step_timeout
        self._evaluate_timeout = evaluate_timeout
        self._client = Client(remote_server_url, token=token, patience=patience)
        self._messages: list[Message] = []
        self._complete = True
        """Whether `_messages` is the whole history: the last answer of an episode may come without it."""
        self._is_init = False
        self._is_done = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def reset(self, task_config: dict[str, Any]) -> Observation:
        """Begin an episode of the task; the first observation.

        Raises what the boot or the set-up failed with, and StillBooting at the end of `reset_timeout`, in which case
        the job goes on: reset with the same task to wait on.
        """
        self._is_init, self._is_done = True, False
        self._messages, self._complete = [], True
        try:
            return await self._reset(task_config, Deadline.after(self._reset_timeout))
        except EnvdError as error:
            self._is_done = True
            return self._old(error, self._observation(None, 0.0))

    async def step(self, prediction: str) -> Observation:
        """Do what the model said; done once. An answer that was lost is asked for again, if the server keeps
        idempotency keys. Raises ServerUnreachable with `outcome` "unknown" when there is no answer to be had: the
        desktop may or may not have been acted on."""
        self._is_init = False
        try:
            answer = await self._post(
                "/env/step", Resend.KEYED, Deadline.after(self._step_timeout), prediction=prediction
            )
            return await self._taken(answer)
        except EnvdError as error:
            self._is_done = self._is_done or self.silent_errors
            return self._old(error, self._observation(None, -1.0))

    async def evaluate(self) -> float:
        """The score of the episode. Raises whatever kept it from being judged, with envd's verdict as the fact
        `verdict`: never a made-up number.

        Asked for again when the answer was lost: envd judges an episode once. An older server judges it anew.
        """
        try:
            answer = await self._post("/env/evaluate", Resend.ALWAYS, Deadline.after(self._evaluate_timeout))
            return _score(answer)
        except EnvdError as error:
            return self._old(error, 0.0)

    async def get_history_messages(self) -> list[Message]:
        """The episode so far, the model's last word included."""
        if not self._complete:
            try:
                await self._fetch_history(Deadline.after(self._step_timeout))
            except EnvdError as error:
                return self._old(error, self._messages)
        return self._messages

    async def get_history_images(self) -> list[Image.Image]:
        """The screenshots of the episode, oldest first, as PIL images."""
        messages = await self.get_history_messages()
        return await anyio.to_thread.run_sync(_images, messages)

    def is_init(self) -> bool:
        """Whether an episode was begun and no step taken in it."""
        return self._is_init

    def is_done(self) -> bool:
        """Whether the episode has ended, or could not begin."""
        return self._is_done

    async def _reset(self, task_config: dict[str, Any], deadline: Deadline) -> Observation:
        try:
            answer = await self._post("/env/reset", Resend.KEYED, deadline, task_config=task_config)
        except StillBooting as booting:
            job = booting.facts.get("job")
            if not isinstance(job, dict) or "id" not in job:
                raise
            await self._client.wait(job["id"], timeout=max(0.0, deadline.left))
            await self._fetch_history(deadline)
            observation = self._observation(self._messages or None, 0.0)
        except ServerUnreachable as lost:
            if lost.facts.get("outcome") == "unknown":
                lost.hint = f"{lost.hint} Reset again: an envd server joins it to the reset that is under way."
            raise
        else:
            observation = await self._taken(answer)
        if not observation["obs_messages"]:
            # How older servers say that a reset failed.
            raise BootFailed(
                f"{self._client.url} answered the reset of env {self.slot_id} without an observation.",
                hint="Its log may say why.",
            )
        return observation

    async def _post(self, path: str, resend: Resend, deadline: Deadline, **body: Any) -> Answer:
        return await self._client.http.request(
            "POST", path, body=body | {"slot_id": self.slot_id}, resend=resend, deadline=deadline, limit=ANSWER_LIMIT
        )

    async def _taken(self, answer: Answer) -> Observation:
        """What reset and step answered, with the history kept."""
        messages, done, format_reward = await _aside(_read_observation, answer)
        self._is_done = done
        self._complete = messages is not None
        self._messages = self._messages if messages is None else messages
        return self._observation(messages, format_reward)

    async def _fetch_history(self, deadline: Deadline) -> None:
        answer = await self._post("/env/history_messages", Resend.ALWAYS, deadline)
        self._messages, self._complete = await _aside(_read_history, answer), True

    def _observation(self, messages: list[Message] | None, format_reward: float) -> Observation:
        return {
            "env_idx": self.worker_idx,
            "obs_messages": messages,
            "is_done": self._is_done,
            "format_reward": format_reward,
        }

    def _old(self, error: EnvdError, value: T) -> T:
        if not self.silent_errors:
            raise error
        logger.warning("worker %d answers %r in place of: %s", self.worker_idx, value, error)
        return value


class BlockingRemoteEnvWorker:
    """`RemoteEnvWorker` for callers without an event loop, such as a Ray actor: takes the same arguments, all of which
    can be pickled, and has the same methods, which block. The loop runs in a thread of its own until `close`, the end
    of a `with` block, or the end of the process.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._worker = RemoteEnvWorker(*args, **options)
        stack = ExitStack()
        self._portal = stack.enter_context(start_blocking_portal(name="envd-worker"))
        stack.callback(self._portal.call, self._worker.aclose)
        # Also when it is forgotten: at the end of the process, waiting for the loop would otherwise never end.
        self._close = weakref.finalize(self, stack.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """May be called more than once."""
        self._close()

    def reset(self, task_config: dict[str, Any]) -> Observation:
        return self._run(self._worker.reset, task_config)

    def step(self, prediction: str) -> Observation:
        return self._run(self._worker.step, prediction)

    def evaluate(self) -> float:
        return self._run(self._worker.evaluate)

    def get_history_messages(self) -> list[Message]:
        return self._run(self._worker.get_history_messages)

    def get_history_images(self) -> list[Image.Image]:
        return self._run(self._worker.get_history_images)

    def is_init(self) -> bool:
        return self._worker.is_init()

    def is_done(self) -> bool:
        return self._worker.is_done()

    def _run(self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        future: Future[T] = self._portal.start_task_soon(call, *args)
        try:
            return future.result()
        finally:
            future.cancel()  # matters when the wait was interrupted, by Ctrl-C for example


async def _aside(read: Callable[[Answer], T], answer: Answer) -> T:
    """Decode here, or in a thread when that would hold up the loop."""
    if len(answer.body) <= IN_THREAD_BYTES:
        return read(answer)
    return await anyio.to_thread.run_sync(read, answer)


def _read_observation(answer: Answer) -> tuple[list[Message] | None, bool, float]:
    document = answer.object()
    messages, done, reward = document.get("obs_messages"), document.get("is_done"), document.get("format_reward", 0.0)
    if not isinstance(done, bool) or not _is_number(reward):
        raise InfraError(f"{answer.request} was answered with something that is not an observation.")
    return None if messages is None else _from_wire(answer, messages), done, float(reward)


def _read_history(answer: Answer) -> list[Message]:
    return _from_wire(answer, answer.object().get("history_messages"))


def _from_wire(answer: Answer, messages: Any) -> list[Message]:
    try:
        return [
            {"role": message["role"], "content": [_part(part) for part in message["content"]]} for message in messages
        ]
    except (TypeError, KeyError, AttributeError) as error:
        raise InfraError(f"{answer.request} was answered with messages that cannot be read ({error!r}).") from error


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return dict(part)
    data = part["b64"]
    return {
        "type": "image",
        "image": data if data.startswith("data:") else IMAGE_PREFIX + data,
        "min_pixels": part.get("min_pixels", MIN_PIXELS),
        "max_pixels": part.get("max_pixels", MAX_PIXELS),
    }


def _images(messages: list[Message]) -> list[Image.Image]:
    from PIL import Image  # here, so that a client that never looks at pictures need not load it

    images: list[Image.Image] = []
    for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
        try:
            image = Image.open(io.BytesIO(base64.b64decode(part["image"].partition(",")[2])))
            image.load()
        except (OSError, ValueError) as error:
            raise GuestMisbehaved(f"A screenshot in the history cannot be decoded: {error}.") from error
        images.append(image)
    return images


def _score(answer: Answer) -> float:
    """Dialects A and B answer a bare number, C {"score": number}."""
    value = answer.json()
    score = value.get("score") if isinstance(value, dict) else value
    if not _is_number(score):
        raise InfraError(f"{answer.request} was answered with {str(value)[:200]} where a score was due.")
    return float(score)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
