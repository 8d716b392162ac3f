"""Google Drive (REST, version 3) as an OAuth user of the daemon's owner, ENVD_GOOGLE_CREDENTIALS."""

from __future__ import annotations

import json
import mimetypes
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import aiohttp
import anyio
from pydantic import BaseModel, Field, ValidationError

from ...errors import InfraError, MissingRequirement, TaskInvalid
from ...guest.client import parse_json, read_bounded
from ...settings import Settings

API = "https://www.googleapis.com"
TOKENS = "https://oauth2.googleapis.com/token"
FOLDER = "application/vnd.google-apps.folder"
NATIVE = "application/vnd.google-apps."
"""Documents that exist in Drive only; they are had as a file of another kind."""

SECONDS = 60.0
TRANSFER_SECONDS = 300.0
TRIES = 3
PAUSE = 0.5
MOST_FILES = 10_000
LARGEST_ANSWER = 16 * 1024 * 1024
LARGEST_FILE = 256 * 1024 * 1024
ADVICE = "Reset again, and see whether Google Drive can be reached from this host."
HINT = "Set ENVD_GOOGLE_CREDENTIALS to the JSON of an authorised user: client_id, client_secret, refresh_token."

RENAMED = {"title": "name", "modifiedDate": "modifiedTime", "lastViewedByMeDate": "viewedByMeTime"}
"""Tasks are written in the query language of version 2."""
WORDS = re.compile(r"'(?:\\.|[^'\\])*'|\"((?:\\.|[^\"\\])*)\"|\b(" + "|".join(RENAMED) + r")\b")


class Daemon(Protocol):
    """What is needed of a Context, or of whoever evaluates."""

    @property
    def settings(self) -> Settings: ...

    @property
    def session(self) -> aiohttp.ClientSession: ...


class Credentials(BaseModel):
    """As Google's own tools write them for an authorised user."""

    client_id: str
    client_secret: str = Field(repr=False)
    refresh_token: str = Field(repr=False)
    token_uri: str = TOKENS


_tokens: dict[tuple[str, str, str], tuple[str, float]] = {}
"""Access tokens by what they were had for, with the monotonic time until which they are good: an hour, usually."""


class Drive:
    """Calls raise MissingRequirement when Google does not accept the credentials, TaskInvalid for a query that it does
    not understand, and InfraError for everything else. What fails in passing is tried three times."""

    def __init__(self, session: aiohttp.ClientSession, credentials: Credentials, api: str = API) -> None:
        self._session = session
        self._credentials = credentials
        self._api = api

    @classmethod
    async def configured(cls, daemon: Daemon, api: str = API) -> Self:
        """Raises MissingRequirement."""
        file = daemon.settings.google_credentials
        if file is None:
            raise _missing("The task uses Google Drive, and no credentials are configured.")
        try:
            credentials = Credentials.model_validate(json.loads(await anyio.Path(file).read_bytes()))
        except ValidationError as error:
            at = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise _missing(f"{file} cannot be used: {at}: {error.errors()[0]['msg']}.") from None  # it quotes secrets
        except (OSError, ValueError) as error:
            raise _missing(f"{file} cannot be read: {error}.") from error
        return cls(daemon.session, credentials, api)

    async def find(self, query: str) -> list[dict[str, str]]:
        """{id, name, mimeType} of what a query finds (in the language of version 2 or 3), at most MOST_FILES."""
        found: list[dict[str, str]] = []
        asked = {"q": modern(query), "fields": "nextPageToken,files(id,name,mimeType)", "pageSize": "1000"}
        while True:
            answer = await self._call("GET", "/drive/v3/files", params=asked)
            found += [
                {key: str(file.get(key)) for key in ("id", "name", "mimeType")} for file in answer.get("files") or []
            ]
            if len(found) > MOST_FILES:
                raise InfraError(f"Google Drive has more than {MOST_FILES} files for {query!r}.")
            if not answer.get("nextPageToken"):
                return found
            asked["pageToken"] = str(answer["nextPageToken"])

    async def delete(self, query: str, *, trash: bool) -> None:
        """Files before folders, since what is in a folder goes with it. An empty query means everything."""
        found = await self.find(query)
        for file in sorted(found, key=lambda file: file["mimeType"] == FOLDER):
            path = f"/drive/v3/files/{file['id']}"
            if trash:
                await self._call("PATCH", path, json={"trashed": True}, gone_is_fine=True)
            else:
                await self._call("DELETE", path, gone_is_fine=True)

    async def make_folders(self, path: Sequence[str]) -> str:
        """The id of the folder at `path`, of which what is missing is made."""
        parent = "root"
        for name in path:
            there = await self.find(
                f"'{parent}' in parents and name = {_quoted(name)} and mimeType = '{FOLDER}' and trashed = false"
            )
            if there:
                parent = there[0]["id"]
            else:
                made = {"name": name, "mimeType": FOLDER, "parents": [parent]}
                parent = str((await self._call("POST", "/drive/v3/files", json=made)).get("id"))
        return parent

    async def upload(self, file: Path, path: Sequence[str]) -> None:
        """Store `file` as `path`, whose last element is its name there."""
        parent = await self.make_folders(path[:-1])
        about = {"name": path[-1], "parents": [parent]}
        kind = mimetypes.guess_type(path[-1])[0] or "application/octet-stream"
        async with await anyio.open_file(file, "rb") as opened:
            with aiohttp.MultipartWriter("related") as parts:
                parts.append_json(about)
                parts.append(opened.wrapped, {"Content-Type": kind})
            # Once only: the file has been read, and Drive would keep both of two with one name.
            await self._call(
                "POST",
                "/upload/drive/v3/files",
                params={"uploadType": "multipart"},
                data=parts,
                seconds=TRANSFER_SECONDS,
                tries=1,
            )

    async def fetch(self, queries: Sequence[str], file: Path) -> Path | None:
        """Follow `queries` from the root, each among the children of what the one before found first, and store the
        last as `file`. None when there is no such file, which is for the evaluator to judge."""
        parent, kind = "root", FOLDER
        for query in queries:
            found = await self.find(f"( {query} ) and '{parent}' in parents")
            if not found:
                return None
            parent, kind = found[0]["id"], found[0]["mimeType"]
        if kind == FOLDER:
            return None
        address, params = f"/drive/v3/files/{parent}", {"alt": "media"}
        if kind.startswith(NATIVE):
            address += "/export"
            params = {"mimeType": mimetypes.guess_type(file.name)[0] or "application/pdf"}
        async with self._request("GET", address, TRANSFER_SECONDS, params=params) as response:
            if response.status != 200:
                await self._checked(response)
                raise InfraError(
                    f"Google Drive answered {response.status} to a download.", hint=ADVICE, http_status=response.status
                )
            await _store(response, file)
        return file

    async def _call(
        self,
        method: str,
        path: str,
        *,
        gone_is_fine: bool = False,
        seconds: float = SECONDS,
        tries: int = TRIES,
        **how: Any,
    ) -> dict[str, Any]:
        """The answer's object, empty when there is none. A POST is not sent twice unless it was turned away."""
        for attempt in range(1, tries + 1):
            try:
                async with self._request(method, path, seconds, **how) as response:
                    if response.status == 404 and gone_is_fine:
                        return {}
                    if attempt == tries or not _passes(method, response.status):
                        return await self._checked(response)
                    if response.status == 401:
                        self._forget_token()
            except InfraError as error:
                if attempt == tries or method == "POST" or "http_status" in error.facts:
                    raise
            await anyio.sleep(PAUSE * attempt)
        raise AssertionError("the last try returns or raises")

    async def _checked(self, response: aiohttp.ClientResponse) -> dict[str, Any]:
        """The object of a good answer, empty when there is none, or the error that a bad one means."""
        body = await read_bounded(response, LARGEST_ANSWER)
        answer = _object(body)
        if response.status < 300:
            return answer
        said = f"Google Drive answered {response.status}: {_words(answer, body)}"
        if response.status == 401:
            self._forget_token()
            raise _missing(f"{said}. It does not accept the access token that it gave for the refresh token.")
        if response.status == 400:
            raise TaskInvalid(said, errors=[{"field": "query", "message": said}])
        raise InfraError(said, hint=ADVICE, http_status=response.status)

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, seconds: float, **how: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Authorization": f"Bearer {await self._token()}"}
        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.request(
                method, self._api + path, headers=headers, timeout=limit, allow_redirects=False, **how
            ) as response:
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise InfraError(
                f"Google Drive did not answer {method} {path}: {type(error).__name__} {error}".strip(), hint=ADVICE
            ) from error

    async def _token(self) -> str:
        key = self._key()
        token, until = _tokens.get(key, ("", 0.0))
        if time.monotonic() < until:
            return token
        mine = self._credentials
        form = {"client_id": mine.client_id, "client_secret": mine.client_secret, "grant_type": "refresh_token"}
        form["refresh_token"] = mine.refresh_token
        try:
            async with self._session.post(
                mine.token_uri, data=form, timeout=aiohttp.ClientTimeout(total=SECONDS), allow_redirects=False
            ) as response:
                body = await read_bounded(response, LARGEST_ANSWER)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise InfraError(
                f"{mine.token_uri} gave no access token: {type(error).__name__} {error}", hint=ADVICE
            ) from error
        answer = _object(body)
        if response.status in (400, 401, 403):
            raise _missing(f"Google refuses the refresh token ({response.status}): {_words(answer, body)}.")
        given, lasts = answer.get("access_token"), answer.get("expires_in")
        if response.status != 200 or not isinstance(given, str):
            raise InfraError(
                f"{mine.token_uri} answered {response.status} and no token.", hint=ADVICE, http_status=response.status
            )
        # A minute less, so that it does not run out on its way.
        _tokens[key] = given, time.monotonic() + (lasts if isinstance(lasts, int | float) else 300) - 60
        return given

    def _forget_token(self) -> None:
        _tokens.pop(self._key(), None)

    def _key(self) -> tuple[str, str, str]:
        return self._credentials.token_uri, self._credentials.client_id, self._credentials.refresh_token


async def download(daemon: Daemon, config: Mapping[str, Any], folder: Path, *, api: str = API) -> Any:
    """What the getter `googledrive_file` fetches into `folder`: `query` or `path` as one file under the name `dest`,
    `query_list` or `path_list` as a list of them. A Path each, or None for what is not there.

    Raises MissingRequirement, TaskInvalid, InfraError.
    """
    if "query_list" in config or "path_list" in config:
        walks, names = config.get("query_list") or config["path_list"], list(config["dest"])
        if len(walks) != len(names):
            message = f"has {len(names)} names for {len(walks)} files"
            raise TaskInvalid(f"dest {message}.", errors=[{"field": "dest", "message": message}])
        by_path = "query_list" not in config
    else:
        walks, names, by_path = [config.get("query") or config["path"]], [config["dest"]], "query" not in config
    drive = await Drive.configured(daemon, api)
    files = [
        await drive.fetch(_along(walk) if by_path else several(walk), folder / _plain_name(name))
        for walk, name in zip(walks, names, strict=True)
    ]
    return files if "query_list" in config or "path_list" in config else files[0]


def modern(query: str) -> str:
    """A query in the language of version 3. Names in quotes stay as they are; double quotes become single ones."""

    def replace(match: re.Match[str]) -> str:
        if match[2]:
            return RENAMED[match[2]]
        return match[0] if match[1] is None else "'" + match[1].replace('\\"', '"').replace("'", "\\'") + "'"

    return WORDS.sub(replace, query)


def _along(path: Any) -> list[str]:
    """A query for each name of a path; all but the last are folders."""
    names = several(path)
    folders = [f"name = {_quoted(name)} and mimeType = '{FOLDER}' and trashed = false" for name in names[:-1]]
    return [*folders, f"name = {_quoted(names[-1])} and trashed = false"]


def several(value: Any) -> list[str]:
    """A path in Drive as its names, or a search as its queries; tasks give a single one also without a list."""
    return [value] if isinstance(value, str) else [str(one) for one in value]


def _quoted(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _plain_name(name: object) -> str:
    """`name` as one of a file in the folder that it is meant for. Raises TaskInvalid."""
    plain = Path(str(name)).name
    if plain in ("", ".."):
        raise TaskInvalid("dest must be the name of a file.", errors=[{"field": "dest", "message": "must be a name"}])
    return plain


def _passes(method: str, status: int) -> bool:
    """Whether a refusal may pass, and asking once more does no harm."""
    return status in (401, 429) or (status >= 500 and method != "POST")


def _object(body: bytes) -> dict[str, Any]:
    try:
        answer = parse_json(body) if body else {}
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _words(answer: Mapping[str, Any], body: bytes) -> str:
    """What Google says of an error: {"error": {"message"}} of its services, {"error", "error_description"} of OAuth."""
    error = answer.get("error")
    if isinstance(error, dict):
        return str(error.get("message"))[:300]
    return " ".join(str(part) for part in (error, answer.get("error_description")) if part)[:300] or repr(body[:100])


async def _store(response: aiohttp.ClientResponse, file: Path) -> None:
    size = 0
    async with await anyio.open_file(file, "wb") as opened:
        async for chunk in response.content.iter_chunked(256 * 1024):
            size += len(chunk)
            if size > LARGEST_FILE:
                raise InfraError(f"A file in Google Drive is larger than {LARGEST_FILE} bytes; {file.name} is cut off.")
            await opened.write(chunk)


def _missing(detail: str) -> MissingRequirement:
    return MissingRequirement(detail, hint=HINT, errors=[{"field": "googledrive", "message": detail}])
