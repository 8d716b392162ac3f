"""The clients of the soak: each plays episodes on an env of its own, sends what was not answered again under the same
key, and checks whatever it is told. One that is killed leaves a diary, from which its successor goes on."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import aiohttp
from soak_world import Eyes

AGAIN = frozenset({"draining", "env_busy", "too_many_requests", "deadline_passed", "server_unreachable"})
"""Codes of refusals after which a call is to be sent again."""
STUCK = 120.0
"""Seconds after which a call that is not answered counts as lost."""
KEPT_CALLS = 12

Stage = Literal["reset", "wait", "step", "evaluate", "look"]
Answer = tuple[int, dict[str, Any]]


class Stuck(Exception):
    """A call was not answered, however often it was sent."""


@dataclass
class Ledger:
    """What all clients together sent and were told. `wrong` is what must not be."""

    wrong: list[str] = field(default_factory=list)
    accepted: dict[str, str] = field(default_factory=dict)
    """Task, by job."""
    ended: dict[str, str] = field(default_factory=dict)
    """States that jobs were said to have ended in."""
    texts: dict[str, str] = field(default_factory=dict)
    """What became of each text: sent, ok, unknown, failed, lost."""
    desktop_of: dict[str, str] = field(default_factory=dict)
    """By text."""
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By episode."""
    played_on: set[str] = field(default_factory=set)
    """Desktops."""
    counts: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """Of jobs, steps and verdicts, by code."""


@dataclass(frozen=True)
class Call:
    """One that is kept to be sent again later. `answer` has no picture: that is not kept for ever."""

    path: str
    body: dict[str, Any]
    key: str
    answer: dict[str, Any]


@dataclass
class Diary:
    """All that a client knows. It is written once an answer is there, in one go, so that whoever reads it sends what
    may not have been answered, and nothing else."""

    env: int
    random: Random
    stage: Stage = "reset"
    episode: int = 0
    job_id: str = ""
    version: int = 0
    began_at: float = 0.0
    episode_id: str = ""
    desktop_id: str = ""
    steps: int = 0
    step: int = 0
    gave_up: bool | None = False
    """None: it is not known whether the desktop took it."""
    lost: str = ""
    """The code with which a step failed."""
    asked_at: float = 0.0
    """When it was first asked for the verdict (Unix seconds)."""
    before: deque[Call] = field(default_factory=lambda: deque(maxlen=KEPT_CALLS))
    owed: int = 0
    """Episodes that it is to play before it may rest."""

    @property
    def name(self) -> str:
        return f"e{self.env}n{self.episode}"


class Clients:
    """A task for each env. `rest` has them end the episode that they play, play one more undisturbed, and wait."""

    def __init__(self, number: int, url: str, eyes: Eyes, random: Random) -> None:
        self.ledger = Ledger()
        self.diaries = [Diary(env, Random(random.random())) for env in range(number)]
        self._url = url
        self._eyes = eyes
        self._random = random
        self._playing = asyncio.Event()
        self._playing.set()
        self._resting: set[int] = set()
        self._moved = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Clients:
        timeout = aiohttp.ClientTimeout(total=40)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        self._tasks = [asyncio.create_task(self._play(diary)) for diary in self.diaries]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()

    async def kill_one(self) -> None:
        """In the middle of whatever it does; another goes on from its diary."""
        env = self._random.randrange(len(self._tasks))
        task = self._tasks[env]
        task.cancel()
        await asyncio.wait([task])
        self._tasks[env] = asyncio.create_task(self._play(self.diaries[env]))

    async def rest(self, episodes: int = 1) -> None:
        """Return once each has ended its episode and played so many more."""
        for diary in self.diaries:
            diary.owed = episodes
        self._playing.clear()
        async with asyncio.timeout(60 + 4 * len(self.diaries)):
            while len(self._resting) < len(self.diaries):
                self._moved.clear()
                await self._moved.wait()
                self.raise_for_broken()

    def go_on(self) -> None:
        self._playing.set()

    def raise_for_broken(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def _play(self, diary: Diary) -> None:
        stages = {
            "reset": self._reset,
            "wait": self._wait,
            "step": self._step,
            "evaluate": self._evaluate,
            "look": self._look,
        }
        try:
            while True:
                if diary.stage == "reset" and not self._playing.is_set():
                    if diary.owed == 0:
                        await self._pause(diary)
                    diary.owed = max(0, diary.owed - 1)
                try:
                    await stages[diary.stage](diary)
                except Stuck as stuck:
                    self.ledger.wrong.append(str(stuck))
                    self._give_up(diary)
        finally:
            self._moved.set()

    async def _pause(self, diary: Diary) -> None:
        self._resting.add(diary.env)
        self._moved.set()
        try:
            await self._playing.wait()
        finally:
            self._resting.discard(diary.env)

    def _give_up(self, diary: Diary) -> None:
        """On with another episode."""
        diary.stage, diary.episode = "reset", diary.episode + 1

    # -- what a client does -------------------------------------------------------------------------------------

    async def _reset(self, diary: Diary) -> None:
        path, body, key = f"/v1/envs/{diary.env}/reset", {"task": _task(diary.name)}, f"reset-{diary.name}"
        status, job = await self._post(diary, path, body, key)
        if status != 202:
            self.ledger.wrong.append(f"a reset was answered {status}: {job}")
            self._give_up(diary)
            return
        if job["task_id"] != diary.name:
            self.ledger.wrong.append(f"the reset of {diary.name} was answered with {job['id']} of {job['task_id']}")
        self.ledger.accepted[job["id"]] = diary.name
        diary.before.append(Call(path, body, key, {"id": job["id"]}))
        diary.stage, diary.job_id, diary.version = "wait", job["id"], 0
        diary.began_at = job["created_at"]

    async def _wait(self, diary: Diary) -> None:
        query = {"wait": "20", "after": str(diary.version)}
        status, job = await self._call(diary, "GET", f"/v1/jobs/{diary.job_id}", query=query)
        if status != 200:
            self.ledger.wrong.append(f"{diary.job_id} was accepted, and is answered {status}: {job}")
            self._give_up(diary)
            return
        # A version that was never written may have been told of; the next life may begin again below it.
        diary.version = job["version"]
        if job["ended_at"] is None:
            return
        told = self.ledger.ended.setdefault(job["id"], job["state"])
        if told != job["state"]:
            self.ledger.wrong.append(f"{job['id']} had ended {told}, and now {job['state']}")
        self.ledger.counts["restarts seen by jobs"] += job["restarts"]
        if job["state"] != "succeeded":
            self._must_have_a_cause(f"{job['id']} of {diary.name}", job["error"] or {}, job, job["desktop_id"])
            self._give_up(diary)
            return
        diary.episode_id, diary.desktop_id = job["episode_id"], job["desktop_id"]
        if diary.desktop_id in self.ledger.played_on:
            self.ledger.wrong.append(f"{diary.desktop_id} was given to a second episode, {diary.episode_id}")
        self.ledger.played_on.add(diary.desktop_id)
        diary.stage, diary.steps, diary.step = "step", diary.random.randint(3, 6), 0
        diary.gave_up, diary.lost, diary.asked_at = False, "", 0.0

    async def _step(self, diary: Diary) -> None:
        number = diary.step + 1
        texts, body = self._what_to_type(diary, number)
        for text in texts:
            self.ledger.texts.setdefault(text, "sent")
            self.ledger.desktop_of[text] = diary.desktop_id
        path, key = f"/v1/envs/{diary.env}/step", f"step-{diary.name}-{number}"
        status, result = await self._post(diary, path, body, key)
        self.ledger.counts["steps"] += 1
        if status != 200:
            self._step_failed(diary, number, texts, result)
        elif (result["episode_id"], result["step"]) != (diary.episode_id, number):
            self.ledger.wrong.append(
                f"step {number} of {diary.episode_id} was answered as {result['step']} of {result['episode_id']}"
            )
        else:
            for text, action in zip(texts, result["actions"], strict=False):
                self.ledger.texts[text] = action["outcome"]
                self.ledger.counts[f"actions {action['outcome']}"] += 1
            diary.before.append(Call(path, body, key, _without_picture(result)))
            if "FAIL" in body["actions"]:
                said = [action for action in result["actions"] if action["action"] == "FAIL"]
                diary.gave_up = bool(said) and result["end_reason"] == "fail"
        done = number >= diary.steps or bool(diary.lost) or diary.gave_up
        diary.step, diary.stage = number, "evaluate" if done else "step"
        if not done and diary.random.random() < 0.15:
            await self._again(diary)

    def _what_to_type(self, diary: Diary, number: int) -> tuple[list[str], dict[str, Any]]:
        """The same whoever asks: it depends on the diary alone."""
        chosen = Random(f"{diary.name}/{number}/{diary.job_id}")
        texts = [f"{diary.name}s{number}{letter};" for letter in ("a", "b")[: chosen.randint(1, 2)]]
        actions = [f"pyautogui.write({text!r})" for text in texts]
        if number == diary.steps and chosen.random() < 0.5:
            actions.append("FAIL")
        # In the pause the daemon may die, when what was typed is there already and the step has not ended.
        pause = round(chosen.uniform(0, 0.3), 3)
        body: dict[str, Any] = {"actions": actions, "pause_s": pause, "include_screenshot": chosen.random() < 0.3}
        if diary.env % 2:
            body["step"] = number
        return texts, body

    def _step_failed(self, diary: Diary, number: int, texts: list[str], problem: dict[str, Any]) -> None:
        diary.lost = str(problem.get("code"))
        for text in texts:
            self.ledger.texts[text] = "lost"
        diary.gave_up = None
        self._must_have_a_cause(f"step {number} of {diary.episode_id}", problem, None, diary.desktop_id, diary.began_at)

    async def _evaluate(self, diary: Diary) -> None:
        path, key = f"/v1/envs/{diary.env}/evaluate", f"evaluate-{diary.name}"
        diary.asked_at = diary.asked_at or time.time()
        status, verdict = await self._post(diary, path, {}, key)
        if status != 200:
            self.ledger.wrong.append(f"the evaluation of {diary.episode_id} was answered {status}: {verdict}")
            self._give_up(diary)
            return
        self._judge(diary, verdict)
        diary.before.append(Call(path, {}, key, verdict))
        diary.stage = "look"

    def _judge(self, diary: Diary, verdict: dict[str, Any]) -> None:
        what = f"the verdict of {diary.episode_id}"
        if verdict["episode_id"] != diary.episode_id:
            self.ledger.wrong.append(f"{what} is of {verdict['episode_id']}")
        known = self.ledger.verdicts.setdefault(diary.episode_id, verdict)
        if known != verdict:
            self.ledger.wrong.append(f"{what} was {known}, and is {verdict}")
        self.ledger.counts[f"verdicts {verdict['status']}"] += known is verdict
        if verdict["status"] != "scored":
            if verdict["score"] is not None or not verdict["mask"]:
                self.ledger.wrong.append(f"{what} is a number and none: {verdict}")
            self._must_have_a_cause(what, verdict, None, diary.desktop_id, diary.began_at)
            return
        died = self._eyes.death(diary.desktop_id)
        if died is not None and died < diary.asked_at:
            self.ledger.wrong.append(f"{what} is {verdict['score']}, and its desktop was lost before: {verdict}")
        if diary.gave_up is not None and verdict["score"] != float(diary.gave_up):
            self.ledger.wrong.append(f"{what} is {verdict['score']}, and the model gave up: {diary.gave_up}")

    async def _look(self, diary: Diary) -> None:
        """Ask for the same once more, in another way, and see what was typed before the desktop goes."""
        eyes, desktop_id = self._eyes, diary.desktop_id
        seen = eyes.death(desktop_id) is not None or await eyes.look(desktop_id)
        # It may have died while it was looked for.
        if not (seen or eyes.death(desktop_id) or eyes.died_with_an_engine(desktop_id, diary.began_at)):
            self.ledger.wrong.append(f"{desktop_id} of {diary.episode_id} is not there")
        status, verdict = await self._call(diary, "GET", f"/v1/episodes/{diary.episode_id}/verdict")
        if status != 200 or verdict != self.ledger.verdicts[diary.episode_id]:
            self.ledger.wrong.append(f"the verdict of {diary.episode_id} is answered {status}: {verdict}")
        if diary.random.random() < 0.3:
            await self._again(diary)
        self.ledger.counts["episodes"] += 1
        diary.stage, diary.episode = "reset", diary.episode + 1

    async def _again(self, diary: Diary) -> None:
        """Something that was answered long ago."""
        call = diary.random.choice(list(diary.before))
        status, answer = await self._post(diary, call.path, call.body, call.key)
        self.ledger.counts["asked again later"] += 1
        answer = _without_picture(answer)
        same = answer.get("id") == call.answer["id"] if "id" in call.answer else answer == call.answer
        if status not in (200, 202) or not same:
            self.ledger.wrong.append(f"{call.key} was answered {call.answer}, and sent again {status}: {answer}")

    def _must_have_a_cause(
        self, what: str, problem: dict[str, Any], job: dict[str, Any] | None, desktop_id: str | None, since: float = 0.0
    ) -> None:
        """Nothing fails but by our doing, and what fails says why."""
        code = problem.get("code")
        self.ledger.failures[str(code)] += 1
        if not code or code == "internal_error":
            self.ledger.wrong.append(f"{what} failed without a reason: {problem}")
        if desktop_id is not None and self._eyes.death(desktop_id) is not None:
            return
        since = job["created_at"] if job is not None else since
        if not any(at >= since for at in self._eyes.engines_killed):
            self.ledger.wrong.append(f"{what} failed, and nobody did anything to {desktop_id}: {problem}")

    # -- how it speaks ------------------------------------------------------------------------------------------

    async def _post(self, diary: Diary, path: str, body: dict[str, Any], key: str) -> Answer:
        return await self._call(diary, "POST", path, body, {"Idempotency-Key": key})

    async def _call(
        self,
        diary: Diary,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
    ) -> Answer:
        """The answer, which is asked for until there is one. Raises Stuck."""
        give_up, tries = time.monotonic() + STUCK, 0
        said = ""
        while time.monotonic() < give_up:
            tries += 1
            sent = dict(headers or {})
            if method == "POST" and diary.random.random() < 0.1:
                sent["X-Request-Deadline"] = f"{diary.random.uniform(0.02, 1):.3f}"
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with self._session.request(
                    method, self._url + path, json=body, headers=sent, params=query
                ) as answer:
                    found = await answer.json(content_type=None)
                if answer.status < 400 or found["code"] not in AGAIN:
                    return answer.status, found
                said = found["code"]
                self.ledger.refusals[said] += 1
            self.ledger.counts["retries"] += 1
            await asyncio.sleep(diary.random.uniform(0.02, 0.02 * min(16, 2**tries)))
        raise Stuck(f"{method} {path} was sent {tries} times and not answered; the last refusal: {said or 'none'}")


def _task(name: str) -> dict[str, Any]:
    return {"id": name, "instruction": f"Type {name}.", "config": [], "evaluator": {"func": "infeasible"}}


def _without_picture(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("screenshot",)}


def compared(ledger: Ledger, eyes: Eyes) -> tuple[int, int, int]:
    """How many texts were compared with what was typed, how many cannot be, and how many were typed more than once.
    What is wrong is in the ledger."""
    found: Counter[str] = Counter()
    for desktop_id, typed in eyes.typed.items():
        for text in filter(None, typed.split(";")):
            found[f"{text};"] += 1
            if f"{text};" not in ledger.texts:
                ledger.wrong.append(f"{desktop_id} has {text!r}, which nobody sent")
            elif ledger.desktop_of[f"{text};"] != desktop_id:
                ledger.wrong.append(f"{text!r} is on {desktop_id}, and was sent to {ledger.desktop_of[f'{text};']}")
    seen = blind = 0
    for text, outcome in ledger.texts.items():
        if found[text] > 1:
            ledger.wrong.append(f"{text!r} ({outcome}) was typed {found[text]} times")
        if outcome == "ok" and not found[text]:
            if ledger.desktop_of[text] in eyes.dead_with_engine:
                blind += 1
                continue
            ledger.wrong.append(f"{text!r} was said to be typed, and is not on {ledger.desktop_of[text]}")
        seen += 1
    return seen, blind, sum(number > 1 for number in found.values())
