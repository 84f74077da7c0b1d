"""Where channels and ports between daemons are made: the one place for credentials, limits and transport settings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import grpc.aio


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """How daemons talk."""

    message_bytes_max: int = (4 << 20) + 1024
    """The largest message taken: the largest chunk and its header. It guards our memory; never unlimited."""
    lookahead_bytes: int = 4 << 20
    """How far a stream may run ahead of its reader. 16 MiB fills long fat links and costs 50 MB more in a round."""
    dial_timeout_s: float = 5.0
    """How long connecting and the hello may take."""
    transport: str = "auto"
    """How chunks travel: over plain TCP where both offer it and it can be reached, else gRPC (auto); or one only."""
    bulk_port: int = 0
    """Where the plain TCP path listens; 0: any free port. Behind a firewall or a port mapping it must be let through
    under this number; where it is not, chunks go over gRPC."""
    tcp_patience_s: float = 1.0
    """How long connecting to a TCP port may take: where a firewall drops what it does not let through, the first round
    waits so long before it takes gRPC."""
    tcp_again_s: float = 600.0
    """... and how long until it is tried again."""
    links: int = 0
    """Connections between two members for one group's chunks; 0: one, or `links_far` over a long way."""
    links_far: int = 4
    """One connection does not fill a long line: a lost packet halves its rate for many round trips."""
    far_s: float = 0.03
    """The round trip from which on the way is long."""
    near_s: float = 0.002
    """The round trip below which a TCP connection may have `near_bytes_max` on its way."""
    near_bytes_max: int = 256 << 10
    """... which Linux doubles. Enough for 250 MB/s at 2 ms; more overruns receivers that have no processor to spare."""
    linger_s: float = 15.0
    """How long a transfer may last after its group is done, with one that does not read or does not end it."""
    connections_of_one_max: int = 64
    """TCP connections of one peer; further ones are refused. It needs one a group, or `links_far`."""
    redial_pause_s: float = 0.5
    """After an address could not be connected to, it is not tried again before; meanwhile dials to it fail at once."""
    dialable_again_s: float = 10.0
    """One who could not dial us back may itself be at fault: after this another one is asked."""
    keepalive_s: float = 10.0
    """A connection without traffic is probed this often, and given up after half of it without an answer."""
    outbox_max: int = 1024
    """Messages that wait for one peer. A peer that reads slower than this is cut off."""
    outbox_bytes_max: int = 16 << 20
    """... and their bytes: small questions have large answers."""
    conversations_max: int = 2048
    """Conversations held at once, and TCP connections; further ones are refused."""
    conversations_of_one_max: int = 8
    """... with one peer: it may dial while we do, and again before we noticed that its last connection is dead."""
    greetings_max: int = 512
    """Callers that have not proved yet who they are; further ones are refused."""
    dialling_max: int = 1024
    """Peers dialled at once; messages to further ones are lost, as those to the dead are."""
    idle_channels_max: int = 256
    """Channels kept warm without a stream on them."""
    strangers_max: int = 1024
    """Transfers that may wait for a group we have not heard of yet. The oldest makes room: an honest one waits for
    milliseconds, and nobody has proved anything so far."""
    stranger_patience_s: float = 15.0
    """... and for how long."""


def _options(config: PeerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.message_bytes_max),
        ("grpc.max_send_message_length", config.message_bytes_max),
        ("grpc.http2.lookahead_bytes", config.lookahead_bytes),
        ("grpc.keepalive_time_ms", int(config.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(config.keepalive_s * 500)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", int(config.keepalive_s * 500)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(config.keepalive_s * 250)),
    ]


def dial(address: str, config: PeerConfig) -> grpc.aio.Channel:
    """A channel to another daemon. Connects when it is first used.

    It shares nothing with other channels to that address: who asks whether a peer can be dialled is not to be told what
    came of an earlier attempt. And it soon tries again what failed: gRPC's own pauses grow to two minutes, in which a
    peer that was restarted would count as dead.
    """
    ours = [
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", int(config.redial_pause_s * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(config.redial_pause_s * 1000)),
        ("grpc.min_reconnect_backoff_ms", int(config.dial_timeout_s * 1000)),
    ]
    return grpc.aio.insecure_channel(address, options=[*_options(config), *ours])


@dataclass
class Warm:
    """A channel and how many streams use it."""

    channel: grpc.aio.Channel
    users: int = 0
    round_trip_s: float = 0.0
    """What the last hello over it took; 0: none did."""


class Channels:
    """Channels to others, kept warm between rounds."""

    def __init__(self, config: PeerConfig) -> None:
        self._config = config
        self._warm: OrderedDict[tuple[str, int], Warm] = OrderedDict()
        """By address and number, the longest idle first."""

    @asynccontextmanager
    async def use(self, address: str, number: int = 0) -> AsyncIterator[Warm]:
        """For as long as a stream uses it, and a while longer: whoever invents addresses must not fill our memory.
        Channels of different numbers are different connections."""
        key = address, number
        warm = self._warm.get(key)
        if warm is None:
            warm = self._warm[key] = Warm(dial(address, self._config))
        warm.users += 1
        try:
            yield warm
        finally:
            warm.users -= 1
            self._warm.move_to_end(key)
            idle = [name for name, one in self._warm.items() if not one.users]
            for name in idle[: max(0, len(idle) - self._config.idle_channels_max)]:
                await self._warm.pop(name).channel.close()

    async def close(self) -> None:
        for warm in self._warm.values():
            await warm.channel.close()


def new_server(config: PeerConfig) -> grpc.aio.Server:
    """A server for other daemons. Ports are never shared: two daemons on one port must not go unnoticed."""
    return grpc.aio.server(options=[*_options(config), ("grpc.so_reuseport", 0)])


def listen(server: grpc.aio.Server, address: str) -> int:
    """Bind a port; returns its number, 0 when it is taken. Raises RuntimeError for an address that is none of ours."""
    return server.add_insecure_port(address)
