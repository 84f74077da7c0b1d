"""What a driver runs: the common face of the machines that keep one trainer's stay, and which of them it gets.

Knows the verbs. Does not know what any machine does with them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from moshpitd.averaging.all_reduce import Outgoing
from moshpitd.averaging.compute_budget import BudgetOptions
from moshpitd.averaging.effects import Effect
from moshpitd.averaging.link import LinkRates
from moshpitd.averaging.membership import Credentials
from moshpitd.averaging.messages import Chunk, Message, Record, Sighting
from moshpitd.averaging.names import GroupId, Key, PeerId, Rank
from moshpitd.averaging.session import (
    Call,
    Load,
    Session,
    SessionConfig,
    SessionOptions,
    SessionStatus,
    Whereabouts,
)
from moshpitd.averaging.vector import Vector
from moshpitd.averaging.wait_avoiding import WaitAvoiding


class Machine(Protocol):
    """See Session, whose verbs these are."""

    options: SessionOptions

    @property
    def key(self) -> Key:
        """Where its sessions announce themselves; messages are addressed to it."""
        ...

    @property
    def last_k(self) -> int: ...
    @property
    def result(self) -> Vector: ...
    @property
    def contribution(self) -> Vector | None: ...

    def set_budget(self, options: BudgetOptions, now: float) -> None: ...
    def weighed(self, call: Call, now: float) -> Call: ...
    def start(self, call: Call, vector: Vector, now: float, *, spares: Sequence[Vector] = ()) -> None: ...
    def abandon(self, now: float) -> None: ...
    def close(self, now: float) -> None: ...
    def relocate(self, here: Whereabouts, now: float) -> None: ...

    def receive(self, message: Message, sender: PeerId, now: float) -> None: ...
    def peer_lost(self, peer: PeerId, why: str, now: float) -> None: ...
    def roster_received(self, key: Key, sightings: list[Sighting[Record]], now: float) -> None: ...
    def chunk_received(self, group_id: GroupId, sender: Rank, chunk: Chunk, now: float) -> None: ...
    def stream_opened(self, group_id: GroupId, rank: Rank, transport: str) -> None: ...
    def stream_lost(self, group_id: GroupId, rank: Rank, why: str, now: float) -> None: ...
    def compute_finished(self, group_id: GroupId, job_id: int, value: object, now: float) -> None: ...
    def next_outgoing(self, group_id: GroupId, rank: Rank) -> Outgoing | None: ...
    def handle_timer(self, now: float) -> None: ...
    def next_deadline(self) -> float | None: ...
    def take_effects(self) -> list[Effect]: ...

    def is_free(self, spare: Vector) -> bool:
        """Whether no job may still write to this buffer."""
        ...

    def holds(self, vector: Vector) -> bool:
        """Whether the trainer must not write into this buffer, though no call is under way."""
        ...

    def status(self, now: float) -> SessionStatus: ...
    def load(self) -> Load: ...
    def known_peers(self) -> list[tuple[PeerId, str, bool]]: ...


def machine_for(
    options: SessionOptions,
    config: SessionConfig,
    here: Whereabouts,
    credentials: Credentials,
    rng: random.Random,
    link: LinkRates,
    *,
    last_k: int,
    now: float,
) -> Machine:
    """The machine that these options ask for. Raises InvalidInput for impossible ones."""
    kind = WaitAvoiding if options.wait_avoidance else Session
    return kind(options, config, here, credentials, rng, link, last_k=last_k, now=now)
