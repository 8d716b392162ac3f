"""`envd templates`: what it shows of templates, which ones it removes, what it says of one that changed."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from daemon_process import environment
from rich.console import Console
from vm_engine import shared

from envd.cli.template_creation import PLACE
from envd.cli.templates import ls, remove, verify
from envd.daemon import locked
from envd.errors import NotFound
from envd.settings import Settings
from envd.vm.disks import Disk
from envd.vm.machine import Machine
from envd.vm.templates import OVERLAY, RAM, STATE, Plan, Template, Templates, Trial

MIB = 1024**2


def settings(folder: Path, **changes: object) -> Settings:
    return Settings.model_validate(
        {"state_dir": folder / "state", "template_dir": folder / "templates", "provider": "sim"} | changes
    )


def paper() -> Console:
    return Console(file=io.StringIO(), width=200)


def run(command: Coroutine[Any, Any, int]) -> int:
    """As the command line does. What the tests themselves do with files may block: no loop runs meanwhile."""
    return asyncio.run(command)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def template(folder: Path, image: str = "envd/qemu") -> Template:
    """One that was admitted. No machine was ever frozen in it."""
    kept = Templates(folder / "templates", limit=1024 * MIB)
    kept.open()
    machine = Machine(memory=8 * MIB, cpus=2, accel="tcg", screen=(1280, 720), qemu=(7, 2, 0))
    plan = Plan(machine, Disk(Path("/disks/guest.qcow2"), 1024 * MIB, "disk"), 1024 * MIB, image)
    directory = kept.begin(plan)
    for name in (STATE, OVERLAY):
        (directory / name).write_bytes(name.encode() * 1000)
    with (directory / RAM).open("r+b") as ram:
        ram.write(b"memory" * 1000)
    return kept.admit(plan, Trial(frame="f", identity="helper", pictures=True, input=True), boot_seconds=47.6)


def test_none_at_all_says_how_one_comes_to_be(tmp_path: Path) -> None:
    output = paper()
    assert run(ls(settings(tmp_path), output=output)) == 0
    assert "envd templates create" in written(output)


def test_a_template_is_shown_with_all_that_shaped_it(tmp_path: Path) -> None:
    made, output = template(tmp_path), paper()
    assert run(ls(settings(tmp_path), output=output)) == 0
    head, *facts = written(output).splitlines()
    assert head.startswith(f"{made.key[:8]}  ready, last used ")
    told = {line[:11].strip(): line[11:] for line in facts}
    assert (told["disk"], told["image"]) == ("/disks/guest.qcow2", "envd/qemu")
    assert told["machine"] == "1280x720, 2 cpus, 8 MiB, emulated"
    assert "of a boot of 48 s" in told["made"]
    assert told["host io"] == "pictures and input"


def test_json_has_the_whole_key_and_the_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = template(tmp_path)
    assert run(ls(settings(tmp_path), as_json=True)) == 0
    (one,) = json.loads(capsys.readouterr().out)["templates"]
    assert (one["key"], one["in_use"], one["problem"]) == (made.key, False, "")
    assert one["manifest"]["files"][RAM]["size"] == 8 * MIB


def test_one_that_failed_says_that_it_is_not_used(tmp_path: Path) -> None:
    made, output = template(tmp_path), paper()
    Templates(tmp_path / "templates", limit=MIB).set_aside(made.key)
    run(ls(settings(tmp_path), output=output))
    assert "not used (put aside" in written(output)


def test_the_beginning_of_a_key_removes_that_one_alone(tmp_path: Path) -> None:
    gone, stays, output = template(tmp_path), template(tmp_path, image="other"), paper()
    assert run(remove(settings(tmp_path), [gone.key[:8]], output=output)) == 0
    assert (gone.directory.exists(), stays.directory.exists()) == (False, True)
    assert written(output).startswith(f"removed {gone.key[:8]}: ")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        pytest.param([], "--all", id="nothing named"),
        pytest.param([""], "no template", id="empty"),
        pytest.param(["zz"], "no template zz", id="unknown"),
        pytest.param(["../templates"], "no template", id="a path"),
    ],
)
def test_a_key_that_means_none_removes_none(tmp_path: Path, keys: list[str], told: str) -> None:
    made = template(tmp_path)
    with pytest.raises(NotFound) as raised:
        run(remove(settings(tmp_path), [made.key, *keys] if keys else []))
    assert told in str(raised.value)
    assert made.directory.exists()


def test_one_that_a_daemon_uses_is_kept_and_told(tmp_path: Path) -> None:
    used, unused, output = template(tmp_path), template(tmp_path, image="other"), paper()
    with Templates(tmp_path / "templates", limit=MIB).locked(used.key, "use", shared=True):
        assert run(remove(settings(tmp_path), [], everything=True, output=output)) == 1
    assert (used.directory.exists(), unused.directory.exists()) == (True, False)
    assert f"kept {used.key[:8]}" in written(output)


def test_verify_finds_a_changed_byte_that_left_no_time(tmp_path: Path) -> None:
    whole, changed, output = template(tmp_path), template(tmp_path, image="other"), paper()
    ram = changed.directory / RAM
    before = ram.stat()
    with ram.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"!")
    os.utime(ram, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(verify(settings(tmp_path), whole.key, output=output)) == 0
    assert run(verify(settings(tmp_path), output=output)) == 1
    told = dict(line.split(": ", 1) for line in written(output).splitlines())
    assert told[whole.key[:8]].startswith("as it was made")
    assert told[changed.key[:8]].startswith("ram is not what it was")


def command(folder: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "envd", "templates", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=environment(folder / "state", changes),
        cwd=folder,
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param({"ENVD_TEMPLATES": "off"}, "ENVD_TEMPLATES=off", id="off"),
        pytest.param({"PROVIDER": "local"}, "makes no virtual machines", id="local"),
        pytest.param({"PROVIDER": "docker", "DOCKER_HOST": "unix:///nonexistent"}, "does not run", id="no engine"),
    ],
)
def test_what_can_never_be_cloned_is_refused_in_two_lines(tmp_path: Path, changes: dict[str, str], told: str) -> None:
    ran = command(tmp_path, "create", **changes)
    assert (ran.returncode, ran.stdout, len(ran.stderr.splitlines())) == (1, "", 2)
    assert told in ran.stderr
    assert not (tmp_path / "state").exists()


def test_creating_one_beside_a_daemon_is_shown_as_it_goes(tmp_path: Path) -> None:
    with locked(tmp_path / "state"):  # as by a daemon that runs
        ran = command(tmp_path, "create", ENVD_SIM="boot=0.5,restore=0.1")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [word for word in ("· template", "✓ screenshot", "· clone", "succeeded") if word not in ran.stdout] == []
    assert ran.stdout.splitlines()[-1] == "There is a template for these settings now."


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        pytest.param("boot=0.1", "No template came of it", id="cannot be cloned"),
        pytest.param("boot=0.1,fail=1", "[instance_died]", id="died"),
    ],
)
def test_a_boot_that_gives_no_template_says_so(tmp_path: Path, behaviour: str, told: str) -> None:
    ran = command(tmp_path, "create", ENVD_SIM=behaviour)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert told in ran.stdout.splitlines()[-1]


def test_two_that_create_at_once_do_not_meet(tmp_path: Path) -> None:
    with locked(tmp_path / "state" / PLACE):
        ran = command(tmp_path, "create", ENVD_SIM="restore=0.1")
    assert ran.returncode == 1
    assert str(os.getpid()) in ran.stderr


@pytest.mark.qemu
@pytest.mark.timeout(700)
def test_a_machine_that_was_frozen_from_here_is_the_daemons_template(tmp_path: Path) -> None:
    changes = {"PROVIDER": "qemu", "RAM_SIZE": "2G", "CPU_CORES": "2", "ENVD_TEMPLATE_DIR": str(shared() / "templates")}
    made = command(tmp_path, "create", **changes)
    assert (made.returncode, made.stderr) == (0, "")
    again = command(tmp_path, "create", **changes)
    assert (again.returncode, again.stdout) == (0, "There is a template for these settings already.\n")
    (head, *_) = command(tmp_path, "ls", **changes).stdout.splitlines()
    assert head.split("  ")[1].startswith("ready")
    assert command(tmp_path, "verify", head.split()[0], **changes).returncode == 0
    assert not list((tmp_path / "state" / PLACE / "qemu" / "desktops").iterdir())
