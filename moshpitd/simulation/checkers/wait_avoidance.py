"""What must hold of wait-avoiding sessions: no model too old, no version twice, one model after a barrier, none torn.

Judges what machines put in and what receipts say of it. Does not know why a trainer was late.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.messages import Group
from moshpitd.averaging.names import PeerId, Rank
from moshpitd.averaging.receipt import Receipt, VersionReceipt
from moshpitd.averaging.session import Call
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.checkers.checker import Checker
from moshpitd.simulation.history import flat
from moshpitd.simulation.swarm import Ending, Peer

Values = npt.NDArray[np.floating]
ROUNDING = 1e-6
VERSIONS_KEPT = 4096


def version_of(peer: Peer, ending: Ending) -> tuple[Receipt, VersionReceipt] | None:
    receipt = ending.receipt
    return (receipt, receipt.version) if receipt is not None and receipt.version is not None else None


class Staleness(Checker):
    """No model in a sum is more than tau versions old: every tau versions everybody posts."""

    name = "staleness"

    def __init__(self, barrier_every: int) -> None:
        super().__init__()
        self.untold = 0
        """Models whose age is not known: the word of it was lost with its connection."""
        self._most = barrier_every

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        if (told := version_of(peer, ending)) is None:
            return
        _, version = told
        for line in version.contributors:
            self.looked += 1
            if line.posted < 0:
                self.untold += 1
            elif not 0 <= version.version - line.posted <= self._most:
                self.complain(
                    ending.at, f"{peer.name} got a model of version {line.posted} in version {version.version}"
                )


class OnceEach(Checker):
    """A version runs once at each daemon, and versions run in order."""

    name = "once each"

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[PeerId, int], int] = {}

    def group_began(self, peer: Peer, group: Group, rank: Rank, values: Vector, now: float) -> None:
        if not is_version(peer, group):
            return
        self.looked += 1
        last = self._last.get((peer.id, peer.incarnation), -1)
        if group.k <= last:
            self.complain(now, f"{peer.name} runs version {group.k} after version {last}")
        self._last[peer.id, peer.incarnation] = group.k


class EqualAfterBarrier(Checker):
    """Whoever comes out of a barrier into the same cohort holds the same bits."""

    name = "equal after barriers"

    def __init__(self) -> None:
        super().__init__()
        self._bits: dict[bytes, tuple[str, bytes]] = {}

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        told = version_of(peer, ending)
        if told is None or told[1].kind != "barrier" or ending.vector is None:
            return
        self.looked += 1
        held = hashlib.sha256(ending.vector.buffer.tobytes()).digest()
        name, bits = self._bits.setdefault(told[1].cohort, (peer.name, held))
        if bits != held:
            self.complain(ending.at, f"{name} and {peer.name} hold other bits after barrier {told[1].version}")


@dataclass(slots=True)
class Sent:
    """What a version's members put in."""

    began: dict[PeerId, tuple[Values, Vector]] = field(default_factory=dict)
    """A copy, and the buffer it was read from."""


class UntornPosts(Checker):
    """What a daemon puts in is a model that its trainer posted, whole, from the version's begin to its end; and what a
    trainer gets is what the members put in, merged with its own model by the rule."""

    name = "untorn posts"

    def __init__(self) -> None:
        super().__init__()
        self._posted: defaultdict[PeerId, list[bytes]] = defaultdict(list)
        self._called_with: dict[PeerId, Values] = {}
        self._results: defaultdict[PeerId, list[bytes]] = defaultdict(list)
        self._sent: dict[tuple[PeerId, ...], dict[int, Sent]] = defaultdict(dict)

    def call_began(self, peer: Peer, call: Call, vector: Vector, now: float) -> None:
        values = flat(vector)
        self._called_with[peer.id] = values
        self._posted[peer.id] = [*self._posted[peer.id][-3:], _bits(values)]

    def group_began(self, peer: Peer, group: Group, rank: Rank, values: Vector, now: float) -> None:
        if not is_version(peer, group):
            return
        self.looked += 1
        copy = flat(values)
        if _bits(copy) not in (*self._posted[peer.id], *self._results[peer.id]):
            self.complain(now, f"{peer.name} puts into version {group.k} what its trainer never posted")
        versions = self._sent[tuple(member.peer for member in group.members)]
        versions.setdefault(group.k, Sent()).began[peer.id] = (copy, values)
        while len(versions) > VERSIONS_KEPT:
            del versions[min(versions)]

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        told = version_of(peer, ending)
        if told is None or ending.vector is None:
            return
        receipt, version = told
        result = flat(ending.vector)
        self._results[peer.id] = [*self._results[peer.id][-3:], _bits(result)]
        if version.kind not in ("fresh", "merge"):
            return
        self.looked += 1
        (round_,) = receipt.rounds
        sent = self._sent[tuple(line.peer for line in round_.members)][version.version]
        if version.kind == "fresh":
            copy, read = sent.began[peer.id]
            if not np.array_equal(flat(read), copy):
                self.complain(ending.at, f"{peer.name}'s post changed while version {version.version} read it")
        own = self._called_with[peer.id]
        for span in round_.spans:
            rows = [sent.began[one][0][span.start : span.stop].astype(np.float64) for one in span.contributors]
            if version.kind == "merge":
                rows.append(own[span.start : span.stop].astype(np.float64))
            expected = np.mean(np.stack(rows), axis=0)
            scale = max(1e-30, float(np.max(np.abs(np.stack(rows)))))
            if float(np.max(np.abs(result[span.start : span.stop] - expected))) > ROUNDING * scale:
                self.complain(ending.at, f"{peer.name} got another {version.kind} of version {version.version}")
                return


def is_version(peer: Peer, group: Group) -> bool:
    """Versions are made from a cohort; a barrier's group was found, and knows when its members came."""
    return peer.machine.options.wait_avoidance is not None and not group.arrival_offsets_s


def _bits(values: Values) -> bytes:
    return hashlib.sha256(values.tobytes()).digest()
