"""The pages that follow from the code: settings, commands, errors. `python -m envd.app.docs` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from ...errors import EnvdError, Fault, StartError, error_classes
from ...settings import VARIABLES, Settings, own_url
from .pages import PAGES

MARK = "<!-- Made by `make docs`; a test compares it. -->\n\n"
SETTING_GROUPS = {
    "provider": "Where it listens, and for whom",
    "state_dir": "Envs and boots",
    "max_steps": "Episodes",
    "client_password": "Tasks and their files",
    "evaluators": "Verdicts and evidence",
    "journal_days": "What is remembered",
    "prompt_file": "What models are shown",
    "heartbeat": "Limits, and the end",
    "docker_host": "Containers and virtual machines",
    "spares": "Spares",
    "aws_region": "AWS",
    "local_unsandboxed": "The rest",
}
"""The setting with which a group begins, and its heading."""
_IN_UNITS = ("ram_size", "disk_size", "template_limit", "journal_limit")
"""Numbers of bytes that may be given with K, M, G or T."""


def settings_page() -> str:
    lines = [
        "# Settings\n",
        "From the environment or `.env` in the folder where the daemon is started; the environment wins. A name that "
        "does not exist or a value that cannot be used stops the start and names the nearest valid one. Durations are "
        "seconds. What is in force, and where each value came from, is printed at the start and served at "
        "`GET /version`.\n",
        "`make serve` runs with `PROVIDER=local` unless told otherwise; `envd serve` takes `--host` and `--port` "
        "instead of the settings.",
    ]
    for variable, field in VARIABLES.items():
        if field in SETTING_GROUPS:
            lines += [f"\n## {SETTING_GROUPS[field]}\n", "| setting | default | meaning |", "|---|---|---|"]
        about = Settings.model_fields[field]
        meaning = _cell(" ".join((about.description or "").split()))
        default = default_of(field)
        lines.append(f"| `{variable}` | {f'`{default}`' if default else ''} | {_coded(meaning)} |")
    return MARK + "\n".join(lines) + "\n"


def default_of(field: str) -> str:
    """As it would be written into `.env`; empty where there is none, or it depends."""
    if field == "cache":
        return "~/.cache/envd"
    if field == "state_dir":
        return "~/.local/state/envd"
    if field == "url":
        return own_url({})
    value: Any = Settings.model_fields[field].default
    if value is None or isinstance(value, SecretStr) or value == ():
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if field in _IN_UNITS:
        return f"{value // 1024**3}G"
    if field == "screen":
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _coded(words: str) -> str:
    """Names of settings and placeholders as code."""
    return re.sub(r"(?<![`\w{])(ENVD_[A-Z_]+|\{[\w, ]+\}|/dev/shm)(?![`\w])", r"`\1`", words)


def commands_page() -> str:
    """Every command with its own help."""
    import typer

    from ...cli import app

    lines = [
        "# Commands\n",
        "What `envd COMMAND --help` prints. Commands that talk to a daemon take `--url`, or `ENVD_URL`, "
        "and send `ENVD_TOKEN`.\n",
    ]
    for path, command in _commands(typer.main.get_command(app), "envd"):
        context = typer.Context(command, info_name=path)
        usage = re.sub(r"\s+", " ", command.get_usage(context)).removeprefix("Usage: ")
        lines += [f"## {path}\n", f"{_prose(command.help or '')}\n", f"    {usage}\n"]
        options = [record for one in command.get_params(context) if (record := one.get_help_record(context))]
        shown = [(name, " ".join(words.split())) for name, words in options if name != "--help"]
        if shown:
            lines += [
                "| argument | meaning |",
                "|---|---|",
                *(f"| `{_cell(name)}` | {_cell(words)} |" for name, words in shown),
                "",
            ]
    return MARK + "\n".join(lines)


def _cell(words: str) -> str:
    """As a cell of a table takes it."""
    return words.replace("|", "\\|").replace("[required]", "").rstrip()


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Those that do something, with the words that call them."""
    for name, below in getattr(command, "commands", {}).items():
        if getattr(below, "commands", None):
            yield from _commands(below, f"{path} {name}")
        else:
            yield f"{path} {name}", below


def _prose(help_text: str) -> str:
    """A command's help as Markdown: what typer is told not to wrap (after \\b) is code."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", help_text.strip()):
        if paragraph.startswith("\b"):
            first, *rest = paragraph.removeprefix("\b").strip("\n").split("\n")
            paragraphs.append(f"{first.strip()}\n\n" + "\n".join(f"    {line.strip()}" for line in rest))
        else:
            paragraphs.append(" ".join(paragraph.split()))
    return "\n\n".join(paragraphs)


FAULTS = {
    Fault.CLIENT: ("The caller", "Change the call. Nothing was lost."),
    Fault.CAPACITY: ("Capacity", "Wait for `Retry-After`, then send the same call again."),
    Fault.INFRA: (
        "Machines and services",
        "Mask the episode, reset, go on. Where it comes back, the cause is on the host.",
    ),
    Fault.TASK: ("The task", "Leave the task out until it is mended; no other desktop would help."),
}
"""Fault → heading, and what a trainer does about it."""


def errors_page() -> str:
    classes = error_classes()
    sent = [cls for cls in classes.values() if not issubclass(cls, StartError)]
    lines = [
        "# Errors\n",
        "Every failure is sent as `application/problem+json` with a `code` that stays the same from version to "
        "version, the `fault`, whether it is `retryable`, what happened (`detail`) and what to do (`hint`). "
        "`type` leads to the code's place on this page. Clients raise the class of the code: `envd.errors`.\n",
        "| whose fault | what a trainer does |",
        "|---|---|",
        *(
            f"| [{name}](#{name.lower().replace(' ', '-')}), `{fault}` | {words} |"
            for fault, (name, words) in FAULTS.items()
        ),
        "| the model, `agent` | None: a prediction that does not parse ends the episode, which is then judged. |",
    ]
    for fault, (name, _) in FAULTS.items():
        of_fault = [cls for cls in sent if cls.fault is fault]
        lines.append(f"\n## {name}\n")
        lines.append(" · ".join(f"[`{cls.code}`](#{cls.code})" for cls in of_fault) + "\n")
        lines += [_error(cls) for cls in of_fault]
    lines += ["\n## The daemon cannot start\n", "Printed by `envd serve`, and never sent.\n"]
    lines += [_error(cls) for cls in classes.values() if issubclass(cls, StartError)]
    return MARK + "\n".join(lines)


def _error(cls: type[EnvdError]) -> str:
    again = "try again" if cls.retryable else "do not try again as it is"
    facts = f"exit code {cls.exit_code}" if issubclass(cls, StartError) else f"status {cls.status}, {again}"
    documented = re.search(r"Facts[^:]*: (.*)", " ".join((vars(cls).get("__doc__") or "").split()))
    carried = f"\n\nThe problem carries: {documented[1]}" if documented else ""
    return (
        f"### `{cls.code}`\n\n{cls.title} ({facts}).\n\n**Cause.** {cls.cause}\n\n"
        f"**What to do.** {cls.remedy}{carried}\n"
    )


def write(folder: Path, root: Path) -> None:
    """Every page that follows from the code, and copies of those that lie elsewhere in the repository at `root`, below
    `folder`."""
    from .reference import api_pages

    pages = {"settings": settings_page(), "commands": commands_page(), "errors": errors_page(), **api_pages()}
    for name, text in pages.items():
        (folder / "pages" / f"{name}.md").write_text(text, encoding="utf-8")
    for page in PAGES.values():
        if page.copied:
            text = (root / page.source).read_text(encoding="utf-8")
            mark = f"<!-- A copy of {page.source}, made by `make docs`. Change that one. -->\n\n"
            (folder / "copies" / f"{page.name}.md").write_text(mark + text, encoding="utf-8")
