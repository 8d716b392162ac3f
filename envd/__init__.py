"""envd: the server side of computer desktops for agent training.

The public names are loaded when they are first used, so that `import envd` costs nothing in a process that only
needs one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import errors
    from .app import create_app
    from .client import BlockingRemoteEnvWorker, Client, RemoteEnvWorker

__all__ = ["BlockingRemoteEnvWorker", "Client", "RemoteEnvWorker", "__version__", "create_app", "errors"]

_HOMES = {
    "BlockingRemoteEnvWorker": ".client",
    "Client": ".client",
    "RemoteEnvWorker": ".client",
    "create_app": ".app",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(".errors", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
