"""The verbs and their flags: what may be typed. What a verb does is imported when it is typed, because `status` has to
answer in the time of a blink.

click rather than argparse: it suggests the flag or verb that was meant, exits 2 on wrong usage, and its verbs are typed
functions.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Unpack

import click
from click.core import ParameterSource

import moshpitd
from moshpitd.cli.failure import ExitCode, Failure
from moshpitd.config import Config, ConfigError, Flags, default_socket, load

if TYPE_CHECKING:
    from moshpitd.cli.connection import Daemon
    from moshpitd.cli.forms import Json
    from moshpitd.cli.simulation_flags import SimulationFlags

_Verb = TypeVar("_Verb", bound=Callable[..., None])


class _Verbs(click.Group):
    """The group that turns a Failure into a message and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except Failure as failure:
            click.echo(f"Error: {failure}", err=True)
            ctx.exit(failure.code)


def _weight(ctx: click.Context, param: click.Parameter, text: str) -> float:
    weight = _number(text)
    if not 0 <= weight < math.inf:
        raise click.BadParameter(f"{text!r} is no weight: give a finite number from 0 up")
    return weight


def _compressor(ctx: click.Context, param: click.Parameter, text: str) -> None:
    from moshpitd.averaging.compressors import check_compressor
    from moshpitd.averaging.errors import InvalidInput

    try:
        name = check_compressor(text)
    except InvalidInput as error:
        raise click.BadParameter(str(error)) from error
    if name != "dense":
        raise click.BadParameter(
            f"{name} sends some now and the rest later, and a single averaging has no later: open a session, "
            "from Python say: daemon.open_session(..., compressor=...)"
        )


def _timeout(ctx: click.Context, param: click.Parameter, text: str) -> float:
    timeout_s = _number(text)
    if not 0 < timeout_s < math.inf:
        raise click.BadParameter(f"{text!r} is no timeout: give seconds, more than 0")
    return timeout_s


def _rounds(ctx: click.Context, param: click.Parameter, text: str) -> int:
    if text == "auto":
        return 0
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise click.BadParameter(f"{text!r} is neither auto nor a number from 1 to 64")
    return int(text)


def _every(ctx: click.Context, param: click.Parameter, text: str) -> int:
    if text == "auto":
        return 0
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 20:
        raise click.BadParameter(f"{text!r} is neither auto nor a number from 1 to {1 << 20}")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


socket_flag = click.option(
    "--socket",
    type=click.Path(path_type=Path),
    envvar="MOSHPITD_SOCKET",
    default=lambda: default_socket(os.environ),
    show_default="below $XDG_RUNTIME_DIR",
    help="The daemon's Unix socket.",
)
json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def settings_flags(verb: _Verb) -> _Verb:
    """The flags of `run`, untouched text: config.py reads them as it reads the environment and the file."""
    for option in reversed(
        (
            click.option("--swarm", metavar="NAME", help="The swarm to join or to start."),
            click.option("--listen", metavar="HOST:PORT", help="gRPC on TCP, directory on UDP.  [0.0.0.0:7600]"),
            click.option("--announce", metavar="HOST:PORT", help="What others are to dial.  [found out]"),
            click.option("--join", metavar="HOST:PORT", multiple=True, help="Any live member; repeatable."),
            click.option("--socket", metavar="PATH", help="The trainers' Unix socket.  [below $XDG_RUNTIME_DIR]"),
            click.option("--data-dir", metavar="DIR", help="Identity and remembered peers.  [below $XDG_STATE_HOME]"),
            click.option("--grid", metavar="auto|4x4|...", help="Pin the grid.  [auto]"),
            click.option("--group-size-max", metavar="N", help="The planner's largest group.  [16]"),
            click.option("--http", metavar="HOST:PORT|off", help="Serve /healthz and /metrics.  [off]"),
            click.option("--event-loop", metavar="auto|uvloop|asyncio", help="[uvloop where installed]"),
            click.option("--drain-timeout", metavar="SECONDS", help="What SIGTERM waits for a running round.  [20]"),
            click.option("--transport", metavar="auto|grpc|tcp", help="How chunks travel between peers.  [auto]"),
            click.option("--bulk-port", metavar="PORT", help="Where plain TCP listens.  [any free one]"),
            click.option("--bulk-announce", metavar="PORT", help="What others dial for it.  [the same]"),
            click.option("--vector-bytes-max", metavar="N|NGiB", help="The largest vector of a trainer.  [4GiB]"),
            click.option("--shared-memory-dir", metavar="DIR|auto|off", help="To share with trainers.  [/dev/shm]"),
            click.option("--preset", metavar="loopback|lan|wan", help="The kind of network.  [wan]"),
            click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.  [info]"),
            click.option("--config", metavar="FILE", help="TOML; weaker than flags and MOSHPITD_* variables."),
        )
    ):
        verb = option(verb)
    return verb


def simulation_flags(verb: _Verb) -> _Verb:
    """The flags of `simulate`. Text that has a grammar of its own is read by simulation_flags.py."""
    share, length = click.FloatRange(0, 1), click.FloatRange(0, 1e6)
    file = click.Path(path_type=Path, dir_okay=False)
    for option in reversed(
        (
            click.option(
                "--workload",
                type=click.Choice(["in-step", "mixed"]),
                default="in-step",
                show_default=True,
                help="in-step: all average at once, the spread is measured; mixed: everything goes wrong that may.",
            ),
            click.option(
                "--averaging",
                type=click.Choice(["wait-avoiding", "group", "global"]),
                help="Trainers that compute, some of them late, and who waits for whom; step times are measured.",
            ),
            click.option(
                "--straggler",
                metavar="COUNT:LATE",
                multiple=True,
                help="In each step so many trainers, drawn anew, are late, as in 2:320ms; repeatable.",
            ),
            click.option("--step", metavar="100ms", default="100ms", show_default=True, help="Of a trainer, in time."),
            click.option("--jitter", type=share, default=0.0, help="... give or take this share of it."),
            click.option("--steps", type=click.IntRange(1, 100_000), default=100, show_default=True),
            click.option(
                "--group-size", type=click.IntRange(2, 64), default=2, show_default=True, help="Of a version."
            ),
            click.option("--barrier-every", metavar="TAU", type=click.IntRange(1, 1024), default=10, show_default=True),
            click.option("--lockstep", is_flag=True, help="Late trainers make every step themselves."),
            click.option(
                "--compressor",
                default="dense",
                show_default=True,
                metavar="NAME",
                help="Mixed: what the trainers' sessions use, arc:0.2,4,ef21m,0.1,0 say.",
            ),
            click.option("--transport", type=click.Choice(["reliable", "lossy", "auto"]), default="reliable"),
            click.option("--reliable-every", metavar="R|auto", callback=_every, default="auto", show_default=True),
            click.option("--packet-loss", metavar="0.1[:8]", help="Share of packets lost, in bursts of so many."),
            click.option("--update", type=click.FloatRange(0, 1e6), default=0.0, help="What trainers add, each time."),
            click.option("--peers", type=click.IntRange(2, 8192), help="[16; mixed: drawn from 16 to 64]"),
            click.option("--grid", metavar="auto|8x8", default="auto", show_default=True, help="Pin the grid."),
            click.option("--group-size-max", type=click.IntRange(2, 1024), default=16, show_default=True),
            click.option("--rounds", metavar="N|auto", default="1", show_default=True, help="Of each averaging."),
            click.option("--averagings-max", type=click.IntRange(1, 10_000), default=50, show_default=True),
            click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True),
            click.option("--seeds", type=click.IntRange(1, 10**6), default=1, show_default=True, help="Run so many."),
            click.option("--vector-bytes", metavar="64MB", help="What the links carry.  [next to nothing]"),
            click.option("--delay", metavar="5ms[..20ms]", help="Of a message, one way.  [0.2ms..2ms]"),
            click.option("--loss", type=click.FloatRange(0, 0.9), default=0.0, help="Share of messages sent again."),
            click.option(
                "--link",
                metavar="NAME:COUNT:...",
                multiple=True,
                help="The lines of some peers, as in slow:2:up=1MB,down=5MB,delay=40ms,loss=0.01; repeatable.",
            ),
            click.option("--absent", type=share, default=0.0, help="Chance to miss an averaging."),
            click.option("--crash", type=share, default=0.0, help="Chance of a daemon to die in an averaging."),
            click.option("--pause", type=share, default=0.0, help="Chance of a daemon to stand still in one ..."),
            click.option("--pause-seconds", type=length, default=5.0, show_default=True, help="... for up to."),
            click.option("--burst", metavar="K:SHARE", multiple=True, help="So many are absent from averaging K."),
            click.option(
                "--partition",
                metavar="K:SHARE:SECONDS[:one-way]",
                multiple=True,
                help="So many cannot reach the others from averaging K on.",
            ),
            click.option("--slow-trainers", type=share, default=0.0, help="Chance of a trainer to call late ..."),
            click.option("--slow-seconds", type=length, default=2.0, show_default=True, help="... by up to."),
            click.option("--join", metavar="K:N", multiple=True, help="N peers come before averaging K."),
            click.option("--leave", metavar="K:N", multiple=True, help="N peers leave before averaging K."),
            click.option("--directory-delay", metavar="10ms[..50ms]", help="Of a look-up.  [1ms..10ms]"),
            click.option("--stale", type=length, default=0.0, help="Seconds until a record is seen, at most."),
            click.option("--lost-writes", type=share, default=0.0, help="Share of records nobody gets to see."),
            click.option("--timeout", metavar="SECONDS", callback=_timeout, default="60", show_default=True),
            click.option("--drop-compute", is_flag=True, help="What a compute budget is worth, instead of a swarm:"),
            click.option("--micro-batches", type=click.IntRange(2, 256), default=12, show_default=True, help="A step."),
            click.option("--micro-batch", metavar="10ms", default="10ms", show_default=True, help="Without noise."),
            click.option(
                "--noise",
                type=click.FloatRange(0, 100),
                default=0.5,
                show_default=True,
                help="Added to a micro-batch in the mean, in micro-batches.",
            ),
            click.option(
                "--exchange", metavar="30ms", default="30ms", show_default=True, help="Of a step, beside them."
            ),
            click.option("--plot", metavar="FILE", type=file, help="Draw the spread: .png, .svg or .pdf."),
            click.option("--trace", metavar="FILE", type=file, help="Write everything that happens, messages too."),
        )
    ):
        verb = option(verb)
    return verb


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(moshpitd.__version__, prog_name="moshpitd", message="%(prog)s %(version)s")
def main() -> None:
    """Average tensors with others over unreliable machines.

    Start a daemon with `moshpitd run --swarm NAME`, then average from any trainer or with `moshpitd average`.

    Exit codes: 0 ok, 1 failed, 2 usage, 3 daemon not reachable, 4 not healthy, 5 timed out or no group.
    """


@main.command()
@settings_flags
def run(**flags: str | tuple[str, ...] | None) -> None:
    """Run the daemon in the foreground. SIGTERM or Ctrl+C drains, a second one exits now."""
    config = _load(flags)
    from moshpitd.daemon import start

    raise SystemExit(start(config))


@main.command()
@click.argument("source", metavar="IN.safetensors", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="OUT.safetensors", type=click.Path(path_type=Path), help="Write the result.")
@click.option(
    "--weight", metavar="W", callback=_weight, default="1", show_default=True, help="What these values count."
)
@click.option(
    "--rounds", metavar="N|auto", callback=_rounds, default="auto", show_default=True, help="auto gives the exact mean."
)
@click.option("--epoch", type=click.IntRange(0, 2**63 - 1), help="Meet only peers with the same number.")
@click.option("--min-peers", type=click.IntRange(1, 2**31 - 1), default=1, help="Begin when so many are here, with us.")
@click.option(
    "--codec",
    metavar="NAME|PATTERN=NAME,...",
    default="float32",
    show_default=True,
    help="How values travel: float32, float16, bfloat16, flash8, flash4-8, flash4+anchored, ..., auto; or for each "
    "tensor its own, as in '*.bias=float32,size<4096=float32,*=flash8'.",
)
@click.option("--compressor", callback=_compressor, expose_value=False, default="dense", hidden=True)
@click.option(
    "--transport",
    type=click.Choice(["reliable", "lossy", "auto"]),
    default="reliable",
    show_default=True,
    help="lossy: packets that are lost are not sent again, the mean is estimated from the others; auto: where that "
    "is faster. All peers alike.",
)
@click.option(
    "--reliable-every",
    metavar="R|auto",
    callback=_every,
    default="auto",
    show_default=True,
    help="With lossy and auto: each R-th averaging loses nothing.",
)
@click.option("--name", metavar="SESSION", default="default", show_default=True, help="Other names never meet.")
@click.option("--joining", type=click.Choice(["receive", "contribute"]), default="contribute", show_default=True)
@click.option("--allow-alone", is_flag=True, help="Nobody else is no failure: OUT gets IN's values.")
@click.option("--timeout", metavar="SECONDS", callback=_timeout, default="60", show_default=True)
@socket_flag
@json_flag
def average(
    *,
    source: Path,
    output: Path | None,
    weight: float,
    rounds: int,
    epoch: int | None,
    min_peers: int,
    codec: str,
    transport: str,
    reliable_every: int,
    name: str,
    joining: str,
    allow_alone: bool,
    timeout: float,
    socket: Path,
    as_json: bool,
) -> None:
    """Average a file of tensors with the swarm, once. Without -o only the receipt is printed."""
    from moshpitd.cli import forms, one_shot

    wish = one_shot.Wish(
        source=source,
        output=output,
        weight=weight,
        rounds=rounds,
        epoch=epoch,
        min_peers=min_peers,
        codec=codec,
        transport=transport,
        reliable_every=reliable_every,
        name=name,
        joining=joining,
        allow_alone=allow_alone,
        timeout_s=timeout,
    )
    receipt = one_shot.average(wish, socket)
    alone = forms.OUTCOMES[receipt.outcome] == "alone"
    if as_json:
        _print_json(forms.receipt(receipt))
    else:
        from moshpitd.cli import tables

        tables.receipt(receipt, str(output) if output and (not alone or allow_alone) else None)
    if alone and not allow_alone:
        why = receipt.why or "nobody else was there"
        raise Failure(ExitCode.NO_GROUP, f"{why}; nothing was written (--timeout waits longer, --allow-alone accepts)")


@main.command()
@socket_flag
@json_flag
def status(socket: Path, as_json: bool) -> None:
    """How the daemon is doing. Exit 0 when it is ready, 4 when not, 3 when it is not there."""
    from moshpitd.cli import forms

    with _daemon(socket) as daemon:
        answer = daemon.status()
    if as_json:
        _print_json(forms.status(answer))
    else:
        from moshpitd.cli import tables

        tables.status(answer)
    if not answer.ready:
        raise SystemExit(ExitCode.NOT_HEALTHY)


@main.command()
@socket_flag
@json_flag
def peers(socket: Path, as_json: bool) -> None:
    """The other daemons this one knows."""
    from moshpitd.cli import forms

    with _daemon(socket) as daemon:
        answer = daemon.peers()
    if as_json:
        _print_json({"peers": forms.peers(answer.peers)})
    else:
        from moshpitd.cli import tables

        tables.peers(answer.peers)


@main.command()
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Averagings to show.")
@socket_flag
@json_flag
def rounds(limit: int, socket: Path, as_json: bool) -> None:
    """The last averagings with their rounds, newest first."""
    from moshpitd.cli import forms

    with _daemon(socket) as daemon:
        answer = daemon.rounds(limit=limit)
    if as_json:
        _print_json({"averagings": [forms.receipt(receipt) for receipt in answer.receipts]})
    else:
        from moshpitd.cli import tables

        tables.rounds(answer.receipts)


@main.command()
@click.argument("which", metavar="ROUND")
@socket_flag
@json_flag
def explain(which: str, socket: Path, as_json: bool) -> None:
    """Tell an averaging in plain sentences. ROUND is its epoch (7), one of its rounds (7.1), or `last`."""
    from moshpitd.cli import forms
    from moshpitd.cli.explain import read_round, sentences

    try:
        epoch, round_ = read_round(which)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="ROUND") from error
    with _daemon(socket) as daemon:
        own = daemon.status().peer_id
        found = list(daemon.rounds(limit=1 if epoch is None else 20, epoch=epoch).receipts)
        if round_ is not None:
            found = [receipt for receipt in found if any(each.round == round_ for each in receipt.rounds)]
        if not found:
            known = [receipt.epoch for receipt in daemon.rounds(limit=1000).receipts]
            there = f"it remembers {min(known)} to {max(known)}" if known else "it remembers none yet"
            raise Failure(ExitCode.FAILED, f"the daemon knows no averaging {which}; {there} (`moshpitd rounds`)")
    told = [list(sentences(receipt, round_, own)) for receipt in found]
    if as_json:
        pairs: list[Json] = [
            {"receipt": forms.receipt(receipt), "told": [*lines]} for receipt, lines in zip(found, told, strict=True)
        ]
        _print_json({"averagings": pairs})
    else:
        click.echo("\n\n".join("\n".join(lines) for lines in told))


@main.command("id")
@socket_flag
@json_flag
def id_(socket: Path, as_json: bool) -> None:
    """The daemon's peer id."""
    with _daemon(socket) as daemon:
        peer_id = daemon.status().peer_id
    if as_json:
        _print_json({"peer_id": peer_id})
    else:
        click.echo(peer_id)


@main.group()
def config() -> None:
    """The configuration."""


@config.command()
@click.option("--offline", is_flag=True, help="Ask no daemon: show what `run` with these flags would use.")
@settings_flags
@json_flag
def show(*, offline: bool, as_json: bool, **flags: str | tuple[str, ...] | None) -> None:
    """Every setting, its value and where it came from: of the running daemon, or --offline of the next one."""
    if offline or any(given for name, given in flags.items() if name != "socket"):
        values: list[tuple[str, str, str]] = [(each.name, each.value, each.source) for each in _load(flags).values]
    else:
        path = flags["socket"] or os.environ.get("MOSHPITD_SOCKET") or default_socket(os.environ)
        assert isinstance(path, str | Path)
        with _daemon(Path(path)) as daemon:
            answer = daemon.config()
        values = [(each.name, each.value, each.source) for each in answer.values]
    if as_json:
        from moshpitd.cli import forms

        _print_json(forms.config(values))
    else:
        from moshpitd.cli import tables

        tables.config(values)


@main.command()
@simulation_flags
@json_flag
@click.pass_context
def simulate(ctx: click.Context, **flags: Unpack[SimulationFlags]) -> None:
    """Run a swarm on paper: the daemon's own machines under virtual time, with seeded faults.

    The same options and seed give the same result, to the byte. Exit 1 when what must always hold did not.

    64 peers, 3 % of them absent, two slow uplinks; which group size?

        moshpitd simulate --peers 64 --absent 0.03 --link slow:2:up=5MB --vector-bytes 64MB --group-size-max 8

    32 trainers that accumulate 12 micro-batches of 80 ms; would they gain by a compute budget?

        moshpitd simulate --drop-compute --peers 32 --micro-batch 80ms --noise 0.3 --exchange 500ms
    """
    from moshpitd.cli import simulate as simulation
    from moshpitd.cli.simulation_flags import read

    typed = {name for name in flags if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if flags["drop_compute"]:
        from moshpitd.cli import drop_compute

        drop_compute.show(drop_compute.read(flags, typed), as_json=flags["as_json"])
        return
    options = read(flags, typed)
    if flags["seeds"] > 1:
        seeds = simulation.run_seeds(options, flags["seeds"])
        simulation.show_seeds(seeds, options, lambda seed: _replay(ctx, seed), as_json=flags["as_json"])
    else:
        report = simulation.run(options, plot=flags["plot"], trace=flags["trace"])
        simulation.show(report, options, _replay(ctx, report.seed), as_json=flags["as_json"])


@main.group()
def bench() -> None:
    """What this machine can do. Asks no daemon."""


@bench.command()
@click.option("--codec", "names", metavar="NAME", multiple=True, help="This one; repeatable.  [a choice of all]")
@click.option("--file", metavar="IN.safetensors", type=click.Path(path_type=Path), help="Your tensors' error, too.")
@json_flag
def codecs(*, names: tuple[str, ...], file: Path | None, as_json: bool) -> None:
    """Each codec's speed on one core, its bits an element and its error. Takes some seconds."""
    from moshpitd.cli import codec_bench

    found = codec_bench.run(names, file)
    if as_json:
        _print_json(codec_bench.form(found))
    else:
        codec_bench.show(found)


def _replay(ctx: click.Context, seed: int) -> str:
    """The command that runs this seed again, alone."""
    words = ["moshpitd", "simulate"]
    for param in ctx.command.params:
        name = param.name or ""
        given = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in ("seed", "seeds", "plot", "trace", "as_json"):
            value = ctx.params[name]
            for each in value if isinstance(value, tuple) else (value,):
                words += [param.opts[0]] if each is True else [param.opts[0], str(each)]
    return shlex.join([*words, "--seed", str(seed)])


@bench.command("wait-avoiding")
@click.option(
    "--part",
    "parts",
    type=click.Choice(["exact", "late", "race", "spread"]),
    multiple=True,
    default=("exact", "late", "race", "spread"),
    help="This one; repeatable.  [all]",
)
@click.option("--steps", type=click.IntRange(20, 10_000), default=60, show_default=True, help="Of each run.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@json_flag
def wait_avoiding(*, parts: tuple[str, ...], steps: int, seed: int, as_json: bool) -> None:
    """Wait-avoiding averaging on real daemons, beside synchronous averaging: trainers that sleep, some of them late.

    exact: all punctual, the mean after one version an axis. late: one sleeps 2 s, how long do the others' calls take?
    race: two of eight late by 320 ms in steps of 100, step times of each way. spread: how far 16 models are apart.
    """
    from moshpitd.cli import wait_avoiding_bench

    wait_avoiding_bench.show(wait_avoiding_bench.run(parts=parts, steps=steps, seed=seed), as_json=as_json)


@bench.command("compute-budget")
@click.option("--peers", type=click.IntRange(2, 64), default=8, show_default=True, help="Daemons, each with a trainer.")
@click.option("--steps", type=click.IntRange(10, 10_000), default=100, show_default=True, help="With a tau.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@json_flag
def compute_budget(*, peers: int, steps: int, seed: int, as_json: bool) -> None:
    """Compute budgets on real daemons: trainers that sleep as long as the authors' noise says, and learn.

    Twelve micro-batches of 10 ms and noise a step, once without a budget and once with, the same noise in both.
    """
    from moshpitd.cli import compute_budget_bench

    compute_budget_bench.show(compute_budget_bench.run(peers=peers, steps=steps, seed=seed), as_json=as_json)


@bench.command("packet-loss")
@click.option(
    "--part",
    "parts",
    type=click.Choice(["bias", "drift", "rounds", "training", "loopback"]),
    multiple=True,
    default=("bias", "drift", "rounds", "training", "loopback"),
    help="This one; repeatable.  [all]",
)
@click.option(
    "--rounds", type=click.IntRange(2, 10_000), default=100, show_default=True, help="Of 4 MB, for each kind of link."
)
@click.option("--steps", type=click.IntRange(40, 100_000), default=300, show_default=True, help="Of peers that learn.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@json_flag
def packet_loss(*, parts: tuple[str, ...], rounds: int, steps: int, seed: int, as_json: bool) -> None:
    """Lossy rounds: what their results are worth, and how long they take where packets are lost.

    bias: how far estimates lean and scatter. drift: how far members are apart, on paper and on daemons. rounds: four
    daemons, 4 and 64 MB, 0 to 10 % loss, beside gRPC. training: eight peers learn digits. loopback: what one process
    tells another, and its cost. Daemons need network namespaces: root, ip, tc and iptables.
    """
    from moshpitd.cli import packet_loss_bench

    figures = packet_loss_bench.run(parts=parts, rounds=rounds, steps=steps, seed=seed)
    packet_loss_bench.show(figures, as_json=as_json)


@main.command()
@json_flag
def version(as_json: bool) -> None:
    """The version of this command."""
    if as_json:
        _print_json({"version": moshpitd.__version__})
    else:
        click.echo(moshpitd.__version__)


def _load(flags: Flags) -> Config:
    try:
        return load(flags, os.environ)
    except ConfigError as error:
        raise Failure(ExitCode.USAGE, str(error)) from error


def _daemon(socket: Path) -> Daemon:
    from moshpitd.cli.connection import Daemon

    return Daemon(socket)


def _print_json(form: Json) -> None:
    click.echo(json.dumps(form))
