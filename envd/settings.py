"""All settings: one frozen value, read once from the environment and `.env` (the environment wins).

Names that users of older servers have keep working (`PROVIDER`, `DOCKER_VM_READY_TIMEOUT`, …); everything else is
`ENVD_*`. A name that does not exist and a value that cannot be used stop the start: nothing is silently replaced.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from .errors import SettingsError
from .models import Counts

SHORTEST_SECRET = 4
DEFAULT_PORT = 15_001
KNOWN_PROVIDERS = ("aws", "docker", "local", "qemu", "sim")


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """`$XDG_STATE_HOME/envd`, else `~/.local/state/envd`."""
    home = environ.get("HOME") or str(Path.home())
    return Path(environ.get("XDG_STATE_HOME") or Path(home, ".local", "state")) / "envd"


def default_cache(environ: Mapping[str, str]) -> Path:
    """`$XDG_CACHE_HOME/envd`, else `~/.cache/envd`."""
    home = environ.get("HOME") or str(Path.home())
    return Path(environ.get("XDG_CACHE_HOME") or Path(home, ".cache")) / "envd"


def own_url(given: Mapping[str, Any]) -> str:
    """Where a daemon with these settings (field → value) is reached from its own host."""
    host, port = str(given.get("host") or "127.0.0.1"), given.get("port") or DEFAULT_PORT
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if given.get("tls_cert") else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _screen(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"([1-9][0-9]{2,4})[x×]([1-9][0-9]{2,4})", value.strip())
        if match is None:
            raise ValueError("give it as WIDTHxHEIGHT, for example 1920x1080")
        return int(match[1]), int(match[2])
    return value


def _bytes(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?", value.strip().lower())
        if match is None:
            raise ValueError("give it as a number of bytes, or with K, M, G or T behind it, for example 4G")
        try:
            return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))
        except OverflowError as error:
            raise ValueError("that is more than there can be") from error
    return value


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError("there is no such user, or no home") from error


def _words(value: Any) -> Any:
    return tuple(word for part in value.split(",") if (word := part.strip())) if isinstance(value, str) else value


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
UserPath = Annotated[Path, AfterValidator(_expanded)]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]


class Settings(BaseSettings):
    """Field order is the order of the documentation. Durations are seconds. After a change of any: `make docs`."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True)

    provider: str = Field(default="docker", validation_alias=AliasChoices("PROVIDER", "provider"))
    """Who makes the desktops: aws, docker, local, qemu or sim. `make serve` sets local."""
    host: str = "127.0.0.1"
    """Address to listen on; another than loopback needs ENVD_TOKEN, ENVD_TOKEN_FILE, ENVD_ALLOW or ENVD_INSECURE."""
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    token: SecretStr = SecretStr("")
    """Whoever sends this may do everything. Clients read the same variable."""
    token_file: UserPath | None = None
    """More of them, one to a line: TOKEN, or NAME SCOPE TOKEN with the scope read, play or admin."""
    allow: Words = ()
    """Networks whose clients need no token, separated by commas."""
    insecure: bool = False
    """Let everybody who reaches the daemon use it."""
    proxies: Words = ()
    """Networks of proxies whose X-Forwarded-For is believed, separated by commas."""
    hosts: Words = ()
    """Names that the daemon is called by, beside localhost, this host's and addresses, separated by commas."""
    tls_cert: UserPath | None = None
    """Certificate chain (PEM) to serve HTTPS with, read at the start. Clients know its CA, and use ENVD_URL=https://…"""
    tls_key: UserPath | None = None
    """Its private key (PEM, no passphrase)."""
    request_rate: float = Field(default=500, ge=0, allow_inf_nan=False)
    """Requests that one client may make in a second on average, and twice as many at once; 0 is no limit."""
    state_dir: UserPath = Path()
    """Where the daemon keeps what must outlive it. One daemon per directory."""
    envs: int = Field(default=1, ge=1, le=4096)
    """How many envs are served, numbered from 0."""
    prewarm: bool | None = None
    """Boot a first desktop at start. Unset: for providers whose boots take minutes."""
    screen: Annotated[tuple[int, int], BeforeValidator(_screen)] = (1920, 1080)
    """Screen of the desktops."""
    ready_timeout: PositiveSeconds = Field(
        default=3600, validation_alias=AliasChoices("DOCKER_VM_READY_TIMEOUT", "ready_timeout")
    )
    """A boot that has not passed both probes by then has failed."""
    chrome_grace: Seconds = 10
    """How long the guest may answer without CDP before Chrome is started in it."""
    legacy_wait: Seconds = 1150
    """How long `POST /env/reset` waits for its job; below the 1200 s after which old clients hang up."""
    queue_limit: int = Field(default=1024, ge=1)
    """Jobs that may wait at once."""
    client_jobs: int = Field(default=0, ge=0)
    """Of these, resets of one client (a token, or an address that needs none), which is answered 429 above; 0 is no
    limit."""
    queue_timeout: Seconds = 86_400
    """A job that waited so long expires."""
    max_steps: int = Field(default=16, ge=1)
    """Length of an episode, as existing trainers expect."""
    counts: Counts = "actions"
    """What ENVD_MAX_STEPS limits: actions (as servers always did; a prediction may hold several) or predictions."""
    episode_timeout: Seconds = 0.0
    """No step of an episode begins later than this; 0 is no limit."""
    format_reward: Literal["plain", "shaped"] = "plain"
    """shaped: the bonuses that one older server added for parsing, acting and finishing."""
    action_pause: Seconds = 0.5
    """Wait after each action, before the next or the screenshot. A step may ask for another."""
    wait_seconds: Seconds = 1.0
    """How long the model's wait() lasts."""
    settle_seconds: Seconds = 0.0
    """Wait at least so long before the first observation of an episode, whatever the screen does."""
    settle_quiet: Seconds = 0.2
    """The screen has settled once it did not change for so long; 0 takes the first picture."""
    settle_limit: Seconds = 10.0
    """How long to wait for that, before the first observation and before an evaluation."""
    client_password: str = "password"
    """Password of the desktops' user, put where a task says {CLIENT_PASSWORD}."""
    setup_attempts: int = Field(default=2, ge=1, le=5)
    """Desktops that a task's set-up is tried on before its reset fails."""
    setup_timeout: PositiveSeconds = 900
    """A task's set-up must be done by then."""
    asset_mirrors: Words = ()
    """Where files that tasks name are looked for first, separated by commas: base URLs, folders (HOST/PATH below them,
    as `wget --force-directories` lays them out), or PREFIX=REPLACEMENT such as
    `https://huggingface.co=https://mirror.example`."""
    asset_limit: int = Field(default=20 * 1024**3, ge=1024**2)
    """Bytes that the cache of such files may take; the least recently used go first."""
    asset_timeout: PositiveSeconds = 300
    """One try of a download may take so long."""
    offline: bool = False
    """Download nothing: use the cache and folders alone."""
    proxy_file: UserPath | None = None
    """JSON list of {host, port, username, password, protocol} for tasks that ask for a proxy."""
    google_credentials: UserPath | None = None
    """JSON of an OAuth user (client_id, client_secret, refresh_token) for tasks that use Google Drive."""
    google_account: UserPath | None = None
    """JSON {email, password} for tasks that log in to Google."""
    evaluators: UserPath | None = None
    """Python interpreter that has the evaluators, as `make evaluators` builds it. Unset: that one, if it is there."""
    evaluations: int = Field(default=2, ge=1, le=64)
    """Evaluations that may run at once."""
    evaluation_timeout: PositiveSeconds = 270
    """A verdict is there by then; below the 300 s after which old clients hang up."""
    bundles: int = Field(default=500, ge=1)
    """Episodes whose evidence is kept."""
    bundle_days: float = Field(default=14, gt=0, allow_inf_nan=False)
    """How long it is kept."""
    bundle_limit: int = Field(default=256 * 1024**2, ge=1024**2)
    """Bytes that one episode's evidence may take."""
    journal_days: float = Field(default=7, gt=0, allow_inf_nan=False)
    """How long ended jobs and verdicts are kept. Answers to idempotency keys: 24 hours."""
    journal_jobs: int = Field(default=10_000, ge=1)
    """Ended jobs that are kept."""
    journal_limit: Annotated[int, BeforeValidator(_bytes), Field(ge=16 * 1024**2)] = 1024**3
    """Bytes that the journal may take; beyond, old answers are forgotten."""
    keep_desktops: bool = False
    """Leave desktops, episodes and jobs as they are when the daemon ends, for its next start."""
    prompt_file: UserPath | None = None
    """Prompt template your model was trained with; must contain {instruction}. Unset: envd's own."""
    min_pixels: int = Field(default=3136, ge=784)
    """Advertised with each image."""
    max_pixels: int = Field(default=2_116_800, ge=784)
    """Advertised with each image; predictions are scaled by it."""
    heartbeat: PositiveSeconds = 15
    """Seconds of silence before an event stream sends a comment."""
    max_streams: int = Field(default=2048, ge=1)
    """Event streams, screens, connections to Chrome and transfers of files that may be open at once."""
    body_limit: int = Field(default=8 * 1024 * 1024, ge=1024)
    """Largest request body, in bytes."""
    drain_seconds: float = Field(default=1.0, ge=0, le=60)
    """At shutdown, how long running steps may take to finish."""
    drain_limit: Seconds = 0.0
    """At shutdown, how long episodes may go on before that, while no new work is taken."""
    docker_host: str = Field(
        default="unix:///var/run/docker.sock", validation_alias=AliasChoices("DOCKER_HOST", "docker_host")
    )
    """The Docker engine's socket, on this host."""
    docker_image: str = "happysixd/osworld-docker"
    """What docker desktops are made of: any image that keeps OSWorld's ports; envd/desktop and envd/qemu are ours."""
    pull: Literal["never", "missing"] = "never"
    """missing: an image that is not on this host is pulled when the daemon starts. Never inside a reset."""
    vm_disk: UserPath | None = None
    """Disk of the virtual machines (.qcow2), opened read-only. Unset: the one of `make images`, for our own image."""
    cache: UserPath = Field(default_factory=lambda: default_cache(os.environ))
    """Where `make images` keeps the guest disk and what it is made of."""
    ram_size: Annotated[int, BeforeValidator(_bytes)] = Field(
        default=4 * 1024**3, validation_alias=AliasChoices("RAM_SIZE", "ram_size")
    )
    """Memory of one desktop."""
    disk_size: Annotated[int, BeforeValidator(_bytes)] = Field(
        default=32 * 1024**3, validation_alias=AliasChoices("DISK_SIZE", "disk_size")
    )
    """Size to which a virtual machine's disk may grow."""
    cpu_cores: int = Field(default=4, ge=1, le=64, validation_alias=AliasChoices("CPU_CORES", "cpu_cores"))
    """Processors of one desktop; of our own virtual machines not more than this host has."""
    templates: Literal["auto", "off"] = "auto"
    """auto: a virtual machine is booted once and cloned ever after."""
    template_dir: UserPath | None = None
    """Where templates are kept; memory-backed, or clones are slow. Unset: a folder of this user's in /dev/shm."""
    template_limit: Annotated[int, BeforeValidator(_bytes), Field(ge=256 * 1024**2)] = 16 * 1024**3
    """Bytes that all templates may take together."""
    clone_width: int | None = Field(default=None, ge=1, le=64)
    """Clones that may come up at once. Unset: from this host's cores and free memory."""
    host_io: Literal["auto", "off"] = "auto"
    """auto: clicks, keys and pictures of a virtual machine go past its guest, where that was seen to work."""
    pause_idle: bool = False
    """Stop virtual machines between steps."""
    spares: int = Field(default=0, ge=0, le=4096)
    """Clean desktops kept ready beyond those in use."""
    aws_region: str = Field(default="", validation_alias=AliasChoices("AWS_REGION", "aws_region"))
    """Region of the desktops. Unset: on EC2 this host's."""
    aws_subnet_id: Words = Field(default=(), validation_alias=AliasChoices("AWS_SUBNET_ID", "aws_subnet_id"))
    """Subnets of the desktops, separated by commas; the next is tried where one has no capacity. Unset: on EC2 this
    host's."""
    aws_security_group_id: Words = Field(
        default=(), validation_alias=AliasChoices("AWS_SECURITY_GROUP_ID", "aws_security_group_id")
    )
    """Security groups of the desktops, separated by commas. Unset: on EC2 this host's."""
    aws_instance_type: str = Field(
        default="t3.xlarge", validation_alias=AliasChoices("AWS_INSTANCE_TYPE", "aws_instance_type")
    )
    """What a desktop runs on."""
    aws_ami: str = ""
    """Image of the desktops. Unset: OSWorld's published one for the region and the screen."""
    aws_public_ip: bool = False
    """Give desktops public addresses and reach them there. Else private ones are used."""
    aws_key_name: str = ""
    """Key pair for SSH to the desktops. Unset: none."""
    aws_owner: str = ""
    """Whose instances these are, as their tag says. Unset: the name of the identity that launches them."""
    aws_boot_width: int = Field(default=4, ge=1, le=64)
    """Instances that may boot at once: they share nothing with this host."""
    aws_max_instances: int | None = Field(default=None, ge=1)
    """Instances of this daemon that may exist at once. Unset: no limit."""
    aws_max_hourly_usd: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """What all of them together may cost in an hour. Unset: no limit."""
    aws_prices: UserPath | None = None
    """JSON of {instance type: US dollars an hour}, over envd's own table."""
    aws_reset: Literal["replace", "replace-root"] = "replace"
    """replace: a reset launches a new instance. replace-root: it gives the old one a new root volume."""
    aws_spares_stopped: bool = False
    """Keep spares stopped, where they cost their disks alone, and start them when they are wanted."""
    enable_ttl: bool = Field(default=True, validation_alias=AliasChoices("ENABLE_TTL", "enable_ttl"))
    """Have AWS itself terminate each instance that this daemon has not prolonged in time."""
    default_ttl_minutes: int = Field(
        default=180, ge=5, le=525_600, validation_alias=AliasChoices("DEFAULT_TTL_MINUTES", "default_ttl_minutes")
    )
    """After so many minutes without being prolonged, which is done while this daemon runs."""
    aws_scheduler_role_arn: str = Field(
        default="", validation_alias=AliasChoices("AWS_SCHEDULER_ROLE_ARN", "aws_scheduler_role_arn")
    )
    """Role as which the scheduler terminates. Unset: AWS_SCHEDULER_ROLE_NAME, made if it is missing."""
    aws_scheduler_role_name: str = Field(
        default="envd-scheduler-terminate",
        validation_alias=AliasChoices("AWS_SCHEDULER_ROLE_NAME", "aws_scheduler_role_name"),
    )
    """Name of that role."""
    local_unsandboxed: bool = False
    """Let `local` desktops run without bubblewrap; they can then read your files. Sandboxed or not they share this
    host's network: a page in them reaches what listens on its loopback, this daemon too."""
    sim: str = ""
    """Behaviour of `sim` desktops, for example `slow,boot=2,fail=0.1`; with `outlive` they live in a process of their
    own and outlive the daemon, by `linger=60` seconds."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: JSON unless stderr is a terminal."""
    url: str = Field(default_factory=lambda given: own_url(given))
    """Server that the command line's client commands talk to. Unset: the one that these settings start, by ENVD_HOST,
    ENVD_PORT and ENVD_TLS_CERT."""
    lease: SecretStr = SecretStr("")
    """Lease that they play under."""

    origins: Mapping[str, str] = Field(default_factory=dict, exclude=True, repr=False)
    """Field name → where its value came from: `environment`, the .env file's path, `argument` or `default`."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` passes: it reads the environment itself, once, and keeps where each value came from."""
        return (init_settings,)

    @field_validator("provider")
    @classmethod
    def _provider_is_known(cls, value: str) -> str:
        value = value.strip().lower()
        if value not in KNOWN_PROVIDERS:
            near = difflib.get_close_matches(value, KNOWN_PROVIDERS, n=1)
            raise ValueError(
                f"no such provider{f', did you mean {near[0]}' if near else ''}; there are {', '.join(KNOWN_PROVIDERS)}"
            )
        return value

    @property
    def guest_disk(self) -> Path:
        """The disk of the virtual machines: the one that was set, else our own."""
        return self.vm_disk or self.cache / "images" / "guest-disk.qcow2"

    @model_validator(mode="after")
    def _certificate_with_its_key(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("ENVD_TLS_CERT and ENVD_TLS_KEY go together")
        return self

    @model_validator(mode="after")
    def _pixels_in_order(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError("ENVD_MIN_PIXELS is larger than ENVD_MAX_PIXELS")
        return self


def variable(field: str) -> str:
    """The name under which `field` is set from outside."""
    alias = Settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0])
    return f"ENVD_{field.upper()}"


VARIABLES = {variable(name): name for name in Settings.model_fields if name != "origins"}


def load(environ: Mapping[str, str] | None = None, env_file: Path | None = Path(".env"), **arguments: Any) -> Settings:
    """Settings from `arguments` (None is not given), else `environ`, else `env_file`, else the defaults.

    Raises SettingsError that names each variable at fault, where it was set, and the nearest valid name.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origins = dict.fromkeys(VARIABLES.values(), "default")
    complaints: list[str] = []
    for origin, source in _sources(environ, env_file):
        for name, raw in source.items():
            field = VARIABLES.get(name)
            if field is not None and not _is_text(raw):
                complaints.append(f"{name} ({origin}): it is no text in UTF-8")
            elif field is not None and raw.strip():
                values[field], origins[field] = raw, origin
            elif field is None and (name.startswith("ENVD_") or (source is not environ and _meant(name))):
                complaints.append(f"{name} ({origin}): no such setting{_did_you_mean(name)}")
    for field, value in arguments.items():
        if value is not None:
            values[field], origins[field] = value, "argument"
    values.setdefault("state_dir", default_state_dir(environ))
    values.setdefault("cache", default_cache(environ))
    try:
        settings = Settings(**values, origins=origins)
    except ValidationError as error:
        for item in error.errors():
            if item["type"] == "default_factory_not_called":  # it follows from others, which are told of
                continue
            field = str(item["loc"][0]) if item["loc"] else ""
            name = field if field in VARIABLES else variable(field) if field in Settings.model_fields else "settings"
            source_name = origins.get(VARIABLES.get(name, ""), "settings")
            # What no single field is at fault for comes with all of them, and one is the token.
            given = f"={without_logins(str(item['input'])):.80}" if item["loc"] and name != "ENVD_TOKEN" else ""
            complaints.append(f"{name}{given} ({source_name}): {_plain(item['msg'])}")
    if complaints:
        told = "; ".join(complaints)
        end = "" if told.endswith("?") else "."
        raise SettingsError(f"{len(complaints)} setting{'s' * (len(complaints) > 1)} cannot be used: {told}{end}")
    return settings


def effective(settings: Settings) -> dict[str, dict[str, Any]]:
    """Each variable with its value and origin, as printed at start and served at `/version`: without secrets, those in
    URLs included."""
    dump = settings.model_dump(mode="json")
    if secret_password(settings):
        dump["client_password"] = "**********"
    return {
        name: {"value": _without_logins(dump[field]), "origin": settings.origins.get(field, "argument")}
        for name, field in VARIABLES.items()
    }


def secret_password(settings: Settings) -> str | None:
    """The desktops' password, unless everybody knows it or it is so short that any text would contain it."""
    password = settings.client_password
    known = password == Settings.model_fields["client_password"].default
    return None if known or len(password) < SHORTEST_SECRET else password


def without_logins(text: str) -> str:
    """`text` as it may be told and logged: names and passwords in its URLs are left out."""
    return re.sub(r"(\b[a-z][a-z0-9+.-]*://)[^/?#\s]*@", r"\1", text, flags=re.IGNORECASE)


def _without_logins(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_logins(item) for item in value]
    return without_logins(value) if isinstance(value, str) else value


def _sources(environ: Mapping[str, str], env_file: Path | None) -> list[tuple[str, Mapping[str, str]]]:
    sources: list[tuple[str, Mapping[str, str]]] = []
    if env_file is not None and env_file.is_file():
        try:
            parsed = dotenv_values(env_file, interpolate=False)
        except (OSError, ValueError) as error:
            raise SettingsError(f"{env_file} cannot be read: {error}.") from error
        sources.append((str(env_file), {name: value for name, value in parsed.items() if value is not None}))
    sources.append(("environment", environ))
    return sources


def _is_text(value: str) -> bool:
    """Bytes that are no UTF-8 come out of the environment as halves of characters, which no answer can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _meant(name: str) -> bool:
    """Whether `name` can only be a setting misspelt. Asked of the .env file alone: the environment is everybody's."""
    return bool(difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.85))


def _did_you_mean(name: str) -> str:
    near = difflib.get_close_matches(name, VARIABLES, n=1)
    return f", did you mean {near[0]}?" if near else ""


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ").rstrip(".")
