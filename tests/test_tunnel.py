"""The tunnel: the unit's own command against a real sshd, with the files that are handed out for the node."""

from __future__ import annotations

import asyncio
import getpass
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from daemon_process import daemon, ended_job, reset
from serving import eventually

TUNNEL = Path(__file__).parent.parent / "deploy" / "tunnel"
UNIT = TUNNEL / "envd-tunnel.service"
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
EXPOSURE = 20
"""Tenths of systemd's points: 10 is a service without any protection."""
WITHIN = 30.0

needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None,
    reason="no sshd or ssh; the Debian package is openssh-server, and deploy/test-servers.sh installs it",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def settings_of_unit() -> dict[str, list[str]]:
    """Its lines by name, as systemd joins them."""
    text = UNIT.read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, is_setting, value = line.partition("=")
        if is_setting and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def command_of_unit(values: Mapping[str, str], key: Path, known_hosts: Path) -> list[str]:
    """Its ExecStart, with what systemd puts in and the host's files where a test has them."""
    unit = settings_of_unit()
    environment = dict(pair.split("=", 1) for pair in shlex.split(unit["Environment"][0])) | dict(values)
    words = []
    for word in unit["ExecStart"][0].split():
        word = re.sub(r"\$\{(\w+)\}", lambda match: environment[match[1]], word)
        words.append(word.replace("%d/key", str(key)).replace("/etc/envd/tunnel-known-hosts", str(known_hosts)))
    return words


class Node:
    """The cluster's node: an sshd of the tests' own user on loopback. `restricted` says how its key is bounded: by the
    line in authorized_keys, or by sshd's configuration."""

    def __init__(self, folder: Path, listen: int, restricted: str) -> None:
        self.port = free_port()
        self.listen = listen
        self.key, self.known_hosts = folder / "key", folder / "known-hosts"
        host_key = folder / "host-key"
        for path in (self.key, host_key):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=20)
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {host_key.with_suffix('.pub').read_text()}")
        public = self.key.with_suffix(".pub").read_text()
        [line] = re.findall(r"(?m)^(restrict,.*) ssh-ed25519 AAAA", (TUNNEL / "README.md").read_text())
        line = line.replace(":15001", f":{listen}")
        (folder / "authorized-keys").write_text(f"{line} {public}" if restricted == "by its line" else public)
        lines = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {host_key}",
            f"AuthorizedKeysFile {folder}/authorized-keys",
            "PidFile none",
            "StrictModes no",  # the folders of tests are in /tmp, where others may write
            "UsePAM no",
            "PermitRootLogin prohibit-password",
        ]
        if restricted == "by sshd":
            ours = (TUNNEL / "sshd-envd.conf").read_text()
            lines.append(ours.replace("envd-tunnel", getpass.getuser()).replace(":15001", f":{listen}"))
        self._config = folder / "sshd_config"
        self._config.write_text("\n".join(lines) + "\n")
        self._log = folder / "sshd.log"
        self._process: asyncio.subprocess.Process | None = None
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # as its unit does

    async def up(self) -> None:
        assert SSHD is not None
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                SSHD, "-D", "-e", "-f", str(self._config), stdout=log, stderr=log, start_new_session=True
            )
        await answers(self.port, self.log)

    def log(self) -> str:
        return self._log.read_text()

    async def down(self) -> None:
        """It and its connections, at once."""
        if self._process is not None and self._process.returncode is None:
            for pid in [*_children(self._process.pid), self._process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            await self._process.wait()

    async def ssh(self, *arguments: str) -> tuple[int, str]:
        """With the tunnel's key: exit code, and what was said."""
        process = await asyncio.create_subprocess_exec(
            *("ssh", "-F", "none", "-i", str(self.key), "-p", str(self.port), "-o", "BatchMode=yes"),
            *("-o", "IdentitiesOnly=yes", "-o", f"UserKnownHostsFile={self.known_hosts}", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await asyncio.wait_for(process.communicate(), WITHIN)
        assert process.returncode is not None
        return process.returncode, said.decode()


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    mine = [int(word) for word in found.stdout.split()]
    return [each for child in mine for each in (*_children(child), child)]


async def answers(port: int, told: Any) -> None:
    """Return once something listens there."""
    try:
        async with asyncio.timeout(WITHIN):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.05)
                    continue
                writer.close()
                return
    except TimeoutError:
        raise AssertionError(f"nothing listens on {port}: {told()}") from None


@asynccontextmanager
async def node(folder: Path, listen: int, restricted: str) -> AsyncIterator[Node]:
    made = Node(folder, listen, restricted)
    await made.up()
    try:
        yield made
    finally:
        await made.down()


class Supervisor:
    """systemd in small: starts the command again whenever it ends, as Restart=always asks for, but sooner."""

    def __init__(self, command: list[str]) -> None:
        assert settings_of_unit()["Restart"] == ["always"]
        self._command = command
        self.process: asyncio.subprocess.Process | None = None
        self.ends = 0

    async def run(self) -> None:
        while True:
            self.process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
            )
            try:
                await self.process.wait()
            except asyncio.CancelledError:
                self.process.kill()
                await self.process.wait()
                raise
            self.ends += 1
            await asyncio.sleep(0.1)


@asynccontextmanager
async def tunnel(to: Node, envd_url: str) -> AsyncIterator[Supervisor]:
    values = {
        "NODE": f"{getpass.getuser()}@127.0.0.1",
        "NODE_PORT": str(to.port),
        "LISTEN": f"127.0.0.1:{to.listen}",
        "ENVD_PORT": envd_url.rpartition(":")[2],
    }
    supervisor = Supervisor(command_of_unit(values, to.key, to.known_hosts))
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def plays(session: aiohttp.ClientSession, url: str) -> None:
    """A whole reset, and a step."""
    job = await ended_job(session, url, (await reset(session, url))["id"])
    assert job["state"] == "succeeded", job
    async with session.post(f"{url}/v1/envs/0/step", json={"actions": ["pyautogui.click(30, 40)"]}) as answer:
        assert answer.status == 200, await answer.text()


@needs_sshd
@pytest.mark.parametrize("restricted", ["by its line", "by sshd"])
async def test_an_episode_is_played_through_it_and_it_comes_back(tmp_path: Path, restricted: str) -> None:
    async with (
        daemon(tmp_path / "state") as (running, session),
        node(tmp_path, free_port(), restricted) as cluster,
        tunnel(cluster, running.url) as supervisor,
    ):
        url = f"http://127.0.0.1:{cluster.listen}"
        await answers(cluster.listen, cluster.log)
        await plays(session, url)

        assert supervisor.process is not None
        supervisor.process.kill()
        await _again(supervisor, 1)
        await answers(cluster.listen, cluster.log)
        await plays(session, url)

        before = supervisor.ends
        await cluster.down()
        await _again(supervisor, before + 1)
        await cluster.up()
        await answers(cluster.listen, cluster.log)
        await plays(session, url)


async def _again(supervisor: Supervisor, ends: int) -> None:
    await eventually(lambda: supervisor.ends >= ends, WITHIN)


@needs_sshd
@pytest.mark.parametrize("restricted", ["by its line", "by sshd"])
async def test_the_key_is_good_for_nothing_else(tmp_path: Path, restricted: str) -> None:
    mark = tmp_path / "mark"
    async with node(tmp_path, free_port(), restricted) as cluster:
        who = f"{getpass.getuser()}@127.0.0.1"
        code, _ = await cluster.ssh(who, f"touch {mark}")
        assert code != 0
        code, said = await cluster.ssh("-tt", who)
        assert code != 0
        assert not mark.exists()

        code, said = await cluster.ssh(
            "-N", "-o", "ExitOnForwardFailure=yes", "-R", f"127.0.0.1:{free_port()}:127.0.0.1:1", who
        )
        assert (code != 0, "remote port forwarding failed" in said) == (True, True), said

        # To a port of the node that does answer: sshd's own.
        code, said = await cluster.ssh("-W", f"127.0.0.1:{cluster.port}", who)
        assert code != 0
        assert "administratively prohibited" in said


@needs_sshd
async def test_an_unrestricted_key_could_do_all_that(tmp_path: Path) -> None:
    """Else the test before would prove nothing."""
    mark = tmp_path / "mark"
    async with node(tmp_path, free_port(), "not at all") as cluster:
        who = f"{getpass.getuser()}@127.0.0.1"
        code, said = await cluster.ssh(who, f"touch {mark}")
        assert (code, mark.exists()) == (0, True), said
        _, said = await cluster.ssh("-W", f"127.0.0.1:{cluster.port}", who)
        assert "SSH-2.0" in said


@needs_sshd
async def test_a_port_that_is_taken_ends_it(tmp_path: Path) -> None:
    """It would be up and reach nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with (
            node(tmp_path, taken.getsockname()[1], "by its line") as cluster,
            tunnel(cluster, "http://127.0.0.1:1") as supervisor,
        ):
            await _again(supervisor, 2)


def test_a_lost_peer_is_noticed_on_both_sides() -> None:
    command = settings_of_unit()["ExecStart"][0]
    ours = [int(number) for number in re.findall(r"ServerAlive\w+=(\d+)", command)]
    theirs = [int(number) for number in re.findall(r"ClientAlive\w+ (\d+)", (TUNNEL / "sshd-envd.conf").read_text())]
    assert ours == theirs == [15, 3]


systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")


@systemd
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    program = tmp_path / "ssh"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={program}", UNIT.read_text()))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False, timeout=60)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if UNIT.name in line]
    assert (done.returncode, ours) == (0, [])


@systemd
def test_the_unit_exposes_little() -> None:
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout[-300:]
