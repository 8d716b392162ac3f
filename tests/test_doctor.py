"""`envd doctor` on the server: green where all is well, and each thing that is wrong told with its fix."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import jsonschema
import pytest
from daemon_process import daemon, environment
from nobody import as_nobody
from test_network import listener

from envd import __version__, findings, last_start
from envd.cli import doctor as command
from envd.daemon import locked
from envd.doctor import desktops, host, machine, remote, serving
from envd.doctor.capacity import Need, capacity_of, need_of
from envd.doctor.desktops import Here
from envd.doctor.machine import Machine, clock_of, packages_of, platform_of
from envd.doctor.serving import Daemon
from envd.drivers.docker import engine
from envd.errors import InfraError
from envd.findings import Finding, gather
from envd.network import Holder
from envd.settings import Settings, effective, load
from envd.tasks import grading
from envd.vm.capacity import Memory
from envd.vm.templates import FORMAT, Listed, Manifest, Trial

GIB = 1024**3
LINUX = Machine("Linux", "Debian GNU/Linux 12 (bookworm)", "6.1.0", "x86_64")
Usage = namedtuple("Usage", "total used free")
SCHEMA = {
    "type": "object",
    "required": ["ok", "of", "first", "findings"],
    "additionalProperties": False,
    "properties": {
        "ok": {"type": "boolean"},
        "of": {"type": "string"},
        "first": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/finding"}]},
        "findings": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/finding"}},
    },
    "$defs": {
        "finding": {
            "type": "object",
            "required": ["what", "verdict", "detail", "fix"],
            "additionalProperties": False,
            "properties": {
                "what": {"type": "string", "minLength": 1},
                "verdict": {"enum": ["ok", "warning", "failed", "unknown", "skipped"]},
                "detail": {"type": "string", "minLength": 1},
                "fix": {"type": "string"},
            },
        }
    },
}


def settings(tmp_path: Path, **given: Any) -> Settings:
    return load({}, None, **{"provider": "sim", "state_dir": tmp_path / "state", **given})


def run(folder: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command, in a folder of its own, with nothing chosen but what is given."""
    env = environment(folder / "state", {"PROVIDER": "", **changes})
    argv = [sys.executable, "-m", "envd", "doctor", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, env=env, cwd=folder)


def told(ran: subprocess.CompletedProcess[str]) -> dict[str, Finding]:
    """What `--json` printed, by what it is about."""
    document = json.loads(ran.stdout)
    jsonschema.validate(document, SCHEMA)
    assert document["ok"] is (ran.returncode == 0)
    return {one["what"]: Finding(**one) for one in document["findings"]}


# -- the whole ------------------------------------------------------------------------------------------------------


async def test_beside_a_daemon_that_runs_all_is_green_though_nothing_is_chosen_here(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env={"ENVD_ENVS": "2"}) as (process, _):
        port = process.url.rpartition(":")[2]
        ran = await asyncio.to_thread(partial(run, tmp_path, "--json", ENVD_PORT=port))
        lines = await asyncio.to_thread(partial(run, tmp_path, ENVD_PORT=port))
    found = told(ran)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert {one.verdict for one in found.values()} <= {"ok", "skipped"}, found
    assert found["provider"].detail.startswith("sim, as the daemon that runs has it")
    assert f"envd {__version__} at {process.url}, process {process.pid}, up" in found[f"port {port}"].detail
    assert f"of the daemon that runs (process {process.pid})" in found["state directory"].detail
    assert found["KVM"].detail.startswith("not needed by PROVIDER=sim")
    assert found["Docker"].detail == "not needed by PROVIDER=sim"
    assert found["ready"].detail == "a reset can be served now"
    assert "ENVD_ENVS=2 (the daemon that runs)" in found["settings"].detail
    assert lines.stdout.startswith("ok       platform")
    assert lines.stdout.rstrip().endswith("Nothing is in the way of desktops.")


async def test_of_a_daemon_that_wants_a_token_the_provider_is_known_without_one(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env={"ENVD_TOKEN": "t" * 20}) as (process, _):
        port = process.url.rpartition(":")[2]
        found = told(await asyncio.to_thread(partial(run, tmp_path, "--json", ENVD_PORT=port)))
    assert found["provider"].detail.startswith("sim, as the daemon that runs has it")
    assert {one.verdict for one in found.values()} <= {"ok", "skipped"}, found


def test_without_a_daemon_the_host_is_looked_at_all_the_same(tmp_path: Path) -> None:
    found = told(run(tmp_path, "--json", PROVIDER="sim", ENVD_PORT="0"))
    assert {one.verdict for one in found.values()} <= {"ok", "skipped"}, found
    assert "ready" not in found


def test_what_failed_is_the_exit_code_and_the_first_thing_to_do(tmp_path: Path) -> None:
    with listener() as (pid, port):
        ran = run(tmp_path, PROVIDER="sim", ENVD_PORT=str(port))
    assert ran.returncode == 1
    assert f"         → kill {pid}; or ENVD_PORT=another port" in ran.stdout.splitlines()
    last = ran.stdout.rstrip().splitlines()[-1]
    assert "1 failed" in last
    assert last.endswith(f"First put this right: port {port}. → kill {pid}; or ENVD_PORT=another port")


def test_settings_that_cannot_be_used_do_not_end_the_doctor(tmp_path: Path) -> None:
    found = told(run(tmp_path, "--json", ENVD_ENVS="many", ENVD_PROT="1", DOCKER_HOST="unix:///nonexistent"))
    assert found["settings"].verdict == "failed"
    assert "ENVD_ENVS=many (environment)" in found["settings"].detail
    assert "did you mean ENVD_PORT" in found["settings"].detail
    assert found["platform"].verdict == "ok"
    assert "state directory" in found


def test_no_colour_in_a_pipe_and_colours_on_a_terminal(tmp_path: Path) -> None:
    assert "\x1b" not in run(tmp_path, PROVIDER="sim", ENVD_PORT="0").stdout
    ours, theirs = pty.openpty()
    env = environment(tmp_path / "state", {"ENVD_PORT": "0", "TERM": "xterm", "NO_COLOR": ""})
    with subprocess.Popen(
        [sys.executable, "-m", "envd", "doctor"], env=env, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        said = b""
        try:
            while piece := os.read(ours, 65536):
                said += piece
        except OSError:
            pass  # that is how a terminal ends
        os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[32mok" in said


def test_the_summary_says_what_to_do_first() -> None:
    fine = Finding("a", "ok", "x")
    odd, bad = Finding("b", "warning", "x", "mend b"), Finding("c", "failed", "x", "mend c")
    assert command._summary([fine], None) == "1 ok. Nothing is in the way of desktops."
    assert command._summary([fine], "http://h:1") == "1 ok. http://h:1 can be used from here."
    assert command._summary([odd], None) == "1 warning. Nothing failed. First look at: b. → mend b"
    assert command._summary([odd, bad], None) == "1 warning, 1 failed. First put this right: c. → mend c"


def test_the_command_imports_nothing_heavy_before_it_looks() -> None:
    program = """
import sys
sys.argv = ["envd", "doctor", "--help"]
from envd.cli import main
try:
    main()
except SystemExit:
    pass
print([name for name in ("aiohttp", "anyio", "asyncio", "rich", "psutil", "envd.settings") if name in sys.modules],
      file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert ran.stderr == "[]\n"
    assert "--url" in ran.stdout


def test_url_looks_at_the_server_and_not_at_this_host(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        found = told(run(tmp_path, "--url", url, "--json"))
    assert found["connection"].verdict == "failed"
    assert "platform" not in found


# -- looks that break -----------------------------------------------------------------------------------------------


async def test_a_look_that_breaks_or_hangs_is_unknown_and_leaves_the_others_theirs() -> None:
    async def fine() -> list[Finding]:
        return [Finding("fine", "ok", "x")]

    async def hangs() -> list[Finding]:
        await anyio.sleep_forever()
        return []

    async def breaks() -> list[Finding]:
        raise ZeroDivisionError("nought")

    async def refuses() -> list[Finding]:
        raise InfraError("No.", hint="Wait.")

    looks: list[tuple[str, findings.Look]] = [("a", hangs), ("b", breaks), ("c", fine), ("d", refuses)]
    found = await gather(looks, told=remote.broke, at_once=8, within=0.05)
    assert found == [
        Finding("a", "unknown", "there was no answer within 0.05 s"),
        Finding("b", "unknown", "this look broke: ZeroDivisionError: nought"),
        Finding("fine", "ok", "x"),
        Finding("d", "unknown", "No.", "Wait."),
    ]


async def test_one_look_of_the_host_that_breaks_does_not_end_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> Finding:
        raise OSError("the disk is gone")

    monkeypatch.setattr(machine, "packages_of", breaks)
    environ = {"PROVIDER": "sim", "ENVD_STATE_DIR": str(tmp_path), "ENVD_PORT": "0", "HOME": str(tmp_path)}
    found = {one.what: one for one in await host.examine(environ)}
    assert found["packages"] == Finding("packages", "unknown", "this look broke: OSError: the disk is gone")
    assert found["state directory"].verdict == "ok"


# -- the machine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("about", "verdict", "words"),
    [
        pytest.param(LINUX, "ok", "supported", id="Linux"),
        pytest.param(replace(LINUX, container="Docker"), "ok", "in a container (Docker)", id="container"),
        pytest.param(
            Machine("Darwin", "macOS 15.2", "24.2.0", "arm64"), "failed", "Client here, worker elsewhere", id="Mac"
        ),
        pytest.param(
            Machine("Windows", "Windows", "11", "AMD64"), "failed", "Client here, worker elsewhere", id="Windows"
        ),
        pytest.param(
            replace(LINUX, kernel="5.15.167.4-microsoft-standard-WSL2"),
            "warning",
            "Client here, worker elsewhere",
            id="WSL",
        ),
    ],
)
def test_the_first_line_says_whether_this_machine_is_supported(about: Machine, verdict: str, words: str) -> None:
    found = platform_of(about)
    assert (found.what, found.verdict) == ("platform", verdict)
    assert words in found.detail
    assert ("envd doctor --url http://HOST:15001" in found.fix) == (verdict != "ok")


async def test_on_a_laptop_nothing_else_of_a_worker_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda: Machine("Darwin", "macOS 15.2", "24.2.0", "arm64"))
    found = await host.examine({})
    assert [(one.what, one.verdict) for one in found] == [
        ("platform", "failed"),
        ("Python", "ok"),
        ("the rest", "skipped"),
    ]


@pytest.mark.parametrize(
    ("provider", "extra"), [("docker", "docker"), ("qemu", "qemu"), ("aws", "aws"), ("local", "agent")]
)
def test_missing_packages_name_the_extra_that_brings_them(tmp_path: Path, provider: str, extra: str) -> None:
    chosen = settings(tmp_path, provider=provider)
    found = packages_of(chosen, lambda name: name == "numpy")
    assert found.verdict == "failed"
    assert found.fix == f"{sys.executable} -m pip install 'envd-server[{extra}]'"
    assert packages_of(chosen, lambda name: True).verdict == "ok"


def test_a_part_of_a_package_that_is_not_there_is_no_mistake() -> None:
    assert machine.has_module("json.decoder")
    assert not machine.has_module("no_such_package.part")


@pytest.mark.parametrize(
    ("provider", "status", "verdict"),
    [
        ("local", 0, "ok"),
        ("local", machine.UNSYNCHRONISED, "ok"),
        ("aws", machine.UNSYNCHRONISED, "warning"),
        ("aws", 0x2001, "ok"),
        ("local", None, "unknown"),
    ],
)
def test_the_clock_matters_where_requests_are_signed(
    tmp_path: Path, provider: str, status: int | None, verdict: str
) -> None:
    assert clock_of(settings(tmp_path, provider=provider), status).verdict == verdict


def test_the_kernel_tells_the_state_of_its_clock() -> None:
    assert isinstance(machine.clock_status(), int)


# -- how it is served -----------------------------------------------------------------------------------------------


def test_a_port_that_is_free_is_ok_and_one_of_another_program_is_not(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert serving.port_of(settings(tmp_path, port=port), None, None).verdict == "ok"
    with listener() as (pid, port):
        chosen = settings(tmp_path, port=port)
        found = serving.port_of(chosen, None, serving.holder(chosen))
    assert found.verdict == "failed"
    assert f"another program listens on it: process {pid} (" in found.detail


def test_an_envd_that_hangs_is_told_from_another_program(tmp_path: Path) -> None:
    found = serving.port_of(settings(tmp_path), None, Holder(7, "python -m envd serve", "127.0.0.1"))
    assert found.verdict == "failed"
    assert "an envd has it, process 7 (python -m envd serve), and does not answer" in found.detail


def test_a_daemon_of_another_version_is_to_be_restarted(tmp_path: Path) -> None:
    old = Daemon("http://127.0.0.1:15001", "0.0.9", "local", None, None, None)
    found = serving.port_of(settings(tmp_path), old, None)
    assert (found.verdict, found.fix) == ("warning", "sudo systemctl restart envd")
    assert f"this command is {__version__}" in found.detail


def test_a_provider_that_was_chosen_here_is_not_taken_from_the_daemon(tmp_path: Path) -> None:
    other = Daemon("http://127.0.0.1:15001", __version__, "local", None, None, None)
    mine, taken = serving.as_the_daemon(settings(tmp_path), other)
    assert (mine.provider, taken, serving.provider_of(mine, other).verdict) == ("sim", (), "warning")
    theirs, taken = serving.as_the_daemon(load({}, None), other)
    assert (theirs.provider, taken, serving.provider_of(theirs, other).verdict) == ("local", ("provider",), "ok")
    alone, taken = serving.as_the_daemon(load({}, None), None)
    assert (alone.provider, taken) == ("docker", ())
    assert "make serve takes local" in serving.provider_of(alone, None).detail


def test_what_is_not_set_here_is_looked_at_as_the_daemon_has_it(tmp_path: Path) -> None:
    theirs = load(
        {}, None, provider="qemu", host="0.0.0.0", token="t" * 20, state_dir=tmp_path, screen="800x600", envs=4,
        hosts="a,b", log_level="debug",
    )  # fmt: skip
    told = json.loads(json.dumps(effective(theirs)))
    daemon = Daemon("http://127.0.0.1:15001", __version__, "qemu", None, told, None)
    mine, taken = serving.as_the_daemon(load({}, None, envs=2), daemon)
    assert set(taken) == {"provider", "state_dir", "screen", "hosts"}
    assert (mine.provider, mine.state_dir, mine.screen, mine.hosts) == ("qemu", tmp_path, (800, 600), ("a", "b"))
    assert (mine.envs, mine.host, mine.token.get_secret_value()) == (2, "127.0.0.1", "")
    assert "(the daemon that runs)" in serving.settings_of(mine, daemon).detail
    assert "t" * 20 not in serving.settings_of(mine, daemon).detail
    used, _ = serving.state_of(mine, daemon)
    assert used.detail == f"{tmp_path}, of the daemon that runs"
    admitted = serving.access_of_daemon(mine, {}, daemon)
    assert admitted.verdict == "ok"
    assert "http://127.0.0.1:15001" in admitted.detail
    assert "; ENVD_TOKEN; without TLS" in admitted.detail


def test_a_daemon_that_others_reach_has_tokens_wherever_they_are() -> None:
    told = {"ENVD_HOST": {"value": "0.0.0.0"}, "ENVD_PORT": {"value": 15001}}
    daemon = Daemon("http://127.0.0.1:15001", __version__, "sim", None, told, None)
    found = serving.access_of_daemon(load({}, None), {}, daemon)
    assert found.verdict == "ok"
    assert "credentials" in found.detail


async def test_desktops_at_aws_are_looked_at_as_the_preflight_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    place, rest = await desktops.aws(Here(settings(tmp_path, provider="aws"), None, ""))
    assert (place.what, place.verdict, rest.verdict) == ("place", "failed", "unknown")
    assert "AWS_REGION" in place.fix


def test_settings_of_another_version_that_cannot_be_used_are_left(tmp_path: Path) -> None:
    odd = {"ENVD_ENVS": {"value": "many", "origin": "environment"}, "ENVD_NEW": {"value": 1, "origin": "environment"}}
    daemon = Daemon("http://127.0.0.1:15001", "9.9.9", "sim", None, odd, None)
    mine = settings(tmp_path)
    assert serving.as_the_daemon(mine, daemon) == (mine, ())


@pytest.mark.parametrize(
    ("given", "verdict", "words"),
    [
        pytest.param({}, "ok", "this host alone", id="loopback"),
        pytest.param({"host": "0.0.0.0"}, "failed", "lets others reach this daemon", id="open"),
        pytest.param({"host": "0.0.0.0", "token": "t" * 20}, "ok", "1 token; without TLS", id="token"),
        pytest.param(
            {"host": "0.0.0.0", "allow": "10.0.0.0/8"}, "ok", "no token wanted from 10.0.0.0/8", id="networks"
        ),
        pytest.param({"host": "0.0.0.0", "insecure": True}, "warning", "ENVD_INSECURE", id="insecure"),
        pytest.param({"token": "short"}, "failed", "at least", id="bad token"),
    ],
)
def test_who_can_come_in_is_told(tmp_path: Path, given: dict[str, Any], verdict: str, words: str) -> None:
    found = serving.access_of_daemon(settings(tmp_path, **given), {})
    assert found.verdict == verdict
    assert words in found.detail
    assert "t" * 20 not in found.detail
    assert (not found.fix) == (verdict == "ok")


def test_a_state_directory_that_cannot_be_written_to_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (found,) = serving.state_of(settings(tmp_path, state_dir=tmp_path / "file"), None)
    assert (found.what, found.verdict) == ("state directory", "failed")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    said = as_nobody(lambda: serving.state_of(settings(tmp_path, state_dir=closed / "state"), None), tmp_path)
    assert "cannot be written to: Permission denied" in said
    assert "ENVD_STATE_DIR=a folder of yours" in said


def test_a_state_directory_of_another_daemon_names_it_and_its_lock_is_not_tried(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    with locked(chosen.state_dir):
        assert serving.lock_holder(chosen.state_dir / "lock") == os.getpid()
        used, _ = serving.state_of(chosen, None)
        mine = Daemon("", __version__, "sim", None, None, Holder(os.getpid(), "", ""))
        assert serving.state_of(chosen, mine)[0].verdict == "ok"
    assert used.verdict == "warning"
    assert f"process {os.getpid()} (" in used.detail
    assert serving.lock_holder(chosen.state_dir / "lock") is None
    assert serving.state_of(chosen, None)[0].verdict == "ok"


@pytest.mark.parametrize(
    ("free", "verdict", "words"),
    [(10**6, "failed", "no new work is taken"), (GIB, "warning", "fill that soon"), (50 * GIB, "ok", "free at")],
)
def test_the_disk_is_held_against_the_floor(free: int, verdict: str, words: str) -> None:
    found = serving.disk_of(Path("/state"), Usage(100 * GIB, 100 * GIB - free, free))
    assert (found.what, found.verdict) == ("disk", verdict)
    assert words in found.detail


def test_settings_are_told_with_their_origins_and_without_secrets(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("ENVD_ENVS=3\nENVD_TOKEN=secretsecretsecret\n")
    found = serving.settings_of(load({"PROVIDER": "sim", "HOME": str(tmp_path)}, file), None)
    assert "PROVIDER=sim (environment)" in found.detail
    assert f"ENVD_ENVS=3 ({file})" in found.detail
    assert "secretsecret" not in found.detail


# -- desktops -------------------------------------------------------------------------------------------------------


def docker_here(tmp_path: Path, docker_host: Path, **given: Any) -> Here:
    chosen = settings(tmp_path, provider="docker", docker_host=f"unix://{docker_host}", **given)
    return Here(chosen, None, "")


@contextmanager
def dead_socket(path: Path) -> Iterator[Path]:
    """The file of a socket that nobody listens on any more."""
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        yield path


async def test_without_its_socket_docker_is_not_installed_or_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_installed", lambda: False)
    absent, rest = await desktops.docker(docker_here(tmp_path, tmp_path / "docker.sock"))
    assert (absent.what, absent.verdict, rest.verdict) == ("Docker", "failed", "unknown")
    assert absent.detail.startswith("Docker is not installed")
    assert "deploy/docker-engine.sh" in absent.fix
    monkeypatch.setattr(engine, "_installed", lambda: True)
    stopped, _ = await desktops.docker(docker_here(tmp_path, tmp_path / "docker.sock"))
    assert stopped.detail.startswith("The Docker engine does not run")
    with dead_socket(tmp_path / "dead.sock") as path:
        dead, _ = await desktops.docker(docker_here(tmp_path, path))
    assert dead.detail.startswith("The Docker engine does not run")
    assert "sudo systemctl start docker" in dead.fix


def test_a_socket_that_this_user_may_not_use_asks_for_the_group(tmp_path: Path) -> None:
    with dead_socket(tmp_path / "docker.sock") as path:
        path.chmod(0)
        here = docker_here(tmp_path, path)
        said = as_nobody(lambda: asyncio.run(desktops.docker(here)), tmp_path)
    assert "The Docker engine may not be used" in said
    assert "sudo usermod -aG docker" in said
    assert "log in again" in said


async def test_a_docker_host_that_is_elsewhere_is_refused_with_why(tmp_path: Path) -> None:
    chosen = settings(tmp_path, provider="docker", docker_host="tcp://10.0.0.7:2375")
    refused, _ = await desktops.docker(Here(chosen, None, ""))
    assert refused.verdict == "failed"
    assert "not the socket of an engine of this host" in refused.detail


@pytest.mark.docker
async def test_an_engine_with_our_images_is_ok_and_containers_need_no_kvm(tmp_path: Path) -> None:
    found = {
        one.what: one
        for one in await desktops.docker(
            Here(settings(tmp_path, provider="docker", docker_image="envd/desktop"), None, "")
        )
    }
    assert found["Docker"].verdict == found["image"].verdict == found["capacity"].verdict == "ok"
    assert found["KVM"].detail.startswith("not needed by containers of envd/desktop")
    assert "disk of machines" not in found


@pytest.mark.docker
async def test_an_image_that_is_not_here_is_told_with_the_command_that_gets_it(tmp_path: Path) -> None:
    chosen = settings(tmp_path, provider="docker", docker_image="example.invalid/no:such")
    found = {one.what: one for one in await desktops.docker(Here(chosen, None, ""))}
    assert (found["image"].verdict, found["image"].fix) == ("failed", "envd images pull example.invalid/no:such")


@pytest.mark.docker
async def test_an_image_that_the_start_pulls_is_no_failure(tmp_path: Path) -> None:
    chosen = settings(tmp_path, provider="docker", docker_image="example.invalid/no:such", pull="missing")
    found = {one.what: one for one in await desktops.docker(Here(chosen, None, ""))}
    assert (found["image"].verdict, "the next start pulls it" in found["image"].detail) == ("warning", True)


async def test_without_qemu_its_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(b"QFI\xfb" + bytes(10))
    found = {
        one.what: one for one in await desktops.qemu(Here(settings(tmp_path, provider="qemu", vm_disk=disk), None, ""))
    }
    assert found["QEMU"].verdict == "failed"
    assert "apt-get install -y --no-install-recommends" in found["QEMU"].fix
    assert found["disk of machines"].verdict == "failed"
    assert "only 14 bytes are there" in found["disk of machines"].detail
    assert not (tmp_path / "state").exists()


async def test_without_their_programs_local_desktops_name_every_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, *_, **__: None)
    (found,) = await desktops.local(Here(settings(tmp_path, provider="local"), None, ""))
    assert (found.what, found.verdict) == ("programs", "failed")
    assert "bubblewrap" in found.fix
    assert "xvfb" in found.fix


@pytest.mark.local
async def test_local_desktops_are_tried_beside_a_daemon_without_touching_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Here(settings(tmp_path, provider="local"), None, "")
    found = await desktops.local(here)
    assert [(one.what, one.verdict) for one in found] == [("programs", "ok"), ("sandbox", "ok")]
    assert not (tmp_path / "state").exists()
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "bwrap").write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2; exit 1\n")
    (bin / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    _, sandbox = await desktops.local(here)
    assert (sandbox.what, sandbox.verdict) == ("sandbox", "failed")
    assert "No permissions to create new namespace" in sandbox.detail
    assert "kernel.unprivileged_userns_clone=1" in sandbox.fix


async def test_evaluators_that_are_not_there_are_no_warning_and_wrong_ones_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(grading, "find_interpreter", lambda chosen: None)
        (none,) = await desktops.evaluators(Here(settings(tmp_path), None, ""))
    assert (none.verdict, none.fix) == ("skipped", "make evaluators")
    (absent,) = await desktops.evaluators(Here(settings(tmp_path, evaluators=tmp_path / "none"), None, ""))
    assert absent.verdict == "failed"
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    (wrong,) = await desktops.evaluators(Here(settings(tmp_path, evaluators=empty), None, ""))
    assert (wrong.verdict, "without desktop-env" in wrong.detail) == ("failed", True)


def test_what_a_killed_daemon_left_is_told(tmp_path: Path) -> None:
    here = Here(settings(tmp_path, provider="local"), None, "")
    assert desktops.leftovers(here).verdict == "ok"
    (tmp_path / "state" / "local" / "desktops" / "envd-abcdef-1").mkdir(parents=True)
    found = desktops.leftovers(here)
    assert found.verdict == "warning"
    assert "1 of a daemon that was killed: envd-abcdef-1" in found.detail
    running = Daemon("", __version__, "local", None, None, None)
    assert desktops.leftovers(replace(here, daemon=running)).verdict == "ok"
    assert desktops.leftovers(Here(settings(tmp_path, provider="aws"), None, "")).fix == "envd aws ls"


# -- how many fit ---------------------------------------------------------------------------------------------------


def template(clone_bytes: int | None, problem: str = "") -> Listed:
    tried = Trial(frame="", identity="helper", clone_bytes=clone_bytes)
    made = Manifest(
        format=FORMAT, key="k" * 16, created=0, boot_seconds=1, disk="", image="", machine="", trial=tried, files={}
    )
    return Listed("k" * 16, GIB, 0.0, False, made, problem)


@pytest.mark.parametrize(
    ("kind", "given", "templates", "each", "first", "disk"),
    [
        pytest.param("local", {}, [], 390 * 10**6, 0, 0, id="local"),
        pytest.param("container", {}, [], 245 * 10**6, 0, 0, id="container"),
        pytest.param("foreign", {}, [], 4 * GIB + 384 * 1024**2, 0, 2 * GIB, id="foreign"),
        pytest.param("machine", {"templates": "off"}, [], 4 * GIB + 384 * 1024**2, 0, 2 * GIB, id="no templates"),
        pytest.param("machine", {}, [], 400 * 1024**2, 4 * GIB + 384 * 1024**2, 2 * GIB, id="first boot"),
        pytest.param("machine", {}, [template(100)], 120, 0, 2 * GIB, id="measured"),
        pytest.param("machine", {}, [template(None)], 400 * 1024**2, 0, 2 * GIB, id="not measured"),
        pytest.param(
            "machine", {}, [template(100, "put aside")], 400 * 1024**2, 4 * GIB + 384 * 1024**2, 2 * GIB, id="unusable"
        ),
    ],
)
def test_what_one_desktop_takes_is_what_was_measured(
    tmp_path: Path, kind: Any, given: dict[str, Any], templates: list[Listed], each: int, first: int, disk: int
) -> None:
    need = need_of(kind, settings(tmp_path, **given), templates)
    assert need is not None
    assert (need.each, need.first, need.disk) == (each, first, disk)


@pytest.mark.parametrize(
    ("available", "disk_free", "words"),
    [
        pytest.param(10.5, 100, "room for 10 more, memory binds", id="memory"),
        pytest.param(10.5, 7, "room for 3 more, disk binds", id="disk"),
        pytest.param(0.2, 100, "room for 0 more, memory binds", id="none"),
    ],
)
def test_what_binds_is_what_runs_out_first(tmp_path: Path, available: float, disk_free: int, words: str) -> None:
    memory = Memory(limit=16 * GIB, available=int(available * GIB))
    found = capacity_of(settings(tmp_path), Need(GIB, "measured", disk=2 * GIB), memory, disk_free * GIB)
    assert found.verdict == "ok"
    assert found.detail.startswith(words)


def test_a_disk_that_is_not_seen_binds_nothing(tmp_path: Path) -> None:
    memory = Memory(limit=16 * GIB, available=int(10.5 * GIB))
    found = capacity_of(settings(tmp_path), Need(GIB, "measured", disk=2 * GIB), memory, None)
    assert found.detail.startswith("room for 10 more, memory binds")


def test_the_first_of_a_template_takes_more(tmp_path: Path) -> None:
    memory = Memory(limit=16 * GIB, available=int(6.5 * GIB))
    found = capacity_of(settings(tmp_path), Need(GIB, "a clone", first=4 * GIB), memory, 0)
    assert found.detail.startswith("room for 3 more")


def test_more_envs_than_the_host_can_hold_are_a_warning(tmp_path: Path) -> None:
    memory = Memory(limit=4 * GIB, available=3 * GIB)
    found = capacity_of(settings(tmp_path, envs=8), Need(GIB, "measured"), memory, 0)
    assert (found.verdict, found.fix) == ("warning", "ENVD_ENVS=3, or a host with more memory")
    large = capacity_of(settings(tmp_path, envs=1), Need(8 * GIB, "measured"), memory, 0)
    assert large.verdict == "failed"


def test_desktops_elsewhere_are_limited_by_what_was_set(tmp_path: Path) -> None:
    found = capacity_of(settings(tmp_path, provider="aws", aws_max_instances=8), None, Memory(GIB, GIB), 0)
    assert (found.verdict, "ENVD_AWS_MAX_INSTANCES=8" in found.detail) == ("skipped", True)


async def test_the_memory_of_this_host_is_counted(tmp_path: Path) -> None:
    (found,) = await desktops.capacity(Here(settings(tmp_path, provider="local"), None, ""))
    assert found.verdict == "ok"
    assert "measured with a blank page" in found.detail


# -- beside the settings of a daemon --------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_of_a_daemon_that_is_gone_the_provider_is_judged_and_its_end_told(
    tmp_path: Path, end: signal.Signals
) -> None:
    async with daemon(tmp_path / "state", env={"ENVD_TOKEN": "a-secret-of-the-tests"}) as (process, _):
        process.signal(end)
        await process.ended()
    found = told(await asyncio.to_thread(partial(run, tmp_path, "--json", ENVD_PORT="0")))
    assert found["provider"].detail == "sim, as the daemon that ran last had it; here nothing is chosen"
    assert found["daemon"].verdict == "warning"
    assert f"with sim desktops at {process.url}, started at " in found["daemon"].detail
    assert found["daemon"].fix.startswith("envd serve")
    left = (tmp_path / "state" / last_start.FILE).read_text()
    assert "secret" not in left
    assert json.loads(left)["pid"] == process.pid
    chosen = told(await asyncio.to_thread(partial(run, tmp_path, "--json", ENVD_PORT="0", PROVIDER="sim")))
    assert chosen["provider"].detail == "sim, by environment"


@pytest.mark.parametrize("left", ["", "{}", "[]", '{"provider": "rm", "started_at": 1}', '{"started_at": 1e400}'])
def test_what_is_left_of_a_start_and_tells_nothing_is_passed_over(tmp_path: Path, left: str) -> None:
    (tmp_path / last_start.FILE).write_text(left)
    assert last_start.read(tmp_path) is None


def test_before_any_start_in_a_checkout_what_make_serve_takes_is_judged(tmp_path: Path) -> None:
    before = load({}, None, state_dir=tmp_path)
    judged = serving.as_it_would_start(before, None, checkout=True)
    assert judged.provider == "local"
    assert "`make serve` takes" in serving.provider_of(judged, None).detail
    assert serving.as_it_would_start(before, None, checkout=False) is before
    assert serving.in_a_checkout(Path(__file__).parent.parent)
    assert not serving.in_a_checkout(tmp_path)


async def test_settings_that_the_daemon_on_the_same_port_does_not_have_are_a_warning(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env={"ENVD_ENVS": "2"}) as (process, _):
        port = process.url.rpartition(":")[2]
        (tmp_path / ".env").write_text("ENVD_HOST=0.0.0.0\nENVD_TOKEN=a-secret-of-the-tests\nENVD_ENVS=4\n")
        ran = await asyncio.to_thread(partial(run, tmp_path, "--json", ENVD_PORT=port, ENVD_HOST="", ENVD_ENVS=""))
    found = told(ran)
    assert ran.returncode == 0
    assert "a-secret" not in ran.stdout
    assert found["settings"].verdict == "warning"
    assert "ENVD_HOST, ENVD_TOKEN, ENVD_ENVS differ" in found["settings"].detail
    assert "`envd serve` here is refused" in found["settings"].detail
    assert "ENVD_STATE_DIR and an ENVD_PORT of its own" in found["settings"].fix
    assert found["access"].detail.startswith("of the daemon that runs, not by these settings: ENVD_HOST=127.0.0.1")
