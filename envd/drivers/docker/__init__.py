"""Desktops that are containers of the Docker engine of this host (`PROVIDER=docker`).

driver.py      DockerDriver: what is checked at start, and which of the two below makes the desktops
desktops.py    desktops that are one container each: our own, and any image that keeps OSWorld's ports
cell.py        the container around a virtual machine of ours, for `envd/vm`
containers.py  containers made, found and removed by name and label
recipes.py     what the engine is told of a container, by the kind of its image
watch.py       one stream of events; who died, and of what
logs.py        what containers write, within bounds
images.py      is an image here, and pulling it
space.py       room for one more
engine.py      the engine itself, and what it refuses as errors
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
