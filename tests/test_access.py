"""Who may use a daemon: tokens and their scopes, networks, proxies, names, links."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from envd.access import CREDENTIAL, LONGEST_LINK, Access, Caller, Scope, access_of
from envd.errors import Forbidden, SettingsError, Unauthorized
from envd.settings import effective, load

TOKEN, OTHER = "t" * 20, "o" * 20
PATH = "/v1/envs/0/screenshot"


def rules(environ: dict[str, str] | None = None, **settings: Any) -> Access:
    environ = {"HOME": "/nowhere", **(environ or {})}
    return access_of(load({**environ, "PROVIDER": "sim"}, env_file=None, **settings), environ)


def ask(
    access: Access, peer: str = "10.1.2.3", token: str = "", forwarded: tuple[str, ...] = (), link: str = ""
) -> Caller:
    return access.caller(peer, f"Bearer {token}" if token else "", forwarded, link, PATH)


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_on_loopback_nobody_needs_a_token(peer: str) -> None:
    assert ask(rules(), peer).scope is Scope.ADMIN


def test_with_networks_that_need_no_token_this_host_needs_none_either() -> None:
    assert ask(rules(host="0.0.0.0", allow="10.0.0.0/8"), "127.0.0.1").how == "open"


def test_what_is_open_on_loopback_is_so_for_this_host_alone_wherever_the_app_is_bound() -> None:
    with pytest.raises(Unauthorized):
        ask(rules(), "10.1.2.3")


@pytest.mark.parametrize("proxies", ["", "127.0.0.1"])
def test_a_proxy_on_this_host_does_not_make_others_of_this_host(proxies: str) -> None:
    with pytest.raises(Unauthorized):
        ask(rules(proxies=proxies), "127.0.0.1", forwarded=("203.0.113.9",))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org"])
def test_others_reach_a_daemon_only_when_it_was_said_who_may(host: str) -> None:
    with pytest.raises(SettingsError, match="lets others reach") as caught:
        rules(host=host)
    assert {"ENVD_TOKEN", "ENVD_ALLOW", "ENVD_INSECURE"} <= set(caught.value.hint.replace("=", " ").split())
    said: list[dict[str, Any]] = [{"token": TOKEN}, {"allow": "10.0.0.0/8"}, {"insecure": True}]
    for one in said:
        rules(host=host, **one)


def test_with_a_token_loopback_needs_it_too() -> None:
    access = rules(token=TOKEN)
    with pytest.raises(Unauthorized, match="must send a token"):
        ask(access, "127.0.0.1")
    assert ask(access, token=TOKEN) == Caller("ENVD_TOKEN", Scope.ADMIN, "10.1.2.3", "token")


@pytest.mark.parametrize("given", [OTHER, TOKEN[:-1], f"{TOKEN}x", "x"])
def test_another_token_is_refused_also_from_a_network_that_needs_none(given: str) -> None:
    with pytest.raises(Unauthorized, match="not known"):
        ask(rules(token=TOKEN, allow="10.0.0.0/8"), token=given)


@pytest.mark.parametrize(
    ("peer", "may"),
    [
        pytest.param("10.100.4.17", True, id="in it"),
        pytest.param("10.100.5.1", False, id="beside it"),
        pytest.param("::ffff:10.100.4.17", True, id="mapped into IPv6"),
        pytest.param("fd00::1", True, id="the other one"),
    ],
)
def test_a_network_that_was_named_needs_no_token(peer: str, may: bool) -> None:
    access = rules(host="0.0.0.0", allow="10.100.4.0/24, fd00::/8")
    if may:
        assert ask(access, peer).how == "network"
    else:
        with pytest.raises(Unauthorized):
            ask(access, peer)


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        pytest.param("10.9.9.9", ("10.100.4.17",), "10.9.9.9", id="not from a proxy of ours"),
        pytest.param("192.168.0.2", ("10.100.4.17",), "10.100.4.17", id="from one"),
        pytest.param(
            "192.168.0.2", ("10.100.4.17, 6.6.6.6",), "6.6.6.6", id="what a client wrote before it is nothing"
        ),
        pytest.param("192.168.0.2", ("10.100.4.17", "192.168.0.3"), "10.100.4.17", id="through two of ours"),
        pytest.param("192.168.0.2", (), "192.168.0.2", id="nothing forwarded"),
    ],
)
def test_only_proxies_that_were_named_say_who_asks(peer: str, forwarded: tuple[str, ...], address: str) -> None:
    access = rules(insecure=True, proxies="192.168.0.0/24")
    assert ask(access, peer, forwarded=forwarded).address == address


def test_nonsense_from_a_proxy_is_refused_unless_there_is_a_token() -> None:
    access = rules(token=TOKEN, proxies="192.168.0.0/24")
    with pytest.raises(Unauthorized, match="no address"):
        ask(access, "192.168.0.2", forwarded=("unknown",))
    assert ask(access, "192.168.0.2", token=TOKEN, forwarded=("unknown",)).address == "192.168.0.2"


@pytest.mark.parametrize("hop", ["10.100.4.17:4711", "[fd00::1]:4711", "[fd00::1]", "fd00::1"])
def test_a_proxy_may_say_the_port_as_well(hop: str) -> None:
    caller = ask(rules(insecure=True, proxies="192.168.0.0/24"), "192.168.0.2", forwarded=(hop,))
    assert caller.address in ("10.100.4.17", "fd00::1")


def test_where_there_are_no_tokens_one_that_is_sent_does_no_harm() -> None:
    assert ask(rules(), "127.0.0.1", token=TOKEN).how == "open"


def test_tokens_of_a_file_have_names_and_scopes(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# who may what\nwatcher read {TOKEN}\ntrainer  play {OTHER}  # the cluster\n\n{'a' * 16}\n")
    file.chmod(0o600)
    access = rules(token_file=file)
    assert [(ask(access, token=one).name, ask(access, token=one).scope) for one in (TOKEN, OTHER, "a" * 16)] == [
        ("watcher", Scope.READ),
        ("trainer", Scope.PLAY),
        ("tokens:5", Scope.ADMIN),
    ]
    with pytest.raises(Forbidden, match="needs the scope play; watcher has read"):
        ask(access, token=TOKEN).require(Scope.PLAY, "POST /env/step")


def test_tokens_come_as_a_credential_of_the_service(tmp_path: Path) -> None:
    (tmp_path / CREDENTIAL).write_text(f"trainer play {TOKEN}\n")
    (tmp_path / CREDENTIAL).chmod(0o400)
    access = rules({"CREDENTIALS_DIRECTORY": str(tmp_path)}, host="0.0.0.0")
    assert ask(access, token=TOKEN).name == "trainer"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("short\n", "at least 16", id="too short"),
        pytest.param(f"trainer everything {TOKEN}\n", "line 1 is neither", id="no such scope"),
        pytest.param("# nobody\n", "no token in", id="empty"),
        pytest.param(f"{TOKEN}é\n", "ASCII", id="not ASCII"),
    ],
)
def test_a_file_of_tokens_that_cannot_be_used_is_told_without_showing_one(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(SettingsError, match=says) as caught:
        rules(token_file=file)
    assert TOKEN not in str(caught.value)


def test_a_file_of_tokens_that_everybody_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(TOKEN)
    file.chmod(0o644)
    with pytest.raises(SettingsError, match="Everybody"):
        rules(token_file=file)


def test_a_token_given_as_the_file_is_not_shown() -> None:
    with pytest.raises(SettingsError, match="cannot be read") as caught:
        rules(token_file=Path(TOKEN))
    assert TOKEN not in str(caught.value)


def test_names_are_given_in_full() -> None:
    with pytest.raises(SettingsError, match="in full"):
        rules(hosts="*.example")


def test_blanks_around_a_token_are_not_part_of_it() -> None:
    assert ask(rules(token=f" {TOKEN}\n"), token=TOKEN).how == "token"
    with pytest.raises(SettingsError, match="without blanks"):
        rules(token=f"{TOKEN} {OTHER}")


@pytest.mark.parametrize("field", ["allow", "proxies"])
def test_everybody_is_no_network(field: str) -> None:
    for everybody in ("0.0.0.0/0", "::/0"):
        with pytest.raises(SettingsError, match="is everybody"):
            rules({f"ENVD_{field.upper()}": everybody})


@pytest.mark.parametrize("field", ["allow", "proxies"])
def test_what_is_no_network_stops_the_start(field: str) -> None:
    with pytest.raises(SettingsError, match=f"ENVD_{field.upper()}=10.0.0.0/99"):
        rules({f"ENVD_{field.upper()}": "10.0.0.0/99"})


def test_a_token_is_shown_nowhere() -> None:
    settings = load({"HOME": "/nowhere", "ENVD_TOKEN": TOKEN}, env_file=None)
    access = access_of(settings, {})
    for shown in (repr(settings), str(effective(settings)), repr(access), repr(ask(access, token=TOKEN))):
        assert TOKEN not in shown
    for wrong in ({"ENVD_MIN_PIXELS": "3000000"}, {"ENVD_PORT": "many"}):
        with pytest.raises(SettingsError) as caught:
            load({"HOME": "/nowhere", "ENVD_TOKEN": TOKEN, **wrong}, env_file=None)
        assert TOKEN not in str(caught.value)


def test_a_link_lets_anybody_read_one_thing_for_a_while() -> None:
    access = rules(token=TOKEN)
    link = access.link(PATH, 60)
    caller = ask(access, link=link)
    assert (caller.name, caller.scope, caller.how) == ("link", Scope.READ, "link")
    assert caller.until is not None
    assert 59 <= caller.until - time.time() <= 61
    with pytest.raises(Unauthorized):
        access.caller("10.1.2.3", "", (), link, "/v1/envs/1/screenshot")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda link: link[:-1] + ("A" if link[-1] != "A" else "B"), id="signature"),
        pytest.param(lambda link: "9" + link[1:], id="end"),
        pytest.param(lambda link: link.partition(".")[0], id="without one"),
        pytest.param(lambda link: f"{'9' * 400}.x", id="far too long"),
        pytest.param(lambda link: "é.é", id="not ASCII"),
    ],
)
def test_a_link_that_was_changed_is_refused(change: Any) -> None:
    access = rules(token=TOKEN)
    with pytest.raises(Unauthorized, match="signature"):
        ask(access, link=change(access.link(PATH, 60)))


def test_a_link_ends_and_lasts_an_hour_at_most() -> None:
    access, now = rules(token=TOKEN), time.time()
    with pytest.raises(Unauthorized, match="has ended"):
        ask(access, link=access.link(PATH, 60, now=now - 61))
    with pytest.raises(Unauthorized, match="has ended"):
        ask(access, link=access.link(PATH, 10**9, now=now - LONGEST_LINK - 1))


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1:15001", True),
        ("[::1]:15001", True),
        ("10.4.4.4", True),
        ("localhost:15001", True),
        ("LOCALHOST.", True),
        ("desk.example:15001", True),
        ("other.example", True),
        ("envd.default.svc.cluster.local:15001", True),
        ("ip-10-0-0-5.ec2.internal", True),
        ("evil.example:15001", False),
        ("127.0.0.1.evil.example", False),
        ("localhost@evil.example", False),
        ("", True),
    ],
)
def test_it_is_known_by_addresses_and_by_the_names_that_it_was_given(host: str, known: bool) -> None:
    assert rules(hosts="desk.example,other.example.:15001").knows_host(host) is known
