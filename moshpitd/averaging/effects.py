"""What machines wish done. The driver carries them out; the simulator does so in virtual time.

Knows no way of doing anything. Every wish is frozen data, but for the jobs, which are pure functions to be called once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moshpitd.averaging.messages import Group, Message, Record
from moshpitd.averaging.names import GroupId, Key, PeerId, Rank
from moshpitd.averaging.receipt import Receipt


@dataclass(frozen=True, slots=True)
class Send:
    """Tell a peer. `address` is where to dial when there is no channel yet; empty: only over an open channel."""

    peer: PeerId
    address: str
    message: Message


@dataclass(frozen=True, slots=True)
class Announce:
    """Make the record known under the key, and bring back who else is there. The newest of a slot wins."""

    key: Key
    record: Record
    ttl_s: float
    slot: str
    """lease or presence"""


@dataclass(frozen=True, slots=True)
class LookUp:
    """Bring back who is announced under the key."""

    key: Key


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take our record under the key back."""

    key: Key


@dataclass(frozen=True, slots=True)
class OpenStreams:
    """Connect the group's members for bulk data; they pull and deliver chunks by rank."""

    group: Group
    rank: Rank
    lossy_codec: str = ""
    """Of a lossy round, whose packets travel beside the streams: the name of their codec."""


@dataclass(frozen=True, slots=True)
class CloseStreams:
    """The group needs its streams no longer."""

    group_id: GroupId


@dataclass(frozen=True, slots=True)
class Sendable:
    """The bell: a pull for this member would succeed again."""

    group_id: GroupId
    rank: Rank


@dataclass(frozen=True, slots=True)
class Receivable:
    """The bell of the other direction: this member, which was ahead, may go on."""

    group_id: GroupId
    rank: Rank


@dataclass(frozen=True, slots=True)
class Compute:
    """Call `job` (at most 4 MiB of work), then hand its value back under this id."""

    group_id: GroupId
    job_id: int
    job: Callable[[], object]
    cost_bytes: int
    """Bytes it reads: a simulator's virtual cost, a driver's choice between inline and thread."""
    of_bytes: int = 0
    """... of all that are wished for at once with it: they would keep an event loop one after the other."""


@dataclass(frozen=True, slots=True)
class Progress:
    """For the trainer: what is being waited for."""

    text: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The averaging ended with an outcome; the result is in the session's hands."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Failed:
    """The averaging cannot be done; the vector is untouched."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Log:
    """A transition worth a line."""

    text: str


Effect = (
    Send
    | Announce
    | LookUp
    | Withdraw
    | OpenStreams
    | CloseStreams
    | Sendable
    | Receivable
    | Compute
    | Progress
    | Finished
    | Failed
    | Log
)
