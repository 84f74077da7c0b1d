"""What an all-reduce costs under torch.distributed's Gloo: one process a peer on loopback, one round after another.

Knows torch; does not know moshpitd. Runs in an environment of its own and is spoken to as rivals.py has it. A round is
one `all_reduce` (a sum: Gloo has no average, and we leave out the division that would follow) of one float32 tensor,
between two barriers; its time is the slowest peer's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed


def be_a_peer(link, meeting_point: Path, rank: int, peers: int) -> None:  # type: ignore[no-untyped-def]
    """One rank's process, until its link is closed."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting_point.as_uri(), rank=rank, world_size=peers)
    tensor = torch.empty(0)
    while True:
        try:
            request = link.recv()
        except EOFError:
            return
        if request["do"] == "open":
            tensor = torch.empty(int(request["megabytes"] * 1e6) // 4)
            link.send(None)
        elif request["do"] == "fill":
            tensor.fill_(rank + 1.0)
            link.send(None)
        else:
            torch.distributed.barrier()
            began = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            ended = time.perf_counter()
            expected = peers * (peers + 1) / 2
            link.send((ended - began, bool(tensor.min() == expected and tensor.max() == expected)))


def main() -> None:
    """Starts the peers, then answers line by line until its input ends."""
    parser = argparse.ArgumentParser(description="Measure rounds of torch.distributed's all_reduce over Gloo.")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--group-size", type=int, help="all of them: there are no groups here")
    arguments = parser.parse_args()
    assert arguments.group_size in (None, arguments.peers)
    # Otherwise Gloo asks the host's name for an address, which need not be this machine's.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    context = multiprocessing.get_context("spawn")
    links = []
    with tempfile.TemporaryDirectory() as scratch:
        for rank in range(arguments.peers):
            ours, theirs = context.Pipe()
            where = Path(scratch, "meet")
            context.Process(target=be_a_peer, args=(theirs, where, rank, arguments.peers), daemon=True).start()
            theirs.close()
            links.append(ours)
        for line in sys.stdin:
            request = json.loads(line)
            for link in links:
                link.send(request)
            answers = [link.recv() for link in links]
            answer: dict[str, object] = {"version": f"torch {torch.__version__}"}
            if request["do"] == "round":
                slowest = max(seconds for seconds, _ in answers)
                answer = {"data_seconds": slowest, "seconds": slowest, "is_whole": True}
                answer["is_right"] = all(right for _, right in answers)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
