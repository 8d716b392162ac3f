"""Command lines that are wrong: whatever is given, it is told in clean lines, and never with a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_process import envd

NOBODY = {"ENVD_URL": "http://127.0.0.1:1", "ENVD_PORT": "0"}
ILL: dict[str, str] = {"ENVD_PORT": "none"}
COMMANDS = [
    ("init", "--yes"),
    ("doctor", "--full"),
    ("demo",),
    ("demo", "--own"),
    ("serve",),
    ("watch",),
    ("ls",),
    ("ls", "--episodes"),
    ("logs",),
    ("screenshot", "0"),
    ("version", "--url", "http://127.0.0.1:1"),
    ("prewarm",),
    ("reset", "0"),
    ("step", "0", "DONE"),
    ("evaluate", "0"),
    ("bundle", "0"),
    ("rescore", "none"),
    ("cancel", "job-0"),
    ("drain",),
    ("gc", "--dry-run"),
    ("bench",),
    ("tasks", "check", "none"),
    ("tasks", "prefetch", "none"),
    ("images", "ls"),
    ("images", "pull"),
    ("templates", "ls"),
    ("templates", "create"),
    ("templates", "rm", "none"),
    ("templates", "verify"),
    ("aws", "check"),
    ("aws", "ls"),
    ("aws", "gc", "--dry-run"),
]


def told(folder: Path, *arguments: str, **settings: str) -> tuple[int, str]:
    ran = envd(folder, *arguments, **settings)
    assert "Traceback" not in ran.stdout + ran.stderr
    return ran.returncode, ran.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_settings_that_cannot_be_used_are_told_by_every_command(tmp_path: Path, command: tuple[str, ...]) -> None:
    code, said = told(tmp_path, *command, **ILL)
    if command[0] in ("init", "version") or command == ("doctor",):  # they do without them
        return
    assert code != 0
    assert "ENVD_PORT=none (environment)" in said
    assert len(said.splitlines()) <= 2


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("logs", "--since", "yesterday"), 2),
        (("logs", "--since", "1e9d"), 2),
        (("logs", "--since", "999999999d"), 1),
        (("logs", "--level", "loud"), 2),
        (("logs", "--env", "-1"), 2),
        (("logs", "--limit", "0"), 2),
        (("ls", "--url", "http://[::1"), 1),
        (("ls", "--url", "ftp://host"), 1),
        (("ls", "--url", "http://host:99999"), 1),
        (("ls", "--jobs", "--leases"), 2),
        (("ls", "--episodes", "--limit", "0"), 2),
        (("version", "--url", "nothing at all"), 1),
        (("watch", "job/../.."), 1),
        (("watch", "--url", "http://user:pass@host:x"), 1),
        (("screenshot", "-1"), 2),
        (("screenshot", "one"), 2),
        (("reset", "0", "none.json"), 1),
        (("reset", "0", "--counts", "words"), 2),
        (("reset", "0", "--max-steps", "0"), 2),
        (("reset", "0", "--lease", "\udcff"), 1),
        (("step", "0", "DONE", "--pause", "nan"), 2),
        (("step", "0", "a", "-p", "b"), 2),
        (("step", "99999999999999999999", "DONE"), 1),
        (("bundle", "²"), 1),
        (("bundle", "../../etc"), 1),
        (("cancel", "job/../.."), 1),
        (("cancel", ""), 1),
        (("drain", "--limit", "nan"), 2),
        (("rescore", "none.tar"), 2),
        (("rescore", "."), 2),
        (("init", "--yes", "--file", "none/.env"), 1),
        (("init", "--yes", "--network", "home"), 1),
        (("demo", "--provider", "vmware"), 1),
        (("demo", "--own", "-o", "/dev/null/frames"), 1),
        (("serve", "--host", "no such host"), 78),
        (("serve", "--port", "-1"), 78),
        (("images", "pull", "no such image"), 1),
        (("templates", "rm"), 1),
        (("templates", "verify", "../.."), 1),
        (("bench", "--clients", "0"), 2),
    ],
    ids=lambda one: ascii(" ".join(one)) if isinstance(one, tuple) else "",
)
def test_what_is_given_wrong_is_told_without_a_traceback(tmp_path: Path, command: tuple[str, ...], code: int) -> None:
    ended, said = told(tmp_path, *command, **NOBODY)
    assert ended == code
    assert said


@pytest.mark.parametrize("flag", ["--version", "version"])
def test_the_version_is_told_either_way(tmp_path: Path, flag: str) -> None:
    ran = envd(tmp_path, flag)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == envd(tmp_path, "version").stdout
