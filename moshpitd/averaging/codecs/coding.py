"""What turns a chunk into bytes and back, whichever half of the all-reduce it is for."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from moshpitd.averaging.vector import Floats


class Coding(Protocol):
    """Turns a chunk into bytes and back. Decoding what was encoded is deterministic, bit for bit, on every machine."""

    def encode(self, values: Floats) -> bytes | memoryview:
        """`values`: one-dimensional, of any dtype in DTYPES. May return a view of them: they must not change after."""
        ...

    def decode(self, payload: bytes | memoryview, dtype: np.dtype, elements: int) -> Floats:
        """Values of `dtype`; may be a read-only view of the payload. Raises RemoteProtocolError for what is no code."""
        ...

    def encoded_bytes(self, dtype: np.dtype, elements: int) -> int:
        """The exact size of the code."""
        ...
