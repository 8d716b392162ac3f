"""Which pages there are, in which order, and where each has its source."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import Path

HERE = "envd/app/docs/pages"
"""The folder of most of them, from the root of the repository."""
_FOLDER = Path(__file__).parent / "pages"
_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, slots=True)
class Page:
    """`source` is a path from the root of the repository. `section` is the heading under which the menu has it."""

    name: str
    title: str
    section: str
    source: str
    language: str = "en"

    @property
    def url(self) -> str:
        return {"index": "/docs", "errors": "/errors"}.get(self.name, f"/docs/{self.name}")

    def read(self) -> str:
        """Its Markdown: of an installed package beside the others, in a checkout where it lies."""
        packed = _FOLDER / f"{self.name}.md"
        return (packed if packed.exists() else _ROOT / self.source).read_text(encoding="utf-8")


def _pages(section: str, **titles: str) -> list[Page]:
    names = {name.replace("_", "-"): title for name, title in titles.items()}
    return [Page(name, title, section, f"{HERE}/{name}.md") for name, title in names.items()]


_ALL = (
    *_pages("Start", index="Overview", quick_start="Quick start"),
    Page("zh-CN", "快速上手", "Start", "README.zh-CN.md", "zh-CN"),
    *_pages("Start", concepts="Words", faq="Questions"),
    *_pages(
        "Train",
        porting="From an older server",
        trainers="Your own trainer",
        tasks="Tasks and verdicts",
        jobs="Resets and boots",
        events="Events",
        leases="Leases",
    ),
    *_pages(
        "Operate",
        running="Running it",
        access="Tokens and scopes",
        recovery="When something dies",
        settings="Settings",
        commands="Commands",
        errors="Errors",
    ),
    *_pages(
        "API",
        api="Conventions",
        api_play="Envs",
        api_jobs="Jobs",
        api_events="Event streams",
        api_leases="Leases",
        api_desktop="Desktops",
        api_evidence="Evidence",
        api_trainers="Existing trainers",
        api_daemon="Daemon",
        api_docs="Documents",
        api_models="Models",
    ),
    *_pages("Inside", architecture="Architecture", drivers="Write a driver"),
    Page("changelog", "Changelog", "Inside", "CHANGELOG.md"),
)
PAGES: dict[str, Page] = {page.name: page for page in _ALL}
"""By their names, in the order in which they are read."""
_BY_SOURCE = {page.source: page for page in _ALL}


def target_of(page: Page, reference: str) -> str | None:
    """Where a link of `page` leads when it is served: to another page, an address, or nowhere (None) when it leads to
    a file of the repository that is no page."""
    if reference.startswith(("#", "/", "https://", "http://")):
        return reference
    path, hash_sign, anchor = reference.partition("#")
    file = source_of(page, path)
    if file not in _BY_SOURCE:
        return None
    return _BY_SOURCE[file].url + hash_sign + anchor


def source_of(page: Page, path: str) -> str:
    """The file that a relative link of `page` names, from the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page.source), path))
