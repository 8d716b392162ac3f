"""A proxy for a desktop: real shells run the step's commands, with stand-ins for sudo, apt-get and tinyproxy."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import anyio
import pytest
from aiohttp import web
from test_setup_chrome import site

from envd.errors import GuestMisbehaved, MissingRequirement
from envd.guest import Cdp, Guest
from envd.settings import Settings
from envd.tasks.assets import Assets
from envd.tasks.setup import chrome, proxy
from envd.tasks.setup.context import Context

OWNED = {"host": "proxy.example", "port": 8000, "username": "me", "password": "s3cret", "protocol": "http"}
TINYPROXY = f"""#!{sys.executable}
import pathlib, socket, sys, time
lines = dict(line.split(' ', 1) for line in pathlib.Path(sys.argv[2]).read_text().splitlines())
assert sys.argv[1::2] == ['-c', '-d'] and lines['Allow'] == '127.0.0.1'
server = socket.create_server((lines['Listen'], int(lines['Port'])))
time.sleep(60)
"""
PROGRAMS = {
    "sudo": """read -r word; [ "$word" = "it's" ] || { echo "not with $word" >&2; exit 1; }; shift; exec "$@" """,
    "apt-get": """echo "$@" >> "$HOME/apt"; [ "$1" = update ] || ln -s "$HOME/kept/tinyproxy" "$HOME/bin" """,
}


@asynccontextmanager
async def guest(home: Path, owned: Any = (OWNED,), broken: bool = False) -> AsyncIterator[Context]:
    """A guest that runs what it is told as `sh` does, at home in `home`."""
    launched: list[asyncio.subprocess.Process] = []
    for folder in ("bin", "kept"):
        (home / folder).mkdir()
    programs = {f"bin/{name}": f"#!/bin/sh\n{script}\n" for name, script in PROGRAMS.items()}
    for name, script in (programs | {"kept/tinyproxy": "#!/bin/false\n" if broken else TINYPROXY}).items():
        (home / name).write_text(script)
        (home / name).chmod(0o755)
    environment = os.environ | {"HOME": str(home), "PATH": f"{home}/bin:/usr/bin:/bin"}

    async def start(request: web.Request) -> asyncio.subprocess.Process:
        command = (await request.json())["command"]
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(*command, env=environment, stdout=pipe, stderr=pipe)

    async def execute(request: web.Request) -> web.Response:
        process = await start(request)
        out, err = (text.decode() for text in await process.communicate())
        done = {"status": "success", "returncode": process.returncode, "output": out, "error": err}
        return web.json_response(done)

    async def launch(request: web.Request) -> web.Response:
        launched.append(await start(request))
        return web.Response(text="launched successfully")

    async def upload(request: web.Request) -> web.Response:
        form = await request.post()
        content = cast(web.FileField, form["file_data"]).file.read()
        await anyio.Path(str(form["file_path"])).write_bytes(content)
        return web.Response(text="File Uploaded")

    (home / "owned.json").write_text(json.dumps(owned))
    settings = Settings(state_dir=home, proxy_file=home / "owned.json")
    routes = [web.post("/execute", execute), web.post("/setup/launch", launch), web.post("/setup/upload", upload)]
    async with site(*routes) as base, aiohttp.ClientSession() as http, asyncio.timeout(30):
        try:
            yield Context(Guest(http, base), Cdp(http, base), cast(Assets, None), settings, http)
        finally:
            for process in launched:
                if process.returncode is None:
                    process.kill()
                await process.communicate()


@pytest.fixture(autouse=True)
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(proxy, "CONFIGURATION", str(tmp_path / "tinyproxy.conf"))
    monkeypatch.setattr(proxy, "LISTEN_SECONDS", 3)
    return tmp_path / "tinyproxy.conf"


async def test_the_guest_gets_a_proxy_that_listens_and_its_shells_and_chrome_are_told(
    tmp_path: Path, configuration: Path, unused_tcp_port: int
) -> None:
    address = f"http://127.0.0.1:{unused_tcp_port}"
    async with guest(tmp_path) as context:
        assert await proxy.proxy(context, {"client_password": "it's"}, address=address) == ""
        assert (
            "Upstream http me:s3cret@proxy.example:8000" in (await anyio.Path(configuration).read_text()).splitlines()
        )
        assert (tmp_path / "apt").read_text().splitlines() == ["update", "install -y tinyproxy"]
        told = (tmp_path / ".bashrc").read_text().split()
        assert told[1::2] == [
            f"{name}={address}" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        ]
        _, writer = await asyncio.open_connection("127.0.0.1", unused_tcp_port)
        writer.close()
        (tmp_path / "bin" / "google-chrome").write_text('#!/bin/sh\necho "$@" > "$HOME/chrome"\n')
        (tmp_path / "bin" / "google-chrome").chmod(0o755)
        (tmp_path / "bin" / "socat").symlink_to("/bin/true")
        await chrome.start(context)
        while not (tmp_path / "chrome").exists():  # noqa: ASYNC110 - another process, which tells us nothing
            await asyncio.sleep(0.01)
        assert f"--proxy-server={chrome.PROXY}" in (tmp_path / "chrome").read_text().split()


async def test_tinyproxy_is_not_installed_where_it_is(tmp_path: Path, unused_tcp_port: int) -> None:
    async with guest(tmp_path) as context:
        (tmp_path / "bin" / "tinyproxy").symlink_to(tmp_path / "kept" / "tinyproxy")
        await proxy.proxy(context, {}, address=f"http://127.0.0.1:{unused_tcp_port}")
        assert not (tmp_path / "apt").exists()
        assert context.proxied


async def test_a_password_that_sudo_does_not_take_fails_the_step_and_is_not_told(tmp_path: Path) -> None:
    async with guest(tmp_path) as context:
        with pytest.raises(GuestMisbehaved, match="could not install tinyproxy") as failed:
            await proxy.proxy(context, {"client_password": "hunter2"})
        assert "hunter2" not in str(failed.value)
        assert not context.proxied


async def test_a_proxy_that_does_not_listen_fails_the_step(tmp_path: Path, unused_tcp_port: int) -> None:
    async with guest(tmp_path, broken=True) as context:
        with pytest.raises(GuestMisbehaved, match="does not listen on port"):
            await proxy.proxy(context, {"client_password": "it's"}, address=f"http://127.0.0.1:{unused_tcp_port}")
        assert not context.proxied


@pytest.mark.parametrize(
    "owned",
    [
        pytest.param([], id="none"),
        pytest.param({}, id="no list"),
        pytest.param([{"host": "h"}], id="no port"),
        pytest.param([OWNED | {"host": "h\nUser root"}], id="two lines"),
        pytest.param([OWNED | {"password": "s3cret\nPort 1"}], id="two lines in a secret"),
        pytest.param([OWNED | {"protocol": "ftp"}], id="a protocol that tinyproxy has not"),
    ],
)
async def test_proxies_that_cannot_be_used_are_a_missing_requirement_that_keeps_secrets(
    owned: Any, tmp_path: Path
) -> None:
    async with guest(tmp_path, owned) as context:
        with pytest.raises(MissingRequirement) as failed:
            await proxy.proxy(context, {})
        assert "ENVD_PROXY_FILE" in failed.value.hint
        assert "s3cret" not in str(failed.value)


async def test_without_proxies_the_step_is_a_missing_requirement(tmp_path: Path) -> None:
    async with aiohttp.ClientSession() as http:
        settings = Settings(state_dir=tmp_path)
        context = Context(Guest(http, "http://x"), Cdp(http, "http://x"), cast(Assets, None), settings, http)
        with pytest.raises(MissingRequirement, match="none is configured"):
            await proxy.proxy(context, {})
