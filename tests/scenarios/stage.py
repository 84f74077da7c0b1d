"""The stage on which the stories are played: a few named peers under virtual time, and everything that watches them.

Knows how to open a swarm, let trainers call, wait for a moment to strike in, and write down what happened: what peers
say to each other, what they log, what their receipts say. Does not know any story. The production machines play; all
checkers of the simulator look on.

In a trace, `ann -> ben: Join 1.0` is a message as it is sent, `ann: ...` what she logs, `** ...` what befalls the
swarm, and `== ...` what a trainer is told: for each round the group by rank, who reduced which chunks of the vector,
and of whom, where that is not everybody. `ann => ben` is a chunk when it has come, where a story shows them. Begin
lists the members by rank. Ann holds 1 everywhere, ben 2, cat 4, dan 8, eva 16: a mean tells whose it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moshpitd.averaging.effects import Send
from moshpitd.averaging.grid import Plan, grid_key, leadership
from moshpitd.averaging.messages import Chunk, Group, PlanNotice
from moshpitd.averaging.names import PeerId, Rank
from moshpitd.averaging.receipt import Outcome, Receipt, RoundReceipt
from moshpitd.averaging.session import Call, SessionConfig, SessionOptions
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.checkers import (
    Agreement,
    Bounds,
    Checker,
    Conservation,
    Contraction,
    HonestReceipts,
    Leaks,
    Liveness,
)
from moshpitd.simulation.history import History
from moshpitd.simulation.network import Weather
from moshpitd.simulation.swarm import SWARM, Array, Ending, Observer, Peer, Swarm, options_for

CHUNK = 4096
ROW = 128
"""Elements; spans and chunks are multiples of it."""
HELD = {"ann": 1.0, "ben": 2.0, "cat": 4.0, "dan": 8.0, "eva": 16.0}
BEGINS_AT = 2.0
"""When the curtain rises, after the peers have met."""
SETTLE_S = 40.0
SEEDS_TRIED = 5000


@dataclass(frozen=True, slots=True)
class Scene:
    """How things stand when a story begins."""

    seed: int = 0
    cast: str = "ann ben cat dan"
    leads_in: int | None = None
    """The averaging in whose first round the cast would lead in the order in which it is named."""
    met: bool = True
    """Averaging 0 is over and was complete; else they only know each other and their plan."""
    acquainted: bool = True
    """They opened together, long ago; else nobody is here yet and the story opens them."""
    grid: str = ""
    group_size_max: int = 4
    chunks: int = 4
    """Of the vector."""
    rounds: int = 0
    compressor: str = "dense"
    """With another the vector is a matrix, and what a trainer holds falls from row to row, or rises: see `uneven`."""
    show_messages: bool = True
    show_chunks: bool = False
    weather: Weather = field(default_factory=Weather)


@dataclass(frozen=True, slots=True)
class Story:
    """What happens, and what must come of it."""

    name: str
    text: str
    scene: Scene
    play: Callable[[Stage], None]

    def told(self, tell: Callable[[str], None] = lambda line: None) -> str:
        """Play it; the trace. Raises AssertionError when its point is missed or a checker complains."""
        lines: list[str] = []

        def write(line: str) -> None:
            lines.append(line)
            tell(line)

        write(f"{self.name}, seed {self.scene.seed}")
        for line in self.text.splitlines():
            write(f"  {line.strip()}" if line.strip() else "")
        write("")
        stage = Stage(self.scene, write)
        self.play(stage)
        stage.finish()
        return "\n".join(lines) + "\n"


class Stage(Observer):
    """A swarm, its cast, its checkers. `now` is virtual."""

    def __init__(self, scene: Scene, write: Callable[[str], None]) -> None:
        self.scene = scene
        self.contraction = Contraction()
        self.checkers: list[Checker] = [
            Agreement(),
            HonestReceipts(),
            Conservation(),
            Bounds(),
            Leaks(),
            Liveness(),
            self.contraction,
        ]
        self.held = dict(HELD)
        """What a trainer puts in next, by name: a number that it holds everywhere."""
        self.swarm = Swarm(scene.seed, scene.weather, _config(scene), keep_messages=True)
        self.swarm.observers += [History(list(self.checkers)), self]
        self.swarm.trace_messages = scene.show_messages
        self._whens: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._chunk_whens: list[tuple[Callable[[Peer, Peer, Chunk], bool], Callable[[], None]]] = []
        self._begun: list[tuple[float, str]] = []
        self.cast: list[Peer] = []
        if scene.acquainted:
            self.cast = _acquaint(self.swarm, scene)
            _check_cast(self.swarm, scene, self.cast)
        if scene.met:
            assert {r.outcome for r in self.average(*self.cast).values()} == {Outcome.COMPLETE}
        self.swarm.run_for(BEGINS_AT - self.now)
        self.swarm.clock.after_event = self._look
        self.swarm.on_chunk = self._chunk_arrived
        self.swarm.trace = write

    @property
    def now(self) -> float:
        return self.swarm.now

    # ---- what a story does

    def open(self, name: str, *, last_k: int = -1, joining: str = "receive", dialable: bool = True) -> Peer:
        options = replace(_options(self.scene), joining=joining)
        peer = self.swarm.open(name, options, last_k=last_k, dialable=dialable)
        self.cast = [*(p for p in self.cast if p.name != name), peer]
        return peer

    def call(self, peer: Peer, *, after_s: float = 0.0, timeout_s: float = 20.0, epoch: int | None = None) -> None:
        """Its trainer calls then, with what it holds."""

        def start() -> None:
            self.swarm.note(f"{peer.name}'s trainer calls, holding {self.held[peer.name]:g}")
            values = np.full(self.scene.chunks * CHUNK, self.held[peer.name], np.float32)
            if self.scene.compressor != "dense":
                values = uneven(values, falling=peer.name in ("ann", "ben"))
            self.swarm.start_if_alive(peer, Vector.of({"w": values}), Call(timeout_s=timeout_s, epoch=epoch))

        self.swarm.at(self.now + after_s, start)

    def average(
        self, *peers: Peer, timeout_s: float = 20.0, epoch: int | None = None, limit_s: float = 60.0
    ) -> dict[Peer, Receipt]:
        """All call, a millisecond apart, and end; what those are told that live to hear it."""
        for number, peer in enumerate(peers):
            self.call(peer, after_s=number / 1000, timeout_s=timeout_s, epoch=epoch)
        return self.ended(*peers, limit_s=limit_s)

    def ended(self, *peers: Peer, limit_s: float = 60.0) -> dict[Peer, Receipt]:
        """Wait until each has ended the averaging that it is in or about to call for."""
        before = {peer: len(peer.endings) for peer in peers}
        self.swarm.run_until(lambda: all(len(p.endings) > n or not p.alive for p, n in before.items()), limit_s)
        return {peer: peer.endings[n].told for peer, n in before.items() if len(peer.endings) > n}

    def train(self, peer: Peer) -> None:
        """Its trainer calls again and again, a third of a second after each end."""

        def again(_: Ending | None = None) -> None:
            self.swarm.at(self.now + 1 / 3, lambda: self.call(peer) if peer.on_end else None)

        peer.on_end = again
        again()

    def stop_training(self) -> dict[Peer, Receipt]:
        """Nobody calls again; the last that each is told."""
        for peer in self.swarm.living():
            peer.on_end = None
        self.swarm.run_until(lambda: not any(peer.busy for peer in self.swarm.living()))
        return {peer: peer.endings[-1].told for peer in self.swarm.living()}

    def when(self, condition: Callable[[], bool], deed: Callable[[], None]) -> None:
        """Strike right after the event that makes it true."""
        self._whens.append((condition, deed))

    def when_chunk(self, condition: Callable[[Peer, Peer, Chunk], bool], deed: Callable[[], None]) -> None:
        """Strike when such a chunk has come: its sender, who gets it, the chunk."""
        self._chunk_whens.append((condition, deed))

    def lose(self, kind: type, sender: Peer, receiver: Peer, *, times: int = 1) -> None:
        """So many messages of this kind do not arrive."""
        left = itertools.count(times, -1)
        earlier = self.swarm.swallow

        def swallow(peer: Peer, send: Send) -> bool:
            if earlier and earlier(peer, send):
                return True
            chosen = isinstance(send.message, kind) and peer.name == sender.name and send.peer == receiver.id
            return chosen and next(left) > 0

        self.swarm.swallow = swallow

    def hide(self, ones: Sequence[Peer], others: Sequence[Peer]) -> None:
        """In the directory, neither side finds the other's leases."""
        self.swarm.note(f"the directory hides {_list(ones)} and {_list(others)} from each other")
        self.swarm.directory.unseen |= {(a.id, b.id) for a in ones for b in others}
        self.swarm.directory.unseen |= {(b.id, a.id) for a in ones for b in others}

    def show(self) -> None:
        """The directory hides nobody any more."""
        self.swarm.note("the directory shows everybody")
        self.swarm.directory.unseen.clear()

    # ---- what a story looks at

    def sent(self, kind: type, sender: Peer | None = None, receiver: Peer | None = None) -> list[Send]:
        """Since the curtain rose."""
        return [
            send
            for at, peer, send in self.swarm.sent
            if at >= BEGINS_AT
            and isinstance(send.message, kind)
            and (sender is None or peer.name == sender.name)
            and (receiver is None or send.peer == receiver.id)
        ]

    def has_sent(self, kind: type, sender: Peer, receiver: Peer | None = None) -> Callable[[], bool]:
        """A condition for `when`."""
        return lambda: bool(self.sent(kind, sender, receiver))

    def state(self, peer: Peer) -> str:
        return peer.machine.status(self.now).state

    def began(self, peer: Peer) -> int:
        """How many groups it began to reduce in since the curtain rose."""
        return sum(at >= BEGINS_AT and name == peer.name for at, name in self._begun)

    def mean(self, *peers: Peer) -> float:
        return sum(self.held[peer.name] for peer in peers) / len(peers)

    def holds(self, peer: Peer, value: float) -> bool:
        """Whether its last averaging left it with this value everywhere, but for rounding."""
        return bool(np.allclose(peer.endings[-1].values, value, rtol=1e-6))

    def plans(self) -> list[Plan]:
        """All that were ever told, by version."""
        told = {m.plan.digest: m.plan for _, _, s in self.swarm.sent if isinstance(m := s.message, PlanNotice)}
        return sorted(told.values(), key=lambda plan: (plan.version, plan.digest))

    # ---- the end

    def finish(self) -> None:
        """Let everything come to rest; nobody may complain."""
        self.swarm.trace = None
        self.swarm.swallow = None
        self.swarm.run_for(SETTLE_S)
        for checker in self.checkers:
            checker.finish(self.swarm)
        assert [complaint for checker in self.checkers for complaint in checker.complaints] == []
        assert self.swarm.protocol_errors == []
        assert not self._whens and not self._chunk_whens, "the story waited for something that never happened"

    # ---- what is written down

    def group_began(self, peer: Peer, group: Group, rank: Rank, values: Vector, now: float) -> None:
        self._begun.append((now, peer.name))

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        for line in _told(peer, ending):
            if self.swarm.trace:
                self.swarm.trace(f"{ending.at:9.4f} == {line}")

    def _look(self) -> None:
        for when in [when for when in self._whens if when[0]()]:
            self._whens.remove(when)
            when[1]()

    def _chunk_arrived(self, sender: Peer, receiver: Peer, chunk: Chunk) -> None:
        if self.scene.show_chunks and self.swarm.trace:
            what = "average" if chunk.is_average else "values"
            self.swarm.trace(f"{self.now:9.4f} {sender.name} => {receiver.name}: {what} of chunk {chunk.index}")
        for when in [when for when in self._chunk_whens if when[0](sender, receiver, chunk)]:
            self._chunk_whens.remove(when)
            self.swarm.at(self.now, when[1])


def uneven(values: Array, *, falling: bool) -> Array:
    """As rows of ROW elements, times 1, 1/2, 1/4, ... for each eighth of them, from the first on or from the last."""
    rows = values.reshape(-1, ROW)
    share = np.repeat(0.5 ** np.arange(8, dtype=np.float32), len(rows) // 8)
    return rows * (share if falling else share[::-1])[:, None]


def _told(peer: Peer, ending: Ending) -> list[str]:
    """A receipt in a few lines."""
    if ending.receipt is None:
        return [f"{peer.name} gets no average: {ending.error}"]
    receipt = ending.receipt
    found = list(dict.fromkeys(ending.values.tolist()))
    values = ", ".join(f"{value:.6g}" for value in found)
    joined = ", joined" if receipt.joined else ""
    first = f"{peer.name}: averaging {receipt.epoch} {receipt.outcome.value}{joined}, holds {values}"
    notes = [f"    {_plain(note)}" for note in receipt.notes]
    rounds = [f"    {_stage(one)}round {one.averaging}.{one.round} {_round(one)}" for one in receipt.rounds]
    return [first, *rounds, *notes]


def _stage(receipt: RoundReceipt) -> str:
    return f"{receipt.stage} in " if receipt.stage != "dense" else ""


def _round(receipt: RoundReceipt) -> str:
    if receipt.outcome is Outcome.ALONE:
        return f"alone: {_plain(receipt.why)}"
    everybody = tuple(member.peer for member in receipt.members if member.weight > 0)
    lines = [
        f"{span.start // CHUNK}-{-(-span.stop // CHUNK)} by {_names([span.reducer])}"
        + (f" of {_names(span.contributors)}" if span.contributors != everybody else "")
        for span in receipt.spans
    ]
    group = f"group {receipt.group_id.hex()[:4]} of {_names(member.peer for member in receipt.members)}"
    why = f"; {_plain(receipt.why)}" if receipt.why else ""
    return f"{receipt.outcome.value} in {group} ({', '.join(lines)}){why}"


def _names(peers: Iterable[PeerId]) -> str:
    return " ".join(peer[:8].rstrip("-") for peer in peers)


def _plain(text: str) -> str:
    """Ids are a name, filled up."""
    return " ".join(word.replace("-----", "") for word in text.split())


def _list(peers: Sequence[Peer]) -> str:
    return ", ".join(peer.name for peer in peers)


def _config(scene: Scene) -> SessionConfig:
    return SessionConfig(chunk_bytes=4 * CHUNK, group_size_max=scene.group_size_max, pin=scene.grid)


def _options(scene: Scene) -> SessionOptions:
    values = np.zeros(scene.chunks * CHUNK, np.float32)
    if scene.compressor != "dense":
        values = uneven(values, falling=True)
    return options_for(values, rounds=scene.rounds, compressor=scene.compressor)


def _acquaint(swarm: Swarm, scene: Scene) -> list[Peer]:
    """All announce at one moment and hear of all the others at the next."""
    swarm.weather = replace(scene.weather, directory=(0.005, 0.005), stale_s=0.0)
    peers = [swarm.open(name, _options(scene)) for name in scene.cast.split()]
    swarm.run_for(1.0)
    swarm.weather = scene.weather
    return peers


def _order(swarm: Swarm, scene: Scene, peers: Sequence[Peer], k: int) -> str:
    """Names in the order in which they lead the first peer's line in the first round of averaging k."""
    plan = next(m.plan for _, _, send in swarm.sent if isinstance(m := send.message, PlanNotice))
    axis = plan.axis(k, 0, scene.rounds or len(plan.sides))
    key = grid_key(SWARM, plan.terms, plan, k=k, j=0, axis=axis, cell=plan.cells[peers[0].id])
    return " ".join(peer.name for peer in sorted(peers, key=lambda peer: leadership(key, peer.id)))


def _check_cast(swarm: Swarm, scene: Scene, peers: Sequence[Peer]) -> None:
    """Who leads follows from the seed: should that ever change, say which seed casts the story as it is written."""
    if scene.leads_in is None or _order(swarm, scene, peers, scene.leads_in) == scene.cast:
        return
    for seed in range(SEEDS_TRIED):
        other = Swarm(seed, scene.weather, _config(scene), keep_messages=True)
        if _order(other, scene, _acquaint(other, scene), scene.leads_in) == scene.cast:
            raise AssertionError(f"under seed {scene.seed} others lead: give the scene seed {seed}")
    raise AssertionError(f"no seed casts {scene.cast}")
