"""The conversation on the wire: the messages that trainers were written for, in their order."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envd.actions import dialogue
from envd.actions.dialogue import DEFAULT_TEMPLATE, SYSTEM_TEXT, Dialogue, PromptTemplate, WireMessage, add_box_token

TEMPLATE = PromptTemplate("Do this: {instruction}\n")
FIRST, SECOND = b"\x89PNG first", b"\x89PNG second"


def text(role: str, content: str) -> WireMessage:
    return {"role": role, "content": [{"type": "text", "text": content}]}


def image(data: bytes, min_pixels: int = 3136, max_pixels: int = 2_116_800) -> WireMessage:
    b64 = base64.b64encode(data).decode()
    return {
        "role": "user",
        "content": [{"type": "image", "b64": b64, "min_pixels": min_pixels, "max_pixels": max_pixels}],
    }


def after_one_step() -> Dialogue:
    talk = Dialogue("open é", template=TEMPLATE)
    talk.saw(FIRST)
    talk.said("Thought: x\nAction: click(start_box='(1,2)')")
    talk.saw(SECOND)
    return talk


def test_the_system_text_keeps_its_typo() -> None:
    assert SYSTEM_TEXT == "Your are a helpful assistant."
    assert len(SYSTEM_TEXT) == 29


def test_a_reset_gives_three_messages_and_a_step_two_more() -> None:
    talk = after_one_step()
    assert len(talk) == 5
    assert talk.to_wire() == [
        text("system", SYSTEM_TEXT),
        text("user", "Do this: open é\n"),
        image(FIRST),
        text("assistant", "Thought: x\nAction: click(start_box='<|box_start|>(1,2)<|box_end|>')"),
        image(SECOND),
    ]


def test_the_pixels_we_advertise_go_with_every_image() -> None:
    talk = Dialogue("", template=TEMPLATE, min_pixels=28, max_pixels=518_400)
    talk.saw(FIRST)
    assert talk.to_wire()[2] == image(FIRST, 28, 518_400)


def test_the_screenshots_are_the_files_that_were_seen() -> None:
    assert after_one_step().screenshots == (FIRST, SECOND)


def test_an_image_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = after_one_step()
    encode, encoded = base64.b64encode, []

    def counted(data: bytes) -> bytes:
        encoded.append(data)
        return encode(data)

    monkeypatch.setattr(base64, "b64encode", counted)
    for _ in range(3):
        talk.to_wire()
        talk.wire_json()
    assert encoded == [FIRST, SECOND]


def test_changing_what_was_given_out_does_not_change_the_history() -> None:
    talk = after_one_step()
    talk.to_wire()[0]["content"].clear()
    assert talk.to_wire()[0] == text("system", SYSTEM_TEXT)


@given(st.text(), st.text(), st.binary(), st.integers(1, 10**6))
def test_the_json_is_that_of_the_messages(instruction: str, prediction: str, screenshot: bytes, pixels: int) -> None:
    talk = Dialogue(instruction, template=TEMPLATE, min_pixels=pixels)
    talk.saw(screenshot)
    talk.said(prediction)
    assert talk.wire_json().isascii()
    assert json.loads(talk.wire_json()) == talk.to_wire()


@pytest.mark.parametrize(
    ("prediction", "kept"),
    [
        pytest.param(
            "Action: drag(start_box='(1,2)', end_box='(3,4)')",
            "Action: drag(start_box='<|box_start|>(1,2)<|box_end|>', end_box='<|box_start|>(3,4)<|box_end|>')",
            id="both boxes",
        ),
        pytest.param(
            "Thought: t\nAction: click(start_box='(1,2)')\nAction: wait()\n",
            "Thought: t\nAction: click(start_box='<|box_start|>(1,2)<|box_end|>')\n\nwait()",
            id="several Action: are joined by a blank line",
        ),
        pytest.param("Action: click(start_box='(1.5,2)')", None, id="float"),
        pytest.param("Action: click(start_box='(1, 2)')", None, id="blank after the comma"),
        pytest.param("Action: click(start_box='(1,2,3,4)')", None, id="four numbers"),
        pytest.param("Action:click(start_box='(1,2)')", None, id="no blank after Action:"),
        pytest.param("Action: wait()\n", None, id="no box"),
        pytest.param("I am lost. ", None, id="no action"),
        pytest.param("Action: click(start_box='<|box_start|>(1,2)<|box_end|>')", None, id="tokens already there"),
    ],
)
def test_boxes_get_their_tokens_back_as_upstream_does_it(prediction: str, kept: str | None) -> None:
    assert add_box_token(prediction) == (prediction if kept is None else kept)


SIGNATURES = [
    "click(start_box='<|box_start|>(x1,y1)<|box_end|>')",
    "left_double(start_box='<|box_start|>(x1,y1)<|box_end|>')",
    "right_single(start_box='<|box_start|>(x1,y1)<|box_end|>')",
    "drag(start_box='<|box_start|>(x1,y1)<|box_end|>', end_box='<|box_start|>(x3,y3)<|box_end|>')",
    "hotkey(key='')",
    "type(content='xxx')",
    "scroll(start_box='<|box_start|>(x1,y1)<|box_end|>', direction='down or up or right or left')",
    "wait()",
    "finished(content='xxx')",
]


def test_our_prompt_offers_the_nine_calls() -> None:
    offered = [line.split("  #")[0] for line in DEFAULT_TEMPLATE.text.splitlines()]
    assert [line for line in offered if line.endswith(")")] == SIGNATURES


def test_our_prompt_ends_with_the_task() -> None:
    assert DEFAULT_TEMPLATE.fill("close it").endswith("\nclose it\n")
    assert not DEFAULT_TEMPLATE.matches_published


def test_braces_are_only_text() -> None:
    template = PromptTemplate("{a} {{b}} {instruction} %s")
    assert template.fill("{instruction} {0} \\1 {") == "{a} {{b}} {instruction} {0} \\1 { %s"


def test_a_template_file_is_taken_as_it_stands(tmp_path: Path) -> None:
    content = "Zeile é\r\n{instruction}\r\n".encode()
    (tmp_path / "prompt.txt").write_bytes(content)
    template = PromptTemplate.load(tmp_path / "prompt.txt")
    assert (template.text.encode(), template.sha256) == (content, hashlib.sha256(content).hexdigest())


def test_the_published_prompt_is_recognised_by_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not TEMPLATE.matches_published
    monkeypatch.setattr(dialogue, "PUBLISHED_SHA256", hashlib.sha256(TEMPLATE.text.encode()).hexdigest())
    assert TEMPLATE.matches_published


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(b"no place", "exactly once, and this one has it 0 times", id="no placeholder"),
        pytest.param(b"{instruction} {instruction}", "has it 2 times", id="two placeholders"),
        pytest.param(b"\xff{instruction}", "utf-8", id="not UTF-8"),
        pytest.param(None, "No such file", id="no file"),
    ],
)
def test_a_template_of_no_use_names_its_file(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"prompt\.txt.*{why}"):
        PromptTemplate.load(path)
