"""Doors for the tests of this room."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from moshpitd.identity import Identity
from moshpitd.peer.channels import PeerConfig
from moshpitd.peer.door import PeerDoor
from tests.peer.houses import CONFIG, SWARM, House, Told


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Callable[..., object]]:
    doors: list[PeerDoor] = []

    async def open_(swarm: bytes = SWARM, config: PeerConfig = CONFIG) -> House:
        identity = Identity.open(tmp_path / str(len(doors)))
        door = await PeerDoor.open("127.0.0.1", 0, identity=identity, swarm_id=swarm, config=config)
        doors.append(door)
        told = Told()
        await door.serve(told)
        return House(identity, door, told)

    yield open_
    for door in doors:
        await door.close(0.2)
