"""One file's way into a part: from a server, continued where it broke off and tried again; or from a folder."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import anyio
from anyio.to_thread import run_sync

from .mirrors import without_secrets
from .parts import Part, Version, version_in_folder
from .unreachable import HostGivenUp

Progress = Callable[[int, int | None], None]
"""Told of bytes received so far, and of bytes in all when that is known."""

BACKOFF = (0.5, 2.0)
"""Seconds before the second and the third try; a server's Retry-After counts up to the last."""
LONGEST_RETRY_AFTER = 30.0
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 60.0
REDIRECTS = 10
CHUNK = 1024 * 1024
TRANSIENT = frozenset({408, 425, 429})


class SourceFailed(Exception):
    """A file cannot be had from one place. `status` is what was answered; `again` says that trying on may help."""

    def __init__(self, why: str, status: int | None = None, again: bool = False, after: float = 0) -> None:
        super().__init__(why)
        self.why, self.status, self.again, self.after = why, status, again, after


class NotReached(SourceFailed):
    """The session has given the host up; another time it may be there."""

    def __init__(self, why: str) -> None:
        super().__init__(why, again=True)


class TooLarge(SourceFailed):
    """The file is larger than the whole cache may be."""


class Download:
    """Fills one part. `room(n)` makes room for n bytes more, or raises NoRoom; `limit` is in bytes, `timeout` in
    seconds for each try."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        part: Part,
        room: Callable[[int], Awaitable[None]],
        limit: int,
        timeout: float,
        progress: Progress,
    ) -> None:
        self._session = session
        self._part = part
        self._room = room
        self._limit = limit
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
        self._progress = progress

    async def run(self, place: str | Path) -> None:
        """The part is the whole file of `place` afterwards. Raises SourceFailed, NoRoom, and OSError of the part."""
        if isinstance(place, Path):
            return await self._copy(place)
        for pause in BACKOFF:
            try:
                return await self._attempt(place)
            except SourceFailed as error:
                if not error.again or isinstance(error, NotReached):
                    raise
                await anyio.sleep(max(pause, min(error.after, LONGEST_RETRY_AFTER)))
        return await self._attempt(place)

    async def _attempt(self, url: str) -> None:
        if self._part.is_whole_of(url):
            return
        try:
            # Packed bytes could be neither counted nor continued.
            headers = {"Accept-Encoding": "identity"} | self._part.range_of(url)
            async with self._session.get(
                url, headers=headers, timeout=self._timeout, max_redirects=REDIRECTS, read_bufsize=CHUNK
            ) as response:
                await self._receive(url, response, asked="Range" in headers)
        except aiohttp.TooManyRedirects as error:
            raise SourceFailed(f"redirected more than {REDIRECTS} times", error.status) from error
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise SourceFailed(f"not a URL that can be downloaded: {without_secrets(str(error))}") from error
        except HostGivenUp as error:
            raise NotReached(_words_of(error.error)) from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise SourceFailed(f"its certificate is not valid: {error.certificate_error}") from error
        except aiohttp.ClientResponseError as error:
            raise SourceFailed(f"answered something that is not HTTP: {error.message[:200]!r}", again=True) from error
        except aiohttp.ClientError as error:
            raise SourceFailed(f"{_words_of(error)}{self._part.so_far()}", again=True) from error
        except TimeoutError as error:
            raise SourceFailed(f"not done within {self._timeout.total:g} s{self._part.so_far()}", again=True) from error

    async def _receive(self, url: str, response: aiohttp.ClientResponse, asked: bool) -> None:
        status = response.status
        if asked and (status == 416 or (status == 206 and not self._part.goes_on_with(response.headers))):
            # What is there has changed, or was cut: from the beginning, in the same try, which asks for no range.
            await run_sync(self._part.begin, Version(url))
            response.close()
            return await self._attempt(url)
        if status >= 500 or status in TRANSIENT:
            after = response.headers.get("Retry-After", "")
            raise SourceFailed(_answer(response), status, again=True, after=float(after) if after.isdecimal() else 0)
        if status != 200 and not (asked and status == 206):
            raise SourceFailed(_answer(response), status)
        if status == 200:
            await run_sync(self._part.begin, _version(url, response))
        await self._fill(response)
        return None

    async def _fill(self, response: aiohttp.ClientResponse) -> None:
        part, total = self._part, self._part.total
        self._refuse_larger(total or 0, response.status)
        await self._room((total or 0) - part.size if total else 0)
        self._progress(part.size, total)
        async for chunk in response.content.iter_chunked(CHUNK):
            self._refuse_larger(part.size + len(chunk), response.status)
            await run_sync(part.append, chunk)
            self._progress(part.size, total)
        if total is not None and part.size != total:
            got = part.size
            await run_sync(part.begin, Version(part.version.source if part.version else ""))
            raise SourceFailed(f"sent {got} bytes where it had said {total}", response.status, again=True)

    async def _copy(self, path: Path) -> None:
        try:
            version = await run_sync(version_in_folder, path)
            self._refuse_larger(version.total or 0, None)
            await self._room(version.total or 0)
            await run_sync(self._part.begin, version)
            async with await anyio.open_file(path, "rb") as file:
                while chunk := await _read(file, path):
                    await run_sync(self._part.append, chunk)
                    self._progress(self._part.size, version.total)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SourceFailed("no such file") from error
        if self._part.size != version.total or await run_sync(version_in_folder, path) != version:
            raise SourceFailed("it changed while it was copied")

    def _refuse_larger(self, size: int, status: int | None) -> None:
        if size > self._limit:
            raise TooLarge(f"the file has {size} bytes or more, and the whole cache {self._limit} at most", status)


async def _read(file: anyio.AsyncFile[bytes], path: Path) -> bytes:
    try:
        return await file.read(CHUNK)
    except OSError as error:
        raise SourceFailed(f"{path} cannot be read: {error.strerror}") from error


def _version(url: str, response: aiohttp.ClientResponse) -> Version:
    """A body that was packed although we asked for it plain is unpacked by aiohttp: its length is not known, and it
    cannot be continued."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return Version(url)
    headers = response.headers
    return Version(url, headers.get("ETag"), headers.get("Last-Modified"), response.content_length)


def _answer(response: aiohttp.ClientResponse) -> str:
    by = f" by {response.url.host}" if response.history else ""
    return f"answered {response.status} {response.reason or ''}".rstrip() + by


def _words_of(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"{error.host} is not known to the name service"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"{error.host}:{error.port} cannot be connected to: {error.os_error.strerror or error.os_error}"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return f"no connection within {CONNECT_SECONDS:g} s"
    if isinstance(error, aiohttp.SocketTimeoutError):
        return f"silent for {SILENCE_SECONDS:g} s"
    return f"broke off ({type(error).__name__})"
