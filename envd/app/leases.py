"""Leases over HTTP: `/v1/leases`, and the header that calls about a leased env carry."""

from __future__ import annotations

from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..access import Scope
from ..errors import DiskLow, RequestError
from ..leases import HEADER
from ..models import Lease, LeaseRequest, LeaseState
from ..records import KeptAnswer
from .bodies import LONGEST_POLL, hold, number_in_query, read_call, read_json, service_of
from .gate import caller_of


def require(request: HTTPConnection, env: int) -> int:
    """`env`, which the request is about to change, if it may. See `Leases.require`."""
    service_of(request).leases.require(env, request.headers.get(HEADER))
    return env


async def leases(request: Request) -> Response:
    """GET: the leases that are held or wait; the ids of others' are cut short. POST: lease `count` envs, all or none:
    201 when they are held, within `wait_s` if need be; else 202, and the lease waits on for as long as it is asked
    about."""
    return await _ask(request) if request.method == "POST" else _list(request)


def _list(request: Request) -> Response:
    caller, leases = caller_of(request.scope), service_of(request).leases
    oversees = caller.how == "token" and caller.scope >= Scope.ADMIN
    shown = [
        lease if oversees or lease.owner == caller.name else lease.model_copy(update={"id": lease.short_id})
        for lease in map(leases.told, leases.all())
    ]
    return JSONResponse({"leases": [lease.model_dump(mode="json") for lease in shown]}, headers=_NOT_KEPT)


async def _ask(request: Request) -> Response:
    asked, how_sent = await read_call(request, LeaseRequest)
    service = service_of(request)

    async def work() -> Lease:
        service.refuse_new_work()
        asked_for = service.leases.ask(_owner(request, asked), asked)
        try:
            await service.calls.keep(how_sent, "lease", asked_for.id)
        except DiskLow:
            service.leases.release(asked_for.id)
            raise
        return asked_for

    async def again(kept: KeptAnswer) -> Lease:
        return service.leases.get(kept.id)

    lease = await service.calls.do(how_sent, work, again)
    if lease.state is LeaseState.WAITING and asked.wait_s:
        try:
            left = asked.wait_s if how_sent.left is None else how_sent.left
            lease = await _settled(request, lease.id, min(asked.wait_s, left))
        except BaseException:
            if not how_sent.key:
                # Its id was told to nobody, so nobody could use it.
                service.leases.release(lease.id)
            raise
    lease = service.leases.told(lease)
    return lease_json(lease, 201 if lease.state is LeaseState.HELD else 202, {"Location": lease.links["self"]})


async def _settled(request: Request, lease_id: str, wait: float) -> Lease:
    """Raises Draining, and RequestError when the client leaves."""
    service = service_of(request)
    lease = await hold(request, lambda: service.leases.settled(lease_id, wait))
    if lease is None:
        service.refuse_when_draining()
        raise RequestError("The client went away before it was told of its lease.")
    return lease


async def lease(request: Request) -> Response:
    """GET: the lease. With `wait` (seconds, at most 60): as soon as it changes, or is newer than the version `after`.
    DELETE: release it; repeatable. Its envs lose their jobs, episodes and desktops; what these leave as evidence is
    kept."""
    lease_id, service = request.path_params["lease"], service_of(request)
    if request.method == "DELETE":
        released = service.leases.release(lease_id)
        await service.store.commit()
        return lease_json(released)
    found = service.leases.get(lease_id)
    wait = number_in_query(request, "wait", 0, LONGEST_POLL)
    after = int(number_in_query(request, "after", found.version, 2**53))
    if wait and found.state is not LeaseState.ENDED:
        changed = await hold(request, lambda: service.leases.changed(lease_id, after, wait))
        if changed is None:
            service.refuse_when_draining()
    found = await service.leases.changed(lease_id, after, 0)
    await service.store.settle()
    return lease_json(service.leases.told(found))


async def renew(request: Request) -> Response:
    """Have the lease last for its ttl from now: a heartbeat of a holder who does not use it just now, or who waits."""
    await read_json(request)
    leases = service_of(request).leases
    return lease_json(leases.told(leases.renew(request.path_params["lease"])))


def lease_json(lease: Lease, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = lease.model_dump(mode="json") | {"links": lease.links}
    return JSONResponse(body, status, {**_NOT_KEPT, **(headers or {})})


def _owner(request: Request, asked: LeaseRequest) -> str:
    """A token says who sends it; of others we know the address, and believe them."""
    caller = caller_of(request.scope)
    return caller.name if caller.how == "token" else asked.owner or caller.name


_NOT_KEPT = {"Cache-Control": "no-store"}

routes = [
    Route("/v1/leases", leases, methods=["GET", "POST"]),
    Route("/v1/leases/{lease}", lease, methods=["GET", "DELETE"]),
    Route("/v1/leases/{lease}/renew", renew, methods=["POST"]),
]
