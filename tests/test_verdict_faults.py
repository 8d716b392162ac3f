"""What fails between a reset and its verdict never becomes a number: every boundary, and every way to fail there.

A boundary is a call that leaves the daemon: to the guest, to Chrome, for a file, to the evaluator's processes. Clean
runs show which there are (the first tests), and at each of them every fault of a list is injected: the reset then has
no episode, or the verdict no number; it is put down to the infrastructure; the desktop is not used again; and the
env's next episode is scored as it should be. What may end otherwise stands in `EXEMPT`, with the reason.

All cases run at once on the envs of one daemon, since most of them wait; each test looks at its own case.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import files_server
import pytest
import pytest_asyncio
from aiohttp import web
from files_server import FilesServer
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Served, eventually, serving
from test_grading import descendants

from envd.drivers.sim import Behaviour
from envd.drivers.sim.behaviour import FOREVER, Fault
from envd.settings import load
from envd.tasks.grading import find_interpreter

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    # In some runs one connection that a sim desktop's Chrome had accepted is left to the garbage collector. Seen once
    # with its owner noted; the filter cannot tell it from others, and TCP is not in `Bed.rest`.
    pytest.mark.filterwarnings(
        r"ignore:Exception ignored in. <(function _SelectorTransport|socket\.socket.*laddr)"
        ":pytest.PytestUnraisableExceptionWarning"
    ),
]

Task = dict[str, Any]
ENVS = 32
AT_ONCE = 8
"""Cases that use the processor; those that only wait for a deadline run beside them."""
PATIENCE = 90

# -- tasks --------------------------------------------------------------------------------------------------------


def rule(expected: Any) -> Task:
    return {"type": "rule", "rules": {"expected": expected}}


def says_done(path: str = "/home/user/out.txt") -> Task:
    return {"type": "vm_command_line", "command": ["cat", path]}


def task(config: list[Task], *, post: list[Task] | None = None, **evaluator: Any) -> Task:
    judged = {"func": "exact_match", "result": says_done(), "expected": rule("done\n"), **evaluator}
    return {"config": config, "evaluator": judged | {"postconfig": post or []}}


def step(kind: str, **parameters: Any) -> Task:
    return {"type": kind, "parameters": parameters}


WRITE = step("execute", command="echo done > /home/user/out.txt", shell=True)


def downloads(base: str) -> Task:
    return step("download", files=[{"url": f"{base}/in.txt", "path": "/home/user/in.txt"}])


def whole(base: str) -> Task:
    """Files, a command and Chrome to set up; a command before it is judged; a command and two files to judge by."""
    file = {"type": "vm_file", "path": "/home/user/out.txt", "dest": "out.txt"}
    gold = {"type": "cloud_file", "path": f"{base}/gold.txt", "dest": "gold.txt"}
    return task(
        [downloads(base), WRITE, step("chrome_open_tabs", urls_to_open=["https://a.example/"])],
        post=[step("execute", command=["touch", "/home/user/post"])],
        func=["exact_match", "compare_text_file"],
        result=[says_done(), file],
        expected=[rule("done\n"), gold],
    )


def steps(base: str) -> Task:
    """The other steps that a sim desktop can do."""
    return task(
        [
            downloads(base),
            WRITE,
            step("command", command="echo ready", shell=True, until={"stdout": "ready"}),
            step("execute_with_verification", command=["true"], verification={"command_success": "true"}),
            step("launch", command=["gedit", "in.txt"]),
            step("open", path="/home/user/in.txt"),
            step("activate_window", window_name="in.txt"),
            step("close_window", window_name="in.txt"),
            step("change_wallpaper", path="/home/user/in.txt"),
            step("chrome_close_tabs", urls_to_close=["about:blank"]),
        ]
    )


def getter(config: Task, func: str, expected: Any) -> Callable[[str], Task]:
    """Judged by this one getter."""

    def build(base: str) -> Task:
        wallpaper = step("change_wallpaper", path="/home/user/in.txt")
        return task([downloads(base), WRITE, wallpaper], func=func, result=config, expected=expected)

    return build


DAYS = {"relativeTime": {"from": "tomorrow"}, "expected": {"time": "{Year}"}, "include": ["done"]}
TASKS: dict[str, Callable[[str], Task]] = {
    "whole": whole,
    "steps": steps,
    "terminal": getter({"type": "vm_terminal_output"}, "literal_match", rule("x") | {"rules": "done"}),
    "tree": getter({"type": "accessibility_tree"}, "check_accessibility_tree", {"type": "rule", "rules": []}),
    "directory": getter(
        {"type": "list_directory", "path": "/home/user"}, "check_direct_json_object", rule({"type": "directory"})
    ),
    "screen": getter({"type": "vm_screen_size"}, "check_direct_json_object", rule({"width": 320})),
    "wallpaper": getter(
        {"type": "vm_wallpaper", "dest": "w.png"}, "compare_text_file",
        {"type": "vm_file", "path": "/home/user/in.txt", "dest": "in.txt"},
    ),
    "zone": getter(says_done(), "check_include_exclude", {"type": "rule_relativeTime", "rules": DAYS}),
}  # fmt: skip
AFTERWARDS = task([WRITE])


# -- boundaries and faults ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Boundary:
    """The `call`th call of a route of a task; of a file's download, its path. `words` tell it from others."""

    task: str
    route: str
    words: str = ""
    call: int = 1
    judging: bool = False

    @property
    def id(self) -> str:
        when = "verdict" if self.judging else "set-up"
        return f"{self.task} {when} {self.route}{f' {self.words}' if self.words else ''} {self.call}"

    @property
    def key(self) -> str:
        return f"{self.route} {self.words}" if self.words else self.route


def calls(task: str, *routes: str, judging: bool = False) -> list[Boundary]:
    return [Boundary(task, *route.partition(" ")[::2], judging=judging) for route in routes]


ANY = ("error", "stall", "reset", "lose", "garbage", "empty", "half", "cut", "die")
STEP = ("error", "stall", "reset", "lose", "garbage", "empty", "die")
"""Of calls that are answered in words, of which half are words, too: see EXEMPT for one of them."""
CDP = ("error", "stall", "reset", "garbage", "empty", "size", "die")
READ = ("error", "stall", "reset", "garbage", "empty", "half", "cut", "size", "die")
FILE = ("404", "500", "stall", "reset", "garbage", "cut", "die")
HTTP = ("/json/list", "/json/version", "/devtools/browser")
TARGETS = ("Target.createTarget", "Target.attachToTarget", "Target.closeTarget", "Target.getTargets")
PAGES = ("Page.enable", "Page.navigate", "Runtime.evaluate")
WINDOWS = ("/execute wmctrl", "/setup/activate_window", "/setup/close_window", "/setup/change_wallpaper")
OTHERS = ("/execute ready", "/execute_with_verification", "/setup/launch", "/setup/open_file", *WINDOWS)
PLAN: list[tuple[list[Boundary], tuple[str, ...]]] = [
    (calls("whole", "/in.txt"), FILE),
    (calls("whole", "/setup/upload in.txt", "/execute echo done"), ANY),
    (calls("whole", *HTTP, *TARGETS, *PAGES), CDP),
    ([*calls("whole", "/screenshot"), Boundary("whole", "/screenshot", call=2)], READ),
    (calls("whole", "/execute touch", judging=True), ANY),
    ([*calls("whole", "/screenshot", judging=True), Boundary("whole", "/screenshot", call=2, judging=True)], READ),
    (calls("whole", "/gold.txt", judging=True), FILE),
    (calls("whole", "/execute cat", judging=True), ANY),
    (calls("whole", "/file", judging=True), READ),
    (calls("steps", *OTHERS), STEP),
    (calls("terminal", "/terminal", judging=True), READ),
    (calls("tree", "/accessibility", judging=True), READ),
    (calls("directory", "/list_directory", judging=True), READ),
    (calls("screen", "/screen_size", judging=True), READ),
    (calls("wallpaper", "/wallpaper", judging=True), READ),
    (calls("zone", "/execute timezone", judging=True), READ),
]
CASES = [(boundary, way) for boundaries, ways in PLAN for boundary in boundaries for way in ways]


def is_file(boundary: Boundary) -> bool:
    return boundary.route in ("/in.txt", "/gold.txt")


# -- what may end otherwise ---------------------------------------------------------------------------------------

RIGHT, TOLD = "the score is right", "the score is right of what the guest told"
BYTES = "whatever bytes a whole answer of 200 has are the content of that file, as far as anybody can know"
SIZE = "a picture of another size is what is seen when a task, or the model, has changed the resolution"
WORDS = "the file is stored, and it is said so in words that are text after the half of them, too"
PAGE = "Chrome says that it cannot open the page: pages fail by themselves, and a warning says so"
EXEMPT: dict[tuple[str, str], tuple[str, str]] = {
    **{("/file", way): (TOLD, BYTES) for way in ("garbage", "empty", "half", "size")},
    **{("/wallpaper", way): (TOLD, BYTES) for way in ("garbage", "half", "size")},
    ("/screenshot", "size"): (RIGHT, SIZE),
    ("/setup/upload", "half"): (RIGHT, WORDS),
    ("Page.navigate", "error"): (RIGHT, PAGE),
}
"""(route, fault) → what may be, and why."""
RETRIED = [*calls("whole", "/screenshot", "/file", judging=True), *calls("terminal", "/terminal", judging=True)]
"""Calls that only read: when one fails once, the same call is made again, so that it could not matter."""


# -- one case -----------------------------------------------------------------------------------------------------


class Source(FilesServer):
    """Files for tasks, under a folder for each case. `asked` is called before the answer; `wrong` is how it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_for: dict[str, Callable[[], None]] = {}
        self.wrong: dict[str, files_server.Fault] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if then := self.asked_for.pop(request.path, None):
            then()
        content = {"in.txt": b"in", "gold.txt": b"done\n"}[request.path.rpartition("/")[2]]
        if wrong := self.wrong.get(request.path):
            return await wrong(self, request, content * 50)
        return web.Response(body=content)


async def stalls(*_: object) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError("unreachable")


WRONG_FILES: dict[str, files_server.Fault] = {
    "404": files_server.says(404),
    "500": files_server.says(500),
    "stall": stalls,
    "reset": files_server.resets,
    "garbage": files_server.speaks_garbage,
    "cut": files_server.truncates,
}


@asynccontextmanager
async def source() -> AsyncIterator[Source]:
    server, app = Source(), web.Application()
    app.router.add_get("/{path:.*}", server.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.port = runner.addresses[0][1]
        yield server
    finally:
        await runner.cleanup()


Faults = tuple[tuple[Boundary, str], ...]


@dataclass
class End:
    """How a reset and its evaluation went with faults, and the same env's next ones without."""

    job: dict[str, Any]
    desktop: str
    gone: bool
    verdict: dict[str, Any] | None = None
    kept: Any = None
    asked: list[tuple[str, str]] = field(default_factory=list)
    next_desktop: str = ""
    next_score: float | None = None


@dataclass
class Bed:
    """The daemon that all cases run on."""

    served: Served
    source: Source
    free: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    busy: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    cases: dict[str, asyncio.Task[End]] = field(default_factory=dict)
    began: dict[int, float] = field(default_factory=dict)
    number: int = 0
    before: Any = None

    async def rest(self) -> tuple[set[int], dict[str, int], int]:
        """What is there while nothing runs: the evaluator's processes, the daemon's tasks, open files."""
        zygote = (await self.served.service.evaluators.graders.warm()).process.pid
        tasks = Counter(name for task in asyncio.all_tasks() if (name := task.get_name()).startswith("envd."))
        return set(await descendants(zygote)), dict(tasks), await asyncio.to_thread(files_open)

    async def run(self, which: str, faults: Faults = (), times: int = FOREVER) -> End:
        """The task, with faults that strike `times` times."""
        env = await self.free.get()
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._run(env, which, faults, times)
        finally:
            self.free.put_nowait(env)

    async def one(self, boundary: Boundary, way: str) -> End:
        if waits(boundary, way):
            return await self.run(boundary.task, ((boundary, way),))
        async with self.busy:
            return await self.run(boundary.task, ((boundary, way),))

    async def _run(self, env: int, which: str, faults: Faults, times: int) -> End:
        self.number += 1
        folder = f"/{self.number}"
        early = [fault for fault in faults if not fault[0].judging]
        late = [fault for fault in faults if fault[0].judging]
        self.source.asked_for[f"{folder}/in.txt"] = lambda: self._inject(env, folder, early, times)
        job = await self._reset(env, TASKS[which](self.source.url(folder)))
        end = End(job, str(job["desktop_id"]), gone=job["desktop_id"] not in self.served.sim.desktops)
        if job["state"] == "succeeded":
            desktop = self.served.desktop(env)
            desktop.terminal = "done"
            self._inject(env, folder, late, times)
            end.verdict = await self._evaluate(env)
            end.kept = (await self.served.get(f"/v1/episodes/{job['episode_id']}/verdict"))[1]
            end.asked = [(call.route, call.said) for call in desktop.calls if call.at >= self.began[env]]
        again = await self._reset(env, AFTERWARDS)
        assert again["state"] == "succeeded", again
        end.next_desktop, end.next_score = again["desktop_id"], (await self._evaluate(env))["score"]
        await self.served.service.fleet.gone(end.desktop)
        return end

    def _inject(self, env: int, folder: str, faults: list[tuple[Boundary, str]], times: int) -> None:
        """From here on the desktop behaves so; its calls are counted from here, too. A set-up begins with this."""
        info = self.served.service.env(env).desktop
        running, _ = self.served.service.queue.of_env(env)
        desktop_id = info.id if info else running.desktop_id if running else None
        assert desktop_id is not None
        if info is None:
            self.began[env] = time.monotonic()
        on: dict[str, Fault] = {}
        for boundary, way in faults:
            if not is_file(boundary):
                on[boundary.key] = Fault(way, call=boundary.call, times=times)  # type: ignore[arg-type]  # see PLAN
            elif way != "die":
                self.source.wrong[folder + boundary.route] = WRONG_FILES[way]
            elif boundary.judging:
                self.source.asked_for[folder + boundary.route] = lambda: self.served.sim.kill(desktop_id)
            else:
                self.served.sim.kill(desktop_id)
        self.served.sim.desktops[desktop_id].behaviour = Behaviour(on=on)

    async def _reset(self, env: int, task: Task) -> dict[str, Any]:
        status, job = await self.served.post(f"/v1/envs/{env}/reset", {"task": task})
        assert status == 202, job
        await self.served.service.queue.ended(job["id"])
        return (await self.served.get(f"/v1/jobs/{job['id']}"))[1]  # type: ignore[no-any-return]  # JSON

    async def _evaluate(self, env: int) -> dict[str, Any]:
        """Asked twice at once, as by a client whose connection broke: the answer must be the same."""
        path = f"/v1/envs/{env}/evaluate"
        first, second = await asyncio.gather(self.served.post(path), self.served.post(path))
        assert first == second
        assert first[0] == 200, first
        return first[1]  # type: ignore[no-any-return]  # JSON


@asynccontextmanager
async def bed() -> AsyncIterator[Bed]:
    limits: dict[str, Any] = {"setup_timeout": 6, "evaluation_timeout": 20, "asset_timeout": 2, "setup_attempts": 1}
    async with source() as files, serving(envs=ENVS, evaluations=ENVS, settle_quiet=0.01, **limits) as served:
        bed = Bed(served, files)
        for env in range(ENVS):
            bed.free.put_nowait(env)
        yield bed


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Bed]:
    """All cases begin here; those that wait for deadlines go first."""
    if find_interpreter(load({}, env_file=None, provider="sim")) is None:
        pytest.skip("the evaluators' interpreter is not there: run `make evaluators`")
    ready: asyncio.Future[Bed] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()
    # In a task of its own: what is opened in a task is to be closed in it, and a fixture has one for each.
    host = asyncio.create_task(keep_running(ready, over))
    host.add_done_callback(lambda _: ready.cancel())
    try:
        yield await ready
    finally:
        over.set()
        await host


async def keep_running(ready: asyncio.Future[Bed], over: asyncio.Event) -> None:
    async with bed() as made:
        await made.served.service.evaluators.graders.warm()
        await asyncio.gather(*(made.run("screen") for _ in range(ENVS)))
        made.before = await made.rest()
        for boundary, way in sorted(CASES, key=lambda case: not waits(*case)):
            case = name(boundary, way)
            made.cases[case] = asyncio.create_task(made.one(boundary, way), name=case)
        ready.set_result(made)
        await over.wait()
        for task in made.cases.values():
            task.cancel()
        await asyncio.wait(made.cases.values())


def parameters() -> list[Any]:
    return [pytest.param(boundary, way, id=name(boundary, way)) for boundary, way in CASES]


def waits(boundary: Boundary, way: str) -> bool:
    """Whether a deadline ends it, so that it costs time and no work."""
    return way == "stall" or boundary.route in HTTP


def name(boundary: Boundary, way: str) -> str:
    return f"{boundary.id}-{way}"


@pytest.mark.parametrize(("boundary", "way"), parameters())
async def test_a_fault_is_never_a_number(running: Bed, boundary: Boundary, way: str) -> None:
    """Of the evaluator's own processes, killed at each stage, see test_evaluations: all cases here share them."""
    end = await running.cases[name(boundary, way)]
    may, _ = EXEMPT.get((boundary.route, way), ("", ""))
    if may:
        assert end.verdict is not None, end.job
        assert may == TOLD or end.verdict["score"] == 1.0, end.verdict
        assert (boundary.route == "Page.navigate") == bool(end.verdict["warnings"]), end.verdict
    elif boundary.judging:
        check_verdict(end, way)
    else:
        check_reset(end)
    assert (end.next_score, end.next_desktop != end.desktop) == (1.0, True)


def check_reset(end: End) -> None:
    assert (end.job["state"], end.verdict, end.gone) == ("failed", None, True), f"{end.job} {end.verdict}"
    assert (end.job["error"]["fault"], end.job["episode_id"]) == ("infra", None), f"{end.job}"


def check_verdict(end: End, way: str) -> None:
    verdict = end.verdict
    assert verdict is not None, end.job
    assert (verdict["score"], verdict["mask"], verdict["fault"]) == (None, True, "infra"), verdict
    assert verdict["status"] in ("infra_error", "expired" if way == "stall" else ""), verdict
    # The call that was under way when the desktop died may have been told of it first.
    codes = ("desktop_lost", "guest_unreachable")
    assert (verdict["code"] in codes) if way == "die" else (verdict["code"] != "desktop_lost"), verdict
    assert end.kept == verdict


@pytest.mark.parametrize("which", TASKS)
async def test_there_is_no_other_boundary(running: Bed, which: str) -> None:
    """What a clean run asks of a desktop; of routes that are asked several times, each has the first of its cases."""
    end = await running.run(which)
    assert end.verdict is not None, end.job
    assert end.verdict["score"] == 1.0, end.verdict
    known = {boundary for boundary, _ in CASES}
    left = [call for call in end.asked if not any(call[0] == one.route and one.words in call[1] for one in known)]
    assert left == []
    assert which != "whole" or sum(route == "/screenshot" for route, _ in end.asked) == 4


def plain(boundary: Boundary, way: str) -> bool:
    """Whether it can be combined with others: it ends the one task, at once."""
    return boundary.task == "whole" and not waits(boundary, way) and (boundary.route, way) not in EXEMPT


SOME = st.sampled_from([case for case in CASES if plain(*case)])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(faults=st.lists(SOME, min_size=2, max_size=3, unique_by=lambda case: case[0]))
async def test_faults_together_are_no_number_either(running: Bed, faults: list[tuple[Boundary, str]]) -> None:
    end = await running.run("whole", tuple(faults))
    if any(not boundary.judging for boundary, _ in faults):
        check_reset(end)
    else:
        assert end.verdict is not None
        assert (end.verdict["score"], end.verdict["mask"], end.verdict["fault"]) == (None, True, "infra"), end.verdict
    assert (end.next_score, end.next_desktop != end.desktop) == (1.0, True)


@pytest.mark.parametrize("boundary", RETRIED, ids=lambda boundary: boundary.id)
async def test_a_call_that_only_reads_is_made_again_and_scores_right(running: Bed, boundary: Boundary) -> None:
    end = await running.run(boundary.task, ((boundary, "reset"),), times=1)
    assert end.verdict is not None, end.job
    assert end.verdict["score"] == 1.0, end.verdict


async def test_nothing_is_left_of_all_that(running: Bed) -> None:
    """By far more cases ran than there are envs, so what each of them left would show."""
    await asyncio.wait(running.cases.values())
    service, sim = running.served.service, running.served.sim
    await eventually(lambda: set(sim.desktops) == {env.desktop.id for env in service.all_envs() if env.desktop})
    assert len(sim.desktops) == ENVS
    assert await asyncio.to_thread(os.listdir, service.evaluators.graders.directory) == []
    assert await running.rest() == running.before


def files_open() -> int:
    """Descriptors of this process but for TCP sockets, which clients keep for a while for the next call."""
    local = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            targets.append(os.readlink(link))
        except FileNotFoundError:
            continue  # it was for the listing itself
    return sum(not target.startswith("socket:") or target[8:-1] in local for target in targets)
