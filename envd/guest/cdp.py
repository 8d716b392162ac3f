"""One desktop's Chrome (DevTools protocol, port 9222 in OSWorld images), as seen by the daemon.

`Cdp` asks over HTTP what there is; `Browser`, a websocket, does things. The guest is not trusted: of the address that
it gives for the websocket only the path is used, no redirect is followed, every answer is bounded in size and time.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from ..errors import EnvdError, GuestMisbehaved, GuestUnreachable
from .client import parse_json, read_bounded

ANSWER_SECONDS = 10.0
"""How long Chrome may take over a command that does not wait for a page."""

LARGEST_MESSAGE = 4 * 1024 * 1024
CLOSE_SECONDS = 1.0
PAGES_LOOKED_AT = 32
EVENTS_KEPT = 64
BROWSER_PATH = re.compile(r"/devtools/browser/[A-Za-z0-9-]{1,64}")
HEADERS = {"Host": "localhost"}
"""Chrome answers those only that call it by an address or as localhost, lest web pages reach it through a name of
theirs; a desktop may be known to us by another name. With an Origin it would refuse us too, so none is sent."""

FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
"""A page gets animation frames only while it is shown. The second one is asked for when the first was on its way."""

Params = dict[str, Any]


class Cdp:
    """Raises GuestUnreachable and GuestMisbehaved."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url

    async def version(self, timeout: float = 5) -> Params:
        """`/json/version`: Browser, Protocol-Version, webSocketDebuggerUrl, …"""
        answer = await self._get("/json/version", timeout)
        if not isinstance(answer, dict) or not answer.get("Browser"):
            raise GuestMisbehaved(f"{self.url}/json/version names no browser")
        return answer

    async def pages(self, timeout: float = 5) -> list[Params]:
        """The targets of type `page`, as `/json/list` tells them."""
        answer = await self._get("/json/list", timeout)
        if not isinstance(answer, list):
            raise GuestMisbehaved(f"{self.url}/json/list is no list")
        return [target for target in answer if isinstance(target, dict) and target.get("type") == "page"]

    @asynccontextmanager
    async def browser(self, timeout: float = ANSWER_SECONDS) -> AsyncIterator[Browser]:
        """A connection to the browser as a whole, closed at the end of the block. `timeout` is for connecting."""
        address = str((await self.version(timeout)).get("webSocketDebuggerUrl"))
        path = urlsplit(address).path if len(address) < 1000 else ""
        if not BROWSER_PATH.fullmatch(path):
            raise GuestMisbehaved(f"{self.url}/json/version names no websocket of the browser: {address[:100]!r}")
        async with self._websocket(path, timeout) as socket:
            browser, failure = Browser(socket, self.url), None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(browser.read)
                try:
                    yield browser
                except Exception as error:  # noqa: BLE001 - raised again outside of the group, which would wrap it
                    failure = error
                finally:
                    tasks.cancel_scope.cancel()
            if failure is not None:
                raise failure

    async def painted(self, timeout: float) -> bool:
        """Whether some page is on the screen and gets drawn: two animation frames within `timeout` seconds. False for
        pages that are hidden, crashed or hang, and when there is none. A page is listed before its window has content.
        """
        found = anyio.Event()

        async def look(browser: Browser, target: str) -> None:
            try:
                session = await browser.attach(target, timeout)
                frames = {"expression": FRAMES, "awaitPromise": True, "returnByValue": True}
                answer = await browser.send("Runtime.evaluate", frames, session_id=session, timeout=timeout)
            except EnvdError:
                return
            if answer.get("result") == {"type": "boolean", "value": True}:
                found.set()
                looks.cancel_scope.cancel()

        async with self.browser(timeout) as browser:
            targets = (await browser.pages())[:PAGES_LOOKED_AT]
            with anyio.move_on_after(timeout):
                async with anyio.create_task_group() as looks:
                    for target in targets:
                        looks.start_soon(look, browser, target["targetId"])
        return found.is_set()

    @asynccontextmanager
    async def _websocket(self, path: str, timeout: float) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """On the caller's connections, but in a session that follows no redirect: the guest does not choose where the
        daemon connects to."""
        async with aiohttp.ClientSession(
            connector=self._session.connector,
            connector_owner=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[no_redirects()],
        ) as session:
            try:
                with anyio.fail_after(timeout):
                    socket = await session.ws_connect(self.url + path, headers=HEADERS, max_msg_size=LARGEST_MESSAGE)
            except aiohttp.WSServerHandshakeError as error:
                raise GuestMisbehaved(f"{self.url}{path} is no websocket: {error.status} {error.message}") from error
            except (aiohttp.ClientError, TimeoutError) as error:
                raise GuestUnreachable(f"{self.url}{path}: {type(error).__name__} {error}".strip()) from error
            try:
                yield socket
            finally:
                # A deadline of ours: the library's starts again with every message that still comes in.
                with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                    await socket.close()

    async def _get(self, path: str, timeout: float) -> Any:
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self._session.get(
                self.url + path, timeout=limit, allow_redirects=False, headers=HEADERS
            ) as response:
                body = await read_bounded(response, LARGEST_MESSAGE)
        except aiohttp.ClientConnectorError as error:
            raise GuestUnreachable(f"{self.url} refused the connection.") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise GuestUnreachable(f"{self.url}{path}: {type(error).__name__} {error}".strip()) from error
        if response.status != 200:
            raise GuestMisbehaved(f"{self.url}{path} answered {response.status}")
        try:
            return parse_json(body)
        except ValueError as error:
            raise GuestMisbehaved(f"{self.url}{path} answered no JSON") from error


class Browser:
    """An open websocket. Commands may be sent from many tasks at once; pages are spoken to in sessions (`attach`).

    Calls raise GuestMisbehaved, with Chrome's own words, for what Chrome refuses and for messages that cannot be used,
    and GuestUnreachable when there is no answer in time or the connection broke.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, url: str) -> None:
        self._socket = socket
        self._url = url
        self._last_id = 0
        self._answers: dict[int, asyncio.Future[Params]] = {}
        self._events: dict[tuple[str, str | None], list[MemoryObjectSendStream[Params]]] = {}
        self._broken: EnvdError | None = None

    async def send(
        self,
        method: str,
        params: Params | None = None,
        *,
        session_id: str | None = None,
        timeout: float = ANSWER_SECONDS,
    ) -> Params:
        """The `result` of a command: of the browser, or of the page that `session_id` is a session with."""
        self._last_id += 1
        number = self._last_id
        command = {"id": number, "method": method, "params": params or {}}
        if session_id is not None:
            command["sessionId"] = session_id
        answer: asyncio.Future[Params] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            with anyio.fail_after(timeout):
                await self._transmit(json.dumps(command))
                message = await answer
        except TimeoutError as error:
            raise GuestUnreachable(f"Chrome at {self._url} did not answer {method} within {timeout:g} s.") from error
        finally:
            del self._answers[number]
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # asked for, so that nobody misses it when the command itself could not be sent
        refusal, result = message.get("error"), message.get("result")
        if isinstance(refusal, dict):
            words = str(refusal.get("message"))[:300]
            raise GuestMisbehaved(f"Chrome at {self._url} refused {method}: {words}", chrome_said=words)
        if not isinstance(result, dict):
            raise GuestMisbehaved(f"Chrome at {self._url} answered {method} with no result")
        return result

    @contextmanager
    def events(self, event: str, session_id: str | None = None) -> Iterator[MemoryObjectReceiveStream[Params]]:
        """The `params` of each `event` from here to the end of the block. The stream ends with the connection; of many
        that nobody receives, the latest are lost.

        >>> with browser.events("Page.loadEventFired", session) as loads:
        ...     await browser.send("Page.navigate", {"url": url}, session_id=session)
        ...     await loads.receive()
        """
        hand, receive = anyio.create_memory_object_stream[Params](EVENTS_KEPT)
        hands = self._events.setdefault((event, session_id), [])
        hands.append(hand)
        if self._broken is not None:
            hand.close()
        with hand, receive:
            try:
                yield receive
            finally:
                hands.remove(hand)
                if not hands:
                    self._events.pop((event, session_id), None)

    async def attach(self, target_id: str, timeout: float = ANSWER_SECONDS) -> str:
        """The id of a new session with a page. It ends with the connection."""
        answer = await self.send("Target.attachToTarget", {"targetId": target_id, "flatten": True}, timeout=timeout)
        session = answer.get("sessionId")
        if not isinstance(session, str):
            raise GuestMisbehaved(f"Chrome at {self._url} attached to {target_id} without a session")
        return session

    async def pages(self) -> list[Params]:
        """The pages, each with at least `targetId` and `url` as strings, in no order."""
        infos = (await self.send("Target.getTargets")).get("targetInfos")
        if not isinstance(infos, list):
            raise GuestMisbehaved(f"Chrome at {self._url} lists no targets")
        return [info for info in infos if _is_page(info)]

    async def read(self) -> None:
        """Hand out what Chrome says until the connection ends; never raises. For the task that owns the connection."""
        why: EnvdError = GuestUnreachable(f"Chrome at {self._url} closed the connection.", sent=True)
        try:
            async for message in self._socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    raise GuestMisbehaved(f"Chrome at {self._url} sent {message.type.name}: {str(message.data)[:200]}")
                self._take(message.data)
        except EnvdError as error:
            why = error
        finally:
            self._broken = why
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(why)
            for hand in [hand for hands in self._events.values() for hand in hands]:
                hand.close()

    def _take(self, text: str) -> None:
        try:
            message = parse_json(text.encode())
        except ValueError as error:
            raise GuestMisbehaved(f"Chrome at {self._url} sent no JSON: {text[:100]!r}") from error
        if not isinstance(message, dict):
            raise GuestMisbehaved(f"Chrome at {self._url} sent {type(message).__name__} where an object belongs")
        number, method, session = message.get("id"), message.get("method"), message.get("sessionId")
        if isinstance(number, int):
            # One that nobody waits for came too late for its command.
            if (answer := self._answers.get(number)) and not answer.done():
                answer.set_result(message)
        elif isinstance(method, str) and (session is None or isinstance(session, str)):
            params = message.get("params")
            for hand in self._events.get((method, session), ()):
                with suppress(anyio.WouldBlock):
                    hand.send_nowait(params if isinstance(params, dict) else {})

    async def _transmit(self, text: str) -> None:
        if self._broken is not None:
            raise self._broken
        try:
            await self._socket.send_str(text)
        except (aiohttp.ClientError, OSError) as error:
            raise GuestUnreachable(f"Chrome at {self._url} is gone: {error}", sent=True) from error


def _is_page(info: object) -> bool:
    return (
        isinstance(info, dict)
        and info.get("type") == "page"
        and isinstance(info.get("targetId"), str)
        and isinstance(info.get("url"), str)
    )


def no_redirects() -> aiohttp.TraceConfig:
    """Of a session in which a websocket follows none; for plain requests aiohttp has an argument."""
    config = aiohttp.TraceConfig()
    config.on_request_redirect.append(_refuse_redirect)
    return config


async def _refuse_redirect(
    session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceRequestRedirectParams
) -> None:
    raise GuestMisbehaved(f"{params.url} answered {params.response.status}: a redirect where a websocket belongs")
