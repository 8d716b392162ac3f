"""structlog, set up once by the command line. Nothing else in envd configures logging.

JSON lines when stderr is not a terminal, coloured lines when it is. Everything goes through one stdlib handler that
hands its lines to a thread: whoever logs neither waits for stderr (a pager, a slow disk) nor hears of its troubles (a
full disk, a closed pipe), which would stop the event loop or kill the queue from inside a log call. The last lines are
kept beside (`LINES`), for whoever cannot see stderr.
"""

from __future__ import annotations

import io
import logging
import os
import queue
import select
import sys
import threading
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor

from .telemetry.lines import Keeper, Lines, as_json
from .terminal import printable

LogFormat = Literal["auto", "json", "console"]

LINES_KEPT = 10_000
"""Lines that wait for a stderr that does not take them; what comes on top is lost, and counted."""
FLUSH = 1.0
"""Seconds that the end of the process waits for them."""
LINES = Lines()
"""The last lines of this process. They are kept once `setup` was called."""

TELLTALES = ("botocore", "aiobotocore", "boto3", "hpack", "urllib3")
"""Libraries that at the debug level log what they sign, send and are answered, credentials and tokens included."""


def setup(level: str = "info", fmt: LogFormat = "auto") -> None:
    """Send envd's and its libraries' logs to stderr. Safe to call again: the last call wins."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    # A process that was started without a stderr has None here.
    terminal = sys.stderr is not None and sys.stderr.isatty()
    # Locals in tracebacks would carry secrets into the log.
    tracebacks = structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    )
    renderer: list[Processor]
    if fmt == "json" or (fmt == "auto" and not terminal):
        renderer = [tracebacks, structlog.processors.JSONRenderer(_dumps)]
    else:
        renderer = [
            _printable,
            structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=_traceback, pad_event_to=0),
        ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
    )
    handler = logging.NullHandler() if sys.stderr is None else Outlet(sys.stderr.fileno())
    handler.setFormatter(formatter)
    keeper = Keeper(LINES)
    keeper.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[tracebacks, keeper.take])
    )
    root = logging.getLogger()
    for former in root.handlers[:]:
        root.removeHandler(former)
        former.close()
    root.addHandler(handler)
    root.addHandler(keeper)
    root.setLevel(level.upper())
    for name in TELLTALES:
        logging.getLogger(name).setLevel(max(logging.INFO, root.level))
    logging.captureWarnings(True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _printable(logger: Any, method: str, facts: EventDict) -> EventDict:
    """A guest's words, and a stranger's, are in events and errors: on a terminal they only are to be read."""
    return {name: printable(fact) if isinstance(fact, str) else fact for name, fact in facts.items()}


def _traceback(written: TextIO, exc_info: ExcInfo) -> None:
    told = io.StringIO()
    structlog.dev.plain_traceback(told, exc_info)
    written.write(printable(told.getvalue()))


def for_people(fmt: LogFormat) -> bool:
    """Whether what is logged is read on a terminal as it comes."""
    return fmt != "json" and sys.stderr is not None and sys.stderr.isatty()


class Outlet(logging.Handler):
    """Writes lines to a file descriptor, in order, from a thread of its own. Never blocks and never raises."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str | threading.Event | None] = queue.Queue(LINES_KEPT)
        self._lost = 0
        # A daemon thread, since it may be stuck in a write when the process ends.
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001 - whatever was logged: a line that cannot be told is told of
            line = _dumps({"event": "a log line could not be made", "logger": record.name, "error": repr(error)})
        try:
            if self._lost:
                self._lines.put_nowait(_dumps({"event": "log lines were lost", "lines": self._lost}))
                self._lost = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def flush(self) -> None:
        """Wait until what was logged is written, for `FLUSH` seconds at most. Called at the end of the process."""
        written = threading.Event()
        try:
            self._lines.put(written, timeout=FLUSH)
        except queue.Full:
            return
        written.wait(FLUSH)

    def close(self) -> None:
        super().close()
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            pass

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            if isinstance(line, threading.Event):
                line.set()
                continue
            try:
                _write(self._descriptor, f"{line}\n".encode(errors="backslashreplace"))
            except OSError:
                # The line is lost; the next one may find room again.
                continue


def _write(descriptor: int, line: bytes) -> None:
    """All of `line`, past Python's own stderr object: a thread stuck in its lock would abort the end of the process."""
    while line:
        try:
            line = line[os.write(descriptor, line) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


def _dumps(record: Any, **options: Any) -> str:
    return as_json(record)
