"""What every driver promises (`drivers/base.py`), held against each: one set of tests, all providers.

A driver takes part by being an item of DRIVERS: how it is made, and how one of its instances is made to die by itself.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import anyio
import pytest
from aws_faults import FaultyAccount, faulty_account
from aws_guests import Guests, guests, settings_in
from PIL import Image
from vm_engine import MACHINE, SCREEN, Told, engine, shared

import envd.drivers.aws
import envd.drivers.docker
import envd.drivers.local
import envd.drivers.qemu  # noqa: F401 - here, since an import blocks and drivers are imported when they are chosen
from envd.boot.probes import Readiness
from envd.drivers import make_driver
from envd.drivers.aws import instances
from envd.drivers.base import Death, Driver, InstanceSpec, Made, Report
from envd.drivers.qemu import QemuDriver
from envd.drivers.sim import HostedSimDriver, SimDriver, SimHost
from envd.errors import BootFailed, GuestMisbehaved
from envd.guest import Cdp, Guest
from envd.models import Endpoints, Probe, ResetPath
from envd.settings import Settings
from envd.vm.running import process_of

PATIENCE = 60
"""Seconds for what takes parts of one where nothing is emulated: there a new page alone takes ten."""


@dataclass(frozen=True)
class Provider:
    name: str
    kill: Callable[[Driver, str, Endpoints], Awaitable[str]]
    """Make the instance die by itself. Returns a word that the reason of its death must have."""
    image: str = "envd/desktop"
    virtual: bool = False
    """Whether its desktops are virtual machines, which are clones of one template then."""
    cloud: bool = False
    """Whether they are instances of the account that is shared by these tests."""
    adopts: bool = False
    """Whether they outlive the driver, and another one takes them over."""
    sim: str = ""
    """How those of `sim` behave."""

    def driver(self, state_dir: Path, daemon_id: str = "test") -> Driver:
        machine: dict[str, Any] = {"template_dir": shared() / "templates", **MACHINE} if self.virtual else {}
        about: dict[str, Any] = {
            "provider": self.name,
            "state_dir": state_dir,
            "screen": SCREEN,
            "docker_image": self.image,
            "sim": self.sim,
        }
        if self.cloud:
            about |= settings_in(ACCOUNTS[0][0])
        return make_driver(Settings(**about, **machine), daemon_id)


async def stop_the_sim(driver: Driver, instance_id: str, _: Endpoints) -> str:
    assert isinstance(driver, SimDriver)
    driver.kill(instance_id, "pulled the plug")
    return "plug"


async def stop_the_hosted_sim(driver: Driver, instance_id: str, _: Endpoints) -> str:
    assert isinstance(driver, HostedSimDriver)
    async with SimHost(driver.state_dir) as host:
        await host.kill(instance_id, "pulled the plug")
    return "plug"


async def kill_the_x_server(_: Driver, __: str, endpoints: Endpoints) -> str:
    async with aiohttp.ClientSession() as http:
        await Guest(http, endpoints.guest).launch(["pkill", "-KILL", "Xvfb"])
    return "X server"


async def kill_the_containers_x_server(driver: Driver, instance_id: str, endpoints: Endpoints) -> str:
    await kill_the_x_server(driver, instance_id, endpoints)
    return "its container ended with code"


async def kill_the_machine(driver: Driver, instance_id: str, _: Endpoints) -> str:
    assert isinstance(driver, QemuDriver)
    process = await anyio.to_thread.run_sync(process_of, driver.desktops / instance_id / "desktop")
    assert process is not None
    os.kill(int(process.name), signal.SIGKILL)
    return "SIGKILL"


async def terminate_the_instance(_: Driver, __: str, endpoints: Endpoints) -> str:
    """As from the console of AWS, or as the schedule does."""
    [(aws, there)] = ACCOUNTS
    ec2 = aws.client("ec2")
    filters = [
        {"Name": "private-ip-address", "Values": [urlsplit(endpoints.guest).hostname]},
        {"Name": "instance-state-name", "Values": ["running"]},
    ]
    pages = await anyio.to_thread.run_sync(lambda: ec2.describe_instances(Filters=filters)["Reservations"])
    ids = [one["InstanceId"] for page in pages for one in page["Instances"]]
    await anyio.to_thread.run_sync(lambda: ec2.terminate_instances(InstanceIds=ids))
    await anyio.to_thread.run_sync(there.look_now)
    return "User initiated"


PAGE = Path(__file__).parent.parent / "envd/app/docs/pages/drivers.md"
[SHOWN] = re.findall(r"```python driver\n(.*?)```", PAGE.read_text(), re.DOTALL)


@dataclass(frozen=True)
class WorkedExample(Provider):
    """The driver that the documentation shows."""

    def driver(self, state_dir: Path, daemon_id: str = "test") -> Driver:
        names: dict[str, Any] = {"__name__": "toy"}
        exec(compile(SHOWN, str(PAGE), "exec"), names)
        made = names["ToyDriver"](Settings(provider="sim", state_dir=state_dir, screen=SCREEN), daemon_id)
        assert isinstance(made, Driver)
        return made


async def stop_the_shown_one(driver: Driver, instance_id: str, _: Endpoints) -> str:
    machines: Any = vars(driver)["machines"]
    machines[instance_id].die(Death("pulled the plug"))
    return "plug"


DRIVERS = [
    pytest.param(Provider("sim", stop_the_sim), id="sim"),
    pytest.param(WorkedExample("toy", stop_the_shown_one), id="as the documentation shows"),
    pytest.param(Provider("sim", stop_the_hosted_sim, adopts=True, sim="outlive,linger=10"), id="sim outlive"),
    pytest.param(Provider("aws", terminate_the_instance, cloud=True, adopts=True), id="aws"),
    pytest.param(Provider("local", kill_the_x_server), id="local", marks=pytest.mark.local),
    pytest.param(Provider("docker", kill_the_containers_x_server, adopts=True), id="docker", marks=pytest.mark.docker),
    pytest.param(
        Provider("qemu", kill_the_machine, virtual=True),
        id="qemu",
        marks=[pytest.mark.qemu, pytest.mark.timeout(900)],  # the first of them waits for the template
    ),
]
every_driver = pytest.mark.parametrize("provider", DRIVERS)
ACCOUNTS: list[tuple[FaultyAccount, Guests]] = []
"""The one of these tests at AWS, and who is its instances; while there is one."""


@pytest.fixture(scope="module")
def an_account() -> Iterator[None]:
    with faulty_account() as aws, guests(aws) as there:
        ACCOUNTS.append((aws, there))
        yield
        ACCOUNTS.clear()


@pytest.fixture(autouse=True)
def an_account_is_there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For instances: made for the first test, kept for all. What happens to them is seen within a moment."""
    if request.node.callspec.params["provider"].cloud:
        request.getfixturevalue("an_account")
        ACCOUNTS[0][0].forget_tokens()
        monkeypatch.setattr(instances, "IDLE", 0.2)
        monkeypatch.setattr(instances, "BUSY", 0.05)


@pytest.fixture(autouse=True)
async def a_template_is_there(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """For virtual machines: made by the first test, in minutes, so that each desktop of all tests comes in seconds."""
    if request.node.callspec.params["provider"].virtual:
        async with engine(tmp_path_factory.mktemp("template")) as machines:
            if machines.next_path() is not ResetPath.RESTORE:
                await machines.create(spec("template"), Told())


class Silent:
    def probed(self, probe: Probe) -> None: ...

    def note(self, message: str) -> None: ...


def spec(name: str) -> InstanceSpec:
    return InstanceSpec(name, SCREEN)


@asynccontextmanager
async def ready(driver: Driver, *names: str) -> AsyncIterator[list[Endpoints]]:
    """Instances that have passed both probes, and are destroyed afterwards."""
    try:
        async with asyncio.timeout(2 * PATIENCE), aiohttp.ClientSession() as http:
            made = [(await driver.create(spec(name), Report())).endpoints for name in names]
            for endpoints in made:
                guest, cdp = Guest(http, endpoints.guest), Cdp(http, endpoints.cdp)
                await Readiness(guest, cdp, SCREEN, interval=0.03, chrome_grace=30, watcher=Silent()).wait()
        yield made
    finally:
        for name in names:
            await driver.destroy(name)


async def refuses(url: str) -> bool:
    address = urlsplit(url)
    try:
        _, writer = await asyncio.open_connection(address.hostname, address.port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def listed(driver: Driver) -> set[str]:
    return set(await driver.list())


@every_driver
async def test_an_instance_answers_on_both_ports(provider: Provider, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver, ready(driver, "a-1") as [at], aiohttp.ClientSession() as http:
        picture = await Guest(http, at.guest).screenshot()
        (tmp_path / "picture").write_bytes(picture)
        version, pages = await Cdp(http, at.cdp).version(), await Cdp(http, at.cdp).pages()
    with Image.open(tmp_path / "picture") as image:
        assert image.size == SCREEN
    assert "Chrom" in version["Browser"]
    assert len(pages) == 1


@every_driver
async def test_a_file_comes_back_as_it_was_sent_and_commands_see_it(provider: Provider, tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "sent").write_bytes(content)
    path = "/tmp/made for it/ü.bin"
    async with provider.driver(tmp_path) as driver, ready(driver, "a-1") as [at], aiohttp.ClientSession() as http:
        guest = Guest(http, at.guest)
        await guest.upload(path, tmp_path / "sent")
        assert await guest.file(path) == content
        assert (await guest.execute(["test", "-s", path])).returncode == 0
        assert (await guest.execute(f"rm '{path}' && test -e '{path}'", shell=True)).returncode == 1
        with pytest.raises(GuestMisbehaved) as caught:
            await guest.file(path)
    assert caught.value.facts["http_status"] == 404
    assert caught.value.facts["refused"]


@every_driver
@pytest.mark.parametrize(
    ("command", "shell", "outcome"),
    [
        pytest.param(["echo", "a b"], False, (0, "a b\n"), id="words"),
        pytest.param("echo 'a b'", False, (0, "a b\n"), id="text"),
        pytest.param("false || echo a; false", True, (1, "a\n"), id="shell"),
        pytest.param(["python", "-c", "import platform; print(platform.system())"], False, (0, "Linux\n"), id="python"),
        pytest.param("cat /nowhere/at/all", True, (1, ""), id="fails"),
    ],
)
async def test_a_command_gives_its_output_and_return_code(
    provider: Provider, command: list[str] | str, shell: bool, outcome: tuple[int, str], tmp_path: Path
) -> None:
    async with provider.driver(tmp_path) as driver, ready(driver, "a-1") as [at], aiohttp.ClientSession() as http:
        done = await Guest(http, at.guest).execute(command, shell=shell)
    assert (done.returncode, done.stdout) == outcome


@every_driver
async def test_pages_are_opened_visited_and_closed_over_the_websocket(provider: Provider, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver, ready(driver, "a-1") as [at], aiohttp.ClientSession() as http:
        cdp = Cdp(http, at.cdp)
        async with cdp.browser() as browser:
            [first] = await browser.pages()
            made = (await browser.send("Target.createTarget", {"url": "about:blank"}, timeout=PATIENCE))["targetId"]
            session = await browser.attach(made)
            await browser.send("Page.enable", session_id=session, timeout=PATIENCE)
            with browser.events("Page.loadEventFired", session) as loads:
                await browser.send("Page.navigate", {"url": "about:blank?x"}, session_id=session)
                await loads.receive()
            assert {page["url"] for page in await cdp.pages()} == {first["url"], "about:blank?x"}
            with browser.events("Target.detachedFromTarget") as ends:
                await browser.send("Target.closeTarget", {"targetId": made})
                assert (await ends.receive())["sessionId"] == session
        assert [page["id"] for page in await cdp.pages()] == [first["targetId"]]
        assert await cdp.painted(PATIENCE)


@every_driver
async def test_a_window_that_is_not_there_is_no_error(provider: Provider, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver, ready(driver, "a-1") as [at], aiohttp.ClientSession() as http:
        guest = Guest(http, at.guest)
        assert await guest.tell("/setup/activate_window", {"window_name": "no such window"}, 20)
        assert await guest.tell("/setup/close_window", {"window_name": "no such window"}, 20)
        assert await guest.post("/screen_size", {}, 20) == {"width": SCREEN[0], "height": SCREEN[1]}


@every_driver
async def test_a_destroyed_instance_leaves_no_port_and_no_name(provider: Provider, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver:
        async with ready(driver, "a-1") as [at]:
            assert not await refuses(at.guest)
        assert await refuses(at.guest)
        assert await refuses(at.cdp)
        assert await listed(driver) == set()


@every_driver
async def test_destroying_twice_at_once_and_again_is_destroying(provider: Provider, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver:
        await driver.create(spec("a-1"), Report())
        await asyncio.gather(driver.destroy("a-1"), driver.destroy("a-1"))
        await driver.destroy("a-1")
        assert await listed(driver) == set()


@every_driver
@pytest.mark.parametrize("name", ["never-made", "../a", "", "x" * 64])
async def test_destroying_what_never_existed_is_no_error(provider: Provider, name: str, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver:
        await driver.destroy(name)
        assert await listed(driver) == set()


@every_driver
async def test_list_tells_of_ours_and_of_no_other_daemons(provider: Provider, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    async with provider.driver(tmp_path / "one", "one") as one, provider.driver(tmp_path / "two", "two") as two:
        try:
            await one.create(spec("a-1"), Report())
            await two.create(spec("b-1"), Report())
            await two.destroy("a-1")
            assert (await listed(one), await listed(two)) == ({"a-1"}, {"b-1"})
        finally:
            await one.destroy("a-1")
            await two.destroy("b-1")


@every_driver
@pytest.mark.parametrize("seconds", [0, 0.001, 0.01, 0.03, 0.06, 0.1])
async def test_a_cancelled_create_leaves_nothing_that_destroy_would_not_remove(
    provider: Provider, seconds: float, tmp_path: Path
) -> None:
    async with provider.driver(tmp_path) as driver:
        with anyio.move_on_after(seconds):
            await driver.create(spec("a-1"), Report())
        await driver.destroy("a-1")
        assert await listed(driver) == set()
        async with asyncio.timeout(5):
            assert isinstance(await driver.wait("a-1"), Death)


@every_driver
@pytest.mark.parametrize("seconds", [0, 0.01, 0.05])
async def test_destroy_during_create_ends_both(provider: Provider, seconds: float, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver:
        creating = asyncio.create_task(driver.create(spec("a-1"), Report()))
        await asyncio.sleep(seconds)
        await driver.destroy("a-1")
        [outcome] = await asyncio.gather(creating, return_exceptions=True)
        assert isinstance(outcome, BootFailed | Made)
        await driver.destroy("a-1")
        assert await listed(driver) == set()


@every_driver
async def test_an_id_is_used_once(provider: Provider, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver:
        await driver.create(spec("a-1"), Report())
        with pytest.raises(BootFailed, match="a-1"):
            await driver.create(spec("a-1"), Report())
        assert await listed(driver) == {"a-1"}
        await driver.destroy("a-1")


@every_driver
async def test_two_instances_have_nothing_in_common(provider: Provider, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver, ready(driver, "a-1", "a-2") as [one, two]:
        assert len({one.guest, one.cdp, two.guest, two.cdp}) == 4
        async with aiohttp.ClientSession() as http:
            before = await Cdp(http, two.cdp).pages()
            await driver.destroy("a-1")
            assert await Cdp(http, two.cdp).pages() == before
            await Guest(http, two.guest).screenshot()
        assert await listed(driver) == {"a-2"}


@every_driver
async def test_wait_tells_how_an_instance_died(provider: Provider, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver, ready(driver, "a-1") as [at]:
        waiting = asyncio.create_task(driver.wait("a-1"))
        await asyncio.sleep(0)
        assert not waiting.done()
        word = await provider.kill(driver, "a-1", at)
        async with asyncio.timeout(2):
            death = await waiting
        assert word in death.reason
        assert await refuses(at.guest)
        assert await listed(driver) == {"a-1"}


@every_driver
async def test_wait_returns_for_what_is_destroyed_or_unknown(provider: Provider, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver, asyncio.timeout(30):
        await driver.create(spec("a-1"), Report())
        waiting = [asyncio.create_task(driver.wait("a-1")) for _ in range(2)]
        await driver.destroy("a-1")
        for death in (*await asyncio.gather(*waiting), await driver.wait("a-1"), await driver.wait("never-made")):
            assert isinstance(death, Death)


@every_driver
async def test_the_log_is_there_while_the_instance_is_and_never_an_error(provider: Provider, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver:
        async with ready(driver, "a-1") as [at]:
            await provider.kill(driver, "a-1", at)
            await driver.wait("a-1")
            assert await driver.log_tail("a-1")
            assert len(await driver.log_tail("a-1", lines=1)) == 1
        assert await driver.log_tail("a-1") == await driver.log_tail("../a") == await driver.log_tail("b-1") == ()


@pytest.mark.parametrize("provider", [one for one in DRIVERS if one.values[0].adopts])  # type: ignore[union-attr]
async def test_an_instance_of_an_earlier_life_is_adopted(provider: Provider, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as earlier:
        made = await earlier.create(spec("a-1"), Report())
    async with provider.driver(tmp_path) as driver:
        try:
            adopted = await driver.adopt("a-1", Report())
            assert adopted is not None
            assert adopted.endpoints == made.endpoints
            async with asyncio.timeout(PATIENCE), aiohttp.ClientSession() as http:
                guest, cdp = Guest(http, adopted.endpoints.guest), Cdp(http, adopted.endpoints.cdp)
                await Readiness(guest, cdp, SCREEN, interval=0.03, chrome_grace=30, watcher=Silent()).wait()
            waiting = asyncio.create_task(driver.wait("a-1"))
            assert await listed(driver) == {"a-1"}
            assert not waiting.done()
        finally:
            await driver.destroy("a-1")
        assert isinstance(await waiting, Death)
        assert await refuses(adopted.endpoints.guest)
        assert await listed(driver) == set()


@every_driver
async def test_what_never_existed_is_not_adopted(provider: Provider, tmp_path: Path) -> None:
    async with provider.driver(tmp_path) as driver:
        assert await driver.adopt("never-made", Report()) is None
        assert await driver.adopt("../a", Report()) is None
