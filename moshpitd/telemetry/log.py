"""The event log: one line a transition, on stderr, for people and for `grep`.

Knows the line's form: UTC time, level, room, text. Does not know files or rotation: whoever starts the daemon keeps its
stderr. Rooms log by `logging.getLogger(__name__)` and never format by hand.
"""

from __future__ import annotations

import logging
import time
from typing import Literal, TextIO

Level = Literal["debug", "info", "warning", "error"]

LOUD = ("kademlia", "rpcudp", "asyncio", "grpc")
"""Libraries whose info is our debug: a lost datagram is no event of the swarm's."""


def set_up(level: Level, stream: TextIO) -> None:
    """Send everything from `level` up to `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else logging.WARNING)


class _LineFormatter(logging.Formatter):
    """`2026-05-04T03:02:01.123Z info directory: text`; what follows a line break is indented, so a line is an event."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        room = record.name.removeprefix("moshpitd.")
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        head = f"{moment}.{int(record.msecs):03d}Z {record.levelname.lower()} {room}: "
        return head + text.replace("\n", "\n    ")
