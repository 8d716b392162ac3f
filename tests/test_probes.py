"""Readiness is evidence: what counts as a usable desktop, against guests that answer in every wrong way."""

from __future__ import annotations

import asyncio
import io
import re
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image, ImageDraw

from envd.boot import hops, probes
from envd.boot.probes import NEEDED, Readiness, judge_picture
from envd.drivers.base import InstanceSpec, Report
from envd.drivers.sim import FOREVER, Behaviour, Fault, SimDriver
from envd.guest import Cdp, Guest
from envd.models import Probe, ProbeResult
from envd.settings import Settings

SCREEN = (320, 240)


@dataclass
class Heard:
    probes: list[Probe] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    moment: asyncio.Event = field(default_factory=asyncio.Event)

    def probed(self, probe: Probe) -> None:
        self.probes.append(probe)
        self.moment.set()

    def note(self, message: str) -> None:
        self.notes.append(message)
        self.moment.set()

    async def until(self, name: str, result: ProbeResult) -> Probe:
        """The first try of the probe that came out so."""
        async with asyncio.timeout(20):
            while not (found := [probe for probe in self.probes if (probe.name, probe.result) == (name, result)]):
                self.moment.clear()
                await self.moment.wait()
        return found[0]


async def readiness(
    tmp_path: Path,
    behaviour: Behaviour,
    heard: Heard,
    *,
    wait_for: Any,
    grace: float = 60,
    frame: bytes | None = None,
) -> Readiness:
    """Probe one sim desktop until `wait_for`, an awaitable of the test's, is done; None waits until it is ready. With a
    `frame` it is probed as a clone."""
    settings = Settings(provider="sim", state_dir=tmp_path, screen=SCREEN)
    async with SimDriver(settings, "probe", behaviour=behaviour) as driver, aiohttp.ClientSession() as http:
        ends = (await driver.create(InstanceSpec("one", SCREEN), Report())).endpoints
        ready = Readiness(Guest(http, ends.guest), Cdp(http, ends.cdp), SCREEN, 0.005, grace, heard, frame)
        waiting = asyncio.create_task(ready.wait())
        async with asyncio.timeout(20):
            await (wait_for or waiting)
        waiting.cancel()
        await asyncio.wait({waiting})
        await driver.destroy("one")
    return ready


def picture(draw: Any = None, size: tuple[int, int] = SCREEN, kind: str = "PNG") -> bytes:
    image = Image.new("RGB", size, (30, 60, 90))
    if draw is not None:
        draw(ImageDraw.Draw(image))
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def window(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((40, 40, 200, 160), fill=(250, 250, 250))


def pointer(draw: ImageDraw.ImageDraw) -> None:
    draw.polygon([(100, 100), (100, 112), (108, 108)], fill=(0, 0, 0))


@pytest.mark.parametrize(
    ("body", "result", "says"),
    [
        pytest.param(picture(window), ProbeResult.OK, "320x240", id="a window"),
        pytest.param(picture(window, kind="JPEG"), ProbeResult.OK, "320x240", id="as jpeg"),
        pytest.param(picture(), ProbeResult.FAIL, "one flat colour", id="flat"),
        pytest.param(picture(pointer), ProbeResult.FAIL, "one flat colour", id="flat with a pointer"),
        pytest.param(picture(window, (640, 480)), ProbeResult.FAIL, "640x480, not 320x240", id="other size"),
        pytest.param(picture(window)[:200], ProbeResult.FAIL, "do not decode", id="cut short"),
        pytest.param(b"\x89PNG\r\n\x1a\n", ProbeResult.FAIL, "do not decode", id="only a magic number"),
        pytest.param(picture(window, kind="GIF"), ProbeResult.FAIL, "do not decode", id="a format guests do not send"),
    ],
)
def test_invariant_10_a_screenshot_counts_when_it_shows_a_desktop(body: bytes, result: ProbeResult, says: str) -> None:
    judged, detail = judge_picture(body, SCREEN)
    assert judged is result
    assert says in detail


@pytest.mark.parametrize("bad", ["error", "garbage", "half", "flat", "size", "html", "empty", "redirect", "cut"])
async def test_a_probe_passes_only_after_successes_in_a_row(tmp_path: Path, bad: Any) -> None:
    heard = Heard()
    ready = await readiness(tmp_path, Behaviour(flaky=3, bad=(bad,)), heard, wait_for=None)
    for name in ("screenshot", "chrome_cdp"):
        results = [probe.result for probe in heard.probes if probe.name == name]
        assert results[-NEEDED:] == [ProbeResult.OK] * NEEDED
        assert ProbeResult.OK not in results[: -NEEDED - 2], results
        assert len(results) > NEEDED
    assert all(probe.passed for probe in ready.probes.values())


async def test_a_guest_that_is_not_there_is_unknown_and_one_that_answers_badly_has_failed(tmp_path: Path) -> None:
    heard = Heard()
    await readiness(tmp_path, Behaviour(refuse=True), heard, wait_for=heard.until("screenshot", ProbeResult.UNKNOWN))
    assert {probe.result for probe in heard.probes} == {ProbeResult.UNKNOWN}
    heard = Heard()
    bad = Behaviour(flaky=FOREVER, bad=("error",))
    await readiness(tmp_path, bad, heard, wait_for=heard.until("screenshot", ProbeResult.FAIL))
    assert any("answered 500" in probe.detail for probe in heard.probes)


async def test_chrome_that_shows_no_page_is_not_ready(tmp_path: Path) -> None:
    heard = Heard()
    no_page = heard.until("chrome_cdp", ProbeResult.FAIL)
    await readiness(tmp_path, Behaviour(cdp_no_page=True), heard, wait_for=no_page)
    assert "shows no page" in next(p.detail for p in heard.probes if p.result is ProbeResult.FAIL)


async def test_a_try_that_hangs_is_cut_off_and_no_two_tries_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "TRY_TIMEOUT", 0.05)
    heard = Heard()
    began = time.monotonic()

    async def four_tries() -> None:
        while sum(probe.name == "screenshot" for probe in heard.probes) < 4:
            heard.moment.clear()
            await heard.moment.wait()

    await readiness(tmp_path, Behaviour(never=True), heard, wait_for=four_tries())
    assert time.monotonic() - began >= 4 * 0.05
    assert {probe.result for probe in heard.probes} == {ProbeResult.UNKNOWN}


async def test_the_probes_do_not_wait_for_each_other(tmp_path: Path) -> None:
    heard = Heard()
    ready = await readiness(tmp_path, Behaviour(boot_s=0.4, cdp_s=0), heard, wait_for=None)
    shot, cdp = ready.probes["screenshot"].seconds, ready.probes["chrome_cdp"].seconds
    assert shot is not None
    assert cdp is not None
    assert cdp < 0.4 <= shot


async def test_chrome_and_the_bridge_are_started_only_when_the_guest_answers_and_cdp_does_not(tmp_path: Path) -> None:
    heard = Heard()
    await readiness(tmp_path, Behaviour(cdp_s=None), heard, wait_for=None, grace=0.02)
    assert len(heard.notes) == 1
    assert "starting Chrome and the socat bridge in the guest" in heard.notes[0]
    heard = Heard()
    await readiness(tmp_path, Behaviour(), heard, wait_for=None, grace=60)
    assert heard.notes == []


async def test_a_launch_that_fails_is_told_and_tried_again() -> None:
    async def screenshot(request: web.Request) -> web.Response:
        return web.Response(body=picture(window), content_type="image/png")

    async def launch(request: web.Request) -> web.Response:
        return web.json_response({"status": "error", "message": "no such program"}, status=500)

    guest = web.Application()
    guest.add_routes([web.get("/screenshot", screenshot), web.post("/setup/launch", launch)])
    heard = Heard()

    async def told_twice() -> None:
        while sum("did not start them" in note for note in heard.notes) < 2:
            heard.moment.clear()
            await heard.moment.wait()

    async with TestServer(guest) as server, aiohttp.ClientSession() as http:
        url = str(server.make_url("")).rstrip("/")
        ready = Readiness(Guest(http, url), Cdp(http, f"{url}/no-chrome"), SCREEN, 0.005, 0, heard)
        waiting = asyncio.create_task(ready.wait())
        async with asyncio.timeout(20):
            await told_twice()
        waiting.cancel()
        await asyncio.wait({waiting})
    assert "no such program" in next(note for note in heard.notes if "did not start" in note)


ROWS = "  sl  local_address rem_address   st tx_queue rx_queue\n   0: 0100007F:{port:04X} 00000000:0000 {state} 0:0\n"
"""As /proc/net/tcp has them."""


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        pytest.param(ROWS.format(port=22, state="0A"), "nothing listens on 9222 or 1337", id="neither"),
        pytest.param(ROWS.format(port=9222, state="0A"), "there is no Chrome behind it", id="no Chrome"),
        pytest.param(
            ROWS.format(port=1337, state="0A"), r"the bridge \(socat\) between them is missing", id="no bridge"
        ),
        pytest.param(
            ROWS.format(port=1337, state="0A") + ROWS.format(port=9222, state="0A"),
            "it is Chrome itself that does not answer",
            id="both",
        ),
        pytest.param(ROWS.format(port=9222, state="01"), "nothing listens on 9222 or 1337", id="a connection only"),
        pytest.param("", "could not be seen: no such file", id="no tables"),
    ],
)
async def test_which_part_of_the_way_to_chrome_is_missing_is_told(tables: str, says: str) -> None:
    async def screenshot(request: web.Request) -> web.Response:
        return web.Response(body=picture(window), content_type="image/png")

    async def launch(request: web.Request) -> web.Response:
        return web.Response(text="launched")

    async def execute(request: web.Request) -> web.Response:
        assert (await request.json())["command"] == ["cat", "/proc/net/tcp", "/proc/net/tcp6"]
        return web.json_response(
            {"status": "success", "output": tables, "error": "no such file", "returncode": int(not tables)}
        )

    guest = web.Application()
    guest.add_routes([web.get("/screenshot", screenshot), web.post("/setup/launch", launch)])
    guest.add_routes([web.post("/execute", execute)])
    heard = Heard()
    async with TestServer(guest) as server, aiohttp.ClientSession() as http:
        url = str(server.make_url("")).rstrip("/")
        ready = Readiness(Guest(http, url), Cdp(http, f"{url}/no-chrome"), SCREEN, 0.005, 0, heard)
        waiting = asyncio.create_task(ready.wait())
        async with asyncio.timeout(20):
            while len(heard.notes) < 2:
                heard.moment.clear()
                await heard.moment.wait()
        waiting.cancel()
        await asyncio.wait({waiting})
    assert "starting Chrome and the socat bridge" in heard.notes[0]
    assert re.search(says, heard.notes[1])


def test_what_listens_is_read_from_the_kernels_own_tables() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as used:
        ports = hops.listening(Path("/proc/net/tcp").read_text())
        assert ports is not None
        assert listener.getsockname()[1] in ports
        assert used.getsockname()[1] not in ports


async def test_invariant_10_a_clone_is_ready_by_its_frame_one_answer_and_one_listed_page(tmp_path: Path) -> None:
    heard = Heard()
    ready = await readiness(tmp_path, Behaviour(), heard, wait_for=None, frame=picture(window))
    assert {name: probe.attempts for name, probe in ready.probes.items()} == {"screenshot": 1, "chrome_cdp": 1}
    assert ready.probes["screenshot"].detail.startswith("frame from outside, guest answered in 0.")
    assert heard.notes == []


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        pytest.param(picture(), "one flat colour", id="flat"),
        pytest.param(picture(window, (640, 480)), "640x480", id="other size"),
        pytest.param(b"P6 320 240 255", "do not decode", id="no picture"),
    ],
)
async def test_a_clone_whose_frame_shows_no_desktop_must_pass_as_if_it_had_been_booted(
    tmp_path: Path, frame: bytes, says: str
) -> None:
    heard = Heard()
    ready = await readiness(tmp_path, Behaviour(), heard, wait_for=None, frame=frame)
    assert ready.probes["screenshot"].attempts == NEEDED
    assert "320x240" in ready.probes["screenshot"].detail
    assert [says in note for note in heard.notes] == [True]


@pytest.mark.parametrize(
    ("bad", "result"),
    [
        pytest.param("error", ProbeResult.FAIL, id="error"),
        pytest.param("huge", ProbeResult.FAIL, id="endless"),
        pytest.param("stall", ProbeResult.UNKNOWN, id="silence"),
        pytest.param("cut", ProbeResult.UNKNOWN, id="cut"),
    ],
)
async def test_a_clone_whose_guest_answers_badly_is_not_ready(
    tmp_path: Path, bad: Any, result: ProbeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "CLONE_TRY", 0.2)
    heard = Heard()
    behaviour = Behaviour(on={"/platform": Fault(bad, times=FOREVER)})
    not_ready = heard.until("screenshot", result)
    ready = await readiness(tmp_path, behaviour, heard, wait_for=not_ready, frame=picture(window))
    assert not ready.probes["screenshot"].passed


async def test_a_clone_that_is_slow_is_given_longer_with_every_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "CLONE_TRY", 0.1)
    heard = Heard()
    ready = await readiness(tmp_path, Behaviour(answer_s=0.3), heard, wait_for=None, frame=picture(window))
    assert ready.probes["screenshot"].passed
    assert "no answer within 0.15 s" in {probe.detail for probe in heard.probes}
    assert 3 <= ready.probes["screenshot"].attempts <= 12


async def test_a_guest_server_that_does_not_tell_its_platform_has_answered() -> None:
    async with TestServer(web.Application()) as server, aiohttp.ClientSession() as http:
        await Guest(http, str(server.make_url("")).rstrip("/")).answers(5)
