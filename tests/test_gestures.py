"""Programs as gestures: the real pyautogui does the same, nothing is guessed, and nothing stays down by itself."""

from __future__ import annotations

import json
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from agent_desktop import environment, x_server
from hypothesis import example, given, settings
from hypothesis import strategies as st

from envd.actions.gestures import Gesture, Key, Move, Press, Rest, Wheel
from envd.actions.keys import KEYS as NAMED
from envd.actions.pyautogui import PREFIX, program_for, program_for_raw
from envd.actions.translate import MOST, gestures_for
from envd.actions.uitars import Click, DoubleClick, Drag, Hotkey, Hover, Input, KeyDown, KeyUp, Point, Scroll, Type
from envd.actions.uitars import Press as PressKey
from envd.vm.keyboard import KEYS, PRINTABLE

SCREEN = (1280, 720)


def read(code: str) -> tuple[Gesture, ...] | None:
    return gestures_for(program_for_raw(code), SCREEN)


def tap(name: str) -> list[Gesture]:
    return [Key(name, down=True), Key(name, down=False)]


LEFT: list[Gesture] = [Press("left", down=True), Press("left", down=False)]
RIGHT: list[Gesture] = [Press("right", down=True), Press("right", down=False)]


@pytest.mark.parametrize(
    ("code", "gestures"),
    [
        pytest.param("pyautogui.click(10.9, 20)", [Move(10, 20), *LEFT], id="a click, at whole pixels"),
        pytest.param("pyautogui.click()", LEFT, id="where the pointer is"),
        pytest.param("pyautogui.click((3, 4))", [Move(3, 4), *LEFT], id="a pair"),
        pytest.param("pyautogui.click(9999, -5)", [Move(1279, 0), *LEFT], id="kept on the screen"),
        pytest.param("pyautogui.rightClick(x=1, y=2)", [Move(1, 2), *RIGHT], id="right"),
        pytest.param("pyautogui.click(1, 2, button='SECONDARY')", [Move(1, 2), *RIGHT], id="secondary"),
        pytest.param("pyautogui.write('a<')", [*tap("a"), *tap("<")], id="less-than as it is written"),
        pytest.param("pyautogui.scroll(-3)", [Wheel(-3)], id="the wheel"),
        pytest.param("pyautogui.scroll(0, 5, 5)", [], id="no click of the wheel does not even move"),
        pytest.param(
            "pyautogui.press('a'); pyautogui.press('b')", [*tap("a"), Rest(0.1), *tap("b")], id="a rest between calls"
        ),
        pytest.param(
            "pyautogui.PAUSE = 0\npyautogui.press('a'); pyautogui.press('b')", [*tap("a"), *tap("b")], id="or none"
        ),
        pytest.param("time.sleep(2)", [Rest(2.0)], id="a sleep"),
        pytest.param("'a thought'\npass\npyautogui.press('Enter')", tap("enter"), id="words between"),
    ],
)
def test_a_program_is_read_as_it_is_meant(code: str, gestures: list[Gesture]) -> None:
    assert read(code) == tuple(gestures)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("pyperclip.copy('é')", id="another module"),
        pytest.param("import os", id="another import"),
        pytest.param("for i in range(3): pyautogui.click(1, 2)", id="a loop"),
        pytest.param("x = 5\npyautogui.click(x, 2)", id="a variable"),
        pytest.param("pyautogui.click(*[1, 2])", id="unpacked"),
        pytest.param("pyautogui.click(1, 2, color='red')", id="an argument that it does not have"),
        pytest.param("pyautogui.click('button.png')", id="a picture to look for"),
        pytest.param("pyautogui.click(True, 2)", id="no number"),
        pytest.param("pyautogui.click(1e999, 2)", id="infinite"),
        pytest.param("pyautogui.click(1, 2, button=1)", id="a button by number"),
        pytest.param("pyautogui.click(5, None)", id="half a place"),
        pytest.param("pyautogui.moveRel(5, 5)", id="away from nobody knows where"),
        pytest.param("pyautogui.moveTo(5, 5, duration=1)", id="a way from nobody knows where"),
        pytest.param("pyautogui.moveTo(1, 2); pyautogui.moveTo(5, 5, 1, pyautogui.easeInQuad)", id="an easing"),
        pytest.param("pyautogui.hscroll(3)", id="sideways"),
        pytest.param("pyautogui.write('naïve')", id="a letter that the keyboard has not"),
        pytest.param("pyautogui.press('f13')", id="a key that it has not"),
        pytest.param("pyautogui.press('a', presses=10**9)", id="an expression"),
        pytest.param(f"pyautogui.press('a', presses={MOST})", id="too much of it"),
        pytest.param("time.sleep(1000)", id="longer than a guest would let it"),
        pytest.param("time.sleep(-1)", id="a mistake that the guest reports"),
        pytest.param("pyautogui.screenshot()", id="a picture"),
        pytest.param("pyautogui.FAILSAFE = True\npyautogui.click(1, 2)", id="watched corners"),
        pytest.param("pyautogui.press({[]: 1})", id="no literal at all"),
        pytest.param("pyautogui.write('\\d')", id="what Python warns of"),
        pytest.param("pyautogui.click(", id="a syntax error"),
        pytest.param("(" * 5000, id="nested too deeply"),
        pytest.param("pyautogui.write('\x00')", id="a null"),
    ],
)
def test_what_is_not_certain_is_left_to_the_guest(code: str) -> None:
    assert read(code) is None


def test_a_program_that_lets_pyautogui_watch_the_corners_is_left_to_the_guest() -> None:
    assert gestures_for("import pyautogui\npyautogui.click(1, 2)", SCREEN) is None


REPLAYED = [
    "pyautogui.click(10.9, 20.2, clicks=2, interval=0.05, button='middle')",
    "pyautogui.doubleClick(100, 50)",
    "pyautogui.tripleClick(100, 50, interval=0.01)",
    "pyautogui.click(100, 50); pyautogui.click(y=70)",
    "pyautogui.moveTo(100, 100); pyautogui.dragTo(400.5, 300, duration=1.0)",
    "pyautogui.moveTo(400, 300, 0.1); pyautogui.moveTo(2000, -50, 0.5); pyautogui.moveTo(5, 5, 0.22)",
    "pyautogui.moveTo(700, 700); pyautogui.move(30, 200); pyautogui.dragRel(-40, -500, 0.3, button='right')",
    "pyautogui.moveTo(7, 7); pyautogui.mouseDown(button='right'); pyautogui.moveTo(50, 9); pyautogui.mouseUp(60, 10)",
    "pyautogui.scroll(3, x=50, y=60); pyautogui.vscroll(-2, (70, 80))",
    "pyautogui.hotkey('ctrl', 'Shift', 'T'); pyautogui.hotkey(['alt', 'f4'], interval=0.02)",
    "pyautogui.press(['left', 'A', 'pgup'], presses=2, interval=0.03); pyautogui.press('num5')",
    f"pyautogui.write({string.printable[:-5].replace('<', '')!r}, interval=0.01)",
    "pyautogui.typewrite(['a', 'enter'], 0.2)",
    "pyautogui.keyDown('winright'); pyautogui.keyUp('winright'); pyautogui.keyDown('!'); pyautogui.keyUp('!')",
    "pyautogui.PAUSE = 0.25; pyautogui.press('esc'); time.sleep(0.5); pyautogui.sleep(1); pyautogui.press('\\b')",
]

RECORDER = """
import json, sys, time
import pyautogui
from Xlib import X
module, log, real = pyautogui.platformModule, [], pyautogui.platformModule.fake_input
words = {X.ButtonPress: "button down", X.ButtonRelease: "button up", X.KeyPress: "key down", X.KeyRelease: "key up"}
def fake_input(display, kind, detail=0, **place):
    if kind == X.MotionNotify:
        real(display, kind, **place)
        log.append(["move", *pyautogui.position()])
    else:
        log.append([words[kind], detail])
module.fake_input = fake_input
time.sleep = lambda seconds: log.append(["rest", seconds])
logs = []
for code in json.load(sys.stdin):
    log.clear()
    pyautogui.PAUSE = 0.1
    exec(code)
    logs.append(list(log))
json.dump([logs, {name: code for name, code in module.keyboardMapping.items() if code}], sys.stdout)
"""
BUTTONS = {"left": 1, "middle": 2, "right": 3}


@pytest.mark.local
def test_the_real_pyautogui_does_the_same(tmp_path: Path) -> None:
    with x_server(f"{SCREEN[0]}x{SCREEN[1]}") as display:
        programs = json.dumps([program_for_raw(code) for code in REPLAYED])
        ran = subprocess.run(
            [sys.executable, "-c", RECORDER],
            input=programs, env=environment(display, tmp_path), capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    logs, codes = json.loads(ran.stdout)
    for code, log in zip(REPLAYED, logs, strict=True):
        gestures = read(code)
        assert gestures is not None, code
        assert tidied([event for gesture in gestures for event in seen(gesture, codes)]) == tidied(log), code


def seen(gesture: Gesture, codes: dict[str, int]) -> list[list[Any]]:
    """What an X server would be told of it."""
    match gesture:
        case Move(x, y):
            return [["move", x, y]]
        case Press(button, down):
            return [["button down" if down else "button up", BUTTONS[button]]]
        case Wheel(up):
            return [["button down", 4 if up > 0 else 5], ["button up", 4 if up > 0 else 5]] * abs(up)
        case Key(name, down):
            stroke = [["key down" if down else "key up", codes[name]]]
            shift = codes["shift"]
            held = down and KEYS[name].shift
            return [["key down", shift], *stroke, ["key up", shift]] if held else stroke
        case Rest(seconds):
            return [["rest", seconds]]


def tidied(log: list[list[Any]]) -> list[list[Any]]:
    """Without motion to where the pointer is, rests added up, and nothing after the last event."""
    tidy: list[list[Any]] = []
    place: list[Any] = []
    for event in log:
        if event[0] == "rest" and tidy and tidy[-1][0] == "rest":
            tidy[-1] = ["rest", round(tidy[-1][1] + event[1], 6)]
        elif event not in (["rest", 0], ["rest", 0.0], place):
            tidy.append(event)
        place = event if event[0] == "move" else place
    return tidy[: -1 if tidy and tidy[-1][0] == "rest" else None]


points = st.builds(Point, st.floats(0, SCREEN[0], width=32), st.floats(0, SCREEN[1], width=32))
on_the_keyboard = st.sampled_from(sorted(NAMED & KEYS.keys()))
inputs: st.SearchStrategy[Input] = st.one_of(
    st.builds(Click, points, st.sampled_from(["left", "right"])),
    st.builds(DoubleClick, points),
    st.builds(Hover, points),
    st.builds(Drag, points, points),
    st.builds(Hotkey, st.lists(on_the_keyboard, min_size=1, max_size=4).map(tuple)),
    st.builds(PressKey, on_the_keyboard),
    st.builds(Type, st.text(PRINTABLE + "\t\n", max_size=300), st.booleans()),
    st.builds(Scroll, st.sampled_from(["up", "down"]), st.none() | points),
)


@settings(deadline=None)
@given(inputs)
@example(Type("<" * 300))
@example(Hotkey(("ctrl", "<")))
@example(Type("x" * 20_000))
def test_all_that_a_model_does_with_a_us_keyboard_can_be_done_from_outside_and_leaves_nothing_down(
    action: Input,
) -> None:
    gestures = gestures_for(program_for(action), SCREEN)
    assert gestures is not None
    down: set[str] = set()
    for gesture in gestures:
        if isinstance(gesture, Key | Press):
            what = gesture.name if isinstance(gesture, Key) else f"the {gesture.button} button"
            (down.add if gesture.down else down.discard)(what)
        if isinstance(gesture, Move):
            assert 0 <= gesture.x < SCREEN[0]
            assert 0 <= gesture.y < SCREEN[1]
    assert not down


def test_a_key_stays_down_if_the_program_says_so() -> None:
    assert gestures_for(program_for(KeyDown("shift")), SCREEN) == (Key("shift", down=True),)
    assert gestures_for(program_for(KeyUp("shift")), SCREEN) == (Key("shift", down=False),)


@settings(deadline=None)
@given(st.text(max_size=200) | st.text("pyautogui.clkwrTo(),='12\n ", max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    gestures_for(text, SCREEN)
    gestures_for(PREFIX + text, SCREEN)


def test_every_printable_character_is_one_stroke_of_its_own() -> None:
    assert len(PRINTABLE) == 95
    assert len({KEYS[character] for character in PRINTABLE}) == 95
