"""What an earlier life of the daemon made is taken over by its next: the promise of `Driver.adopt`, held against the
drivers whose instances outlive their daemon, and what each of them refuses to take."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from aws_driving import Heard, driver_in, instances_of, spec
from aws_faults import FaultyAccount, said
from docker_engine import ENGINE, OwnEngine, docker, image, nothing_left, own_engine, tiny_images
from structlog.testing import capture_logs
from vm_engine import MACHINE, Told, both_answer, run_in, shared

from envd.actions.gestures import Move
from envd.drivers.aws import AwsDriver, boot, desktops, driver, instances, roots, sweep
from envd.drivers.base import Made, Report
from envd.drivers.docker import DockerDriver
from envd.errors import CloudRefused, DockerUnavailable
from envd.guest import Guest
from envd.models import ResetPath
from envd.settings import Settings
from envd.vm.console import HostIo
from envd.vm.kept import FILE
from envd.vm.monitor import Monitor
from envd.vm.trial import host_io_works

__all__ = ["nothing_left", "own_engine", "tiny_images"]


async def is_waiting(waiting: asyncio.Task[Any]) -> bool:
    """Still, after it had the time to look."""
    await asyncio.wait([waiting], timeout=0.5)
    return not waiting.done()


# -- instances of EC2 -----------------------------------------------------------------------------------------------


@pytest.fixture
def aws(account: FaultyAccount, monkeypatch: pytest.MonkeyPatch) -> FaultyAccount:
    """What takes seconds takes parts of one."""
    account.faults.heard.clear()
    account.forget_tokens()
    monkeypatch.setattr(instances, "BUSY", 0.05)
    monkeypatch.setattr(instances, "IDLE", 0.1)
    monkeypatch.setattr(boot, "LOOKS", 0.1)
    monkeypatch.setattr(desktops, "LOOKS", 0.05)
    monkeypatch.setattr(roots, "LOOKS", 0.05)
    return account


@asynccontextmanager
async def next_life(
    aws: FaultyAccount, left: Callable[[AwsDriver], Awaitable[Any]], **settings: Any
) -> AsyncIterator[AwsDriver]:
    """A driver whose earlier life did `left` and destroyed nothing."""
    async with driver_in(aws, **settings) as later:
        async with AwsDriver(later._settings, "test") as earlier:
            await left(earlier)
        yield later


async def makes(earlier: AwsDriver) -> None:
    await earlier.create(spec("a-1"), Report())


async def one(aws: FaultyAccount, name: str = "a-1") -> dict[str, Any]:
    return (await anyio.to_thread.run_sync(instances_of, aws))[name]


def schedules(aws: FaultyAccount) -> set[str]:
    told = aws.client("scheduler").list_schedules()["Schedules"]
    return {each["Name"].removeprefix("envd-ttl-") for each in told}


async def test_an_instance_is_taken_over_with_its_end(aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        before = await one(aws)
        made = await later.adopt("a-1", Report())
        assert made is not None
        assert made.endpoints.guest == f"http://{before['PrivateIpAddress']}:5000"
        waiting = asyncio.create_task(later.wait("a-1"))
        assert await is_waiting(waiting)
        assert isinstance(await later.log_tail("a-1"), tuple)
        assert aws.count("ec2:GetConsoleOutput") >= 1
        desktop = later._opened.known["a-1"]
        first = desktop.ends
        await later._opened.prolong(1e9)
        assert first is not None
        assert desktop.ends is not None
        assert desktop.ends >= first
        assert await later.list() == {"a-1"}
        await later.destroy("a-1")
        assert before["InstanceId"] in (await waiting).reason
        assert await later.list() == frozenset()
        assert before["InstanceId"] not in await anyio.to_thread.run_sync(schedules, aws)


async def test_what_is_pending_is_waited_for(aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        aws.rewrite("ec2:DescribeInstances", said("pending", 0))
        await later._opened._instances.fresh()
        heard = Heard()
        adopting = asyncio.create_task(later.adopt("a-1", heard))
        assert await is_waiting(adopting)
        aws.settled()
        assert await adopting is not None
        assert heard.phases == ["pending", "running"]


@pytest.mark.parametrize(
    "code", ["Client.InternalError", "Client.VolumeLimitExceeded", "Server.InsufficientInstanceCapacity"]
)
async def test_what_ends_while_it_is_pending_is_not_taken(code: str, aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        aws.rewrite("ec2:DescribeInstances", said("pending", 0))
        await later._opened._instances.fresh()
        heard = Heard()
        adopting = asyncio.create_task(later.adopt("a-1", heard))
        assert await is_waiting(adopting)
        aws.settled()
        aws.rewrite("ec2:DescribeInstances", said("terminated", 48, (code, f"{code}: No.")))
        assert await adopting is None
        assert heard.notes != []
        aws.settled()
        await later._opened._instances.fresh()  # it runs, and is ended


async def test_an_instance_that_was_killed_before_its_schedule_was_made_gets_one(aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        name = (await one(aws))["InstanceId"]
        await anyio.to_thread.run_sync(lambda: aws.client("scheduler").delete_schedule(Name=f"envd-ttl-{name}"))
        assert await later.adopt("a-1", Report()) is not None
        assert name in await anyio.to_thread.run_sync(schedules, aws)


async def test_an_instance_whose_end_cannot_be_scheduled_is_not_taken(aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        aws.fail("scheduler:UpdateSchedule", "AccessDeniedException", status=403, times=None)
        heard = Heard()
        assert await later.adopt("a-1", heard) is None
        assert "cannot be scheduled" in heard.notes[0]


async def test_an_instance_that_aws_will_end_is_not_taken_where_there_is_no_ttl(aws: FaultyAccount) -> None:
    async with driver_in(aws) as earlier:
        await makes(earlier)
        async with AwsDriver(earlier._settings.model_copy(update={"enable_ttl": False}), "test") as later:
            heard = Heard()
            assert await later.adopt("a-1", heard) is None
        assert "launched with a TTL" in heard.notes[0]


async def parks(earlier: AwsDriver) -> None:
    await makes(earlier)
    await earlier.park("a-1")


async def has_two(earlier: AwsDriver) -> None:
    """As two launches of one desktop would be."""
    await makes(earlier)
    await earlier.create(spec("a-2"), Report())
    other = earlier._opened.known["a-2"].instance_id
    tags = [{"Key": "envd:desktop", "Value": "a-1"}]
    await earlier._cloud.call("ec2", "create_tags", Resources=[other], Tags=tags)


async def ends(earlier: AwsDriver) -> None:
    """Without having been told to by its daemon."""
    await makes(earlier)
    name = earlier._opened.known["a-1"].instance_id
    await earlier._cloud.call("ec2", "terminate_instances", InstanceIds=[name])


async def makes_nothing(earlier: AwsDriver) -> None:
    pass


@pytest.mark.parametrize(
    "left",
    [
        pytest.param(makes_nothing, id="never made"),
        pytest.param(parks, id="parked"),
        pytest.param(has_two, id="two of it"),
        pytest.param(ends, id="terminated"),
    ],
)
async def test_what_is_not_taken_is_gone_when_it_is_destroyed(
    left: Callable[[AwsDriver], Awaitable[None]], aws: FaultyAccount
) -> None:
    async with next_life(aws, left, aws_spares_stopped=True) as later:
        assert await later.adopt("a-1", Report()) is None
        assert "a-1" not in later._opened
        await later.destroy("a-1")
        assert await anyio.to_thread.run_sync(instances_of, aws) == {}


async def test_an_instance_of_another_daemon_is_not_taken(aws: FaultyAccount) -> None:
    async with driver_in(aws, "other") as other, driver_in(aws) as ours:
        await makes(other)
        assert await ours.adopt("a-1", Report()) is None
        await ours.destroy("a-1")
        assert await other.list() == {"a-1"}


async def renews(earlier: AwsDriver) -> None:
    await makes(earlier)
    await earlier.renew("a-1", spec("a-2"), Report())


async def test_a_renewed_instance_is_taken_by_its_new_name(aws: FaultyAccount) -> None:
    async with next_life(aws, renews, aws_reset="replace-root") as later:
        assert await later.adopt("a-1", Report()) is None
        assert await later.adopt("a-2", Report()) is not None


async def test_an_instance_whose_renewal_was_interrupted_is_dirty_and_not_taken(aws: FaultyAccount) -> None:
    async def is_interrupted(earlier: AwsDriver) -> None:
        await makes(earlier)
        held = aws.hold("ec2:CreateReplaceRootVolumeTask", "before")
        renewing = asyncio.create_task(earlier.renew("a-1", spec("a-2"), Report()))
        await held.reached()
        renewing.cancel()
        held.drop()
        with contextlib.suppress(asyncio.CancelledError):
            await renewing

    async with next_life(aws, is_interrupted, aws_reset="replace-root") as later:
        heard = Heard()
        assert await later.adopt("a-2", heard) is None
        assert "may not have been replaced" in heard.notes[0]
        await later.destroy("a-2")
        assert await anyio.to_thread.run_sync(instances_of, aws) == {}


async def test_destroying_it_meanwhile_ends_the_taking_over(aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        name = (await one(aws))["InstanceId"]
        held = aws.hold("scheduler:UpdateSchedule", "before")
        adopting = asyncio.create_task(later.adopt("a-1", Report()))
        await held.reached()
        destroying = asyncio.create_task(later.destroy("a-1"))
        await asyncio.sleep(0)
        held.release()
        assert await adopting is None
        await destroying
        assert await anyio.to_thread.run_sync(instances_of, aws) == {}
        assert name not in await anyio.to_thread.run_sync(schedules, aws)


async def test_that_aws_does_not_answer_is_not_taken_for_an_instance_that_is_gone(aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        aws.fail("ec2:DescribeInstances", "AuthFailure", status=401, times=None)
        with pytest.raises(CloudRefused):
            await later.adopt("a-1", Report())
        aws.settled()
        assert await later.adopt("a-1", Report()) is not None


async def test_no_sweep_comes_before_instances_could_be_taken_over(
    aws: FaultyAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opens the driver takes `a-1` over after many of EC2's answers; `a-2` is nobody's, and swept later."""

    async def makes_two(earlier: AwsDriver) -> None:
        await makes(earlier)
        await earlier.create(spec("a-2"), Report())

    defaults = sweep.sweep.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "grace", 0.0)
    async with next_life(aws, makes_two) as first:
        monkeypatch.setattr(driver, "SWEEPS", 3.0)
        async with AwsDriver(first._settings, "test") as later, asyncio.timeout(20):
            for _ in range(5):
                await later._opened._instances.fresh()
            assert set(await anyio.to_thread.run_sync(instances_of, aws)) == {"a-1", "a-2"}
            assert await later.adopt("a-1", Report()) is not None
            while set(await anyio.to_thread.run_sync(instances_of, aws)) != {"a-1"}:
                await later._opened._instances.fresh()


# -- containers -----------------------------------------------------------------------------------------------------

MIB = 1024**2
a_container = pytest.mark.docker
tiny = pytest.mark.usefixtures("tiny_images", "nothing_left")


def of_docker(state_dir: Path, **more: Any) -> Settings:
    about = {"docker_image": image("serves"), "ram_size": 64 * MIB, **more}
    return Settings(provider="docker", state_dir=state_dir, **about)


@asynccontextmanager
async def later_life(settings: Settings, daemon_id: str = "test") -> AsyncIterator[DockerDriver]:
    """Whose desktops are destroyed in the end."""
    async with DockerDriver(settings, daemon_id) as opened:
        try:
            yield opened
        finally:
            for left in await opened.list():
                await opened.destroy(left)


async def tell(*arguments: str, host: str = ENGINE) -> str:
    return await anyio.to_thread.run_sync(lambda: docker(*arguments, host=host))


async def containers_of(name: str) -> str:
    return await tell("ps", "--all", "--quiet", "--filter", f"label=io.envd.desktop={name}")


async def answers(url: str) -> bool:
    """Within its time: a container that runs may not have got that far."""
    async with asyncio.timeout(20), aiohttp.ClientSession() as http:
        while True:
            try:
                async with http.get(url) as answer:
                    return answer.status == 200
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)


async def container_made(settings: Settings, daemon_id: str = "test") -> Made:
    """By an earlier life."""
    async with DockerDriver(settings, daemon_id) as earlier:
        return await earlier.create(spec("a-1"), Report())


@a_container
@tiny
async def test_a_container_is_taken_over(tmp_path: Path) -> None:
    before = await container_made(of_docker(tmp_path))
    async with later_life(of_docker(tmp_path)) as later:
        told = Told(until="guest server")
        made = await later.adopt("a-1", told)
        assert made == before
        assert await answers(made.endpoints.guest)
        async with asyncio.timeout(20):
            await told.reached.wait()
        waiting = asyncio.create_task(later.wait("a-1"))
        assert await is_waiting(waiting)
        assert await later.log_tail("a-1") == ("envd-milestone: guest-server",)
        await later.destroy("a-1")
        assert (await waiting).reason == "it was destroyed"
        assert await later.list() == frozenset()
        assert await containers_of("a-1") == ""


@a_container
@tiny
async def test_a_container_that_was_taken_over_dies_with_its_limit_known(tmp_path: Path) -> None:
    await container_made(of_docker(tmp_path))
    async with later_life(of_docker(tmp_path)) as later:
        assert await later.adopt("a-1", Report()) is not None
        waiting = asyncio.create_task(later.wait("a-1"))
        async with asyncio.timeout(30):
            with capture_logs() as logged:
                with pytest.raises(AssertionError):  # it is killed
                    await tell("exec", "a-1", "perl", "-e", "$x .= q(a) x 1e6 while 1")
                # The engine tells of it when it comes to it.
                while not any("for lack of memory" in str(line["event"]) for line in logged):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            await tell("kill", "a-1")
            death = await waiting
    assert death.out_of_memory == 64 * MIB


@a_container
@tiny
@pytest.mark.parametrize("how", ["kill", "stop", "pause", "rm --force --volumes"])
async def test_a_container_that_does_not_run_is_not_taken_and_can_be_destroyed(how: str, tmp_path: Path) -> None:
    await container_made(of_docker(tmp_path))
    await tell(*how.split(), "a-1")
    async with later_life(of_docker(tmp_path)) as later:
        assert await later.adopt("a-1", Report()) is None
        await later.destroy("a-1")
        assert await later.list() == frozenset()
        assert await containers_of("a-1") == ""


@a_container
@tiny
@pytest.mark.parametrize(
    "made",
    [
        pytest.param(["create"], id="never started"),
        pytest.param(["run", "--detach"], id="without ports"),
        pytest.param(
            ["run", "--detach", "--publish-all", "--expose", "5000", "--label", "io.envd.kind=qemu"], id="a cell"
        ),
    ],
)
async def test_a_container_that_is_no_desktop_is_not_taken(made: list[str], tmp_path: Path) -> None:
    labels = ("--label", "io.envd.daemon=test", "--label", "io.envd.desktop=a-1")
    await tell(*made, "--name", "a-1", *labels, image("serves"))
    async with later_life(of_docker(tmp_path)) as later:
        assert await later.list() == {"a-1"}
        assert await later.adopt("a-1", Report()) is None


@a_container
@tiny
async def test_containers_of_nobody_another_daemon_and_another_kind_are_not_taken(tmp_path: Path) -> None:
    await container_made(of_docker(tmp_path), "other")
    async with later_life(of_docker(tmp_path), "other") as other:
        async with later_life(of_docker(tmp_path)) as later:
            assert await later.adopt("a-1", Report()) is None
            assert await later.adopt("never-made", Report()) is None
            assert await later.adopt("../a", Report()) is None
        assert await other.list() == {"a-1"}
        async with DockerDriver(of_docker(tmp_path, docker_image="envd/qemu", **TEMPLATES), "other") as machines:
            assert await machines.list() == {"a-1"}
            assert await machines.adopt("a-1", Report()) is None


@a_container
async def test_an_engine_that_is_away_is_not_taken_for_a_container_that_is_gone(
    own_engine: OwnEngine, tmp_path: Path
) -> None:
    settings = of_docker(tmp_path, docker_host=own_engine.host)
    await container_made(settings)
    async with DockerDriver(settings, "test") as later:
        await anyio.to_thread.run_sync(own_engine.stop)
        with pytest.raises(DockerUnavailable):
            await later.adopt("a-1", Report())
        await anyio.to_thread.run_sync(own_engine.start)
        assert await later.adopt("a-1", Report()) is None  # it has ended with its engine
        await tell("start", "a-1", host=own_engine.host)
        made = await later.adopt("a-1", Report())
        assert made is not None
        asked = ("inspect", "--format", "{{json .NetworkSettings.Ports}}", "a-1")
        ports = json.loads(await tell(*asked, host=own_engine.host))
        assert made.endpoints.guest == f"http://127.0.0.1:{ports['5000/tcp'][0]['HostPort']}"
        await later.destroy("a-1")
        assert await later.list() == frozenset()


# -- virtual machines in containers ---------------------------------------------------------------------------------

TEMPLATES: dict[str, Any] = {"template_dir": shared() / "templates"}
VM = {"docker_image": "envd/qemu", **TEMPLATES, **MACHINE}
A_MACHINE = (pytest.mark.docker, pytest.mark.qemu, pytest.mark.timeout(900))
"""The first of these tests waits for the template."""

EARLIER = """
import asyncio, json, os, signal, sys
from pathlib import Path
from envd.actions.gestures import Move
from envd.drivers.base import InstanceSpec, Report
from envd.drivers.docker import DockerDriver
from envd.settings import Settings
from vm_engine import both_answer

asked = json.loads(sys.argv[1])
class Dies(Report):
    def phase(self, name):
        if name == asked["dies_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
    async def ready(self, endpoints):
        await both_answer(endpoints, picture=True)
async def main():
    settings = Settings(provider="docker", state_dir=Path(asked["state_dir"]), **asked["settings"])
    async with DockerDriver(settings, "test") as driver:
        made = await driver.create(InstanceSpec("a-1", (1920, 1080)), Dies())
        await both_answer(made.endpoints)
        console = driver.console("a-1")
        await console.perform([Move(400, 300)])
        if asked["pauses"]:
            await console.pause()
        print(made.endpoints.model_dump_json(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


async def killed_life(state_dir: Path, dies_at: str = "", pauses: bool = False, **changes: Any) -> str:
    """A process that makes a machine and is killed in the phase `dies_at`, or when it is ready. What it printed."""
    settings = {**VM, "template_dir": str(VM["template_dir"]), **changes}
    asked = {"state_dir": str(state_dir), "dies_at": dies_at, "pauses": pauses, "settings": settings}
    paths = os.pathsep.join(sys.path)
    done = await anyio.run_process(
        [sys.executable, "-c", EARLIER, json.dumps(asked)],
        check=False,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == -signal.SIGKILL, done.stdout.decode()
    return done.stdout.decode().splitlines()[-1] if not dies_at else ""


@pytest.fixture
async def a_template(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Made by the first test, in minutes."""
    async with later_life(of_docker(tmp_path_factory.mktemp("template"), **VM)) as machines:
        if machines.next_path() is not ResetPath.RESTORE:
            await machines.create(spec("template"), Told())


def a_machine(test: Any) -> Any:
    for mark in A_MACHINE:
        test = mark(test)
    return test


@a_machine
@pytest.mark.usefixtures("a_template")
@pytest.mark.parametrize("pauses", [False, True], ids=["running", "paused"])
async def test_a_clone_of_a_killed_daemon_goes_on_with_its_screen_and_its_hands(pauses: bool, tmp_path: Path) -> None:
    endpoints = json.loads(await killed_life(tmp_path, pauses=pauses))
    async with later_life(of_docker(tmp_path, **VM)) as later:
        assert await later.list() == {"a-1"}
        made = await later.adopt("a-1", Report())
        assert made is not None
        assert (made.endpoints.model_dump(), made.path) == (endpoints, ResetPath.RESTORE)
        await both_answer(made.endpoints)
        console = later.console("a-1")
        assert console is not None
        assert made.frame is not None
        assert made.frame.startswith(b"\x89PNG")
        assert (console.pictures, console.input) == (True, True)
        # The tablet is where the earlier life left it, and the guest's pointer elsewhere.
        position = "python3 -c 'import pyautogui; {}print(*pyautogui.position())'"
        assert await run_in(made, position.format("pyautogui.moveTo(10, 20); ")) == "10 20"
        await console.perform([Move(400, 300)])
        assert await run_in(made, position.format("")) == "400 300"
        if not pauses:
            async with aiohttp.ClientSession() as http:
                seen = await host_io_works(console, Guest(http, made.endpoints.guest))
            assert seen == HostIo(True, True, seen.detail), seen.detail
        waiting = asyncio.create_task(later.wait("a-1"))
        assert await is_waiting(waiting)
        await run_in(made, "echo said after it | sudo tee /dev/ttyS0")
        assert "said after it" in await later.log_tail("a-1")
        await later.destroy("a-1")
        assert "destroyed" in (await waiting).reason
        assert later.console("a-1") is None
        assert await later.list() == frozenset()
        assert await containers_of("a-1") == ""
        assert list((tmp_path / "docker" / "desktops").iterdir()) == []


@a_machine
@pytest.mark.usefixtures("a_template")
async def test_a_clone_without_an_identity_is_not_taken_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    await killed_life(tmp_path, dies_at="identity")
    assert await containers_of("a-1") != ""
    async with later_life(of_docker(tmp_path, **VM)) as later:
        assert await later.list() == {"a-1"}
        assert await later.adopt("a-1", Report()) is None
        await later.destroy("a-1")
        assert await later.list() == frozenset()
        assert await containers_of("a-1") == ""


@a_machine
@pytest.mark.usefixtures("a_template")
@pytest.mark.parametrize("how", ["killed", "paused container", "nonsense in its file", "frozen"])
async def test_a_machine_that_does_not_run_is_not_taken(how: str, tmp_path: Path) -> None:
    async with DockerDriver(of_docker(tmp_path, **VM), "test") as earlier:
        await earlier.create(spec("a-1"), Report())
    kept = tmp_path / "docker" / "desktops" / "a-1" / FILE
    match how:
        case "killed":
            await tell("kill", "a-1")
        case "paused container":
            await tell("pause", "a-1")
        case "nonsense in its file":
            kept.write_text('{"format": 1, "path": "cold"')
        case "frozen":
            async with Monitor.open(kept.parent / "desktop" / "qmp.sock") as monitor:
                await monitor.pause()
                await monitor.save_state(tmp_path / "state")
    async with later_life(of_docker(tmp_path, **VM)) as later:
        assert await later.adopt("a-1", Report()) is None
        assert later.console("a-1") is None
        await later.destroy("a-1")
        assert await later.list() == frozenset()
        assert await containers_of("a-1") == ""
        assert not kept.parent.exists()


@a_machine
async def test_a_cold_boot_goes_on_in_the_next_life(tmp_path: Path) -> None:
    await killed_life(tmp_path, dies_at="kernel", templates="off")
    async with later_life(of_docker(tmp_path, **{**VM, "templates": "off"})) as later:
        told = Told(until="guest server")
        made = await later.adopt("a-1", told)
        assert made is not None
        assert (made.path, made.frame) == (ResetPath.COLD, None)
        await both_answer(made.endpoints)
        await told.reached.wait()
        assert [phase for phase in told.phases if phase != "boot loader"][:2] == ["kernel", "display"]
        assert later.console("a-1") is not None
    assert await containers_of("a-1") == ""
