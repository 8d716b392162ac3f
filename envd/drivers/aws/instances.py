"""What state the instances of one daemon are in: one question for all of them, asked again and again.

What EC2 answers lags behind what it did, by seconds: an instance that was launched may not be there yet, one that was
started may still be stopped; and one answer may know less than the one before. So what was launched is remembered, and
is not gone because an answer leaves it out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import anyio
import structlog

from ...errors import CloudRefused
from .cloud import Cloud
from .tags import DAEMON, DESKTOP, as_dict

logger = structlog.get_logger(__name__)

IDLE, BUSY = 5.0, 1.0
"""Seconds between two questions while nobody waits for a change, and while somebody does."""
SLOWEST = 30.0
"""The same while EC2 refuses to answer."""
CALL = 20.0
"""Seconds for one answer."""
LAG = 120.0
"""Seconds for which answers may leave an instance out that exists: after its launch, and after any answer with it."""
GONE = "gone"
"""State of an instance that EC2 knows no more: it tells of an ended one for about an hour."""
ENDED = ("terminated", GONE)


@dataclass(frozen=True, slots=True)
class Seen:
    """An instance, as it was seen last. `reason` is why it left its last state, as EC2's StateReason has it."""

    id: str
    desktop_id: str
    state: str
    type: str = ""
    private_ip: str | None = None
    public_ip: str | None = None
    reason_code: str = ""
    reason: str = ""

    @classmethod
    def of(cls, told: dict[str, Any]) -> Self:
        why = told.get("StateReason") or {}
        return cls(
            id=told["InstanceId"],
            desktop_id=as_dict(told.get("Tags")).get(DESKTOP, ""),
            state=told["State"]["Name"],
            type=told.get("InstanceType", ""),
            private_ip=told.get("PrivateIpAddress"),
            public_ip=told.get("PublicIpAddress"),
            reason_code=why.get("Code") or "",
            reason=why.get("Message") or told.get("StateTransitionReason") or "",
        )

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Instances:
    """`run` must be running for anything to change."""

    def __init__(self, cloud: Cloud, daemon_id: str) -> None:
        self._cloud = cloud
        self._filters = [{"Name": f"tag:{DAEMON}", "Values": [daemon_id]}]
        self._seen: dict[str, Seen] = {}
        self._absent_since: dict[str, float] = {}
        self._begun = self._done = 0
        self._waiting = 0
        self._refusal: CloudRefused | None = None
        self._news = asyncio.Event()
        self._wanted = asyncio.Event()

    def __iter__(self) -> Iterator[Seen]:
        return iter(self._seen.values())

    def launched(self, seen: Seen) -> None:
        """Know of an instance before EC2 tells of it, or again after it was taken for gone."""
        if self.get(seen.id).state == GONE:
            self._seen[seen.id] = seen
            self._absent_since[seen.id] = time.monotonic()

    def get(self, instance_id: str) -> Seen:
        return self._seen.get(instance_id) or Seen(instance_id, "", GONE)

    async def until(self, instance_id: str, wanted: Callable[[Seen], bool], *, hurry: bool = True) -> Seen:
        """Return once it is as `wanted`, or has ended. Refusals are sat out; `hurry` has EC2 asked more often.

        Raises CloudRefused for one that only a person can change, as of credentials that have expired.
        """
        began = self._begun
        with self._asking(hurry):
            while True:
                seen = self.get(instance_id)
                if seen.ended or wanted(seen):
                    return seen
                await self._next(began)

    async def fresh(self) -> None:
        """Return when all was seen by a question that was asked after this call. Raises as `until` does."""
        began = self._begun
        with self._asking(hurry=True):
            while self._done <= began:
                await self._next(began)

    async def _next(self, began: int) -> None:
        """Return after one answer more. Raises what a question that came after the one of number `began` met."""
        await self._news.wait()
        if self._refusal is not None and not self._refusal.retryable and self._begun > began:
            raise self._refusal

    async def run(self) -> None:
        """Ask, for ever."""
        pause = 0.0
        while True:
            self._wanted.clear()
            try:
                await self._look()
            except CloudRefused as refusal:
                if self._refusal is None:
                    logger.warning("cannot see the instances", code=refusal.code, error=refusal.detail)
                self._refusal = refusal
                pause = min(2 * pause or BUSY, SLOWEST)
                self._tell()
                with anyio.move_on_after(pause):
                    await self._wanted.wait()
            else:
                self._refusal, pause = None, 0.0
                self._tell()
                with anyio.move_on_after(BUSY if self._waiting else IDLE):
                    await self._wanted.wait()

    async def _look(self) -> None:
        self._begun += 1
        asked_at = time.monotonic()
        asked = {"Filters": self._filters, "MaxResults": 1000, "within": CALL}
        pages = await self._cloud.pages("ec2", "describe_instances", "Reservations", **asked)
        now = {told["InstanceId"]: Seen.of(told) for page in pages for told in page["Instances"]}
        for instance_id, seen in self._seen.items():
            if instance_id in now or seen.ended:
                self._absent_since.pop(instance_id, None)
            elif asked_at < self._absent_since.setdefault(instance_id, asked_at) + LAG:
                now[instance_id] = seen
            else:
                now[instance_id] = replace(seen, state=GONE)
        self._seen = now
        self._done = self._begun

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    @contextmanager
    def _asking(self, hurry: bool) -> Iterator[None]:
        """While somebody waits for a change, it is asked for more often."""
        self._waiting += hurry
        if hurry:
            self._wanted.set()
        try:
            yield
        finally:
            self._waiting -= hurry
