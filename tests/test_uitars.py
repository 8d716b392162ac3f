"""Predictions → typed actions: what upstream's grammar gets right is kept, what it gets wrong is mended.

Upstream is the parser of the published trainers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envd.actions.keys import ALIASES, KEYS, key_name, split_combination
from envd.actions.uitars import (
    MAX_PREDICTION_BYTES,
    Action,
    CallUser,
    Click,
    DoubleClick,
    Drag,
    ErrorEnv,
    Finished,
    Frame,
    Hotkey,
    Hover,
    KeyDown,
    KeyUp,
    Point,
    PredictionError,
    Press,
    Scroll,
    Type,
    Wait,
    parse,
    smart_resize,
)

SCREEN = Frame(1920, 1080)
AT = Point(99.379, 197.802)
TO = Point(298.137, 395.604)


def actions(body: str, frame: Frame = SCREEN) -> tuple[Action, ...]:
    return parse(f"Thought: I act.\nAction: {body}", frame=frame).actions


def failure(prediction: str) -> PredictionError:
    with pytest.raises(PredictionError) as caught:
        parse(prediction, frame=SCREEN)
    return caught.value


@pytest.mark.parametrize(
    ("call", "action"),
    [
        pytest.param("click(start_box='(100,200)')", Click(AT), id="click"),
        pytest.param("left_single(start_box='(100,200)')", Click(AT), id="left_single"),
        pytest.param("right_single(start_box='(100,200)')", Click(AT, "right"), id="right_single"),
        pytest.param("left_double(start_box='(100,200)')", DoubleClick(AT), id="left_double"),
        pytest.param("hover(start_box='(100,200)')", Hover(AT), id="hover"),
        pytest.param("drag(start_box='(100,200)', end_box='(300,400)')", Drag(AT, TO), id="drag"),
        pytest.param("select(start_box='(100,200)', end_box='(300,400)')", Drag(AT, TO), id="select"),
        pytest.param("hotkey(key='ctrl c')", Hotkey(("ctrl", "c")), id="hotkey"),
        pytest.param("hotkey(hotkey='alt f4')", Hotkey(("alt", "f4")), id="hotkey by its other name"),
        pytest.param("press(key='enter')", Press("enter"), id="press"),
        pytest.param("press(press='enter')", Press("enter"), id="press by its other name"),
        pytest.param("keydown(key='shift')", KeyDown("shift"), id="keydown"),
        pytest.param("keyup(key='shift')", KeyUp("shift"), id="keyup"),
        pytest.param("type(content='hello')", Type("hello"), id="type"),
        pytest.param("scroll(direction='down')", Scroll("down"), id="scroll where the cursor is"),
        pytest.param("scroll(start_box='(100,200)', direction='up')", Scroll("up", AT), id="scroll at a place"),
        pytest.param("scroll(start_box='', direction='up')", Scroll("up"), id="an empty box is no box"),
        pytest.param("scroll(direction='left')", Scroll("left"), id="scroll left"),
        pytest.param("scroll(direction='Right')", Scroll("right"), id="scroll right"),
        pytest.param("scroll(direction='up or down')", Scroll("up"), id="up is looked for first"),
        pytest.param("wait()", Wait(), id="wait"),
        pytest.param("WAIT", Wait(), id="WAIT as C's hint spells it"),
        pytest.param("finished", Finished(), id="bare finished"),
        pytest.param("finished(content='it's done')", Finished("it's done"), id="finished"),
        pytest.param("finished(content='cut of", Finished(""), id="finished cut off"),
        pytest.param("call_user()", CallUser(), id="call_user"),
        pytest.param("error_env()", ErrorEnv(), id="error_env"),
        pytest.param("a.b.click(start_box='(100,200)')", Click(AT), id="only the last name counts"),
        pytest.param("Click(start_box='(100,200)')", Click(AT), id="names ignore case"),
        pytest.param("click(start_box='(100,200)')  # the button", Click(AT), id="comment"),
        pytest.param("click( start_box = '(100,200)' , )", Click(AT), id="blanks and a last comma"),
        pytest.param("click(9, 'x', start_box='(100,200)', why='x')", Click(AT), id="what is not asked for is dropped"),
        pytest.param("drag(start_box='(100,200)',\n     end_box='(300,400)')", Drag(AT, TO), id="call over two lines"),
    ],
)
def test_a_call_becomes_its_action(call: str, action: Action) -> None:
    assert actions(call) == (action,)


@pytest.mark.parametrize(
    ("box", "point"),
    [
        pytest.param("(100,200)", AT, id="plain"),
        pytest.param("(100, 200)", AT, id="blank after the comma"),
        pytest.param("100,200", AT, id="no brackets"),
        pytest.param("<|box_start|>(100,200)<|box_end|>", AT, id="box tokens"),
        pytest.param("[100,200]", AT, id="square brackets"),
        pytest.param("(100 200)", AT, id="blank for comma"),
        pytest.param("(100.0,2e2)", AT, id="floats"),
        pytest.param("(50,100,150,300)", AT, id="middle of a box"),
        pytest.param("(50,100),(150,300)", AT, id="two corners"),
        pytest.param("(2000,3000)", Point(1919.0, 1079.0), id="below the screen: its edge"),
        pytest.param("(-5,-1)", Point(0.0, 0.0), id="above the screen: its edge"),
    ],
)
def test_a_box_becomes_a_point_on_the_screen(box: str, point: Point) -> None:
    assert actions(f"click(start_box='{box}')") == (Click(point),)


@pytest.mark.parametrize(
    ("frame", "seen"),
    [
        pytest.param(Frame(1920, 1080), (1932, 1092), id="default"),
        pytest.param(Frame(1920, 1080, 3136, 518_400), (952, 532), id="the pixels of C"),
        pytest.param(Frame(1920, 1080, 3136, 129_024), (476, 252), id="the pixels of B's newest"),
        pytest.param(Frame(1920, 1080, 78_400, 12_845_056), (1932, 1092), id="upstream's own assumption"),
        pytest.param(Frame(10, 10, 3136), (56, 56), id="grown to the minimum"),
        pytest.param(Frame(28, 2800, 3136, 3136), (28, 560), id="no side below 28"),
    ],
)
def test_the_model_sees_what_the_advertised_pixels_make_of_the_screen(frame: Frame, seen: tuple[int, int]) -> None:
    assert frame.seen() == seen


def test_a_click_lands_by_the_pixels_we_advertised() -> None:
    small = Frame(1920, 1080, max_pixels=518_400)
    assert actions("click(start_box='(476,266)')", small) == (Click(Point(960.0, 540.0)),)


@given(st.integers(28, 4000), st.integers(28, 4000), st.integers(3136, 4_000_000))
def test_a_resized_image_stays_below_its_maximum(height: int, width: int, maximum: int) -> None:
    high, wide = smart_resize(height, width, 784, maximum)
    assert high % 28 == wide % 28 == 0
    assert high * wide <= maximum or min(high, wide) == 28


@pytest.mark.parametrize("shape", [(0, 10), (10, 2001), (10, 10, 5, 4), (10, 10, 0, 4)])
def test_a_frame_nobody_could_be_shown_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"px|pixels"):
        Frame(*shape)


@pytest.mark.parametrize(
    ("content", "typed"),
    [
        pytest.param(r"'it\'s'", Type("it's"), id="escaped quote"),
        pytest.param("'it's'", Type("it's"), id="loose quote"),
        pytest.param("'print('hi')'", Type("print('hi')"), id="loose quote and parenthesis"),
        pytest.param('"hello"', Type("hello"), id="double quotes"),
        pytest.param('"it\'s"', Type("it's"), id="single quote in double quotes"),
        pytest.param(r'"say \"hi\""', Type('say "hi"'), id="escaped double quote"),
        pytest.param("''", Type(""), id="empty"),
        pytest.param(r"'x\n'", Type("x", enter=True), id="newline at the end"),
        pytest.param(r"'x\n\n\n'", Type("x", enter=True), id="many newlines are one enter"),
        pytest.param("'x\n'", Type("x", enter=True), id="real newline at the end"),
        pytest.param(r"'\n'", Type("", enter=True), id="only a newline"),
        pytest.param("' '", Type(" "), id="only a blank"),
        pytest.param("'  x '", Type("x "), id="the left is stripped, as ever"),
        pytest.param(r"'a\nb'", Type("a\nb"), id="newline inside"),
        pytest.param("'a\nb'", Type("a\nb"), id="real newline inside"),
        pytest.param("'a\r\nb'", Type("a\nb"), id="newline of Windows"),
        pytest.param("'a\n\n\nb'", Type("a\n\n\nb"), id="blank lines inside"),
        pytest.param(r"'a\tb'", Type("a\tb"), id="tab"),
        pytest.param(r"'C:\\new'", Type(r"C:\new"), id="escaped backslash"),
        pytest.param(r"'C:\dir\x41\u'", Type(r"C:\dir\x41\u"), id="any other backslash is one"),
        pytest.param(r"'C:\\'", Type("C:\\"), id="backslash at the end"),
        pytest.param(r"'fun\\n'", Type("fun", enter=True), id="literal backslash-n at the end"),
        pytest.param(r"'fun\\\\n'", Type(r"fun\\n"), id="two backslashes and n at the end"),
        pytest.param(r"'\\n'", Type("", enter=True), id="only a literal backslash-n"),
        pytest.param("'a # b'", Type("a # b"), id="number sign"),
        pytest.param("'wait'", Type("wait"), id="the name of an action"),
        pytest.param("'Write Action: wait()'", Type("Write Action: wait()"), id="Action: inside"),
        pytest.param("'a\nwait()\nb'", Type("a\nwait()\nb"), id="a call on its own line inside"),
        pytest.param("'print('a')\n\nprint('b')'", Type("print('a')\n\nprint('b')"), id="unescaped code"),
        pytest.param("'ünï ☃ 漢'", Type("ünï ☃ 漢"), id="other scripts"),
    ],
)
def test_type_types_what_the_model_meant(content: str, typed: Type) -> None:
    assert actions(f"type(content={content})") == (typed,)


@pytest.mark.parametrize("form", ["type(content = {})", "type( content={} )", "type(content={})  # the name"])
def test_type_may_be_written_loosely(form: str) -> None:
    assert actions(form.format("'x'")) == (Type("x"),)


@pytest.mark.parametrize("between", ["\n\n", "\n", "\n\n  \n"], ids=["blank line", "next line", "more blanks"])
def test_several_calls_are_several_actions(between: str) -> None:
    calls = between.join(["click(start_box='(100,200)')", "type(content='it's\\n')", "hotkey(key='ctrl s')"])
    assert actions(calls) == (Click(AT), Type("it's", enter=True), Hotkey(("ctrl", "s")))


def test_each_action_knows_the_text_it_came_from() -> None:
    found = actions("click(start_box='(1,2)')\n\ntype(content='a\n\nb')")
    assert [action.source for action in found] == ["click(start_box='(1,2)')", "type(content='a\n\nb')"]


def test_only_the_last_action_line_counts() -> None:
    prediction = "Thought: a\nAction: click(start_box='(1,2)')\nThought: b\nAction: wait()"
    assert parse(prediction, frame=SCREEN).actions == (Wait(),)


def test_what_follows_an_ending_is_not_looked_at() -> None:
    assert actions("finished()\n\nclick()") == (Finished(),)


@pytest.mark.parametrize(
    ("prediction", "thought"),
    [
        pytest.param("Thought: look\nAction: wait()", "look", id="thought"),
        pytest.param("Thought: a\n\nb ''' \\x\nAction: wait()", "a\n\nb ''' \\x", id="as it stands"),
        pytest.param("Reflection: r Action_Summary: s\nAction: wait()", "s", id="reflection"),
        pytest.param("Action_Summary: s\nAction: wait()", "s", id="summary"),
        pytest.param("Action: wait()", None, id="none"),
        pytest.param("So I wait.\nAction: wait()", None, id="not announced"),
    ],
)
def test_the_thought_is_what_was_said_before_acting(prediction: str, thought: str | None) -> None:
    assert parse(prediction, frame=SCREEN).thought == thought


@pytest.mark.parametrize(
    ("combination", "keys"),
    [
        pytest.param("ctrl c", ("ctrl", "c"), id="blank"),
        pytest.param("ctrl+c", ("ctrl", "c"), id="plus"),
        pytest.param("ctrl + c", ("ctrl", "c"), id="plus and blanks"),
        pytest.param("Ctrl+Shift+T", ("ctrl", "shift", "t"), id="as menus print it"),
        pytest.param("ctrl C", ("ctrl", "C"), id="after a blank case counts, as ever"),
        pytest.param("ctrl +", ("ctrl", "+"), id="the plus key"),
        pytest.param("ctrl++", ("ctrl", "+"), id="the plus key, joined"),
        pytest.param("ctrl+", ("ctrl", "+"), id="the plus key, at the end"),
        pytest.param("+", ("+",), id="the plus key alone"),
        pytest.param("ctrl -", ("ctrl", "-"), id="minus"),
        pytest.param("arrowleft", ("left",), id="arrow alone"),
        pytest.param("ctrl arrowleft", ("ctrl", "left"), id="arrow in a combination"),
        pytest.param("space", (" ",), id="space"),
        pytest.param("ctrl space", ("ctrl", " "), id="space in a combination"),
        pytest.param("Page_Down", ("pagedown",), id="as xdotool spells it"),
        pytest.param("cmd a", ("win", "a"), id="cmd"),
        pytest.param("Return", ("return",), id="return"),
        pytest.param("ESC", ("esc",), id="upper case"),
    ],
)
def test_a_hotkey_holds_the_keys_it_names(combination: str, keys: tuple[str, ...]) -> None:
    assert actions(f"hotkey(key='{combination}')") == (Hotkey(keys),)


def test_every_alias_means_a_key_that_exists() -> None:
    assert set(ALIASES.values()) <= KEYS
    assert {name: key_name(name) for name in ALIASES} == dict(ALIASES)


@given(st.lists(st.sampled_from(sorted(KEYS - {"+", " "})), min_size=1, max_size=4))
def test_keys_written_apart_are_read_as_written(keys: list[str]) -> None:
    assert split_combination(" ".join(keys)) == keys


@pytest.mark.parametrize(
    ("prediction", "code", "fragment"),
    [
        pytest.param("", "no_action", "", id="nothing"),
        pytest.param("I am lost.", "no_action", "I am lost.", id="no Action:"),
        pytest.param("Action: \n ", "no_action", "", id="nothing after Action:"),
        pytest.param("Action: press the button", "not_a_call", "press the button", id="prose"),
        pytest.param("Action: wait.", "not_a_call", "wait.", id="a word and a stop"),
        pytest.param("Action: click(start_box='(1,2)'", "not_a_call", "click(start_box='(1,2)'", id="cut off"),
        pytest.param("Action: click(start_box=f(2))", "bad_argument", "start_box=f", id="nested call"),
        pytest.param("Action: wait() and see", "trailing_text", "and see", id="prose after a call"),
        pytest.param("Action: wait() wait()", "trailing_text", "wait()", id="two calls on a line"),
        pytest.param("Action: type(content='x') now", "trailing_text", "now", id="prose after type"),
        pytest.param("Action: type(content='x", "unterminated", "type(content='x", id="type cut off"),
        pytest.param(
            "Action: type(content='x\nclick(start_box='(1,2)')",
            "unterminated",
            "type(content='x\nclick(start_box='(1,2)')",
            id="a text that runs into the next call",
        ),
        pytest.param("Action: fly(to='x')", "unknown_action", "fly(to='x')", id="unknown action"),
        pytest.param("Action: wait()\nfly()\n\nx", "not_a_call", "x", id="one bad action fails all"),
        pytest.param("Action: click(start_box=5)", "bad_argument", "start_box=5", id="not a string"),
        pytest.param("Action: wait(a='', a='')", "bad_argument", "a=''", id="given twice"),
        pytest.param("Action: click()", "missing_box", "click()", id="click without box"),
        pytest.param("Action: click('(1,2)')", "missing_box", "click('(1,2)')", id="box without name"),
        pytest.param("Action: click(start_box='')", "missing_box", "click(start_box='')", id="empty box"),
        pytest.param("Action: drag(start_box='(1,2)')", "missing_box", "drag(start_box='(1,2)')", id="half a drag"),
        pytest.param("Action: click(start_box='(1)')", "bad_box", "(1)", id="one number"),
        pytest.param("Action: click(start_box='(1,2,3)')", "bad_box", "(1,2,3)", id="three numbers"),
        pytest.param("Action: click(start_box='(1,,2)')", "bad_box", "(1,,2)", id="no number"),
        pytest.param("Action: click(start_box='(nan,inf)')", "bad_box", "(nan,inf)", id="numbers that are none"),
        pytest.param("Action: click(start_box='the OK button')", "bad_box", "the OK button", id="words"),
        pytest.param("Action: hotkey(key='')", "missing_key", "hotkey(key='')", id="no key"),
        pytest.param("Action: hotkey(key='ctrl entr')", "unknown_key", "entr", id="misspelt key"),
        pytest.param("Action: hotkey(key='volumeup')", "unknown_key", "volumeup", id="a key X11 has not"),
        pytest.param("Action: press(key='ctrl c')", "too_many_keys", "press(key='ctrl c')", id="press takes one"),
        pytest.param("Action: type()", "missing_content", "type()", id="nothing to type"),
        pytest.param("Action: scroll()", "missing_direction", "scroll()", id="no direction"),
        pytest.param("Action: scroll(direction='in')", "bad_direction", "in", id="no such direction"),
        pytest.param("Action: wait() \ud83d", "not_text", "\\ud83d", id="half a surrogate pair"),
    ],
)
def test_what_cannot_be_done_says_where_and_why(prediction: str, code: str, fragment: str) -> None:
    error = failure(prediction)
    assert (error.code, error.fragment) == (code, fragment)
    assert repr(fragment) in str(error)


def test_a_misspelt_key_is_told_the_nearest() -> None:
    assert "Did you mean 'pagedown'" in str(failure("Action: press(key='pagedwn')"))


def test_an_unknown_action_is_told_the_known_ones() -> None:
    assert "left_double" in str(failure("Action: fly()"))


@pytest.mark.parametrize(
    "prediction",
    [
        pytest.param("Action: " + "x" * MAX_PREDICTION_BYTES, id="too long"),
        pytest.param("Action: click(" + "(" * 20_000 + ")" * 5_000, id="deep parentheses"),
        pytest.param("Action: " + "a." * 14_000, id="dots"),
        pytest.param("Action: " * 3_700, id="many Action:"),
        pytest.param("Action: type(content='" + "\\'" * 14_000, id="many quotes, never closed"),
        pytest.param("Action: type(content='" + "')\n\n" * 7_000 + "x", id="many ends"),
        pytest.param("Action: click(" + "a='', " * 4_500, id="many arguments"),
        pytest.param("Action: click(start_box='" + "1 " * 14_000 + "')", id="many numbers"),
        pytest.param("Action: click(start_box='" + "9" * 29_000 + ",1')", id="a huge number"),
        pytest.param("Action: hotkey(key='" + "+" * 29_000 + "')", id="many keys"),
    ],
)
@pytest.mark.timeout(5)
def test_a_hostile_prediction_is_refused_quickly(prediction: str) -> None:
    assert failure(prediction).code != "too_long" or len(prediction) > MAX_PREDICTION_BYTES


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")


plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1)


@given(plain_text, st.booleans())
def test_any_text_written_as_the_prompt_asks_is_read_as_meant(text: str, enter: bool) -> None:
    text = f"|{text}|"
    ending = "\\n" if enter else ""
    assert actions(f"type(content='{escaped(text)}{ending}')") == (Type(text, enter=enter),)


@given(plain_text)
def test_what_is_typed_first_does_not_change_what_comes_next(text: str) -> None:
    found = actions(f"type(content='|{escaped(text)}|')\n\nclick(start_box='(100,200)')")
    assert found == (Type(f"|{text}|"), Click(AT))


def test_debians_own_python_reads_the_same() -> None:
    """Regular expressions differ between the releases of 3.11, and this one is what most daemons run on."""
    debians = Path("/usr/bin/python3")
    if not debians.exists():
        pytest.skip("there is no /usr/bin/python3")
    said = [
        "Thought: The button.\nAction: click(start_box='(100,200)')",
        "Action: type(content='it\\'s a.b(c) # d\\n')  # and enter",
        "Action: pyautogui.hotkey(key='ctrl+shift t')\n\nAction: scroll(direction='left', start_box='[1, 2]')",
        'Action: drag(start_box="(1,2)", end_box="<|box_start|>(3,4)<|box_end|>")\n\nwait()',
        "Action: finished(content='x')",
        "no action at all",
    ]
    script = """
import json, sys
from envd.actions.pyautogui import steps
from envd.actions.uitars import Frame, PredictionError, parse
def read(text):
    try:
        return [getattr(step, "code", step) for step in steps(parse(text, frame=Frame(1920, 1080)))]
    except PredictionError as error:
        return str(error)
print(json.dumps([read(text) for text in json.load(sys.stdin)]))
"""
    answers = [
        json.loads(
            subprocess.run(
                [python, "-c", script],
                input=json.dumps(said),
                text=True,
                capture_output=True,
                check=True,
                cwd=Path(__file__).parent.parent,
            ).stdout
        )
        for python in (debians, sys.executable)
    ]
    assert answers[0] == answers[1]
    assert [isinstance(answer, list) for answer in answers[0]] == [True] * 5 + [False]
