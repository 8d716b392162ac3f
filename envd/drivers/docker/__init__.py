"""Desktops that are containers of the Docker engine of this host (`PROVIDER=docker`).

    driver.py      DockerDriver: what is checked at start, and who makes the desktops
    desktops.py    desktops that are one container each: our own, and any image that keeps OSWorld's ports
    machines.py    desktops that are virtual machines of ours: which QEMU the image has, and whether KVM works for it
    cell.py        the container around such a machine, for `envd/vm`
    containers.py  containers made, found and removed by name and label
    recipes.py     what the engine is told of a container, by the kind of its image
    watch.py       one stream of events; who died, and of what
    logs.py        what containers write, within bounds
    images.py      is an image here, and pulling it
    engine.py      the engine itself, and what it refuses as errors

Nothing here knows of tasks, envs or readiness.
"""

from __future__ import annotations

from ...errors import MissingDependency

try:
    from .driver import DockerDriver
except ModuleNotFoundError as error:
    raise MissingDependency(
        f"PROVIDER=docker needs the Python package {error.name}.", hint="pip install 'envd-server[docker]'"
    ) from error

__all__ = ["DockerDriver"]
