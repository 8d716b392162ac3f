"""The agent's web application: every endpoint, and JSON for every failure."""

from __future__ import annotations

import asyncio
import logging
import platform
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler

from envd.agent import x11
from envd.agent.accessibility import Accessibility
from envd.agent.commands import Commands
from envd.agent.errors import AgentError, problem
from envd.agent.files import Files
from envd.agent.input import WarmInterpreter
from envd.agent.limits import Limits
from envd.agent.processes import Processes
from envd.agent.recording import Recorder
from envd.agent.screen import Screen
from envd.agent.wallpaper import Wallpaper
from envd.agent.windows import Windows

log = logging.getLogger("envd.agent")

_PREPARE_AFTER = 1.0
"""Seconds to wait for a first request; usually somebody is asking already whether the desktop is up."""
_WARM_AFTER = 1.0
"""Seconds from then until the warm interpreter is started; a program that comes before starts it."""


class Agent:
    """All that one desktop's agent owns: its parts, and the processes and threads behind them."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.processes = Processes(self.limits)
        self.warm = WarmInterpreter(self.processes)
        self.screen = Screen(self.limits)
        self.recorder = Recorder(self.screen)
        self.answered = asyncio.Event()

    def routes(self) -> list[web.RouteDef]:
        limits, processes, screen = self.limits, self.processes, self.screen
        parts = (
            screen,
            self.recorder,
            Commands(limits, processes, self.warm),
            Files(limits),
            Windows(limits, processes, screen),
            Wallpaper(processes, screen),
            Accessibility(limits, processes),
        )
        own = [web.get("/", self.about), web.get("/platform", self.platform)]
        return [*own, *(route for part in parts for route in part.routes())]

    async def about(self, request: web.Request) -> web.Response:
        """What answers here, and whether the desktop behind it does."""
        try:
            width, height = await self.screen.ask(x11.size)
            screen: dict[str, int | str] = {"width": width, "height": height}
        except AgentError as error:
            screen = {"error": error.message}
        name = {"name": "envd-agent", "version": await asyncio.to_thread(_version)}
        return web.json_response(name | {"screen": screen, "interpreter": self.warm.pid is not None})

    async def platform(self, request: web.Request) -> web.Response:
        return web.Response(text=platform.system())

    async def prepare(self) -> None:
        """Get ready what the first picture and the first click need, out of the way of the first answer."""
        await asyncio.wait([asyncio.ensure_future(self.answered.wait())], timeout=_PREPARE_AFTER)
        self.screen.prepare()
        # Half a second of processor time, which the browser needs more while the desktop comes up.
        await asyncio.sleep(_WARM_AFTER)
        await self.warm.prepare()

    def kill(self) -> None:
        """End our processes at once, when there is no time to wait for them."""
        self.processes.kill_all()
        self.warm.kill()
        self.recorder.kill()

    async def close(self) -> None:
        await self.recorder.close()
        await self.warm.close()
        await self.processes.close()
        self.screen.close()


AGENT = web.AppKey("agent", Agent)


def create_app(limits: Limits | None = None, *, prepare: bool = True) -> web.Application:
    """The application of one desktop, the one that DISPLAY names. `prepare` warms things up once it has started.

    Serve it through `runner_of`: a client that hangs up must cancel its handler.
    """
    agent = Agent(limits)
    app = web.Application(middlewares=[_json_errors], client_max_size=agent.limits.body)
    app[AGENT] = agent
    app.add_routes(agent.routes())

    async def life(app: web.Application) -> AsyncIterator[None]:
        preparing = asyncio.create_task(agent.prepare()) if prepare else None
        yield
        if preparing is not None:
            preparing.cancel()
            await asyncio.gather(preparing, return_exceptions=True)
        await agent.close()

    app.cleanup_ctx.append(life)
    return app


def runner_of(app: web.Application) -> web.AppRunner:
    # Cancelling the handler is what ends a command whose client has gone.
    return web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=2)


@web.middleware
async def _json_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except AgentError as error:
        return error.response()
    except web.HTTPException as error:
        return _translated(request, error)
    except ConnectionError:  # the client is gone; there is nobody to tell
        raise
    except Exception as error:  # the boundary: everything must be answered, and the traceback kept
        log.exception("%s %s failed", request.method, request.path)
        return problem(500, f"{request.path} failed in a way nobody foresaw: {type(error).__name__}: {error}")
    finally:
        request.app[AGENT].answered.set()


def _translated(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    """aiohttp's own answers, as ours."""
    if error.status < 400:
        raise error
    reason = {
        404: f"there is no endpoint {request.path} in this desktop's agent",
        405: f"{request.path} does not take {request.method}; it takes {error.headers.get('Allow')}",
        413: f"the body of {request.path} is too large; send files through /setup/upload",
    }.get(error.status, error.reason)
    response = problem(error.status, reason)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def _version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("envd-server")
    except PackageNotFoundError:  # run from a copy of the files inside a desktop
        return None
