"""Getters that read Chrome over CDP, against a real one: what is read, and what is told when it cannot be."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from grading_desktop import FakeGuest, fake_guest, rule
from test_grading import settings_of

from envd.tasks.grading import GradeReport, Graders
from envd.tasks.task import Metric

pytestmark = [pytest.mark.local, pytest.mark.asyncio(loop_scope="module")]

CHROMIUM = "/usr/lib/chromium/chromium"
LISTENS = re.compile(rb"DevTools listening on ws://127\.0\.0\.1:(\d+)/")
TABS = {"type": "open_tabs_info"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def graders(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Graders]:
    async with Graders.open(settings_of(tmp_path_factory.mktemp("state"))) as graders:
        await graders.warm()
        yield graders


@pytest_asyncio.fixture(loop_scope="module")
async def guest() -> AsyncIterator[FakeGuest]:
    async with fake_guest() as guest:
        guest.faults["/page"] = _page
        yield guest


async def _page(_: web.Request) -> web.StreamResponse:
    return web.Response(text="<title>A page</title><p class=price>7</p>", content_type="text/html")


@asynccontextmanager
async def chromium(profile: Path, url: str) -> AsyncIterator[tuple[int, asyncio.subprocess.Process]]:
    """A browser that shows `url`, and the port of its CDP."""
    process = await asyncio.create_subprocess_exec(
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={profile}"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"),
        *("--disable-gpu", url),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            while (listens := LISTENS.search(await process.stderr.readline())) is None:
                assert not process.stderr.at_eof()
        yield int(listens[1]), process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def grade(graders: Graders, guest: FakeGuest, port: int, *metrics: Metric, deadline_s: float = 60) -> GradeReport:
    workdir = await graders.make_workdir()
    request = guest.request(*metrics, guest=guest.address(chromium=port))
    report = await graders.grade(request, workdir, deadline_s)
    shutil.rmtree(workdir)
    return report


async def test_the_tabs_that_are_open_are_read(graders: Graders, guest: FakeGuest, tmp_path: Path) -> None:
    page = f"http://127.0.0.1:{guest.port}/page"
    async with chromium(tmp_path, page) as (port, _):
        report = await grade(
            graders, guest, port, Metric("is_expected_tabs", TABS, rule({"type": "url", "urls": [page]}))
        )
    assert report.metrics[0].result == [{"title": "A page", "url": page}]
    assert report.score == 1.0, report


async def test_a_page_is_read(graders: Graders, guest: FakeGuest, tmp_path: Path) -> None:
    infos = [{"action": "inner_text", "selector": ".price"}]
    config: dict[str, Any] = {"type": "info_from_website", "url": f"http://127.0.0.1:{guest.port}/page", "infos": infos}
    metric = Metric("exact_match", rule(["7"]), config)
    async with chromium(tmp_path, "about:blank") as (port, _):
        report = await grade(graders, guest, port, metric)
    assert report.metrics[0].expected == ["7"], report


async def test_a_site_that_cannot_be_reached_is_told_although_there_are_backups(
    graders: Graders, guest: FakeGuest, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"type": "info_from_website", "url": "http://nowhere.invalid/", "backups": ["7"]}
    async with chromium(tmp_path, "about:blank") as (port, _):
        report = await grade(graders, guest, port, Metric("exact_match", config, rule({"expected": ["7"]})))
    assert report.failure is not None
    assert (report.failure.kind, report.failure.facts["url"]) == ("infra", "http://nowhere.invalid/")


async def test_a_chrome_that_goes_away_while_it_is_read_is_the_desktops_failure(
    graders: Graders, guest: FakeGuest, tmp_path: Path
) -> None:
    opened = asyncio.Event()

    async def never_ends(_: web.Request) -> web.StreamResponse:
        opened.set()
        await asyncio.sleep(3600)
        return web.Response()

    guest.faults["/never"] = never_ends
    config = {"type": "page_info", "url": f"http://127.0.0.1:{guest.port}/never"}
    async with chromium(tmp_path, "about:blank") as (port, process):
        task = asyncio.create_task(grade(graders, guest, port, Metric("exact_match", config, rule({}))))
        async with asyncio.timeout(20):
            await opened.wait()  # the getter is connected, and waits for its page
        process.kill()
        report = await task
    assert report.failure is not None
    assert report.failure.kind == "infra", report.failure
