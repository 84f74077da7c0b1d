"""Owners that stay, on paper: what each half brings, who may call it, and what becomes of the shards of the dead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshpitd.averaging.cohort import WaitAvoidance
from moshpitd.averaging.compute_budget import BudgetOptions
from moshpitd.averaging.errors import InvalidInput, NoGroup, Precondition, SessionError, ShardsChanged
from moshpitd.averaging.lossy_reduce import Part
from moshpitd.averaging.partition import ALIGNMENT, equal_spans
from moshpitd.averaging.receipt import Outcome, ShardLine
from moshpitd.averaging.session import Call, SessionConfig, SessionOptions
from moshpitd.averaging.shards import Half, Sharding
from moshpitd.averaging.transport import EVERYTHING_ARRIVES, Transport
from moshpitd.averaging.unbiased import Form
from moshpitd.averaging.vector import Layout, TensorSpec, Vector
from moshpitd.simulation.packet_loss import LossModel, PacketLoss
from moshpitd.simulation.swarm import Ending, Peer, Swarm
from tests.averaging.group_on_paper import GroupOnPaper, flat, group_of, normal_vectors
from tests.averaging.lossy_on_paper import LossyGroupOnPaper
from tests.averaging.test_lossy_reduce import paths_of

ELEMENTS = 10 * ALIGNMENT + 17
LAYOUT = Layout.of([TensorSpec("w", (ELEMENTS,), "float32")])
MATRIX = Layout.of([TensorSpec("w", (1024, 64), "float32")])
SCATTER, BROADCAST = Half.REDUCE_SCATTER, Half.BROADCAST_SHARD
Values = npt.NDArray[np.float32]


@dataclass
class Trainers:
    """Peers with parameters of their own, and how their calls end."""

    size: int = 4
    loss: float = 0.0
    seed: int = 1
    chosen: dict[str, object] = field(default_factory=dict)
    swarm: Swarm = field(init=False)
    parameters: dict[Peer, Values] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.swarm = Swarm(self.seed, config=SessionConfig(chunk_bytes=1 << 14, group_size_max=2))
        self.swarm.packets = PacketLoss(LossModel.even(self.loss), self.swarm.rng)
        self.rng = np.random.default_rng(self.seed)
        self.join(self.size)

    @property
    def peers(self) -> list[Peer]:
        return [peer for peer in self.parameters if peer.alive]

    def join(self, count: int = 1) -> list[Peer]:
        options = SessionOptions(LAYOUT, shards=Sharding(), **self.chosen)  # type: ignore[arg-type]
        came = [self.swarm.open(f"p{len(self.parameters) + n}", options) for n in range(count)]
        for peer in came:
            self.parameters[peer] = self.draw()
        self.swarm.run_for(2.0)
        return came

    def draw(self) -> Values:
        return self.rng.standard_normal(ELEMENTS).astype(np.float32)

    def call(
        self, halves: Mapping[Peer, Half], values: Mapping[Peer, Values], timeout_s: float = 20.0
    ) -> dict[Peer, Ending]:
        calls = {
            peer: (Vector.of({"w": values[peer]}), Call(timeout_s=timeout_s, half=half))
            for peer, half in halves.items()
        }
        endings = self.swarm.average(calls, limit_s=5 * timeout_s)
        assert self.swarm.protocol_errors == []
        return endings

    def scatter(
        self, gradients: Mapping[Peer, Values] | None = None, peers: Sequence[Peer] | None = None
    ) -> dict[Peer, Ending]:
        peers = self.peers if peers is None else peers
        return self.call(dict.fromkeys(peers, SCATTER), gradients or {peer: self.draw() for peer in peers})

    def broadcast(self, peers: Sequence[Peer] | None = None, timeout_s: float = 20.0) -> dict[Peer, Ending]:
        peers = self.peers if peers is None else peers
        endings = self.call(dict.fromkeys(peers, BROADCAST), self.parameters, timeout_s)
        for peer, ending in endings.items():
            if ending.vector is not None:
                self.parameters[peer] = ending.values.copy()
        return endings

    def step(self) -> None:
        """A whole one, in which each owner adds 1 to what it owns."""
        for peer, ending in self.scatter().items():
            self.parameters[peer][own(ending)] += 1.0
        self.broadcast()

    @property
    def distinct(self) -> int:
        return len({self.parameters[peer].tobytes() for peer in self.peers})


def shard_of(ending: Ending) -> ShardLine:
    assert ending.told.shard is not None
    return ending.told.shard


def own(ending: Ending) -> slice:
    return slice(shard_of(ending).start, shard_of(ending).stop)


def error_of(endings: Mapping[Peer, Ending], peer: Peer) -> SessionError:
    error = endings[peer].error
    assert error is not None
    return error


# ---- what the halves bring


def test_each_owner_gets_the_exact_mean_of_its_shard_and_all_get_what_owners_made_of_it() -> None:
    trainers = Trainers()
    first = trainers.broadcast()
    assert trainers.distinct == 1, "the first broadcast is where all begin"
    before = trainers.parameters[trainers.peers[0]].copy()
    gradients = {peer: trainers.draw() for peer in trainers.peers}
    mean = np.mean([each.astype(np.float64) for each in gradients.values()], axis=0)
    endings = trainers.scatter(gradients)
    shards = sorted((shard_of(ending).start, shard_of(ending).stop) for ending in endings.values())
    assert [start for start, _ in shards] == [0, *(stop for _, stop in shards[:-1])]
    assert shards[-1][1] == ELEMENTS
    assert max(stop - start for start, stop in shards) < 1.5 * ELEMENTS / 4
    for peer, ending in endings.items():
        assert ending.told.outcome is Outcome.COMPLETE
        assert not shard_of(ending).changed, "the same peers own the same"
        assert shard_of(ending).version == shard_of(first[peer]).version
        assert np.abs(ending.values[own(ending)] - mean[own(ending)]).max() < 1e-6
        trainers.parameters[peer][own(ending)] -= 0.5 * ending.values[own(ending)]
    endings = trainers.broadcast()
    assert trainers.distinct == 1
    assert np.abs(trainers.parameters[trainers.peers[0]] - (before - 0.5 * mean)).max() < 1e-6
    (digest,) = {ending.told.digest for ending in endings.values()}
    assert digest
    assert len({ending.told.rounds[0].group_id for ending in endings.values()}) == 1


def test_what_is_lost_stays_as_it_was_and_a_reliable_step_brings_all_to_the_same_bits() -> None:
    trainers = Trainers(loss=0.1, chosen={"transport": Transport("lossy", every=4)})
    trainers.broadcast()
    assert trainers.distinct == 1, "who has nothing of the others' yet gets all of it"
    for number in range(8):
        trainers.step()
        receipts = [peer.endings[-1].told for peer in trainers.peers]
        assert {receipt.outcome for receipt in receipts} == {Outcome.COMPLETE}
        is_reliable = number % 4 == 3
        assert (trainers.distinct == 1) == is_reliable
        assert all(bool(receipt.digest) == is_reliable for receipt in receipts)
        stale = [receipt.rounds[0].lossy.stale_elements for receipt in receipts if receipt.rounds[0].lossy]
        assert len(stale) == (0 if is_reliable else 4)
        assert all(0 < each < ELEMENTS / 4 for each in stale)


def test_owners_between_whom_no_datagram_passes_have_each_other_all_the_same() -> None:
    trainers = Trainers(4, loss=0.1, chosen={"transport": Transport("lossy", every=100)})
    trainers.broadcast()
    one, other, *_ = trainers.peers
    trainers.swarm.no_datagrams.add(frozenset((one.id, other.id)))
    took: list[float] = []
    for _ in range(3):
        began = trainers.swarm.now
        trainers.step()
        took.append(trainers.swarm.now - began)
    assert max(took[1:]) < 1.0 < took[0] < 10.0, "found out in the first call, known from then on"
    for peer, blocked in ((one, other), (other, one)):
        for ending in peer.endings[-2:]:
            assert ending.told.outcome is Outcome.COMPLETE, ending.told.why
            lossy = ending.told.rounds[0].lossy
            assert lossy is not None
            assert [line.peer for line in lossy.links if line.blocked] == [blocked.id]


@pytest.mark.parametrize("form", list(Form))
def test_the_mean_of_a_shard_does_not_lean_whoever_is_heard(form: Form) -> None:
    values = normal_vectors(4, 5 * ALIGNMENT, seed=5)
    group = group_of(values)
    mean = np.mean([flat(each) for each in values], axis=0)
    errors = np.zeros((30, 5 * ALIGNMENT))
    for seed in range(30):
        paper = LossyGroupOnPaper(
            group, values, loss=0.3, seed=seed, part=Part.SCATTER, form=form, paths=paths_of(4)
        ).run()
        assert paper.committed == [0, 1, 2, 3]
        assert all(machine.unrepaired == 0 for machine in paper.machines), "who went first still sent again"
        for rank in range(4):
            mine = slice(group.spans[rank], group.spans[rank + 1])
            errors[seed][mine] = paper.result(rank)[mine] - mean[mine]
    lean = errors.mean(axis=0)
    noise = errors.std(axis=0) / np.sqrt(30)
    assert abs(float(lean.mean())) < 4 * float(noise.mean()) / np.sqrt(150), "150 ranges that are lost or not"


def test_where_nothing_may_be_lost_both_halves_are_the_all_reduce_to_the_bit() -> None:
    values = normal_vectors(5, 60_000)
    group = group_of(values, weights=[1.0, 3.0, 0.0, 2.0, 2.0])
    whole = GroupOnPaper(group, values)
    whole.run()
    scattered = LossyGroupOnPaper(group, values, loss=0.9, part=Part.SCATTER, is_reliable=True).run()
    for rank in range(5):
        mine = slice(group.spans[rank], group.spans[rank + 1])
        assert np.array_equal(scattered.result(rank)[mine], whole.result_flat(rank)[mine])
    gathered = LossyGroupOnPaper(group, scattered.results, loss=0.9, part=Part.GATHER, is_reliable=True).run()
    assert {result.buffer.tobytes() for result in gathered.results} == {whole.result(0)}
    assert len({machine.digest for machine in gathered.machines}) == 1
    assert all(machine.digest and machine.is_complete for machine in gathered.machines)
    assert scattered.packets == gathered.packets == 0


def test_a_member_that_dies_costs_the_others_its_gradient_and_no_time() -> None:
    values = normal_vectors(4, 60_000)
    for is_reliable in (False, True):
        paper = LossyGroupOnPaper(group_of(values), values, part=Part.SCATTER, is_reliable=is_reliable)
        paper.kill(3, noticed_s=0.01)
        paper.run()
        assert paper.committed == [0, 1, 2]
        assert paper.now < 1.0
        assert all(len(machine.dropped_lines()) == 1 for machine in paper.machines[:3])


# ---- who takes part


def test_who_calls_the_other_half_is_not_averaged_with_and_all_are_told() -> None:
    trainers = Trainers(3)
    trainers.broadcast()
    one, *others = trainers.peers
    values = {peer: trainers.draw() for peer in trainers.peers}
    endings = trainers.call({one: BROADCAST, **dict.fromkeys(others, SCATTER)}, values)
    for peer in trainers.peers:
        error = error_of(endings, peer)
        assert isinstance(error, Precondition)
        assert "p0------ called broadcast_shard" in str(error) and "by turns" in str(error)
    assert {ending.told.outcome for ending in trainers.scatter().values()} == {Outcome.COMPLETE}


def test_a_late_owner_is_waited_for_then_named_and_keeps_its_shard() -> None:
    trainers = Trainers(3)
    before = {peer: shard_of(ending) for peer, ending in trainers.broadcast().items()}
    late, *punctual = trainers.peers
    began = trainers.swarm.now
    endings = trainers.scatter(peers=punctual)
    assert trainers.swarm.now - began > 15.0
    for peer in punctual:
        assert isinstance(error_of(endings, peer), NoGroup)
        assert "p0------ was expected but did not come in time" in str(error_of(endings, peer))
    for peer, ending in trainers.scatter().items():
        assert ending.told.outcome is Outcome.COMPLETE
        assert (shard_of(ending).start, shard_of(ending).version) == (before[peer].start, before[peer].version)
    assert late in trainers.peers


def test_the_shard_of_one_that_dies_between_the_halves_is_given_by_its_neighbour_then_shared_out() -> None:
    trainers = Trainers(4)
    trainers.step()
    trainers.step()
    old = trainers.parameters[trainers.peers[0]].copy()
    scattered = trainers.scatter()
    dead = trainers.peers[1]
    lost = own(scattered[dead])
    trainers.swarm.kill(dead)
    trainers.swarm.run_for(2.0)
    for peer in trainers.peers:
        trainers.parameters[peer][own(scattered[peer])] += 1.0
    endings = trainers.broadcast()
    assert trainers.distinct == 1
    expected = old + 1.0
    expected[lost] = old[lost]
    assert np.array_equal(trainers.parameters[trainers.peers[0]], expected)
    for ending in endings.values():
        assert ending.told.outcome is Outcome.PARTIAL
        assert f"the owner of elements {lost.start} to {lost.stop} is gone" in ending.told.why
    endings = trainers.scatter()
    assert all(ending.told.outcome is Outcome.COMPLETE and shard_of(ending).changed for ending in endings.values())
    assert sum(shard_of(ending).stop - shard_of(ending).start for ending in endings.values()) == ELEMENTS
    assert {shard_of(ending).version for ending in endings.values()}.isdisjoint({shard_of(scattered[dead]).version})


def test_a_newcomer_receives_what_the_owners_hold_before_it_owns_anything() -> None:
    trainers = Trainers(3)
    trainers.step()
    (new,) = trainers.join()
    trainers.swarm.start(new, Vector.of({"w": trainers.draw()}), Call(half=SCATTER))
    trainers.swarm.run_for(0.5)
    endings = trainers.scatter(peers=[peer for peer in trainers.peers if peer is not new])
    refusal = new.endings[-1].error
    assert isinstance(refusal, Precondition)
    assert "broadcast_shard first" in str(refusal)
    for peer, ending in endings.items():
        assert ending.told.outcome is Outcome.COMPLETE
        trainers.parameters[peer][own(ending)] += 1.0
    endings = trainers.broadcast()
    assert trainers.distinct == 1
    assert endings[new].told.joined
    assert endings[new].told.shard is None
    endings = trainers.scatter()
    assert all(shard_of(ending).changed for ending in endings.values())


def test_a_newcomer_that_broadcasts_while_the_owners_scatter_waits_for_their_broadcast() -> None:
    trainers = Trainers(3)
    trainers.step()
    (new,) = trainers.join()
    owners = [peer for peer in trainers.peers if peer is not new]
    trainers.swarm.start(new, Vector.of({"w": trainers.parameters[new]}), Call(timeout_s=60.0, half=BROADCAST))
    endings = trainers.scatter(peers=owners)
    assert all(ending.told.outcome is Outcome.COMPLETE for ending in endings.values())
    assert new.busy
    trainers.swarm.run_for(1.0)
    trainers.broadcast(owners)
    trainers.swarm.run_until(lambda: not new.busy, 5.0)
    assert new.endings[-1].told.joined
    assert np.array_equal(new.endings[-1].values, trainers.parameters[owners[0]])


def test_an_owner_that_stood_still_brings_no_old_values_back() -> None:
    trainers = Trainers(4, chosen={"min_peers": 2})
    trainers.step()
    slow, *others = trainers.peers
    for half in (SCATTER, SCATTER):  # missed twice, it is not waited for
        values = {peer: trainers.draw() for peer in others}
        endings = trainers.call(dict.fromkeys(others, half), values, timeout_s=3.0)
        assert all(isinstance(ending.error, NoGroup) for ending in endings.values())
    for peer, ending in trainers.scatter(peers=others).items():
        assert ending.told.outcome is Outcome.COMPLETE
        trainers.parameters[peer][own(ending)] += 5.0
    trainers.broadcast(others)
    held = trainers.parameters[others[0]].copy()
    trainers.swarm.start(slow, Vector.of({"w": trainers.draw()}), Call(half=SCATTER))
    trainers.swarm.run_for(1.0)
    assert all(ending.told.outcome is Outcome.COMPLETE for ending in trainers.scatter(peers=others).values())
    refusal = slow.endings[-1].error
    assert isinstance(refusal, ShardsChanged)
    assert "Call broadcast_shard: it brings their values" in str(refusal)
    trainers.broadcast()
    assert trainers.distinct == 1
    assert np.array_equal(trainers.parameters[slow], held)
    assert all(ending.told.outcome is Outcome.COMPLETE for ending in trainers.scatter().values())


def test_one_that_is_alone_owns_all_of_it_until_another_received_it() -> None:
    trainers = Trainers(1)
    trainers.broadcast()
    (ending,) = trainers.scatter().values()
    assert ending.told.outcome is Outcome.ALONE
    assert own(ending) == slice(0, ELEMENTS)
    one = trainers.peers[0]
    trainers.parameters[one] += 1.0
    held = trainers.parameters[one].copy()
    (new,) = trainers.join()
    gradients = {peer: trainers.draw() for peer in trainers.peers}
    # The newcomer broadcasts first, as every trainer; the other is about to scatter, and goes on alone meanwhile.
    trainers.swarm.start(new, Vector.of({"w": trainers.parameters[new]}), Call(timeout_s=60.0, half=BROADCAST))
    endings = trainers.call({one: SCATTER}, gradients)
    assert endings[one].told.outcome is Outcome.ALONE
    trainers.broadcast([one])
    trainers.swarm.run_until(lambda: not new.busy, 5.0)
    assert np.array_equal(new.endings[-1].values, held)
    assert np.array_equal(trainers.parameters[one], held)


def test_sharded_training_over_lossy_paths_ends_where_unsharded_training_does() -> None:
    trainers = Trainers(4, loss=0.1, chosen={"transport": Transport("lossy", every=8)})
    trainers.broadcast()
    targets = {peer: trainers.draw() for peer in trainers.peers}
    best = np.mean([each.astype(np.float64) for each in targets.values()], axis=0)
    apart: list[float] = []
    for _ in range(40):
        gradients = {peer: trainers.parameters[peer] - targets[peer] for peer in trainers.peers}
        for peer, ending in trainers.scatter(gradients).items():
            trainers.parameters[peer][own(ending)] -= 0.3 * ending.values[own(ending)]
        trainers.broadcast()
        apart.append(float(np.std([trainers.parameters[peer] for peer in trainers.peers], axis=0).mean()))
    for peer in trainers.peers:
        assert np.abs(trainers.parameters[peer] - best).mean() < 0.15, "of values about 1 apart"
    assert apart[-1] == 0.0, "the last step was a reliable one"
    assert max(apart[20:]) <= max(apart[:20]), "no drift"


def free_trainer(trainers: Trainers, peer: Peer, errors: list[SessionError]) -> None:
    """Calls by turns, and again what failed; who is told to receive first does."""
    half = BROADCAST

    def call() -> None:
        values = trainers.parameters[peer] if half is BROADCAST else trainers.draw()
        trainers.swarm.start_if_alive(peer, Vector.of({"w": values}), Call(timeout_s=10.0, half=half))

    def ended(ending: Ending) -> None:
        nonlocal half
        if ending.error is not None:
            errors.append(ending.error)
            half = BROADCAST if isinstance(ending.error, Precondition) else half
        elif half is BROADCAST:
            trainers.parameters[peer] = ending.values.copy()
            half = SCATTER
        else:
            trainers.parameters[peer][own(ending)] += 1.0
            half = BROADCAST
        trainers.swarm.at(trainers.swarm.now + trainers.swarm.rng.uniform(0.05, 1.0), call)

    peer.on_end = ended
    call()


@pytest.mark.parametrize("seed", range(3))
def test_trainers_that_run_free_go_on_whoever_dies_comes_or_stands_still(seed: int) -> None:
    trainers = Trainers(4, loss=0.1, seed=seed, chosen={"transport": Transport("lossy", every=3), "min_peers": 2})
    swarm = trainers.swarm
    errors: dict[Peer, list[SessionError]] = {}

    def put_to_work(peers: Sequence[Peer]) -> None:
        for peer in peers:
            free_trainer(trainers, peer, errors.setdefault(peer, []))

    put_to_work(trainers.peers)
    swarm.run_for(6.0)
    swarm.kill(swarm.rng.choice(trainers.peers), silent=seed == 0)
    swarm.run_for(5.0)
    put_to_work(trainers.join())
    swarm.run_for(5.0)
    stopped = swarm.rng.choice(trainers.peers)
    swarm.pause(stopped)
    swarm.run_for(30.0)
    swarm.resume(stopped)
    swarm.run_for(30.0)
    before = {peer: len(peer.endings) for peer in trainers.peers}
    failures = {peer: len(errors[peer]) for peer in trainers.peers}
    swarm.run_for(20.0)
    assert all(len(peer.endings) - before[peer] > 10 for peer in trainers.peers)
    assert {peer: len(errors[peer]) for peer in trainers.peers} == failures, "all is well again"
    assert swarm.protocol_errors == []
    shards = [shard_of(next(e for e in reversed(peer.endings) if e.receipt)) for peer in trainers.peers]
    assert len({shard.version for shard in shards}) == 1
    assert sum(shard.stop - shard.start for shard in shards) == ELEMENTS


# ---- what is refused


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"compressor": "arc:0.2,4,ef14"}, "owners need all of their shard"),
        ({"codec": "flash8+anchored"}, "without +anchored"),
        ({"codec": "*.b=float32,*=flash8"}, "one codec for all"),
        ({"rounds": 2}, "each of its calls is one"),
        ({"joining": "contribute"}, "calls broadcast_shard first"),
        ({"min_peers": 65}, "takes 64 peers"),
        ({"wait_avoidance": WaitAvoidance(2, 10), "min_peers": 2}, "wait-avoiding"),
    ],
)
@pytest.mark.parametrize("transport", [EVERYTHING_ARRIVES, Transport("lossy")])
def test_what_does_not_go_with_shards_is_refused_by_name(
    chosen: dict[str, object], told: str, transport: Transport
) -> None:
    options = SessionOptions(MATRIX, shards=Sharding(), transport=transport, **chosen)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=told.replace("+", r"\+")):
        options.check()


def test_calls_of_another_kind_of_session_are_refused_by_name() -> None:
    trainers = Trainers(1)
    (peer,) = trainers.peers
    vector = Vector.of({"w": trainers.draw()})
    for call, told in [
        (Call(), "call reduce_scatter and broadcast_shard by turns"),
        (Call(half=SCATTER, epoch=3), "numbered by the daemons"),
        (Call(half=BROADCAST, weight=2.0), "is not averaged"),
    ]:
        with pytest.raises(InvalidInput, match=told):
            trainers.swarm.start(peer, vector, call)
    with pytest.raises(InvalidInput, match="every second call there has none"):
        peer.machine.set_budget(BudgetOptions(4), 0.0)
    plain = trainers.swarm.open("plain", SessionOptions(LAYOUT, name="other"))
    with pytest.raises(InvalidInput, match="without shards"):
        trainers.swarm.start(plain, vector, Call(half=SCATTER))


def test_sessions_with_and_without_shards_never_meet() -> None:
    swarm = Swarm(1, config=SessionConfig(chunk_bytes=1 << 14))
    options = [SessionOptions(LAYOUT, shards=shards) for shards in (Sharding(), Sharding(), None)]
    *_, odd = (swarm.open(f"p{n}", each) for n, each in enumerate(options))
    swarm.run_for(2.0)
    ending = swarm.average({odd: (Vector.zeros(LAYOUT), Call(timeout_s=5.0))})[odd]
    assert isinstance(ending.error, Precondition)
    assert "averaging 'synchronous' against 'shards'" in str(ending.error)


def test_all_weights_zero_is_refused() -> None:
    trainers = Trainers(2)
    trainers.broadcast()
    calls = {peer: (Vector.of({"w": trainers.draw()}), Call(0.0, half=SCATTER)) for peer in trainers.peers}
    for ending in trainers.swarm.average(calls).values():
        assert isinstance(ending.error, InvalidInput)
        assert "give at least one peer a positive weight" in str(ending.error)


# ---- how shards are cut


@given(
    elements=st.lists(st.integers(0, 60_000), min_size=1, max_size=3).filter(any),
    dialable=st.lists(st.booleans(), min_size=1, max_size=12).filter(any),
)
def test_shards_are_equal_aligned_and_cover_everything(elements: list[int], dialable: list[bool]) -> None:
    dtypes = ["float64", "float32", "float16"]
    layout = Layout.of(TensorSpec(str(n), (size,), dtypes[n]) for n, size in enumerate(elements))
    undialable = [rank for rank, able in enumerate(dialable) if not able]
    members = group_of([Vector.zeros(layout) for _ in dialable], undialable=undialable).members
    edges = equal_spans(layout, members)
    assert (edges[0], edges[-1]) == (0, layout.elements)
    sizes = np.diff(edges)
    share = layout.elements / sum(dialable)
    assert all(size == 0 for size, able in zip(sizes, dialable, strict=True) if not able)
    assert all(abs(size - share) <= 2 * ALIGNMENT for size, able in zip(sizes, dialable, strict=True) if able)
    starts = {segment.start for segment in layout.segments}
    for edge in edges[1:-1]:
        segment = max(start for start in starts if start <= edge)
        ends_segment = edge in {segment.stop for segment in layout.segments}
        assert (edge - segment) % ALIGNMENT == 0 or ends_segment
