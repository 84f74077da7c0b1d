"""One trainer of the demo: a small network, a shard of digits, and a daemon to average through.

Knows its own shard and the socket of its daemon; does not know the other trainers, the grid, nor anything of moshpitd
but `moshpit_client`. The loop in `main` is what moshpitd asks of anybody's training loop: open a session on the
parameters, call `average` every few steps, go on with what stands in the arrays afterwards.

For run.py, which started it, it prints one JSON object a line, an `averaging` after each averaging and a `finished` at
the end, and saves the parameters as they were before and after each averaging under `--record`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Literal

import numpy as np
from network import BATCH, Network, batches

import moshpit_client


def main() -> None:
    """Trains on one shard, averaging through the daemon."""
    parser = argparse.ArgumentParser(description="One trainer of the digits demo; run.py starts eight of them.")
    parser.add_argument("--socket", required=True, help="of this trainer's daemon")
    parser.add_argument("--shard", type=Path, required=True, help="an .npz with this trainer's `pixels` and `labels`")
    parser.add_argument("--record", type=Path, required=True, help="directory for the parameters of every averaging")
    parser.add_argument("--seed", type=int, required=True, help="of the order of batches")
    parser.add_argument("--peers", type=int, required=True, help="begin an averaging only when so many are there")
    parser.add_argument("--averagings", type=int, required=True)
    parser.add_argument("--local-steps", type=int, required=True, help="steps of SGD between two averagings")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for one averaging")
    arguments = parser.parse_args()

    with np.load(arguments.shard) as shard:
        pixels, labels = shard["pixels"], shard["labels"]
    network = Network()
    draws = batches(pixels, labels, BATCH, arguments.seed)

    def train_and_average(session: moshpit_client.Session, number: int, epoch: int) -> None:
        for _ in range(arguments.local_steps):
            network.step(*next(draws))
        before = network.vector()
        receipt = session.average(weight=float(len(labels)), timeout=arguments.timeout, epoch=epoch)
        np.save(arguments.record / f"averaging-{number:03}.npy", np.stack([before, network.vector()]))
        first = receipt.rounds[0] if receipt.outcome != "alone" else None
        report = {
            "event": "averaging",
            "number": number,
            "outcome": receipt.outcome,
            "axis": first.axis if first else None,
            "group": first.group_id if first else f"nobody but {arguments.socket}",
            "members": len(first.members) if first else 1,
            "seconds": receipt.seconds.total,
            "loss": network.loss(pixels, labels),
        }
        print(json.dumps(report), flush=True)

    def open_session(daemon: moshpit_client.Daemon, name: str, rounds: Literal["auto"] | int) -> moshpit_client.Session:
        return daemon.open_session(network.parameters, min_peers=arguments.peers, rounds=rounds, name=name)

    # One Moshpit round an averaging: groups along one axis of the grid now, along the other the next time. Whoever is a
    # little late is to meet the others of its step and not those of the next, so the trainers count together.
    with (
        moshpit_client.connect(arguments.socket) as daemon,
        open_session(daemon, "training", rounds=1) as session,
    ):
        for number in range(arguments.averagings):
            train_and_average(session, number, epoch=number)
        # As many rounds as the grid has axes: the exact mean, and so the same model everywhere. Its session is opened
        # inside the other: nobody leaves the training while somebody may still need it there.
        with open_session(daemon, "final", rounds="auto") as last:
            train_and_average(last, arguments.averagings, epoch=0)
    print(json.dumps({"event": "finished"}), flush=True)


if __name__ == "__main__":
    main()
