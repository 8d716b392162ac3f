"""The keeper of templates: what is found, what is refused, what goes when there is no room. No machine runs here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from envd.errors import NoSpace, StartError
from envd.settings import load
from envd.vm.disks import Disk
from envd.vm.frozen import Changed
from envd.vm.machine import Machine
from envd.vm.templates import (
    FAILURES,
    MANIFEST,
    OVERLAY_BUDGET,
    Plan,
    Template,
    Templates,
    Trial,
    list_templates,
    remove_template,
    verify_template,
)

MIB = 1024**2
MACHINE = Machine(64 * MIB, 2, "tcg", (1920, 1080), (7, 2, 0))
PLAN = Plan(MACHINE, Disk(Path("/d"), 1024 * MIB, "d1"), 1024 * MIB, "qemu 7.2")
NEEDED = MACHINE.memory + OVERLAY_BUDGET
TRIAL = Trial(frame="f", identity="helper")


def keeper(root: Path, limit: int = 16 * NEEDED) -> Templates:
    templates = Templates(root / "templates", limit)
    templates.open()
    return templates


def made(templates: Templates, plan: Plan = PLAN, used_at: float | None = None) -> Template:
    directory = templates.begin(plan)
    with (directory / "ram").open("r+b") as ram:
        ram.seek(MIB)
        ram.write(os.urandom(MIB))
    (directory / "state").write_bytes(b"state" * 1000)
    (directory / "disk.qcow2").write_bytes(b"disk" * 1000)
    template = templates.admit(plan, TRIAL, 1.0)
    if used_at is not None:
        os.utime(template.directory, (used_at, used_at))
    return template


def plan_of(disk: str) -> Plan:
    return Plan(MACHINE, Disk(Path("/d"), 1024 * MIB, disk), 1024 * MIB, "qemu 7.2")


def test_what_was_made_is_found_and_as_it_was(tmp_path: Path) -> None:
    templates = keeper(tmp_path)
    assert templates.find(PLAN.key) is None
    template = made(templates)
    assert templates.find(PLAN.key) == template
    assert templates.verify(PLAN.key) == []
    assert not list(templates.root.glob("*.new"))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(plan_of("d2"), id="disk"),
        pytest.param(Plan(MACHINE, PLAN.disk, 2048 * MIB, "qemu 7.2"), id="size of the disk"),
        pytest.param(Plan(MACHINE, PLAN.disk, PLAN.size, "qemu 7.3"), id="image"),
        *(
            pytest.param(Plan(machine, PLAN.disk, PLAN.size, PLAN.image), id=name)
            for name, machine in {
                "memory": Machine(128 * MIB, 2, "tcg", (1920, 1080), (7, 2, 0)),
                "processors": Machine(64 * MIB, 4, "tcg", (1920, 1080), (7, 2, 0)),
                "accelerator": Machine(64 * MIB, 2, "kvm", (1920, 1080), (7, 2, 0)),
                "screen": Machine(64 * MIB, 2, "tcg", (1280, 720), (7, 2, 0)),
                "version": Machine(64 * MIB, 2, "tcg", (1920, 1080), (8, 2, 0)),
            }.items()
        ),
    ],
)
def test_whatever_shapes_a_machine_is_in_its_key(other: Plan) -> None:
    assert other.key != PLAN.key


def test_where_the_disk_lies_is_not_in_the_key() -> None:
    moved = Plan(MACHINE, Disk(Path("/elsewhere"), PLAN.disk.size, PLAN.disk.identity), PLAN.size, PLAN.image)
    assert moved.key == PLAN.key


def write(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")


def exchange(path: Path) -> None:
    content, status = path.read_bytes(), path.stat()
    path.rename(path.with_suffix(".old"))
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", ["ram", "state", "disk.qcow2"])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: os.truncate(path, path.stat().st_size - 1), id="cut"),
        pytest.param(write, id="written"),
        pytest.param(exchange, id="exchanged"),
        pytest.param(Path.unlink, id="gone"),
    ],
)
def test_a_file_that_changed_is_told_by_a_look(tmp_path: Path, name: str, spoil: Callable[[Path], None]) -> None:
    templates = keeper(tmp_path)
    template = made(templates)
    spoil(template.directory / name)
    with pytest.raises(Changed, match=name):
        templates.find(PLAN.key)
    assert templates.verify(PLAN.key)
    assert templates.listed()[0].problem


def test_a_change_that_no_look_tells_is_told_by_verifying(tmp_path: Path) -> None:
    templates = keeper(tmp_path)
    ram = made(templates).directory / "ram"
    status = ram.stat()
    with ram.open("r+b") as file:
        file.seek(MIB + 5)
        file.write(b"x")
    os.utime(ram, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert templates.find(PLAN.key) is not None
    assert templates.verify(PLAN.key) == ["ram is not what it was when the template was made"]


def test_a_hole_that_a_clone_looked_at_is_no_change(tmp_path: Path) -> None:
    templates = keeper(tmp_path)
    ram = made(templates).directory / "ram"
    status = ram.stat()
    with ram.open("r+b") as file:
        file.seek(10 * MIB)
        file.write(bytes(MIB))
    os.utime(ram, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert templates.verify(PLAN.key) == []


def test_what_a_killed_daemon_left_half_made_goes_and_what_another_makes_stays(tmp_path: Path) -> None:
    templates = keeper(tmp_path)
    theirs = templates.begin(plan_of("theirs"))
    left = templates.begin(PLAN)
    with templates.locked(theirs.stem, "make") as locked:
        assert locked
        keeper(tmp_path)
        assert theirs.exists()
        assert not left.exists()


def test_only_one_daemon_makes_a_template(tmp_path: Path) -> None:
    templates = keeper(tmp_path)
    program = (
        "import sys; from pathlib import Path; from envd.vm.templates import Templates;"
        f"print(Templates(Path({str(templates.root)!r}), 1).lock('k', 'make') is not None)"
    )
    with templates.locked("k", "make"):
        assert run(program) == "False"
    assert run(program) == "True"


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def test_the_least_recently_used_goes_when_there_is_no_room(tmp_path: Path) -> None:
    templates = keeper(tmp_path, limit=NEEDED + 3 * MIB)
    for index, disk in enumerate(("a", "b", "c")):
        made(templates, plan_of(disk), used_at=1000.0 + index)
    templates.cloned(Template(templates.root / plan_of("a").key, templates.find(plan_of("a").key).manifest))  # type: ignore[union-attr]  # just made
    templates.begin(plan_of("d"))
    left = {one.key for one in templates.listed()}
    assert left == {plan_of("a").key, plan_of("c").key}


def test_what_a_daemon_uses_does_not_go_and_too_little_room_is_told_with_numbers(tmp_path: Path) -> None:
    templates = keeper(tmp_path, limit=NEEDED)
    template = made(templates)
    with templates.locked(template.key, "use", shared=True), pytest.raises(NoSpace) as caught:
        templates.begin(plan_of("other"))
    assert caught.value.facts["needed_bytes"] == NEEDED
    assert caught.value.facts["free_bytes"] < NEEDED
    assert templates.find(template.key) is not None


def test_failures_are_counted_for_every_daemon(tmp_path: Path) -> None:
    template = made(keeper(tmp_path))
    assert [keeper(tmp_path).failed(template) for _ in range(FAILURES)] == [1, 2]


def test_a_clone_that_was_made_forgives_the_failures_before_it(tmp_path: Path) -> None:
    templates = keeper(tmp_path)
    template = made(templates)
    templates.failed(template)
    templates.cloned(template)
    assert templates.failed(template) == 1


def test_what_is_put_aside_is_kept_without_its_memory_and_not_found(tmp_path: Path) -> None:
    templates = keeper(tmp_path)
    made(templates)
    aside = templates.set_aside(PLAN.key)
    assert sorted(path.name for path in aside.iterdir()) == ["disk.qcow2", MANIFEST, "state"]
    assert templates.find(PLAN.key) is None
    assert [(one.key, one.problem) for one in templates.listed()] == [(aside.name, "put aside after it failed")]
    made(templates)
    assert templates.set_aside(PLAN.key) == aside
    assert templates.set_aside("no-such-key").exists() is False


def test_a_folder_of_others_is_not_used(tmp_path: Path) -> None:
    root = tmp_path / "templates"
    root.mkdir(mode=0o777)
    root.chmod(0o777)
    with pytest.raises(StartError, match="others"):
        Templates(root, NEEDED).open()
    root.rmdir()
    root.symlink_to(tmp_path)
    with pytest.raises(StartError):
        Templates(root, NEEDED).open()


@pytest.mark.parametrize("words", [pytest.param("{", id="no JSON"), pytest.param("{}", id="nothing in it")])
def test_a_folder_without_a_whole_manifest_is_no_template(tmp_path: Path, words: str) -> None:
    templates = keeper(tmp_path)
    (made(templates).directory / MANIFEST).write_text(words)
    assert templates.find(PLAN.key) is None
    assert "not whole" in templates.listed()[0].problem


def test_the_command_line_lists_verifies_and_removes(tmp_path: Path) -> None:
    settings = load({"HOME": str(tmp_path)}, env_file=None, template_dir=tmp_path / "templates")
    assert list_templates(settings) == []
    template = made(keeper(tmp_path))
    assert [one.key for one in list_templates(settings)] == [template.key]
    assert verify_template(settings, template.key) == []
    with keeper(tmp_path).locked(template.key, "use", shared=True):
        assert list_templates(settings)[0].in_use
        assert not remove_template(settings, template.key)
    assert remove_template(settings, template.key)
    assert list_templates(settings) == []
    assert not remove_template(settings, template.key)
    assert not remove_template(settings, "../templates")
