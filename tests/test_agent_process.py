"""The guest agent as a process: how it starts, how it ends, and what it takes with it."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from agent_desktop import (
    PREFIX,
    RunningAgent,
    agent_process,
    alive,
    children,
    client,
    environment,
    running,
    until,
    written,
    x_server,
)

pytestmark = pytest.mark.local


@pytest.fixture
def desktop(tmp_path: Path) -> Iterator[RunningAgent]:
    with x_server("320x240") as display, agent_process(environment(display, tmp_path)) as agent:
        yield agent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_whatever_ends_the_agent_ends_its_interpreter_and_commands(
    number: signal.Signals, desktop: RunningAgent, tmp_path: Path
) -> None:
    async with client(desktop.url) as guest:
        ran_by, _ = await guest.program(PREFIX + "pyautogui.moveTo(1, 1)")
        program = asyncio.create_task(guest.program(PREFIX + "time.sleep(60)"))
        command = asyncio.create_task(
            guest.post("/execute", command=f"echo $$ > {tmp_path}/pid; exec sleep 60", shell=True)
        )
        pid = int(await until(written(tmp_path / "pid")))
        mine = children(desktop.process.pid)
        await until(lambda: any(children(child) for child in mine))
        theirs = [pid, *mine, *(grandchild for child in mine for grandchild in children(child))]
        desktop.process.send_signal(number)
        await until(lambda: desktop.process.poll() is not None, 1)
        await until(lambda: not any(map(alive, theirs)), 2)
        await asyncio.gather(program, command, return_exceptions=True)
    assert (ran_by, len(theirs) >= 3) == ("warm", True)


async def test_what_was_launched_outlives_the_agent(desktop: RunningAgent, tmp_path: Path) -> None:
    async with client(desktop.url) as guest:
        await guest.post("/setup/launch", command=["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60"])
    pid = int(await until(written(tmp_path / "pid")))
    desktop.process.terminate()
    await until(lambda: desktop.process.poll() is not None)
    survived = alive(pid)
    os.kill(pid, signal.SIGKILL)
    assert survived


async def test_a_port_in_use_is_named_and_ends_the_agent(desktop: RunningAgent) -> None:
    port = desktop.url.rpartition(":")[2]
    argv = ["python", "-m", "envd.agent", "--port", port]
    second = await asyncio.to_thread(subprocess.run, argv, env=desktop.env, capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    assert f"127.0.0.1:{port}" in second.stderr
    assert "Traceback" not in second.stderr


async def test_an_inherited_socket_holds_requests_until_the_agent_serves_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port, number = held.getsockname()[1], str(held.fileno())
        async with client(f"http://127.0.0.1:{port}") as guest:
            early = asyncio.create_task(guest.get("/platform"))
            argv = [sys.executable, "-m", "envd.agent", "--fd", number]
            with running(argv, env=environment(":9999", tmp_path), pass_fds=[held.fileno()]):
                assert await early == (200, "Linux")


async def test_without_an_x_server_the_agent_still_answers(tmp_path: Path) -> None:
    with agent_process(environment(":9999", tmp_path)) as agent:
        async with client(agent.url) as guest:
            terminal = await guest.get("/terminal")
            _, about = await guest.get("/")
            _, ran = await guest.post("/execute", command=["echo", "here"])
            ran_by, program = await guest.program(PREFIX + "pyautogui.click(1, 1)")
    assert terminal == (200, {"output": None, "status": "success"})
    assert (ran["output"], ran_by, program["returncode"]) == ("here\n", "process", 1)
    assert ":9999" in about["screen"]["error"]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
async def test_a_recording_begins_ends_and_is_handed_over(desktop: RunningAgent) -> None:
    async with client(desktop.url) as guest:
        early, _ = await guest.post("/end_recording")
        begun = await guest.post("/start_recording")
        twice, _ = await guest.post("/start_recording")
        await asyncio.sleep(1)  # something to record
        status, video = await guest.post("/end_recording")
        again, _ = await guest.post("/end_recording")
    assert (early, begun[0], twice, status, again) == (400, 200, 400, 200, 400)
    assert video[4:8] == b"ftyp"


async def test_the_accessibility_tree_shows_what_the_browser_shows(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<title>A page</title><h1>Big words</h1><button>Press me</button>")
    flags = "--no-sandbox --disable-background-networking --disable-component-update --disable-sync --no-first-run"
    ours = f"--disable-gpu --force-renderer-accessibility --user-data-dir={tmp_path}/profile"
    states = "{https://accessibility.ubuntu.example.org/ns/state}"
    places = "{https://accessibility.ubuntu.example.org/ns/component}"
    bus = ["dbus-daemon", "--session", "--nofork", "--print-address"]
    with x_server() as display, running(bus, env=environment(display, tmp_path), stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        address = daemon.stdout.readline().decode().strip()
        env = environment(display, tmp_path) | {"DBUS_SESSION_BUS_ADDRESS": address, "ACCESSIBILITY_ENABLED": "1"}
        with agent_process(env) as agent, running(["chromium", *flags.split(), *ours.split(), str(page)], env=env):
            async with client(agent.url) as guest:
                buttons: list[ElementTree.Element] = []
                async with asyncio.timeout(60):
                    while not buttons:
                        status, answer = await guest.get("/accessibility")
                        if status == 200:
                            tree = ElementTree.fromstring(answer["AT"])
                            buttons = [node for node in tree.iter("push-button") if node.get("name") == "Press me"]
                terminal = await guest.get("/terminal")
    assert (tree.tag, answer["truncated"], terminal[1]["output"]) == ("desktop-frame", False, None)
    assert (buttons[0].get(f"{states}enabled"), buttons[0].get(f"{places}screencoord", "")[:1]) == ("true", "(")
    assert "Big words" in [node.get("name") for node in tree.iter("heading")]
