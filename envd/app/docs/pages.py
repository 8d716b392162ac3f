"""Which pages there are, in which order, and where each has its source."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import Path

HERE = "envd/app/docs/pages"
"""The folder of most of them, from the root of the repository."""
COPIES = "envd/app/docs/copies"
"""Of those that lie elsewhere: an installed package has no more than its own folder."""
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Page:
    """`source` is a path from the root of the repository. `section` is the heading under which the menu has it."""

    name: str
    title: str
    section: str
    source: str
    language: str = "en"
    note: str = ""
    """Shown above everything else."""

    @property
    def copied(self) -> bool:
        return not self.source.startswith(HERE)

    @property
    def url(self) -> str:
        return {"index": "/docs", "errors": "/errors"}.get(self.name, f"/docs/{self.name}")

    def read(self) -> str:
        """Its Markdown."""
        folder = _FOLDER / ("copies" if self.copied else "pages")
        return (folder / f"{self.name}.md").read_text(encoding="utf-8")


def _guide(name: str, title: str, source: str, *, run: bool = False) -> Page:
    """A guide that lies beside what it is about. `run` says whether all of its commands are run by tests."""
    note = (
        f"This guide is {source} of the source. Its commands need hosts of their own: no test of these pages runs them."
    )
    return Page(name, title, "Operate", source, note="" if run else note)


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
    *_pages("Operate", running="Running it"),
    _guide("runbook", "Runbook", "deploy/RUNBOOK.md", run=True),
    _guide("docker", "Docker and machines", "deploy/DOCKER.md"),
    _guide("ec2", "EC2", "deploy/aws/README.md"),
    _guide("container", "The daemon in a container", "deploy/container/README.md"),
    _guide("proxy", "A proxy in front", "deploy/proxy/README.md"),
    _guide("tunnel", "Behind NAT", "deploy/tunnel/README.md"),
    *_pages(
        "Operate",
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
