"""Everything below HTTP, put together: driver, fleet, queue, envs, evaluations, events. What the app calls and the
daemon supervises."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import anyio.to_thread
import structlog

from .access import Access, access_of
from .actions.dialogue import DEFAULT_TEMPLATE, PromptTemplate
from .boot.fleet import Fleet
from .boot.queue import BootQueue, Reset
from .bundles import Bundles
from .drivers import make_driver
from .drivers.base import Driver
from .episodes import Envs
from .errors import Draining, EnvBusy, InvalidRequest, SettingsError
from .evaluations import Evaluations
from .events import EventLog
from .journal import Journal
from .leases import Leases
from .models import Env, Job, StepRequest, StepResult, Verdict
from .settings import Settings, variable
from .store import Store
from .tasks.abilities import Abilities
from .tasks.assets import Assets
from .tasks.evaluating import Evaluators
from .tasks.schema import parse

logger = structlog.get_logger(__name__)

CLEAR_LIMIT = 2.5
"""Seconds that destroying what is left may take when the daemon ends."""


class Service:
    """Made by `open_service`. `run` must be running for resets to be served."""

    def __init__(
        self,
        settings: Settings,
        driver: Driver,
        store: Store,
        events: EventLog,
        session: aiohttp.ClientSession,
        assets: Assets,
        bundles: Bundles,
        evaluators: Evaluators,
        daemon_id: str,
        access: Access,
    ) -> None:
        self.settings = settings
        self.driver = driver
        self.store = store
        self.events = events
        self.daemon_id = daemon_id
        self.access = access
        self.fleet = Fleet(driver, settings, events, session, daemon_id)
        self.bundles = bundles
        self.envs = Envs(settings, self.fleet, events, load_template(settings), assets, bundles, session)
        self.evaluations = Evaluations(settings, driver, self.envs, store, bundles, evaluators, events)
        self.evaluators = evaluators
        self.abilities = Abilities.of(settings, has_asset=assets.has_now, ocr=evaluators.ocr)
        self.queue = BootQueue(settings, self.fleet, self.envs, store, events)
        self.leases = Leases(settings, self.envs, self.queue, store, events)
        self.started_at = time.time()
        self.draining = anyio.Event()
        self.streams = 0
        self._running = False

    async def run(self, started: Callable[[], None]) -> None:
        """Recover, call `started`, serve until cancelled; then destroy every desktop that would die with us.

        Any exception that comes out of here is a bug of ours, and whoever runs this must end the process.
        """
        try:
            async with anyio.create_task_group() as tasks:
                recovered, judging, consuming = anyio.Event(), anyio.Event(), anyio.Event()
                tasks.start_soon(self.fleet.run, recovered)
                await recovered.wait()
                tasks.start_soon(self.evaluations.run, judging)
                await judging.wait()
                wanted = self.settings.prewarm
                if wanted or (wanted is None and self.driver.traits.prewarm):
                    self.queue.submit_prewarm()
                tasks.start_soon(self.queue.run, consuming)
                await consuming.wait()
                await self.leases.recover()
                tasks.start_soon(self.leases.run)
                self._running = True
                started()
        finally:
            self._running = False
            with anyio.move_on_after(CLEAR_LIMIT, shield=True):
                await self.fleet.clear()
            if left := [desktop.id for desktop in self.fleet.desktops()]:
                logger.error("desktops could not be removed in time; the next start removes them", desktop_ids=left)

    async def drain(self) -> None:
        """Take no new work, wake whoever waits, let running steps finish for a moment, cancel the jobs, end the
        streams."""
        if self.draining.is_set():
            return
        self.draining.set()
        with anyio.move_on_after(self.settings.drain_seconds):
            await self.envs.idle()
            await self.evaluations.idle()
        self.queue.close()
        with anyio.move_on_after(1):
            await self.queue.idle()
        self.events.close()

    # -- what the routes call -----------------------------------------------------------------------------------

    async def reset(self, env: int, task: Mapping[str, Any], how: Reset | None = None) -> Job:
        """Accept a reset to `task`, an OSWorld task file, played as `how` says: the job is kept as durably as the store
        can before this returns.

        Raises UnknownEnv, TaskInvalid, MissingRequirement, QueueFull, Draining; none of them changes anything.
        """
        self.refuse_when_draining()
        self.envs.env(env)
        job = self.queue.submit(env, replace(how or Reset(), task=parse(task, self.abilities)))
        await self.store.commit()
        return job

    async def prewarm(self) -> Job:
        """As `reset`, for no env. Raises QueueFull and Draining."""
        self.refuse_when_draining()
        job = self.queue.submit_prewarm()
        await self.store.commit()
        return job

    async def step(self, env: int, request: StepRequest) -> StepResult:
        """See `Envs.step`. Refused also while a reset of the env waits: its caller has given this episode up."""
        self.refuse_when_draining()
        _, waiting = self.queue.of_env(env)
        if waiting is not None:
            raise EnvBusy(
                f"A reset of env {env} waits ({waiting.id}).", hint="Wait for it or cancel it.", retry_after=1
            )
        return await self.envs.step(env, request)

    async def evaluate(self, env: int) -> Verdict:
        """See `Evaluations.evaluate`."""
        self.refuse_when_draining()
        return await self.evaluations.evaluate(env)

    def refuse_other_screen(self, screen: tuple[int, int] | None) -> None:
        """Raise InvalidRequest unless desktops have the screen that a caller counts on."""
        if screen is not None and screen != self.settings.screen:
            have, want = ("x".join(map(str, size)) for size in (self.settings.screen, screen))
            message = f"desktops of this server have {have}, not {want}; ENVD_SCREEN sets it"
            raise InvalidRequest(f"screen: {message}.", errors=[{"field": "screen", "message": message}])

    def env(self, env: int) -> Env:
        running, waiting = self.queue.of_env(env)
        return self.envs.env(env).model_copy(
            update={
                "job_id": running.id if running else None,
                "waiting_job_id": waiting.id if waiting else None,
                "lease": self.leases.view(env),
            }
        )

    def all_envs(self) -> list[Env]:
        return [self.env(number) for number in range(len(self.envs))]

    def not_ready(self) -> list[str]:
        """Why a reset cannot be served now; empty when it can."""
        reasons = []
        if self.draining.is_set():
            reasons.append("the daemon is shutting down")
        elif not self._running:
            reasons.append("the boot queue does not run")
        if self.queue.callers_waiting >= self.settings.queue_limit:
            reasons.append(f"the queue is full: {self.queue.callers_waiting} jobs wait")
        return reasons

    def refuse_when_draining(self) -> None:
        if self.draining.is_set():
            raise Draining("The daemon is shutting down and takes no new work.", retry_after=5)

    def snapshot(self) -> dict[str, Any]:
        """What a watcher of everything needs first."""
        return {
            "queue": self.queue_view(),
            "envs": [env.model_dump(mode="json") for env in self.all_envs()],
            "jobs": [job.model_dump(mode="json") for job in self.queue.active()],
        }

    def queue_view(self) -> dict[str, Any]:
        return {
            "booting": [job.model_dump(mode="json") for job in self.queue.booting()],
            "waiting": [job.model_dump(mode="json") for job in self.queue.waiting()],
            "limit": self.settings.queue_limit,
            "spares": self.fleet.spares,
            "spares_wanted": self.settings.spares,
            "boot_width": self.driver.traits.boot_width,
            "restore_width": self.driver.traits.restore_width,
        }


@asynccontextmanager
async def open_service(settings: Settings, daemon_id: str, driver: Driver | None = None) -> AsyncIterator[Service]:
    """A service with everything it needs open. Raises StartError when the provider cannot be used."""
    await anyio.to_thread.run_sync(refuse_unreadable, settings)
    access = await anyio.to_thread.run_sync(access_of, settings, os.environ)
    # The daemon itself bounds every call, and one desktop must not be able to use up all connections.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    async with (
        Journal.open(settings) as store,
        aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session,
        Bundles.open(settings) as bundles,
    ):
        assets = Assets(settings, session)
        await assets.load()
        async with (
            Evaluators.open(settings, assets) as evaluators,
            driver or make_driver(settings, daemon_id) as opened,
        ):
            events = EventLog(store)
            yield Service(settings, opened, store, events, session, assets, bundles, evaluators, daemon_id, access)


def refuse_unreadable(settings: Settings) -> None:
    """Raise SettingsError for a file that a setting names and that holds no JSON. Blocks."""
    for field in ("proxy_file", "google_credentials", "google_account"):
        file: Path | None = getattr(settings, field)
        try:
            if file is not None:
                json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise SettingsError(f"{variable(field)}: {file} cannot be used: {error}.") from error


def load_template(settings: Settings) -> PromptTemplate:
    """The prompt that trainers are shown. Raises SettingsError for a file that cannot be used."""
    if settings.prompt_file is None:
        return DEFAULT_TEMPLATE
    try:
        template = PromptTemplate.load(settings.prompt_file)
    except ValueError as error:
        raise SettingsError(f"ENVD_PROMPT_FILE: {error}.") from error
    logger.info("prompt template", file=str(settings.prompt_file), published=template.matches_published)
    return template
