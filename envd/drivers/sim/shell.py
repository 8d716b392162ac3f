"""The commands that a sim desktop knows, and scripts of them.

A script is commands joined by `;`, `&&`, `||` or a new line, each with `>` or `>>` a file where it writes to one. There
are no pipes and no variables but $HOME. A command that is not known ends with 127, as in a shell.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

from .files import HOME, absolute, is_folder
from .gui import Output, run_python

if TYPE_CHECKING:
    from .desktop import Desktop

PYTHONS = ("python", "python3")
SHELLS = ("sh", "bash")
JOINTS = (";", "&&", "||")
TO_FILE = (">", ">>")
SIGNS = ";&|<>\n"
_STDERR_ELSEWHERE = re.compile(r"\s2>\s*(/dev/null|&1)")


async def run_words(words: list[str], desktop: Desktop) -> Output:
    """Run one command."""
    match words:
        case [python, "-c", program, *_] if python in PYTHONS:
            desktop.inputs.append(program)
            return await run_python(program, desktop.gui, desktop.behaviour.pace)
        case [shell, "-c", script, *_] if shell in SHELLS:
            return await run_script(script, desktop)
        case ["timeout", _, *rest] if rest:
            return await run_words(rest, desktop)
        case ["sleep", seconds] if seconds.replace(".", "", 1).isdigit():
            await asyncio.sleep(float(seconds))
            return Output()
        case [name, *rest] if name in _COMMANDS:
            return _COMMANDS[name](rest, desktop)
        case _:
            return Output(error=f"{words[0] if words else ''}: command not found\n", returncode=127)


async def run_script(script: str, desktop: Desktop) -> Output:
    """Run what a shell would; the last command's return code is the script's."""
    try:
        steps = _steps(script)
    except ValueError as error:
        return Output(error=f"sh: a sim desktop does not understand {script[:200]}: {error}\n", returncode=2)
    printed, complaints, code = "", "", 0
    for joint, words, mode, target in steps:
        if (joint == "&&" and code) or (joint == "||" and not code):
            continue
        done = await run_words(words, desktop)
        code = done.returncode
        complaints += done.error
        if mode:
            before = desktop.files.get(target, b"") if mode == ">>" else b""
            desktop.files[target] = before + done.output.encode()
        else:
            printed += done.output
    return Output(printed, complaints, code)


def _steps(script: str) -> list[tuple[str, list[str], str, str]]:
    """Of each command: what joins it to the one before, its words, `>` or `>>`, and the file. Raises ValueError."""
    lexer = shlex.shlex(_STDERR_ELSEWHERE.sub(" ", script), posix=True, punctuation_chars=SIGNS)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    steps: list[tuple[str, list[str], str, str]] = []
    joint, words, mode, target = ";", list[str](), "", ""
    tokens = iter([*lexer, ";"])
    for token in tokens:
        sign = _sign(token)
        if sign in JOINTS:
            steps += [(joint, words, mode, target)] if words else []
            joint, words, mode, target = sign, [], "", ""
        elif sign in TO_FILE and not _sign(file := next(tokens)):
            mode, target = sign, absolute(file)
        elif sign:
            raise ValueError(f"{sign} is not known here")
        else:
            words.append(token.replace("$HOME", HOME))
    return steps


def _sign(token: str) -> str:
    """The token if it is one of the shell's own, "" for a word."""
    return token.strip("\n") or ";" if token and not token.strip(SIGNS) else ""


def _cat(paths: list[str], desktop: Desktop) -> Output:
    printed, complaints = "", ""
    for path in paths:
        content = desktop.files.get(absolute(path))
        if content is None:
            complaints += f"cat: {path}: No such file or directory\n"
        else:
            printed += content.decode(errors="replace")
    return Output(printed, complaints, 1 if complaints else 0)


def _test(words: list[str], desktop: Desktop) -> Output:
    match words:
        case ["!", *rest]:
            return Output(returncode=1 - _test(rest, desktop).returncode)
        case [("-e" | "-f" | "-s" | "-d") as what, path, *_]:
            content, folder = desktop.files.get(absolute(path)), is_folder(absolute(path), desktop.files)
            holds = {"-e": content is not None or folder, "-f": content is not None, "-s": bool(content), "-d": folder}
            return Output(returncode=0 if holds[what] else 1)
        case _:
            return Output(error=f"test: a sim desktop does not understand {words}\n", returncode=2)


def _touch(paths: list[str], desktop: Desktop) -> Output:
    for path in paths:
        desktop.files.setdefault(absolute(path), b"")
    return Output()


def _remove(words: list[str], desktop: Desktop) -> Output:
    """Folders go with their files, whether it is asked for or not."""
    for path in (absolute(word) for word in words if not word.startswith("-")):
        for name in [name for name in desktop.files if name == path or name.startswith(f"{path}/")]:
            del desktop.files[name]
    return Output()


def _wmctrl(words: list[str], desktop: Desktop) -> Output:
    if words not in (["-l"], ["-lx"]):
        return Output(error="wmctrl: a sim desktop only lists its windows\n", returncode=1)
    lines = ""
    for number, title in enumerate(desktop.gui.windows, 1):
        kind = f"{desktop.gui.class_of(title)} " if words == ["-lx"] else ""
        lines += f"0x{number:08x}  0 {kind}desktop {title}\n"
    return Output(lines)


_COMMANDS: dict[str, Callable[[list[str], Desktop], Output]] = {
    "[": _test,
    "cat": _cat,
    "echo": lambda words, desktop: Output(" ".join(words) + "\n"),
    "false": lambda words, desktop: Output(returncode=1),
    "mkdir": lambda words, desktop: Output(),  # a folder is there when a file is in it
    "rm": _remove,
    "test": _test,
    "touch": _touch,
    "true": lambda words, desktop: Output(),
    "wmctrl": _wmctrl,
}
