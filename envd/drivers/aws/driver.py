"""`PROVIDER=aws`: each desktop is an EC2 instance of its own.

An instance carries its tags from the call that launches it, so whoever comes later finds it: `destroy`, the next life
of this daemon, a sweep. Beside that, what this process launched it remembers, since EC2's answers lag behind.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType
from typing import ClassVar, Self

import anyio
import anyio.to_thread
import structlog

from ...errors import BootFailed, CloudRefused, EnvdError, StartError
from ...settings import Settings
from ..base import Costs, Death, Driver, InstanceSpec, Made, Report, Traits
from .boot import console
from .budget import Budget, load_prices
from .cloud import Cloud, open_cloud
from .desktops import Desktops
from .instances import Instances
from .launch import Image, find_image
from .place import Place, find_place
from .sweep import sweep
from .ttl import Ttl, open_ttl

logger = structlog.get_logger(__name__)

SWEEPS = 180.0
"""Seconds between two sweeps, and before the first: until then whoever opened the driver has said which instances of
an earlier life are taken over, and has removed the others."""
METER_LOOKS = 5.0
"""Seconds between two looks at what costs."""
TTL_LOOKS = 10.0
"""Seconds between two looks at whether an end must be put off."""
TTL_LEFT = 0.5
"""Share of the TTL that is left when it is put off."""


class AwsDriver(Driver):
    """Desktops of one daemon in one account and region. They outlive the daemon; its next start takes them over or
    removes them, and without one the TTL does."""

    name: ClassVar[str] = "aws"

    def __init__(self, settings: Settings, daemon_id: str) -> None:
        self._settings = settings
        self._daemon_id = daemon_id
        self._image: Image | None = None
        self._cloud: Cloud
        self._ttl: Ttl | None
        self._desktops: Desktops | None = None
        self._periodic: list[asyncio.Task[None]] = []
        self._open: AsyncExitStack

    @property
    def image(self) -> str:
        return self._image.id if self._image else self._settings.aws_ami or self.name

    @property
    def traits(self) -> Traits:  # type: ignore[override]  # a fact that is asked for anew: what the limits allow now
        room = self._desktops is None or self._desktops.has_room
        return Traits(
            boot_width=self._settings.aws_boot_width,
            make_before_break=room,
            keeps_old=room or self._settings.aws_reset == "replace-root",
            parks_spares=self._settings.aws_spares_stopped,
            removal_s=300.0,
            prewarm=True,
            probe_interval_s=1.0,
            monitor_interval_s=2.0,
        )

    async def __aenter__(self) -> Self:
        """Raises StartError for what AWS refuses, SettingsError for what is not set and cannot be found out."""
        async with AsyncExitStack() as opening:
            try:
                await self._begin(opening)
            except BootFailed as error:
                raise StartError(error.detail, hint=error.hint, **error.facts, refusal=error.code) from error
            self._open = opening.pop_all()
        return self

    async def _begin(self, opening: AsyncExitStack) -> None:
        place = await find_place(self._settings)
        prices = await anyio.to_thread.run_sync(load_prices, self._settings.aws_prices)
        self._cloud = cloud = await opening.enter_async_context(open_cloud(place.region))
        identity = await cloud.call("sts", "get_caller_identity")
        self._image = image = await find_image(cloud, self._settings)
        self._ttl = ttl = await open_ttl(cloud, self._settings)
        instances = Instances(cloud, self._daemon_id)
        background = await opening.enter_async_context(asyncio.TaskGroup())
        self._desktops = Desktops(
            self._settings,
            self._daemon_id,
            self._settings.aws_owner or _name_of(identity["Arn"]),
            cloud,
            place,
            image,
            Budget(prices, self._settings.aws_max_instances, self._settings.aws_max_hourly_usd),
            ttl,
            instances,
            background,
        )
        forever = [instances.run(), self._sweep(self._desktops), self._meter(self._desktops)]
        if ttl is not None:
            forever.append(self._prolong(self._desktops, ttl))
        self._periodic = [background.create_task(each) for each in forever]
        opening.callback(self._stop)
        self._tell(place, identity["Account"], identity["Arn"])

    def _stop(self) -> None:
        """All but launches, which `background` waits for: they are heard to their end."""
        assert self._desktops is not None
        self._desktops.hush()
        for task in self._periodic:
            task.cancel()

    def _tell(self, place: Place, account: str, identity: str) -> None:
        assert self._image is not None
        origin = place.origins
        logger.info(
            "aws",
            region=f"{place.region} ({origin['aws_region']})",
            subnets=f"{', '.join(place.subnets)} ({origin['aws_subnet_id']})",
            security_groups=f"{', '.join(place.security_groups)} ({origin['aws_security_group_id']})",
            account=account,
            identity=identity,
            image=f"{self._image.id} {self._image.name}".strip(),
            instance_type=self._settings.aws_instance_type,
            ttl_role=self._ttl.role if self._ttl else "none: ENABLE_TTL is off",
        )

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What went wrong in the caller's block is not the business of what is closed here.
        await self._open.__aexit__(None, None, None)

    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        return await self._opened.create(spec, report)

    async def renew(self, instance_id: str, spec: InstanceSpec, report: Report) -> Made | None:
        return await self._opened.renew(instance_id, spec, report)

    async def adopt(self, instance_id: str, report: Report) -> Made | None:
        return await self._opened.adopt(instance_id, report)

    async def park(self, instance_id: str) -> None:
        await self._opened.park(instance_id)

    async def unpark(self, instance_id: str, report: Report) -> Made:
        return await self._opened.unpark(instance_id, report)

    async def destroy(self, instance_id: str) -> None:
        await self._opened.destroy(instance_id)

    def costs(self) -> Costs | None:
        return self._desktops.costs() if self._desktops is not None else None

    async def list(self) -> frozenset[str]:
        return await self._opened.list()

    async def wait(self, instance_id: str) -> Death:
        return await self._opened.wait(instance_id)

    async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
        desktop = self._opened.known.get(instance_id)
        if desktop is None or desktop.instance_id is None:
            return ()
        try:
            return await console(self._cloud, desktop.instance_id, lines)
        except EnvdError as error:
            logger.info("the console cannot be read", desktop_id=instance_id, error=error.detail)
            return ()

    @property
    def _opened(self) -> Desktops:
        assert self._desktops is not None, "the driver is not open"
        return self._desktops

    # -- in the background --------------------------------------------------------------------------------------

    async def _sweep(self, desktops: Desktops) -> None:
        while True:
            await anyio.sleep(SWEEPS)
            try:
                for found in await sweep(self._cloud, self._daemon_id, desktops):
                    logger.warning(
                        "ended an instance that nobody knew", instance_id=found.instance_id, desktop_id=found.desktop_id
                    )
            except CloudRefused as refusal:
                logger.warning("cannot sweep", code=refusal.code, error=refusal.detail)

    async def _meter(self, desktops: Desktops) -> None:
        while True:
            desktops.costs()
            await anyio.sleep(METER_LOOKS)

    async def _prolong(self, desktops: Desktops, ttl: Ttl) -> None:
        while True:
            await anyio.sleep(TTL_LOOKS)
            await desktops.prolong(ttl.seconds * TTL_LEFT)


def _name_of(arn: str) -> str:
    """The user, or the role and its session: what comes after the kind."""
    return arn.partition("/")[2] or arn.rpartition(":")[2]
