"""The daemon of this machine, as a trainer sees it: where it is, how it is doing, sessions with it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal

from moshpit_client import tensors as _tensors
from moshpit_client.compressors import ArcTopK, spelled
from moshpit_client.connection import ANSWER_SECONDS, Connection
from moshpit_client.errors import InvalidInput
from moshpit_client.receipt import Receipt, read_receipt
from moshpit_client.session import Session
from moshpit_client.status import ConfigValue, Peer, Status, read_config_value, read_peer, read_status
from moshpit_client.v1 import daemon_pb2 as pb

_AVERAGINGS = {"in_step": pb.AVERAGING_IN_STEP, "wait_avoiding": pb.AVERAGING_WAIT_AVOIDING}
_JOININGS = {"receive": pb.JOINING_RECEIVE, "contribute": pb.JOINING_CONTRIBUTE}


def connect(path: str | os.PathLike[str] | None = None) -> Daemon:
    """Connect to the daemon that serves `path`, or MOSHPITD_SOCKET, or the default. Raises DaemonUnreachable."""
    return Daemon(os.path.abspath(path if path is not None else _default_socket()))


def _default_socket() -> Path:
    if socket := os.environ.get("MOSHPITD_SOCKET"):
        return Path(socket).expanduser()
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, "moshpitd", "moshpitd.sock")
    return Path(tempfile.gettempdir(), f"moshpitd-{os.getuid()}", "moshpitd.sock")


class Daemon:
    """A connection to the daemon, from `connect` to `close`. Not to be used in a forked child."""

    def __init__(self, socket: str) -> None:
        self._connection = Connection(socket)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<moshpit_client.Daemon on {self._connection.socket}>"

    def close(self) -> None:
        """Close the connection, and with it every session opened on it. Idempotent."""
        self._connection.close()

    def open_session(
        self,
        tensors: Mapping[str, object],
        *,
        name: str = "default",
        min_peers: int = 1,
        initial_peers: int | None = None,
        rounds: Literal["auto"] | int = "auto",
        codec: str | Mapping[str, str] = "float32",
        compressor: str | ArcTopK = "dense",
        feedback: Literal["ef14"] | None = None,
        joining: Literal["receive", "contribute"] = "receive",
        lonely_wait: float | None = None,
        shared_memory: bool = True,
        averaging: Literal["in_step", "wait_avoiding"] = "in_step",
        group_size: int | None = None,
        barrier_every: int | None = None,
        lockstep: bool = False,
        transport: Literal["reliable", "lossy", "auto"] = "reliable",
        reliable_every: Literal["auto"] | int = "auto",
        shards: bool = False,
        estimator: Literal["difference", "horvitz-thompson"] | None = None,
    ) -> Session:
        """Open a session for these tensors: numpy arrays, or anything with `__dlpack__` on the CPU.

        name: sessions of one swarm with different names are separate averagings.
        min_peers: begin each averaging only when so many live sessions are there, this one included.
        initial_peers: the same, for the first averaging only.
        rounds: of an averaging; "auto" gives the exact mean of the swarm.
        codec: how values travel between peers: float32 (lossless for every dtype), float16, bfloat16, block-wise
            integers, flash<bits>[-<all-gather bits>][:<group>][+spikes][+anchored]: flash8, flash4-8, flash4+anchored;
            or auto, by what the group's links carry. For each tensor its own:
            {"*.bias": "float32", "size<4096": "float32", "*": "flash4-8"}; the first that fits a tensor's name, or
            that it is small enough for, counts.
        compressor: what is sent of the values: "dense", all; ArcTopK(...), the largest rows, the rest later.
        feedback: "ef14": what a lossy codec leaves out is sent again next time; for gradients and other updates.
            What compressor and feedback keep back is saved by `Session.feedback_state`.
        joining: whether a newcomer's first averaging only receives the swarm's mean or counts at once.
        lonely_wait: seconds an averaging looks for somebody while nobody else is known.
        shared_memory: share memory with the daemon where that is possible; `Daemon.status` says whether and why not.
        averaging: "wait_avoiding": nobody waits for who is late. `average` posts the model, which takes part in the
            next version; who comes late merges with the last one. Call it after every step; alike in all trainers.
        group_size: wait-avoiding: S, how many models a version adds up; at most `min_peers`.
        barrier_every: wait-avoiding: tau, every so many versions all wait for all. `min_peers` is what the first such
            barrier needs; later ones take whoever is alive.
        lockstep: wait-avoiding: a late trainer makes every step that the others make, instead of skipping some.
        transport: whether values must arrive between peers. "lossy": packets that are lost are not sent again, so that
            lossy paths do not slow rounds down; the mean is estimated without a lean from what arrives, and who misses
            a part of it keeps its own values of it until next time. "auto": lossy where the paths lose so much that
            everything else would be slow. Alike in all trainers.
        reliable_every: lossy and auto: each so many averagings one loses nothing, after which all hold the same;
            "auto" chooses by the loss, and the receipt says why.

        shards: owners that stay, for a sharded optimizer: each peer owns a part of the tensors. Gradients go through
            `Session.reduce_scatter`, the tensors through `Session.broadcast_shard`. Alike in all trainers.
        estimator: with shards, where gradients are lost: "difference" to the owner's own, or "horvitz-thompson": what
            arrives is scaled up.

        Raises InvalidInput, naming the tensor, for what cannot be averaged.
        """
        self._connection.require()
        views = {tensor: _tensors.view(tensor, value) for tensor, value in tensors.items()}
        if joining not in _JOININGS:
            raise InvalidInput(f"joining={joining!r}: give 'receive' or 'contribute'")
        if averaging not in _AVERAGINGS:
            raise InvalidInput(f"averaging={averaging!r}: give 'in_step' or 'wait_avoiding'")
        if transport not in ("reliable", "lossy", "auto"):
            raise InvalidInput(f"transport={transport!r}: give 'reliable', 'lossy' or 'auto'")
        if averaging == "wait_avoiding" and (group_size is None or barrier_every is None):
            missing = "group_size" if group_size is None else "barrier_every"
            raise InvalidInput(
                f"averaging='wait_avoiding' needs {missing}: give group_size, barrier_every and min_peers"
            )
        request = pb.OpenSessionRequest(
            name=name,
            tensors=[view.spec.message for view in views.values()],
            rounds=0 if rounds == "auto" else _count("rounds", rounds),
            codec=codec if isinstance(codec, str) else _rules(codec),
            compressor=spelled(compressor, feedback),
            min_peers=_count("min_peers", min_peers),
            joining=_JOININGS[joining],
            lonely_wait_seconds=lonely_wait or 0.0,
            shared_memory=shared_memory,
            averaging=_AVERAGINGS[averaging],
            group_size=0 if group_size is None else _count("group_size", group_size),
            barrier_every=0 if barrier_every is None else _count("barrier_every", barrier_every),
            lockstep=lockstep,
            transport=transport,
            reliable_every=0 if reliable_every == "auto" else _count("reliable_every", reliable_every),
            shards=shards,
            estimator=estimator or "",
        )
        frozen = next((name for name, view in views.items() if view.immutable), None)
        if shards and frozen is not None:
            raise InvalidInput(
                f"tensor {frozen!r} cannot be written: a session with shards needs a copy, np.array(...)"
            )
        first_peers = 1 if initial_peers is None else _count("initial_peers", initial_peers)
        # Immutable tensors are not kept: those of `average_values` come with each call.
        kept = {name: tensors[name] for name, view in views.items() if not view.immutable}
        return Session(self._connection, request, {name: view.spec for name, view in views.items()}, kept, first_peers)

    def status(self) -> Status:
        """How the daemon is doing."""
        self._connection.require()
        with self._connection.errors():
            return read_status(self._connection.calls.get_status(pb.GetStatusRequest(), timeout=ANSWER_SECONDS))

    def peers(self) -> list[Peer]:
        """The peers the daemon knows."""
        self._connection.require()
        with self._connection.errors():
            answer = self._connection.calls.list_peers(pb.ListPeersRequest(), timeout=ANSWER_SECONDS)
        return [read_peer(message) for message in answer.peers]

    def rounds(self, limit: int = 20, epoch: int | None = None) -> list[Receipt]:
        """The receipts of the last averagings, newest first; of one epoch only, if given."""
        self._connection.require()
        request = pb.ListRoundsRequest(limit=_count("limit", limit), epoch=epoch)
        with self._connection.errors():
            answer = self._connection.calls.list_rounds(request, timeout=ANSWER_SECONDS)
        return [read_receipt(message) for message in answer.receipts]

    def config(self) -> list[ConfigValue]:
        """The daemon's configuration, each value with where it came from."""
        self._connection.require()
        with self._connection.errors():
            answer = self._connection.calls.get_config(pb.GetConfigRequest(), timeout=ANSWER_SECONDS)
        return [read_config_value(message) for message in answer.values]


def _rules(codecs: Mapping[str, str]) -> str:
    if not codecs:
        raise InvalidInput("codec={}: give a codec for each pattern, {'*': 'flash8'}")
    for pattern in codecs:
        if "," in pattern:
            raise InvalidInput(f"codec pattern {pattern!r}: write ? for the comma")
    return ",".join(f"{pattern}={codec}" for pattern, codec in codecs.items())


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 32:
        raise InvalidInput(f"{name}={value!r}: give a whole number of at least 1")
    return value
