"""How a compressor turns one averaging into stages, and how its owner drives it.

Knows what passes between a compressor and the session: stages to be averaged, jobs to be run, and what came of them.
Does not know groups, rounds' times or how a stage travels.

One averaging of one trainer is a `Run`. Its `wish` says what is to be done next; the owner does it and says so:

| wish  | the owner                                                                            | then                |
|-------|--------------------------------------------------------------------------------------|---------------------|
| Jobs  | runs every job, in any order and on any thread                                       | `jobs_done()`       |
| Stage | takes its values through the rounds of the averaging, each along the round's axis    | `averaged(result)`  |
|       | ... unless members of a group came with another agreement                            | `disagreed(why)`    |
| Done  | has the result                                                                       |                     |

The compressor's state stays as it was until the last stage was averaged (`committed`); a run that is dropped before
that leaves no trace. The jobs after it write the state and the result, and must be run to their end.

Jobs are pure functions over pieces of at most JOB_ELEMENTS elements; those of one wish write to different places.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.vector import DTYPES, NAME_BYTES_MAX, Floats, Layout, TensorSpec, Vector

JOB_ELEMENTS = 1 << 18
"""A job reads up to four arrays of as many elements: 4 MiB."""

SLOTS = 3
FEEDBACK_NAME_BYTES_MAX = NAME_BYTES_MAX + 64
"""Arrays of a saved state are named after tensors, with their kind before it."""

Arrays = dict[str, npt.NDArray[np.floating]]
"""Flat arrays by name: a compressor's state as it is saved."""


class Operation(Enum):
    """What a reducer makes of the contributions to a chunk."""

    MEAN = "mean"
    """Weighted by what the members carry."""
    SUM = "sum"
    """Of all members, whatever they weigh."""
    SUM_OF_CELLS = "sum of cells"
    """Of one member a coordinate: those that share a cell bring the same sum of their earlier line."""


@dataclass(frozen=True, slots=True)
class Job:
    """Call once; at most 4 MiB of work."""

    call: Callable[[], None]
    cost_bytes: int


@dataclass(frozen=True, slots=True)
class Jobs:
    """To be run, all of them, before `jobs_done()`."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """A vector to be averaged over all rounds of the averaging, from the call's own weight on."""

    name: str
    slot: int
    """0 to SLOTS - 1: its place in the averaging, at all peers the same. With R rounds an averaging, its own are number
    slot * R and following; who skips a stage skips its numbers."""
    values: Vector
    """Ours. Stays as it is until the run goes on."""
    sums: bool = False
    """Integers below 2^53, held in float64 exactly: added, never divided, in whatever order. Its rounds go along each
    axis once; after the first they add up cells, of which each counts once."""
    lossless: bool = False
    """Not to be encoded with the session's codec, but with `float32`."""
    agreement: bytes = b""
    """What the members of a group must have in common to go through it; travels in the group's header."""
    more: int = 0
    """Stages that may follow: they share the caller's time."""
    fed: bool = False
    """What the codec leaves out is to be noted."""
    spare: Vector | None = None
    """Of the same layout, where its rounds may write."""

    def operation(self, round_of_stage: int) -> Operation:
        """For the all-reduce of this stage's round 0, 1, ..."""
        if not self.sums:
            return Operation.MEAN
        return Operation.SUM if round_of_stage == 0 else Operation.SUM_OF_CELLS


@dataclass(frozen=True, slots=True)
class Done:
    """The averaging's result, in the layout of the values."""

    values: Vector


Wish = Jobs | Stage | Done


@dataclass(frozen=True, slots=True)
class Unsent:
    """What the codec left out in one round of a stage, as the round's all-reduce noted it."""

    values: Vector
    share: float
    """The weight carried into the round by the weight the stage began with; 0 where that is 0."""


@dataclass(frozen=True, slots=True)
class Averaged:
    """What came of a stage."""

    result: Vector
    unsent: tuple[Unsent, ...]
    """By round. Empty when the codec leaves nothing out."""
    digest: bytes
    """Of the result: who has the same has the same bits."""


@dataclass(frozen=True, slots=True)
class Disagreed:
    """A group's members had different agreements."""

    why: str


Answer = Averaged | Disagreed | None
Steps = Generator[Jobs | Stage, Answer, Vector]


class Run:
    """One averaging under way; see the table above."""

    def __init__(self, steps: Callable[[Run], Steps]) -> None:
        self.committed = False
        """The state counts as changed: what is still to be run must be run."""
        self.whole = True
        """Every round of ours, of every stage so far, was complete."""
        self.notes: list[str] = []
        """For the receipt: why a stage was not what it should have been."""
        self._steps = steps(self)
        self._wish: Wish
        self._go_on(None)

    @property
    def wish(self) -> Wish:
        return self._wish

    def jobs_done(self) -> None:
        assert isinstance(self._wish, Jobs)
        self._go_on(None)

    def averaged(
        self, result: Vector, unsent: Sequence[Unsent] = (), *, whole: bool = True, digest: bytes = b""
    ) -> None:
        """The stage went through its last round. `result` stays as it is until the run is done. `whole`: all our rounds
        were complete. Others' may not have been, on other lines: only equal digests tell that all hold the same."""
        assert isinstance(self._wish, Stage)
        self.whole = self.whole and whole
        assert result.layout == self._wish.values.layout
        self._go_on(Averaged(result, tuple(unsent), digest))

    def disagreed(self, why: str) -> None:
        """The members of a group of this stage are not of one mind: no value of theirs was averaged."""
        assert isinstance(self._wish, Stage)
        self._go_on(Disagreed(why))

    def _go_on(self, answer: Answer) -> None:
        try:
            self._wish = next(self._steps) if answer is None else self._steps.send(answer)
        except StopIteration as end:
            self._wish = Done(end.value)


class Compressor(Protocol):
    """A session's compressor: lives as long as the session, holds the feedback state."""

    @property
    def name(self) -> str:
        """The canonical spelling, as it stands in the terms."""
        ...

    @property
    def slots(self) -> int:
        """How many of an averaging's slots it may use."""
        ...

    @property
    def state_layout(self) -> Layout | None:
        """Of what is saved; None: there is no state."""
        ...

    def layout(self, k: int, slot: int) -> Layout:
        """Of the stage in this slot of averaging k, should there be one: others may come to it before we do."""
        ...

    def begin(self, values: Vector, into: Vector, *, weight: float, k: int, seed: bytes) -> Run:
        """Average `values`, which stay as they are until the run is done. One run at a time; dropping it is harmless
        before it has committed. `into`: another vector of the layout, for offers and results; the run's until it is
        done. `seed`: the same at all peers of averaging k, and another in each."""
        ...

    def save(self) -> Arrays:
        """A copy of the state, for a checkpoint."""
        ...

    def load(self, arrays: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """Go on from a saved state. Raises InvalidInput that names what does not fit; the state is then as before."""
        ...


# ---- pieces


@dataclass(frozen=True, slots=True)
class Part:
    """Elements [start, stop) of one tensor."""

    tensor: str
    start: int
    stop: int


def parts_of(tensors: Iterable[TensorSpec], multiple: int = 1) -> Iterator[Part]:
    """Tensors cut for jobs, at multiples of so many elements."""
    step = max(multiple, JOB_ELEMENTS // multiple * multiple)
    for spec in tensors:
        for start in range(0, spec.elements, step):
            yield Part(spec.name, start, min(start + step, spec.elements))


def jobs_over(parts: Iterable[Part], work: Callable[[Part], None], bytes_an_element: int) -> Jobs:
    """`work` for each part, small ones together."""
    jobs: list[Job] = []
    batch: list[Part] = []
    size = 0

    def close() -> None:
        if batch:
            jobs.append(Job(_work_through(work, tuple(batch)), size * bytes_an_element))
            batch.clear()

    for part in parts:
        elements = part.stop - part.start
        if size + elements > JOB_ELEMENTS:
            close()
            size = 0
        batch.append(part)
        size += elements
    close()
    return Jobs(tuple(jobs))


def _work_through(work: Callable[[Part], None], parts: tuple[Part, ...]) -> Callable[[], None]:
    def call() -> None:
        for part in parts:
            work(part)

    return call


def flat_views(vector: Vector) -> dict[str, Floats]:
    """The tensors' values by name, each flat."""
    return {spec.name: view for spec, view in vector.views()}


def layout_of(state: Arrays) -> Layout:
    """Of arrays as they are saved; their names are a little longer than tensors'."""
    specs = (TensorSpec(name, array.shape, array.dtype.name) for name, array in state.items())
    return Layout.of(specs, name_bytes_max=FEEDBACK_NAME_BYTES_MAX)


def wide(dtype: str) -> np.dtype:
    """What is computed and kept with: float64 for itself, float32 for everything else."""
    return DTYPES["float64" if dtype == "float64" else "float32"]
