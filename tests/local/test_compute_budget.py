"""Compute budgets as any language sees them: raw messages over a real socket."""

from __future__ import annotations

import grpc.aio
import pytest

from moshpitd.local.v1 import daemon_pb2 as pb
from tests.local.test_server import ONES, Door, chunk, door

__all__ = ["door"]


async def test_a_budget_is_set_told_and_counted(door: Door) -> None:
    session_id, _ = await door.session()
    wish = pb.SetComputeBudgetRequest(
        session_id=session_id, micro_batches=12, normalise=pb.NORMALISE_COMPUTED, tau_seconds=0.5, warm_up=0, learn=9
    )
    told = (await door.stub.SetComputeBudget(wish)).budget
    assert (told.micro_batches, told.normalise, told.tau_seconds) == (12, pb.NORMALISE_COMPUTED, 0.5)
    options = door.driver.budgets[session_id]
    assert (options.normalise, options.tau_s, options.off, options.warm_up, options.learn) == (
        "computed",
        0.5,
        False,
        0,
        9,
    )
    begin = pb.AverageStart(session_id=session_id, micro_batch_seconds=[0.25, 0.5, 0.125])
    receipt, _ = await door.average(pb.AverageRequest(start=begin), chunk(0, ONES))
    assert door.driver.calls[0].micro_batch_s == ((0.25, 0.5, 0.125),)
    assert (receipt.receipt.budget.completed, receipt.receipt.budget.tau_seconds) == (3, 0.5)
    assert receipt.receipt.budget.note.startswith("1 of 2 members")


async def test_what_is_unset_has_the_documented_default(door: Door) -> None:
    session_id, _ = await door.session()
    await door.stub.SetComputeBudget(pb.SetComputeBudgetRequest(session_id=session_id, micro_batches=12))
    options = door.driver.budgets[session_id]
    assert (options.normalise, options.tau_s, options.warm_up, options.learn, options.refresh_every) == (
        "",
        None,
        5,
        45,
        0,
    )
    receipt, _ = await door.average(pb.AverageRequest(start=pb.AverageStart(session_id=session_id)), chunk(0, ONES))
    assert receipt.receipt.HasField("budget")


@pytest.mark.parametrize(
    ("wish", "details"),
    [
        (pb.SetComputeBudgetRequest(), "micro_batches 0"),
        (pb.SetComputeBudgetRequest(micro_batches=257), "micro_batches 257"),
        (pb.SetComputeBudgetRequest(micro_batches=4, normalise=9), "normalise 9 is unknown"),  # type: ignore[arg-type]
        (pb.SetComputeBudgetRequest(micro_batches=4, tau_seconds=0), "tau 0.0"),
        (pb.SetComputeBudgetRequest(micro_batches=4, tau_seconds=-1), "tau -1.0"),
        (pb.SetComputeBudgetRequest(micro_batches=4, tau_seconds=1, off=True), "choose one"),
        (pb.SetComputeBudgetRequest(micro_batches=4, learn=65), "learn 65"),
        (pb.SetComputeBudgetRequest(micro_batches=4, refresh_every=9), "refresh_every 9"),
    ],
)
async def test_budgets_that_make_no_sense_are_refused_by_name(
    door: Door, wish: pb.SetComputeBudgetRequest, details: str
) -> None:
    session_id, _ = await door.session()
    wish.session_id = session_id
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await door.stub.SetComputeBudget(wish)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details in str(refused.value.details())
    assert session_id not in door.driver.budgets


@pytest.mark.parametrize("seconds", [-0.5, float("nan"), float("inf")])
async def test_latencies_that_cannot_be_are_refused(door: Door, seconds: float) -> None:
    session_id, _ = await door.session()
    begin = pb.AverageStart(session_id=session_id, micro_batch_seconds=[0.5, seconds])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await door.average(pb.AverageRequest(start=begin), chunk(0, ONES))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "of micro-batch 1" in str(refused.value.details())


async def test_a_budget_of_no_session_is_not_found(door: Door) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await door.stub.SetComputeBudget(pb.SetComputeBudgetRequest(session_id="s9", micro_batches=4))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
