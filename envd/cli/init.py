"""`envd init`: a `.env` that a daemon starts with, from three questions: who makes the desktops, who may reach them,
how many there are.

What the file has already is the answer that is proposed; lines about anything else stay as they are. Nothing is written
that `envd serve` would refuse.
"""

from __future__ import annotations

import asyncio
import errno
import io
import ipaddress
import json
import os
import re
import secrets
import shlex
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer
from dotenv import dotenv_values

from ..errors import EnvdError, SettingsError
from ..settings import KNOWN_PROVIDERS, Settings, load
from .listing import busy, console

Reach = Literal["host", "network", "token"]
REACHES: tuple[Reach, ...] = ("host", "network", "token")

MANAGED = ("PROVIDER", "ENVD_DOCKER_IMAGE", "ENVD_HOST", "ENVD_ALLOW", "ENVD_TOKEN", "ENVD_ENVS")
"""What the three questions are about."""
SECRET = re.compile(r"^\s*(?:export\s+)?ENVD_TOKEN\s*=\s*\S", re.MULTILINE)
LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=")
EVERYWHERE = "0.0.0.0"

REACH_WORDS = {
    "host": "this host only; nobody else can connect",
    "network": "whoever is in a network that you name, without a token: old trainers can send none",
    "token": "everybody who sends a token, which is made now",
}
PROVIDER_WORDS = {
    "local": "processes of this host behind bubblewrap: a browser and a terminal, ready in seconds",
    "docker": "containers, or virtual machines in them; OSWorld's own image, too",
    "qemu": "virtual machines, without Docker",
    "aws": "an EC2 instance each; `envd aws check` looks whether it can",
    "sim": "simulated, for trying trainers out: a picture that follows clicks and keys",
}


@dataclass(frozen=True, slots=True)
class Answers:
    """`network` is of reach `network` alone: networks, separated by commas."""

    provider: str
    reach: Reach
    envs: int
    network: str = ""
    image: str = ""
    """Of docker, where one of ours is here."""


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line said; None is asked."""

    file: Path
    provider: str | None
    reach: Reach | None
    network: str | None
    envs: int | None
    yes: bool
    force: bool
    as_json: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """A provider. `works` is None where that is not looked at; `why` is why it does not."""

    name: str
    works: bool | None
    why: str = ""
    image: str = ""


def init(given: Given) -> int:
    """Ask, show, write. 0 when the file says what it should, 1 when it was left as it is. Raises SettingsError. Blocks,
    and runs a loop of its own."""
    if not (given.yes or sys.stdin.isatty()):
        raise SettingsError(
            "Nobody can be asked here.", hint="Give --yes, and what is not to be as proposed: see --help."
        )
    text = _text_of(given.file)
    kept = {name: value or "" for name, value in dotenv_values(stream=io.StringIO(text), interpolate=False).items()}
    with busy(console(), "looking at what works on this host", quiet=given.as_json):
        found = asyncio.run(choices())
    answers = _with_given(proposed(kept, found), given, kept, found)
    if not given.yes:
        answers = asked(answers, given, kept, found)
    said = settings_of(answers, kept)
    after = merged(text, said)
    settings = checked(after)
    if after == text:
        return _tell(given, said, settings, "says that already")
    if text and not given.yes:
        typer.echo(f"\n{given.file} is there. It would be:\n\n{_indented(masked(after))}")
        if not typer.confirm("Write that?", default=True):
            return 1
    if text and given.yes and not given.force:
        raise SettingsError(
            f"{given.file} is there, and says something else.", hint="Give --force to change it, or --file another one."
        )
    write(given.file, after)
    return _tell(given, said, settings, "written")


def _text_of(file: Path) -> str:
    try:
        return file.read_text() if file.exists() else ""
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read: {error}.", hint="Name another one with --file.") from error


def _with_given(first: Answers, given: Given, kept: Mapping[str, str], found: list[Choice]) -> Answers:
    """What the command line said instead of what is proposed. Raises SettingsError."""
    if given.provider is not None and given.provider not in KNOWN_PROVIDERS:
        raise SettingsError(f"There is no provider {given.provider}.", hint=f"There are {', '.join(KNOWN_PROVIDERS)}.")
    provider = given.provider or first.provider
    reach = given.reach or ("network" if given.network else first.reach)
    network = networks(given.network) if given.network else first.network
    if reach == "network" and not network:
        network = own_network()
    image = image_for(provider, kept, found)
    return Answers(provider, reach, given.envs or first.envs, network, image)


def _tell(given: Given, said: Mapping[str, str], settings: Settings, what: str) -> int:
    shown = {name: "…" if name == "ENVD_TOKEN" else value for name, value in said.items()}
    if given.as_json:
        typer.echo(json.dumps({"file": str(given.file), "written": what == "written", "settings": shown}, indent=1))
        return 0
    typer.echo(f"{given.file} {what}: {', '.join(f'{name}={value}' for name, value in shown.items())}")
    for name in overridden(said, os.environ):
        typer.echo(f"{name} is set in the environment too, and that wins.")
    for line in in_the_way(given.file):
        typer.echo(f"\n{line}")
    typer.echo("\n" + "\n".join(next_words(settings, said, given.file)))
    return 0


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


async def choices() -> list[Choice]:
    """Every provider, and whether it works here. The best comes first."""
    found = [await _local(), *await _docker_and_qemu(), Choice("aws", None), Choice("sim", True)]
    return sorted(found, key=lambda choice: choice.works is not True and choice.works is not None)


async def _local() -> Choice:
    from anyio.to_thread import run_sync

    from ..drivers.local import LocalDriver

    with tempfile.TemporaryDirectory(prefix="envd-init-") as folder:
        state_dir = Path(folder) / "state"
        await run_sync(state_dir.mkdir)
        try:
            async with LocalDriver(Settings(provider="local", state_dir=state_dir), "000000"):
                return Choice("local", True)
        except EnvdError as error:
            return Choice("local", False, str(error))


async def _docker_and_qemu() -> tuple[Choice, Choice]:
    import shutil

    from .images import look

    settings = load(environ={}, env_file=None, provider="docker")
    parts, trouble = await look(settings)
    ours = [part.name for part in parts if part.name in ("envd/desktop", "envd/qemu") and part.usable]
    disk = parts[-1]
    if trouble is not None:
        docker = Choice("docker", False, trouble.detail)
    elif not ours:
        docker = Choice("docker", False, "no image of ours is here: `make images` makes them")
    else:
        docker = Choice("docker", True, image=ours[0])
    own_disk = (await look(load(environ={}, env_file=None, provider="qemu")))[0][-1] if not disk.usable else disk
    if shutil.which("qemu-system-x86_64") is None:
        return docker, Choice("qemu", False, "there is no qemu-system-x86_64: the Debian package is qemu-system-x86")
    if not own_disk.usable:
        return docker, Choice("qemu", False, own_disk.problem or "there is no disk for them: `make images` makes it")
    return docker, Choice("qemu", True)


def proposed(kept: Mapping[str, str], found: list[Choice]) -> Answers:
    """What is taken where nothing else is said: what the file says, else what works here, for this host alone."""
    provider = kept.get("PROVIDER", "").strip().lower()
    if provider not in KNOWN_PROVIDERS:
        provider = next(choice.name for choice in found if choice.works)
    token = kept.get("ENVD_TOKEN") or kept.get("ENVD_TOKEN_FILE")
    reach: Reach = "token" if token else "network" if kept.get("ENVD_ALLOW") else "host"
    envs = kept.get("ENVD_ENVS", "")
    return Answers(
        provider=provider,
        reach=reach,
        envs=int(envs) if envs.isdecimal() and int(envs) else 1,
        network=kept.get("ENVD_ALLOW", ""),
        image=image_for(provider, kept, found),
    )


def image_for(provider: str, kept: Mapping[str, str], found: list[Choice]) -> str:
    if provider != "docker":
        return kept.get("ENVD_DOCKER_IMAGE", "")
    return kept.get("ENVD_DOCKER_IMAGE", "") or next(choice.image for choice in found if choice.name == "docker")


def asked(first: Answers, given: Given, kept: Mapping[str, str], found: list[Choice]) -> Answers:
    """Put the questions that the command line left open; Return takes what is proposed. Blocks."""
    provider, reach, network, envs = first.provider, first.reach, first.network, first.envs
    typer.echo("Return takes what is in brackets.")
    if given.provider is None:
        typer.echo("\nWho makes the desktops?")
        for choice in found:
            typer.echo(f"  {choice.name:<8} {PROVIDER_WORDS[choice.name]}")
            if choice.works is False:
                typer.echo(f"  {'':<8} not here: {choice.why}")
        provider = _one_of([choice.name for choice in found], provider)
    if given.reach is None and given.network is None:
        typer.echo("\nWho may reach them?")
        for name in REACHES:
            typer.echo(f"  {name:<8} {REACH_WORDS[name]}")
        chosen = _one_of(REACHES, reach)
        reach = next(name for name in REACHES if name == chosen)
    if reach == "network" and given.network is None:
        typer.echo("\nWhich networks? Several are separated by commas.")
        network = _valid(networks, network or own_network())
    if given.envs is None:
        typer.echo(
            "\nHow many desktops are played on at once? Each is an env, a number that a trainer resets and steps."
        )
        envs = int(_valid(_count, str(envs)))
    return Answers(provider, reach, envs, network, image_for(provider, kept, found))


def _one_of(names: list[str] | tuple[str, ...], default: str) -> str:
    def known(given: str) -> str:
        begun = [name for name in names if name.startswith(given.strip().lower())]
        if not given.strip() or len(begun) != 1:
            raise SettingsError(f"one of {', '.join(names)}")
        return begun[0]

    return _valid(known, default)


def _valid(check: Callable[[str], str], default: str) -> str:
    while True:
        given: str = typer.prompt("", default=default, prompt_suffix="> ")
        try:
            return check(given)
        except EnvdError as error:
            typer.echo(f"  That is not it: {error.detail}.")


def networks(given: str) -> str:
    """Networks, separated by commas, as ENVD_ALLOW takes them. Raises SettingsError."""
    words = [word.strip() for word in given.split(",") if word.strip()]
    try:
        named = [str(ipaddress.ip_network(word, strict=False)) for word in words]
    except ValueError as error:
        raise SettingsError(f"{error}; give it as 10.100.4.0/24") from error
    if not named:
        raise SettingsError("a network such as 10.100.4.0/24")
    return ",".join(named)


def _count(given: str) -> str:
    if not (given.isdecimal() and 1 <= int(given) <= 4096):
        raise SettingsError("a number from 1 to 4096")
    return given


def own_network() -> str:
    """The network around the address by which this host goes out, as far as that can be guessed: its /24."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect(("192.0.2.1", 9))  # sends nothing: it only chooses an address
            address = way.getsockname()[0]
        except OSError:
            return "10.0.0.0/8"
    return str(ipaddress.ip_network(f"{address}/24", strict=False))


def settings_of(answers: Answers, kept: Mapping[str, str]) -> dict[str, str]:
    """What the file is to say. A token that is there stays: trainers have it."""
    said = {"PROVIDER": answers.provider, "ENVD_ENVS": str(answers.envs)}
    if answers.image:
        said["ENVD_DOCKER_IMAGE"] = answers.image
    if answers.reach != "host":
        said["ENVD_HOST"] = kept.get("ENVD_HOST") or EVERYWHERE
        if said["ENVD_HOST"] in ("127.0.0.1", "localhost", "::1"):
            said["ENVD_HOST"] = EVERYWHERE
    if answers.reach == "network":
        said["ENVD_ALLOW"] = answers.network
    if answers.reach == "token":
        if kept.get("ENVD_TOKEN") or not kept.get("ENVD_TOKEN_FILE"):
            said["ENVD_TOKEN"] = kept.get("ENVD_TOKEN") or secrets.token_hex(32)
        if kept.get("ENVD_ALLOW"):
            said["ENVD_ALLOW"] = kept["ENVD_ALLOW"]
    return said


def merged(text: str, said: Mapping[str, str]) -> str:
    """`text` with what is `said`: in the place of lines about the same, else below; lines about anything else stay, and
    so do those that say it already, quotes and comments with them."""
    left = dict(said)
    lines = []
    for line in text.splitlines():
        match = LINE.match(line)
        name = match[1] if match else ""
        if name not in MANAGED:
            lines.append(line)
        elif name in left:
            value = left.pop(name)
            says_it = dotenv_values(stream=io.StringIO(line), interpolate=False).get(name) == value
            lines.append(line if says_it else f"{name}={value}")
    if left and not text:
        lines.append("# Written by `envd init`; /docs/settings has every setting. The environment wins over this file.")
    lines += [f"{name}={value}" for name, value in left.items()]
    return "\n".join(lines) + "\n"


def checked(text: str) -> Settings:
    """The settings that a daemon would have of it. Raises SettingsError."""
    with tempfile.TemporaryDirectory(prefix="envd-init-") as folder:
        file = Path(folder) / ".env"
        file.touch(0o600)
        file.write_text(text)
        try:
            return load(environ={}, env_file=file)
        except SettingsError as error:
            raise SettingsError(error.detail.replace(str(file), ".env"), hint="Put that right in it first.") from error


def write(file: Path, text: str) -> None:
    """Whole or not at all; for this user alone where it holds a token. Raises SettingsError."""
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    mode = 0o600 if SECRET.search(text) else (file.stat().st_mode & 0o777) if file.exists() else 0o644
    try:
        try:
            part.touch(0o600)
            part.write_text(text)
            part.chmod(mode)
            os.replace(part, file.resolve())
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(
            f"{file} cannot be written: {error.strerror or error}.", hint="Name it with --file."
        ) from error


def masked(text: str) -> str:
    """As it may be shown."""
    return re.sub(r"^(\s*(?:export\s+)?ENVD_TOKEN\s*=).+$", r"\1…", text, flags=re.MULTILINE)


def overridden(said: Mapping[str, str], environ: Mapping[str, str]) -> list[str]:
    """Names that the environment sets to something else."""
    return [name for name, value in said.items() if environ.get(name, "").strip() not in ("", value)]


def in_the_way(file: Path) -> list[str]:
    """What keeps a daemon from being started beside what runs now. Blocks."""
    from ..doctor.serving import bindable, lock_holder

    try:
        settings = load(env_file=file)
    except SettingsError:  # by the environment; the start will say it
        return []
    own = "stop it first, or give this one an ENVD_STATE_DIR and an ENVD_PORT of its own"
    if pid := lock_holder(settings.state_dir / "lock"):
        return [f"A daemon runs with {settings.state_dir} now (process {pid}), and keeps its settings: {own}."]
    trouble = bindable(settings.host, settings.port) if settings.port else None
    if trouble is not None and trouble.errno == errno.EADDRINUSE:
        return [f"Something listens on port {settings.port} now: {own}."]
    return []


def next_words(settings: Settings, said: Mapping[str, str], file: Path) -> list[str]:
    """What to do now."""
    start = "envd serve" if file == Path(".env") else f"cd {shlex.quote(str(file.parent))} && envd serve"
    words = ["Look first:    envd doctor", f"Start it:      {start}"]
    if "ENVD_HOST" in said:
        words.append(f"Trainers use:  ENVD_URL=http://{socket.gethostname()}:{settings.port}")
        if "ENVD_TOKEN" in said:
            words.append(f"               ENVD_TOKEN, which is in {file}; keep that to yourself")
    words.append("See it work:   envd demo")
    return words
