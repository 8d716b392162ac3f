"""Typed actions → programs: what the guest does is what the model said, and nothing else."""

from __future__ import annotations

import ast
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from envd.actions.pyautogui import (
    KEY_COST,
    PREFIX,
    WRITE_LIMIT,
    Program,
    Special,
    Step,
    interval_for,
    program_for,
    program_for_raw,
    step_for_raw,
    steps,
)
from envd.actions.uitars import (
    MAX_PREDICTION_BYTES,
    Click,
    DoubleClick,
    Drag,
    Frame,
    Hotkey,
    Hover,
    Input,
    KeyDown,
    KeyUp,
    Point,
    PredictionError,
    Press,
    Scroll,
    Type,
    parse,
)
from envd.agent.input import is_input_program

SCREEN = Frame(1920, 1080)
AT = Point(99.379, 197.802)
CONTROLLER_SECONDS = 90
LONGEST_ARGUMENT = 128 * 1024


@dataclass
class Guest:
    """Runs a program as a guest would, and keeps what its screen would have seen. Types as pyautogui does on X11."""

    text: str = ""
    clipboard: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.pyautogui = SimpleNamespace(write=self.write, press=self.press, hotkey=self.hotkey, PAUSE=0.1)

    def run(self, code: str) -> Guest:
        modules = {
            "pyautogui": self.pyautogui,
            "pyperclip": SimpleNamespace(copy=self.copy),
            "time": SimpleNamespace(sleep=self.sleep),
        }

        def load(name: str, *_: object) -> SimpleNamespace:
            return modules[name]

        exec(compile(code, "<program>", "exec"), {"__builtins__": {"__import__": load}})
        return self

    def write(self, text: str, interval: float) -> None:
        keyboard = string.ascii_letters + string.digits + string.punctuation + " \t\n"
        for character in text:
            self.seconds += interval + KEY_COST
            self.text += ">" if character == "<" else character if character in keyboard else ""
        self.rest()

    def press(self, key: str) -> None:
        self.text += {"enter": "\n"}[key]
        self.rest()

    def hotkey(self, *keys: str) -> None:
        self.seconds += 2 * KEY_COST
        self.text += {"shift ,": "<", "ctrl v": self.clipboard}[" ".join(keys)]
        self.rest()

    def copy(self, text: str) -> None:
        self.clipboard = text

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def rest(self) -> None:
        self.seconds += self.pyautogui.PAUSE


def body(code: str) -> list[str]:
    assert code.startswith(PREFIX + "\n")
    return code.removeprefix(PREFIX + "\n").splitlines()


def plan(prediction: str) -> tuple[Step, ...]:
    return steps(parse(prediction, frame=SCREEN))


def assert_harmless(code: str) -> None:
    """Imports, two settings, and calls of three modules with literal arguments; and short enough to be sent."""
    assert code.isascii()
    assert len(code) < LONGEST_ARGUMENT
    for statement in ast.parse(code).body:
        match statement:
            case ast.Import(names=[ast.alias(name="pyautogui" | "time" | "pyperclip", asname=None)]):
                pass
            case ast.Assign([ast.Attribute(ast.Name("pyautogui"), "FAILSAFE" | "PAUSE")], ast.Constant(False | 0)):
                pass
            case ast.Expr(ast.Call(ast.Attribute(ast.Name("pyautogui" | "time" | "pyperclip")), positional, named)):
                for argument in (*positional, *(keyword.value for keyword in named)):
                    ast.literal_eval(argument)
            case _:
                pytest.fail(f"not allowed in a program: {ast.unparse(statement)}")


@pytest.mark.parametrize(
    ("action", "lines"),
    [
        pytest.param(Click(AT), ["pyautogui.click(99.379, 197.802, button='left')"], id="click"),
        pytest.param(Click(AT, "right"), ["pyautogui.click(99.379, 197.802, button='right')"], id="right"),
        pytest.param(DoubleClick(AT), ["pyautogui.doubleClick(99.379, 197.802, button='left')"], id="double"),
        pytest.param(Hover(AT), ["pyautogui.moveTo(99.379, 197.802)"], id="hover"),
        pytest.param(
            Drag(AT, Point(3.0, 4.0)),
            ["pyautogui.moveTo(99.379, 197.802)", "pyautogui.dragTo(3.0, 4.0, duration=1.0)"],
            id="drag",
        ),
        pytest.param(Hotkey(("ctrl", "c")), ["pyautogui.hotkey('ctrl', 'c')"], id="hotkey"),
        pytest.param(Hotkey(("ctrl", "<")), ["pyautogui.hotkey('ctrl', 'shift', ',')"], id="less-than held"),
        pytest.param(Press("enter"), ["pyautogui.press('enter')"], id="press"),
        pytest.param(Press("'"), ['pyautogui.press("\'")'], id="press a quote"),
        pytest.param(Press("<"), ["pyautogui.hotkey('shift', ',')"], id="press less-than"),
        pytest.param(KeyDown("shift"), ["pyautogui.keyDown('shift')"], id="keydown"),
        pytest.param(KeyUp("shift"), ["pyautogui.keyUp('shift')"], id="keyup"),
        pytest.param(Scroll("up"), ["pyautogui.scroll(5)"], id="up"),
        pytest.param(Scroll("down", AT), ["pyautogui.scroll(-5, x=99.379, y=197.802)"], id="down at a place"),
        pytest.param(Scroll("left"), ["pyautogui.hscroll(-5)"], id="left"),
        pytest.param(Scroll("right", AT), ["pyautogui.hscroll(5, x=99.379, y=197.802)"], id="right at a place"),
        pytest.param(Type(""), [], id="nothing to type"),
        pytest.param(Type("", enter=True), ["pyautogui.press('enter')"], id="enter alone"),
        pytest.param(
            Type("it's", enter=True),
            ['pyautogui.write("it\'s", interval=0.1)', "time.sleep(0.5)", "pyautogui.press('enter')"],
            id="type",
        ),
        pytest.param(
            Type("<b>"),
            [
                "pyautogui.PAUSE = 0",
                "pyautogui.hotkey('shift', ',')",
                "time.sleep(0.1)",
                "pyautogui.write('b>', interval=0.1)",
                "time.sleep(0.5)",
            ],
            id="less-than",
        ),
        pytest.param(
            Type("né"),
            ["import pyperclip", "pyperclip.copy('n\\xe9')", "pyautogui.hotkey('ctrl', 'v')", "time.sleep(0.5)"],
            id="what no key types is pasted",
        ),
    ],
)
def test_an_action_becomes_its_program(action: Input, lines: list[str]) -> None:
    code = program_for(action)
    assert body(code) == lines
    assert_harmless(code)


@pytest.mark.parametrize(
    ("prediction", "planned"),
    [
        pytest.param("Action: finished()", [Special.DONE], id="finished"),
        pytest.param("Action: wait()", [Special.WAIT], id="wait"),
        pytest.param("Action: call_user()", [Special.FAIL], id="call_user"),
        pytest.param("Action: error_env()", [Special.FAIL], id="error_env"),
        pytest.param("Action: click(start_box='(1,2)')\n\nfinished()", [Special.DONE], id="earlier clicks are dropped"),
        pytest.param("Action: press(key='a')\n\nwait()\n\npress(key='b')", [Special.WAIT], id="and later ones"),
        pytest.param("Action: wait()\n\nfinished()", [Special.WAIT], id="the first word counts"),
        pytest.param(
            "Action: press(key='a')\n\npress(key='b')",
            [Program(program_for(Press("a"))), Program(program_for(Press("b")))],
            id="a program each",
        ),
    ],
)
def test_a_prediction_is_programs_or_one_word(prediction: str, planned: Sequence[Step]) -> None:
    assert plan(prediction) == tuple(planned)


def test_a_program_names_what_it_carries_out() -> None:
    (step,) = plan("Thought: x\nAction: press(key='a')")
    assert isinstance(step, Program)
    assert step.source == "press(key='a')"


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        pytest.param("pyautogui.click(1, 2)", PREFIX + "\npyautogui.click(1, 2)", id="one call"),
        pytest.param("  pyautogui.click(1, 2)", PREFIX + "\npyautogui.click(1, 2)", id="blanks before it"),
        pytest.param("for i in 'ab':\n  print(i)", PREFIX + "\nfor i in 'ab':\n  print(i)", id="a loop"),
        pytest.param(PREFIX + "print()", PREFIX + "print()", id="prefixed already"),
    ],
)
def test_a_raw_program_has_the_prefix_once(raw: str, code: str) -> None:
    assert program_for_raw(raw) == code
    assert program_for_raw(code) == code
    compile(code, "<program>", "exec")


@pytest.mark.parametrize("word", ["DONE", "WAIT", "FAIL", " DONE\n"])
def test_a_special_word_alone_is_no_program(word: str) -> None:
    assert step_for_raw(word) is Special(word.strip())


@pytest.mark.parametrize("raw", ["done", "print('DONE')", ""])
def test_anything_else_raw_is_a_program(raw: str) -> None:
    assert step_for_raw(raw) == Program(program_for_raw(raw))


@pytest.mark.parametrize(
    ("length", "interval"),
    [
        pytest.param(1, 0.1, id="one key"),
        pytest.param(590, 0.1, id="the longest at upstream's pace"),
        pytest.param(1000, 0.0585, id="a page"),
        pytest.param(WRITE_LIMIT, 0.0015, id="the longest that is typed"),
        pytest.param(WRITE_LIMIT * 10, 0.0, id="never negative"),
    ],
)
def test_a_long_text_is_typed_faster(length: int, interval: float) -> None:
    assert interval_for(length) == interval


@pytest.mark.parametrize("piece", ["x", "<", "<x", "☃"])
@pytest.mark.parametrize("length", [1, 600, 5000, WRITE_LIMIT, WRITE_LIMIT + 1])
def test_typing_never_outlasts_the_controller(piece: str, length: int) -> None:
    text = (piece * length)[:length]
    guest = Guest().run(program_for(Type(text)))
    assert guest.text == text
    assert guest.seconds < CONTROLLER_SECONDS


any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"))
code_text = st.text(st.sampled_from("ab\\n'\"<>{}()#\n\t ;é"))


@given(any_text | code_text, st.booleans())
@example("'''\\N{DASH}\\x\\u", False)
@example("'); import os; os.system('x", True)
def test_the_guest_gets_the_text_that_was_to_be_typed(text: str, enter: bool) -> None:
    code = program_for(Type(text, enter))
    assert_harmless(code)
    assert Guest().run(code).text == text + "\n" * enter


@given(any_text | code_text)
def test_what_a_model_types_arrives(text: str) -> None:
    escaped = f"|{text}|".replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    (step,) = plan(f"Thought: I type.\nAction: type(content='{escaped}')")
    assert isinstance(step, Program)
    assert Guest().run(step.code).text == f"|{text}|"


@given((any_text | code_text).filter(lambda text: "Action:" not in text))
@example("''' \\x \\u \\N{ None")
def test_no_thought_changes_the_program(thought: str) -> None:
    action = "Action: click(start_box='(100,200)')"
    assert plan(f"Thought: {thought}\n{action}") == plan(action)


NAMES = "click left_double drag hotkey press keydown type scroll wait finished call_user fly".split()  # noqa: SIM905 - a list of twelve is longer
PIECES = [
    "Action: ",
    "Thought: ",
    "\n",
    "\n\n",
    "(",
    ")",
    "='",
    "')",
    "', ",
    "(1,2)",
    "[3 4]",
    "ctrl c",
    "\\",
    '"',
    "é",
]
NAMED = ["start_box", "end_box", "key", "content", "direction", "up", "left", "<|box_start|>"]
soup = st.lists(st.sampled_from([*NAMES, *PIECES, *NAMED]) | st.text(max_size=3)).map("".join)
values = st.sampled_from(["(1,2)", "ctrl c", "+", "left", "\\n", ""]) | code_text
arguments = st.dictionaries(st.sampled_from(NAMED[:5]), values, max_size=3)


def written(name: str, given_arguments: Mapping[str, str]) -> str:
    inside = ", ".join(f"{key}='{value}'" for key, value in given_arguments.items())
    return f"{name}({inside})"


calls = st.builds(written, st.sampled_from(NAMES), arguments)
predictions = st.lists(calls, max_size=4).map(lambda found: "Action: " + "\n\n".join(found))


@given(soup | predictions | st.text())
@example("Action: type(content='" + "\x01" * (MAX_PREDICTION_BYTES - 30) + "')")
@example("Action: type(content='" + "<" * (MAX_PREDICTION_BYTES - 30) + "')")
def test_a_prediction_is_harmless_programs_or_a_prediction_error(prediction: str) -> None:
    """And the guest agent runs all but the very long ones in its warm interpreter."""
    try:
        planned = plan(prediction)
    except PredictionError:
        return
    assert planned
    for step in planned:
        if isinstance(step, Program):
            assert_harmless(step.code)
            assert is_input_program(step.code) is (len(step.code) <= 65536)
