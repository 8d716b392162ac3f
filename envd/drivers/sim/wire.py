"""What the driver and the sim host say to each other: lines of JSON over a unix socket in the state directory.

The driver asks {"call": number, "do": …, and what that takes}. Each call is answered once: {"call": number, "done": …,
"template": whether there is one} or {"call": number, "error": …}. Before that, one that makes an instance hears how it
goes, {"call": number, "report": progress, phase or note, "words": …}; and is asked, {"call": number, "ready":
endpoints}, to say {"do": "ready", "id": …} once both probes have passed there. {"call": number, "do": "cancel"} ends a
call; an instance that is being made is made all the same, whether its call was cancelled or whoever asked has died.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from typing import Any

from ...errors import BootFailed, EnvdError, InfraError
from ...models import Endpoints, ResetPath
from ..base import InstanceSpec, Made
from .behaviour import Behaviour, Fault

SOCKET = "sim-host.sock"
LOCK = "sim-host.lock"
"""Held by the host as long as it runs."""
LOG = "sim-host.log"
TAKEN = 75
"""Exit code of a host that found the lock held."""
LONGEST_LINE = 1 << 26

Message = dict[str, Any]
_ERRORS = {one.code: one for one in (BootFailed, InfraError)}


def line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def error_to(error: EnvdError) -> Message:
    return {"code": error.code, "detail": error.detail, "hint": error.hint, "facts": error.facts}


def error_from(told: Message) -> EnvdError:
    return _ERRORS.get(told["code"], InfraError)(told["detail"], hint=told["hint"], **told["facts"])


def endpoints_to(endpoints: Endpoints) -> Message:
    return {"guest": endpoints.guest, "cdp": endpoints.cdp}


def made_to(made: Made | None) -> Message | None:
    if made is None:
        return None
    frame = None if made.frame is None else base64.b64encode(made.frame).decode()
    return {"endpoints": endpoints_to(made.endpoints), "path": made.path.value, "frame": frame}


def made_from(told: Message | None) -> Made | None:
    if told is None:
        return None
    frame = None if told["frame"] is None else base64.b64decode(told["frame"])
    return Made(Endpoints(**told["endpoints"]), ResetPath(told["path"]), frame)


def spec_from(told: Message) -> InstanceSpec:
    width, height = told["screen"]
    return InstanceSpec(**{**told, "screen": (width, height)})


def behaviour_to(behaviour: Behaviour) -> Message:
    return asdict(behaviour)


def behaviour_from(told: Message) -> Behaviour:
    on = {asked: Fault(**fault) for asked, fault in told["on"].items()}
    return Behaviour(**{**told, "bad": tuple(told["bad"]), "on": on})
