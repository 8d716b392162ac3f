"""What must differ between clones of one template, and the clock, which stands where it stood when that was frozen.

Our own guests have a helper that waits at a virtio port for one line of JSON and answers with another; a guest without
it is told by a shell command through its guest server, as the user whose password is known.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import secrets
import shlex
import socket
import time
from pathlib import Path
from typing import Any, Literal

import anyio

from ..errors import GuestMisbehaved, InfraError
from ..guest import Guest

How = Literal["helper", "command", "none"]
"""The way to tell a guest: found out once per template."""

SECONDS = 30.0
"""A clone that was not told by then has failed. In an emulated guest on a busy host it takes parts of a second."""

HELPER_SECONDS = 20.0
"""A guest that is at rest and does not answer by then has no helper."""

_LONGEST_ANSWER = 64 * 1024


def new_identity(instance_id: str) -> dict[str, Any]:
    """Of the instance with this id: what depends on nothing but it is the same whenever it is asked for."""
    digest = hashlib.sha256(instance_id.encode()).hexdigest()
    return {
        "hostname": f"desktop-{digest[:8]}",
        "machine_id": digest[:32],
        "mac": "52:54:00:" + ":".join(digest[index : index + 2] for index in (32, 34, 36)),
        "seed": base64.b64encode(secrets.token_bytes(64)).decode(),
        "ssh": True,
    }


async def has_helper(run: Path) -> bool:
    """Whether the guest of the machine whose /run/vm is `run` has the helper, and it answers."""
    try:
        await _ask_helper(run, {}, timeout=HELPER_SECONDS)
    except InfraError:
        return False
    return True


async def give_identity(how: How, run: Path, guest: Guest, instance_id: str, password: str) -> None:
    """Set the guest's clock and all that must differ. Raises InfraError (GuestUnreachable, GuestMisbehaved)."""
    identity = new_identity(instance_id)
    if how == "helper":
        answer = await _ask_helper(run, {"time": time.time(), **identity}, timeout=SECONDS)
        if answer.get("ok") is not True:
            raise GuestMisbehaved(f"The clone did not take its identity: {str(answer.get('error'))[:300]}")
    elif how == "command":
        try:
            done = await guest.execute(_command(identity, password), shell=True, timeout=SECONDS)
        except GuestMisbehaved as error:
            # What a guest says of a command that took too long is the command itself.
            said = error.detail.replace(shlex.quote(password), "…")
            raise GuestMisbehaved(f"The clone did not take its identity: {said[:300]}") from None
        if done.returncode:
            raise GuestMisbehaved(f"The clone did not take its identity: {done.stderr.strip()[:300]}")


def _command(identity: dict[str, Any], password: str) -> str:
    """For a guest without the helper. Its address stays: a link that goes down would take this answer with it."""
    script = f"""
date -s @{time.time():.3f} >/dev/null || exit 1
hostname {identity["hostname"]} && echo {identity["hostname"]} >/etc/hostname
echo {identity["machine_id"]} >/etc/machine-id
[ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ] && cp /etc/machine-id /var/lib/dbus/machine-id
echo {identity["seed"]} | base64 -d >/dev/urandom
if ls /etc/ssh/ssh_host_*_key >/dev/null 2>&1; then rm -f /etc/ssh/ssh_host_*; ssh-keygen -A >/dev/null 2>&1; fi
exit 0"""
    return f"printf '%s\\n' {shlex.quote(password)} | sudo -S -p '' sh -c {shlex.quote(script)}"


async def _ask_helper(run: Path, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Raises GuestMisbehaved, also for silence: the port takes what is written whether or not anybody reads it."""
    try:
        with anyio.fail_after(timeout):
            with anyio.CancelScope(shield=True):  # takes no time, and half of it could not be closed
                sock = await anyio.to_thread.run_sync(open_identity, run)
                reader, writer = await asyncio.open_connection(sock=sock, limit=_LONGEST_ANSWER)
            with contextlib.closing(writer):
                writer.write(json.dumps(request).encode() + b"\n")
                await writer.drain()
                answer = json.loads(await reader.readuntil(b"\n"))
    except TimeoutError as error:
        raise GuestMisbehaved(f"The guest's identity helper did not answer within {timeout:g} s.") from error
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise GuestMisbehaved(f"The guest's identity helper cannot be spoken to: {error}.") from error
    if not isinstance(answer, dict):
        raise GuestMisbehaved(f"The guest's identity helper answered {str(answer)[:200]}.")
    return answer


def open_identity(run: Path) -> socket.socket:
    """A connection to the machine's identity port. By the directory's descriptor: a socket's path may have 107 bytes
    only (unix(7)). Blocks. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        directory = os.open(run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{directory}/identity.sock")
        finally:
            os.close(directory)
    except BaseException:
        sock.close()
        raise
    return sock
