"""A trainer to be killed or forked: `python -m tests.client.trainer SOCKET SESSION HOW`."""

from __future__ import annotations

import multiprocessing
import sys
import threading

import numpy as np

import moshpit_client


def main(socket: str, name: str, how: str) -> None:
    w = np.ones(3, np.float32)
    session = moshpit_client.connect(socket).open_session({"w": w}, name=name)
    if how == "with-workers":
        multiprocessing.get_context("fork").Process(target=threading.Event().wait, daemon=True).start()
    if how == "averaging":
        session.average(progress=lambda progress: print("waiting", flush=True))
    print("open", flush=True)
    if how != "leaving":
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
