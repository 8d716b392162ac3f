"""`envd aws`: what it shows of instances, which ones it ends, and whom it asks."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from aws_cloud import Account, account
from rich.console import Console
from typer.testing import CliRunner

from envd.cli import app, aws_check
from envd.cli.aws_gc import end, ls, survey
from envd.daemon import daemon_id, locked
from envd.drivers.aws.tags import as_list, schedule_name, tags_of
from envd.drivers.base import InstanceSpec
from envd.findings import Finding
from envd.settings import Settings, load

OTHER = "0e0e0e"


@pytest.fixture(scope="module")
def one_account() -> Iterator[Account]:
    with account() as made:
        yield made


@pytest.fixture
def aws(one_account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Account:
    """Without instances, and with a state directory whose daemon has been there before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENVD_STATE_DIR", str(tmp_path / "state"))
    with locked(tmp_path / "state"):
        daemon_id(tmp_path / "state")
    if left := alive(one_account):
        one_account.client("ec2").terminate_instances(InstanceIds=list(left))
    return one_account


def settings() -> Settings:
    return load(env_file=None)


def ours() -> str:
    return daemon_id(settings().state_dir)


def launch(aws: Account, daemon: str, *, env: int = 0, expires_in: float | None = 3600) -> str:
    """An instance as a daemon makes it."""
    now = time.time()
    spec = InstanceSpec(id=f"envd-{daemon}-{env}", env=env, job_id="j-1", screen=(1920, 1080))
    tags = tags_of(spec, daemon, "someone", now - 7200, None if expires_in is None else now + expires_in)
    made = aws.client("ec2").run_instances(
        ImageId=aws.ami,
        InstanceType="t3.xlarge",
        SubnetId=aws.subnets[0],
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": as_list(tags)}],
    )
    return str(made["Instances"][0]["InstanceId"])


def alive(aws: Account) -> set[str]:
    states = [{"Name": "instance-state-name", "Values": ["pending", "running", "stopped"]}]
    found = aws.client("ec2").describe_instances(Filters=states)["Reservations"]
    return {one["InstanceId"] for reservation in found for one in reservation["Instances"]}


def schedule(aws: Account, instance: str) -> None:
    aws.client("scheduler").create_schedule(
        Name=schedule_name(instance),
        ScheduleExpression="at(2099-01-01T00:00:00)",
        FlexibleTimeWindow={"Mode": "OFF"},
        Target={
            "Arn": "arn:aws:scheduler:::aws-sdk:ec2:terminateInstances",
            "RoleArn": "arn:aws:iam::123456789012:role/r",
        },
    )


def run(command: Coroutine[Any, Any, int]) -> int:
    return asyncio.run(command)


def paper() -> Console:
    return Console(file=io.StringIO(), width=250)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def gc(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["aws", "gc", *arguments])


def test_every_instance_is_shown_with_age_owner_cost_and_whose_it_is(aws: Account) -> None:
    mine, theirs = launch(aws, ours(), env=3), launch(aws, OTHER, expires_in=None)
    schedule(aws, mine)
    output = paper()
    assert run(ls(settings(), output=output)) == 0
    lines = {line.split()[1 if line.startswith("*") else 0]: line.split() for line in written(output).splitlines()[1:3]}
    assert lines[mine] == f"* {mine} envd-{ours()}-3 running t3.xlarge 2 h 3 someone in 60 min $0.33".split()
    assert lines[theirs] == f"{theirs} envd-{OTHER}-0 running t3.xlarge 2 h 0 someone never $0.33".split()
    assert "2 of 2 daemons in us-east-1, some $0.67 so far" in written(output)


def test_for_programs_all_facts_of_an_instance_are_json(aws: Account, capsys: pytest.CaptureFixture[str]) -> None:
    mine = launch(aws, ours())
    assert run(ls(settings(), as_json=True)) == 0
    told = json.loads(capsys.readouterr().out)
    (one,) = told["instances"]
    assert (told["region"], told["daemon_id"]) == ("us-east-1", ours())
    assert (one["instance_id"], one["job"], one["ours"], one["schedule"]) == (mine, "j-1", True, False)


def test_where_there_is_none_that_is_said(aws: Account) -> None:
    output = paper()
    assert run(ls(settings(), output=output)) == 0
    assert written(output) == "There is no instance of envd's in us-east-1.\n"


@pytest.mark.parametrize(
    ("options", "left"),
    [
        pytest.param([], {"theirs", "theirs, late"}, id="this daemon's"),
        pytest.param(["--expired"], {"theirs"}, id="and what outlived its time"),
        pytest.param(["--all"], set(), id="everybody's"),
    ],
)
def test_ended_is_what_was_asked_for_and_nothing_else(aws: Account, options: list[str], left: set[str]) -> None:
    names = {
        launch(aws, ours()): "mine",
        launch(aws, ours(), env=1, expires_in=-60): "mine, late",
        launch(aws, OTHER): "theirs",
        launch(aws, OTHER, env=1, expires_in=-60): "theirs, late",
    }
    assert gc("--yes", *options).exit_code == 0
    assert {names[instance] for instance in alive(aws)} == left


def test_a_daemon_that_runs_keeps_what_it_uses_whatever_is_asked(aws: Account) -> None:
    used, late = launch(aws, ours()), launch(aws, ours(), env=1, expires_in=-60)
    with locked(settings().state_dir):
        ran = gc("--all", "--yes")
    assert (ran.exit_code, alive(aws)) == (0, {used})
    assert f"1 of daemon {ours()} left to it, since it runs" in ran.stdout
    assert late in ran.stdout


def test_a_dry_run_ends_nothing_and_says_what_it_would(aws: Account) -> None:
    mine = launch(aws, ours())
    ran = gc("--dry-run")
    assert (ran.exit_code, alive(aws)) == (0, {mine})
    assert mine in ran.stdout
    assert "1 instance would be ended" in ran.stdout


def test_nothing_is_ended_where_nobody_can_be_asked(aws: Account) -> None:
    mine = launch(aws, ours())
    ran = gc()
    assert (ran.exit_code, alive(aws)) == (1, {mine})
    assert "--yes" in ran.stderr


@pytest.mark.parametrize(("answer", "ended"), [pytest.param("y", True, id="yes"), pytest.param("n", False, id="no")])
def test_a_person_is_asked(aws: Account, answer: str, ended: bool) -> None:
    launch(aws, ours())
    command = [sys.executable, "-m", "envd", "aws", "gc"]
    # A terminal of its own: `script` gives the command one, and takes the answer from its own input.
    ran = subprocess.run(
        ["script", "-qec", " ".join(command), "/dev/null"],
        input=f"{answer}\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "End 1 instance? [y/N]:" in ran.stdout
    assert (alive(aws) == set(), ran.returncode == 0) == (ended, ended)


def test_where_no_daemon_ever_was_nothing_is_ours_and_none_is_made_up(
    aws: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = launch(aws, OTHER)
    monkeypatch.setenv("ENVD_STATE_DIR", str(tmp_path / "nowhere"))
    assert gc("--yes").exit_code == 0
    assert alive(aws) == {theirs}
    assert not (tmp_path / "nowhere").exists()


def test_what_was_put_off_since_it_was_agreed_to_is_not_ended(aws: Account) -> None:
    theirs = launch(aws, OTHER, expires_in=-60)
    plan = asyncio.run(survey(settings(), expired=True, everything=False))
    assert [one.instance_id for one in plan.chosen] == [theirs]
    later = as_list({"envd:expires-at": "2099-01-01T00:00:00Z"})
    aws.client("ec2").create_tags(Resources=[theirs], Tags=later)
    assert run(end(settings(), plan, dry_run=False, as_json=False, output=paper())) == 0
    assert alive(aws) == {theirs}


def test_programs_are_told_what_was_ended(aws: Account) -> None:
    mine = launch(aws, ours())
    told = json.loads(gc("--yes", "--json").stdout)
    assert (told["ended"], told["dry_run"], told["daemon_runs"]) == ([mine], False, False)
    assert alive(aws) == set()


FINDINGS = [
    Finding("place", "ok", "region us-east-1 (set)"),
    Finding("port 5000 of desktops", "failed", "no rule opens it", "aws ec2 authorize-…"),
]


@pytest.mark.parametrize(
    ("findings", "code", "told"),
    [
        pytest.param(FINDINGS[:1], 0, "1 ok. Nothing failed: PROVIDER=aws envd serve", id="nothing failed"),
        pytest.param(FINDINGS, 1, "1 ok, 1 failed. Desktops cannot be launched", id="something failed"),
    ],
)
def test_the_exit_code_says_whether_anything_failed(
    monkeypatch: pytest.MonkeyPatch, findings: list[Finding], code: int, told: str
) -> None:
    async def look(settings: Settings) -> list[Finding]:
        return findings

    monkeypatch.setattr(aws_check, "look", look)
    output = paper()
    assert run(aws_check.check(load({}, None), output=output)) == code
    assert told in written(output)


@pytest.mark.parametrize("terminal", [pytest.param(True, id="terminal"), pytest.param(False, id="pipe")])
def test_every_line_has_its_verdict_and_its_fix(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    async def look(settings: Settings) -> list[Finding]:
        return FINDINGS

    monkeypatch.setattr(aws_check, "look", look)
    output = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
    run(aws_check.check(load({}, None), output=output))
    lines = [" ".join(line.split()) for line in written(output).splitlines()]
    assert "ok place region us-east-1 (set)" in lines
    assert "failed port 5000 of desktops no rule opens it" in lines
    assert "→ aws ec2 authorize-…" in lines


def test_without_the_package_that_speaks_to_aws_the_command_says_what_to_install(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["aioboto3"] = None
sys.argv = ["envd", "aws", "ls"]
from envd.cli import main
main()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert ran.returncode == 1
    assert "pip install 'envd-server[aws]'" in ran.stderr
