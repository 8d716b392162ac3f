"""Files of the desktop: send, receive, download, list."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
import shutil
import ssl
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import quote

from aiohttp import BodyPartReader, web

from envd.agent import bodies
from envd.agent.errors import AgentError, BadRequest, NotFound
from envd.agent.limits import Limits

_CHUNK = 256 * 1024
_TRIES = 3


class Files:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/file", self.file),
            web.post("/setup/upload", self.upload),
            web.post("/setup/download_file", self.download),
            web.post("/list_directory", self.list_directory),
            web.post("/desktop_path", self.desktop_path),
        ]

    async def file(self, request: web.Request) -> web.StreamResponse:
        """The bytes of a file, streamed; a Range header asks for a part of it."""
        path = bodies.path_of(await bodies.form_text(request, "file_path"))
        return await attachment(path)

    async def upload(self, request: web.Request) -> web.Response:
        """Store the field `file_data` as `file_path`, whichever comes first. It appears whole or not at all."""
        if not request.content_type.startswith("multipart/"):
            raise BadRequest("an upload must be a multipart form with the fields file_path and file_data")
        target: Path | None = None
        landing: Landing | None = None
        try:
            async for part in _parts(request):
                if part.name == "file_path":
                    target = bodies.path_of((await part.text()).strip())
                elif part.name == "file_data":
                    landing = Landing(target or Path(tempfile.gettempdir(), "upload"))
                    await landing.open()
                    while chunk := await part.read_chunk(_CHUNK):
                        await landing.write(chunk)
            if target is None or target == Path() or landing is None:
                raise BadRequest("an upload needs both form fields, file_path and file_data")
            await landing.move_to(target)
            return web.Response(text=f"File Uploaded: {landing.size} bytes")
        finally:
            if landing is not None:
                await landing.discard()

    async def download(self, request: web.Request) -> web.Response:
        """Fetch `url` from inside the desktop and store it as `path`."""
        body = await bodies.json_object(request)
        url, path = bodies.text(body, "url"), bodies.path_of(bodies.text(body, "path"))
        if not re.match(r"https?://", url):
            raise BadRequest(f"url must begin with http:// or https://, not {url[:40]!r}")
        for attempt in range(1, _TRIES + 1):
            try:
                async with asyncio.timeout(self._limits.download):
                    size = await _fetch(url, path)
                return web.Response(text=f"File downloaded successfully: {size} bytes")
            except (_FetchFailed, TimeoutError) as error:
                reason = str(error) or f"it took longer than {self._limits.download:g} s"
            if attempt < _TRIES:
                await asyncio.sleep(attempt)
        raise AgentError(f"cannot download {url} in {_TRIES} tries: {reason}; is it reachable from the desktop?")

    async def list_directory(self, request: web.Request) -> web.Response:
        path = bodies.path_of(bodies.text(await bodies.json_object(request), "path"))
        if not await asyncio.to_thread(path.is_dir):
            raise BadRequest(f"{path} is not a directory in the desktop")
        lister = _Lister(self._limits.tree_entries)
        tree = await asyncio.to_thread(lister.root, path)
        return web.json_response({"directory_tree": tree} | ({"truncated": True} if lister.room <= 0 else {}))

    async def desktop_path(self, request: web.Request) -> web.Response:
        path = bodies.path_of("~/Desktop")
        if not await asyncio.to_thread(path.is_dir):
            raise NotFound(f"this desktop's user has no directory {path}; make it if the task needs one")
        return web.json_response({"desktop_path": str(path)})


async def attachment(path: Path, content_type: str | None = None) -> web.FileResponse:
    """A response that streams `path`. Raises NotFound, BadRequest for what is no file, AgentError if unreadable."""
    try:
        await asyncio.to_thread(_must_be_readable, path)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path} in the desktop") from None
    except OSError as error:
        raise AgentError(f"cannot read {path}: {error.strerror}") from error
    response = web.FileResponse(
        path, headers={"Content-Disposition": f"attachment; filename*=UTF-8''{quote(path.name)}"}
    )
    if content_type is not None:
        response.content_type = content_type
    return response


def _must_be_readable(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise BadRequest(f"{path} is not a regular file; /list_directory lists directories")
    with path.open("rb"):
        pass


class Landing:
    """A file that is written beside its target under a name of its own, and takes its place when it is complete.

    Writes happen in threads; `discard` waits for the one under way, as its caller may have been cancelled.
    """

    def __init__(self, target: Path) -> None:
        self.size = 0
        self._target = target
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._path: Path | None = None

    async def open(self) -> None:
        """Raises AgentError when the directory cannot be made or written to."""
        await self._do(self._open)

    async def write(self, data: bytes | bytearray) -> None:
        await self._do(self._write, data)
        self.size += len(data)

    async def move_to(self, target: Path) -> None:
        """Make the file appear at `target`. An existing file's permissions, and links to it, are kept."""
        await self._do(self._move_to, target)

    async def discard(self) -> None:
        """Remove what was not moved. Idempotent."""
        await asyncio.to_thread(self._discard)

    async def __aenter__(self) -> Landing:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self.move_to(self._target)
        finally:
            await self.discard()

    async def _do(self, work: Any, *arguments: Any) -> None:
        try:
            await asyncio.to_thread(self._locked, work, *arguments)
        except OSError as error:
            hint = "; free some space in the desktop" if error.errno == errno.ENOSPC else ""
            raise AgentError(f"cannot write {self._target}: {error.strerror}{hint}") from error

    def _locked(self, work: Any, *arguments: Any) -> None:
        with self._lock:
            work(*arguments)

    def _open(self) -> None:
        directory = self._target.resolve().parent
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f".{self._target.name[:100]}.{secrets.token_hex(4)}.part"
        # Not tempfile's: those are for their owner alone, and this becomes an ordinary file.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._file = os.fdopen(descriptor, "wb")

    def _write(self, data: bytes | bytearray) -> None:
        if self._file is not None:
            self._file.write(data)

    def _move_to(self, target: Path) -> None:
        if self._file is None or self._path is None:
            raise RuntimeError("the file was never opened")
        self._file.close()
        self._target, final = target, target.resolve()
        if final.is_dir():
            raise BadRequest(f"{final} is a directory; name the file in it")
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            shutil.copymode(final, self._path)
        try:
            os.replace(self._path, final)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # It was begun before its target was known, and that is on another file system.
            beside = final.with_name(f".{final.name[:100]}.{secrets.token_hex(4)}.part")
            try:
                shutil.copy(self._path, beside)
                os.replace(beside, final)
            finally:
                beside.unlink(missing_ok=True)
            return
        self._path = None

    def _discard(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
            if self._path is not None:
                self._path.unlink(missing_ok=True)
                self._path = None


async def _parts(request: web.Request) -> AsyncIterator[BodyPartReader]:
    """The parts of a multipart body. Raises BadRequest when it is malformed or ends too early."""
    try:
        reader = await request.multipart()
        while (part := await reader.next()) is not None:
            if not isinstance(part, BodyPartReader):
                raise BadRequest("a multipart form inside a multipart form is not understood")
            yield part
    except (ValueError, web.HTTPException) as error:
        raise BadRequest(f"the multipart body cannot be read: {error}") from error


class _FetchFailed(Exception):
    """One try at a download failed, for the reason it tells."""


async def _fetch(url: str, path: Path) -> int:
    import aiohttp

    # Made here, and not by aiohttp when it is imported, since reading all the certificates takes a while.
    trust = await asyncio.to_thread(ssl.create_default_context)
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=30)) as session,
            session.get(url, ssl=trust) as response,
        ):
            response.raise_for_status()
            async with Landing(path) as landing:
                async for chunk in response.content.iter_chunked(_CHUNK):
                    await landing.write(chunk)
            return landing.size
    except aiohttp.ClientError as error:
        # Among them ClientPayloadError: fewer bytes came than were announced.
        raise _FetchFailed(f"{type(error).__name__}: {error}") from error


class _Lister:
    """Lists a directory with all below it. Links to directories are followed, but never into what they are in."""

    def __init__(self, room: int) -> None:
        self.room = room

    def root(self, path: Path) -> dict[str, Any]:
        return self.directory(str(path), path.absolute().name or "/", ())

    def directory(self, path: str, name: str, above: tuple[tuple[int, int], ...]) -> dict[str, Any]:
        node: dict[str, Any] = {"type": "directory", "name": name, "children": []}
        try:
            status = os.stat(path)
            here = (status.st_dev, status.st_ino)
            if here in above:
                return node
            with os.scandir(path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            return node | {"error": str(error.strerror)}
        for entry in found:
            self.room -= 1
            if self.room <= 0:
                break
            child = _readable(entry.name)
            if _is_directory(entry):
                node["children"].append(self.directory(entry.path, child, (*above, here)))
            else:
                node["children"].append({"type": "file", "name": child})
        return node


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _readable(name: str) -> str:
    """A name as text that JSON can carry: bytes that are no UTF-8 are replaced."""
    return os.fsencode(name).decode(errors="replace")
