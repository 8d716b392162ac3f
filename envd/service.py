"""Everything below HTTP, put together: driver, fleet, queue, envs, evaluations, events. What the app calls and the
daemon supervises."""

from __future__ import annotations

import json
import os
import signal
import ssl
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
from anyio.abc import TaskGroup

from .access import Access, access_of
from .actions.dialogue import DEFAULT_TEMPLATE, PromptTemplate
from .boot.fleet import Fleet
from .boot.queue import BootQueue, Reset
from .bundles import Bundles
from .calls import UNMARKED, Calls, Sent
from .drivers import make_driver
from .drivers.base import Driver
from .episodes import Envs
from .episodes import Sent as StepSent
from .errors import DiskLow, Draining, EnvBusy, InvalidRequest, SettingsError
from .evaluations import NO_EVALUATORS, Evaluations
from .events import EventLog
from .host import Host
from .journal import Journal
from .leases import Leases
from .models import DesktopState, Env, EnvState, Episode, Job, JobState, StepRequest, StepResult, Verdict
from .records import KeptAnswer, KeptDesktop, KeptReset
from .settings import Settings, variable
from .store import Kind, Store
from .tasks.abilities import Abilities
from .tasks.assets import Assets
from .tasks.evaluating import Evaluators
from .tasks.schema import examine, parse
from .tasks.task import NO_TASK
from .telemetry.about import note
from .telemetry.metrics import Metrics
from .telemetry.tracing import Tracing, open_tracing
from .vm.kvm import Kvm
from .vm.kvm import known as known_kvm

logger = structlog.get_logger(__name__)

OWED_SECONDS = 600.0
"""For how long after its end a reset whose caller gave up waiting is still the one that is sent again."""
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
        tracing: Tracing | None = None,
    ) -> None:
        self.settings = settings
        self.driver = driver
        self.store = store
        self.events = events
        self.daemon_id = daemon_id
        self.access = access
        self.fleet = Fleet(driver, settings, store, events, session, daemon_id)
        self.bundles = bundles
        self.envs = Envs(settings, self.fleet, events, store, load_template(settings), assets, bundles, session)
        self.calls = Calls(store)
        self.evaluations = Evaluations(settings, driver, self.envs, store, bundles, evaluators, events)
        self.evaluators = evaluators
        self.abilities = Abilities.of(settings, has_asset=assets.has_now, ocr=evaluators.ocr)
        self.queue = BootQueue(settings, self.fleet, self.envs, store, events)
        self.leases = Leases(settings, self.envs, self.queue, store, events)
        self.tracing = tracing
        if tracing is not None:
            events.listen(tracing.observe)
        self.host = Host(settings.state_dir)
        self.metrics = Metrics()
        events.listen(self.metrics.observe)
        self.queue.on_boot = self.metrics.booted
        self.kvm: Kvm | None = None
        """What is known of it since the provider was opened, which tries it if it needs it. None: nobody tried."""
        self.started_at = time.time()
        self.closing = anyio.Event()
        """No new work is taken."""
        self.draining = anyio.Event()
        """And nothing goes on any more."""
        self.drain_until: float | None = None
        """(monotonic) until when episodes may go on once there is no new work."""
        self.on_drain: Callable[[], None] = lambda: signal.raise_signal(signal.SIGTERM)
        self.streams = 0
        self._owed: dict[int, tuple[str, str]] = {}
        """Env → its last reset whose caller waits for the observation or gave up waiting: the job, what was asked."""
        self._running = False

    async def run(self, started: Callable[[], None]) -> None:
        """Recover, call `started`, serve until cancelled; then destroy every desktop, unless all is left to the next
        life (ENVD_KEEP_DESKTOPS).

        Any exception that comes out of here is a bug of ours, and whoever runs this must end the process.
        """
        try:
            async with anyio.create_task_group() as tasks:
                await self._recover(tasks)
                wanted = self.settings.prewarm
                if wanted or (wanted is None and self.driver.traits.prewarm):
                    self.queue.submit_prewarm()
                for part in (self.calls.run, self.evaluations.run, self.queue.run):
                    running = anyio.Event()
                    tasks.start_soon(part, running)
                    await running.wait()
                tasks.start_soon(self.leases.run)
                tasks.start_soon(self.host.run)
                self._running = True
                started()
        finally:
            self._running = False
            # After a mistake of ours, too, what the next life can take up is left to it.
            if not self.settings.keep_desktops:
                with anyio.move_on_after(CLEAR_LIMIT, shield=True):
                    await self.fleet.clear()
                if left := [desktop.id for desktop in self.fleet.desktops()]:
                    logger.error("desktops could not be removed in time; the next start removes them", desktop_ids=left)

    async def _recover(self, tasks: TaskGroup) -> None:
        """Take up what an earlier life left: desktops, then what is played on them, then jobs."""
        playing = await self.envs.plays_on()
        booting = {job.desktop_id for job in self.store.jobs() if _goes_on(job)}

        def goes_on(kept: KeptDesktop) -> bool:
            desktop = kept.desktop
            # A clean one must be what this life would make.
            same = (kept.screen, kept.image) == (self.settings.screen, self.driver.image)
            match desktop.state:
                case DesktopState.BOOTING:
                    return same and desktop.id in booting
                case DesktopState.READY:
                    return same and desktop.env is None and desktop.endpoints is not None
                case DesktopState.IN_USE:
                    return desktop.id in playing and desktop.endpoints is not None
            return False

        self.fleet.goes_on = goes_on
        recovered = anyio.Event()
        tasks.start_soon(self.fleet.run, recovered)
        await recovered.wait()
        await self.envs.recover(lambda raw: examine(raw, self.abilities).task)
        await self.evaluations.recover()
        await self.queue.recover(self._asked_again)
        await self.leases.recover()
        await self.store.settle()

    def _asked_again(self, kept: KeptReset) -> Reset:
        return Reset(
            task=parse(kept.task, self.abilities) if kept.task else NO_TASK,
            max_steps=kept.max_steps,
            counts=kept.counts,
            episode_timeout_s=kept.episode_timeout_s,
            queue_timeout_s=kept.queue_timeout_s,
            owner=kept.owner,
        )

    # -- the way out --------------------------------------------------------------------------------------------

    def ask_to_drain(self, limit_s: float | None = None) -> None:
        """Have the daemon end once the episodes that are played have ended, after `limit_s` seconds at the latest
        (ENVD_DRAIN_LIMIT). Asked again it changes the limit."""
        limit = self.settings.drain_limit if limit_s is None else limit_s
        self.drain_until = time.monotonic() + limit
        if not self.closing.is_set():
            self._stop_taking_work()
            self.on_drain()

    def _stop_taking_work(self) -> None:
        if self.closing.is_set():
            return
        self.closing.set()
        left = max(0.0, (self.drain_until or 0.0) - time.monotonic())
        message = f"The daemon takes no new work and ends; what is played may go on for {left:.0f} s."
        self.events.publish("note", message=message)
        if self.settings.keep_desktops:
            self.queue.hold()
        else:
            self.queue.close()

    @property
    def going_on(self) -> list[int]:
        """Envs whose episode is played or judged still, or about to begin. A reset that failed and waits for the next
        life of the daemon begins none."""
        return [
            number
            for number in range(len(self.envs))
            if not self.evaluations.is_over(number)
            and (self.envs.env(number).state is not EnvState.RESETTING or self.queue.of_env(number)[0] is not None)
        ]

    async def drain(self, at_once: anyio.Event | None = None) -> None:
        """Take no new work, let episodes go on until they have ended or the time for that is over, let running steps
        finish for a moment, cancel the jobs or leave them to the next life, wake whoever waits, end the streams.

        `at_once` cuts all waiting short.
        """
        if self.draining.is_set():
            return
        if self.drain_until is None:
            self.drain_until = time.monotonic() + self.settings.drain_limit
        self._stop_taking_work()
        async with anyio.create_task_group() as waiting:

            async def hurry() -> None:
                if at_once is not None:
                    await at_once.wait()
                    waiting.cancel_scope.cancel()

            waiting.start_soon(hurry)
            while self.going_on and time.monotonic() < self.drain_until:  # noqa: ASYNC110 - it is in several hands
                await anyio.sleep(min(0.2, max(0.0, self.drain_until - time.monotonic())))
            self.draining.set()
            with anyio.move_on_after(self.settings.drain_seconds):
                await self.envs.idle()
                await self.evaluations.idle()
            if not self.settings.keep_desktops:
                with anyio.move_on_after(1):
                    await self.queue.idle()
            waiting.cancel_scope.cancel()
        self.draining.set()
        if self.settings.keep_desktops:
            self.queue.leave()
            self.fleet.leave()
        self.events.close()

    # -- what the routes call -----------------------------------------------------------------------------------

    async def reset(
        self,
        env: int,
        task: Mapping[str, Any],
        how: Reset | None = None,
        sent: Sent = UNMARKED,
        *,
        until_told: bool = False,
    ) -> Job:
        """Accept a reset to `task`, an OSWorld task file, played as `how` says: the job is on disk before this returns.

        With `until_told` the same reset sent again is the same one until `told` was called for it, also when its job
        has ended meanwhile: for callers that can only give up waiting and ask again.

        Raises UnknownEnv, TaskInvalid, MissingRequirement, QueueFull, TooManyRequests, DiskLow, Draining, Leased,
        LeaseOver, KeyReused; none of them changes anything. And DeadlinePassed: then it goes on.
        """

        def submit() -> Job:
            self.envs.env(env)
            self.leases.require(env, sent.lease)
            asked = replace(how or Reset(), task=parse(task, self.abilities), owner=sent.owner)
            if until_told and (owed := self._owed_to(env, asked)):
                return owed
            job = self.queue.submit(env, asked)
            self._owed.pop(env, None)
            if until_told:
                self._owed[env] = job.id, asked.fingerprint
            return job

        return await self._accept(submit, sent)

    def told(self, env: int, job: Job) -> None:
        """A caller is sent the observation of this reset: the next one is another."""
        if self._owed.get(env, ("",))[0] == job.id:
            del self._owed[env]

    def _owed_to(self, env: int, asked: Reset) -> Job | None:
        """The job of this reset, if it ended well a moment ago, nobody was told, and nothing was done since."""
        job_id, fingerprint = self._owed.get(env, ("", ""))
        if fingerprint != asked.fingerprint or any(self.queue.of_env(env)):
            return None
        job = self.store.get_job(job_id)
        if job is None or job.ended_at is None or time.time() - job.ended_at > OWED_SECONDS:
            return None
        return job if job.episode_id and self.envs.is_untouched(env, job.episode_id) else None

    async def prewarm(self, sent: Sent = UNMARKED) -> Job:
        """As `reset`, for no env."""
        return await self._accept(self.queue.submit_prewarm, sent)

    async def _accept(self, submit: Callable[[], Job], sent: Sent) -> Job:
        async def work() -> Job:
            self.refuse_new_work()
            job = submit()
            note(job_id=job.id, env=job.env)
            try:
                await self.calls.keep(sent, "job", job.id)
            except DiskLow:
                # Nobody was told of one that is new; whoever joined it meanwhile is told the same. One that was joined
                # goes on.
                if not job.joined:
                    self.queue.cancel(job.id)
                raise
            return job

        return await self.calls.do(sent, work, self._job_again)

    async def _job_again(self, kept: KeptAnswer) -> Job:
        note(job_id=kept.id)
        return self.queue.get(kept.id)

    def refuse_new_work(self) -> None:
        """Raises Draining, DiskLow."""
        if self.closing.is_set():
            left = max(0.0, (self.drain_until or 0.0) - time.monotonic())
            raise Draining("The daemon is shutting down and takes no new work.", retry_after=left + 5)
        if trouble := self.store.trouble:
            raise DiskLow(
                f"No new work is taken: {trouble}.", hint="Make room on that disk (ENVD_STATE_DIR).", retry_after=30
            )

    async def step(self, env: int, request: StepRequest, sent: Sent = UNMARKED) -> StepResult:
        """See `Envs.step`. Refused also while a reset of the env waits: its caller has given this episode up."""

        async def work() -> StepResult:
            self.about(env)
            self.refuse_when_draining()
            self.leases.require(env, sent.lease)
            _, waiting = self.queue.of_env(env)
            if waiting is not None:
                raise EnvBusy(
                    f"A reset of env {env} waits ({waiting.id}).", hint="Wait for it or cancel it.", retry_after=1
                )
            return await self.envs.step(env, request, StepSent(sent.fingerprint, sent.key))

        async def again(kept: KeptAnswer) -> StepResult:
            return await self.envs.answered(kept.id, kept.step, with_picture=request.include_screenshot)

        return await self.calls.do(sent, work, again)

    async def evaluate(self, env: int, sent: Sent = UNMARKED) -> Verdict:
        """See `Evaluations.evaluate`."""

        async def work() -> Verdict:
            self.about(env)
            self.refuse_when_draining()
            self.leases.require(env, sent.lease)
            episode, _ = self.envs.played(env)
            if sent.key:
                answer = KeptAnswer(fingerprint=sent.fingerprint, what="verdict", id=episode.id)
                self.store.put(Kind.ANSWERS, sent.key, answer)
            return await self.evaluations.evaluate(env)

        async def again(kept: KeptAnswer) -> Verdict:
            now = self.envs.env(env).episode
            if now is not None and now.id == kept.id:
                # It may have been cut short before there was one, or before it was in the bundle.
                return await self.evaluations.evaluate(env)
            return await self.evaluations.verdict(kept.id)

        return await self.calls.do(sent, work, again)

    def about(self, env: int) -> None:
        """The request that is being served is about what is played there now. Raises UnknownEnv."""
        now = self.envs.env(env)
        note(
            env=env,
            episode_id=now.episode.id if now.episode else None,
            desktop_id=now.desktop.id if now.desktop else None,
        )

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
        if self.closing.is_set():
            reasons.append("the daemon is shutting down")
        elif not self._running:
            reasons.append("the boot queue does not run")
        if trouble := self.store.trouble:
            reasons.append(trouble)
        if self.queue.callers_waiting >= self.settings.queue_limit:
            reasons.append(f"the queue is full: {self.queue.callers_waiting} jobs wait")
        return reasons

    def readiness(self) -> dict[str, Any]:
        """What `/readyz` says."""
        reasons = self.not_ready()
        return {"ready": not reasons, "reasons": reasons, "warnings": self.doubts()}

    def doubts(self) -> list[str]:
        """What may keep a reset from succeeding although it can be served, or its episode from being judged."""
        doubts = []
        if self.settings.insecure:
            doubts.append("ENVD_INSECURE: whoever reaches this address can use the desktops")
        if failed := self.fleet.failed_boots:
            at, code = failed[-1]
            count = "boot" if len(failed) == 1 else f"{len(failed)} boots"
            doubts.append(
                f"the last {count} failed, {time.time() - at:.0f} s ago with {code}; /v1/jobs?state=failed tells why"
            )
        if self.evaluators.missing:
            doubts.append(f"episodes cannot be judged: {NO_EVALUATORS}")
        return doubts

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
    ):
        played = [episode.id for episode in (await store.all(Kind.EPISODES, Episode)).values()]
        assets = Assets(settings, session)
        await assets.load()
        async with (
            open_tracing(os.environ, daemon_id) as tracing,
            Bundles.open(settings, played) as bundles,
            Evaluators.open(settings, assets) as evaluators,
            driver or make_driver(settings, daemon_id) as opened,
        ):
            events = EventLog(store)
            service = Service(
                settings, opened, store, events, session, assets, bundles, evaluators, daemon_id, access, tracing
            )
            service.kvm = await anyio.to_thread.run_sync(known_kvm, settings.state_dir)
            yield service


def _goes_on(job: Job) -> bool:
    """Whether the boot of a job of an earlier life is wanted still."""
    return job.state is JobState.BOOTING and not job.cancel_requested


def refuse_unreadable(settings: Settings) -> None:
    """Raise SettingsError for a file that a setting names and that is not what it is to be. Blocks."""
    for field in ("proxy_file", "google_credentials", "google_account"):
        file: Path | None = getattr(settings, field)
        try:
            if file is not None:
                json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise SettingsError(f"{variable(field)}: {file} cannot be used: {error}.") from error
    if settings.tls_cert is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(settings.tls_cert, settings.tls_key)
        except OSError as error:
            raise SettingsError(
                f"ENVD_TLS_CERT={settings.tls_cert} with ENVD_TLS_KEY={settings.tls_key} cannot be used: {error}.",
                hint="Both are PEM: the certificate with its chain, and its key without a passphrase.",
            ) from error


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
