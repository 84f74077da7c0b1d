"""A trainer that opens a session, goes on from a saved state, says so, and waits for its end: SOCKET STATE.npz."""

from __future__ import annotations

import sys
import threading

import numpy as np

import moshpit_client
from moshpit_client import ArcTopK


def main(socket: str, saved: str) -> None:
    tensors = {"w": np.zeros((512, 64), np.float32), "bias": np.zeros(100, np.float32)}
    compressor = ArcTopK(ratio=0.125, rank=4, feedback="ef21m", eta=0.5, warmup=0)
    with moshpit_client.connect(socket) as daemon:
        session = daemon.open_session(tensors, compressor=compressor, min_peers=3)
        session.load_feedback_state(dict(np.load(saved)))
        print("restored", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
