"""What an averaging waits for, on stderr: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self

LINE_INTERVAL_S = 3.0
"""At most so often in a log that nobody can overwrite."""


class Progress(Protocol):
    """Where to say it."""

    def show(self, text: str, fraction: float) -> None:
        """`fraction` goes from 0 to 1."""


def progress() -> AbstractContextManager[Progress]:
    """The one that fits stderr."""
    if not sys.stderr.isatty():
        return _Lines()
    from moshpitd.cli.progress_bar import Bar

    return Bar()


class _Lines:
    def __init__(self) -> None:
        self._last = ""
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, text: str, fraction: float) -> None:
        now = time.monotonic()
        if text and text != self._last and now >= self._next:
            print(text, file=sys.stderr, flush=True)
            self._last, self._next = text, now + LINE_INTERVAL_S
