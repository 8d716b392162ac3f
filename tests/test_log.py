"""The log: JSON lines that neither stop nor break whoever writes them."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest
from daemon_process import environment

from envd import log
from envd.daemon import bound

PROGRAM = """
import logging, warnings
import structlog
from envd import log
log.setup(fmt={fmt!r})
logger = structlog.get_logger("test")
{body}
"""


def lines_of(body: str, fmt: str = "json") -> list[str]:
    """What a process that runs `body` writes to stderr."""
    program = PROGRAM.format(body=body, fmt=fmt)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    ).stderr.splitlines()


def test_every_kind_of_line_is_json() -> None:
    body = """
logger.info("facts", nan=float("nan"), path=logging, text="two\\nlines \\ud800")
logging.getLogger("a.library").warning("said %s", "so", extra={"count": 1})
warnings.warn("old", DeprecationWarning)
class Unspeakable:
    def __str__(self): raise RuntimeError("no words")
logger.info("odd", thing=Unspeakable())
logger.debug("quiet")
"""
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines_of(body)]
    assert [record["event"] for record in records][:2] == ["facts", "said so"]
    assert (records[0]["nan"], records[0]["text"], records[1]["count"]) == ("NaN", "two\nlines \ud800", 1)
    assert "DeprecationWarning" in records[2]["event"]
    assert records[3] == {
        "event": "a log line could not be made",
        "logger": "test",
        "error": "RuntimeError('no words')",
    }
    assert len(records) == 4


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_a_traceback_shows_no_locals(fmt: str) -> None:
    body = """
def fail(password):
    raise ValueError("wrong")
try:
    fail("hunter" + str(2))
except ValueError:
    logger.exception("refused")
"""
    text = "\n".join(lines_of(body, fmt))
    assert "ValueError" in text
    assert "wrong" in text
    assert "hunter2" not in text


def test_on_a_terminal_a_line_does_not_steer_it() -> None:
    body = r"""
evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp"
logger.info(evil, path=evil, several=[evil], a=evil + " b")
logging.getLogger("lib").warning("of a library %s", evil)
try:
    raise ValueError(evil)
except ValueError:
    logger.exception("broke")
"""
    lines = lines_of(body, "console")
    assert sum("owned" in line for line in lines) >= 3
    assert [line for line in lines if re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", line)] == []


@contextmanager
def broken_stderr(kind: str) -> Iterator[int]:
    """A descriptor to write to that takes nothing."""
    if kind == "full disk":
        with open("/dev/full", "wb") as full:
            yield full.fileno()
        return
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    try:
        yield writer
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("kind", ["full disk", "reader asleep", "none at all"])
async def test_the_daemon_serves_whatever_became_of_stderr(tmp_path: Path, kind: str) -> None:
    with bound("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    close = 'exec "$@" 2>&-' if kind == "none at all" else 'exec "$@"'
    serve = ["sh", "-c", close, "sh", sys.executable, "-m", "envd", "serve", "--port", str(port)]
    env = environment(tmp_path / "state", {"ENVD_LOG_LEVEL": "debug"})
    with broken_stderr(kind) as stderr:
        process = await asyncio.create_subprocess_exec(*serve, env=env, cwd=tmp_path, stderr=stderr)
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
                await answers(session, f"http://127.0.0.1:{port}/livez")
                for _ in range(100):  # more than a pipe holds
                    async with session.get(f"http://127.0.0.1:{port}/version") as answer:
                        assert answer.status == 200
            process.terminate()
            async with asyncio.timeout(5):
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def answers(session: aiohttp.ClientSession, url: str) -> None:
    """Return when somebody answers there."""
    async with asyncio.timeout(30):
        while True:
            try:
                async with session.get(url):
                    return
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.05)


async def test_a_setting_that_cannot_be_told_still_has_its_exit_code(tmp_path: Path) -> None:
    with broken_stderr("full disk") as stderr:
        env = environment(tmp_path / "state", {"PROVIDER": "nobody"})
        refused = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "envd", "serve", env=env, cwd=tmp_path, stderr=stderr
        )
        assert await refused.wait() == 78


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, __file__, 1, text, None, None)


def test_lines_that_found_no_room_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "LINES_KEPT", 10)
    monkeypatch.setattr(log, "FLUSH", 0.05)
    reader, writer = os.pipe()
    outlet = log.Outlet(writer)
    for _ in range(200):
        outlet.emit(record("x" * 8192))
    outlet.flush()  # gives up: nobody reads
    seen = b""
    while b"were lost" not in seen:
        seen += os.read(reader, 65536)
        outlet.emit(record("more"))
    lost = json.loads(next(line for line in seen.split(b"\n") if b"were lost" in line))
    assert lost["event"] == "log lines were lost"
    assert lost["lines"] > 0
    outlet.close()


def test_a_reader_that_left_costs_lines_and_nothing_else() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    outlet = log.Outlet(writer)
    outlet.emit(record("nobody reads this"))
    outlet.flush()
    outlet.close()
    os.close(writer)


def test_lines_come_in_order_and_flushing_waits_for_them() -> None:
    reader, writer = os.pipe()
    outlet = log.Outlet(writer)
    for number in range(500):
        outlet.emit(record(str(number)))
    outlet.flush()
    outlet.close()
    os.close(writer)
    with open(reader) as written:
        assert written.read().split() == [str(number) for number in range(500)]
