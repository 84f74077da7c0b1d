"""Every committed value equals the float64 weighted mean of the contributors that its receipt names, or their sum.

Of a lossy round it is judged what kept its own values. Whether its estimates lean, another checker asks."""

from __future__ import annotations

import numpy as np

from moshpitd.averaging.codecs import rules_of
from moshpitd.averaging.receipt import LossyLine, SpanLine
from moshpitd.simulation.checkers.checker import Checker
from moshpitd.simulation.history import SUMMED, RoundRecord


class HonestReceipts(Checker):
    """Computes each span anew, from what was put in."""

    name = "honest receipts"

    def round_ended(self, record: RoundRecord) -> None:
        self.looked += 1
        receipt, group = record.receipt, record.group
        where = f"{record.peer.name}'s round {receipt.averaging}.{receipt.round}"
        weights = {line.peer: line.weight for line in receipt.members}
        covered = 0
        if receipt.lossy is not None:
            self._judge_stale(record, receipt.lossy, where)
        for span in receipt.spans:
            if span.start != covered:
                self.complain(record.at, f"{where}: its spans leave out {covered} to {span.start}")
            covered = span.stop
            if receipt.lossy is not None and span.reducer != record.peer.id:
                continue  # whom its owner heard only the owner knows
            if missing := [peer for peer in span.contributors if peer not in group.inputs or peer not in weights]:
                self.complain(record.at, f"{where}: names {missing[0][:8]}, which never began this group")
                continue
            if receipt.lossy is not None:
                continue
            if receipt.stage == SUMMED:
                self._judge_sum(record, span, where)
                continue
            total = sum(weights[peer] for peer in span.contributors)
            if not total > 0:
                self.complain(record.at, f"{where}: nobody who is named for {span.start} to {span.stop} has any weight")
                continue
            inputs = [group.inputs[peer][span.start : span.stop].astype(np.float64) for peer in span.contributors]
            mean = sum(weights[p] / total * x for p, x in zip(span.contributors, inputs, strict=True))
            scale = max(float(np.max(np.abs(x))) for x in inputs)
            error = float(np.max(np.abs(record.output[span.start : span.stop] - mean)))
            if not error <= rules_of(receipt.codec).precision * max(scale, 1e-30):
                names = ", ".join(peer[:8] for peer in span.contributors)
                self.complain(
                    record.at, f"{where}: {span.start} to {span.stop} is {error:.2e} away from the mean of {names}"
                )
        self._judge_end(record, covered, where)

    def _judge_sum(self, record: RoundRecord, span: SpanLine, where: str) -> None:
        """Integers: exact. After the first round one of each cell counts, the first that is named."""
        coordinates = {line.peer: line.coordinate for line in record.receipt.members}
        counting = list(span.contributors)
        if record.receipt.round > 0:
            first = {coordinates[peer]: peer for peer in reversed(counting)}
            counting = list(first.values())
        total = sum(record.group.inputs[peer][span.start : span.stop] for peer in counting)
        if not np.array_equal(record.output[span.start : span.stop], total):
            self.complain(record.at, f"{where}: {span.start} to {span.stop} is not the sum of {len(counting)}")

    def _judge_stale(self, record: RoundRecord, lossy: LossyLine, where: str) -> None:
        own = record.group.inputs[record.peer.id]
        for start, stop in lossy.stale:
            if not np.array_equal(record.output[start:stop], own[start:stop]):
                self.complain(record.at, f"{where}: {start} to {stop} was missed, and holds other values than its own")
        if not lossy.stale_elements >= sum(stop - start for start, stop in lossy.stale):
            self.complain(record.at, f"{where}: more was missed than is counted")

    def _judge_end(self, record: RoundRecord, covered: int, where: str) -> None:
        if covered != len(record.output):
            self.complain(record.at, f"{where}: its spans end at {covered} of {len(record.output)}")
