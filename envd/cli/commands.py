"""Every command, and the groups of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import __version__
from . import completion
from .aws import app as aws
from .aws import gc as aws_gc
from .common import WRONG, EnvNumber, JobId, Json, Lease, Url, agreed, ask, fail, talk, told
from .groups import images, tasks, templates
from .sections import Sections

app = typer.Typer(
    name="envd",
    cls=Sections,
    help="Serves computer desktops to agent trainers over one HTTP port: reset, step, evaluate.",
    epilog="Each command's --help has examples and its exit codes. Settings come from the environment and from .env in "
    "this folder. `envd --install-completion` teaches your shell the commands, env numbers and job ids.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain help: rich would double the time that `envd --help` takes.
    rich_markup_mode=None,
    add_completion=True,
)
app.add_typer(tasks, name="tasks")
app.add_typer(images, name="images")
app.add_typer(templates, name="templates")
app.add_typer(aws, name="aws")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _every(
    told_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    app(prog_name="envd")


# To begin


@app.command()
def init(
    file: Annotated[Path, typer.Option("--file", help="The file that is written.")] = Path(".env"),
    provider: Annotated[str | None, typer.Option(help="Who makes the desktops; not asked then.")] = None,
    reach: Annotated[
        Literal["host", "network", "token"] | None, typer.Option(help="Who may reach them; not asked then.")
    ] = None,
    network: Annotated[str | None, typer.Option(help="With --reach network: which, as 10.100.4.0/24.")] = None,
    envs: Annotated[int | None, typer.Option(min=1, max=4096, help="How many desktops at once.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take what is proposed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --yes: change a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a .env that a daemon starts with: three questions.

    Who makes the desktops (what works on this host is proposed), who may reach them (this host, a network, or whoever
    has a token, which is made), and how many there are. A file that is there is changed only after you agreed; its
    lines about anything else stay.

    \b
    Examples:
      envd init                              asks
      envd init --yes                        local desktops where they can be made, for this host alone
      envd init --yes --reach token --envs 8

    Exit codes: 0 written, or it says that already; 1 not written.
    """
    from .init import Given
    from .init import init as write

    given = Given(file, provider, reach, network, envs, yes=yes, force=force, as_json=as_json)
    with told():
        raise SystemExit(write(given))


@app.command()
def doctor(
    url: Annotated[
        str | None, typer.Option("--url", help="Look from here at the server there, as a trainer's node would.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="And have a desktop, of an env that is free: reset, picture, step.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what is in the way of desktops, and what puts it right.

    Without --url this host is looked at, whether or not a daemon runs. With --full alone the server is ENVD_URL, else
    that of ENVD_HOST and ENVD_PORT.

    \b
    Examples:
      envd doctor
      envd doctor --url http://HOST:15001
      envd doctor --url http://HOST:15001 --full
      envd doctor --json | jq '.findings[] | select(.verdict == "failed")'

    Exit codes: 0 nothing failed, 1 something did.
    """
    from .doctor import doctor as look

    raise SystemExit(talk(look(url, full=full, as_json=as_json)))


@app.command()
def demo(
    url: Url = None,
    own: Annotated[bool, typer.Option("--own", help="On a daemon of its own, also where one runs.")] = False,
    provider: Annotated[
        str | None, typer.Option(help="On a daemon of its own with these desktops; default local, else sim.")
    ] = None,
    pause: Annotated[float, typer.Option(min=0, max=60, help="Seconds before each step, to look on.")] = 1.0,
    folder: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the frames; default a temporary one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Play a short episode, and show each thing that happens.

    Reset, observation, steps, verdict, evidence. It is played on the server that runs, when that has an env which
    nobody uses (it is leased, and given back); else on a daemon of its own, with real desktops of this host where they
    can be made, which is gone afterwards. Every frame is kept.

    \b
    Examples:
      envd demo
      envd demo --own --provider sim     needs nothing but Python
      envd demo --pause 5                slowly, to look on in a browser

    Exit codes: 0 played, and scored where evaluators are installed; 3 played, and without a score, which says why; 1 it
    could not be played.
    """
    from ..settings import load
    from .demo import demo as play

    async def run() -> int:
        return await play(load(), url=url, own=own, provider=provider, pause_s=pause, folder=folder, as_json=as_json)

    raise SystemExit(talk(run()))


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default ENVD_HOST, else 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default ENVD_PORT, else 15001.")] = None,
) -> None:
    """Run the daemon until it is told to stop.

    Settings come from the environment and from .env in this folder; /docs/settings of a daemon has all of them. What it
    does goes to stderr, a line for each event.

    \b
    Examples:
      envd serve
      PROVIDER=local ENVD_ENVS=4 envd serve --port 15002

    Exit codes: 0 stopped by a signal or drained, 78 a setting cannot be used, 75 the port or the state directory is
    taken, 69 something is not installed, 70 a bug.
    """
    import asyncio

    from .. import daemon, log
    from ..errors import StartError
    from ..settings import load

    try:
        log.setup()
        settings = load(host=host, port=port)
        log.setup(settings.log_level, settings.log_format)
        asyncio.run(daemon.serve(settings))
    except StartError as error:
        fail(f"envd cannot start: {error.detail}", error.hint, error.exit_code)
    except Exception:  # noqa: BLE001 - the outermost boundary: told in one log line, ends non-zero
        import structlog

        structlog.get_logger("envd").exception("envd ended because one of its halves died")
        raise SystemExit(70) from None


# To look


@app.command()
def watch(
    job: Annotated[
        str | None, typer.Argument(help="A job's id; all jobs without it.", autocompletion=completion.jobs)
    ] = None,
    url: Url = None,
) -> None:
    """Follow boots and resets live.

    Phase and ETA, both probes, place in the queue; a restart of the daemon is survived. Ctrl-C ends the watching and
    nothing else.

    \b
    Examples:
      envd watch
      envd watch --url http://desks.example:15001
      envd reset 0 --no-wait && envd watch

    Exit codes: 0 the job succeeded, 1 it did not, or the server was never reached.
    """

    from .watch import watch as follow

    ask(url, lambda client: follow(client, job))


@app.command()
def ls(
    jobs: Annotated[bool, typer.Option("--jobs", help="The jobs instead: active ones, and recent ones.")] = False,
    episodes: Annotated[
        bool, typer.Option("--episodes", help="The episodes with evidence, and verdicts, instead.")
    ] = False,
    leases: Annotated[bool, typer.Option("--leases", help="Who has leased what, and who waits, instead.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, max=1000, help="With --episodes: the newest so many; default 20.")
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show the envs of a server, its jobs, its episodes or its leases.

    Of an env: state, task, how far its episode is, desktop, who has it leased, which job runs and which waits. `over`
    is an env whose episode has ended, with its verdict.

    \b
    Examples:
      envd ls
      envd ls --jobs
      envd ls --json | jq '.envs[] | select(.state == "lost") | .id'

    Exit codes: 0 it was told, 1 the server was not reached or refused.
    """
    from . import ls as lists

    if jobs + episodes + leases > 1:
        raise typer.BadParameter("give one of --jobs, --episodes and --leases")
    if limit is not None and not episodes:
        raise typer.BadParameter("--limit goes with --episodes")
    if episodes:
        ask(url, lambda client: lists.episodes(client, limit=limit or lists.EPISODES_SHOWN, as_json=as_json))
    look = lists.jobs if jobs else lists.leases if leases else lists.envs
    ask(url, lambda client: look(client, as_json=as_json))


@app.command()
def logs(
    env: Annotated[
        int | None, typer.Option(min=0, help="Lines about this env.", autocompletion=completion.env_numbers)
    ] = None,
    job: Annotated[str | None, typer.Option(help="Lines about this job.", autocompletion=completion.jobs)] = None,
    episode: Annotated[
        str | None, typer.Option(help="Lines about this episode.", autocompletion=completion.episodes)
    ] = None,
    level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option(help="No line below it.")
    ] = None,
    since: Annotated[str | None, typer.Option(help="No line older than that: 30s, 10m, 2h, 1d.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The newest so many; default 200.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with the lines that come.")] = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Show the daemon's log, of all or of one env, job or episode.

    Its last lines, and with --follow those that come. A restart of the daemon is survived.

    \b
    Examples:
      envd logs --env 0 --follow
      envd logs --level warning --since 1h
      envd logs --job job-0123456789ab --json | jq .event

    Exit codes: 0 it was told, 1 the server was not reached or refused.
    """
    with told():
        from ..client.logs import Which
        from .logs import logs as show
        from .logs import moment

    with told(code=WRONG):
        since_s = moment(since)
    which = Which(env=env, job=job, episode=episode, level=level, since=since_s, limit=limit)
    ask(url, lambda client: show(client, which, follow=follow, as_json=as_json))


@app.command()
def screenshot(
    env: EnvNumber,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file, - for stdout; default env-0.png and the like.")
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Save an env's screen as it is now.

    Looking needs no lease, and changes nothing.

    \b
    Examples:
      envd screenshot 0
      envd screenshot 3 -o /tmp/three.png
      envd screenshot 0 -o - | feh -

    Exit codes: 0 saved, 1 there is no desktop, or the file cannot be written.
    """
    from .play import screenshot as save

    ask(url, lambda client: save(client, env, output, as_json=as_json))


@app.command()
def version(url: Url = None, as_json: Json = False) -> None:
    """Print the version, with --url the server's too.

    \b
    Examples:
      envd version
      envd version --url http://desks.example:15001
      envd version --json

    Exit codes: 0 printed, 1 the server that was named was not reached.
    """
    if url is None:
        if as_json:
            import json

            typer.echo(json.dumps({"version": __version__}))
        else:
            typer.echo(__version__)
        return
    from .ls import versions

    ask(url, lambda client: versions(client, as_json=as_json))


# To play


@app.command()
def prewarm(url: Url = None, as_json: Json = False) -> None:
    """Boot a clean desktop, and wait until it stands by.

    The next reset finds it and needs no boot of its own. It is shown as `envd watch` does; Ctrl-C ends the watching,
    and the boot goes on.

    \b
    Examples:
      envd prewarm
      ENVD_URL=http://desks.example:15001 envd prewarm

    Exit codes: 0 it stands by, 1 it does not.
    """
    from .play import prewarm as boot

    ask(url, lambda client: boot(client, as_json=as_json))


@app.command()
def reset(
    env: EnvNumber,
    task: Annotated[
        Path | None,
        typer.Argument(
            metavar="TASK.json",
            help="A task file, - for stdin; none is an empty desktop.",
            autocompletion=completion.files,
        ),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, max=10_000, help="Length of the episode.")] = None,
    counts: Annotated[Literal["actions", "predictions"] | None, typer.Option(help="What --max-steps limits.")] = None,
    episode_timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds after which no step of the episode begins.")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id, and do not wait for it.")] = False,
    lease: Lease = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Give an env a clean desktop with a task on it.

    It is followed to its end, and shown as `envd watch` does. Ctrl-C ends the watching: the job goes on, and `envd
    cancel` ends it. The same reset sent again joins the job that runs.

    \b
    Examples:
      envd reset 0
      envd reset 0 task.json --max-steps 30
      jq '.[3]' tasks.json | envd reset 1 - --json

    Exit codes: 0 the first observation is there (--no-wait: the job was accepted), 1 it failed or was refused.
    """
    from .play import reset as begin

    ask(
        url,
        lambda client: begin(
            client,
            env,
            task,
            max_steps=max_steps,
            counts=counts,
            episode_timeout_s=episode_timeout,
            wait=not no_wait,
            as_json=as_json,
        ),
        lease=lease,
    )


@app.command()
def step(
    env: EnvNumber,
    actions: Annotated[
        list[str] | None, typer.Argument(metavar="ACTION", help="pyautogui programs, or DONE, WAIT, FAIL.")
    ] = None,
    prediction: Annotated[
        str | None, typer.Option("--prediction", "-p", help="What a model said instead, - for stdin.")
    ] = None,
    pause: Annotated[float | None, typer.Option(min=0, max=60, help="Seconds after each action.")] = None,
    screenshot: Annotated[
        Path | None, typer.Option("--screenshot", "-s", metavar="FILE", help="Save the screen after it there.")
    ] = None,
    lease: Lease = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Act on an env's desktop, once.

    What became of each action is told. Without an action or a prediction, or with -, a program is read from stdin. What
    was sent is never sent twice: of an action whose answer was lost the outcome is `unknown`.

    \b
    Examples:
      envd step 0 "pyautogui.click(960, 540)"
      envd step 0 "pyautogui.write('hello')" "pyautogui.press('enter')" -s after.png
      envd step 0 -p "Thought: … Action: click(point='<point>500 300</point>')"
      envd step 0 < program.py

    Exit codes: 0 all was done; 3 an action failed, its outcome is unknown, or the prediction does not parse; 1 refused.
    """
    import sys

    from .play import step as act

    if prediction is not None and actions:
        raise typer.BadParameter("give actions or --prediction, not both")
    if prediction is None and not actions and sys.stdin.isatty():
        raise typer.BadParameter('give an action, such as "pyautogui.click(960, 540)", or --prediction')
    ask(
        url,
        lambda client: act(
            client,
            env,
            actions or [],
            prediction=prediction,
            pause_s=pause,
            screenshot=screenshot,
            as_json=as_json,
        ),
        lease=lease,
    )


@app.command()
def evaluate(env: EnvNumber, lease: Lease = None, url: Url = None, as_json: Json = False) -> None:
    """Judge an env's episode: a score, or none and why.

    The task's own evaluator judges, once: asked again, the same verdict is printed. The episode ends with it. What
    failed is never a number.

    \b
    Examples:
      envd evaluate 0
      envd evaluate 0 --json | jq '{score, status, detail}'

    Exit codes: 0 there is a score, whatever it is; 3 there is none; 1 refused, or there is no episode.
    """
    from .play import evaluate as judge

    ask(url, lambda client: judge(client, env, as_json=as_json), lease=lease)


@app.command()
def bundle(
    episode: Annotated[
        str,
        typer.Argument(
            metavar="EPISODE",
            help="An episode's id, or the number of an env that plays it.",
            autocompletion=completion.episodes,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file, or a folder; default EPISODE.tar here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over the file that -o names.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Save the evidence that an episode left.

    Task, set-up, actions, frames, what was judged, the verdict, in one tar file. `envd ls --episodes` lists the
    episodes that have some.

    \b
    Examples:
      envd bundle 0                       of what env 0 plays
      envd bundle ep-0123456789abcdef -o evidence/
      envd rescore ep-0123456789abcdef.tar

    Exit codes: 0 saved, 1 there is no such episode, or the file is there already or cannot be written.
    """
    from .play import bundle as save

    ask(url, lambda client: save(client, episode, output, force=force, as_json=as_json))


@app.command()
def rescore(
    bundle: Annotated[Path, typer.Argument(help="An episode's evidence: its folder, or the archive of it.")],
    as_json: Json = False,
) -> None:
    """Judge an episode again by its evidence, and compare.

    Needs no server: what each getter gave is in the evidence.

    \b
    Examples:
      envd rescore evidence.tar
      envd rescore evidence.tar --json

    Exit codes: 0 the scores are equal, 1 they differ, 2 it cannot be judged again.
    """
    from ..settings import load
    from .rescore import rescore as again

    async def run() -> int:
        return await again(bundle, load(), as_json=as_json)

    raise SystemExit(talk(run()))


# To run it


@app.command()
def cancel(
    job: JobId,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until its desktop is gone.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """End a job, and wait until its desktop is gone.

    A boot that another job can use goes on for that one.

    \b
    Examples:
      envd cancel job-0123456789ab
      envd ls --json | jq -r '.envs[].waiting_job_id // empty' | xargs -n1 envd cancel

    Exit codes: 0 it is cancelled, is about to be, or had ended before; 1 it ended in another way meanwhile, or there is
    no such job.
    """
    from .ending import cancel as end

    ask(url, lambda client: end(client, job, wait=not no_wait, as_json=as_json))


@app.command()
def drain(
    limit: Annotated[
        float | None,
        typer.Option(min=0, max=604_800, help="Seconds that episodes may go on; default ENVD_DRAIN_LIMIT."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until the daemon has ended.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Only tell how far it is.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """End the daemon once its episodes have been judged.

    It takes no new work from then on. Sent again it has another limit. It needs a token of scope admin where there are
    tokens. Under systemd a unit that was drained stays down until it is started. Ctrl-C ends the waiting; the daemon
    ends all the same.

    \b
    Examples:
      envd drain --limit 3600 --wait
      envd drain --limit 0                no episode is waited for
      envd drain --status

    Exit codes: 0 it was told, with --wait it has ended; 1 refused, or the server was not reached.
    """
    from . import ending

    if status:
        ask(url, lambda client: ending.drain_status(client, as_json=as_json))
    ask(url, lambda client: ending.drain(client, limit, wait=wait, as_json=as_json))


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what a dead daemon left on this host.

    Containers, virtual machines and their disks, sandboxes. Only what carries the label of the daemon whose state
    directory this is (ENVD_STATE_DIR), or lies in that directory. While that daemon runs nothing is touched: it sweeps
    by itself. With PROVIDER=aws, `envd aws gc` follows (not with --json).

    \b
    Examples:
      envd gc --dry-run
      envd gc
      ENVD_STATE_DIR=/var/lib/envd envd gc --yes

    Exit codes: 0 done, or nothing to do; 1 refused, or something could not be looked at or removed.
    """
    from ..settings import load
    from . import gc as left

    with told():
        settings = load()
    found: list[left.Survey] = []

    async def look() -> int:
        found.append(await left.survey(settings))
        if not as_json:
            left.show(found[0], dry_run=dry_run)
        return 0

    # The question in between is asked while no loop runs: it takes as long as it takes.
    if code := talk(look()):
        raise SystemExit(code)
    if found[0].left and not dry_run and not agreed("Remove them?", yes=yes, as_json=as_json):
        raise SystemExit(1)
    code = talk(left.remove(settings, found[0], dry_run=dry_run, as_json=as_json))
    if settings.provider == "aws" and not as_json:
        typer.echo("\nInstances on EC2:")
        aws_gc(dry_run=dry_run, expired=False, everything=False, yes=yes, as_json=False)
    raise SystemExit(code)


@app.command()
def bench(
    resets: Annotated[int, typer.Option(min=1, max=1000, help="Resets of each client.")] = 5,
    clients: Annotated[int, typer.Option(min=1, max=256, help="How many play at once, each on an env of its own.")] = 1,
    steps: Annotated[int, typer.Option(min=0, max=1000, help="Steps after each reset.")] = 20,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Measure a server that runs.

    Resets by path, the wait for a turn, steps and screenshots: p50, p95, p99. It plays only on envs that nobody uses:
    it leases them, and gives them back. Each client does one thing at a time. A reset is timed from the request to the
    first observation, a step from the request to its screenshot.

    \b
    Examples:
      envd bench
      envd bench --clients 4 --resets 10
      envd bench --json > before.json

    Exit codes: 0 measured, 1 something failed, or too few envs are free.
    """
    from .bench import Load
    from .bench import bench as measure

    ask(url, lambda client: measure(client, Load(resets, clients, steps), as_json=as_json))
