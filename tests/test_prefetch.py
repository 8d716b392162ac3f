"""`envd tasks prefetch`, from task files to the cache."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from files_server import FilesServer, files_server, pauses
from rich.console import Console

from envd.settings import Settings
from envd.tasks.prefetch import prefetch
from envd.tasks.unreachable import ROUNDS, HostGivenUp, Unreachable


def task(tmp_path: Path, name: str, *urls: str, expected: str = "") -> Path:
    """A task file that downloads `urls`, and whose expected file is at `expected`."""
    steps = [{"type": "download", "parameters": {"files": [{"url": url, "path": "/tmp/x"} for url in urls]}}]
    raw: dict[str, Any] = {"id": name, "instruction": "…", "config": steps if urls else []}
    if expected:
        gold = {"type": "cloud_file", "path": expected, "dest": "gold"}
        result = {"type": "vm_file", "path": "/x", "dest": "x"}
        raw["evaluator"] = {"func": "compare_text_file", "result": result, "expected": gold}
    path = tmp_path / "tasks" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(raw))
    return path.parent


async def run(folder: Path, state_dir: Path, *, terminal: bool = False, **settings: Any) -> tuple[int, str]:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, markup=False, highlight=False)
    code = await prefetch([folder], Settings(state_dir=state_dir, **settings), console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture(params=["refuses", "unknown"])
def dead_host(request: pytest.FixtureRequest, unused_port: int) -> str:
    return f"127.0.0.1:{unused_port}" if request.param == "refuses" else "no-such-host.invalid"


def filled(server: FilesServer, *names: str) -> list[str]:
    server.files |= {f"/{name}": name.encode() * 1000 for name in names}
    return [server.url(f"/{name}") for name in names]


@pytest.mark.parametrize("terminal", [pytest.param(False, id="lines"), pytest.param(True, id="terminal")])
async def test_each_file_of_all_tasks_is_downloaded_once(tmp_path: Path, terminal: bool) -> None:
    async with files_server() as server:
        a, b, gold = filled(server, "a", "b", "gold")
        task(tmp_path, "one", a, b)
        folder = task(tmp_path, "two", a, expected=gold)
        first = await run(folder, tmp_path, terminal=terminal)
        second = await run(folder, tmp_path, terminal=terminal)
    assert first[0] == second[0] == 0
    assert sorted(path for path, _ in server.seen) == ["/a", "/b", "/gold"]
    assert "2 task files need 3 files: 3 downloaded (6.0 kB), 0 already there, 0 missing." in first[1]
    assert "2 task files need 3 files: 0 downloaded (0 bytes), 3 already there, 0 missing." in second[1]


async def test_what_is_missing_is_listed_with_its_reason(tmp_path: Path) -> None:
    async with files_server() as server:
        (a,) = filled(server, "a")
        code, told = await run(task(tmp_path, "one", a, server.url("/none\x1b[2J")), tmp_path)
    assert code == 1
    assert "answered 404 Not Found" in told
    assert "1 downloaded (1.0 kB), 0 already there, 1 missing." in told
    assert "Check the URL in the task file" in told
    assert "\x1b" not in told


async def test_a_task_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    async with files_server() as server:
        folder = task(tmp_path, "one", *filled(server, "a"))
        (folder / "broken.json").write_text("{")
        code, told = await run(folder, tmp_path)
    assert code == 1
    assert "not read" in told
    assert "broken.json" in told
    assert "1 downloaded" in told


@pytest.mark.parametrize(
    ("below", "told"),
    [
        pytest.param("", "No task files found.\n", id="empty folder"),
        pytest.param("none", "cannot be read: No such file or directory\nNo task files found.\n", id="nothing there"),
    ],
)
async def test_no_task_file_is_told(tmp_path: Path, below: str, told: str) -> None:
    code, said = await run(tmp_path / below, tmp_path / "state")
    assert code == 2
    assert said.endswith(told)


async def test_a_path_that_is_not_there_counts_as_no_task_file(tmp_path: Path) -> None:
    async with files_server() as server:
        folder = task(tmp_path, "one", *filled(server, "a"))
        console = Console(file=io.StringIO(), width=200)
        code = await prefetch([folder, tmp_path / "none"], Settings(state_dir=tmp_path), console)
    assert isinstance(console.file, io.StringIO)
    assert code == 1
    assert console.file.getvalue().endswith(
        "1 task file needs 1 file: 1 downloaded (1.0 kB), 0 already there, 0 missing.\n"
    )


async def test_a_host_that_cannot_be_reached_is_given_up_for_all_its_files(tmp_path: Path, dead_host: str) -> None:
    async with files_server() as server:
        urls = [f"http://{dead_host}/{number}" for number in range(60)]
        folder = task(tmp_path, "one", *urls, *filled(server, "a", "b"))
        async with asyncio.timeout(20):  # each on its own: 2.5 s, four at once
            code, told = await run(folder, tmp_path)
    lines = told.splitlines()
    assert code == 1
    assert [line.split("/")[0].strip() for line in lines[:62]] == [str(number) for number in range(1, 63)]
    assert "1 task file needs 62 files: 2 downloaded (2.0 kB), 0 already there, 60 missing." in lines[62]
    assert lines[63].startswith(f"host {dead_host}: 60 files: ")
    assert lines[64].startswith("Check this host's network, or name a folder")
    assert len(lines) == 65


async def test_requests_that_fail_together_are_one_failure_and_an_answer_forgets_them(unused_port: int) -> None:
    async def empty(_: web.BaseRequest) -> web.Response:
        return web.Response()

    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, middlewares=(Unreachable(),)) as session:
        url = f"http://127.0.0.1:{unused_port}/a"
        for _ in range(ROUNDS - 1):
            failed = await asyncio.gather(*(session.get(url) for _ in range(8)), return_exceptions=True)
            assert {type(error) for error in failed} == {aiohttp.ClientConnectorError}
        async with RawTestServer(empty, port=unused_port), session.get(url) as response:
            assert response.status == 200
        for expected in (*[aiohttp.ClientConnectorError] * (ROUNDS - 1), HostGivenUp, HostGivenUp):
            with pytest.raises(expected):
                await session.get(url)


async def test_more_than_the_cache_may_hold_is_told(tmp_path: Path) -> None:
    async with files_server() as server:
        names = [f"{number}" for number in range(12)]
        folder = task(tmp_path, "one", *filled(server, *names))
        server.files = {path: content[:1] * 300_000 for path, content in server.files.items()}
        server.files["/10"], server.files["/11"] = b"x" * 300_000, b"y" * 300_000
        code, told = await run(folder, tmp_path, asset_limit=1024**2)
    assert code == 1
    assert "the cache is full (1.0 MB)" in told
    assert told.endswith("\nRaise ENVD_ASSET_LIMIT.\n")


async def test_offline_tells_what_is_missing(tmp_path: Path) -> None:
    async with files_server() as server:
        a, b = filled(server, "a", "b")
        await run(task(tmp_path, "one", a), tmp_path)
        code, told = await run(task(tmp_path, "two", b), tmp_path, offline=True)
    assert code == 1
    assert "0 downloaded (0 bytes), 1 already there, 1 missing." in told
    assert "Unset ENVD_OFFLINE, or name a folder" in told
    assert "tasks prefetch" not in told


async def test_ctrl_c_ends_it_and_the_next_run_continues(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path; from envd.settings import Settings\n"
        "from envd.tasks.prefetch import prefetch\n"
        "asyncio.run(prefetch([Path(sys.argv[1])], Settings(state_dir=Path(sys.argv[2]))))"
    )
    async with files_server() as server:
        a, b = filled(server, "a", "b")
        folder = task(tmp_path, "one", a, b)
        server.faults.extend([pauses, pauses])
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(folder), str(tmp_path), stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(30):
            await server.asked(2)
            os.kill(process.pid, signal.SIGINT)
            _, told = await process.communicate()
            await server.left.wait()
        again = await run(folder, tmp_path)
    assert b"Stopped. What was downloaded stays" in told
    assert process.returncode not in (0, None)
    assert again[0] == 0


async def test_it_may_run_beside_a_daemon(tmp_path: Path) -> None:
    async with files_server() as server:
        folder = task(tmp_path, "one", *filled(server, *"abcdefgh"))
        runs = await asyncio.gather(*(run(folder, tmp_path) for _ in range(3)))
    assert [code for code, _ in runs] == [0, 0, 0]
    assert list((tmp_path / "assets" / "parts").glob("*.part")) == []
