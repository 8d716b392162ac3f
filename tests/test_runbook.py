"""The runbook: every command in it is run, or says visibly why not.

A comment behind each block tells how it is run:

    run: trainer          by a shell of this machine, against a daemon with sim desktops
    run: host             by root, where the installer has made a service of it (a container with systemd)
    run: nowhere          with an address that nobody has
    run: first            before each of the others, in the same shell
    for: SECONDS          it goes on until it is stopped; else it has to end well
    fails                 it has to fail
    shows: WORDS          what it prints has these words
    playing; after: …     what is the case before: an episode; a crash, a reset, a change
    not run: REASON       and the line behind it tells the reader so

In the blocks HOST is this host, 15001 the port that the daemon has here, and … a token.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from daemon_process import daemon, ended_job, reset
from service_host import ROOT, ServiceHost, base, docker, service_host
from serving import eventually
from test_install import INSTALL, SOCKET, becomes_ready, docker_command
from test_tunnel import free_port, plays

RUNBOOK = ROOT / "deploy" / "RUNBOOK.md"
TOKEN = "a-token-of-the-runbook"
NOBODY = "192.0.2.1"
"""Of a network that is for examples alone (RFC 5737)."""
TOOLS = "curl iproute2 openssl sudo procps"
"""What the commands need of Debian."""
_BLOCK = re.compile(r"```(\w*)\n(.*?)\n```\n(?:<!-- (.*?) -->\n)?([^\n]*)", re.DOTALL)
WITHIN = 60


@dataclass(frozen=True)
class Block:
    """`where` is empty for one that is not run."""

    heading: str
    language: str
    text: str
    told: str
    behind: str

    @property
    def facts(self) -> dict[str, str]:
        parts = [part.partition(":") for part in self.told.split("; ")] if not self.told.startswith("not run") else []
        return {name.strip(): value.strip() for name, _, value in parts}

    @property
    def where(self) -> str:
        return self.facts.get("run", "")

    def script(self, url: str, token: str) -> str:
        address, _, port = url.removeprefix("http://").rpartition(":")
        text = "\n".join(block.text for block in BLOCKS if block.where == "first") + "\n" + self.text
        return "set -euo pipefail\n" + text.replace("HOST", address).replace("15001", port).replace("…", token)


def blocks() -> list[Block]:
    text, found = RUNBOOK.read_text(), []
    for match in _BLOCK.finditer(text):
        heading = re.findall(r"(?m)^#+ (.*)", text[: match.start()])[-1]
        found.append(Block(heading, match[1], match[2], match[3] or "", match[4]))
    assert len(found) == text.count("```") // 2
    return found


BLOCKS = blocks()


def those(where: str) -> list[object]:
    return [
        pytest.param(block, id=f"{number}: {block.heading}")
        for number, block in enumerate(BLOCKS)
        if block.where == where
    ]


@pytest.mark.parametrize("block", [pytest.param(block, id=block.heading) for block in BLOCKS])
def test_every_block_is_run_or_says_why_not(block: Block) -> None:
    assert block.language == "sh"
    if block.told.startswith("not run: "):
        assert len(block.told) > len("not run: ")
        assert re.match(r"\*\(Not run .*by our tests", block.behind), "a reader is not told"
    else:
        assert block.where in ("trainer", "host", "nowhere", "first"), f"nothing says how it is run: {block.text}"
        assert set(block.facts) <= {"run", "for", "fails", "shows", "playing", "after"}


# -- on a trainer's node ------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with our command in it, of the code beside the tests."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "envd"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m envd "$@"\n')
    program.chmod(0o755)
    return folder


async def ran(block: Block, url: str, folder: Path) -> None:
    """By a shell, with what the comment behind it promises."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("ENVD_")}
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", block.script(url, TOKEN)),
        cwd=folder,
        env=mine | {"PATH": f"{folder}/bin:{os.environ['PATH']}"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    reading = asyncio.create_task(process.communicate())
    done, _ = await asyncio.wait([reading], timeout=float(block.facts.get("for", WITHIN)))
    went_on = not done
    if went_on:
        os.killpg(process.pid, 15)
    said = (await reading)[0].decode(errors="replace")
    assert process.returncode is not None
    assert went_on is ("for" in block.facts), said
    if not went_on:
        assert (process.returncode != 0) is ("fails" in block.facts), said
    shown(block, said)


def shown(block: Block, said: str) -> None:
    """Blanks between a name and its value are the server's own business."""

    def compact(text: str) -> str:
        return text.replace('": ', '":')

    assert compact(block.facts.get("shows", "")) in compact(said), said


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("block", those("trainer"))
async def test_it_can_be_run_on_a_trainers_node(block: Block, tmp_path: Path) -> None:
    settings = {"ENVD_TOKEN": TOKEN, "ENVD_SIM": "vnc"}
    async with daemon(tmp_path / "state", env=settings) as (running, session):
        session.headers["Authorization"] = f"Bearer {TOKEN}"
        if "playing" in block.facts:
            await ended_job(session, running.url, (await reset(session, running.url))["id"])
        await ran(block, running.url, tmp_path)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("block", those("nowhere"))
async def test_it_can_be_run_where_nobody_answers(block: Block, tmp_path: Path) -> None:
    await ran(block, f"http://{NOBODY}:15001", tmp_path)


# -- on the host --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host() -> Iterator[tuple[ServiceHost, str]]:
    """As the installer leaves one, with sim desktops; and its URL."""
    if not base():
        pytest.skip("docker: no image debian:bookworm-slim or envd/base:bookworm; `make images` makes one")
    port = free_port()
    engine = ("--volume", f"{SOCKET}:{SOCKET}", "--volume", f"{docker_command()}:/usr/bin/docker:ro")
    with service_host(*engine) as made:
        if made.why_no_systemd:
            pytest.skip(made.why_no_systemd)
        made.run(f"apt-get update -q && apt-get install -qy --no-install-recommends {TOOLS}", timeout=200)
        made.run(f"{INSTALL} --provider sim --host 127.0.0.1 --port {port}", timeout=400)
        yield made, f"http://127.0.0.1:{port}"


@asynccontextmanager
async def asking(host: ServiceHost) -> AsyncIterator[aiohttp.ClientSession]:
    token = host.run("sed -n 's/^admin admin //p' /etc/envd/tokens").strip()
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


async def serves(host: ServiceHost, url: str) -> None:
    """Once it is ready, whatever the block before did; a drained one is started."""
    deadline = time.monotonic() + WITHIN
    while "active" not in host.run("systemctl is-active envd", check=False).split():
        host.run("systemctl start envd", check=False)
        assert time.monotonic() < deadline
    async with aiohttp.ClientSession() as session:
        await becomes_ready(session, url)


@pytest.mark.docker
@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", those("host"))
async def test_it_can_be_run_on_the_host(block: Block, host: tuple[ServiceHost, str]) -> None:
    """They go on from one another, as they stand there."""
    made, url = host
    before = block.facts.get("after", "")
    if block.text != "sudo deploy/install.sh":
        await serves(made, url)
    async with asking(made) as session:
        if before in ("reset", "change"):
            await plays(session, url)
        if before == "crash":
            made.run("kill -KILL $(systemctl show -p MainPID --value envd)")
            await _again(made, url)
    token = "$(sed -n 's/^admin admin //p' /etc/envd/tokens)"
    script = f"cd /src; {block.script(url, token)}"
    if seconds := block.facts.get("for"):
        said = docker("exec", made.name, "timeout", seconds, "bash", "-c", script, check=False)
    else:
        said = made.run(script, timeout=300)
    shown(block, said)


async def _again(host: ServiceHost, url: str) -> None:
    """Once systemd has started it again."""
    await eventually(lambda: host.run("systemctl show -p NRestarts --value envd").strip() != "0", WITHIN)
    await serves(host, url)
