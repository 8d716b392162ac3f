"""The daemon's own image: built as its guide says, run by its compose file."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import anyio
import pytest
from service_host import LABEL, ROOT, ServiceHost, base, docker, service_host
from test_tunnel import free_port, plays

CONTAINER = ROOT / "deploy" / "container"
UID = 10001
SOCKET = Path("/var/run/docker.sock")
PINNED = """
ARG BASE
FROM $BASE
COPY wheels /wheels
RUN printf '[global]\\nno-index = true\\nfind-links = /wheels\\n' >/etc/pip.conf
"""
"""The base with Python packages in it, for where the index is reached by this machine's pip alone."""

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]


def built(name: str, context: bytes | Path, *arguments: str) -> str:
    """A context is a folder, or an archive of one. The image's name."""
    command = ["docker", "build", "--network", "host", "--label", f"{LABEL}=container", "--tag", name, *arguments]
    archive = context if isinstance(context, bytes) else None
    where = "-" if isinstance(context, bytes) else str(context)
    done = subprocess.run(
        [*command, where], input=archive, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout.decode()[-3000:]
    return name


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not base():
        pytest.skip("docker: no image debian:bookworm-slim or envd/base:bookworm; `make images` makes one")
    folder = tmp_path_factory.mktemp("base")
    (folder / "wheels").mkdir()
    with service_host("--volume", f"{folder}/wheels:/wheels", systemd=False) as builder:
        builder.run("apt-get update -q && apt-get install -qy --no-install-recommends python3-venv", timeout=200)
        wanted = "'/src[aws,docker,qemu]' hatchling"
        builder.run("python3 -m venv /venv && /venv/bin/pip install --quiet wheel", timeout=100)
        builder.run(f"/venv/bin/pip wheel --quiet -w /wheels -c /src/constraints.txt {wanted}", timeout=300)
        builder.run("rm /wheels/envd_server-*")
    (folder / "Dockerfile").write_text(PINNED)
    pinned = built("envd/test-pinned", folder, "--build-arg", f"BASE={base()}")
    context = subprocess.run(
        ["bash", "-c", command_of_guide("tar")], cwd=ROOT, capture_output=True, check=True, timeout=60
    ).stdout
    name = built("envd/test-daemon", context, "--file", "deploy/container/Dockerfile", "--build-arg", f"BASE={pinned}")
    yield name
    docker("image", "rm", name, pinned, check=False)


def command_of_guide(program: str) -> str:
    """The part of the guide's command that is run before the pipe."""
    [line] = re.findall(rf"(?m)^({program} .*?) \| docker build ", (CONTAINER / "README.md").read_text())
    assert isinstance(line, str)
    return line


@dataclass
class Composed:
    host: ServiceHost
    environment: dict[str, str]
    folder: Path

    def compose(self, *arguments: str) -> str:
        """By the program of Debian 12, in a container of its own that speaks to this host's engine."""
        given = " ".join(f"{name}='{value}'" for name, value in self.environment.items())
        return self.host.run(f"cd {self.folder} && {given} docker-compose {' '.join(arguments)}", timeout=200)


@contextmanager
def composed(folder: Path, image: str, **more: str) -> Iterator[Composed]:
    """What the guide has done before `docker compose up`."""
    folder.chmod(0o755)
    for name in ("state", "cache"):
        (folder / name).mkdir()
    tokens = folder / "tokens"
    tokens.write_text(f"admin admin {secrets.token_hex(32)}\n")
    (folder / "compose.yaml").write_bytes((CONTAINER / "compose.yaml").read_bytes())
    environment = {
        "ENVD_IMAGE": image,
        "DOCKER_GROUP": str(SOCKET.stat().st_gid),
        "ENVD_PORT": str(free_port()),
        "ENVD_STATE": str(folder / "state"),
        "ENVD_CACHE": str(folder / "cache"),
        "ENVD_TOKENS": str(tokens),
        "COMPOSE_FILE": "compose.yaml",
        "COMPOSE_PROJECT_NAME": f"envd-test-{secrets.token_hex(3)}",
    }
    mounts = ("--volume", f"{SOCKET}:{SOCKET}", "--volume", f"{folder}:{folder}")
    with service_host(*mounts, systemd=False) as host:
        host.run("apt-get update -q && apt-get install -qy --no-install-recommends docker-compose", timeout=300)
        # By somebody who may: the numbers are of the image, and nobody's here.
        host.run(f"cd {folder} && chown {UID}:{UID} state cache tokens && chmod 700 state && chmod 600 tokens")
        made = Composed(host, environment | more, folder)
        try:
            yield made
        finally:
            made.compose("down --timeout 20")
            owner = (folder / "state" / "daemon-id").read_text().strip() if os.geteuid() == 0 else ""
            if owner:
                for each in docker("ps", "--all", "--quiet", "--filter", f"label=io.envd.daemon={owner}").split():
                    docker("rm", "--force", "--volumes", each)
            host.run(f"chown -R {os.getuid()}:{os.getgid()} {folder}")


async def healthy(container: str) -> None:
    with anyio.fail_after(60):
        while True:
            told = json.loads(docker("inspect", "--format", "{{json .State}}", container))
            if told.get("Health", {}).get("Status") == "healthy":
                return
            assert told["Status"] == "running", docker("logs", container)
            await anyio.sleep(0.2)


def session(token: str) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {token}"}
    return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=60))


async def test_the_composed_daemon_plays_on_docker_desktops_and_keeps_them(tmp_path: Path, image: str) -> None:
    with composed(tmp_path, image) as made:
        made.compose("up --detach")
        [container] = made.compose("ps --quiet").split()
        await healthy(container)
        url = f"http://127.0.0.1:{made.environment['ENVD_PORT']}"
        token = made.host.run(f"cut -d ' ' -f 3 {made.environment['ENVD_TOKENS']}").strip()
        async with session(token) as http:
            await plays(http, url)
            # Another image, say: the container is made anew, and the desktop played on.
            made.compose("up --detach --force-recreate")
            [again] = made.compose("ps --quiet").split()
            assert again != container
            await healthy(again)
            async with http.post(f"{url}/v1/envs/0/step", json={"actions": ["pyautogui.click(30, 40)"]}) as answer:
                assert answer.status == 200, await answer.text()


async def test_it_needs_no_root_and_no_engine_for_sim_desktops(image: str) -> None:
    """And is reached by a port that is published."""
    name, token = f"envd-test-{secrets.token_hex(4)}", secrets.token_hex(32)
    options = ("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--read-only", "--tmpfs", "/tmp")
    state = ("--volume", f"{name}:/var/lib/envd")
    settings = ("--env", "PROVIDER=sim", "--env", f"ENVD_TOKEN={token}")
    docker("run", "--detach", "--name", name, "--publish", "127.0.0.1::15001", *options, *state, *settings, image)
    try:
        await healthy(name)
        port = docker("port", name, "15001/tcp").strip().rpartition(":")[2]
        async with session(token) as http:
            await plays(http, f"http://127.0.0.1:{port}")
        assert docker("exec", name, "id", "-u").strip() == str(UID)
        docker("stop", "--time", "20", name)
        assert docker("inspect", "--format", "{{.State.ExitCode}}", name).strip() == "0"
    finally:
        docker("rm", "--force", "--volumes", name)
        docker("volume", "rm", "--force", name)


async def test_it_does_not_listen_for_everybody_without_a_token(image: str) -> None:
    said = docker("run", "--rm", "--env", "PROVIDER=sim", image, check=False)
    assert "ENVD_HOST=0.0.0.0 lets others reach this daemon" in said


async def test_one_that_hangs_is_unhealthy(image: str) -> None:
    name = f"envd-test-{secrets.token_hex(4)}"
    settings = ("--env", "PROVIDER=sim", "--env", f"ENVD_TOKEN={secrets.token_hex(32)}")
    docker("run", "--detach", "--name", name, *settings, "--init", image)
    try:
        await healthy(name)
        check = ("exec", name, "/opt/envd/venv/bin/python", "-I", "/usr/local/lib/envd/healthcheck.py")
        assert docker(*check) == ""
        docker("exec", name, "bash", "-c", "kill -STOP $(cat /var/lib/envd/lock)")
        assert "timed out" in docker(*check, check=False)
    finally:
        docker("rm", "--force", "--volumes", name)


def test_the_image_has_what_is_named_and_nothing_else(image: str) -> None:
    """What the two ways to build send: the archive of the guide, and the folder but for what is ignored."""
    ignored = (CONTAINER / "Dockerfile.dockerignore").read_text().splitlines()
    sent = command_of_guide("tar").split("tar -c ")[1].split()
    listed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert {each for each in sent if each != "deploy/container"} == listed - {"deploy/container/healthcheck.py"}
    assert docker("run", "--rm", "--entrypoint", "ls", image, "/src", check=False).startswith("ls: cannot access")
