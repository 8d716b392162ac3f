"""Docker desktops on a real engine: how they end, and that nothing is left of them. Tiny images stand for desktops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from docker_engine import ENGINE, docker, image, nothing_left, tiny_images

from envd.drivers.base import Death, InstanceSpec, Report
from envd.drivers.docker import DockerDriver
from envd.errors import (
    BootFailed,
    ImageMissing,
    InstanceDied,
    MissingDependency,
    NoSpace,
    OutOfMemory,
    SettingsError,
    StartError,
)
from envd.settings import Settings

__all__ = ["nothing_left", "tiny_images"]

MIB = 1024**2
pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("tiny_images", "nothing_left")]


class Heard(Report):
    def __init__(self) -> None:
        self.phases: asyncio.Queue[str] = asyncio.Queue()
        self.notes: asyncio.Queue[str] = asyncio.Queue()

    def phase(self, name: str) -> None:
        self.phases.put_nowait(name)

    def note(self, words: str) -> None:
        self.notes.put_nowait(words)


def settings(state_dir: Path, what: str = "serves", **more: Any) -> Settings:
    return Settings(
        provider="docker", state_dir=state_dir, **{"docker_image": image(what), "ram_size": 64 * MIB, **more}
    )


@asynccontextmanager
async def driver(
    state_dir: Path, what: str = "serves", daemon: str = "test", **more: Any
) -> AsyncIterator[DockerDriver]:
    """Whose desktops are destroyed in the end."""
    async with DockerDriver(settings(state_dir, what, **more), daemon) as opened:
        try:
            yield opened
        finally:
            for left in await opened.list():
                await opened.destroy(left)


def spec(name: str = "t-1") -> InstanceSpec:
    return InstanceSpec(name, (800, 600), job_id="job-1", env=7)


async def first_answer(http: aiohttp.ClientSession, url: str) -> bytes:
    """What a container says that has only just been started."""
    async with asyncio.timeout(20):
        while True:
            try:
                async with http.get(url) as answer:
                    return await answer.read()
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)


async def tell(*arguments: str) -> str:
    return await anyio.to_thread.run_sync(lambda: docker(*arguments))


async def death_after(opened: DockerDriver, *arguments: str, within: float = 2) -> Death:
    """How `t-1` died of what the docker command was told; noticed while that went on, or soon after."""
    waiting = asyncio.create_task(opened.wait("t-1"))
    await asyncio.sleep(0)
    await tell(*arguments)
    async with asyncio.timeout(within):
        return await waiting


async def test_what_is_published_answers_here_and_on_no_other_address(tmp_path: Path) -> None:
    async with driver(tmp_path) as opened, aiohttp.ClientSession() as http:
        at = (await opened.create(spec(), Report())).endpoints
        for url, start in ((at.guest, b"\x89PNG"), (at.cdp, b"["), (at.vnc, b"vnc"), (at.vlc, b"vlc")):
            assert (await first_answer(http, url or "")).startswith(start)
        assert {line.rpartition(" ")[2].rpartition(":")[0] for line in (await tell("port", "t-1")).splitlines()} == {
            "127.0.0.1"
        }


async def test_labels_tell_whose_container_it_is(tmp_path: Path) -> None:
    async with driver(tmp_path) as opened:
        await opened.create(spec(), Report())
        labels = await tell("inspect", "--format", "{{json .Config.Labels}}", "t-1")
    assert '"io.envd.daemon":"test"' in labels
    assert '"io.envd.job":"job-1"' in labels
    assert '"io.envd.env":"7"' in labels


async def test_milestones_become_phases(tmp_path: Path) -> None:
    heard = Heard()
    async with driver(tmp_path) as opened, asyncio.timeout(10):
        await opened.create(spec(), heard)
        assert await heard.phases.get() == "guest server"


@pytest.mark.parametrize(
    ("command", "word", "code"),
    [
        pytest.param(["kill", "t-1"], "signal 9", 137, id="killed"),
        pytest.param(["stop", "t-1"], "signal 15", 0, id="stopped"),
        pytest.param(["rm", "--force", "--volumes", "t-1"], "removed", None, id="removed"),
        pytest.param(["restart", "t-1"], "signal 15", 0, id="restarted"),
    ],
)
async def test_whoever_ends_a_container_is_told_apart(
    command: list[str], word: str, code: int | None, tmp_path: Path
) -> None:
    async with driver(tmp_path) as opened:
        await opened.create(spec(), Report())
        death = await death_after(opened, *command)
        assert word in death.reason
        assert code is None or death.exit_code == code
        assert await opened.wait("t-1") == death


async def test_a_container_that_ends_by_itself_is_told_with_its_last_words(tmp_path: Path) -> None:
    async with driver(tmp_path) as opened:
        await opened.create(spec(), Report())
        inside = ["sh", "-c", "echo I have had enough >/proc/1/fd/1; kill -TERM 1"]
        death = await death_after(opened, "exec", "t-1", *inside)
        assert "ended with code 0" in death.reason
        assert "I have had enough" in death.reason
        assert (await opened.log_tail("t-1"))[-1] == "I have had enough"


async def test_death_is_noticed_within_two_seconds(tmp_path: Path) -> None:
    async with driver(tmp_path) as opened:
        await opened.create(spec(), Report())
        pid = int(await tell("inspect", "--format", "{{.State.Pid}}", "t-1"))
        if os.geteuid() != 0:
            pytest.skip("only root may kill a container's process")
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(2):
            death = await opened.wait("t-1")
        assert death.exit_code == 137
        assert "not through Docker" in death.reason


async def test_out_of_memory_names_the_limit(tmp_path: Path) -> None:
    limits: list[int] = []  # it may or may not live until it has been looked at
    async with driver(tmp_path, "eats") as opened, asyncio.timeout(30):
        try:
            await opened.create(spec(), Report())
        except OutOfMemory as error:
            limits.append(error.facts["limit_bytes"])
        death = await opened.wait("t-1")
        assert "out of memory" in death.reason
        assert "64 MiB" in death.reason
        assert death.exit_code == 137
        assert death.out_of_memory == 64 * MIB
        assert limits in ([], [64 * MIB])


async def test_an_image_that_exits_at_once_is_told_with_code_and_log(tmp_path: Path) -> None:
    codes: list[int] = []
    async with driver(tmp_path, "exits") as opened, asyncio.timeout(10):
        try:
            await opened.create(spec(), Report())
        except InstanceDied as error:
            codes.append(error.facts["exit_code"])
        death = await opened.wait("t-1")
        assert death.exit_code == 3
        assert "no disk was given" in death.reason
        assert await opened.log_tail("t-1") == ("no disk was given",)
        assert codes in ([], [3])


async def test_an_image_that_never_opens_ports_lives_and_refuses(tmp_path: Path) -> None:
    async with driver(tmp_path, "silent") as opened, aiohttp.ClientSession() as http:
        at = (await opened.create(spec(), Report())).endpoints
        with pytest.raises(aiohttp.ClientError):
            await http.get(at.guest)
        assert await opened.log_tail("t-1") == ("not a word more",)


async def test_a_paused_container_is_not_dead_says_so_and_can_be_destroyed(tmp_path: Path) -> None:
    heard = Heard()
    async with driver(tmp_path, "silent") as opened, asyncio.timeout(20):
        await opened.create(spec(), heard)
        waiting = asyncio.create_task(opened.wait("t-1"))
        await tell("pause", "t-1")
        assert "docker unpause t-1" in await heard.notes.get()
        assert not waiting.done()
        assert "docker unpause t-1" in (await opened.log_tail("t-1"))[-1]
        await opened.destroy("t-1")
        await waiting


async def test_a_guest_that_writes_for_ever_is_read_within_bounds(tmp_path: Path) -> None:
    async with driver(tmp_path, "writes") as opened:
        await opened.create(spec(), Report())
        await asyncio.sleep(1)
        began = time.monotonic()
        lines = await opened.log_tail("t-1", 5)
        assert time.monotonic() - began < 5
        assert 1 <= len(lines) <= 5
        assert all(len(line) <= 1000 and "\x1b" not in line for line in lines)


async def test_anonymous_volumes_go_with_their_container(tmp_path: Path) -> None:
    async with driver(tmp_path) as opened:
        await opened.create(spec(), Report())
        [volume] = (await tell("inspect", "--format", "{{range .Mounts}}{{.Name}}{{end}}", "t-1")).split()
        await opened.destroy("t-1")
        assert volume not in (await tell("volume", "ls", "--quiet")).split()


async def test_two_daemons_on_one_engine_touch_their_own_alone(tmp_path: Path) -> None:
    async with driver(tmp_path, daemon="one") as one, driver(tmp_path, daemon="two") as two:
        await one.create(spec("a-1"), Report())
        await two.create(spec("b-1"), Report())
        waiting = asyncio.create_task(one.wait("a-1"))
        await two.destroy("a-1")
        assert (set(await one.list()), set(await two.list())) == ({"a-1"}, {"b-1"})
        assert await two.wait("a-1") == Death("no such desktop")
        assert not waiting.done()
        with pytest.raises(BootFailed, match="b-1"):
            await one.create(spec("b-1"), Report())
        waiting.cancel()


async def test_somebody_elses_container_of_the_same_name_is_left_alone(tmp_path: Path) -> None:
    await tell("run", "--detach", "--name", "t-1", image("silent"))
    try:
        async with driver(tmp_path) as opened:
            with pytest.raises(BootFailed, match="t-1"):
                await opened.create(spec(), Report())
            await opened.destroy("t-1")
            assert await opened.list() == frozenset()
            assert await tell("inspect", "--format", "{{.State.Running}}", "t-1") == "true"
    finally:
        await tell("rm", "--force", "t-1")


@pytest.mark.parametrize("word", ["creating", "starting"])
async def test_a_daemon_killed_while_it_makes_a_container_leaves_none_for_its_next_life(
    word: str, tmp_path: Path
) -> None:
    program = f"""
import asyncio, os, signal
from pathlib import Path
from envd.drivers.base import InstanceSpec, Report
from envd.drivers.docker import DockerDriver
from envd.settings import Settings
class Kills(Report):
    def progress(self, words):
        if words.startswith({word!r}):
            later = {0.005 if word == "creating" else 0}
            asyncio.get_running_loop().call_later(later, os.kill, os.getpid(), signal.SIGKILL)
async def main():
    settings = Settings(provider="docker", state_dir=Path({str(tmp_path)!r}), docker_image={image("serves")!r})
    async with DockerDriver(settings, "test") as driver:
        await driver.create(InstanceSpec("t-1", (800, 600)), Kills())
asyncio.run(main())
"""
    done = await anyio.run_process([sys.executable, "-c", program], check=False, stderr=subprocess.STDOUT)
    assert done.returncode == -signal.SIGKILL, done.stdout.decode()
    async with driver(tmp_path) as opened, asyncio.timeout(20):
        if word == "starting":
            assert await opened.list() == {"t-1"}
        await asyncio.sleep(0.5)  # the engine finishes what it was asked for
        await opened.destroy("t-1")
        assert await opened.list() == frozenset()


async def test_a_container_of_an_earlier_life_is_watched_and_destroyed(tmp_path: Path) -> None:
    async with driver(tmp_path) as later:
        async with DockerDriver(settings(tmp_path), "test") as earlier:
            await earlier.create(spec(), Report())
        assert await later.list() == {"t-1"}
        assert "signal 9" in (await death_after(later, "kill", "t-1")).reason


async def test_an_image_that_is_not_here_stops_the_start_and_says_how_to_get_it(tmp_path: Path) -> None:
    for name, words in (("envd/no-such", "make images"), ("no.such/thing", "envd images pull no.such/thing")):
        with pytest.raises(StartError, match="not on this host") as caught:
            async with driver(tmp_path, docker_image=name):
                pass
        assert words in caught.value.hint


async def test_an_image_that_went_away_fails_the_boot_and_says_so(tmp_path: Path) -> None:
    container = await tell("create", image("silent"))
    await tell("commit", "--change", "LABEL a=b", container, image("other"))
    await tell("rm", container)
    async with driver(tmp_path, docker_image=image("other")) as opened:
        await tell("image", "rm", image("other"))
        with pytest.raises(ImageMissing):
            await opened.create(spec(), Report())


async def test_too_little_disk_is_refused_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envd.drivers.docker.desktops.DESKTOP_BUDGET", 1 << 60)
    async with driver(tmp_path) as opened:
        with pytest.raises(NoSpace) as caught:
            await opened.create(spec(), Report())
        facts = caught.value.facts
        assert facts["needed_bytes"] > facts["free_bytes"] > 0
        assert facts["where"] in caught.value.detail
        assert await opened.list() == frozenset()


@pytest.mark.parametrize("cause", ["not_running", "not_installed"])
async def test_an_engine_that_is_not_there_says_why(
    cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "envd.drivers.docker.engine._PROGRAMS", os.environ["PATH"] if cause == "not_running" else "/none"
    )
    kind = MissingDependency if cause == "not_installed" else StartError
    with pytest.raises(StartError) as caught:
        async with driver(tmp_path, docker_host=f"unix://{tmp_path}/none.sock"):
            pass
    assert type(caught.value) is kind
    assert caught.value.facts["cause"] == cause
    assert "docker-engine.sh" in caught.value.hint


async def test_an_engine_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envd.drivers.docker.engine.ANSWER", 0.5)
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(tmp_path / "hung.sock"))
        hung.listen()
        with pytest.raises(StartError, match="does not answer") as caught:
            async with driver(tmp_path, docker_host=f"unix://{tmp_path}/hung.sock"):
                pass
    assert caught.value.facts["cause"] == "no_answer"


async def test_a_user_who_may_not_use_the_engine_is_told_how_to(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody who may not")
    program = f"""
import asyncio, os
import anyio
from envd.drivers.docker.engine import Engine
from envd.errors import DockerUnavailable
async def main():
    async with Engine({ENGINE!r}):
        pass  # everything is imported: nobody may not read the interpreter's files either
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    try:
        async with Engine({ENGINE!r}):
            pass
    except DockerUnavailable as error:
        print(error.facts["cause"], error.hint)
asyncio.run(main())
"""
    done = await anyio.run_process([sys.executable, "-c", program], check=False)
    assert done.stdout.decode().startswith("no_permission"), done.stderr.decode()
    assert b"usermod -aG docker nobody" in done.stdout


@pytest.mark.parametrize(
    ("content", "cause"), [pytest.param(None, "absent", id="absent"), pytest.param(b"PK", "not_a_disk", id="zip")]
)
async def test_a_foreign_images_disk_is_looked_at_before_anything_boots(
    content: bytes | None, cause: str, tmp_path: Path
) -> None:
    container = await tell("create", image("silent"))
    await tell("commit", "--change", "LABEL io.envd.kind=", container, image("foreign"))
    await tell("rm", container)
    disk = tmp_path / "disk.qcow2"
    if content is not None:
        disk.write_bytes(content)
    try:
        with pytest.raises(SettingsError, match="ENVD_VM_DISK") as caught:
            async with driver(tmp_path, docker_image=image("foreign"), vm_disk=disk):
                pass
        assert caught.value.facts["cause"] == cause
    finally:
        await tell("image", "rm", image("foreign"))
