"""How a verb ends when it does not end well: an exit code for the kind, a message for the culprit and the way out."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What scripts may rely on."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_REACHABLE = 3
    NOT_HEALTHY = 4
    NO_GROUP = 5
    """Timed out, or nobody to average with."""
    INTERRUPTED = 130


class Failure(Exception):
    """Ends the verb with a message on stderr and an exit code."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code = code
