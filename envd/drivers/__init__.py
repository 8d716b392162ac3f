"""The providers of desktops, by the name that `PROVIDER` takes. A driver is imported only when it is chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..settings import Settings
    from .base import Driver

DRIVERS = {
    "aws": "AwsDriver",
    "docker": "DockerDriver",
    "local": "LocalDriver",
    "qemu": "QemuDriver",
    "sim": "sim_driver",
}


def make_driver(settings: Settings, daemon_id: str) -> Driver:
    """The driver that `settings.provider` names, not yet opened. `daemon_id` marks its instances as ours."""
    name = settings.provider
    module = import_module(f".{name}", __name__)
    driver: Driver = getattr(module, DRIVERS[name])(settings, daemon_id)
    return driver
