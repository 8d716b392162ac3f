"""The gate of the HTTP face, on a real port: who gets in, for what, how often, and what is written of it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import aiohttp
import pytest
from serving import Served, serving

from envd.app.gate import Rates
from envd.client import Client
from envd.errors import TooManyRequests, Unauthorized

TOKEN, READER = "t" * 20, "r" * 20
GOOD = {"Authorization": f"Bearer {TOKEN}"}


async def answers(served: Served, method: str, path: str, **how: Any) -> tuple[int, str]:
    status, body, _ = await served.ask(method, path, **how)
    return status, body.get("code", "") if isinstance(body, dict) else ""


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/envs"),
        ("GET", "/v1/envs/0/screenshot"),
        ("GET", "/version"),
        ("GET", "/docsx"),
        ("POST", "/docs"),
        ("GET", "/nothing/here"),
        ("POST", "/v1/envs/0/reset"),
        ("POST", "/env/reset"),
        ("POST", "/v1/links"),
    ],
)
async def test_without_the_token_everything_is_closed(method: str, path: str) -> None:
    async with serving(token=TOKEN) as served:
        status, body, headers = await served.ask(method, path)
        assert (status, body["code"]) == (401, "unauthorized")
        assert headers["WWW-Authenticate"].startswith("Bearer")
        assert TOKEN not in str(body)
        assert (await answers(served, method, path, headers=GOOD))[0] != 401


async def test_load_balancers_need_no_token() -> None:
    async with serving(token=TOKEN) as served:
        assert [(await served.ask("GET", path))[0] for path in ("/livez", "/readyz", "/health")] == [200, 200, 200]


async def test_the_documentation_needs_no_token_and_tells_nothing_of_this_daemon() -> None:
    async with serving(token=TOKEN, aws_owner="a-name-of-mine") as served:
        for path in ("/docs", "/docs/settings", "/errors", "/openapi.json"):
            status, body, _ = await served.ask("GET", path)
            assert status == 200
            assert not [word for word in (TOKEN, "a-name-of-mine", str(served.settings.state_dir)) if word in str(body)]
        assert (await served.ask("GET", "/docs/nothing"))[0] == 404


async def test_a_client_with_the_token_plays_and_one_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(token=TOKEN) as served:
        async with Client(served.url, token=TOKEN) as client:
            await client.env(0).reset()
        monkeypatch.setenv("ENVD_TOKEN", TOKEN)
        async with Client(served.url) as client:
            assert (await client.env(0).state()).state == "playing"
        async with Client(served.url, token="") as client:
            with pytest.raises(Unauthorized, match="must send a token"):
                await client.env(0).state()


async def test_a_scope_that_is_too_small_is_refused_and_says_which_is_needed(tmp_path: Any) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"reader read {READER}\n")
    file.chmod(0o600)
    reader = {"Authorization": f"Bearer {READER}"}
    async with serving(token_file=file) as served:
        assert (await served.ask("GET", "/v1/envs", headers=reader))[0] == 200
        status, body, _ = await served.ask("POST", "/v1/envs/0/reset", {}, headers=reader)
        assert (status, body["code"], body["needed"]) == (403, "forbidden", "play")
        assert served.service.queue.active() == ()


async def test_a_link_shows_a_browser_one_picture() -> None:
    async with serving(token=TOKEN) as served:
        async with Client(served.url, token=TOKEN) as client:
            await client.env(0).reset()
        path = "/v1/envs/0/screenshot"
        status, link, _ = await served.ask("POST", "/v1/links", {"path": path}, headers=GOOD)
        assert status == 201
        status, picture, _ = await served.ask("GET", link["path"])
        assert (status, picture[:4]) == (200, b"\x89PNG")
        elsewhere = link["path"].replace(path, "/v1/envs")
        assert (await answers(served, "GET", elsewhere)) == (401, "unauthorized")
        assert (await answers(served, "POST", link["path"].replace(path, "/v1/envs/0/reset")))[0] == 401


async def test_a_stream_ends_with_the_link_that_it_came_by() -> None:
    async with serving(token=TOKEN) as served:
        _, link, _ = await served.ask("POST", "/v1/links", {"path": "/v1/events", "seconds": 0.2}, headers=GOOD)
        async with asyncio.timeout(10), served.http.get(served.url + link["path"]) as answer:
            assert answer.status == 200
            with contextlib.suppress(aiohttp.ClientPayloadError):
                await answer.read()


@pytest.mark.parametrize("path", ["//evil.example/x", "/v1/envs?x=1", "/v1/envs#y", "/%2e", "v1/envs", ""])
async def test_what_is_no_path_of_ours_gets_no_link(path: str) -> None:
    async with serving() as served:
        assert (await answers(served, "POST", "/v1/links", body={"path": path})) == (422, "invalid_request")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        pytest.param({"Host": "evil.example"}, "misdirected_request", id="a name that was made to point here"),
        pytest.param({"Origin": "http://evil.example"}, "forbidden", id="a page of another site"),
        pytest.param({"Sec-Fetch-Site": "cross-site"}, "forbidden", id="what its browser says of it"),
        pytest.param({"Origin": "null"}, "forbidden", id="a page of no site"),
        pytest.param({"Origin": "http://["}, "forbidden", id="a page of nonsense"),
    ],
)
async def test_a_page_that_somebody_visits_cannot_use_an_open_daemon(headers: dict[str, str], code: str) -> None:
    async with serving() as served:
        assert (await answers(served, "POST", "/v1/envs/0/reset", body={}, headers=headers))[1] == code
        assert served.service.queue.active() == ()


async def test_no_page_of_another_site_is_let_read_an_answer() -> None:
    async with serving(token=TOKEN) as served:
        _, _, headers = await served.ask("GET", "/v1/envs", headers={**GOOD, "Origin": "http://evil.example"})
        assert not [name for name in headers if name.lower().startswith("access-control")]


async def test_who_asks_too_often_waits_and_others_do_not() -> None:
    async with serving(request_rate=5, insecure=True, proxies="127.0.0.0/8") as served:

        async def ask(who: str) -> int:
            return (await served.ask("GET", "/version", headers={"X-Forwarded-For": who}))[0]

        statuses = await asyncio.gather(*(ask("10.0.0.1") for _ in range(30)))
        assert 10 <= statuses.count(200) < 20
        assert set(statuses) == {200, 429}
        assert await ask("10.0.0.2") == 200
        status, body, headers = await served.ask("GET", "/version", headers={"X-Forwarded-For": "10.0.0.1"})
        assert (status, body["code"], body["setting"]) == (429, "too_many_requests", "ENVD_REQUEST_RATE")
        assert int(headers["Retry-After"]) >= 1


def test_the_memory_of_rates_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envd.app.gate.CLIENTS", 10)
    rates = Rates(1)
    for number in range(100):
        rates.require(str(number), "here")
    assert len(rates._left) == 10
    rates.require("99", "here")
    with pytest.raises(TooManyRequests):
        rates.require("99", "here")


def test_those_who_share_a_token_do_not_share_a_rate_and_a_slow_one_is_served_too() -> None:
    rates = Rates(0.1)
    rates.require("ENVD_TOKEN", "token 10.0.0.1")
    rates.require("ENVD_TOKEN", "token 10.0.0.2")
    with pytest.raises(TooManyRequests, match="ENVD_TOKEN made more than"):
        rates.require("ENVD_TOKEN", "token 10.0.0.1")


async def test_who_changed_what_is_written_and_no_token_with_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with serving(token=TOKEN) as served:
        await served.ask("POST", "/v1/envs/0/reset", {}, headers=GOOD)
        await served.ask("GET", "/v1/envs", headers=GOOD)
        await served.ask("POST", "/v1/envs/0/reset", {}, headers={"Authorization": "Bearer wrong-token-of-somebody"})
    written = [record for record in caplog.records if record.name == "envd.audit"]
    one, refused = [vars(record) for record in written]
    assert (refused["how"], refused["address"], refused["status"]) == ("refused", "127.0.0.1", 401)
    assert (one["caller"], one["how"], one["address"], one["method"], one["path"], one["status"]) == (
        *("ENVD_TOKEN", "token", "127.0.0.1", "POST", "/v1/envs/0/reset", 202),
    )
    everything = "\n".join(str(vars(record)) for record in caplog.records)
    assert TOKEN not in everything
    assert "wrong-token" not in everything


async def test_an_insecure_daemon_says_so_whenever_it_is_asked() -> None:
    async with serving(insecure=True) as served:
        _, body, _ = await served.ask("GET", "/readyz")
        assert any("ENVD_INSECURE" in words for words in body["warnings"])
