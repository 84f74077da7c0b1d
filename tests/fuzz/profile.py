"""How hard to try: the same examples on every machine, more of them when asked.

`MOSHPITD_FUZZ=20 python -m pytest tests/fuzz -m ""` tries twenty times as many and runs what is marked slow, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("MOSHPITD_FUZZ", "1"))
_Test = TypeVar("_Test", bound=Callable[..., object])


def tries(examples: int) -> Callable[[_Test], _Test]:
    """A property test with so many examples; drawn from the test's own text, never from a database."""
    return settings(
        max_examples=examples * FACTOR,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
