"""What a grading says to its guest and to the internet: bounded, never sent twice if it acts, entered in the ledger.

Getters use `requests`, `urllib` and Playwright by themselves. `watch` puts our own handling under these, so that an
unreachable guest, a timeout or garbage is known for what it is, whatever the getter makes of it.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any
from urllib.parse import urlsplit

import requests

from .ledger import AssetMissing, GuestFailure, InternetFailure, Ledger, Missing

LARGEST_FILE = 512 * 1024 * 1024
LARGEST_ANSWER = 64 * 1024 * 1024
CONNECT_SECONDS = 10
GUEST_SECONDS = 130
"""The guest's own limit of a command is 120 s."""
TRIES = 3
RETRY_PAUSE = 0.3

_NETWORK_ERRORS = re.compile(
    r"net::ERR_(NAME|INTERNET|CONNECTION|TIMED_OUT|ADDRESS|PROXY|NETWORK|TUNNEL|DNS|EMPTY_RESPONSE|SOCKET|SSL)"
    r"|Timeout \d+ms exceeded"
)
"""Of what Playwright says when a page cannot be opened: the network's doing, not the address's."""


@dataclass(frozen=True)
class Answer:
    """What the guest server said. `path` is for messages."""

    path: str
    status: int
    body: bytes

    def json(self) -> dict[str, Any]:
        """Raises GuestFailure when it is no JSON object."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise GuestFailure(f"The guest's {self.path} answered {self.status} with {_excerpt(self.body)}.")
        return value


class Guest:
    """The guest server of one desktop."""

    def __init__(self, request: Mapping[str, Any], ledger: Ledger, deadline: float) -> None:
        self.host: str = request["guest"]["host"]
        self.ports = {name: int(request["guest"][f"{name}_port"]) for name in ("server", "chromium", "vnc", "vlc")}
        self.ledger = ledger
        self._deadline = deadline
        self._url = f"http://{self.host}:{self.ports['server']}"

    def ask(self, method: str, path: str, *, accept: tuple[int, ...] = (200,), **how: Any) -> Answer:
        """A call that only reads; tried again when the connection fails. Raises GuestFailure."""
        for attempt in range(1, TRIES + 1):
            try:
                answer = self.exchange(method, self._url + path, **how)
                break
            except GuestFailure:
                if attempt == TRIES or self._left() < CONNECT_SECONDS:
                    raise
                time.sleep(RETRY_PAUSE)
        if answer.status not in accept:
            raise GuestFailure(f"The guest's {path} answered {answer.status}: {_excerpt(answer.body)}.")
        return answer

    def execute(self, command: list[str]) -> dict[str, Any]:
        """Run a command. Sent once. Raises GuestFailure unless it ran to its end."""
        answer = self.exchange("POST", f"{self._url}/execute", json={"command": command, "shell": False})
        said = check_execute(answer)
        if answer.status != 200:
            raise GuestFailure(f"The guest could not run Python: {str(said.get('message'))[:400]}")
        return said

    def exchange(self, method: str, url: str, **how: Any) -> Answer:
        """One request, whatever it is answered with. Raises GuestFailure when there is no whole answer."""
        path = urlsplit(url).path
        # Where a redirect leads would be the guest's choice.
        how |= {"allow_redirects": False, "stream": True, "timeout": (CONNECT_SECONDS, self._patience())}
        limit = LARGEST_FILE if path == "/file" else LARGEST_ANSWER
        key = f"{method} {urlsplit(url).netloc}{path}"
        with self.ledger.call(f"{method} {path}") as call:
            try:
                with _plain_session() as session, _request(session, method, url, **how) as response:
                    call.status = response.status_code
                    body = self._read(response, limit)
            except (requests.RequestException, OSError, ValueError) as error:
                call.error = _reason(error)
                stop = GuestFailure(f"The guest's {path} on {urlsplit(url).netloc} failed: {call.error}.", path=path)
                self.ledger.failed(key, stop)
                raise stop from error
        self.ledger.succeeded(key)
        return Answer(path, call.status, body)

    def is_mine(self, url: str) -> bool:
        parts = urlsplit(url)
        try:
            return parts.hostname == self.host.lower().strip("[]") and parts.port in self.ports.values()
        except ValueError:
            return False

    def _read(self, response: requests.Response, limit: int) -> bytes:
        parts, size = [], 0
        for chunk in response.iter_content(256 * 1024):
            size += len(chunk)
            if size > limit:
                raise ValueError(f"more than {limit} bytes")
            if self._left() <= 0:
                raise requests.Timeout("the answer did not end in time")
            parts.append(chunk)
        return b"".join(parts)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _patience(self) -> float:
        return max(1.0, min(GUEST_SECONDS, self._left() - 1))


def check_execute(answer: Answer) -> dict[str, Any]:
    """The object that /execute answered. Raises GuestFailure unless the command ran, and Missing when the guest says
    that it cannot run it: the getter would make None of that, and a metric would judge it as the model's doing."""
    said = answer.json()
    if answer.status == 200:
        if not isinstance(said.get("output"), str) or not isinstance(said.get("returncode"), int):
            raise GuestFailure(f"The guest's /execute answered {_excerpt(answer.body)}.")
        return said
    message = str(said.get("message", ""))
    if answer.status != 500 or said.get("status") != "error" or not message:
        raise GuestFailure(f"The guest's /execute answered {answer.status}: {_excerpt(answer.body)}.")
    if re.search(r"timed? ?out|TimeoutExpired", message, re.IGNORECASE):
        raise GuestFailure(f"A command in the guest did not end: {message[:400]}")
    raise Missing(
        f"The desktop cannot run a command of the evaluator: {message[:400]}",
        hint="The task was written for an image that has this program: use one.",
    )


def watch(guest: Guest, *, allow_internet: bool) -> None:
    """From now on `requests`, `urllib` and Playwright are watched, in this process."""
    _watch_requests(guest, allow_internet)
    _watch_urllib(guest, allow_internet)
    _watch_playwright(guest)


_request = requests.Session.request


def _plain_session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # no proxy stands between us and a guest
    return session


def _watch_requests(guest: Guest, allow_internet: bool) -> None:
    def request(session: requests.Session, method: str, url: str, **how: Any) -> requests.Response:
        url = str(url)
        if guest.is_mine(url):
            return _of_guest(guest, method.upper(), url, how)
        return _of_internet(guest.ledger, allow_internet, session, method.upper(), url, how)

    # wraps() keeps the signature: requests itself calls it with the same keywords.
    requests.Session.request = wraps(_request)(request)  # type: ignore[method-assign, assignment]  # meant


def _of_guest(guest: Guest, method: str, url: str, how: dict[str, Any]) -> requests.Response:
    wanted = {name: how[name] for name in ("data", "json", "headers", "auth", "params", "files") if name in how}
    try:
        answer = guest.exchange(method, url, **wanted)
    except GuestFailure as stop:
        _explain_refusal_of_vlc(guest, url, stop)
        raise
    try:
        if answer.path in ("/execute", "/setup/execute"):
            check_execute(answer)
        elif answer.status >= 400 and not answer.path.startswith("/setup/"):
            raise GuestFailure(f"The guest's {answer.path} answered {answer.status}: {_excerpt(answer.body)}.")
    except (GuestFailure, Missing) as stop:
        guest.ledger.failed(answer.path, stop)  # also if something swallows it
        raise
    response = requests.Response()
    response.status_code, response.url = answer.status, url
    response._content = answer.body
    response.encoding = "utf-8"
    return response


def _explain_refusal_of_vlc(guest: Guest, url: str, stop: GuestFailure) -> None:
    """A VLC that does not run is the state of the desktop. Raises FileNotFoundError when the guest says so itself."""
    if urlsplit(url).port != guest.ports["vlc"]:
        return
    looked = guest.exchange("POST", guest._url + "/execute", json={"command": ["pgrep", "-x", "vlc"], "shell": False})
    said = check_execute(looked)
    if looked.status == 200 and said["returncode"] == 1 and not said["output"].strip():
        guest.ledger.outstanding.clear()
        guest.ledger.warn("VLC does not run in the desktop.")
        raise FileNotFoundError("VLC does not run in the desktop.") from stop


def _of_internet(
    ledger: Ledger, allow: bool, session: requests.Session, method: str, url: str, how: dict[str, Any]
) -> requests.Response:
    host = urlsplit(url).hostname or url
    if ledger.getter == "cloud_file":
        raise AssetMissing(f"The file {url} was not put in place before the evaluation.", url=url)
    if not allow:
        raise InternetFailure(f"The evaluator asks for {url[:300]}, and this daemon is offline.", url=url[:300])
    if how.get("timeout") is None:
        how["timeout"] = (CONNECT_SECONDS, 30)
    with ledger.call(f"{method} {host}") as call:
        try:
            response = _request(session, method, url, **how)
        except requests.RequestException as error:
            ledger.failed(f"internet {host}", InternetFailure(f"{url[:300]} failed: {_reason(error)}.", url=url[:300]))
            raise
        call.status = response.status_code
    ledger.succeeded(f"internet {host}")
    return response


def _watch_urllib(guest: Guest, allow_internet: bool) -> None:
    plain = urllib.request.urlopen

    def urlopen(url: Any, data: Any = None, timeout: Any = None, **how: Any) -> Any:
        if not allow_internet:
            raise urllib.error.URLError("this daemon is offline")
        with guest.ledger.call(f"urlopen {getattr(url, 'full_url', url)}"):
            return plain(url, data, timeout if isinstance(timeout, int | float) else 30, **how)

    urllib.request.urlopen = urlopen


def _watch_playwright(guest: Guest) -> None:
    """Chrome must be reached in the end (getters start it when it is not there), stay while it is read, and the last
    page that was opened must have been."""
    try:
        from playwright import sync_api
    except ImportError:
        return
    if not hasattr(sync_api, "__file__"):  # a placeholder
        return
    Browser, BrowserType, Page = sync_api.Browser, sync_api.BrowserType, sync_api.Page
    ledger = guest.ledger
    plain_connect, plain_goto, plain_close = BrowserType.connect_over_cdp, Page.goto, Browser.close

    def connect_over_cdp(kind: Any, endpoint: str, **how: Any) -> Any:
        how.setdefault("timeout", 30_000)
        with ledger.call(f"CDP {endpoint}"):
            try:
                browser = plain_connect(kind, endpoint, **how)
            except Exception as error:
                ledger.failed("cdp", GuestFailure(f"Chrome at {endpoint} could not be reached: {_first_line(error)}"))
                raise
        ledger.succeeded("cdp")
        browser.on("disconnected", lambda *_: _gone(ledger, browser))
        return browser

    def close(browser: Any, **how: Any) -> None:
        browser._envd_closing = True
        plain_close(browser, **how)

    def goto(page: Any, url: str, **how: Any) -> Any:
        with ledger.call(f"open {url}"):
            try:
                response = plain_goto(page, url, **how)
            except Exception as error:
                if _NETWORK_ERRORS.search(str(error)):
                    ledger.failed("page", InternetFailure(f"{url} could not be opened: {_first_line(error)}", url=url))
                raise
        ledger.succeeded("page")
        return response

    BrowserType.connect_over_cdp = connect_over_cdp
    Browser.close = close
    Page.goto = goto


def _gone(ledger: Ledger, browser: Any) -> None:
    if not getattr(browser, "_envd_closing", False):
        ledger.failed("cdp", GuestFailure("Chrome went away while it was read."))


def _reason(error: Exception) -> str:
    text = re.sub(r"<[^<>]* object at 0x[0-9a-f]+>:? ?", "", str(error))
    return f"{type(error).__name__}: {text}"[:400]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _excerpt(body: bytes) -> str:
    text = body[:300].decode(errors="replace").strip()
    return repr(text) if text else "nothing"
