"""Desktops that are virtual machines, each a sandboxed QEMU process of this host (`PROVIDER=qemu`), without Docker.

driver.py   QemuDriver: what is checked at start; the rest is `envd/vm`
cell.py     where a QEMU process runs: in bubblewrap
host.py     QEMU on this host: is it there, and which
"""

from __future__ import annotations

from ...errors import MissingDependency

try:
    from .driver import QemuDriver
except ModuleNotFoundError as error:
    raise MissingDependency(
        f"PROVIDER=qemu needs the Python package {error.name}.", hint="Run: pip install 'envd-server[qemu]'"
    ) from error

__all__ = ["QemuDriver"]
