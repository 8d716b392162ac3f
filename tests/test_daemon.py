"""The supervisor, as a process of its own that is sent real signals."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from daemon_process import CRASH, DRIVER, DaemonProcess, crash, daemon, ended_job, reset, start, watch
from h2.connection import H2Connection
from h2.events import ResponseReceived

from envd.daemon import allow_open_files, bound, daemon_id, hang_up, locked
from envd.errors import AddressInUse, SettingsError, StateDirLocked

WATCHERS, POLLS, WAITING = 50, 5, 3
TO_EXIT = 5.0
SLOW = {"ENVD_SIM": "boot=60", "ENVD_ENVS": "5"}
Answer = tuple[int, dict[str, Any]]


async def ask(session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> Answer:
    async with session.request(method, url, json=body) as answer:
        return answer.status, await answer.json(content_type=None)


async def connect(process: DaemonProcess, request: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(process.url.rpartition(":")[2]))
    writer.write(request)
    await writer.drain()
    return reader, writer


async def play(process: DaemonProcess, session: aiohttp.ClientSession) -> None:
    """A reset of env 0, through to its end."""
    job = await ended_job(session, process.url, (await reset(session, process.url))["id"])
    assert job["state"] == "succeeded", job


class Crowd:
    """Everybody who may be connected when the daemon is told to stop: a boot runs, jobs wait, and all are watched."""

    def __init__(self, process: DaemonProcess, session: aiohttp.ClientSession) -> None:
        self.process, self.session = process, session
        self.streams: list[asyncio.Task[bytes]] = []
        self.polls: list[asyncio.Task[Answer]] = []

    async def gather(self) -> None:
        url, opened = self.process.url, [asyncio.Event() for _ in range(WATCHERS)]
        self.streams = [asyncio.create_task(watch(self.session, url, event)) for event in opened]
        booting = await reset(self.session, url, 0)
        waiting = [await reset(self.session, url, env) for env in range(1, 1 + WAITING)]
        for job in [booting, *waiting, booting][:POLLS]:
            # No job reaches this version: the poll is held until the daemon ends it.
            poll = f"{url}/v1/jobs/{job['id']}?wait=60&after=100000"
            self.polls.append(asyncio.create_task(ask(self.session, "GET", poll)))
        self.legacy = asyncio.create_task(
            ask(self.session, "POST", f"{url}/env/reset", {"slot_id": 4, "task_config": {}})
        )
        for event in opened:
            await event.wait()
        async with asyncio.timeout(10):
            # Its job is the last to be accepted.
            while (await ask(self.session, "GET", f"{url}/v1/queue"))[1]["waiting"][-1]["env"] != 4:
                pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_everything_within_five_seconds(
    tmp_path: Path, python: Path, number: signal.Signals
) -> None:
    async with daemon(tmp_path / "state", python=python, env=SLOW) as (process, session):
        crowd = Crowd(process, session)
        await crowd.gather()
        told = process.signal(number)
        assert await process.ended() == 0
        took = time.monotonic() - told
        lasts = [body.rstrip().rpartition(b"event: ")[2] for body in await asyncio.gather(*crowd.streams)]
        assert [last.partition(b"\n")[0] for last in lasts] == [b"server-shutdown"] * WATCHERS
        # A poll may also hear of its job's own end, which the drain brings about.
        polled = {(status, body.get("code", body.get("state"))) for status, body in await asyncio.gather(*crowd.polls)}
        assert polled <= {(503, "draining"), (200, "cancelled")}
        status, problem = await crowd.legacy
        assert (status, problem["code"], problem["retryable"]) == (503, "draining", True)
        assert took < TO_EXIT
        assert await process.left_nothing_taken()
        assert "Traceback" not in process.text
        assert process.records()[-1]["event"] == "stopped"


async def test_half_a_request_does_not_hold_up_the_end(tmp_path: Path, python: Path) -> None:
    async with daemon(tmp_path / "state", python=python) as (process, _):
        heads = [await connect(process, b"GET /health HTTP/1.1\r\nHos") for _ in range(5)]
        body = (
            b"POST /v1/envs/0/reset HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n"
        )
        bodies = [await connect(process, body) for _ in range(5)]
        for reader, _ in bodies:
            assert b" 100 " in await reader.readuntil(b"\r\n\r\n")  # its handler waits for the rest
        told = process.signal()
        assert await process.ended() == 0
        assert time.monotonic() - told < TO_EXIT
        for _, writer in (*heads, *bodies):
            writer.close()


async def test_a_desktop_that_will_not_go_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env={"ENVD_SIM": "destroy=60"}) as (process, session):
        await play(process, session)
        told = process.signal()
        assert await process.ended() == 0
        assert time.monotonic() - told < TO_EXIT


async def test_a_signal_during_recovery_is_heard(tmp_path: Path) -> None:
    hanging = "async def hang(self): import asyncio; logger.warning('listing'); await asyncio.Event().wait()"
    prelude = f"{DRIVER}\nfrom structlog import get_logger\nlogger = get_logger()\n{hanging}\nMarkedDriver.list = hang"
    process = await start(tmp_path / "state", prelude=prelude, env={"INSTANCES": str(tmp_path / "made")})
    try:
        await process.logged(lambda line: "listing" in line)
        told = process.signal()
        assert await process.ended() == 0
        assert time.monotonic() - told < TO_EXIT
    finally:
        await process.kill()


async def test_a_terminal_that_closes_ends_it_too_and_more_signals_change_nothing(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env={"ENVD_SIM": "destroy=0.5"}) as (process, session):
        await play(process, session)
        process.signal(signal.SIGHUP)
        await process.logged(lambda line: "shutting down" in line)
        process.signal(signal.SIGINT)
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0


async def test_under_nohup_a_terminal_that_closes_ends_nothing(tmp_path: Path) -> None:
    nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    async with daemon(tmp_path / "state", prelude=nohup) as (process, session):
        process.signal(signal.SIGHUP)
        assert (await ask(session, "GET", f"{process.url}/livez"))[0] == 200


async def test_a_crash_of_the_queue_ends_the_process_and_its_desktops(tmp_path: Path, python: Path) -> None:
    made = tmp_path / "made"
    env = {"ENVD_ENVS": "2", "INSTANCES": str(made)}
    async with daemon(tmp_path / "state", prelude=DRIVER + CRASH, python=python, env=env) as (process, session):
        await play(process, session)
        assert len(list(made.iterdir())) == 1
        opened = asyncio.Event()
        stream = asyncio.create_task(watch(session, process.url, opened))
        await opened.wait()
        await crash(session, process.url)
        assert await process.ended() == 70
        assert list(made.iterdir()) == []
        assert b"server-shutdown" in await stream
        assert await process.left_nothing_taken()
        last = process.records()[-1]
        assert last["level"] == "error"
        assert "injected" in str(last["exception"])


async def test_the_death_of_the_http_half_ends_the_process_and_its_desktops(tmp_path: Path) -> None:
    prelude = """
import asyncio, signal
import envd.daemon
whole = envd.daemon.hypercorn_serve
async def mortal(app, config, shutdown_trigger):
    died = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, died.set)
    serving = asyncio.create_task(whole(app, config, shutdown_trigger=shutdown_trigger))
    await died.wait()
    raise OSError("injected")
envd.daemon.hypercorn_serve = mortal
"""
    made = tmp_path / "made"
    env = {"INSTANCES": str(made)}
    async with daemon(tmp_path / "state", prelude=DRIVER + prelude, env=env) as (process, session):
        await play(process, session)
        assert len(list(made.iterdir())) == 1
        process.signal(signal.SIGUSR1)
        assert await process.ended() == 70
        assert list(made.iterdir()) == []
        assert "injected" in str(process.records()[-1]["exception"])


async def test_after_a_kill_the_next_life_sweeps_what_the_last_one_left(tmp_path: Path) -> None:
    state, made = tmp_path / "state", tmp_path / "made"
    (made / "envd-ffffff-somebody-elses").mkdir(parents=True)
    env = {"INSTANCES": str(made)}
    async with daemon(state, prelude=DRIVER, env=env) as (first, session):
        await play(first, session)
        assert len(list(made.iterdir())) == 2
        first.signal(signal.SIGKILL)
        assert await first.ended() == -signal.SIGKILL
    async with daemon(state, prelude=DRIVER, env=env) as (second, session):
        assert [path.name for path in made.iterdir()] == ["envd-ffffff-somebody-elses"]
        await play(second, session)


async def test_a_second_daemon_on_the_state_directory_is_refused_and_the_first_stays(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state") as (first, session):
        kept = (tmp_path / "state" / "daemon-id").read_text()
        second = await start(tmp_path / "state")
        assert await second.ended() == 75
        assert f"process {first.pid}" in second.text
        assert "ENVD_STATE_DIR" in second.text
        assert (tmp_path / "state" / "daemon-id").read_text() == kept
        assert (tmp_path / "state" / "lock").read_text() == f"{first.pid}\n"
        await play(first, session)


async def test_a_taken_port_is_named_and_nothing_is_touched(tmp_path: Path) -> None:
    with bound("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        refused = await start(tmp_path / "state", "--port", str(port))
        assert await refused.ended() == 75
    assert f"127.0.0.1:{port}" in refused.text
    assert f"process {os.getpid()} (" in refused.text
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("env", "told"),
    [
        pytest.param(
            {"ENVD_PROT": "1", "ENVD_ENVS": "many", "PROVIDER": "dcoker"},
            ("ENVD_PROT", "did you mean ENVD_PORT", "ENVD_ENVS=many", "did you mean docker"),
            id="all at once",
        ),
        pytest.param(
            {"PROVIDER": "", "DOCKER_HOST": "tcp://127.0.0.1:1"},
            ("DOCKER_HOST=tcp://127.0.0.1:1", "unix://"),
            id="the default provider's engine is on another host",
        ),
        pytest.param({"ENVD_STATE_DIR": "/dev/null/state"}, ("/dev/null/state", "ENVD_STATE_DIR"), id="no directory"),
    ],
)
async def test_an_unusable_setting_stops_the_start(tmp_path: Path, env: dict[str, str], told: tuple[str, ...]) -> None:
    refused = await start(tmp_path / "state", env=env)
    assert await refused.ended(30) == 78
    assert [words for words in told if words not in refused.text] == []
    assert "Traceback" not in refused.text
    assert len(refused.log) <= 2


async def test_an_idle_daemon_is_idle_and_small(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state") as (process, session):
        await play(process, session)
        await session.close()
        before = cpu_seconds(process.pid)
        await asyncio.sleep(2)
        used = cpu_seconds(process.pid) - before
        # Far from what a busy loop would use, which is all of it.
        assert used < 0.3
        assert resident_bytes(process.pid) < 150e6


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_two_thousand_idle_connections_keep_nobody_out(tmp_path: Path) -> None:
    allow_open_files(8192)
    async with daemon(tmp_path / "state") as (process, session):
        idle = [await connect(process) for _ in range(2000)]
        assert (await ask(session, "GET", f"{process.url}/livez"))[0] == 200
        assert (await ended_job(session, process.url, (await reset(session, process.url))["id"]))[
            "state"
        ] == "succeeded"
        told = process.signal()
        assert await process.ended() == 0
        assert time.monotonic() - told < TO_EXIT
        for _, writer in idle:
            writer.close()


GARBAGE = {
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), b"400"),
    "endless head": (b"GET /livez HTTP/1.1\r\n" + b"X: y\r\n" * 20_000, b"431"),
    "no host": (b"GET /livez HTTP/1.1\r\n\r\n", b"400"),
    "negative length": (b"POST /env/reset HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", b"400"),
    "no chunk": (b"POST /env/reset HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
    "no path": (b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
    "method": (b"TRACE /v1/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"405"),
    "websocket": (
        b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        b"403",
    ),
}


async def test_garbage_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state") as (process, session):
        answered = {}
        for name, (sent, _) in GARBAGE.items():
            reader, writer = await connect(process, sent)
            async with asyncio.timeout(10):
                answered[name] = (await reader.read()).split(b" ")[1]
            writer.close()
        assert (await ask(session, "GET", f"{process.url}/livez"))[0] == 200
        assert answered == {name: status for name, (_, status) in GARBAGE.items()}
        assert [line for line in process.records() if line["level"] == "error"] == []


async def test_a_stream_over_http2_is_refused(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state") as (process, _):
        http2 = H2Connection()
        http2.initiate_connection()
        asked = [(":method", "GET"), (":path", "/v1/events"), (":scheme", "http"), (":authority", "localhost")]
        http2.send_headers(1, asked, end_stream=True)
        reader, writer = await connect(process, http2.data_to_send())
        events: list[Any] = []
        async with asyncio.timeout(10):
            while not any(isinstance(event, ResponseReceived) for event in events):
                events += http2.receive_data(await reader.read(65536))
        [answer] = [event for event in events if isinstance(event, ResponseReceived)]
        assert (b":status", b"505") in [(bytes(name), bytes(value)) for name, value in answer.headers]
        writer.close()
        process.signal()
        assert await process.ended() == 0


# In this process


def test_the_lock_is_held_by_one_and_let_go(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(StateDirLocked, match=str(os.getpid())), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("kept", [b"", b"12345", b"1234567", b"ABCDEF", b"\xff\xfe\x00abc", b"../../"])
def test_a_broken_daemon_id_is_made_anew(tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "daemon-id").write_bytes(kept)
    made = daemon_id(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{6}", made)
    assert daemon_id(tmp_path) == made
    assert [path.name for path in tmp_path.iterdir()] == ["daemon-id"]


def test_a_daemon_id_that_cannot_be_kept_is_a_settings_error(tmp_path: Path) -> None:
    (tmp_path / "daemon-id").mkdir()
    with pytest.raises(SettingsError, match=str(tmp_path)):
        daemon_id(tmp_path)


def test_a_bound_port_takes_connections_before_anybody_serves() -> None:
    with bound("127.0.0.1", 0) as listener:
        socket.create_connection(listener.getsockname(), timeout=5).close()
        with pytest.raises(AddressInUse), bound("127.0.0.1", listener.getsockname()[1]):
            pass


def test_hanging_up_cuts_what_was_accepted_and_nothing_else() -> None:
    with bound("127.0.0.1", 0) as one, bound("127.0.0.1", 0) as other:
        cut, kept = (socket.create_connection(listener.getsockname(), timeout=5) for listener in (one, other))
        for listener in (one, other):
            listener.settimeout(5)
        with cut, kept, one.accept()[0], other.accept()[0] as survivor:
            descriptors = len(os.listdir("/proc/self/fd"))
            hang_up({one.getsockname()[1]})
            assert cut.recv(1) == b""
            survivor.sendall(b"x")
            assert kept.recv(1) == b"x"
            assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes_and_never_lowered() -> None:
    program = """
import resource
from envd.daemon import allow_open_files
seen = []
for wanted in (32, 128, 512):
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256))
    allow_open_files(wanted)
    seen.append(resource.getrlimit(resource.RLIMIT_NOFILE))
assert seen == [(64, 256), (128, 256), (256, 256)], seen
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


@pytest.mark.parametrize(
    ("host", "told"),
    [
        pytest.param("no.such.host.invalid", "cannot be resolved", id="no such host"),
        pytest.param("192.0.2.1", "Cannot listen on 192.0.2.1:0", id="another machine's"),
    ],
)
def test_an_address_that_is_not_ours_is_a_settings_error(host: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told), bound(host, 0):
        pass
