"""One desktop's OSWorld guest server (port 5000), as seen by the daemon.

The guest is not trusted: every answer is bounded in size and time, and nothing of it is evaluated.
"""

from __future__ import annotations

import json
import posixpath
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import anyio

from ..errors import GuestMisbehaved, GuestUnreachable

LARGEST_ANSWER = 64 * 1024 * 1024
"""Bytes. A 4K screenshot that does not compress at all is 33 MB."""
LARGEST_WORDS = 16 * 1024 * 1024
"""Bytes of an answer that is JSON or text."""
MOST_PARTS = 300_000
"""Objects and lists in a guest's JSON. Small ones take twenty times their length in memory, and the loop stands still
while they are made: these many, for a tenth of a second."""
LARGEST_FILE = 256 * 1024 * 1024
"""Bytes of a file that is fetched from a guest, unless the caller says otherwise."""
WORDS_KEPT = 2000
"""Characters of what a guest says of a failure."""
CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Executed:
    """What the guest says of a command it ran to its end."""

    returncode: int
    stdout: str
    stderr: str


class Guest:
    """Calls raise GuestUnreachable when there is no answer and GuestMisbehaved when it cannot be used.

    Nothing is ever sent twice: `GuestUnreachable.facts["sent"]` says whether the guest may have acted on the call.
    Of GuestMisbehaved, `facts["http_status"]` is there when the guest answered with an HTTP error, and
    `facts["refused"]` when it is well and said in its own words why it will not or cannot do what it was asked.
    Timeouts are in seconds; None leaves it to a deadline of the caller's.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url

    async def screenshot(self, timeout: float = 30) -> bytes:
        """The screen as PNG (or JPEG) bytes, told by their magic number; not decoded."""
        async with self._call("GET", "/screenshot", timeout) as response:
            body = await self._read(response, "/screenshot")
        if not body.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
            raise GuestMisbehaved(
                f"{self.url}/screenshot answered {len(body)} bytes that are no picture: {_excerpt(body)}"
            )
        return body

    async def answers(self, timeout: float) -> None:
        """Return once the guest has answered the question that costs it least, its platform. A server that does not
        know that one answers too."""
        try:
            async with self._call("GET", "/platform", timeout) as response:
                await self._read(response, "/platform", WORDS_KEPT)
        except GuestMisbehaved as error:
            if error.facts.get("http_status") != 404:
                raise

    async def execute(self, command: list[str] | str, *, shell: bool = False, timeout: float | None = 130) -> Executed:
        """Run `command` in the guest and wait for its end (the guest's own limit is 120 s)."""
        return self.executed("/execute", await self.post("/execute", {"command": command, "shell": shell}, timeout))

    def executed(self, path: str, answer: Mapping[str, Any]) -> Executed:
        """What `answer`, from the endpoint `path`, says of the command that was run. Raises GuestMisbehaved if it was
        not."""
        code = answer.get("returncode")
        if answer.get("status") != "success" or not isinstance(code, int) or abs(code) >= 2**63:
            said = answer.get("message")
            refused: dict[str, Any] = {"refused": said[:WORDS_KEPT]} if isinstance(said, str) and said else {}
            raise GuestMisbehaved(
                f"{self.url}{path} did not run the command: {str(said or answer)[:WORDS_KEPT]}", **refused
            )
        return Executed(code, str(answer.get("output") or ""), str(answer.get("error") or ""))

    async def launch(self, command: list[str] | str, *, shell: bool = False, timeout: float | None = 30) -> None:
        """Start `command` in the guest without waiting for it."""
        await self.tell("/setup/launch", {"command": command, "shell": shell}, timeout)

    async def upload(self, path: str, file: Path, timeout: float | None = 600) -> None:
        """Store `file` of this host as `path` in the guest, streamed.

        Older guest servers do not make the folder it goes into, and break down with a page of HTML. Then it is made,
        and the file sent once more: what was answered so was not stored.
        """
        try:
            await self._upload(path, file, timeout)
        except GuestMisbehaved as error:
            folder = posixpath.dirname(path)
            if error.facts.get("http_status") != 500 or "refused" in error.facts or folder.strip("/") == "":
                raise
            made = await self.execute(["mkdir", "-p", folder], timeout=timeout)
            if made.returncode:
                said = made.stderr.strip()[:WORDS_KEPT]
                raise GuestMisbehaved(f"{self.url} cannot make the folder {folder}: {said}", refused=said) from error
            await self._upload(path, file, timeout)

    async def _upload(self, path: str, file: Path, timeout: float | None) -> None:
        async with await anyio.open_file(file, "rb") as opened:
            form = aiohttp.FormData()
            form.add_field("file_path", path)
            # The guest wants a name to tell a file from a field, and makes no use of it.
            form.add_field("file_data", opened.wrapped, filename="file", content_type="application/octet-stream")
            size = (await anyio.Path(file).stat()).st_size
            await self._stored(path, size, timeout, data=form)

    async def store(self, path: str, parts: AsyncIterator[bytes], size: int, timeout: float | None = 600) -> None:
        """As `upload`, of `size` bytes that come from elsewhere and are sent on as they come. Nothing is tried again,
        so the folder must be there. An error that `parts` raises comes out as GuestUnreachable."""
        boundary = secrets.token_hex(16)
        field = f"--{boundary}\r\nContent-Disposition: form-data; name="
        before = (
            f'{field}"file_path"\r\n\r\n{path}\r\n{field}"file_data"; filename="file"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        after = f"\r\n--{boundary}--\r\n".encode()

        async def form() -> AsyncIterator[bytes]:
            yield before
            async for part in parts:
                yield part
            yield after

        # Published guest servers take no form whose length they are not told.
        headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(before) + size + len(after)),
        }
        await self._stored(path, size, timeout, data=form(), headers=headers)

    async def _stored(self, path: str, size: int, timeout: float | None, **form: Any) -> None:
        async with self._call("POST", "/setup/upload", timeout, **form) as response:
            said = self._words("/setup/upload", response, await self._read(response, "/setup/upload", LARGEST_WORDS))
        stored = re.search(r"(\d+) bytes", said)
        if stored and int(stored[1]) != size:
            raise GuestMisbehaved(f"{self.url}/setup/upload stored {stored[1]} of {size} bytes of {path}")

    async def file(self, path: str, *, limit: int = LARGEST_FILE, timeout: float | None = 120) -> bytes:
        """The bytes of the guest's file `path`; GuestMisbehaved (404, refused) when there is none, or if it is longer
        than `limit`."""
        async with self._call("POST", "/file", timeout, data={"file_path": path}) as response:
            return await self._read(response, "/file", limit)

    async def form(self, path: str, fields: Mapping[str, str], timeout: float | None = 30) -> dict[str, Any]:
        """POST a form; the answer as `post` gives it."""
        async with self._call("POST", path, timeout, data=dict(fields)) as response:
            return self._object(path, response, await self._read(response, path, LARGEST_WORDS))

    async def tell(self, path: str, body: dict[str, Any], timeout: float | None) -> str:
        """POST JSON to an endpoint that answers in words that it has done it; the words."""
        async with self._call("POST", path, timeout, json=body) as response:
            return self._words(path, response, await self._read(response, path, LARGEST_WORDS))

    async def post(self, path: str, body: dict[str, Any], timeout: float | None) -> dict[str, Any]:
        """POST JSON; the answer's object, or {"text": …} where this endpoint answers plain text."""
        async with self._call("POST", path, timeout, json=body) as response:
            return self._object(path, response, await self._read(response, path, LARGEST_WORDS))

    async def _read(self, response: aiohttp.ClientResponse, path: str, limit: int = LARGEST_ANSWER) -> bytes:
        raw = await read_bounded(response, limit)
        if response.status != 200:
            facts: dict[str, Any] = {"http_status": response.status}
            if said := _refusal(response.status, raw):
                facts["refused"] = said
            raise GuestMisbehaved(f"{self.url}{path} answered {response.status}: {said or _excerpt(raw)}", **facts)
        return raw

    def _object(self, path: str, response: aiohttp.ClientResponse, raw: bytes) -> dict[str, Any]:
        if response.content_type != "application/json":
            return {"text": raw.decode(errors="replace")}
        try:
            answer = parse_json(raw)
        except ValueError as error:
            raise GuestMisbehaved(f"{self.url}{path} answered broken JSON: {_excerpt(raw)}") from error
        if not isinstance(answer, dict):
            raise GuestMisbehaved(f"{self.url}{path} answered {type(answer).__name__} where an object belongs")
        return answer

    def _words(self, path: str, response: aiohttp.ClientResponse, raw: bytes) -> str:
        """Text, or JSON that speaks of success: a page of HTML, garbage or nothing comes from something broken."""
        answer = self._object(path, response, raw)
        if answer.get("status") == "success":
            return str(answer.get("message") or "success")[:WORDS_KEPT]
        words = "" if response.content_type == "application/json" else _plain(raw)
        if not words:
            raise GuestMisbehaved(f"{self.url}{path} answered 200 and not that it was done: {_excerpt(raw)}")
        return words

    @asynccontextmanager
    async def _call(
        self, method: str, path: str, timeout: float | None, **how: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        connect = CONNECT_SECONDS if timeout is None else min(timeout, CONNECT_SECONDS)
        limit = aiohttp.ClientTimeout(total=timeout, sock_connect=connect)
        try:
            # A redirect would let the guest choose where the daemon connects to.
            async with self._session.request(
                method, self.url + path, timeout=limit, allow_redirects=False, **how
            ) as response:
                yield response
        except aiohttp.ClientConnectorError as error:
            raise GuestUnreachable(f"{self.url} refused the connection: {error.os_error}.", sent=False) from error
        except (aiohttp.ConnectionTimeoutError, aiohttp.SocketTimeoutError, TimeoutError) as error:
            connecting = isinstance(error, aiohttp.ConnectionTimeoutError)
            waited = connect if connecting or timeout is None else timeout
            raise GuestUnreachable(
                f"{self.url}{path} did not answer within {waited:g} s.", sent=not connecting
            ) from error
        except aiohttp.ClientError as error:
            raise GuestUnreachable(f"{self.url}{path} broke off: {type(error).__name__}: {error}", sent=True) from error


async def read_bounded(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, or GuestMisbehaved once it is longer than `limit` bytes."""
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_chunked(256 * 1024):
        size += len(chunk)
        if size > limit:
            response.close()
            raise GuestMisbehaved(f"{response.url} answered more than {limit} bytes; the rest was not read.")
        parts.append(chunk)
    return b"".join(parts)


def parse_json(raw: bytes) -> Any:
    """A guest's JSON. Raises ValueError, also for what has more than `MOST_PARTS`. Halves of surrogate pairs become
    `?`: in an event or an answer, they could not be sent on."""
    if raw.count(b"[") + raw.count(b"{") > MOST_PARTS:
        raise ValueError(f"it has more than {MOST_PARTS} objects and lists")
    try:
        value = json.loads(raw.decode(errors="replace"))
        if re.search(rb"\\u[dD][89a-fA-F]", raw):
            value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _refusal(status: int, raw: bytes) -> str:
    """What a guest in good health says of a call that it refused, cut; "" when the answer is no such thing.

    Flask's own pages are HTML: no endpoint, a request it could not read, an endpoint that broke down.
    """
    if status < 400 or status in (502, 503, 504):
        return ""
    try:
        answer = parse_json(raw)
    except ValueError:
        return "" if raw.lstrip().startswith((b"{", b"[")) else _plain(raw)
    said = (answer.get("message") or answer.get("error")) if isinstance(answer, dict) else ""
    return said.strip()[:WORDS_KEPT] if isinstance(said, str) else ""


def _plain(raw: bytes) -> str:
    """The text of `raw`, cut, if people are meant to read it; "" for a page of HTML and for what was never text."""
    text = raw[: 4 * WORDS_KEPT].decode(errors="replace").strip().rstrip("\ufffd")
    return "" if re.match(r"<(!doctype|html)", text, re.I) or "\ufffd" in text or "\0" in text else text[:WORDS_KEPT]


def _excerpt(body: bytes) -> str:
    text = body[:300].decode(errors="replace").strip()
    return repr(text) if text else "nothing"
