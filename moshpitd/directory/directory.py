"""The directory's face: announce, look up, withdraw; and the tasks that keep us in the swarm.

Knows which records are ours and when they are due again, whom to join, and what we have read of which key. Does not
know what bodies mean, or how a datagram is made. The DHT is for rendezvous only: a roster says who announced, not who
is alive.

A read merges what the nearest nodes hold, ours among them where we are one. A write is the same walk: each node merges
the record and answers with what it holds, so one walk both publishes and reads, in one round trip once we know the
swarm.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kademlia.network import Server
from kademlia.node import Node

from moshpitd.averaging.announcements import Roster
from moshpitd.averaging.names import Incarnation, Key, PeerId
from moshpitd.directory.addresses import Address, AddressError, resolve, split_host_port
from moshpitd.directory.config import DirectoryConfig
from moshpitd.directory.crawl import Crawl, Question
from moshpitd.directory.protocol import (
    LANES_MAX,
    REQUEST,
    RESPONSE,
    Contact,
    Counters,
    HardenedProtocol,
    Reading,
    Stranger,
)
from moshpitd.directory.records import Notary, Record
from moshpitd.directory.remembered import RememberedPeers
from moshpitd.directory.shelf import Book, Shelf
from moshpitd.directory.socket import ClaimedTransport, DatagramSocket
from moshpitd.identity import Identity, node_id

log = logging.getLogger(__name__)

T = TypeVar("T")
RECORDS_A_LANE = 8
STALE_CONTACTS_CHECKED = 8
"""Contacts greeted again each mend interval, those not heard for longest: an idle node finds out who left."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A contact, as people see it."""

    peer: PeerId
    incarnation: Incarnation
    address: Address
    heard_s_ago: float
    strikes: int
    """Requests it left unanswered since it was last heard."""


@dataclass(slots=True)
class _Holder:
    """How far we have read one holder's book."""

    epoch: int = 0
    cursor: int = 0


@dataclass(slots=True)
class _View:
    """What we have read of one key and kind."""

    book: Book
    holders: dict[bytes, _Holder] = field(default_factory=dict)
    shelf_cursor: int = 0


@dataclass(slots=True)
class _Mine:
    """A record of ours that we keep alive."""

    key: Key
    kind: str
    body: bytes
    ttl_s: float
    due_at: float


class _Node(Server):
    """The package's server, on the daemon's socket instead of one of its own, and without its hourly republishing."""

    def __init__(
        self, node: bytes, shelf: Shelf, bucket: int, make: Callable[[Node, Shelf, int], HardenedProtocol]
    ) -> None:
        super().__init__(ksize=bucket, node_id=node, storage=shelf)
        self.protocol_class = make

    def listen_on(self, socket: DatagramSocket) -> HardenedProtocol:
        """Takes over the datagrams that begin with rpcudp's two bytes."""
        self.protocol = protocol = self.protocol_class(self.node, self.storage, self.ksize)
        self.transport = ClaimedTransport(socket, (REQUEST, RESPONSE), protocol)
        return protocol


class Directory:
    """One daemon's place in its swarm's directory. Opened and closed by whoever composes the daemon."""

    def __init__(
        self,
        identity: Identity,
        swarm_id: bytes,
        socket: DatagramSocket,
        *,
        join: Sequence[str],
        announced: Address | None,
        config: DirectoryConfig,
        clock: Callable[[], float],
        rng: random.Random,
        on_clone: Callable[[Address], None],
    ) -> None:
        """Use `Directory.open`."""
        for one in join:
            split_host_port(one)
        self._identity = identity
        self._socket = socket
        self._join = tuple(join)
        self._config = config
        self._clock = clock
        self._rng = rng
        self._on_clone = on_clone
        self._notary = notary = Notary(swarm_id, config)
        self._shelf = Shelf(config)
        self._views: OrderedDict[tuple[Key, str], _View] = OrderedDict()
        self._mine: dict[tuple[Key, str], _Mine] = {}
        self._remembered = RememberedPeers(config.remembered_file, config.remembered_max)
        self._tasks: set[asyncio.Task[object]] = set()
        self._ready = asyncio.Event()
        self._waiting_for: str | None = None
        self._fresh: dict[bytes, Contact] = {}
        self._fresh_came = asyncio.Event()
        self._mine_changed = asyncio.Event()
        self._node = _Node(
            identity.node_id,
            self._shelf,
            config.bucket,
            lambda node, shelf, ksize: HardenedProtocol(
                node,
                shelf,
                ksize,
                identity=identity,
                swarm_id=swarm_id,
                notary=notary,
                config=config,
                clock=clock,
                announced=announced,
                owner=self,
            ),
        )
        self._protocol = self._node.listen_on(socket)

    @classmethod
    async def open(
        cls,
        identity: Identity,
        swarm_id: bytes,
        socket: DatagramSocket,
        *,
        join: Sequence[str] = (),
        announced: Address | None = None,
        config: DirectoryConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        on_clone: Callable[[Address], None] = lambda address: None,
    ) -> Directory:
        """Begins to answer and to look for the swarm; `wait_ready` says when it was found.

        `join`: HOST:PORT of members; empty, with no remembered peer answering, starts a new swarm. `announced`: where
        others shall find this node when that differs from where they hear it. `on_clone` is told the address of another
        living daemon with this identity. The socket stays the caller's. Raises `AddressError`.
        """
        directory = cls(
            identity,
            swarm_id,
            socket,
            join=join,
            announced=announced,
            config=config or DirectoryConfig(),
            clock=clock,
            rng=rng or random.Random(),
            on_clone=on_clone,
        )
        directory.spawn(directory._stay_in_touch())
        directory.spawn(directory._republish())
        return directory

    async def close(self) -> None:
        """Stops answering and republishing; records not withdrawn live out their ttl at their holders."""
        self._remember()
        self._node.stop()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- what is announced -------------------------------------------------------------------------------------------

    async def announce(self, key: Key, kind: str, body: bytes, ttl_s: float, *, keep: bool = True) -> Roster:
        """Publishes our record under a key and returns all records there, ours included.

        It replaces our last one of that key and kind. With `keep` it is republished until withdrawn, else it ends with
        its ttl. Raises `DirectoryError` for what no holder would take. Cancelling it does not undo it.
        """
        record = self._notary.write(self._identity, key, kind, body, ttl_s)
        self._mine.pop((key, kind), None)
        if keep:
            due_at = self._clock() + ttl_s / self._config.republish_part
            self._mine[key, kind] = _Mine(key, kind, body, ttl_s, due_at)
            self._mine_changed.set()
        roster, taken = await self._visit(key, kind, record)
        self._retry_unless(taken, key, kind)
        return roster

    async def look_up(self, key: Key, kind: str) -> Roster:
        """All live records of a key and kind, merged over the nodes nearest to it."""
        roster, _ = await self._visit(key, kind, None)
        return roster

    async def withdraw(self, key: Key, kind: str) -> None:
        """Takes our record back: every holder that hears of it stops naming us."""
        mine = self._mine.pop((key, kind), None)
        # Older records of ours may live as long as any of them was announced for; unknown if it was not kept.
        ttl_s = self._config.ttl_s_max if mine is None else mine.ttl_s
        await self._visit(key, kind, self._notary.write(self._identity, key, kind, b"", ttl_s, withdrawn=True))

    async def _visit(self, key: Key, kind: str, record: Record | None) -> tuple[Roster, int]:
        """Walks to the key, hands over the record and reads; the roster, and how many nodes took the record."""
        target, view, taken = Node(key), self._view(key, kind), 0
        includes_self = self._protocol.is_responsible(key)
        if record is not None:
            view.book.put(record, record.ttl_s, self._clock())
            if includes_self:
                self._shelf.put(key, record, self._clock())
                taken += 1
        unread: dict[bytes, Reading] = {}

        async def ask(node: Node) -> tuple[Node, ...] | None:
            nonlocal taken
            holder = view.holders.setdefault(node.id, _Holder())
            epoch, cursor = holder.epoch, holder.cursor
            if record is None:
                reading = await self._protocol.read(node, key, kind, epoch=epoch, cursor=cursor)
            else:
                reading = await self._protocol.publish(node, key, record, epoch=epoch, cursor=cursor)
            if reading is None:
                return None
            taken += reading.taken
            self._merge(view, reading)
            holder.epoch, holder.cursor = reading.epoch, reading.cursor
            if reading.left:
                unread[node.id] = reading
            return reading.nodes

        answered = await self._crawl(target, ask, width=self._config.replicas, includes_self=includes_self)
        self._merge_shelf(view, key, kind)
        for node in answered:
            reading = unread.get(node.id)
            # Most hold the same: once one is read to its end, the others' tags say that nothing is missing.
            if reading is not None and reading.tag != view.book.tag:
                await self._read_on(view, node, key, kind, reading)
        if len(view.holders) > 4 * self._config.replicas:
            view.holders = {node.id: view.holders[node.id] for node in answered}
        return view.book.roster(self._clock()), taken

    async def _read_on(self, view: _View, node: Node, key: Key, kind: str, first: Reading) -> None:
        """Everything that did not fit a holder's first page, in lanes side by side."""
        lanes = max(1, min(LANES_MAX // 2, first.left // RECORDS_A_LANE))

        async def read_lane(lane: int) -> bool:
            cursor, left = first.cursor, first.left
            while left:
                reading = await self._protocol.read(
                    node, key, kind, epoch=first.epoch, cursor=cursor, lane=lane, lanes=lanes
                )
                if (
                    reading is None
                    or reading.epoch != first.epoch
                    or not (reading.left < left or reading.cursor > cursor)
                ):
                    return False  # gone silent, begun anew, or making no progress
                self._merge(view, reading)
                cursor, left = reading.cursor, reading.left
            return True

        # Not a TaskGroup: lanes end by themselves within their retransmissions, whatever becomes of our caller.
        ends = await asyncio.gather(*(self.spawn(read_lane(lane)) for lane in range(lanes)))
        if all(ends):
            view.holders[node.id] = _Holder(first.epoch, first.head)

    def _merge(self, view: _View, reading: Reading) -> None:
        now = self._clock()
        for ttl_s, record in reading.records:
            view.book.put(record, ttl_s, now)

    def _merge_shelf(self, view: _View, key: Key, kind: str) -> None:
        book, now = self._shelf.book(key, kind), self._clock()
        if book is not None:
            view.shelf_cursor, news = book.changes(view.shelf_cursor, now)
            for ttl_s, record in news:
                view.book.put(record, ttl_s, now)

    def _view(self, key: Key, kind: str) -> _View:
        view = self._views.pop((key, kind), None) or _View(Book(self._config))
        self._views[key, kind] = view
        if len(self._views) > self._config.views_max:
            self._views.popitem(last=False)
        return view

    # -- what is kept alive ------------------------------------------------------------------------------------------

    async def _republish(self) -> None:
        """Announces our records anew before they expire."""
        while True:
            now = self._clock()
            for mine in [mine for mine in self._mine.values() if mine.due_at <= now]:
                # A little early, at random: peers that began together do not stay together.
                mine.due_at = now + mine.ttl_s / self._config.republish_part * self._rng.uniform(0.8, 1.0)
                self.spawn(self._publish_again(mine))
            next_at = min((mine.due_at for mine in self._mine.values()), default=None)
            await _come_or_pass(self._mine_changed, None if next_at is None else next_at - self._clock())
            self._mine_changed.clear()

    async def _publish_again(self, mine: _Mine) -> None:
        record = self._notary.write(self._identity, mine.key, mine.kind, mine.body, mine.ttl_s)
        _, taken = await self._visit(mine.key, mine.kind, record)
        self._retry_unless(taken, mine.key, mine.kind)

    def _retry_unless(self, taken: int, key: Key, kind: str) -> None:
        mine = self._mine.get((key, kind))
        wanted = min(len(self._protocol.contacts) + 1, self._config.replicas) // 2 + 1
        if mine is not None and taken < wanted:
            log.debug("only %d nodes took a %s record, %d wanted: again soon", taken, kind, wanted)
            mine.due_at = min(mine.due_at, self._clock() + self._config.republish_retry_s)
            self._mine_changed.set()

    # -- who is there ------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether the swarm was found, or none was to be found and this is a new one."""
        return self._ready.is_set()

    async def wait_ready(self) -> None:
        """Until `is_ready`."""
        await self._ready.wait()

    def waiting_for(self) -> str | None:
        """What keeps it from being ready, in words; None when it is."""
        return None if self.is_ready else self._waiting_for or "looking for the swarm"

    def neighbours(self) -> list[Neighbour]:
        """Every contact, the last heard first."""
        now = self._clock()
        contacts = sorted(self._protocol.contacts.values(), key=lambda one: -one.heard_at)
        return [Neighbour(one.peer, one.incarnation, one.address, now - one.heard_at, one.strikes) for one in contacts]

    def seen_as(self) -> Address | None:
        """The address under which most contacts hear this daemon, if any does: what a peer behind no NAT may
        announce."""
        seen = list(self._protocol.seen_as.values())
        return max(sorted(set(seen)), key=seen.count, default=None)

    @property
    def counters(self) -> Counters:
        """What the directory went through so far."""
        return self._protocol.counters

    async def _stay_in_touch(self) -> None:
        """Finds the swarm, then keeps the routing table in order and mends splits."""
        await self._find_somebody()
        mend_at = self._clock() + self._config.mend_interval_s
        while True:
            await self._look_around()
            if not self._ready.is_set():
                log.info("ready: %d peers answer", len(self._protocol.contacts))
                self._ready.set()
            self._remember()
            await asyncio.sleep(self._config.crawl_pause_s)
            await _come_or_pass(self._fresh_came, mend_at - self._clock())
            if self._clock() >= mend_at:
                await self._mend()
                mend_at = self._clock() + self._config.mend_interval_s * self._rng.uniform(0.9, 1.1)

    async def _find_somebody(self) -> None:
        """Until another node answers, or it is clear that there is no swarm yet."""
        pause_s, begun = self._config.join_retry_s, self._clock()
        while True:
            remembered = [str(one) for one in self._remembered.read()]
            greeting = self.spawn(self._greet([*self._join, *remembered]))
            somebody = self.spawn(self._fresh_came.wait())
            # One that answers is enough: the dead among them are not waited for.
            await asyncio.wait((greeting, somebody), return_when=asyncio.FIRST_COMPLETED)
            somebody.cancel()
            if self._protocol.contacts:
                return
            found = await greeting
            missing = [one for one in self._join if found.get(one) != Stranger.MYSELF.value]
            if not missing:
                return
            waiting = "; ".join(f"{one} {found[one]}" for one in missing)
            self._waiting_for = f"{waiting} (trying for {self._clock() - begun:.0f} s)"
            log.warning("cannot join yet: %s", self._waiting_for)
            await _come_or_pass(self._fresh_came, pause_s)
            pause_s = min(2 * pause_s, self._config.join_retry_s_max)

    async def _look_around(self) -> None:
        """Asks for our own neighbourhood: those nearest to us, and whom we met since, however far.

        A new contact may be the one bridge to a part of the swarm that none of the nearest knows.
        """
        fresh, self._fresh = self._fresh, {}
        self._fresh_came.clear()
        home = self._node.node

        async def ask(node: Node) -> tuple[Node, ...] | None:
            return await self._protocol.find_node(node, home.id)

        bridges = [Node(one, *contact.address) for one, contact in fresh.items()][: self._config.contacts_per_crawl_max]
        named = await asyncio.gather(*(self.spawn(ask(bridge)) for bridge in bridges))
        heard_of = [node for nodes in named if nodes is not None for node in nodes]
        await self._crawl(home, ask, width=self._config.bucket, includes_self=True, heard_of=heard_of)

    async def _mend(self) -> None:
        """Contacts every --join address and one remembered peer again, and those not heard for longest."""
        self._shelf.sweep(self._clock())
        remembered = self._remembered.read()
        await self._greet([*self._join, *(str(one) for one in self._rng.sample(remembered, min(1, len(remembered))))])
        stale = sorted(self._protocol.contacts.values(), key=lambda one: one.heard_at)[:STALE_CONTACTS_CHECKED]
        limit = self._clock() - self._config.mend_interval_s
        await asyncio.gather(*(self.spawn(self._protocol.check(one)) for one in stale if one.heard_at < limit))

    async def _greet(self, written: Sequence[str]) -> dict[str, str]:
        """Greets all of HOST:PORT at once; for each, in words, what came of it."""
        unique = tuple(dict.fromkeys(written))
        return dict(
            zip(unique, await asyncio.gather(*(self.spawn(self._greet_one(one)) for one in unique)), strict=True)
        )

    async def _greet_one(self, written: str) -> str:
        try:
            addresses = [one for one in await resolve(written) if self._socket.reaches(one)]
        except AddressError as error:
            return f"({error})"
        if not addresses:
            return (
                f"has no address that a socket bound to {self._socket.address} reaches; --listen [::]:PORT reaches all"
            )
        met = await asyncio.gather(*(self.spawn(self._protocol.meet(one)) for one in addresses))
        strangers = [one for one in met if isinstance(one, Stranger)]
        if len(strangers) < len(met):
            return "answered"
        return next((one.value for one in strangers if one is not Stranger.SILENT), Stranger.SILENT.value)

    async def _crawl(
        self, target: Node, question: Question, *, width: int, includes_self: bool, heard_of: Sequence[Node] = ()
    ) -> list[Node]:
        crawl = Crawl(
            self._protocol,
            target,
            [*self._protocol.closest(target, width), *heard_of],
            width=width,
            config=self._config,
            spawn=self.spawn,
            includes_self=includes_self,
        )
        return await crawl.find(question)

    def _remember(self) -> None:
        heard = sorted(self._protocol.contacts.values(), key=lambda one: one.address)
        self._remembered.write(one.address for one in heard if not one.strikes)

    # -- what the protocol tells us ----------------------------------------------------------------------------------

    def met(self, contact: Contact) -> None:
        """A new contact: look around with its help, and give it what it is near to."""
        one = node_id(contact.peer)
        self._fresh[one] = contact
        self._fresh_came.set()
        for mine in self._mine.values():
            nearest = self._protocol.closest(Node(mine.key), self._config.replicas)
            if any(node.id == one for node in nearest):
                mine.due_at = min(mine.due_at, self._clock() + self._config.crawl_pause_s)
                self._mine_changed.set()

    def met_clone(self, address: Address) -> None:
        """Another daemon lives with our identity."""
        log.error("another daemon with this daemon's identity answers at %s", address)
        self._on_clone(address)

    def spawn(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Runs it to its end, or to ours: those who wait for it may be cancelled without leaving it half done."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _come_or_pass(event: asyncio.Event, seconds: float | None) -> None:
    """Until the event, or for so long."""
    try:
        async with asyncio.timeout(None if seconds is None else max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        pass
