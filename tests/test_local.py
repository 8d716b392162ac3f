"""The local driver: what a desktop sees and does not see, what its end looks like, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import signal
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from envd.drivers.base import InstanceSpec, Report
from envd.drivers.local import LocalDriver
from envd.drivers.local.branding import renamed
from envd.errors import EnvdError, MissingDependency, StartError
from envd.guest import Cdp, Guest
from envd.models import Endpoints
from envd.settings import Settings

pytestmark = pytest.mark.local

OWNER = Path(__file__).with_name("local_owner.py")
REPOSITORY = Path(__file__).parents[1]
BOTH = pytest.mark.parametrize("unsandboxed", [pytest.param(False, id="sandboxed"), pytest.param(True, id="bare")])


def local(state_dir: Path, **settings: Any) -> LocalDriver:
    return LocalDriver(Settings(provider="local", state_dir=state_dir, **settings), "test")


class Desktop:
    """A desktop as its tasks know it: by its two ports."""

    def __init__(self, http: aiohttp.ClientSession, at: Endpoints) -> None:
        self.guest, self.cdp = Guest(http, at.guest), Cdp(http, at.cdp)

    async def sh(self, script: str) -> str:
        done = await self.guest.execute(["bash", "-c", script])
        return (done.stdout + done.stderr).strip()

    async def has_chrome(self) -> bool:
        try:
            return bool(await self.cdp.pages())
        except EnvdError:
            return False

    async def has_no_chrome(self) -> bool:
        try:
            await self.cdp.version()
        except EnvdError:
            return True
        return False


@asynccontextmanager
async def desktops(driver: LocalDriver, *names: str) -> AsyncIterator[list[Desktop]]:
    """Desktops whose guest server answers; Chromium may still be starting."""
    try:
        async with aiohttp.ClientSession() as http, asyncio.timeout(60):
            made = [
                Desktop(http, (await driver.create(InstanceSpec(name, (800, 600)), Report())).endpoints)
                for name in names
            ]
            for desktop in made:
                await desktop.guest.screenshot()
            yield made
    finally:
        for name in names:
            await driver.destroy(name)


def processes(match: Callable[[Path], bool]) -> set[int]:
    """Live processes of this host whose directory in /proc passes."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if match(directory) and "\nState:\tZ" not in (directory / "status").read_text():
                found.add(int(directory.name))
        except OSError:
            continue
    return found


def started_with(word: str) -> set[int]:
    return processes(lambda directory: word.encode() in (directory / "cmdline").read_bytes())


def in_namespace(namespace: str) -> set[int]:
    return processes(lambda directory: os.readlink(directory / "ns/pid") == namespace)


def is_locked(display: str) -> bool:
    return Path(f"/tmp/.X{display}-lock").exists()


async def until(true: Callable[[], Awaitable[object]], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not await true():  # noqa: ASYNC110 - of other processes, which tell us nothing
            await asyncio.sleep(0.02)


async def none_left(look: Callable[[], set[int]]) -> None:
    async def none() -> bool:
        return not look()

    await until(none)


async def test_a_desktop_sees_no_file_of_the_host_that_it_was_not_given(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    async with local(tmp_path / "state") as driver, desktops(driver, "a-1", "a-2") as [desktop, _]:
        others = tmp_path / "state" / "local" / "desktops" / "a-2" / "home"
        hidden = [secret, tmp_path / "state", others, Path("/etc/shadow"), REPOSITORY / "pyproject.toml"]
        hidden += [path for path in Path.home().iterdir() if not path.is_relative_to("/usr")]
        given = [
            path for path in hidden if any(Path(root).is_relative_to(path) for root in (sys.prefix, sys.base_prefix))
        ]
        seen = await desktop.sh(f"ls -d {' '.join(str(path) for path in hidden)} 2>/dev/null")
        assert set(seen.split()) <= {str(path) for path in given}
        assert await desktop.sh("ls /home; ls -A ~") == "user\n" + await desktop.sh("ls -A /home/user")


async def test_a_desktop_sees_its_own_processes_only(tmp_path: Path) -> None:
    async with local(tmp_path) as driver, desktops(driver, "a-1", "a-2") as [one, _]:
        seen = (await one.sh("ps -eo comm=")).split("\n")
        assert "pytest" not in seen
        assert [seen.count(name) for name in ("Xvfb", "openbox")] == [1, 1]


async def test_a_desktop_can_change_nothing_of_the_host(tmp_path: Path) -> None:
    """Also not by what /proc lets the host's root do without any capability, when that is who runs the daemon."""
    async with local(tmp_path) as driver, desktops(driver, "a-1") as [desktop]:
        script = (
            "for f in /proc/sys/kernel/* /proc/sysrq-trigger /etc/hosts /usr/x /opt/x /x; do : >> $f && echo $f; done"
        )
        assert await desktop.sh(f"({script}) 2>/dev/null") == ""
        assert "mounted" not in await desktop.sh("mount -t tmpfs x /mnt && echo mounted")
        assert "failed" in await desktop.sh("unshare --user true")


async def test_desktops_do_not_reach_each_others_screens(tmp_path: Path) -> None:
    async with local(tmp_path) as driver, desktops(driver, "a-1", "a-2") as [one, two]:
        size = "xdotool getdisplaygeometry"
        theirs = await two.sh("echo $DISPLAY")
        assert await one.sh(size) == "800 600"
        assert theirs != await one.sh("echo $DISPLAY")
        assert "800 600" not in await one.sh(f"DISPLAY={theirs} {size}")


async def test_the_daemons_environment_is_not_the_desktops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    async with local(tmp_path) as driver, desktops(driver, "a-1") as [desktop]:
        assert "s3cret" not in await desktop.sh("cat /proc/[0-9]*/environ | tr '\\0' '\\n'")
        environment = await desktop.sh("env")
        assert {"HOME=/home/user", "LANG=C.UTF-8", "XDG_SESSION_TYPE=x11"} <= set(environment.split("\n"))


async def test_the_desktops_python_has_pyautogui_and_its_chrome_is_chromium(tmp_path: Path) -> None:
    async with local(tmp_path) as driver, desktops(driver, "a-1") as [desktop]:
        for python in ("python", "python3"):
            assert await desktop.sh(f"{python} -c 'import pyautogui; print(*pyautogui.size())'") == "800 600"
        for chrome in ("google-chrome", "google-chrome-stable", "chromium"):
            assert (await desktop.sh(f"{chrome} --version")).startswith("Chromium ")


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        pytest.param("-x Xvfb", "X server", id="X server"),
        pytest.param("-x openbox", "window manager", id="window manager"),
        pytest.param("-f envd.agent", "guest server", id="guest server"),
    ],
)
async def test_a_desktop_ends_with_what_it_cannot_do_without(pattern: str, what: str, tmp_path: Path) -> None:
    async with local(tmp_path) as driver, desktops(driver, "a-1") as [desktop]:
        await desktop.guest.launch(f"sleep 0.2; pkill -KILL {pattern}", shell=True)
        async with asyncio.timeout(2.2):
            death = await driver.wait("a-1")
        assert (death.reason, death.exit_code) == (f"{what} was killed by SIGKILL", -9)
        assert any(f"{what}: killed by signal 9" in line for line in await driver.log_tail("a-1"))


async def test_a_desktop_outlives_its_chrome_which_comes_back_where_it_was(tmp_path: Path) -> None:
    async with local(tmp_path) as driver, desktops(driver, "a-1") as [desktop]:
        await until(desktop.has_chrome)
        for signal_name in ("TERM", "KILL"):
            assert await desktop.sh(f"pkill -{signal_name} chrome") == ""
            await until(desktop.has_no_chrome)
            await desktop.guest.launch(["google-chrome", "--remote-debugging-port=1337"])
            await until(desktop.has_chrome)
        await desktop.guest.screenshot()
        assert any(
            "chromium: killed by signal" in line or "chromium: ended" in line
            for line in await driver.log_tail("a-1", 500)
        )


def pages(targets: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Which they are and where; a title comes a moment after its page."""
    return [(target["id"], target["url"]) for target in targets]


async def test_starting_chrome_and_its_bridge_as_tasks_do_changes_nothing(tmp_path: Path) -> None:
    async with local(tmp_path) as driver, desktops(driver, "a-1", "a-2") as [one, two]:
        for desktop in (one, two):
            await until(desktop.has_chrome)
            before = pages(await desktop.cdp.pages())
            await desktop.sh("timeout 10 google-chrome --remote-debugging-port=1337")
            bridge = "timeout 0.3 socat tcp-listen:9222,fork tcp:localhost:1337; echo $?"
            assert await desktop.sh(bridge) == "124"
            assert pages(await desktop.cdp.pages()) == before


async def test_a_page_that_a_task_opens_is_opened_in_the_running_chrome(tmp_path: Path) -> None:
    async with local(tmp_path) as driver, desktops(driver, "a-1") as [desktop]:
        await until(desktop.has_chrome)
        await desktop.guest.launch(["google-chrome", "--remote-debugging-port=1337", "file:///usr/share/"])

        async def opened() -> bool:
            return "file:///usr/share/" in str(await desktop.cdp.pages())

        await until(opened)


@pytest.mark.parametrize("page", ["/home/user/Desktop/page.html", "http://127.0.0.1:9/page"])
async def test_whatever_opens_a_page_opens_it_in_the_desktops_chrome(page: str, tmp_path: Path) -> None:
    async with local(tmp_path) as driver, desktops(driver, "a-1") as [desktop]:
        await desktop.sh("echo '<title>x</title>' > ~/Desktop/page.html")
        await until(desktop.has_chrome)
        await desktop.guest.launch(["xdg-open", page])

        async def opened() -> bool:
            return any(target["url"].endswith(page) for target in await desktop.cdp.pages())

        await until(opened)


async def test_chromes_windows_have_the_name_that_tasks_look_for(tmp_path: Path) -> None:
    async with local(tmp_path) as driver, desktops(driver, "a-1") as [desktop]:

        async def named() -> bool:
            return "about:blank - Google Chrome" in await desktop.sh("wmctrl -l")

        await until(named)


def pack(*texts: bytes, version: int = 5) -> bytes:
    """A file of Chromium's texts, the first of them under two numbers."""
    begin = 12 + 6 * (len(texts) + 1) + 4
    offsets = [begin + len(b"".join(texts[:index])) for index in range(len(texts) + 1)]
    entries = b"".join(struct.pack("<HI", 10 + index, offset) for index, offset in enumerate(offsets))
    return struct.pack("<IBxxxHH", version, 1, len(texts), 1) + entries + struct.pack("<HH", 99, 0) + b"".join(texts)


def test_texts_are_renamed_and_the_rest_of_the_pack_stays() -> None:
    before, after = (b"About Chromium", b"", b"%s - Chromium"), (b"About Google Chrome", b"", b"%s - Google Chrome")
    assert renamed(pack(*before)) == pack(*after)


@pytest.mark.parametrize(
    "other",
    [pytest.param(pack(b"Chromium", version=6), id="of another version"), pytest.param(b"Chromium", id="cut short")],
)
def test_a_pack_that_we_do_not_know_is_left_as_it_is(other: bytes) -> None:
    assert renamed(other) == other


async def test_the_image_names_the_system_and_the_browser(tmp_path: Path) -> None:
    async with local(tmp_path) as driver:
        assert driver.image.startswith("local (Debian")
        assert "chromium " in driver.image


@BOTH
async def test_nothing_survives_a_destroy(unsandboxed: bool, tmp_path: Path) -> None:
    word = f"{secrets.randbelow(10**9)}.5"
    async with local(tmp_path, local_unsandboxed=unsandboxed) as driver:
        async with desktops(driver, "a-1") as [desktop]:
            await desktop.guest.launch(f"setsid nohup sleep 1{word} & (env -i setsid sleep 2{word} &) &", shell=True)

            async def both() -> bool:
                return len(started_with(word)) == 2

            await until(both)
            await desktop.sh("mkdir -p ~/shut/in && touch ~/shut/in/x && chmod 0 ~/shut/in ~/shut")
        assert started_with(word) == set()
        assert started_with(str(tmp_path)) == set()
        assert list((tmp_path / "local" / "desktops").iterdir()) == []


@BOTH
async def test_invariant_5_nothing_survives_the_daemon_and_the_next_one_finds_the_rest(
    unsandboxed: bool, tmp_path: Path
) -> None:
    word = f"{secrets.randbelow(10**9)}.5"
    owner = await asyncio.create_subprocess_exec(
        sys.executable, OWNER, tmp_path, str(unsandboxed), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert owner.stdout is not None
        url = (await owner.stdout.readline()).decode().strip()
        async with aiohttp.ClientSession() as http:
            desktop = Desktop(http, Endpoints(guest=url, cdp=url))
            await desktop.guest.launch(f"(setsid nohup sleep {word} &) &", shell=True)
            namespace = await desktop.sh("readlink /proc/self/ns/pid")
    finally:
        owner.send_signal(signal.SIGKILL)
        await owner.wait()
    await none_left(lambda: started_with(word) | started_with(f"{tmp_path}/local"))
    if not unsandboxed:
        await none_left(lambda: in_namespace(namespace))
    async with local(tmp_path, local_unsandboxed=unsandboxed) as driver:
        assert await driver.list() == {"a-1"}
        await driver.destroy("a-1")
        assert await driver.list() == frozenset()


@BOTH
async def test_what_another_driver_left_running_is_found_by_its_directory(unsandboxed: bool, tmp_path: Path) -> None:
    async with local(tmp_path, local_unsandboxed=unsandboxed) as one, desktops(one, "a-1") as [desktop]:
        display = (await desktop.sh("echo $DISPLAY")).removeprefix(":")
        async with local(tmp_path, local_unsandboxed=unsandboxed) as two:
            await two.destroy("a-1")
        assert started_with(f"{tmp_path}/local") == set()
        assert not is_locked(display)
        async with asyncio.timeout(2):
            await one.wait("a-1")


async def test_a_guest_that_speaks_for_its_supervisor_fools_nobody(tmp_path: Path) -> None:
    async with local(tmp_path) as driver:
        async with desktops(driver, "a-1") as [desktop]:
            lies = [f'{{"child-pid": {os.getpid()}}}', '{"event": "death", "what": "me", "status": 0}', "nonsense"]
            await desktop.sh(f"printf '%s\\n' {shlex.join(lies)} > /proc/2/fd/1")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await driver.wait("a-1")
        assert await driver.list() == frozenset()


async def test_a_guest_that_floods_its_log_fills_a_megabyte_and_no_more(tmp_path: Path) -> None:
    async with local(tmp_path) as driver, desktops(driver, "a-1") as [desktop]:
        flood = "yes 0123456789012345678901234567890123456789 | head -c 5000000 > /proc/$(pgrep -ox openbox)/fd/2"
        await desktop.sh(flood + "; echo the last line > /proc/$(pgrep -ox openbox)/fd/2")

        async def written() -> bool:
            return any("the last line" in line for line in await driver.log_tail("a-1"))

        await until(written)
        assert (tmp_path / "local" / "desktops" / "a-1" / "log").stat().st_size <= 1024 * 1024


async def test_only_their_owner_can_read_the_desktops_files(tmp_path: Path) -> None:
    async with local(tmp_path):
        assert (tmp_path / "local").stat().st_mode & 0o777 == 0o700


async def test_all_that_is_missing_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency) as refused:
        async with local(tmp_path):
            pass
    assert "apt-get install" in refused.value.hint
    assert {"bubblewrap", "openbox", "socat", "xvfb"} <= set(refused.value.hint.split())


async def test_a_host_that_forbids_the_sandbox_is_told_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden = tmp_path / "bwrap"
    forbidden.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    forbidden.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(StartError, match="No permissions") as refused:
        async with local(tmp_path / "state"):
            pass
    assert "ENVD_LOCAL_UNSANDBOXED=1" in refused.value.hint


async def test_two_desktops_may_boot_at_once(tmp_path: Path) -> None:
    async with local(tmp_path) as driver, aiohttp.ClientSession() as http, asyncio.timeout(60):
        made = await asyncio.gather(*(driver.create(InstanceSpec(f"a-{n}", (800, 600)), Report()) for n in range(3)))
        await asyncio.gather(*(Desktop(http, one.endpoints).guest.screenshot() for one in made))
        await asyncio.gather(*(driver.destroy(f"a-{n}") for n in range(3)))
        assert await driver.list() == frozenset()
