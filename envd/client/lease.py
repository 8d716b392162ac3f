"""A lease as a block of code: asked for, waited for, renewed while the block runs, released at its end."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import aiohttp
import anyio
from pydantic import ValidationError

from ..errors import EnvdError, InfraError, LeaseOver, LeaseUnavailable, NotFound, SettingsError
from ..models import Lease, LeaseState
from .answers import Answer
from .handle import EnvHandle
from .transport import Deadline, Resend, Transport

if TYPE_CHECKING:
    from .client import Client

HEADER = "X-Lease"
TTL = 60.0
POLL = 25.0
"""Seconds for which one question about a lease that waits is held open; below the idle limits of proxies."""
TRY = 30.0
"""Seconds for one try of a call that is answered at once."""
GIVE_BACK = 10.0
"""Seconds that the release may take; what is not released expires."""


@asynccontextmanager
async def held(
    client: Client,
    count: int,
    *,
    ttl_s: float,
    wait_s: float | None,
    owner: str | None,
    on_wait: Callable[[Lease], None] = lambda lease: None,
) -> AsyncIterator[list[EnvHandle]]:
    """See `Client.lease`. Who is cancelled before the server's first answer does not know what to release: that
    expires."""
    http = client.http
    lease = await _ask(http, {"count": count, "ttl_s": ttl_s, "owner": owner}, wait_s)
    failure: Exception | None = None
    lost: list[LeaseOver] = []
    try:
        lease = await _granted(http, lease, wait_s, on_wait)
        async with anyio.create_task_group() as both:

            async def hold() -> None:
                lost.append(await _renewed_until_lost(http, lease))
                both.cancel_scope.cancel()

            both.start_soon(hold)
            try:
                yield [EnvHandle(under(client, lease.id), env) for env in lease.envs]
            except Exception as error:  # noqa: BLE001 - the block's own, raised again below: not in a group
                failure = error
            both.cancel_scope.cancel()
    finally:
        with anyio.move_on_after(GIVE_BACK, shield=True), suppress(EnvdError):
            await http.request("DELETE", _path(lease), deadline=Deadline.after(GIVE_BACK), attempt_timeout=TRY)
    if lost and failure is not None:
        raise lost[0] from failure
    ended = lost[0] if lost else failure
    if ended is not None:
        raise ended


async def _ask(http: Transport, body: dict[str, Any], wait_s: float | None) -> Lease:
    return _parsed(
        await http.request(
            "POST",
            "/v1/leases",
            body={name: value for name, value in body.items() if value is not None},
            resend=Resend.KEYED,
            deadline=Deadline.after(TRY if wait_s is None else max(wait_s, TRY)),
            attempt_timeout=TRY,
        )
    )


async def _granted(http: Transport, lease: Lease, wait_s: float | None, on_wait: Callable[[Lease], None]) -> Lease:
    """The lease once it is held. Raises LeaseUnavailable when `wait_s` is over, LeaseOver when it ended meanwhile."""
    deadline = Deadline.after(wait_s)
    while lease.state is LeaseState.WAITING:
        on_wait(lease)
        if deadline.left <= 0:
            were = "1 env was not free" if lease.count == 1 else f"{lease.count} envs were not free at once"
            raise LeaseUnavailable(
                f"{were} within {wait_s:g} s{told_of(lease)}.",
                hint=f"The lease was number {lease.position} in line. Wait longer, or ask for fewer.",
                position=lease.position,
                waits_for=[taken.model_dump(mode="json") for taken in lease.waits_for],
            )
        # While the server is away this waits, as every call does; a lease outlives a restart.
        wait = min(POLL, deadline.left, lease.ttl_s / 2)
        lease = _parsed(
            await http.request(
                "GET",
                _path(lease),
                params={"after": str(lease.version), "wait": f"{wait:.3f}"},
                deadline=Deadline.after(wait + max(TRY, http.patience)),
                attempt_timeout=wait + TRY,
            )
        )
    if lease.state is LeaseState.ENDED:
        raise LeaseOver(f"The lease was {lease.end_reason} while it waited.", end_reason=lease.end_reason)
    return lease


def told_of(lease: Lease) -> str:
    """What a lease waits for, to end a sentence with; "" where the server says nothing of it."""
    words = "; ".join(f"env {taken.env} is {taken.detail}" for taken in lease.waits_for)
    return f": {words}" if words else ""


async def _renewed_until_lost(http: Transport, lease: Lease) -> LeaseOver:
    """Renew the lease every third of its ttl; why it is over, once it is."""
    patience = max(lease.ttl_s, http.patience)
    renewed = time.monotonic()
    pause = lease.ttl_s / 3
    while True:
        await anyio.sleep(pause)
        try:
            limit = Deadline.after(patience)
            path, once = f"{_path(lease)}/renew", min(TRY, lease.ttl_s / 3)
            _parsed(await http.request("POST", path, deadline=limit, attempt_timeout=once))
        except LeaseOver as over:
            return over
        except EnvdError as error:
            if isinstance(error, NotFound) or time.monotonic() - renewed > patience:
                lost = LeaseOver(f"The lease was lost: {error.detail}", hint=error.hint)
                lost.__cause__ = error
                return lost
            pause = min(1.0, lease.ttl_s / 10)
        else:
            renewed, pause = time.monotonic(), lease.ttl_s / 3


def _path(lease: Lease) -> str:
    return f"/v1/leases/{lease.id}"


def _parsed(answer: Answer) -> Lease:
    try:
        return Lease.model_validate_json(answer.body)
    except ValidationError as error:
        raise InfraError(
            f"{answer.request} was answered with something this client cannot read: {error}",
            hint="Are client and server of about the same version?",
        ) from error


def under(client: Client, lease_id: str) -> Client:
    """The client, saying with everything it asks under which lease that is. Raises SettingsError."""
    if not re.fullmatch("[!-~]+", lease_id):
        raise SettingsError(f"{lease_id!r} is no lease's id.", hint="POST /v1/leases answers it.")
    view = copy.copy(client)
    view.http = _Under(client.http, lease_id)
    return view


class _Under(Transport):
    """Another transport, and its session, with a header more."""

    def __init__(self, http: Transport, lease_id: str) -> None:
        self.url, self.patience = http.url, http.patience
        self._http = http
        self._says = {HEADER: lease_id}

    async def aclose(self) -> None:
        """The session is the other's to close."""

    def patience_of(self, asked: float | None) -> float:
        return self._http.patience_of(asked)

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        headers = (options.pop("headers", None) or {}) | self._says
        return await self._http.request(method, path, headers=headers, **options)

    def stream(self, path: str, headers: dict[str, str]) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:  # type: ignore[override]  # the same, but for the name of its class
        return self._http.stream(path, headers | self._says)
