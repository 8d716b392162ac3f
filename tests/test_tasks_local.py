"""Whole tasks on real desktops, judged by the evaluators themselves: done right they score 1, left undone 0.

The tasks are those in `tests/tasks`, and of the public ones, where they are there, those that need neither the internet
nor programs that these desktops lack. Each is played on two desktops at once, one on which it is done and one on which
nothing is. Chrome's settings are set by what its own settings pages call.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from daemon_process import daemon

from envd import Client
from envd.client import EnvHandle
from envd.errors import SetupFailed
from envd.guest import Cdp, Guest
from envd.models import Verdict, VerdictStatus
from envd.settings import Settings
from envd.tasks.grading import find_interpreter
from envd.tasks.setup.chrome import evaluate, new_tab, visit

pytestmark = [pytest.mark.local, pytest.mark.asyncio(loop_scope="module")]

OURS = Path(__file__).with_name("tasks")
PUBLIC = Path(__file__).parents[2] / "shared" / "osworld-tasks"

ORDER = """<!doctype html><title>Order</title>
<button style="position: fixed; inset: 0; width: 100%" onclick="this.textContent = 'Ordered'">Order</button>"""

SET_PREFERENCE = "new Promise(done => chrome.settingsPrivate.setPref({name!r}, {value}, '', done))"
USE_BING = """import('chrome://settings/settings.js').then(async settings => {
    const engines = settings.SearchEnginesBrowserProxyImpl.getInstance();
    const {defaults} = await engines.getSearchEnginesList();
    const bing = defaults.find(engine => engine.name.includes('Bing'));
    engines.setDefaultSearchEngine(bing.id, settings.ChoiceMadeLocation.SEARCH_SETTINGS, false);
    while ((await engines.getSearchEnginesList()).defaults.find(engine => engine.default).id != bing.id);
})"""
FORGET = """(async () => {
    const seen = (root, css) => {
        for (const element of root.querySelectorAll('*')) {
            const found = element.matches(css) ? element : element.shadowRoot && seen(element.shadowRoot, css);
            if (found) return found;
        }
    };
    const until = async look => { while (!look()) await new Promise(done => setTimeout(done, 20)); return look(); };
    const history = document.querySelector('history-app');
    await until(() => seen(document, 'history-item'));
    history.selectOrUnselectAll();
    await until(() => seen(document, 'history-item[selected], history-item cr-checkbox[checked]'));
    history.deleteSelected();
    (await until(() => seen(document, 'cr-dialog[open] .action-button'))).click();
    await until(() => !seen(document, 'history-item'));
})()"""


@dataclass(frozen=True)
class Seat:
    """A desktop at the start of an episode, as who plays it has it."""

    env: EnvHandle
    guest: Guest
    cdp: Cdp
    warnings: tuple[str, ...]

    async def sh(self, script: str) -> str:
        done = await self.guest.execute(["bash", "-c", script])
        return (done.stdout + done.stderr).strip()

    async def in_page(self, url: str, expression: str) -> Any:
        """The value of an expression in a page of Chrome's own, in a new tab."""
        async with self.cdp.browser() as browser:
            session = await new_tab(browser)
            assert await visit(browser, session, url, 20) == ""
            return await evaluate(browser, session, expression)

    async def has_page(self, url: str) -> None:
        async with asyncio.timeout(20):
            while not any(page["url"] == url for page in await self.cdp.pages()):  # noqa: ASYNC110 - of Chrome
                await asyncio.sleep(0.05)


Deed = Callable[[Seat], Awaitable[object]]


class Hall:
    """A daemon with two envs, and a web server that its desktops reach."""

    def __init__(self, client: Client, http: aiohttp.ClientSession, server: str) -> None:
        self.client, self.http, self.server = client, http, server

    def ours(self, name: str) -> dict[str, Any]:
        task: dict[str, Any] = json.loads((OURS / f"{name}.json").read_text().replace("{SERVER}", self.server))
        return task

    async def sit(self, task: dict[str, Any], env: int = 0) -> Seat:
        """Begin an episode."""
        job = await self.client.reset(task, env=env)
        desktop = (await self.client.env_state(env)).desktop
        assert desktop is not None
        at = desktop.endpoints
        assert at is not None
        return Seat(self.client.env(env), Guest(self.http, at.guest), Cdp(self.http, at.cdp), job.warnings)

    async def play(self, task: dict[str, Any], deed: Deed | None, env: int, end: str = "DONE") -> Verdict:
        seat = await self.sit(task, env)
        if deed is not None:
            await deed(seat)
        await seat.env.act(end)
        return await seat.env.evaluate()

    async def scores(self, task: dict[str, Any], deed: Deed) -> tuple[float | None, float | None]:
        """What it scores when it is done, and when it is left undone."""
        done, undone = await asyncio.gather(self.play(task, deed, 0), self.play(task, None, 1))
        assert (done.detail, undone.detail) == ("", "")
        return done.score, undone.score


@asynccontextmanager
async def pages() -> AsyncIterator[str]:
    """The URL of a server whose pages are named as they are asked for, and one to order from."""

    async def page(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        body = ORDER if name == "order" else f"<!doctype html><title>{name}</title><p>{name}"
        return web.Response(text=body, content_type="text/html")

    app = web.Application()
    app.router.add_get("/{name}", page)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hall(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hall]:
    if find_interpreter(Settings()) is None:
        pytest.skip("the evaluators' interpreter is not there: run `make evaluators`")
    state = tmp_path_factory.mktemp("tasks") / "state"
    settings = {"PROVIDER": "local", "ENVD_ENVS": "2", "ENVD_ACTION_PAUSE": "0.1"}
    async with (
        daemon(state, env=settings) as (served, http),
        Client(served.url) as client,
        pages() as server,
    ):
        yield Hall(client, http, server)


# Deeds


def commands(script: str) -> Deed:
    return lambda seat: seat.sh(script)


def preference(page: str, name: str, value: str) -> Deed:
    return lambda seat: seat.in_page(page, SET_PREFERENCE.format(name=name, value=value))


def forget(word: str) -> Deed:
    return lambda seat: seat.in_page(f"chrome://history/?q={word}", FORGET)


DO_NOT_TRACK = preference("chrome://settings/cookies", "enable_do_not_track", "true")


# Our own tasks


@pytest.mark.parametrize(
    ("name", "deed"),
    [
        pytest.param("do-not-track", DO_NOT_TRACK, id="a setting of Chrome's"),
        pytest.param("history", forget("first.example"), id="Chrome's history"),
        pytest.param("rename-folder", commands("mv ~/Desktop/draft ~/Desktop/final"), id="what a command prints"),
        pytest.param("write-file", commands("printf 'milk\\nbread\\n' > ~/Desktop/list.txt"), id="a file and a rule"),
        pytest.param("either", commands("echo done > ~/Desktop/two.txt"), id="one of two metrics"),
        pytest.param("both", commands("umask 077; echo done > ~/Desktop/one.txt"), id="two metrics"),
    ],
)
async def test_a_task_scores_1_when_it_is_done_and_0_when_it_is_not(hall: Hall, name: str, deed: Deed) -> None:
    assert await hall.scores(hall.ours(name), deed) == (1.0, 0.0)


async def test_tabs_are_read_from_chrome(hall: Hall) -> None:
    async def reopen(seat: Seat) -> None:
        await seat.env.act("pyautogui.hotkey('ctrl', 'shift', 't')")
        await seat.has_page(f"{hall.server}/second")

    assert await hall.scores(hall.ours("closed-tab"), reopen) == (1.0, 0.0)


async def test_the_accessibility_tree_is_read(hall: Hall) -> None:
    async def click(seat: Seat) -> None:
        await seat.env.click(960, 600)

    assert await hall.scores(hall.ours("button"), click) == (1.0, 0.0)


async def test_half_of_a_task_with_two_metrics_scores_nothing(hall: Hall) -> None:
    verdict = await hall.play(hall.ours("both"), commands("umask 022; echo done > ~/Desktop/one.txt"), 0)
    assert (verdict.score, verdict.raw) == (0.0, (1.0, 0.0))


async def test_an_infeasible_task_is_done_by_giving_up_and_no_other_task_is(hall: Hall) -> None:
    task = hall.ours("infeasible")
    gave_up, went_on = await asyncio.gather(hall.play(task, None, 0, "FAIL"), hall.play(task, None, 1, "DONE"))
    assert (gave_up.score, went_on.score) == (1.0, 0.0)
    done = commands("mv ~/Desktop/draft ~/Desktop/final")
    assert (await hall.play(hall.ours("rename-folder"), done, 0, "FAIL")).score == 0.0


async def test_a_set_up_that_fails_gives_its_step_and_no_observation_and_the_next_desktop_is_clean(hall: Hall) -> None:
    with pytest.raises(SetupFailed) as caught:
        await hall.sit(hall.ours("third-step-fails"))
    assert caught.value.facts["step"] == 2
    assert "no-such-program" in caught.value.detail
    left = await hall.client.env_state(0)
    assert (left.desktop, left.episode) == (None, None)
    seat = await hall.sit(hall.ours("write-file"))
    assert await seat.sh("ls ~/Desktop") == ""


async def test_post_configuration_runs_once_however_often_a_verdict_is_asked_for(hall: Hall) -> None:
    async def legacy() -> Any:
        async with hall.http.post(f"{hall.client.url}/env/evaluate", json={}) as answer:
            return await answer.json()

    seat = await hall.sit(hall.ours("counts-gradings"))
    await seat.env.act("DONE")
    first, second, number = await asyncio.gather(seat.env.evaluate(), seat.env.evaluate(), legacy())
    assert (first.status, first.score) == (VerdictStatus.SCORED, 1.0)
    again = [await seat.env.evaluate() for _ in range(5)]
    assert all(verdict == first for verdict in [second, *again])
    assert [number, await legacy()] == [1.0, 1.0]
    assert await seat.sh("cat ~/Desktop/log") == "graded"


# The public ones


def appearance(mode: int) -> str:
    return f"""import('chrome://settings/settings.js').then(async settings => {{
        settings.customizeColorSchemeModeBrowserProxyFactory.getInstance().handler.setColorSchemeMode({mode});
    }})"""


SAR = "CPU %user %nice %system %iowait %steal %idle"
PLAYED: list[tuple[str, Deed]] = [
    ("chrome/030eeff7", DO_NOT_TRACK),
    ("chrome/af630914", preference("chrome://settings/fonts", "webkit.webprefs.default_font_size", "24")),
    ("chrome/bb5e4c0d", lambda seat: seat.in_page("chrome://settings/search", USE_BING)),
    ("chrome/44ee5668", forget("youtube")),
    ("os/e0df059f", commands("mkdir ~/Desktop/todo_list_Jan_2")),
    ("os/f9be0997", commands("gsettings set org.gnome.desktop.notifications show-banners false")),
    (
        "multi_apps/2373b66a",
        commands(f"(echo '{SAR}'; for i in $(seq 31); do date +%T; done) > ~/Desktop/System_Resources_Report.txt"),
    ),
    (
        "multi_apps/3c8f201a",
        commands("""python -c 'from PIL import Image; Image.new("RGB", (9, 9)).save("Desktop/compressed.jpeg")'"""),
    ),
    ("multi_apps/48d05431", commands("echo '# >>> conda initialize >>>' >> ~/.bashrc")),
    ("multi_apps/f8369178", commands("gsettings set org.gnome.desktop.interface gtk-theme Orchis")),
]


def public(name: str) -> dict[str, Any]:
    found = list(PUBLIC.glob(f"{name}*.json"))
    if not found:
        pytest.skip(f"the public task {name} is not in ../shared/osworld-tasks")
    task: dict[str, Any] = json.loads(found[0].read_text())
    return task


@pytest.mark.parametrize(("name", "deed"), PLAYED, ids=[name for name, _ in PLAYED])
async def test_a_public_task_scores_1_when_it_is_done_and_0_when_it_is_not(hall: Hall, name: str, deed: Deed) -> None:
    assert await hall.scores(public(name), deed) == (1.0, 0.0)


async def test_a_public_infeasible_task_is_done_by_giving_up(hall: Hall) -> None:
    task = public("chrome/480bcfea")
    gave_up, went_on = await asyncio.gather(hall.play(task, None, 0, "FAIL"), hall.play(task, None, 1, "DONE"))
    assert (gave_up.score, went_on.score) == (1.0, 0.0)
