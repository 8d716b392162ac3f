"""Virtual machines in containers: what is to be known of an image's QEMU before `envd/vm` can work with it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

import anyio.to_thread

from ...errors import StartError
from ...settings import Settings
from ...vm.engine import Engine as Machines
from ...vm.kvm import PROOF_SECONDS, Kvm, prove
from . import recipes
from .cell import DockerCell, user_of
from .containers import Containers
from .engine import Engine
from .images import Image

QEMU = "qemu-system-x86_64"
_RUN_SECONDS = 20.0


class Trials:
    """Runs programs of an image."""

    def __init__(self, engine: Engine, containers: Containers, image: Image, daemon_id: str) -> None:
        self._engine = engine
        self._containers = containers
        self._image = image
        self._daemon_id = daemon_id

    async def kvm(self, settings: Settings) -> Kvm:
        """Whether the image's QEMU executes guests with /dev/kvm. Raises BootFailed."""
        return await prove(settings.state_dir, self._image.id, lambda argv: self._run(argv, PROOF_SECONDS, kvm=True))

    async def qemu_version(self) -> tuple[int, int, int]:
        """Raises StartError, BootFailed."""
        code, printed = await self._run([QEMU, "--version"], _RUN_SECONDS, kvm=False)
        if (found := re.search(r"version (\d+)\.(\d+)\.(\d+)", printed)) is None:
            raise StartError(
                f"{QEMU} of the image {self._image.name} does not tell its version (code {code}): {printed[:300]}.",
                hint="`make images` builds ours anew.",
            )
        major, minor, micro = map(int, found.groups())
        return major, minor, micro

    async def _run(self, argv: Sequence[str], within: float, *, kvm: bool) -> tuple[int | None, str]:
        name = f"envd-{self._daemon_id}-try-{secrets.token_hex(4)}"
        who = recipes.Identity(self._daemon_id, name, "trial")
        user = user_of(self._engine.about)
        recipe = await anyio.to_thread.run_sync(lambda: recipes.of_trial(self._image.id, who, argv, user=user, kvm=kvm))
        return await self._containers.run(name, recipe, within)


async def machines(
    settings: Settings, daemon_id: str, engine: Engine, containers: Containers, image: Image
) -> tuple[Machines, Kvm]:
    """Of our image, not opened yet. Raises StartError, BootFailed."""
    trials = Trials(engine, containers, image, daemon_id)
    qemu = await trials.qemu_version()
    kvm = await trials.kvm(settings)
    made = Machines(
        settings,
        DockerCell(engine, containers, image, daemon_id),
        name="docker",
        directory=settings.state_dir / "docker",
        image=image.id,
        qemu=qemu,
        accel="kvm" if kvm.works else "tcg",
        why_emulated="" if kvm.works else kvm.detail,
    )
    return made, kvm
