"""Addresses of peers that outlive the daemon, in a file.

Knows JSON and atomic replacement. Does not know who is worth remembering. The file is a hint, never a truth: one that
cannot be read is an empty one, with a warning.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from moshpitd.directory.addresses import Address, address

log = logging.getLogger(__name__)

FILE_BYTES_MAX = 1 << 20


class RememberedPeers:
    """The file, and what it held when it was last written."""

    def __init__(self, path: Path | None, limit: int) -> None:
        """None remembers nobody."""
        self._path = path
        self._limit = limit
        self._written: tuple[Address, ...] | None = None

    def read(self) -> tuple[Address, ...]:
        """What the last start left."""
        if self._path is None or not self._path.exists():
            return ()
        try:
            with self._path.open("rb") as file:
                entries = json.loads(file.read(FILE_BYTES_MAX))["peers"]
            found = [address(str(entry["host"]), int(entry["port"])) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("%s is not a file of remembered peers (%s): ignored, and written anew", self._path, error)
            return ()
        return tuple(one for one in found[: self._limit] if 0 < one.port < 65536)

    def write(self, peers: Iterable[Address]) -> None:
        """Replaces the file, if anything changed; keeps the old one rather than forget everybody."""
        latest = tuple(peers)[: self._limit]
        if self._path is None or not latest or latest == self._written:
            return
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        content = {"peers": [{"host": one.host, "port": one.port} for one in latest]}
        try:
            draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            draft.replace(self._path)
        except OSError as error:
            log.warning("cannot write %s: %s; after a restart only --join finds the swarm", self._path, error)
            draft.unlink(missing_ok=True)
            return
        self._written = latest
