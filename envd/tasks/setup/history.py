"""The set-up step that makes Chrome remember pages that nobody visited."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import anyio

from ...errors import EnvdError, GuestMisbehaved
from ..task import Parameters
from .chrome import PAUSE, answering, start
from .context import Context, Run

PROFILE = ".config/google-chrome"
LARGEST = 64 * 1024 * 1024
EDIT_SECONDS = 20.0
MADE_SECONDS = 10.0
TABS_KEPT = 32

CHROMES_EPOCH = -11_644_473_600
"""1601-01-01 UTC in seconds since 1970. Chrome counts microseconds from there."""
LINK = 0x30000000
"""A visit by a link that no redirect is part of (Chromium's PageTransition: LINK, CHAIN_START and CHAIN_END)."""

LOOK = 'printf "%s\\n" "$HOME"; date +%s; test -s "$HOME/.config/google-chrome/Default/History"'
"""Answers where the profile's home is and what time it is in the guest, and ends with 0 if there is a history."""

END = r"""
lock() { held=$(readlink "$HOME/.config/google-chrome/SingletonLock") && kill -0 "${held##*-}" 2>/dev/null; }
for tick in $(seq 200); do
    lock || exit 0
    [ "$tick" = 50 ] && kill -TERM "${held##*-}"
    sleep 0.05
done
exit 1
"""
"""Waits until no process holds the profile, which Chrome does by a link whose target ends with its process id. One that
was not asked to end, since it has no debugging port, or did not want to, is told after 2.5 s; 10 s in all."""


@dataclass(frozen=True)
class Entry:
    """One visit, `ago` seconds before now."""

    url: str
    title: str
    ago: float


async def update(context: Context, parameters: Parameters) -> str:
    """`history`: visits to add, each {url, title, visit_time_from_now_in_seconds}.

    Chrome keeps its history in a database that it has locked and partly in memory while it runs. So it is ended, the
    database is fetched, added to and put back, and Chrome is started again on the pages that it had, if it ran. A
    profile that has no history yet gets it from Chrome, so that it is one that this Chrome understands.
    """
    entries = [
        Entry(str(one["url"]), str(one["title"]), float(one["visit_time_from_now_in_seconds"]))
        for one in parameters["history"]
    ]
    pages = await _pages(context)
    home, now, there = await _look(context)
    if not there:
        await start(context)
        await answering(context)
        home, now = await _made(context)
    await _end_chrome(context)
    await _rewrite(context, f"{home}/{PROFILE}/Default/History", entries, now)
    if pages is not None:
        await start(context, *pages)
        await answering(context)
    return ""


async def _pages(context: Context) -> list[str] | None:
    """The pages that a running Chrome shows and can be started on, oldest first; None when it does not run."""
    try:
        targets = await context.cdp.pages()
    except EnvdError:
        return None
    urls = [str(target.get("url")) for target in reversed(targets[:TABS_KEPT])]
    return [url for url in urls if url.startswith(("http://", "https://", "file://", "about:", "chrome://"))]


async def _look(context: Context) -> tuple[str, int, bool]:
    """The user's home, the guest's clock in seconds since 1970, and whether there is a history."""
    done = await context.guest.execute(["sh", "-c", LOOK])
    home, _, clock = done.stdout.strip().partition("\n")
    if not home.startswith("/") or len(home) > 1000 or not clock.isdecimal() or len(clock) > 11:
        raise GuestMisbehaved(f"The guest does not say where Chrome's profile is: {done.stdout[:200]!r}")
    return home, int(clock), done.returncode == 0


async def _made(context: Context) -> tuple[str, int]:
    """As `_look`, once Chrome has made a history. Raises GuestMisbehaved."""
    deadline = time.monotonic() + MADE_SECONDS
    while time.monotonic() < deadline:
        home, now, there = await _look(context)
        if there:
            return home, now
        await anyio.sleep(PAUSE)
    raise GuestMisbehaved(f"Chrome has started and made no history in {home}/{PROFILE}.")


async def _end_chrome(context: Context) -> None:
    try:
        async with context.cdp.browser() as browser:
            await browser.send("Browser.close")
    except EnvdError:
        pass  # it does not run, or was too quick to answer; both show below
    done = await context.guest.execute(["sh", "-c", END])
    if done.returncode:
        raise GuestMisbehaved(f"Chrome did not end, so its history cannot be written: {done.stderr.strip()[-300:]}")


async def _rewrite(context: Context, path: str, entries: list[Entry], now: int) -> None:
    content = await context.guest.file(path, limit=LARGEST)
    async with anyio.TemporaryDirectory() as folder:
        file = Path(folder, "History")
        await anyio.to_thread.run_sync(_add, file, content, entries, now)
        await context.guest.upload(path, file)
    # A guest server that runs as somebody else than the user may have made it somebody else's; as the user it cannot.
    own = 'chown --reference="${0%/*}" "$0" || sudo -n chown user:user "$0"'
    await context.guest.execute(["sh", "-c", own, path])


def _add(file: Path, content: bytes, entries: list[Entry], now: int) -> None:
    """Write `content`, a guest's database that may be anything, to `file` with `entries` added. Blocks. Raises
    GuestMisbehaved."""
    file.write_bytes(content)
    try:
        with closing(sqlite3.connect(file)) as database:
            _guard(database)
            with database:
                for entry in entries:
                    _visit(database, entry, now)
    except sqlite3.Error as error:
        raise GuestMisbehaved(f"Chrome's history in the guest cannot be added to: {error}") from error


def _guard(database: sqlite3.Connection) -> None:
    """What a database brings along (triggers, views, expressions in its schema) gets neither functions, files, space
    nor time."""
    deadline = time.monotonic() + EDIT_SECONDS
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST)
    database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    database.setlimit(sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 1)
    database.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    database.execute("PRAGMA trusted_schema = OFF")
    database.execute("PRAGMA journal_mode = MEMORY")
    (size,) = database.execute("PRAGMA page_size").fetchone()
    database.execute(f"PRAGMA max_page_count = {2 * LARGEST // size}")


def _visit(database: sqlite3.Connection, entry: Entry, now: int) -> None:
    at = int((now - entry.ago - CHROMES_EPOCH) * 1_000_000)
    known = database.execute("SELECT id FROM urls WHERE url = ?", (entry.url,)).fetchone()
    if known:
        (page,) = known
        database.execute(
            "UPDATE urls SET title = ?, visit_count = visit_count + 1, last_visit_time = max(last_visit_time, ?)"
            " WHERE id = ?",
            (entry.title, at, page),
        )
    else:
        page = database.execute(
            "INSERT INTO urls (url, title, visit_count, typed_count, last_visit_time, hidden)"
            " VALUES (?, ?, 1, 0, ?, 0)",
            (entry.url, entry.title, at),
        ).lastrowid
    database.execute(
        "INSERT INTO visits (url, visit_time, from_visit, transition, segment_id, visit_duration)"
        " VALUES (?, ?, 0, ?, 0, 0)",
        (page, at, LINK),
    )


STEPS: dict[str, Run] = {"update_browse_history": update}
