"""A trainer that owns a shard, through the client: what is written where, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import moshpit_client
from moshpit_client import Daemon
from tests.client.conftest import DEADLINE_S, DaemonProcess

WAIT_AVOIDING = {"averaging": "wait_avoiding", "group_size": 2, "barrier_every": 9, "min_peers": 2}


@pytest.fixture
def daemon(shared: DaemonProcess) -> Iterator[Daemon]:
    with moshpit_client.connect(shared.path) as daemon:
        yield daemon


def tensors() -> dict[str, npt.NDArray[np.generic]]:
    """40 elements packed: 8 double, 20 single (a strided and a plain one), 12 of bfloat16."""
    return {
        "double": np.arange(8, dtype=np.float64),
        "strided": np.arange(20, dtype=np.float32)[::2],
        "table": np.arange(10, dtype=np.float32).reshape(2, 5),
        "brain": np.arange(12).astype(ml_dtypes.bfloat16),
    }


@pytest.mark.parametrize("shared_memory", [True, False])
def test_gradients_change_in_the_shard_only_and_parameters_everywhere(daemon: Daemon, shared_memory: bool) -> None:
    parameters, gradients = tensors(), tensors()
    began = tensors()
    with daemon.open_session(parameters, shards=True, transport="lossy", shared_memory=shared_memory) as session:
        assert session.shard == {}
        receipt = session.reduce_scatter(gradients, weight=2.0, timeout=DEADLINE_S)
        assert receipt.shard is not None
        assert (receipt.shard.start, receipt.shard.stop) == (10, 20)
        assert receipt.shard.version == b"version!".hex()
        assert session.shard == {"strided": slice(2, 10), "table": slice(0, 2)}
        for name, gradient in gradients.items():
            factors = np.ones(gradient.size)
            factors[session.shard.get(name, slice(0))] = 2.0
            expected = began[name].reshape(-1) * factors.astype(began[name].dtype)
            np.testing.assert_array_equal(gradient.reshape(-1), expected, err_msg=name)
        for name, parameter in parameters.items():
            np.testing.assert_array_equal(parameter, began[name], err_msg=name)
        session.broadcast_shard(timeout=DEADLINE_S)
        for name, parameter in parameters.items():
            np.testing.assert_array_equal(parameter, 2 * began[name], err_msg=name)


def test_gradients_that_a_framework_puts_elsewhere_each_step_are_found(daemon: Daemon) -> None:
    with daemon.open_session({"w": np.ones(8, np.float32)}, shards=True) as session:
        for _ in range(3):
            gradient = np.full(8, 3.0, np.float32)
            session.reduce_scatter({"w": gradient}, timeout=DEADLINE_S)
            np.testing.assert_array_equal(gradient, [3, 3, 6, 6, 3, 3, 3, 3])


def test_who_is_alone_keeps_its_values_and_owns_what_the_receipt_says(daemon: Daemon) -> None:
    parameters, gradient = {"w": np.ones(8, np.float32)}, np.ones(8, np.float32)
    with daemon.open_session(parameters, name="alone", shards=True) as session:
        assert session.reduce_scatter({"w": gradient}, timeout=DEADLINE_S).outcome == "alone"
        assert session.shard == {"w": slice(2, 4)}
        session.broadcast_shard(timeout=DEADLINE_S)
    assert gradient.sum() == parameters["w"].sum() == 8


def test_one_whose_shards_others_took_is_told_by_a_named_error_and_owns_nothing(daemon: Daemon) -> None:
    with daemon.open_session({"w": np.ones(8, np.float32)}, name="replaced", shards=True) as session:
        with pytest.raises(moshpit_client.ShardsChanged, match="call broadcast_shard"):
            session.broadcast_shard(timeout=DEADLINE_S)
        assert session.shard == {}
    assert issubclass(moshpit_client.ShardsChanged, moshpit_client.PreconditionFailed)


def test_what_belongs_to_the_other_kind_of_session_is_refused_by_name(daemon: Daemon) -> None:
    w = {"w": np.ones(8, np.float32)}
    with daemon.open_session(w, name="sharded", shards=True, estimator="horvitz-thompson") as session:
        for call in (session.average, session.average_async, lambda: session.average_values(w)):
            with pytest.raises(moshpit_client.InvalidInput, match="'sharded' has shards: call reduce_scatter"):
                call()
        with pytest.raises(moshpit_client.InvalidInput, match="'b' is not of this session"):
            session.reduce_scatter({**w, "b": w["w"]})
        with pytest.raises(moshpit_client.InvalidInput, match=r"'w' is float32\[4\] but was float32\[8\]"):
            session.reduce_scatter({"w": np.ones(4, np.float32)})
        frozen = np.ones(8, np.float32)
        frozen.flags.writeable = False
        with pytest.raises(moshpit_client.InvalidInput, match="gradient 'w' cannot be written"):
            session.reduce_scatter({"w": frozen})
        with pytest.raises(moshpit_client.InvalidInput, match="tensor 'w' cannot be written"):
            daemon.open_session({"w": frozen}, name="frozen", shards=True)
    with daemon.open_session(w, name="whole") as session:
        for call in (lambda: session.reduce_scatter(w), session.broadcast_shard):
            with pytest.raises(moshpit_client.InvalidInput, match="'whole' has no shards: open it with shards=True"):
                call()
    assert w["w"].sum() == 8


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"estimator": "difference"}, "in a session without shards"),
        ({"shards": True, "estimator": "median"}, "'median' is unknown: give difference or horvitz-thompson"),
        ({"shards": True, "rounds": 3}, "rounds 3"),
        ({"shards": True, "feedback": "ef14"}, "owners need all of their shard"),
        ({"shards": True, "joining": "contribute"}, "calls broadcast_shard first"),
        ({"shards": True, "codec": "flash8+anchored"}, "without .anchored"),
        (
            {"shards": True, "averaging": "wait_avoiding", "group_size": 2, "barrier_every": 9, "min_peers": 2},
            "wait-av",
        ),
    ],
)
def test_what_does_not_go_with_shards_is_refused_at_open(daemon: Daemon, chosen: dict[str, object], told: str) -> None:
    with pytest.raises(moshpit_client.InvalidInput, match=told):
        daemon.open_session({"w": np.ones(8, np.float32)}, **chosen)  # type: ignore[arg-type]
