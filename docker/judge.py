"""Reads what the trainers of compose.yaml wrote, draws a table and says whether the swarm was right.

Knows the result files only (results.py); does not know the daemons. Right means: every rank is there without a
failure, every averaging was complete and exact, and at every step all ranks hold the same bits, by the receipts' digest
and by the trainers' own.

Exit code: 0 right, 1 wrong, 5 when a result was still missing at the deadline.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from results import RELATIVE_ERROR_MAX, Result


def complaints(results: list[Result], peers: int) -> list[str]:
    """Return what is wrong, each in one line; nothing when the swarm was right."""
    wrong = [f"rank {rank} left no result" for rank in range(peers) if rank not in {result.rank for result in results}]
    for result in results:
        if result.failure:
            wrong.append(f"rank {result.rank}: {result.failure}")
        elif not result.averagings:
            wrong.append(f"rank {result.rank} never averaged")
        for step, averaging in enumerate(result.averagings):
            where = f"rank {result.rank}, step {step}"
            if averaging.outcome != "complete":
                wrong.append(f"{where}: the outcome is {averaging.outcome}, not complete")
            if not averaging.error <= RELATIVE_ERROR_MAX:
                wrong.append(f"{where}: {averaging.error:.1e} off the exact mean, allowed {RELATIVE_ERROR_MAX:.0e}")
    counts = {len(result.averagings) for result in results}
    if len(counts) > 1:
        wrong.append(f"some averaged more often than others: {sorted(counts)} times")
    for step in range(max(counts, default=0)):
        here = [result.averagings[step] for result in results if step < len(result.averagings)]
        if len({averaging.digest for averaging in here}) > 1:
            wrong.append(f"step {step}: the receipts' digests differ between ranks")
        if len({averaging.bits for averaging in here}) > 1:
            wrong.append(f"step {step}: the trainers hold different bits")
    return wrong


def table(results: list[Result]) -> str:
    """Return one line a rank: outcomes, the worst error, the slowest step and the digest of the last one."""
    lines = ["rank  averagings  outcomes    worst error  slowest step  last digest"]
    for result in sorted(results, key=lambda each: each.rank):
        averagings = result.averagings
        outcomes = "/".join(sorted({averaging.outcome for averaging in averagings})) or "none"
        error = max((averaging.error for averaging in averagings), default=float("nan"))
        seconds = max((averaging.seconds for averaging in averagings), default=float("nan"))
        digest = averagings[-1].digest[:12] if averagings else "-"
        lines.append(
            f"{result.rank:>4}  {len(averagings):>10}  {outcomes:<10}  {error:>11.1e}  {seconds:>10.3f} s  {digest}"
        )
    return "\n".join(lines)


def main() -> int:
    """Wait for all results, at most until the deadline, and judge what is there."""
    peers = int(os.environ.get("MOSHPIT_PEERS", "4"))
    directory = Path(os.environ.get("MOSHPIT_RESULTS", "/results"))
    deadline = time.monotonic() + float(os.environ.get("MOSHPIT_DEADLINE_S", "120"))
    results: list[Result] = []
    while True:
        results = [result for rank in range(peers) if (result := Result.read(directory, rank))]
        if len(results) == peers or time.monotonic() >= deadline:
            break
        time.sleep(0.2)
    print(table(results))
    wrong = complaints(results, peers)
    for line in wrong:
        print(f"wrong: {line}")
    if not wrong:
        print(f"right: {peers} ranks, every averaging complete, exact and the same bits everywhere")
    return 5 if len(results) < peers else int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
