"""From a trainer's node: is the server there, is it envd, may I use it, and how fast is the way to it.

What keeps the rest from being looked at ends the list, since everything after it would only say the same again.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import ssl
import statistics
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # documented, not in typeshed

import aiohttp
import anyio
from anyio.to_thread import run_sync

from .. import __version__
from ..access import is_loopback
from ..errors import EnvdError, SettingsError
from ..findings import Finding, Look, gather
from ..settings import without_logins
from .wire import Reply, ask, opened

CONNECT = 5.0
"""Seconds for a connection: a packet that is dropped is sent again after 1 and after 3."""
ROUNDS = 20
"""Round trips that are timed."""
SLOW_ROUND = 0.1
"""Seconds of a round trip from which on it is worth a word: every step waits for two."""
SKEW = 2.0
"""Seconds by which two clocks may differ."""
DOWNLOADS = 4
MOST_WORDS, MOST_LETTERS = 20, 500
"""Of what a server says that is passed on: so many sentences, of so many characters."""
UNJUDGED = "no evaluators"
"""In what `/readyz` warns of where nothing can be judged."""
SLOW = 2_000_000
"""Bytes a second below which pictures take longer than desktops: one of a full screen has some 500,000."""


@dataclass(frozen=True, slots=True)
class Server:
    """The one that is looked at. `url` has no path."""

    url: str
    scheme: str
    host: str
    port: int
    token: str

    @property
    def where(self) -> str:
        return f"{self.host}:{self.port}"


def server_at(url: str, token: str) -> Server:
    """Raises SettingsError."""
    if "://" not in url:
        url = f"http://{url}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise SettingsError(
            f"{without_logins(url)!r} is no URL: {error}.", hint="Give it as http://HOST:15001."
        ) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise SettingsError(
            f"{without_logins(url)!r} is not the address of a server.",
            hint="Give it as http://HOST:15001, without a user: what a server wants is a token, ENVD_TOKEN.",
        )
    port = port or (443 if parts.scheme == "https" else 80)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Server(f"{parts.scheme}://{host}:{port}", parts.scheme, parts.hostname, port, token)


async def examine(
    url: str, token: str, *, full: bool = False, environ: Mapping[str, str] | None = None, connect: float = CONNECT
) -> list[Finding]:
    """All that is found, in the order in which it is to be put right."""
    environ = os.environ if environ is None else environ
    try:
        server = server_at(url, token)
    except SettingsError as error:
        return [Finding("URL", "failed", error.detail, error.hint)]
    found = [proxies(server, environ)]
    addresses, named = await name(server)
    found.insert(0, named)
    if not addresses:
        return [*found, _not_looked("the name leads nowhere")]
    connected = await connection(server, addresses, connect)
    found.append(connected)
    if connected.verdict == "failed":
        return [*found, _not_looked("there is no connection")]
    async with opened(token) as session:
        first, answered = await service(session, server)
        found += answered
        if first is None:
            return [*found, _not_looked("it is not envd that answers")]
        admitted = access(server, first)
        found.append(admitted)
        looks: list[tuple[str, Look]] = [
            ("clock", partial(clock, session, server)),
            ("round trip", partial(round_trip, session, server)),
            ("ready", partial(readiness, session, server)),
        ]
        if admitted.verdict != "failed":
            looks.append(("envs", partial(envs, session, server)))
            looks.append(("bandwidth", partial(bandwidth, session, server)))
        # One after another: what is timed is not to wait for the others.
        found += await gather(looks, told=broke, at_once=1, within=30.0)
    if full and admitted.verdict != "failed":
        await run_sync(import_module, ".trial", __package__)  # only here: it looks at pictures, which takes Pillow
        from .trial import desktop

        found += await desktop(server.url, token)
    elif full:
        found.append(Finding("desktop", "unknown", "not tried: access is refused"))
    return found


def broke(what: str, error: Exception) -> Finding:
    """What is said of a look that ended otherwise than it should."""
    if isinstance(error, EnvdError):
        return Finding(what, "unknown", error.detail, error.hint)
    return Finding(what, "unknown", f"this look broke: {type(error).__name__}: {error}".rstrip(": "))


def _not_looked(why: str) -> Finding:
    return Finding("the rest", "unknown", f"not looked at: {why}")


# -- the way there --------------------------------------------------------------------------------------------------


def proxies(server: Server, environ: Mapping[str, str]) -> Finding:
    """Our own clients use no proxy; what a trainer is made of may."""
    lower = {name.lower(): value for name, value in environ.items() if value}
    wanted = [name for name in (f"{server.scheme}_proxy", "all_proxy") if name in lower]
    if not wanted:
        return Finding("proxy", "ok", f"no variable sets one for {server.scheme}")
    names = ", ".join(name.upper() for name in wanted)
    if proxy_bypass_environment(server.host, {"no": lower.get("no_proxy", "")}):
        return Finding("proxy", "ok", f"{names} is set, and NO_PROXY has {server.host}")
    kept = "$NO_PROXY," if lower.get("no_proxy") else ""
    return Finding(
        "proxy",
        "warning",
        f"{names} is set and NO_PROXY lacks {server.host}: envd's own clients go past the proxy, and others (requests, "
        "httpx, curl) send it what is meant for envd, which may answer 502 or 403",
        f"export NO_PROXY={kept}{server.host} no_proxy={kept}{server.host}",
    )


async def name(server: Server) -> tuple[list[tuple[int, str]], Finding]:
    """The addresses of its host, as family and address."""
    what = "name"
    try:
        with anyio.fail_after(CONNECT):
            found = await anyio.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except TimeoutError:
        detail = f"{server.host}: the name server did not answer within {CONNECT:g} s"
        return [], Finding(what, "failed", detail, f"getent hosts {server.host}; see /etc/resolv.conf")
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return [], Finding(
            what,
            "failed",
            f"{server.host} cannot be resolved: {why}",
            f"getent hosts {server.host}; or use the server's address: http://ADDRESS:{server.port}",
        )
    addresses = list(dict.fromkeys((int(family), str(address[0])) for family, _, _, _, address in found))
    told = ", ".join(address for _, address in addresses)
    detail = f"{told} is an address" if told == server.host else f"{server.host} is {told}"
    return addresses, Finding(what, "ok", detail)


async def connection(server: Server, addresses: list[tuple[int, str]], within: float = CONNECT) -> Finding:
    """The first address that takes a connection; else why none does, by the first."""
    errors: list[tuple[str, OSError]] = []
    for _, address in addresses:
        began = anyio.current_time()
        try:
            with anyio.fail_after(within):
                stream = await anyio.connect_tcp(address, server.port)
            took = anyio.current_time() - began
            await stream.aclose()
        except OSError as error:  # a TimeoutError is one
            errors.append((address, _cause(error)))
            continue
        return Finding("connection", "ok", f"{address} port {server.port} in {took * 1000:.1f} ms")
    return await run_sync(lambda: _unconnected(server, *errors[0], within))


def _cause(error: OSError) -> OSError:
    """anyio says that all attempts failed, from what the system said."""
    cause = error.__cause__
    return cause if isinstance(cause, OSError) and error.errno is None else error


def _unconnected(server: Server, address: str, error: OSError, within: float) -> Finding:
    """Blocks for no time."""
    what, port = "connection", server.port
    if isinstance(error, ConnectionRefusedError):
        if is_loopback(address):
            return Finding(
                what,
                "failed",
                f"refused: nothing listens on port {port} of this host, which is what {server.host} means here",
                f"start it here (make serve), or name the server: envd doctor --url http://HOST:{port}",
            )
        return Finding(
            what,
            "failed",
            f"refused: {address} is there, and nothing listens on its port {port} for others. envd does not run there, "
            "or listens on 127.0.0.1 alone (its default), or on another port",
            f"on {server.host}: ENVD_HOST=0.0.0.0 ENVD_TOKEN=$(openssl rand -hex 32) make serve",
        )
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        mine = _own_address(address)
        far = ""
        if ipaddress.ip_address(address.partition("%")[0]).is_private:
            far = f"; {address} is a private address, which is reached from within its network (VPC, VPN) alone"
        return Finding(
            what,
            "failed",
            f"timed out: no answer from {address} port {port} within {within:g} s. A firewall or a security group "
            f"drops the packets, or the host is down{far}",
            f"aws ec2 authorize-security-group-ingress --group-id <the server's group> --protocol tcp --port {port} "
            f"--cidr {mine}/{'128' if ':' in mine else '32'}; elsewhere, on {server.host}: sudo ufw allow proto tcp "
            f"from {mine} to any port {port}",
        )
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return Finding(
            what,
            "failed",
            f"no route: this host knows no way to {address} ({error.strerror}). They are in different networks, or the "
            "host is down",
            f"ip route get {address}; then join the networks (VPC peering, VPN), or use an address that is reached",
        )
    return Finding(what, "failed", f"{address} port {port}: {error.strerror or error}", f"ip route get {address}")


def _own_address(to: str) -> str:
    """The address from which this host would speak to `to`; nothing is sent."""
    with closing(socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        try:
            sock.connect((to, 9))
            return str(sock.getsockname()[0])
        except OSError:
            return "<this host's address>"


# -- who answers ----------------------------------------------------------------------------------------------------


async def service(session: aiohttp.ClientSession, server: Server) -> tuple[Reply | None, list[Finding]]:
    """The answer of `/version`, where it is envd's."""
    try:
        reply = await ask(session, f"{server.url}/version")
    except (aiohttp.ClientError, OSError) as error:
        return None, [_no_answer(server, error)]
    if not reply.envd:
        return None, [_somebody_else(server, reply)]
    return reply, [Finding("service", "ok", f"envd {reply.envd} at {server.url}"), version(reply.envd)]


def _no_answer(server: Server, error: Exception) -> Finding:
    what = "service"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Finding(
            "certificate",
            "failed",
            f"it is not accepted for {server.host}: {error.certificate_error}",
            "use a name that it is for, or have this host trust who signed it: export SSL_CERT_FILE=/path/to/ca.pem",
        )
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return Finding(
            what,
            "failed",
            f"it speaks no TLS: {error}",
            f"envd doctor --url http://{_in_url(server.host)}:{server.port}",
        )
    if isinstance(error, TimeoutError):
        return Finding(
            what,
            "failed",
            "the connection is taken, and nothing answers: the daemon is stuck or is starting, or something in between "
            "(a tunnel, a load balancer) takes connections in its stead",
            f"on {server.host}: sudo ss -ltnp 'sport = :{server.port}'; journalctl -u envd -n 50",
        )
    secure = server.scheme == "http"
    return Finding(
        what,
        "failed",
        f"what answers does not speak HTTP, or hangs up: {error or type(error).__name__}",
        f"if it serves HTTPS: envd doctor --url https://{_in_url(server.host)}:{server.port}"
        if secure
        else f"on {server.host}: sudo ss -ltnp 'sport = :{server.port}'",
    )


def _somebody_else(server: Server, reply: Reply) -> Finding:
    said = reply.headers.get("Server", "")
    who = f"{said} answers" if said else "it answers"
    if reply.status in (502, 503, 504):
        return Finding(
            "service",
            "failed",
            f"a proxy or load balancer {f'({said}) ' if said else ''}answers {reply.status}: it does not reach an envd",
            f"look at what it forwards to, or go past it: envd doctor --url http://HOST:{server.port}",
        )
    return Finding(
        "service",
        "failed",
        f"another service listens on {server.where}: {who} {reply.status} for /version, and not as envd does",
        f"on {server.host}: sudo ss -ltnp 'sport = :{server.port}' says who; envd's own port is 15001, or ENVD_PORT",
    )


def version(theirs: str, ours: str = __version__) -> Finding:
    """The parts that may change the wire are compared: of 0.x the first two numbers, else the first."""

    def face(told: str) -> list[str]:
        numbers = told.split(".")
        return numbers[:2] if numbers[0] == "0" else numbers[:1]

    if theirs == ours:
        return Finding("version", "ok", f"{theirs} on both sides")
    if face(theirs) == face(ours):
        return Finding("version", "ok", f"{theirs} there, {ours} here: they understand each other")
    # What is to be copied into a shell is never what a stranger made up.
    can_be_had = re.fullmatch(r"[0-9][0-9A-Za-z.+]{0,60}", theirs) is not None
    return Finding(
        "version",
        "warning",
        f"{theirs} there, {ours} here: calls may have changed in between",
        f"pip install 'envd-server=={theirs}'" if can_be_had else "",
    )


def access(server: Server, reply: Reply) -> Finding:
    what, problem = "access", reply.json()
    detail, hint = (str(problem.get(name, ""))[:MOST_LETTERS] for name in ("detail", "hint"))
    detail = detail.rstrip(".")
    sent = "the token of ENVD_TOKEN" if server.token else "no token"
    if reply.status == 200:
        return Finding(what, "ok", f"let in with {sent}")
    if reply.status == 401:
        if server.token:
            return Finding(
                what, "failed", f"401: {sent} is not known there", "export ENVD_TOKEN=<the one that the daemon has>"
            )
        return Finding(
            what,
            "failed",
            f"401: a token is wanted, and none was sent ({detail})",
            f"export ENVD_TOKEN=<the daemon's>; or start the daemon with ENVD_ALLOW={_network_of(detail)}",
        )
    if reply.status == 403:
        return Finding(
            what,
            "failed",
            f"403: {sent} may not do this ({detail}). {hint}".rstrip(),
            "use another token",
        )
    if reply.status == 421:
        return Finding(
            what,
            "failed",
            f"421: the daemon is not known by the name {server.host}, and answers without a token only where it is",
            f"on the server: ENVD_HOSTS={server.host}; or use its address, or a token",
        )
    if reply.status == 429:
        return Finding(what, "warning", "429: more requests were sent from here than ENVD_REQUEST_RATE allows")
    return Finding(what, "failed", f"{reply.status}: {detail or 'an answer that this version does not know'}")


def _network_of(detail: str) -> str:
    """The caller's address, as the daemon told it."""
    first = detail.partition(" ")[0]
    try:
        return str(ipaddress.ip_address(first))
    except ValueError:
        return "<this host's address>"


# -- how it is there ------------------------------------------------------------------------------------------------


async def clock(session: aiohttp.ClientSession, server: Server) -> list[Finding]:
    reply = await ask(session, f"{server.url}/livez")
    return [clock_of(reply)]


def clock_of(reply: Reply) -> Finding:
    """HTTP tells whole seconds, so less than one cannot be seen."""
    what = "clock"
    try:
        theirs = parsedate_to_datetime(reply.headers["Date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return Finding(what, "unknown", "the answer has no date")
    early, late = theirs - reply.received, theirs + 1 - reply.sent
    if early <= 0 <= late:
        return Finding(what, "ok", "the same as this host's, to a second")
    apart = early if early > 0 else late
    which = "ahead of" if apart > 0 else "behind"
    detail = f"the server's is {abs(apart):.0f} s {which} this host's"
    if abs(apart) <= SKEW:
        return Finding(what, "ok", detail)
    return Finding(
        what,
        "warning",
        f"{detail}: logs do not match, and links and certificates may be refused",
        "timedatectl, on both; then sudo timedatectl set-ntp true on the one that is wrong",
    )


async def round_trip(session: aiohttp.ClientSession, server: Server) -> list[Finding]:
    took = [(await ask(session, f"{server.url}/livez")).seconds for _ in range(ROUNDS)]
    middle, worst = statistics.median(took), max(took)
    detail = f"p50 {middle * 1000:.1f} ms, slowest {worst * 1000:.1f} ms, of {ROUNDS}"
    if middle > SLOW_ROUND:
        return [
            Finding("round trip", "warning", f"{detail}: every step waits so long", "put server and trainers closer")
        ]
    return [Finding("round trip", "ok", detail)]


async def bandwidth(session: aiohttp.ClientSession, server: Server) -> list[Finding]:
    """By a page that costs no desktop anything, and the best of some: the first has the server make it."""
    replies = [await ask(session, f"{server.url}/docs") for _ in range(1 + DOWNLOADS)]
    trips = [(await ask(session, f"{server.url}/livez")).seconds for _ in range(DOWNLOADS)]
    if any(one.status != 200 for one in replies):
        return [Finding("bandwidth", "unknown", f"/docs was answered {replies[0].status}")]
    size, took = len(replies[-1].body), min(one.seconds for one in replies[1:])
    rate = size / max(took - min(trips), 1e-4)
    detail = f"{size / 1000:.0f} kB at {rate / 1e6:.1f} MB/s, the best of {DOWNLOADS}"
    if rate < SLOW:
        detail += ": pictures of a full screen take long"
        return [Finding("bandwidth", "warning", detail, "put server and trainers closer")]
    return [Finding("bandwidth", "ok", detail)]


async def readiness(session: aiohttp.ClientSession, server: Server) -> list[Finding]:
    """Of `/readyz`, which needs no token: a server that answers is not yet one that can serve a reset."""
    reply = await ask(session, f"{server.url}/readyz")
    found = [Finding("ready", "warning", one, _remedy(one)) for one in _words_of(reply, "warnings")]
    if reply.status == 200:
        return [Finding("ready", "ok", "a reset can be served now"), *found]
    reasons = _words_of(reply, "reasons") or [f"/readyz answers {reply.status}"]
    return [*(Finding("ready", "failed", f"no reset is served: {one}", _remedy(one)) for one in reasons), *found]


def _words_of(reply: Reply, name: str) -> list[str]:
    """What the answer lists under that name, as far as anybody would read it."""
    listed = reply.json().get(name)
    return [str(one)[:MOST_LETTERS] for one in listed[:MOST_WORDS]] if isinstance(listed, list) else []


def _remedy(reason: str) -> str:
    """What to do about a reason that `/readyz` gives."""
    if "disk" in reason:
        return "free some space there, or set ENVD_STATE_DIR to a folder on a larger disk; it goes on by itself"
    if "shutting down" in reason:
        return "wait until it has ended, and start it again: sudo systemctl start envd, or make serve"
    if "queue is full" in reason:
        return "wait, or raise ENVD_QUEUE_LIMIT; envd watch shows what it does"
    if "ENVD_INSECURE" in reason:
        return "ENVD_TOKEN=$(openssl rand -hex 32) instead of ENVD_INSECURE=1"
    if UNJUDGED in reason:
        return "make evaluators, there"
    return "see the daemon's log: journalctl -u envd -n 50"


async def envs(session: aiohttp.ClientSession, server: Server) -> list[Finding]:
    reply = await ask(session, f"{server.url}/v1/envs")
    told = reply.json()
    if reply.status != 200:
        said = str(told.get("detail", ""))[:MOST_LETTERS]
        return [Finding("envs", "unknown", f"/v1/envs was answered {reply.status}: {said}")]
    given = told.get("envs")
    listed = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    leased = sum(one.get("lease") is not None for one in listed)
    busy = sum(one.get("lease") is None and _is_busy(one) for one in listed)
    free = len(listed) - leased - busy
    others = ", ".join(
        f"{count} {how}" for count, how in ((leased, "leased"), (busy, "played or being reset")) if count
    )
    detail = f"{free} of {len(listed)} free{f', {others}' if others else ''}"
    if not free:
        return [
            Finding("envs", "warning", detail, "wait in line with a lease (client.lease(n)), or raise ENVD_ENVS there")
        ]
    return [Finding("envs", "ok", detail)]


def _is_busy(env: Mapping[str, Any]) -> bool:
    episode = env.get("episode") or {}
    return env.get("state") == "resetting" or (env.get("state") == "playing" and not episode.get("done"))


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
