"""A trainer's stay in a swarm: averages its tensors, call by call.

Knows how an averaging goes over the wire and that a result counts only when all of it has arrived. Does not know how
tensors lie in memory (tensors.py) nor what the daemon does with them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from moshpit_client.compute_budget import ComputeBudget, budget_request, normalise_number, read_budget
from moshpit_client.connection import ANSWER_SECONDS, Connection, keep_in_children
from moshpit_client.errors import (
    DaemonBug,
    DaemonLeaving,
    DaemonUnreachable,
    InvalidInput,
    MoshpitError,
    NoGroup,
    NotFound,
    PreconditionFailed,
    ShardsChanged,
)
from moshpit_client.receipt import Receipt, Shard, read_receipt
from moshpit_client.shared_memory import NotShared, SharedBuffers
from moshpit_client.tensors import (
    TensorSpec,
    View,
    add_change,
    byte_at,
    canonical,
    pack,
    pack_into,
    parts_of,
    read_spec,
    unpack,
    view,
    write_part,
)
from moshpit_client.v1 import daemon_pb2 as pb

CLOSE_SECONDS = 60.0
"""For CloseSession, which may wait for a running round to end for the others."""
GATHER_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """What an averaging waits for."""

    text: str
    """2 of 8 peers here, waiting for 6 more, 21 s left"""
    fraction: float
    """From 0 to 1."""


ProgressCall = Callable[[Progress], None]
Normalise = Literal["fixed", "computed"]


@dataclass(frozen=True, slots=True)
class _CountedStep:
    """A step under a compute budget, on its way to be averaged."""

    budget: ComputeBudget
    seconds: tuple[float, ...]
    """Of each completed micro-batch."""
    normalise: str | None


@dataclass(frozen=True, eq=False, slots=True)
class _Change:
    """What an averaging brought: both packed, both ours alone."""

    before: npt.NDArray[np.uint8]
    after: npt.NDArray[np.uint8]


class Delta(Future[Receipt]):
    """What `Session.average_async(apply="delta")` returns: a future of the receipt, and the change, to be applied at a
    moment of the trainer's choosing."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self._change: _Change | None = None
        self._is_over = False
        self._applying = threading.Lock()

    def apply(self, timeout: float | None = None) -> Receipt:
        """Wait until the averaging is done, then add what it changed to the tensors as they are now, in this thread and
        in place: tensor = result + (tensor - contribution). Once: called again it only returns the receipt.

        timeout: seconds to wait here; None waits for the averaging's own end. Raises TimeoutError, or the error of the
        averaging, and then the tensors are as they were.
        """
        receipt = self.result(timeout)
        with self._applying:
            if self._change is not None:
                self._session._apply(self._change)
            self._change, self._is_over = None, True
        return receipt

    @property
    def is_pending(self) -> bool:
        """Whether there is, or may come, something to apply."""
        if not self.done():
            return True
        return not self.cancelled() and self.exception() is None and not self._is_over

    def bring(self, receipt: Receipt, change: _Change | None) -> None:
        """For the session: how the averaging ended."""
        self._change, self._is_over = change, change is None
        self.set_result(receipt)


class Session:
    """Made by `Daemon.open_session`. Averagings of a session take turns, whatever threads they are called from."""

    def __init__(
        self,
        connection: Connection,
        request: pb.OpenSessionRequest,
        specs: Mapping[str, TensorSpec],
        tensors: Mapping[str, object],
        initial_peers: int,
    ) -> None:
        self._connection = connection
        self._specs = canonical(specs)
        self._tensors = dict(tensors)
        self._initial_peers = initial_peers
        self._turn = threading.Lock()
        self._vector_bytes = sum(spec.byte_size for spec in self._specs)
        self._staging: npt.NDArray[np.uint8] | None = None
        """Where streamed results of `average` arrive; kept, because fresh memory is the slowest part of a large one."""
        self._contribution: npt.NDArray[np.uint8] | None = None
        """What `contribution` handed out while there is no shared memory."""
        self._shared: SharedBuffers | None = None
        self._shared_is_ours = True
        """False from a call's start until its receipt: after an error the daemon may still read what we gave it."""
        self._delta: Delta | None = None
        """The last one: two at once would count what the first brought twice."""
        self._budget: ComputeBudget | None = None
        self._has_shards = request.shards
        self._shard: Shard | None = None
        self._closed = False
        with connection.errors():
            # Held open, not read: the session lives as long as this call.
            self._life = connection.calls.open_session(request)
            try:
                opened = next(iter(self._life))
            except StopIteration:
                raise DaemonBug("the daemon ended the session's call before naming the session: report it") from None
        keep_in_children(self._life)
        self.session_id = opened.session_id
        self.name = request.name
        if opened.HasField("shared_memory"):
            self._attach(opened.shared_memory)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<moshpit_client.Session {self.name!r} of {len(self._specs)} tensors on {self._connection.socket}>"

    def average(
        self,
        weight: float = 1.0,
        timeout: float = 60.0,
        epoch: int | None = None,
        progress: ProgressCall | None = None,
        normalise: Normalise | None = None,
    ) -> Receipt:
        """Average the session's tensors in place.

        weight: of these values, finite and not negative; the samples since the last averaging, say.
        timeout: seconds this call is willing to wait for peers and the result.
        epoch: meet only peers with the same epoch; None meets the newest open averaging.
        progress: called in this thread while waiting.
        normalise: with a compute budget, see there; None is what it has, and in the beginning "fixed".

        The tensors change only when the whole result has arrived; after any error they are as they were. Raises
        InvalidInput for tensors that cannot be written (JAX): use `average_values`.
        """
        self._require_whole()
        return self._average(weight, timeout, epoch, progress, self._step_of(normalise))

    def _average(
        self, weight: float, timeout: float, epoch: int | None, progress: ProgressCall | None, step: _CountedStep | None
    ) -> Receipt:
        with self._turn:
            views = [self._view(spec) for spec in self._specs]
            receipt, packed = self._exchange(views, self._kept_staging, weight, timeout, epoch, progress, step)
            if packed is not None:
                arrays = unpack(packed, self._specs)
                for each in views:
                    np.copyto(each.array, arrays[each.spec.name])
            return receipt

    @overload
    def average_async(
        self,
        weight: float = 1.0,
        timeout: float = 60.0,
        epoch: int | None = None,
        progress: ProgressCall | None = None,
        *,
        apply: Literal["overwrite"] = "overwrite",
        normalise: Normalise | None = None,
    ) -> Future[Receipt]: ...

    @overload
    def average_async(
        self,
        weight: float = 1.0,
        timeout: float = 60.0,
        epoch: int | None = None,
        progress: ProgressCall | None = None,
        *,
        apply: Literal["delta"],
        normalise: Normalise | None = None,
    ) -> Delta: ...

    def average_async(
        self,
        weight: float = 1.0,
        timeout: float = 60.0,
        epoch: int | None = None,
        progress: ProgressCall | None = None,
        *,
        apply: Literal["overwrite", "delta"] = "overwrite",
        normalise: Normalise | None = None,
    ) -> Future[Receipt]:
        """`average` in a thread of its own, where `progress` is called too. A future can be cancelled while it waits
        for its turn.

        apply: "overwrite" puts the result into the tensors as soon as it is here: neither read nor write them until the
        future is done. With "delta" the trainer keeps computing on them: what counts are the values at the time of this
        call, copied before it returns, and `Delta.apply`, called by the trainer between two steps, adds what the
        averaging changed to what the tensors are by then. Until it is applied the session averages nothing else. Takes
        two vectors of memory.

            pending = session.average_async(weight=samples, timeout=30.0, apply="delta")
            for batch in some_batches:
                train(batch)
            receipt = pending.apply()
        """
        self._require_whole()
        if apply not in ("overwrite", "delta"):
            raise InvalidInput(f"apply={apply!r}: give 'overwrite' or 'delta'")
        step = self._step_of(normalise)  # now: the trainer may compute the next one meanwhile
        match apply:
            case "overwrite":
                future: Future[Receipt] = Future()

                def average() -> None:
                    self._require()
                    self._require_applied()
                    future.set_result(self._average(weight, timeout, epoch, progress, step))

                self._in_background(future, average)
                return future
            case "delta":
                before = self._new_staging()
                pack_into(before, [self._view(spec) for spec in self._specs])
                self._delta = delta = Delta(self)
                self._in_background(
                    delta, lambda: delta.bring(*self._exchange_copy(before, weight, timeout, epoch, progress, step))
                )
                return delta

    def average_values(
        self,
        tensors: Mapping[str, object],
        weight: float = 1.0,
        timeout: float = 60.0,
        epoch: int | None = None,
        progress: ProgressCall | None = None,
        *,
        copy: bool = True,
        normalise: Normalise | None = None,
    ) -> tuple[dict[str, npt.NDArray[np.generic]], Receipt]:
        """Average these values and return new arrays: for JAX and others whose tensors cannot be written.

        Names, shapes and dtypes must be those the session was opened with. bfloat16 comes back in the dtype of
        ml_dtypes if it came as such, else as its bits in uint16.

        copy: False returns views of shared memory, where there is any: they hold until the session's next averaging
        begins. Together with `contribution` nothing is copied between trainer and daemon.
        """
        self._require_whole()
        views = self._all_given(tensors)
        step = self._step_of(normalise)
        with self._turn:
            receipt, packed = self._exchange(views, self._new_staging, weight, timeout, epoch, progress, step)
            if packed is None:
                return {
                    each.spec.name: each.array.astype(each.array.dtype).view(each.native) for each in views
                }, receipt
            if copy and not packed.flags.owndata:
                packed = packed.copy()
            arrays = unpack(packed, self._specs)
            return {each.spec.name: arrays[each.spec.name].view(each.native) for each in views}, receipt

    def reduce_scatter(
        self,
        gradients: Mapping[str, object],
        weight: float = 1.0,
        timeout: float = 60.0,
        progress: ProgressCall | None = None,
    ) -> Receipt:
        """In a session with shards: the mean of all peers' gradients, of this peer's shard, in place.

            session.broadcast_shard()  # all begin with the same; a newcomer receives
            for batch in batches:
                gradients = gradients_of(parameters, batch)
                session.reduce_scatter(gradients, weight=samples)
                for name, part in session.shard.items():
                    flat(parameters[name])[part] -= rate * flat(gradients[name])[part]
                session.broadcast_shard()

        gradients: of the names, shapes and dtypes of the session's tensors; looked up anew in each call. Outside of
            `session.shard` they stay as they are.

        An owner that does not come in time fails the call at all others with NoGroup, which names it; nothing has
        changed then, call again. `receipt.shard.changed` tells when shards were made anew, because somebody died or
        came. Raises ShardsChanged when this trainer itself was missed: call `broadcast_shard` first.
        """
        self._require_shards()
        with self._turn:
            views = self._all_given(gradients)
            if frozen := next((each.spec.name for each in views if each.immutable), None):
                raise InvalidInput(f"gradient {frozen!r} cannot be written: give a copy, np.array(...)")
            receipt, packed = self._half(pb.HALF_REDUCE_SCATTER, views, weight, timeout, progress)
            if packed is not None:
                arrays, parts = unpack(packed, self._specs), self.shard
                for each in views:
                    if each.spec.name in parts:
                        write_part(each, arrays[each.spec.name], parts[each.spec.name])
            return receipt

    def broadcast_shard(self, timeout: float = 60.0, progress: ProgressCall | None = None) -> Receipt:
        """In a session with shards: give this peer's shard of the session's tensors, get all others', in place.

        Over lossy paths what did not arrive stays as it was (`receipt.rounds[0].lossy.stale`) until the next time, and
        each `reliable_every` steps all hold the same bits. A newcomer only receives, all of it: `receipt.joined`.
        """
        self._require_shards()
        with self._turn:
            views = [self._view(spec) for spec in self._specs]
            receipt, packed = self._half(pb.HALF_BROADCAST_SHARD, views, 1.0, timeout, progress)
            if packed is not None:
                arrays = unpack(packed, self._specs)
                for each in views:
                    np.copyto(each.array, arrays[each.spec.name])
            return receipt

    @property
    def shard(self) -> dict[str, slice]:
        """What this peer owns of each tensor, flattened in C order; tensors of which it owns nothing are left out."""
        return parts_of(self._specs, self._shard.start, self._shard.stop) if self._shard else {}

    def _half(
        self,
        half: pb.Half.ValueType,
        views: Sequence[View],
        weight: float,
        timeout: float,
        progress: ProgressCall | None,
    ) -> tuple[Receipt, npt.NDArray[np.uint8] | None]:
        try:
            receipt, packed = self._exchange(views, self._kept_staging, weight, timeout, None, progress, None, half)
        except ShardsChanged:
            self._shard = None
            raise
        self._shard = receipt.shard
        return receipt, packed

    def compute_budget(
        self,
        micro_batches: int,
        *,
        normalise: Normalise | None = None,
        tau: Literal["auto", "off"] | float = "auto",
        warm_up: int | None = None,
        learn: int | None = None,
        refresh_every: int = 0,
    ) -> ComputeBudget:
        """Let nobody wait for the slowest: once a step has taken tau seconds it begins no further micro-batch.

            budget = session.compute_budget(micro_batches=12, normalise="computed")
            with budget.step() as step:
                for micro_batch in micro_batches:
                    if not step.proceed():
                        break
                    gradient += gradient_of(micro_batch)
            gradient /= step.completed
            session.average()

        Call it right after the session was opened, alike in all trainers, and `average` after each step. What a step
        weighs is then counted for you; the `weight` of `average` is that of one micro-batch.

        micro_batches: M, of a whole step.
        normalise: what a dropped micro-batch means. "fixed": zeros; the gradient is the sum divided by M. "computed":
            nothing; the gradient is the sum divided by `step.completed`. None leaves it to the first `average`.
        tau: "auto": the swarm finds it, the same for all; "off": never drop; or seconds.
        warm_up, learn: steps at the beginning that are not measured (5), and that are (45); nothing is dropped in them.
        refresh_every: averagings after which tau is found anew; 0: never.
        """
        self._require()
        request = budget_request(self.session_id, micro_batches, normalise, tau, warm_up, learn, refresh_every)
        with self._turn, self._connection.errors():
            answer = self._connection.calls.set_compute_budget(request, timeout=ANSWER_SECONDS)
        self._budget = ComputeBudget(read_budget(answer.budget), request)
        return self._budget

    def contribution(self) -> dict[str, npt.NDArray[np.generic]]:
        """Arrays by name, in shared memory where there is any, to be filled and given to the next `average_values`,
        which copies nothing from them. Do not write to them during that averaging, and ask again for each: after an
        error the daemon may still read the last ones. bfloat16 comes as its bits in uint16: give a view in a dtype.
        """
        self._require()
        if self._shared is not None and self._shared_is_ours:
            return unpack(self._shared.contribution, self._specs)
        if self._contribution is None:
            self._contribution = self._new_staging()
        return unpack(self._contribution, self._specs)

    def feedback_state(self, timeout: float = 60.0) -> dict[str, npt.NDArray[np.generic]]:
        """What the session's compressor has kept back so far, as named arrays: put them into the checkpoint. A session
        opened later, for the same tensors with the same compressor, goes on from them by `load_feedback_state`.

        Waits for an averaging that is under way. Raises PreconditionFailed where nothing is ever kept back.
        """
        self._require()
        with self._turn, self._connection.errors():
            request = pb.FetchFeedbackRequest(session_id=self.session_id)
            answers = self._connection.calls.fetch_feedback(request, timeout=timeout)
            first = next(iter(answers))
            specs = [read_spec(each) for each in first.arrays.arrays]
            packed = np.empty(sum(spec.byte_size for spec in specs), np.uint8)
            arrived = 0
            for answer in answers:
                data = np.frombuffer(answer.chunk.data, np.uint8)
                packed[arrived : arrived + len(data)] = data
                arrived += len(data)
        if arrived != len(packed):
            raise DaemonBug("the daemon's feedback is too short: report it with its log")
        return unpack(packed, specs)

    def load_feedback_state(self, state: Mapping[str, npt.NDArray[np.generic]], timeout: float = 60.0) -> None:
        """Go on from what `feedback_state` gave. Raises InvalidInput for that of other tensors or another compressor;
        what the session had is then kept."""
        self._require()
        views = {name: view(name, np.asarray(array)) for name, array in state.items()}
        order = canonical({name: each.spec for name, each in views.items()})
        start = pb.LoadFeedbackStart(session_id=self.session_id, arrays=[spec.message for spec in order])

        def requests() -> Iterator[pb.LoadFeedbackRequest]:
            yield pb.LoadFeedbackRequest(start=start)
            offset = 0
            for data in pack([views[spec.name] for spec in order]):
                yield pb.LoadFeedbackRequest(chunk=pb.VectorChunk(offset=offset, data=data))
                offset += len(data)

        with self._turn, self._connection.errors():
            self._connection.calls.load_feedback(requests(), timeout=timeout)

    def close(self) -> None:
        """Close the session and tell the swarm. Idempotent; nothing in a forked child, nothing when all is over."""
        if self._closed or not self._connection.is_usable:
            return
        self._closed = True
        self._staging = self._contribution = self._shared = None
        request = pb.CloseSessionRequest(session_id=self.session_id)
        try:
            with self._connection.errors():
                self._connection.calls.close_session(request, timeout=CLOSE_SECONDS)
        except (DaemonUnreachable, DaemonLeaving, NotFound):
            pass  # It is closed already.
        finally:
            self._life.cancel()

    def _attach(self, offer: pb.SharedMemory) -> None:
        """Map what the daemon offers, or tell it why not: then this session streams."""
        answer = pb.AttachSharedMemoryRequest(session_id=self.session_id)
        shared: SharedBuffers | None = None
        try:
            shared = SharedBuffers.map(offer, self._vector_bytes)
            answer.proof = shared.proof
        except NotShared as error:
            answer.why_not = str(error)
        try:
            with self._connection.errors():
                self._connection.calls.attach_shared_memory(answer, timeout=ANSWER_SECONDS)
        except PreconditionFailed:
            return
        self._shared = shared

    def _new_staging(self) -> npt.NDArray[np.uint8]:
        return np.empty(self._vector_bytes, np.uint8)

    def _kept_staging(self) -> npt.NDArray[np.uint8]:
        if self._staging is None:
            self._staging = self._new_staging()
        return self._staging

    def _require(self) -> None:
        self._connection.require()
        if self._closed:
            raise MoshpitError(f"session {self.name!r} is closed: open another")

    def _require_whole(self) -> None:
        self._require()
        self._require_applied()
        if self._has_shards:
            raise InvalidInput(
                f"session {self.name!r} has shards: call reduce_scatter and broadcast_shard by turns, or open another "
                "without shards"
            )

    def _require_shards(self) -> None:
        self._require()
        if not self._has_shards:
            raise InvalidInput(f"session {self.name!r} has no shards: open it with shards=True, or call average")

    def _in_background(self, future: Future[Receipt], work: Callable[[], None]) -> None:
        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                work()
            except BaseException as error:  # whatever it is belongs to who asks the future
                future.set_exception(error)

        threading.Thread(target=run, name=f"moshpit-average-{self.name}", daemon=True).start()

    def _exchange_copy(
        self,
        before: npt.NDArray[np.uint8],
        weight: float,
        timeout: float,
        epoch: int | None,
        progress: ProgressCall | None,
        step: _CountedStep | None,
    ) -> tuple[Receipt, _Change | None]:
        """Average packed values; the result is a copy too, for as long as it is wanted."""
        arrays = unpack(before, self._specs)
        views = [View(spec, arrays[spec.name], arrays[spec.name].dtype, False, before) for spec in self._specs]
        with self._turn:
            receipt, after = self._exchange(views, self._new_staging, weight, timeout, epoch, progress, step)
            if after is None:
                return receipt, None
            return receipt, _Change(before, after if after.flags.owndata else after.copy())

    def _apply(self, change: _Change) -> None:
        views = [self._view(spec) for spec in self._specs]
        if frozen := next((each.spec.name for each in views if each.immutable), None):
            raise InvalidInput(f"tensor {frozen!r} cannot be written any more: make it writable, then apply again")
        before, after = (unpack(packed, self._specs) for packed in (change.before, change.after))
        for each in views:
            add_change(each, before[each.spec.name], after[each.spec.name])

    def _require_applied(self) -> None:
        if self._delta is not None and self._delta.is_pending:
            raise MoshpitError(
                f"the last averaging of session {self.name!r} has not been applied: call apply() on what "
                "average_async returned first"
            )

    def _view(self, spec: TensorSpec) -> View:
        tensor = self._tensors.get(spec.name)
        if tensor is None:
            raise InvalidInput(
                f"tensor {spec.name!r} cannot be written in place: use Session.average_values, which returns new arrays"
            )
        return _checked(spec, view(spec.name, tensor))

    def _given(self, spec: TensorSpec, tensors: Mapping[str, object]) -> View:
        if spec.name not in tensors:
            raise InvalidInput(f"tensor {spec.name!r} is missing: give all that the session was opened with")
        return _checked(spec, view(spec.name, tensors[spec.name]))

    def _all_given(self, tensors: Mapping[str, object]) -> list[View]:
        views = [self._given(spec, tensors) for spec in self._specs]
        if unknown := sorted(tensors.keys() - {spec.name for spec in self._specs}):
            raise InvalidInput(f"tensor {unknown[0]!r} is not of this session: open one that has it")
        return views

    def _exchange(
        self,
        views: Sequence[View],
        staging: Callable[[], npt.NDArray[np.uint8]],
        weight: float,
        timeout: float,
        epoch: int | None,
        progress: ProgressCall | None,
        step: _CountedStep | None,
        half: pb.Half.ValueType = pb.HALF_UNSPECIFIED,
    ) -> tuple[Receipt, npt.NDArray[np.uint8] | None]:
        """One averaging, or half of one: the whole packed result, of which after a reduce_scatter only the shard means
        anything; None when nobody else was there. `staging` is for one that is streamed."""
        if epoch is not None and not 0 <= epoch < 1 << 64:
            raise InvalidInput(f"epoch={epoch}: give a whole number of at least 0")
        if step is not None:
            self._agree(step)  # before others are looked for: who normalises otherwise is not one of us
        if self._initial_peers > 1:
            timeout -= self._gather(self._initial_peers, timeout, progress)
        start = pb.AverageStart(
            session_id=self.session_id, weight=float(weight), timeout_seconds=float(timeout), epoch=epoch, half=half
        )
        if step is not None:
            start.micro_batch_seconds.extend(step.seconds)
        shared = self._shared if self._shared_is_ours else None
        self._shared_is_ours = False
        if shared is not None:
            start.shared_memory = True
            pack_into(shared.contribution, views)
        receipt: Receipt | None = None
        packed: npt.NDArray[np.uint8] | None = None
        first, last = 0, self._vector_bytes  # of what is to come
        arrived = first
        with self._connection.errors():
            # The daemon bounds the call by its timeout, keepalive bounds the daemon.
            call = self._connection.calls.average(_requests(start, () if shared is not None else views))
            try:
                for response in call:
                    match response.WhichOneof("message"):
                        case "chunk":
                            chunk = response.chunk
                            data = chunk.data
                            packed = staging() if packed is None else packed
                            if chunk.offset != arrived or arrived + len(data) > last:
                                raise DaemonBug("the daemon's result has a gap or is too long: report it with its log")
                            packed.data[arrived : arrived + len(data)] = data
                            arrived += len(data)
                        case "receipt":
                            receipt = read_receipt(response.receipt)
                            if half == pb.HALF_REDUCE_SCATTER and (own := receipt.shard):
                                first, last = byte_at(self._specs, own.start), byte_at(self._specs, own.stop)
                                arrived = first
                        case "progress" if progress is not None:
                            progress(Progress(response.progress.text, response.progress.fraction))
                        case _:
                            pass  # what a newer daemon has to say
            finally:
                call.cancel()
        self._initial_peers = 1
        if packed is None and shared is not None:
            packed = shared.result()
        is_whole = arrived in (first, last)
        if receipt is None or not is_whole or (packed is None and receipt.outcome != "alone" and first < last):
            raise DaemonBug("the daemon's result has no receipt or is too short: report it with its log")
        self._shared_is_ours = True
        if step is not None and receipt.budget is not None:
            step.budget.averaged(step.seconds, receipt.budget)
        return receipt, packed

    def _step_of(self, normalise: str | None) -> _CountedStep | None:
        """The step to be averaged; None without a compute budget."""
        if self._budget is None:
            if normalise is not None:
                raise InvalidInput(
                    f"normalise={normalise!r} without a compute budget: call Session.compute_budget first"
                )
            return None
        if normalise is not None:
            normalise_number(normalise)
        return _CountedStep(self._budget, self._budget.offer(), normalise)

    def _agree(self, step: _CountedStep) -> None:
        """How dropped micro-batches are normalised, where it was not said before or is said otherwise."""
        known = step.budget.state.normalise
        wanted = step.normalise or known or "fixed"
        if wanted != known:
            request = step.budget.request
            request.normalise = normalise_number(wanted)
            with self._connection.errors():
                answer = self._connection.calls.set_compute_budget(request, timeout=ANSWER_SECONDS)
            step.budget.changed(read_budget(answer.budget))

    def _gather(self, wanted: int, timeout: float, progress: ProgressCall | None) -> float:
        """Wait until so many live sessions are there; returns the seconds it took. Raises NoGroup."""
        began = time.monotonic()
        while True:
            with self._connection.errors():
                status = self._connection.calls.get_status(pb.GetStatusRequest(), timeout=ANSWER_SECONDS)
            here = [
                each
                for each in status.sessions
                if any(trainer.session_id == self.session_id for trainer in each.trainers)
            ]
            if not here:
                raise NotFound(f"the daemon has no session {self.name!r} any more: open it again")
            live, differs = here[0].live_sessions, here[0].differs
            waited = time.monotonic() - began
            if live >= wanted:
                return waited
            if differs and here[0].is_outvoted:
                raise PreconditionFailed(f"{differs}. Use the same tensors and options, or another session name")
            left = timeout - waited
            if left <= 0 and differs:
                raise NoGroup(f"{live} of {wanted} peers were here after {timeout:g} s; {differs}")
            if left <= 0:
                raise NoGroup(
                    f"{live} of {wanted} peers were here after {timeout:g} s: start the others, give a longer "
                    "timeout, or lower initial_peers"
                )
            if progress is not None:
                text = f"{live} of {wanted} peers here, waiting for {wanted - live} more, {left:.0f} s left"
                progress(Progress(f"{text}; {differs}" if differs else text, 0.0))
            time.sleep(min(GATHER_POLL_SECONDS, left))


def _checked(spec: TensorSpec, found: View) -> View:
    if found.spec != spec:
        raise InvalidInput(
            f"tensor {spec.name!r} is {found.spec} but was {spec} when the session was opened: open another session"
        )
    return found


def _requests(start: pb.AverageStart, views: Sequence[View]) -> Iterator[pb.AverageRequest]:
    """Pulled by gRPC's own thread as the daemon reads: packing and sending overlap."""
    yield pb.AverageRequest(start=start)
    offset = 0
    for data in pack(views):
        request = pb.AverageRequest()
        request.chunk.offset = offset
        request.chunk.data = data
        yield request
        offset += len(data)
