"""ARC-Top-K (Chen et al. 2025): the same top rows at every peer, though nobody sends an index.

Knows the stages of one averaging, what they carry, and when it must be a dense one instead. Does not know how a stage
travels.

Every tensor of two or more dimensions and at least SMALL elements is read as rows of `row` consecutive elements, the
last one padded with zeros; a row never holds two tensors' values, but all rows of the vector compete for the same K
places, as in the authors' flat buffers: a budget a tensor would spend most of it where nothing moves. All else goes
dense, as it is.

    sketch   q_i = integers of w_i * (offer_i V), V the same at all peers, and words about ourselves      summed
    rows     K = ceil(ratio * n) rows of largest ||sum_i q_i||^2, of the offer; beside them all else      mean

The sketch's sum has the same bits at everybody (fixed_point.py), so have the squared norms, which are computed
elementwise in a fixed order, and so has the choice: by norm, of equal ones the first. How a machine multiplies offer_i
by V is its own affair: before the sum nothing has to be alike. The chosen rows' hash is the second stage's agreement.

Instead of the rows all is sent (`dense_stage`) when the words say that peers hold different scales, that an integer
does not fit, or, for EF21M, that somebody came, left, or changed its weight; and when a group is not of one mind about
the rows. Under EF14 newcomers disturb nobody: they leave their sketch out once and learn the scale. The swarm's
averagings before number `warmup` are dense, and without feedback. All decide so alike, from what all have."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.compressors.error_feedback import Ef14, Ef21M, copies, dense_stage, fitting, plain_stage
from moshpitd.averaging.compressors.fixed_point import (
    EXPONENT_MAX,
    WORDS,
    Assembly,
    Standing,
    magnitude_of,
    quantised,
    read_words,
    words_of,
)
from moshpitd.averaging.compressors.stages import (
    JOB_ELEMENTS,
    SLOTS,
    Answer,
    Arrays,
    Averaged,
    Disagreed,
    Job,
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
from moshpitd.averaging.names import digest
from moshpitd.averaging.vector import DTYPES, Layout, TensorSpec, Vector

ROW = 128
SMALL = 1024
"""Tensors with fewer elements go dense: their rows would cost more sketch than they save."""
RANK_MAX = 32

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ArcOptions:
    """What is chosen by the user; `name` is its spelling in the terms."""

    ratio: float = 0.2
    """Share of the rows that is sent."""
    rank: int = 4
    """Numbers a row in the sketch: more rank rows better and cost 8 bytes a row each."""
    feedback: str = "ef21m"
    """ef21m: within stable membership; ef14: for those who come and go."""
    eta: float = 0.1
    """Of EF21M's momentum; 1 is none. EF14 has none."""
    warmup: int = 1000
    """The swarm's averagings before this number are dense."""

    @property
    def name(self) -> str:
        return f"arc:{plain(self.ratio)},{self.rank},{self.feedback},{plain(self.eta)},{self.warmup}"

    def check(self) -> None:
        """Raises InvalidInput that names what is wrong."""
        if not 0 < self.ratio <= 1:
            raise InvalidInput(f"arc's ratio {self.ratio:g}: the share of rows to send, above 0 and at most 1")
        if not 1 <= self.rank <= RANK_MAX:
            raise InvalidInput(f"arc's rank {self.rank}: must be 1 to {RANK_MAX}")
        if self.feedback not in ("ef14", "ef21m"):
            raise InvalidInput(f"arc's feedback {self.feedback!r}: there are ef14 and ef21m")
        if self.feedback == "ef14" and self.eta != 1:
            raise InvalidInput("arc's ef14 has no momentum: leave eta out, or 1")
        if not 0 < self.eta <= 1:
            raise InvalidInput(f"arc's eta {self.eta:g}: must be above 0 and at most 1")
        if not 0 <= self.warmup < 1 << 31:
            raise InvalidInput(f"arc's warmup {self.warmup}: must be a number of averagings, 0 or more")


def plain(number: float) -> str:
    """0.2, 1: as short as tells it from every other."""
    return repr(number).removesuffix(".0")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor read as rows, and which row of all its first one is."""

    spec: TensorSpec
    first: int


@dataclass(slots=True)
class Bond:
    """What binds the peers that may go on without a dense stage."""

    exponent: int | None = None
    """Of the sketch's scale; None: not known yet."""
    peers: int = 0
    weight: float = 0.0
    history: bytes = bytes(32)
    """Over everything since the last dense stage. Only EF21M has one; zeros: broken."""


class ArcTopK:
    """A session's compressor."""

    slots = SLOTS

    def __init__(self, layout: Layout, options: ArcOptions, *, row: int = ROW, small: int = SMALL) -> None:
        """`row`, `small`: not the user's to choose. Raises InvalidInput when there is nothing to compress."""
        options.check()
        self.name = options.name
        self._options = options
        self._row = row
        self._layout = layout
        self._matrices: dict[str, Matrix] = {}
        self._small: list[TensorSpec] = []
        self._rows = 0
        for spec in layout.tensors:
            if len(spec.shape) > 1 and spec.elements >= small:
                self._matrices[spec.name] = Matrix(spec, self._rows)
                self._rows += -(-spec.elements // row)
            else:
                self._small.append(spec)
        if not self._matrices:
            raise InvalidInput(
                f"{self.name} has nothing to compress: no tensor has two dimensions and {small} elements; "
                "give the weights their shapes, or use dense"
            )
        self._chosen = math.ceil(Fraction(repr(options.ratio)) * self._rows)
        self._compressed = [matrix.spec for matrix in self._matrices.values()]
        self._feedback = Ef14(self._compressed) if options.feedback == "ef14" else Ef21M(self._compressed, options.eta)
        self._bond = Bond()
        self._sketch_layout = Layout.of(
            (TensorSpec("sketch", (self._rows, options.rank), "float64"), TensorSpec("words", (WORDS,), "float64"))
        )
        self._rows_layout = Layout.of(self._second_stage())

    def _second_stage(self) -> list[TensorSpec]:
        """The rows, and for each dtype all that goes dense, end to end."""
        kinds = {wide(spec.dtype) for spec in self._compressed}
        specs = [TensorSpec("rows", (self._chosen, self._row), max(kinds, key=lambda kind: kind.itemsize).name)]
        for dtype in DTYPES:
            if elements := sum(spec.elements for spec in self._small if spec.dtype == dtype):
                specs.append(TensorSpec(f"small.{dtype}", (elements,), dtype))
        return specs

    def layout(self, k: int, slot: int) -> Layout:
        if k < self._options.warmup or slot == SLOTS - 1:
            return self._layout
        return self._sketch_layout if slot == 0 else self._rows_layout

    # ---- an averaging

    def begin(self, values: Vector, into: Vector, *, weight: float, k: int, seed: bytes) -> Run:
        assert values.layout == into.layout == self._layout
        return Run(lambda run: self._steps(run, values, into, weight=weight, k=k, seed=seed))

    def _steps(self, run: Run, values: Vector, into: Vector, *, weight: float, k: int, seed: bytes) -> Steps:
        if k < self._options.warmup:
            return (yield from plain_stage(run, values, into))
        sketch = Vector.empty(self._sketch_layout)
        standing = yield from self._lay_out_sketch(sketch, values, weight, seed)
        views = flat_views(sketch)
        views["words"][:] = words_of(standing)
        answer = yield Stage("sketch", 0, sketch, sums=True, lossless=True, more=2)
        assert isinstance(answer, Averaged)
        total = flat_views(answer.result)
        assembly = read_words(total["words"].astype(np.float64))
        why = self._why_dense(assembly)
        if not why:
            chosen = np.empty(self._chosen, np.int64)
            yield from self._choose(total["sketch"].reshape(self._rows, -1), chosen)
            agreement = digest("rows", chosen.astype("<i8").tobytes(), self._bond.history)
            rows = Vector.empty(self._rows_layout)
            yield self._lay_out_rows(rows, values, chosen)
            second = yield Stage("rows", 1, rows, agreement=agreement, more=1, fed=True)
            match second:
                case Averaged():
                    run.committed = True
                    self._bind(run, assembly, weight, digest(self._bond.history, k, agreement, second.digest))
                    yield self._settle(values, into, rows, second, chosen)
                    return into
                case Disagreed(why=why):
                    pass
                case None:
                    raise AssertionError("a stage was not answered")
        run.notes.append(f"sent dense: {why}")
        dense = yield from dense_stage(run, self._feedback, self._compressed, values, into, slot=2)
        self._bind(run, assembly, weight, digest("dense", k, assembly.peers, dense.digest))
        if isinstance(self._feedback, Ef21M):
            self._feedback.started = True
        return dense.result

    def _why_dense(self, assembly: Assembly) -> str:
        """The same words at all peers; empty: rows may be sent."""
        stable = isinstance(self._feedback, Ef21M)
        if assembly.wants_dense:
            return "somebody's sketch or weight does not fit the last averaging's"
        if assembly.holders == 0:
            return "nobody goes on from an earlier averaging"
        if not assembly.agreed:
            return "peers do not go on from the same averaging"
        if stable and (assembly.holders < assembly.peers or assembly.peers != self._bond.peers):
            return "membership changed"
        return ""

    def _bind(self, run: Run, assembly: Assembly, weight: float, history: bytes) -> None:
        if not run.whole or not isinstance(self._feedback, Ef21M):
            history = bytes(32)
        exponent = assembly.next_exponent
        if exponent is None and assembly.agreed:  # nothing has changed at anybody: the scale is as good as it was
            exponent = self._bond.exponent
        self._bond = Bond(exponent, assembly.peers, weight, history)

    def _holds(self) -> bytes | None:
        """What all must have in common with us; None while we have nothing."""
        bond = self._bond
        if bond.exponent is None or (isinstance(self._feedback, Ef21M) and not any(bond.history)):
            return None
        stable = isinstance(self._feedback, Ef21M)
        return digest("bond", bond.exponent, bond.peers if stable else 0, bond.history)

    # ---- the sketch

    def _lay_out_sketch(
        self, sketch: Vector, values: Vector, weight: float, seed: bytes
    ) -> Generator[Jobs, Answer, Standing]:
        v = directions(seed, self._row, self._options.rank)
        given, rows = flat_views(values), flat_views(sketch)["sketch"].reshape(self._rows, -1)
        parts = list(parts_of(self._compressed, self._row))
        number = {part: index for index, part in enumerate(parts)}
        largest, fits = np.zeros(len(parts)), np.ones(len(parts), bool)
        holds = self._holds()
        exponent = self._bond.exponent if holds is not None else None

        def project(part: Part) -> None:
            offer = self._feedback.offer(part, given[part.tensor][part.start : part.stop], dense=False)
            with np.errstate(all="ignore"):
                projected = np.multiply(self._as_rows(offer) @ v.astype(offer.dtype), weight, dtype=np.float64)
            here, at = self._rows_of(part), number[part]
            largest[at] = np.abs(projected).max()
            if exponent is None:
                rows[here] = 0
            else:
                rows[here], fits[at] = quantised(projected, exponent)

        yield jobs_over(parts, project, 8)
        changed = isinstance(self._feedback, Ef21M) and holds is not None and weight != self._bond.weight
        return Standing(holds, magnitude_of(float(largest.max())), changed or not fits.all())

    def _choose(self, total: npt.NDArray[np.floating], chosen: Rows) -> Generator[Jobs, Answer, None]:
        norms = np.empty(self._rows)
        step = max(1, JOB_ELEMENTS // self._options.rank)

        def weigh(start: int) -> None:
            squared_norms(total[start : start + step], norms[start : start + step])

        yield Jobs(
            tuple(Job(partial(weigh, start), 8 * step * self._options.rank) for start in range(0, self._rows, step))
        )
        yield Jobs((Job(lambda: choose_rows(norms, chosen), norms.nbytes),))

    # ---- the rows

    def _lay_out_rows(self, rows: Vector, values: Vector, chosen: Rows) -> Jobs:
        given, taken = flat_views(values), flat_views(rows)
        table = taken["rows"].reshape(self._chosen, self._row)
        places = self._small_places()

        def take(part: Part) -> None:
            x = given[part.tensor][part.start : part.stop]
            if part.tensor not in self._matrices:
                dtype, at = places[part.tensor]
                taken[f"small.{dtype}"][at + part.start : at + part.stop] = x
                return
            mine, local = self._chosen_in(part, chosen)
            if len(local):
                table[mine] = self._as_rows(self._feedback.offer(part, x, dense=False))[local]

        return jobs_over(parts_of(self._layout.tensors, self._row), take, 16)

    def _settle(self, values: Vector, into: Vector, rows: Vector, answer: Averaged, chosen: Rows) -> Jobs:
        given, results, means = flat_views(values), flat_views(into), flat_views(answer.result)
        shape = self._chosen, self._row
        sent_rows, mean_rows = flat_views(rows)["rows"].reshape(shape), means["rows"].reshape(shape)
        unsent = [(flat_views(lost.values)["rows"].reshape(shape), lost.share) for lost in answer.unsent]
        places = self._small_places()

        def settle(part: Part) -> None:
            piece = slice(part.start, part.stop)
            if part.tensor not in self._matrices:
                dtype, at = places[part.tensor]
                results[part.tensor][piece] = means[f"small.{dtype}"][at + part.start : at + part.stop]
                return
            mine, local = self._chosen_in(part, chosen)
            here = self._rows_of(part)
            sent = np.zeros((here.stop - here.start, self._row), wide(self._matrices[part.tensor].spec.dtype))
            mean = np.zeros_like(sent)
            sent[local], mean[local] = sent_rows[mine], mean_rows[mine]
            for lost, share in unsent:
                sent[local] -= lost[mine] * lost.dtype.type(share)
            size = part.stop - part.start
            result = self._feedback.settle(
                part, given[part.tensor][piece], sent.reshape(-1)[:size], mean.reshape(-1)[:size], dense=False
            )
            results[part.tensor][piece] = result

        return jobs_over(parts_of(self._layout.tensors, self._row), settle, 16)

    def _small_places(self) -> dict[str, tuple[str, int]]:
        """Where each tensor that goes dense begins among those of its dtype."""
        places: dict[str, tuple[str, int]] = {}
        filled = dict.fromkeys(DTYPES, 0)
        for spec in self._small:
            places[spec.name] = spec.dtype, filled[spec.dtype]
            filled[spec.dtype] += spec.elements
        return places

    def _rows_of(self, part: Part) -> slice:
        """Which rows of all a part holds: it begins with a whole one."""
        first = self._matrices[part.tensor].first
        return slice(first + part.start // self._row, first - (-part.stop // self._row))

    def _chosen_in(self, part: Part, chosen: Rows) -> tuple[slice, Rows]:
        """Which of the chosen rows lie in the part, and which of its rows they are."""
        here = self._rows_of(part)
        low, high = (int(at) for at in np.searchsorted(chosen, (here.start, here.stop)))
        return slice(low, high), chosen[low:high] - here.start

    def _as_rows(self, offer: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        short = -len(offer) % self._row
        return (np.pad(offer, (0, short)) if short else offer).reshape(-1, self._row)

    # ---- checkpoints

    @property
    def state_layout(self) -> Layout | None:
        return layout_of(self._feedback.state | {"bond": self._saved_bond()})

    def _saved_bond(self) -> npt.NDArray[np.floating]:
        bond = self._bond
        head = [self._started, bond.exponent is not None, bond.exponent or 0, bond.peers, bond.weight]
        return np.array([*head, *bond.history], np.float64)

    def save(self) -> Arrays:
        return copies(self._feedback.state) | {"bond": self._saved_bond()}

    def load(self, arrays: Mapping[str, npt.NDArray[np.floating]]) -> None:
        fitting({"bond": self._saved_bond()}, {name: arrays[name] for name in arrays if name == "bond"})
        started, known, exponent, peers, weight, *history = arrays["bond"].tolist()
        if abs(exponent) > 2 * EXPONENT_MAX or not all(byte in range(256) for byte in history):
            raise InvalidInput("the saved feedback's 'bond' is not one that was saved")
        self._feedback.load({name: array for name, array in arrays.items() if name != "bond"})
        if isinstance(self._feedback, Ef21M):
            self._feedback.started = bool(started)
        self._bond = Bond(int(exponent) if known else None, int(peers), weight, bytes(int(byte) for byte in history))

    @property
    def _started(self) -> bool:
        return isinstance(self._feedback, Ef21M) and self._feedback.started


def directions(seed: bytes, row: int, rank: int) -> npt.NDArray[np.float64]:
    """V, row x rank, nearly normal: sums of twelve uniform 16-bit numbers, of variance 1.

    From SHAKE-128 and integers alone, so that it is the same with every numpy and on every machine. Without the paper's
    1 / sqrt(rank), which changes no ranking.
    """
    raw = hashlib.shake_128(seed).digest(row * rank * 24)
    uniform = np.frombuffer(raw, "<u2").reshape(row, rank, 12).astype(np.int64)
    v: npt.NDArray[np.float64] = (uniform.sum(axis=2) - 6 * 65535) / 65536.0
    return v


def squared_norms(rows: npt.NDArray[np.floating], out: npt.NDArray[np.floating]) -> None:
    """Column after column, one rounding at a time: the same bits on every machine."""
    out[:] = 0
    for column in range(rows.shape[1]):
        out += rows[:, column] * rows[:, column]


def choose_rows(norms: npt.NDArray[np.floating], chosen: Rows) -> None:
    """The largest, in the order of the rows; of equal ones the first."""
    count = len(chosen)
    threshold = np.partition(norms, len(norms) - count)[len(norms) - count]
    above, equal = np.flatnonzero(norms > threshold), np.flatnonzero(norms == threshold)
    chosen[:] = np.sort(np.concatenate((above, equal[: count - len(above)])))
