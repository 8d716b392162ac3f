"""The machine's network, by system calls: processes that would do it cost tens of milliseconds each when emulated.

QEMU's user network gives every machine the same address; where its router does not answer, DHCP is asked.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Say = Callable[[str], None]

INTERFACE = "eth0"
ADDRESS, NETMASK, ROUTER = "10.0.2.15", "255.255.255.0", "10.0.2.2"
ROUTER_SECONDS = 5.0

# linux/sockios.h, linux/if.h, linux/route.h
_SIOCADDRT, _SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x890B, 0x8913, 0x8914
_SIOCSIFADDR, _SIOCSIFNETMASK = 0x8916, 0x891C
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_RTF_UP, _RTF_GATEWAY = 0x1, 0x2
_DHCP_SCRIPT = "/opt/envd/lib/dhcp.sh"


def up(say: Say) -> None:
    """Loopback and the first Ethernet card. In the background, DHCP if the router is not where QEMU has it."""
    with _control() as control:
        _address(control, "lo", "127.0.0.1", "255.0.0.0")
        if not os.path.exists(f"/sys/class/net/{INTERFACE}"):
            say("network: there is no eth0")
            return
        with open(f"/proc/sys/net/ipv4/conf/{INTERFACE}/arp_notify", "w") as file:
            file.write("1")  # others are told of a new hardware address at once
        _address(control, INTERFACE, ADDRESS, NETMASK)
        _default_route(control, ROUTER)
    threading.Thread(target=_ask_dhcp_if_alone, args=(say,), daemon=True).start()


def _control() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def _address(control: socket.socket, interface: str, address: str, netmask: str) -> None:
    for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, netmask)):
        fcntl.ioctl(control, request, struct.pack("16s16s", interface.encode(), _sockaddr(value)))
    _set_flags(control, interface, _flags(control, interface) | _IFF_UP | _IFF_RUNNING)


def _default_route(control: socket.socket, router: str) -> None:
    """struct rtentry: padding, destination, gateway, mask, flags, and nothing for the rest."""
    anywhere = _sockaddr("0.0.0.0")
    entry = struct.pack("Q16s16s16sH62x", 0, anywhere, _sockaddr(router), anywhere, _RTF_UP | _RTF_GATEWAY)
    try:
        fcntl.ioctl(control, _SIOCADDRT, entry)
    except FileExistsError:
        pass


def _flags(control: socket.socket, interface: str) -> int:
    answer = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH14x", interface.encode(), 0))
    flags: int = struct.unpack("16sH14x", answer)[1]
    return flags


def _set_flags(control: socket.socket, interface: str, flags: int) -> None:
    fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", interface.encode(), flags))


def _sockaddr(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def _ask_dhcp_if_alone(say: Say) -> None:
    with _control() as control:
        deadline = time.monotonic() + ROUTER_SECONDS
        while time.monotonic() < deadline:
            try:
                control.sendto(b"", (ROUTER, 9))  # any packet: what counts is that its hardware address is asked for
            except OSError:
                pass
            time.sleep(0.5)
            with open("/proc/net/arp") as file:
                if any(line.startswith(ROUTER + " ") and " 0x2 " in line for line in file):
                    return
    say(f"network: no router at {ROUTER}; asking DHCP")
    command = ["busybox", "udhcpc", "-i", INTERFACE, "-s", _DHCP_SCRIPT, "-b", "-S"]
    os.posix_spawn("/bin/busybox", command, {"PATH": "/usr/sbin:/usr/bin"})
