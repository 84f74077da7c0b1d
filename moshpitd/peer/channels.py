"""Where channels and ports between daemons are made: the one place for credentials, limits and transport settings."""

from __future__ import annotations

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
    """Conversations held at once; further ones are refused."""
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


def new_server(config: PeerConfig) -> grpc.aio.Server:
    """A server for other daemons. Ports are never shared: two daemons on one port must not go unnoticed."""
    return grpc.aio.server(options=[*_options(config), ("grpc.so_reuseport", 0)])


def listen(server: grpc.aio.Server, address: str) -> int:
    """Bind a port; returns its number, 0 when it is taken. Raises RuntimeError for an address that is none of ours."""
    return server.add_insecure_port(address)
