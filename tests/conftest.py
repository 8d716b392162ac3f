"""For every test: nothing in envd may block the event loop, and log lines go where pytest shows them.

What tests of docker and qemu desktops need is looked for once; where it is missing they are skipped by name, and in CI
they fail.

And the interpreters that process tests run on: the one that runs the tests, and one from the other side of 3.12. Since
Python 3.12 a server that closes waits for its open connections, so the way out has to be seen on both sides.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog
from blockbuster import blockbuster_ctx
from figures import FIGURES

from envd.settings import load

if TYPE_CHECKING:
    from aws_faults import FaultyAccount

ROOT = Path(__file__).parent.parent
WATERSHED = (3, 12)
OLDEST = (3, 11)


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop() -> Iterator[None]:
    """A call from envd that blocks while a loop runs raises BlockingError there; ruff sees only the plainest of them.

    Not in the agent, which serves one guest and may look at a file.
    """
    with blockbuster_ctx("envd", excluded_modules=["envd.agent"]):
        yield


@pytest.fixture(scope="session", autouse=True)
def logs_are_captured() -> None:
    """Without this structlog prints, and looks up source files for its tracebacks, which blocks."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            structlog.stdlib.render_to_log_kwargs,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Of a test marked `docker` or `qemu`: skip it where its parts are missing, fail it in CI."""
    for name, missing in (("docker", missing_for_docker), ("qemu", missing_for_qemu)):
        if item.get_closest_marker(name) is not None and (reason := missing()):
            if os.environ.get("CI"):
                pytest.fail(f"{name} tests must run in CI: {reason}", pytrace=False)
            pytest.skip(f"{name}: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests counted and measured; and of those that make up their inputs and recorded them as `tried`, how many
    ended how, by file."""
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.write_line(line)
    tried: dict[str, Counter[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "tried" and report.when == "call":
                    tried.setdefault(report.nodeid.partition("::")[0], Counter()).update(value)
    for file, ends in tried.items():
        told = ", ".join(f"{end} × {count}" for end, count in sorted(ends.items()))
        terminalreporter.write_line(f"{file}: {ends.total()} inputs: {told}")


@cache
def missing_for_docker() -> str:
    """Why no test can use a Docker engine here; empty if they can."""
    if shutil.which("docker") is None:
        return "no docker command; deploy/docker-engine.sh installs it"
    for image in ("envd/desktop", "envd/qemu"):
        looked = subprocess.run(
            ["docker", "image", "inspect", "--format", "{{.Id}}", image],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        if looked.returncode:
            said = (looked.stderr.strip().splitlines() or ["no answer"])[-1]
            return f"no image {image} ({said}); `make images` makes it"
    return ""


@cache
def missing_for_qemu() -> str:
    """Why no test can make a virtual machine here; empty if they can."""
    for program, package in (("qemu-system-x86_64", "qemu-system-x86"), ("qemu-img", "qemu-utils")):
        if shutil.which(program) is None:
            return f"no {program}; the Debian package is {package}"
    disk = load(env_file=None).guest_disk
    return "" if disk.exists() else f"no guest disk at {disk}; `make images` makes it"


@pytest.fixture(scope="module")
def account() -> Iterator[FaultyAccount]:
    """At AWS, for all tests of a module: it takes seconds to start."""
    from aws_faults import faulty_account  # no test but AWS's waits for boto3

    with faulty_account() as made:
        yield made


@pytest.fixture(scope="session")
def other_python() -> Path:
    """An interpreter from the other side of 3.12, in a virtual environment that has envd. Skips when there is none."""
    found = sorted((version, path) for path in _interpreters() if (version := _version_of(path)) >= OLDEST)
    others = [one for one in found if (one[0] >= WATERSHED) is not (sys.version_info[:2] >= WATERSHED)]
    if not others:
        side = "newer than 3.11" if sys.version_info[:2] < WATERSHED else "3.11"
        pytest.skip(f"no Python {side} on PATH or under pyenv")
    version, path = others[-1]
    return _environment(version, path)


@pytest.fixture(params=["this", "other"])
def python(request: pytest.FixtureRequest) -> Path:
    """Each of the two in turn."""
    return Path(sys.executable) if request.param == "this" else request.getfixturevalue("other_python")


def _interpreters() -> Iterator[Path]:
    for minor in range(11, 20):
        if found := shutil.which(f"python3.{minor}"):
            yield Path(found)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from pyenv.glob("versions/*/bin/python3")


def _version_of(python: Path) -> tuple[int, int]:
    """(0, 0) for what cannot make virtual environments, such as a shim without a version behind it."""
    probe = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    ran = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False, timeout=20)
    major, minor = ran.stdout.split() if ran.returncode == 0 else ("0", "0")
    return int(major), int(minor)


def _environment(version: tuple[int, int], python: Path) -> Path:
    """Made once, and again when what it is made from has changed. Two runs of the tests do not make it at once."""
    venv = ROOT / f".venv-{version[0]}.{version[1]}"
    constraints, project = ROOT / "constraints.txt", ROOT / "pyproject.toml"
    made_from = hashlib.sha256(f"{python}\n{project.read_text()}\n{constraints.read_text()}".encode()).hexdigest()
    stamp, made = venv / "made-from", venv / "bin" / "python"
    with project.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (stamp.is_file() and stamp.read_text() == made_from):
            _run(python, "-m", "venv", "--clear", venv)
            pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
            _run(made, *pip, "--constraint", constraints, "--editable", ROOT)
            stamp.write_text(made_from)
    return made


def _run(*command: str | Path) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        pytest.skip(f"no second interpreter: {' '.join(map(str, command[:4]))} … failed: {last}")
