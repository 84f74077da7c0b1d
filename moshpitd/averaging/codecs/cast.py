"""Values travel as they are, or cast to a narrower float.

`float32` is the lossless codec: it narrows nothing (float64 travels as float64, float16 as float16). `float16` and
`bfloat16` cast what is wider; what is as narrow already travels unchanged. Values beyond the narrower range saturate
instead of becoming infinite, so that one large value does not end a round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.vector import DTYPES, LARGEST, Floats


@dataclass(frozen=True, slots=True)
class Cast:
    """A coding that casts to `name` on the wire."""

    name: str

    def _wire(self, dtype: np.dtype) -> np.dtype:
        target = DTYPES[self.name]
        return dtype if self.name == "float32" or dtype.itemsize <= target.itemsize else target

    def encode(self, values: Floats) -> bytes | memoryview:
        wire = self._wire(values.dtype)
        if wire == values.dtype:
            return values.view(np.uint8).data
        largest = LARGEST[self.name]
        if len(values) and (values.max() > largest or values.min() < -largest):  # looking costs less than clipping
            values = np.clip(values, -largest, largest)
        return values.astype(wire).view(np.uint8).data

    def decode(self, payload: bytes | memoryview, dtype: np.dtype, elements: int) -> Floats:
        wire = self._wire(dtype)
        if len(payload) != elements * wire.itemsize:
            raise RemoteProtocolError(
                f"{elements} elements as {wire.name} have {elements * wire.itemsize} bytes, not {len(payload)}"
            )
        values = np.frombuffer(payload, wire)
        return values if wire == dtype else values.astype(dtype)

    def encoded_bytes(self, dtype: np.dtype, elements: int) -> int:
        return elements * self._wire(dtype).itemsize
