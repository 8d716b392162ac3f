"""How `envd tasks check` tells what it found: a table for people, lines for pipes, JSON for programs."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .checked import Checked

NEEDS_WIDTH = 30
"""Columns that a table leaves for its last column at least; where paths are too long for that, there are lines."""
NO_EVALUATORS = (
    "No evaluators were found, so hardly any task would get a score. Run: make evaluators. Or set ENVD_EVALUATORS to a "
    "Python that has desktop-env."
)


def print_json(checked: Sequence[Checked]) -> None:
    """{"tasks": [{"id", "path", "supported", "needs", "problems": [{"field", "message"}]}]}"""
    tasks = [
        {
            "id": one.task_id,
            "path": str(one.path),
            "supported": one.supported,
            "needs": list(one.needs),
            "problems": [{"field": problem.field, "message": problem.message} for problem in one.problems],
        }
        for one in checked
    ]
    Console().out(json.dumps({"tasks": tasks}, indent=1), highlight=False)


def print_report(checked: Sequence[Checked], *, evaluators: bool = True) -> None:
    """`evaluators` says whether this host has them. Paths are told as they were given, to be pasted."""
    console = Console(markup=False, highlight=False, emoji=False)
    if checked:
        if console.is_terminal and max(len(_name(one)) for one in checked) + NEEDS_WIDTH <= console.width:
            console.print(_table(checked))
        else:
            for line in _lines(checked):
                console.out(line, highlight=False)
    console.out(_summary(checked), highlight=False)
    if checked and not evaluators:
        console.out(NO_EVALUATORS, highlight=False)


def _table(checked: Sequence[Checked]) -> Table:
    table = Table(expand=True, show_edge=False, pad_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("runs")
    table.add_column("needs, and what is wrong", ratio=1, overflow="fold")
    for one in checked:
        table.add_row(
            Text(_name(one)),
            Text("yes", style="green") if one.supported else Text("no", style="red"),
            Text("\n").join(filter(None, [Text(_needs(one)), *(Text(problem, style="red") for problem in _told(one))])),
        )
    return table


def _lines(checked: Sequence[Checked]) -> list[str]:
    lines = []
    for one in checked:
        lines.append(f"{'yes' if one.supported else 'no '}  {_name(one)}  {_needs(one)}".rstrip())
        lines.extend(f"     {problem}" for problem in _told(one))
    return lines


def _told(one: Checked) -> list[str]:
    return [
        _shown(f"{problem.field}: {problem.message}" if problem.field else problem.message) for problem in one.problems
    ]


def _needs(one: Checked) -> str:
    words = [need for need in one.needs if not need.startswith("asset:")]
    assets = len(one.needs) - len(words)
    return ", ".join([*words, *([f"{assets} file{'s' * (assets > 1)}"] if assets else [])])


def _summary(checked: Sequence[Checked]) -> str:
    if not checked:
        return "No task files found."
    able = sum(one.supported for one in checked)
    text = f"{able} of {len(checked)} supported: what this server can do; programs in its desktops are not looked at."
    needs = Counter(need for one in checked for need in one.needs if not need.startswith("asset:"))
    if needs:
        text += f" Needs: {', '.join(f'{need} {count}' for need, count in needs.most_common())}."
    if assets := {need for one in checked for need in one.needs if need.startswith("asset:")}:
        text += f" {len(assets)} different file{'s' * (len(assets) > 1)}."
    ids = Counter(one.task_id for one in checked if one.task_id)
    if again := [name for name, count in ids.items() if count > 1]:
        text += f" {len(again)} id{'s' * (len(again) > 1)} in more than one file, the first is {_shown(again[0])}."
    return text


def _name(one: Checked) -> str:
    return shlex.quote(_shown(str(one.path)))


def _shown(text: str) -> str:
    """`text` on one line, without what would steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
