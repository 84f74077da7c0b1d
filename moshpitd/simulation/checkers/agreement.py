"""Members that commit under the same group id hold identical bytes; under a compressor also what they make of them."""

from __future__ import annotations

import hashlib

from moshpitd.averaging.receipt import Outcome
from moshpitd.simulation.checkers.checker import Checker
from moshpitd.simulation.history import RoundRecord
from moshpitd.simulation.swarm import Ending, Peer


class Agreement(Checker):
    """Compares everybody with the first that committed."""

    name = "agreement"

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[bytes, tuple[str, bytes, bytes]] = {}
        self._holds: dict[bytes, bytes] = {}
        """By digest: what it is the digest of."""
        self._results: dict[bytes, tuple[str, bytes]] = {}
        """By the last group's id: a compressor's result."""

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        receipt = ending.receipt
        if receipt is None or receipt.outcome is not Outcome.COMPLETE or receipt.compressor == "dense":
            return
        assert ending.vector is not None
        held = hashlib.sha256(ending.vector.buffer.tobytes()).digest()
        name, first = self._results.setdefault(receipt.rounds[-1].group_id, (peer.name, held))
        if first != held:
            self.complain(ending.at, f"{name} and {peer.name} made other results of averaging {receipt.epoch}")

    def round_ended(self, record: RoundRecord) -> None:
        self.looked += 1
        receipt = record.receipt
        if receipt.lossy is not None:  # members of a lossy round differ where one of them missed an average
            if receipt.digest:
                self.complain(record.at, f"{record.peer.name} has a digest of a lossy round")
            return
        held = hashlib.sha256(record.output.tobytes()).digest()
        name, digest, bits = self._first.setdefault(receipt.group_id, (record.peer.name, receipt.digest, held))
        where = f"group {receipt.group_id.hex()[:8]} of round {receipt.averaging}.{receipt.round}"
        if digest != receipt.digest:
            self.complain(record.at, f"{name} and {record.peer.name} have other digests for {where}")
        if bits != held:
            self.complain(record.at, f"{name} and {record.peer.name} hold other bits of {where}")
        if self._holds.setdefault(receipt.digest, held) != held:
            self.complain(record.at, f"{record.peer.name} holds other bits of {where} than their digest stands for")
