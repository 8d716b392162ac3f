"""A real Chromium without a window, driven over its DevTools: for tests of pages.

    async with chromium(tmp_path) as browser, browser.page(1280, 900) as page:
        await page.open(url)
        await page.until("document.title === 'envd'")

`page.troubles` has what a page must not have: exceptions, errors on its console, and what its policy forbade.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
PATIENCE = 30.0
"""Seconds within which what is waited for is there; a loaded machine of two cores needs a few."""


@asynccontextmanager
async def chromium(folder: Path) -> AsyncIterator[Browser]:
    """A browser with a profile of its own in `folder`, gone after the block. Skips where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium; the Debian package is chromium")
    profile = folder / "profile"
    process = await asyncio.create_subprocess_exec(
        program,
        *FLAGS,
        f"--user-data-dir={profile}",
        "about:blank",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as http:
            url = await _address(profile / "DevToolsActivePort", process)
            async with http.ws_connect(url, max_msg_size=0) as socket:
                browser = Browser(socket)
                reading = asyncio.create_task(browser.read())
                try:
                    yield browser
                finally:
                    reading.cancel()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _address(file: Path, process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(PATIENCE):
        while process.returncode is None:
            with suppress(OSError, ValueError):
                port, path = (await asyncio.to_thread(file.read_text)).split()
                return f"ws://127.0.0.1:{port}{path}"
            await asyncio.sleep(0.02)
    raise AssertionError(f"chromium ended with {process.returncode}")


class Browser:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}

    async def command(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """What DevTools answers. Fails on an error."""
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        asked = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        await self._socket.send_json(asked)
        async with asyncio.timeout(PATIENCE):
            told = await answer
        assert "error" not in told, (method, told)
        result: dict[str, Any] = told["result"]
        return result

    async def read(self) -> None:
        async for message in self._socket:
            told = message.json()
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            elif page := self._pages.get(told.get("sessionId", "")):
                page.hear(told["method"], told["params"])

    @asynccontextmanager
    async def page(self, width: int = 1280, height: int = 900, *, dark: bool = False) -> AsyncIterator[Page]:
        """A page in a context of its own, so that nothing is kept of an earlier one."""
        context = (await self.command("Target.createBrowserContext"))["browserContextId"]
        target = (await self.command("Target.createTarget", url="about:blank", browserContextId=context))["targetId"]
        session = (await self.command("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await page.command(f"{domain}.enable")
        await page.resize(width, height)
        await page.theme(dark=dark)
        try:
            yield page
        finally:
            await self.command("Target.disposeBrowserContext", browserContextId=context)

    async def opened(self, part: str) -> dict[str, Any]:
        """What is told of the page whose address has that `part`, once there is one."""
        end = asyncio.get_running_loop().time() + PATIENCE
        while asyncio.get_running_loop().time() < end:
            for target in (await self.command("Target.getTargets"))["targetInfos"]:
                if target["type"] == "page" and part in target["url"]:
                    return target  # type: ignore[no-any-return]  # JSON
            await asyncio.sleep(0.05)
        raise AssertionError(f"no page at {part} was opened")


class Page:
    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.troubles: list[str] = []
        self.requests: list[str] = []
        """Addresses that it asked for."""
        self.headers: list[dict[str, str]] = []
        """Sent with each of them, their names in lower case."""
        self.refused: list[str] = []
        """Those that did not answer well, of which Chromium itself tells: a page may mean to ask and find out."""
        self.network: list[str] = []
        """And how."""

    def hear(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.troubles.append(str(details.get("exception", {}).get("description", details["text"])))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.troubles.append(str([one.get("value", one.get("description")) for one in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["source"] == "network":
            self.refused.append(params["entry"].get("url", ""))
            self.network.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.troubles.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
            self.headers.append({name.lower(): value for name, value in params["request"]["headers"].items()})

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        return await self._browser.command(method, self._session, **params)

    async def open(self, url: str) -> None:
        """Returns when it is loaded."""
        told = await self.command("Page.navigate", url=url)
        assert "errorText" not in told, told
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def evaluate(self, expression: str) -> Any:
        """Its value, as JSON; of a promise what it comes to. Fails where it throws."""
        told = await self._evaluated(expression)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def _evaluated(self, expression: str) -> dict[str, Any]:
        return await self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )

    async def until(self, expression: str, seconds: float = PATIENCE) -> Any:
        """Its value as soon as that is true, and it does not throw; fails with what the page shows. An element is no
        value: ask for `!!element`."""
        end = asyncio.get_running_loop().time() + seconds
        while not (value := (told := await self._evaluated(expression))["result"].get("value")) or (
            "exceptionDetails" in told
        ):
            if asyncio.get_running_loop().time() > end:
                shown = await self.evaluate("document.body.innerText.slice(0, 3000)")
                raise AssertionError(
                    f"{expression} did not come to pass; the page shows:\n{shown}\n{self.troubles} {self.network}"
                )
            await asyncio.sleep(0.03)
        return value

    async def click(self, selector: str) -> None:
        """As a mouse does, in the middle of what is first of that selector."""
        place = await self.until(
            f"""(() => {{
                const node = document.querySelector({selector!r});
                if (!node) return null;
                node.scrollIntoView({{block: 'center'}});
                const box = node.getBoundingClientRect();
                return box.width ? [box.x + box.width / 2, box.y + box.height / 2] : null;
            }})()"""
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            await self.command(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    async def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            await self.command(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text
            )

    async def type(self, text: str) -> None:
        await self.command("Input.insertText", text=text)

    async def resize(self, width: int, height: int) -> None:
        await self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def theme(self, *, dark: bool, still: bool = False) -> None:
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        await self.command("Emulation.setEmulatedMedia", features=features)

    async def screenshot(self, file: Path) -> None:
        """What is seen of the page, as a PNG."""
        told = await self.command("Page.captureScreenshot", format="png")
        await asyncio.to_thread(file.write_bytes, base64.b64decode(told["data"]))

    async def accessible(self) -> list[dict[str, Any]]:
        """What assistive technology is told of: role, name and whether it can have the keyboard, of every node."""
        await self.command("Accessibility.enable")
        nodes = (await self.command("Accessibility.getFullAXTree"))["nodes"]
        return [
            {
                "role": node["role"]["value"],
                "name": node.get("name", {}).get("value", ""),
                "focusable": any(
                    one["name"] == "focusable" and one["value"]["value"] for one in node.get("properties", ())
                ),
            }
            for node in nodes
            if not node.get("ignored")
        ]
