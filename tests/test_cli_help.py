"""What every command's help has, so that nobody needs the README at night."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from envd.cli import app
from envd.cli.sections import SECTIONS

FIRST_LINE = 64
"""Characters that the list of commands has room for on a terminal of 80 columns."""


def commands() -> Iterator[tuple[str, ...]]:
    """The words of every command, as they are typed."""

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        below = getattr(command, "commands", None)
        if below is None:
            yield words
            return
        for name, one in below.items():
            yield from walk(one, (*words, name))

    yield from walk(typer.main.get_command(app), ())


def groups() -> list[str]:
    return sorted({words[0] for words in commands() if len(words) > 1})


def helped(*words: str) -> str:
    ran = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}, prog_name="envd")
    assert ran.exit_code == 0
    return ran.stdout


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join(words)) for words in commands()])
def test_help_of_a_command_has_a_promise_an_example_and_its_exit_codes(words: tuple[str, ...]) -> None:
    told = helped(*words)
    examples = told.partition("Examples:\n")[2].partition("\n\n")[0]
    assert re.search(rf"^    .*\benvd {' '.join(words)}\b", examples, re.MULTILINE), "an example that runs it"
    assert re.search(r"Exit codes: 0 \w", told), "what 0 says"
    promise = told.split("\n\n")[1].strip()
    assert promise.endswith("."), f"the promise is a sentence: {promise}"


def test_the_list_of_commands_is_in_sections_and_cuts_nothing_short() -> None:
    told = helped()
    assert [line for line in told.splitlines()[1:] if line.endswith("...")] == []
    assert "\nAnd:" not in told, "every command is in a section"
    titles = [title for title in SECTIONS if f"\n{title}:\n" in told]
    assert titles == list(SECTIONS)
    assert told.index("  init ") < told.index("  serve ") < told.index("  reset ") < told.index("  drain ")


@pytest.mark.parametrize("group", groups())
def test_the_list_of_a_groups_commands_names_each(group: str) -> None:
    told = helped(group)
    assert [words for words in commands() if words[0] == group and f"\n  {words[1]} " not in told] == []
