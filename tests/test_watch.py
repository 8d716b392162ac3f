import asyncio
import io
import os
import pty
import signal
import sys
import time
from typing import Any

import pytest
from fake_server import FakeServer, serving
from rich.console import Console
from rich.text import Text

from envd.cli.watch import Board, _probe, clock, watch
from envd.client import Client
from envd.errors import BootTimeout, ServerUnreachable, UnknownJob
from envd.models import Event, Job, JobState, Phase, Probe, ProbeResult, ResetPath

WAITS = Probe(name="screenshot", detail="connection refused", attempts=17)
PASSED = Probe(name="chrome_cdp", result=ProbeResult.OK, passed=True, detail="1 page", attempts=3, seconds=4.12)


class Paper(io.StringIO):
    """What a console writes on; says when it did."""

    def __init__(self) -> None:
        super().__init__()
        self.grew = asyncio.Event()

    def write(self, text: str) -> int:
        self.grew.set()
        return super().write(text)


def plain() -> Console:
    return Console(file=Paper(), force_terminal=False, width=120)


def terminal() -> Console:
    return Console(file=Paper(), force_terminal=True, width=120, height=40)


def paper(console: Console) -> Paper:
    assert isinstance(console.file, Paper)
    return console.file


def written(console: Console) -> str:
    return paper(console).getvalue()


async def shown(console: Console, words: str) -> None:
    """Return once `words` are there."""
    async with asyncio.timeout(10):
        while words not in written(console):
            paper(console).grew.clear()
            await paper(console).grew.wait()


def job(id: str = "job-1", **facts: Any) -> Job:
    return Job(**({"id": id, "env": 0, "created_at": 1000.0, "state": JobState.BOOTING, "phase": "ready"} | facts))


def event(kind: str, job: Job | None = None, at: float = 1010.0, **data: Any) -> Event:
    return Event(id="", kind=kind, at=at, job=job, job_id=job.id if job else None, data=data)


def drawn(board: Board, now: float = 0.0, width: int = 100, height: int = 40) -> str:
    console = Console(record=True, file=io.StringIO(), width=width, height=height)
    console.print(board.render(now, [], height))
    return console.export_text()


def told(lines: list[Text]) -> list[str]:
    return [line.plain for line in lines]


# The picture


def test_a_boot_is_drawn_with_bar_eta_phases_and_both_probes() -> None:
    board = Board("job-1")
    phases = (Phase(name="queue", started_at=1000, seconds=2.0), Phase(name="ready", started_at=1002))
    board.apply(event("snapshot", job(eta_s=30, phases=phases, probes=(WAITS, PASSED), task_id="t-9")), now=50)
    picture = drawn(board, now=55)
    assert "0:15, about 0:25 left" in picture
    assert "queue 2.0 s" in picture
    assert "ready 0:13 …" in picture
    assert "· screenshot" in picture
    assert "connection refused  (17 tries)" in picture
    assert "✓ chrome_cdp" in picture
    assert "4.1 s  1 page" in picture
    assert "env 0 · job-1 · t-9" in picture


@pytest.mark.parametrize(
    ("facts", "now", "words"),
    [
        pytest.param({"eta_s": None}, 0, "0:10, no earlier boot to judge by", id="first boot"),
        pytest.param({"eta_s": 5}, 20, "0:30, 0:15 longer than expected", id="late"),
        pytest.param({"state": JobState.SUCCEEDED, "ended_at": 1061}, 500, "after 1:01", id="ended, its clock stands"),
        pytest.param({"state": JobState.QUEUED, "position": 3, "ahead": 4}, 0, "place 3, 4 ahead", id="queued"),
    ],
)
def test_the_bar_says_what_is_known_about_time(facts: dict[str, Any], now: float, words: str) -> None:
    board = Board("job-1")
    board.apply(event("snapshot", job(**facts)), now=0)
    assert words in drawn(board, now)


def test_only_success_fills_the_bar() -> None:
    def filled(**facts: Any) -> int:
        board = Board("job-1")
        board.apply(event("snapshot", job(eta_s=1, **facts)), now=0)
        return drawn(board, now=10_000).count("━")

    assert filled() < filled(state=JobState.SUCCEEDED, ended_at=1060)


def test_everything_shows_what_runs_what_waits_in_order_and_what_ended() -> None:
    jobs = [
        job("job-r"),
        job("job-b", state=JobState.QUEUED, phase="queue", position=2, env=2),
        job("job-a", state=JobState.QUEUED, phase="queue", position=1, env=1),
    ]
    board = Board()
    board.apply(event("snapshot", jobs=[one.model_dump(mode="json") for one in jobs]), now=0)
    error = BootTimeout("Too slow.", hint="Give it longer.").problem()
    board.apply(event("state", job("job-f", state=JobState.FAILED, ended_at=1009, error=error)), now=0)
    picture = drawn(board)
    places = [picture.index(id) for id in ("job-r", "job-a", "job-b", "job-f")]
    assert places == sorted(places)
    assert "failed after 9.0 s: Too slow. Give it longer. [boot_timeout]" in picture


def test_a_hundred_waiting_jobs_do_not_flood_the_screen() -> None:
    jobs = [job(f"job-{n}", state=JobState.QUEUED, phase="queue", position=n) for n in range(1, 101)]
    board = Board()
    board.apply(event("snapshot", jobs=[one.model_dump(mode="json") for one in jobs]), now=0)
    picture = drawn(board, height=24)
    assert "more" in picture
    assert picture.count("\n") <= 24


def test_many_ended_jobs_leave_room_for_the_others() -> None:
    board = Board()
    for n in range(50):
        board.apply(event("state", job(f"job-{n}", state=JobState.SUCCEEDED, ended_at=1001.0 + n)), now=0)
    assert drawn(board).count("succeeded") == 5


def test_a_guests_words_cannot_steer_the_terminal() -> None:
    board = Board("job-1")
    evil = Probe(name="screenshot", detail="\x1b]0;owned\x07\x1b[2J[red]x[/red]", attempts=1)
    lines = board.apply(event("note", job(probes=(evil,)), message="\x1b[2Jhello\nthere"), now=0)
    assert "\x1b" not in drawn(board) + "".join(told(lines))
    assert "[red]x[/red]" in drawn(board)
    assert told(lines) == ["env 0 job-1: [2Jhello there"]


def test_a_narrow_terminal_still_works() -> None:
    board = Board("job-1")
    board.apply(event("snapshot", job(eta_s=30, probes=(WAITS, PASSED))), now=0)
    assert "screenshot" in drawn(board, width=40)


@pytest.mark.parametrize(("seconds", "shown"), [(-3, "0:00"), (9.9, "0:09"), (61, "1:01"), (3725, "1:02:05")])
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


# What is news


def test_replayed_events_do_not_turn_the_picture_back() -> None:
    board = Board("job-1")
    board.apply(event("snapshot", job(version=9, state=JobState.SETTING_UP)), now=0)
    assert board.apply(event("phase", job(version=3), phase="create"), now=0) == []
    assert "setting up" in drawn(board)


def test_probes_are_news_when_their_verdict_changes_only() -> None:
    board = Board("job-1")
    board.apply(event("snapshot", job(probes=(WAITS,))), now=0)
    again = WAITS.model_copy(update={"detail": "timed out", "attempts": 18})
    assert board.apply(event("probe", job(version=2, probes=(again,))), now=0) == []
    assert told(board.apply(event("probe", job(version=3, probes=(again, PASSED))), now=0)) == [
        "env 0 job-1: ✓ chrome_cdp 4.1 s  1 page"
    ]


def test_a_probe_that_has_not_passed_yet_is_no_failure_until_the_job_is_one() -> None:
    flat = Probe(name="screenshot", result=ProbeResult.FAIL, detail="one flat colour", attempts=1)
    board = Board("job-1")
    board.apply(event("snapshot", job()), now=0)
    [line] = board.apply(event("probe", job(version=2, probes=(flat,))), now=0)
    assert line.plain == "env 0 job-1: · screenshot one flat colour  (1 try)"
    assert line.spans[-1].style == "dim"
    [line] = board.apply(event("progress", job(version=3), message="Waiting for VM to be ready… 3s / 60s"), now=1)
    assert line.plain == "env 0 job-1: waiting for the desktop… 3s / 60s"
    mark, _ = _probe(flat, job(state=JobState.FAILED))
    assert (mark.plain, mark.style) == ("✗ screenshot", "red")


def test_progress_is_news_every_ten_seconds() -> None:
    board = Board("job-1")
    lines = [
        board.apply(event("progress", job(version=n), message="Waiting for VM to be ready…"), now=float(n))
        for n in range(1, 25)
    ]
    assert [n for n, line in enumerate(lines, start=1) if line] == [1, 11, 21]


def test_jobs_that_a_restart_forgot_are_gone_from_the_picture() -> None:
    board = Board()
    board.apply(event("snapshot", jobs=[job().model_dump(mode="json")]), now=0)
    board.apply(event("snapshot", jobs=[]), now=1)
    assert "nothing boots and nothing waits" in drawn(board)


# Following a server


async def test_a_job_that_succeeds_is_told_line_by_line_and_gives_status_0() -> None:
    console = plain()
    async with serving() as server, Client(server.url) as client, asyncio.TaskGroup() as group:
        server.new_job(task_id="t")
        status = group.create_task(watch(client, "job-1", console))
        await server.until(lambda: server.streams)
        server.advance("job-1", "phase", state=JobState.BOOTING, phase="ready")
        server.advance("job-1", "probe", probes=(PASSED,))
        server.advance("job-1", state=JobState.SUCCEEDED, ended_at=time.time(), reset_path=ResetPath.COLD)
        assert await status == 0
    lines = [line.partition(": ")[2] for line in written(console).splitlines()]
    assert lines[1:3] == ["booting · ready", "✓ chrome_cdp 4.1 s  1 page"]
    assert lines[3].startswith("succeeded after 0.")
    assert "\x1b" not in written(console)


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED, JobState.SUPERSEDED, JobState.EXPIRED])
@pytest.mark.parametrize("console", [plain, terminal])
async def test_a_job_that_ends_otherwise_gives_status_1(state: JobState, console: Any) -> None:
    async with serving() as server, Client(server.url) as client:
        server.new_job(state=state, ended_at=time.time())
        assert await watch(client, "job-1", console()) == 1


@pytest.mark.parametrize("make", [plain, terminal])
async def test_watching_survives_a_restart_of_the_daemon_and_shows_it(make: Any) -> None:
    console = make()
    async with serving() as server, Client(server.url) as client, asyncio.TaskGroup() as group:
        server.new_job()
        status = group.create_task(watch(client, "job-1", console))
        await server.until(lambda: server.streams)
        await server.stop()
        await shown(console, "reconnecting")
        await server.restart()
        await server.until(lambda: server.streams)
        server.advance("job-1", state=JobState.SUCCEEDED, ended_at=time.time())
        assert await status == 0
    assert "connected again" in written(console)


@pytest.mark.parametrize("make", [plain, terminal])
async def test_an_unknown_job_is_an_error_as_it_is(make: Any) -> None:
    async with serving() as server, Client(server.url) as client:
        with pytest.raises(UnknownJob):
            await watch(client, "nobody", make())


async def test_a_server_that_was_never_there_is_not_waited_for() -> None:
    async with Client("http://127.0.0.1:9", patience=60) as client:
        with pytest.raises(ServerUnreachable):
            await watch(client, None, plain())


async def test_being_cancelled_gives_the_cursor_back() -> None:
    console = terminal()
    async with serving() as server, Client(server.url) as client:
        server.new_job()
        watching = asyncio.create_task(watch(client, None, console))
        await shown(console, "job-1")
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
    assert written(console).endswith("\x1b[?25h")


async def test_ctrl_c_on_a_real_terminal_leaves_it_clean() -> None:
    async with serving() as server:
        server.new_job()
        output, status = await _in_a_terminal(server)
    assert status == 130
    assert "\x1b[?25h" in output.rpartition("\x1b[?25l")[2]
    assert "Traceback" not in output


async def _in_a_terminal(server: FakeServer) -> tuple[str, int]:
    """Run `envd watch` on a terminal of its own, press Ctrl-C once it shows the job."""
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if not name.startswith("ENVD_")}
    command = (sys.executable, "-c", "from envd.cli import main; main()", "watch", "--url", server.url)
    process = await asyncio.create_subprocess_exec(
        *command, stdin=theirs, stdout=theirs, stderr=theirs, env=env | {"TERM": "xterm-256color"}
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    output, grew, loop = bytearray(), asyncio.Event(), asyncio.get_running_loop()

    def read() -> None:
        try:
            output.extend(os.read(ours, 65536))
        except OSError:
            loop.remove_reader(ours)
        grew.set()

    loop.add_reader(ours, read)
    try:
        async with asyncio.timeout(30):
            while b"job-1" not in output:
                grew.clear()
                await grew.wait()
            process.send_signal(signal.SIGINT)
            status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        loop.remove_reader(ours)
        try:
            output.extend(os.read(ours, 65536))
        except OSError:
            pass
        os.close(ours)
    return output.decode(errors="replace"), status
