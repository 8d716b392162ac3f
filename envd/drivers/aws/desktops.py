"""The desktops of one daemon, as instances: made, taken over, ended, renewed, put to sleep.

A launch goes on when whoever asked for it is cancelled, in a task of its own: a call that was sent must be heard to its
end, or nobody would know of its instance until the next sweep.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import structlog

from ...errors import BootFailed, CloudRefused, CloudUnreachable, InfraError, TtlUnavailable
from ...models import Endpoints
from ...settings import Settings
from ..base import Costs, Death, InstanceSpec, Made, Report
from . import tags
from .boot import narrate
from .budget import Budget
from .cloud import Cloud
from .instances import ENDED, Instances, Seen
from .launch import Image, launch
from .meter import PAID, Meter
from .place import Place
from .refusals import early_end
from .roots import replace_root
from .ttl import Ttl

logger = structlog.get_logger(__name__)

IDS = re.compile(r"[a-z0-9-]{1,48}")
"""What can have been made by us. In EC2's filters `*` and `?` stand for anything."""
UNHEARD = 20.0
"""Seconds for which an instance is looked for whose launch was not answered."""
LOOKS = 1.0
"""Seconds between two looks for it."""
AGAIN = 10.0
"""Seconds after which an instance that is not seen to end is told so again."""
ADDRESS = 60.0
"""Seconds within which a running instance has its address."""
CALL = 30.0
LEAVING = ("shutting-down", "stopping", "stopped")
USED = ("pending", "running", "stopping", "stopped")
"""States of instances that count and cost."""


@dataclass(eq=False)
class Desktop:
    """One that this process launched or took over, until it is destroyed.

    launched  set when the outcome of the launch is known: `instance_id`, or `failure`, or both.
    unheard   AWS may have launched it and did not say so.
    asked     what it was launched with.
    ends      when its TTL ends it, in Unix seconds; None without one.
    renewed   its instance is another desktop now.
    """

    id: str
    instance_id: str | None = None
    failure: Exception | None = None
    unheard: bool = False
    asked: dict[str, Any] = field(default_factory=dict)
    ends: float | None = None
    parked: bool = False
    renewed: bool = False
    launched: asyncio.Event = field(default_factory=asyncio.Event)
    making: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    scheduling: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    narrator: asyncio.Task[None] | None = None

    def hush(self) -> None:
        """Its boot is told of no more."""
        if self.narrator is not None:
            self.narrator.cancel()


class Desktops:
    """`background` must live as long as this does, and outlive no launch."""

    def __init__(
        self,
        settings: Settings,
        daemon_id: str,
        owner: str,
        cloud: Cloud,
        place: Place,
        image: Image,
        budget: Budget,
        ttl: Ttl | None,
        instances: Instances,
        background: asyncio.TaskGroup,
    ) -> None:
        self._settings = settings
        self._daemon_id = daemon_id
        self._owner = owner
        self._cloud = cloud
        self._place = place
        self._image = image
        self._budget = budget
        self._ttl = ttl
        self._instances = instances
        self._background = background
        self._meter = Meter(budget)
        self.known: dict[str, Desktop] = {}

    def __contains__(self, one: object) -> bool:
        """Whether a desktop's id, or an instance's, is of something that this process has. An instance that is renewed
        is known by its own id while EC2 still tells of its old tags."""
        return one in self.known or any(one == desktop.instance_id for desktop in self.known.values())

    @property
    def has_room(self) -> bool:
        return self._budget.has_room(self._types(), self._settings.aws_instance_type)

    def _types(self) -> list[str]:
        """One for each instance that exists or is being launched."""
        there = [seen for seen in self._instances if seen.state in USED]
        mine = {seen.id for seen in there} | {seen.desktop_id for seen in there}
        launching = [
            desktop
            for desktop in self.known.values()
            if not desktop.launched.is_set() and desktop.instance_id not in mine and desktop.id not in mine
        ]
        return [seen.type for seen in there] + [self._settings.aws_instance_type] * len(launching)

    def costs(self) -> Costs:
        """Asked for now and then, it misses nothing but what came and went in between."""
        return self._meter.look(seen.type for seen in self._instances if seen.state in PAID)

    # -- making -------------------------------------------------------------------------------------------------

    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        if spec.id in self.known:
            raise BootFailed(f"A desktop {spec.id} exists already.", hint="Ids are unique for ever; choose another.")
        self._budget.require(self._types(), self._settings.aws_instance_type)
        desktop = self.known[spec.id] = Desktop(spec.id)
        report.phase("launch")
        self._background.create_task(self._launch(desktop, spec, report))
        with desktop.making:
            await desktop.launched.wait()
            if desktop.failure is not None:
                raise desktop.failure
            report.phase("pending")
            return await self._running(desktop, report)
        raise BootFailed(f"The desktop {spec.id} was destroyed while it was made.")

    async def _launch(self, desktop: Desktop, spec: InstanceSpec, report: Report) -> None:
        """Never raises: what went wrong is the desktop's `failure`."""
        try:
            await self._launch_and_schedule(desktop, spec, report)
        except CloudRefused as refusal:
            desktop.failure = refusal
            # Also an error of AWS's own may come after it was done.
            server_failed = type(refusal) is CloudRefused and refusal.facts.get("aws_code", "").startswith("Internal")
            desktop.unheard = desktop.instance_id is None and (isinstance(refusal, CloudUnreachable) or server_failed)
            if desktop.instance_id is not None:
                await self._end_early(desktop.instance_id)
        except Exception as error:  # noqa: BLE001 - a task's boundary: it is raised where the launch is waited for
            desktop.failure = error
        finally:
            desktop.launched.set()

    async def _launch_and_schedule(self, desktop: Desktop, spec: InstanceSpec, report: Report) -> None:
        now = time.time()
        ends = self._ttl.expires(now) if self._ttl else None
        mine = tags.tags_of(spec, self._daemon_id, self._owner, now, ends)
        told, desktop.asked = await launch(self._cloud, self._settings, self._place, self._image, spec, mine, report)
        seen = Seen.of(told)
        desktop.instance_id = seen.id
        self._instances.launched(seen)
        logger.info("launched", desktop_id=spec.id, instance_id=seen.id, subnet=told.get("SubnetId"))
        report.progress(f"{seen.id} is launched")
        if self._ttl is not None:
            with desktop.scheduling:
                desktop.ends = await self._ttl.begin(seen.id)

    async def _end_early(self, instance_id: str) -> None:
        """Without a schedule it must not stay. Whether it went is `destroy`'s to see."""
        try:
            await self._cloud.call("ec2", "terminate_instances", within=CALL, InstanceIds=[instance_id])
        except CloudRefused as refusal:
            logger.warning("an instance without a schedule stays for now", instance_id=instance_id, error=str(refusal))

    async def _running(self, desktop: Desktop, report: Report) -> Made:
        """Where its ports will be, once it runs and has its address."""
        assert desktop.instance_id is not None
        instance_id = desktop.instance_id
        report.progress(f"{instance_id} is pending")
        seen = await self._instances.until(instance_id, lambda seen: seen.state not in ("pending", "stopped"))
        if seen.state != "running":
            raise early_end(seen.reason_code, seen.reason, instance_id, region=self._cloud.region, asked=desktop.asked)
        report.phase("running")
        address = await self._address(instance_id)
        report.progress(f"{instance_id} runs, at {address}")
        desktop.hush()
        desktop.narrator = self._background.create_task(narrate(self._cloud, instance_id, report))
        return Made(_endpoints(address))

    async def _address(self, instance_id: str) -> str:
        public = self._settings.aws_public_ip

        def address(seen: Seen) -> str | None:
            return seen.public_ip if public else seen.private_ip

        with anyio.move_on_after(ADDRESS):
            if found := address(await self._instances.until(instance_id, lambda seen: bool(address(seen)))):
                return found
        kind, hint = ("public", "See whether its subnet routes to an internet gateway, or unset ENVD_AWS_PUBLIC_IP.")
        raise BootFailed(
            f"{instance_id} runs and has no {kind if public else 'private'} address.", hint=hint if public else ""
        )

    # -- taking over --------------------------------------------------------------------------------------------

    async def adopt(self, desktop_id: str, report: Report) -> Made | None:
        """It is known, so no sweep ends it, from before AWS is asked."""
        if IDS.fullmatch(desktop_id) is None or desktop_id in self.known:
            return None
        desktop = self.known[desktop_id] = Desktop(desktop_id)
        desktop.launched.set()
        made = None
        try:
            with desktop.making:
                made = await self._adopt(desktop, report)
        finally:
            if made is None and self.known.get(desktop_id) is desktop:
                del self.known[desktop_id]
        return made

    async def _adopt(self, desktop: Desktop, report: Report) -> Made | None:
        """Its instance must be the only one, and run or be about to. Raises CloudRefused."""
        there = [told for told in await self._tagged(desktop.id) if told["State"]["Name"] in USED]
        if len(there) > 1:
            report.note(f"{len(there)} instances are {desktop.id}: {', '.join(one['InstanceId'] for one in there)}.")
        if len(there) != 1:
            return None
        [told] = there
        seen, marks = Seen.of(told), tags.as_dict(told.get("Tags"))
        if seen.state in LEAVING:
            report.note(f"{seen.id} is {seen.state}.")
            return None
        if marks.get(tags.RENEWAL) == tags.RENEWING:
            report.note(f"The root volume of {seen.id} may not have been replaced.")
            return None
        if not await self._has_an_end(desktop, seen.id, marks, report):
            return None
        desktop.instance_id = seen.id
        self._instances.launched(seen)
        if seen.state == "pending":
            report.phase("pending")
        try:
            return await self._running(desktop, report)
        except BootFailed as error:
            # A refusal is why EC2 does not say how it is, or why the instance has ended.
            if isinstance(error, CloudRefused) and self._instances.get(seen.id).state not in (*LEAVING, *ENDED):
                raise
            report.note(error.detail)
            return None

    async def _has_an_end(self, desktop: Desktop, instance_id: str, marks: Mapping[str, str], report: Report) -> bool:
        """Whether its end is as the settings have it from here on. That its tag names one does not mean that there is a
        schedule: whoever launched it may have been killed in between."""
        if self._ttl is None:
            if tags.EXPIRES in marks:
                report.note(f"{instance_id} was launched with a TTL that ends it at {marks[tags.EXPIRES]}.")
            return tags.EXPIRES not in marks
        try:
            desktop.ends = await self._ttl.prolong(instance_id)
        except TtlUnavailable as refusal:
            report.note(refusal.detail)
            return False
        return True

    def hush(self) -> None:
        """What is told of boots is told no more."""
        for desktop in self.known.values():
            desktop.hush()

    # -- ending -------------------------------------------------------------------------------------------------

    async def destroy(self, desktop_id: str) -> None:
        if IDS.fullmatch(desktop_id) is None:
            return
        desktop = self.known.get(desktop_id)
        if desktop is not None:
            desktop.making.cancel()
            desktop.scheduling.cancel()
            desktop.hush()
            await desktop.launched.wait()
        ending = (self._end(instance_id) for instance_id in await self._instances_of(desktop_id, desktop))
        for outcome in await asyncio.gather(*ending, return_exceptions=True):
            if outcome is not None:
                raise outcome
        if self.known.get(desktop_id) is desktop:
            self.known.pop(desktop_id, None)

    async def _instances_of(self, desktop_id: str, desktop: Desktop | None) -> set[str]:
        """Mostly one. Not those that are another desktop by now: EC2 may tell of their old tags for a while."""
        others = {one.instance_id for one in self.known.values() if one is not desktop}
        mine = {desktop.instance_id} if desktop is not None and desktop.instance_id else set()
        patience = time.monotonic() + (UNHEARD if desktop is not None and desktop.unheard else 0.0)
        while True:
            for told in await self._tagged(desktop_id):
                if told["InstanceId"] not in others:
                    self._instances.launched(Seen.of(told))
                    mine.add(told["InstanceId"])
            if mine or time.monotonic() >= patience:
                return mine
            await anyio.sleep(LOOKS)

    async def _tagged(self, desktop_id: str) -> list[dict[str, Any]]:
        filters = [{"Name": f"tag:{tags.DESKTOP}", "Values": [desktop_id]}, *tags.of_daemon(self._daemon_id)]
        pages = await self._cloud.pages("ec2", "describe_instances", "Reservations", Filters=filters, within=CALL)
        return [told for page in pages for told in page["Instances"]]

    async def _end(self, instance_id: str) -> None:
        """Return when it is seen to have ended. What EC2 does not know yet is told again to end; what is only taken for
        gone, since answers left it out, is told as well, and EC2 must say itself that there is no such instance."""
        seen = self._instances.get(instance_id)
        told = False
        while seen.state != "terminated" and not (told and seen.ended):
            try:
                await self._cloud.call("ec2", "terminate_instances", within=CALL, InstanceIds=[instance_id])
            except CloudRefused as refusal:
                if refusal.facts.get("aws_code") != "InvalidInstanceID.NotFound":
                    raise
                if seen.ended:
                    break
            else:
                told = True
                self._instances.launched(Seen(instance_id, "", "shutting-down"))
            with anyio.move_on_after(AGAIN):
                await self._instances.fresh()
                seen = await self._instances.until(instance_id, lambda seen: seen.state == "shutting-down")
            if seen.state == "shutting-down":
                seen = await self._instances.until(instance_id, lambda seen: False)
        if self._ttl is not None:
            try:
                await self._ttl.end(instance_id)
            except CloudRefused as refusal:
                logger.warning("its schedule stays until the next sweep", instance_id=instance_id, error=str(refusal))

    # -- living -------------------------------------------------------------------------------------------------

    async def wait(self, desktop_id: str) -> Death:
        desktop = self.known.get(desktop_id)
        if desktop is None:
            return Death("there is no such desktop")
        await desktop.launched.wait()
        if desktop.instance_id is None:
            return Death(f"it was never launched: {desktop.failure}")

        def is_over(seen: Seen) -> bool:
            return desktop.renewed or (seen.state in LEAVING and not (desktop.parked and seen.state != LEAVING[0]))

        seen = await self._instances.until(desktop.instance_id, is_over, hurry=False)
        if desktop.renewed:
            return Death("its instance is another desktop now")
        why = seen.reason or seen.reason_code or "EC2 gives no reason"
        return Death(f"{desktop.instance_id} is {seen.state}: {why}")

    async def renew(self, old_id: str, spec: InstanceSpec, report: Report) -> Made | None:
        """By EC2's replacement of root volumes, which restores what the instance was launched from."""
        old = self.known.get(old_id)
        if self._settings.aws_reset != "replace-root" or old is None or old.instance_id is None or old.parked:
            return None
        instance_id = old.instance_id
        if self._instances.get(instance_id).state != "running" or not old.launched.is_set():
            return None
        new = Desktop(spec.id, instance_id, asked=old.asked, ends=old.ends)
        new.launched.set()
        old.renewed = True
        old.hush()
        del self.known[old_id]
        self.known[spec.id] = new
        report.phase("replace-root")
        with new.making:
            await self._retag(instance_id, spec)
            await replace_root(self._cloud, instance_id, spec.id, report)
            await self._tag(instance_id, {tags.RENEWAL: tags.RENEWED})
            return await self._running(new, report)
        raise BootFailed(f"The desktop {spec.id} was destroyed while it was made.")

    async def _retag(self, instance_id: str, spec: InstanceSpec) -> None:
        """It is dirty yet, and says so: after a crash nobody takes it for the clean one that it is named for."""
        told = {"Name": spec.id, tags.DESKTOP: spec.id, tags.JOB: spec.job_id, tags.RENEWAL: tags.RENEWING}
        told[tags.ENV] = "" if spec.env is None else str(spec.env)
        await self._tag(instance_id, told)

    async def _tag(self, instance_id: str, told: Mapping[str, str]) -> None:
        await self._cloud.call("ec2", "create_tags", within=CALL, Resources=[instance_id], Tags=tags.as_list(told))

    async def park(self, desktop_id: str) -> None:
        desktop = self._existing(desktop_id)
        assert desktop.instance_id is not None
        desktop.parked = True
        desktop.hush()
        await self._cloud.call("ec2", "stop_instances", within=CALL, InstanceIds=[desktop.instance_id])
        seen = await self._instances.until(desktop.instance_id, lambda seen: seen.state in ("stopped", "shutting-down"))
        if seen.state != "stopped":
            raise InfraError(f"{desktop.instance_id} was to stop, and is {seen.state}: {seen.reason}")

    async def unpark(self, desktop_id: str, report: Report) -> Made:
        desktop = self._existing(desktop_id)
        report.phase("start")
        with anyio.CancelScope() as desktop.making:
            await self._cloud.call("ec2", "start_instances", within=CALL, InstanceIds=[desktop.instance_id])
            made = await self._running(desktop, report)
            desktop.parked = False
            return made
        raise BootFailed(f"The desktop {desktop_id} was destroyed while it was started.")

    def _existing(self, desktop_id: str) -> Desktop:
        desktop = self.known.get(desktop_id)
        if desktop is None or desktop.instance_id is None:
            raise BootFailed(f"There is no desktop {desktop_id}.")
        return desktop

    async def prolong(self, left: float) -> None:
        """Put off the end of each that has less than `left` seconds: all at once, since a scheduler that hangs for one
        must not be the end of the others."""
        due = [
            desktop
            for desktop in self.known.values()
            if desktop.instance_id is not None and desktop.ends is not None and desktop.ends - time.time() < left
        ]
        await asyncio.gather(*(self._prolong(desktop) for desktop in due))

    async def _prolong(self, desktop: Desktop) -> None:
        assert self._ttl is not None
        assert desktop.instance_id is not None
        assert desktop.ends is not None
        try:
            desktop.ends = await self._ttl.prolong(desktop.instance_id)
        except CloudRefused as refusal:
            until = tags.in_utc(desktop.ends)
            logger.warning("its end cannot be put off", desktop_id=desktop.id, until=until, error=str(refusal))

    async def list(self) -> frozenset[str]:
        pages = await self._cloud.pages(
            "ec2", "describe_instances", "Reservations", Filters=tags.of_daemon(self._daemon_id), within=CALL
        )
        found = {tags.as_dict(told.get("Tags")).get(tags.DESKTOP, "") for page in pages for told in page["Instances"]}
        return frozenset(found - {""}) | frozenset(self.known)


def _endpoints(address: str) -> Endpoints:
    """The ports that OSWorld's images have."""
    return Endpoints(
        guest=f"http://{address}:5000",
        cdp=f"http://{address}:9222",
        vnc=f"http://{address}:8006",
        vlc=f"http://{address}:8080",
    )
