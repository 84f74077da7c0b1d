"""What the daemon says, as tables and lines for people. Loaded only where a person reads: rich takes its time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moshpitd.averaging.names import PeerId, short
from moshpitd.cli.forms import OUTCOMES
from moshpitd.local.v1 import daemon_pb2 as pb

COLOURS = {"complete": "green", "partial": "yellow", "alone": "red", "live": "green", "suspect": "yellow"}


def status(message: pb.GetStatusResponse) -> None:
    state = "draining" if message.draining else "ready" if message.ready else "not ready"
    colour = "green" if state == "ready" else "yellow"
    reason = f": waiting for {escape(message.waiting_for)}" if message.waiting_for and not message.ready else ""
    dialable = {True: "yes", False: "no: others cannot open connections to it"}[message.dialable]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("state", f"[{colour}]{state}[/]{reason}")
    facts.add_row("swarm", f"{escape(message.swarm)}, {_count(message.peers, 'other peer')}")
    facts.add_row("peer id", message.peer_id)
    bulk = f"; chunks over plain TCP at port {message.bulk_port}" if message.bulk_port else "; chunks over gRPC only"
    facts.add_row("listens", f"{message.listen}, announced as {message.announce or 'nothing'}{bulk}")
    facts.add_row("dialable", dialable if message.HasField("dialable") else "not known yet")
    facts.add_row("bandwidth", f"{_rate(message.bandwidth.up_bytes_s)} out, {_rate(message.bandwidth.down_bytes_s)} in")
    if message.datagrams.sent or message.datagrams.received or message.datagrams.refused:
        facts.add_row("packets", _packets(message.datagrams))
    facts.add_row("process", f"{message.pid}, version {message.version}, up {duration(message.uptime_seconds)}")
    console = Console()
    console.print(facts, soft_wrap=True)
    if message.sessions:
        table = _table("session", "state", "epoch", "grid", "cell", "live", "vector", "codec", "trainers", "averagings")
        for session in message.sessions:
            table.add_row(
                escape(session.name),
                escape(f"{session.state}: {session.waiting_for}" if session.waiting_for else session.state),
                str(session.epoch),
                session.grid or "-",
                ",".join(map(str, session.cell)) or "-",
                str(session.live_sessions),
                amount(session.vector_bytes),
                escape(session.codec),
                escape(_trainers(session.trainers)),
                ", ".join(f"{count} {name}" for name, count in sorted(session.averagings.items()) if count) or "-",
            )
        console.print(table)
        for session in message.sessions:
            if session.differs:
                console.print(escape(f"{session.name}: {session.differs}"), soft_wrap=True, highlight=False)
            if session.HasField("budget"):
                console.print(
                    f"compute budget of {escape(session.name)}: {escape(budget(session.budget))}", soft_wrap=True
                )
            if session.HasField("cohort"):
                console.print(escape(f"{session.name}: {_cohort(session.cohort)}"), soft_wrap=True, highlight=False)


def budget(message: pb.ComputeBudget) -> str:
    """A compute budget in words."""
    tau = f"tau {message.tau_seconds * 1e3:.4g} ms" if message.tau_seconds else "no tau"
    found = (
        f"; found from {message.tables} peers, expected {message.expected_speedup:.3f} times as fast with "
        f"{message.expected_drop_rate:.1%} dropped"
        if message.tables
        else ""
    )
    seen = f"; here {message.speedup:.3f} times as fast" if message.speedup else ""
    return f"{tau}, {message.state}{found}{seen}; {message.drop_rate:.1%} dropped here"


def _cohort(cohort: pb.Cohort) -> str:
    """ "version 17 of a cohort of 8, barrier at 20; 14 fresh, 2 merged, ..."."""
    counts = cohort.counts
    there = (
        f"version {cohort.version} of a cohort of {cohort.live}"
        + (f" (it began with {cohort.members})" if cohort.live < cohort.members else "")
        + f", barrier at {cohort.barrier}"
        if cohort.cohort
        else "in no cohort until the next barrier"
    )
    return (
        f"{there}; {counts['fresh']} fresh, {counts['merge']} merged, {_count(counts['barrier'], 'barrier')}, "
        f"{counts['alone']} alone; {counts['activations']} begun by this trainer, {counts['passive']} run without it, "
        f"{counts['skipped']} skipped; models at most {_count(cohort.staleness_max, 'version')} old"
    )


def _trainers(trainers: Sequence[pb.TrainerStatus]) -> str:
    """ "3 shared-memory, 1 stream: switched off": how many, by the way their values take."""
    ways = Counter(
        f"{each.transport}: {each.transport_why}" if each.transport_why else each.transport for each in trainers
    )
    return ", ".join(f"{count} {way}" for way, count in ways.items())


def peers(messages: Iterable[pb.Peer]) -> None:
    table = _table("peer", "address", "state", "heard", "sessions")
    for peer in messages:
        heard = f"{duration(peer.seconds_since_heard)} ago" if peer.HasField("seconds_since_heard") else "never"
        table.add_row(
            _short(peer.peer_id),
            escape(peer.address) or "cannot be dialled",
            _coloured(peer.state),
            heard,
            escape(", ".join(peer.sessions)),
        )
    _print(table, "no other peers known")


def config(values: Iterable[tuple[str, str, str]]) -> None:
    table = _table("setting", "value", "from")
    for name, value, source in values:
        table.add_row(name, escape(value), source)
    _print(table, "no settings")


def rounds(receipts: Iterable[pb.Receipt]) -> None:
    """One line a round, newest averaging first."""
    table = _table("round", "session", "outcome", "group", "axis", "leader", "time", "out", "in", "dropped")
    for receipt in receipts:
        if not receipt.rounds:
            table.add_row(str(receipt.epoch), escape(receipt.session), _coloured(OUTCOMES[receipt.outcome]))
        for round_ in receipt.rounds:
            table.add_row(
                f"{receipt.epoch}.{round_.round}",
                escape(receipt.session),
                _coloured(OUTCOMES[round_.outcome]),
                str(len(round_.members)),
                str(round_.axis),
                _short(round_.leader),
                f"{round_.seconds.total or round_.seconds.matchmaking + round_.seconds.reduce:.3f} s",
                amount(round_.bytes.sent),
                amount(round_.bytes.received),
                ", ".join(_short(dropped.peer) for dropped in round_.dropped),
            )
    _print(table, "no averagings yet")


def receipt(message: pb.Receipt, output: str | None) -> None:
    """What the one-shot averaging says at its end."""
    outcome = OUTCOMES[message.outcome]
    others = _count(len(message.peers), "other peer")
    if message.local.trainers > 1:
        others += f" and {_count(message.local.trainers - 1, 'other trainer')} of this daemon"
    Console().print(
        f"{_coloured(outcome)}: averaging {message.epoch} with {others} in {message.seconds.total:.2f} s"
        + (f", grid {message.grid}" if message.grid else "")
        + (f" ({escape(message.why)})" if message.why else "")
        + (f" -> {escape(output)}" if output else ""),
        soft_wrap=True,
    )


def amount(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _packets(line: pb.Datagrams) -> str:
    """Of lossy rounds."""
    told = f"{line.sent:,} out, {line.received:,} in, {line.refused:,} refused"
    return told + (f"; none passes to {_count(line.peers_blocked, 'peer')}" if line.peers_blocked else "")


def _rate(bytes_s: float) -> str:
    return f"{amount(round(bytes_s))}/s" if bytes_s else "not known"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _table(*columns: str) -> Table:
    # Ten columns of a usual round fit a terminal of 80 only like this.
    padding = 1 if len(columns) > 9 else 2
    table = Table(box=None, header_style="bold", padding=(0, padding, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table, nothing: str) -> None:
    Console().print(table if table.row_count else nothing)


def _coloured(word: str) -> str:
    return f"[{COLOURS[word]}]{word}[/]" if word in COLOURS else escape(word)


def _short(peer: str) -> str:
    return short(PeerId(peer))


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
