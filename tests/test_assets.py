"""The cache of files that tasks name, against a real server that misbehaves."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from files_server import (
    Fault,
    FilesServer,
    declares_too_much,
    files_server,
    pauses,
    resets,
    says,
    speaks_garbage,
    takes_any_range,
    truncates,
    truncates_once_read,
)

from envd.errors import AssetUnavailable, SettingsError
from envd.settings import Settings
from envd.tasks import assets as assets_module
from envd.tasks import download
from envd.tasks.assets import Assets
from envd.tasks.mirrors import parse_mirrors
from envd.tasks.parts import Part, Version

CONTENT = bytes(range(256)) * 1200
HALF = f"bytes={len(CONTENT) // 2}-"


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", (0.0, 0.0))


@asynccontextmanager
async def opened(tmp_path: Path, **settings: Any) -> AsyncIterator[Assets]:
    async with aiohttp.ClientSession() as session:
        yield Assets(Settings(state_dir=tmp_path, **settings), session)


@asynccontextmanager
async def serving(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[FilesServer, Assets]]:
    async with files_server() as server, opened(tmp_path, **settings) as assets:
        server.files["/a.xlsx"] = CONTENT
        yield server, assets


def blobs(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "assets" / "blobs").rglob("*") if path.is_file()]


def aged(tmp_path: Path, seconds: float) -> None:
    """Make everything that the cache has look as if it had last been used so long ago."""
    for path in (tmp_path / "assets").rglob("*"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


# -- downloads --------------------------------------------------------------------------------------------------------


async def test_a_file_is_downloaded_once_and_found_by_later_daemons(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets), opened(tmp_path) as later:
        first, second = await assets.fetch(server.url("/a.xlsx")), await later.fetch(server.url("/a.xlsx"))
    assert first == second
    assert first.read_bytes() == CONTENT
    assert first.stat().st_mode & 0o777 == 0o444
    assert server.seen == [("/a.xlsx", None)]


async def test_fifty_callers_share_one_download(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets):
        paths = await asyncio.gather(*(assets.fetch(server.url("/a.xlsx")) for _ in range(50)))
    assert len(set(paths)) == 1
    assert len(server.seen) == 1


async def test_fifty_callers_share_one_failure_and_the_next_one_tries_anew(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets):
        url = server.url("/late")
        failed = await asyncio.gather(*(assets.fetch(url) for _ in range(50)), return_exceptions=True)
        server.files["/late"] = b"here now"
        path = await assets.fetch(url)
    assert {type(error) for error in failed} == {AssetUnavailable}
    assert len({id(error) for error in failed}) == 50
    assert path.read_bytes() == b"here now"
    assert len(server.seen) == 2


async def test_a_file_that_is_not_there_is_asked_for_once_and_named(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets):
        with pytest.raises(AssetUnavailable, match="404") as caught:
            await assets.fetch(url := server.url("/none"))
    error = caught.value
    assert error.facts == {"url": url, "http_status": 404, "tried": [{"where": url, "why": "answered 404 Not Found"}]}
    assert not error.retryable
    assert "ENVD_ASSET_MIRRORS" in error.hint
    assert len(server.seen) == 1
    assert list((tmp_path / "assets" / "parts").iterdir()) == []


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(truncates, id="truncated"),
        pytest.param(resets, id="reset"),
        pytest.param(declares_too_much, id="shorter than declared"),
        pytest.param(speaks_garbage, id="no HTTP"),
        pytest.param(says(500), id="500"),
        pytest.param(says(429, Retry_After="0"), id="429"),
        pytest.param(says(503, Retry_After="soon"), id="503 without a number"),
    ],
)
@pytest.mark.parametrize("ranges", [pytest.param(True, id="ranges"), pytest.param(False, id="no ranges")])
async def test_what_passes_is_tried_three_times(tmp_path: Path, fault: Fault, ranges: bool) -> None:
    async with serving(tmp_path) as (server, assets):
        server.ranges = server.validators = ranges
        server.faults.extend([fault, fault])
        path = await assets.fetch(server.url("/a.xlsx"))
        server.files["/other"] = CONTENT
        server.faults.extend([fault, fault, fault])
        with pytest.raises(AssetUnavailable) as caught:
            await assets.fetch(server.url("/other"))
    assert path.read_bytes() == CONTENT
    assert caught.value.retryable
    assert len(server.seen) == 6


async def test_nobody_there_is_an_error_without_a_status(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets):
        url = server.url("/a.xlsx")
    async with opened(tmp_path) as assets:
        with pytest.raises(AssetUnavailable, match="cannot be connected to") as caught:
            await assets.fetch(url)
    assert caught.value.facts["http_status"] is None


async def test_a_try_ends_at_its_deadline_and_the_next_continues(tmp_path: Path) -> None:
    async with serving(tmp_path, asset_timeout=0.3) as (server, assets):
        server.faults.append(pauses)
        path = await assets.fetch(server.url("/a.xlsx"))
    assert path.read_bytes() == CONTENT
    assert server.seen[1:] == [("/a.xlsx", HALF)]


async def test_a_download_that_broke_off_is_continued(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets):
        server.faults.append(truncates_once_read)
        path = await assets.fetch(server.url("/a.xlsx"), server.watch)
    assert path.read_bytes() == CONTENT
    assert server.seen == [("/a.xlsx", None), ("/a.xlsx", HALF)]


@pytest.mark.parametrize(
    "second",
    [
        pytest.param([], id="server answers the whole"),
        pytest.param([takes_any_range], id="server answers a rest of the new one"),
        pytest.param([says(416)], id="server knows no such range"),
        pytest.param([says(206, Content_Range="garbage")], id="server's range is garbage"),
    ],
)
async def test_what_changed_meanwhile_is_not_mixed(tmp_path: Path, second: list[Fault]) -> None:
    async with serving(tmp_path) as (server, assets):

        async def changes(server: FilesServer, *args: Any) -> Any:
            server.files["/a.xlsx"] = CONTENT[::-1] + b"longer"
            return await truncates_once_read(server, *args)

        server.faults.extend([changes, *second])
        path = await assets.fetch(server.url("/a.xlsx"), server.watch)
    assert path.read_bytes() == CONTENT[::-1] + b"longer"
    assert server.seen[1] == ("/a.xlsx", HALF)


async def test_redirects_are_followed_within_bounds(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets):
        server.faults.append(says(302, Location="/a.xlsx"))
        path = await assets.fetch(server.url("/moved"))
        server.faults.extend([says(302, Location="/round")] * 20)
        with pytest.raises(AssetUnavailable, match="redirected more than 10 times"):
            await assets.fetch(server.url("/round"))
        server.faults.clear()
        server.faults.append(says(302, Location="file:///etc/passwd"))
        with pytest.raises(AssetUnavailable, match="not a URL that can be downloaded"):
            await assets.fetch(server.url("/out"))
    assert path.read_bytes() == CONTENT


async def test_progress_is_told_to_every_caller(tmp_path: Path) -> None:
    told: list[list[tuple[int, int | None]]] = [[], []]
    async with serving(tmp_path) as (server, assets):
        server.faults.append(truncates)
        calls = (assets.fetch(server.url("/a.xlsx"), lambda *now, to=to: to.append(now)) for to in told)
        await asyncio.gather(*calls)
    assert told[0] == told[1]
    assert told[0][0] == (0, len(CONTENT))
    assert told[0][-1] == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "a.xlsx", "http://", "ftp://host/a", "http://[::1/a"])
async def test_only_urls_of_files_are_fetched(tmp_path: Path, url: str) -> None:
    async with opened(tmp_path) as assets:
        with pytest.raises(AssetUnavailable) as caught:
            await assets.fetch(url)
        assert not await assets.has(url)
        assert not assets.has_now(url)
    assert not caught.value.retryable


# -- callers that leave, processes that die ---------------------------------------------------------------------------


async def test_a_caller_that_leaves_does_not_end_the_download_of_the_others(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets):
        server.faults.append(pauses)
        async with asyncio.TaskGroup() as tasks:
            first, *others = [tasks.create_task(assets.fetch(server.url("/a.xlsx"), server.watch)) for _ in range(5)]
            await server.half_read.wait()
            first.cancel()
    assert first.cancelled()
    assert {other.result().read_bytes() for other in others} == {CONTENT}
    assert server.seen == [("/a.xlsx", None), ("/a.xlsx", HALF)]


async def test_a_caller_whose_deadline_ends_hands_the_download_over(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets):
        server.faults.append(pauses)
        async with asyncio.TaskGroup() as tasks:
            with anyio.CancelScope() as deadline:

                def watch(received: int, total: int | None) -> None:
                    if total and received >= total // 2:
                        deadline.cancel()

                tasks.create_task(server.asked(1)).add_done_callback(
                    lambda _: others.append(tasks.create_task(assets.fetch(server.url("/a.xlsx"))))
                )
                others: list[asyncio.Task[Path]] = []
                await assets.fetch(server.url("/a.xlsx"), watch)
    assert deadline.cancelled_caught
    assert [other.result().read_bytes() for other in others] == [CONTENT]
    assert server.seen == [("/a.xlsx", None), ("/a.xlsx", HALF)]


async def test_the_last_caller_that_leaves_takes_the_download_along(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets):
        server.faults.append(pauses)
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            callers = [tasks.create_task(assets.fetch(server.url("/a.xlsx"), server.watch)) for _ in range(5)]
            await server.half_read.wait()
            for caller in callers:
                caller.cancel()
        await asyncio.wait_for(server.left.wait(), 10)
        assert len(server.seen) == 1
        path = await assets.fetch(server.url("/a.xlsx"))
    assert path.read_bytes() == CONTENT
    assert server.seen[1:] == [("/a.xlsx", HALF)]


FETCHES = """
import asyncio, sys, aiohttp
from pathlib import Path
from envd.settings import Settings
from envd.tasks.assets import Assets

async def main():
    async with aiohttp.ClientSession() as session:
        await Assets(Settings(state_dir=Path(sys.argv[1])), session).fetch(
            sys.argv[2], lambda received, total: print(received, flush=True)
        )

asyncio.run(main())
"""


async def test_a_download_whose_process_was_killed_is_continued_by_the_next(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets):
        server.faults.append(pauses)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FETCHES, str(tmp_path), server.url("/a.xlsx"), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        while (line := await asyncio.wait_for(process.stdout.readline(), 30)) and int(line) < len(CONTENT) // 2:
            pass
        process.kill()
        await process.wait()
        assert blobs(tmp_path) == []
        path = await assets.fetch(server.url("/a.xlsx"))
    assert path.read_bytes() == CONTENT
    assert server.seen == [("/a.xlsx", None), ("/a.xlsx", HALF)]


async def test_a_part_is_not_continued_after_the_machine_was_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, asset_timeout=0.3) as (server, assets):
        server.faults.extend([truncates, says(404)])
        with pytest.raises(AssetUnavailable):
            await assets.fetch(server.url("/a.xlsx"))
        (tmp_path / "boot_id").write_text("another")
        monkeypatch.setattr("envd.tasks.parts.BOOT_ID", tmp_path / "boot_id")
        path = await assets.fetch(server.url("/a.xlsx"))
    assert path.read_bytes() == CONTENT
    assert server.seen[2:] == [("/a.xlsx", None)]


async def test_two_processes_that_download_one_url_do_not_share_a_part(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets):
        url = server.url("/a.xlsx")
        other = Part(assets._blobs.part_path(url))
        await asyncio.to_thread(other.open)
        await asyncio.to_thread(other.begin, Version(url))
        await asyncio.to_thread(other.append, b"begun")
        try:
            path = await assets.fetch(url)
        finally:
            await asyncio.to_thread(other.close)
    assert path.read_bytes() == CONTENT
    assert list((tmp_path / "assets" / "parts").glob("*.part")) == [other.path]
    assert other.path.read_bytes() == b"begun"


# -- what is in the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), id="truncated"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[::-1]), id="changed"),
        pytest.param(lambda path: path.unlink(), id="gone"),
    ],
)
@pytest.mark.parametrize("later", [pytest.param(True, id="next daemon"), pytest.param(False, id="same daemon")])
async def test_a_damaged_file_is_fetched_again(tmp_path: Path, harm: Callable[[Path], Any], later: bool) -> None:
    async with serving(tmp_path) as (server, assets), opened(tmp_path) as next_daemon:
        path = await assets.fetch(server.url("/a.xlsx"))
        path.chmod(0o644)
        harm(path)
        again = await (next_daemon if later else assets).fetch(server.url("/a.xlsx"))
    assert again.read_bytes() == CONTENT
    assert len(server.seen) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": 1}', '{"sha256": "../../../etc/passwd"}'])
async def test_an_entry_that_cannot_be_read_is_no_entry(tmp_path: Path, text: str) -> None:
    async with serving(tmp_path) as (server, assets), opened(tmp_path) as next_daemon:
        await assets.fetch(server.url("/a.xlsx"))
        (entry,) = (tmp_path / "assets" / "index").iterdir()
        entry.write_text(text)
        await next_daemon.load()
        assert not await next_daemon.has(server.url("/a.xlsx"))
        assert (await next_daemon.fetch(server.url("/a.xlsx"))).read_bytes() == CONTENT


async def test_equal_content_is_kept_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets):
        server.files["/b.xlsx"] = CONTENT
        assert await assets.fetch(server.url("/a.xlsx")) == await assets.fetch(server.url("/b.xlsx"))
        assert await assets.size() == len(CONTENT)


async def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    async with serving(tmp_path, asset_limit=1024**2) as (server, assets):
        for name in ("old", "used", "new"):
            server.files[f"/{name}"] = name.encode() * 110_000
        for name in ("old", "used", "old", "used"):
            await assets.fetch(server.url(f"/{name}"))
            aged(tmp_path, 1000)
        await assets.fetch(server.url("/new"))
        assert [await assets.has(server.url(f"/{name}")) for name in ("old", "used", "new")] == [False, True, True]
        assert [assets.has_now(server.url(f"/{name}")) for name in ("old", "used", "new")] == [False, True, True]
        assert await assets.size() <= 1024**2


async def test_what_may_be_in_use_is_not_removed(tmp_path: Path) -> None:
    async with serving(tmp_path, asset_limit=1024**2) as (server, assets):
        server.files |= {"/1": b"1" * 700_000, "/2": b"2" * 700_000}
        paths = [await assets.fetch(server.url("/1")), await assets.fetch(server.url("/2"))]
    assert [path.stat().st_size for path in paths] == [700_000, 700_000]


@pytest.mark.parametrize("validators", [pytest.param(True, id="length"), pytest.param(False, id="no length")])
async def test_a_file_larger_than_the_cache_is_refused(tmp_path: Path, validators: bool) -> None:
    async with serving(tmp_path, asset_limit=1024**2) as (server, assets):
        server.files["/huge"] = b"x" * (1024**2 + 1)
        if not validators:
            server.faults.append(streams)
        with pytest.raises(AssetUnavailable, match="the whole cache 1048576 at most") as caught:
            await assets.fetch(server.url("/huge"))
    assert "ENVD_ASSET_LIMIT" in caught.value.hint
    assert len(server.seen) == 1


async def streams(server: FilesServer, request: Any, content: bytes) -> Any:
    from aiohttp import web

    response = web.StreamResponse()
    response.enable_chunked_encoding()
    await response.prepare(request)
    await response.write(content)
    return response


async def test_a_full_disk_is_told_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    async with serving(tmp_path) as (server, assets):
        with pytest.raises(AssetUnavailable, match="does not fit on the disk") as caught:
            await assets.fetch(server.url("/a.xlsx"))
    assert caught.value.facts["needed_bytes"] == len(CONTENT)
    assert caught.value.facts["free_bytes"] == 1000
    assert caught.value.facts["directory"] == str(tmp_path / "assets")


async def test_a_disk_that_fills_up_is_told_and_the_part_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with serving(tmp_path) as (server, assets):
        monkeypatch.setattr("os.pwrite", full)
        with pytest.raises(AssetUnavailable, match="does not fit on the disk"):
            await assets.fetch(server.url("/a.xlsx"))
        monkeypatch.undo()
        assert await assets.size() == 0
        assert (await assets.fetch(server.url("/a.xlsx"))).read_bytes() == CONTENT


async def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "assets").write_text("in the way")
    async with serving(tmp_path) as (server, assets):
        with pytest.raises(AssetUnavailable, match="the cache cannot be used") as caught:
            await assets.fetch(server.url("/a.xlsx"))
        assert not await assets.has(server.url("/a.xlsx"))
    assert str(tmp_path / "assets") in caught.value.detail


async def test_what_is_there_is_known_without_looking_after_load(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets), opened(tmp_path) as later:
        await assets.fetch(url := server.url("/a.xlsx"))
        before = later.has_now(url)
        await later.load()
        assert (before, later.has_now(url), later.has_now(server.url("/b"))) == (False, True, False)


# -- mirrors ----------------------------------------------------------------------------------------------------------


async def test_mirrors_are_asked_in_order_before_the_original(tmp_path: Path) -> None:
    async with files_server() as mirror, files_server() as origin:
        mirrors = (mirror.url("/empty"), str(tmp_path / "folder"), mirror.url("/full"))
        async with opened(tmp_path, asset_mirrors=mirrors) as assets:
            host = f"127.0.0.1:{origin.port}"
            mirror.files[f"/full/{host}/d/a%20b.xlsx?x=1"] = CONTENT
            path = await assets.fetch(origin.url("/d/a%20b.xlsx?x=1"))
    assert path.read_bytes() == CONTENT
    assert [seen[0] for seen in mirror.seen] == [f"/{base}/{host}/d/a%20b.xlsx?x=1" for base in ("empty", "full")]
    assert origin.seen == []


async def test_the_original_is_asked_when_no_mirror_has_the_file(tmp_path: Path) -> None:
    async with serving(tmp_path, asset_mirrors=("http://127.0.0.1:9/m", str(tmp_path))) as (server, assets):
        assert (await assets.fetch(server.url("/a.xlsx"))).read_bytes() == CONTENT
        with pytest.raises(AssetUnavailable) as caught:
            await assets.fetch(server.url("/none"))
    assert len(caught.value.facts["tried"]) == 3
    assert caught.value.facts["http_status"] == 404


async def test_a_prefix_is_replaced(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, _):
        mirrors = (f"https://files.example=http://127.0.0.1:{server.port}",)
        async with opened(tmp_path, asset_mirrors=mirrors) as assets:
            assert (await assets.fetch("https://files.example/a.xlsx")).read_bytes() == CONTENT
    assert parse_mirrors(mirrors)[0].place_of("https://files.example.org/a.xlsx") is None


async def test_a_file_of_a_folder_is_copied_and_copied_anew_when_it_changed(tmp_path: Path) -> None:
    source = tmp_path / "mirror" / "files.example" / "d" / "a b.txt"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    async with opened(tmp_path, asset_mirrors=(str(tmp_path / "mirror"),), offline=True) as assets:
        await assets.load()
        assert assets.has_now("https://files.example/d/a%20b.txt")
        assert await assets.has("https://files.example/d/a%20b.txt")
        first = await assets.fetch("https://files.example/d/a%20b.txt")
        source.write_text("two, longer")
        second = await assets.fetch("https://files.example/d/a%20b.txt")
        source.unlink()
        third = await assets.fetch("https://files.example/d/a%20b.txt")
    assert (first.read_text(), second.read_text(), third) == ("one", "two, longer", second)


@pytest.mark.parametrize(
    "path", ["/../secret", "/%2e%2e/secret", "/d/..%2f..%2fsecret", "/%00", "/d/", "", "/a/%2Fetc%2Fpasswd"]
)
def test_no_url_leads_out_of_a_folder(path: str) -> None:
    (mirror,) = parse_mirrors(["/srv/mirror"])
    assert mirror.place_of(f"https://h{path}") in (None, Path("/srv/mirror/h"))


@pytest.mark.parametrize(
    ("word", "place"),
    [
        ("https://m.example/base/", "https://m.example/base/h.example/a%20b?q=1/2"),
        ("/srv/m", Path("/srv/m/h.example/a b?q=1%2F2")),
        ("https://h.example=https://m.example", "https://m.example/a%20b?q=1/2"),
        ("https://h.example/=/srv/m", Path("/srv/m/a b?q=1%2F2")),
        ("https://other.example=https://m.example", None),
    ],
)
def test_a_mirror_keeps_files_under_their_url(word: str, place: str | Path | None) -> None:
    (mirror,) = parse_mirrors([word])
    assert mirror.place_of("https://user:pw@H.example/a%20b?q=1/2".replace("user:pw@H", "h")) == place


@pytest.mark.parametrize("word", ["hf-mirror.example", "ftp://m.example", "https://a.example=b.example", "https://"])
def test_what_is_no_mirror_stops_the_start(word: str) -> None:
    with pytest.raises(SettingsError, match="ENVD_ASSET_MIRRORS"):
        parse_mirrors([word])


async def test_offline_nothing_is_asked_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, assets), opened(tmp_path, offline=True) as offline:
        await assets.fetch(server.url("/a.xlsx"))
        assert (await offline.fetch(server.url("/a.xlsx"))).read_bytes() == CONTENT
        with pytest.raises(AssetUnavailable, match="ENVD_OFFLINE") as caught:
            await offline.fetch(server.url("/b.xlsx"))
    assert len(server.seen) == 1
    assert "envd tasks prefetch" in caught.value.hint
    assert not caught.value.retryable


async def test_secrets_in_urls_are_not_told(tmp_path: Path) -> None:
    async with opened(tmp_path, offline=True) as assets:
        with pytest.raises(AssetUnavailable) as caught:
            await assets.fetch("https://user:hunter2@files.example/a")
    assert "hunter2" not in f"{caught.value}{caught.value.facts}"


async def test_only_so_many_downloads_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets_module, "AT_ONCE", 2)
    async with serving(tmp_path) as (server, assets), asyncio.TaskGroup() as tasks:
        server.faults.extend([pauses, pauses])
        for number in range(5):
            server.files[f"/{number}"] = CONTENT
            tasks.create_task(assets.fetch(server.url(f"/{number}"), server.watch))
        await server.half_read.wait()
        await server.asked(2)
        seen = len(server.seen)
        server.go_on.set()
    assert seen == 2
    assert len(server.seen) == 5
