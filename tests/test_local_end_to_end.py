"""The whole product on real parts: a daemon process, real X11 desktops with Chromium, and clients as existing
trainers are."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
import requests
from daemon_process import daemon, descendants
from PIL import Image

from envd import Client

pytestmark = pytest.mark.local

LOCAL = {"PROVIDER": "local", "ENVD_ACTION_PAUSE": "0.2"}
TASK = {"id": "7b6c7e24", "instruction": "Type a word.", "config": [], "evaluator": {"func": "infeasible"}}


def is_chromium_window(picture: bytes) -> bool:
    """A maximised window on a blank page: white in the middle, and a tab strip that is not."""
    with Image.open(io.BytesIO(picture)) as image:
        rgb = image.convert("RGB")
        return rgb.size == (1920, 1080) and rgb.getpixel((960, 700)) == (255, 255, 255) != rgb.getpixel((960, 20))


def named(pids: list[int], name: str) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == name]


def trainer(url: str, dialect: str) -> list[dict[str, Any]]:
    """A public-protocol client: `requests`, one POST per call, 1200 s; reset, five steps, history. Answers what it
    got."""
    slot = {"slot_id": 0} if dialect == "C" else {}

    def post(path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        answer = requests.post(url + path, json=body, timeout=1200)
        answer.raise_for_status()
        body_: dict[str, Any] = answer.json()
        return body_

    said = [
        "Thought: The address bar.\nAction: click(start_box='(300,63)')",
        "Thought: I type.\nAction: type(content='about:version\\n')",
        "Thought: I wait.\nAction: wait()",
        "Thought: Down.\nAction: scroll(start_box='(960,700)', direction='down')",
        "Thought: Done.\nAction: finished(content='done')",
    ]
    got = [post("/env/reset", {"task_config": TASK | {"domain": "chrome", "task_id": TASK["id"]}, **slot})]
    got += [
        post("/env/step", {"prediction": text, **slot, **({"noise_probability": 0.0} if slot else {})}) for text in said
    ]
    got.append(post("/env/history_messages", slot or None))
    return got


@pytest.mark.parametrize("dialect", ["A", "C"])
async def test_a_trainer_of_the_public_protocol_resets_takes_five_steps_and_reads_the_history(
    tmp_path: Path, dialect: str
) -> None:
    async with daemon(tmp_path / "state", env=LOCAL) as (served, _):
        reset, *steps, history = await anyio.to_thread.run_sync(trainer, served.url, dialect)

    first = pictures(reset["obs_messages"])[-1]
    assert is_chromium_window(first)
    assert [len(step["obs_messages"] or ()) for step in steps] == [5, 7, 9, 11, 0]
    assert [step["is_done"] for step in steps] == [False] * 4 + [True]
    assert {step["format_reward"] for step in steps} == {0.0}
    messages = history["history_messages"]
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "user",
        *["assistant", "user"] * 4,
        "assistant",
    ]
    typed = pictures(messages)[2]
    assert typed != first


def pictures(messages: list[dict[str, Any]]) -> list[bytes]:
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    return [base64.b64decode(part["b64"]) for part in parts]


async def test_the_snippet_of_the_readme_saves_a_picture_of_chromiums_window(tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    async with daemon(tmp_path / "state", env=LOCAL) as (served, _):
        (tmp_path / "try.py").write_text(snippet.replace("http://127.0.0.1:15001", served.url))
        await anyio.run_process([sys.executable, "try.py"], cwd=tmp_path)
    assert is_chromium_window((tmp_path / "desktop.png").read_bytes())


async def test_the_first_observation_shows_chromiums_window(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=LOCAL) as (served, _), Client(served.url) as client:
        for number in range(5):
            await client.reset({"id": str(number)})
            assert is_chromium_window(await client.screenshot(0))


@pytest.mark.parametrize("name", ["chrome", "Xvfb"])
async def test_killing_a_part_of_a_ready_desktop_is_reported_within_two_seconds_and_the_next_reset_works(
    tmp_path: Path, name: str
) -> None:
    async with daemon(tmp_path / "state", env=LOCAL) as (served, session), Client(served.url) as client:
        await client.reset({"id": "a"})
        victims = named(descendants(served.pid), name)
        assert victims
        expected = "chrome gone" if name == "chrome" else "lost"
        async with session.get(f"{served.url}/v1/events") as stream:
            await stream.content.readuntil(b"\n\n")  # the snapshot: we are listening
            killed = time.monotonic()
            os.kill(min(victims), signal.SIGKILL)
            async with asyncio.timeout(10):
                await until(stream, lambda line: b'"state":"' + expected.encode() in line)
            took = time.monotonic() - killed
        assert took < 2
        await client.reset({"id": "b"})
        assert is_chromium_window(await client.screenshot(0))


async def until(stream: aiohttp.ClientResponse, wanted: Callable[[bytes], bool]) -> None:
    async for line in stream.content:
        if wanted(line):
            return
    raise EOFError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_invariant_5_no_process_of_a_desktop_survives_the_daemon(tmp_path: Path, number: signal.Signals) -> None:
    async with daemon(tmp_path / "state", env=LOCAL | {"ENVD_ENVS": "2"}) as (served, _), Client(served.url) as client:
        await client.reset({"id": "a"}, env=0)
        await client.reset({"id": "b"}, env=1)
        inside = descendants(served.pid)
        assert len(named(inside, "Xvfb")) == 2
        handles = [os.pidfd_open(pid) for pid in inside]
        served.signal(number)
        await served.ended()
        async with asyncio.timeout(10):
            await asyncio.gather(*(death_of(handle) for handle in handles))


async def death_of(handle: int) -> None:
    """Return when the process behind a pidfd is dead; it is readable then."""
    await anyio.wait_readable(handle)
    os.close(handle)


async def test_text_that_no_keyboard_has_is_typed(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=LOCAL) as (served, session), Client(served.url) as client:
        await client.reset({"id": "a"})
        env = client.env(0)
        page = "data:text/html,<textarea autofocus></textarea>"
        await env.act("pyautogui.hotkey('ctrl', 'l')")
        await env.step(f"Thought: The page.\nAction: type(content='{page}\\n')")
        desktop = (await env.state()).desktop
        await page_at(session, desktop, "data:")
        text = "Grüße <b>, 世界 & C:\\new"
        result = await env.step(f"Thought: I type.\nAction: type(content='{text.replace(chr(92), chr(92) * 2)}')")
        assert [action.outcome for action in result.actions] == ["ok"], result.actions
        assert await textarea(session, desktop) == text


async def page_at(session: aiohttp.ClientSession, desktop: Any, url: str) -> dict[str, Any]:
    """The page whose address begins with `url`, as soon as Chromium shows one."""
    async with asyncio.timeout(20):
        while True:
            async with session.get(f"{desktop.endpoints.cdp}/json/list") as answer:
                for target in await answer.json(content_type=None):
                    if target["type"] == "page" and target["url"].startswith(url):
                        return dict(target)


async def textarea(session: aiohttp.ClientSession, desktop: Any) -> str:
    page = await page_at(session, desktop, "data:")
    async with session.ws_connect(page["webSocketDebuggerUrl"]) as socket:
        expression = "document.querySelector('textarea').value"
        await socket.send_json({"id": 1, "method": "Runtime.evaluate", "params": {"expression": expression}})
        answer = await socket.receive_json()
    value: str = answer["result"]["result"]["value"]
    return value
