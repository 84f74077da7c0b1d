"""Swarms of real directories on real sockets, started and stopped by the test that asks for them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest
import umsgpack

from moshpitd.averaging.announcements import Roster
from moshpitd.averaging.names import Key, PeerId
from moshpitd.directory import Address, DatagramSocket, Directory, DirectoryConfig
from moshpitd.directory.socket import Drop
from moshpitd.identity import Identity

QUICK = DirectoryConfig(
    retransmit_s=0.05,
    mend_interval_s=0.3,
    crawl_pause_s=0.02,
    join_retry_s=0.05,
    join_retry_s_max=0.1,
    republish_retry_s=0.05,
    meet_again_s=0.1,
)


@dataclass
class Member:
    """A directory with all that belongs to it."""

    directory: Directory
    socket: DatagramSocket
    identity: Identity
    clones: list[Address] = field(default_factory=list)

    @property
    def at(self) -> str:
        return str(self.socket.address)

    @property
    def neighbours(self) -> dict[PeerId, Address]:
        return {one.peer: one.address for one in self.directory.neighbours()}

    async def stop(self) -> None:
        await self.directory.close()
        self.socket.close()


class Swarm:
    """Starts members; whoever was not stopped is stopped at the end."""

    def __init__(self, scratch: Path, stack: AsyncExitStack) -> None:
        self._scratch = scratch
        self._stack = stack

    async def start(
        self,
        name: str,
        *,
        join: Sequence[str] = (),
        listen: str = "127.0.0.1",
        swarm: bytes = b"swarm",
        drop: Drop | None = None,
        config: DirectoryConfig = QUICK,
        ready: bool = True,
        announced: Address | None = None,
    ) -> Member:
        """A member whose data directory is called `name`: starting it again is a restart."""
        socket = await DatagramSocket.open(listen, 0, drop=drop)
        identity = Identity.open(self._scratch / name)
        clones: list[Address] = []
        directory = await Directory.open(
            identity,
            swarm,
            socket,
            join=join,
            announced=announced,
            config=replace(config, remembered_file=self._scratch / name / "peers.json"),
            rng=random.Random(name),
            on_clone=clones.append,
        )
        member = Member(directory, socket, identity, clones)
        self._stack.push_async_callback(member.stop)
        if ready:
            async with asyncio.timeout(20):
                await directory.wait_ready()
        return member

    async def start_many(
        self, count: int, *, drop: Drop | None = None, config: DirectoryConfig = QUICK
    ) -> list[Member]:
        """Members that all know each other."""
        members = [await self.start("0", drop=drop, config=config)]
        for index in range(1, count):
            members.append(await self.start(str(index), join=[members[0].at], drop=drop, config=config))
        await eventually(lambda: all(len(member.neighbours) == count - 1 for member in members))
        return members


class RawClient(asyncio.DatagramProtocol):
    """Speaks to a node as anybody on the network can."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[bytes] = asyncio.Queue()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.inbox.put_nowait(data)

    def send(self, to: Member, datagram: bytes) -> None:
        self.transport.sendto(datagram, to.socket.address)

    async def ask(self, to: Member, name: str, *args: object) -> list[object]:
        """Sends one request from an invented node and waits for its answer."""
        call_id = random.randbytes(20)
        self.send(to, b"\0" + call_id + umsgpack.packb([name, [b"n" * 20, *args]]))
        async with asyncio.timeout(10):
            while True:
                datagram = await self.inbox.get()
                if datagram[:21] == b"\1" + call_id:
                    answer = umsgpack.unpackb(datagram[21:])
                    assert isinstance(answer, list)
                    return answer


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[Swarm]:
    """A swarm to start members in. Anything that reaches the loop's exception handler fails the test."""
    escaped: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: escaped.append(str(context)))
    async with AsyncExitStack() as stack:
        yield Swarm(tmp_path, stack)
    assert escaped == []


@pytest.fixture
async def raw_client() -> AsyncIterator[RawClient]:
    """A bare UDP socket."""
    transport, client = await asyncio.get_running_loop().create_datagram_endpoint(
        RawClient, local_addr=("127.0.0.1", 0)
    )
    yield client
    transport.close()


async def eventually(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Waits for something that others bring about."""
    loop = asyncio.get_running_loop()
    until = loop.time() + within_s
    while not condition():
        assert loop.time() < until, "it never happened"
        await asyncio.sleep(0.01)


async def reads(member: Member, key: Key, kind: str, wanted: Callable[[Roster], bool]) -> Roster:
    """Looks up until the roster is as wanted."""
    async with asyncio.timeout(20):
        while True:
            roster = await member.directory.look_up(key, kind)
            if wanted(roster):
                return roster
            await asyncio.sleep(0.01)
