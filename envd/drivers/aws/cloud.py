"""The open clients, one of each service for the daemon's life, and the one way in which AWS is called."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Literal

import aioboto3
import anyio
import anyio.to_thread
from aiobotocore.config import AioConfig
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from botocore.parsers import ResponseParserError

from ...errors import CloudRefused, CloudUnreachable
from .refusals import explain

Service = Literal["ec2", "scheduler", "iam", "sts", "service-quotas"]

SERVICES: tuple[Service, ...] = ("ec2", "scheduler", "iam", "sts", "service-quotas")
DEADLINE = 60.0
"""Seconds that one call may take, botocore's retries included."""
_CONFIG = AioConfig(
    # Standard mode gives up on a refused connection after 1.3 s, where legacy, the default, takes 8.
    retries={"mode": "standard", "total_max_attempts": 4},
    connect_timeout=5,
    read_timeout=30,
    max_pool_connections=50,
)


class Cloud:
    """AWS in one region. Made by `open_cloud`."""

    def __init__(self, region: str, clients: dict[str, Any]) -> None:
        self.region = region
        self._clients = clients

    async def call(self, service: Service, operation: str, /, *, within: float = DEADLINE, **parameters: Any) -> Any:
        """What `operation` (as the client names it: `run_instances`) answers: a dict with the fields of AWS's API.

        Raises CloudRefused and what is below it, after at most `within` seconds.
        """
        client, action = self._clients[service], self.action(service, operation)
        whom = {"action": action, "endpoint": client.meta.endpoint_url}
        try:
            with anyio.fail_after(within):
                answer = await getattr(client, operation)(**parameters)
        except TimeoutError as error:
            raise CloudUnreachable(
                f"{action} got no answer within {within:g} s.",
                hint="See whether this host reaches AWS: a NAT gateway, a VPC endpoint, a proxy.",
                **whom,
            ) from error
        except ResponseParserError as error:
            raise CloudRefused(
                f"{action} was answered with what is not its answer.",
                hint="See what answers at that address: something between this host and AWS may do so in its place.",
                **whom,
            ) from error
        except (ClientError, BotoCoreError, OSError) as error:
            raise explain(error, action, region=self.region, asked=parameters) from error
        return answer

    async def pages(self, service: Service, operation: str, /, key: str, **parameters: Any) -> list[Any]:
        """The items under `key` of every page. Raises as `call` does."""
        found: list[Any] = []
        token: str | None = None
        while True:
            more: dict[str, Any] = {"NextToken": token} if token else {}
            answer = await self.call(service, operation, **parameters, **more)
            found.extend(answer.get(key, ()))
            token = answer.get("NextToken")
            if not token:
                return found

    def action(self, service: Service, operation: str) -> str:
        """The call as policies name it: `ec2:RunInstances`."""
        client = self._clients[service]
        name = client.meta.service_model.signing_name if service == "service-quotas" else service
        return f"{name.replace('service-quotas', 'servicequotas')}:{client.meta.method_to_api_mapping[operation]}"


@asynccontextmanager
async def open_cloud(region: str) -> AsyncIterator[Cloud]:
    """Clients of `region`, with credentials by botocore's chain. Closes their connections at the end.

    Raises NoCredentials where there are none, CloudRefused where they or AWS's own settings cannot be read.
    """
    async with AsyncExitStack() as stack:
        try:
            session = await anyio.to_thread.run_sync(partial(aioboto3.Session, region_name=region))
            if await anyio.to_thread.run_sync(asyncio.run, session.get_credentials()) is None:
                raise NoCredentialsError
            clients: dict[str, Any] = {
                service: await stack.enter_async_context(_client(session, service)) for service in SERVICES
            }
        except (BotoCoreError, OSError) as error:
            raise explain(error, "sts:GetCallerIdentity", region=region, asked={}) from error
        yield Cloud(region, clients)


@asynccontextmanager
async def _client(session: aioboto3.Session, service: Service) -> AsyncIterator[Any]:
    """Made in a thread, with a loop of its own while that lasts: it reads the descriptions of its service, and files of
    the user's, which for the first client takes 0.3 s. It has no connection before it is used."""
    opening = session.client(service, config=_CONFIG)
    client = await anyio.to_thread.run_sync(asyncio.run, opening.__aenter__())
    try:
        yield client
    finally:
        await opening.__aexit__(None, None, None)
