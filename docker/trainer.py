"""One trainer of the swarm in compose.yaml: averages vectors that it can compute for every rank, so it knows the truth.

Knows the Python client, its rank and how many ranks there are. Does not know the daemons, the grid or the other
trainers. At every step each rank fills its tensors from (rank, step) and averages them with a weight that differs from
rank to rank and from step to step; the result is held against the weighted mean in float64. What it saw goes to a
result file, for judge.py to read.

Exit code: 0 when every averaging was complete and exact, else 1.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from results import Averaging, Result

import moshpit_client


def tensors_of(rank: int, step: int, elements: int) -> dict[str, NDArray[np.float32]]:
    """Return what `rank` brings to `step`: a matrix and a bias, so that one averaging holds more than one tensor."""
    dice = np.random.default_rng([rank, step])
    return {
        "weight": dice.standard_normal((elements // 1000, 1000), dtype=np.float32),
        "bias": dice.standard_normal(1000, dtype=np.float32),
    }


def weight_of(rank: int, step: int, peers: int) -> float:
    """Return the weight of `rank` at `step`: 1 to `peers`, another rank the heaviest at every step."""
    return float(1 + (rank + step) % peers)


def relative_error(tensors: dict[str, NDArray[np.float32]], step: int, peers: int, elements: int) -> float:
    """Return the largest deviation from the weighted mean of all ranks, relative to the mean's largest value."""
    weights = [weight_of(rank, step, peers) for rank in range(peers)]
    brought = [tensors_of(rank, step, elements) for rank in range(peers)]
    deviation = scale = 0.0
    for name, averaged in tensors.items():
        mean = np.average([each[name].astype(np.float64) for each in brought], axis=0, weights=weights)
        deviation = max(deviation, float(np.abs(averaged - mean).max()))
        scale = max(scale, float(np.abs(mean).max()))
    return deviation / scale


def run(rank: int, peers: int, steps: int, elements: int, timeout_s: float) -> Result:
    """Average `steps` times with the daemon of MOSHPITD_SOCKET; the client's own errors end up in the result."""
    averagings: list[Averaging] = []
    tensors = tensors_of(rank, 0, elements)
    try:
        with moshpit_client.connect() as daemon, daemon.open_session(tensors, min_peers=peers) as session:
            for step in range(steps):
                for name, values in tensors_of(rank, step, elements).items():
                    tensors[name][:] = values
                began = time.monotonic()
                receipt = session.average(weight=weight_of(rank, step, peers), timeout=timeout_s)
                seconds = time.monotonic() - began
                bits = hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()
                averagings.append(
                    Averaging(
                        outcome=str(receipt.outcome),
                        weight=weight_of(rank, step, peers),
                        error=relative_error(tensors, step, peers, elements),
                        digest=receipt.digest,
                        bits=bits,
                        seconds=seconds,
                    )
                )
                print(f"step {step}: {averagings[-1]}")
    except moshpit_client.MoshpitError as error:
        return Result(rank, averagings, failure=f"{type(error).__name__}: {error}")
    return Result(rank, averagings)


def main() -> int:
    """Run one trainer as the environment says."""
    rank = int(os.environ["MOSHPIT_RANK"])
    result = run(
        rank,
        peers=int(os.environ.get("MOSHPIT_PEERS", "4")),
        steps=int(os.environ.get("MOSHPIT_STEPS", "5")),
        elements=int(os.environ.get("MOSHPIT_ELEMENTS", "1000000")),
        timeout_s=float(os.environ.get("MOSHPIT_TIMEOUT_S", "60")),
    )
    result.write(Path(os.environ.get("MOSHPIT_RESULTS", "/results")))
    if result.failure:
        print(result.failure, file=sys.stderr)
    return 0 if result.is_right() else 1


if __name__ == "__main__":
    raise SystemExit(main())
