"""The installer on a bare Debian: a container with systemd as its first process, where the service really runs."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from service_host import ROOT, ServiceHost, base, service_host
from test_tunnel import Node, answers, free_port, needs_sshd, node, plays

import envd

INSTALL = "/src/deploy/install.sh"
SOCKET = Path("/var/run/docker.sock")
FILES = """
find /etc/envd /etc/systemd/system /opt/envd /usr/local/bin /var/lib/envd -maxdepth 3 -printf '%p %m %u %T@ %l\n' |
    grep -v -e journal -e __pycache__ | sort
"""
"""What an installation is made of, with modes, owners and times."""
TOKEN = "sed -n 's/^admin admin //p' /etc/envd/tokens"

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]


def docker_command() -> Path:
    """The program of this machine."""
    return Path(str(shutil.which("docker"))).resolve()


@pytest.fixture(scope="module")
def host() -> Iterator[ServiceHost]:
    """One for all tests of this file, which go on from one another."""
    if not base():
        pytest.skip("docker: no image debian:bookworm-slim or envd/base:bookworm; `make images` makes one")
    # As on a host with an engine: its socket, and the command that speaks to it.
    engine = ("--volume", f"{SOCKET}:{SOCKET}", "--volume", f"{docker_command()}:/usr/bin/docker:ro")
    with service_host(*engine) as made:
        if made.why_no_systemd:
            pytest.skip(made.why_no_systemd)
        yield made


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


def installed(host: ServiceHost, *arguments: str) -> str:
    return host.run(f"{INSTALL} {' '.join(arguments)}", timeout=400)


def token_of(host: ServiceHost) -> str:
    return host.run(TOKEN).strip()


def session(host: ServiceHost) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {token_of(host)}"}
    return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=60))


async def test_a_bare_host_becomes_one_that_serves(host: ServiceHost, port: int) -> None:
    said = installed(host, "--provider sim --host 127.0.0.1", f"--port {port}")
    assert "envd runs, and is ready" in said
    assert f"envd doctor --url http://127.0.0.1:{port}" in said
    async with session(host) as http:
        await plays(http, f"http://127.0.0.1:{port}")
    assert host.run("systemctl is-active envd; systemctl is-enabled envd").split() == ["active", "enabled"]
    assert host.run("stat -c %U /proc/$(systemctl show -p MainPID --value envd)").strip() == "envd"
    assert host.run("envd version").strip() == envd.__version__


async def test_who_has_no_token_is_refused_and_it_is_told_nowhere(host: ServiceHost, port: int) -> None:
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/v1/envs") as answer:
        assert answer.status == 401
    token = token_of(host)
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert host.run("stat -c '%a %U' /etc/envd/tokens /etc/envd/envd.env").split() == ["600", "root", "600", "root"]
    everything = host.run("journalctl --no-pager; cat /proc/*/environ /proc/*/cmdline | tr '\\0' '\\n'", check=False)
    assert "envd is listening" in everything
    assert token not in everything


def test_a_second_run_changes_nothing_and_says_so(host: ServiceHost) -> None:
    before = host.run(FILES), host.run("systemctl show -p MainPID envd")
    said = installed(host)
    assert "all is as it should be; nothing was changed" in said
    assert "envd runs, and is ready" in said
    assert (host.run(FILES), host.run("systemctl show -p MainPID envd")) == before


def test_a_settings_file_of_yours_decides(host: ServiceHost) -> None:
    before = host.run("cat /etc/envd/envd.env")
    said = host.fails(f"{INSTALL} --provider aws")
    assert "/etc/envd/envd.env says PROVIDER=sim, and --provider aws was asked for" in said
    assert host.run("cat /etc/envd/envd.env") == before


async def test_an_update_replaces_it_and_keeps_what_is_yours(host: ServiceHost, port: int) -> None:
    def kept() -> str:
        return host.run("cat /etc/envd/envd.env /etc/envd/tokens /var/lib/envd/daemon-id")

    before, jobs = kept(), await _jobs(host, port)
    old = host.run("readlink /opt/envd/venv").strip()
    copied = "envd deploy pyproject.toml constraints.txt README.md LICENSE"
    host.run(f"mkdir -p /root/newer && cd /src && cp -r {copied} /root/newer")
    host.run("sed -i 's/^__version__ = .*/__version__ = \"9.9\"/' /root/newer/envd/__init__.py")
    host.run("sed -i 's/^version = .*/version = \"9.9\"/' /root/newer/pyproject.toml")
    said = host.run("/root/newer/deploy/install.sh", timeout=400)
    assert "stopping the running one" in said
    assert "envd 9.9 is in /opt/envd/venv" in said
    async with session(host) as http, http.get(f"http://127.0.0.1:{port}/version") as answer:
        assert (await answer.json())["version"] == "9.9"
    assert (kept(), await _jobs(host, port)) == (before, jobs)
    # The one before is there still, and the way back is to run its installer.
    assert host.run(f"{old}/bin/envd version").strip() == envd.__version__
    assert "nothing was changed" not in installed(host)
    assert host.run("envd version").strip() == envd.__version__


async def _jobs(host: ServiceHost, port: int) -> list[str]:
    async with session(host) as http, http.get(f"http://127.0.0.1:{port}/v1/jobs") as answer:
        return [job["id"] for job in (await answer.json())["jobs"]]


def test_a_start_that_fails_says_why(host: ServiceHost) -> None:
    host.run("cp /etc/envd/envd.env /root/good && echo ENVD_ENVZ=2 >>/etc/envd/envd.env && systemctl stop envd")
    try:
        said = host.fails(INSTALL)
        assert "ENVD_ENVZ (environment): no such setting, did you mean ENVD_ENVS?" in said
        assert "envd did not start; its last words are above" in said
    finally:
        host.run("cp /root/good /etc/envd/envd.env")
    assert "envd runs, and is ready" in installed(host)


def test_two_at_once_do_not_meet(host: ServiceHost) -> None:
    with_lock = f"flock /run/envd-install.lock {INSTALL} --no-start"
    assert "Another install.sh runs on this host" in host.fails(with_lock)


@needs_sshd
async def test_the_tunnel_runs_as_a_service(host: ServiceHost, port: int, tmp_path: Path) -> None:
    host.run("apt-get update -q && apt-get install -qy --no-install-recommends openssh-client", timeout=120)
    async with node(tmp_path, free_port(), "by its line") as cluster:
        _set_up_tunnel(host, port, cluster)
        host.run("systemctl daemon-reload && systemctl enable --now envd-tunnel")
        try:
            for _ in range(2):
                await answers(cluster.listen, lambda: host.run("journalctl -u envd-tunnel --no-pager"))
                async with session(host) as http:
                    await plays(http, f"http://127.0.0.1:{cluster.listen}")
                await cluster.down()
                await cluster.up()
        finally:
            host.run("systemctl disable --now envd-tunnel")


def _set_up_tunnel(host: ServiceHost, port: int, cluster: Node) -> None:
    """As the guide beside the unit says."""
    unit = (ROOT / "deploy" / "tunnel" / "envd-tunnel.service").read_text()
    host.write("/etc/systemd/system/envd-tunnel.service", unit)
    host.write("/etc/envd/tunnel-key", cluster.key.read_text())
    host.write("/etc/envd/tunnel-known-hosts", cluster.known_hosts.read_text())
    host.write(
        "/etc/envd/tunnel.env",
        f"NODE=root@127.0.0.1\nNODE_PORT={cluster.port}\nLISTEN=127.0.0.1:{cluster.listen}\nENVD_PORT={port}\n",
    )
    host.run("chmod 600 /etc/envd/tunnel-key")


async def test_another_provider_is_had_by_the_settings_file_and_a_second_run(host: ServiceHost, port: int) -> None:
    """local: its packages are installed, and the unit lets its sandboxes be."""
    host.run("sed -i 's/^PROVIDER=.*/PROVIDER=local/' /etc/envd/envd.env")
    said = host.run(INSTALL, timeout=550)
    assert "writing /etc/systemd/system/envd.service.d/provider.conf" in said
    assert "envd runs, and is ready" in said
    async with session(host) as http:
        await plays(http, f"http://127.0.0.1:{port}")


def ours(host: ServiceHost, owner: str) -> list[str]:
    """The containers of its daemon."""
    return host.run(f"docker ps --all --quiet --filter label=io.envd.daemon={owner}").split()


async def test_docker_desktops_outlive_a_restart_of_the_service(host: ServiceHost, port: int) -> None:
    """Through the engine of the host that this one is on."""
    host.run(f"getent group docker || groupadd --gid $(stat -c %g {SOCKET}) docker")
    host.run("sed -i 's/^PROVIDER=.*/PROVIDER=docker/' /etc/envd/envd.env")
    host.run("echo ENVD_DOCKER_IMAGE=envd/desktop >>/etc/envd/envd.env")
    said = installed(host)
    assert "removing /etc/systemd/system/envd.service.d/provider.conf" in said
    assert "envd runs, and is ready" in said
    url, owner = f"http://127.0.0.1:{port}", host.run("cat /var/lib/envd/daemon-id").strip()
    async with session(host) as http:
        await plays(http, url)
        desktops = ours(host, owner)
        assert len(desktops) == 1
        # A new start takes it over.
        host.run("systemctl restart envd")
        await becomes_ready(http, url)
        async with http.post(f"{url}/v1/envs/0/step", json={"actions": ["pyautogui.click(30, 40)"]}) as answer:
            assert answer.status == 200, await answer.text()
    assert ours(host, owner) == desktops


def test_it_goes_as_it_came_and_its_desktops_with_it(host: ServiceHost) -> None:
    owner = host.run("cat /var/lib/envd/daemon-id").strip()
    said = installed(host, "--uninstall")
    assert "removing the service" in said
    assert "removing desktops: 1" in said
    assert ours(host, owner) == []
    assert "kept: /etc/envd /var/lib/envd /var/cache/envd" in said
    assert host.run("systemctl is-active envd", check=False).strip() == "inactive"
    assert "nothing was changed" in installed(host, "--uninstall")
    assert "removing the user envd" in installed(host, "--uninstall --purge")
    paths = "/etc/envd /opt/envd /var/lib/envd /var/cache/envd /usr/local/bin/envd /etc/systemd/system/envd.service*"
    assert host.run(f"ls -d {paths} 2>/dev/null; getent passwd envd", check=False) == ""
    assert installed(host, "--uninstall").strip() == "install: envd is not installed here; nothing was changed"


async def becomes_ready(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                async with http.get(f"{url}/readyz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.1)


async def test_without_systemd_it_installs_and_says_how_to_start() -> None:
    if not base():
        pytest.skip("docker: no image debian:bookworm-slim or envd/base:bookworm; `make images` makes one")
    port = free_port()
    with service_host(systemd=False) as bare:
        said = bare.run(f"{INSTALL} --provider sim --host 127.0.0.1 --port {port}", timeout=400)
        assert "systemd does not run here, so envd was not started" in said
        # Enabled, for when this system boots.
        bare.run("test -L /etc/systemd/system/multi-user.target.wants/envd.service")
        [command] = re.findall(r"By hand: sudo (.*)", said)
        bare.leave(command)
        async with session(bare) as http:
            await becomes_ready(http, f"http://127.0.0.1:{port}")
            await plays(http, f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--provider moon", "There is no provider moon"),
        ("--port http", "--port http is no number"),
        ("--purge", "--purge goes with --uninstall"),
        ("--nonsense", "There is no option --nonsense"),
        ("--image", "--image needs a value"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_done(host: ServiceHost, arguments: str, words: str) -> None:
    assert words in host.fails(f"{INSTALL} {arguments}")
    assert host.run("ls -d /etc/envd /opt/envd 2>/dev/null", check=False) == ""


def test_a_user_who_may_not_install_is_told(host: ServiceHost) -> None:
    said = host.fails(f"setpriv --reuid nobody --clear-groups {INSTALL} --provider sim")
    assert "This needs root. Run: sudo /src/deploy/install.sh --provider sim" in said


def test_help_names_every_option(host: ServiceHost) -> None:
    said = installed(host, "--help")
    source = (ROOT / "deploy" / "install.sh").read_text()
    options = set(
        re.findall(r"--[a-z-]+", source[source.index("read_arguments()") : source.index("# -- what it is to")])
    )
    assert options - {"--help"} <= set(re.findall(r"--[a-z-]+", said))
