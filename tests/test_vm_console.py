"""The console of a real machine: what is shown is the guest's screen, what is typed arrives, and nothing stays down."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import pytest_asyncio
from console_machine import SCREEN, Machine, booted, started
from PIL import Image

from envd.actions.gestures import Gesture, Key, Move, Press, Rest
from envd.actions.pyautogui import program_for_raw
from envd.actions.translate import gestures_for
from envd.errors import GuestMisbehaved, InfraError
from envd.vm.console import FRAME, VmConsole
from envd.vm.keyboard import KEYS, PRINTABLE
from envd.vm.pictures import Pictures
from envd.vm.trial import host_io_works

PPM = b"P6\n2 1\n255\n\xff\x00\x00\x00\x00\xff"

BOOT = 400
"""Seconds that the first test with a guest may take, with the boot."""


def guest_test(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """A test that needs the guest, in the loop that has it."""
    for mark in (pytest.mark.qemu, pytest.mark.timeout(BOOT), pytest.mark.asyncio(loop_scope="module")):
        test = mark(test)
    return test


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machine]:
    """One guest for all tests of this file: it takes most of a minute to boot."""
    async with booted(tmp_path_factory.mktemp("vm")) as it:
        yield it


# --- without a guest ----------------------------------------------------------------------------------------------


def test_a_picture_that_qemu_writes_becomes_png(tmp_path: Path) -> None:
    (tmp_path / FRAME).write_bytes(PPM)
    with Image.open(io.BytesIO(Pictures().read(tmp_path / FRAME))) as picture:
        assert (picture.format, picture.size) == ("PNG", (2, 1))
        assert picture.tobytes() == b"\xff\x00\x00\x00\x00\xff"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(PPM[:-1], id="cut short"),
        pytest.param(PPM + b"\0", id="too long"),
        pytest.param(PPM.replace(b"P6", b"P5"), id="another format"),
        pytest.param(b"P6\n0 0\n255\n", id="no pixels"),
        pytest.param(None, id="absent"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / FRAME).write_bytes(content)
    with pytest.raises(InfraError):
        Pictures().read(tmp_path / FRAME)


def test_a_link_to_a_file_of_this_host_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(PPM)
    (tmp_path / FRAME).symlink_to(tmp_path / "other")
    with pytest.raises(InfraError):
        Pictures().read(tmp_path / FRAME)


@pytest.mark.qemu
async def test_a_machine_whose_guest_has_no_driver_is_seen_and_takes_no_input(tmp_path: Path) -> None:
    async with started(tmp_path) as (monitor, _):
        console = VmConsole(monitor, tmp_path, SCREEN)
        assert (await console.picture()).startswith(b"\x89PNG")
        assert not (tmp_path / FRAME).exists()
        with pytest.raises(InfraError) as refused:
            await console.perform([Key("a", down=True)])
        assert refused.value.facts["sent"] is False


@pytest.mark.qemu
async def test_a_machine_that_is_gone_is_told(tmp_path: Path) -> None:
    async with started(tmp_path) as (monitor, process):
        console = VmConsole(monitor, tmp_path, SCREEN)
        process.kill()
        await monitor.lost()
        for call in (console.picture(), console.pause()):
            with pytest.raises(InfraError):
                await call
        with pytest.raises(InfraError) as failed:
            await console.perform([Move(1, 1)])
        assert failed.value.facts["sent"] is False


# --- with one -----------------------------------------------------------------------------------------------------


@guest_test
async def test_the_trial_finds_that_pictures_and_input_work(machine: Machine) -> None:
    seen = await host_io_works(machine.console, machine.guest)
    assert (seen.pictures, seen.input) == (True, True), seen.detail
    assert f"{len(PRINTABLE)} characters" in seen.detail


READ_KEYS = """
import json, select, sys, time
import pyautogui
from Xlib import X
module, path = pyautogui.platformModule, sys.argv[1]
server, seen = module._display, []
window = server.screen().root.create_window(0, 0, 300, 200, 0, 24, override_redirect=1, event_mask=X.KeyPressMask)
window.map()
while window.grab_keyboard(False, X.GrabModeAsync, X.GrabModeAsync, X.CurrentTime):
    time.sleep(0.1)
open(path, "w").write("ready")
names = {}
for name, code in module.keyboardMapping.items():
    names.setdefault(code, []).append(name)
end = time.monotonic() + 60
while time.monotonic() < end:
    if server.pending_events() or select.select([server], [], [], 0.2)[0]:
        event = server.next_event()
        if event.type == X.KeyPress:
            seen.append(names.get(event.detail, [str(event.detail)])[-1])
        if event.type == X.KeyPress and "f12" in names.get(event.detail, []):
            break
known = {name: names[code][-1] for name, code in module.keyboardMapping.items() if code}
open(path, "w").write(json.dumps([seen, known]))
"""


async def ready(machine: Machine, path: str, wanted: bytes) -> bytes:
    """The guest's file, once it begins so."""
    async with asyncio.timeout(60):
        while True:
            try:
                if (content := await machine.guest.file(path)).startswith(wanted):
                    return content
            except GuestMisbehaved:  # it is not there yet
                pass
            await asyncio.sleep(0.2)


@guest_test
async def test_every_key_is_the_one_that_pyautogui_presses(machine: Machine) -> None:
    path = "/tmp/keys-of-a-test"
    await machine.guest.launch(["python", "-c", READ_KEYS, path])
    await ready(machine, path, b"ready")
    names = [name for name in KEYS if len(name) > 1 and name != "f12"]
    taps = [Key(name, down) for name in [*names, "capslock", "numlock", "scrolllock", "f12"] for down in (True, False)]
    await machine.console.perform(taps)
    seen, known = json.loads(await ready(machine, path, b"[["))
    assert seen == [known[name] for name in [*names, "capslock", "numlock", "scrolllock", "f12"]]


async def ask(machine: Machine, expression: str) -> str:
    code = f"import pyautogui; from Xlib.display import Display; print({expression})"
    return (await machine.guest.execute(["python", "-c", code])).stdout.strip()


@guest_test
async def test_the_pointer_goes_to_a_place_that_it_was_last_sent_to_though_the_guest_has_moved_it(
    machine: Machine,
) -> None:
    await machine.console.perform([Move(400, 300)])
    assert await ask(machine, "pyautogui.moveTo(10, 20) or tuple(pyautogui.position())") == "(10, 20)"
    await machine.console.perform([Move(400, 300)])
    assert await ask(machine, "tuple(pyautogui.position())") == "(400, 300)"


@guest_test
async def test_a_call_that_is_cut_off_lets_go_of_what_it_held(machine: Machine) -> None:
    held: list[Gesture] = [
        Move(640, 600),
        Press("left", down=True),
        Key("shift", down=True),
        Key("a", down=True),
        Rest(60),
    ]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await machine.console.perform(held)
    down = "sum(Display().query_keymap()), Display().screen().root.query_pointer().mask"
    assert await ask(machine, down) == "0 0"


@guest_test
async def test_a_key_that_is_meant_to_stay_down_does(machine: Machine) -> None:
    await machine.console.perform([Key("shift", down=True)])
    assert await ask(machine, "sum(Display().query_keymap()) > 0") == "True"
    await machine.console.perform([Key("shift", down=False)])
    assert await ask(machine, "sum(Display().query_keymap())") == "0"


@guest_test
async def test_a_paused_machine_uses_no_processor_is_seen_and_goes_on_for_a_gesture(machine: Machine) -> None:
    console = machine.console
    await console.pause()
    await console.pause()
    await asyncio.sleep(0.5)
    before = machine.ticks()
    await asyncio.sleep(2)
    assert machine.ticks() - before <= 2
    assert (await console.picture()).startswith(b"\x89PNG")
    assert await machine.monitor.status() == "paused"
    await console.perform([Move(5, 5)])
    assert await machine.monitor.status() == "running"
    await console.resume()
    assert await ask(machine, "tuple(pyautogui.position())") == "(5, 5)"


async def click_until_it_has_the_keyboard(machine: Machine, click: Sequence[Gesture], title: str) -> None:
    """Its program may run before its window is shown."""
    async with asyncio.timeout(60):
        while True:
            await machine.console.perform(click)
            active = await machine.guest.execute(["xdotool", "getactivewindow", "getwindowname"])
            if active.stdout.strip() == title:
                return


@guest_test
async def test_as_much_as_is_taken_at_once_arrives_whole_on_a_busy_host(machine: Machine) -> None:
    """As many loops as would take every processor twice over run beside it."""
    path, text = "/tmp/text-of-a-test", "Hello, world."
    reader = f"stty -icanon -echo min 1; touch {path}; exec dd bs=1 status=none of={path}"
    await machine.guest.launch(["xterm", "-T", "reader", "-geometry", "100x30+100+100", "-e", "sh", "-c", reader])
    await ready(machine, path, b"")
    click = gestures_for(program_for_raw("pyautogui.click(400, 300)"), SCREEN)
    typed = gestures_for(program_for_raw(f"pyautogui.write({text!r})"), SCREEN)
    assert click is not None
    assert typed is not None
    assert machine.console.takes(typed)
    assert not machine.console.takes([*typed, *typed])
    await click_until_it_has_the_keyboard(machine, click, "reader")
    loops = [await asyncio.create_subprocess_exec("timeout", "60", "sh", "-c", "while :; do :; done") for _ in range(4)]
    try:
        await machine.console.perform(typed)
    finally:
        for loop in loops:
            loop.terminate()
            await loop.wait()
    arrived = b""
    deadline = time.monotonic() + 20
    while len(arrived) < len(text) and time.monotonic() < deadline:
        arrived = await machine.guest.file(path)
        await asyncio.sleep(0.2)
    assert arrived.decode() == text
