"""Lossy rounds over real sockets, with the kernel losing datagrams."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from moshpitd.averaging.losses import Deadline, DeadlineConfig
from moshpitd.averaging.lossy_reduce import LossyConfig, Paths
from moshpitd.averaging.messages import Address
from moshpitd.directory import DatagramSocket
from moshpitd.peer.udp import UdpConfig
from tests.averaging.group_on_paper import GroupOnPaper, flat, normal_vectors
from tests.peer.lossy_houses import Street


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_round_without_loss_is_the_reliable_one_to_the_bit(host: str, offload: bool) -> None:
    values = normal_vectors(3, 60_000)
    async with Street(3, host=host, offload=offload) as street:
        group = street.group(values)
        machines = await street.round(values, group=group)
        reliable = GroupOnPaper(group, values)
        reliable.run()
        assert sum(house.udp.refusals.total for house in street.houses) == 0
        for house, machine in zip(street.houses, machines, strict=True):
            assert machine.is_complete and machine.stale() == []
            assert house.result == reliable.result(0)


@pytest.mark.parametrize("codec", ["float32", "flash4"])
async def test_rounds_go_on_while_the_kernel_drops_a_fifth(codec: str) -> None:
    values = normal_vectors(4, 200_000)
    mean = np.mean([flat(vector) for vector in values], axis=0)
    async with Street(4, loss=0.2, offload=False) as street:
        for _ in range(3):
            machines = await street.round(values, codec=codec)
            assert all(machine.state.value == "committed" for machine in machines)
            for house in street.houses:
                values_there = house.values
                is_stale = np.zeros(len(mean), np.bool_)
                assert house.machine is not None
                for start, stop in house.machine.stale():
                    is_stale[start:stop] = True
                assert np.array_equal(values_there[is_stale], flat(values[house.rank])[is_stale])
                assert np.abs(values_there - mean)[~is_stale].mean() < 0.25
        sent = sum(house.udp.packets_sent for house in street.houses)
        arrived = sum(house.udp.packets_received for house in street.houses)
        assert 1 - arrived / sent == pytest.approx(0.2, abs=0.04)


async def test_who_cannot_be_dialled_is_heard_and_answered() -> None:
    values = normal_vectors(3, 40_000)
    async with Street(3) as street:
        group = street.group(values, undialable=[1])
        assert group.spans[1] == group.spans[2], "it holds no span"
        members = [replace(m, address=Address("")) if not m.dialable else m for m in group.members]
        machines = await street.round(values, group=replace(group, members=tuple(members)))
        assert all(machine.is_complete for machine in machines)
        assert len({house.result for house in street.houses}) == 1


async def test_a_blocked_path_is_found_out_in_the_first_round_and_not_by_a_hang() -> None:
    values = normal_vectors(3, 40_000)
    config = UdpConfig(patience_s=0.3)
    async with Street(3, config=config) as street:
        group = street.group(values)
        for _ in range(2):  # the second time it is known
            deaf = await DatagramSocket.open("127.0.0.1", 0)
            group = street.group(values)
            where = [Address(str(deaf.address)) if n == 2 else m.address for n, m in enumerate(group.members)]
            members = tuple(replace(m, address=a) for m, a in zip(group.members, where, strict=True))
            street.houses[2].socket.release(0xD7)  # a firewall before the third
            began = asyncio.get_running_loop().time()
            machines = await street.round(values, group=replace(group, members=members))
            took = asyncio.get_running_loop().time() - began
            deaf.close()
            assert all(machine.is_complete for machine in machines)
            assert len({house.result for house in street.houses}) == 1
            assert [line.is_blocked for line in machines[0].link_losses()] == [False, True]
        assert street.houses[0].udp.is_blocked(group.members[2].peer)
        assert not street.houses[0].udp.is_blocked(group.members[1].peer)
        assert took < 5
        street.houses[2].socket.claim_bulk(0xD7, lambda *_: None)


async def test_a_flood_from_a_stranger_is_counted_and_costs_nobody_the_round() -> None:
    values = normal_vectors(2, 400_000)
    async with Street(2) as street:
        stranger = await DatagramSocket.open("127.0.0.1", 0)
        victim = street.houses[0].socket.address
        flood = memoryview(bytes([0xD7]) + bytes(1403))
        is_over = False

        async def pour() -> None:
            while not is_over:
                for _ in range(20):
                    stranger.send_bulk(flood, len(flood), victim)
                await asyncio.sleep(0)

        pouring = asyncio.create_task(pour())
        machines = await street.round(values, config=LossyConfig())
        is_over = True
        await pouring
        stranger.close()
        assert all(machine.state.value == "committed" for machine in machines)
        assert street.houses[0].udp.refusals.malformed + street.houses[0].udp.refusals.unknown > 20


async def test_a_member_that_falls_silent_costs_a_deadline() -> None:
    values = normal_vectors(3, 40_000)
    async with Street(3, config=UdpConfig(patience_s=0.2)) as street:
        hurry = DeadlineConfig(first_s=0.5)
        street.paths = [Paths(scatter=Deadline(hurry), gather=Deadline(hurry)) for _ in range(3)]
        group = street.group(values)
        silent = street.houses.pop()
        street.paths.pop()
        machines = await street.round(values[:2], group=group, config=LossyConfig(repair_s=0.2))
        street.houses.append(silent)
        assert all(machine.state.value == "committed" for machine in machines)
