"""Leases: so many envs for one owner, all or none, for as long as they are used or asked for.

    waiting ──▶ held ──▶ ended (released | expired)
       └────────────────────▲

* An env is in at most one held lease. It is given out only while nobody plays on it: it is unleased, no job of it runs
  or waits, no call is in the middle, and it has no episode, or one that has ended. Who plays without a lease keeps the
  env until then, and is in no line: a lease takes what such a player leaves, and cannot hold it back from the next one.
* Next is the first lease of the owner who was served longest ago; who was not served within the last hour comes as if
  served just before the last grant. Within an owner, first come first served. Nobody is granted before who is next.
* When some env is free and too few are, those that are free are kept for who is next, who from then on stays next: one
  who wants many is not overtaken by those who want few.
* A lease ends when its holder says so, or when it was not used or renewed for its ttl. Then the jobs of its envs are
  cancelled, and their episodes ended and desktops taken away as by a reset: evidence stays, no desktop is handed on.
  The envs are free once nothing runs on them any more.

`Book` decides all this and does nothing else; `Leases` has the clock, the envs, the store and the callers who wait.
"""

from __future__ import annotations

import heapq
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import anyio

from .errors import InvalidRequest, Leased, LeaseOver, NotFound, QueueFull
from .events import EventLog
from .models import Env, EnvState, Job, Lease, LeaseEnd, LeaseRequest, LeaseState, LeaseView, Taken
from .settings import Settings
from .store import Kind, Store

HEADER = "X-Lease"
KEPT = 3600.0
"""Seconds for which a lease that has ended is still answered, and remembered when it is asked who was served last."""
MOST_KEPT = 1000
GRACE = 30.0
"""Seconds that every lease has at least after a restart: its holder may have been kept from renewing it."""
LOOKS = 5.0
"""Seconds between two looks, while somebody waits, at what nothing announces: an episode whose time runs out."""
LONGEST_SLEEP = 60.0
"""Expiry is by the wall clock, which may be set."""


class Book:
    """Who has which envs, who waits, and who is next. Time and free envs are told to it; `take` says what changed."""

    def __init__(self, envs: int) -> None:
        self._envs = envs
        self._open: dict[str, Lease] = {}
        self._ended: dict[str, Lease] = {}
        self._served: dict[str, int] = {}
        self._holders: dict[int, str] = {}
        self._leaving: dict[int, str] = {}
        self._turns = 0
        self._kept_for: str | None = None
        self._changed: dict[str, Lease | None] = {}

    def restore(self, leases: Iterable[Lease], now: float) -> None:
        """What an earlier life left. None of it ends before GRACE is over, but what there are too few envs for by
        now."""
        until = now + GRACE
        in_order = sorted(leases, key=lambda lease: (lease.ended_at or lease.created_at, lease.id))
        for lease in in_order:
            self._turns = max(self._turns, lease.turn)
            self._was_served(lease)
            if lease.state is LeaseState.ENDED:
                leaving = tuple(env for env in lease.leaving if env < self._envs)
                self._put(lease, leaving=leaving)
                self._leaving |= dict.fromkeys(leaving, lease.id)
                continue
            self._put(lease, expires_at=max(lease.expires_at, until))
            self._holders |= dict.fromkeys(lease.envs, lease.id)
            if lease.count > self._envs or any(env >= self._envs for env in lease.envs):
                self.end(lease.id, LeaseEnd.EXPIRED, now)
            elif lease.position == 1:
                # Envs may have been kept for it.
                self._kept_for = lease.id
        self._renumber()

    # -- looking ------------------------------------------------------------------------------------------------

    def get(self, lease_id: str) -> Lease | None:
        return self._open.get(lease_id) or self._ended.get(lease_id)

    def open(self) -> list[Lease]:
        """Those that have not ended, in the order in which they were asked for."""
        return list(self._open.values())

    def ended(self) -> list[Lease]:
        """Those that are remembered, in the order of their ends."""
        return list(self._ended.values())

    def holder(self, env: int) -> Lease | None:
        return self._open[self._holders[env]] if env in self._holders else None

    def leaving(self, env: int) -> Lease | None:
        """The lease that has ended, and whose last jobs and calls of `env` have not."""
        return self._ended[self._leaving[env]] if env in self._leaving else None

    @property
    def envs_leaving(self) -> tuple[int, ...]:
        return tuple(self._leaving)

    @property
    def waiting(self) -> int:
        return sum(1 for lease in self._open.values() if lease.state is LeaseState.WAITING)

    def line(self) -> list[Lease]:
        """Who waits, in the order in which they will be granted if nothing else comes."""
        waiting: dict[str, deque[Lease]] = {}
        for lease in self._open.values():
            if lease.state is LeaseState.WAITING:
                waiting.setdefault(lease.owner, deque()).append(lease)
        line: list[Lease] = []
        turn = self._turns
        # Owners come in the order of their first waiting lease, which decides between equals.
        heap = [
            (self._served.get(owner, theirs[0].turn - 0.5), place, owner)
            for place, (owner, theirs) in enumerate(waiting.items())
        ]
        if self._kept_for is not None:
            heap = [
                (-1.0, place, owner) if waiting[owner][0].id == self._kept_for else (last, place, owner)
                for last, place, owner in heap
            ]
        heapq.heapify(heap)
        while heap:
            _, place, owner = heapq.heappop(heap)
            line.append(waiting[owner].popleft())
            turn += 1
            if waiting[owner]:
                heapq.heappush(heap, (turn, place, owner))
        return line

    def overdue(self, now: float) -> list[Lease]:
        return [lease for lease in self._open.values() if lease.expires_at <= now]

    def next_end(self) -> float | None:
        return min((lease.expires_at for lease in self._open.values()), default=None)

    # -- changing -----------------------------------------------------------------------------------------------

    def ask(self, lease_id: str, owner: str, count: int, ttl_s: float, now: float) -> None:
        """A new lease, which waits; `grant` may grant it."""
        assert 1 <= count <= self._envs, count
        self._put(
            Lease(
                id=lease_id,
                owner=owner,
                count=count,
                created_at=now,
                ttl_s=ttl_s,
                expires_at=now + ttl_s,
                turn=self._turns,
            )
        )
        self._renumber()

    def renew(self, lease_id: str, now: float) -> None:
        """Of one that has ended this changes nothing."""
        lease = self._open.get(lease_id)
        if lease is not None and now + lease.ttl_s > lease.expires_at:
            self._put(lease, expires_at=now + lease.ttl_s)

    def grant(self, free: Sequence[int], now: float) -> list[Lease]:
        """Give out what can be given out of the `free` envs, the first of them first."""
        left = [env for env in free if env not in self._holders and env not in self._leaving]
        granted: list[Lease] = []
        if not left:
            return granted
        for lease in self.line():
            if len(left) < lease.count:
                if left:
                    self._kept_for = lease.id
                break
            envs, left = tuple(sorted(left[: lease.count])), left[lease.count :]
            self._turns += 1
            self._holders |= dict.fromkeys(envs, lease.id)
            if self._kept_for == lease.id:
                self._kept_for = None
            held = self._put(
                lease,
                state=LeaseState.HELD,
                envs=envs,
                position=None,
                turn=self._turns,
                expires_at=now + lease.ttl_s,
                version=lease.version + 1,
            )
            self._was_served(held)
            granted.append(held)
        self._renumber()
        return granted

    def end(self, lease_id: str, reason: LeaseEnd, now: float) -> None:
        """Its envs are `leaving` until `has_left` was said of each. Of one that has ended this changes nothing."""
        lease = self._open.pop(lease_id, None)
        if lease is None:
            return
        leaving = tuple(env for env in lease.envs if env < self._envs)
        for env in lease.envs:
            del self._holders[env]
        self._leaving |= dict.fromkeys(leaving, lease_id)
        if self._kept_for == lease_id:
            self._kept_for = None
        self._put(
            lease,
            state=LeaseState.ENDED,
            position=None,
            end_reason=reason,
            ended_at=now,
            leaving=leaving,
            version=lease.version + 1,
        )
        self._renumber()

    def has_left(self, env: int) -> None:
        """Nothing runs on the env any more."""
        lease = self._ended[self._leaving.pop(env)]
        self._put(lease, leaving=tuple(other for other in lease.leaving if other != env), version=lease.version + 1)

    def forget(self, now: float) -> None:
        """Those that ended long ago, and the first of too many. Whose last grant is forgotten may move in line."""
        for lease in self.ended():
            if len(self._ended) <= MOST_KEPT and (lease.ended_at or 0.0) >= now - KEPT:
                break
            if not lease.leaving:
                del self._ended[lease.id]
                self._changed[lease.id] = None
                self._forget_grant(lease)

    def _forget_grant(self, lease: Lease) -> None:
        if self._served.get(lease.owner) == lease.turn:
            del self._served[lease.owner]
            for other in (*self._open.values(), *self._ended.values()):
                if other.owner == lease.owner:
                    self._was_served(other)
            self._renumber()

    def take(self) -> dict[str, Lease | None]:
        """What changed since this was last called; None was forgotten."""
        changed, self._changed = self._changed, {}
        return changed

    def _put(self, lease: Lease, **changes: object) -> Lease:
        lease = self._changed[lease.id] = lease.model_copy(update=changes)
        (self._ended if lease.state is LeaseState.ENDED else self._open)[lease.id] = lease
        return lease

    def _was_served(self, lease: Lease) -> None:
        if lease.envs:
            self._served[lease.owner] = max(lease.turn, self._served.get(lease.owner, 0))

    def _renumber(self) -> None:
        for place, lease in enumerate(self.line(), start=1):
            if lease.position != place:
                self._put(lease, position=place, version=lease.version + 1)


class Players(Protocol):
    """What is leased: the envs."""

    def __len__(self) -> int: ...

    def env(self, env: int) -> Env: ...

    def is_idle(self, env: int) -> bool:
        """Whether nobody plays on it: no reset, no call in the middle, no episode that could go on."""

    def recycle(self, env: int, why: str) -> None:
        """End its episode and take its desktop away, as a reset does; nothing if it is being reset."""

    on_idle: Callable[[], None]
    """Told when an env may have become idle."""


class Jobs(Protocol):
    """The boot queue."""

    def of_env(self, env: int) -> tuple[Job | None, Job | None]:
        """The job that runs, and the one that waits."""

    def cancel(self, job_id: str) -> Job: ...

    async def stirred(self) -> None:
        """Return when a job may have ended."""


class Leases:
    """`recover` first, once; `run` must be running for leases to end, and for those that wait to be granted."""

    def __init__(self, settings: Settings, players: Players, jobs: Jobs, store: Store, events: EventLog) -> None:
        self._settings = settings
        self._players = players
        self._jobs = jobs
        self._store = store
        self._events = events
        self._book = Book(len(players))
        self._told: dict[str, Lease] = {}
        self._news: dict[str, anyio.Event] = {}
        self._attended: Counter[str] = Counter()
        self._wake = anyio.Event()
        players.on_idle = self._stir

    async def recover(self) -> None:
        """Leases of an earlier life: who held one holds it, who waited is where they were in line."""
        self._book.restore((await self._store.all(Kind.LEASES, Lease)).values(), time.time())
        self._told = {lease.id: lease for lease in (*self._book.ended(), *self._book.open())}
        self._tell()

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow_the_jobs)
            while True:
                wake = self._wake
                self._turn()
                with anyio.move_on_after(self._sleep()):
                    await wake.wait()

    # -- what the routes call -----------------------------------------------------------------------------------

    def ask(self, owner: str, asked: LeaseRequest) -> Lease:
        """A new lease: held if it can be at once, else waiting. Raises InvalidRequest and QueueFull."""
        if asked.count > len(self._players):
            message = f"the server has {len(self._players)} env{'s' * (len(self._players) != 1)}, not {asked.count}"
            raise InvalidRequest(
                f"count: {message}.",
                hint="Start the daemon with a larger ENVD_ENVS to serve more.",
                errors=[{"field": "count", "message": message}],
            )
        if (waiting := self._book.waiting) >= self._settings.queue_limit:
            raise QueueFull(
                f"{waiting} leases wait already, the limit is ENVD_QUEUE_LIMIT={self._settings.queue_limit}.",
                hint="Try again later.",
                retry_after=30,
            )
        lease_id = f"lease-{secrets.token_hex(6)}"
        self._book.ask(lease_id, owner, asked.count, asked.ttl_s, time.time())
        self._turn()
        self._stir()  # it may end before anything else does
        return self.get(lease_id)

    def get(self, lease_id: str) -> Lease:
        """Raises NotFound."""
        lease = self._book.get(lease_id)
        if lease is None:
            raise NotFound(
                "There is no lease of that id; it never was, or ended long ago.", hint="Ask for one: POST /v1/leases."
            )
        return lease

    def all(self) -> list[Lease]:
        """Those that have not ended, in the order in which they were asked for."""
        return self._book.open()

    async def changed(self, lease_id: str, after: int, timeout: float) -> Lease:
        """The lease as soon as its version is above `after` or it has ended, or as it is when `timeout` seconds are
        over. One that waits is renewed by this. Raises NotFound."""
        return await self._until(
            lease_id, lambda lease: lease.version > after or lease.state is LeaseState.ENDED, timeout
        )

    async def settled(self, lease_id: str, timeout: float) -> Lease:
        """As `changed`: as soon as it no longer waits."""
        return await self._until(lease_id, lambda lease: lease.state is not LeaseState.WAITING, timeout)

    async def _until(self, lease_id: str, wanted: Callable[[Lease], bool], timeout: float) -> Lease:
        with self._attending(lease_id), anyio.move_on_after(timeout):
            while not wanted(self.get(lease_id)):
                await self._news.setdefault(lease_id, anyio.Event()).wait()
        return self.get(lease_id)

    @contextmanager
    def _attending(self, lease_id: str) -> Iterator[None]:
        """A lease that waits does not expire while somebody waits for it."""
        self._attended[lease_id] += 1
        try:
            yield
        finally:
            self._attended[lease_id] -= 1
            if not self._attended[lease_id]:
                del self._attended[lease_id]
            lease = self._book.get(lease_id)
            if lease is not None and lease.state is LeaseState.WAITING:
                self._book.renew(lease_id, time.time())
                self._tell()

    def renew(self, lease_id: str) -> Lease:
        """Raises NotFound and LeaseOver."""
        lease = self.get(lease_id)
        if lease.state is LeaseState.ENDED:
            raise _over(lease)
        self._book.renew(lease_id, time.time())
        self._tell()
        return self.get(lease_id)

    def release(self, lease_id: str) -> Lease:
        """Repeatable. Raises NotFound."""
        self._end(self.get(lease_id), LeaseEnd.RELEASED)
        self._turn()
        self._stir()
        return self.get(lease_id)

    def require(self, env: int, lease_id: str | None) -> None:
        """Return if a call that carries `lease_id`, or none, may change the env, which renews the lease.

        Raises Leased where somebody else has the env, LeaseOver for a lease that has ended or is not known,
        InvalidRequest for one that is of other envs or still waits. What env numbers there are is not looked at.
        """
        holder = self._book.holder(env)
        if holder is not None and holder.id == lease_id:
            self._book.renew(holder.id, time.time())
            self._tell()
            return
        mine = self._book.get(lease_id) if lease_id else None
        if holder is not None:
            gone = mine is not None and mine.state is LeaseState.ENDED
            raise Leased(
                f"Env {env} is leased to {holder.owner}.",
                hint=f"{'The lease that was sent has ended. ' if gone else ''}Ask for one with POST /v1/leases and "
                f"send its id as {HEADER}, or take another env.",
                retry_after=max(1.0, round(holder.expires_at - time.time(), 1)),
                holder=holder.owner,
                expires_at=holder.expires_at,
            )
        if lease_id and (mine is None or mine.state is LeaseState.ENDED):
            raise _over(mine)
        if mine is not None:
            which = ", ".join(map(str, mine.envs))
            message = f"that lease is of env {which}, not {env}" if mine.envs else "that lease still waits"
            raise InvalidRequest(f"{HEADER}: {message}.", errors=[{"field": HEADER, "message": message}])
        if (last := self._book.leaving(env)) is not None:
            raise Leased(
                f"Env {env} is being taken back from {last.owner}, whose lease has ended.",
                hint="Try again in a moment.",
                retry_after=1,
                holder=last.owner,
                expires_at=last.ended_at,
            )

    def view(self, env: int) -> LeaseView | None:
        """The lease that holds the env, as everybody may see it."""
        holder = self._book.holder(env)
        return holder.view if holder else None

    def told(self, lease: Lease) -> Lease:
        """The lease as it is answered: one that waits with what it waits for."""
        if lease.state is not LeaseState.WAITING:
            return lease
        taken = [self._taken(env) for env in range(len(self._players))]
        return lease.model_copy(update={"waits_for": tuple(one for one in taken if one is not None)})

    def _taken(self, env: int) -> Taken | None:
        """By what the env is taken; None if nobody plays on it."""
        if (holder := self._book.holder(env)) is not None:
            return Taken(env=env, by="lease", since=holder.created_at, detail=f"leased to {holder.owner}")
        if (last := self._book.leaving(env)) is not None:
            words = f"being taken back from {last.owner}, whose lease has ended"
            return Taken(env=env, by="lease", since=last.ended_at, detail=words)
        running, waiting = self._jobs.of_env(env)
        if (job := running or waiting) is not None:
            return Taken(env=env, by="job", since=job.created_at, detail=f"being reset without a lease ({job.id})")
        if self._players.is_idle(env):
            return None
        episode = self._players.env(env).episode
        if episode is None or episode.done:
            return Taken(env=env, by="call", detail="in the middle of a call")
        words = (
            f"played on without a lease for {max(0.0, time.time() - episode.started_at):.0f} s ({episode.id}): "
            "evaluating it, or a step with DONE or FAIL, ends that and frees the env"
        )
        return Taken(env=env, by="episode", since=episode.started_at, detail=words)

    # -- within -------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """All that is due now."""
        now = time.time()
        for lease in self._book.overdue(now):
            if lease.state is LeaseState.WAITING and lease.id in self._attended:
                self._book.renew(lease.id, now)
            else:
                self._end(lease, LeaseEnd.EXPIRED)
        for env in self._book.envs_leaving:
            self._take_back(env)
        if self._book.waiting:
            for lease in self._book.grant(self._free(), now):
                for env in lease.envs:
                    # What an earlier player left there is nobody's to look at or to be judged by.
                    self._players.recycle(env, "it was leased")
        self._book.forget(now)
        self._tell()

    def _free(self) -> list[int]:
        """Envs that nobody plays on, the untouched ones first: what was played on another may still be evaluated."""
        free = [env for env in range(len(self._players)) if self._is_free(env)]
        return sorted(free, key=lambda env: self._players.env(env).state is not EnvState.EMPTY)

    def _is_free(self, env: int) -> bool:
        return self._jobs.of_env(env) == (None, None) and self._players.is_idle(env)

    def _end(self, lease: Lease, reason: LeaseEnd) -> None:
        if lease.state is LeaseState.ENDED:
            return
        self._book.end(lease.id, reason, time.time())
        for env in lease.envs:
            self._take_back(env)

    def _take_back(self, env: int) -> None:
        """Again until nothing runs there: a reset that was nearly done when it was cancelled still begins its
        episode."""
        if self._book.leaving(env) is None:
            return
        running, waiting = self._jobs.of_env(env)
        # The one that waits first: it would inherit the other's boot.
        for job in (waiting, running):
            if job is not None and not job.cancel_requested:
                self._jobs.cancel(job.id)
        self._players.recycle(env, "its lease ended")
        if self._is_free(env):
            self._book.has_left(env)

    def _tell(self) -> None:
        """The one place where changes go out: kept, told to whoever waits, published."""
        for lease_id, lease in self._book.take().items():
            self._store.put(Kind.LEASES, lease_id, lease)
            before = self._told.pop(lease_id, None)
            if lease is not None:
                self._told[lease_id] = lease
            moved = lease is None or before is None or before.version != lease.version
            if moved and (news := self._news.pop(lease_id, None)):
                news.set()
            if lease is not None and (before is None or before.state is not lease.state):
                self._publish(lease)

    def _publish(self, lease: Lease) -> None:
        envs = ", ".join(map(str, lease.envs))
        what, message = {
            LeaseState.WAITING: ("waiting", f"{lease.owner} waits for {lease.count} env{'s' * (lease.count != 1)}"),
            LeaseState.HELD: ("granted", f"leased to {lease.owner}: env {envs}"),
            LeaseState.ENDED: (str(lease.end_reason), f"the lease of {lease.owner} ended: {lease.end_reason}"),
        }[lease.state]
        self._events.publish(
            "lease",
            state=what,
            lease=lease.short_id,
            owner=lease.owner,
            count=lease.count,
            envs=list(lease.envs),
            position=lease.position,
            expires_at=lease.expires_at,
            message=message,
        )

    async def _follow_the_jobs(self) -> None:
        while True:
            await self._jobs.stirred()
            self._stir()

    def _stir(self) -> None:
        """Something changed that may free an env, or be due sooner."""
        self._wake.set()
        self._wake = anyio.Event()

    def _sleep(self) -> float:
        longest = LOOKS if self._book.waiting or self._book.envs_leaving else LONGEST_SLEEP
        end = self._book.next_end()
        return longest if end is None else min(longest, max(0.0, end - time.time()))


def _over(lease: Lease | None) -> LeaseOver:
    why = f"was {lease.end_reason}" if lease is not None else "is not known here: it ended long ago, or never was"
    return LeaseOver(
        f"The lease {why}.",
        hint="Ask for another one: POST /v1/leases. Its envs have no episode any more.",
        end_reason=lease.end_reason if lease else None,
        ended_at=lease.ended_at if lease else None,
    )
