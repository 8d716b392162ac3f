"""The scripts behind `make`: what they do for a user who may not install, who has an old Python, who chose a
provider."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    path = f"{cwd / 'bin'}:{os.environ['PATH']}"
    mine = {name: value for name, value in os.environ.items() if name != "PROVIDER"}
    return subprocess.run(
        [str(ROOT / "deploy" / script), *arguments],
        cwd=cwd,
        env=mine | {"PATH": path} | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def stand_in(folder: Path, name: str, script: str) -> None:
    """A program that is found before the real one."""
    program = folder / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_a_user_who_may_not_install_is_told_the_one_line_that_does(tmp_path: Path) -> None:
    stand_in(tmp_path, "dpkg-query", "echo 'installed xvfb'; exit 1")
    stand_in(tmp_path, "id", "echo 1000")
    stand_in(tmp_path, "sudo", "exit 1")
    done = run("system-packages.sh", cwd=tmp_path)
    (line,) = [line.strip() for line in done.stderr.splitlines() if "apt-get" in line]
    assert done.returncode == 1
    assert line.startswith("sudo apt-get install -y --no-install-recommends ")
    assert {"bubblewrap", "chromium", "openbox"} <= set(line.split())
    assert "xvfb" not in line.split()


def test_missing_packages_are_installed_by_who_may_and_a_failure_shows_why(tmp_path: Path) -> None:
    stand_in(tmp_path, "dpkg-query", "exit 1")
    stand_in(tmp_path, "id", "echo 0")
    stand_in(
        tmp_path,
        "apt-get",
        f'echo "$@" >> {tmp_path}/called; [ "$1" = update ] || {{ echo no such mirror; exit 100; }}',
    )
    done = run("system-packages.sh", cwd=tmp_path)
    update, install = (tmp_path / "called").read_text().splitlines()
    assert update.startswith("update")
    assert install.startswith("install -y --no-install-recommends")
    assert done.returncode == 1
    assert "no such mirror" in done.stderr


def test_nothing_is_called_when_nothing_is_missing(tmp_path: Path) -> None:
    stand_in(tmp_path, "dpkg-query", 'shift 2; for p in "$@"; do echo "installed $p"; done')
    stand_in(tmp_path, "apt-get", f"touch {tmp_path}/called")
    done = run("system-packages.sh", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "called").exists()


def test_an_old_python_is_refused_by_name(tmp_path: Path) -> None:
    stand_in(tmp_path, "oldpython", '[ "$1" = -V ] && echo Python 3.9.2; exit 1')
    done = run("make-venv.sh", "oldpython", ".venv", "agent", cwd=tmp_path)
    assert done.returncode == 1
    assert "needs Python 3.11 or later; oldpython is Python 3.9.2" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("environ", "env_file", "expected"),
    [
        pytest.param({}, None, "local", id="nothing chosen"),
        pytest.param({"PROVIDER": "sim"}, None, "sim", id="environment"),
        pytest.param({}, "PROVIDER=sim\n", "", id=".env, which the daemon reads itself"),
        pytest.param({"PROVIDER": ""}, None, "local", id="empty"),
        pytest.param({}, "#PROVIDER=sim\n", "local", id="commented out"),
    ],
)
def test_make_serve_takes_local_desktops_unless_somebody_chose(
    tmp_path: Path, environ: dict[str, str], env_file: str | None, expected: str
) -> None:
    stand_in(tmp_path, "fakepython", 'echo "$PROVIDER|$*"')
    if env_file:
        (tmp_path / ".env").write_text(env_file)
    done = run("serve.sh", "--port", "7", cwd=tmp_path, PYTHON="fakepython", **environ)
    assert done.stdout == f"{expected}|-m envd serve --port 7\n"


def test_the_top_level_holds_what_it_should_and_no_more() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert {name.split("/")[0] for name in listed if name} == {
        ".ci",
        ".env.example",
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "README.zh-CN.md",
        "constraints.txt",
        "deploy",
        "envd",
        "pyproject.toml",
        "tests",
    }
