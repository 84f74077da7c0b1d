"""A trainer to be killed: `python -m tests.end_to_end.trainer SOCKET SESSION ELEMENTS MIN_PEERS`."""

from __future__ import annotations

import sys

import numpy as np

import moshpit_client


def main(socket: str, name: str, elements: str, min_peers: str) -> None:
    tensors = {"w": np.ones(int(elements), np.float32)}
    session = moshpit_client.connect(socket).open_session(tensors, name=name, min_peers=int(min_peers))
    print("open", flush=True)
    print(session.average().outcome, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
