"""`hypercorn envd.asgi:app`, a command of its own. By default it serves in a child of the process that is told to
stop."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from daemon_process import CRASH, DRIVER, Kind, crash, daemon, ended_job, reset, start, watch

KINDS: list[Kind] = ["hypercorn", "hypercorn in-process"]
CRASHED = {"hypercorn": 0, "hypercorn in-process": 70}
"""Exit codes. Hypercorn 0.18 forgets how its only child ended."""
TO_EXIT = 5.0
CLICK = "Thought: The button.\nAction: click(start_box='(100,100)')"


async def test_it_serves_a_reset_a_step_and_the_history(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", kind="hypercorn", env={"ENVD_ACTION_PAUSE": "0"}) as (process, session):
        url = process.url
        async with session.post(f"{url}/env/reset", json={"slot_id": 0, "task_config": {}}) as answer:
            assert (answer.status, (await answer.json())["is_done"]) == (200, False)
        async with session.post(f"{url}/env/step", json={"slot_id": 0, "prediction": CLICK}) as answer:
            assert (answer.status, (await answer.json())["format_reward"]) == (200, 0.0)
        async with session.get(f"{url}/env/history_messages", params={"slot_id": 0}) as answer:
            roles = [message["role"] for message in (await answer.json())["history_messages"]]
        assert roles[-2:] == ["assistant", "user"]


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        pytest.param("hypercorn", signal.SIGTERM, id="child"),
        pytest.param("hypercorn in-process", signal.SIGINT, id="in-process"),
    ],
)
async def test_a_signal_ends_everything_within_five_seconds(
    tmp_path: Path, python: Path, kind: Kind, number: signal.Signals
) -> None:
    env = {"ENVD_SIM": "boot=60"}
    async with daemon(tmp_path / "state", kind=kind, python=python, env=env) as (process, session):
        opened = [asyncio.Event() for _ in range(10)]
        streams = [asyncio.create_task(watch(session, process.url, event)) for event in opened]
        job = await reset(session, process.url)
        poll = asyncio.create_task(session.get(f"{process.url}/v1/jobs/{job['id']}?wait=60&after=100000").__aenter__())
        for event in opened:
            await event.wait()
        _, half = await asyncio.open_connection("127.0.0.1", int(process.url.rpartition(":")[2]))
        half.write(b"POST /v1/prewarm HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
        await half.drain()
        told = process.signal(number)
        assert await process.ended() == 0
        assert time.monotonic() - told < TO_EXIT
        assert [b"event: server-shutdown" in body for body in await asyncio.gather(*streams)] == [True] * 10
        assert (await poll).status in (200, 503)
        assert await process.left_nothing_taken()
        half.close()
        assert "Traceback" not in process.text


async def test_a_signal_to_all_its_processes_leaves_no_desktop(tmp_path: Path) -> None:
    """As systemd stops a service, and as Ctrl-C reaches a terminal's processes."""
    made = tmp_path / "made"
    env = {"INSTANCES": str(made)}
    async with daemon(tmp_path / "state", kind="hypercorn", prelude=DRIVER, env=env) as (process, session):
        await ended_job(session, process.url, (await reset(session, process.url))["id"])
        assert len(list(made.iterdir())) == 1
        process.signal_all(signal.SIGTERM)
        await process.ended()
        assert list(made.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_crash_of_the_queue_ends_the_whole_command(tmp_path: Path, kind: Kind) -> None:
    made = tmp_path / "made"
    env = {"ENVD_ENVS": "2", "INSTANCES": str(made)}
    async with daemon(tmp_path / "state", kind=kind, prelude=DRIVER + CRASH, env=env) as (process, session):
        await ended_job(session, process.url, (await reset(session, process.url))["id"])
        assert len(list(made.iterdir())) == 1
        await crash(session, process.url)
        assert await process.ended() == CRASHED[kind]
        assert list(made.iterdir()) == []
        assert "injected" in process.text
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(process.url.rpartition(":")[2])), timeout=5)


async def test_what_cannot_start_ends_the_whole_command(tmp_path: Path) -> None:
    refused = await start(tmp_path / "state", kind="hypercorn in-process", env={"ENVD_PROT": "1"})
    assert await refused.ended(30) == 1
    assert "did you mean ENVD_PORT" in refused.text


async def test_a_mistake_of_ours_at_the_start_ends_the_whole_command(tmp_path: Path) -> None:
    """Hypercorn would serve on, without a queue."""
    broken = "import envd.service\ndef broken(settings, daemon_id): raise RuntimeError('injected')"
    prelude = f"{broken}\nenvd.service.make_driver = broken"
    refused = await start(tmp_path / "state", kind="hypercorn in-process", prelude=prelude)
    assert await refused.ended(30) == 1
    assert "injected" in refused.text


async def test_two_workers_are_refused_by_the_lock(tmp_path: Path) -> None:
    refused = await start(tmp_path / "state", "--workers", "2", kind="hypercorn")
    await refused.ended(30)
    assert re.search(r"Another envd \(process \d+\) uses", refused.text)
