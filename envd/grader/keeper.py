"""Guards one grading: its deadline, its log, its disk space, and that nothing of it is left behind.

The keeper is a small process between the zygote and the worker. It runs none of the evaluators' code, so whatever
becomes of the worker, there is someone to say so.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from . import frames, jail, worker
from .library import Library

REQUEST_SECONDS = 10
LOG_BYTES = 1024 * 1024
LOG_TAIL = 8 * 1024
DISK_BYTES = 2 * 1024**3
DISK_SECONDS = 1.0
DIRECTORIES = ("cache", "values", "tmp", "home")


def keep(connection: socket.socket, life: int, gradings: Path, place: Path | None, library: Library) -> None:
    """Serve one grading that is asked for over `connection`; closing it cancels. `life` is a pipe that ends with the
    zygote. `place` is where a grading sees its directory; None without a sandbox. Returns when all of it has ended."""
    started = time.monotonic()
    connection.settimeout(REQUEST_SECONDS)
    request = frames.receive(connection.recv)
    if request is None:
        return
    workdir = gradings / request["workdir"]
    if workdir.parent != gradings or not workdir.is_dir():
        raise ValueError(f"{request['workdir']!r} is no directory of gradings")
    for name in DIRECTORIES:
        (workdir / name).mkdir(mode=0o700, exist_ok=True)
    jail.adopt_orphans()
    separated = place is not None and jail.separate(gradings, workdir, place)
    root = place if separated and place is not None else workdir
    with _Guard(request, root, separated, library) as guard:
        report = guard.watch(connection, life)
    if report is not None:
        report["seconds"] = {"total": round(time.monotonic() - started, 4)}
        report["separated"] = separated
        with contextlib.suppress(OSError):  # the daemon has gone
            connection.settimeout(REQUEST_SECONDS)
            connection.sendall(_packed(report))


class _Guard:
    """The worker's process, its log and its report. Leaving it ends them."""

    def __init__(self, request: dict[str, Any], root: Path, separated: bool, library: Library) -> None:
        self._request = request
        self._root = root
        self._separated = separated
        self._library = library
        self._progress: dict[str, Any] = {}
        self._frames = frames.Frames()
        self._tail = b""

    def __enter__(self) -> _Guard:
        self._log = open(self._root / "log.txt", "wb", buffering=0)
        self._log_end, log_write = os.pipe()
        self._report_end, report_write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._log_end)
                os.close(self._report_end)
                self._become_worker(log_write, report_write)
            except BaseException:  # noqa: BLE001 - nothing may leave this process but by its exit
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(log_write)
        os.close(report_write)
        return self

    def __exit__(self, *_: object) -> None:
        jail.end_children()
        for end in (self._log_end, self._report_end):
            os.close(end)
        self._log.close()
        for name in ("tmp", "home"):
            shutil.rmtree(self._root / name, ignore_errors=True)

    def _become_worker(self, log: int, report: int) -> None:
        jail.die_with_parent()
        os.setsid()
        nothing = os.open("/dev/null", os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        kept = os.dup2(report, 3, inheritable=False)
        os.closerange(4, 4096)
        sys.stdout = os.fdopen(1, "w", buffering=1, errors="replace", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="replace", closefd=False)
        os.umask(0o077)
        os.nice(5)
        os.environ |= {"HOME": str(self._root / "home"), "TMPDIR": str(self._root / "tmp")}
        jail.limit(self._request["deadline_s"], separated=self._separated)
        jail.drop_capabilities()
        worker.work(self._request, self._root, self._library, kept)

    def watch(self, connection: socket.socket, life: int) -> dict[str, Any] | None:
        """The report, or None when nobody waits for one any more."""
        deadline = time.monotonic() + self._request["deadline_s"]
        poll = select.poll()
        for source in (connection.fileno(), life, self._log_end, self._report_end):
            poll.register(source, select.POLLIN)
        look_at_disk = time.monotonic() + DISK_SECONDS
        while (now := time.monotonic()) < deadline:
            ready = {source for source, _ in poll.poll(max(1, min(deadline, look_at_disk) - now) * 1000 + 1)}
            if connection.fileno() in ready or life in ready:
                return None
            if self._log_end in ready and not self._copy_log():
                poll.unregister(self._log_end)
            if self._report_end in ready:
                data = os.read(self._report_end, 65_536)
                report = self._read(data) if data else self._died()
                if report is not None:
                    return self._finish(report)
            if time.monotonic() >= look_at_disk:
                if _disk_use(self._root) > DISK_BYTES:
                    message = f"The evaluation wrote more than {DISK_BYTES} bytes."
                    return self._finish(self._failure("evaluator", message))
                look_at_disk = time.monotonic() + DISK_SECONDS
        message = f"The evaluation did not end within {self._request['deadline_s']:g} s"
        return self._finish(self._failure("timeout", f"{message}: it was in the {self._progress.get('stage')} stage."))

    def _read(self, data: bytes) -> dict[str, Any] | None:
        try:
            messages = self._frames.feed(data)
        except ValueError as error:
            return self._failure("evaluator", f"The evaluator's report cannot be read: {error}")
        for message in messages:
            self._progress = message.get("progress", self._progress)
            if isinstance(message.get("report"), dict):
                return dict(message["report"])
        return None

    def _died(self) -> dict[str, Any]:
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        ending = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return self._failure("killed", f"The evaluator's process ended with {ending} in the middle of its work.")

    def _failure(self, kind: str, message: str) -> dict[str, Any]:
        facts = dict(self._progress)
        failure = {
            "kind": kind,
            "stage": facts.pop("stage", "process"),
            "index": facts.pop("index", 0),
            "message": message,
            "hint": "",
            "traceback": "",
            "facts": {},
        }
        return {"status": "failed", "failure": failure, "metrics": [], "warnings": [], **facts}

    def _finish(self, report: dict[str, Any]) -> dict[str, Any]:
        """Take what is left of the log."""
        os.set_blocking(self._log_end, False)
        with contextlib.suppress(BlockingIOError):
            while self._copy_log():
                pass
        return report | {"log": self._tail.decode(errors="replace")}

    def _copy_log(self) -> bool:
        data = os.read(self._log_end, 65_536)
        room = LOG_BYTES - self._log.tell()
        if room > 0:
            with contextlib.suppress(OSError):  # a full disk is no reason to lose the report
                self._log.write(data[:room])
        self._tail = (self._tail + data)[-LOG_TAIL:]
        return bool(data)


def _packed(report: dict[str, Any]) -> bytes:
    try:
        return frames.pack(report)
    except ValueError as error:
        failure = {"kind": "evaluator", "stage": "process", "index": 0, "message": f"The report is {error}."}
        return frames.pack({"status": "failed", "failure": failure, "seconds": report["seconds"]})


def _disk_use(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total
