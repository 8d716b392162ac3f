"""Where this host can be reached, and who listens on its ports: by /proc and the interfaces alone, asking nobody."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass, replace

import psutil

LONGEST_COMMAND = 120
"""Characters of a command line that are told."""
ANY = {"0.0.0.0": (socket.AF_INET,), "::": (socket.AF_INET6, socket.AF_INET)}
"""Addresses that stand for all of a host's. Linux has IPv4 connections come to `::` as well."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who listens on a port. `pid` is None where the system does not tell this user."""

    pid: int | None
    command: str
    address: str

    @property
    def is_envd(self) -> bool:
        """As far as its command line tells."""
        return re.search(r"\benvd\.asgi\b|\benvd\b.*\bserve\b", self.command) is not None

    def __str__(self) -> str:
        if self.pid is None:
            return "a process that this user may not look at"
        return f"process {self.pid} ({self.command})" if self.command else f"process {self.pid}"


def holder_of(port: int, host: str = "") -> Holder | None:
    """Who listens there, so that `host` (an address; empty is any) could not be listened on. None where nobody is
    seen: it may be in another network namespace. Blocks."""
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    rivals = [
        Holder(one.pid, "", one.laddr.ip)
        for one in connections
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and _collide(one.laddr.ip, host)
    ]
    for one in sorted(rivals, key=lambda one: one.pid is None):
        return replace(one, command=command_of(one.pid))
    return None


def command_of(pid: int | None) -> str:
    """A process's command line, without line breaks; empty where it cannot be seen. Blocks."""
    if pid is None:
        return ""
    try:
        words = psutil.Process(pid).cmdline() or [psutil.Process(pid).name()]
    except (psutil.Error, OSError):
        return ""
    told = " ".join(" ".join(words).split())
    return told if len(told) <= LONGEST_COMMAND else f"{told[: LONGEST_COMMAND - 1]}…"


def urls(host: str, port: int, scheme: str = "http") -> list[str]:
    """Every URL at which a listener on the address `host` is reached: one, or one for each address of this host."""
    addresses = interface_addresses(ANY[host]) if host in ANY else [host]
    return [f"{scheme}://{_in_url(address)}:{port}" for address in addresses]


def interface_addresses(families: tuple[int, ...] = (socket.AF_INET,)) -> list[str]:
    """This host's: the loopback's first, then those that others may reach. Without those that are good on one link
    alone, and those of bridges to containers."""
    found = [
        ipaddress.ip_address(entry.address.partition("%")[0])
        for name, entries in psutil.net_if_addrs().items()
        if not re.match(r"docker|br-|veth|virbr", name)
        for entry in entries
        if entry.family in families
    ]
    told = [address for address in dict.fromkeys(found) if not address.is_link_local]
    return [str(address) for address in sorted(told, key=lambda one: (not one.is_loopback, one.version))]


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _collide(taken: str, wanted: str) -> bool:
    """Whether a listener on the one address keeps another from the other."""
    return not wanted or taken == wanted or taken in ANY or wanted in ANY or taken == f"::ffff:{wanted}"
