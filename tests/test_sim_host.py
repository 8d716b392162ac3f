"""Sim desktops that outlive the daemon: real processes, ended by real signals."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from daemon_process import daemon, ended_job, environment, reset

from envd.drivers import make_driver
from envd.drivers.base import InstanceSpec, Made, Report
from envd.drivers.sim import Behaviour, Fault, HostedSimDriver, SimDriver, SimHost, hosted, wire
from envd.errors import BootFailed, InfraError, SettingsError, StartError
from envd.guest import Guest
from envd.models import Endpoints, ResetPath
from envd.settings import Settings

DAEMON = """
import asyncio, sys
from pathlib import Path
from envd.drivers.base import InstanceSpec, Report
from envd.drivers.sim import HostedSimDriver
from envd.settings import Settings

async def main(state_dir, sim):
    async with HostedSimDriver(Settings(provider="sim", state_dir=Path(state_dir), sim=sim), "test") as driver:
        print("open", flush=True)
        print((await driver.create(InstanceSpec("a-1", (320, 240)), Report())).endpoints.guest, flush=True)
        await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""
"""A process that opens the driver and makes one desktop."""
TYPE_HELLO = ["python", "-c", "import pyautogui; pyautogui.write('hello')"]


def spec(name: str) -> InstanceSpec:
    return InstanceSpec(name, (320, 240))


def hosted_sim(state_dir: Path, behaviour: Behaviour | None = None, daemon_id: str = "test") -> HostedSimDriver:
    return HostedSimDriver(Settings(provider="sim", state_dir=state_dir), daemon_id, behaviour or Behaviour())


async def until(fact: Callable[[], Awaitable[object]], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not await fact():  # noqa: ASYNC110 - another process has no event to wait for
            await asyncio.sleep(0.01)


async def pid_of_host(state_dir: Path) -> int:
    async with SimHost(state_dir) as host:
        return host.pid


async def ended(handle: int, seconds: float) -> None:
    """Return when the process of that pidfd has."""
    async with asyncio.timeout(seconds):
        await hosted._readable(handle)


@asynccontextmanager
async def watched(state_dir: Path) -> AsyncIterator[int]:
    """A pidfd of the host; it is ended with the block if it runs by then, and has had nothing to complain about."""
    handle = os.pidfd_open(await pid_of_host(state_dir))
    try:
        yield handle
        assert (state_dir / wire.LOG).read_text() == ""
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


@asynccontextmanager
async def opened_elsewhere(state_dir: Path, sim: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The driver, in a process group of its own that is killed with the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", DAEMON, str(state_dir), sim),
        env=environment(state_dir),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"open\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def answers(url: str) -> bool:
    async with aiohttp.ClientSession() as http:
        try:
            return bool(await Guest(http, url).screenshot())
        except InfraError:
            return False


class Judge(Report):
    """Says ready when it is told to."""

    def __init__(self, verdict: bool) -> None:
        self.asked: asyncio.Future[Endpoints] = asyncio.get_running_loop().create_future()
        self.phases: list[str] = []
        self._says = asyncio.Event()
        if verdict:
            self._says.set()

    def phase(self, name: str) -> None:
        self.phases.append(name)

    async def ready(self, endpoints: Endpoints) -> None:
        self.asked.set_result(endpoints)
        await self._says.wait()


# What outlives what


async def test_a_desktop_outlives_a_daemon_that_is_killed_and_remembers_what_was_done(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with daemon(state, env={"ENVD_SIM": "outlive"}) as (process, session):
        job = await ended_job(session, process.url, (await reset(session, process.url))["id"])
        assert job["state"] == "succeeded"
        async with watched(state) as host:
            process.signal_all(signal.SIGKILL)
            assert await process.ended() == -signal.SIGKILL
            async with hosted_sim(state, daemon_id=(state / "daemon-id").read_text().strip()) as driver:
                [left] = await driver.list()
                made = await driver.adopt(left, Report())
                assert made is not None
                async with aiohttp.ClientSession() as http, SimHost(state) as looked:
                    done = len(await looked.inputs(left))
                    await Guest(http, made.endpoints.guest).execute(TYPE_HELLO)
                    assert len(await looked.inputs(left)) == done + 1
                    assert await looked.typed(left) == "hello"
                    verbs = [entry.verb for entry in await looked.journal() if entry.id == left]
                assert verbs == ["create-begin", "create-end", "ready", "adopt"]
                await driver.destroy(left)
            await ended(host, 5)


async def test_a_daemon_that_is_told_to_end_leaves_neither_desktops_nor_host(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with daemon(state, env={"ENVD_SIM": "outlive"}) as (process, session):
        await ended_job(session, process.url, (await reset(session, process.url))["id"])
        async with watched(state) as host:
            process.signal(signal.SIGTERM)
            assert await process.ended() == 0
            await ended(host, 5)


async def test_a_create_that_its_daemon_did_not_see_the_end_of_is_adopted_when_it_is_done(tmp_path: Path) -> None:
    async with opened_elsewhere(tmp_path, "create=0.5,boot=0.2") as process, watched(tmp_path):
        async with SimHost(tmp_path) as host:
            await until(lambda: host.ask("list"))
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        async with hosted_sim(tmp_path) as driver:
            assert await driver.list() == {"a-1"}
            made = await driver.adopt("a-1", Report())
            assert made is not None
            await until(lambda: answers(made.endpoints.guest))
            await driver.destroy("a-1")


@pytest.mark.parametrize("sim", [pytest.param("create=600", id="boot"), pytest.param("restore=600", id="clone")])
async def test_a_create_that_its_daemon_did_not_see_the_end_of_is_ended_by_destroy(sim: str, tmp_path: Path) -> None:
    async with opened_elsewhere(tmp_path, sim) as process, watched(tmp_path) as host_process:
        async with SimHost(tmp_path) as host:
            await until(lambda: host.ask("list"))
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        async with hosted_sim(tmp_path) as driver, asyncio.timeout(5):
            adopting = asyncio.create_task(driver.adopt("a-1", Report()))
            await driver.destroy("a-1")
            assert await adopting is None
            assert await driver.list() == frozenset()
        await ended(host_process, 5)


@pytest.mark.parametrize("boot_s", [pytest.param(0.0, id="ready"), pytest.param(2.0, id="booting")])
async def test_what_lives_is_adopted(boot_s: float, tmp_path: Path) -> None:
    async with hosted_sim(tmp_path, Behaviour(boot_s=boot_s)) as earlier, watched(tmp_path):
        made = await earlier.create(spec("a-1"), Report())
        await earlier.__aexit__(None, None, None)
        async with hosted_sim(tmp_path) as driver:
            assert await driver.adopt("a-1", Report()) == made
            assert await answers(made.endpoints.guest) is (boot_s == 0)
            await until(lambda: answers(made.endpoints.guest))


async def test_what_has_died_is_not_adopted(tmp_path: Path) -> None:
    async with hosted_sim(tmp_path) as driver, watched(tmp_path), SimHost(tmp_path) as host:
        await driver.create(spec("a-1"), Report())
        await host.kill("a-1")
        assert await driver.adopt("a-1", Report()) is None
        assert await driver.list() == {"a-1"}


async def test_one_that_was_parked_is_awake_when_it_is_adopted(tmp_path: Path) -> None:
    async with hosted_sim(tmp_path, Behaviour(parks=True)) as earlier, watched(tmp_path):
        made = await earlier.create(spec("a-1"), Report())
        await earlier.park("a-1")
        assert not await answers(made.endpoints.guest)
        async with hosted_sim(tmp_path, Behaviour(parks=True)) as driver:
            assert await driver.adopt("a-1", Report()) == made
            assert await answers(made.endpoints.guest)
            await driver.park("a-1")
            assert await driver.unpark("a-1", Report()) == made
            await driver.park("a-1")
            async with SimHost(tmp_path) as host:
                await host.kill("a-1")
            assert await driver.adopt("a-1", Report()) is None


async def test_a_template_whose_judge_died_is_judged_by_whoever_adopts(tmp_path: Path) -> None:
    behaviour = Behaviour(restore_s=0.01)
    async with hosted_sim(tmp_path, behaviour) as earlier, watched(tmp_path), asyncio.timeout(10):
        gone, judge = Judge(verdict=False), Judge(verdict=True)
        creating = asyncio.create_task(earlier.create(spec("a-1"), gone))
        await gone.asked
        assert gone.phases == ["template"]
        creating.cancel()
        await asyncio.wait([creating])
        await earlier.__aexit__(None, None, None)
        async with hosted_sim(tmp_path, behaviour) as driver:
            assert driver.next_path() is ResetPath.COLD
            made = await driver.adopt("a-1", judge)
            assert await judge.asked == await gone.asked
            assert made is not None
            assert made.path is ResetPath.RESTORE
            assert made.frame is not None
            assert driver.next_path() is ResetPath.RESTORE


async def test_a_renewed_desktop_is_known_by_its_new_id(tmp_path: Path) -> None:
    async with hosted_sim(tmp_path, Behaviour(renews=True)) as driver, watched(tmp_path):
        await driver.create(spec("a-1"), Report())
        waiting = asyncio.create_task(driver.wait("a-1"))
        await asyncio.sleep(0)
        assert isinstance(await driver.renew("a-1", spec("a-2"), Report()), Made)
        assert (await waiting).reason == "destroyed"
        assert await driver.list() == {"a-2"}
        assert await driver.renew("a-1", spec("a-3"), Report()) is None


async def test_a_daemon_that_dies_with_answers_unread_is_missed_by_nobody(tmp_path: Path) -> None:
    async with hosted_sim(tmp_path, Behaviour(linger_s=0.2)) as driver, watched(tmp_path) as host:
        await driver.create(spec("a-1"), Report())
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(tmp_path / wire.SOCKET))
            for call in range(2):
                rude.sendall(wire.line({"call": call, "do": "hello", "daemon_id": "test", "linger_s": 0.2}))
            await until(lambda: _readable_now(rude))
        await driver.__aexit__(None, None, None)
        await ended(host, 5)


async def _readable_now(of: socket.socket) -> bool:
    return bool(select.select([of], [], [], 0)[0])


# The host's own life


async def test_when_the_host_is_killed_everybody_hears_of_it_and_the_next_create_has_a_new_one(tmp_path: Path) -> None:
    behaviour = Behaviour(create_s=600)
    async with hosted_sim(tmp_path) as driver:
        async with watched(tmp_path) as host:
            made = await driver.create(spec("a-1"), Report())
            waiting = [asyncio.create_task(driver.wait("a-1")) for _ in range(2)]
            driver.behaviours = behaviour
            creating = asyncio.create_task(driver.create(spec("a-2"), Report()))
            async with SimHost(tmp_path) as looked:
                await until(lambda: _has(looked, "a-2"))
            signal.pidfd_send_signal(host, signal.SIGKILL)
            async with asyncio.timeout(2):
                assert [death.reason for death in await asyncio.gather(*waiting)] == ["the sim host ended"] * 2
                with pytest.raises(BootFailed, match="host ended while it made a-2"):
                    await creating
            assert not await answers(made.endpoints.guest)
            await driver.destroy("a-1")
            assert await driver.list() == frozenset()
            assert await driver.adopt("a-1", Report()) is None
            assert await driver.log_tail("a-1") == ()
            with pytest.raises(InfraError):
                await driver.park("a-1")
            with pytest.raises(BootFailed):
                await driver.unpark("a-1", Report())
        driver.behaviours = Behaviour()
        again = await driver.create(spec("a-3"), Report())
        async with watched(tmp_path):
            assert await answers(again.endpoints.guest)
            assert await driver.list() == {"a-3"}


async def _has(host: SimHost, instance_id: str) -> bool:
    return instance_id in await host.ask("list")


async def test_a_host_without_a_daemon_ends_by_itself_and_leaves_no_port(tmp_path: Path) -> None:
    async with hosted_sim(tmp_path, Behaviour(linger_s=0.3)) as driver, watched(tmp_path) as host:
        made = await driver.create(spec("a-1"), Report())
        # A test that only looks keeps it from nothing.
        async with SimHost(tmp_path):
            await driver.__aexit__(None, None, None)
            await ended(host, 5)
    assert not await answers(made.endpoints.guest)
    assert not (tmp_path / wire.SOCKET).exists()


async def test_a_host_does_not_end_while_there_is_a_daemon(tmp_path: Path) -> None:
    async with hosted_sim(tmp_path, Behaviour(linger_s=0.1)) as driver, watched(tmp_path) as host:
        await driver.create(spec("a-1"), Report())
        with pytest.raises(TimeoutError):
            await ended(host, 0.5)


async def test_a_host_without_daemon_and_desktop_ends_at_once(tmp_path: Path) -> None:
    async with hosted_sim(tmp_path) as driver, watched(tmp_path) as host:
        await driver.create(spec("a-1"), Report())
        await driver.destroy("a-1")
        await driver.__aexit__(None, None, None)
        await ended(host, 5)


async def test_drivers_that_open_and_close_at_once_find_one_host_each_time(tmp_path: Path) -> None:
    async def life(name: str) -> None:
        for turn in range(3):
            async with hosted_sim(tmp_path) as driver:
                await driver.create(spec(f"{name}-{turn}"), Report())
                assert f"{name}-{turn}" in await driver.list()
                await driver.destroy(f"{name}-{turn}")

    await asyncio.gather(life("a"), life("b"))


async def test_two_drivers_at_once_start_one_host(tmp_path: Path) -> None:
    drivers = [hosted_sim(tmp_path) for _ in range(3)]
    await asyncio.gather(*(driver.__aenter__() for driver in drivers))
    try:
        async with watched(tmp_path):
            await drivers[0].create(spec("b-1"), Report())
            assert [await driver.list() for driver in drivers] == [{"b-1"}] * 3
    finally:
        await asyncio.gather(*(driver.__aexit__(None, None, None) for driver in drivers))


async def test_a_state_directory_may_have_a_long_name(tmp_path: Path) -> None:
    state = tmp_path / ("x" * 120) / ("y" * 120)
    async with hosted_sim(state) as driver, watched(state):
        await driver.create(spec("a-1"), Report())
        assert await driver.list() == {"a-1"}


async def test_a_daemon_of_another_id_is_refused(tmp_path: Path) -> None:
    async with hosted_sim(tmp_path, daemon_id="one") as driver, watched(tmp_path):
        await driver.create(spec("a-1"), Report())
        with pytest.raises(StartError, match="the daemon one") as caught:
            await hosted_sim(tmp_path, daemon_id="two").__aenter__()
        assert "ENVD_STATE_DIR" in caught.value.hint
        assert await driver.list() == {"a-1"}


async def test_a_host_that_cannot_be_started_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / wire.LOCK).mkdir()
    with pytest.raises(StartError, match="Is a directory") as caught:
        await hosted_sim(tmp_path).__aenter__()
    assert f"-m envd.drivers.sim.host {tmp_path}" in caught.value.hint


async def test_a_state_directory_that_cannot_be_made_is_an_error_that_says_so() -> None:
    with pytest.raises(StartError, match="/dev/null") as caught:
        await hosted_sim(Path("/dev/null/state")).__aenter__()
    assert caught.value.hint == "Set ENVD_STATE_DIR."


async def test_a_host_that_does_not_answer_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosted, "TO_ANSWER", 0.5)
    with (tmp_path / wire.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StartError, match="does not answer") as caught:
            await hosted_sim(tmp_path).__aenter__()
    assert str(tmp_path / wire.LOCK) in caught.value.hint


async def test_what_a_killed_host_left_lying_about_is_no_obstacle(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / wire.SOCKET))
    async with hosted_sim(tmp_path) as driver, watched(tmp_path):
        await driver.create(spec("a-1"), Report())
        assert await driver.list() == {"a-1"}


async def test_calls_that_wait_when_the_driver_is_closed_are_told_and_nothing_has_died(tmp_path: Path) -> None:
    async with hosted_sim(tmp_path) as driver, watched(tmp_path):
        await driver.create(spec("a-1"), Report())
        waiting = asyncio.create_task(driver.wait("a-1"))
        await asyncio.sleep(0)
        await driver.__aexit__(None, None, None)
        with pytest.raises(InfraError, match="was closed"):
            await waiting
        async with SimHost(tmp_path) as host:
            assert await host.ask("list") == ["a-1"]


# Behaviour


async def test_desktops_behave_as_the_driver_that_asks_for_them_is_told(tmp_path: Path) -> None:
    async with hosted_sim(tmp_path) as driver, watched(tmp_path):
        driver.behaviours = [Behaviour(create_fails="no room"), Behaviour(destroy_fails=1)]
        with pytest.raises(BootFailed, match="no room") as caught:
            await driver.create(spec("a-1"), Report())
        assert caught.value.facts["log"] == ["died: no room"]
        await driver.create(spec("a-2"), Report())
        with pytest.raises(InfraError, match="would not go") as refused:
            await driver.destroy("a-2")
        assert "destroy_fails" in refused.value.hint
        await driver.destroy("a-2")
        assert await driver.list() == {"a-1"}


def test_a_behaviour_crosses_the_wire_whole() -> None:
    behaviour = replace(
        Behaviour.parse("flaky,cdp=launch,restore=0.5,bad=half+cut"), on={"/execute rm": Fault("die", call=2)}
    )
    assert wire.behaviour_from(json.loads(json.dumps(wire.behaviour_to(behaviour)))) == behaviour


@pytest.mark.parametrize(
    ("sim", "driver"),
    [
        pytest.param("", SimDriver, id="in process"),
        pytest.param("outlive", HostedSimDriver, id="alone"),
        pytest.param("outlive,boot=0.3", HostedSimDriver, id="first"),
        pytest.param("slow,renews,outlive", HostedSimDriver, id="last"),
        pytest.param("outlive=false", SimDriver, id="not"),
    ],
)
def test_the_setting_decides_where_desktops_live(sim: str, driver: type, tmp_path: Path) -> None:
    assert type(make_driver(Settings(provider="sim", state_dir=tmp_path, sim=sim), "test")) is driver


def test_what_outlives_the_daemon_has_no_console() -> None:
    with pytest.raises(SettingsError, match="no console"):
        Behaviour.parse("outlive,console")


def test_what_was_made_crosses_the_wire_whole() -> None:
    made = Made(Endpoints(guest="http://127.0.0.1:1", cdp="http://127.0.0.1:2"), ResetPath.RESTORE, b"\x89PNG")
    assert wire.made_from(json.loads(json.dumps(wire.made_to(made)))) == made
