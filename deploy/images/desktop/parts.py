"""`python3 parts.py PROJECT`: the files of the package `envd` that the guest server needs, one a line: its own, and
all that these import of the package, wherever in a file they do."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE, AGENT = "envd", "envd.agent"


def parts(project: Path) -> list[Path]:
    """Paths in the project, sorted."""
    found = {project / PACKAGE / "__init__.py"}
    new = set((project / Path(*AGENT.split("."))).glob("*.py"))
    while new:
        found |= new
        new = {path for file in new for name in _imported(file, project) if (path := _file_of(name, project))} - found
    inits = {parent / "__init__.py" for path in found for parent in path.relative_to(project).parents if parent.name}
    return sorted({path.relative_to(project) for path in found} | {path for path in inits if (project / path).exists()})


def _imported(file: Path, project: Path) -> Iterator[str]:
    package = list(file.relative_to(project).parent.parts)
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _file_of(name: str, project: Path) -> Path | None:
    if name.split(".")[0] != PACKAGE:
        return None
    path = project.joinpath(*name.split("."))
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()), None)


if __name__ == "__main__":
    sys.stdout.writelines(f"{path}\n" for path in parts(Path(sys.argv[1])))
