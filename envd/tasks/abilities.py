"""What this server can do for tasks beyond what it always can, and what it lacks for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import catalog, needs
from .mirrors import parse_mirrors
from .task import Task

if TYPE_CHECKING:
    from ..settings import Settings


@dataclass(frozen=True)
class Abilities:
    """What this server can do for tasks, beyond what it always can.

    folders    local folders that `upload_file` may take files from
    offline    nothing is downloaded
    has_asset  whether a URL's file is there without the network; None when nobody knows. Asked only when offline
    ocr        the evaluators can read text in pictures
    """

    google_drive: bool = False
    google_login: bool = False
    proxy: bool = False
    folders: tuple[str, ...] = ()
    offline: bool = False
    has_asset: Callable[[str], bool] | None = None
    ocr: bool = False

    @classmethod
    def of(cls, settings: Settings, *, has_asset: Callable[[str], bool] | None = None, ocr: bool = False) -> Abilities:
        """Opens nothing: whether the files that settings name can be read is found out by those who read them.

        Raises SettingsError for a mirror that is none."""
        return cls(
            google_drive=settings.google_credentials is not None,
            google_login=settings.google_account is not None,
            proxy=settings.proxy_file is not None,
            folders=tuple(
                str(mirror.base) for mirror in parse_mirrors(settings.asset_mirrors) if isinstance(mirror.base, Path)
            ),
            offline=settings.offline,
            has_asset=has_asset,
            ocr=ocr,
        )

    def lacking(self, task: Task, uses: Iterable[needs.Use]) -> Iterator[tuple[str, str]]:
        """Yield (field, message) for what the task needs and is not here; `uses` are those of the task."""
        for use in uses:
            if message := self._unmet(use):
                yield use.field, message
        for place, step in needs.all_steps(task):
            if step.type == "upload_file" and not self.folders:
                yield (
                    f"{place}.type",
                    "takes files of the server's host, and only from folders that ENVD_ASSET_MIRRORS names;"
                    " it names none",
                )

    def _unmet(self, use: needs.Use) -> str:
        """What is missing for `use`, and what to do about it; "" when nothing is."""
        if use.need == catalog.DRIVE and not self.google_drive:
            return "needs Google Drive; ENVD_GOOGLE_CREDENTIALS is not set"
        if use.need == catalog.LOGIN and not self.google_login:
            return "needs a Google account; ENVD_GOOGLE_ACCOUNT is not set"
        # A task that would like a proxy runs without one, as upstream's default is; a step that makes one cannot.
        if use.need == catalog.PROXY and use.field != needs.WISHES_PROXY and not self.proxy:
            return "needs a proxy; ENVD_PROXY_FILE is not set"
        if use.need == catalog.OCR and not self.ocr:
            return "reads text in pictures; the evaluators here are without easyocr, install it into them"
        if use.url and self.offline and self.has_asset and not self.has_asset(use.url):
            return f"{use.url[:300]} is not in the cache, and ENVD_OFFLINE is set; run `envd tasks prefetch` first"
        return ""


def has_ocr(interpreter: Path) -> bool:
    """Whether the evaluators of this Python have what the metric compare_image_text needs. Blocks."""
    return any(interpreter.parent.parent.glob("lib/python3*/site-packages/easyocr/__init__.py"))
