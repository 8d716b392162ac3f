"""Every example of the pages is run against a daemon with simulated desktops, and prints what the page says it prints.

An example is a fence of `sh` or `python`; a fence of `text` after it is its output, in which `…` stands for any text.
One that is marked `not-run:` is shown with its reason, and not run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from daemon_process import DaemonProcess, daemon, ended_job, environment

from envd.app.docs.markdown import NOT_RUN
from envd.app.docs.pages import PAGES
from envd.app.docs.reference import examples

ROOT = Path(__file__).parent.parent
HERE = "http://127.0.0.1:15001"
"""The daemon's address on the pages."""
QUICK = {
    "ENVD_ENVS": "5",
    "ENVD_SCREEN": "640x480",
    "ENVD_ACTION_PAUSE": "0",
    "ENVD_SETTLE_QUIET": "0",
    "ENVD_OFFLINE": "1",
}
TASK = {"id": "greeting", "instruction": "Write hello.", "evaluator": {"func": "infeasible"}}
LAST = "POST /v1/drain"
"""The example that ends the daemon."""
CONSOLE = """
import ast, asyncio, contextlib, inspect, io, json, sys, traceback
import envd

def run(source, names):
    '''As `python -m asyncio`: `await` as it stands, and the last expression is shown.'''
    tree = ast.parse(source)
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        call = ast.Call(ast.Name("_shown", ast.Load()), [tree.body[-1].value], [])
        tree.body[-1].value = call
    ast.fix_missing_locations(tree)
    return eval(compile(tree, "example", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)

async def main():
    asked = json.load(sys.stdin)
    told = {}
    async with envd.Client() as client:
        for name, source in asked["examples"].items():
            names = {"client": client, "envd": envd, **asked["ids"]}
            names["_shown"] = lambda value: None if value is None else print(repr(value))
            with contextlib.redirect_stdout(io.StringIO()) as out:
                try:
                    work = run(source, names)
                    if inspect.iscoroutine(work):
                        await asyncio.wait_for(work, 30)
                except Exception:
                    traceback.print_exc(file=out)
            told[name] = out.getvalue()
    print(json.dumps(told))

asyncio.run(main())
"""


@dataclass(frozen=True)
class Example:
    language: str
    code: str
    reason: str
    """Why it is not run; empty of one that is."""
    output: str | None


def examples_of(text: str) -> list[Example]:
    found: list[Example] = []
    between = 0
    for match in re.finditer(r"^```(\w+)[ ]?(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        language, about, code = match.groups()
        if language in ("sh", "python"):
            reason = about.partition(NOT_RUN)[2].strip()
            assert not about or reason or about == "driver", f"{about!r} says no reason"
            found.append(Example(language, code, reason, None))
        elif language == "text" and found and not text[between : match.start()].strip():
            found[-1] = Example(found[-1].language, found[-1].code, found[-1].reason, code)
        between = match.end()
    return found


def told_of(shown: str, printed: str) -> None:
    """`printed` is what `shown` says, blanks at the ends aside."""
    pattern = ".*".join(re.escape(part) for part in shown.strip().split("…"))
    assert re.fullmatch(pattern, printed.strip(), re.DOTALL), f"shown:\n{shown}\nprinted:\n{printed}"


def shell(code: str, folder: Path, names: dict[str, str]) -> str:
    """What a script prints, run as a reader would: each line must succeed. `envd` is this tree's."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "envd").write_text(f'#!/bin/sh\nexec {sys.executable} -m envd "$@"\n')
    (tools / "envd").chmod(0o755)
    names = names | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    return program(["bash", "-euo", "pipefail", "-c", code], folder, names)


def program(command: list[str], folder: Path, names: dict[str, str], given: str = "") -> str:
    ran = subprocess.run(
        command, cwd=folder, env=names, input=given, capture_output=True, text=True, check=False, timeout=100
    )
    assert ran.returncode == 0, f"{command[-1]}\nended with {ran.returncode}:\n{ran.stdout}{ran.stderr}"
    return ran.stdout


def around(served: DaemonProcess) -> dict[str, str]:
    return environment(served.state_dir) | {"ENVD_URL": served.url, "HOME": str(served.state_dir.parent)}


NATIVE = [name for name in PAGES if not name.startswith("api-")]
RUN = {name: examples_of(PAGES[name].read()) for name in NATIVE if name != "drivers" and not PAGES[name].copied}

WANT_TWO = {name for name in RUN if "ENVD_ENVS=2" in PAGES[name].read()}


@pytest.mark.parametrize("name", [name for name, found in RUN.items() if any(not one.reason for one in found)])
async def test_the_examples_of_a_page_print_what_it_says(name: str, tmp_path: Path) -> None:
    """With the one env of the quick start, unless the page says that it takes two."""
    envs = "2" if name in WANT_TWO else "1"
    async with daemon(tmp_path / "state", env=QUICK | {"ENVD_ENVS": envs}) as (served, _):
        folder = tmp_path / "reader"
        folder.mkdir()
        names = around(served)
        for example in RUN[name]:
            if example.reason:
                continue
            code = example.code.replace(HERE, served.url)
            if example.language == "sh":
                run = partial(shell, code, folder, names)
            else:
                run = partial(program, [sys.executable, "-c", code], folder, names)
            printed = await anyio.to_thread.run_sync(run)
            if example.output is not None:
                told_of(example.output, printed)


def of_operations(language: str) -> Iterator[tuple[str, Example]]:
    for name, text in examples().items():
        found = [one for one in examples_of(text) if one.language == language]
        assert len(found) == 1, name
        assert found[0].reason or found[0].output is not None, f"{name} does not say what it prints"
        yield name, found[0]


OF_OPERATIONS = {language: dict(of_operations(language)) for language in ("sh", "python")}


@pytest.mark.parametrize("language", OF_OPERATIONS)
async def test_the_examples_of_the_reference_print_what_it_says(language: str, tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (served, session):

        async def post(path: str, body: Any = None) -> Any:
            async with session.post(f"{served.url}{path}", json=body or {}) as answer:
                assert answer.status < 300, await answer.text()
                return await answer.json()

        job = await ended_job(session, served.url, (await post("/v1/envs/2/reset", {"task": TASK}))["id"])
        await post("/v1/envs/2/evaluate")
        for env in (0, 1):
            await ended_job(session, served.url, (await post(f"/v1/envs/{env}/reset", {"task": TASK}))["id"])
        lease = await post("/v1/leases", {"count": 1, "wait_s": 30})
        ids = {"job": job["id"], "episode": job["episode_id"], "lease": lease["id"]}
        found = OF_OPERATIONS[language]
        # The one that ends the daemon comes last.
        runnable = {name: one for name, one in found.items() if not one.reason and name != LAST} | {LAST: found[LAST]}
        folder = tmp_path / "reader"
        folder.mkdir()
        if language == "sh":
            names = around(served) | {name.upper(): value for name, value in ids.items()}
            for example in runnable.values():
                printed = await anyio.to_thread.run_sync(shell, example.code, folder, names)
                told_of(example.output or "", printed)
        else:
            asked = {
                "examples": {name: example.code for name, example in runnable.items()},
                "ids": {f"{name}_id": value for name, value in ids.items()},
            }
            run = partial(program, [sys.executable, "-c", CONSOLE], folder, around(served), json.dumps(asked))
            told = json.loads(await anyio.to_thread.run_sync(run))
            for name, example in runnable.items():
                told_of(example.output or "", told[name])


def test_what_is_not_run_is_little() -> None:
    found = [one for name in NATIVE for one in RUN.get(name, [])] + [
        one for of_language in OF_OPERATIONS.values() for one in of_language.values()
    ]
    assert sum(not one.reason for one in found) > 90
    assert sum(bool(one.reason) for one in found) < 20


def test_the_check_of_an_output_can_fail() -> None:
    told_of("a …\nb", "a 1 2\nb\n")
    for printed in ("a\nb", "a 1\nbc", ""):
        with pytest.raises(AssertionError):
            told_of("a …\nb", printed)
