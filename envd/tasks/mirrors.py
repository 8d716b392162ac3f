"""Where a file that a task names by URL may be had: mirrors in their order, then the URL itself.

A mirror is one of (ENVD_ASSET_MIRRORS, separated by commas):

    https://mirror.example/osworld                    a base URL: https://host/a/b?q is at <base>/host/a/b?q
    /srv/osworld                                      a folder: the same file is at <folder>/host/a/b?q, percent-decoded
    https://huggingface.co=https://hf-mirror.example  what URLs begin with, and what takes its place: a URL or a folder

The layout of a folder is the one that `wget --force-directories` makes. The query is part of the name: two URLs that
differ in it are two files. No URL leads out of a folder; symbolic links in it are its owner's, and are followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from ..errors import SettingsError
from ..settings import without_logins


@dataclass(frozen=True)
class Mirror:
    """`prefix` is what of a URL `base` takes the place of; "" is for all URLs, which then keep their host."""

    base: str | Path
    prefix: str = ""

    def place_of(self, url: str) -> str | Path | None:
        """Where the file of `url` would be on this mirror; None when it cannot be there."""
        if self.prefix and not re.match(re.escape(self.prefix) + r"(?=[/?]|$)", url):
            return None
        rest = url[len(self.prefix) :] if self.prefix else _after_scheme(url)
        return self.base + rest if isinstance(self.base, str) else _inside(self.base, rest)


def parse_mirrors(words: Iterable[str]) -> tuple[Mirror, ...]:
    """Raises SettingsError that names the mirror at fault."""
    return tuple(_parse(word) for word in words)


def same_file(url: str) -> str:
    """`url` without its fragment, which no server is sent. Raises ValueError for what is no URL of a file."""
    plain = urldefrag(url).url.strip()
    parts = urlsplit(plain)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it does not begin with http:// or https:// and a host")
    return plain


def without_secrets(url: str) -> str:
    """`url` as it may be told, logged and kept: a name and password in it are left out."""
    return without_logins(url)


def _parse(word: str) -> Mirror:
    if found := re.fullmatch(r"(https?://[^/=]+[^=]*)=(.+)", word):
        return Mirror(_base(found[2], word), found[1].rstrip("/"))
    return Mirror(_base(word, word))


def _base(text: str, word: str) -> str | Path:
    if re.match(r"https?://[^/]", text):
        return text.rstrip("/")
    if text.startswith(("/", "~", ".")):
        return Path(text).expanduser().absolute()
    raise SettingsError(
        f"ENVD_ASSET_MIRRORS: {without_logins(word)} is neither a URL nor a folder.",
        hint="Write a URL with http:// or https://, a folder as /…, ~/… or ./…, or one URL=another.",
    )


def _after_scheme(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2].lower()
    return f"/{host}{parts.path}" + (f"?{parts.query}" if parts.query else "")


def _inside(folder: Path, rest: str) -> Path | None:
    path, mark, query = rest.partition("?")
    names = [unquote(name) for name in path.split("/") if name]
    if not names or path.endswith("/") or any(name in (".", "..") or re.search(r"[/\0]", name) for name in names):
        return None
    names[-1] += mark + query.replace("/", "%2F")
    return folder.joinpath(*names)
