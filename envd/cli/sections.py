"""The list of commands in `envd --help`: in sections, in the order in which a person comes to need them."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

SECTIONS = {
    "To begin": ("init", "doctor", "demo", "serve"),
    "To look": ("watch", "ls", "logs", "screenshot", "version"),
    "To play": ("prewarm", "reset", "step", "evaluate", "bundle", "rescore"),
    "To run it": ("cancel", "drain", "gc", "bench"),
    "What desktops and tasks are made of": ("tasks", "images", "templates", "aws"),
}
OTHERS = "And"


class Sections(TyperGroup):
    """What no section names comes last, so that a command cannot be forgotten here."""

    def list_commands(self, ctx: Any) -> list[str]:
        named = [name for names in SECTIONS.values() for name in names if name in self.commands]
        return [*named, *(name for name in self.commands if name not in named)]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        names = self.list_commands(ctx)
        width = max(map(len, names))
        known = {name for some in SECTIONS.values() for name in some}
        for title, some in {**SECTIONS, OTHERS: tuple(name for name in names if name not in known)}.items():
            rows = [
                (name.ljust(width), self.commands[name].get_short_help_str(formatter.width - width - 6))
                for name in some
                if name in self.commands and not self.commands[name].hidden
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
