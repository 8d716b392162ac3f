"""Google's login in a real Chromium, at pages in its likeness; Google Drive, at a server that speaks its protocol."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from test_setup_chrome import desktop, site

from envd.errors import EnvdError, GuestMisbehaved, InfraError, MissingRequirement, TaskInvalid
from envd.guest import Cdp, Guest
from envd.settings import Settings
from envd.tasks.assets import Assets
from envd.tasks.setup import drive, google
from envd.tasks.setup.context import Context

SECRET = "s3cr3t-of-the-owner"
EMAIL = """<input type=email><div id=identifierNext><div><button onclick="
    document.cookie = 'email=' + document.querySelector('input').value;
    setTimeout(() => location = '/password', 100)">Next</button></div></div>"""
PASSWORD = """<input type=password style='display: none'><div id=passwordNext><div><button onclick="
    location = '/check?password=' + document.querySelector('input').value">Next</button></div></div>
    <script>setTimeout(() => document.querySelector('input').style.display = 'block', 200)</script>"""


def _page(body: str) -> Any:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=body, content_type="text/html")

    return answer


@asynccontextmanager
async def google_pages() -> AsyncIterator[str]:
    """The URL of a Drive that sends who is not logged in to another host; let in are a@example.com and 'pass word'."""

    async def my_drive(request: web.Request) -> web.Response:
        if request.cookies.get("in") or request.query.get("in"):
            return web.Response(text="<title>My Drive</title>", content_type="text/html")
        raise web.HTTPFound(f"http://localhost:{request.url.port}/login")

    async def check(request: web.Request) -> web.Response:
        if (request.cookies["email"], request.query["password"]) != ("a@example.com", "pass word"):
            return web.Response(text="Wrong password", content_type="text/html")
        raise web.HTTPFound(f"http://127.0.0.1:{request.url.port}/my-drive?in=1")

    routes = [web.get("/my-drive", my_drive), web.get("/check", check)]
    routes += [web.get("/login", _page(EMAIL)), web.get("/password", _page(PASSWORD))]
    async with site(*routes) as base:
        yield f"{base}/my-drive"


def account(tmp_path: Path, password: str = "pass word") -> Path:
    file = tmp_path / "account.json"
    file.write_text(json.dumps({"email": "a@example.com", "password": password}))
    return file


@pytest.mark.local
async def test_the_account_is_logged_in_in_a_new_tab(tmp_path: Path) -> None:
    async with google_pages() as page, desktop(tmp_path, google_account=account(tmp_path)) as context:
        assert await google.login(context, {"platform": "googledrive"}, page=page) == ""
        pages = await context.cdp.pages()
        assert [one["url"] for one in pages] == [f"{page}?in=1", "about:blank"]
        assert pages[0]["title"] == "My Drive"
        assert await google.login(context, {}, page=f"{page}?in=1") == "was logged in already"


@pytest.mark.local
async def test_a_login_that_is_refused_fails_and_keeps_the_password_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(google, "FIELD_SECONDS", 3)
    async with google_pages() as page, desktop(tmp_path, google_account=account(tmp_path, SECRET)) as context:
        with pytest.raises(GuestMisbehaved, match="did not accept the login") as failed:
            await google.login(context, {}, page=page)
        assert SECRET not in str(failed.value)


@dataclass
class FakeDrive:
    """Files by id, of {name, mimeType, parents, content, trashed}; `asked` has method and path of each request."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    tokens: int = 0
    refuse: tuple[int, dict[str, Any]] | None = None
    """The token endpoint's answer."""
    failures: list[int] = field(default_factory=list)
    """Statuses of the next answers."""
    url: str = ""

    def add(self, name: str, parent: str = "root", kind: str = "text/plain", content: bytes = b"") -> str:
        file = f"id-{len(self.files)}"
        self.files[file] = {"name": name, "mimeType": kind, "parents": [parent], "content": content, "trashed": False}
        return file

    @property
    def names(self) -> list[str]:
        return [file["name"] for file in self.files.values() if not file["trashed"]]

    async def token(self, request: web.Request) -> web.Response:
        form = await request.post()
        self.tokens += 1
        if self.refuse:
            return web.json_response(self.refuse[1], status=self.refuse[0])
        assert (form["grant_type"], form["refresh_token"]) == ("refresh_token", SECRET)
        return web.json_response({"access_token": f"t-{self.tokens}", "expires_in": 3600})

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path != "/token":
            self.asked.append(f"{request.method} {request.path}")
            if self.failures:
                return web.json_response({"error": {"message": "not now"}}, status=self.failures.pop(0))
            if request.headers["Authorization"] != f"Bearer t-{self.tokens}":
                return web.json_response({"error": {"message": "Invalid Credentials"}}, status=401)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def find(self, request: web.Request) -> web.Response:
        """One file a page. Of the language, what is asked here: names, parents and whether it is a folder."""
        query = request.query["q"]
        self.queries.append(query)
        if "title" in query:
            return web.json_response({"error": {"message": "Invalid Value"}}, status=400)
        names = re.findall(r"name = '((?:\\.|[^'])*)'", query)
        found = [
            {"id": file, "name": about["name"], "mimeType": about["mimeType"]}
            for file, about in self.files.items()
            if (not names or about["name"] in [name.replace("\\'", "'") for name in names])
            and all(parent in about["parents"] for parent in re.findall(r"'([\w-]+)' in parents", query))
            and ("mimeType = " not in query or about["mimeType"] == drive.FOLDER)
        ]
        at = int(request.query.get("pageToken", 0))
        more = {"nextPageToken": str(at + 1)} if at + 1 < len(found) else {}
        return web.json_response({"files": found[at : at + 1], **more})

    async def make(self, request: web.Request) -> web.Response:
        about = await request.json()
        return web.json_response({"id": self.add(about["name"], about["parents"][0], about["mimeType"])})

    async def upload(self, request: web.Request) -> web.Response:
        assert (request.query["uploadType"], request.content_type) == ("multipart", "multipart/related")
        reader = cast(Any, await request.multipart())
        about, kind = await (await reader.next()).json(), "text/plain"
        content = await (await reader.next()).read()
        return web.json_response({"id": self.add(about["name"], about["parents"][0], kind, bytes(content))})

    async def change(self, request: web.Request) -> web.Response:
        file = self.files[request.match_info["file"]]
        file.update(await request.json())
        return web.json_response({})

    async def delete(self, request: web.Request) -> web.Response:
        gone = request.match_info["file"]
        if gone not in self.files:
            return web.json_response({"error": {"message": "File not found"}}, status=404)
        for file in [file for file, about in self.files.items() if file == gone or gone in about["parents"]]:
            del self.files[file]
        return web.Response(status=204)

    async def read(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["file"]]["content"], content_type="application/json")

    async def export(self, request: web.Request) -> web.Response:
        return web.Response(text=f"as {request.query['mimeType']}")


class OneFile:
    def __init__(self, file: Path) -> None:
        self.file = file

    async def fetch(self, url: str) -> Path:
        assert url == "https://files.example/x"
        return self.file


@asynccontextmanager
async def fake_drive(tmp_path: Path, file: Path | None = None) -> AsyncIterator[tuple[FakeDrive, Context]]:
    fake = FakeDrive()
    app = web.Application(middlewares=[fake.guard])
    one = "/drive/v3/files/{file}"
    app.add_routes([web.post("/token", fake.token), web.get("/drive/v3/files", fake.find)])
    app.add_routes([web.post("/drive/v3/files", fake.make), web.post("/upload/drive/v3/files", fake.upload)])
    app.add_routes([web.patch(one, fake.change), web.delete(one, fake.delete), web.get(one, fake.read)])
    app.add_routes([web.get(f"{one}/export", fake.export)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        owner = {"client_id": "c", "client_secret": "d", "refresh_token": SECRET, "token_uri": f"{fake.url}/token"}
        credentials = tmp_path / "credentials.json"
        await asyncio.to_thread(credentials.write_text, json.dumps({"type": "authorized_user", **owner}))
        settings = Settings(state_dir=tmp_path, google_credentials=credentials)
        async with aiohttp.ClientSession() as http:
            assets = cast(Assets, OneFile(file or credentials))
            yield fake, Context(Guest(http, "http://x"), Cdp(http, "http://x"), assets, settings, http)
    finally:
        await runner.cleanup()


async def operate(fake: FakeDrive, context: Context, **operations: dict[str, Any]) -> None:
    parameters = {"operation": list(operations), "args": list(operations.values())}
    assert await google.googledrive(context, parameters, api=fake.url) == ""


async def test_all_operations_run_in_order_also_after_an_upload(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(b"content " * 10_000)
    async with fake_drive(tmp_path, file) as (fake, context):
        upload = {"url": "https://files.example/x", "path": ["a", "it's.txt"]}
        await operate(fake, context, upload=upload, mkdirs={"path": ["a", "b"]}, delete={"query": "title = 'b'"})
        a, stored = fake.files.values()
        assert (a["name"], a["mimeType"]) == ("a", drive.FOLDER)
        assert (stored["name"], stored["parents"], stored["content"]) == ("it's.txt", ["id-0"], b"content " * 10_000)


async def test_deleting_takes_files_before_folders_and_minds_not_what_is_gone_already(tmp_path: Path) -> None:
    async with fake_drive(tmp_path) as (fake, context):
        folder = fake.add("x", kind=drive.FOLDER)
        inside, kept = fake.add("x", parent=folder), fake.add("y")
        await operate(fake, context, delete={"query": "title = 'x'"})
        assert [asked for asked in fake.asked if "DELETE" in asked] == [
            f"DELETE /drive/v3/files/{file}" for file in (inside, folder)
        ]
        assert list(fake.files) == [kept]


async def test_with_trash_nothing_is_deleted_for_good(tmp_path: Path) -> None:
    async with fake_drive(tmp_path) as (fake, context):
        fake.add("x")
        await operate(fake, context, delete={"query": "title = 'x'", "trash": True})
        assert (fake.names, len(fake.files)) == ([], 1)


async def test_folders_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    async with fake_drive(tmp_path) as (fake, context):
        fake.add("a", kind=drive.FOLDER)
        await operate(fake, context, mkdirs={"path": ["a", "b"]})
        await operate(fake, context, mkdirs={"path": "a"})
        assert [(file["name"], file["parents"]) for file in fake.files.values()] == [("a", ["root"]), ("b", ["id-0"])]


async def test_one_token_serves_many_calls_and_a_refused_one_is_had_anew(tmp_path: Path) -> None:
    async with fake_drive(tmp_path) as (fake, context):
        await operate(fake, context, mkdirs={"path": ["a", "b"]})
        await operate(fake, context, mkdirs={"path": ["c"]})
        assert fake.tokens == 1
        fake.failures = [401]
        await operate(fake, context, mkdirs={"path": ["d"]})
        assert (fake.tokens, fake.names) == (2, ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("refuse", "failures", "error", "words"),
    [
        pytest.param(
            (400, {"error": "invalid_grant"}), [], MissingRequirement, "refresh token .*invalid_grant", id="revoked"
        ),
        pytest.param(
            (401, {"error": "invalid_client"}), [], MissingRequirement, "refuses the refresh token", id="client"
        ),
        pytest.param((500, {}), [], InfraError, "answered 500 and no token", id="tokens down"),
        pytest.param((200, {"access_token": 7}), [], InfraError, "no token", id="odd token"),
        pytest.param(None, [401] * 3, MissingRequirement, "401: not now", id="never good"),
        pytest.param(None, [503] * 3, InfraError, "503: not now", id="drive down"),
        pytest.param(None, [403], InfraError, "403: not now", id="forbidden"),
        pytest.param(None, [400], TaskInvalid, "400: not now", id="bad query"),
        pytest.param(None, [302], InfraError, "302", id="redirect"),
    ],
)
async def test_a_refusal_says_whose_it_is_and_keeps_the_secrets(
    refuse: Any,
    failures: list[int],
    error: type[EnvdError],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drive, "PAUSE", 0.01)
    async with fake_drive(tmp_path) as (fake, context):
        fake.refuse, fake.failures = refuse, failures
        with pytest.raises(error, match=words) as failed:
            await operate(fake, context, mkdirs={"path": ["a"]})
        assert type(failed.value) is error
        assert SECRET not in str(failed.value.problem())


async def test_what_fails_in_passing_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "PAUSE", 0.01)
    async with fake_drive(tmp_path) as (fake, context):
        fake.failures = [503, 429]
        await operate(fake, context, mkdirs={"path": ["a"]})
        assert fake.names == ["a"]


@pytest.mark.parametrize("setting", ["google_account", "google_credentials"])
@pytest.mark.parametrize("content", [None, "{", '{"refresh_token": "s3cr3t-of-the-owner", "password": 7}'])
async def test_what_is_not_configured_or_cannot_be_used_is_a_missing_requirement(
    setting: str, content: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    for settings in (Settings(state_dir=tmp_path), Settings.model_validate({"state_dir": tmp_path, setting: file})):
        async with aiohttp.ClientSession() as http:
            here = Context(Guest(http, "http://x"), Cdp(http, "http://x"), cast(Assets, None), settings, http)
            run = google.login if setting == "google_account" else google.googledrive
            with pytest.raises(MissingRequirement) as failed:
                await run(here, {"operation": ["delete"], "args": [{}]})
        assert setting.upper() in failed.value.hint
        assert SECRET not in str(failed.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("title = 'a title' and 'root' in parents", "name = 'a title' and 'root' in parents", id="title"),
        pytest.param('title="it\'s"', "name='it\\'s'", id="double quotes"),
        pytest.param("title = 'it\\'s title'", "name = 'it\\'s title'", id="escaped"),
        pytest.param("modifiedDate > '2012' and subtitle", "modifiedTime > '2012' and subtitle", id="dates"),
    ],
)
def test_queries_are_put_in_the_language_of_today(old: str, new: str) -> None:
    assert drive.modern(old) == new


async def test_files_are_had_by_path_or_by_query_and_none_stands_for_what_is_not_there(tmp_path: Path) -> None:
    async with fake_drive(tmp_path) as (fake, context):
        folder = fake.add("f", kind=drive.FOLDER)
        fake.add("a.txt", folder, content=b'{"a": 1}')
        fake.add("d", folder, kind="application/vnd.google-apps.document")

        async def had(**config: Any) -> Any:
            return await drive.download(context, config, tmp_path, api=fake.url)

        assert (await had(path=["f", "a.txt"], dest="../../x.json")).read_bytes() == b'{"a": 1}'
        assert await had(path=["f", "b.txt"], dest="b") is None
        assert await had(path=["f"], dest="folder") is None
        assert await had(query=["title = 'f'", "title = 'a.txt'"], dest="q") == tmp_path / "q"
        assert await had(path_list=[["f", "a.txt"], ["a.txt"]], dest=["1", "2"]) == [tmp_path / "1", None]
        assert await had(query_list=[["title = 'f'", "title = 'a.txt'"]], dest=["1"]) == [tmp_path / "1"]
        assert (await had(path=["f", "d"], dest="d.pdf")).read_text() == "as application/pdf"
        with pytest.raises(TaskInvalid):
            await had(path_list=[["f"]], dest=["1", "2"])
        with pytest.raises(TaskInvalid):
            await had(path=["f"], dest="..")
    assert (tmp_path / "x.json").exists()


async def test_a_file_that_is_too_large_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "LARGEST_FILE", 10)
    async with fake_drive(tmp_path) as (fake, context):
        fake.add("a", content=b"x" * 100)
        with pytest.raises(InfraError, match="larger than 10 bytes"):
            await drive.download(context, {"path": ["a"], "dest": "a"}, tmp_path, api=fake.url)
