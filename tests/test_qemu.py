"""What is particular to `PROVIDER=qemu`: what it needs of the host, and the sandbox around each QEMU.

Where the sandbox is looked at from inside, `sh` runs in QEMU's place. What every driver promises is in
`test_driver_contract.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from envd.drivers.base import Report
from envd.drivers.qemu import QemuDriver
from envd.drivers.qemu.cell import ProcessCell
from envd.drivers.qemu.host import find_qemu
from envd.errors import BootFailed, MissingDependency, SettingsError, StartError
from envd.settings import Settings
from envd.vm.cell import CellSpec, Role

pytestmark = pytest.mark.qemu

OLD, NEW = (7, 2, 22), (8, 2, 0)
LIBRARIES = ("lib", "lib32", "lib64", "libx32")


def shell(root: Path, script: str, *, role: Role = "desktop", name: str = "a-1", template: bool = False) -> CellSpec:
    """A cell that runs a script. Everything that it is given is there."""
    run, disk, files = root / name, root / "disk", root / "template"
    for directory in (run, files):
        directory.mkdir(parents=True, exist_ok=True)
    for path in (disk, files / "ram", files / "state"):
        path.write_text("whole")
    return CellSpec(name, name, role, ("sh", "-c", script), run, 0, disk=disk, template=files if template else None)


@asynccontextmanager
async def cells(root: Path, qemu: tuple[int, int, int] = OLD) -> AsyncIterator[ProcessCell]:
    async with ProcessCell.open(root, qemu) as cell:
        yield cell


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not await anyio.to_thread.run_sync(holds):  # noqa: ASYNC110 - other processes tell nobody
            await asyncio.sleep(0.01)


async def printed(root: Path, script: str, qemu: tuple[int, int, int] = OLD, **of_cell: bool | str) -> list[str]:
    """What the script prints in a cell, which must end well."""
    spec = await anyio.to_thread.run_sync(lambda: shell(root, script, **of_cell))  # type: ignore[arg-type]  # of two types
    async with cells(root, qemu) as cell:
        await cell.start(spec, Report())
        async with asyncio.timeout(20):
            death = await cell.wait(spec.name)
        *lines, last = await cell.log_tail(spec.name, 100)
    assert (death.exit_code, last) == (0, "envd: QEMU ended with code 0"), lines
    return lines


async def test_a_machine_sees_nothing_of_the_host_but_its_programs_and_what_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVD_SECRET", "secret")
    lines = await printed(
        tmp_path,
        "ls -A /; echo; ls -A /home /root /tmp 2>/dev/null; ls -A /etc; echo; ls -d /proc/[0-9]* | wc -l; env; id -u; "
        "cat /System.qcow2; hostname",
    )
    roots, etc, rest = (part.split() for part in "\n".join(lines).split("\n\n"))
    assert set(roots) <= {"bin", "dev", "etc", "proc", "run", "sbin", "System.qcow2", "usr", "var", *LIBRARIES}
    assert set(etc) <= {"ld.so.cache", "resolv.conf"}
    assert int(rest[0]) < 6
    assert not any("ENVD" in word or "HOME" in word for word in rest)
    assert rest[-2:] == ["1000", "wholemachine"]


@pytest.mark.parametrize(
    ("path", "role", "qemu", "writable"),
    [
        pytest.param("/run/vm/x", "desktop", OLD, True, id="its directory"),
        pytest.param("/System.qcow2", "template", OLD, False, id="the disk"),
        pytest.param("/template/ram", "template", NEW, True, id="memory of a template that boots"),
        pytest.param("/template/ram", "desktop", OLD, True, id="memory of a clone, for an older QEMU"),
        pytest.param("/template/ram", "desktop", NEW, False, id="memory of a clone"),
        pytest.param("/template/state", "template", OLD, False, id="state"),
        pytest.param("/template/new", "template", OLD, False, id="more files of a template"),
        pytest.param("/usr/bin/new", "desktop", OLD, False, id="programs"),
        pytest.param("/proc/sys/kernel/core_pattern", "desktop", OLD, False, id="settings of the kernel"),
    ],
)
async def test_what_a_machine_may_write(
    tmp_path: Path, path: str, role: Role, qemu: tuple[int, int, int], writable: bool
) -> None:
    script = f"if (: >>{path}) 2>/dev/null; then echo yes; else echo no; fi"
    assert await printed(tmp_path, script, qemu, role=role, template=True) == ["yes" if writable else "no"]


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        pytest.param("exit 3", 3, "QEMU ended with code 3", id="ends"),
        pytest.param("kill -BUS $$", -7, "QEMU was killed by SIGBUS", id="killed"),
    ],
)
async def test_a_machine_that_ends_by_itself_says_how(tmp_path: Path, script: str, code: int, reason: str) -> None:
    async with cells(tmp_path) as cell:
        await cell.start(shell(tmp_path, f"echo its last words; {script}"), Report())
        async with asyncio.timeout(20):
            death = await cell.wait("a-1")
        assert (death.exit_code, death.reason) == (code, reason)
        assert await cell.log_tail("a-1", 2) == ("its last words", f"envd: {reason}")
        assert await cell.names() == {"a-1": "a-1"}
        await cell.end("a-1")
        assert await cell.names() == {}


async def test_what_a_machine_prints_is_kept_within_bounds(tmp_path: Path) -> None:
    async with cells(tmp_path) as cell:
        script = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; head -c 5000000 /dev/zero"
        await cell.start(shell(tmp_path, script), Report())
        async with asyncio.timeout(20):
            await cell.wait("a-1")
        lines = await cell.log_tail("a-1", 10_000)
    assert len(lines) == 200
    assert lines[-3] == "line 2999"
    assert max(map(len, lines)) <= 500


async def test_ending_a_machine_ends_all_of_its_processes_and_may_be_asked_twice_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    listens = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); open('up', 'w'); time.sleep(99)"
    async with cells(tmp_path) as cell:
        await cell.start(
            shell(tmp_path, f'cd /run/vm; trap "" HUP; setsid /usr/bin/python3 -c "{listens}" & wait'), Report()
        )
        await until((tmp_path / "a-1" / "up").exists)
        waiting = asyncio.create_task(cell.wait("a-1"))
        await asyncio.gather(cell.end("a-1"), cell.end("a-1"))
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        assert (await waiting).reason == "it was destroyed"
        await cell.end("a-1")


async def test_a_name_is_used_once(tmp_path: Path) -> None:
    async with cells(tmp_path) as cell:
        await cell.start(shell(tmp_path, "sleep 99"), Report())
        with pytest.raises(BootFailed, match="a-1"):
            await cell.start(shell(tmp_path, "sleep 99"), Report())


OWNER = """
import asyncio, sys
from pathlib import Path
from envd.drivers.base import Report
from envd.drivers.qemu.cell import ProcessCell
from envd.vm.cell import CellSpec

async def main(root):
    async with ProcessCell.open(root, (7, 2, 22)) as cell:
        run = root / "a-1"
        run.mkdir()
        await cell.start(CellSpec("a-1", "a-1", "desktop", ("sleep", "99"), run, 0), Report())
        print("up", flush=True)
        await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1])))
"""


def given(root: Path) -> list[int]:
    """Processes that have a path below `root` among their arguments, and are not tests themselves."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if argv[0] == b"bwrap" and any(os.fsencode(root) in word for word in argv):
            found.append(int(entry.name))
    return found


async def test_machines_do_not_outlive_a_daemon_that_is_killed(tmp_path: Path) -> None:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout is not None
    assert await owner.stdout.readline() == b"up\n"
    assert await anyio.to_thread.run_sync(given, tmp_path)
    owner.send_signal(signal.SIGKILL)
    await owner.wait()
    await until(lambda: not given(tmp_path))


async def test_what_a_killed_daemon_left_is_ended_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "a-1").mkdir()
    left = await asyncio.create_subprocess_exec(
        *("bwrap", "--unshare-pid", "--ro-bind", "/", "/", "--bind", str(tmp_path / "a-1"), "/mnt", "sleep", "99")
    )
    await until(lambda: bool(given(tmp_path)))
    async with cells(tmp_path):
        assert await anyio.to_thread.run_sync(given, tmp_path) == []
    assert await left.wait() == -signal.SIGKILL


def program(directory: Path, name: str, says: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\necho '{says}'\n")
    (directory / name).chmod(0o755)


async def test_all_that_is_missing_is_named_at_once_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency) as caught:
        await find_qemu()
    assert "apt-get install -y --no-install-recommends bubblewrap qemu-system-x86 qemu-utils" in caught.value.hint


@pytest.mark.parametrize(
    ("says", "words"),
    [
        pytest.param("QEMU emulator version 4.2.1", "too old", id="old"),
        pytest.param("command not found", "no version of QEMU", id="something else"),
    ],
)
async def test_a_qemu_that_is_of_no_use_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, words: str
) -> None:
    program(tmp_path / "bin", "qemu-system-x86_64", says)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(StartError, match=words):
        await find_qemu()


async def test_the_build_of_qemu_is_part_of_its_name() -> None:
    qemu = await find_qemu()
    assert qemu.version > (5, 2, 0)
    assert qemu.name.startswith(f"QEMU {'.'.join(map(str, qemu.version))}")


async def test_a_host_that_forbids_the_sandbox_says_so_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bwrap").write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2; exit 1\n")
    (tmp_path / "bin" / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(StartError, match="No permissions to create") as caught:
        async with cells(tmp_path):
            pass
    assert "unprivileged_userns_clone" in caught.value.hint


async def test_a_disk_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    settings = Settings(provider="qemu", state_dir=tmp_path, vm_disk=tmp_path / "no.qcow2")
    with pytest.raises(SettingsError, match=r"no\.qcow2"):
        async with QemuDriver(settings, "test"):
            pass
