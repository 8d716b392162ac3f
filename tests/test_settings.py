"""Settings: where each value comes from, and that nothing unusable is silently replaced."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from envd.errors import SettingsError
from envd.settings import VARIABLES, Settings, effective, load

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "envd/app/docs/pages/settings.md"
README = ROOT / "README.md"


def refused(environ: dict[str, str], env_file: Path | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(environ, env_file)
    assert caught.value.exit_code == 78
    return caught.value.detail


def test_defaults_are_those_that_users_know() -> None:
    settings = load({"HOME": "/home/someone"}, env_file=None)
    assert (settings.provider, settings.host, settings.port, settings.envs) == ("docker", "127.0.0.1", 15001, 1)
    assert (settings.ready_timeout, settings.legacy_wait, settings.max_steps) == (3600, 1150, 16)
    assert (settings.min_pixels, settings.max_pixels, settings.screen) == (3136, 2_116_800, (1920, 1080))
    assert settings.state_dir == Path("/home/someone/.local/state/envd")


def test_the_state_directory_follows_xdg() -> None:
    environ = {"HOME": "/home/someone", "XDG_STATE_HOME": "/var/states"}
    assert load(environ, env_file=None).state_dir == Path("/var/states/envd")


def test_a_tilde_in_a_path_is_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load({"ENVD_STATE_DIR": "~/states"}, env_file=None).state_dir == Path("/home/someone/states")


def test_arguments_win_over_the_environment_and_the_environment_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("ENVD_PORT=1001\nENVD_ENVS=2\nENVD_MAX_STEPS=3\nUNRELATED=x\n")
    settings = load({"ENVD_PORT": "1002", "ENVD_ENVS": "4", "PATH": "/bin"}, file, port=1003, host=None)
    assert (settings.port, settings.envs, settings.max_steps, settings.host) == (1003, 4, 3, "127.0.0.1")
    origins = {name: entry["origin"] for name, entry in effective(settings).items()}
    assert (origins["ENVD_PORT"], origins["ENVD_ENVS"]) == ("argument", "environment")
    assert (origins["ENVD_MAX_STEPS"], origins["ENVD_HOST"]) == (str(file), "default")


def test_an_empty_value_is_no_value(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("ENVD_PORT=1001\n")
    settings = load({"ENVD_PORT": " ", "ENVD_PROMPT_FILE": ""}, file)
    assert (settings.port, settings.prompt_file) == (1001, None)


def test_the_names_of_older_servers_work() -> None:
    settings = load({"PROVIDER": " Local ", "DOCKER_VM_READY_TIMEOUT": "7"}, env_file=None)
    assert (settings.provider, settings.ready_timeout) == ("local", 7)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        pytest.param("ENVD_PROT", "1", "no such setting, did you mean ENVD_PORT?", id="misspelt"),
        pytest.param("ENVD_XYZZY_PLUGH", "1", "no such setting", id="unknown"),
        pytest.param("PROVIDER", "dokcer", "did you mean docker", id="misspelt provider"),
        pytest.param("PROVIDER", "vmware", "there are aws, docker, local, qemu, sim", id="unknown provider"),
        pytest.param("ENVD_PORT", "http", "valid integer", id="no number"),
        pytest.param("ENVD_PORT", "65536", "less than or equal to 65535", id="port too large"),
        pytest.param("ENVD_PORT", "-1", "greater than or equal to 0", id="port negative"),
        pytest.param("ENVD_ENVS", "0", "greater than or equal to 1", id="no env"),
        pytest.param("ENVD_ENVS", "1.5", "valid integer", id="half an env"),
        pytest.param("ENVD_SCREEN", "1920", "WIDTHxHEIGHT", id="screen without height"),
        pytest.param("ENVD_SCREEN", "000x000", "WIDTHxHEIGHT", id="screen of nothing"),
        pytest.param("DOCKER_VM_READY_TIMEOUT", "0", "greater than 0", id="no time to boot"),
        pytest.param("DOCKER_VM_READY_TIMEOUT", "inf", "finite", id="endless boot"),
        pytest.param("ENVD_LEGACY_WAIT", "nan", "finite", id="not a number"),
        pytest.param("ENVD_LEGACY_WAIT", "-1", "greater than or equal to 0", id="negative wait"),
        pytest.param("ENVD_HEARTBEAT", "0", "greater than 0", id="no heartbeat"),
        pytest.param("ENVD_HEARTBEAT", "inf", "finite", id="endless silence"),
        pytest.param("ENVD_DRAIN_SECONDS", "61", "less than or equal to 60", id="drain too long"),
        pytest.param("ENVD_PREWARM", "perhaps", "boolean", id="no boolean"),
        pytest.param("ENVD_LOG_LEVEL", "loud", "'debug', 'info'", id="no such level"),
        pytest.param("ENVD_MIN_PIXELS", "3000000", "larger than ENVD_MAX_PIXELS", id="pixels in the wrong order"),
        pytest.param("ENVD_BODY_LIMIT", "5", "greater than or equal to 1024", id="tiny bodies"),
    ],
)
def test_what_cannot_be_used_stops_the_start(name: str, value: str, says: str, tmp_path: Path) -> None:
    complaint = refused({name: value})
    assert says in complaint
    assert f"{name}=" in complaint or f"{name} (" in complaint or name == "ENVD_MIN_PIXELS"
    file = tmp_path / ".env"
    file.write_text(f"{name}={value}\n")
    assert says in refused({}, file)
    assert str(file) in refused({}, file) or name == "ENVD_MIN_PIXELS"


def test_a_question_ends_with_its_own_mark() -> None:
    complaint = refused({"ENVD_PROT": "1"})
    assert complaint.startswith("1 setting cannot be used: ")
    assert complaint.endswith("did you mean ENVD_PORT?")


def test_all_that_is_wrong_is_said_at_once() -> None:
    complaint = refused({"ENVD_PORT": "x", "ENVD_ENVS": "y", "ENVD_FOO": "z"})
    assert complaint.startswith("3 settings cannot be used: ")
    assert all(name in complaint for name in ("ENVD_PORT=x", "ENVD_ENVS=y", "ENVD_FOO"))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes(b"ENVD_PORT=\xff\xfe\n")
    assert str(file) in refused({}, file)


def test_a_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert load({}, tmp_path / ".env").port == 15001


def test_settings_do_not_change() -> None:
    settings: Any = load({}, env_file=None)
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_the_effective_settings_are_json_and_cover_every_variable() -> None:
    shown = json.loads(json.dumps(effective(load({}, env_file=None)), allow_nan=False))
    assert shown.keys() == VARIABLES.keys()
    assert shown["ENVD_SCREEN"] == {"value": [1920, 1080], "origin": "default"}


def test_every_setting_says_what_it_is_for() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def table_of(file: Path) -> dict[str, str]:
    """Each setting with its default, as the tables of a page have them."""
    rows = [line.split("|")[1:3] for line in file.read_text().splitlines() if re.match(r"\| `(ENVD_|[A-Z_]+`)", line)]
    table: dict[str, str] = {}
    for names, defaults in rows:
        named, given = re.findall(r"`([A-Z_]+)`", names), re.findall(r"`([^`]*)`", defaults)
        table |= dict(zip(named, [*given, *[""] * len(named)], strict=False))
    return table


def test_the_page_of_settings_lists_every_one_with_its_default() -> None:
    table = table_of(PAGE)
    assert list(table) == list(VARIABLES)
    given = {name: value for name, value in table.items() if value}
    shown = {name: load({"HOME": "~", name: value}, env_file=None) for name, value in given.items()}
    assert len(given) > 60
    defaults = load({"HOME": "~"}, env_file=None)
    for name, settings in shown.items():
        field = VARIABLES[name]
        assert getattr(settings, field) == getattr(defaults, field), name


def test_what_the_readme_says_of_settings_is_what_their_page_says() -> None:
    short, whole = table_of(README), table_of(PAGE)
    assert len(short) > 5
    assert short == {name: whole[name] for name in short}


@pytest.mark.parametrize(
    ("environ", "disk"),
    [
        pytest.param({"HOME": "/h"}, "/h/.cache/envd/images/guest-disk.qcow2", id="home"),
        pytest.param({"HOME": "/h", "XDG_CACHE_HOME": "/c"}, "/c/envd/images/guest-disk.qcow2", id="XDG"),
        pytest.param({"XDG_CACHE_HOME": "/c", "ENVD_CACHE": "/e"}, "/e/images/guest-disk.qcow2", id="ENVD_CACHE"),
        pytest.param({"ENVD_CACHE": "/e", "ENVD_VM_DISK": "/d.qcow2"}, "/d.qcow2", id="ENVD_VM_DISK"),
    ],
)
def test_virtual_machines_have_our_own_disk_unless_another_is_set(environ: dict[str, str], disk: str) -> None:
    assert load(environ, env_file=None).guest_disk == Path(disk)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({}, "http://127.0.0.1:15001"),
        ({"ENVD_PORT": "15555"}, "http://127.0.0.1:15555"),
        ({"ENVD_PORT": "0"}, "http://127.0.0.1:15001"),
        ({"ENVD_HOST": "0.0.0.0", "ENVD_PORT": "15555"}, "http://127.0.0.1:15555"),
        ({"ENVD_HOST": "::"}, "http://[::1]:15001"),
        ({"ENVD_HOST": "10.1.2.3"}, "http://10.1.2.3:15001"),
        ({"ENVD_TLS_CERT": "a.pem", "ENVD_TLS_KEY": "b.pem"}, "https://127.0.0.1:15001"),
        ({"ENVD_URL": "http://desks:1", "ENVD_PORT": "15555"}, "http://desks:1"),
    ],
)
def test_clients_talk_to_the_daemon_of_the_same_settings(given: dict[str, str], url: str) -> None:
    assert load(given, None).url == url
