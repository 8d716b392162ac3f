"""What the engine is told of containers, what its refusals become, and what a log's lines mean. Without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from envd.drivers.docker import logs, recipes
from envd.drivers.docker.engine import Engine, refusal, start_error
from envd.drivers.docker.recipes import Identity
from envd.errors import (
    BootFailed,
    DiskUnusable,
    DockerUnavailable,
    ImageMissing,
    MissingDependency,
    NoSpace,
    PortConflict,
    SettingsError,
    StartError,
)
from envd.vm.cell import CellSpec

GIB = 1024**3
WHO = Identity("daemon", "desktop-1", job="job-1", env=3, deadline=1e9)


def desktop() -> dict[str, Any]:
    return recipes.of_desktop("sha256:1", WHO, screen=(800, 600), memory=2 * GIB, cpus=None)


def foreign(*, kvm: bool = False, disk: str | None = "/disks/a.qcow2") -> dict[str, Any]:
    return recipes.of_foreign("sha256:1", WHO, memory=4 * GIB, cpus=4, disk_size=32 * GIB, disk=disk, kvm=kvm)


def cell(tmp_path: Path, *, role: Any = "desktop") -> dict[str, Any]:
    spec = CellSpec(
        "desktop-1", "desktop-1", role, ("qemu", "-m"), tmp_path, GIB, disk=tmp_path / "disk", template=tmp_path / "t"
    )
    return recipes.of_cell("sha256:1", WHO, spec, user="1000:1000", own_users=False)


@pytest.fixture(params=["desktop", "foreign", "cell"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {"desktop": desktop(), "foreign": foreign(), "cell": cell(tmp_path)}[request.param]


def test_every_port_is_of_this_host_alone_and_chosen_by_the_engine(recipe: dict[str, Any]) -> None:
    bindings = recipe["HostConfig"]["PortBindings"]
    assert set(bindings) == {"5000/tcp", "9222/tcp", "8006/tcp", "8080/tcp"}
    assert all(binding == [{"HostIp": "127.0.0.1", "HostPort": ""}] for binding in bindings.values())


def test_nothing_is_privileged_restarted_or_without_limit(recipe: dict[str, Any]) -> None:
    host = recipe["HostConfig"]
    assert not host.get("Privileged")
    assert host["RestartPolicy"] == {"Name": "no"}
    assert host["Memory"] == host["MemorySwap"] > 0
    assert host["PidsLimit"] > 0
    assert int(host["LogConfig"]["Config"]["max-size"]) <= 16 * 1024**2


def test_labels_say_whose_it_is_for_what_and_until_when(recipe: dict[str, Any]) -> None:
    labels = recipe["Labels"]
    assert float(labels.pop("io.envd.created")) > 1e9
    assert labels == {
        "io.envd.daemon": "daemon",
        "io.envd.desktop": "desktop-1",
        "io.envd.role": "desktop",
        "io.envd.job": "job-1",
        "io.envd.env": "3",
        "io.envd.deadline": "1000000000",
    }


def test_a_foreign_image_is_told_what_osworld_tells_its_own() -> None:
    recipe = foreign()
    assert recipe["Env"] == ["DISK_SIZE=32G", "RAM_SIZE=4G", "CPU_CORES=4", "KVM=N"]
    assert recipe["HostConfig"]["CapAdd"] == ["NET_ADMIN"]
    [mount] = recipe["HostConfig"]["Mounts"]
    assert mount == {"Type": "bind", "Source": "/disks/a.qcow2", "Target": "/System.qcow2", "ReadOnly": True}
    assert "Devices" not in recipe["HostConfig"]


@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this host has no /dev/kvm to give")
def test_kvm_is_given_only_where_it_was_proven() -> None:
    recipe = foreign(kvm=True)
    assert [device["PathOnHost"] for device in recipe["HostConfig"]["Devices"]] == ["/dev/kvm"]
    assert "KVM=N" not in recipe["Env"]


def test_a_foreign_image_has_room_beside_its_guest() -> None:
    assert foreign()["HostConfig"]["Memory"] > 4 * GIB


def test_our_desktop_has_what_sudo_needs_and_no_more() -> None:
    host = desktop()["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert {"SETUID", "SETGID"} < set(host["CapAdd"])
    assert not {"SYS_ADMIN", "NET_ADMIN", "NET_RAW", "MKNOD"} & set(host["CapAdd"])
    assert desktop()["Env"] == ["SCREEN=800x600"]


def test_a_cell_has_no_rights_and_shares_the_template_for_reading(tmp_path: Path) -> None:
    recipe = cell(tmp_path)
    mounts = {mount["Target"]: mount["ReadOnly"] for mount in recipe["HostConfig"]["Mounts"]}
    assert mounts == {"/run/vm": False, "/System.qcow2": True, "/template": True, "/template/ram": False}
    assert recipe["HostConfig"]["CapDrop"] == ["ALL"]
    assert "CapAdd" not in recipe["HostConfig"]
    assert recipe["HostConfig"]["SecurityOpt"] == ["no-new-privileges:true"]
    assert (recipe["User"], recipe["Cmd"]) == ("1000:1000", ["qemu", "-m"])


def test_only_a_template_in_the_making_is_written(tmp_path: Path) -> None:
    mounts = {mount["Target"]: mount["ReadOnly"] for mount in cell(tmp_path, role="template")["HostConfig"]["Mounts"]}
    assert mounts["/template"] is False


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        pytest.param("No such image: a:latest", ImageMissing, id="image"),
        pytest.param("driver failed: Bind for 127.0.0.1:1 failed: port is already allocated", PortConflict, id="port"),
        pytest.param("listen tcp4 127.0.0.1:32768: bind: address already in use", PortConflict, id="port-proxy"),
        pytest.param("write /var/lib/docker/x: no space left on device", NoSpace, id="space"),
        pytest.param(
            'invalid mount config for type "bind": bind source path does not exist: /a/b', DiskUnusable, id="disk"
        ),
        pytest.param("something else", BootFailed, id="other"),
    ],
)
def test_a_refusal_of_the_engine_is_of_the_class_that_says_what_to_do(message: str, kind: type[BootFailed]) -> None:
    error = refusal("start a container", message, 500)
    assert type(error) is kind
    assert message in error.detail or error.facts["disk"] == "/a/b"


def test_what_is_not_installed_is_a_missing_dependency_at_start() -> None:
    assert type(start_error(DockerUnavailable("a", cause="not_installed"))) is MissingDependency
    assert type(start_error(DockerUnavailable("a", cause="not_running"))) is StartError


@pytest.mark.parametrize("host", ["tcp://10.0.0.1:2375", "ssh://user@host", "/var/run/docker.sock", "unix://relative"])
def test_only_a_socket_of_this_host_is_an_engine(host: str) -> None:
    with pytest.raises(SettingsError, match="DOCKER_HOST"):
        Engine(host)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        pytest.param("envd-milestone: guest-server", "guest server", id="ours"),
        pytest.param("chromium: envd-milestone: display", "display", id="behind-a-name"),
        pytest.param("❯ Booting image using QEMU v9.2.0...", "firmware", id="banner"),
        pytest.param("SeaBIOS (version 1.16.2-debian-1.16.2-1)", "firmware", id="bios"),
        pytest.param("BdsDxe: loading Boot0002", "firmware", id="uefi"),
        pytest.param("GNU GRUB  version 2.06", "boot loader", id="grub"),
        pytest.param("[    0.000000] Linux version 6.5.0-18-generic", "kernel", id="kernel"),
        pytest.param("[  OK  ] Started GNOME Display Manager.", "display", id="display"),
        pytest.param("envd-milestone: <script>", None, id="no-name"),
        pytest.param("nothing in particular", None, id="nothing"),
    ],
)
def test_milestones_are_known_by_their_lines(line: str, name: str | None) -> None:
    assert logs.milestone(line) == name


def test_lines_cannot_move_a_cursor_nor_be_endless() -> None:
    assert "\x1b" not in logs.clean("a\x1b[2Jb")
    assert len(logs.clean("a" * 10**6)) == logs.LINE
