"""What no HTTP client sends: requests that two servers would read differently, and clients that never finish. Nothing
that hides in another request is run, and whoever is slow holds a connection for a while and nothing else."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from typing import NamedTuple

import pytest
from serving import Served, eventually, raw_connection, serving

GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
STEP = b"POST /v1/envs/0/step HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HIDDEN = b"POST /v1/prewarm HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
"""Makes a job, if it is taken for a request."""
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CLOSE = b"Connection: close\r\n"


async def said(reader: asyncio.StreamReader, enough: bytes | None = None) -> bytes:
    """All until the connection closes, or until it contains `enough`."""
    answer = b""
    async with asyncio.timeout(10):
        while chunk := await reader.read(65_536):
            answer += chunk
            if enough is not None and enough in answer:
                break
    return answer


async def exchange(served: Served, request: bytes) -> bytes:
    async with raw_connection(served.address) as (reader, writer):
        writer.write(request)
        return await said(reader)


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3})", answer, re.M)]


def jobs(served: Served) -> int:
    return len(tuple(served.service.store.jobs()))


AMBIGUOUS = {
    "two lengths": STEP + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a signed length": STEP + b"Content-Length: +0\r\n\r\n",
    "a length in hex": STEP + b"Content-Length: 0x0\r\n\r\n",
    "two lengths in one": STEP + b"Content-Length: 0 2\r\n\r\n",
    "a length of 30 digits": STEP + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
    "a length that is a digit elsewhere": STEP + b"Content-Length: \xb2\r\n\r\n",
    "no such coding": STEP + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": STEP + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
    "chunked twice in one": STEP + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "packed and chunked": STEP + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": STEP + b"Transfer-Encoding: identity\r\n\r\n",
    "a blank before the colon": STEP + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a vertical tab": STEP + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "a bare CR": GET + b"X: a\rContent-Length: 5\r\n\r\n",
    "NUL in a value": GET + b"X: a\0b\r\n\r\n",
    "NUL in a name": GET + b"X\0: a\r\n\r\n",
    "NUL in the path": b"GET /li\0vez HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two hosts": GET + b"Host: evil.example\r\n\r\n",
    "chunks for HTTP/1.0": STEP.replace(b"HTTP/1.1", b"HTTP/1.0") + CHUNKED + b"\r\n0\r\n\r\n",
    "no version": b"GET /livez\r\n\r\n",
    "no path": b"GET  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "10,000 headers": GET + b"".join(b"X-%d: y\r\n" % number for number in range(10_000)) + b"\r\n",
    "10,000 trailers": STEP + CHUNKED + b"\r\n0\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(10_000)),
    "an endless chunk extension": STEP + CHUNKED + b"\r\n2;" + b"a" * 100_000 + b"\r\n{}\r\n0\r\n\r\n",
    "a negative chunk": STEP + CHUNKED + b"\r\n-1\r\n",
    "a chunk of 10^36 bytes": STEP + CHUNKED + b"\r\n" + b"f" * 30 + b"\r\n",
}


@pytest.mark.parametrize("request_bytes", [pytest.param(one, id=name) for name, one in AMBIGUOUS.items()])
async def test_what_servers_disagree_about_is_refused_and_the_connection_ends(request_bytes: bytes) -> None:
    async with serving() as served:
        answer = await exchange(served, request_bytes + HIDDEN)
        assert len(statuses(answer)) == 1
        assert statuses(answer)[0] in (400, 431, 501)
        assert jobs(served) == 0
        assert (await served.get("/livez"))[0] == 200


@pytest.mark.parametrize("chunks_first", [True, False])
async def test_a_request_with_a_length_and_chunks_ends_the_connection_and_what_follows_is_not_run(
    chunks_first: bool,
) -> None:
    lengths = [CHUNKED, b"Content-Length: 4\r\n"]
    async with serving() as served:
        head = STEP + b"".join(lengths if chunks_first else reversed(lengths))
        answer = await exchange(served, head + b"\r\n0\r\n\r\n" + HIDDEN)
        assert statuses(answer) == [400]
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "bad_request"
        assert jobs(served) == 0


class Odd(NamedTuple):
    request: bytes
    status: int
    code: str


ODD = {
    "another's address": Odd(b"GET http://evil.example/v1/envs HTTP/1.1\r\nHost: localhost\r\n", 404, "not_found"),
    "our address for another": Odd(
        b"GET http://localhost/v1/envs HTTP/1.1\r\nHost: evil.example\r\n", 421, "misdirected_request"
    ),
    "a tunnel": Odd(b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: localhost\r\n", 404, "not_found"),
    "everything": Odd(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n", 404, "not_found"),
    "a path that climbs": Odd(b"GET /v1/episodes/%2e%2e/bundle HTTP/1.1\r\nHost: localhost\r\n", 404, "not_found"),
    "a path that climbs far": Odd(
        b"GET /v1/episodes/..%2f..%2fetc/bundle HTTP/1.1\r\nHost: localhost\r\n", 404, "not_found"
    ),
    "a path that is no text": Odd(b"GET /v1/jobs/%zz%ff%00 HTTP/1.1\r\nHost: localhost\r\n", 404, "unknown_job"),
    "a host that is no text": Odd(b"GET /v1/envs HTTP/1.1\r\nHost: \xff\r\n", 421, "misdirected_request"),
    "from an address that is none": Odd(
        GET.replace(b"livez", b"v1/envs") + b"X-Forwarded-For: \xff,,\r\n", 401, "unauthorized"
    ),
    "a page's websocket of old": Odd(STEP + b"Upgrade: h2c\r\nContent-Length: 2\r\n", 422, "invalid_request"),
    "a method of 10,000 letters": Odd(
        b"A" * 10_000 + b" /livez HTTP/1.1\r\nHost: localhost\r\n", 405, "method_not_allowed"
    ),
}


@pytest.mark.parametrize("odd", [pytest.param(one, id=name) for name, one in ODD.items()])
async def test_an_odd_request_is_one_clear_problem(odd: Odd) -> None:
    async with serving() as served:
        body = b"{}" if b"Content-Length" in odd.request else b""
        answer = await exchange(served, odd.request + CLOSE + b"\r\n" + body)
        assert statuses(answer) == [odd.status]
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"application/problem+json" in head
        assert json.loads(body)["code"] == odd.code


async def test_a_body_that_is_packed_is_not_unpacked() -> None:
    bomb = gzip.compress(b'{"actions": ["WAIT"], "x": "' + bytes(50_000_000))
    async with serving(body_limit=100_000) as served:
        head = STEP + CLOSE + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
        answer = await exchange(served, head + bomb)
        assert statuses(answer) == [400]
        assert b'"malformed_json"' in answer


async def test_a_body_in_chunks_of_two_bytes_is_read_like_any_other() -> None:
    body = b'{"actions": []}     ' * 500
    chunks = b"".join(b"2\r\n%b\r\n" % body[at : at + 2] for at in range(0, len(body), 2))
    async with serving(body_limit=len(body)) as served:
        assert statuses(await exchange(served, STEP + CLOSE + CHUNKED + b"\r\n" + chunks + b"0\r\n\r\n")) == [400]
        longer = chunks + b"1\r\n \r\n0\r\n\r\n"
        assert statuses(await exchange(served, STEP + CLOSE + CHUNKED + b"\r\n" + longer)) == [413]


async def test_what_is_sent_behind_a_stream_waits_and_the_stream_ends_with_its_reader() -> None:
    async with serving(heartbeat=0.05) as served:
        async with raw_connection(served.address) as (reader, writer):
            writer.write(GET.replace(b"livez", b"v1/events") + b"\r\n" + HIDDEN)
            await said(reader, b"still here")
            assert (served.service.streams, jobs(served)) == (1, 0)
        await eventually(lambda: served.service.streams == 0)


async def test_headers_that_come_a_byte_at_a_time_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envd.daemon.KEEP_ALIVE", 0.3)
    async with serving() as served:
        for beginning in (b"", GET + b"\r\n"):
            async with raw_connection(served.address) as (reader, writer):
                writer.write(beginning + GET)
                assert statuses(await dripped(reader, writer, b"x")) == [200] * bool(beginning)


async def test_a_body_that_comes_a_byte_at_a_time_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envd.app.bodies.READ_SECONDS", 0.3)
    monkeypatch.setattr("envd.app.problems.REST_SECONDS", 0.1)
    async with serving() as served:
        async with raw_connection(served.address) as (reader, writer):
            writer.write(STEP + b"Content-Length: 100000\r\n\r\n{")
            answer = await dripped(reader, writer, b" ")
        assert statuses(answer) == [408]
        assert b'"body_too_slow"' in answer


async def dripped(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, byte: bytes) -> bytes:
    """What is said until the connection closes while such bytes still come."""

    async def drip() -> None:
        while True:
            writer.write(byte)
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    answer = b""
    try:
        async with asyncio.timeout(10):
            while chunk := await reader.read(65_536):
                answer += chunk
    except ConnectionError:
        pass
    finally:
        dripping.cancel()
    return answer
