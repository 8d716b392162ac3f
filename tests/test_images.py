"""What our images are made of, and what the script that makes them says when it cannot. No image is made here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = PROJECT / "deploy/images/desktop/packages.txt"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the images are made of."""
    copy = tmp_path / "project"
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("deploy", "envd"):
        shutil.copytree(PROJECT / name, copy / name, ignore=unwanted)
    shutil.copy(PROJECT / "constraints.txt", copy)
    return copy


def script(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(project / "deploy/make-images.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "ENVD_CACHE": str(project / "cache"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def hashes(project: Path) -> dict[str, str]:
    done = script(project, "--hashes")
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("changed", "images"),
    [
        pytest.param("envd/agent/screen.py", {"desktop", "guest-disk"}, id="the-guest-server"),
        pytest.param("envd/png.py", {"desktop", "guest-disk"}, id="a-module-that-the-guest-server-imports"),
        pytest.param("envd/drivers/local/guest/openbox/rc.xml", {"desktop", "guest-disk"}, id="shared-with-local-ones"),
        pytest.param("constraints.txt", {"desktop", "guest-disk"}, id="versions"),
        pytest.param("deploy/images/common/runner.py", {"desktop", "qemu", "guest-disk"}, id="the-first-process"),
        pytest.param("deploy/images/qemu/qemu.py", {"qemu"}, id="qemu"),
        pytest.param("deploy/images/guest-disk/lib/machine.py", {"guest-disk"}, id="the-machine"),
        pytest.param("envd/service.py", set(), id="nothing-of-theirs"),
    ],
)
def test_an_image_is_made_anew_when_something_in_it_changed(project: Path, changed: str, images: set[str]) -> None:
    before = hashes(project)
    with (project / changed).open("a") as file:
        file.write("\n# changed\n")
    after = hashes(project)
    assert {name for name in before if before[name] != after[name]} == images


def test_the_same_files_give_the_same_hashes_wherever_and_whenever_they_lie(project: Path) -> None:
    for path in project.rglob("*"):
        os.utime(path, (1, 1))
    assert hashes(project) == hashes(PROJECT)


def test_the_guest_server_imports_with_the_files_that_its_image_gets(project: Path, tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, project / "deploy/images/desktop/parts.py", project],
        capture_output=True,
        text=True,
        check=True,
    )
    files = [Path(line) for line in told.stdout.splitlines()]
    for file in files:
        target = tmp_path / "image" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project / file, target)
    modules = [
        ".".join(file.with_suffix("").parts) for file in files if file.stem not in ("__init__", "__main__", "warm")
    ]
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'image')!r})\nimport {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_desktop_has_every_package_that_the_guest_server_asks_for() -> None:
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {re.split(r"[<>=!~ ]", line)[0].lower() for line in [*extras["agent"], "aiohttp"]}
    had = {line.lower() for line in PACKAGES.read_text().splitlines() if not line.startswith("#")}
    pinned = {line.split("==")[0].lower() for line in (PROJECT / "constraints.txt").read_text().splitlines()}
    assert asked <= had <= pinned


def test_a_host_without_docker_is_told_to_install_it(project: Path, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    done = script(project, PATH=str(programs))
    assert done.returncode == 1
    assert "apt-get install -y --no-install-recommends docker.io" in done.stderr


@pytest.mark.skipif(shutil.which("docker") is None, reason="the Docker client is not installed")
def test_an_engine_that_does_not_run_is_told_from_one_that_is_not_there(project: Path, tmp_path: Path) -> None:
    done = script(project, DOCKER_HOST=f"unix://{tmp_path}/docker.sock")
    assert done.returncode == 1
    assert "Docker does not run" in done.stderr


def test_an_image_that_does_not_exist_is_answered_with_those_that_do(project: Path) -> None:
    done = script(project, "deskop")
    assert done.returncode == 1
    assert "deskop" in done.stderr
    assert "guest-disk" in done.stderr
