"""What was not sent is not lost: error feedback for whatever leaves something out, a codec or a choice of rows.

Knows the two recurrences and their state, piece by piece. Does not know why something was left out.

With x the trainer's values, C(...) what of an offer was really sent (decoded), and means over the peers by weight:

    EF14   (Seide et al. 2014)      offer a = x + e                    EF21M  (Fatkhullin et al. 2023)
                                    e <- a - C(a)                             h <- (1 - eta) h + eta x ; offer h - g_i
                                    result = mean C(a)                        g_i <- g_i + C(h - g_i)
                                                                              g <- g + mean C(h - g_i) ; result = g

EF14 keeps only what concerns this peer, so anybody may average with anybody. EF21M lives from g = mean g_i: it holds
while the same peers with the same weights take part. A dense offer resets it: h is offered, g_i <- C(h), g <- mean
C(h); the first one starts with h = x.

A lossy codec leaves something out twice in every round: of each contribution, which its sender notes, and of the
average, which its reducer notes for all, times the group's weight by its own. Each makes up with the weight it began
with for what was lost with the weight it carried. So on any grid, under any codec, what came out and what is kept back
are, over the swarm and by weight, all that was put in.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.compressors.stages import (
    Answer,
    Arrays,
    Averaged,
    Jobs,
    Part,
    Run,
    Stage,
    Steps,
    flat_views,
    jobs_over,
    layout_of,
    parts_of,
    wide,
)
from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.vector import Floats, Layout, TensorSpec, Vector

Wide = npt.NDArray[np.floating]
"""float32, or float64 for float64 tensors."""


class Feedback(Protocol):
    """State of the tensors it was made for. All functions are for one part and touch nothing beyond it."""

    def offer(self, part: Part, values: Floats, *, dense: bool) -> Wide:
        """What is to be sent of the trainer's values, as far as it will be. Changes nothing."""
        ...

    def settle(self, part: Part, values: Floats, sent: Wide, mean: Wide, *, dense: bool) -> Wide:
        """Write the state: of the offer `sent` was sent, over all peers `mean` came of it (0 where nothing was sent).
        Gives the result."""
        ...

    @property
    def state(self) -> Arrays:
        """Its own arrays."""
        ...

    def load(self, arrays: Mapping[str, npt.NDArray[np.floating]]) -> None: ...


class Ef14:
    """Any peers, any weights."""

    def __init__(self, tensors: Iterable[TensorSpec]) -> None:
        self.state = _zeros("error", tensors)

    def offer(self, part: Part, values: Floats, *, dense: bool) -> Wide:
        error = self.state[f"error/{part.tensor}"][part.start : part.stop]
        return np.add(values, error, dtype=error.dtype)

    def settle(self, part: Part, values: Floats, sent: Wide, mean: Wide, *, dense: bool) -> Wide:
        error = self.state[f"error/{part.tensor}"][part.start : part.stop]
        np.subtract(np.add(values, error, dtype=error.dtype), sent, out=error)
        return mean

    def load(self, arrays: Mapping[str, npt.NDArray[np.floating]]) -> None:
        self.state = fitting(self.state, arrays)


class Ef21M:
    """The same peers with the same weights, from one dense offer to the next."""

    def __init__(self, tensors: Iterable[TensorSpec], eta: float) -> None:
        self._eta = eta
        self.state = _zeros("momentum", specs := list(tensors)) | _zeros("own", specs) | _zeros("mean", specs)
        self.started = False
        """Set by the owner when the first dense offer has settled."""

    def _momentum(self, part: Part, values: Floats) -> Wide:
        h = self._of("momentum", part)
        if not self.started:
            return values.astype(h.dtype)
        return h + h.dtype.type(self._eta) * (values.astype(h.dtype) - h)

    def offer(self, part: Part, values: Floats, *, dense: bool) -> Wide:
        momentum = self._momentum(part, values)
        return momentum if dense else momentum - self._of("own", part)

    def settle(self, part: Part, values: Floats, sent: Wide, mean: Wide, *, dense: bool) -> Wide:
        self._of("momentum", part)[:] = self._momentum(part, values)
        own, g = self._of("own", part), self._of("mean", part)
        if dense:
            own[:], g[:] = sent, mean
        else:
            own += sent
            g += mean
        return g

    def load(self, arrays: Mapping[str, npt.NDArray[np.floating]]) -> None:
        self.state = fitting(self.state, arrays)

    def _of(self, kind: str, part: Part) -> Wide:
        return self.state[f"{kind}/{part.tensor}"][part.start : part.stop]


def _zeros(kind: str, tensors: Iterable[TensorSpec]) -> Arrays:
    return {f"{kind}/{spec.name}": np.zeros(spec.elements, wide(spec.dtype)) for spec in tensors}


def copies(state: Arrays) -> Arrays:
    return {name: array.copy() for name, array in state.items()}


def fitting(state: Arrays, arrays: Mapping[str, npt.NDArray[np.floating]]) -> Arrays:
    """Copies of saved arrays in the place of `state`. Raises InvalidInput that names the first that does not fit."""
    for name in sorted(state.keys() | arrays.keys()):
        if name not in arrays:
            raise InvalidInput(f"the saved feedback has no {name!r}: it is of another layout or compressor")
        if name not in state:
            raise InvalidInput(f"the saved feedback has {name!r}, which is not here: of another layout or compressor")
        saved, here = arrays[name], state[name]
        if (saved.shape, saved.dtype) != (here.shape, here.dtype):
            raise InvalidInput(
                f"the saved feedback's {name!r} is {saved.dtype}{list(saved.shape)}, here it is "
                f"{here.dtype}{list(here.shape)}: of another layout"
            )
        if not np.isfinite(saved).all():
            raise InvalidInput(f"the saved feedback's {name!r} holds NaN or infinity")
    return {name: np.array(arrays[name]) for name in state}


# ---- the whole vector at once


class Dense:
    """One stage: the vector itself; what a lossy codec leaves out is fed back if wished."""

    slots = 1

    def __init__(self, layout: Layout, *, feedback: bool) -> None:
        self.name = "dense:ef14" if feedback else "dense"
        self._layout = layout
        self._feedback = Ef14(layout.tensors) if feedback else None

    @property
    def state_layout(self) -> Layout | None:
        return layout_of(self._feedback.state) if self._feedback else None

    def layout(self, k: int, slot: int) -> Layout:
        return self._layout

    def begin(self, values: Vector, into: Vector, *, weight: float, k: int, seed: bytes) -> Run:
        return Run(lambda run: self._steps(run, values, into))

    def _steps(self, run: Run, values: Vector, into: Vector) -> Steps:
        if self._feedback is not None:
            return (yield from dense_stage(run, self._feedback, values.layout.tensors, values, into, slot=0)).result
        return (yield from plain_stage(run, values, into))

    def save(self) -> Arrays:
        return copies(self._feedback.state) if self._feedback else {}

    def load(self, arrays: Mapping[str, npt.NDArray[np.floating]]) -> None:
        if self._feedback is not None:
            self._feedback.load(arrays)
        else:
            fitting({}, arrays)


def plain_stage(run: Run, values: Vector, spare: Vector) -> Steps:
    """The values as they are, without feedback."""
    answer = yield Stage("dense", 0, values, spare=spare)
    assert isinstance(answer, Averaged)  # who asks for no agreement cannot be told that there is none
    run.committed = True
    return answer.result


def dense_stage(
    run: Run, feedback: Feedback, fed: Iterable[TensorSpec], values: Vector, spare: Vector, *, slot: int
) -> Generator[Jobs | Stage, Answer, Averaged]:
    """The whole offer of the fed tensors, and the values of the others."""
    names = {spec.name for spec in fed}
    offered = Vector.empty(values.layout)
    given, offers = flat_views(values), flat_views(offered)

    def lay_out(part: Part) -> None:
        piece = slice(part.start, part.stop)
        x = given[part.tensor][piece]
        offers[part.tensor][piece] = feedback.offer(part, x, dense=True) if part.tensor in names else x

    yield jobs_over(parts_of(values.layout.tensors), lay_out, 8)
    answer = yield Stage("dense", slot, offered, fed=True, spare=spare)
    assert isinstance(answer, Averaged)
    run.committed = True
    means, unsent = flat_views(answer.result), [(flat_views(lost.values), lost.share) for lost in answer.unsent]
    dtypes = {spec.name: spec.dtype for spec in values.layout.tensors}

    def settle(part: Part) -> None:
        piece = slice(part.start, part.stop)
        x = given[part.tensor][piece]
        kind = wide(dtypes[part.tensor])
        sent = offers[part.tensor][piece].astype(kind)
        for lost, share in unsent:
            sent -= lost[part.tensor][piece] * kind.type(share)
        feedback.settle(part, x, sent, means[part.tensor][piece].astype(kind), dense=True)

    yield jobs_over(parts_of(spec for spec in values.layout.tensors if spec.name in names), settle, 16)
    return answer
