"""The sim driver: each behaviour does what its name says, programs have their effect, and nothing leaks."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import aiohttp
import pytest
from PIL import Image

from envd.actions.gestures import Gesture, Key, Move, Press, Wheel
from envd.drivers import make_driver
from envd.drivers.base import InstanceSpec, Report
from envd.drivers.sim import (
    BAD,
    FOREVER,
    PRESETS,
    WAYS,
    Behaviour,
    Click,
    Desktop,
    Fault,
    SimDriver,
    Way,
    boots_in_flight_max,
    restores_in_flight_max,
)
from envd.drivers.sim.gui import Gui, run_python
from envd.errors import BootFailed, EnvdError, GuestMisbehaved, GuestUnreachable, InfraError, SettingsError
from envd.guest import Browser, Cdp, Guest
from envd.models import Endpoints, ResetPath
from envd.settings import load

SCREEN = (640, 480)
SHORT = aiohttp.ClientTimeout(total=0.2)
AMPLE = aiohttp.ClientTimeout(total=30)
PREFIX = "import pyautogui; import time; pyautogui.FAILSAFE = False; "


def sim(behaviour: Behaviour | Sequence[Behaviour] | None = None, **arguments: Any) -> SimDriver:
    return SimDriver(load({"PROVIDER": "sim"}, env_file=None, **arguments), "test", behaviour)


async def create(driver: SimDriver, name: str = "d-0", screen: tuple[int, int] = SCREEN) -> Endpoints:
    return (await driver.create(InstanceSpec(name, screen), Report())).endpoints


@asynccontextmanager
async def running(
    behaviour: Behaviour | None = None,
) -> AsyncIterator[tuple[SimDriver, Desktop, Endpoints, aiohttp.ClientSession]]:
    async with sim(behaviour) as driver, aiohttp.ClientSession() as http:
        ports = await create(driver)
        yield driver, driver.desktops["d-0"], ports, http


async def get(http: aiohttp.ClientSession, url: str, timeout: aiohttp.ClientTimeout = AMPLE) -> tuple[int, bytes]:
    async with http.get(url, timeout=timeout, allow_redirects=False) as response:
        return response.status, await response.read()


async def execute(http: aiohttp.ClientSession, ports: Endpoints, command: Any, **more: Any) -> Any:
    async with http.post(f"{ports.guest}/execute", json={"command": command, **more}, timeout=AMPLE) as response:
        return await response.json()


async def make_ready(http: aiohttp.ClientSession, ports: Endpoints) -> None:
    await get(http, f"{ports.guest}/screenshot")
    await get(http, f"{ports.cdp}/json/list")


async def refused(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def answering(url: str) -> None:
    async with asyncio.timeout(5):
        while await refused(url):  # noqa: ASYNC110 - another side of a socket has no event to wait for
            await asyncio.sleep(0.005)


def verbs(driver: SimDriver, name: str = "d-0") -> list[str]:
    return [entry.verb for entry in driver.journal if entry.id == name]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# Settings


@pytest.mark.parametrize(
    ("text", "behaviour"),
    [
        pytest.param("", Behaviour(), id="nothing"),
        pytest.param("boot=2,fail=0.1", Behaviour(boot_s=2, fail=0.1), id="fields"),
        pytest.param(" slow , cdp = launch ", Behaviour(boot_s=3, cdp_s=None), id="preset-and-change"),
        pytest.param("bad=half+html,flaky=forever", Behaviour(bad=("half", "html"), flaky=2**63 - 1), id="lists"),
        pytest.param("never=true,death=out of memory", Behaviour(never=True, death="out of memory"), id="words"),
        *(pytest.param(name, preset, id=name) for name, preset in PRESETS.items()),
    ],
)
def test_a_setting_is_read_as_a_behaviour(text: str, behaviour: Behaviour) -> None:
    assert sim(sim=text).behaviours == behaviour


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("boto=2", "no such key boto, did you mean boot?", id="unknown-key"),
        pytest.param("slwo", "did you mean slow?", id="unknown-preset"),
        pytest.param("boot=2,slow", "slow: expected key=value", id="preset-not-first"),
        pytest.param("boot=2,", "an empty item", id="empty-item"),
        pytest.param("boot=soon", "boot=soon is not a number", id="not-a-number"),
        pytest.param("boot=-1", "boot must be a number of at least 0", id="negative"),
        pytest.param("boot=inf", "boot must be a number", id="endless"),
        pytest.param("fail=2", "fail is a probability", id="not-a-probability"),
        pytest.param("flaky=some", "flaky=some is not a whole number", id="not-a-count"),
        pytest.param("never=perhaps", "never=perhaps is not true or false", id="not-a-flag"),
        pytest.param("bad=rude", "bad takes some of error", id="unknown-way"),
        pytest.param("hang=execute", "hang takes a route", id="not-a-route"),
        pytest.param("dies_when=later", "dies_when is booting or ready", id="unknown-moment"),
        pytest.param("boot=1,boot=2", "boot is given twice", id="twice"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_with_what_to_do(text: str, complaint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        sim(sim=text)
    assert complaint in caught.value.detail
    assert "Presets: fast, slow" in caught.value.hint


def test_the_driver_is_had_by_its_name() -> None:
    driver = make_driver(load({"PROVIDER": "sim", "ENVD_SIM": "slow"}, env_file=None), "daemon")
    assert isinstance(driver, SimDriver)
    assert driver.behaviours == PRESETS["slow"]


# Looking


async def test_the_screenshot_is_a_png_of_the_screens_size_and_not_flat() -> None:
    async with running() as (_, _, ports, http):
        _, png = await get(http, f"{ports.guest}/screenshot")
    image = Image.open(io.BytesIO(png))
    colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert (image.format, image.size) == ("PNG", SCREEN)
    assert colours is not None
    assert len(colours) > 50


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("pyautogui.moveTo(5, 5)", id="move"),
        pytest.param("pyautogui.write('a')", id="type"),
        pytest.param("pyautogui.click()", id="click"),
        pytest.param("pyautogui.scroll(3)", id="scroll"),
    ],
)
async def test_the_picture_changes_with_input_and_only_then(program: str) -> None:
    async with running() as (_, _, ports, http):
        before, again = [await get(http, f"{ports.guest}/screenshot") for _ in range(2)]
        await execute(http, ports, ["python", "-c", PREFIX + program])
        after = await get(http, f"{ports.guest}/screenshot")
    assert (before == again, before == after) == (True, False)  # a difference of pictures is no use to read


async def test_untouched_desktops_share_one_frame() -> None:
    async with sim() as driver:
        for name in ("a", "b"):
            await create(driver, name)
        one, other = [await desktop.screenshot() for desktop in driver.desktops.values()]
    assert one is other


# Programs


@pytest.mark.parametrize(
    ("code", "typed"),
    [
        pytest.param("pyautogui.write('it\\'s', interval=0.1)\ntime.sleep(0.5)\npyautogui.press('enter')", "it's\n"),
        pytest.param("pyautogui.typewrite('abc'); pyautogui.press('backspace', presses=2)", "a", id="backspace"),
        pytest.param("pyautogui.write('naïve')", "nave", id="not-ascii"),
        pytest.param("pyautogui.press(['h', 'space', 'i'])", "h i", id="keys"),
        pytest.param("pyautogui.keyDown('shift'); pyautogui.press('a'); pyautogui.keyUp('shift')", "A", id="shift"),
        pytest.param("import pyperclip\npyperclip.copy('né')\npyautogui.hotkey('ctrl', 'v')", "né", id="paste"),
        pytest.param("pyautogui.write('old'); pyautogui.hotkey('ctrl', 'a'); pyautogui.write('new')", "new", id="all"),
        pytest.param("pyautogui.hotkey('ctrl', 's'); pyautogui.press('nonsense')", "", id="no-text"),
        pytest.param("from pyautogui import write as w\nw('x')", "x", id="imported-name"),
        pytest.param("'''\nThought:\n'''\ntext = 'x'\npyautogui.write(text)", "x", id="thought-and-name"),
    ],
)
async def test_typed_text_shows_up_in_the_state(code: str, typed: str) -> None:
    async with running() as (_, desktop, ports, http):
        answer = await execute(http, ports, ["python", "-c", PREFIX + code])
        assert (answer, desktop.gui.typed) == (
            {"status": "success", "output": "", "error": "", "returncode": 0},
            typed,
        )
        assert desktop.inputs == [PREFIX + code]


@pytest.mark.parametrize(
    ("code", "clicks"),
    [
        pytest.param("click(10, 20, button='left')", [Click("left", (10, 20), (10, 20))], id="click"),
        pytest.param("doubleClick(x=1, y=2)", [Click("left", (1, 2), (1, 2))] * 2, id="double"),
        pytest.param("rightClick((3, 4))", [Click("right", (3, 4), (3, 4))], id="right-at-a-tuple"),
        pytest.param("click(9999, -5)", [Click("left", (639, 0), (639, 0))], id="off-the-screen"),
        pytest.param("moveTo(1, 1); pyautogui.dragTo(5, 6, duration=1.0)", [Click("left", (1, 1), (5, 6))], id="drag"),
        pytest.param(
            "mouseDown(1, 1); pyautogui.mouseUp(2, 2)", [Click("left", (1, 1), (2, 2))], id="press-and-release"
        ),
    ],
)
async def test_clicks_are_logged_and_move_the_cursor(code: str, clicks: list[Click]) -> None:
    gui = Gui(SCREEN)
    await run_python(f"{PREFIX}pyautogui.{code}", gui, pace=0)
    assert (gui.clicks, gui.cursor) == (clicks, clicks[-1].to)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        pytest.param("pyautogui.click(", "SyntaxError: '(' was never closed", id="syntax"),
        pytest.param("pyautogui.clik(1, 2)", "AttributeError: module 'pyautogui' has no attribute 'clik'", id="call"),
        pytest.param("import os; os.remove('/')", "AttributeError: module 'os' has no attribute 'remove'", id="os"),
        pytest.param("import numpy", "ModuleNotFoundError: No module named 'numpy'", id="import"),
        pytest.param("x()", "NameError: name 'x' is not defined", id="name"),
        pytest.param("pyautogui.press()", "TypeError", id="arguments"),
        pytest.param("open('/etc/passwd')", "NameError: name 'open' is not defined", id="builtin"),
        pytest.param("[1 for _ in ()]", "NotImplementedError: a sim desktop does not understand", id="statement"),
        pytest.param("\0", "null bytes", id="null"),
    ],
)
async def test_a_program_that_fails_says_so_as_python_does(code: str, error: str) -> None:
    async with running() as (_, desktop, ports, http):
        answer = await execute(http, ports, ["python", "-c", f"import pyautogui; pyautogui.write('a')\n{code}"])
        assert (answer["status"], answer["returncode"]) == ("success", 1)
        assert error in answer["error"]
        assert desktop.gui.typed == ("" if "SyntaxError" in answer["error"] or code == "\0" else "a")


async def test_a_programs_waits_pass_at_the_pace_that_was_told() -> None:
    loop = asyncio.get_running_loop()
    start = loop.time()
    await run_python("import time; time.sleep(30)", Gui(SCREEN), pace=0)
    middle = loop.time()
    await run_python("import pyautogui; pyautogui.write('abcd', interval=0.1)", Gui(SCREEN), pace=0.25)
    assert middle - start < 20
    assert loop.time() - middle >= 0.1


@pytest.mark.parametrize(
    ("command", "more", "outcome"),
    [
        pytest.param("echo hello there", {}, ("hello there\n", "", 0), id="echo"),
        pytest.param("true", {"shell": True}, ("", "", 0), id="true"),
        pytest.param(["false"], {}, ("", "", 1), id="false"),
        pytest.param(["sleep", "0.01"], {}, ("", "", 0), id="sleep"),
        pytest.param(["bash", "-c", "echo 'a b'"], {}, ("a b\n", "", 0), id="shell"),
        pytest.param("cat ~/Desktop/README.txt", {}, ("A simulated desktop.\n", "", 0), id="cat"),
        pytest.param("cat /none", {}, ("", "cat: /none: No such file or directory\n", 1), id="cat-nothing"),
        pytest.param("frobnicate -x", {}, ("", "frobnicate: command not found\n", 127), id="unknown"),
        pytest.param(["python", "-c", "import platform; print(platform.system())"], {}, ("Linux\n", "", 0), id="print"),
        pytest.param(
            ["python", "-c", f"{PREFIX}import os; print(os.path.join(os.getenv('HOME'), '.config', 'a'))"],
            {},
            ("/home/user/.config/a\n", "", 0),
            id="path-of-getters",
        ),
        pytest.param(
            ["python", "-c", "import os; print(os.path.expanduser('~/a b'))"],
            {},
            ("/home/user/a b\n", "", 0),
            id="home",
        ),
        pytest.param("echo $HOME; false", {"shell": True}, ("/home/user\n", "", 1), id="one-after-another"),
        pytest.param("false && echo a || echo 'b; c'", {"shell": True}, ("b; c\n", "", 0), id="if-and-if-not"),
        pytest.param(["test -e /a 2>/dev/null || cat /etc/timezone"], {"shell": True}, ("Etc/UTC\n", "", 0), id="else"),
        pytest.param("echo a > /t; echo b >> /t\ncat /t", {"shell": True}, ("a\nb\n", "", 0), id="to-a-file"),
        pytest.param("touch ~/d/a && rm -r ~/d && test -e ~/d", {"shell": True}, ("", "", 1), id="removed"),
        pytest.param("test -d ~/Desktop && [ ! -s /none ]", {"shell": True}, ("", "", 0), id="tests"),
        pytest.param("wmctrl -lx", {}, ("0x00000001  0 google-chrome.Google-chrome desktop Google Chrome\n", "", 0)),
        pytest.param(["timeout", "5", "sh", "-c", "exit"], {}, ("", "exit: command not found\n", 127), id="timeout"),
        pytest.param("echo ''", {"shell": True}, ("\n", "", 0), id="empty-word"),
    ],
)
async def test_a_few_commands_are_known(command: Any, more: dict[str, bool], outcome: tuple[str, str, int]) -> None:
    async with running() as (_, _, ports, http):
        answer = await execute(http, ports, command, **more)
    assert (answer["output"], answer["error"], answer["returncode"]) == outcome


# The other routes


async def test_an_uploaded_file_can_be_listed_opened_and_read_back() -> None:
    content = os.urandom(3 << 20)
    async with running() as (_, desktop, ports, http):
        form = aiohttp.FormData({"file_path": "~/Desktop/new/a.bin"})
        form.add_field("file_data", io.BytesIO(content), filename="a.bin")
        async with http.post(f"{ports.guest}/setup/upload", data=form) as response:
            assert (response.status, await response.text()) == (200, f"File Uploaded: {len(content)} bytes")
        async with http.post(f"{ports.guest}/list_directory", json={"path": "/home/user/Desktop/new"}) as response:
            tree = {"type": "directory", "name": "new", "children": [{"type": "file", "name": "a.bin"}]}
            assert await response.json() == {"directory_tree": tree}
        async with http.post(f"{ports.guest}/file", data={"file_path": "~/Desktop/new/a.bin"}) as response:
            returned = await response.read()
        async with http.post(f"{ports.guest}/setup/open_file", json={"path": "~/Desktop/new/a.bin"}) as response:
            assert (response.status, desktop.gui.windows[-1]) == (200, "a.bin")
    assert hashlib.sha256(returned).digest() == hashlib.sha256(content).digest()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        pytest.param("POST", "/file", {"data": {"file_path": "/none"}}, 404, id="file-absent"),
        pytest.param("POST", "/file", {"data": {}}, 400, id="file-unnamed"),
        pytest.param("POST", "/setup/upload", {"data": {"file_path": "/a"}}, 400, id="upload-without-data"),
        pytest.param("POST", "/list_directory", {"json": {"path": "/none"}}, 400, id="directory-absent"),
        pytest.param("POST", "/setup/open_file", {"json": {"path": "/none"}}, 404, id="open-absent"),
        pytest.param("POST", "/setup/open_file", {"json": {}}, 400, id="open-unnamed"),
        pytest.param("POST", "/execute", {"data": "x"}, 415, id="not-json"),
        pytest.param(
            "POST",
            "/execute",
            {"data": "{", "headers": {"Content-Type": "application/json"}},
            400,
            id="broken-json",
        ),
        pytest.param("POST", "/execute", {"json": {"command": "echo 'open"}}, 500, id="broken-quotes"),
        pytest.param("GET", "/execute", {}, 405, id="wrong-method"),
        pytest.param("GET", "/nothing", {}, 404, id="unknown-route"),
    ],
)
async def test_a_wrong_request_gets_the_guest_servers_status(
    method: str, path: str, body: dict[str, Any], status: int
) -> None:
    async with running() as (_, _, ports, http), http.request(method, ports.guest + path, **body) as response:
        assert response.status == status


async def test_the_small_routes_answer_in_the_guest_servers_shapes() -> None:
    async with running() as (_, _, ports, http):
        assert await get(http, f"{ports.guest}/platform") == (200, b"Linux")
        assert await get(http, f"{ports.guest}/cursor_position") == (200, b"[320, 240]")
        assert await get(http, f"{ports.guest}/terminal") == (200, b'{"output": null, "status": "success"}')
        async with http.post(f"{ports.guest}/screen_size") as response:
            assert await response.json() == {"width": 640, "height": 480}


async def test_a_shell_script_that_is_not_understood_says_so() -> None:
    async with running() as (_, _, ports, http):
        for script, sign in (("ls | wc", "|"), ("cat < /t", "<"), ("echo a >", ">")):
            answer = await execute(http, ports, script, shell=True)
            assert (answer["returncode"], f"{sign} is not known here" in answer["error"]) == (2, True)


@pytest.mark.parametrize(
    ("verification", "status", "outcome"),
    [
        pytest.param({"window_exists": "chrome", "command_success": "test -e /t"}, 200, "passed", id="both"),
        pytest.param({"window_exists": "gimp"}, 500, "failed", id="no-window"),
        pytest.param({"command_success": "false"}, 500, "failed", id="no-success"),
    ],
)
async def test_a_command_is_verified_by_windows_and_commands(
    verification: dict[str, str], status: int, outcome: str
) -> None:
    body = {"command": "touch /t", "verification": verification, "max_wait_time": 0.02, "check_interval": 0.01}
    async with (
        running() as (_, _, ports, http),
        http.post(f"{ports.guest}/execute_with_verification", json=body) as response,
    ):
        answer = await response.json()
        assert (response.status, answer["verification"], answer["returncode"]) == (status, outcome, 0)


async def test_a_wallpaper_is_what_was_set_and_is_not_there_before() -> None:
    async with running() as (_, desktop, ports, http):
        async with http.post(f"{ports.guest}/wallpaper") as response:
            assert response.status == 404
        desktop.downloads["https://a.example/p.png"] = b"\x89PNG"
        asked = {"url": "https://a.example/p.png", "path": "~/p.png"}
        async with http.post(f"{ports.guest}/setup/download_file", json=asked) as response:
            assert await response.text() == "File downloaded successfully: 4 bytes"
        async with http.post(f"{ports.guest}/setup/change_wallpaper", json={"path": "~/p.png"}) as response:
            assert response.status == 200
        async with http.post(f"{ports.guest}/wallpaper") as response:
            assert await response.read() == b"\x89PNG"


async def test_windows_are_seen_by_class_and_in_the_accessibility_tree() -> None:
    async with running() as (_, desktop, ports, http):
        desktop.gui.windows.append("a <b>")
        guest = Guest(http, ports.guest)
        assert await guest.form("/window_size", {"app_class_name": "Google-Chrome"}) == {"width": 400, "height": 300}
        with pytest.raises(GuestMisbehaved, match="500"):
            await guest.form("/window_size", {"app_class_name": "vlc"})
        _, answer = await get(http, f"{ports.guest}/accessibility")
    assert [
        (node.get("name"), node.get("{https://accessibility.ubuntu.example.org/ns/state}active"))
        for node in ElementTree.fromstring(json.loads(answer)["AT"])
    ] == [("Google Chrome", None), ("a <b>", "true")]


@pytest.mark.parametrize(
    ("how", "left"),
    [
        pytest.param({"window_name": "NOTES"}, ["Google Chrome", "notes"], id="a-part"),
        pytest.param({"window_name": "notes", "strict": True}, ["Google Chrome", "my notes"], id="strict"),
        pytest.param({"window_name": "google-chrome", "by_class": True}, ["my notes", "notes"], id="class"),
        pytest.param({"window_name": "gimp"}, ["Google Chrome", "my notes", "notes"], id="none"),
    ],
)
async def test_a_window_is_meant_as_wmctrl_means_it(how: dict[str, Any], left: list[str]) -> None:
    async with running() as (_, desktop, ports, http):
        desktop.gui.windows[:] = ["Google Chrome", "my notes", "notes"]
        async with http.post(f"{ports.guest}/setup/close_window", json=how) as response:
            assert response.status == 200
        assert desktop.gui.windows == left


async def test_windows_are_raised_and_closed_by_a_part_of_their_title() -> None:
    async with running() as (_, desktop, ports, http):
        desktop.gui.windows[:] = ["Google Chrome", "notes.txt", "Files"]
        async with http.post(f"{ports.guest}/setup/activate_window", json={"window_name": "chrome"}) as response:
            assert response.status == 200
        async with http.post(f"{ports.guest}/setup/close_window", json={"window_name": "files"}) as response:
            assert response.status == 200
        assert desktop.gui.windows == ["notes.txt", "Google Chrome"]


# CDP


async def test_cdp_lists_a_page_and_opens_another() -> None:
    async with running() as (_, _, ports, http):
        async with http.put(f"{ports.cdp}/json/new?http://example.org/") as response:
            made = await response.json()
        async with http.get(f"{ports.cdp}/json/list") as response:
            pages = await response.json()
        async with http.get(f"{ports.cdp}/json/version") as response:
            version = await response.json()
    assert [(page["type"], page["url"]) for page in pages] == [("page", "about:blank"), ("page", "http://example.org/")]
    assert made == pages[1]
    assert version["webSocketDebuggerUrl"].startswith(ports.cdp.replace("http", "ws") + "/devtools/browser/")


async def test_the_cdp_websocket_answers_what_it_knows_and_refuses_the_rest() -> None:
    async with running() as (_, desktop, ports, http):
        page = next(iter(desktop.chrome.pages))
        async with http.ws_connect(f"{ports.cdp}/devtools/page/{page}") as socket:
            await socket.send_json({"id": 1, "method": "Page.navigate", "params": {"url": "http://example.org/"}})
            navigated = await socket.receive_json()
            await socket.send_json({"id": 2, "method": "Page.dance"})
            unknown = await socket.receive_json()
            await socket.send_str("{")
            broken = await socket.receive_json()
        assert (navigated["id"], navigated["result"]["frameId"]) == (1, page)
        assert desktop.chrome.pages[page] == "http://example.org/"
    assert unknown == {"id": 2, "error": {"code": -32601, "message": "'Page.dance' wasn't found"}}
    assert broken["error"]["code"] == -32700


@asynccontextmanager
async def browsing() -> AsyncIterator[tuple[Desktop, Browser]]:
    async with running() as (_, desktop, ports, http), Cdp(http, ports.cdp).browser() as browser:
        yield desktop, browser


async def test_a_page_is_navigated_in_its_session_and_tells_when_it_has_loaded() -> None:
    async with browsing() as (desktop, browser):
        page = (await browser.send("Target.createTarget", {"url": "about:blank"}))["targetId"]
        session = await browser.attach(page)
        await browser.send("Page.enable", session_id=session)
        with browser.events("Page.loadEventFired", session) as loads:
            await browser.send("Page.navigate", {"url": "http://a.example/"}, session_id=session)
            async with asyncio.timeout(5):
                await loads.receive()
        title = await browser.send("Runtime.evaluate", {"expression": "document.title"}, session_id=session)
    assert list(desktop.chrome.pages.values()) == ["about:blank", "http://a.example/"]
    assert title["result"]["value"] == "http://a.example/"


async def test_a_closed_page_ends_its_sessions() -> None:
    async with browsing() as (desktop, browser):
        page = next(iter(desktop.chrome.pages))
        session = await browser.attach(page)
        with browser.events("Target.detachedFromTarget") as ends:
            await browser.send("Target.closeTarget", {"targetId": page})
            async with asyncio.timeout(5):
                assert await ends.receive() == {"sessionId": session, "targetId": page}
        assert await browser.pages() == []
        for refused in (
            browser.send("Page.enable", session_id=session),
            browser.send("Page.enable"),
            browser.attach(page),
        ):
            with pytest.raises(GuestMisbehaved):
                await refused


async def test_every_page_is_painted() -> None:
    async with running() as (_, _, ports, http):
        assert await Cdp(http, ports.cdp).painted(5)


async def test_a_closed_chrome_comes_back_with_the_pages_that_it_is_launched_with() -> None:
    async with running() as (_, desktop, ports, http):
        async with Cdp(http, ports.cdp).browser() as browser:
            await browser.send("Browser.close")
        assert await refused(ports.cdp)
        await Guest(http, ports.guest).launch(["google-chrome", "--flag", "http://a.example/"])
        assert list(desktop.chrome.pages.values()) == ["http://a.example/"]
        await Guest(http, ports.guest).launch(["google-chrome", "http://b.example/"])
        assert len(await Cdp(http, ports.cdp).pages()) == 2


# Behaviours


async def test_a_slow_desktop_refuses_until_it_has_booted() -> None:
    async with running(Behaviour(boot_s=0.05, cdp_s=0.1)) as (_, desktop, ports, http):
        assert await refused(ports.guest)
        assert await refused(ports.cdp)
        await answering(ports.guest)
        assert await refused(ports.cdp)
        await answering(ports.cdp)
        await make_ready(http, ports)
        assert desktop.ready.is_set()


async def test_chrome_that_is_only_launched_through_the_guest_comes_up_then() -> None:
    async with running(Behaviour(cdp_s=None)) as (_, desktop, ports, http):
        assert await refused(ports.cdp)
        for command in (["socat", "tcp-listen:9222,fork", "tcp:localhost:1337"], ["google-chrome", "--flag"]):
            async with http.post(f"{ports.guest}/setup/launch", json={"command": command}) as response:
                assert await response.text() == f"{' '.join(command)} launched successfully"
        assert (await get(http, f"{ports.cdp}/json/version"))[0] == 200
        assert len(desktop.launched) == 2


async def test_a_stopped_chrome_refuses_until_it_is_launched_again() -> None:
    async with running() as (driver, _, ports, http):
        await get(http, f"{ports.cdp}/json/version")
        driver.stop_chrome("d-0")
        assert await refused(ports.cdp)
        assert (await get(http, f"{ports.guest}/screenshot"))[0] == 200
        async with http.post(f"{ports.guest}/setup/launch", json={"command": "chromium"}) as response:
            assert response.status == 200
        assert (await get(http, f"{ports.cdp}/json/version"))[0] == 200


async def test_never_accepts_connections_and_does_not_answer() -> None:
    async with running(PRESETS["never"]) as (_, _, ports, http):
        assert not await refused(ports.guest)
        for url in (f"{ports.guest}/screenshot", f"{ports.cdp}/json/version"):
            with pytest.raises(TimeoutError):
                await get(http, url, SHORT)


async def test_refuse_never_opens_a_port() -> None:
    async with running(Behaviour(refuse=True)) as (_, _, ports, _):
        assert await refused(ports.guest)
        assert await refused(ports.cdp)


async def test_flaky_answers_badly_so_often_in_turn_and_then_well() -> None:
    async with running(Behaviour(flaky=2, bad=("error", "html"))) as (_, desktop, ports, http):
        for url in (f"{ports.guest}/screenshot", f"{ports.cdp}/json/version", f"{ports.cdp}/json/list"):
            answers = [await get(http, url) for _ in range(3)]
            assert [status for status, _ in answers] == [500, 200, 200]
            assert b"sign in" in answers[1][1]
            assert b"html" not in answers[2][1]
        assert desktop.ready.is_set()


def _undecodable(status: int, body: bytes) -> bool:
    try:
        Image.open(io.BytesIO(body)).load()
    except OSError:
        return status == 200
    return False


@pytest.mark.parametrize(
    ("way", "is_so"),
    [
        pytest.param("error", lambda status, body: status == 500, id="error"),
        pytest.param("garbage", _undecodable, id="garbage"),
        pytest.param("half", lambda status, body: body[:4] == b"\x89PNG" and _undecodable(status, body), id="half"),
        pytest.param("flat", lambda status, body: len(Image.open(io.BytesIO(body)).getcolors() or []) == 1, id="flat"),
        pytest.param("size", lambda status, body: Image.open(io.BytesIO(body)).size == (320, 240), id="size"),
        pytest.param("html", lambda status, body: status == 200 and body.startswith(b"<!doctype"), id="html"),
        pytest.param("empty", lambda status, body: (status, body) == (200, b""), id="empty"),
        pytest.param("redirect", lambda status, body: status == 302, id="redirect"),
    ],
)
async def test_each_bad_screenshot_is_bad_in_its_way(way: Any, is_so: Any) -> None:
    async with running(Behaviour(flaky=1, bad=(way,))) as (_, _, ports, http):
        assert is_so(*await get(http, f"{ports.guest}/screenshot"))


@pytest.mark.parametrize(
    ("way", "error"),
    [
        pytest.param("cut", aiohttp.ClientPayloadError, id="cut"),
        pytest.param("drip", TimeoutError, id="drip"),
        pytest.param("stall", TimeoutError, id="stall"),
    ],
)
async def test_each_bad_connection_fails_in_its_way(way: Any, error: type[Exception]) -> None:
    async with running(Behaviour(flaky=1, bad=(way,))) as (_, _, ports, http):
        with pytest.raises(error):
            await get(http, f"{ports.guest}/screenshot", SHORT if error is TimeoutError else AMPLE)


async def test_a_huge_answer_goes_on_until_the_client_has_had_enough() -> None:
    async with running(Behaviour(flaky=1, bad=("huge",))) as (_, _, ports, http):
        response = await http.get(f"{ports.guest}/screenshot")
        await response.content.readexactly(8 << 20)
        response.close()


@pytest.mark.parametrize("way", BAD)
async def test_no_bad_answer_makes_a_desktop_ready(way: Any) -> None:
    async with running(Behaviour(flaky=1, bad=(way,))) as (_, desktop, ports, http):
        for url in (f"{ports.guest}/screenshot", f"{ports.cdp}/json/list"):
            try:
                await get(http, url, SHORT)
            except (aiohttp.ClientError, TimeoutError):
                pass
        assert not desktop.ready.is_set()


async def test_cdp_without_a_page_answers_and_is_not_ready() -> None:
    async with running(Behaviour(cdp_no_page=True)) as (_, desktop, ports, http):
        await make_ready(http, ports)
        assert (await get(http, f"{ports.cdp}/json/version"))[0] == 200
        assert await get(http, f"{ports.cdp}/json/list") == (200, b"[]")
        assert not desktop.ready.is_set()


async def test_hanging_takes_no_input_once_it_is_ready() -> None:
    async with running(PRESETS["hanging"]) as (_, desktop, ports, http):
        assert (await execute(http, ports, "true"))["returncode"] == 0
        await make_ready(http, ports)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await execute(http, ports, ["python", "-c", PREFIX])
        assert desktop.inputs == []
        assert (await get(http, f"{ports.guest}/screenshot"))[0] == 200


async def test_a_lost_answer_had_its_effect() -> None:
    async with running(Behaviour(lose="/execute")) as (_, desktop, ports, http):
        await make_ready(http, ports)
        with pytest.raises(aiohttp.ClientError):
            await execute(http, ports, ["python", "-c", f"{PREFIX}pyautogui.write('a')"])
        assert desktop.gui.typed == "a"


async def test_a_spoiled_route_answers_badly_and_does_nothing() -> None:
    async with running(Behaviour(spoil="/execute", bad=("error",))) as (_, desktop, ports, http):
        await make_ready(http, ports)
        async with http.post(f"{ports.guest}/execute", json={"command": ["python", "-c", "pass"]}) as response:
            assert response.status == 500
        assert (desktop.inputs, desktop.requests["/execute"]) == ([], 1)


async def test_trouble_can_wait_and_be_changed_while_the_desktop_runs() -> None:
    async with running(Behaviour(hang="*", trouble_s=60)) as (_, desktop, ports, http):
        await make_ready(http, ports)
        assert (await execute(http, ports, "true"))["returncode"] == 0
        desktop.behaviour = Behaviour(hang="*")
        for url in (f"{ports.guest}/platform", f"{ports.cdp}/json/version"):
            with pytest.raises(TimeoutError):
                await get(http, url, SHORT)


# Faults at single calls


async def outcome(asking: Awaitable[Any]) -> Any:
    """What was answered, or the kind of failure."""
    try:
        async with asyncio.timeout(0.3):
            return await asking
    except (EnvdError, TimeoutError) as error:
        return type(error)


def fault(way: Way, route: str, call: int = 1) -> Fault:
    """One that is noticed: when the connection breaks, aiohttp sends a GET once more by itself."""
    again = way in ("reset", "lose") and (route == "/screenshot" or route.startswith(("/json", "/devtools")))
    return Fault(way, call, times=2 if again else 1)


BROKEN = (GuestUnreachable, GuestMisbehaved, TimeoutError)
UNNOTICED: dict[str, tuple[Way, ...]] = {
    "/file": ("garbage", "half", "flat", "size", "html", "empty"),
    "/screenshot": ("half", "flat", "size"),
    "/setup/launch": ("half",),
    "/setup/upload": ("half", "error"),
}
"""A file may have any content, a picture is looked at elsewhere, half of a sentence still is words, and an upload
answered with a page of HTML is sent again, since older guest servers answer so when there is no folder."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("route", ["/screenshot", "/file", "/execute", "/setup/launch", "/setup/upload"])
async def test_a_fault_hits_the_call_that_it_is_meant_for_and_no_other(route: str, way: Way, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 99)
    async with running(Behaviour(on={route: fault(way, route, call=2)})) as (_, desktop, ports, http):
        guest = Guest(http, ports.guest)
        desktop.files["/a"] = b"abc" * 99
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "/screenshot": guest.screenshot,
            "/file": lambda: guest.file("/a"),
            "/execute": lambda: guest.execute(["echo", "a"]),
            "/setup/launch": lambda: guest.launch(["vlc"]),
            "/setup/upload": lambda: guest.upload("/t/b", tmp_path / "a"),
        }
        before, hit, after = [await outcome(calls[route]()) for _ in range(3)]
        assert (hit in BROKEN) == (way not in UNNOTICED.get(route, ()))
        assert hit != before or route.startswith("/setup")
        assert after == (GuestUnreachable if way == "die" else before)
        assert desktop.gone.is_set() == (way == "die")


@pytest.mark.parametrize("way", ["lose", "half", "cut"])
async def test_a_fault_of_the_answer_alone_leaves_the_work_done(way: Way) -> None:
    async with running(Behaviour(on={"/execute": Fault(way)})) as (_, desktop, ports, http):
        assert await outcome(Guest(http, ports.guest).execute(["touch", "/t"])) in BROKEN
        assert "/t" in desktop.files


@pytest.mark.parametrize("way", ["reset", "die", "error", "garbage", "stall", "empty"])
async def test_other_faults_leave_nothing_done(way: Way) -> None:
    async with running(Behaviour(on={"/execute": Fault(way)})) as (_, desktop, ports, http):
        assert await outcome(Guest(http, ports.guest).execute(["touch", "/t"])) in BROKEN
        assert "/t" not in desktop.files


async def test_a_fault_can_be_told_by_words_and_last_for_ever() -> None:
    behaviour = Behaviour(on={"/execute rm": Fault("reset", times=FOREVER), "/file /a b": Fault("error")})
    async with running(behaviour) as (_, desktop, ports, http):
        guest = Guest(http, ports.guest)
        desktop.files["/a b"] = b""
        asked = [["echo"], ["rm", "/a"], ["echo"], ["rm", "/a"]]
        codes = [await outcome(guest.execute(command)) for command in asked]
        assert [code is GuestUnreachable for code in codes] == [False, True, False, True]
        assert [await outcome(guest.file(path)) for path in ("/a b", "/a b")] == [GuestMisbehaved, b""]


async def test_faults_are_counted_from_a_new_behaviour() -> None:
    async with running() as (_, desktop, ports, http):
        guest = Guest(http, ports.guest)
        await guest.execute("true")
        desktop.behaviour = Behaviour(on={"/execute": Fault("error"), "*": Fault("garbage", call=3)})
        asked = [await outcome(guest.execute("true")) for _ in range(4)]
    assert [one is GuestMisbehaved for one in asked] == [True, False, True, False]


async def test_a_reset_connection_is_reset_and_not_closed() -> None:
    async with running(Behaviour(on={"/platform": Fault("reset", times=2)})) as (_, _, ports, http):
        with pytest.raises(aiohttp.ClientOSError, match="reset by peer"):
            await get(http, f"{ports.guest}/platform")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("route", ["/json/version", "/json/list", "/devtools/browser", "Target.getTargets"])
async def test_a_fault_hits_chrome_in_its_way(route: str, way: Way) -> None:
    async def pages(cdp: Cdp) -> int:
        async with cdp.browser(0.2) as browser:
            return len(await browser.pages()) + len(await cdp.pages())

    async with running(Behaviour(on={route: fault(way, route)})) as (_, desktop, ports, http):
        cdp = Cdp(http, ports.cdp)
        hit, after = await outcome(pages(cdp)), await outcome(pages(cdp))
        assert hit in BROKEN or (route, way, hit) == ("/json/list", "size", 1)
        assert after == (GuestUnreachable if way == "die" else 2)
        assert desktop.gone.is_set() == (way == "die")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        pytest.param(lambda: Fault(cast(Way, "rude")), "a fault is one of reset, lose", id="way"),
        pytest.param(lambda: Fault("reset", call=0), "count from 1", id="call"),
        pytest.param(lambda: Fault("reset", times=0), "count from 1", id="times"),
        pytest.param(lambda: Behaviour(on={"execute": Fault("reset")}), "on takes routes", id="route"),
    ],
)
def test_a_fault_that_could_never_strike_is_refused(make: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


async def test_everything_asked_is_told_in_order_and_in_words(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    async with running() as (_, desktop, ports, http):
        guest = Guest(http, ports.guest)
        await guest.upload("/t/ü", tmp_path / "a")
        await guest.file("/t/ü")
        await guest.execute(["echo", 'a "b"'])
        async with Cdp(http, ports.cdp).browser() as browser:
            await browser.send("Target.createTarget", {"url": "http://a.example/"})
        assert [(call.route, call.said) for call in desktop.calls] == [
            ("/setup/upload", "/t/ü"),
            ("/file", "/t/ü"),
            ("/execute", 'echo a "b"'),
            ("/json/version", ""),
            ("/devtools/browser", desktop.chrome.browser_id),
            ("Target.createTarget", "http://a.example/"),
        ]


async def test_dying_dies_while_it_boots_with_its_reason() -> None:
    async with running(Behaviour(dies_after_s=0.02, dies_when="booting", death="disk full")) as (driver, _, ports, _):
        assert await refused(ports.guest)
        death = await driver.wait("d-0")
        assert death.reason == "disk full"
        assert await driver.list() == {"d-0"}
        assert "died: disk full" in await driver.log_tail("d-0")
    assert verbs(driver) == ["create-begin", "create-end", "died"]


async def test_dying_later_counts_from_being_ready() -> None:
    async with running(Behaviour(dies_after_s=0.01)) as (driver, _, ports, http):
        await make_ready(http, ports)
        assert (await driver.wait("d-0")).reason == "the simulated machine stopped"
        assert await refused(ports.guest)
        assert await refused(ports.cdp)
    assert verbs(driver) == ["create-begin", "create-end", "ready", "died"]


async def test_the_same_seed_fails_the_same_instances() -> None:
    async def survivors(seed: int) -> list[bool]:
        async with sim(Behaviour(fail=0.5, seed=seed)) as driver:
            opened = [not await refused((await create(driver, f"d-{number}")).guest) for number in range(12)]
            for name, alive in zip(list(driver.desktops), opened, strict=True):
                if not alive:
                    await driver.wait(name)
            return opened

    first, again, other = [await survivors(seed) for seed in (1, 1, 2)]
    assert first == again
    assert first != other
    assert 0 < sum(first) < 12


async def test_a_create_that_fails_says_why_and_leaves_an_id_to_destroy() -> None:
    async with sim(Behaviour(create_fails="no space left")) as driver:
        with pytest.raises(BootFailed, match="no space left"):
            await create(driver)
        await driver.destroy("d-0")
        assert await driver.list() == frozenset()
    assert verbs(driver) == ["create-begin", "died", "destroy-begin", "destroy-end"]


async def test_behaviours_are_taken_in_the_order_of_creation() -> None:
    async with sim([Behaviour(create_fails="first"), Behaviour()]) as driver:
        with pytest.raises(BootFailed):
            await create(driver, "a")
        await create(driver, "b")
        await create(driver, "c")
        driver.behaviours = lambda number: Behaviour(create_fails=f"number {number}")
        with pytest.raises(BootFailed, match="number 3"):
            await create(driver, "d")


async def test_a_destroy_that_fails_can_be_called_again() -> None:
    async with running(Behaviour(destroy_fails=1)) as (driver, _, ports, _):
        with pytest.raises(InfraError, match="would not go"):
            await driver.destroy("d-0")
        assert await driver.list() == {"d-0"}
        await driver.destroy("d-0")
        assert await refused(ports.guest)
    assert verbs(driver)[-3:] == ["destroy-begin", "destroy-begin", "destroy-end"]


# Lifetimes


async def test_a_killed_desktop_is_gone_at_once_for_whoever_was_talking_to_it() -> None:
    async with running() as (driver, _, ports, http):
        talking = asyncio.create_task(execute(http, ports, "sleep 60"))
        await make_ready(http, ports)
        driver.kill("d-0", "power failure")
        with pytest.raises(aiohttp.ClientError):
            await talking
        assert (await driver.wait("d-0")).reason == "power failure"
        assert await refused(ports.guest)


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(Behaviour(), id="fast"),
        pytest.param(Behaviour(boot_s=60), id="booting"),
        pytest.param(Behaviour(never=True), id="never"),
        pytest.param(Behaviour(dies_after_s=60), id="about-to-die"),
        pytest.param(Behaviour(dies_after_s=0, dies_when="booting"), id="dead"),
    ],
)
async def test_destroy_leaves_no_task_no_socket_and_no_port(behaviour: Behaviour) -> None:
    async with sim() as driver:
        await create(driver, "warm-up")
        tasks, files = asyncio.all_tasks(), open_files()
        driver.behaviours = behaviour
        ports = await create(driver)
        await driver.destroy("d-0")
        gc.collect()
        assert (asyncio.all_tasks(), open_files()) == (tasks, files)
        assert await refused(ports.guest)
        assert await refused(ports.cdp)


async def test_destroy_cuts_connections_that_are_idle_hanging_upgraded_or_just_arriving() -> None:
    async with sim(Behaviour(hang="/terminal")) as driver:
        tasks, files = asyncio.all_tasks(), open_files()
        ports = await create(driver)
        async with aiohttp.ClientSession() as http:
            await make_ready(http, ports)
            hanging = [asyncio.create_task(get(http, f"{ports.guest}/terminal")) for _ in range(5)]
            page = next(iter(driver.desktops["d-0"].chrome.pages))
            socket = await http.ws_connect(f"{ports.cdp}/devtools/page/{page}")
            port = int(ports.guest.rpartition(":")[2])
            arriving = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
            await driver.destroy("d-0")
            assert (await socket.receive()).type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
            ended = await asyncio.gather(*hanging, return_exceptions=True)
        assert all(isinstance(error, aiohttp.ClientError) for error in ended)
        for _, writer in arriving:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        assert (asyncio.all_tasks(), open_files()) == (tasks, files)


async def test_a_cancelled_create_leaves_nothing_that_destroy_does_not_remove() -> None:
    async with sim(Behaviour(create_s=60)) as driver:
        creating = asyncio.create_task(create(driver))
        await asyncio.sleep(0)  # it runs until its first await
        creating.cancel()
        await asyncio.wait([creating])
        await driver.destroy("d-0")
        assert await driver.list() == frozenset()


async def test_a_destroy_during_create_ends_the_create_and_opens_no_port() -> None:
    async with sim(Behaviour(create_s=0.02)) as driver:
        files = open_files()
        creating = asyncio.create_task(create(driver))
        await asyncio.sleep(0)  # it runs until its first await
        await driver.destroy("d-0")
        with pytest.raises(BootFailed, match="destroyed"):
            await creating
        assert open_files() == files


async def test_leaving_the_driver_ends_its_desktops() -> None:
    tasks, files = asyncio.all_tasks(), open_files()
    async with sim(Behaviour(cdp_s=60)) as driver:
        for number in range(3):
            await create(driver, f"d-{number}")
    assert (asyncio.all_tasks(), open_files()) == (tasks, files)


async def test_a_hundred_desktops_live_beside_each_other() -> None:
    async with sim() as driver, aiohttp.ClientSession() as http:
        all_ports = await asyncio.gather(*(create(driver, f"d-{number}") for number in range(100)))
        await asyncio.gather(*(make_ready(http, ports) for ports in all_ports))
        await asyncio.gather(
            *(
                execute(http, ports, ["python", "-c", f"{PREFIX}pyautogui.write('{number}')"])
                for number, ports in enumerate(all_ports)
            )
        )
        assert [desktop.gui.typed for desktop in driver.desktops.values()] == [str(number) for number in range(100)]
        await asyncio.gather(*(driver.destroy(f"d-{number}") for number in range(100)))
        assert await driver.list() == frozenset()


# The journal


async def test_the_journal_tells_a_life_in_order() -> None:
    async with running() as (driver, _, ports, http):
        await make_ready(http, ports)
        await driver.destroy("d-0")
    assert verbs(driver) == ["create-begin", "create-end", "ready", "destroy-begin", "destroy-end"]
    assert all(earlier.at <= later.at for earlier, later in pairwise(driver.journal))


@pytest.mark.parametrize(
    ("lines", "most"),
    [
        pytest.param([], 0, id="nothing"),
        pytest.param(["create-begin a", "create-end a", "ready a", "create-begin b"], 1, id="after-ready"),
        pytest.param(["create-begin a", "create-end a", "create-begin b"], 2, id="before-ready"),
        pytest.param(["create-begin a", "died a", "create-begin b"], 1, id="after-death"),
        pytest.param(["create-begin a", "destroy-begin a", "create-begin b", "destroy-end a"], 2, id="during-destroy"),
        pytest.param(["create-begin a", "ready a", "destroy-begin a", "create-begin b"], 1, id="destroy-of-ready"),
    ],
)
def test_boots_in_flight_are_counted_from_create_to_ready_or_gone(lines: list[str], most: int) -> None:
    journal = [(float(at), *line.split()) for at, line in enumerate(lines)]
    assert boots_in_flight_max(journal) == most  # type: ignore[arg-type]  # split gives lists, not pairs


# Templates, room, consoles


async def test_a_restored_desktop_comes_from_a_template_that_was_seen_to_be_ready() -> None:
    seen: list[Endpoints] = []

    class Listening(Report):
        async def ready(self, endpoints: Endpoints) -> None:
            seen.append(endpoints)

    behaviour = Behaviour(create_s=0.01, boot_s=3600, cdp_s=3600, restore_s=0.01, restore_fails=1)
    async with sim(behaviour, clone_width=4) as driver, aiohttp.ClientSession() as http:
        assert (driver.next_path(), driver.traits.restore_width) == (ResetPath.COLD, 4)
        made = [await driver.create(InstanceSpec(name, SCREEN), Listening()) for name in ("a", "b")]
        assert driver.next_path() is ResetPath.RESTORE
        assert [one.path for one in made] == [ResetPath.COLD, ResetPath.RESTORE]
        assert [one.frame is not None for one in made] == [False, True]
        assert [one == made[0].endpoints for one in seen] == [False, True]
        await Guest(http, made[1].endpoints.guest).answers(5)
        assert await Cdp(http, made[1].endpoints.cdp).pages()
        assert driver.desktops["b"].ready.is_set()
    assert boots_in_flight_max(driver.journal) == restores_in_flight_max(driver.journal) == 1


async def test_a_console_sees_and_works_a_desktop_and_stops_it() -> None:
    async with running(Behaviour(console=True)) as (driver, desktop, at, http):
        console = driver.console("d-0")
        assert console is not None
        guest = Guest(http, at.guest)
        done: list[Gesture] = [
            Move(7, 9),
            Press("left", True),
            Press("left", False),
            Key("a", True),
            Key("a", False),
            Wheel(2),
        ]
        await console.perform(done)
        gui = desktop.gui
        assert (gui.cursor, len(gui.clicks), gui.typed, gui.scrolled[1]) == ((7, 9), 1, "a", 2)
        await console.pause()
        with pytest.raises(GuestUnreachable):
            await guest.answers(0.1)
        assert (await console.picture()).startswith(b"\x89PNG")
        await console.resume()
        await guest.answers(5)
        driver.kill("d-0")
        with pytest.raises(InfraError) as gone:
            await console.perform(done)
        assert gone.value.facts["sent"] is False
