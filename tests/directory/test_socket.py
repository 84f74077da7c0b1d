"""One socket, several protocols, told apart by the first byte."""

from __future__ import annotations

import asyncio
import logging

import pytest
import uvloop

from moshpitd.directory import (
    Address,
    AddressError,
    DatagramSocket,
    PortInUse,
    resolve,
    socket,
    split_host_port,
)
from moshpitd.directory.addresses import pack_nodes, unpack_nodes


async def exchange() -> list[tuple[bytes, Address]]:
    one, other = await DatagramSocket.open("127.0.0.1", 0), await DatagramSocket.open("::", 0)
    heard: asyncio.Queue[tuple[bytes, Address]] = asyncio.Queue()
    one.claim(0x10, lambda datagram, sender: heard.put_nowait((datagram, sender)))
    one.claim(0x20, lambda datagram, sender: heard.put_nowait((datagram.upper(), sender)))
    for datagram in (b"\x10a", b"\x20a", b"\x30a", b"", b"\x10b"):
        other.send(datagram, one.address)
    try:
        async with asyncio.timeout(10):
            return [await heard.get() for _ in range(3)]
    finally:
        one.close()
        other.close()


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_datagrams_go_to_whom_claimed_their_first_byte_under_either_loop(loop_factory: object) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:  # type: ignore[arg-type]
        heard = runner.run(exchange())
    assert [datagram for datagram, _ in heard] == [b"\x10a", b"\x20A", b"\x10b"]
    assert {sender.host for _, sender in heard} == {"127.0.0.1"}, "a dual-stack socket speaks plain IPv4"


async def test_a_taken_port_is_named() -> None:
    first = await DatagramSocket.open("127.0.0.1", 0)
    with pytest.raises(PortInUse, match=str(first.address)):
        await DatagramSocket.open("127.0.0.1", first.address.port)
    first.close()


async def test_what_cannot_be_sent_is_lost_and_counted() -> None:
    socket = await DatagramSocket.open("127.0.0.1", 0)
    socket.send(b"x", Address("::1", 9))
    socket.send(bytes(70_000), socket.address)
    assert socket.counters.refused == 2
    socket.close()
    socket.send(b"x", Address("127.0.0.1", 9))


@pytest.mark.parametrize(
    ("text", "parts"),
    [("a.example:7", ("a.example", 7)), ("1.2.3.4:65535", ("1.2.3.4", 65535)), ("[::1]:80", ("::1", 80))],
)
def test_host_and_port_are_split(text: str, parts: tuple[str, int]) -> None:
    assert split_host_port(text) == parts


@pytest.mark.parametrize("text", ["", "host", "host:", ":80", "host:80x", "host:65536", "::1:80", "host:-1"])
def test_what_is_not_host_and_port_is_refused(text: str) -> None:
    with pytest.raises(AddressError, match=r"HOST:PORT|IPv6"):
        split_host_port(text)


async def test_a_host_that_does_not_exist_is_named() -> None:
    with pytest.raises(AddressError, match=r"no-such-host\.invalid"):
        await resolve("no-such-host.invalid:80")


def test_node_lists_travel_and_lose_what_no_datagram_can_reach() -> None:
    sound = [(b"a" * 20, Address("1.2.3.4", 5)), (b"b" * 20, Address("2001:db8::1", 6))]
    unsound = [
        (b"c" * 20, Address("0.0.0.0", 5)),
        (b"d" * 20, Address("224.0.0.1", 5)),
        (b"e" * 20, Address("1.2.3.4", 0)),
        (b"f" * 20, Address("255.255.255.255", 5)),
    ]
    raw = pack_nodes(iter([sound[0], *unsound, sound[1]]))
    assert unpack_nodes(raw, limit=20) == sound
    assert unpack_nodes(raw, limit=1) == sound[:1]
    for length in range(len(raw)):
        unpack_nodes(raw[:length], limit=20)


@pytest.mark.parametrize("offload", [True, False])
async def test_bulk_is_handed_over_many_at_a_time_and_told_apart_from_what_looks_alike(offload: bool) -> None:
    one = await DatagramSocket.open("127.0.0.1", 0, offload=offload)
    other = await DatagramSocket.open("::", 0, offload=offload)
    bulk: list[tuple[bytes, int]] = []
    words: list[bytes] = []
    heard = asyncio.Event()

    def take(datagrams: memoryview, size: int, _: object) -> None:
        bulk.append((bytes(datagrams), size))
        heard.set()

    one.claim_bulk(0xD7, take)
    one.claim(0x10, lambda datagram, _: words.append(datagram))
    run = b"".join(b"\xd7" + bytes([n]) * 99 for n in range(40)) + b"\xd7last"
    assert other.send_bulk(memoryview(run), 100, one.address)
    other.send(b"\x10" + bytes(99), one.address)
    assert other.send_bulk(memoryview(run[:100]), 100, one.address)
    try:
        async with asyncio.timeout(10):
            while len(b"".join(datagrams for datagrams, _ in bulk)) < len(run) + 100 or not words:
                await heard.wait()
                heard.clear()
    finally:
        one.close()
        other.close()
    assert b"".join(datagrams for datagrams, _ in bulk) == run + run[:100]
    assert {size for _, size in bulk} <= {100, 5}
    assert words == [b"\x10" + bytes(99)]
    assert one.counters.received == other.counters.sent == 43
    assert len(bulk) < 42, "many at a time"


async def test_a_datagram_that_does_not_fit_the_path_is_refused_and_never_fragmented() -> None:
    socket = await DatagramSocket.open("127.0.0.1", 0)
    socket.send_bulk(memoryview(bytes(65_500)), 65_500, Address("127.0.0.1", 9))
    socket.send_bulk(memoryview(bytes(66_000)), 66_000, Address("127.0.0.1", 9))
    assert socket.counters.refused >= 1
    async with asyncio.timeout(5):
        await socket.writable()
    socket.close()
    assert socket.send_bulk(memoryview(b"x"), 1, Address("127.0.0.1", 9)), "lost"


async def test_a_receive_buffer_smaller_than_asked_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What no kernel grants unasked-for; who reads the log learns what to raise."""
    monkeypatch.setattr(socket, "RECEIVE_BUFFER_BYTES", 1 << 30)
    with caplog.at_level(logging.INFO):
        opened = await DatagramSocket.open("127.0.0.1", 0)
    opened.close()
    assert opened.receive_buffer_bytes < 1 << 30
    assert f"asked for {1 << 30} bytes, granted {opened.receive_buffer_bytes}" in caplog.text
    assert "net.core.rmem_max" in caplog.text
