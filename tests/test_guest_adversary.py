"""A guest, and a Chrome in it, that do their worst on the wire: each call ends in time, in an error that has a name,
and takes no more memory than it may. What they say in well-formed answers: test_guest.py, test_cdp.py."""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import io
import re
import struct
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest
from PIL import Image

from envd.boot.probes import judge_picture
from envd.errors import EnvdError, GuestMisbehaved, GuestUnreachable
from envd.guest import Cdp, Guest
from envd.guest.client import LARGEST_ANSWER, LARGEST_WORDS, MOST_PARTS
from envd.models import ProbeResult
from envd.settle import differs

Talk = Callable[[asyncio.StreamWriter], Awaitable[None]]

PATIENCE = 1.0
"""Seconds that each call is given."""
GROWTH = 192 * 1024 * 1024
"""Bytes by which the process may grow: an answer of the largest size, twice, and what the allocator keeps."""
OK = b"HTTP/1.1 200 OK\r\n"
JSON = OK + b"Content-Type: application/json\r\n"


@asynccontextmanager
async def wire(talk: Talk, handshake: bytes | None = None) -> AsyncIterator[str]:
    """The address of a server that answers every request by `talk`. With `handshake` it is a Chrome, whose websocket
    answers so, with these bytes among its headers, once it is open."""

    talks: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if length := re.search(rb"Content-Length: (\d+)", head, re.I):
            await reader.readexactly(int(length[1]))
        if handshake is None:
            await talk(writer)
        elif b" /json/version " in head:
            said = b'{"Browser": "X/1", "webSocketDebuggerUrl": "ws://h/devtools/browser/b-1"}'
            await body(said, OK + b"Connection: close\r\n")(writer)
        else:
            writer.write(opened(head, handshake))
            await talk(writer)
            await reader.read()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(me := asyncio.ensure_future(answer(reader, writer)))
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await me
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for one in talks:
            one.cancel()
        await asyncio.gather(*talks, return_exceptions=True)


def opened(head: bytes, more: bytes) -> bytes:
    lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    key = next(value for name, value in lines.items() if name.lower() == b"sec-websocket-key")
    accepted = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accepted + b"\r\n" + more + b"\r\n"
    )


def says(*pieces: bytes) -> Talk:
    """Says that, and hangs up."""

    async def talk(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return talk


def for_ever(first: bytes, then: bytes, pause: float = 0.0) -> Talk:
    async def talk(writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(then)
            await writer.drain()
            await asyncio.sleep(pause)

    return talk


def body(content: bytes, headers: bytes = JSON) -> Talk:
    return says(headers + b"Content-Length: %d\r\n\r\n" % len(content), content)


def packed(size: int, wbits: int) -> bytes:
    """So many zeros, deflated; wbits 31 is gzip, 15 zlib."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, wbits)
    zeros = bytes(1024 * 1024)
    return b"".join(deflater.compress(zeros) for _ in range(size // len(zeros))) + deflater.flush()


@contextmanager
def within_bounds() -> Iterator[None]:
    """What runs in the block takes little more than `PATIENCE`, and no more than `GROWTH`."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = memory("VmRSS"), time.monotonic()
    yield
    assert time.monotonic() - began < PATIENCE + 9
    assert memory("VmHWM") - before < GROWTH


def memory(which: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{which}:")[2].split()[0]) * 1024


class Worst(NamedTuple):
    talk: Talk
    error: type[EnvdError]
    words: str


def gone(words: str = "", *, talk: Talk) -> Worst:
    return Worst(talk, GuestUnreachable, words)


def bad(words: str, *, talk: Talk) -> Worst:
    return Worst(talk, GuestMisbehaved, words)


ELSEWHERE = b"HTTP/1.1 307 Temporary Redirect\r\nConnection: close\r\nContent-Length: 0\r\nLocation: "
ANSWERS = {
    "endless": bad("more than 16777216 bytes", talk=for_ever(JSON + b"\r\n", b"x" * 65_536)),
    "endless, in chunks": bad(
        "more than 16777216 bytes",
        talk=for_ever(JSON + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65_536 + b"\r\n"),
    ),
    "a byte at a time": gone("did not answer within", talk=for_ever(JSON + b"Content-Length: 999\r\n\r\n", b"x", 0.02)),
    "a header at a time": gone(talk=for_ever(OK, b"X-A: b\r\n", 0.02)),
    "endless headers": gone(talk=for_ever(OK, b"X-A: b\r\n" * 1000)),
    "an endless header": gone(talk=for_ever(OK + b"X-A: ", b"x" * 65_536)),
    "an endless status": gone(talk=for_ever(b"HTTP/1.1 200 ", b"x" * 65_536)),
    "go on, for ever": gone("did not answer within", talk=for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, 0.01)),
    "hints, for ever": gone(
        "did not answer within", talk=for_ever(b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 100, 0.01)
    ),
    "half a body": gone("broke off", talk=says(JSON + b"Content-Length: 999\r\n\r\n{")),
    "half a header": gone("broke off", talk=says(b"HTTP/1.1 200 OK\r\nContent-Le")),
    "nothing": gone("broke off", talk=says()),
    "no chunk": gone("broke off", talk=says(JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")),
    "a chunk of 10^1000 bytes": gone(
        "broke off", talk=says(JSON + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 1000 + b"\r\n")
    ),
    "an endless chunk's extension": gone(talk=for_ever(JSON + b"Transfer-Encoding: chunked\r\n\r\n5;", b"x" * 65_536)),
    "two lengths": gone("broke off", talk=says(JSON + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}")),
    "a length and chunks": gone(
        "broke off", talk=says(JSON + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    ),
    "no such version": gone("broke off", talk=says(b"HTTP/9.9 200 OK\r\nContent-Length: 2\r\n\r\n{}")),
    "no such status": gone("broke off", talk=says(b"HTTP/1.1 999999 OK\r\nContent-Length: 2\r\n\r\n{}")),
    "another protocol": bad(
        "answered 101", talk=says(b"HTTP/1.1 101 S\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\nx")
    ),
    "a type that is no text": gone("broke off", talk=body(b"{}", OK + b"Content-Type: \xff\x00;charset=\xff\r\n")),
    "an odd charset": bad(
        "did not run", talk=body(b"{}", OK + b"Content-Type: application/json; charset=\xe9\"'(;\r\n")
    ),
    "to the cloud's secrets": bad("answered 307", talk=says(ELSEWHERE + b"http://169.254.169.254/latest/\r\n\r\n")),
    "to our disk": bad("answered 307", talk=says(ELSEWHERE + b"file:///etc/passwd\r\n\r\n")),
    "packed a thousand to one": bad(
        "more than 16777216 bytes", talk=body(packed(1 << 28, 31), JSON + b"Content-Encoding: gzip\r\n")
    ),
    "deflated a thousand to one": bad(
        "more than 16777216 bytes", talk=body(packed(1 << 28, 15), JSON + b"Content-Encoding: deflate\r\n")
    ),
    "not packed": gone("broke off", talk=body(b"0123456789", JSON + b"Content-Encoding: gzip\r\n")),
    "packed otherwise": gone("broke off", talk=body(b"0123456789", JSON + b"Content-Encoding: br\r\n")),
    "nested": bad("broken JSON", talk=body(b"[" * 250_000)),
    "many small parts": bad("broken JSON", talk=body(b"[" + b"[]," * (LARGEST_WORDS // 4) + b"1]")),
    "an exit code beyond all numbers": bad("did not run", talk=body(b'{"status": "success", "returncode": 1e999}')),
    "an exit code of 4000 digits": bad(
        "did not run", talk=body(b'{"status": "success", "returncode": ' + b"9" * 4000 + b"}")
    ),
    "an exit code of 5000 digits": bad(
        "broken JSON", talk=body(b'{"status": "success", "returncode": ' + b"9" * 5000 + b"}")
    ),
}


@pytest.mark.parametrize("worst", [pytest.param(one, id=name) for name, one in ANSWERS.items()])
async def test_what_a_guest_answers_ends_in_time_in_an_error_and_fits_into_memory(worst: Worst) -> None:
    async with wire(worst.talk) as url, aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        with within_bounds(), pytest.raises(worst.error, match=worst.words or None):
            await Guest(session, url).execute("true", timeout=PATIENCE)


@pytest.mark.parametrize("path", ["http://127.0.0.1:{port}/", "//127.0.0.1:{port}/", "/elsewhere"])
async def test_a_guest_leads_the_daemon_nowhere(path: str) -> None:
    asked: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()

    other = await asyncio.start_server(listen, "127.0.0.1", 0)
    location = path.format(port=other.sockets[0].getsockname()[1]).encode()
    async with other, wire(says(ELSEWHERE + location + b"\r\n\r\n")) as url, aiohttp.ClientSession() as session:
        guest, cdp = Guest(session, url), Cdp(session, url)
        for call in (guest.screenshot(1), guest.execute("x"), guest.file("/x"), guest.form("/x", {}), cdp.version(1)):
            with pytest.raises(GuestMisbehaved, match="answered 307"):
                await call
    assert asked == []


async def test_megabytes_that_a_terminal_shows_are_taken() -> None:
    shown = b"x" * (LARGEST_WORDS - 1000)
    async with (
        wire(body(b'{"status": "success", "returncode": 1, "output": "' + shown + b'"}')) as url,
        aiohttp.ClientSession() as session,
    ):
        with within_bounds():
            assert len((await Guest(session, url).execute("x")).stdout) == len(shown)


async def test_a_picture_or_a_file_without_end_is_not_read_to_its_end() -> None:
    async with wire(for_ever(OK + b"\r\n", b"\x89PNG\r\n\x1a\n" * 8000)) as url, aiohttp.ClientSession() as session:
        with within_bounds(), pytest.raises(GuestMisbehaved, match=f"more than {LARGEST_ANSWER} bytes"):
            await Guest(session, url).screenshot(PATIENCE + 5)
        with within_bounds(), pytest.raises(GuestMisbehaved, match="more than 1000 bytes"):
            await Guest(session, url).file("/dev/zero", limit=1000)


def frame(kind: int, content: bytes, *, last: int = 1, reserved: int = 0, length: int | None = None) -> bytes:
    """A websocket frame, which may lie about its length."""
    size = len(content) if length is None else length
    first = last << 7 | reserved << 4 | kind
    if size < 126:
        return bytes([first, size]) + content
    return bytes([first, 127]) + struct.pack(">Q", size) + content


PERMESSAGE = b"Sec-WebSocket-Extensions: permessage-deflate\r\n"
MESSAGES = {
    "a gigabyte": bad("exceeds limit", talk=for_ever(frame(1, b"", length=1 << 30), b"x" * 65_536)),
    "an exabyte": bad("exceeds limit", talk=for_ever(frame(1, b"", length=(1 << 63) - 1), b"x" * 65_536)),
    "endless fragments": bad("exceeds limit", talk=for_ever(frame(1, b"x", last=0), frame(0, b"x" * 60_000, last=0))),
    "empty fragments": Worst(for_ever(frame(1, b"x", last=0), frame(0, b"", last=0) * 1000, 0.001), EnvdError, ""),
    "pings, for ever": gone("did not answer", talk=for_ever(b"", frame(9, b"x" * 100) * 1000, 0.001)),
    "events, for ever": gone(
        "did not answer", talk=for_ever(b"", frame(1, b'{"method": "A.e", "params": {}}') * 1000, 0.001)
    ),
    "many small parts": bad("no JSON", talk=says(frame(1, b"[" + b"[]," * MOST_PARTS + b"1]"))),
    "no UTF-8": bad("UTF-8", talk=says(frame(1, b"\xff\xfe"))),
    "reserved bits": bad("reserved bits", talk=says(frame(1, b"{}", reserved=7))),
    "packed a thousand to one": bad("", talk=says(frame(1, packed(1 << 28, -15), reserved=4))),
    "no frames": Worst(for_ever(b"", b"HTTP/1.1 200 OK\r\n"), EnvdError, ""),
}


@pytest.mark.parametrize("worst", [pytest.param(one, id=name) for name, one in MESSAGES.items()])
@pytest.mark.parametrize("handshake", [b"", PERMESSAGE], ids=["plain", "with an extension that was not asked for"])
async def test_what_chrome_says_ends_in_time_in_an_error_and_fits_into_memory(worst: Worst, handshake: bytes) -> None:
    async with wire(worst.talk, handshake) as url, aiohttp.ClientSession() as session:
        with within_bounds(), pytest.raises(worst.error, match=worst.words or None):
            async with Cdp(session, url).browser(PATIENCE) as browser:
                await browser.send("A.b", timeout=PATIENCE)


@pytest.mark.parametrize("said", [b"[" + b"{}," * MOST_PARTS + b"1]", b"\xff" * 100, b"7", b'"x"', b"{}"])
async def test_what_chrome_lists_is_a_list_of_pages_or_an_error(said: bytes) -> None:
    async with wire(body(said)) as url, aiohttp.ClientSession() as session:
        for call in (Cdp(session, url).pages(PATIENCE), Cdp(session, url).version(PATIENCE)):
            with within_bounds(), pytest.raises(GuestMisbehaved):
                await call


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A picture of some 100 kB that is 170 million pixels: just below what Pillow refuses by itself."""
    made = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(made, "PNG")
    return made.getvalue()


async def test_a_picture_that_is_far_larger_than_its_bytes_is_not_unpacked(bomb: bytes) -> None:
    assert len(bomb) < 200_000
    with within_bounds():
        assert judge_picture(bomb, (1920, 1080))[0] is ProbeResult.FAIL
    other = bytearray(bomb)
    other[-1] ^= 1
    with within_bounds(), pytest.raises(GuestMisbehaved, match="pixels"):
        differs(bomb, bytes(other))
