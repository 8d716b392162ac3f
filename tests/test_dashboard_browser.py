"""The dashboard in a real Chromium: what is shown as it happens, what survives, what may be done, and that everybody
can use it. Pictures of it are left in $ENVD_ARTEFACTS, or in a folder that the figures at the end of a run name."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
from browser import Browser, Page, chromium
from daemon_process import daemon, reset
from figures import FIGURES
from serving import CLICK, DONE, Served, serving

from envd import __version__
from envd.drivers.base import Death
from envd.drivers.sim import Behaviour, Fault

TOKEN, READER = "t" * 20, "r" * 20
SHOWN = "document.documentElement.dataset.state === 'known'"
FIGURES_SHOWN = "document.querySelector('.figures')"
UP = f"{FIGURES_SHOWN}.lastElementChild.lastElementChild.textContent"
LIVE = "document.documentElement.dataset.connection === 'live'"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>\" ' --> \u202e ]]>"
TASK = {"id": "t-1", "instruction": "Do it.", "config": [], "evaluator": {"func": "infeasible"}}
WATCH_SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) {
        if (entry.hadRecentInput) continue;
        const told = ({node, previousRect: from, currentRect: to}) =>
            [node?.parentElement?.className, node?.className, from.x, from.y, 'to', to.x, to.y].join(' ');
        window.shifts.push([entry.value, entry.sources.map(told)]);
    }
}).observe({type: 'layout-shift', buffered: true});
"""

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Browser]:
    async with chromium(tmp_path) as opened:
        yield opened


@asynccontextmanager
async def looking(browser: Browser, url: str, width: int = 1280, height: int = 900, **how: Any) -> AsyncIterator[Page]:
    """The dashboard, known and live; at the end it must have had no trouble."""
    async with browser.page(width, height, **how) as page:
        await page.open(url)
        await page.until(f"{SHOWN} && {LIVE}")
        yield page
        assert page.troubles == []


def card(env: int | str, part: str = "") -> str:
    return f"document.querySelectorAll('.card')[{env}]{f'.querySelector({part!r})' if part else ''}"


def has(selector: str, words: str) -> str:
    return f"[...document.querySelectorAll({selector!r})].some((one) => one.textContent.includes({words!r}))"


def artefacts() -> Path:
    folder = Path(os.environ.get("ENVD_ARTEFACTS") or Path(tempfile.gettempdir(), "envd-artefacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


async def test_a_daemon_that_swallows_a_request_is_asked_again(browser: Browser) -> None:
    async with serving(envs=1) as served, browser.page() as page:
        await page.command("Fetch.enable", patterns=[{"urlPattern": "*/v1/whoami"}])
        await page.open(served.url)  # what it asks now is held for ever
        await page.until("document.querySelector('#before').textContent.includes('did not answer in time')")
        await page.command("Fetch.disable")
        await page.until(f"{SHOWN} && {LIVE}")


async def test_a_page_that_lacks_a_part_loads_itself_again(browser: Browser) -> None:
    async with serving(envs=1) as served, browser.page() as page:
        await page.command("Network.setBlockedURLs", urls=["*/dashboard/film.js"])
        await page.open(served.url)
        assert not await page.evaluate(SHOWN)
        await page.command("Network.setBlockedURLs", urls=[])
        await page.until(f"{SHOWN} && {LIVE}")


# -- what happens is shown ----------------------------------------------------------------------------------------


async def test_a_boot_is_shown_as_it_goes_on_without_a_reload(browser: Browser) -> None:
    async with serving(Behaviour(boot_s=3, cdp_s=1), envs=2) as served, looking(browser, served.url) as page:
        await page.evaluate("window.mine = true")
        await page.until("!document.querySelector('#no-boots').hidden")
        _, job = await served.post("/v1/envs/0/reset", {"task": TASK})
        await page.until(has(".boot h3", "Env 0 boots"))
        await page.until("document.querySelectorAll('.boot .segment').length >= 3")
        await page.until(has(".boot .phase-list li", "probe"))
        await page.until(has(".boot .probes li", "5000 guest") + " && " + has(".boot .probes li", "9222 Chrome"))
        await page.until(has(".boot .probes .pill", "passed"))
        await page.until(has(".boot .lines li", "starting a simulated desktop"))
        assert await page.evaluate(has(".boot .boot-facts", "task t-1"))
        assert await page.evaluate(f"{card(0, '.screen-boot')}.hidden === false")
        await served.ended(job["id"])
        await page.until(f"{card(0, '.pill')}.textContent === 'playing'")
        await page.until(f"{card(0, 'img')}.naturalWidth > 100")
        await page.until("document.querySelectorAll('.boot').length === 0")
        await page.until("document.querySelectorAll('#resets .plot .dot').length === 1")
        assert await page.evaluate("window.mine")


async def test_a_card_follows_its_episode_to_the_verdict(browser: Browser) -> None:
    async with serving(Behaviour(vnc=True), envs=2) as served, looking(browser, served.url) as page:
        await served.reset(1, task=TASK, max_steps=5)
        await page.until(f"{card(1, '.task')}.textContent === 'Do it.'")
        await page.until(f"{card(1, 'img')}.naturalWidth > 100")
        before = await page.evaluate(f"{card(1, 'img')}.src")
        await served.post("/v1/envs/1/step", {"prediction": CLICK})
        await page.until(f"{card(1, '.progress .number')}.textContent === '1 of 5 actions'")
        await page.until(f"{card(1, 'img')}.src !== {before!r}")
        await served.post("/v1/envs/1/step", {"prediction": DONE})
        await page.until(f"{card(1, '.pill')}.textContent === 'episode over'")
        await served.evaluate(1)
        await page.until(f"{card(1, '.facts')}.textContent.includes('score 0')")
        await page.until(has("#episodes tr", "score 0"))
        await served.post("/v1/leases", {"owner": "alice"})
        await page.until(f"{card(0, '.facts')}.textContent.includes('alice')")


async def test_a_failure_is_never_shown_as_a_number(browser: Browser) -> None:
    async with serving(envs=1) as served, looking(browser, served.url) as page:
        await served.reset(0, task=TASK)
        served.desktop().die(Death("somebody pulled the plug"))
        await page.until(f"{card(0, '.pill')}.textContent === 'desktop lost'")
        await page.until(f"{card(0, '.screen-why')}.textContent.includes('somebody pulled the plug')")
        verdict = await served.evaluate()
        assert verdict["score"] is None
        shown = await page.until(f"{card(0, '.facts')}.textContent.match(/no score: .*/)?.[0]")
        assert shown == f"no score: {verdict['code']}"
        await page.until(has("#episodes .verdict-why", "fault: infra"))
        await page.until(has("#failures .fault", verdict["code"]))


async def test_a_reset_that_failed_says_why_in_its_place(browser: Browser) -> None:
    async with serving(Behaviour(dies_after_s=0.1, dies_when="booting"), envs=1) as served:
        async with looking(browser, served.url) as page:
            job = await served.reset()
            assert job["state"] == "failed"
            await page.until(f"{card(0, '.pill')}.textContent === 'reset failed'")
            await page.until(f"{card(0, '.screen-why')}.textContent.includes({job['error']['code']!r})")
            await page.until(f"{card(0, '.screen-why')}.textContent.includes({job['error']['detail']!r})")
        async with looking(browser, served.url) as page:  # also for who looks later
            await page.until(f"{card(0, '.screen-why')}.textContent.includes({job['error']['code']!r})")


async def test_a_picture_that_cannot_be_had_says_why(browser: Browser) -> None:
    async with serving(envs=1) as served, browser.page() as page:
        await served.reset()
        served.desktop().behaviour = Behaviour(on={"/screenshot": Fault("error", times=10**6)})
        await page.open(served.url)
        await page.until(f"{card(0, '.screen-why')}.textContent.includes('/screenshot')")
        assert not await page.evaluate(f"{card(0, 'img')}.hasAttribute('src')")


async def test_a_queue_shows_places_and_a_job_that_waits_is_cancelled(browser: Browser) -> None:
    async with serving(Behaviour(boot_s=60), envs=3) as served, looking(browser, served.url) as page:
        jobs = [(await served.post(f"/v1/envs/{env}/reset", {}))[1]["id"] for env in range(3)]
        await page.until("document.querySelectorAll('.queue-row').length === 2")
        assert await page.evaluate("document.querySelector('.queue-row').textContent") == "1env 1no estimateCancel"
        await page.click(".queue-row button")
        await page.click("#ask-yes")
        await page.until("document.querySelectorAll('.queue-row').length === 1")
        assert (await served.ended(jobs[1]))["state"] == "cancelled"
        await page.click(".boot button")
        await page.click("#ask-no")
        assert (await served.get(f"/v1/jobs/{jobs[0]}"))[1]["state"] == "booting"
        await page.click(".boot button")
        await page.click("#ask-yes")
        assert (await served.ended(jobs[0]))["state"] == "cancelled"
        await page.until(has(".boot h3", "Env 2 boots"))


async def test_an_env_is_recycled(browser: Browser) -> None:
    async with serving(envs=1) as served, looking(browser, served.url) as page:
        old = await served.play(task=TASK)
        await page.until(f"{card(0, '.task')}.textContent === 'Do it.'")
        await page.click(".card .act")
        await page.until(has("#ask-words", "ends without a verdict"))
        await page.click("#ask-yes")
        await page.until(f"{card(0, '.task')}.textContent === 'No task: a plain desktop.'")
        assert served.desktop().id != old.id


async def test_an_env_without_a_desktop_is_given_one_at_once(browser: Browser) -> None:
    async with serving(envs=1) as served, looking(browser, served.url) as page:
        await page.until(f"{card(0, '.act')}.textContent === 'Start'")
        await page.click(".card .act")
        await page.until(f"{card(0, '.task')}.textContent === 'No task: a plain desktop.'")
        assert await page.evaluate(f"{card(0, '.act')}.textContent") == "Recycle"
        assert served.service.env(0).desktop is not None


async def test_the_daemon_is_drained(browser: Browser) -> None:
    asked = asyncio.Event()
    async with serving(envs=1) as served, looking(browser, served.url) as page:
        served.service.on_drain = asked.set
        await page.click("#drain")
        await page.click("#ask-yes")
        async with asyncio.timeout(10):
            await asked.wait()
        await page.until("document.querySelector('#ready').textContent === 'Draining'")
        assert await page.evaluate("document.querySelector('#reasons').textContent.includes('left for episodes')")


async def test_why_no_reset_can_be_served_is_at_the_top(browser: Browser) -> None:
    async with serving(Behaviour(boot_s=60), envs=3, queue_limit=1) as served, looking(browser, served.url) as page:
        assert await page.evaluate("document.querySelector('#ready').textContent") == "Ready"
        for env in range(2):
            await served.post(f"/v1/envs/{env}/reset", {})
        await page.until("document.querySelector('#ready').textContent === 'Not ready'")
        assert await page.evaluate("document.querySelector('#reasons').textContent.includes('the queue is full')")


# -- what survives ------------------------------------------------------------------------------------------------


async def test_the_page_lives_through_a_daemon_that_is_killed_and_started_again(
    browser: Browser, tmp_path: Path
) -> None:
    env = {"ENVD_ENVS": "2", "ENVD_SCREEN": "320x240"}
    state = tmp_path / "state"
    async with browser.page() as page:
        async with daemon(state, env=env) as (first, _):
            port = first.url.rpartition(":")[2]
            await page.open(first.url)
            await page.until(f"{SHOWN} && {LIVE}")
            await page.evaluate("window.mine = true")
            await page.until(f"{UP} !== '–'")
            assert await page.evaluate(f"getComputedStyle({FIGURES_SHOWN}).filter") == "none"
            first.signal_all(SIGKILL)
            await page.until("document.querySelector('#connection').textContent.startsWith('Reconnecting')")
            assert await page.evaluate("document.querySelector('#ready').dataset.tone") == "bad"
            told = await page.evaluate("document.querySelector('.readiness').innerText")
            assert re.fullmatch(r"Not reachable\s+since \d\d:\d\d:\d\d; trying again", told)
            for part in (FIGURES_SHOWN, "document.querySelector('.columns')"):
                assert await page.evaluate(f"getComputedStyle({part}).filter") == "grayscale(1)"
                assert "no longer told" in await page.evaluate(f"{part}.ariaLabel")
            up = await page.evaluate(UP)
            await page.evaluate("new Promise((resolve) => setTimeout(resolve, 2500))")  # a second or two go by
            assert await page.evaluate(UP) == up
            assert await page.evaluate("document.querySelector('.readiness').innerText") == told
        async with daemon(state, "--port", port, env=env) as (second, session):
            assert second.url == first.url
            await page.until(LIVE)
            await page.until("document.querySelector('#ready').textContent === 'Ready'")
            assert await page.evaluate(f"getComputedStyle({FIGURES_SHOWN}).filter") == "none"
            assert await page.evaluate(f"{FIGURES_SHOWN}.ariaLabel") == "At a glance"
            await reset(session, second.url, 1)
            await page.until(f"{card(1, '.pill')}.textContent === 'playing'")
            assert await page.evaluate("window.mine")
        streams = [headers for url, headers in zip(page.requests, page.headers, strict=True) if "/v1/events" in url]
        assert "last-event-id" not in streams[0]
        assert streams[-1]["last-event-id"]


async def test_a_stream_is_read_wherever_it_is_cut(browser: Browser) -> None:
    text = (
        'retry: 1000\n\nid: e-1\nevent: snapshot\ndata: {"a":\ndata: "\u00e9"}\n\n: still here\n\nevent: x\ndata: 2\n\n'
    )
    expected = [{"event": "snapshot", "data": {"a": "é"}, "id": "e-1"}, {"event": "x", "data": 2, "id": "e-1"}]
    async with serving() as served, looking(browser, served.url) as page:
        told = await page.evaluate(
            f"""import('/dashboard/stream.js').then(({{Parser}}) => {{
                const text = {text!r}, found = [];
                for (let cut = 0; cut <= text.length; cut++) {{
                    const parser = new Parser();
                    found.push([...parser.feed(text.slice(0, cut)), ...parser.feed(text.slice(cut))]);
                }}
                return found;
            }})"""
        )
    assert len(told) == len(text) + 1
    assert all(messages == expected for messages in told)


async def test_what_is_told_again_after_a_reconnect_brings_no_job_back(browser: Browser) -> None:
    async with serving() as served, looking(browser, served.url) as page:
        job = await served.reset()
        async with served.stream(f"/v1/events?last_event_id={served.service.events.epoch}-0") as reader:
            again = [json.loads(message.data) for message in await reader.until(lambda one: '"succeeded"' in one.data)]
        events = [event for event in again if event.get("job_id") == job["id"]]
        assert len(events) > 3
        told = await page.evaluate(
            f"""import('/dashboard/store.js').then(async ({{Store}}) => {{
                const store = new Store();
                const stream = await fetch('/v1/events?stats=1');
                const {{Parser}} = await import('/dashboard/stream.js');
                const reader = stream.body.pipeThrough(new TextDecoderStream()).getReader();
                const parser = new Parser();
                for (let known = false; !known;) {{
                    for (const message of parser.feed((await reader.read()).value)) {{
                        store.take(message);
                        known ||= message.event === 'snapshot';
                    }}
                }}
                await reader.cancel();
                for (const event of {json.dumps(events)}) store.take({{event: event.kind, data: event}});
                return [store.jobs.size, store.ended.length];
            }})"""
        )
    assert told == [0, 1]


@pytest.mark.local
async def test_a_real_desktop_is_shown_booting_and_played_on(browser: Browser, tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env={"PROVIDER": "local", "ENVD_PREWARM": "0"}) as (running, session):
        async with looking(browser, running.url) as page:
            await reset(session, running.url)
            await page.until(has(".boot .phase-list li", "probe"), 60)
            await page.until(f"{card(0, '.pill')}.textContent === 'playing'", 60)
            await page.until(f"{card(0, 'img')}.naturalWidth >= 480")
            async with session.post(f"{running.url}/v1/envs/0/step", json={"prediction": CLICK}) as answer:
                assert answer.status == 200
            await page.until(f"{card(0, '.progress .number')}.textContent.startsWith('1 of')")
            vnc = f"{card(0, '.card-end a')}"
            assert await page.evaluate(f"{vnc}.getAttribute('aria-disabled')") == "true"
            assert await page.evaluate(f"{vnc}.title") == "Desktops of local have no VNC."
            await page.screenshot(artefacts() / "dashboard-local.png")
        running.signal()
        assert await running.ended(20) == 0


# -- who may ------------------------------------------------------------------------------------------------------


async def test_a_token_is_asked_for_and_kept_in_memory_alone(browser: Browser) -> None:
    async with serving(Behaviour(vnc=True), token=TOKEN) as served, browser.page() as page:
        await served.service.queue.ended((await served.service.reset(0, TASK)).id)
        await page.open(served.url)
        await page.until("document.querySelector('#token-dialog').open")
        await page.type("another token, which is wrong")
        await page.press("Enter", 13)
        await page.until("document.querySelector('#token-refusal').textContent.includes('not known')")
        await page.type(TOKEN)
        await page.press("Enter", 13)
        await page.until(f"{SHOWN} && {LIVE}")
        await page.until(f"{card(0, 'img')}.naturalWidth > 100")
        assert await page.evaluate("document.querySelector('#caller').textContent") == "ENVD_TOKEN · admin"
        kept = await page.evaluate(
            "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href, "
            "document.documentElement.outerHTML])"
        )
        assert TOKEN not in kept
        await page.click(".card-end a")
        opened = await browser.opened("/vnc/")
        assert not opened.get("canAccessOpener")
        assert TOKEN not in json.dumps([opened, page.requests])
        assert f"{served.url}/v1/links" in page.requests
        assert page.troubles == []


async def test_who_may_only_look_is_offered_nothing_else(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"wall read {READER}\n")
    file.chmod(0o600)
    async with serving(Behaviour(boot_s=60), token_file=file) as served, browser.page() as page:
        job = await served.service.reset(0, TASK)
        await page.open(served.url)
        await page.until("document.querySelector('#token-dialog').open")
        await page.type(READER)
        await page.press("Enter", 13)
        await page.until(f"{SHOWN} && {LIVE} && !!document.querySelector('.boot button')")
        assert await page.evaluate("document.querySelector('#drain').hidden")
        assert await page.evaluate("document.querySelector('.boot button').title") == "This needs the scope play."
        await page.click(".boot button")
        assert not await page.evaluate("document.querySelector('#ask-dialog').open")
        assert served.service.queue.get(job.id).state == "booting"


async def test_what_guests_and_tasks_say_is_text(browser: Browser) -> None:
    """Hostile words as the instruction, the task's id, the reason of a death, an action, its output and a verdict."""
    task = {**TASK, "id": HOSTILE[:100], "instruction": HOSTILE}
    async with serving(Behaviour(boot_s=1), envs=2) as served, looking(browser, served.url) as page:
        title = await page.evaluate("document.title")
        await served.reset(0, task=task)
        said = f"Thought: {HOSTILE}\nAction: type(content='<b>bold</b><script>document.title=1</script>')"
        await served.post("/v1/envs/0/step", {"prediction": said})
        await served.post("/v1/envs/0/step", {"actions": [f"print({HOSTILE!r})"]})
        await page.until(f"{card(0, '.task')}.textContent.includes('onerror=')")
        episode = served.service.env(0).episode
        assert episode is not None
        await page.evaluate(f"location.hash = 'film/{episode.id}/1'")
        await page.until(has("#film-said", "<script>document.title=1"))
        await page.evaluate("location.hash = 'film/..%2f<script>'")
        await page.until("!document.querySelector('#film').open")
        served.desktop().die(Death(HOSTILE))
        await page.until(f"{card(0, '.screen-why')}.textContent.includes('onerror=')")
        await served.evaluate()
        await page.until(has(".verdict-why", "onerror="))
        assert await page.evaluate("document.title") == title
        assert await page.evaluate("document.querySelectorAll('main script, main b, main img[onerror]').length") == 0


# -- the film -----------------------------------------------------------------------------------------------------


async def test_an_episode_is_a_film_with_what_was_done_drawn_in(browser: Browser) -> None:
    async with serving(screen=(1920, 1080)) as served, looking(browser, served.url) as page:
        await served.reset(0, task=TASK)
        for action in (
            "click(start_box='(966,546)')",
            "drag(start_box='(0,0)', end_box='(966,546)')",
            "type(content='hello')",
            "scroll(direction='down', start_box='(966,546)')",
        ):
            await served.post("/v1/envs/0/step", {"prediction": f"Thought: so.\nAction: {action}"})
        await page.until(f"{card(0, 'img')}.naturalWidth > 100")
        await page.click(".card .screen")
        await page.until("document.querySelectorAll('.thumb').length === 5")
        await page.until("document.querySelector('.film-picture').naturalWidth === 1920")
        ring = "document.querySelector('.film-stage .overlay circle')"
        assert await page.evaluate(f"[{ring}.getAttribute('cx'), {ring}.getAttribute('cy')]") == ["960", "540"]
        where = await page.evaluate(
            f"""(() => {{
                const picture = document.querySelector('.film-picture').getBoundingClientRect();
                const spot = {ring}.getBoundingClientRect();
                return [(spot.x + spot.width / 2 - picture.x) / picture.width,
                        (spot.y + spot.height / 2 - picture.y) / picture.height];
            }})()"""
        )
        assert where == pytest.approx([0.5, 0.5], abs=0.005)
        assert await page.evaluate("document.querySelector('#film-actions').textContent") == "click at 960, 540"
        await page.press("ArrowRight", 39)
        await page.until(has("#film-actions", "drag at 0, 0 to 960, 540"))
        assert await page.evaluate("location.hash.endsWith('/2')")
        await page.press("ArrowRight", 39)
        await page.until("document.querySelector('.film-caption').textContent === 'type “hello”'")
        await page.press("End", 35)
        await page.until(has("#film-step", "After the last step"))
        await served.post("/v1/envs/0/step", {"prediction": DONE})
        await page.until("document.querySelectorAll('.thumb').length === 6")  # it goes on while it is looked at
        await page.until("[...document.querySelectorAll('.thumb img')].every((one) => one.naturalWidth > 0)")
        await page.screenshot(artefacts() / "dashboard-film.png")
        await page.press("Escape", 27)
        await page.until("!document.querySelector('#film').open && location.hash === ''")


async def test_an_episode_that_is_not_kept_says_so(browser: Browser) -> None:
    async with serving() as served, browser.page() as page:
        await page.open(f"{served.url}/#film/ep-none")
        await page.until(has("#film-why", "There is no bundle"))
        assert await page.evaluate(has("#film-step", "There is no such episode"))
        for button in ("#film-back", "#film-on", "#film-bundle"):
            assert await page.evaluate(f"document.querySelector({button!r}).getAttribute('aria-disabled')") == "true"
        loaded = len(page.requests)
        await page.click("#film-bundle")
        await page.click("#film-on")
        assert not [url for url in page.requests[loaded:] if "/bundle" in url]
        job = await served.reset(0, task=TASK)
        await page.evaluate(f"location.hash = 'film/{job['episode_id']}'")  # what there is has its buttons again
        await page.until("document.querySelectorAll('.thumb').length === 1")
        assert await page.evaluate("document.querySelector('#film-bundle').getAttribute('aria-disabled')") is None


@pytest.mark.parametrize("width", [320, 360, 740, 1280])
async def test_nothing_of_a_film_is_cut_off_however_narrow_the_screen(browser: Browser, width: int) -> None:
    async with serving() as served, looking(browser, served.url, width, 740) as page:
        job = await served.reset(0, task={**TASK, "id": "a-task-with-a-rather-long-name-of-many-words"})
        for _ in range(5):
            await served.post("/v1/envs/0/step", {"prediction": CLICK})
        served.desktop().die(Death("the machine stopped"))
        await served.evaluate()  # no score, and words why
        await page.evaluate(f"location.hash = 'film/{job['episode_id']}'")
        await page.until("document.querySelectorAll('.thumb').length > 5")
        film = "document.querySelector('#film')"
        assert await page.evaluate(f"{film}.scrollWidth <= {film}.clientWidth")
        for button in ("#film-close", "#film-bundle", "#film-back", "#film-on"):
            box = await page.evaluate(f"document.querySelector({button!r}).getBoundingClientRect().toJSON()")
            assert box["left"] >= 0, button
            assert box["right"] <= width, button
            await page.until(f"document.querySelector({button!r}).checkVisibility()")
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        await page.screenshot(artefacts() / f"dashboard-film-{width}.png")
        await page.click("#film-close")
        await page.until(f"!{film}.open")


async def test_an_empty_env_says_how_to_begin(browser: Browser) -> None:
    async with serving(envs=2) as served, looking(browser, served.url) as page:
        why = await page.evaluate(f"{card(1, '.screen-why')}.textContent")
        assert why == "No desktop. Start, `envd reset 1` or `envd demo` makes one."


async def test_the_top_says_which_host_and_what_else_is_known_of_it(browser: Browser) -> None:
    async with serving() as served, looking(browser, served.url) as page:
        place = "document.querySelector('#place')"
        assert await page.evaluate(f"{place}.textContent") == f"host {socket.gethostname()} · sim · {__version__}"
        title = await page.evaluate(f"{place}.title")
        assert f"host {socket.gethostname()};" in title
        assert f"envd {__version__};" in title


# -- for everybody ------------------------------------------------------------------------------------------------


CUT = """[...document.querySelectorAll('.figures dt, .figures dd, .filter, .readiness span, .chip')]
    .filter((one) => one.scrollWidth > one.clientWidth || one.scrollHeight > one.clientHeight + 1)
    .map((one) => [one.textContent, one.scrollWidth, one.clientWidth, one.scrollHeight, one.clientHeight])"""
"""Labels that do not fit; and the words about readiness, which may be long."""
CONTRASTS = """(() => {
    const parsed = (color) => {
        const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const cache = new Map();
    const rgba = (color) => cache.get(color) ?? (cache.set(color, parsed(color)), cache.get(color));
    const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
    const behind = (node) => {
        const layers = [];
        for (let at = node; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
        return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
    };
    const light = (color) => {
        const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = color.map((one) => linear(one / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let text = walker.nextNode(); text; text = walker.nextNode()) {
        const node = text.parentElement;
        if (!text.data.trim() || node.closest('noscript')) continue;
        if (!node.checkVisibility({visibilityProperty: true})) continue;
        const style = getComputedStyle(node);
        const under = behind(node);
        const color = over(rgba(node instanceof SVGElement ? style.fill : style.color), under);
        const [a, b] = [light(color), light(under)].sort((x, y) => y - x);
        found.push([(a + 0.05) / (b + 0.05), text.data.trim().slice(0, 40), node.className?.baseVal ?? node.className]);
    }
    return found.sort((x, y) => x[0] - y[0]);
})()"""
TOKENS = """(() => {
    const probe = document.body.appendChild(document.createElement('i'));
    const names = [...document.styleSheets[0].cssRules].find((rule) => rule.selectorText === ':root')
        .cssText.match(/--[\\w-]+/g).filter((name, at, all) => all.indexOf(name) === at);
    const found = names.map((name) => {
        probe.style.color = probe.style.boxShadow = `var(${name})`;
        const { color, boxShadow } = getComputedStyle(probe);
        return [name, color, boxShadow];
    });
    probe.remove();
    return found;
})()"""


async def busy(served: Served) -> None:
    """Every state that an env, a boot and a verdict can be shown in."""
    for env in range(5):
        await served.reset(env, task={**TASK, "instruction": f"The task of env {env}, told in more words than fit."})
        await served.post(f"/v1/envs/{env}/step", {"prediction": CLICK})
    await served.evaluate(1)
    await served.post("/v1/envs/2/step", {"prediction": "Thought: no.\nAction: call_user()"})
    await served.evaluate(2)
    served.desktop(3).die(Death("the machine stopped"))
    await served.evaluate(3)
    await served.post("/v1/leases", {"owner": "alice"})
    served.sim.behaviours = Behaviour(boot_s=90)
    for env in (4, 6, 7):
        await served.post(f"/v1/envs/{env}/reset", {"task": TASK})


async def test_text_has_contrast_controls_have_names_and_pictures_are_left_behind(browser: Browser) -> None:
    async with serving(Behaviour(vnc=True), envs=8, screen=(1920, 1080)) as served:
        await busy(served)
        lowest = []
        for width, height in ((360, 800), (1280, 900), (1920, 1080)):
            for dark in (False, True):
                name = f"{width}-{'dark' if dark else 'light'}"
                async with looking(browser, served.url, width, height, dark=dark) as page:
                    await page.theme(dark=dark, still=True)
                    await page.until("document.querySelectorAll('.queue-row, .boot').length > 1")
                    await page.resize(width, await page.evaluate("document.documentElement.scrollHeight"))
                    await page.until("[0, 1, 2].every((env) => " + card("env", "img") + ".naturalWidth > 0)")
                    await page.screenshot(artefacts() / f"dashboard-{name}.png")
                    contrasts = await page.evaluate(CONTRASTS)
                    assert len(contrasts) > 100
                    assert contrasts[0][0] >= 4.5, (name, contrasts[:5])
                    lowest.append(contrasts[0][0])
                    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
                    assert await page.evaluate(CUT) == [], name
                    nodes = await page.accessible()
                    nameless = [
                        one for one in nodes if one["focusable"] and not one["name"] and one["role"] != "RootWebArea"
                    ]
                    assert nameless == []
                    assert sum(one["role"] == "button" for one in nodes) > 20
                    assert all(one["name"] for one in nodes if one["role"] in ("image", "img", "progressbar", "dialog"))
        FIGURES.append(f"dashboard: lowest contrast of any text {min(lowest):.2f}; pictures in {artefacts()}")


@pytest.mark.parametrize("width", [360, 1280])
async def test_a_warning_is_read_with_what_to_do(browser: Browser, width: int) -> None:
    hint = "Run `make evaluators` once, which takes minutes, or set ENVD_EVALUATORS to a Python that has them."
    warning = f"episodes can be played but not judged: there is no interpreter with the evaluators. {hint}"
    async with serving() as served:
        said = served.service.doubts()
        served.service.doubts = lambda: [*said, warning]  # type: ignore[method-assign]
        async with looking(browser, served.url, width) as page:
            await page.until(has("#reasons", hint))
            assert await page.evaluate(CUT) == []
            assert await page.evaluate("document.querySelector('#ready').textContent") == "Ready"


async def test_a_theme_is_chosen_and_remembered_and_is_the_system_s_own_in_other_words(browser: Browser) -> None:
    async with serving() as served, browser.page(dark=True) as page:
        await page.open(served.url)
        await page.until(SHOWN)
        dark_by_system = await page.evaluate(TOKENS)
        await page.theme(dark=False)
        light_by_system = await page.evaluate(TOKENS)
        assert dark_by_system != light_by_system
        await page.click("#theme")
        assert await page.evaluate("document.querySelector('#theme').textContent") == "Theme: light"
        await page.theme(dark=True)
        assert await page.evaluate(TOKENS) == light_by_system
        await page.click("#theme")
        await page.theme(dark=False)
        assert await page.evaluate(TOKENS) == dark_by_system
        await page.open(f"{served.url}/?again")
        await page.until(SHOWN)
        assert await page.evaluate("document.querySelector('#theme').textContent") == "Theme: dark"
        assert await page.evaluate(TOKENS) == dark_by_system


async def test_everything_is_reached_with_the_keyboard_and_the_focus_is_seen(browser: Browser) -> None:
    async with serving(envs=2) as served, looking(browser, served.url) as page:
        await served.reset(0, task=TASK)
        await page.until(f"{card(0, 'img')}.naturalWidth > 0")
        reached = []
        for _ in range(40):
            await page.press("Tab", 9)
            where = await page.evaluate(
                "(() => { const node = document.activeElement, style = getComputedStyle(node);"
                "return node === document.body ? null :"
                "[node.id || node.textContent || node.ariaLabel, style.outlineStyle, style.outlineWidth] })()"
            )
            if where is None:
                break
            reached.append(where)
        names = [where[0] for where in reached]
        assert names[0] == "Skip to the envs"
        assert {"drain", "theme", "Film", "Bundle", "Recycle", "queue-scroll"} <= set(names)
        assert all(style != "none" and width != "0px" for _, style, width in reached)


@pytest.mark.parametrize("width", [360, 1280])
async def test_nothing_moves_when_something_happens(browser: Browser, width: int) -> None:
    async with serving(Behaviour(boot_s=0.5), envs=6) as served, browser.page(width, 900) as page:
        await page.command("Page.addScriptToEvaluateOnNewDocument", source=WATCH_SHIFTS)
        await page.open(served.url)
        await page.until(f"{SHOWN} && {LIVE}")
        for env in range(3):
            await served.reset(env, task=TASK)
            await served.post(f"/v1/envs/{env}/step", {"prediction": CLICK})
        await served.evaluate(0)
        served.desktop(1).die(Death("the machine stopped"))
        served.sim.behaviours = Behaviour(boot_s=60)
        for env in (3, 4, 5):
            await served.post(f"/v1/envs/{env}/reset", {"task": TASK})
        await page.until("document.querySelectorAll('.queue-row').length === 2")
        await page.until(f"{card(1, '.pill')}.textContent === 'desktop lost'")
        await page.until("document.querySelectorAll('#episodes tr').length === 1")
        shifts = await page.evaluate("window.shifts")
        moved = sum(value for value, _ in shifts)
        FIGURES.append(f"dashboard: layout moved {moved:.4f} in all at {width} px")
        assert moved < 0.02, sorted(shifts, reverse=True)[:10]


async def test_a_thousand_envs_and_as_long_a_queue_stay_fluid(browser: Browser) -> None:
    async with serving(Behaviour(boot_s=90), envs=1001, request_rate=0) as served:
        for env in range(1001):
            await served.service.reset(env, TASK)
        async with looking(browser, served.url) as page:
            await page.until("document.querySelectorAll('.card').length === 1001")
            await page.until("document.querySelector('#queue-count').textContent.startsWith('1000 of')")
            assert await page.evaluate("document.querySelectorAll('.queue-row').length") < 40
            await page.evaluate(
                "window.long = []; new PerformanceObserver((list) => window.long.push(...list.getEntries()"
                ".map((one) => one.duration))).observe({type: 'longtask'})"
            )
            waiting = served.service.queue.waiting()
            served.service.queue.cancel(waiting[0].id)  # everybody's place changes
            await page.until("document.querySelector('#queue-count').textContent.startsWith('999 of')")
            await page.evaluate("document.querySelector('#queue-scroll').scrollTop = 1e9")
            await page.until("document.querySelector('#queue').lastElementChild?.textContent.startsWith('999')")
            await page.evaluate("new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 200)))")
            longest = max(await page.evaluate("window.long"), default=0)
            FIGURES.append(
                f"dashboard: 1,001 envs, 1,000 jobs that all move up: the page was busy for {longest:.0f} ms"
            )
            assert longest < 600
