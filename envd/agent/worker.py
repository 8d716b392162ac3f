"""One thread for work that blocks on the X server, so that a server that hangs can hold up nothing else."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Runs functions one after another in a thread of its own.

    The thread is a daemon: a call that never comes back does not keep the process alive, as the threads of
    `concurrent.futures` would.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._name = name
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], T]) -> Future[T]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._jobs.put((future, work))
        return future

    async def call(self, work: Callable[[], T], seconds: float) -> T:
        """Raises TimeoutError after `seconds`; the work itself goes on, since a thread cannot be stopped."""
        return await result_of(self.submit(work), seconds)

    def close(self) -> None:
        """End the thread after what it is doing now. Idempotent."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - belongs to whoever waits for the future
                future.set_exception(error)
            else:
                future.set_result(result)
            del job, future, work


async def result_of(future: Future[T], seconds: float) -> T:
    """Wait for a future that others may be waiting for too: giving up does not cancel it for them."""
    ours = asyncio.wrap_future(future)
    # Once nobody waits for it any more, a failure is no news.
    ours.add_done_callback(lambda done: done.cancelled() or done.exception())
    async with asyncio.timeout(seconds):
        return await asyncio.shield(ours)
