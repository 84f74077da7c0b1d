"""The network of namespaces that `moshpitd bench packet-loss` has, for benchmarks: what is not to be had is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from moshpitd.cli import namespaces
from moshpitd.cli.namespaces import NETWORK, TCP_PAYLOAD, NoNamespaces, Place, Rate
from tests.benchmarks.rivals import Unavailable

__all__ = ["NETWORK", "TCP_PAYLOAD", "Rate", "shaped_net"]


@contextlib.contextmanager
def shaped_net(uplinks: Sequence[Rate | None]) -> Iterator[list[Place]]:
    """So many places that see each other and nobody else; None: not shaped. Raises Unavailable, saying what it would
    need."""
    try:
        with namespaces.shaped_net(uplinks) as places:
            yield places
    except NoNamespaces as error:
        raise Unavailable(str(error)) from error
