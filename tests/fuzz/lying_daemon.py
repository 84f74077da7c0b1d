"""A daemon that takes part in everything and lies: `python -m tests.fuzz.lying_daemon SEED run --swarm ...`.

Everything it says and every chunk it sends may be changed on the way out, said twice, or said again later.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from dataclasses import replace

import numpy as np

from moshpitd.__main__ import main
from moshpitd.averaging.all_reduce import Outgoing
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.messages import Chunk, Message
from moshpitd.averaging.names import GroupId, Key, PeerId, Rank
from moshpitd.driver import Driver
from moshpitd.peer import wire
from moshpitd.peer.door import PeerDoor
from tests.fuzz.nonsense import Overheard, change

LIE_SHARE = 0.15


def lie_from_now_on(dice: random.Random) -> None:
    """Put ourselves between the driver and the door."""
    send, next_outgoing = PeerDoor.send, Driver.next_outgoing
    said: deque[tuple[Key, PeerId, str, Message]] = deque(maxlen=64)
    overheard = Overheard()

    def lying_send(door: PeerDoor, session: Key, peer: PeerId, address: str, message: Message) -> None:
        said.append((session, peer, address, message))
        overheard.listen(wire.envelope(session, message))
        send(door, session, peer, address, message)
        if dice.random() < LIE_SHARE:
            _, _, _, lie = dice.choice(said)
            envelope = wire.envelope(session, lie)
            change(envelope, [(dice.randrange(200), dice.randrange(200)) for _ in range(dice.randrange(3))], overheard)
            try:
                _, lie = wire.opened(envelope)
            except RemoteProtocolError:
                return  # what the wire refuses is tried by strangers
            send(door, session, peer, address, lie)

    def lying_chunks(driver: Driver, session: Key, group_id: GroupId, rank: Rank) -> Outgoing | None:
        outgoing = next_outgoing(driver, session, group_id, rank)
        if outgoing is None or dice.random() >= LIE_SHARE:
            return outgoing
        return dice.choice([_nan, _short, _elsewhere, _later, _of_nobody])(outgoing)

    PeerDoor.send = lying_send  # type: ignore[method-assign]
    Driver.next_outgoing = lying_chunks  # type: ignore[method-assign]


def _nan(outgoing: Outgoing) -> Outgoing:
    size = len(outgoing.encode())
    return replace(outgoing, encode=lambda: np.full(size // 4, np.nan, np.float32).tobytes())


def _short(outgoing: Outgoing) -> Outgoing:
    return replace(outgoing, encode=lambda: b"short")


def _elsewhere(outgoing: Outgoing) -> Outgoing:
    return _with(outgoing, index=outgoing.chunk.index + 1)


def _later(outgoing: Outgoing) -> Outgoing:
    return _with(outgoing, view=outgoing.chunk.view + 7)


def _of_nobody(outgoing: Outgoing) -> Outgoing:
    return _with(outgoing, contributors=(), is_average=not outgoing.chunk.is_average)


def _with(outgoing: Outgoing, **changed: object) -> Outgoing:
    chunk: Chunk = replace(outgoing.chunk, **changed)  # type: ignore[arg-type]
    return replace(outgoing, chunk=chunk)


if __name__ == "__main__":
    lie_from_now_on(random.Random(int(sys.argv.pop(1))))
    main()
