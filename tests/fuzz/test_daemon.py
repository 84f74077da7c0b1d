"""Real daemons under fire: no crash, no hang, bounded memory, and the honest average exactly all the while.

Level two of two: real processes, real sockets. Strangers prove an identity of their own and then send what they like; a
lying daemon is a member of the group. `MOSHPITD_FUZZ=20 python -m pytest tests/fuzz -m ""` tries harder.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import numpy as np
import psutil
import pytest
import umsgpack
from hypothesis import given
from hypothesis import strategies as st

import moshpit_client
from moshpitd.averaging.messages import Chunk, Heartbeat, Holdings, TermsWanted
from moshpitd.averaging.names import GroupId, PeerId
from moshpitd.identity import node_id
from moshpitd.peer import wire
from moshpitd.peer.v1 import peer_pb2
from tests.end_to_end.swarm import Peer, Process, Swarm, Trainer, average_all, error, mean, random_tensors, trainers
from tests.fuzz.nonsense import Changes, Overheard, change, changes, damage, every_message, noise
from tests.fuzz.profile import FACTOR, tries
from tests.fuzz.stranger import HUNG_UP, Stranger, enveloped, framed

ELEMENTS = 1 << 18
SESSION = "under-fire"
GROWTH_MAX_MB = 128
"""How much a daemon may grow under a flood: limits of queues, gRPC's own buffers, and what the allocator keeps."""


@dataclass
class Front:
    """Three honest daemons whose trainers average without a pause, and a stranger to each."""

    peers: list[Peer]
    there: list[Trainer]
    strangers: list[Stranger]
    runner: asyncio.Runner
    rounds: int = 0
    peaks: dict[int, int] = field(default_factory=dict)

    def run(self, work: Callable[[Stranger], object]) -> None:
        """All strangers at once."""

        async def all_of_them() -> None:
            async with asyncio.timeout(60):
                await asyncio.gather(*(work(stranger) for stranger in self.strangers))  # type: ignore[call-overload]

        self.runner.run(all_of_them())

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """The honest average on; each averaging must be complete and exact."""
        enough = threading.Event()
        with ThreadPoolExecutor(2) as pool:
            watch = pool.submit(self._watch, enough)
            work = pool.submit(self._average_until, enough)
            try:
                yield
            finally:
                enough.set()
                work.result()
                watch.result()

    def _average_until(self, enough: threading.Event) -> None:
        while True:
            last = enough.is_set()
            for index, trainer in enumerate(self.there):
                trainer.tensors["w"][:] = random_tensors(index, ELEMENTS)["w"]
            receipts = average_all(self.there)
            assert {receipt.outcome for receipt in receipts} == {"complete"}, receipts
            expected = mean([trainer.began_with["w"] for trainer in self.there], [1.0] * len(self.there))
            assert max(error(trainer.tensors["w"], expected) for trainer in self.there) < 1e-6
            self.rounds += 1
            if last:
                return

    def _watch(self, enough: threading.Event) -> None:
        while not enough.wait(0.05):
            for peer in self.peers:
                pid = peer.process.pid
                self.peaks[pid] = max(self.peaks.get(pid, 0), psutil.Process(pid).memory_info().rss)

    def assert_all_is_well(self) -> None:
        assert self.rounds > 0
        for peer in self.peers:
            assert peer.process.poll() is None
            assert complaints(peer) == []


def complaints(peer: Peer) -> list[str]:
    """What a daemon says when something got where it was not caught."""
    return [line for line in peer.lines if "Traceback" in line or "never retrieved" in line][:3]


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with Swarm() as swarm, asyncio.Runner() as runner:
        peers = swarm.start(3)
        homes = tmp_path_factory.mktemp("strangers")
        strangers = [
            Stranger(homes / str(n), peer.address, peer.json("status")["bulk_port"], "test", SESSION)
            for n, peer in enumerate(peers)
        ]
        with trainers(peers, lambda i: random_tensors(i, ELEMENTS), name=SESSION, min_peers=3) as there:
            average_all(there)
            yield Front(peers, there, strangers, runner)
        assert [peer.cli("status").returncode for peer in peers] == [0, 0, 0]


# ---- anything, from anybody


frames = st.lists(st.tuples(st.integers(0, 40), changes, st.just([]) | changes), max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=30) | noise,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("hello", "find_node", "look_up", "announce", "store", "ping", "")


def datagram(first: int, name: str, arguments: list[object], how: Changes, stranger: Stranger) -> bytes:
    body = umsgpack.packb([name, [stranger.identity.node_id, *arguments]] if first == 0 else arguments)
    return damage(bytes([first]) + bytes(20) + body, how)


@tries(25)
@given(
    said=frames,
    shown=st.lists(st.tuples(st.booleans(), changes, st.binary(max_size=50)), max_size=4),
    datagrams=st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from(NAMES), st.lists(values, max_size=6), st.just([]) | changes),
        max_size=30,
    ),
    raw=st.lists(noise, max_size=3),
)
def test_nonsense_from_a_stranger_costs_nobody_else_anything(
    front: Front,
    said: list[tuple[int, Changes, Changes]],
    shown: list[tuple[bool, Changes, bytes]],
    datagrams: list[tuple[int, str, list[object], Changes]],
    raw: list[bytes],
) -> None:
    async def attack(stranger: Stranger) -> None:
        frames = [*(message_frame(stranger, *one) for one in said), *raw]
        streams = [transfer_frame(stranger, *one) for one in shown]
        stranger.sends([*(datagram(*one, stranger) for one in datagrams), *raw])
        async with stranger.channel() as channel:
            await asyncio.gather(
                stranger.says(channel, frames),
                stranger.transfers(channel, [*streams, *raw]),
                stranger.transfers(channel, raw),
            )

    with front.averaging():
        front.run(attack)
    front.assert_all_is_well()


def message_frame(stranger: Stranger, base: int, how: Changes, damaged: Changes) -> bytes:
    kinds = every_message()
    envelope = kinds[base % len(kinds)]
    envelope.session = stranger.session
    change(envelope, how, Overheard({"peer": [stranger.identity.peer_id]}))
    if base // len(kinds) == 0 and not damaged:
        envelope.session = stranger.session
    return damage(enveloped(envelope), damaged)


def transfer_frame(stranger: Stranger, is_opening: bool, how: Changes, payload: bytes) -> bytes:
    request = peer_pb2.TransferRequest()
    if is_opening:
        request.open.group_id, request.open.session = bytes(16), stranger.session
        request.open.public_key = stranger.identity.public_key
    else:
        request.chunk.payload = payload
    change(request, how, Overheard())
    return request.SerializeToString()


# ---- too much of everything


async def _flood_of_early_holdings(stranger: Stranger) -> None:
    """Of groups that nobody knows, each as large as a message may be."""
    views = tuple([1 << 30] * 100_000)
    frames = [
        enveloped(wire.envelope(stranger.session, Holdings(GroupId(n.to_bytes(16, "big")), 1 << 31, views)))
        for n in range(60)
    ]
    async with stranger.channel() as channel:
        await stranger.says(channel, frames)


async def _flood_of_unread_questions(stranger: Stranger) -> None:
    """Whose answers are larger than they are, and never read."""
    question = enveloped(wire.envelope(stranger.session, TermsWanted()))
    async with stranger.channel() as channel:
        with suppress(*HUNG_UP):
            async with stranger.conversation(channel) as call:
                for _ in range(6_000):
                    await call.write(question)


async def _flood_of_dial_back_wishes(stranger: Stranger) -> None:
    frames = [
        peer_pb2.ConverseRequest(
            dial_back_wanted=peer_pb2.DialBackWanted(address=f"127.0.0.1:{1 + n % 1000}")
        ).SerializeToString()
        for n in range(2_000)
    ]
    async with stranger.channel() as channel:
        await stranger.says(channel, frames)


async def _flood_of_conversations(stranger: Stranger) -> None:
    """One identity, very often; and callers that never prove theirs."""

    async def hold(channel: grpc.aio.Channel) -> None:
        with suppress(AssertionError, *HUNG_UP):
            async with stranger.conversation(channel) as call:
                await call.write(enveloped(wire.envelope(stranger.session, Heartbeat(GroupId(bytes(16)), 1))))

    async def never_prove(channel: grpc.aio.Channel) -> None:
        with suppress(*HUNG_UP):
            async with stranger.stream(channel, "Converse") as call:
                await call.write(peer_pb2.ConverseRequest().SerializeToString())

    async with stranger.channel() as channel:
        await asyncio.gather(*(hold(channel) for _ in range(150)), *(never_prove(channel) for _ in range(150)))


async def _flood_of_transfers(stranger: Stranger) -> None:
    """Of groups that do not exist: they wait for them."""

    async def wait(channel: grpc.aio.Channel, number: int) -> None:
        opening = peer_pb2.TransferOpen(group_id=number.to_bytes(16, "big"), session=stranger.session)
        with suppress(*HUNG_UP):
            async with stranger.stream(channel, "Transfer") as call:
                await call.write(peer_pb2.TransferRequest(open=opening).SerializeToString())
                with suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await call.read()

    async with stranger.channel() as channel:
        await asyncio.gather(*(wait(channel, number) for number in range(400)))


async def _flood_of_too_large_messages(stranger: Stranger) -> None:
    async with stranger.channel() as channel:
        for size in (5 << 20, 64 << 20):
            await stranger.says(channel, [peer_pb2.ConverseRequest().SerializeToString() + bytes(size)])
            frame = b"".join(wire.chunk_frame(Chunk(0, 0, b"", is_average=False), bytes(size)))
            await stranger.transfers(channel, [frame])


async def _flood_of_tcp_connections(stranger: Stranger) -> None:
    """Silent ones, such that say they will send much, garbage, and openings of groups that do not exist."""
    openings = [
        peer_pb2.TransferRequest(
            open=peer_pb2.TransferOpen(group_id=number.to_bytes(16, "big"), session=stranger.session)
        )
        for number in range(3)
    ]

    async def call(number: int) -> None:
        with suppress(OSError, EOFError):
            async with stranger.connection() as (reader, writer):
                match number % 4:
                    case 0:
                        writer.write(struct.pack(">I", 1 << 30) + bytes(1000))
                    case 1:
                        writer.write(framed(b"\xff" * 500))
                    case 2:
                        await stranger.greets(reader, writer)
                        writer.write(struct.pack(">I", 4 << 20) + bytes(1 << 20))
                    case _:
                        await stranger.greets(reader, writer)
                        for opening in openings:
                            writer.write(framed(opening.SerializeToString()))
                with suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await reader.read()

    await asyncio.gather(*(call(number) for number in range(200)))


async def _flood_of_datagrams(stranger: Stranger) -> None:
    """From invented nodes."""
    for number in range(3_000):
        one = node_id(PeerId(number.to_bytes(32, "big").hex()))
        stranger.sends([b"\0" + bytes(20) + umsgpack.packb(["find_node", [one, one]])])


FLOODS = [
    _flood_of_early_holdings,
    _flood_of_unread_questions,
    _flood_of_dial_back_wishes,
    _flood_of_conversations,
    _flood_of_transfers,
    _flood_of_too_large_messages,
    _flood_of_tcp_connections,
    _flood_of_datagrams,
]


@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.__name__.removeprefix("_flood_of_"))
def test_a_flood_does_not_fill_a_daemons_memory_nor_stop_the_others(
    front: Front, flood: Callable[[Stranger], object]
) -> None:
    front.peaks.clear()
    before = {peer.process.pid: psutil.Process(peer.process.pid).memory_info().rss for peer in front.peers}
    with front.averaging():
        front.run(flood)
    growth_mb = {pid: (front.peaks[pid] - before[pid]) >> 20 for pid in before}
    print(flood.__name__, growth_mb)
    assert max(growth_mb.values()) < GROWTH_MAX_MB, growth_mb
    front.assert_all_is_well()


# ---- a member that lies


class LyingPeer(Peer):
    """A daemon that joined as any other."""

    def __init__(self, home: Path, seed: int, *, join: Peer) -> None:
        self.home, self.socket, self.data = home, home / "s" / "s", home / "d"
        Process.__init__(
            self, "tests.fuzz.lying_daemon", str(seed), "run", "--swarm", "test", "--listen", "127.0.0.1:0",
            "--preset", "loopback", "--socket", str(self.socket), "--data-dir", str(self.data), "--http", "off",
            "--join", join.address,
        )  # fmt: skip


def averages_with_a_liar(seed: int, averagings: int) -> None:
    with Swarm() as swarm:
        peers = swarm.start(3)
        liar = LyingPeer(peers[0].home.parent / "liar", seed, join=peers[0])
        swarm.peers.append(liar)
        liar.is_ready()
        with trainers(peers, lambda i: random_tensors(i, ELEMENTS), name="lied-to", min_peers=3) as there:
            with trainers([liar], lambda i: random_tensors(9, ELEMENTS), name="lied-to") as lying:
                for _ in range(averagings):
                    futures = [trainer.average(timeout=8) for trainer in [*there, *lying]]
                    for future in futures:
                        with suppress(moshpit_client.MoshpitError):
                            future.result(30)  # an outcome or a typed error, and in time
                    assert all(np.isfinite(trainer.tensors["w"]).all() for trainer in there)
            liar.kill()
            for _ in range(6):
                for index, trainer in enumerate(there):
                    trainer.tensors["w"][:] = random_tensors(index, ELEMENTS)["w"]
                outcomes = {receipt.outcome for receipt in average_all(there)}
                if outcomes == {"complete"}:
                    break
            assert outcomes == {"complete"}
            expected = mean([trainer.began_with["w"] for trainer in there], [1.0] * 3)
            assert max(error(trainer.tensors["w"], expected) for trainer in there) < 1e-6
        assert [complaints(peer) for peer in peers] == [[], [], []]


def test_a_member_that_lies_stops_nobody_for_longer_than_it_is_there() -> None:
    averages_with_a_liar(seed=2, averagings=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3, 3 + 5 * FACTOR))
def test_many_liars(seed: int) -> None:
    averages_with_a_liar(seed, averagings=3)
