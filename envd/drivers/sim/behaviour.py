"""How a sim desktop behaves: `Behaviour`, its presets, and the spelling that the setting `ENVD_SIM` takes.

ENVD_SIM=slow                    a preset
ENVD_SIM=boot=2,fail=0.1         fields, without their unit suffix
ENVD_SIM=flaky,cdp=launch        a preset, then changes to it
ENVD_SIM=outlive,boot=0.3        what is true or false is true when it is named
"""

from __future__ import annotations

import difflib
import math
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from ...errors import SettingsError

Bad = Literal[
    "error", "garbage", "half", "flat", "size", "html", "empty", "redirect", "cut", "drip", "huge", "stall"
]  # fmt: skip
"""Ways to answer badly.

error     500 with a page of HTML
garbage   200 with bytes that are neither picture nor JSON
half      200 with the first half of what is right, announced as the whole
flat      200 with a picture of one colour; on CDP, an empty object or list
size      200 with a picture of half the size; on CDP, JSON of the wrong shape
html      200 with a page of HTML
empty     200 without a body
redirect  302 to itself
cut       the connection closes in the middle of the right answer
drip      the right answer, one byte every 50 ms
huge      a body that ends after 256 MiB
stall     no answer at all
"""
BAD: tuple[Bad, ...] = get_args(Bad)
Way = Literal["reset", "lose", "die"] | Bad
"""Ways in which a call can go wrong: those of `Bad`, and

reset  the connection is reset before anything is done
lose   the work is done, and the connection closes without an answer
die    the instance dies before anything is done

With those in ACTING the work is done, since they are made of the right answer; with the others nothing is.
On a websocket there is neither redirect nor drip: a command that should go wrong so is answered as with error.
"""
WAYS: tuple[Way, ...] = ("reset", "lose", "die", *BAD)
ACTING: tuple[Way, ...] = ("lose", "half", "cut", "drip")
FOREVER = sys.maxsize


@dataclass(frozen=True, slots=True)
class Fault:
    """The `call`th of some calls, counted from 1, goes wrong in this way, and so do the next `times` - 1.

    A client that sends a call again is only stopped by `times`: aiohttp does so, once, with a GET (also the one that
    opens a websocket) whose connection is reset or lost, and the evaluators do so with whatever only reads.
    """

    way: Way
    call: int = 1
    times: int = 1

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise ValueError(f"a fault is one of {', '.join(WAYS)}")
        if self.call < 1 or self.times < 1:
            raise ValueError("call and times count from 1")

    def strikes(self, call: int) -> bool:
        return self.call <= call < self.call + self.times


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """Durations are seconds. Ready is an instance that has given a good answer to /screenshot and one to /json/list.

    Routes are paths such as /execute, whose other name /setup/execute is the same route. /devtools/browser and
    /devtools/page are the opening of a websocket; a command on it has its method for a route, such as Page.navigate.
    * means every route of both ports.
    """

    create_s: float = 0.0
    """`create` takes so long."""
    create_fails: str = ""
    """`create` raises BootFailed with this text."""
    boot_s: float = 0.0
    """From the end of `create` until the guest port opens; refused before."""
    cdp_s: float | None = 0.0
    """From the end of `create` until the CDP port opens. None: not until Chrome is launched through the guest."""
    cdp_no_page: bool = False
    """CDP answers, and lists no page."""
    never: bool = False
    """Both ports accept connections and never answer."""
    refuse: bool = False
    """The ports never open."""
    flaky: int = 0
    """So many first answers of each of /screenshot, /json/version and /json/list are bad."""
    bad: tuple[Bad, ...] = ("error", "garbage", "half", "flat", "size", "html")
    """In which ways, in turn."""
    fail: float = 0.0
    """Chance that an instance dies while it boots."""
    seed: int = 0
    """Decides which ones `fail` strikes: the same seed strikes the same."""
    dies_after_s: float | None = None
    """It dies by itself so long after `dies_when` began."""
    dies_when: Literal["booting", "ready"] = "ready"
    """`booting` counts from the end of `create`, and the ports stay shut meanwhile; `ready` from being ready."""
    death: str = "the simulated machine stopped"
    """The reason that `wait` then gives."""
    answer_s: float = 0.0
    """Every answer of the guest takes so long more."""
    pace: float = 0.0
    """How much of the waits inside a program (sleep, interval, duration) really passes. 1 is real time.
    Where it is not 0, a client that hangs up ends its program, which the published guest server would finish."""
    trouble_s: float = 0.0
    """`hang`, `lose` and `spoil` begin so long after it became ready."""
    hang: str = ""
    """Then this route does nothing and never answers."""
    lose: str = ""
    """Then this route does its work, and the connection breaks without an answer."""
    spoil: str = ""
    """Then this route answers in the ways of `bad`, in turn."""
    on: Mapping[str, Fault] = field(default_factory=dict)
    """Which calls go wrong: a route, or a route, a blank and words that the call must hold (`Call.said`) → how.

    >>> Behaviour(on={"/file": Fault("reset"), "/execute rm -r": Fault("die"), "/screenshot": Fault("half", call=3)})

    Calls are counted from when the desktop was made or was last given a behaviour, whether it is ready or not. Until
    it is, the daemon has it at: /screenshot 2, /json/list 2, /devtools/browser 1; from then on it looks at
    /json/version by the clock, so that calls of that route and of * cannot be counted beforehand.
    The setting `ENVD_SIM` has no spelling for this.
    """
    restore_s: float | None = None
    """The first desktop's machine is booted as a template, and from then on each is made from it in so long, and its
    guest is up at once. None: each is booted."""
    restore_fails: int = 0
    """So many first restores of the driver fail; they are booted instead."""
    admit_s: float = 0.0
    """`admit` waits so long."""
    console: bool = False
    """It can be seen and worked from outside."""
    vnc: bool = False
    """Its screen is also served by a noVNC."""
    parks: bool = False
    """Spares are parked: their ports are shut until they are wanted."""
    unpark_s: float = 0.0
    """Until they are open again."""
    unpark_fails: bool = False
    """It does not wake up."""
    renews: bool = False
    """A reset makes a fresh instance of the one that the env had, instead of another beside it."""
    destroy_s: float = 0.0
    """`destroy` takes so long."""
    destroy_fails: int = 0
    """So many first calls of `destroy` raise InfraError."""
    outlive: bool = False
    """Desktops live in a process of their own, the sim host, and so outlive the daemon. They have no console then."""
    linger_s: float = 60.0
    """The sim host, and all that is in it, ends when there was no daemon for so long."""

    def __post_init__(self) -> None:
        for name in (one.name for one in fields(self) if one.type in ("float", "float | None") and one.name != "fail"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{_key(name)} must be a number of at least 0")
        for name in ("flaky", "restore_fails", "destroy_fails"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0")
        if not 0 <= self.fail <= 1:
            raise ValueError("fail is a probability, from 0 to 1")
        if not self.bad or not set(self.bad) <= set(BAD):
            raise ValueError(f"bad takes some of {', '.join(BAD)}")
        if self.dies_when not in ("booting", "ready"):
            raise ValueError("dies_when is booting or ready")
        if self.outlive and self.console:
            raise ValueError("what outlives the daemon has no console")
        for name in ("hang", "lose", "spoil"):
            route = getattr(self, name)
            if route and route != "*" and not route.startswith("/"):
                raise ValueError(f"{name} takes a route, such as /execute, or *")
        for route in (asked.partition(" ")[0] for asked in self.on):
            if not (route == "*" or route.startswith("/") or "." in route):
                raise ValueError("on takes routes, such as /execute, Page.navigate or *")

    @classmethod
    def parse(cls, text: str) -> Behaviour:
        """The behaviour that a value of `ENVD_SIM` describes. Raises SettingsError with the nearest valid name."""
        behaviour = cls()
        given: dict[str, Any] = {}
        items = [item.strip() for item in text.split(",")] if text.strip() else []
        for position, item in enumerate(items):
            key, equals, value = item.partition("=")
            key = key.strip()
            if not equals and position == 0 and key in PRESETS:
                behaviour = PRESETS[key]
            elif not equals and key not in _FLAGS:
                raise _complaint(text, f"{key or 'an empty item'}: expected key=value{_nearest(key, PRESETS)}")
            elif key not in _FIELDS:
                raise _complaint(text, f"no such key {key}{_nearest(key, _FIELDS)}")
            elif key in given:
                raise _complaint(text, f"{key} is given twice")
            else:
                given[key] = _value(text, key, value.strip() if equals else "true")
        try:
            return replace(behaviour, **{_FIELDS[key]: value for key, value in given.items()})
        except ValueError as error:
            raise _complaint(text, str(error)) from error

    @property
    def dies_booting(self) -> bool:
        return self.dies_after_s is not None and self.dies_when == "booting"

    def strikes(self, number: int) -> bool:
        """Whether `fail` hits the instance that is the `number`th of its driver, from 0."""
        return random.Random(f"{self.seed}/{number}").random() < self.fail


PRESETS: dict[str, Behaviour] = {
    "fast": Behaviour(),
    "slow": Behaviour(boot_s=3.0, cdp_s=5.0),
    "never": Behaviour(never=True),
    "flaky": Behaviour(flaky=6),
    "dying": Behaviour(dies_after_s=0.1, dies_when="booting"),
    "hanging": Behaviour(hang="/execute"),
    "garbage": Behaviour(flaky=FOREVER, bad=("garbage",)),
}
"""Behaviours with a name. `slow` boots for seconds, `never` never answers, `flaky` answers badly six times first,
`dying` dies while it boots, `hanging` boots and then takes no input, `garbage` never answers anything usable."""


def _key(field: str) -> str:
    return field.removesuffix("_s")


def _seconds(value: str) -> float:
    return float(value)


def _seconds_or_never(value: str) -> float | None:
    return None if value in ("launch", "none") else float(value)


def _count(value: str) -> int:
    return FOREVER if value == "forever" else int(value)


def _flag(value: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]


def _several(value: str) -> tuple[str, ...]:
    return tuple(value.split("+"))


_FIELDS = {_key(one.name): one.name for one in fields(Behaviour) if one.name != "on"}
_FLAGS = {_key(one.name) for one in fields(Behaviour) if one.type == "bool"}
_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "float": (_seconds, "a number"),
    "float | None": (_seconds_or_never, "a number, launch or none"),
    "int": (_count, "a whole number or forever"),
    "bool": (_flag, "true or false"),
    "tuple[Bad, ...]": (_several, "ways joined by +"),
}


def _value(text: str, key: str, value: str) -> Any:
    kind = next(str(one.type) for one in fields(Behaviour) if one.name == _FIELDS[key])
    read, wanted = _READERS.get(kind, (str, "text"))
    try:
        return read(value)
    except (ValueError, KeyError) as error:
        raise _complaint(text, f"{key}={value} is not {wanted}") from error


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def _complaint(text: str, what: str) -> SettingsError:
    return SettingsError(
        f"ENVD_SIM={text}: {what}.",
        hint=f"Presets: {', '.join(PRESETS)}. Keys: {', '.join(_FIELDS)}. Example: ENVD_SIM=slow,fail=0.1",
    )
