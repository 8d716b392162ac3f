"""The set-up steps that work on Chrome's tabs, and what other steps need to work with Chrome."""

from __future__ import annotations

import math
import re
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import anyio

from ...boot.probes import BRIDGE, CHROME
from ...errors import EnvdError, GuestMisbehaved, GuestUnreachable
from ...guest import Browser
from ..task import Parameters
from .context import Context, Run

START_SECONDS = 75.0
"""Upstream gives up after fifteen tries, five seconds apart."""
LOAD_SECONDS = 60.0
SETTLE_SECONDS = 5.0
"""How long pages that were asked for just before may take to be there; upstream always waits so long."""
PAUSE = 0.1
NEVER = math.inf

PROXY = "http://127.0.0.1:18888"
"""Where a `proxy` step makes a proxy, in the guest."""

BLANK = frozenset({"", "about:blank", "chrome://newtab/", "chrome://new-tab-page/"})

LOADED = """new Promise(done => {
    const loaded = () => done(performance.timeOrigin);
    document.readyState == 'complete' ? loaded() : addEventListener('load', loaded);
})"""
"""Answers when the page began, which tells it from the next one."""

_GENERIC = frozenset({"ac", "co", "com", "edu", "go", "gov", "ne", "net", "or", "org"})
"""Second-level names under which countries sell domains: co.uk, com.sg."""


async def answering(context: Context) -> list[dict[str, Any]]:
    """Chrome's pages once it has any, as `Cdp.pages` tells them: the one that was last in front comes first. After
    ENVD_CHROME_GRACE seconds of silence Chrome and its bridge are started, and again after as many more. Raises
    GuestUnreachable after START_SECONDS."""
    patience = context.settings.chrome_grace
    begun = quiet_since = time.monotonic()
    while True:
        try:
            if pages := await context.cdp.pages():
                return pages
            last = "it shows no page"
        except EnvdError as error:
            last = error.detail
        now = time.monotonic()
        if now - begun > START_SECONDS:
            raise GuestUnreachable(f"Chrome did not come up within {START_SECONDS:g} s: {last}")
        if now - quiet_since >= patience:
            await start(context)
            quiet_since, patience = now, max(patience, SETTLE_SECONDS)
        await anyio.sleep(PAUSE)


async def start(context: Context, *urls: str) -> None:
    """Start Chrome in the guest with `urls`, and the bridge to its debugging port. Does not wait for them."""
    proxy = [f"--proxy-server={PROXY}"] if context.proxied else []
    await context.guest.launch([*CHROME, *proxy, *urls])
    await context.guest.launch(BRIDGE)


async def new_tab(browser: Browser) -> str:
    """A session with a new, empty tab: behind all others in their row, and the one that is seen."""
    target = (await browser.send("Target.createTarget", {"url": "about:blank"})).get("targetId")
    if not isinstance(target, str):
        raise GuestMisbehaved("Chrome opened a tab and did not say which")
    return await browser.attach(target)


async def visit(browser: Browser, session: str, url: str, timeout: float) -> str:
    """Go to `url` and wait until it has loaded, wherever it leads. Answers what went wrong, or "": pages fail for
    reasons of their own. Raises GuestUnreachable when Chrome itself is gone, GuestMisbehaved when it talks nonsense."""
    failure: EnvdError | None = None
    warning = ""
    await browser.send("Page.enable", session_id=session)  # or a page does not tell of its dialogs
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_dismiss_dialogs, browser, session)
        try:
            with anyio.fail_after(timeout):
                warning = await _go(browser, session, url)
        except TimeoutError:
            warning = f"{url} had not loaded after {timeout:g} s"
        except EnvdError as error:
            if "chrome_said" in error.facts:
                warning = f"{url} was not opened: {error.detail}"
            else:
                failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return warning


async def _go(browser: Browser, session: str, url: str) -> str:
    # Answers when the page begins to come in. The deadline is the caller's.
    answer = await browser.send("Page.navigate", {"url": url}, session_id=session, timeout=NEVER)
    if answer.get("errorText"):
        return f"{url} did not load: {str(answer['errorText'])[:200]}"
    await loaded(browser, session)
    return ""


async def _dismiss_dialogs(browser: Browser, session: str) -> None:
    """A page that asks something while it loads would wait for ever. It is told no, as upstream's driver does."""
    with browser.events("Page.javascriptDialogOpening", session) as dialogs, suppress(EnvdError):
        async for _ in dialogs:
            await browser.send("Page.handleJavaScriptDialog", {"accept": False}, session_id=session)


async def loaded(browser: Browser, session: str) -> None:
    """Return when the page has loaded, and is still there a moment later: some only send their visitors on. Has no
    deadline of its own: a page may load for ever."""
    before = None
    while True:
        try:
            page = await evaluate(browser, session, LOADED)
        except GuestMisbehaved:
            page = None  # it went on while it was asked
        if page is not None and page == before:
            return
        before = page
        await anyio.sleep(PAUSE)


async def evaluate(browser: Browser, session: str, expression: str) -> Any:
    """The JSON value of an expression of ours in the page, a promise's once it is kept. Raises GuestMisbehaved."""
    asked = {"expression": expression, "awaitPromise": True, "returnByValue": True, "userGesture": True}
    answer = await browser.send("Runtime.evaluate", asked, session_id=session, timeout=NEVER)
    result = answer.get("result")
    if answer.get("exceptionDetails") or not isinstance(result, dict):
        raise GuestMisbehaved(f"the page answered with an exception: {str(answer.get('exceptionDetails'))[:300]}")
    return result.get("value")


async def open_tabs(context: Context, parameters: Parameters) -> str:
    """`urls_to_open`: each in a new tab, in order, the last one in front. The empty pages that were there before are
    closed, or the first page when none is empty, as upstream closes the one that Chrome starts with."""
    urls: list[str] = list(parameters["urls_to_open"])
    if not urls:
        return ""
    warnings = [""] * len(urls)
    broken: list[EnvdError] = []

    async def load(index: int, session: str) -> None:
        try:
            warnings[index] = await visit(browser, session, urls[index], LOAD_SECONDS)
        except EnvdError as error:
            broken.append(error)

    before = await answering(context)
    async with context.cdp.browser() as browser:
        tabs = [await new_tab(browser) for _ in urls]
        for page in [page for page in before if page.get("url") in BLANK] or before[-1:]:
            await close(browser, str(page.get("id")))
        async with anyio.create_task_group() as loads:
            for index, session in enumerate(tabs):
                loads.start_soon(load, index, session)
    if broken:
        raise broken[0]
    return "; ".join(filter(None, warnings))


async def close_tabs(context: Context, parameters: Parameters) -> str:
    """`urls_to_close`: the first page at each. Chrome ends with its last page, so an empty one takes that one's
    place."""
    await answering(context)
    missing = []
    async with context.cdp.browser() as browser:
        for url in parameters["urls_to_close"]:
            page, left = await _find(browser, url)
            if page is None:
                missing.append(f"no page is at {url}")
                continue
            if left == 1:
                await new_tab(browser)
            await close(browser, page)
    return "; ".join(missing)


async def close(browser: Browser, target: str) -> None:
    """Close a page and return when it is gone. Raises GuestUnreachable for one that stays."""
    await browser.send("Target.closeTarget", {"targetId": target})
    try:
        with anyio.fail_after(SETTLE_SECONDS):
            while any(page["targetId"] == target for page in await browser.pages()):  # noqa: ASYNC110 - in the guest
                await anyio.sleep(PAUSE)
    except TimeoutError as error:
        raise GuestUnreachable(f"Chrome did not close a page within {SETTLE_SECONDS:g} s.", sent=True) from error


async def _find(browser: Browser, url: str) -> tuple[str | None, int]:
    """The first page at `url`, and how many pages there are. Waits a while for it, as it may be on its way."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        pages = await browser.pages()
        found = next((page["targetId"] for page in pages if same_page(page["url"], url)), None)
        if found is not None or time.monotonic() > deadline:
            return found, len(pages)
        await anyio.sleep(PAUSE)


def same_page(one: str, other: str) -> bool:
    """Whether two URLs mean the same page, as tasks are written: without regard to `www`, to the top-level domain (a
    site sends its visitors to the one of their country) and to a slash at the end."""
    return _essence(one) == _essence(other)


def _essence(url: str) -> tuple[str, str, str, str, str]:
    try:
        parts = urlsplit(url if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", url) else f"http://{url}")
        host = parts.hostname or ""
    except ValueError:
        return "", "", url, "", ""
    return parts.scheme.lower(), _site(host), parts.path.rstrip("/"), parts.query, parts.fragment


def _site(host: str) -> str:
    labels = host.split(".")
    if labels[0] == "www" and len(labels) > 2:
        labels = labels[1:]
    if len(labels) < 2 or labels[-1].isdigit():
        return host
    if len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in _GENERIC:
        labels = labels[:-1]
    return ".".join(labels[:-1])


STEPS: dict[str, Run] = {"chrome_open_tabs": open_tabs, "chrome_close_tabs": close_tabs}
