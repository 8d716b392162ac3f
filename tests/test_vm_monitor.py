"""The monitor connection, against real QEMUs that boot nothing: an empty machine is enough to be asked."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from envd.errors import InfraError
from envd.vm.monitor import Monitor

pytestmark = pytest.mark.qemu

RAM = 16 * 1024**2


@asynccontextmanager
async def qemu(
    directory: Path, *more: str, share: str = "on"
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Path]]:
    """An empty machine, its memory in the file `ram`, and the path of its monitor. QEMU is told relative paths, since
    a socket's may have 107 bytes."""
    memory = f"memory-backend-file,id=ram,size={RAM},mem-path=ram,share={share}"
    process = await asyncio.create_subprocess_exec(
        *(
            "qemu-system-x86_64",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-machine",
            "pc,memory-backend=ram",
        ),
        *("-accel", "tcg", "-m", f"{RAM >> 20}M", "-object", memory, "-device", "VGA"),
        *("-netdev", "user,id=net,hostfwd=tcp:127.0.0.1:0-:5000,hostfwd=tcp:127.0.0.1:0-:9222"),
        *("-device", "virtio-net-pci,netdev=net,romfile=", "-qmp", "unix:qmp.sock,server=on,wait=off", *more),
        cwd=directory,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process, directory / "qmp.sock"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def monitored(directory: Path, *more: str, share: str = "on") -> AsyncIterator[Monitor]:
    async with qemu(directory, *more, share=share) as (_, path), Monitor.open(path) as monitor:
        yield monitor


async def test_a_socket_that_comes_late_at_a_path_too_long_for_one_is_reached(tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 30)
    directory.mkdir()
    statuses = []

    async def connect() -> None:
        async with Monitor.open(directory / "qmp.sock") as monitor:
            statuses.append(await monitor.status())

    async with asyncio.TaskGroup() as tasks:
        connecting = tasks.create_task(connect())
        await asyncio.sleep(0.05)
        async with qemu(directory):
            await connecting
    assert statuses == ["running"]


async def test_where_no_socket_comes_the_error_names_it(tmp_path: Path) -> None:
    with pytest.raises(InfraError, match=r"nobody\.sock.*No such file") as caught:
        async with Monitor.open(tmp_path / "nobody.sock", timeout=0.1):
            pass
    assert caught.value.facts["cause"] == "no_answer"


async def test_who_does_not_speak_qmp_is_told_from_who_says_nothing(tmp_path: Path) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-something\r\n")
        writer.close()

    async with await asyncio.start_unix_server(answer, tmp_path / "other.sock"):
        with pytest.raises(InfraError) as caught:
            async with Monitor.open(tmp_path / "other.sock", timeout=5):
                pass
    assert caught.value.facts["cause"] == "nonsense"


async def test_a_second_connection_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    async with qemu(tmp_path) as (_, path), Monitor.open(path) as monitor:
        with pytest.raises(InfraError, match="one connection at a time") as caught:
            async with Monitor.open(path, timeout=0.2):
                pass
        assert caught.value.facts["cause"] == "no_answer"
        assert await monitor.status() == "running"


async def test_a_machine_is_paused_and_resumed_as_often_as_somebody_likes(tmp_path: Path) -> None:
    async with monitored(tmp_path) as monitor:
        seen = []
        for step in (monitor.pause, monitor.pause, monitor.resume, monitor.resume):
            await step()
            seen.append(await monitor.status())
    assert seen == ["paused", "paused", "running", "running"]


async def test_an_error_of_qemu_is_told_in_its_words_and_the_connection_goes_on(tmp_path: Path) -> None:
    async with monitored(tmp_path) as monitor:
        with pytest.raises(InfraError, match="no-such-command has not been found") as caught:
            await monitor.execute("no-such-command")
        assert (caught.value.facts["cause"], caught.value.facts["command"]) == ("refused", "no-such-command")
        assert await monitor.status() == "running"


async def test_a_qemu_that_hangs_hangs_nobody(tmp_path: Path) -> None:
    async with qemu(tmp_path) as (process, path):
        with anyio.fail_after(5):
            async with Monitor.open(path) as monitor:
                process.send_signal(signal.SIGSTOP)
                for _ in range(2):
                    with pytest.raises(InfraError, match=r"within 0\.1 s") as caught:
                        await monitor.execute("query-status", timeout=0.1)
                    assert caught.value.facts["cause"] == "no_answer"
                process.send_signal(signal.SIGCONT)
                assert await monitor.status() == "running"  # what came late is nobody's answer
                process.send_signal(signal.SIGSTOP)


async def test_a_qemu_that_dies_ends_what_was_asked_and_what_is_listened_to(tmp_path: Path) -> None:
    async with qemu(tmp_path) as (process, path), Monitor.open(path) as monitor, monitor.events() as events:
        process.send_signal(signal.SIGSTOP)
        asked = asyncio.create_task(monitor.status())
        await asyncio.sleep(0.05)
        process.kill()
        with anyio.fail_after(5):
            [failure] = await asyncio.gather(asked, return_exceptions=True)
            await monitor.lost()
            assert [event async for event in events] == []
        with pytest.raises(InfraError) as caught:
            await monitor.status()
        assert isinstance(failure, InfraError)
        assert {failure.facts["cause"], caught.value.facts["cause"]} == {"connection_lost"}


async def test_many_may_ask_at_once(tmp_path: Path) -> None:
    async with monitored(tmp_path) as monitor:
        assert set(await asyncio.gather(*(monitor.status() for _ in range(50)))) == {"running"}


async def test_a_monitor_is_left_by_another_task_than_opened_it(tmp_path: Path) -> None:
    async with qemu(tmp_path) as (_, path):
        opening = Monitor.open(path)
        monitor = await asyncio.create_task(opening.__aenter__())
        assert await monitor.status() == "running"
        await asyncio.create_task(opening.__aexit__(None, None, None))
        await monitor.lost()
        async with Monitor.open(path) as again:
            assert await again.status() == "running"


async def test_events_are_heard_by_name_and_too_many_are_dropped(tmp_path: Path) -> None:
    async with monitored(tmp_path) as monitor, monitor.events("STOP") as stops, monitor.events() as all_of_them:
        for _ in range(200):
            await monitor.pause()
            await monitor.resume()
        heard = stops.statistics().current_buffer_used, all_of_them.statistics().current_buffer_used
        assert (await stops.receive())["event"] == "STOP"
    assert heard == (200, 256)


async def test_the_ports_that_qemu_chose_are_told(tmp_path: Path) -> None:
    async with monitored(tmp_path) as monitor:
        ports = await monitor.forwarded_ports()
        assert ports.keys() == {5000, 9222}
        _, writer = await asyncio.open_connection("127.0.0.1", ports[5000])
        writer.close()
        await writer.wait_closed()


async def test_the_screen_is_written_while_the_machine_is_paused(tmp_path: Path) -> None:
    async with monitored(tmp_path) as monitor:
        await monitor.pause()
        await monitor.screendump("screen.ppm")
    assert (tmp_path / "screen.ppm").read_bytes().startswith(b"P6\n")


@pytest.mark.parametrize("memory", [pytest.param(False, id="devices"), pytest.param(True, id="with memory")])
async def test_a_machine_goes_on_in_another_process_from_what_was_saved(tmp_path: Path, memory: bool) -> None:
    async with monitored(tmp_path) as monitor:
        with (tmp_path / "ram").open("r+b") as ram:
            ram.seek(8 * 1024**2)
            ram.write(b"\x78\x56\x34\x12")
        await monitor.pause()
        await monitor.save_state(tmp_path / "state", memory=memory)
    if memory:
        (tmp_path / "ram").write_bytes(bytes(RAM))
    async with monitored(tmp_path, "-incoming", "defer", share="off") as clone:
        assert await clone.status() == "inmigrate"
        await clone.load_state(tmp_path / "state", memory=memory)
        assert await clone.status() == "paused"
        assert "0x12345678" in await clone.human("xp /1xw 0x800000")
        await clone.resume()
        assert await clone.status() == "running"


async def test_a_state_that_was_cut_short_is_refused_and_its_qemu_ends(tmp_path: Path) -> None:
    async with monitored(tmp_path) as monitor:
        await monitor.pause()
        await monitor.save_state(tmp_path / "state")
    os.truncate(tmp_path / "state", (tmp_path / "state").stat().st_size // 3)
    async with qemu(tmp_path, "-incoming", "defer", share="off") as (process, path), Monitor.open(path) as clone:
        with pytest.raises(InfraError) as caught:
            await clone.load_state(tmp_path / "state")
        assert caught.value.facts["cause"] in ("refused", "connection_lost")
        async with asyncio.timeout(5):
            assert await process.wait() == 1


@pytest.mark.parametrize(
    "path", [pytest.param("no/such/folder", id="saved"), pytest.param("no such file", id="loaded")]
)
async def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, path: str) -> None:
    async with monitored(tmp_path, *(("-incoming", "defer") if " " in path else ())) as monitor:
        with pytest.raises(InfraError, match=f"{path} cannot be opened: No such file"):
            await (monitor.load_state if " " in path else monitor.save_state)(tmp_path / path)
