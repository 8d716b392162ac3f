"""The guest agent: what it answers, against a real X server, a real window manager and real programs."""

import asyncio
import hashlib
import io
import json
import os
import random
import shutil
import signal
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from agent_desktop import (
    PREFIX,
    Client,
    RunningAgent,
    agent_here,
    agent_process,
    alive,
    children,
    client,
    environment,
    home,
    pid_of,
    running,
    serving,
    until,
    written,
    x_server,
)
from aiohttp import web
from PIL import Image

from envd import png
from envd.agent.input import is_input_program
from envd.agent.limits import Limits
from envd.png import ScreenEncoder

pytestmark = [
    pytest.mark.local,
    # python-xlib drops the sockets of attempts that were refused without closing them.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def desktop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """An X server, openbox and the agent as a process, shared by the tests of this file."""
    with x_server() as display:
        env = environment(display, tmp_path_factory.mktemp("home"))
        with running(["openbox"], env=env), agent_process(env) as agent:
            yield agent


@pytest.fixture
async def guest(desktop: RunningAgent) -> AsyncIterator[Client]:
    async with client(desktop.url) as asking:
        yield asking


@pytest.fixture
def here(desktop: RunningAgent, monkeypatch: pytest.MonkeyPatch) -> RunningAgent:
    """This process, made to look at the shared desktop, for agents with limits of their own."""
    for name, value in desktop.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    return desktop


def names(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir()]


# ---- pictures


def decoded(body: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(body))
    picture.load()
    return picture


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def show(display: Any, picture: Image.Image) -> None:
    """Put the picture on the screen, over everything, with a red 16×16 pointer whose hotspot is at (5, 7)."""
    root = display.screen().root
    window = root.create_window(0, 0, *picture.size, 0, display.screen().root_depth, override_redirect=True)
    shape = window.create_pixmap(16, 16, 1)
    shape.fill_rectangle(shape.create_gc(foreground=1), 0, 0, 16, 16)
    window.change_attributes(cursor=shape.create_cursor(shape, (65535, 0, 0), (0, 0, 0), 5, 7))
    window.map()
    window.put_pil_image(window.create_gc(), 0, 0, picture)
    display.sync()


@pytest.mark.parametrize(
    ("x", "y"),
    [
        pytest.param(300, 200, id="in the middle"),
        pytest.param(0, 0, id="in the first corner"),
        pytest.param(319, 239, id="in the last corner"),
    ],
)
async def test_a_screenshot_is_the_screen_pixel_by_pixel_with_the_pointer_at_its_hotspot(
    x: int, y: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from Xlib.display import Display

    picture = noise(320, 240, seed=x)
    with x_server("320x240") as name:
        monkeypatch.setenv("DISPLAY", name)
        display = Display(name)
        show(display, picture)
        display.screen().root.warp_pointer(x, y)
        display.sync()
        async with agent_here() as (guest, _):
            _, body = await guest.get("/screenshot")
            _, pointer = await guest.get("/cursor_position")
        display.close()
    picture.paste((255, 0, 0), (x - 5, y - 7, x + 11, y + 9))
    assert pointer == [x, y]
    assert decoded(body).tobytes() == picture.tobytes()


async def test_twenty_screenshots_at_once_of_a_changing_screen_all_decode(guest: Client, desktop: RunningAgent) -> None:
    with running(["xterm", "-e", "while :; do date; done"], env=desktop.env):
        answers = await asyncio.gather(*(guest.get("/screenshot") for _ in range(20)))
    assert {status for status, _ in answers} == {200}
    assert {decoded(body).size for _, body in answers} == {(1280, 720)}


async def test_a_screenshot_is_never_older_than_its_request(guest: Client, desktop: RunningAgent) -> None:
    from Xlib.display import Display

    display = Display(desktop.env["DISPLAY"])
    window = display.screen().root.create_window(0, 0, 1280, 720, 0, 24, override_redirect=True)
    window.map()
    context = window.create_gc()
    for number in range(1, 25):
        earlier = asyncio.create_task(guest.get("/screenshot"))
        await asyncio.sleep(0.001 * number)  # so that it is found at different points of its way
        context.change(foreground=number * 10)
        window.fill_rectangle(context, 0, 0, 1280, 720)
        display.sync()
        _, body = await guest.get("/screenshot")
        await earlier
        assert decoded(body).getpixel((1200, 10)) == (0, 0, number * 10)
    display.close()


async def test_screenshots_fail_clearly_while_the_x_server_is_gone_and_work_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with x_server("320x240") as name:
        monkeypatch.setenv("DISPLAY", name)
        agent = agent_here()
        guest, _ = await agent.__aenter__()
        before, _ = await guest.get("/screenshot")
    gone = [await guest.get("/screenshot"), await guest.get("/cursor_position"), await guest.post("/screen_size")]
    with x_server("640x480", name):
        after, body = await guest.get("/screenshot")
        await agent.__aexit__(None, None, None)
    assert (before, after, decoded(body).size) == (200, 200, (640, 480))
    assert [status for status, _ in gone] == [500, 500, 500]
    assert all(name in answer["message"] and "start it again" in answer["message"] for _, answer in gone)


@pytest.mark.skipif(shutil.which("xrandr") is None, reason="xrandr is not installed")
async def test_a_screenshot_follows_a_change_of_the_screen_size(monkeypatch: pytest.MonkeyPatch) -> None:
    with x_server("1024x768") as name:
        monkeypatch.setenv("DISPLAY", name)
        sizes = []
        async with agent_here() as (guest, _):
            await guest.post("/execute", command="xrandr --newmode small 25 640 656 752 800 480 490 492 525")
            await guest.post("/execute", command="xrandr --addmode screen small")
            for mode in ("1024x768", "small", "1024x768"):
                await guest.post("/execute", command=["xrandr", "--output", "screen", "--mode", mode])
                sizes.append(decoded((await guest.get("/screenshot"))[1]).size)
    assert sizes == [(1024, 768), (640, 480), (1024, 768)]


async def test_an_x_server_that_hangs_is_reported_and_holds_up_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with x_server("320x240") as name:
        monkeypatch.setenv("DISPLAY", name)
        async with agent_here(Limits(x_server=0.3)) as (guest, _):
            await guest.get("/screenshot")
            server = pid_of(name)
            os.kill(server, signal.SIGSTOP)
            status, answer = await guest.get("/screenshot")
            platform, _ = await guest.get("/platform")
            os.kill(server, signal.SIGCONT)
            _, body = await guest.get("/screenshot")
    assert (status, platform) == (500, 200)
    assert "no answer in 0.3 s" in answer["message"]
    assert decoded(body).size == (320, 240)


@pytest.mark.parametrize("deflate", [pytest.param(png.deflate, id="isal"), pytest.param(zlib, id="zlib")])
@pytest.mark.parametrize("height", [1, 39, 40, 41, 200])
def test_encoded_frames_decode_to_what_went_in_also_when_strips_are_used_again(
    height: int, deflate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(png, "deflate", deflate)
    encoder = ScreenEncoder()
    frame = np.frombuffer(random.Random(height).randbytes(101 * height * 4), np.uint8).reshape(height, 101, 4).copy()
    for row in (0, height // 2, height - 1):
        frame[row, 50:] ^= 0x5A
        picture = decoded(encoder.encode(frame.tobytes(), 101, height))
        assert np.array_equal(np.asarray(picture), frame[:, :, 2::-1])
    smaller = decoded(encoder.encode(frame[:, :7].tobytes(), 7, height))
    assert np.array_equal(np.asarray(smaller), frame[:, :7, 2::-1])


# ---- input


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(PREFIX + "pyautogui.click(1.5, 2, button='left')", id="click"),
        pytest.param(
            "import pyautogui\nimport time\n'''Thought: it's'''\npyautogui.write('a', interval=0.1)", id="thought"
        ),
        pytest.param(PREFIX + "import pyperclip; pyperclip.copy('ä')", id="clipboard"),
        pytest.param(PREFIX + "pyautogui.moveTo(1, -2, 0.5, pyautogui.easeInQuad)", id="easing"),
        pytest.param(
            PREFIX + "pyautogui.PAUSE = 0; pyautogui.hotkey(['ctrl', 'c']); time.sleep(1)", id="hotkey and wait"
        ),
    ],
)
def test_programs_of_plain_input_are_recognised(code: str) -> None:
    assert is_input_program(code)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("", id="nothing"),
        pytest.param("import os", id="another module"),
        pytest.param("import pyautogui as p", id="another name"),
        pytest.param("from pyautogui import click", id="from import"),
        pytest.param("import pyautogui; pyautogui.click(*[1, 2])", id="star"),
        pytest.param("import pyautogui; pyautogui.click(**{})", id="double star"),
        pytest.param("import pyautogui; pyautogui.click(print())", id="call as argument"),
        pytest.param("import pyautogui; pyautogui.click(f'{1}')", id="f-string"),
        pytest.param("import pyautogui; pyautogui.screenshot('x.png')", id="screenshot"),
        pytest.param("import pyautogui; pyautogui.alert('x')", id="dialog"),
        pytest.param("import pyautogui; pyautogui.copy('x')", id="another module's call"),
        pytest.param("import pyperclip; print(pyperclip.paste())", id="reads the clipboard"),
        pytest.param("import pyautogui; pyautogui.os.system('x')", id="deeper attribute"),
        pytest.param("import pyautogui; pyautogui.click = 1", id="other assignment"),
        pytest.param("import pyautogui; pyautogui.PAUSE = print()", id="computed setting"),
        pytest.param("import pyautogui\nwhile True: pyautogui.click()", id="loop"),
        pytest.param("import pyautogui; pyautogui.write('\\d')", id="warns when compiled"),
        pytest.param("import pyautogui; pyautogui.click(", id="syntax error"),
        pytest.param("import pyautogui; pyautogui.click()\0", id="NUL"),
        pytest.param("import pyautogui; pyautogui.write('\ud800')", id="half a character"),
        pytest.param("import pyautogui; " + "-" * 100_000 + "1", id="too deep"),
    ],
)
def test_anything_else_is_no_input_program(code: str) -> None:
    assert not is_input_program(code)


PROGRAMS = [
    pytest.param(PREFIX + "pyautogui.click(100, 200, button='left')", 0, id="click"),
    pytest.param(PREFIX + "pyautogui.moveTo(50.4, 60.6); pyautogui.dragTo(80, 90, duration=0.2)", 0, id="drag"),
    pytest.param(PREFIX + "pyautogui.moveTo(5000, -7)", 0, id="off the screen"),
    pytest.param(PREFIX + "pyautogui.scroll(-5, x=10, y=20); pyautogui.hscroll(2)", 0, id="scroll"),
    pytest.param(PREFIX + "pyautogui.press('no such key'); pyautogui.hotkey('ctrl', 'a')", 0, id="keys"),
    pytest.param(PREFIX + "import pyperclip; pyperclip.copy('ä'); pyperclip.copy(1)", 0, id="clipboard"),
    pytest.param(PREFIX + "import pyperclip; pyperclip.copy()", 1, id="bad clipboard"),
    pytest.param(PREFIX + "pyautogui.click(1, 2, button='nope')", 1, id="bad button"),
    pytest.param(PREFIX + "pyautogui.moveTo('a', 'b')", 1, id="bad type"),
    pytest.param(PREFIX + "\n\n'''Thought'''\npyautogui.click(wrong=1)", 1, id="bad keyword"),
    pytest.param(PREFIX + "time.sleep(-1)", 1, id="bad sleep"),
    pytest.param("pyautogui.click(1, 2)", 1, id="no import"),
    pytest.param("import pyautogui; pyautogui.moveTo(0, 0); pyautogui.click()", 1, id="fail-safe"),
]


@pytest.mark.parametrize(("code", "returncode"), PROGRAMS)
async def test_the_warm_interpreter_answers_as_a_new_process_does(code: str, returncode: int, guest: Client) -> None:
    await guest.program(PREFIX + "pyautogui.moveTo(640, 360)")
    warm, warm_answer = await guest.program(code)
    _, warm_pointer = await guest.get("/cursor_position")
    await guest.program(PREFIX + "pyautogui.moveTo(640, 360)")
    process, answer = await guest.program(code + "\nx = 1")
    _, pointer = await guest.get("/cursor_position")
    assert (warm, process) == ("warm", "process")
    assert warm_answer == answer
    assert warm_pointer == pointer
    assert answer["returncode"] == returncode
    assert ("Traceback" in answer["error"]) == bool(returncode)


@pytest.mark.skipif(shutil.which("xclip") is None, reason="xclip is not installed")
async def test_what_a_program_puts_into_the_clipboard_stays_there(guest: Client) -> None:
    ran_by, answer = await guest.program(PREFIX + "import pyperclip; pyperclip.copy('größer')")
    _, pasted = await guest.post("/execute", command="xclip -selection clipboard -o")
    assert (ran_by, answer["returncode"], pasted["output"]) == ("warm", 0, "größer")


async def test_a_program_that_does_not_parse_answers_as_python_does(guest: Client) -> None:
    ran_by, answer = await guest.program(PREFIX + "pyautogui.click(")
    assert (ran_by, answer["status"], answer["returncode"]) == ("process", "success", 1)
    assert "SyntaxError" in answer["error"]


async def test_no_setting_of_one_program_reaches_the_next(guest: Client) -> None:
    await guest.program("import pyautogui; pyautogui.PAUSE = 0; pyautogui.FAILSAFE = False; pyautogui.moveTo(0, 0)")
    _, answer = await guest.program("import pyautogui; pyautogui.press('shift')")
    began = asyncio.get_running_loop().time()
    await guest.program(PREFIX + "pyautogui.press('shift'); pyautogui.press('shift'); pyautogui.press('shift')")
    assert "FailSafeException" in answer["error"]
    assert asyncio.get_running_loop().time() - began > 0.3  # PAUSE is 0.1 again


async def test_what_is_typed_arrives_in_the_window_that_has_the_focus(
    guest: Client, desktop: RunningAgent, tmp_path: Path
) -> None:
    text = "Hello, World! 0123456789 ~@#$%^&*()_+{}|:?"
    typed = tmp_path / "typed"
    with running(["xterm", "-T", "typing here", "-e", f"cat > {typed}"], env=desktop.env):
        await guest.post("/execute_with_verification", command="true", verification={"window_exists": "TYPING here"})
        _, said = await guest.post("/setup/activate_window", window_name="typing here", strict=True)
        await guest.program(PREFIX + f"pyautogui.PAUSE = 0; pyautogui.write({text!r}); pyautogui.press('enter')")
        ran_by, _ = await guest.program(PREFIX + "pyautogui.hotkey('ctrl', 'd')")
        await until(lambda: written(typed)().endswith("\n"))
    assert (said, ran_by, typed.read_text()) == ("Window activated successfully", "warm", text + "\n")


async def test_a_program_over_its_time_is_killed_and_the_interpreter_stays(here: RunningAgent) -> None:
    async with agent_here(Limits(command=1)) as (guest, agent):
        await guest.program(PREFIX)
        interpreter = agent.warm.pid
        _, answer = await guest.program(PREFIX + "time.sleep(30)")
        ran_by, after = await guest.program(PREFIX + "pyautogui.moveTo(7, 8)")
        assert agent.warm.pid == interpreter
    assert (answer["status"], ran_by, after["returncode"]) == ("error", "warm", 0)
    assert "within 1 s" in answer["message"]


async def test_a_client_that_hangs_up_ends_its_program(here: RunningAgent) -> None:
    async with agent_here() as (guest, agent):
        await guest.program(PREFIX)
        assert agent.warm.pid is not None
        hung = asyncio.create_task(guest.program(PREFIX + "time.sleep(30)"))
        await until(lambda: children(agent.warm.pid or 0))
        hung.cancel()
        async with asyncio.timeout(5):
            ran_by, answer = await guest.program(PREFIX + "pyautogui.moveTo(9, 9)")
    assert (ran_by, answer["returncode"]) == ("warm", 0)


async def test_an_interpreter_that_died_is_replaced(here: RunningAgent) -> None:
    async with agent_here() as (guest, agent):
        await guest.program(PREFIX)
        dead = agent.warm.pid
        assert dead is not None
        os.kill(dead, signal.SIGKILL)
        await until(lambda: not alive(dead))
        ran_by, answer = await guest.program(PREFIX + "pyautogui.moveTo(3, 3)")
        assert agent.warm.pid != dead
    assert (ran_by, answer["returncode"]) == ("warm", 0)


async def test_a_program_whose_interpreter_dies_is_not_sent_again(here: RunningAgent) -> None:
    async with agent_here() as (guest, agent):
        await guest.program(PREFIX)
        hung = asyncio.create_task(guest.program(PREFIX + "time.sleep(30)"))
        (program,) = await until(lambda: children(agent.warm.pid or 0))
        os.kill(agent.warm.pid or 0, signal.SIGKILL)
        _, answer = await hung
        await until(lambda: not alive(program))
        ran_by, _ = await guest.program(PREFIX + "pyautogui.moveTo(3, 3)")
    assert "look at the screen before sending it again" in answer["message"]
    assert ran_by == "warm"


async def test_without_an_x_server_a_program_says_what_a_new_process_says(
    monkeypatch: pytest.MonkeyPatch, here: RunningAgent
) -> None:
    with x_server("320x240") as name:
        monkeypatch.setenv("DISPLAY", name)
        agent = agent_here()
        guest, _ = await agent.__aenter__()
        warm, _ = await guest.program(PREFIX + "pyautogui.moveTo(1, 1)")
    gone, answer = await guest.program(PREFIX + "pyautogui.moveTo(1, 1)")
    with x_server("320x240", name):
        back, _ = await guest.program(PREFIX + "pyautogui.moveTo(1, 1)")
        await agent.__aexit__(None, None, None)
    assert (warm, gone, back) == ("warm", "process", "warm")
    assert (answer["status"], answer["returncode"]) == ("success", 1)
    assert "import pyautogui" not in answer["output"]
    assert "Xlib.error" in answer["error"]


# ---- commands


@pytest.mark.parametrize(
    ("body", "output", "returncode"),
    [
        pytest.param({"command": ["printf", "%s|", "a b", "$HOME"]}, "a b|$HOME|", 0, id="list"),
        pytest.param({"command": "printf '%s|' 'a b' c"}, "a b|c|", 0, id="string is split"),
        pytest.param({"command": "echo $((1+1)) && exit 3", "shell": True}, "2\n", 3, id="shell"),
        pytest.param({"command": ["echo $0 $1", "a", "b"], "shell": True}, "a b\n", 0, id="shell with a list"),
        pytest.param({"command": ["sh", "-c", "echo $PWD/~; basename $1", "-", "~/x"]}, None, 0, id="home directory"),
        pytest.param({"command": ["printf", r"\377a\r\nb\rc"]}, "�a\nb\nc", 0, id="not UTF-8, other line ends"),
        pytest.param({"command": ["sh", "-c", "kill -9 $$"]}, "", -9, id="killed"),
    ],
)
async def test_commands_run_as_they_do_upstream(
    body: dict[str, Any], output: str | None, returncode: int, guest: Client
) -> None:
    status, answer = await guest.post("/setup/execute", **body)
    assert (status, answer["status"], answer["returncode"]) == (200, "success", returncode)
    assert output is None or answer["output"] == output


async def test_an_argument_that_begins_with_the_home_directory_is_expanded(
    guest: Client, desktop: RunningAgent
) -> None:
    _, answer = await guest.post("/execute", command=["echo", "~/x", "a~/x"])
    assert answer["output"] == f"{desktop.env['HOME']}/x a~/x\n"


async def test_output_and_error_are_apart(guest: Client) -> None:
    assert await guest.post("/execute", command="echo out; echo err >&2", shell=True) == (
        200,
        {"status": "success", "output": "out\n", "error": "err\n", "returncode": 0},
    )


async def test_output_beyond_the_limit_is_cut_and_says_so(here: RunningAgent) -> None:
    async with agent_here(Limits(output=1000)) as (guest, _):
        _, cut = await guest.post("/execute", command="head -c 5000000 /dev/zero | tr '\\0' x", shell=True)
        _, whole = await guest.post("/execute", command="head -c 1000 /dev/zero | tr '\\0' x", shell=True)
    assert (cut["output"], cut["truncated"], "/file" in cut["hint"]) == ("x" * 1000, True, True)
    assert "truncated" not in whole


async def test_a_command_over_its_time_dies_with_its_whole_group(here: RunningAgent, tmp_path: Path) -> None:
    script = f"sleep 1000 & echo $! > {tmp_path / 'pid'}; echo begun; wait"
    async with agent_here(Limits(command=0.5)) as (guest, _):
        status, answer = await guest.post("/execute", command=script, shell=True)
    await until(lambda: not alive(int((tmp_path / "pid").read_text())))
    assert (status, answer["status"], answer["output"]) == (500, "error", "begun\n")
    assert "/setup/launch" in answer["message"]


async def test_a_client_that_hangs_up_ends_its_command(guest: Client, tmp_path: Path) -> None:
    script = f"sleep 1000 & echo $! > {tmp_path / 'pid'}; wait"
    hung = asyncio.create_task(guest.post("/execute", command=script, shell=True))
    pid = int(await until(written(tmp_path / "pid")))
    hung.cancel()
    await until(lambda: not alive(pid))


async def test_a_background_child_neither_delays_the_answer_nor_is_killed(guest: Client, tmp_path: Path) -> None:
    script = f"(sleep 1; echo still here; echo done > {tmp_path / 'done'}) & echo started"
    async with asyncio.timeout(0.9):
        _, answer = await guest.post("/execute", command=script, shell=True)
    assert (answer["output"], answer["returncode"]) == ("started\n", 0)
    await until(written(tmp_path / "done"))


@pytest.mark.parametrize("path", ["/execute", "/setup/launch", "/execute_with_verification"])
async def test_a_program_that_is_not_there_is_named(path: str, guest: Client) -> None:
    status, answer = await guest.post(path, command=["no-such-program", "x"])
    assert (status, answer["status"]) == (500, "error")
    assert "no-such-program" in answer["message"]


async def test_what_is_launched_runs_on_and_leaves_no_zombie(
    guest: Client, desktop: RunningAgent, tmp_path: Path
) -> None:
    command = ["sh", "-c", f"echo $$ > {tmp_path / 'pid'}; sleep 0.5; echo noise; touch {tmp_path / 'done'}"]
    status, text = await guest.post("/setup/launch", command=command)
    pid = int(await until(written(tmp_path / "pid")))
    assert (status, text.endswith("launched successfully"), os.getsid(pid)) == (200, True, pid)
    await until((tmp_path / "done").exists)
    await until(lambda: pid not in children(desktop.process.pid))
    log = (home(desktop) / ".local/state/envd-agent/launch.log").read_text()
    assert log.endswith("noise\n")


async def test_a_verification_waits_for_what_the_command_brings_about(guest: Client, tmp_path: Path) -> None:
    command = f"(sleep 0.5; touch {tmp_path / 'flag'}) >/dev/null 2>&1 &"
    body = {"command": command, "shell": True, "check_interval": 0.1}
    check = {"command_success": f"test -e {tmp_path / 'flag'}"}
    passed, answer = await guest.post("/setup/execute_with_verification", **body, verification=check)
    failed, reason = await guest.post(
        "/execute_with_verification", **body, max_wait_time=0.3, verification={"window_exists": "no such window"}
    )
    assert (passed, answer["status"], answer["verification"]) == (200, "success", "passed")
    assert (failed, reason["status"], reason["verification"]) == (500, "verification_failed", "failed")


async def test_python_code_runs_as_a_script(guest: Client) -> None:
    assert await guest.post("/run_python", code="print('ä')") == (
        200,
        {"status": "success", "message": "ä\n", "need_more": False, "output": "ä\n", "error": "", "return_code": 0},
    )
    status, answer = await guest.post("/run_python", code="1/0")
    assert (status, answer["status"], answer["return_code"]) == (200, "error", 1)
    assert "ZeroDivisionError" in answer["error"]


async def test_python_code_over_its_time_says_so(here: RunningAgent) -> None:
    async with agent_here(Limits(python=0.3)) as (guest, _):
        status, answer = await guest.post("/run_python", code="import time; time.sleep(60)")
    assert (status, answer["status"], answer["error"]) == (500, "error", "TimeoutExpired")


async def test_a_bash_script_answers_both_streams_as_one(guest: Client, tmp_path: Path) -> None:
    script = "pwd; echo err >&2; [[ a == a ]] && exit 4"
    assert await guest.post("/run_bash_script", script=script, working_dir=str(tmp_path)) == (
        200,
        {"status": "error", "output": f"{tmp_path}\nerr\n", "error": "", "returncode": 4},
    )


async def test_a_bash_script_over_its_time_or_in_no_directory_fails_in_its_own_shape(guest: Client) -> None:
    late, answer = await guest.post("/run_bash_script", script="sleep 60", timeout=0.3)
    lost, reason = await guest.post("/run_bash_script", script="true", working_dir="/nowhere")
    assert (late, answer["status"], answer["returncode"]) == (500, "error", -1)
    assert (lost, reason["status"], reason["returncode"]) == (400, "error", -1)
    assert "/nowhere" in reason["output"]


# ---- files


async def test_a_file_that_was_uploaded_comes_back_whole_and_in_parts(guest: Client, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(20_000_000)
    target = tmp_path / "new" / "ä.bin"
    status, text = await guest.form("/setup/upload", file_path=str(target), file_data=io.BytesIO(data))
    _, whole = await guest.form("/file", file_path=str(target))
    headers = {"Range": "bytes=1000000-1000099"}
    async with guest.session.post("/file", data={"file_path": str(target)}, headers=headers) as part:
        assert (part.status, await part.read()) == (206, data[1_000_000:1_000_100])
    assert (status, text) == (200, f"File Uploaded: {len(data)} bytes")
    assert hashlib.sha256(whole).digest() == hashlib.sha256(data).digest()
    assert names(target.parent) == ["ä.bin"]


async def test_an_upload_may_name_its_path_last(guest: Client, tmp_path: Path) -> None:
    form = aiohttp.FormData()
    form.add_field("file_data", b"contents", filename="x")
    form.add_field("file_path", str(tmp_path / "late"))
    async with guest.session.post("/setup/upload", data=form) as response:
        assert response.status == 200
    assert (tmp_path / "late").read_bytes() == b"contents"


async def test_an_upload_keeps_the_permissions_of_what_it_replaces(guest: Client, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("old")
    (tmp_path / "script").chmod(0o751)
    (tmp_path / "link").symlink_to("script")
    await guest.form("/setup/upload", file_path=str(tmp_path / "link"), file_data=io.BytesIO(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert ((tmp_path / "script").read_text(), (tmp_path / "script").stat().st_mode & 0o777) == ("new", 0o751)


async def test_an_upload_that_breaks_off_leaves_what_was_there(guest: Client, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    arrived = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b'--B\r\nContent-Disposition: form-data; name="file_path"\r\n\r\n' + os.fsencode(target) + b"\r\n"
        yield b'--B\r\nContent-Disposition: form-data; name="file_data"; filename="x"\r\n\r\n' + b"x" * 1_000_000
        arrived.set()
        await asyncio.Event().wait()

    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    upload = asyncio.create_task(guest.session.post("/setup/upload", data=half(), headers=headers))
    await arrived.wait()
    await until(lambda: len(list(tmp_path.iterdir())) == 2)
    upload.cancel()
    await until(lambda: len(list(tmp_path.iterdir())) == 1)
    assert target.read_text() == "old"


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        pytest.param("/no/such/file", 404, "no file", id="absent"),
        pytest.param("/etc", 400, "/list_directory", id="directory"),
        pytest.param("/dev/zero", 400, "regular file", id="device"),
        pytest.param("/etc/passwd\0", 400, "NUL", id="NUL"),
    ],
)
async def test_what_is_no_file_is_refused_with_a_reason(path: str, status: int, says: str, guest: Client) -> None:
    answered, answer = await guest.form("/file", file_path=path)
    assert answered == status
    assert says in answer["error"]


async def test_file_paths_know_the_home_directory_and_variables(guest: Client, desktop: RunningAgent) -> None:
    (home(desktop) / "note").write_text("here")
    answers = [await guest.form("/file", file_path=path) for path in ("~/note", "$HOME/note")]
    assert answers == [(200, b"here")] * 2


async def test_a_directory_is_listed_through_links_but_not_round_in_circles(guest: Client, tmp_path: Path) -> None:
    (tmp_path / "top" / "sub").mkdir(parents=True)
    (tmp_path / "top" / "sub" / "file").touch()
    (tmp_path / "top" / "sub" / "loop").symlink_to(tmp_path / "top")
    (tmp_path / "top" / "link").symlink_to(tmp_path / "top" / "sub")
    (tmp_path / "top" / "broken").symlink_to("nowhere")
    loop = {"type": "directory", "name": "loop", "children": []}
    inside = [{"type": "file", "name": "file"}, loop]
    status, answer = await guest.post("/list_directory", path=str(tmp_path / "top"))
    assert status == 200
    assert answer["directory_tree"] == {
        "type": "directory",
        "name": "top",
        "children": [
            {"type": "file", "name": "broken"},
            {"type": "directory", "name": "link", "children": inside},
            {"type": "directory", "name": "sub", "children": inside},
        ],
    }


async def test_a_huge_directory_is_cut_and_says_so(here: RunningAgent, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / str(number)).touch()
    async with agent_here(Limits(tree_entries=10)) as (guest, _):
        _, answer = await guest.post("/list_directory", path=str(tmp_path))
    assert (len(answer["directory_tree"]["children"]), answer["truncated"]) == (9, True)


async def test_the_desktop_path_is_that_of_the_user(guest: Client, desktop: RunningAgent) -> None:
    absent, _ = await guest.post("/desktop_path")
    (home(desktop) / "Desktop").mkdir()
    assert (absent, await guest.post("/desktop_path")) == (
        404,
        (200, {"desktop_path": desktop.env["HOME"] + "/Desktop"}),
    )


async def test_the_desktop_downloads_a_file_whole_or_not_at_all(guest: Client, tmp_path: Path) -> None:
    tries = []

    async def truncated(request: web.Request) -> web.StreamResponse:
        tries.append(request.path)
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x" * 10)
        assert request.transport is not None
        request.transport.close()
        return response

    async def whole(request: web.Request) -> web.Response:
        return web.Response(body=b"whole")

    site = web.Application()
    site.add_routes([web.get("/truncated", truncated), web.get("/whole", whole)])
    async with serving(site) as url:
        good = await guest.post("/setup/download_file", url=f"{url}/whole", path=str(tmp_path / "a" / "good"))
        status, answer = await guest.post("/setup/download_file", url=f"{url}/truncated", path=str(tmp_path / "bad"))
    assert good == (200, "File downloaded successfully: 5 bytes")
    assert (status, len(tries), names(tmp_path)) == (500, 3, ["a"])
    assert "in 3 tries" in answer["message"]


# ---- windows


async def test_windows_are_measured_activated_and_closed(guest: Client, desktop: RunningAgent) -> None:
    argv = ["xterm", "-class", "MyClass", "-T", "my window", "-geometry", "80x24", "-e", "sleep", "60"]
    with running(argv, env=desktop.env) as xterm:
        await guest.post("/execute_with_verification", command="true", verification={"window_exists": "my window"})
        status, size = await guest.form("/window_size", app_class_name="myclass")
        unknown, _ = await guest.form("/window_size", app_class_name="no such class")
        answers = [
            await guest.post("/setup/activate_window", window_name="MY WIN"),
            await guest.post("/setup/activate_window", window_name="no such window"),
            await guest.post("/setup/close_window", window_name="MyClass", by_class=True),
        ]
        await until(lambda: xterm.poll() is not None)
    assert (status, unknown, size["width"] > 400, size["height"] > 200) == (200, 404, True, True)
    assert answers == [
        (200, "Window activated successfully"),
        (200, "No window matched 'no such window', so none was activated"),
        (200, "Window closed successfully"),
    ]


async def test_opening_a_file_waits_for_its_window_and_activates_it(
    guest: Client, desktop: RunningAgent, tmp_path: Path
) -> None:
    applications = home(desktop) / ".local/share/applications"
    applications.mkdir(parents=True)
    viewer = applications / "viewer"
    viewer.write_text('#!/bin/sh\nsleep 0.7\nexec xterm -T "$1" -e sleep 60\n')
    viewer.chmod(0o755)
    (applications / "show.desktop").write_text(f"[Desktop Entry]\nType=Application\nName=Show\nExec={viewer} %f\n")
    (applications / "mimeapps.list").write_text("[Default Applications]\ntext/plain=show.desktop\n")
    (tmp_path / "report.txt").write_text("text")
    status, text = await guest.post("/setup/open_file", path=str(tmp_path / "report.txt"))
    _, windows = await guest.post("/execute", command="xdotool getactivewindow getwindowname", shell=True)
    await guest.post("/setup/close_window", window_name="report.txt")
    assert (status, "activated successfully" in text) == (200, True)
    assert "report.txt" in windows["output"]


async def test_opening_what_cannot_be_opened_fails_at_once(guest: Client, tmp_path: Path) -> None:
    (tmp_path / "data.unknown").write_bytes(bytes(range(256)))
    async with asyncio.timeout(10):
        absent, _ = await guest.post("/setup/open_file", path=str(tmp_path / "absent"))
        status, answer = await guest.post("/setup/open_file", path=str(tmp_path / "data.unknown"))
    assert (absent, status) == (404, 500)
    assert "cannot open" in answer["message"]


async def test_a_wallpaper_is_shown_and_handed_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    picture = tmp_path / "green.png"
    Image.new("RGB", (64, 48), (10, 200, 30)).save(picture)
    with x_server("320x240") as name:
        monkeypatch.setenv("DISPLAY", name)
        monkeypatch.setenv("HOME", str(tmp_path))
        async with agent_here() as (guest, _):
            none, _ = await guest.post("/wallpaper")
            changed = await guest.post("/setup/change_wallpaper", path=str(picture))
            shown = decoded((await guest.get("/screenshot"))[1]).getpixel((5, 5))
            handed = await guest.post("/wallpaper")
            bad, _ = await guest.post("/setup/change_wallpaper", path="/etc/passwd")
    assert (none, changed, bad) == (404, (200, "Wallpaper changed successfully"), 400)
    assert (shown, handed) == ((10, 200, 30), (200, picture.read_bytes()))


# ---- the rest


async def test_the_small_questions_are_answered(guest: Client) -> None:
    assert await guest.get("/platform") == (200, "Linux")
    assert await guest.post("/screen_size") == (200, {"width": 1280, "height": 720})
    assert await guest.get("/terminal") == (200, {"output": None, "status": "success"})
    status, about = await guest.get("/")
    assert (status, about["name"], about["screen"]) == (200, "envd-agent", {"width": 1280, "height": 720})


async def test_without_an_accessibility_bus_the_tree_is_an_error_that_says_so(guest: Client) -> None:
    status, answer = await guest.get("/accessibility")
    assert status == 500
    assert "at-spi2-core" in answer["message"]


@pytest.mark.parametrize(
    "path",
    [
        "/execute",
        "/execute_with_verification",
        "/setup/launch",
        "/run_python",
        "/run_bash_script",
        "/list_directory",
        "/setup/open_file",
        "/setup/activate_window",
        "/setup/change_wallpaper",
        "/setup/download_file",
    ],
)
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="broken"),
        pytest.param(b"\xff\xfe", id="not text"),
        pytest.param(b"[1]", id="no object"),
        pytest.param(b"{}", id="empty object"),
        pytest.param(json.dumps(dict.fromkeys(["command", "code", "script", "path"], 7)).encode(), id="wrong types"),
        pytest.param(b"[" * 100_000, id="too deep"),
    ],
)
async def test_a_malformed_body_is_a_400_with_a_reason(path: str, body: bytes, guest: Client) -> None:
    async with guest.session.post(path, data=body) as response:
        answer = await response.json()
    assert (response.status, answer["status"], bool(answer["message"])) == (400, "error", True)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"command": ["a\0b"]}, id="NUL"),
        pytest.param({"command": ["echo", "\ud800"]}, id="half a character"),
        pytest.param({"command": "echo 'open"}, id="open quote"),
        pytest.param({"command": "   "}, id="blank"),
        pytest.param({"command": ["echo", 1]}, id="number in a list"),
        pytest.param({"command": "true", "verification": [1]}, id="verification is no object"),
        pytest.param({"command": "true", "max_wait_time": "long"}, id="time is no number"),
    ],
)
async def test_a_command_that_cannot_be_passed_on_is_a_400(body: dict[str, Any], guest: Client) -> None:
    status, answer = await guest.post("/execute_with_verification", **body)
    assert (status, answer["status"]) == (400, "error")


@pytest.mark.parametrize("path", ["/file", "/window_size", "/setup/upload"])
async def test_a_form_without_its_fields_is_a_400(path: str, guest: Client) -> None:
    answers = [await guest.form(path, other="x"), await guest.post(path, file_path="x")]
    assert [status for status, _ in answers] == [400, 400]
    assert all("required" in answer["error"] or "form" in answer["error"] for _, answer in answers)


async def test_a_multipart_body_that_is_none_is_a_400(guest: Client) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    async with guest.session.post("/setup/upload", data=b"nonsense", headers=headers) as response:
        assert (response.status, response.content_type) == (400, "application/json")


async def test_json_is_read_whatever_its_content_type(guest: Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"):
        body = json.dumps({"command": ["echo", "ä"]})
        async with guest.session.post("/execute", data=body.encode(), headers={"Content-Type": kind}) as response:
            assert (await response.json())["output"] == "ä\n"


async def test_unknown_paths_methods_and_huge_bodies_are_told_in_json(here: RunningAgent) -> None:
    async with agent_here(Limits(body=1000)) as (guest, _):
        answers = [
            await guest.get("/nope"),
            await guest.get("/execute"),
            await guest.post("/execute", command="x" * 2000),
        ]
    assert [status for status, _ in answers] == [404, 405, 413]
    assert ["/nope" in answers[0][1]["message"], "POST" in answers[1][1]["message"]] == [True, True]


async def test_a_missing_tool_is_named_with_its_package(here: RunningAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    async with agent_here() as (guest, _):
        answers = [
            await guest.post("/start_recording"),
            await guest.post("/setup/activate_window", window_name="x"),
        ]
    assert [(status, answer["package"]) for status, answer in answers] == [(500, "ffmpeg"), (500, "wmctrl")]
