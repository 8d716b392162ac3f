"""The warm process: imports the evaluators once (seconds), then forks a keeper for each grading (milliseconds).

It has one thread and does nothing but wait, so that a fork is safe. The daemon sends one byte and a socket for each
grading; when the daemon's end closes, everything here ends.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from . import jail, keeper
from .library import Library, load

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS")


def main(arguments: list[str]) -> None:
    """`CONTROL GRADINGS PLACE [MODULE…]`: the number of the control socket, the directory that has the gradings' own,
    where a grading sees its own (empty without a sandbox), and files with more metrics. Or `--try`: see whether the
    evaluators can be imported."""
    if arguments == ["--try"]:
        _try()
        return
    control_fd, gradings, place, *modules = arguments
    control = socket.socket(fileno=int(control_fd))
    for name in _THREADS:  # a process that forks must have one thread
        os.environ[name] = "1"
    started = time.monotonic()
    try:
        library = load(modules)
    except ImportError as error:
        control.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        return
    # What was imported stays: a collection in a child would touch, and so copy, all of it.
    gc.collect()
    gc.freeze()
    ready = {
        "version": library.version,
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - started, 3),
        "getters": sorted(library.getters),
        "metrics": sorted(library.metrics),
        "absent": library.absent,
    }
    control.send(json.dumps(ready).encode())
    _Zygote(control, Path(gradings), Path(place) if place else None, library).serve()


def _try() -> None:
    library = load()
    absent = f"; without {', '.join(library.absent)}" if library.absent else ""
    sys.stdout.write(f"desktop-env {library.version}: {len(library.metrics)} metrics{absent}\n")


class _Zygote:
    def __init__(self, control: socket.socket, gradings: Path, place: Path | None, library: Library) -> None:
        self._control = control
        self._gradings = gradings
        self._place = place
        self._library = library
        self._keepers: set[int] = set()
        # Its end tells keepers that the zygote has ended, however.
        self._life, self._life_write = os.pipe()

    def serve(self) -> None:
        jail.adopt_orphans()
        woken, wake = os.pipe()
        for end in (woken, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(woken, select.POLLIN)
        while True:
            ready = {source for source, _ in poll.poll()}
            if woken in ready:
                os.read(woken, 4096)
                self._reap()
            if self._control.fileno() in ready and not self._take():
                jail.end_children()
                return

    def _take(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, 16, 1)
        if not data:
            return False
        for descriptor in descriptors:
            pid = os.fork()
            if pid == 0:
                self._become_keeper(socket.socket(fileno=descriptor))
            self._keepers.add(pid)
            os.close(descriptor)
        return True

    def _become_keeper(self, connection: socket.socket) -> None:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            os.close(self._life_write)
            keeper.keep(connection, self._life, self._gradings, self._place, self._library)
        except BaseException:  # noqa: BLE001 - nothing may leave this process but by its exit
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(0)

    def _reap(self) -> None:
        """When a keeper was killed, its worker's processes have become ours: they end, too."""
        ended = False
        while self._keepers:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            ended |= pid in self._keepers
            self._keepers.discard(pid)
        if ended:
            jail.end_children(spare=frozenset(self._keepers))
