"""`moshpitd average`: one file, one averaging, one file.

The order is the promise: read and check IN, make sure that OUT can be written, only then speak to the daemon; write OUT
when all of the result is here. Whatever ends it earlier leaves both files as they were.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np

from moshpitd.averaging.vector import Layout, Vector
from moshpitd.cli.connection import Daemon
from moshpitd.cli.failure import ExitCode, Failure
from moshpitd.cli.progress import Progress, progress
from moshpitd.cli.tensor_file import Output, TensorFile, TensorFileError, read
from moshpitd.local.v1 import daemon_pb2 as pb

CHUNK_BYTES = 1 << 20
"""Where gRPC is fastest on a socket of the same machine; the protocol allows four times as much."""
LONELY_WAIT_ALLOWED_ALONE_S = 2.0
"""Who may end alone does not wait long for the first other peer."""
LONELY_MARGIN_S = 1.0
"""Who may not, looks for somebody until just before its time is up, so that the daemon, not the clock, says why."""
TRANSFER_ALLOWANCE_S = 60.0
"""Beyond the caller's timeout, for vectors on the socket; the daemon keeps the timeout itself."""

DATA_TYPES = {
    "float64": pb.DATA_TYPE_FLOAT64,
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "bfloat16": pb.DATA_TYPE_BFLOAT16,
}
JOINING = {"receive": pb.JOINING_RECEIVE, "contribute": pb.JOINING_CONTRIBUTE}


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for on the command line."""

    source: Path
    output: Path | None
    weight: float
    rounds: int
    """0 = auto."""
    epoch: int | None
    min_peers: int
    codec: str
    transport: str
    reliable_every: int
    """0 = auto."""
    name: str
    joining: str
    allow_alone: bool
    timeout_s: float


def average(wish: Wish, socket: Path) -> pb.Receipt:
    """Average a file. Raises Failure; an outcome `alone` that was not allowed is left to the caller to report."""
    try:
        with _interruptible():
            tensors = read(wish.source)
            with contextlib.ExitStack() as stack:
                output = stack.enter_context(Output(wish.output)) if wish.output else None
                daemon = stack.enter_context(Daemon(socket))
                # Left before the receipt is printed: the bar must be gone by then.
                with progress() as shown:
                    receipt, result = _exchange(daemon, wish, tensors, shown)
                if output and (receipt.outcome != pb.OUTCOME_ALONE or wish.allow_alone):
                    output.commit(result, tensors.metadata)
                return receipt
    except TensorFileError as error:
        raise Failure(ExitCode.FAILED, str(error)) from error
    except KeyboardInterrupt as error:
        raise Failure(ExitCode.INTERRUPTED, "interrupted: nothing was written") from error


def _exchange(daemon: Daemon, wish: Wish, tensors: TensorFile, shown: Progress) -> tuple[pb.Receipt, Vector]:
    """Values out, receipt and result in; the result of an averaging alone is what was sent."""
    layout = tensors.vector.layout
    result = Vector.empty(layout)
    receipt: pb.Receipt | None = None
    filled = 0
    patience_s = wish.timeout_s + TRANSFER_ALLOWANCE_S
    with (
        daemon.session(_opening(wish, layout), patience_s) as session_id,
        daemon.average(_requests(session_id, wish, tensors.vector), patience_s) as responses,
    ):
        for response in responses:
            match response.WhichOneof("message"):
                case "progress":
                    shown.show(response.progress.text, response.progress.fraction)
                case "receipt":
                    receipt = response.receipt
                case "chunk":
                    values = np.frombuffer(response.chunk.data, np.uint8)
                    if response.chunk.offset != filled or filled + len(values) > layout.byte_size:
                        break
                    result.buffer[filled : filled + len(values)] = values
                    filled += len(values)
    if receipt is not None and receipt.outcome == pb.OUTCOME_ALONE and filled == 0:
        return receipt, tensors.vector
    if receipt is None or filled != layout.byte_size:
        raise Failure(
            ExitCode.FAILED,
            f"the daemon answered with {filled} of {layout.byte_size} bytes{'' if receipt else ' and no receipt'}: "
            "a bug of ours, nothing was written",
        )
    return receipt, result


def _opening(wish: Wish, layout: Layout) -> pb.OpenSessionRequest:
    lonely_s = max(wish.timeout_s - LONELY_MARGIN_S, wish.timeout_s / 2)
    return pb.OpenSessionRequest(
        name=wish.name,
        tensors=[
            pb.Tensor(name=spec.name, shape=spec.shape, data_type=DATA_TYPES[spec.dtype]) for spec in layout.tensors
        ],
        rounds=wish.rounds,
        codec=wish.codec,
        transport=wish.transport,
        reliable_every=wish.reliable_every,
        min_peers=wish.min_peers,
        joining=JOINING[wish.joining],
        lonely_wait_seconds=min(lonely_s, LONELY_WAIT_ALLOWED_ALONE_S) if wish.allow_alone else lonely_s,
    )


def _requests(session_id: str, wish: Wish, vector: Vector) -> Iterator[pb.AverageRequest]:
    start = pb.AverageStart(session_id=session_id, weight=wish.weight, timeout_seconds=wish.timeout_s, epoch=wish.epoch)
    yield pb.AverageRequest(start=start)
    for offset in range(0, vector.layout.byte_size, CHUNK_BYTES):
        data = vector.buffer[offset : offset + CHUNK_BYTES].tobytes()
        yield pb.AverageRequest(chunk=pb.VectorChunk(offset=offset, data=data))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends us the way Ctrl+C does: drafts removed, the daemon told."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
