"""`moshpitd` whose kernel loses datagrams of lossy rounds: `python -m tests.end_to_end.lossy_daemon SHARE run ...`.

What the directory says arrives: only what begins with the bulk byte meets the dice, on its way into this daemon. Each
datagram meets its own, so those that the kernel would hand over joined together (GRO) are not joined.
"""

from __future__ import annotations

import sys

import moshpitd.daemon
from moshpitd.__main__ import main
from moshpitd.directory import DatagramSocket
from moshpitd.peer.datagrams import FIRST_BYTE
from tests.peer.lossy_houses import lose_incoming

if __name__ == "__main__":
    share = float(sys.argv.pop(1))

    class LosingSocket(DatagramSocket):
        """Of which the kernel drops a share of the bulk datagrams."""

        @classmethod
        async def open(cls, host: str, port: int, **_: object) -> DatagramSocket:
            opened = await DatagramSocket.open(host, port, offload=False)
            lose_incoming(opened.fileno(), share, first_byte=FIRST_BYTE)
            return opened

    moshpitd.daemon.DatagramSocket = LosingSocket  # type: ignore[misc]
    main()
