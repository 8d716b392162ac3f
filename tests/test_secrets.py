"""A secret in every place that one can come from, and a daemon that lives through all that goes wrong: none of them is
in its log, in an answer, in the evidence it keeps or in any file of its state."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from daemon_process import CRASH, DaemonProcess, daemon
from files_server import FilesServer, files_server, truncates

from envd.access import CREDENTIAL
from envd.errors import GuestMisbehaved, SettingsError
from envd.guest import Guest
from envd.settings import effective, load, without_logins
from envd.tasks.mirrors import parse_mirrors
from envd.vm.identity import give_identity

SECRETS = {
    where: f"Zq7-{where}-never-to-be-shown"
    for where in (
        *("token", "token-file", "credential", "wrong-token", "basic", "client-password", "proxy-user", "proxy"),
        *("google-secret", "google-refresh", "google-account", "aws-key", "aws-secret", "aws-session"),
        *("mirror-user", "mirror", "url", "query", "link"),
    )
}
"""`link` is found out on the way: the daemon makes it."""
BROKEN = """
import os
from envd.episodes import Envs

whole = Envs.screenshot
async def screenshot(self, number):
    everything = dict(os.environ)
    if number == 2:
        raise RuntimeError(f"injected among {len(everything)} secrets")
    return await whole(self, number)

Envs.screenshot = screenshot
"""
"""A prelude: a picture of env 2 breaks, in a frame that holds secrets."""
Step = tuple[str, dict[str, Any]]
READ = (
    *("/metrics", "/v1/logs?limit=5000"),
    *("/version", "/docs", "/errors", "/openapi.json", "/readyz", "/livez", "/health", "/v1/envs", "/v1/envs/0"),
    *("/v1/envs/2/screenshot", "/v1/jobs", "/v1/queue", "/v1/episodes", "/v1/envs/0/history", "/env/history_messages"),
)


def planted(home: Path, files: FilesServer) -> dict[str, str]:
    """The environment of a daemon that is given all of them."""
    secret = SECRETS

    def private(name: str, content: str) -> str:
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o600)
        return str(path)

    private(f"credentials/{CREDENTIAL}", f"trainer play {secret['credential']}\n")
    upstream = {"host": "127.0.0.1", "port": 9, "username": secret["proxy-user"], "password": secret["proxy"]}
    user = {
        "client_id": "id",
        "client_secret": secret["google-secret"],
        "refresh_token": secret["google-refresh"],
        "token_uri": files.url("/no-token"),
    }
    mirror = f"http://{secret['mirror-user']}:{secret['mirror']}@127.0.0.1:{files.port}/mirror"
    return {
        "HOME": str(home),
        "ENVD_ENVS": "3",
        "ENVD_SCREEN": "320x240",
        "ENVD_LOG_LEVEL": "debug",
        "ENVD_SETUP_ATTEMPTS": "1",
        "ENVD_SETTLE_QUIET": "0",
        "ENVD_ACTION_PAUSE": "0",
        "ENVD_TOKEN": secret["token"],
        "ENVD_TOKEN_FILE": private("tokens", f"watcher read {secret['token-file']}\n"),
        "CREDENTIALS_DIRECTORY": str(home / "credentials"),
        "ENVD_CLIENT_PASSWORD": secret["client-password"],
        "ENVD_PROXY_FILE": private("proxies.json", json.dumps([upstream])),
        "ENVD_GOOGLE_CREDENTIALS": private("google.json", json.dumps(user)),
        "ENVD_GOOGLE_ACCOUNT": private(
            "account.json", json.dumps({"email": "a@b", "password": secret["google-account"]})
        ),
        "ENVD_ASSET_MIRRORS": f"{mirror},{mirror}/second,http://nowhere.example={mirror}/third",
        "ENVD_URL": f"http://user:{secret['url']}@127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": secret["aws-key"],
        "AWS_SECRET_ACCESS_KEY": secret["aws-secret"],
        "AWS_SESSION_TOKEN": secret["aws-session"],
    }


def task(*steps: Step) -> dict[str, Any]:
    config = [{"type": kind, "parameters": parameters} for kind, parameters in steps]
    return {"id": "t-1", "config": config, "evaluator": {"func": "infeasible"}}


class Wire:
    """All that the daemon answered, by what it was asked."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self.answers: dict[str, bytes] = {}

    async def ask(self, method: str, path: str, token: str = SECRETS["token"], **how: Any) -> tuple[int, bytes]:
        headers = {"Authorization": token if " " in token else f"Bearer {token}"}
        async with self._session.request(method, self._url + path, headers=headers, **how) as answer:
            stream = answer.content_type == "text/event-stream"
            body = await answer.content.readany() if stream else await answer.read()
            told = f"{len(self.answers)} {method} {path.partition('?')[0]} {answer.status}"
            self.answers[told] = str(answer.headers).encode() + body
            return answer.status, body

    async def reset(self, task: dict[str, Any]) -> dict[str, Any]:
        """The job, ended."""
        status, body = await self.ask("POST", "/v1/envs/0/reset", json={"task": task})
        assert status == 202, body
        job = json.loads(body)
        await self.ask("GET", f"/v1/jobs/{job['id']}/events")
        after = 0
        while True:
            _, body = await self.ask("GET", f"/v1/jobs/{job['id']}?wait=20&after={after}")
            job = json.loads(body)
            if job["ended_at"] is not None:
                return job  # type: ignore[no-any-return]  # JSON
            after = job["version"]


async def live(wire: Wire, files: FilesServer) -> str:
    """All that can be done and go wrong; the signature of a link that was made meanwhile."""
    url = files.url("/a.txt")
    at_mirror = f"/mirror/127.0.0.1:{files.port}/a.txt"
    files.files[at_mirror] = b"there"
    speaks: Step = ("execute", {"command": "{CLIENT_PASSWORD} --help", "shell": True})
    files.files[at_mirror.replace("a.txt", "half")] = b"x" * 8_000_000
    files.faults.extend([truncates] * 3)
    failing: list[tuple[Step, Step]] = [
        (speaks, ("download", {"files": [{"url": files.url("/half"), "path": "/tmp/a"}]})),
        (speaks, ("download", {"files": [{"url": files.url("/none"), "path": "/tmp/a"}]})),
        (speaks, ("download", {"files": [{"url": "http://127.0.0.1:99999/x", "path": "/tmp/a"}]})),
        (speaks, ("proxy", {})),
        (speaks, ("googledrive", {"operation": ["delete"], "args": [{"query": "a"}]})),
        (speaks, ("login", {"settings_file": "a", "platform": "googledrive"})),
    ]
    for steps in failing:
        job = await wire.reset(task(*steps))
        assert job["state"] in ("failed", "succeeded"), job
    assert (await wire.reset(task(speaks, ("download", {"files": [{"url": url, "path": "/tmp/a"}]}))))[
        "state"
    ] == "succeeded"
    assert at_mirror in [path for path, _ in files.seen]
    await wire.ask(
        "POST", "/v1/envs/0/step", json={"actions": ["import pyautogui; pyautogui.click(1, 2)", "nonsense("]}
    )
    await wire.ask("POST", "/v1/envs/0/evaluate")
    await wire.ask("POST", "/env/step", json={"prediction": "no action"})
    for path in (*READ, "/v1/events", f"/v1/envs?access_token={SECRETS['query']}"):
        await wire.ask("GET", path)
    for token in (SECRETS["wrong-token"], f"Basic {SECRETS['basic']}", SECRETS["token-file"], SECRETS["credential"]):
        await wire.ask("GET", "/v1/envs", token=token)
        await wire.ask("POST", "/v1/envs/1/step", token=token, data=b"{")
    for episode in json.loads((await wire.ask("GET", "/v1/episodes"))[1])["episodes"]:
        await wire.ask("GET", f"/v1/episodes/{episode}/bundle")
        await wire.ask("GET", f"/v1/episodes/{episode}/verdict")
    _, link = await wire.ask("POST", "/v1/links", json={"path": "/v1/envs/0/screenshot"})
    wire.answers.popitem()  # the one answer that is there to hold a secret
    path = json.loads(link)["path"]
    await wire.ask("GET", path)
    await wire.ask("GET", path.replace("/0/", "/1/"))
    return str(path.rpartition("=")[2])


async def crash(wire: Wire, process: DaemonProcess) -> None:
    """The queue dies, and the process with a traceback."""
    try:
        await wire.ask("POST", "/v1/envs/1/reset", json={})
    except aiohttp.ClientError:
        pass
    assert await process.ended() not in (0, None)


def state_files(state: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(state.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(state)), path.read_bytes()


async def test_no_secret_is_in_the_log_an_answer_the_evidence_or_a_file(tmp_path: Path) -> None:
    secrets = dict(SECRETS)
    async with files_server() as files:
        environment = planted(tmp_path / "home", files)
        async with daemon(tmp_path / "state", prelude=BROKEN + CRASH, env=environment) as (process, session):
            wire = Wire(session, process.url)
            async with asyncio.timeout(100):
                secrets["link"] = await live(wire, files)
                await crash(wire, process)
    places = {
        "log": process.text.encode(),
        **{f"answer {name}": body for name, body in wire.answers.items()},
        **{f"file {name}": content for name, content in state_files(tmp_path / "state")},
    }
    assert b"Traceback" in places["log"] or b"traceback" in places["log"] or b"exc_type" in places["log"]
    assert any(name.endswith("/v1/envs/2/screenshot 500") for name in places)
    assert {name.rpartition("/")[0] for name in places} >= {"file assets/index", "file assets/parts"}
    found = {
        (name, where)
        for name, secret in secrets.items()
        for where, content in places.items()
        if secret.encode() in content
    }
    assert found == set()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://user:pa@ss@h/x@y", "https://h/x@y"),
        ("https://a.example=https://u:p@b.example/c", "https://a.example=https://b.example/c"),
        ("tcp://u:p@h:1", "tcp://h:1"),
        ("a@b http://h/?q=c@d", "a@b http://h/?q=c@d"),
        ("/srv/a@b", "/srv/a@b"),
    ],
)
def test_names_and_passwords_in_urls_are_not_told(text: str, told: str) -> None:
    assert without_logins(text) == told


def test_settings_are_told_without_secrets() -> None:
    environ = {"HOME": "/nowhere", "ENVD_CLIENT_PASSWORD": SECRETS["client-password"]}
    environ |= {"ENVD_ASSET_MIRRORS": f"https://u:{SECRETS['mirror']}@h, /srv/a"}
    told = effective(load(environ, env_file=None))
    assert told["ENVD_CLIENT_PASSWORD"]["value"] == "**********"
    assert told["ENVD_ASSET_MIRRORS"]["value"] == ["https://h", "/srv/a"]
    assert effective(load({"HOME": "/nowhere"}, env_file=None))["ENVD_CLIENT_PASSWORD"]["value"] == "password"


def test_a_mirror_that_is_none_is_told_without_its_password() -> None:
    with pytest.raises(SettingsError, match="ftp://h is neither") as caught:
        parse_mirrors([f"ftp://u:{SECRETS['mirror']}@h"])
    assert SECRETS["mirror"] not in str(caught.value)


async def test_a_clone_that_repeats_the_command_it_was_given_does_not_tell_the_password(tmp_path: Path) -> None:
    class Repeats(Guest):
        async def execute(self, command: Any, **how: Any) -> Any:
            raise GuestMisbehaved(f"did not run the command: Command '{command}' timed out", refused=str(command))

    async with aiohttp.ClientSession() as session:
        with pytest.raises(GuestMisbehaved) as caught:
            await give_identity("command", tmp_path, Repeats(session, ""), "a-1", SECRETS["client-password"])
    assert SECRETS["client-password"] not in str(caught.value) + str(caught.value.facts)


def test_libraries_that_would_log_credentials_are_kept_from_it() -> None:
    program = """
import logging
from envd import log
log.setup("debug", "json")
for name in ("envd.x", "botocore.auth", "botocore.parsers", "hpack.hpack", "aiobotocore.endpoint", "urllib3"):
    logging.getLogger(name).debug(name)
logging.getLogger("botocore.auth").info("botocore says")
log.setup("warning", "json")
logging.getLogger("botocore.auth").info("too quiet")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert [json.loads(line)["event"] for line in ran.stderr.splitlines()] == ["envd.x", "botocore says"]
