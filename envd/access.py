"""Who may use this daemon, and for what: tokens with scopes, networks that need none, and links that end soon.

Where there is no token, whoever calls from this host's loopback may do everything. That is asked of the caller, and not
of the address that is listened on: another server may have bound this app elsewhere, and a proxy on this host brings
others along.

    read    look: envs, jobs, events, pictures, verdicts, evidence
    play    also change an env: reset, step, evaluate, cancel
    admin   also change the daemon: drain, remove what others have

Nothing here knows HTTP servers or routes; `app/gate.py` asks this of every request.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import math
import re
import secrets
import socket
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from .errors import Forbidden, SettingsError, Unauthorized
from .settings import Settings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

CREDENTIAL = "envd-tokens"
"""Name of the systemd credential that holds tokens."""
SHORTEST = 16
"""Characters that a token must have."""
LONGEST_LINK = 3600.0
"""Seconds."""
OURS_ALONE = (".internal", ".local", ".localhost")
"""Ends of names that nobody on the internet can have point here (RFC 6761, RFC 6762; .internal by ICANN)."""
_LINK = re.compile(
    r"(?P<ends>[0-9]{1,12})\.(?P<scope>[12])\.(?P<length>[0-9]{1,3})\.(?P<signature>[\w-]{1,64})", re.ASCII
)
_LINE = re.compile(r"(?:(?P<name>[\w.@-]{1,64})\s+(?P<scope>read|play|admin)\s+)?(?P<token>\S+)")


class Scope(IntEnum):
    """Each holds those before it."""

    READ = 1
    PLAY = 2
    ADMIN = 3


@dataclass(frozen=True, slots=True)
class Token:
    """`digest` is SHA-256 of it: itself is kept nowhere."""

    name: str
    scope: Scope
    digest: bytes


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request. `name` is the token's, `link`, or the address of somebody who needs none; `how` is one of
    token, link, cookie, network, open. `until` is when a link ends, in Unix seconds; `below` is its path, if it is
    good for all that is below that."""

    name: str
    scope: Scope
    address: str
    how: str
    until: float | None = None
    below: str = ""

    def require(self, wanted: Scope, what: str) -> None:
        """Raises Forbidden."""
        if self.scope < wanted:
            raise Forbidden(
                f"{what} needs the scope {wanted.name.lower()}; {self.name} has {self.scope.name.lower()}.",
                hint="Use a token of that scope. Whoever runs the daemon gives them out (ENVD_TOKEN, ENVD_TOKEN_FILE).",
                needed=wanted.name.lower(),
            )


@dataclass(frozen=True)
class Access:
    """The rules. Made by `access_of`.

    tokens   who has one may what it says, from anywhere
    allowed  addresses that need none, and may everything
    proxies  whose X-Forwarded-For is believed
    hosts    names that this daemon is called by, beside addresses and its own
    open     nobody needs a token
    local    nobody on this host needs one
    key      what links are signed with; new with every start
    """

    tokens: tuple[Token, ...] = ()
    allowed: tuple[Network, ...] = ()
    proxies: tuple[Network, ...] = ()
    hosts: frozenset[str] = frozenset()
    open: bool = False
    local: bool = False
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def caller(
        self,
        peer: str,
        authorization: str,
        forwarded: Sequence[str],
        link: str,
        path: str,
        cookies: Sequence[str] = (),
    ) -> Caller:
        """Who makes the request. `link` is the signature in its query, if any; `cookies` are such that a browser kept
        of earlier ones, and count for who would not be let in without. Raises Unauthorized."""
        hops = [hop.strip() for value in forwarded for hop in value.split(",")]
        if self.tokens and authorization:
            return self._bearer(authorization, str(self._address_of(peer, hops, strict=False)))
        if link:
            return self._linked(link, path, str(self._address_of(peer, hops, strict=False)), "link")
        try:
            return self._nearby(peer, hops)
        except Unauthorized:
            for kept in cookies:  # any page of this origin may have planted others
                with suppress(Unauthorized):
                    return self._linked(kept, path, str(self._address_of(peer, hops, strict=False)), "cookie")
            raise

    def believes(self, peer: str) -> bool:
        """Whether what `peer` forwards it does as a proxy of ours."""
        return any(_address(peer) in network for network in self.proxies)

    def _nearby(self, peer: str, hops: Sequence[str]) -> Caller:
        address = self._address_of(peer, hops)
        unnamed_proxy = bool(hops) and address == _address(peer)
        if self.open or (self.local and address.is_loopback and not unnamed_proxy):
            return Caller(str(address), Scope.ADMIN, str(address), "open")
        if any(address in network for network in self.allowed):
            return Caller(str(address), Scope.ADMIN, str(address), "network")
        raise Unauthorized(
            f"{address} must send a token.",
            hint="Send `Authorization: Bearer TOKEN`; our clients take it from ENVD_TOKEN in their environment. For "
            "clients that cannot, the daemon's ENVD_ALLOW names networks that need none.",
        )

    def _address_of(self, peer: str, hops: Sequence[str], *, strict: bool = True) -> Address:
        """The caller's address: the last one in X-Forwarded-For that was not written by a proxy of ours. Raises
        Unauthorized for what is no address, unless it decides nothing."""
        address, left = _address(peer), list(hops)
        while left and any(address in network for network in self.proxies):
            try:
                address = _address(_without_port(left.pop()))
            except ValueError as error:
                if not strict:
                    return address
                raise Unauthorized("X-Forwarded-For holds something that is no address.") from error
        return address

    def _bearer(self, authorization: str, address: str) -> Caller:
        kind, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        found: Token | None = None
        for token in self.tokens:  # all of them, so that the time tells nothing
            if hmac.compare_digest(token.digest, digest):
                found = token
        if kind.lower() != "bearer" or found is None:
            raise Unauthorized("That token is not known here.", hint="See the daemon's ENVD_TOKEN or ENVD_TOKEN_FILE.")
        return Caller(found.name, found.scope, address, "token")

    # -- links --------------------------------------------------------------------------------------------------

    def link(self, path: str, seconds: float, scope: Scope = Scope.READ, now: float | None = None) -> str:
        """A signature, for the query, with which anybody may GET `path`, and if that ends in / all that is below it,
        for so many seconds, an hour at most. `scope` is what the path needs; whoever asks for the link must have it."""
        ends = math.ceil((time.time() if now is None else now) + min(seconds, LONGEST_LINK))
        return f"{ends}.{scope:d}.{len(path)}.{self._signature(path, ends, scope)}"

    def _linked(self, link: str, path: str, address: str, how: str) -> Caller:
        """Who comes by this link. Raises Unauthorized."""
        parts = _LINK.fullmatch(link)
        if parts is None:
            raise Unauthorized("The link's signature is not right.", hint="Ask for a new link.")
        ends, scope, length = int(parts["ends"]), Scope(int(parts["scope"])), int(parts["length"])
        # The link says how much of the path it was made for, so that one signature is worked out and not one for each
        # folder above.
        signed = path[:length]
        right = hmac.compare_digest(parts["signature"].encode(), self._signature(signed, ends, scope).encode())
        is_above = len(signed) > 1 and signed.endswith("/")
        if not right or not (is_above or signed == path):
            raise Unauthorized("The link's signature is not right.", hint="Ask for a new link.")
        if ends < time.time():
            raise Unauthorized("The link has ended.", hint="Ask for a new link.")
        return Caller("link", scope, address, how, ends, signed if is_above else "")

    def _signature(self, path: str, ends: int, scope: Scope) -> str:
        # A path may be any text that a request brings: halves of characters too.
        signed = hmac.digest(self.key, f"{ends} {scope:d} {path}".encode(errors="surrogatepass"), "sha256")
        return base64.urlsafe_b64encode(signed).decode().rstrip("=")

    # -- names --------------------------------------------------------------------------------------------------

    def knows_host(self, host: str) -> bool:
        """Whether a request for this Host is meant for us. A page whose name was made to point here has another; what
        names nobody is no browser's."""
        if not host:
            return True
        name = _host_name(host.rsplit("@", 1)[-1])
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.hosts or name.endswith(OURS_ALONE)
        return True


def access_of(settings: Settings, environ: Mapping[str, str]) -> Access:
    """The rules that the settings and the credentials of the service give. Blocks. Raises SettingsError: also where
    others could use the daemon and nothing was said about who may."""
    given = settings.token.get_secret_value().strip()
    tokens = (
        *([_token("ENVD_TOKEN", given, "admin", "ENVD_TOKEN")] if given else ()),
        *(_tokens_in(settings.token_file) if settings.token_file else ()),
        *_credentials(environ),
    )
    allowed = tuple(_networks(settings.allow, "ENVD_ALLOW"))
    local = is_loopback(settings.host)
    if not local and not (tokens or allowed or settings.insecure):
        raise SettingsError(
            f"ENVD_HOST={settings.host} lets others reach this daemon, and everybody who can may run programs on its "
            "desktops.",
            hint="Set ENVD_TOKEN (openssl rand -hex 32) and give it to your clients, or ENVD_ALLOW=10.0.0.0/8 for "
            "clients that cannot send one, or ENVD_INSECURE=1.",
        )
    return Access(
        tokens=tokens,
        allowed=allowed,
        proxies=tuple(_networks(settings.proxies, "ENVD_PROXIES")),
        hosts=_names(settings),
        open=settings.insecure,
        local=not tokens,
    )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _names(settings: Settings) -> frozenset[str]:
    own = socket.gethostname()
    names = frozenset(map(_host_name, ("localhost", own, own.partition(".")[0], settings.host, *settings.hosts)))
    if odd := [name for name in names if "*" in name]:
        raise SettingsError(f"ENVD_HOSTS={odd[0]}: names are given in full.")
    return names


def _host_name(host: str) -> str:
    """Without the port, in lower case."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.rstrip(".").lower()


def _networks(words: Sequence[str], setting: str) -> list[Network]:
    found: list[Network] = []
    for word in words:
        try:
            network = ipaddress.ip_network(word)
        except ValueError as error:
            raise SettingsError(f"{setting}={word}: {error}.", hint="Such as 10.100.4.0/24 or 10.100.4.17.") from error
        if network.prefixlen == 0:
            raise SettingsError(
                f"{setting}={word} is everybody.", hint="Name the networks; or ENVD_INSECURE=1, if everybody is meant."
            )
        found.append(network)
    return found


def _credentials(environ: Mapping[str, str]) -> tuple[Token, ...]:
    directory = environ.get("CREDENTIALS_DIRECTORY")
    path = Path(directory, CREDENTIAL) if directory else None
    return _tokens_in(path) if path is not None and path.exists() else ()


def _tokens_in(path: Path) -> tuple[Token, ...]:
    """One to a line: `TOKEN`, or `NAME SCOPE TOKEN`; what begins with # is a comment.

    Raises SettingsError, which does not name a file that cannot be opened: it may be a token, given by mistake.
    """
    try:
        status = path.stat()
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SettingsError(f"The file that ENVD_TOKEN_FILE names cannot be read: {why}.") from None
    if status.st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise SettingsError(f"Everybody on this host can read or write the tokens in {path}.", hint=f"chmod 600 {path}")
    found = []
    for number, line in enumerate(lines, start=1):
        words = re.sub(r"(^|\s)#.*", "", line).strip()
        if not words:
            continue
        where = f"{path} line {number}"
        match = _LINE.fullmatch(words)
        if match is None:
            raise SettingsError(
                f"{where} is neither `TOKEN` nor `NAME SCOPE TOKEN`.", hint="Scopes: read, play, admin."
            )
        found.append(_token(match["name"] or f"{path.name}:{number}", match["token"], match["scope"] or "admin", where))
    if not found:
        raise SettingsError(f"There is no token in {path}.", hint="One to a line, of `openssl rand -hex 32`.")
    return tuple(found)


def _token(name: str, token: str, scope: str, where: str) -> Token:
    """Raises SettingsError, which never holds the token."""
    if len(token) < SHORTEST or not re.fullmatch(r"[!-~]+", token):
        raise SettingsError(
            f"{where}: a token has at least {SHORTEST} ASCII characters, without blanks.", hint="openssl rand -hex 32"
        )
    return Token(name, Scope[scope.upper()], hashlib.sha256(token.encode()).digest())


def _without_port(hop: str) -> str:
    """Of an address as proxies write it: some add the port."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop


def _address(text: str) -> Address:
    """Raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address
