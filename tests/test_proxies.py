"""nginx and Caddy before the daemon, with the configurations that are handed out: names, ports and certificates are
changed, and nothing else where a test does not say so."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from certificates import Certificate, certificate
from serving import Served, serving

from envd.client.sse import Message
from envd.drivers.sim import Behaviour
from envd.settings import load

PROXY = Path(__file__).parent.parent / "deploy" / "proxy"
NAME = "envd.example.org"
PACKAGES = {"nginx": "nginx-light", "caddy": "caddy"}
TO_START = 20.0
GREETING = b"RFB 003.008\n"
TOKEN = "a-token-that-is-long-enough"
Change = Callable[[str], str]


def unchanged(text: str) -> str:
    return text


def changed(text: str, what: str, to: str) -> str:
    """`text` with the one place that `what` fits changed. Raises AssertionError if it fits elsewhere, or nowhere."""
    text, count = re.subn(what, to, text)
    assert count == 1, f"{what} fits {count} places"
    return text


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return certificate(tmp_path_factory.mktemp("certificates"), NAME)


@pytest.fixture(params=sorted(PACKAGES))
def program(request: pytest.FixtureRequest) -> str:
    """Each of the two in turn, if it is here."""
    name: str = request.param
    if shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/bin") is None:
        pytest.skip(f"no {name}; the Debian package is {PACKAGES[name]}, and deploy/test-servers.sh installs it")
    return name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def nginx(folder: Path, port: int, backend: str, signed: Certificate, change: Change) -> list[str]:
    site = change((PROXY / "nginx.conf").read_text())
    site = changed(site, r"listen 443 ", f"listen 127.0.0.1:{port} ")
    site = changed(site, r"server 127\.0\.0\.1:15001;", f"server {backend};")
    site = changed(site, r"/etc/ssl/envd/fullchain\.pem", str(signed.chain))
    site = changed(site, r"/etc/ssl/envd/key\.pem", str(signed.key))
    (folder / "site.conf").write_text(site)
    kept = " ".join(f"{what}_temp_path {folder}/{what};" for what in ("proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body; {kept} include {folder}/site.conf; }}\n"
    )
    return ["nginx", "-c", str(folder / "nginx.conf"), "-e", "stderr"]


def caddy(folder: Path, port: int, backend: str, signed: Certificate, change: Change) -> list[str]:
    site = change((PROXY / "Caddyfile").read_text())
    site = changed(site, rf"(?m)^{re.escape(NAME)} {{", f"https://{NAME}:{port} {{\n\tbind 127.0.0.1")
    site = changed(site, r"127\.0\.0\.1:15001", backend)
    site = changed(site, r"/etc/ssl/envd/fullchain\.pem /etc/ssl/envd/key\.pem", f"{signed.chain} {signed.key}")
    config = f"{{\n\tadmin off\n\tauto_https disable_redirects\n\tstorage file_system {folder}/caddy\n}}\n{site}"
    (folder / "Caddyfile").write_text(config)
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


@asynccontextmanager
async def proxied(
    program: str, served: Served, signed: Certificate, folder: Path, change: Change = unchanged
) -> AsyncIterator[Served]:
    """The daemon as it is reached through the proxy; what is asked of it goes there by the proxy's name."""
    port = free_port()
    write = nginx if program == "nginx" else caddy
    command = write(folder, port, "{}:{}".format(*served.address), signed, change)
    path = shutil.which(command[0], path="/usr/sbin:/usr/bin:/usr/local/bin")
    assert path is not None
    log = folder / "log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            path, *command[1:], stdout=out, stderr=out, env={"HOME": str(folder), "PATH": "/usr/sbin:/usr/bin:/bin"}
        )
    try:
        await _listens(port, process, log)
        async with client(signed) as http:
            yield replace(served, url=f"https://{NAME}:{port}", http=http)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _listens(port: int, process: asyncio.subprocess.Process, log: Path) -> None:
    async with asyncio.timeout(TO_START):
        while True:
            assert process.returncode is None, await asyncio.to_thread(log.read_text)
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            return


class Here(aiohttp.abc.AbstractResolver):
    """The proxy's name is this host's."""

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[Any]:
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": family, "proto": 0, "flags": 0}]

    async def close(self) -> None:
        pass


def client(signed: Certificate, address: str = "127.0.0.1") -> aiohttp.ClientSession:
    """One that comes from this address, and believes the certificate."""
    context = ssl.create_default_context(cafile=str(signed.chain))
    connector = aiohttp.TCPConnector(ssl=context, resolver=Here(), local_addr=(address, 0))
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60))


def _is_of(job_id: str, message: Message) -> bool:
    return bool(json.loads(message.data).get("job", {}).get("id") == job_id)


async def test_events_come_one_by_one(program: str, signed: Certificate, tmp_path: Path) -> None:
    async with (
        serving(Behaviour(boot_s=3600), hosts=(NAME,), proxies=("127.0.0.1",), insecure=True) as served,
        proxied(program, served, signed, tmp_path) as through,
        through.stream("/v1/events") as reader,
    ):
        assert (await reader.next()).event == "snapshot"
        for _ in range(3):
            # Each is read before the next one can happen: what held them back would never let go.
            status, job = await served.post("/v1/envs/0/reset", {})
            assert status == 202
            await reader.until(partial(_is_of, job["id"]))


async def test_a_reset_may_take_as_long_as_old_clients_wait(program: str, signed: Certificate, tmp_path: Path) -> None:
    """All times are shrunk alike: nginx's patience from 3600 s to 6 s, what a reset takes from 1800 s to 3 s. Caddy has
    no patience to shrink."""

    def shrunk(text: str) -> str:
        if program == "nginx":
            text = changed(text, r"proxy_read_timeout 3600s", "proxy_read_timeout 6s")
        return text

    async with (
        serving(Behaviour(boot_s=3), hosts=(NAME,), proxies=("127.0.0.1",), insecure=True) as served,
        proxied(program, served, signed, tmp_path, shrunk) as through,
    ):
        status, body = await through.post("/env/reset", {"task_config": {"id": "t-1", "instruction": "x"}})
        assert status == 200, body


async def test_less_patience_than_a_reset_takes_cuts_it(signed: Certificate, tmp_path: Path) -> None:
    """That the line in nginx's configuration is what decides."""
    if shutil.which("nginx", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("no nginx; the Debian package is nginx-light, and deploy/test-servers.sh installs it")

    def shrunk(text: str) -> str:
        return changed(text, r"proxy_read_timeout 3600s", "proxy_read_timeout 1s")

    async with (
        serving(Behaviour(boot_s=3600), hosts=(NAME,), proxies=("127.0.0.1",), insecure=True) as served,
        proxied("nginx", served, signed, tmp_path, shrunk) as through,
    ):
        status, _ = await through.post("/env/reset", {"task_config": {"id": "t-1", "instruction": "x"}})
        assert status == 504


def test_the_patience_that_is_handed_out_is_enough() -> None:
    text = (PROXY / "nginx.conf").read_text()
    [(read, send)] = re.findall(r"proxy_read_timeout (\d+)s;\s+proxy_send_timeout (\d+)s;", text)
    assert int(read) >= load({}, env_file=None).legacy_wait + 50
    assert int(send) >= 300
    assert "timeout" not in re.sub(r"#.*", "", (PROXY / "Caddyfile").read_text())


async def test_the_screen_and_chrome_pass(program: str, signed: Certificate, tmp_path: Path) -> None:
    async with (
        serving(Behaviour(vnc=True), hosts=(NAME,), proxies=("127.0.0.1",), insecure=True) as served,
        proxied(program, served, signed, tmp_path) as through,
        asyncio.timeout(30),
    ):
        await served.play()
        async with through.http.ws_connect(through.url + "/v1/envs/0/vnc/websockify") as screen:
            assert await screen.receive_bytes() == GREETING
        _, version = await through.get("/v1/envs/0/cdp/json/version")
        address = version["webSocketDebuggerUrl"]
        assert address.startswith(through.url.replace("https:", "wss:"))
        async with through.http.ws_connect(address) as chrome:
            await chrome.send_json({"id": 1, "method": "Browser.getVersion"})
            assert (await chrome.receive_json())["id"] == 1


async def test_clients_are_known_by_their_own_addresses(program: str, signed: Certificate, tmp_path: Path) -> None:
    """And nobody by the one that they claim."""
    async with (
        serving(hosts=(NAME,), proxies=("127.0.0.1",), allow=("127.0.0.5",), token=TOKEN) as served,
        proxied(program, served, signed, tmp_path) as through,
    ):
        seen = {}
        for address in ("127.0.0.5", "127.0.0.6"):
            async with client(signed, address) as http:
                other = replace(through, http=http)
                seen[address] = (await other.get("/v1/envs"))[0]
                claims = {"X-Forwarded-For": "127.0.0.5"}
                seen[f"{address}, claims"] = (await other.get("/v1/envs", headers=claims))[0]
        assert seen == {
            "127.0.0.5": 200,
            "127.0.0.5, claims": 200,
            "127.0.0.6": 401,
            "127.0.0.6, claims": 401,
        }


async def test_a_large_file_passes(program: str, signed: Certificate, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096 * 12  # 12 MiB; nginx by itself takes 1
    async with (
        serving(hosts=(NAME,), proxies=("127.0.0.1",), insecure=True) as served,
        proxied(program, served, signed, tmp_path) as through,
    ):
        await served.play()
        status, _, _ = await through.ask("PUT", "/v1/envs/0/files?path=/home/user/large", data=io.BytesIO(content))
        assert status in (200, 201, 204)
        status, back, _ = await through.ask("GET", "/v1/envs/0/files?path=/home/user/large")
        assert (status, back) == (200, content)


def test_nginx_takes_the_file_as_it_is(tmp_path: Path) -> None:
    """But for the certificate, which is not at its place here."""
    path = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    if path is None:
        pytest.skip("no nginx; the Debian package is nginx-light, and deploy/test-servers.sh installs it")
    signed = certificate(tmp_path, NAME)
    command = nginx(tmp_path, free_port(), "127.0.0.1:15001", signed, unchanged)
    done = subprocess.run([path, "-t", *command[1:]], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr.replace('[warn] the "user"', "")
