"""What tests of docker desktops are made with: tiny images in the place of desktops, and a second Docker engine that
may be stopped, since the one of this host is everybody's."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ENGINE = "unix:///var/run/docker.sock"
PREFIX = "envd-test"

SERVER = r"""
$| = 1;
my %answers = (
    5000 => ["image/png", do { local $/; open my $file, "<", "/screen.png"; <$file> }],
    9222 => ["application/json", ""], 8006 => ["text/html", "vnc"], 8080 => ["text/html", "vlc"]);
my $bits = ""; my %at;
for my $port (keys %answers) {
    socket(my $listener, 2, 1, 0); setsockopt($listener, 1, 2, pack("l", 1));
    bind($listener, pack("S n x4 x8", 2, $port)) or die; listen($listener, 64);
    vec($bits, fileno($listener), 1) = 1; $at{fileno $listener} = [$listener, $port];
}
print "envd-milestone: guest-server\n";
$SIG{CHLD} = "IGNORE";
$SIG{TERM} = sub { exit };
while (1) {
    select(my $ready = $bits, undef, undef, undef) > 0 or next;
    for my $number (grep { vec($ready, $_, 1) } keys %at) {
        my ($listener, $port) = @{$at{$number}};
        accept(my $client, $listener) or next;
        if (fork) { close $client; next; }
        sysread($client, my $request, 8192);
        my ($type, $body) = @{$answers{$port}};
        $body = q([{"id": "1", "type": "page", "url": "about:blank", "webSocketDebuggerUrl": "ws://x/devtools/page/1"}])
            if $port == 9222;
        $body = q({"Browser": "Chrome/1", "webSocketDebuggerUrl": "ws://x/devtools/browser/1"})
            if $request =~ m{/json/version};
        my $head = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: $type\r\n";
        syswrite $client, $head . "Content-Length: " . length($body) . "\r\n\r\n$body";
        exit;
    }
}
"""
"""Answers on OSWorld's four ports as if there were a desktop, to whoever does not look closely. Without any module."""

IMAGES = {
    "serves": "exec perl /server.pl",
    "exits": "echo no disk was given; exit 3",
    "silent": "echo not a word more; exec perl -e 'sleep'",
    "eats": "echo eating; exec perl -e '$x .= q(a) x 1e6 while 1'",
    "writes": "exec perl -e 'while (1) { print q(a) x 999, qq(\\\\e[2J\\\\n) }'",
}
"""Name → what the container does, as sh is told. `serves` has a volume."""


def docker(*arguments: str | Path, host: str = ENGINE, given: bytes | None = None) -> str:
    """What the docker command prints."""
    command = ["docker", "--host", host, *arguments]
    done = subprocess.run(command, input=given, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr.decode()}"
    return done.stdout.decode().strip()


def image(name: str) -> str:
    return f"{PREFIX}/{name}"


@pytest.fixture(scope="session")
def tiny_images() -> Iterator[None]:
    """`IMAGES`, on this host's engine."""
    load_tiny_images(ENGINE)
    yield
    docker("image", "rm", "--force", *map(image, IMAGES))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails the test that leaves a container or a volume of the tiny images behind."""
    volumes = set(docker("volume", "ls", "--quiet").split())
    yield
    left = [line for name in IMAGES for line in docker("ps", "-aq", "--filter", f"ancestor={image(name)}").split()]
    if left:
        docker("rm", "--force", "--volumes", *left)
    assert not left
    assert set(docker("volume", "ls", "--quiet").split()) <= volumes


def load_tiny_images(host: str) -> None:
    archive = _root_file_system()
    for name, script in IMAGES.items():
        changes = [f'CMD ["/bin/sh", "-c", "{script}"]', "LABEL io.envd.kind=desktop"]
        if name == "serves":
            changes.append("VOLUME /data")
        options = [word for change in changes for word in ("--change", change)]
        docker("import", *options, "-", image(name), host=host, given=archive)


def _root_file_system() -> bytes:
    """This host's sh and perl with the libraries that they are linked with, and the server: 7 MB."""
    files = {Path("/bin/sh"), Path("/usr/bin/perl")}
    for program in tuple(files):
        linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True, timeout=20).stdout
        files |= {Path(word) for word in linked.split() if word.startswith("/")}
    screen = Image.new("RGB", (800, 600), "navy")
    ImageDraw.Draw(screen).ellipse((100, 100, 700, 500), fill="orange")
    picture = io.BytesIO()
    screen.save(picture, "PNG")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
        for path in sorted(files):
            tar.add(path, arcname=str(path), recursive=False)
        for name, content in (("server.pl", SERVER.encode()), ("screen.png", picture.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


class OwnEngine:
    """A second engine with the tiny images, which its test may stop, kill and start again. Needs root."""

    def __init__(self, directory: Path, bridge: str) -> None:
        self._directory = directory
        self._bridge = bridge
        self._process: subprocess.Popen[bytes] | None = None
        self.host = f"unix://{directory / 'docker.sock'}"

    def start(self) -> None:
        directory = self._directory
        log = (directory / "log").open("ab")
        command: list[str | Path] = [
            *("dockerd", "--host", self.host, "--pidfile", directory / "pid", "--bridge", self._bridge),
            *("--data-root", directory / "data", "--exec-root", directory / "exec", "--iptables=false"),
            *("--ip-forward=false", "--shutdown-timeout=3", "--storage-driver=vfs"),
        ]
        with log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 40
        while subprocess.run(["docker", "--host", self.host, "version"], capture_output=True).returncode:
            assert self._process.poll() is None, (directory / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (directory / "log").read_text()[-2000:]
            time.sleep(0.1)

    @property
    def stopped(self) -> bool:
        return self._process is None

    def stop(self) -> None:
        """As the service of a machine is stopped: its containers end with it."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Its containers go on, until it comes back and ends them. The program that it runs containers with dies with
        it, and the next engine could not start while that does."""
        helper = int((self._directory / "exec/containerd/containerd.pid").read_text())
        self._end(signal.SIGKILL)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{helper}").exists() and time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(helper, signal.SIGKILL)
            time.sleep(0.02)

    def sweep(self) -> None:
        """End what a killed engine left running and the next did not find, and take its mounts away."""
        for shim in _processes_with(str(self._directory)):
            inside = Path(f"/proc/{shim}/task/{shim}/children")
            with contextlib.suppress(OSError):
                for pid in (*map(int, inside.read_text().split()), shim):
                    os.kill(pid, signal.SIGKILL)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in reversed([each for each in mounts if each.startswith(f"{self._directory}/")]):
            subprocess.run(["umount", "--lazy", mount], check=False)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(40)
            self._process = None


def _processes_with(words: str) -> list[int]:
    """Those on whose command line the words are."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and words.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@contextmanager
def running_engine() -> Iterator[OwnEngine]:
    if os.geteuid() != 0 or shutil.which("dockerd") is None or shutil.which("ip") is None:
        pytest.skip("a second Docker engine needs root, dockerd and ip")
    bridge = f"envd{os.getpid() % 100000}"
    address = f"10.{200 + os.getpid() % 50}.{os.getpid() % 250}.1/24"
    with tempfile.TemporaryDirectory(prefix="envd-engine-", dir="/var/tmp", ignore_cleanup_errors=True) as name:
        engine = OwnEngine(Path(name), bridge)
        try:
            subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
            subprocess.run(["ip", "addr", "add", address, "dev", bridge], check=True)
            subprocess.run(["ip", "link", "set", bridge, "up"], check=True)
            engine.start()
            load_tiny_images(engine.host)
            yield engine
        finally:
            engine.stop()
            engine.sweep()
            subprocess.run(["ip", "link", "del", bridge], check=False)


@pytest.fixture(scope="module")
def own_engine() -> Iterator[OwnEngine]:
    with running_engine() as engine:
        yield engine
