"""Under which addresses a listener can be reached, for the line that says where the daemon listens."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

SIOCGIFADDR = 0x8915
"""Asks Linux for the IPv4 address of an interface."""


def reached_at(listener: socket.socket, scheme: str = "http") -> list[str]:
    """The URLs, this machine's name first; empty if it is reached from this machine alone. IPv4 addresses where it
    listens on all of them: others are under the name."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_loopback:
        return []
    if not address.is_unspecified:
        return [f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"]
    return [f"{scheme}://{name}:{port}" for name in (socket.gethostname(), *_own_addresses())]


def _own_addresses() -> list[str]:
    """IPv4, without loopback and what is local to a link."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has none
            address = ipaddress.IPv4Address(answer[20:24])
            if not (address.is_loopback or address.is_link_local):
                found.append(str(address))
    return found
