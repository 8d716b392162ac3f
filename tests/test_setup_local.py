"""Each type of set-up step on a real desktop, with its own guest server, window manager and Chromium."""

from __future__ import annotations

import asyncio
import io
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image

from envd.drivers.base import InstanceSpec, Report
from envd.drivers.local import LocalDriver
from envd.errors import Fault, SetupFailed
from envd.guest import Cdp, Guest
from envd.models import SetupRecord
from envd.settings import Settings
from envd.tasks.assets import Assets
from envd.tasks.setup import runner
from envd.tasks.setup.context import Context
from envd.tasks.task import Step

pytestmark = pytest.mark.local


@asynccontextmanager
async def desktop(tmp_path: Path, **files: bytes) -> AsyncIterator[tuple[Context, str]]:
    """The context of a set-up on a desktop whose guest answers, and the URL of a server that has `files`."""
    served = tmp_path / "served"
    served.mkdir()
    for name, content in files.items():
        (served / name).write_bytes(content)
    settings = Settings(provider="local", state_dir=tmp_path / "state", asset_mirrors=(str(served),))
    app = web.Application()
    app.router.add_static("/", served)
    async with LocalDriver(settings, "test") as driver, aiohttp.ClientSession() as http, asyncio.timeout(100):
        server = TestServer(app)
        try:
            await server.start_server()
            at = (await driver.create(InstanceSpec("a-1", (800, 600)), Report())).endpoints
            guest, assets = Guest(http, at.guest), Assets(settings, http)
            await guest.screenshot()
            context = Context(guest, Cdp(http, at.cdp), assets, settings, http, screen=(800, 600))
            yield context, str(server.make_url("")).rstrip("/")
        finally:
            await driver.destroy("a-1")
            await server.close()


async def run(context: Context, *steps: tuple[str, dict[str, Any]]) -> tuple[SetupRecord, ...]:
    return await runner.run([Step(kind, parameters) for kind, parameters in steps], context)


async def sh(context: Context, script: str) -> str:
    done = await context.guest.execute(["bash", "-c", script])
    return (done.stdout + done.stderr).strip()


async def until(true: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(20):
        while not await true():  # noqa: ASYNC110 - of another machine, which does not tell us
            await asyncio.sleep(0.05)


def window(title: str, word: str = "envd-test") -> str:
    """A shell command that shows a window of its own, for as long as the desktop lives."""
    program = f"""
        from Xlib import X, display
        d = display.Display()
        w = d.screen().root.create_window(50, 50, 200, 100, 0, d.screen().root_depth, event_mask=X.ExposureMask)
        w.set_wm_name({title!r})
        w.set_wm_class({word!r}, {word!r})
        w.map()
        while True:
            d.next_event()
    """
    lines = "\n".join(
        line.strip() if "next_event" not in line else "    d.next_event()" for line in program.split("\n")
    )
    return f"python -c {shlex.quote(lines)}"


def shown(title: str) -> tuple[str, dict[str, Any]]:
    """A step that shows a window and waits for it."""
    return (
        "execute_with_verification",
        {
            "command": f"({window(title)}) >/dev/null 2>&1 &",
            "shell": True,
            "verification": {"window_exists": title},
            "check_interval": 0.1,
        },
    )


async def test_files_are_brought_into_the_desktop(tmp_path: Path) -> None:
    async with desktop(tmp_path, a=b"abc", b=b"x" * 1_000_000) as (context, url):
        files = [{"url": f"{url}/a", "path": "/home/user/new/folder/a.txt"}, {"url": f"{url}/b", "path": "~/b"}]
        await run(
            context,
            ("download", {"files": files}),
            ("upload_file", {"files": [{"local_path": "a", "path": "/home/user/Desktop/c"}]}),
        )
        assert await context.guest.file("/home/user/new/folder/a.txt") == b"abc"
        assert await context.guest.file("~/b") == b"x" * 1_000_000
        assert await sh(context, "cat ~/Desktop/c") == "abc"


async def test_commands_run_with_their_placeholders_and_outputs(tmp_path: Path) -> None:
    async with desktop(tmp_path) as (context, _):
        records = await run(
            context,
            ("execute", {"command": ["echo", "{SCREEN_WIDTH_HALF}"], "stdout": "half.out"}),
            ("command", {"command": "echo {CLIENT_PASSWORD} >&2; exit 3", "shell": True, "stderr": "word.err"}),
            ("execute", {"command": ["no-such-program"]}),
            ("execute", {"command": "echo x >> ~/x; wc -l < ~/x", "shell": True, "until": {"stdout": "3"}}),
        )
        assert context.outputs == {"half.out": b"400\n", "word.err": b"password\n"}
        assert [str(record.outcome) for record in records] == ["ok", "warning", "warning", "ok"]
        assert "no-such-program" in records[2].detail
        assert await sh(context, "cat ~/x") == "x\nx\nx"


async def test_programs_are_launched_and_left(tmp_path: Path) -> None:
    async with desktop(tmp_path) as (context, _):
        await run(context, ("launch", {"command": "sleep 4711"}), ("launch", {"command": ["touch", "/tmp/with blank"]}))
        await until(lambda: sh(context, "pgrep -x sleep && ls '/tmp/with blank' 2>/dev/null"))
        with pytest.raises(SetupFailed) as caught:
            await run(context, ("launch", {"command": ["no-such-program"]}))
        assert caught.value.fault is Fault.TASK
        assert "no-such-program" in caught.value.detail


async def test_windows_are_shown_activated_and_closed(tmp_path: Path) -> None:
    async with desktop(tmp_path) as (context, _):
        records = await run(
            context,
            shown("Alpha one"),
            shown("Beta two"),
            ("activate_window", {"window_name": "alpha"}),
            ("activate_window", {"window_name": "Nobody"}),
            ("activate_window", {"window_name": "alpha one", "strict": True}),
            ("close_window", {"window_name": "Beta two", "strict": True}),
        )
        assert [str(record.outcome) for record in records] == ["ok", "ok", "ok", "warning", "warning", "ok"]
        await until(lambda: sh(context, "wmctrl -l | grep -q Beta || echo gone"))
        assert "Alpha" in await sh(context, "wmctrl -l")
        [record] = await run(context, ("close_window", {"window_name": "envd-test", "by_class": True}))
        assert str(record.outcome) == "ok"
        await until(lambda: sh(context, "wmctrl -l | grep -q Alpha || echo gone"))


async def test_a_window_that_does_not_come_fails(tmp_path: Path) -> None:
    async with desktop(tmp_path) as (context, _):
        wanted = {"verification": {"window_exists": "Nobody"}, "max_wait_time": 0.2, "check_interval": 0.1}
        with pytest.raises(SetupFailed, match="Nobody") as caught:
            await run(context, ("sleep", {"seconds": 0}), ("execute_with_verification", {"command": "true"} | wanted))
        assert (caught.value.fault, caught.value.facts["step"]) == (Fault.TASK, 1)


async def test_a_page_is_opened_and_is_there_when_the_step_ends(tmp_path: Path) -> None:
    page = b"<!doctype html><title>Quarterly figures</title><p>Hello"
    async with desktop(tmp_path, page=page) as (context, url):
        await run(
            context,
            ("download", {"files": [{"url": f"{url}/page", "path": "/home/user/Desktop/figures.html"}]}),
            ("open", {"path": "/home/user/Desktop/figures.html"}),
        )
        assert "Quarterly figures" in await sh(context, "wmctrl -l")


async def test_a_file_that_is_not_there_is_not_opened(tmp_path: Path) -> None:
    async with desktop(tmp_path) as (context, _):
        with pytest.raises(SetupFailed) as caught:
            await run(context, ("open", {"path": "/home/user/none.html"}))
        assert (
            caught.value.facts["records"][0]["detail"]
            == "there is no file or program /home/user/none.html in the desktop"
        )


async def test_the_wallpaper_is_changed(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(picture, "PNG")
    async with desktop(tmp_path, picture=picture.getvalue()) as (context, url):
        await run(
            context,
            ("download", {"files": [{"url": f"{url}/picture", "path": "/home/user/Pictures/red.png"}]}),
            ("change_wallpaper", {"path": "/home/user/Pictures/red.png"}),
        )
        async with context.session.post(context.guest.url + "/wallpaper") as response:
            assert await response.read() == picture.getvalue()


async def test_a_desktop_that_dies_is_not_the_tasks_fault(tmp_path: Path) -> None:
    async with desktop(tmp_path) as (context, _):
        with pytest.raises(SetupFailed) as caught:
            await run(context, ("execute", {"command": "kill -9 $(pgrep -f envd.agent)", "shell": True}))
        assert (caught.value.fault, caught.value.facts["cause"]) == (Fault.INFRA, "guest_unreachable")
