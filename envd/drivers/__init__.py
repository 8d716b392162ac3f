"""The providers of desktops, by the name that `PROVIDER` takes. A driver is imported only when it is chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import SettingsError

if TYPE_CHECKING:
    from ..settings import Settings
    from .base import Driver

DRIVERS = {"docker": "DockerDriver", "local": "LocalDriver", "qemu": "QemuDriver", "sim": "SimDriver"}


def make_driver(settings: Settings, daemon_id: str) -> Driver:
    """The driver that `settings.provider` names, not yet opened. `daemon_id` marks its instances as ours.

    Raises SettingsError for a provider that this version does not have.
    """
    name = settings.provider
    if name not in DRIVERS:
        raise SettingsError(
            f"PROVIDER={name}: this version of envd has no such driver.",
            hint=f"Set PROVIDER to one of: {', '.join(sorted(DRIVERS))}. `make serve` uses local.",
        )
    module = import_module(f".{name}", __name__)
    driver: Driver = getattr(module, DRIVERS[name])(settings, daemon_id)
    return driver
