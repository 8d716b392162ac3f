"""Where a host is reached, who holds its ports, and what the daemon says of both when it starts, or cannot."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon_process import daemon, environment

from envd.access import Access
from envd.daemon import address_in_use, bound, for_others, welcome
from envd.errors import AddressInUse
from envd.network import Holder, holder_of, interface_addresses, urls

TOKEN = "t" * 32
LISTEN = """
import socket, sys
made = socket.create_server((sys.argv[1], 0))
print(made.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def listener(host: str = "127.0.0.1") -> Iterator[tuple[int, int]]:
    """Process and port of another program that listens."""
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN, host], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.pid, int(process.stdout.readline())
        process.stdin.close()


def test_the_holder_of_a_port_is_found_with_its_command() -> None:
    with listener() as (pid, port):
        found = holder_of(port, "127.0.0.1")
    assert found is not None
    assert (found.pid, found.address, found.is_envd) == (pid, "127.0.0.1", False)
    assert found.command.startswith(f"{sys.executable} -c import socket")
    assert "\n" not in found.command


@pytest.mark.parametrize(
    ("theirs", "mine", "collide"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("127.0.0.1", "127.0.0.2", False),
    ],
)
def test_only_who_is_in_the_way_holds_a_port(theirs: str, mine: str, collide: bool) -> None:
    with listener(theirs) as (_, port):
        assert (holder_of(port, mine) is not None) is collide


def test_of_a_port_that_is_free_there_is_no_holder() -> None:
    with bound("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    assert holder_of(port) is None


@pytest.mark.parametrize(
    ("command", "is_envd"),
    [
        ("/x/.venv/bin/python -m envd serve", True),
        ("/x/bin/envd serve --port 1", True),
        ("hypercorn envd.asgi:app", True),
        ("/usr/bin/envdump serve", False),
        ("python -m http.server", False),
    ],
)
def test_another_envd_is_known_by_its_command(command: str, is_envd: bool) -> None:
    assert Holder(1, command, "127.0.0.1").is_envd is is_envd


def test_a_port_that_is_taken_names_who_has_it() -> None:
    with listener() as (pid, port), pytest.raises(AddressInUse) as caught, bound("127.0.0.1", port):
        pass
    assert f"Another program already listens on 127.0.0.1:{port}: process {pid} (" in caught.value.detail
    assert f"kill {pid}" in caught.value.hint
    assert (caught.value.facts["pid"], caught.value.facts["is_envd"]) == (pid, False)


def test_who_is_not_seen_is_asked_of_ss() -> None:
    for holder in (None, Holder(None, "", "0.0.0.0")):
        error = address_in_use("127.0.0.1", 15001, holder)
        assert error.detail == "Something already listens on 127.0.0.1:15001."
        assert "sudo ss -ltnp 'sport = :15001'" in error.hint


async def test_a_second_daemon_names_the_first(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state") as (process, _):
        port = process.url.rpartition(":")[2]
        command = [sys.executable, "-m", "envd", "serve", "--port", port]
        second = await asyncio.to_thread(
            lambda: subprocess.run(
                command, env=environment(tmp_path / "other"), cwd=tmp_path, capture_output=True, text=True, timeout=30
            )
        )
    assert second.returncode == 75
    assert f"Another envd already listens on 127.0.0.1:{port}: process {process.pid} (" in second.stderr
    assert f"kill {process.pid}" in second.stderr


def test_an_address_is_one_url_and_all_of_them_are_many() -> None:
    assert urls("127.0.0.1", 15001) == ["http://127.0.0.1:15001"]
    assert urls("::1", 1, "https") == ["https://[::1]:1"]
    every = urls("0.0.0.0", 15001)
    assert every[0] == "http://127.0.0.1:15001"
    assert every == [f"http://{address}:15001" for address in interface_addresses()]
    assert {f"http://{address}:15001" for address in interface_addresses()} <= set(urls("::", 15001))


def test_an_address_that_is_good_on_one_link_is_not_told() -> None:
    found = interface_addresses((socket.AF_INET, socket.AF_INET6))
    assert not [one for one in found if ipaddress.ip_address(one).is_link_local]


async def listening(tmp_path: Path, **settings: str) -> dict[str, dict[str, object]]:
    """What a daemon says when it starts, by event."""
    async with daemon(tmp_path / "state", env=settings) as (process, _):
        return {str(record["event"]): record for record in process.records()}


async def test_on_the_loopback_the_start_says_what_is_missing_for_others(tmp_path: Path) -> None:
    said = await listening(tmp_path)
    url = said["envd is listening"]["url"]
    assert said["envd is listening"]["urls"] == [url]
    assert said["envd is listening"]["dashboard"] == f"{url}/"
    told = said["only this host reaches the daemon"]
    assert told["fix"] == "ENVD_HOST=0.0.0.0 ENVD_TOKEN=$(openssl rand -hex 32)"


async def test_on_every_address_the_start_tells_each_url(tmp_path: Path) -> None:
    said = await listening(tmp_path, ENVD_HOST="0.0.0.0", ENVD_ALLOW="127.0.0.0/8")
    record = said["envd is listening"]
    port = str(record["url"]).rpartition(":")[2]
    assert record["urls"] == urls("0.0.0.0", int(port))
    assert record["dashboard"] == f"http://127.0.0.1:{port}/"
    assert "only this host reaches the daemon" not in said


def test_who_has_a_token_is_not_told_to_make_one() -> None:
    assert for_others(Access(open=True)) == "ENVD_HOST=0.0.0.0"


def test_what_a_person_reads_has_every_url_and_what_is_missing() -> None:
    told = welcome(["https://127.0.0.1:1", "https://10.0.0.7:1"], "")
    assert "    https://127.0.0.1:1/   from this host\n    https://10.0.0.7:1/\n" in told
    assert "Only this host" not in told
    assert "start it with ENVD_HOST=0.0.0.0" in welcome(["http://127.0.0.1:1"], "ENVD_HOST=0.0.0.0")


def test_on_a_terminal_the_urls_are_told_to_be_read(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "envd", "serve", "--port", "0"]
    with subprocess.Popen(
        command, env=environment(tmp_path / "state"), cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        said = b""
        try:
            while b"envd doctor" not in said:
                said += os.read(ours, 65536)  # raises OSError when the process has ended without
        finally:
            process.terminate()
            os.close(ours)
    assert b"    http://127.0.0.1:" in said
    assert b"Only this host reaches it." in said
