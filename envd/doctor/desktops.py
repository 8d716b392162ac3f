"""What desktops of each provider are made of, tried as the daemon's start would try it; what earlier daemons left."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

from ..errors import EnvdError
from ..findings import Finding
from ..settings import Settings
from ..vm.capacity import host_memory
from ..vm.disks import in_words
from ..vm.kvm import Kvm, known, look, prove
from ..vm.templates import Listed, Templates, list_templates
from . import kvm
from .capacity import Kind, capacity_of, need_of
from .serving import Daemon

if TYPE_CHECKING:
    from ..drivers.docker.engine import Engine

Given = TypeVarTuple("Given")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Here:
    """What is looked at: settings with the provider that is meant, the daemon that runs, the container that this is
    in."""

    settings: Settings
    daemon: Daemon | None
    container: str


async def in_thread(call: Callable[[*Given], Found], *arguments: *Given) -> Found:
    """A disk that hangs holds up this thread alone, and not the doctor."""
    return await anyio.to_thread.run_sync(call, *arguments, abandon_on_cancel=True)


async def imported(*names: str) -> None:
    """Have modules imported beside the loop, which their files would hold up: what a provider takes is imported when it
    is looked at."""
    for name in names:
        await in_thread(import_module, name, __package__)


# -- local ----------------------------------------------------------------------------------------------------------


async def local(here: Here) -> list[Finding]:
    """Programs and sandbox, by opening the driver as a start does, in a folder of its own."""
    await imported("..drivers.local")
    from ..drivers.local import LocalDriver, sandbox

    sandboxed = not here.settings.local_unsandboxed
    what, found = "programs", []
    try:
        await in_thread(lambda: sandbox.require_programs(sandboxed=sandboxed))
        found.append(Finding(what, "ok", await in_thread(sandbox.made_of)))
        what = "sandbox"
        async with _folder() as folder:
            settings = here.settings.model_copy(update={"state_dir": folder})
            async with LocalDriver(settings, secrets.token_hex(3)):
                pass
    except EnvdError as error:
        return [*found, Finding(what, "failed", error.detail.rstrip("."), error.hint)]
    if not sandboxed:
        detail = "ENVD_LOCAL_UNSANDBOXED: desktops can read this user's files"
        return [*found, Finding(what, "warning", detail, "unset ENVD_LOCAL_UNSANDBOXED")]
    return [*found, Finding(what, "ok", "bubblewrap made one, and a program ran in it")]


# -- docker and qemu ------------------------------------------------------------------------------------------------


async def docker(here: Here) -> list[Finding]:
    """Engine, its disk, image, the virtual machine's disk, KVM, templates, capacity, leftovers."""
    await imported("..drivers.docker.driver", "..cli.images")
    from ..drivers.docker.engine import Engine

    found: list[Finding] = []
    try:
        async with Engine(here.settings.docker_host) as engine:
            about = engine.about
            rootless = ", rootless" if about.rootless else ""
            told = f"engine {about.version} at {engine.socket}, {about.cpus} processors{rootless}"
            found.append(Finding("Docker", "ok", told))
            free, disk = await in_thread(_docker_disk, about.root)
            found += [disk, *await _parts(here)]
            kind = await _kind(engine, here.settings)
            seen = await _docker_kvm(engine, here.settings) if kind in ("machine", "foreign") else None
            found.append(await _kvm(here, seen, kind))
            found += await _room(here, kind, free)
            found.append(await _containers(engine, here))
            return found
    except EnvdError as error:
        return [
            *found,
            Finding("Docker", "failed", error.detail.rstrip("."), error.hint),
            Finding("image, KVM, capacity", "unknown", "not looked at, or not to the end: the engine cannot be used"),
        ]


def _docker_disk(root: Path) -> tuple[int | None, Finding]:
    """Blocks."""
    what = "Docker's disk"
    try:
        usage = shutil.disk_usage(root)
    except OSError:
        return None, Finding(what, "unknown", f"{root} is not seen from here", "docker system df")
    told = f"{in_words(usage.free)} of {in_words(usage.total)} free at {root}"
    if usage.free < 2 * 1024**3:
        return usage.free, Finding(
            what, "failed", f"{told}: a desktop may write 2 GiB", "docker system df; docker system prune"
        )
    if usage.free < usage.total // 20:
        return usage.free, Finding(what, "warning", told, "docker system df; docker system prune")
    return usage.free, Finding(what, "ok", told)


async def _parts(here: Here) -> list[Finding]:
    """Images and disks of these settings."""
    from ..cli.images import OURS
    from ..cli.images import look as look_for_parts

    settings = here.settings
    parts, _ = await look_for_parts(settings)
    found = []
    for part in parts:
        if not part.needed:
            continue
        what = "disk of machines" if part.kind == "disk" else "image"
        if part.usable:
            whole = ", whole" if part.kind == "disk" else ""
            found.append(Finding(what, "ok", f"{part.name}, {in_words(part.size or 0)}{whole}"))
        elif part.kind != "disk" and settings.pull == "missing" and part.name not in OURS and not part.problem:
            found.append(
                Finding(what, "warning", f"{part.name} is not on this host; the next start pulls it", part.get)
            )
        elif not part.name:
            detail = f"{settings.docker_image} boots a disk, and none is given"
            found.append(Finding(what, "failed", detail, part.get))
        else:
            detail = part.problem.rstrip(".") or f"{part.name} is not on this host"
            found.append(Finding(what, "failed", detail, _way_to(part.get, settings, what)))
    return found


def _way_to(get: str, settings: Settings, what: str) -> str:
    """Who has chosen nothing is told of what needs no image from elsewhere."""
    chosen = {settings.origins.get(name, "argument") for name in ("provider", "docker_image")} != {"default"}
    if what != "image" or chosen:
        return get
    return f"make serve, which takes PROVIDER=local; or make images and ENVD_DOCKER_IMAGE=envd/desktop; or {get}"


async def _kind(engine: Engine, settings: Settings) -> Kind:
    """What desktops of the image are, as its label says, or its name where it is not here."""
    from ..drivers.docker.images import find

    try:
        kind: str = (await find(engine, settings.docker_image)).kind
    except EnvdError:
        kind = {"envd/desktop": "desktop", "envd/qemu": "qemu"}.get(settings.docker_image.partition(":")[0], "foreign")
    if kind == "desktop":
        return "container"
    return "machine" if kind == "qemu" else "foreign"


async def _docker_kvm(engine: Engine, settings: Settings) -> Kvm | None:
    """By a guest in a container of the image, where no proof is kept. None where it cannot be tried."""
    from ..drivers.docker.containers import Containers
    from ..drivers.docker.images import find
    from ..drivers.docker.machines import Trials

    kept = await _known(settings)
    if kept is not None:
        return kept
    stranger = secrets.token_hex(3)
    try:
        image = await find(engine, settings.docker_image)
        async with Containers(engine, stranger) as containers, _folder() as folder:
            trial = settings.model_copy(update={"state_dir": folder})
            return await Trials(engine, containers, image, stranger).kvm(trial)
    except EnvdError:
        return None


async def qemu(here: Here) -> list[Finding]:
    """QEMU, the sandbox, the machine's disk, KVM, templates, capacity."""
    await imported("..drivers.qemu.driver", "..cli.images")
    from ..drivers.qemu.cell import ProcessCell
    from ..drivers.qemu.host import find_qemu

    found = await _parts(here)
    what = "QEMU"
    seen: Kvm | None
    try:
        program = await find_qemu()
        found.insert(0, Finding(what, "ok", program.name))
        what = "sandbox"
        async with _folder() as folder:
            async with ProcessCell.open(folder, program.version):
                found.insert(1, Finding(what, "ok", "bubblewrap made one, and QEMU ran in it"))
            kept = await _known(here.settings)
            seen = kept if kept is not None else await prove(folder, program.name)
    except EnvdError as error:
        found.insert(0, Finding(what, "failed", error.detail.rstrip("."), error.hint))
        seen = await _known(here.settings)
    found.append(await _kvm(here, seen, "machine"))
    free = await in_thread(_free, here.settings.state_dir)
    return found + await _room(here, "machine", free)


async def _known(settings: Settings) -> Kvm | None:
    return await in_thread(lambda: known(settings.state_dir))


async def _kvm(here: Here, seen: Kvm | None, kind: Kind) -> Finding:
    if kind == "container":
        return await in_thread(kvm.not_needed, f"containers of {here.settings.docker_image}")
    if seen is None:
        seen = await in_thread(lambda: look())  # its device has a default
    if seen is None:
        return Finding("KVM", "unknown", "/dev/kvm opens, and no guest could be tried without the image", "make images")
    if seen.works:
        return kvm.kvm_of(seen, kvm.Host("", virtual=False, container=here.container))
    from ..drivers.aws.metadata import about_this_host

    aws = await about_this_host()
    host = await in_thread(kvm.this_host, here.container, aws)
    proof = here.settings.state_dir / "kvm.json"
    return await in_thread(lambda: kvm.kvm_of(seen, host, proof=proof))


async def _room(here: Here, kind: Kind, disk_free: int | None) -> list[Finding]:
    """Templates, and how many desktops fit."""
    settings, templates = here.settings, []
    found: list[Finding] = []
    if kind == "machine" and settings.templates != "off":
        templates = await in_thread(list_templates, settings)
        found.append(await in_thread(templates_of, settings, templates))
    memory = await in_thread(lambda: host_memory(own_group=settings.provider in ("local", "qemu")))
    found.append(capacity_of(settings, need_of(kind, settings, templates), memory, disk_free))
    return found


def templates_of(settings: Settings, templates: list[Listed]) -> Finding:
    """Of virtual machines of ours. Blocks."""
    what, root = "templates", Templates.of(settings).root
    bad = [one for one in templates if one.problem]
    good = [one for one in templates if not one.problem]
    there = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if bad:
        told = "; ".join(f"{one.key[:8]}: {one.problem}" for one in bad)
        return Finding(what, "warning", told, f"envd templates rm {' '.join(one.key for one in bad)}")
    if not good and free < settings.ram_size:
        return Finding(
            what,
            "warning",
            f"one takes up to RAM_SIZE={in_words(settings.ram_size)}, and {in_words(free)} are free at {there}: every "
            "machine will be booted",
            f"sudo mount -o remount,size={2 * settings.ram_size // 1024**3 + 1}G /dev/shm; or lower RAM_SIZE",
        )
    if not good:
        return Finding(what, "ok", f"none yet: the first boot makes one, in {root}. envd templates create does it now")
    taken = in_words(sum(one.bytes for one in good))
    return Finding(what, "ok", f"{len(good)}, {taken} in {root}")


async def _containers(engine: Engine, here: Here) -> Finding:
    """Containers of envd's, by whose they are."""
    from ..drivers.docker.recipes import DAEMON

    async with engine.asking("list containers") as client:
        listed = await client.containers.list(all=True, filters={"label": [DAEMON]})
    mine = await in_thread(_daemon_id, here.settings.state_dir)
    ours = [each for each in listed if each["Labels"].get(DAEMON) == mine]
    others = sorted({str(each["Labels"].get(DAEMON)) for each in listed} - {mine})
    told = f"; {len(listed) - len(ours)} of other daemons ({', '.join(others)})" if others else ""
    if ours and here.daemon is None:
        return Finding(
            "leftovers",
            "warning",
            f"{len(ours)} containers of this state directory's daemon, which does not run: its next start takes them "
            f"over or removes them{told}",
            "envd serve; or envd gc --dry-run, and envd gc",
        )
    return Finding(
        "leftovers", "ok", f"{len(ours)} containers, of the daemon that runs{told}" if ours else f"none{told}"
    )


# -- all of them ----------------------------------------------------------------------------------------------------


async def aws(here: Here) -> list[Finding]:
    """What `envd aws check` finds."""
    await imported("..drivers.aws.check")
    from ..drivers.aws.check import check

    return await check(here.settings)


def leftovers(here: Here) -> Finding:
    """Of desktops that end with their daemon: what one that was killed left on the disk. Blocks."""
    settings = here.settings
    if settings.provider not in ("local", "qemu"):
        fix = "envd aws ls" if settings.provider == "aws" else ""
        detail = "instances are at AWS" if fix else f"PROVIDER={settings.provider} leaves nothing on this host"
        return Finding("leftovers", "skipped", detail, fix)
    folder = settings.state_dir / settings.provider / "desktops"
    try:
        left = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        left = []
    if not left:
        return Finding("leftovers", "ok", "none")
    if here.daemon is not None:
        return Finding("leftovers", "ok", f"none; {len(left)} desktop{'s' * (len(left) != 1)} of the daemon that runs")
    detail = f"{len(left)} of a daemon that was killed: {', '.join(left[:5])}. The next start removes what is left"
    return Finding("leftovers", "warning", detail, "envd serve; or envd gc --dry-run, and envd gc")


async def capacity(here: Here) -> list[Finding]:
    """Of providers whose desktops are no virtual machines."""
    kind: Kind = "local" if here.settings.provider == "local" else "elsewhere"
    return await _room(here, kind, None)


async def evaluators(here: Here) -> list[Finding]:
    """The interpreter that judges, its packages and its sandbox."""
    await imported("..tasks.evaluating")
    from ..tasks import grading_sandbox
    from ..tasks.evaluating import LOOK
    from ..tasks.grading import find_interpreter

    what = "evaluators"
    python = await in_thread(find_interpreter, here.settings)
    if python is None and here.settings.evaluators is not None:
        return [Finding(what, "failed", f"ENVD_EVALUATORS={here.settings.evaluators} is no program", "make evaluators")]
    if python is None:
        return [Finding(what, "skipped", "there are none: episodes can be played, and not judged", "make evaluators")]
    done = await anyio.run_process([str(python), "-I", "-c", LOOK], check=False)
    if done.returncode:
        return [Finding(what, "failed", f"{python} is a Python without desktop-env", "make evaluators")]
    if not await in_thread(grading_sandbox.works):
        detail = f"{python}; they run without a sandbox, and can then read this user's files"
        return [Finding(what, "warning", detail, "sudo apt-get install -y bubblewrap")]
    return [Finding(what, "ok", str(python))]


@asynccontextmanager
async def _folder() -> AsyncIterator[Path]:
    """In the place of a state directory: a daemon may run in the real one."""
    made = Path(await in_thread(lambda: tempfile.mkdtemp(prefix="envd-doctor-")))
    try:
        yield made
    finally:
        with anyio.CancelScope(shield=True):
            await in_thread(lambda: shutil.rmtree(made, ignore_errors=True))


def _free(directory: Path) -> int:
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _daemon_id(state_dir: Path) -> str:
    try:
        return (state_dir / "daemon-id").read_text().strip()
    except OSError:
        return ""
