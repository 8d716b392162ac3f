"""Set-up steps that bring files into the guest and show them: download, upload_file, open, change_wallpaper."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from anyio import to_thread

from ...errors import MissingRequirement
from ...settings import Settings
from ..mirrors import parse_mirrors
from ..task import Parameters
from .context import Context, Run

TOLD_SECONDS = 2.0


async def download(context: Context, parameters: Parameters) -> str:
    """Put files that are named by URL into the guest, in their order. The guest needs no network for it."""
    for file in parameters["files"]:
        found = await context.assets.fetch(file["url"], _Told(context, file["url"]))
        await context.guest.upload(file["path"], found, timeout=None)
    return ""


class _Told:
    """Tells how a download goes, not more often than every `TOLD_SECONDS`."""

    def __init__(self, context: Context, url: str) -> None:
        self._context = context
        self._url = url
        self._told = time.monotonic()

    def __call__(self, received: int, total: int | None) -> None:
        if time.monotonic() - self._told >= TOLD_SECONDS:
            self._told = time.monotonic()
            of = f" of {total / 1e6:.0f}" if total else ""
            self._context.note(f"{self._url[:200]}: {received / 1e6:.0f}{of} MB downloaded")


async def upload_file(context: Context, parameters: Parameters) -> str:
    """Put files of this host into the guest: of the folders in ENVD_ASSET_MIRRORS alone, since a task is not allowed
    to read what else is here. A relative path is looked for in each of them."""
    for file in parameters["files"]:
        found = await to_thread.run_sync(_find, file["local_path"], _folders(context.settings))
        if found is None:
            raise MissingRequirement(
                f"{str(file['local_path'])[:300]} is not a file in a folder that tasks may take files from.",
                hint="Put the file into a folder of its own and add that folder to ENVD_ASSET_MIRRORS.",
                errors=[{"field": "local_path", "message": "is not in a folder of ENVD_ASSET_MIRRORS"}],
            )
        await context.guest.upload(file["path"], found, timeout=None)
    return ""


async def open_file(context: Context, parameters: Parameters) -> str:
    """Open a file with the program that the desktop has for it. A newer guest server answers when the file's window
    is there, an older one at once."""
    await context.guest.tell("/setup/open_file", {"path": parameters["path"]}, None)
    return ""


async def change_wallpaper(context: Context, parameters: Parameters) -> str:
    await context.guest.tell("/setup/change_wallpaper", {"path": parameters["path"]}, None)
    return ""


STEPS: dict[str, Run] = {
    "download": download,
    "upload_file": upload_file,
    "open": open_file,
    "change_wallpaper": change_wallpaper,
}


def _folders(settings: Settings) -> tuple[Path, ...]:
    return tuple(mirror.base for mirror in parse_mirrors(settings.asset_mirrors) if isinstance(mirror.base, Path))


def _find(path: str, folders: Iterable[Path]) -> Path | None:
    """The file, wherever links lead, if that is inside one of `folders`."""
    for folder in folders:
        try:
            root = folder.resolve(strict=True)
            found = root.joinpath(path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):  # RuntimeError: links that go round, before Python 3.13
            continue
        if found.is_relative_to(root) and found.is_file():
            return found
    return None
