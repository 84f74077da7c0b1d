"""How a contribution comes in from the trainer and its result goes back.

Knows chunks, their order and what no value may be. Does not know sessions or peers. `Transfer` is the seam: streaming
over the socket is the way that every language has, shared memory saves its copies.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import grpc.aio

from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.vector import DTYPES, Layout, Vector, first_non_finite
from moshpitd.local.shared_memory import SharedBuffers
from moshpitd.local.v1 import daemon_pb2 as pb

CHUNK_BYTES = 1 << 20
"""Of a result: gRPC is fastest between 256 KiB and 1 MiB, and stalls the loop with more."""
CHUNK_BYTES_MAX = 4 << 20
"""Of a contribution, as the protocol says."""
MESSAGE_BYTES_MAX = CHUNK_BYTES_MAX + 1024
"""The guard against a client that wants our memory."""

SCANNED_AT_ONCE = 1 << 20
"""Elements: well under a millisecond on the event loop."""

EVERYTHING = slice(None)

AverageContext = grpc.aio.ServicerContext[pb.AverageRequest, pb.AverageResponse]


class Transfer(Protocol):
    """Where a contribution comes from and its result goes to."""

    @property
    def spares(self) -> Sequence[Vector]:
        """Where results had best lie."""
        ...

    async def contribution(self, layout: Layout) -> Vector:
        """Take the trainer's values, whole and finite. Raises InvalidInput."""
        ...

    async def result(self, vector: Vector, part: slice) -> None:
        """Hand the averaged values back, of which these bytes are wanted."""
        ...


class StreamTransfer:
    """Chunks on the Average call itself."""

    spares: Sequence[Vector] = ()

    def __init__(self, context: AverageContext) -> None:
        self._context = context

    async def contribution(self, layout: Layout) -> Vector:
        intake = Intake(layout)
        while isinstance(request := await self._context.read(), pb.AverageRequest):
            if request.WhichOneof("message") != "chunk":
                raise InvalidInput("after `start` only `chunk` messages may follow: this client has a bug")
            intake.accept(request.chunk.offset, request.chunk.data)
        return intake.finish()

    async def result(self, vector: Vector, part: slice) -> None:
        for offset, data in pieces_of(vector, part):
            await self._context.write(pb.AverageResponse(chunk=pb.VectorChunk(offset=offset, data=data)))


class SharedTransfer:
    """Values lie where the trainer put them, and results where the trainer finds them."""

    def __init__(self, buffers: SharedBuffers, fallback: Transfer) -> None:
        self._buffers = buffers
        self._fallback = fallback

    @property
    def spares(self) -> Sequence[Vector]:
        return self._buffers.results

    async def contribution(self, layout: Layout) -> Vector:
        self._buffers.retract()
        vector = self._buffers.contribution
        assert vector.layout == layout
        for segment in layout.segments:
            for start in range(segment.start, segment.stop, SCANNED_AT_ONCE):
                _refuse_non_finite(vector, start, min(start + SCANNED_AT_ONCE, segment.stop))
                await asyncio.sleep(0)
        return vector

    async def result(self, vector: Vector, part: slice) -> None:
        # It lies elsewhere when a round failed and left its buffer to a job that still ran.
        if not self._buffers.publish(vector):
            await self._fallback.result(vector, part)


def pieces_of(vector: Vector, part: slice = EVERYTHING) -> Iterator[tuple[int, bytes]]:
    """What chunks carry of these bytes: offset and data."""
    raw = vector.buffer.data
    start, stop, _ = part.indices(len(raw))
    for offset in range(start, stop, CHUNK_BYTES):
        yield offset, bytes(raw[offset : min(offset + CHUNK_BYTES, stop)])


class Intake:
    """Fills a vector chunk by chunk and refuses gaps, overruns, NaN and infinity as they come."""

    def __init__(self, layout: Layout) -> None:
        self._vector = Vector.empty(layout)
        self._raw = self._vector.buffer.data
        self._arrived = 0
        self._scanned = 0
        """Elements known to be finite. A chunk may end inside an element: that one waits for the next chunk."""

    def accept(self, offset: int, data: bytes) -> None:
        """Take the next chunk. Raises InvalidInput."""
        size, end = len(self._raw), offset + len(data)
        if offset != self._arrived:
            raise InvalidInput(
                f"a chunk begins at byte {offset} where byte {self._arrived} was due: "
                "send chunks in order, without gaps or repeats"
            )
        if not data or end > size:
            raise InvalidInput(
                f"the chunk at byte {offset} has {len(data)} bytes where {size - offset} are left of {size}: "
                "pack the session's tensors, without padding"
            )
        self._raw[offset:end] = data
        self._arrived = end
        self._scan()

    def finish(self) -> Vector:
        """Return the vector. Raises InvalidInput when some of it has not come."""
        if self._arrived < len(self._raw):
            raise InvalidInput(
                f"the values ended after {self._arrived} of {len(self._raw)} bytes: send the whole packed vector"
            )
        return self._vector

    def _scan(self) -> None:
        for segment in self._vector.layout.segments:
            whole = (self._arrived - segment.byte_start) // DTYPES[segment.dtype].itemsize
            start, stop = max(segment.start, self._scanned), min(segment.stop, segment.start + whole)
            if start >= stop:
                continue
            _refuse_non_finite(self._vector, start, stop)
            self._scanned = stop


def _refuse_non_finite(vector: Vector, start: int, stop: int) -> None:
    """Raises InvalidInput, naming the tensor, for NaN and infinity in elements [start, stop) of one segment."""
    found = first_non_finite(vector.elements(start, stop))
    if found is None:
        return
    position = start + found
    value = float(vector.elements(position, position + 1)[0])
    held = "nan" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
    first = 0
    for spec in vector.layout.tensors:
        if position < first + spec.elements:
            break
        first += spec.elements
    raise InvalidInput(
        f"tensor {spec.name!r} holds {held} at element {position - first}: "
        "find the step that made it, or leave the tensor out; nothing was sent to other peers"
    )
