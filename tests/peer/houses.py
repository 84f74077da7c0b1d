"""Two or more doors to other daemons, each with an inbox that keeps what it is told."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from moshpitd.averaging.all_reduce import Outgoing
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.messages import Address, Chunk, Group, Member, Message
from moshpitd.averaging.names import GroupId, Key, PeerId, Rank
from moshpitd.identity import Identity
from moshpitd.peer.channels import PeerConfig
from moshpitd.peer.door import PeerDoor

DEADLINE_S = 20.0
SWARM = b"w" * 32
SESSION = Key(b"s" * 20)
GROUP_ID = GroupId(b"g" * 16)
CONFIG = PeerConfig(dial_timeout_s=1.0, stranger_patience_s=1.0)


@dataclass
class Told:
    """An inbox that keeps what it is told, and refuses what it was told to refuse."""

    messages: list[tuple[PeerId, Message]] = field(default_factory=list)
    lost: list[tuple[PeerId, str]] = field(default_factory=list)
    chunks: list[tuple[Rank, int, bytes]] = field(default_factory=list)
    streams_lost: list[tuple[Rank, str]] = field(default_factory=list)
    opened: list[GroupId] = field(default_factory=list)
    transports: dict[Rank, str] = field(default_factory=dict)
    dialable: list[bool] = field(default_factory=list)
    outgoing: dict[Rank, list[Outgoing]] = field(default_factory=dict)
    refuses: type[Message] | None = None
    chunks_wanted: float = math.inf
    """Whoever has sent so many is ahead."""

    def message_received(self, session: Key, sender: PeerId, message: Message) -> None:
        assert session == SESSION
        if self.refuses is not None and isinstance(message, self.refuses):
            raise RemoteProtocolError("nonsense")
        self.messages.append((sender, message))

    def peer_lost(self, peer: PeerId, why: str) -> None:
        self.lost.append((peer, why))

    def chunk_received(self, session: Key, group_id: GroupId, sender: Rank, chunk: Chunk) -> None:
        assert session == SESSION
        self.chunks.append((sender, chunk.index, bytes(chunk.payload)))

    def is_ahead(self, session: Key, group_id: GroupId, rank: Rank) -> bool:
        return len(self.chunks) >= self.chunks_wanted

    def next_outgoing(self, session: Key, group_id: GroupId, rank: Rank) -> Outgoing | None:
        return self.outgoing[rank].pop(0) if self.outgoing.get(rank) else None

    def stream_opened(self, session: Key, group_id: GroupId, rank: Rank, transport: str) -> None:
        self.opened.append(group_id)
        self.transports[rank] = transport

    def stream_lost(self, session: Key, group_id: GroupId, rank: Rank, why: str) -> None:
        self.streams_lost.append((rank, why))

    def dialable_found(self, *, dialable: bool) -> None:
        self.dialable.append(dialable)


@dataclass
class House:
    """A daemon as far as this door goes."""

    identity: Identity
    door: PeerDoor
    told: Told

    @property
    def id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def address(self) -> Address:
        return Address(f"127.0.0.1:{self.door.port}")

    def callers(self) -> int:
        """TCP connections that others hold to it."""
        ports = {self.door.port, self.door.bulk_port}
        held = [each for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]
        return sum(each.laddr.port in ports for each in held)

    def say(self, to: House, message: Message, at: str | None = None) -> None:
        self.door.send(SESSION, to.id, to.address if at is None else at, message)


Houses = Callable[..., "asyncio.Future[House]"]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - it looks at several inboxes
            await asyncio.sleep(0.005)


def group_of(*houses: House, bulk_port: int | None = None) -> Group:
    """`bulk_port`: what is told of all of them, instead of the truth."""
    members = tuple(
        Member(
            each.id,
            each.identity.incarnation,
            rank,
            1.0,
            each.address,
            True,
            bulk_port=each.door.bulk_port if bulk_port is None else bulk_port,
        )
        for rank, each in enumerate(houses)
    )
    n = len(members)
    return Group(
        GROUP_ID, b"t" * 16, Key(b"k" * 20), 0, 0, 0, members[0].peer, members, (0,) * n + (8,), 4096, 9.0, (), ()
    )


def chunk(index: int, payload: bytes) -> Outgoing:
    return Outgoing(Chunk(index, 0, b"", is_average=False), lambda: payload)
