"""`envd images`: what it says is here and is missing, and how a pull from a real engine is told, ends and fails."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from daemon_process import environment
from rich.console import Console

from envd.cli.images import ls
from envd.cli.pulling import pull
from envd.errors import DockerUnavailable, ImageMissing
from envd.settings import Settings, load

MIB = 1024**2
NOBODY = "unix:///nonexistent/docker.sock"


def settings(**changes: object) -> Settings:
    return Settings.model_validate(changes)


def paper(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=200, height=40, force_terminal=terminal)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(console: Console) -> dict[str, str]:
    """Name → its line, as far as there is a list."""
    return {line[3:].split("  ")[0]: line for line in written(console).partition("\n\n")[0].splitlines()[1:]}


@asynccontextmanager
async def registry(*, stalls: bool = False) -> AsyncIterator[str]:
    """A registry on the loopback, which engines take without TLS, and the name of the one image it has, which is
    removed from the engine in the end. Its layers come slowly, and with `stalls` never to their end."""
    layers = [_layer(f"{number}.bin", os.urandom(MIB)) for number in range(2)]
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [_digest(gzip.decompress(layer)) for layer in layers]},
        }
    ).encode()
    blobs = {_digest(blob): blob for blob in (config, *layers)}
    kind = "application/vnd.docker."
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{kind}distribution.manifest.v2+json",
        "config": _described(f"{kind}container.image.v1+json", config),
        "layers": [_described(f"{kind}image.rootfs.diff.tar.gzip", layer) for layer in layers],
    }

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/v2/":
            return web.Response()
        if request.path.startswith("/v2/has/it/manifests/"):
            return web.Response(body=json.dumps(manifest).encode(), content_type=str(manifest["mediaType"]))
        blob = blobs.get(request.path.rpartition("/")[2])
        if blob is None:
            return web.json_response(
                {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}, status=404
            )
        response = web.StreamResponse(headers={"Content-Length": str(len(blob))})
        await response.prepare(request)
        for start in range(0, len(blob), MIB // 8):
            await response.write(blob[start : start + MIB // 8])
            await (asyncio.sleep(60) if stalls and start else asyncio.sleep(0.1))
        return response

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    name = f"127.0.0.1:{runner.addresses[0][1]}/has/it"
    try:
        yield name
    finally:
        await runner.cleanup()
        await asyncio.to_thread(subprocess.run, ["docker", "image", "rm", name], capture_output=True, check=False)


def _layer(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), compresslevel=1)


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _described(kind: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "size": len(blob), "digest": _digest(blob)}


async def test_without_an_engine_the_disk_is_still_looked_for(tmp_path: Path) -> None:
    output = paper()
    disk = tmp_path / "disk.qcow2"
    assert await ls(settings(provider="qemu", vm_disk=disk, docker_host=NOBODY), output=output) == 1
    assert lines(output)[str(disk)].endswith("missing")
    assert lines(output)["envd/qemu"].endswith("not known")
    assert "The Docker engine does not run" in written(output)


async def test_a_file_that_is_no_disk_is_unusable_and_says_why(tmp_path: Path) -> None:
    disk, output = tmp_path / "disk.qcow2", paper()
    disk.symlink_to(__file__)
    assert await ls(settings(provider="qemu", vm_disk=disk, docker_host=NOBODY), output=output) == 1
    assert lines(output)[str(disk)].endswith("unusable")
    assert "does not begin as a .qcow2 file does" in written(output)


async def test_desktops_of_this_host_need_none_of_it() -> None:
    output = paper()
    assert await ls(settings(provider="local", docker_host=NOBODY), output=output) == 0
    assert not [line for line in lines(output).values() if line.startswith("*")]


@pytest.mark.docker
@pytest.mark.parametrize(
    ("image", "needed"),
    [
        pytest.param("envd/desktop", {"envd/desktop"}, id="container"),
        pytest.param("envd/qemu:latest", {"envd/qemu", str(load(env_file=None).guest_disk)}, id="virtual machine"),
    ],
)
async def test_what_the_image_needs_is_marked(image: str, needed: set[str]) -> None:
    output = paper()
    code = await ls(settings(docker_image=image), output=output)
    marked = {name for name, line in lines(output).items() if line.startswith("*")}
    assert marked == needed
    assert code == (0 if all(lines(output)[name].endswith("here") for name in needed) else 1)


@pytest.mark.docker
async def test_an_image_that_is_not_here_comes_with_the_command_that_gets_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "registry.invalid/no/such:1"
    assert await ls(settings(docker_image=name), as_json=True) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["complete"], answer["docker"]) == (False, None)
    assert (answer["parts"][0]["name"], answer["parts"][0]["present"]) == (name, False)
    assert answer["parts"][0]["get"] == f"envd images pull {name}"


@pytest.mark.docker
async def test_a_pull_in_a_pipe_tells_each_layer_and_what_came() -> None:
    async with registry() as name:
        output = paper()
        assert await pull(settings(docker_image=name), output=output) == 0
        assert len(re.findall(r"^\w{12} Pull complete$", written(output), re.MULTILINE)) == 2
        assert re.search(rf"^{name} is here: 2\.\d MB unpacked, sha256:\w+$", written(output), re.MULTILINE)
        assert await ls(settings(docker_image=name), output=paper()) == 1  # it has no disk to boot
        again = paper()
        assert await pull(settings(), name, output=again) == 0
        assert "Image is up to date" in written(again)


@pytest.mark.docker
async def test_a_pull_on_a_terminal_has_a_bar_for_each_layer() -> None:
    async with registry() as name:
        output = paper(terminal=True)
        assert await pull(settings(), name, output=output) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(output))
    assert len(set(re.findall(r"^(\w{12}) .*[kM]B of 1\.0 MB", plain, re.MULTILINE))) == 2


@pytest.mark.docker
async def test_what_cannot_be_pulled_says_whether_the_name_or_the_network_is_at_fault() -> None:
    async with registry() as name:
        with pytest.raises(ImageMissing) as unknown:
            await pull(settings(), name.replace("has/it", "has/not"))
    with pytest.raises(ImageMissing) as unreachable:
        await pull(settings(), "registry.invalid/no/such")
    assert "none of that name" in unknown.value.hint
    assert "reach the registry" in unreachable.value.hint


@pytest.mark.docker
async def test_our_own_images_are_built_and_never_pulled() -> None:
    with pytest.raises(ImageMissing) as raised:
        await pull(settings(), "envd/desktop")
    assert "make images" in raised.value.hint


async def test_without_an_engine_nothing_is_pulled() -> None:
    with pytest.raises(DockerUnavailable):
        await pull(settings(docker_host=NOBODY))


@pytest.mark.docker
async def test_ctrl_c_ends_a_pull_without_a_word(tmp_path: Path) -> None:
    async with registry(stalls=True) as name:
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "envd", "images", "pull", name),
            stdout=theirs,
            stderr=subprocess.PIPE,
            env=environment(tmp_path, {"TERM": "xterm"}),
        )
        os.close(theirs)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", 0)
        )
        async with asyncio.timeout(30):
            await reader.readuntil(b" of 1.0 MB")
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            told = await process.stderr.read()
            assert (await process.wait(), told) == (130, b"")
        transport.close()
