"""What hands do at a machine: pointer, buttons, wheel, keys. The words that a desktop's console understands.

A program for the guest that is nothing but such gestures can be done from outside the guest, as input events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Button = Literal["left", "middle", "right"]


@dataclass(frozen=True, slots=True)
class Move:
    """The pointer, to this pixel."""

    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Press:
    """A button of the pointer goes down, or up."""

    button: Button
    down: bool


@dataclass(frozen=True, slots=True)
class Wheel:
    """Clicks of the wheel: positive scrolls up. (The tablet that QEMU emulates has no wheel for sideways.)"""

    up: int


@dataclass(frozen=True, slots=True)
class Key:
    """A key goes down, or up. `name` is pyautogui's: `a`, `enter`, `shift`, `f5`, …; one that a US keyboard has."""

    name: str
    down: bool


@dataclass(frozen=True, slots=True)
class Rest:
    """Nothing, for so many seconds."""

    seconds: float


Gesture = Move | Press | Wheel | Key | Rest
