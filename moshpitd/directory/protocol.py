"""The `kademlia` package's protocol, hardened: what a node of the DHT sends, answers and believes.

Knows datagrams, requests in flight, contacts and their strikes. Does not know why records are announced, nor how to
crawl.

    request   0x00 | id 20 | msgpack [name, [sender's node id, ...]]     sent again, with the same id, until answered
    response  0x01 | id 20 | msgpack [responder's node id, ...]          a repeat is answered anew: all are idempotent

    hello      who are you: proves by signature which peer lives at an address
    find_node  who is close to a key
    look_up    a page of a key's records, and who is close to it
    announce   the same, after merging a signed record: one exchange both publishes and reads

What differs from the package (its other requests, `store` and `find_value` among them, are not answered at all):
- A contact enters the routing table only when the peer proved at that address that it owns the node id; the id follows
  from its public key. Whoever is merely heard of, or heard from, is greeted first.
- A lost datagram costs a retransmission; a contact leaves after `strikes` silent requests in a row. Requests that were
  in flight together are one strike: they say the same thing.
- Requests are answered in the drain loop, without a task each, so a flood holds no memory; what does not have the
  expected shape is dropped and counted.
- A cancelled caller takes its request with it; nothing stays in flight longer than tries x retransmit_s.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import logging
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import umsgpack
from kademlia.node import Node
from kademlia.protocol import KademliaProtocol
from kademlia.routing import RoutingTable

from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.names import Incarnation, Key, PeerId, short
from moshpitd.directory.addresses import Address, pack_nodes, unpack_nodes
from moshpitd.directory.config import DirectoryConfig
from moshpitd.directory.records import Notary, Record, RecordRefused
from moshpitd.directory.shelf import Page, Shelf, Verdict, unpack_entries
from moshpitd.identity import NODE_ID_BYTES, Identity, node_id, peer_id, verify

log = logging.getLogger(__name__)

REQUEST, RESPONSE = 0x00, 0x01
CALL_ID_BYTES = 20
HEADER_BYTES = 1 + CALL_ID_BYTES
HELLO_CONTEXT = "moshpitd directory hello"
NONCE_BYTES = 16
OTHER_SWARM = "other swarm"
LANES_MAX = 64
CONTACTS_MAX = 4_096
NUMBER_MAX = (1 << 64) - 1
ENVELOPE_BYTES = 120
"""Of a response with a page: ids, numbers and msgpack's framing."""
RESPONSIBLE_FACTOR = 2
"""A node refuses a record only when it knows this many times `replicas` nodes nearer to the key: some may be dead."""


class Stranger(Enum):
    """Who does not become a contact, and why."""

    SILENT = "did not answer"
    OTHER_SWARM = "belongs to another swarm"
    FORGED = "answered without proving who it is"
    MYSELF = "is this very daemon"
    CLONE = "is another daemon with this daemon's identity"


@dataclass(slots=True)
class Contact:
    """A peer that proved at this address who it is."""

    peer: PeerId
    incarnation: Incarnation
    address: Address
    """Where it answered us."""
    named: Address
    """Where others are told to find it: what it announces, if it does."""
    heard_at: float
    strikes: int = 0
    struck_at: float = float("-inf")


@dataclass(slots=True)
class Counters:
    """What the directory went through since it was opened."""

    requests: int = 0
    retransmissions: int = 0
    silences: int = 0
    """Requests that were never answered."""
    evictions: int = 0
    answered: int = 0
    malformed: int = 0
    """Datagrams that were not of the expected shape."""
    records_refused: int = 0
    in_flight: int = 0
    """Requests that wait for their answer now."""


@dataclass(slots=True)
class _Call:
    answer: asyncio.Future[list[object] | None]
    datagram: bytes
    to: Address
    tries: int
    timer: asyncio.TimerHandle | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a holder answered to `look_up` or `announce`."""

    taken: bool
    nodes: tuple[Node, ...]
    epoch: int
    """The holder's incarnation: its revisions mean nothing in another."""
    cursor: int
    left: int
    head: int
    tag: int
    records: tuple[tuple[float, Record], ...]


class Owner(Protocol):
    """Who runs the protocol."""

    def spawn(self, work: Coroutine[object, object, object]) -> object:
        """Runs it to its end or to the owner's."""

    def met(self, contact: Contact) -> None:
        """A contact is new, or new at its address."""

    def met_clone(self, address: Address) -> None:
        """Another daemon, alive, has our identity."""


class ClosestTable(RoutingTable):
    """The package's buckets, with neighbours that are truly the closest: its own walk stops at the first k it meets."""

    def find_neighbors(self, node: Node, k: int | None = None, exclude: Node | None = None) -> list[Node]:
        """The k contacts nearest to the node."""
        known = (
            one for bucket in self.buckets for one in bucket.get_nodes() if exclude is None or one.id != exclude.id
        )
        return heapq.nsmallest(k or self.ksize, known, key=node.distance_to)


@dataclass(slots=True)
class _Meetings:
    """Whom we greet, and whom not again so soon."""

    limit: int
    running: set[Address] = field(default_factory=set)
    again_at: OrderedDict[Address, float] = field(default_factory=OrderedDict)

    def may_begin(self, at: Address, now: float) -> bool:
        return at not in self.running and len(self.running) < self.limit and self.again_at.get(at, now) <= now

    def end(self, at: Address, again_at: float) -> None:
        self.running.discard(at)
        self.again_at[at] = again_at
        self.again_at.move_to_end(at)
        if len(self.again_at) > 16 * self.limit:
            self.again_at.popitem(last=False)


class HardenedProtocol(KademliaProtocol):
    """One node of one swarm's DHT."""

    def __init__(
        self,
        source_node: Node,
        storage: Shelf,
        ksize: int,
        *,
        identity: Identity,
        swarm_id: bytes,
        notary: Notary,
        config: DirectoryConfig,
        clock: Callable[[], float],
        announced: Address | None,
        owner: Owner,
    ) -> None:
        """The first three are the package's; `announced` is where others shall find us, None = where they hear us."""
        super().__init__(source_node, storage, ksize)
        self.router = ClosestTable(self, ksize, source_node)
        self.contacts: dict[bytes, Contact] = {}
        self.counters = Counters()
        self.own_addresses: set[Address] = set()
        self.seen_as: dict[bytes, Address] = {}
        """Under which address a contact hears us."""
        self._shelf = storage
        self._identity = identity
        self._swarm_id = swarm_id
        self._tag = hashlib.sha256(b"moshpitd swarm tag" + swarm_id).digest()[:8]
        self._notary = notary
        self._config = config
        self._clock = clock
        self._announced = announced.pack() if announced is not None else b""
        self._owner = owner
        self._calls: dict[bytes, _Call] = {}
        self._meetings = _Meetings(config.meetings_max)
        self._clones: set[Address] = set()

    # -- asking ------------------------------------------------------------------------------------------------------

    async def meet(self, at: Address) -> Contact | Stranger:
        """Greets whoever is at the address; one who proves to be a peer of this swarm becomes a contact."""
        nonce = os.urandom(NONCE_BYTES)
        match await self._call(at, "hello", self._tag, nonce, self._announced):
            case None:
                return Stranger.SILENT
            case [
                bytes(),
                bytes() as key,
                int() as incarnation,
                bytes() as named,
                bytes() as seen,
                bytes() as rival,
                bytes() as proof,
            ]:
                pass
            case [bytes(), str(answer)] if answer == OTHER_SWARM:
                return Stranger.OTHER_SWARM
            case _:
                return Stranger.FORGED
        if not 0 <= incarnation <= NUMBER_MAX or not verify(
            key, proof, HELLO_CONTEXT, *self._greeting(self.source_node.id, nonce, incarnation, named)
        ):
            return Stranger.FORGED
        peer = peer_id(key)
        if peer == self._identity.peer_id:
            if incarnation == self._identity.incarnation:
                self.own_addresses.add(at)
                return Stranger.MYSELF
            self._meet_clone(at)
            return Stranger.CLONE
        contact = Contact(peer, Incarnation(incarnation), at, Address.unpack(named) or at, self._clock())
        if (own := Address.unpack(seen)) is not None:
            self.seen_as[node_id(peer)] = own
        self._admit(contact)
        if (other := Address.unpack(rival)) is not None and other not in self.own_addresses:
            # It knows our id at another address: our last start, most likely, or else a clone; only asking can tell.
            self._greet_later(other)
        return contact

    async def find_node(self, asked: Node, target: bytes) -> tuple[Node, ...] | None:
        """Whom a contact knows near the target; None = silent."""
        match await self._ask(asked, "find_node", target):
            case [bytes(), bytes() as nodes]:
                return self._named_nodes(nodes)
            case _:
                return None

    async def read(
        self, asked: Node, key: Key, kind: str, *, epoch: int, cursor: int, lane: int = 0, lanes: int = 1
    ) -> Reading | None:
        """A page of a holder's records, beginning after a cursor that the holder gave us; None = silent."""
        return self._understand(key, kind, await self._ask(asked, "look_up", key, kind, epoch, cursor, lane, lanes))

    async def publish(self, asked: Node, key: Key, record: Record, *, epoch: int, cursor: int) -> Reading | None:
        """The same, after handing over a record."""
        return self._understand(key, record.kind, await self._ask(asked, "announce", key, record.raw, epoch, cursor))

    def is_responsible(self, key: Key, factor: int = 1) -> bool:
        """Whether we are among the factor x replicas nodes nearest to the key, as far as we know."""
        target, limit = Node(key), factor * self._config.replicas
        mine = self.source_node.distance_to(target)
        nearer = (one for one in self.closest(target, limit) if one.distance_to(target) < mine)
        return sum(1 for _ in nearer) < limit

    def closest(self, target: Node, count: int) -> list[Node]:
        """The contacts nearest to the target."""
        return self.router.find_neighbors(target, count)

    def is_suspect(self, node: Node) -> bool:
        """Whether it was silent when last asked."""
        contact = self.contacts.get(node.id)
        return contact is not None and contact.strikes > 0

    async def _ask(self, asked: Node, name: str, *args: object) -> list[object] | None:
        """Asks a node, greeting it first if it is no contact. Silence is a strike, an answer clears them all."""
        at, begun = Address(asked.ip, asked.port), self._clock()
        contact = self.contacts.get(asked.id)
        if contact is None:
            match await self.meet(at):
                case Contact() as contact if node_id(contact.peer) == asked.id:
                    pass
                case _:
                    return None
        answer = await self._call(contact.address, name, *args)
        if answer is None:
            self._strike(asked.id, begun)
            return None
        if answer[0] != asked.id:
            # Another peer lives there now. The address is proven, the id it had is not there any more.
            self._evict(asked.id)
            self._greet_later(at)
            return None
        self._clear(contact)
        return answer

    async def _call(self, to: Address, name: str, *args: object) -> list[object] | None:
        """One request, retransmitted until answered or given up (None)."""
        if len(self._calls) >= self._config.calls_max or self.transport is None or self.transport.is_closing():
            return None
        call_id = os.urandom(CALL_ID_BYTES)
        datagram = bytes([REQUEST]) + call_id + umsgpack.packb([name, [self.source_node.id, *args]])
        assert len(datagram) <= self._config.datagram_bytes_max, f"{name} request of {len(datagram)} bytes"
        call = _Call(asyncio.get_running_loop().create_future(), datagram, to, 0)
        self._calls[call_id] = call
        self.counters.in_flight += 1
        self.counters.requests += 1
        self._send_again(call)
        try:
            return await call.answer
        finally:
            del self._calls[call_id]
            self.counters.in_flight -= 1
            if call.timer is not None:
                call.timer.cancel()

    def _send_again(self, call: _Call) -> None:
        if call.answer.done():
            return
        if call.tries == self._config.tries:
            self.counters.silences += 1
            call.answer.set_result(None)
            return
        self.counters.retransmissions += call.tries > 0
        call.tries += 1
        self.transport.sendto(call.datagram, call.to)
        call.timer = asyncio.get_running_loop().call_later(self._config.retransmit_s, self._send_again, call)

    def _understand(self, key: Key, kind: str, answer: list[object] | None) -> Reading | None:
        match answer:
            case [
                bytes(),
                bool() as taken,
                bytes() as nodes,
                int() as epoch,
                int() as cursor,
                int() as left,
                int() as head,
                int() as tag,
                bytes() as page,
            ] if all(0 <= number <= NUMBER_MAX for number in (epoch, cursor, left, head, tag)):
                pass
            case _:
                return None
        records: list[tuple[float, Record]] = []
        for ttl_s, raw in unpack_entries(page):
            try:
                record = self._notary.check(key, raw)
            except RecordRefused as refused:
                self._refuse(refused)
                continue
            if record.kind == kind:
                records.append((ttl_s, record))
        return Reading(taken, self._named_nodes(nodes), epoch, cursor, left, head, tag, tuple(records))

    def _named_nodes(self, raw: bytes) -> tuple[Node, ...]:
        """Whom an answer names, ourselves left out; contacts where we know them to be."""
        named = unpack_nodes(raw, limit=self._config.bucket)
        return tuple(self._node(one, at) for one, at in named if one != self.source_node.id)

    def _node(self, one: bytes, at: Address) -> Node:
        contact = self.contacts.get(one)
        return Node(one, *(at if contact is None else contact.address))

    async def check(self, contact: Contact) -> None:
        """Greets a contact again; silence is a strike."""
        begun = self._clock()
        one = node_id(contact.peer)
        match await self.meet(contact.address):
            case Contact(peer=contact.peer):
                pass
            case Stranger.SILENT:
                self._strike(one, begun)
            case _:
                self._evict(one)

    # -- answering ---------------------------------------------------------------------------------------------------

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """The one way in, and the one place where a peer's mistakes are caught."""
        sender, call_id = Address(*addr), data[1 : 1 + CALL_ID_BYTES]
        try:
            message = _unpack(data, limit=self._config.datagram_bytes_max)
            if data[0] == RESPONSE:
                self._take_response(call_id, message)
            else:
                response = self._answer_request(sender, message)
                datagram = bytes([RESPONSE]) + call_id + umsgpack.packb([self.source_node.id, *response])
                assert len(datagram) <= self._config.datagram_bytes_max, f"a response of {len(datagram)} bytes"
                self.transport.sendto(datagram, sender)
        except RemoteProtocolError as error:
            self.counters.malformed += 1
            log.debug("%s sent %s", sender, error)

    def _take_response(self, call_id: bytes, message: list[object]) -> None:
        call = self._calls.get(call_id)
        if call is None or call.answer.done():
            return  # answered already, or given up: retransmissions make that ordinary
        match message:
            case [bytes(), *_]:
                call.answer.set_result(message)
            case _:
                raise RemoteProtocolError("a response without its sender's node id")

    def _answer_request(self, sender: Address, message: list[object]) -> list[object]:
        match message:
            case [str() as name, [bytes() as source, *args]] if len(source) == NODE_ID_BYTES:
                pass
            case _:
                raise RemoteProtocolError("a request of an unknown shape")
        match name, args:
            case "hello", [bytes() as tag, bytes() as nonce, bytes()] if len(nonce) == NONCE_BYTES:
                if tag != self._tag:
                    return [OTHER_SWARM]
                response = self._answer_hello(source, sender, nonce)
            case "find_node", [bytes() as target] if len(target) == NODE_ID_BYTES:
                response = [self._pack_closest(target, source, self._config.bucket)]
            case "look_up", [
                bytes() as key,
                str() as kind,
                int() as epoch,
                int() as cursor,
                int() as lane,
                int() as lanes,
            ] if len(key) == NODE_ID_BYTES and 0 <= lane < lanes <= LANES_MAX:
                response = self._answer_page(source, Key(key), kind, epoch, cursor, lane, lanes, taken=False)
            case "announce", [bytes() as key, bytes() as raw, int() as epoch, int() as cursor] if (
                len(key) == NODE_ID_BYTES
            ):
                response = self._answer_announce(source, Key(key), raw, epoch, cursor)
            case _:
                raise RemoteProtocolError("a request that is not of this protocol")
        self.counters.answered += 1
        self._heard(source, sender)
        return response

    def _answer_hello(self, source: bytes, sender: Address, nonce: bytes) -> list[object]:
        rival = b""
        if (contact := self.contacts.get(source)) is not None and contact.address != sender:
            rival = contact.address.pack()
        incarnation = self._identity.incarnation
        proof = self._identity.sign(HELLO_CONTEXT, *self._greeting(source, nonce, incarnation, self._announced))
        return [self._identity.public_key, incarnation, self._announced, sender.pack(), rival, proof]

    def _answer_announce(self, source: bytes, key: Key, raw: bytes, epoch: int, cursor: int) -> list[object]:
        try:
            record = self._notary.check(key, raw)
        except RecordRefused as refused:
            self._refuse(refused)
            # Answered all the same: a peer with other limits than ours is not to take us for dead.
            return self._answer_page(source, key, "", epoch, cursor, 0, 1, taken=False)
        taken = False
        if self.is_responsible(key, RESPONSIBLE_FACTOR):
            match self._shelf.put(key, record, self._clock()):
                case Verdict.TAKEN | Verdict.KNOWN:
                    taken = True
                case Verdict.STALE | Verdict.FULL:
                    self.counters.records_refused += 1
        return self._answer_page(source, key, record.kind, epoch, cursor, 0, 1, taken=taken)

    def _answer_page(
        self, source: bytes, key: Key, kind: str, epoch: int, cursor: int, lane: int, lanes: int, *, taken: bool
    ) -> list[object]:
        after = cursor if epoch == self._identity.incarnation else 0
        # Lanes are read after a first page, which named the nodes.
        nodes = self._pack_closest(key, source, self._config.replicas) if lanes == 1 else b""
        room = self._config.datagram_bytes_max - ENVELOPE_BYTES - len(nodes)
        book = self._shelf.book(key, kind)
        page = (
            Page((), after, 0, after, 0)
            if book is None
            else book.page(after, lane=lane, lanes=lanes, room_bytes=room, now=self._clock())
        )
        return [taken, nodes, self._identity.incarnation, page.cursor, page.left, page.head, page.tag, page.pack()]

    def _pack_closest(self, target: bytes, asker: bytes, count: int) -> bytes:
        """Those who answered when last asked: the dead are not passed on."""
        near = self.router.find_neighbors(Node(target), count, Node(asker))
        live = [one for one in near if not self.is_suspect(one)]
        return pack_nodes((one.id, self.contacts[one.id].named) for one in live)

    def _greeting(self, asker: bytes, nonce: bytes, incarnation: int, named: bytes) -> tuple[bytes, ...]:
        return self._swarm_id, asker, nonce, incarnation.to_bytes(8, "big"), named

    # -- believing ---------------------------------------------------------------------------------------------------

    def _heard(self, source: bytes, sender: Address) -> None:
        """A request came. Its sender's id is a claim, worth no more than a reason to greet it."""
        contact = self.contacts.get(source)
        if contact is not None and contact.address == sender:
            self._clear(contact)
        elif sender not in self.own_addresses:
            self._greet_later(sender)

    def _greet_later(self, at: Address) -> None:
        if self._meetings.may_begin(at, self._clock()):
            self._meetings.running.add(at)
            self._owner.spawn(self._greet(at))

    async def _greet(self, at: Address) -> None:
        try:
            await self.meet(at)
        finally:
            self._meetings.end(at, self._clock() + self._config.meet_again_s)

    def _admit(self, contact: Contact) -> None:
        one = node_id(contact.peer)
        before = self.contacts.get(one)
        self.contacts[one] = contact
        self.router.add_contact(Node(one, *contact.address))
        if len(self.contacts) > CONTACTS_MAX:
            self._forget_oldest()
        if before is None or before.address != contact.address:
            log.debug("met %s at %s", short(contact.peer), contact.address)
            self._owner.met(contact)

    def _forget_oldest(self) -> None:
        oldest = min(self.contacts, key=lambda one: self.contacts[one].heard_at)
        self.router.remove_contact(Node(oldest))
        self.seen_as.pop(oldest, None)
        del self.contacts[oldest]

    def _clear(self, contact: Contact) -> None:
        contact.heard_at = self._clock()
        contact.strikes = 0

    def _strike(self, one: bytes, begun: float) -> None:
        contact = self.contacts.get(one)
        if contact is None or begun < max(contact.struck_at, contact.heard_at):
            return  # it was heard since, or this silence is the one that was counted
        contact.strikes += 1
        contact.struck_at = self._clock()
        if contact.strikes >= self._config.strikes:
            log.info("%s at %s was silent %d times: forgotten", short(contact.peer), contact.address, contact.strikes)
            self._evict(one)

    def _evict(self, one: bytes) -> None:
        if self.contacts.pop(one, None) is not None:
            self.counters.evictions += 1
            self.seen_as.pop(one, None)
            self.router.remove_contact(Node(one))

    def _meet_clone(self, at: Address) -> None:
        if at not in self._clones:
            self._clones.add(at)
            self._owner.met_clone(at)

    def _refuse(self, refused: RecordRefused) -> None:
        self.counters.records_refused += 1
        log.debug("refused %s", refused)

    # -- what the package would do on its own ------------------------------------------------------------------------

    def call_ping(self, node_to_ask: Node) -> asyncio.Future[None]:
        """The routing table asks whether the oldest contact of a full bucket still lives."""
        contact = self.contacts.get(node_to_ask.id)
        if contact is not None and self._meetings.may_begin(contact.address, self._clock()):
            self._owner.spawn(self.check(contact))
        nothing = asyncio.get_running_loop().create_future()
        nothing.set_result(None)
        return nothing

    def welcome_if_new(self, node: Node) -> None:
        """Nobody is welcome unproven, and nobody is sent records: their owners republish them."""
        raise AssertionError("the package's own requests are not answered")


def _unpack(datagram: bytes, *, limit: int) -> list[object]:
    """The message in a datagram. Nesting ends in RecursionError, lengths that lie in an UnpackException."""
    if not HEADER_BYTES < len(datagram) <= limit:
        raise RemoteProtocolError(f"a datagram of {len(datagram)} bytes")
    try:
        message = umsgpack.unpackb(datagram[HEADER_BYTES:])
    except (umsgpack.UnpackException, RecursionError, OverflowError, ValueError, TypeError, struct.error) as error:
        raise RemoteProtocolError(f"a datagram that is not msgpack ({type(error).__name__})") from error
    if not isinstance(message, list):
        raise RemoteProtocolError("a message that is not a list")
    return message
