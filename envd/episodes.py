"""The envs and what is played on them: set-up and first observation, steps, history, and the way to a verdict.

An env is changed by its resets (the boot queue calls `vacate`, `begin`, `abandon`) and by at most one step at a
time. A desktop that dies or is taken away ends the step that runs on it; nothing that was sent to a guest is sent
again.

An episode outlives the daemon with its desktop: what its verdict and its next step need is in the journal and in its
bundle before anybody is told of it, and a step is there before its input is sent. One that the daemon's end cut short
is ended by its next life as a step whose answer was lost.
"""

from __future__ import annotations

import base64
import io
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import anyio
import structlog
from anyio.abc import TaskGroup
from PIL import Image

from .acting import Sight, act, as_told, plan, shaped_reward, sight
from .actions.dialogue import Dialogue, PromptTemplate
from .actions.pyautogui import Special, Step
from .actions.uitars import Frame, PredictionError
from .boot.fleet import Fleet
from .boot.queue import Beginning, Progress, Reset
from .bundles import Bundle, Bundles
from .errors import (
    DesktopLost,
    EnvBusy,
    EnvdError,
    EpisodeOver,
    GuestMisbehaved,
    InternalError,
    NoEpisode,
    NotFound,
    SetupFailed,
    StepGap,
    StepRepeated,
    UnknownEnv,
    from_problem,
)
from .events import EventLog
from .guest import Guest
from .models import (
    ActionOutcome,
    ActionResult,
    Desktop,
    DesktopState,
    EndReason,
    Env,
    EnvState,
    Episode,
    Job,
    ResetPath,
    Settled,
    SetupOutcome,
    SetupRecord,
    StepRequest,
    StepResult,
)
from .records import KeptAnswer, KeptPlay, KeptStep
from .settings import Settings
from .settle import settle
from .store import Kind, Store
from .tasks.assets import Assets
from .tasks.setup.context import Context
from .tasks.setup.proxy import proxy
from .tasks.setup.runner import run as run_steps
from .tasks.task import Task

logger = structlog.get_logger(__name__)

T = TypeVar("T")
Act = Callable[..., Awaitable[ActionResult]]

INSTRUCTION_KEPT = 2000
"""Characters of the instruction that an env is shown with. The model is shown all of it."""
PICTURE_ENDS = (b"IEND\xaeB`\x82", b"\xff\xd9")
"""With what a whole PNG and a whole JPEG end."""


@dataclass
class Play:
    """What an episode leaves for its verdict, beside the episode itself.

    outputs   what its set-up kept for the evaluator, by name
    browser   as CDP names it, once the set-up was done; "" if there was none
    proxied   Chrome was given a proxy
    warnings  of the set-up, and of actions that the desktop did not take
    last_seen the first picture since something was done to the screen, and when (monotonic) it was taken
    settled   how the screen came to rest before it began
    replaced  a reset, or the end of a lease, has taken the desktop away
    why       what did
    interrupted  the daemon ended while it was judged, when something may have been done to the desktop for that
    judged    it has its verdict, which is final
    """

    job_id: str
    task: Task
    bundle: Bundle
    outputs: dict[str, bytes]
    warnings: tuple[str, ...]
    browser: str = ""
    proxied: bool = False
    settled: Settled | None = None
    last_seen: tuple[bytes, float] | None = None
    replaced: bool = False
    why: str = "a reset began"
    interrupted: bool = False
    judged: bool = False

    def kept(self, *, judging: bool = False) -> KeptPlay:
        return KeptPlay(
            job_id=self.job_id,
            task=dict(self.task.raw),
            outputs=KeptPlay.packed(self.outputs),
            warnings=self.warnings,
            browser=self.browser,
            proxied=self.proxied,
            settled=self.settled,
            judging=judging or self.interrupted,
        )


@dataclass(frozen=True)
class Judged:
    """An episode that is being judged, with its desktop."""

    episode: Episode
    desktop: Desktop
    envs: Envs

    async def while_alive(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of `work`, or DesktopLost as soon as the desktop dies or is taken away."""
        return await self.envs._while_alive(self.desktop.id, work)


@dataclass
class _Slot:
    id: int
    state: EnvState = EnvState.EMPTY
    detail: str = ""
    desktop_id: str | None = None
    episode: Episode | None = None
    dialogue: Dialogue | None = None
    play: Play | None = None
    frame: Frame | None = None
    busy: bool = False
    left: anyio.Event = field(default_factory=anyio.Event)
    """Set when a reset takes the desktop away, which may be kept for a while yet; then a new one."""


@dataclass(frozen=True)
class _Playing:
    """The episode that a step plays. A reset may take it away, or the desktop's death end it, between any two awaits
    of the step, and only then is the step cancelled: until then it must not touch what took the episode's place."""

    slot: _Slot
    episode_id: str
    dialogue: Dialogue
    play: Play

    @property
    def episode(self) -> Episode:
        """Raises DesktopLost when it is over."""
        now = self.slot.episode
        if now is None or now.id != self.episode_id or self.slot.state is not EnvState.PLAYING:
            raise DesktopLost(
                f"The desktop of env {self.slot.id} died or was taken away in the middle of the step.",
                hint="Reset the env. What was sent to the guest may have run; it is not sent again.",
            )
        return now

    def change(self, **changes: object) -> Episode:
        self.slot.episode = self.episode.model_copy(update=changes)
        return self.slot.episode


@dataclass(frozen=True, slots=True)
class Sent:
    """How a step was sent. `key` is its idempotency key, `fingerprint` the same for steps that ask for the same."""

    fingerprint: str = ""
    key: str = ""


class Envs:
    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        events: EventLog,
        store: Store,
        template: PromptTemplate,
        assets: Assets,
        bundles: Bundles,
        session: aiohttp.ClientSession,
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._events = events
        self._store = store
        self._template = template
        self._assets = assets
        self._bundles = bundles
        self._session = session
        self._slots = [_Slot(number) for number in range(settings.envs)]
        self._step_ended = anyio.Event()
        self.on_began: Callable[[Task], None] = lambda task: None
        """Told of the task of each episode that begins."""
        self.doubt: Callable[[Task], Awaitable[str]] = _no_doubt
        """Asked what is to be said against an episode of a task that is about to begin; "" is nothing."""
        self.on_idle: Callable[[], None] = lambda: None
        """Told when an env may have become idle."""
        fleet.on_lost = self._desktop_lost

    # -- looking ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._slots)

    def env(self, env: int) -> Env:
        slot = self._slot(env)
        desktop = self._fleet.get(slot.desktop_id) if slot.desktop_id else None
        return Env(id=env, state=slot.state, detail=slot.detail, desktop=desktop, episode=slot.episode)

    def dialogue(self, env: int) -> Dialogue | None:
        """The messages of the current episode; None when there is none."""
        return self._slot(env).dialogue

    def is_idle(self, env: int) -> bool:
        """Whether nobody plays on it: no reset, no call in the middle, no episode that could go on."""
        slot = self._slot(env)
        over = slot.episode is None or slot.episode.done or _overdue(slot.episode)
        return over and not slot.busy and slot.state is not EnvState.RESETTING

    def is_untouched(self, env: int, episode_id: str) -> bool:
        """Whether the env is where that episode began: nothing was done in it, and nothing is."""
        slot = self._slot(env)
        if slot.state is not EnvState.PLAYING or slot.busy or slot.episode is None or slot.episode.id != episode_id:
            return False
        return not slot.episode.done and not slot.episode.steps

    async def idle(self) -> None:
        """Return when no step runs."""
        while any(slot.busy for slot in self._slots):
            await self._step_ended.wait()

    async def screenshot(self, env: int) -> bytes:
        """The screen as it is now, PNG bytes. Raises NoEpisode, EnvBusy while resetting, DesktopLost,
        GuestUnreachable."""
        desktop = self._desktop(self._with_desktop(env))
        source = self._sight(desktop)
        # A machine shows its screen also while it stands still.
        picture, _ = await self._while_alive(desktop.id, lambda: self._picture(source), wake=source.via == "guest")
        return picture

    def played(self, env: int) -> tuple[Episode, Play]:
        """The episode that can be judged, also when it ended with its desktop. Raises NoEpisode, EnvBusy while
        resetting."""
        slot = self._slot(env)
        if slot.state is not EnvState.LOST:
            self._with_desktop(env)
        if slot.episode is None or slot.play is None:
            raise NoEpisode(f"Env {env} has no episode{_why(slot)}.", hint="Reset it first.")
        return slot.episode, slot.play

    @asynccontextmanager
    async def judging(self, episode: Episode) -> AsyncIterator[Judged]:
        """The env's desktop, for as long as `episode` is judged: waits for the step that runs, ends the episode, and
        lets no other step begin. Raises DesktopLost when the desktop is gone or a reset has taken it."""
        slot = self._slot(episode.env)
        await self.between_steps(slot.id)
        with self._taken(slot, "its evaluation"):
            if slot.episode is None or slot.episode.id != episode.id:
                raise _lost(episode.desktop_id)
            self._with_desktop(slot.id)
            self._end_episode(slot, EndReason.EVALUATED)
            yield Judged(slot.episode, self._desktop(slot), self)

    async def between_steps(self, env: int) -> None:
        """Return when no call is in the middle there."""
        slot = self._slot(env)
        while slot.busy:
            await self._step_ended.wait()

    def has_verdict(self, episode: Episode) -> None:
        """Its verdict, with a number or without, is all that was to be expected of it: nothing more is played."""
        slot = self._slot(episode.env)
        if slot.episode is not None and slot.play is not None and slot.episode.id == episode.id:
            slot.play.judged = True
            self._end_episode(slot, EndReason.EVALUATED)

    async def is_being_judged(self, judged: Judged) -> None:
        """From here on something may be done to the desktop for its verdict, which is not done a second time."""
        slot = self._slot(judged.episode.env)
        if slot.play is not None and slot.episode is not None and slot.episode.id == judged.episode.id:
            self._store.put(Kind.PLAYS, judged.episode.id, slot.play.kept(judging=True))
            await self._store.settle()

    async def on_desktop(self, env: int, work: Callable[[Desktop], Awaitable[T]]) -> T:
        """The result of `work` on the desktop that `env` plays on now, beside whatever else is done there; meanwhile
        its processors run. Raises NoEpisode, EnvBusy while resetting, and DesktopLost as soon as the desktop dies or
        a reset takes it away."""
        slot = self._with_desktop(env)
        desktop = self._desktop(slot)
        return await self._while_alive(desktop.id, lambda: work(desktop), left=slot.left)

    def context(self, desktop: Desktop, record: Callable[[SetupRecord], None]) -> Context:
        """What steps of a set-up or a post-configuration need to run on `desktop`."""
        return Context(
            guest=self._fleet.guest(desktop),
            cdp=self._fleet.cdp(desktop),
            assets=self._assets,
            settings=self._settings,
            session=self._session,
            record=record,
            screen=self._settings.screen,
        )

    # -- resets, called by the queue ----------------------------------------------------------------------------

    def vacate(self, env: int, job: Job) -> str | None:
        slot = self._slot(env)
        desktop_id = slot.desktop_id
        self._end_episode(slot, EndReason.REPLACED)
        slot.state, slot.detail, slot.desktop_id = EnvState.RESETTING, f"{job.id} is being served", None
        slot.left.set()
        slot.left = anyio.Event()
        return desktop_id

    async def begin(self, job: Job, reset: Reset, desktop: Desktop, progress: Progress) -> Beginning:
        assert job.env is not None
        episode_id, task = f"ep-{secrets.token_hex(6)}", reset.task
        about = {
            "episode_id": episode_id,
            "env": job.env,
            "job_id": job.id,
            "task_id": task.id,
            "task_hash": task.hash,
            "desktop_id": desktop.id,
            "provider": desktop.provider,
            "screen": self._settings.screen,
        }
        bundle = await self._bundles.begin(episode_id, task=dict(task.raw), about=about)
        try:
            began = await self._begin(job, reset, desktop, progress, episode_id, bundle)
        except BaseException as error:
            if isinstance(error, EnvdError):
                error.facts.setdefault("bundle", f"/v1/episodes/{episode_id}/bundle")
                await bundle.about({"error": error.problem().model_dump(mode="json")})
            with anyio.CancelScope(shield=True):
                await bundle.guest_log(await self._fleet.log_tail(desktop.id))
            bundle.close(outcome="no episode began")
            raise
        return began

    async def _begin(
        self, job: Job, reset: Reset, desktop: Desktop, progress: Progress, episode_id: str, bundle: Bundle
    ) -> Beginning:
        assert job.env is not None
        slot, task = self._slot(job.env), reset.task
        records: list[SetupRecord] = []
        warnings: list[str] = []
        browser = [""]

        def record(one: SetupRecord) -> None:
            records.append(one)
            progress.setup(one)

        context = self.context(desktop, record)
        context.note = progress.note

        async def prepare() -> tuple[bytes, Settled, tuple[int, int]]:
            warnings.extend(await self._prepare_proxy(task, context))
            await run_steps(task.steps, context)
            progress.phase("observe")
            try:
                browser[0] = str((await context.cdp.version())["Browser"])[:100]
            except EnvdError:
                pass  # there are tasks that begin without Chrome
            return await self.at_rest(desktop, at_least=self._settings.settle_seconds)

        try:
            picture, settled, size = await self._while_alive(desktop.id, prepare)
        finally:
            await bundle.setup(records)
        warnings += warnings_of(records, "config")
        if not settled.still:
            warnings.append(f"the screen was still changing when it was first looked at, after {settled.seconds:.1f} s")
        told = tuple(warnings)
        if doubt := await self.doubt(task):
            # Not the episode's own: it may be over by the time of the verdict.
            told += (doubt,)
        await bundle.frame(0, picture)
        await bundle.about({"warnings": told, "settled": settled.model_dump(mode="json")})
        await bundle.flushed()
        # It may have died after its last answer and before this line, when nothing tied it to the env yet. From here
        # on nothing is awaited until it is.
        now = self._fleet.get(desktop.id)
        if now is None or now.state is not DesktopState.IN_USE:
            raise _lost(desktop.id)
        counts = reset.counts or self._settings.counts
        timeout = reset.episode_timeout_s or self._settings.episode_timeout
        began_at = time.time()
        episode = Episode(
            id=episode_id,
            env=slot.id,
            desktop_id=desktop.id,
            task_id=job.task_id,
            instruction=task.instruction[:INSTRUCTION_KEPT],
            started_at=began_at,
            max_steps=reset.max_steps or self._settings.max_steps,
            counts=counts,
            deadline_at=began_at + timeout if timeout else None,
            screen=size,
            reset_path=job.reset_path or ResetPath.COLD,
        )
        play = Play(job.id, task, bundle, context.outputs, tuple(warnings), browser[0], context.proxied, settled)
        play.last_seen = picture, time.monotonic()
        self._tie(slot, episode, play)
        assert slot.dialogue is not None
        slot.dialogue.saw(picture)
        slot.desktop_id, slot.state, slot.detail = desktop.id, EnvState.PLAYING, ""
        self._store.put(Kind.PLAYS, episode.id, play.kept())
        self._keep(slot)
        self._tell(slot, "episode", state="began", episode_id=episode.id, warnings=told, message="episode began")
        self.on_began(task)
        return Beginning(episode.id, told, settled)

    def _tie(self, slot: _Slot, episode: Episode, play: Play) -> None:
        """The episode to its env, with nothing seen yet."""
        pixels = {"min_pixels": self._settings.min_pixels, "max_pixels": self._settings.max_pixels}
        slot.dialogue = Dialogue(play.task.instruction, template=self._template, **pixels)
        slot.frame = Frame(*episode.screen, **pixels)
        slot.episode, slot.play = episode, play

    def _keep(self, slot: _Slot) -> None:
        self._store.put(Kind.EPISODES, str(slot.id), slot.episode)

    async def _prepare_proxy(self, task: Task, context: Context) -> list[str]:
        """What a task's own `proxy` flag asks for, before its steps. Warnings."""
        if not task.proxy:
            return []
        if self._settings.proxy_file is None:
            return ["the task asks for a proxy and ENVD_PROXY_FILE is not set: it runs without one"]
        try:
            await proxy(context, {})
        except EnvdError as error:
            raise SetupFailed(
                f"The proxy that the task asks for could not be made: {error.detail}", behind=error, step_type="proxy"
            ) from error
        return []

    async def at_rest(
        self, desktop: Desktop, at_least: float = 0.0, before: tuple[bytes, float] | None = None
    ) -> tuple[bytes, Settled, tuple[int, int]]:
        """The screen once it has settled (see `settle`), how that went, and the size of the screen."""
        limits = {"quiet": self._settings.settle_quiet, "limit": self._settings.settle_limit}
        source = self._sight(desktop)
        picture, settled = await settle(source.look, at_least=at_least, before=before, **limits)
        return picture, settled, _size(picture, source)

    def abandon(self, env: int, job: Job) -> None:
        # It may be of an env that an earlier life served.
        slot = self._slots[env] if env < len(self._slots) else None
        if slot is not None and slot.state is EnvState.RESETTING:
            slot.state, slot.detail, slot.desktop_id = EnvState.EMPTY, f"{job.id} ended {job.state}", None

    def recycle(self, env: int, why: str) -> None:
        """End the env's episode, and what runs in it, and take its desktop away, as a reset does. An env that is being
        reset has neither."""
        slot = self._slot(env)
        if slot.state in (EnvState.EMPTY, EnvState.RESETTING):
            return
        if slot.play is not None:
            slot.play.why = why
        desktop_id = slot.desktop_id
        self._end_episode(slot, EndReason.LEASE_OVER)
        slot.state, slot.detail, slot.desktop_id = EnvState.EMPTY, why, None
        if desktop_id is not None:
            self._fleet.retire(desktop_id, why)

    def began(self, job: Job) -> Beginning | None:
        slot = self._slots[job.env] if job.env is not None and job.env < len(self._slots) else None
        if slot is None or slot.play is None or slot.episode is None or slot.play.job_id != job.id:
            return None
        return Beginning(slot.episode.id, slot.play.warnings, slot.play.settled)

    # -- taking up what an earlier life left ---------------------------------------------------------------------

    async def plays_on(self) -> set[str]:
        """Ids of the desktops that episodes of an earlier life are on."""
        kept = await self._store.all(Kind.EPISODES, Episode)
        return {episode.desktop_id for episode in kept.values() if episode.env < len(self._slots)}

    async def recover(self, read: Callable[[Mapping[str, Any]], Task | None]) -> None:
        """Take up every episode, where its desktop is there still: the next step goes on with it. `read` makes a task
        of its file, or None."""
        kept = await self._store.all(Kind.EPISODES, Episode)
        plays = await self._store.all(Kind.PLAYS, KeptPlay)
        # Side by side: a guest that hangs holds up the start once, not once for each env.
        async with anyio.create_task_group() as tasks:
            await self._take_up_all(kept, plays, read, tasks)
        for episode_id in plays:
            self._store.put(Kind.PLAYS, episode_id, None)

    async def _take_up_all(
        self,
        kept: Mapping[str, Episode],
        plays: dict[str, KeptPlay],
        read: Callable[[Mapping[str, Any]], Task | None],
        tasks: TaskGroup,
    ) -> None:
        for number, episode in kept.items():
            play = plays.pop(episode.id, None)
            task = read(play.task) if play is not None else None
            bundle = await self._bundles.resume(episode.id)
            if episode.env >= len(self._slots) or play is None or task is None or bundle is None:
                logger.warning("an episode cannot be taken up", episode_id=episode.id, env=number)
                self._store.put(Kind.EPISODES, number, None)
                self._store.put(Kind.PLAYS, episode.id, None)
                self._fleet.retire(episode.desktop_id, "its episode cannot be taken up")
                if bundle is not None:
                    bundle.close()
                if episode.env < len(self._slots):
                    self._slots[episode.env].detail = f"{episode.id} could not be taken up after a restart"
                continue
            tasks.start_soon(self._take_up, self._slots[episode.env], episode, play, task, bundle)

    async def _take_up(self, slot: _Slot, episode: Episode, kept: KeptPlay, task: Task, bundle: Bundle) -> None:
        play = Play(kept.job_id, task, bundle, kept.unpacked(), kept.warnings, kept.browser, kept.proxied, kept.settled)
        play.interrupted = kept.judging
        self._tie(slot, episode, play)
        slot.desktop_id = episode.desktop_id
        steps = await self._store.all(Kind.STEPS, KeptStep, prefix=f"{episode.id}/")
        cut_short = [step for step in steps.values() if step.result is None and step.problem is None]
        desktop = self._fleet.get(episode.desktop_id)
        why = "it did not outlive the daemon"
        if desktop is not None and desktop.state is DesktopState.IN_USE:
            # From here on it is told when the desktop dies.
            slot.state = EnvState.PLAYING
            whole = await self._remember(slot, list(steps.values()))
            if whole and slot.state is EnvState.PLAYING:
                self._tell(slot, "episode", state="resumed", message="episode goes on after a restart")
                for step in cut_short:
                    await self._end_cut_short(slot, desktop, step)
                return
            why = slot.detail if whole else "what was said and seen in its episode is not kept any more"
            self._fleet.retire(episode.desktop_id, why)
        slot.state, slot.detail = EnvState.LOST, why
        self._end_episode(slot, EndReason.LOST)
        for step in cut_short:
            self._keep_step(episode.id, step, problem=_lost(episode.desktop_id))

    async def _remember(self, slot: _Slot, steps: Sequence[KeptStep]) -> bool:
        """The dialogue as it was, from what was said and the pictures in the bundle. False if some of it is missing."""
        assert slot.dialogue is not None
        assert slot.episode is not None
        first = await self._bundles.frame(slot.episode.id, 0)
        # Steps are forgotten after a day.
        if first is None or not {step.number for step in steps}.issuperset(range(1, slot.episode.steps + 1)):
            return False
        slot.dialogue.saw(first)
        for step in steps:
            if step.turns is not None:
                slot.dialogue.said(step.said)
            if step.shown:
                picture = await self._bundles.frame(slot.episode.id, step.number)
                if picture is None:
                    return False
                slot.dialogue.saw(picture)
            if step.turns not in (None, len(slot.dialogue)):
                return False
        return True

    async def _end_cut_short(self, slot: _Slot, desktop: Desktop, step: KeptStep) -> None:
        """A step that was begun when the daemon ended. What was sent may have run; it is not sent again."""
        assert slot.episode is not None
        assert slot.dialogue is not None
        assert slot.play is not None
        playing = _Playing(slot, slot.episode.id, slot.dialogue, slot.play)
        actions = list(step.actions) if step.actions is not None else None
        request = StepRequest.model_construct(prediction=step.prediction, actions=actions, include_screenshot=False)
        # Counted already, if it got so far.
        slot.episode = slot.episode.model_copy(update={"steps": step.number - 1})
        with self._taken(slot, "a step"):
            try:
                await self._while_alive(desktop.id, lambda: self._step(playing, desktop, request, step, act=_cut_short))
            except EnvdError as error:
                logger.warning("what a step left cannot be seen", env=slot.id, step=step.number, error=error.detail)
                self._failed(playing, step, error)

    # -- steps --------------------------------------------------------------------------------------------------

    async def step(self, env: int, request: StepRequest, sent: Sent = Sent()) -> StepResult:
        """Run what the model said, wait, and look. Input is sent once, whatever happens.

        A program that fails in the guest is reported in its `ActionResult`, and the episode goes on. A step that says
        its number and comes again is answered as it was. Raises EpisodeOver, EnvBusy, NoEpisode, DesktopLost,
        StepRepeated, StepGap; GuestUnreachable when no picture can be had afterwards (its facts carry the action
        results).
        """
        slot = self._slot(env)
        if request.step is not None and slot.episode is not None and request.step <= slot.episode.steps:
            return await self._again(slot.episode, request.step, request, sent)
        slot = self._with_desktop(env)
        if slot.episode is None or slot.dialogue is None or slot.play is None:
            raise NoEpisode(f"Env {env} has no episode.", hint="Reset it first.")
        if not slot.episode.done and not slot.busy and _overdue(slot.episode):
            self._end_episode(slot, EndReason.DEADLINE)
        if slot.episode.done:
            raise _over(slot.episode, slot.play)
        number = slot.episode.steps + 1
        if request.step is not None and request.step > number:
            raise StepGap(
                f"Step {request.step} was sent, and the episode of env {env} has come to step {slot.episode.steps}.",
                hint="Send the steps in their order, each once the one before was answered.",
                expected=number,
            )
        playing = _Playing(slot, slot.episode.id, slot.dialogue, slot.play)
        with self._taken(slot, "a step"):
            desktop = self._desktop(slot)
            step = KeptStep(
                number=number,
                fingerprint=sent.fingerprint,
                prediction=request.prediction,
                actions=tuple(request.actions) if request.actions is not None else None,
            )
            self._store.put(Kind.STEPS, KeptStep.id(playing.episode_id, number), step)
            if sent.key:
                answer = KeptAnswer.of_step(sent.fingerprint, playing.episode_id, number)
                self._store.put(Kind.ANSWERS, sent.key, answer)
            # Before any of it is sent: the next life of the daemon must not send it a second time.
            await self._store.settle()
            begun = False

            async def begin() -> StepResult:
                nonlocal begun
                begun = True
                return await self._step(playing, desktop, request, step)

            try:
                return await self._while_alive(desktop.id, begin)
            except EnvdError as error:
                if begun:
                    self._failed(playing, step, error)
                else:
                    self._not_begun(playing, step, sent)
                raise
            except Exception as mistake:
                self._failed(playing, step, InternalError(f"The daemon made a mistake: {mistake!r}"))
                raise

    def _not_begun(self, playing: _Playing, step: KeptStep, sent: Sent) -> None:
        """Nothing was sent, since the desktop could not be woken or was gone: whoever sends it again has it done."""
        self._store.put(Kind.STEPS, KeptStep.id(playing.episode_id, step.number), None)
        if sent.key:
            self._store.put(Kind.ANSWERS, sent.key, None)

    def _failed(self, playing: _Playing, step: KeptStep, error: EnvdError) -> None:
        """Its number is used up, however early it failed: whoever sends it again is answered the same."""
        self._keep_step(playing.episode_id, step, problem=error)
        slot = playing.slot
        if slot.episode is not None and slot.episode.id == playing.episode_id:
            steps = max(slot.episode.steps, step.number)
            slot.episode = slot.episode.model_copy(update={"steps": steps})
            self._keep(slot)

    def _keep_step(
        self, episode_id: str, step: KeptStep, *, problem: EnvdError | None = None, **came_of_it: object
    ) -> None:
        told = problem.problem() if problem else None
        kept = step.model_copy(update={"problem": told, **came_of_it})
        self._store.put(Kind.STEPS, KeptStep.id(episode_id, step.number), kept)

    async def _again(self, episode: Episode, number: int, request: StepRequest, sent: Sent) -> StepResult:
        """A step that says which one it is, and was begun already."""
        kept = await self._store.get(Kind.STEPS, KeptStep.id(episode.id, number), KeptStep)
        if kept is None or kept.fingerprint != sent.fingerprint:
            raise StepRepeated(
                f"Step {number} of the episode of env {episode.env} was done already, and was another one.",
                hint="Number the steps of an episode from 1, without a gap.",
                expected=episode.steps + 1,
            )
        if kept.result is None and kept.problem is None:
            raise EnvBusy(
                f"Env {episode.env} is in the middle of step {number}.",
                hint="Send it again in a moment.",
                retry_after=1,
            )
        return await self.answered(episode.id, number, with_picture=request.include_screenshot)

    async def answered(self, episode_id: str, number: int, *, with_picture: bool) -> StepResult:
        """A step as it was answered, with its picture if that is kept still. The guest is not asked. Raises what it
        failed with; NotFound when it is no longer kept."""
        kept = await self._store.get(Kind.STEPS, KeptStep.id(episode_id, number), KeptStep)
        if kept is not None and kept.problem is not None:
            raise from_problem(kept.problem)
        if kept is None or kept.result is None:
            raise NotFound(f"What step {number} of {episode_id} was answered is not kept.")
        if not (with_picture and kept.pictured):
            return kept.result
        picture = await self._bundles.frame(episode_id, number)
        return kept.result.model_copy(update={"screenshot": base64.b64encode(picture).decode() if picture else None})

    async def messages_after(self, result: StepResult) -> bytes | None:
        """The messages that a model is shown after a step, as JSON; None when the env plays another episode by now."""
        slot = self._slot(result.env)
        if slot.episode is None or slot.dialogue is None or slot.episode.id != result.episode_id:
            return None
        if slot.episode.steps == result.step:
            return slot.dialogue.wire_json()
        # It was asked for again, after steps that came later.
        kept = await self._store.get(Kind.STEPS, KeptStep.id(result.episode_id, result.step), KeptStep)
        return slot.dialogue.wire_json(kept.turns if kept else None)

    async def _step(
        self, playing: _Playing, desktop: Desktop, request: StepRequest, kept: KeptStep, act: Act = act
    ) -> StepResult:
        began = time.monotonic()
        guest, console, source = self._fleet.guest(desktop), self._fleet.console(desktop), self._sight(desktop)
        problem, format_reward = "", 0.0
        end: EndReason | None = None
        try:
            assert playing.slot.frame is not None
            planned = plan(request, playing.slot.frame)
        except PredictionError as error:
            planned, problem, format_reward, end = (), str(error), -1.0, EndReason.UNPARSABLE
        results: list[ActionResult] = []
        pause = self._settings.action_pause if request.pause_s is None else request.pause_s
        for step in planned:
            results.append(
                await act(
                    guest,
                    step,
                    pause=pause,
                    wait=self._settings.wait_seconds,
                    console=console,
                    screen=playing.episode.screen,
                )
            )
            end = self._count_action(playing, step)
            if end or results[-1].outcome is ActionOutcome.UNKNOWN:
                break
        acted = time.monotonic()
        end = self._count_step(playing, end)
        if any(result.outcome is not ActionOutcome.SPECIAL for result in results):
            playing.play.last_seen = None
        lost = [
            result for result in results if result.returncode is None and result.outcome is not ActionOutcome.SPECIAL
        ]
        if lost:
            words = (
                f"step {playing.episode.steps}: what became of an action is {lost[0].outcome}: {lost[0].stderr[:300]}"
            )
            playing.play.warnings += (words,)
        said = request.prediction if request.prediction is not None else "\n\n".join(request.actions or ())
        try:
            picture = await self._look(source, results) if end is None or request.include_screenshot else None
        except EnvdError as error:
            ran = error.facts.get("actions", [])
            await playing.play.bundle.step({"step": playing.episode.steps, "actions": ran, "error": str(error)}, said)
            raise
        episode = playing.episode
        playing.dialogue.said(said)
        if not problem and self._settings.format_reward == "shaped":
            format_reward = shaped_reward(planned, seen=picture is not None and end is None)
        if picture is not None and end is None:
            playing.dialogue.saw(picture)
        result = StepResult(
            env=episode.env,
            episode_id=episode.id,
            step=episode.steps,
            done=episode.done,
            end_reason=episode.end_reason,
            format_reward=format_reward,
            actions=tuple(results),
            problem=problem,
            seconds={"act": round(acted - began, 4), "observe": round(time.monotonic() - acted, 4)},
            screenshot_via=source.via if picture is not None else None,
            screenshot=base64.b64encode(picture).decode() if picture and request.include_screenshot else None,
        )
        if picture is not None:
            if playing.play.last_seen is None:
                playing.play.last_seen = picture, time.monotonic()
            await playing.play.bundle.frame(result.step, picture)
        await playing.play.bundle.step(result, said)
        # The next life of the daemon shows the model the same pictures.
        await playing.play.bundle.flushed()
        self._keep_step(
            playing.episode_id,
            kept,
            result=result.model_copy(update={"screenshot": None}),
            pictured=picture is not None,
            shown=picture is not None and end is None,
            turns=len(playing.dialogue),
        )
        if lost:
            self._store.put(Kind.PLAYS, playing.episode_id, playing.play.kept())
        self._keep(playing.slot)
        self._tell(playing.slot, "step", **as_told(result), message="step")
        if end is not None:
            self._tell_end(playing.slot)
        return result

    def _count_action(self, playing: _Playing, step: Step) -> EndReason | None:
        episode = playing.change(actions=playing.episode.actions + 1)
        if step is Special.DONE:
            return EndReason.DONE
        if step is Special.FAIL:
            return EndReason.FAIL
        full = episode.counts == "actions" and episode.actions >= episode.max_steps
        return EndReason.MAX_STEPS if full else None

    def _count_step(self, playing: _Playing, end: EndReason | None) -> EndReason | None:
        episode = playing.change(steps=playing.episode.steps + 1)
        if end is None and episode.counts == "predictions" and episode.steps >= episode.max_steps:
            end = EndReason.MAX_STEPS
        if end is None and _overdue(episode):
            end = EndReason.DEADLINE
        if episode.done:
            # Its verdict was not waited for any longer: what is told of it holds.
            return None
        if end is not None:
            playing.change(done=True, end_reason=end)
        return end

    async def _look(self, source: Sight, results: list[ActionResult]) -> bytes:
        try:
            picture, _ = await self._picture(source)
        except EnvdError as error:
            error.facts["actions"] = [result.model_dump(mode="json") for result in results]
            error.hint = error.hint or "The step's actions are listed with what is known of them; none is sent again."
            raise
        return picture

    @staticmethod
    async def _picture(source: Sight) -> tuple[bytes, tuple[int, int]]:
        """A screenshot and its size: one that cannot be opened is an error, never an observation."""
        picture = await source.look()
        return picture, _size(picture, source)

    # -- one env ------------------------------------------------------------------------------------------------

    def _slot(self, env: int) -> _Slot:
        if not 0 <= env < len(self._slots):
            last = len(self._slots) - 1
            raise UnknownEnv(
                f"There is no env {env}; this daemon serves {'env 0' if last == 0 else f'envs 0 to {last}'}.",
                hint="Start it with a larger ENVD_ENVS to serve more.",
                env=env,
            )
        return self._slots[env]

    def _with_desktop(self, env: int) -> _Slot:
        slot = self._slot(env)
        if slot.state is EnvState.RESETTING:
            raise EnvBusy(f"Env {env} is being reset: {slot.detail}.", hint="Wait for that job.", retry_after=1)
        if slot.state is EnvState.LOST:
            raise DesktopLost(f"The desktop of env {env} is gone: {slot.detail}.", hint="Reset the env.")
        if slot.state is EnvState.EMPTY:
            raise NoEpisode(f"Env {slot.id} has no episode{_why(slot)}.", hint="Reset it first.")
        return slot

    def _desktop(self, slot: _Slot) -> Desktop:
        desktop = self._fleet.get(slot.desktop_id or "")
        if desktop is None or desktop.endpoints is None:
            raise DesktopLost(f"The desktop of env {slot.id} is gone.", hint="Reset the env.")
        return desktop

    def _sight(self, desktop: Desktop) -> Sight:
        return sight(self._fleet.guest(desktop), self._fleet.console(desktop))

    @contextmanager
    def _taken(self, slot: _Slot, what: str) -> Iterator[None]:
        if slot.busy:
            raise EnvBusy(f"Env {slot.id} is in the middle of {what}.", hint="Send one call at a time.", retry_after=1)
        slot.busy = True
        try:
            yield
        finally:
            slot.busy = False
            self._step_ended.set()
            self._step_ended = anyio.Event()
            self.on_idle()

    async def _while_alive(
        self, desktop_id: str, work: Callable[[], Awaitable[T]], *, wake: bool = True, left: anyio.Event | None = None
    ) -> T:
        """The result of `work`, or DesktopLost as soon as the desktop dies or is taken away, or as it is `left`.
        Meanwhile its processors run, unless `wake` is False."""
        outcome: list[T] = []
        failure: EnvdError | None = None
        async with anyio.create_task_group() as race:

            async def end_after(wait: Callable[[], Awaitable[object]]) -> None:
                await wait()
                race.cancel_scope.cancel()

            race.start_soon(end_after, lambda: self._fleet.lost(desktop_id))
            if left is not None:
                race.start_soon(end_after, left.wait)
            try:
                async with self._fleet.awake(desktop_id) if wake else nullcontext():
                    outcome.append(await work())
            except EnvdError as error:
                failure = error
            race.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if not outcome:
            raise _lost(desktop_id)
        return outcome[0]

    def _desktop_lost(self, desktop: Desktop, reason: str) -> None:
        for slot in self._slots:
            if slot.desktop_id == desktop.id:
                self._end_episode(slot, EndReason.LOST)
                slot.state, slot.detail = EnvState.LOST, reason

    def _end_episode(self, slot: _Slot, reason: EndReason) -> None:
        if slot.episode is not None and not slot.episode.done:
            slot.episode = slot.episode.model_copy(update={"done": True, "end_reason": reason})
            self._keep(slot)
            self._tell_end(slot)
            self.on_idle()
        if reason in (EndReason.REPLACED, EndReason.LEASE_OVER):
            if slot.episode is not None:
                self._store.put(Kind.EPISODES, str(slot.id), None)
                self._store.put(Kind.PLAYS, slot.episode.id, None)
            if slot.play is not None:
                slot.play.replaced = True
                slot.play.bundle.close()
            slot.episode = slot.dialogue = slot.play = slot.frame = None

    def _tell_end(self, slot: _Slot) -> None:
        assert slot.episode is not None
        ended = slot.episode
        self._tell(
            slot, "episode", state="ended", end_reason=ended.end_reason, steps=ended.steps, message="episode ended"
        )

    def _tell(self, slot: _Slot, kind: str, **data: Any) -> None:
        episode_id = slot.episode.id if slot.episode else None
        self._events.publish(kind, env=slot.id, desktop_id=slot.desktop_id, **{"episode_id": episode_id, **data})


async def _no_doubt(task: Task) -> str:
    return ""


async def _cut_short(guest: Guest, step: Step, **how: object) -> ActionResult:
    """In place of `act`, for what may have been sent when the daemon ended: nothing is done."""
    if isinstance(step, Special):
        return ActionResult(action=step, outcome=ActionOutcome.SPECIAL, seconds=0.0)
    words = "The daemon ended in the middle of the step. What was sent may have run; it is not sent again."
    return ActionResult(action=step.source or step.code, outcome=ActionOutcome.UNKNOWN, stderr=words, seconds=0.0)


def warnings_of(records: list[SetupRecord], where: str) -> list[str]:
    """What was passed over in steps that stand under `where` in the task."""
    passed_over = [record for record in records if record.outcome is SetupOutcome.WARNING]
    return [f"{where}[{record.index}] {record.type}: {record.detail}" for record in passed_over]


def _overdue(episode: Episode) -> bool:
    return episode.deadline_at is not None and time.time() >= episode.deadline_at


def _over(episode: Episode, play: Play) -> EpisodeOver:
    reason = episode.end_reason
    judged = play.judged and reason is not EndReason.EVALUATED
    asked = play.judged or reason is EndReason.EVALUATED
    return EpisodeOver(
        f"The episode of env {episode.env} ended: {reason}{', and it has its verdict' if judged else ''}.",
        hint="Reset the env to play on it again. Asked for again, the verdict is the same."
        if asked
        else "Evaluate it or reset the env.",
        end_reason=reason,
    )


def _why(slot: _Slot) -> str:
    return f" ({slot.detail})" if slot.detail else ""


def _size(picture: bytes, source: Sight) -> tuple[int, int]:
    # Reading the size does not notice that the rest is missing, and decoding all of it takes tens of milliseconds.
    if not picture.endswith(PICTURE_ENDS):
        raise GuestMisbehaved(f"{source.name} answered {len(picture)} bytes that end in the middle of a picture")
    try:
        with Image.open(io.BytesIO(picture), formats=("PNG", "JPEG")) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise GuestMisbehaved(f"{source.name} answered a broken picture: {error}") from error


def _lost(desktop_id: str) -> DesktopLost:
    return DesktopLost(
        f"The desktop {desktop_id} died or was taken away in the middle of the call.",
        hint="Reset the env. What was sent to the guest may have run; it is not sent again.",
        desktop_id=desktop_id,
    )
