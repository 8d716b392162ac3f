"""The engine of virtual machines, on emulated ones: templates, clones, and every way back when these fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from vm_engine import SCREEN, Told, both_answer, engine, run_in, shared, spec, vm_settings

from envd.drivers.base import Made
from envd.errors import BootFailed, DiskUnusable, NoSpace, OutOfMemory, SettingsError
from envd.models import ResetPath
from envd.settings import Settings
from envd.vm.engine import Engine
from envd.vm.frozen import facts_of
from envd.vm.running import memory_taken, process_of
from envd.vm.templates import MANIFEST, Manifest, list_templates

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

MIB = 1024**2


async def test_a_first_desktop_makes_the_template_and_is_a_clone_of_it(tmp_path: Path) -> None:
    async with engine(tmp_path) as machines:
        if machines.next_path() is ResetPath.RESTORE:
            pytest.skip("the template was made by an earlier test")
        told = Told()
        made = await machines.create(spec("first"), told)
        assert (made.path, machines.next_path()) == (ResetPath.RESTORE, ResetPath.RESTORE)
        assert made.frame is not None
        assert await machines.list() == {"first"}
        await both_answer(made.endpoints)
    booted = ["firmware", "kernel", "display", "session", "guest server", "settle", "freeze", "trial"]
    assert [phase for phase in told.phases if phase != "boot loader"] == [*booted, "clone", "identity"]
    assert any("A cold boot was not timed" in note for note in told.notes)
    assert [path.name for path in (tmp_path / "qemu" / "saved").glob("*/state")] == ["state"]


@asynccontextmanager
async def own_template(state_dir: Path) -> AsyncIterator[Path]:
    """A copy of the shared template that a test may spoil: its folder."""
    own = shared() / f"own-{os.getpid()}"
    try:
        yield await anyio.to_thread.run_sync(copy_template, own, vm_settings(state_dir))
    finally:
        await anyio.to_thread.run_sync(shutil.rmtree, own)


def copy_template(own: Path, settings: Settings) -> Path:
    own.mkdir(mode=0o700)
    template = next(one for one in list_templates(settings) if not one.problem)
    copy = own / template.key
    subprocess.run(["cp", "-r", "--sparse=always", shared() / "templates" / template.key, copy], check=True)
    accept(copy)
    return copy


def accept(template: Path) -> None:
    """Its files are from here on what they should be: no look at them tells of a change."""
    known = Manifest.model_validate_json((template / MANIFEST).read_text())
    files = {name: facts_of(template / name) for name in known.files}
    (template / MANIFEST).write_text(known.model_copy(update={"files": files, "failures": 0}).model_dump_json())


async def test_clones_are_told_apart_and_know_the_time(tmp_path: Path) -> None:
    asked = (
        "hostname; cat /etc/machine-id; cat /sys/class/net/e*/address; head -c 8 /dev/urandom | od -An -tx8; date +%s"
    )
    async with engine(tmp_path) as machines:
        one, other = [await machines.create(spec(name), Told()) for name in ("one", "other")]
        ours, theirs = [(await run_in(made, asked)).splitlines() for made in (one, other)]
        assert abs(int(theirs[-1]) - time.time()) < 5
    assert len(ours) == 5
    assert not set(ours[:-1]) & set(theirs[:-1])
    assert one.frame == other.frame


async def test_clones_share_what_they_did_not_change(tmp_path: Path) -> None:
    async with engine(tmp_path) as machines:
        made = await machines.create(spec("one"), Told())
        await both_answer(made.endpoints)
        run = tmp_path / "qemu" / "desktops" / "one" / "desktop"
        taken = await anyio.to_thread.run_sync(lambda: memory_taken(process_of(run)))
        assert taken is not None
        assert 20 * MIB < taken < 500 * MIB


async def test_another_daemon_of_this_user_clones_the_same_template(tmp_path: Path) -> None:
    for name in ("one", "other"):
        async with engine(tmp_path / name) as machines:
            told = Told()
            assert (await machines.create(spec("a"), told)).path is ResetPath.RESTORE
            assert told.phases == ["clone", "identity"]


async def test_a_clone_that_is_destroyed_leaves_nothing_and_may_be_destroyed_again(tmp_path: Path) -> None:
    async with engine(tmp_path) as machines:
        await machines.create(spec("gone"), Told())
        process = process_of(tmp_path / "qemu" / "desktops" / "gone" / "desktop")
        for _ in range(2):
            await machines.destroy("gone")
            assert await machines.list() == frozenset()
        assert process is not None
        assert not process.exists()
        assert list((tmp_path / "qemu" / "desktops").iterdir()) == []
        assert machines.console("gone") is None


async def test_an_id_is_used_once(tmp_path: Path) -> None:
    async with engine(tmp_path) as machines:
        made = await machines.create(spec("one"), Told())
        with pytest.raises(BootFailed, match="already"):
            await machines.create(spec("one"), Told())
        await both_answer(made.endpoints)


async def test_a_clone_that_is_cancelled_can_be_destroyed(tmp_path: Path) -> None:
    async with engine(tmp_path) as machines:
        for phase in ("clone", "identity"):
            told = Told(until=phase)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(machines.create, spec("cut"), told)
                await told.reached.wait()
                tasks.cancel_scope.cancel()
            await machines.destroy("cut")
            assert await machines.list() == frozenset()


async def test_a_machine_that_is_killed_is_told_with_its_last_lines(tmp_path: Path) -> None:
    async with engine(tmp_path) as machines:
        made = await machines.create(spec("one"), Told())
        await run_in(made, "echo said by the guest | sudo tee /dev/ttyS0")
        process = process_of(tmp_path / "qemu" / "desktops" / "one" / "desktop")
        assert process is not None
        os.kill(int(process.name), signal.SIGKILL)
        with anyio.fail_after(2):
            death = await machines.wait("one")
        assert "SIGKILL" in death.reason
        assert "said by the guest" in await machines.log_tail("one")


async def test_a_guest_that_never_stops_writing_to_its_console_fills_nothing(tmp_path: Path) -> None:
    async with engine(tmp_path) as machines:
        made = await machines.create(spec("loud"), Told())
        await run_in(made, "timeout 20 sh -c 'yes | sudo tee /dev/ttyS0 >/dev/null' & sleep 12")
        log = tmp_path / "qemu" / "desktops" / "loud" / "desktop" / "serial.log"
        assert log.stat().st_blocks * 512 < 32 * MIB
        assert set(await machines.log_tail("loud", 20)) <= {"y", ""}


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def write(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 4096)


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        pytest.param("ram", cut, "bytes", id="memory cut short"),
        pytest.param("state", cut, "bytes", id="state cut short"),
        pytest.param("disk.qcow2", cut, "bytes", id="disk cut short"),
        pytest.param("ram", write, "changed", id="memory written to"),
        pytest.param("state", Path.unlink, "gone", id="state gone"),
    ],
)
async def test_a_spoilt_template_is_put_aside_and_the_next_boot_is_cold(
    tmp_path: Path, file: str, spoil: Callable[[Path], None], words: str
) -> None:
    async with own_template(tmp_path) as template:
        async with engine(tmp_path, template_dir=template.parent) as machines:
            spoil(template / file)
            told = Told(until="firmware")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(machines.create, spec("cold"), told)
                await told.reached.wait()
                tasks.cancel_scope.cancel()
            assert machines.next_path() is ResetPath.COLD
        assert any("put aside" in note and words in note for note in told.notes), told.notes
        assert not template.exists()
        assert not (template.parent / f"{template.name}.aside" / "ram").exists()


async def test_clones_that_fail_twice_put_the_template_aside_and_the_full_state_is_restored_meanwhile(
    tmp_path: Path,
) -> None:
    async with own_template(tmp_path) as template:
        async with engine(tmp_path, template_dir=template.parent) as machines:
            await save_full_state(machines, template)
            await anyio.to_thread.run_sync(spoil_unnoticed, template)
            first, second = Told(), Told()
            restored = [await create_ready(machines.create, name, told) for name, told in (("a", first), ("b", second))]
            assert [made.path for made in restored] == [ResetPath.RESTORE] * 2
        for told in (first, second):
            assert told.phases == ["clone", "restore", "identity"], told.notes
            assert any("A clone of the template failed" in note for note in told.notes)
        assert not any("put aside" in note for note in first.notes)
        assert any("2 clones of it failed one after another" in note for note in second.notes)


async def save_full_state(machines: Engine, template: Path) -> None:
    """As it is done when a template is made, of a clone that never goes on."""
    plan = await machines._plan(SCREEN)
    clone = machines._machines.clone(plan, spec("saved"), Told(), template=template, state=template / "state")
    async with clone as running:
        await machines._saved.save(plan, running.monitor, template / "disk.qcow2", Told())
    await machines.destroy("saved")


def spoil_unnoticed(template: Path) -> None:
    with (template / "state").open("r+b") as file:
        file.write(b"no state of a machine")
    accept(template)


async def create_ready(create: Callable[..., object], name: str, told: Told) -> Made:
    made = await create(spec(name), told)  # type: ignore[misc]  # a coroutine function, as Engine.create is
    assert isinstance(made, Made)
    await both_answer(made.endpoints)
    return made


async def test_a_clone_whose_template_is_cut_short_dies_and_says_why(tmp_path: Path) -> None:
    async with own_template(tmp_path) as template, engine(tmp_path, template_dir=template.parent) as machines:
        await machines.create(spec("one"), Told())
        os.truncate(template / "ram", 0)
        with anyio.fail_after(60):
            death = await machines.wait("one")
        assert "cut short" in death.reason


async def test_cold_boots_are_never_two_at_once(tmp_path: Path) -> None:
    async with engine(tmp_path, templates="off") as machines:
        assert machines.next_path() is ResetPath.COLD
        first, second = Told(until="firmware"), Told(until="firmware")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(machines.create, spec("a"), first)
            await first.reached.wait()
            tasks.start_soon(machines.create, spec("b"), second)
            with anyio.move_on_after(5):
                await second.reached.wait()
            assert not second.phases
            assert "waiting for the cold boot" in second.doing[0]
            tasks.cancel_scope.cancel()


async def test_what_a_killed_daemon_left_is_found_and_removed(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from vm_engine import *
async def main():
    async with engine(Path({str(tmp_path)!r}), template_dir=Path({str(shared() / "templates")!r})) as machines:
        await machines.create(spec("left"), Told())
        print("made", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    daemon = await anyio.open_process([sys.executable, "-c", program], stderr=None)
    assert daemon.stdout is not None
    assert b"made" in await daemon.stdout.receive()
    daemon.kill()
    await daemon.aclose()
    async with engine(tmp_path) as machines:
        assert await machines.list() == {"left"}
        await machines.destroy("left")
        assert await machines.list() == frozenset()
        assert list((tmp_path / "qemu" / "desktops").iterdir()) == []


async def test_a_disk_that_is_spoilt_stops_the_start_and_later_the_boot(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    await anyio.run_process(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1G"])
    async with engine(tmp_path, vm_disk=disk) as machines:
        os.truncate(disk, 100)
        with pytest.raises(DiskUnusable) as caught:
            await machines.create(spec("a"), Told())
        assert caught.value.facts["cause"] == "truncated"
    with pytest.raises(SettingsError, match="100 bytes"):
        async with engine(tmp_path, vm_disk=disk):
            pass


async def test_more_memory_than_the_host_has_is_refused_with_numbers(tmp_path: Path) -> None:
    async with engine(tmp_path, ram_size=4096 * 1024**3) as machines:
        with pytest.raises(OutOfMemory) as caught:
            await machines.admit(Told())
        assert caught.value.facts["needed_bytes"] > 4096 * 1024**3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system to fill")
async def test_a_full_state_directory_is_told_with_numbers_and_leaves_nothing(tmp_path: Path) -> None:
    await anyio.run_process(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", tmp_path])
    try:
        async with engine(tmp_path) as machines:
            with pytest.raises(NoSpace) as caught:
                await machines.create(spec("a"), Told())
            assert caught.value.facts["needed_bytes"] > 64 * MIB >= caught.value.facts["free_bytes"]
            assert await machines.list() == frozenset()
    finally:
        await anyio.run_process(["umount", tmp_path])
