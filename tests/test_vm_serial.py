"""A guest's serial console: its phases, its last lines, and bounds on both; and the guest that is told who it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from envd.errors import GuestMisbehaved
from envd.guest import Guest
from envd.vm.identity import give_identity, has_helper, new_identity
from envd.vm.serial import SerialLog

MIB = 1024**2
NOBODY: Guest = None  # type: ignore[assignment]  # the helper is asked past the guest's server


def append(path: Path, words: str | bytes) -> None:
    """As QEMU does it."""
    with path.open("ab") as file:
        file.write(words.encode() if isinstance(words, str) else words)


OURS = """SYSLINUX 6.04 EDD
[    0.000000] Linux version 6.1.0-41-amd64
envd-milestone: kernel
envd-milestone: display
envd-milestone: session
envd-milestone: guest-server
"""
SYSTEMD = """GRUB loading.
[    0.000000] Linux version 5.15.0-91-generic (buildd@lcy02-amd64-045)
[  OK  ] Started GNOME Display Manager.
[  OK  ] Started Session c1 of User user.
[  OK  ] Started OSWorld server.
"""


@pytest.mark.parametrize("said", [pytest.param(OURS, id="ours"), pytest.param(SYSTEMD, id="systemd")])
async def test_each_phase_is_told_once_and_in_order(tmp_path: Path, said: str) -> None:
    told: list[str] = []
    log = SerialLog(tmp_path / "serial.log", told.append)
    for line in said.splitlines(keepends=True):
        append(log.path, line[:7])
        await log.read()
        append(log.path, line[7:])
        await log.read()
    append(log.path, said)
    await log.read()
    assert told == ["boot loader", "kernel", "display", "session", "guest server"]


async def test_a_phase_that_was_not_seen_is_left_out(tmp_path: Path) -> None:
    told: list[str] = []
    log = SerialLog(tmp_path / "serial.log", told.append)
    append(log.path, "envd-milestone: session\nenvd-milestone: display\n")
    await log.read()
    assert told == ["session"]


async def test_once_the_boot_is_over_no_phase_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    log = SerialLog(tmp_path / "serial.log", told.append)
    log.quiet()
    append(log.path, OURS)
    await log.read()
    assert told == []
    assert log.tail(1) == ("envd-milestone: guest-server",)


async def test_the_last_lines_are_plain_and_bounded(tmp_path: Path) -> None:
    log = SerialLog(tmp_path / "serial.log")
    append(log.path, b"\x1b[1;31mred\x1b[0m\r\n\xff\xfe\x00bytes\n" + b"x" * 9000 + b"\nhalf")
    await log.read()
    assert log.tail(4) == ("red", "\ufffd\ufffdbytes", "x" * 300, "half")
    append(log.path, "\n".join(str(number) for number in range(5000)) + "\n")
    await log.read()
    assert log.tail(10_000)[-2:] == ("4998", "4999")
    assert len(log.tail(10_000)) == 200


async def test_a_file_that_grows_is_cut_and_read_on(tmp_path: Path) -> None:
    log = SerialLog(tmp_path / "serial.log")
    for number in range(40):
        append(log.path, b"y\n" * 60_000 + f"end {number}\n".encode())
        await log.read()
        assert log.tail(1) == (f"end {number}",)
        assert log.path.stat().st_size < 2 * MIB


@pytest.mark.parametrize("kind", ["absent", "a link", "a folder", "a pipe"])
async def test_what_is_no_file_of_qemus_is_left_alone(tmp_path: Path, kind: str) -> None:
    path, secret = tmp_path / "serial.log", tmp_path / "secret"
    secret.write_text("secret\n" * MIB)
    match kind:
        case "a link":
            path.symlink_to(secret)
        case "a folder":
            os.mkdir(path)
        case "a pipe":
            os.mkfifo(path)
    log = SerialLog(path)
    await log.read()
    assert log.tail(10) == ()
    assert secret.stat().st_size == 7 * MIB


@asynccontextmanager
async def helper(run: Path, answer: bytes | None) -> AsyncIterator[list[dict[str, Any]]]:
    """A guest's helper as QEMU shows it: what it was asked. Without `answer` it says nothing."""
    asked: list[dict[str, Any]] = []
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            asked.append(json.loads(await reader.readline()))
            writer.write(answer or b"")
            if answer is None:
                await reader.read()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(serve(reader, writer)))

    os.makedirs(run)
    here = os.open(run, os.O_PATH)
    server = await asyncio.start_unix_server(accept, f"/proc/self/fd/{here}/identity.sock")
    os.close(here)
    async with server:
        yield asked
    await asyncio.wait(serving)


async def test_a_clone_is_told_the_time_and_who_it_is_however_long_its_path(tmp_path: Path) -> None:
    run = tmp_path / ("long" * 30)
    async with helper(run, b'{"ok": true, "did": []}\n') as asked:
        assert await has_helper(run)
        await give_identity("helper", run, NOBODY, "one", "password")
    assert asked[0] == {}
    assert abs(asked[1]["time"] - time.time()) < 5
    assert set(asked[1]) == {"time", "hostname", "machine_id", "mac", "seed", "ssh"}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b'{"ok": false, "error": "no such device"}\n', id="refused"),
        pytest.param(b"{\n", id="no JSON"),
        pytest.param(b"[]\n", id="no object"),
        pytest.param(b"", id="hung up"),
        pytest.param(b"x" * 200_000, id="no end of a line"),
    ],
)
async def test_a_helper_that_does_not_do_it_fails_the_clone(tmp_path: Path, answer: bytes) -> None:
    async with helper(tmp_path / "run", answer):
        with pytest.raises(GuestMisbehaved, match="identity"):
            await give_identity("helper", tmp_path / "run", NOBODY, "one", "password")


async def test_a_guest_without_a_helper_is_known_by_its_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envd.vm.identity.HELPER_SECONDS", 0.3)
    assert not await has_helper(tmp_path)
    async with helper(tmp_path / "run", None):
        assert not await has_helper(tmp_path / "run")


def test_an_identity_is_that_of_its_id_and_of_no_other() -> None:
    one, again, other = new_identity("one"), new_identity("one"), new_identity("other")
    lasting = ("hostname", "machine_id", "mac")
    assert [one[name] for name in lasting] == [again[name] for name in lasting]
    assert not {one[name] for name in (*lasting, "seed")} & {other[name] for name in (*lasting, "seed")}
    assert one["seed"] != again["seed"]
    assert int(one["mac"][:2], 16) & 3 == 2  # an address that is not a maker's, of one machine
