"""Hosts that cannot be reached are not asked again and again, once for each file that they should have."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp
import anyio

ROUNDS = 3
"""Failures one after another, each begun after the one before was over: requests that fail together count once."""


class HostGivenUp(aiohttp.ClientConnectionError):
    """`error` is how the last attempt to reach the host ended."""

    def __init__(self, error: aiohttp.ClientError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class _Failures:
    rounds: int
    at: float
    error: aiohttp.ClientError


class Unreachable:
    """A middleware for one `aiohttp.ClientSession`: raises HostGivenUp for every request to a host and port that could
    not be found or connected to in three rounds. Answers of any kind begin the count anew."""

    def __init__(self) -> None:
        self._failed: dict[tuple[str | None, int | None], _Failures] = {}

    async def __call__(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        place = (request.url.host, request.url.port)
        self._refuse(place)
        began = anyio.current_time()
        try:
            response = await handler(request)
        except aiohttp.ClientSSLError:
            raise  # somebody is there
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self._count(place, began, error)
            self._refuse(place)
            raise
        self._failed.pop(place, None)
        return response

    def _count(self, place: tuple[str | None, int | None], began: float, error: aiohttp.ClientError) -> None:
        before = self._failed.get(place)
        if before is None or began >= before.at:
            rounds = before.rounds + 1 if before else 1
            self._failed[place] = _Failures(rounds, anyio.current_time(), error)

    def _refuse(self, place: tuple[str | None, int | None]) -> None:
        failed = self._failed.get(place)
        if failed is not None and failed.rounds >= ROUNDS:
            raise HostGivenUp(failed.error) from failed.error
