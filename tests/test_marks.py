"""What a step did, as marks on the screen that it was done on: where, whereto, which way, what was typed."""

from __future__ import annotations

import pytest

from envd.actions.marks import MOST, Mark, marks_for
from envd.actions.uitars import Frame

SCREEN = Frame(1920, 1080)
"""Shown to models at 1932×1092."""


def marks(said: str, *actions: str) -> list[Mark]:
    return marks_for(said, actions, SCREEN)


@pytest.mark.parametrize(
    ("action", "mark"),
    [
        pytest.param("click(start_box='(966,546)')", Mark("click", (960.0, 540.0)), id="click"),
        pytest.param(
            "right_single(start_box='(966,546)')", Mark("click", (960.0, 540.0), text="right"), id="right click"
        ),
        pytest.param("left_double(start_box='(966,546)')", Mark("double", (960.0, 540.0)), id="double click"),
        pytest.param(
            "drag(start_box='(0,0)', end_box='(966,546)')", Mark("drag", (0.0, 0.0), (960.0, 540.0)), id="drag"
        ),
        pytest.param(
            "scroll(direction='left', start_box='(966,546)')",
            Mark("scroll", (960.0, 540.0), text="left"),
            id="scroll sideways",
        ),
        pytest.param("type(content='hi\\n')", Mark("type", text="hi\n"), id="type and enter"),
        pytest.param("hotkey(key='ctrl s')", Mark("keys", text="ctrl+s"), id="hotkey"),
        pytest.param("wait()", Mark("wait"), id="wait"),
        pytest.param("finished(content='it is there')", Mark("end", text="finished it is there"), id="finished"),
    ],
)
def test_a_prediction_is_marked_where_it_was_carried_out(action: str, mark: Mark) -> None:
    assert marks(f"Thought: so.\nAction: {action}", action) == [mark]


@pytest.mark.parametrize(
    ("program", "found"),
    [
        pytest.param("pyautogui.click(3, 4)", [Mark("click", (3.0, 4.0))], id="click"),
        pytest.param("pyautogui.doubleClick(3, 4)", [Mark("double", (3.0, 4.0))], id="double click"),
        pytest.param("pyautogui.rightClick(3, 4)", [Mark("click", (3.0, 4.0), text="right")], id="right click"),
        pytest.param("pyautogui.moveTo(3, 4)", [Mark("hover", (3.0, 4.0))], id="move"),
        pytest.param(
            "pyautogui.moveTo(3, 4)\npyautogui.dragTo(30, 40)", [Mark("drag", (3.0, 4.0), (30.0, 40.0))], id="drag"
        ),
        pytest.param("pyautogui.scroll(-5, x=3, y=4)", [Mark("scroll", (3.0, 4.0), text="down")], id="scroll"),
        pytest.param(
            "pyautogui.click(3, 4)\npyautogui.click(5, 6)",
            [Mark("click", (3.0, 4.0)), Mark("click", (5.0, 6.0))],
            id="two clicks",
        ),
        pytest.param("pyautogui.write('hi')", [Mark("program", text="pyautogui.write('hi')")], id="typing"),
        pytest.param("print(open('x'))", [Mark("program", text="print(open('x'))")], id="any program"),
        pytest.param("DONE", [Mark("end", text="DONE")], id="done"),
        pytest.param("WAIT", [Mark("wait")], id="wait"),
    ],
)
def test_a_program_is_marked_where_it_is_known_what_it_does(program: str, found: list[Mark]) -> None:
    assert marks(program, program) == found


def test_there_are_never_more_marks_than_anybody_could_tell_apart() -> None:
    program = "\n".join(f"pyautogui.click({place}, 4)" for place in range(200))
    assert len(marks(program, program)) == MOST
    assert len(Mark("type", text="x" * 5000).as_json["text"]) == 200
