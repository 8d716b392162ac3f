"""Bundles: what an episode leaves on disk, whatever the disk, the guest and the end of the daemon do to it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from envd.bundles import Bundle, Bundles
from envd.errors import Fault, NotFound
from envd.models import (
    ActionOutcome,
    ActionResult,
    EndReason,
    MetricRecord,
    Provenance,
    ResetPath,
    SetupOutcome,
    SetupRecord,
    StepResult,
    Verdict,
    VerdictStatus,
)
from envd.settings import Settings, load

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff\xe0"
TASK = {
    "id": "t-1",
    "instruction": "Öffne ☃",
    "config": [{"type": "execute", "parameters": {"command": "echo {CLIENT_PASSWORD}"}}],
}


def settings(folder: Path, **changes: Any) -> Settings:
    return load({}, env_file=None, state_dir=folder, provider="sim", **changes)


def step(
    number: int, action: str = "pyautogui.click(1, 2)", end: EndReason | None = None, **action_facts: Any
) -> StepResult:
    result = ActionResult(action=action, outcome=ActionOutcome.OK, returncode=0, seconds=0.25, **action_facts)
    return StepResult(
        env=0, episode_id="ep-1", step=number, done=end is not None, end_reason=end, format_reward=0.0,
        actions=(result,), seconds={"act": 0.25}, screenshot="TOOLONGTOKEEP",
    )  # fmt: skip


def verdict(episode_id: str = "ep-1", **changes: Any) -> Verdict:
    provenance = Provenance(
        server_version="0", provider="sim", image="sim", task_hash="0", screen=(320, 240), steps=1, actions=1,
        end_reason=EndReason.DONE, reset_path=ResetPath.COLD,
    )  # fmt: skip
    given = {"status": VerdictStatus.SCORED, "score": 1.0, "raw": (1,), "mask": False, **changes}
    return Verdict(episode_id=episode_id, env=0, provenance=provenance, evaluated_at=1.0, **given)


async def whole(bundles: Bundles, episode_id: str) -> dict[str, bytes]:
    """The files in the bundle's archive."""
    data = b"".join([piece async for piece in await bundles.archive(episode_id)])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        return {name.removeprefix(f"{episode_id}/"): file.read() for name, file in files.items() if file}


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def facts_of(folder: Path, episode_id: str = "ep-1") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "episodes" / episode_id / "episode.json").read_text())
    return found


async def play(bundle: Bundle, steps: int = 3) -> None:
    await bundle.frame(0, PNG + b"first")
    for number in range(1, steps + 1):
        await bundle.frame(number, PNG + b"%d" % number)
        await bundle.step(step(number), f"said {number}")


async def test_a_bundle_holds_all_that_was_handed_over(tmp_path: Path) -> None:
    grading = tmp_path / "grading"
    (grading / "deep").mkdir(parents=True)
    (grading / "deep" / "result.txt").write_bytes(b"what the guest had")
    async with Bundles.open(settings(tmp_path)) as bundles:
        bundle = await bundles.begin("ep-1", task=TASK, about={"env": 0, "screen": (320, 240)})
        await bundle.setup([SetupRecord(index=0, type="execute", outcome=SetupOutcome.OK, seconds=0.1)])
        await bundle.frame(0, JPEG)
        await bundle.step(step(1, "DONE", EndReason.DONE), "finished()")
        await bundle.final(PNG + b"judged")
        await bundle.guest_log(["one\n", "two"])
        await bundle.file("notes.bin", b"\x00")
        await bundle.grading({"status": "scored"}, grading)
        await bundle.verdict(verdict())
        bundle.close()
        found = await whole(bundles, "ep-1")
    told = json.loads(found.pop("episode.json"))
    lines = [json.loads(line) for line in found.pop("steps.jsonl").splitlines()]
    assert Verdict.model_validate_json(found.pop("verdict.json")) == verdict()
    assert json.loads(found.pop("task.json")) == TASK
    assert json.loads(found.pop("setup.json"))[0]["outcome"] == "ok"
    assert json.loads(found.pop("evaluation.json")) == {"status": "scored"}
    assert found == {
        "frames/0000.jpg": JPEG, "final.png": PNG + b"judged", "guest.log": b"one\ntwo\n", "files/notes.bin": b"\x00",
        "values/deep/result.txt": b"what the guest had",
    }  # fmt: skip
    assert lines[0].items() >= {"said": "finished()", "step": 1, "frame": None, "end_reason": "done"}.items()
    assert lines[0]["actions"][0]["seconds"] == 0.25
    assert "screenshot" not in lines[0]
    assert told.items() >= {"format": 1, "env": 0, "screen": [320, 240], "last_action": "DONE", "steps": 1}.items()
    assert (told["end_reason"], told["dropped"], told["incomplete"]) == ("done", {}, [])
    assert told["closed_at"] >= told["began_at"]


async def test_fifty_bundles_at_once_each_keep_their_order(tmp_path: Path) -> None:
    async with Bundles.open(settings(tmp_path)) as bundles:
        episodes = [await bundles.begin(f"ep-{number}", task={}, about={}) for number in range(50)]
        await asyncio.gather(*(play(bundle, 20) for bundle in episodes))
        for bundle in episodes:
            await bundle.flushed()
            lines = (tmp_path / "episodes" / bundle.id / "steps.jsonl").read_text().splitlines()
            assert [json.loads(line)["said"] for line in lines] == [f"said {number}" for number in range(1, 21)]
            assert json.loads(lines[-1])["frame"] == "frames/0020.png"


async def test_the_archive_is_what_is_on_disk(tmp_path: Path) -> None:
    big = os.urandom(3_000_001)
    async with Bundles.open(settings(tmp_path)) as bundles:
        bundle = await bundles.begin("ep-1", task=TASK, about={})
        await bundle.file("big.bin", big)
        pieces = [piece async for piece in await bundles.archive("ep-1")]
        assert await whole(bundles, "ep-1") == on_disk(tmp_path / "episodes" / "ep-1")
    assert max(map(len, pieces)) < 1024 * 1024


async def test_the_archive_follows_no_links_and_shows_nothing_half_written(tmp_path: Path) -> None:
    async with Bundles.open(settings(tmp_path)) as bundles:
        await (await bundles.begin("ep-1", task={}, about={})).flushed()
        folder = tmp_path / "episodes" / "ep-1"
        (folder / "passwd").symlink_to("/etc/passwd")
        (folder / "etc").symlink_to("/etc")
        (folder / ".0000.png.tmp").write_bytes(b"half")
        os.mkfifo(folder / "pipe")
        assert set(await whole(bundles, "ep-1")) == {"episode.json", "task.json"}


async def test_links_and_devices_that_an_evaluator_left_are_not_taken(tmp_path: Path) -> None:
    left = tmp_path / "grading"
    left.mkdir()
    (left / "shadow").symlink_to("/etc/shadow")
    (left / "etc").symlink_to("/etc")
    os.mkfifo(left / "pipe")
    (left / "real.txt").write_bytes(b"real")
    async with Bundles.open(settings(tmp_path)) as bundles:
        bundle = await bundles.begin("ep-1", task={}, about={})
        await bundle.grading({}, left)
        assert {name for name in await whole(bundles, "ep-1") if name.startswith("values")} == {"values/real.txt"}


@pytest.mark.parametrize(
    "episode_id",
    [
        pytest.param("ep-none", id="never was"),
        pytest.param("..", id="parent"),
        pytest.param("../episodes/ep-1", id="way round"),
        pytest.param("/etc", id="absolute"),
        pytest.param("", id="empty"),
        pytest.param("ep-1/frames", id="below"),
        pytest.param("ep-\x00", id="nul"),
        pytest.param("x" * 5000, id="long"),
        pytest.param("ep-link", id="link"),
    ],
)
async def test_an_id_that_names_no_bundle_is_not_found(tmp_path: Path, episode_id: str) -> None:
    async with Bundles.open(settings(tmp_path)) as bundles:
        await (await bundles.begin("ep-1", task={}, about={})).flushed()
        (tmp_path / "episodes" / "ep-link").symlink_to("/etc")
        with pytest.raises(NotFound, match=r"never was, or it has been cleared away\. The newest 500 are kept"):
            await bundles.archive(episode_id)
        assert await bundles.get_verdict(episode_id) is None
        assert await bundles.ids() == ["ep-1"]


async def test_a_verdict_is_there_after_a_restart(tmp_path: Path) -> None:
    record = MetricRecord(index=0, func="exact_match", result="half \ud800", value=float("nan"))
    lost = verdict(
        status=VerdictStatus.INFRA_ERROR, score=None, raw=None, mask=True, fault=Fault.INFRA, code="desktop_lost",
        metrics=(record,),
    )  # fmt: skip
    async with Bundles.open(settings(tmp_path)) as bundles:
        bundle = await bundles.begin("ep-1", task={}, about={})
        await bundle.verdict(lost)
        assert await bundles.get_verdict("ep-1") is not None
    async with Bundles.open(settings(tmp_path)) as bundles:
        kept = await bundles.get_verdict("ep-1")
        assert kept is not None
        assert (kept.code, kept.metrics[0].result) == ("desktop_lost", "half ?")


async def test_a_mangled_verdict_is_none(tmp_path: Path) -> None:
    async with Bundles.open(settings(tmp_path)) as bundles:
        await (await bundles.begin("ep-1", task={}, about={})).flushed()
        (tmp_path / "episodes" / "ep-1" / "verdict.json").write_bytes(b'{"score": 1.0')
        assert await bundles.get_verdict("ep-1") is None


async def test_frames_over_the_limit_are_dropped_and_counted_never_the_verdict(tmp_path: Path) -> None:
    limit = 1024**2
    async with Bundles.open(settings(tmp_path, bundle_limit=limit)) as bundles:
        bundle = await bundles.begin("ep-1", task=TASK, about={})
        for number in range(12):
            await bundle.frame(number, PNG + os.urandom(200_000))
            await bundle.step(step(number), "x" * 20_000)
        await bundle.verdict(verdict(detail="y" * limit))
        await bundle.flushed()
        assert await bundles.get_verdict("ep-1") == verdict(detail="y" * limit)
    told, kept = facts_of(tmp_path), on_disk(tmp_path / "episodes" / "ep-1")
    frames = {name for name in kept if name.startswith("frames/")}
    assert told["dropped"] == {"frames": 12 - len(frames)}
    assert 1 <= len(frames) < 5
    assert sum(len(data) for name, data in kept.items() if name != "verdict.json") < limit
    assert [json.loads(line)["frame"] in frames for line in kept["steps.jsonl"].splitlines()].count(True) == len(frames)


async def test_steps_and_files_that_do_not_fit_are_dropped_and_counted(tmp_path: Path) -> None:
    async with Bundles.open(settings(tmp_path, bundle_limit=1024**2)) as bundles:
        bundle = await bundles.begin("ep-1", task={"id": "x" * 2_000_000}, about={})
        for number in range(1, 6):
            await bundle.step(step(number), "x" * 300_000)
        await bundle.file("big.bin", bytes(2_000_000))
        await bundle.guest_log(["x" * 400_000])
        await bundle.flushed()
        assert facts_of(tmp_path)["dropped"] == {"task.json": 1, "steps": 2, "files": 1, "log": 1}


async def test_a_sparse_file_of_the_evaluator_does_not_fill_the_disk(tmp_path: Path) -> None:
    left = tmp_path / "grading"
    left.mkdir()
    with (left / "huge").open("wb") as file:
        file.truncate(1024**4)
    async with Bundles.open(settings(tmp_path)) as bundles:
        bundle = await bundles.begin("ep-1", task={}, about={})
        await bundle.grading({}, left)
        assert facts_of(tmp_path)["dropped"] == {"files": 1}
        assert "values/huge" not in await whole(bundles, "ep-1")


async def test_pictures_that_come_faster_than_the_disk_takes_them_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envd.bundles.WAITING_LIMIT", 1000)
    async with Bundles.open(settings(tmp_path)) as bundles:
        bundle = await bundles.begin("ep-1", task={}, about={})
        for number in range(5):
            await bundle.frame(number, PNG + bytes(392))
        await bundle.flushed()
        await bundle.frame(5, PNG + bytes(392))
        await bundle.flushed()
        assert facts_of(tmp_path)["dropped"] == {"frames": 3}
        assert set(await whole(bundles, "ep-1")) >= {"frames/0000.png", "frames/0001.png", "frames/0005.png"}


async def filled(folder: Path, count: int) -> None:
    async with Bundles.open(settings(folder)) as bundles:
        for number in range(count):
            (await bundles.begin(f"ep-{number}", task={}, about={})).close()
    for number in range(count):
        os.utime(folder / "episodes" / f"ep-{number}", (time.time() - 1000 + number,) * 2)


async def test_a_start_clears_away_what_is_too_many_and_too_old(tmp_path: Path) -> None:
    await filled(tmp_path, 6)
    os.utime(tmp_path / "episodes" / "ep-5", (time.time() - 3 * 86_400,) * 2)
    half_gone = tmp_path / "episodes" / ".going-ep-old"
    half_gone.mkdir()
    async with Bundles.open(settings(tmp_path, bundles=3, bundle_days=2)) as bundles:
        assert await bundles.ids() == ["ep-4", "ep-3", "ep-2"]
        assert not half_gone.exists()


async def test_each_end_clears_away_but_never_what_is_being_written(tmp_path: Path) -> None:
    async with Bundles.open(settings(tmp_path, bundles=1)) as bundles:
        going_on = await bundles.begin("ep-on", task={}, about={})
        await going_on.flushed()
        os.utime(tmp_path / "episodes" / "ep-on", (1, 1))
        await close_and_see(bundles, "ep-1", {"ep-1", "ep-on"})
        await close_and_see(bundles, "ep-2", {"ep-2", "ep-on"})
        await going_on.verdict(verdict("ep-on"))
        assert await bundles.get_verdict("ep-on") == verdict("ep-on")


async def test_a_bundle_that_is_downloaded_is_cleared_away_only_afterwards(tmp_path: Path) -> None:
    async with Bundles.open(settings(tmp_path, bundles=1)) as bundles:
        first = await bundles.begin("ep-0", task={}, about={})
        await first.file("big.bin", bytes(2_000_000))
        first.close()
        await first.flushed()
        download = await bundles.archive("ep-0")
        data = await anext(download)
        await close_and_see(bundles, "ep-1", {"ep-0", "ep-1"})
        # That ep-1 goes shows that a sweep has passed by ep-0.
        await close_and_see(bundles, "ep-2", {"ep-0", "ep-2"})
        data += b"".join([piece async for piece in download])
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            assert archive.getmember("ep-0/files/big.bin").size == 2_000_000
        await close_and_see(bundles, "ep-3", {"ep-3"})
        with pytest.raises(NotFound):
            await bundles.archive("ep-0")


async def close_and_see(bundles: Bundles, episode_id: str, expected: set[str]) -> None:
    """Close a new bundle; return once these are there."""
    bundle = await bundles.begin(episode_id, task={}, about={})
    bundle.close()
    await bundle.flushed()
    async with asyncio.timeout(10):
        while set(await bundles.ids()) != expected:  # noqa: ASYNC110 - nothing tells of a sweep
            await asyncio.sleep(0.005)


async def test_a_write_after_the_bundle_was_cleared_away_does_not_bring_it_back(tmp_path: Path) -> None:
    async with Bundles.open(settings(tmp_path, bundles=1)) as bundles:
        bundle = await bundles.begin("ep-0", task={}, about={})
        bundle.close()
        await bundle.flushed()
        await close_and_see(bundles, "ep-1", {"ep-1"})
        await bundle.verdict(verdict())
        await bundle.frame(3, PNG)
        await bundle.flushed()
        assert await bundles.ids() == ["ep-1"]


async def test_the_end_of_the_daemon_writes_what_waits_and_hands_on_the_blocks_own_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="the block's own"):  # noqa: PT012 - the block is what is tested
        async with Bundles.open(settings(tmp_path)) as bundles:
            bundle = await bundles.begin("ep-1", task={}, about={})
            await play(bundle, 100)
            raise KeyError("the block's own")
    assert facts_of(tmp_path)["steps"] == 100
    await bundle.step(step(101), "too late, and harmless")
    await bundle.flushed()


async def test_a_cancelled_daemon_still_writes_what_waits(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def daemon() -> None:
        async with Bundles.open(settings(tmp_path)) as bundles:
            await play(await bundles.begin("ep-1", task={}, about={}), 100)
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(daemon())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert facts_of(tmp_path)["steps"] == 100


async def test_a_disk_that_hangs_delays_the_end_by_the_deadline_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envd.bundles.CLOSING", 0.2)
    async with Bundles.open(settings(tmp_path)) as bundles:
        bundle = await bundles.begin("ep-1", task={}, about={})
        await bundle.flushed()
        os.mkfifo(tmp_path / "episodes" / "ep-1" / "steps.jsonl")  # Opening it waits for a reader.
        await bundle.step(step(1), "")
        began = time.monotonic()
    assert time.monotonic() - began < 1
    # The thread that hangs would hold up the end of the process.
    descriptor = os.open(tmp_path / "episodes" / "ep-1" / "steps.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    os.close(descriptor)


async def test_only_a_password_that_is_one_is_taken_out_of_texts(tmp_path: Path) -> None:
    for secret, shown in (("s3cr3t", "{CLIENT_PASSWORD}"), ("password", "password"), ("1", "1")):
        folder = tmp_path / secret
        async with Bundles.open(settings(folder, client_password=secret)) as bundles:
            bundle = await bundles.begin("ep-1", task=TASK, about={"screen": [1, 2]})
            await bundle.step(step(1, stderr=f"sudo {secret} failed"), f"type {secret}")
            await bundle.guest_log([f"got {secret}"])
            found = await whole(bundles, "ep-1")
        assert json.loads(found["steps.jsonl"])["actions"][0]["stderr"] == f"sudo {shown} failed"
        assert found["guest.log"] == f"got {shown}\n".encode()
        assert json.loads(found["task.json"]) == TASK
        assert json.loads(found["episode.json"])["screen"] == [1, 2]


async def test_what_has_no_place_in_json_is_told_as_text(tmp_path: Path) -> None:
    async with Bundles.open(settings(tmp_path)) as bundles:
        bundle = await bundles.begin("ep-1", task={}, about={"odd": [float("inf"), "\ud800", Path("/x")]})
        await bundle.about({("no", "key"): 1})  # type: ignore[dict-item]  # a mistake of ours
        await bundle.step(step(1), "goes on")
        await bundle.flushed()
        lines = (tmp_path / "episodes" / "ep-1" / "steps.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["said"] == "goes on"


def in_a_process(function: str, *arguments: str | Path) -> list[str]:
    """The command that calls a function of this file."""
    code = f"import sys; sys.path.insert(0, sys.argv[1]); import test_bundles as t; t.{function}(*sys.argv[2:])"
    return [sys.executable, "-c", code, str(Path(__file__).parent), *map(str, arguments)]


def write_for_ever(folder: str) -> None:
    async def run() -> None:
        async with Bundles.open(settings(Path(folder))) as bundles:
            bundle = await bundles.begin("ep-1", task=TASK, about={})
            for number in range(1, 100_000):
                await bundle.frame(number % 10, PNG + bytes(200_000) + b"end")
                await bundle.step(step(number), "said " + "x" * 20_000)
                await bundle.verdict(verdict(detail="y" * 50_000))
                await bundle.grading({"log": "z" * 50_000}, Path("/nonexistent"))
                print(number, flush=True)  # noqa: T201 - what the test waits for

    asyncio.run(run())


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
async def test_a_bundle_can_be_read_after_kill_9_at_any_point(tmp_path: Path, steps: int) -> None:
    writer = await asyncio.create_subprocess_exec(*in_a_process("write_for_ever", tmp_path), stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        for _ in range(steps):
            assert await writer.stdout.readline()
    finally:
        writer.send_signal(signal.SIGKILL)
        await writer.wait()
    async with Bundles.open(settings(tmp_path)) as bundles:
        found = await whole(bundles, "ep-1")
        assert await bundles.get_verdict("ep-1") == verdict(detail="y" * 50_000)
    *lines, last = found.pop("steps.jsonl").splitlines(keepends=True)
    told = [json.loads(line) for line in lines] + ([json.loads(last)] if last.endswith(b"\n") else [])
    assert [line["step"] for line in told] == list(range(1, len(told) + 1))
    assert len(told) >= steps
    assert json.loads(found["episode.json"])["closed_at"] is None
    assert json.loads(found["task.json"]) == TASK
    assert all(data.endswith(b"end") for name, data in found.items() if name.startswith("frames/"))


def write_too_much(folder: str) -> None:
    """Until the disk is full; then a bundle that takes up room goes, and the verdict comes."""

    async def run() -> None:
        async with Bundles.open(settings(Path(folder))) as bundles:
            other = await bundles.begin("ep-0", task={}, about={})
            await other.file("big", bytes(60_000))
            bundle = await bundles.begin("ep-1", task=TASK, about={})
            for number in range(1, 9):
                await bundle.frame(number, PNG + bytes(70_000 + 40_000 * number))
                await bundle.step(step(number), "x" * 50_000)
            await bundle.flushed()
            (Path(folder) / "episodes" / "ep-0" / "files" / "big").unlink()
            await bundle.verdict(verdict())
            bundle.close()

    asyncio.run(run())


SMALL_DISK = (
    """mount -t tmpfs -o size=1m none "$1" && cd / && state=$1 out=$2 && shift 2 && "$@" && cp -r "$state"/. "$out" """
)
SMALL_FILES = """ulimit -f 300 && state=$1 out=$2 && shift 2 && "$@" && cp -r "$state"/. "$out" """


@pytest.mark.parametrize(
    ("shell", "script", "reason"),
    [
        pytest.param(["unshare", "-rm", "sh"], SMALL_DISK, "No space left on device", id="disk full"),
        pytest.param(["sh"], SMALL_FILES, "File too large", id="file too large"),
    ],
)
def test_a_write_that_fails_is_noted_and_fails_nothing(
    tmp_path: Path, shell: list[str], script: str, reason: str
) -> None:
    if subprocess.run([*shell, "-c", "true"], check=False, capture_output=True).returncode:
        pytest.skip(f"{' '.join(shell)} is not allowed here")
    state, out = tmp_path / "state", tmp_path / "out"
    state.mkdir()
    command = [*shell, "-c", script, "sh", str(state), str(out), *in_a_process("write_too_much", state)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("evidence could not be written") == 1
    folder = out / "episodes" / "ep-1"
    assert Verdict.model_validate_json((folder / "verdict.json").read_bytes()) == verdict()
    told, kept = facts_of(out), on_disk(folder)
    assert told["closed_at"] is not None
    assert told["incomplete"]
    assert all(line.endswith(reason) for line in told["incomplete"])
    assert not [name for name in kept if name.endswith(".tmp")]
    lines = [json.loads(line) for line in kept.get("steps.jsonl", b"").splitlines()]
    frames = {name: len(data) for name, data in kept.items() if name.startswith("frames/")}
    assert {line["frame"] for line in lines} <= {None, *frames}
    assert all(size == 70_008 + 40_000 * int(name[7:11]) for name, size in frames.items())


async def test_the_caller_of_a_step_waits_for_less_than_a_fifth_of_a_millisecond(tmp_path: Path) -> None:
    picture = PNG + os.urandom(500_000)
    async with Bundles.open(settings(tmp_path)) as bundles:
        bundle = await bundles.begin("ep-1", task=TASK, about={})
        taken = []
        for number in range(1, 51):
            began = time.perf_counter()
            await bundle.frame(number, picture)
            await bundle.step(step(number, stdout="x" * 4000), "said")
            taken.append(time.perf_counter() - began)
            await bundle.flushed()
    assert sorted(taken)[len(taken) // 2] < 0.0002
