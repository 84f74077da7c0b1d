"""Compute budgets (DropCompute, Giladi et al., arXiv 2306.10598): when a trainer stops beginning micro-batches.

Knows the rule that finds tau from everybody's latencies, and what one session measures, tells, adopts and counts. Does
not know rounds, time or who its trainer is. Nothing here can make a mean wrong: tau decides how much is computed,
weights say how much was.

How all peers come to the same tau, without a coordinator:

- Averagings are cut into windows of `warm_up + learn` by their number k. While no tau is known, and `refresh_every`
  averagings after the last one, a window is measured: nothing is dropped in it, and each session keeps the latencies of
  its `learn` later steps by k.
- In the window's last averaging each member of a group tells the others all tables it holds, as soon as the group is
  known. Conversations keep their order, and nobody commits before Ready from all: who commits a round holds what its
  members held. So after one averaging with a round an axis (else after `turns` averagings) all hold the same tables,
  find the same tau from them, and go by it from the next averaging on.
- Every member's line in a group's header carries the budget it goes by. Of two the larger one counts, by (k, number of
  tables, tau). So a newcomer, and who lacked a table, goes by what those found who had more, one averaging later; and a
  swarm whose peers differ has one budget after a turn of all axes. Meanwhile the receipts say how many differed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.errors import InvalidInput, RemoteProtocolError
from moshpitd.averaging.messages import Budget, Latencies, Member, Table
from moshpitd.averaging.names import PeerId, digest
from moshpitd.averaging.receipt import BudgetLine

NORMALISATIONS = ("fixed", "computed")
WARM_UP_DEFAULT = 5
LEARN_DEFAULT = 45
MICRO_BATCHES_MAX = 256
LEARN_MAX = 64
SECONDS_MAX = 1e6
"""Of a micro-batch, and of a tau by hand."""
CANDIDATES = 200
"""Taus that are tried, as in the authors' code."""
TRAINERS_TOLD_MAX = 8
"""Of one daemon."""
TABLES_MAX = 256
TABLES_MIN = 16
FLOATS_MAX = 1 << 17
"""In all tables that one session holds and may have to pass on: of a larger swarm the same sample serves everywhere."""
MESSAGE_FLOATS_MAX = 1 << 15
NO_BUDGET = Budget()

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BudgetOptions:
    """What a trainer chose when it gave its session a compute budget."""

    micro_batches: int
    """M: of a whole step."""
    normalise: str = ""
    """fixed: a dropped micro-batch counts as zero; computed: as nothing. Empty: not said yet."""
    tau_s: float | None = None
    """By hand; None: the swarm finds it."""
    off: bool = False
    """Never drop."""
    warm_up: int = WARM_UP_DEFAULT
    """Steps of a window that are not measured: caches fill, kernels are compiled."""
    learn: int = LEARN_DEFAULT
    """Steps of a window that are. Fewer find tau sooner; with the authors' noise 45 find it within 1 % of the best."""
    refresh_every: int = 0
    """Averagings from one tau to the next; 0: one is for ever. In each measured window nothing is dropped."""

    def check(self, averaging: str = "synchronous") -> None:
        """Raises InvalidInput that names what is wrong. `averaging`: the mode of the session's averagings."""
        if averaging == "wait_avoiding":
            raise InvalidInput(
                "a compute budget does not go with wait-avoiding averaging: there nobody waits for the slowest, so "
                "dropping would only lose samples, and models cannot be weighed by micro-batches; choose one of the two"
            )
        if averaging == "shards":
            raise InvalidInput(
                "a compute budget in a session with shards: it weighs calls by their micro-batches, and every second "
                "call there has none; leave one of the two out"
            )
        if not 1 <= self.micro_batches <= MICRO_BATCHES_MAX:
            raise InvalidInput(f"micro_batches {self.micro_batches}: must be 1 to {MICRO_BATCHES_MAX}")
        if self.normalise and self.normalise not in NORMALISATIONS:
            raise InvalidInput(f"normalise {self.normalise!r}: must be fixed or computed")
        if self.tau_s is not None and not 0 < self.tau_s <= SECONDS_MAX:
            raise InvalidInput(f"tau {self.tau_s}: must be more than 0 and at most {SECONDS_MAX:g} seconds")
        if self.tau_s is not None and self.off:
            raise InvalidInput(f"tau {self.tau_s} by hand and a budget that is off: choose one")
        if not 0 <= self.warm_up <= 10_000:
            raise InvalidInput(f"warm_up {self.warm_up}: must be 0 to 10000 steps")
        if not 2 <= self.learn <= LEARN_MAX:
            raise InvalidInput(f"learn {self.learn}: must be 2 to {LEARN_MAX} steps")
        if self.refresh_every and self.refresh_every < self.window:
            raise InvalidInput(
                f"refresh_every {self.refresh_every}: must be 0 (never) or at least warm_up + learn = {self.window}"
            )

    def factor(self, rows: tuple[tuple[float, ...], ...]) -> int:
        """How many times the weight of a micro-batch a trainer's step counts, by its latencies. Raises InvalidInput."""
        completed, whole = sum(map(len, rows)), self.micro_batches
        if not 1 <= completed <= whole:
            raise InvalidInput(
                f"latencies of {completed} micro-batches: a session with a compute budget of {whole} averages after "
                f"steps of 1 to {whole}, and says how long each took"
            )
        return whole if self.normalise == "fixed" else completed

    @property
    def window(self) -> int:
        """Averagings from one window to the next."""
        return self.warm_up + self.learn

    @property
    def term(self) -> str:
        """What members of a group must have in common, as the terms say it; empty while normalise is not said."""
        if not self.normalise:
            return ""
        steps = f"{self.warm_up + 1} to {self.window}"
        return f"{self.normalise} of {self.micro_batches} micro-batches, learnt from steps {steps}"


# ---- the rule


@dataclass(frozen=True, slots=True)
class Choice:
    """A tau and what is expected of it."""

    tau_s: float
    speedup: float
    """Effective: dropped micro-batches taken into account."""
    drop_rate: float


def best_tau(steps: Sequence[Floats], exchange_s: float) -> Choice:
    """The tau with the largest expected speed-up (the authors' rule).

    steps: for each step the latencies of those present, [peer, micro-batch], some of them above 0.
    exchange_s: what a step takes beside its micro-batches, for him who comes last.

    Bit for bit the same whatever the order of the peers: maxima, counts, and sums in the order of the steps.
    """
    ends = [np.cumsum(latencies, axis=1) for latencies in steps]
    middle = max(1, steps[0].shape[1] // 2) - 1
    taus = np.linspace(min(c[:, middle].min() for c in ends), max(c.max() for c in ends), CANDIDATES)
    speedups, drop_rates = expected(steps, taus, exchange_s)
    best = int(np.argmax(speedups))
    return Choice(float(taus[best]), float(speedups[best]), float(drop_rates[best]))


def expected(steps: Sequence[Floats], taus: Floats, exchange_s: float) -> tuple[Floats, Floats]:
    """(speed-ups, drop rates) by the authors' rule: micro-batches that end before tau count and take their time, others
    do neither. Trainers get less: `carried_out`."""
    speedups, drop_rates = np.zeros(len(taus)), np.zeros(len(taus))
    for latencies in steps:
        ends = np.sort(np.cumsum(latencies, axis=1), axis=None)
        longest = ends[-1]
        done = np.searchsorted(ends, taus, side="left")
        gain = longest - np.where(done > 0, ends[done - 1], 0.0)
        drop = 1.0 - done / len(ends)
        rest = 1.0 - gain / (longest + exchange_s)
        # Nothing computed in no time is no speed: such a tau is not to be chosen.
        speedups += np.divide(1.0 - drop, rest, out=np.full(len(taus), -np.inf), where=rest > 0.0)
        drop_rates += drop
    return speedups / len(steps), drop_rates / len(steps)


def carried_out(steps: Sequence[Floats], tau_s: float, exchange_s: float) -> Choice:
    """What comes of a tau when micro-batches that have begun are finished: trainers ask before each, not inside."""
    whole_s = short_s = 0.0
    computed = total = 0
    for latencies in steps:
        ends = np.cumsum(latencies, axis=1)
        begun = np.hstack([np.ones((len(ends), 1), bool), ends[:, :-1] <= tau_s])
        whole_s += float(ends.max()) + exchange_s
        short_s += float(np.where(begun, ends, 0.0).max()) + exchange_s
        computed += int(begun.sum())
        total += begun.size
    return Choice(tau_s, computed / total * whole_s / short_s, 1.0 - computed / total)


def find_budget(tables: Mapping[PeerId, Table], micro_batches: int, *, steps_min: int, k: int) -> Budget | None:
    """The budget from averaging k on; None when the tables hold too little: one peer, a single micro-batch, few steps.

    A step is that of all who ended it in the same averaging. The exchange took as long as it did for him who waited
    least, that is who came last, in the median step.
    """
    rows: dict[int, list[Floats]] = {}
    exchanges: dict[int, list[float]] = {}
    for _, table in sorted(tables.items()):
        latencies = np.array(table.seconds, np.float64).reshape(len(table.steps), micro_batches)
        for step, row, exchange_s in zip(table.steps, latencies, table.exchange_s, strict=True):
            rows.setdefault(step, []).append(row)
            exchanges.setdefault(step, []).extend([exchange_s] if exchange_s > 0 else [])
    steps = [np.stack(rows[step]) for step in sorted(rows) if len(rows[step]) > 1 and any(map(np.any, rows[step]))]
    if micro_batches < 2 or len(steps) < steps_min:
        return None
    least = [min(exchanges[step]) for step in sorted(exchanges) if exchanges[step]]
    choice = best_tau(steps, float(np.median(least)) if least else 0.0)
    return Budget(k, len(tables), choice.tau_s, choice.speedup, choice.drop_rate)


# ---- one session's


@dataclass(slots=True)
class _Pace:
    """Steps that were measured: how long they took, from one averaging's end to the next, and what was computed."""

    seconds: float = 0.0
    completed: int = 0
    steps: int = 0
    """Each trainer's."""

    def add(self, seconds: float, rows: tuple[tuple[float, ...], ...]) -> None:
        self.seconds += seconds
        self.completed += sum(map(len, rows))
        self.steps += len(rows)


@dataclass(slots=True)
class BudgetKeeper:
    """In this order: `start` for each call of the trainer, `group_formed` for each of its groups, `averaged` or
    `interrupted` at its end; `receive` at any time. `line` is what the trainer is told."""

    me: PeerId
    options: BudgetOptions
    budget: Budget = NO_BUDGET
    """The swarm's, as we know it: found or adopted. For a group's header."""
    _rows: dict[int, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    """Our own latencies by the averaging that the step ended in, one row a trainer."""
    _exchange_s: dict[int, float] = field(default_factory=dict)
    _tables: dict[int, dict[PeerId, Table]] = field(default_factory=dict)
    """By the last averaging of their window."""
    _averagings: int = 0
    _current: tuple[tuple[float, ...], ...] = ()
    """The rows of the call under way, or of the last one."""
    _ended_at: float | None = None
    _goes_by_tau: bool | None = None
    """In the step of the call under way; None while its averaging is not known."""
    _paces: dict[bool, _Pace] = field(default_factory=lambda: {False: _Pace(), True: _Pace()})
    """With a tau, and without."""
    _note: str = ""

    def change(self, options: BudgetOptions) -> None:
        """Go by other options. What was measured under others that count is forgotten."""
        before, self.options = self.options, options
        if (before.micro_batches, before.warm_up, before.learn) != (
            options.micro_batches, options.warm_up, options.learn
        ):  # fmt: skip
            self.budget = NO_BUDGET
            for kept in (self._rows, self._exchange_s, self._tables):
                kept.clear()

    def start(self, rows: tuple[tuple[float, ...], ...]) -> None:
        """A call with the latencies of its step, for each trainer of this daemon that is in it."""
        self._current = rows
        self._note, self._goes_by_tau = "", None

    def group_formed(self, k: int, members: Sequence[Member], *, turns: int) -> list[Latencies]:
        """We are in a group of averaging k; what to tell each of its other members. `turns`: averagings in which all
        axes have their turn."""
        if self._goes_by_tau is None:
            self._goes_by_tau = self._tau(k)[0] > 0
        warm = self._averagings >= self.options.warm_up
        if warm and self._measures(k):
            whole = [row for row in self._current if len(row) == self.options.micro_batches]
            self._rows[k] = tuple(whole[:TRAINERS_TOLD_MAX])
        self._adopt(k, members)
        last = self._ended_by(k)
        if not (last >= 0 and k - last < turns and self._is_due(last)):
            return []
        held = self._tables.setdefault(last, {})
        measured = sorted(step for step in self._rows if last - self.options.window < step <= last)
        if steps := tuple(step for step in measured for _ in self._rows[step]):
            seconds = tuple(second for step in measured for row in self._rows[step] for second in row)
            exchange_s = tuple(self._exchange_s.get(step, 0.0) for step in steps)
            self._keep(last, Table(self.me, steps, seconds, exchange_s))
        return list(self._messages(last, held))

    def receive(self, message: Latencies, k: int) -> None:
        """What a member of one of our groups holds; we are in averaging k. Raises RemoteProtocolError."""
        if len(message.tables) > TABLES_MAX:
            raise RemoteProtocolError(f"latencies of {len(message.tables)} peers in one message")
        for table in message.tables:
            self._check(table, message.window)
        if message.window in (self._ended_by(k), self._ended_by(k) + self.options.window):  # else of old, or a guess
            for table in message.tables:
                if table.peer != self.me:
                    self._keep(message.window, table)

    def averaged(self, k: int, *, turns: int, exchange_s: float, now: float) -> None:
        """Averaging k is over, with others in it."""
        if k in self._rows:
            self._exchange_s[k] = exchange_s
        if self._ended_at is not None and self._averagings >= self.options.warm_up:
            self._paces[bool(self._goes_by_tau)].add(now - self._ended_at, self._current)
        self._ended_at = now
        self._averagings += 1
        last = self._ended_by(k)
        if last < 0 or k - last < turns - 1:
            return
        tables = self._tables.get(last, {})
        steps_min = (self.options.learn + 1) // 2
        if self._is_due(last) and (
            found := find_budget(tables, self.options.micro_batches, steps_min=steps_min, k=last + turns)
        ):
            self.budget = max(self.budget, found)
        for window in [window for window in self._tables if window <= last]:
            del self._tables[window]
        for step in [step for step in self._rows if step <= last]:
            del self._rows[step]
            self._exchange_s.pop(step, None)

    def interrupted(self) -> None:
        """A call ended without others: how long it took says nothing about steps."""
        self._ended_at = None

    def line(self, next_k: int) -> BudgetLine:
        """Where it stands; tau is for the step that ends in averaging next_k."""
        options, budget = self.options, self.budget
        with_tau, without = self._paces[True], self._paces[False]
        tau_s, state = self._tau(next_k)
        return BudgetLine(
            micro_batches=options.micro_batches,
            normalise=options.normalise,
            completed=sum(map(len, self._current)),
            tau_s=tau_s,
            state=state,
            k=budget.k,
            tables=budget.tables,
            expected_speedup=budget.speedup,
            expected_drop_rate=budget.drop_rate,
            speedup=(with_tau.completed * without.seconds) / (with_tau.seconds * without.completed)
            if with_tau.seconds and without.completed
            else 0.0,
            drop_rate=1.0 - with_tau.completed / (with_tau.steps * options.micro_batches) if with_tau.steps else 0.0,
            note=self._note,
        )

    def _tau(self, k: int) -> tuple[float, str]:
        """(tau of the step that ends in averaging k, why); 0: none."""
        options, budget = self.options, self.budget
        if options.off:
            return 0.0, "off: nothing is dropped"
        if options.tau_s is not None:
            return options.tau_s, "by hand"
        if self._measures(k):
            last = self._ended_by(k) + options.window
            here = sum(last - options.window < step for step in self._rows)
            return 0.0, f"measuring, nothing is dropped: {here} of {options.learn} steps, tau after averaging {last}"
        if budget.k:
            return budget.tau_s, f"in force since averaging {budget.k}"
        return 0.0, "not known yet: the first steps of a window are not measured"

    # ---- windows

    def _ended_by(self, k: int) -> int:
        """The last averaging of the window that is over when averaging k has ended; negative: none."""
        return (k + 1) // self.options.window * self.options.window - 1

    def _is_due(self, last: int) -> bool:
        """Whether the window that ends with this averaging is to be measured."""
        every, window = self.options.refresh_every, self.options.window
        return not self.budget.k or (every > 0 and last + 1 - self.budget.k // window * window >= every)

    def _measures(self, k: int) -> bool:
        """Whether the step that ends in averaging k is measured. One by hand would tell of its quick steps only."""
        place = k % self.options.window
        last = k - place + self.options.window - 1
        return place >= self.options.warm_up and self.options.tau_s is None and self._is_due(last)

    # ---- what others say

    def _adopt(self, k: int, members: Sequence[Member]) -> None:
        known = [member.budget for member in members if _is_sound(member.budget, k)]
        best = max([self.budget, *known])
        behind = sum(member.budget != best for member in members)
        if best.k and behind:
            self._note = (
                f"{behind} of {len(members)} members did not go by the newest tau yet: "
                f"{best.tau_s:.6g} s, from averaging {best.k} on"
            )
        self.budget = best

    def _check(self, table: Table, window: int) -> None:
        steps, seconds = table.steps, table.seconds
        if (
            len(steps) > self.options.learn * TRAINERS_TOLD_MAX
            or len(seconds) != len(steps) * self.options.micro_batches
            or len(table.exchange_s) != len(steps)
            or any(not window - self.options.window < step <= window for step in steps)
            or any(one > other for one, other in pairwise(steps))
            or any(not 0 <= second <= SECONDS_MAX for second in (*seconds, *table.exchange_s))
        ):
            raise RemoteProtocolError("latencies that cannot be")

    def _keep(self, window: int, table: Table) -> None:
        """Of two of one peer the larger one, of too many those with the smallest digests: the same ones everywhere,
        whatever came first."""
        held = self._tables.setdefault(window, {})
        known = held.get(table.peer)
        if known is None or _size(known) < _size(table):
            held[table.peer] = table
        floats = self.options.learn * self.options.micro_batches
        if len(held) > min(TABLES_MAX, max(TABLES_MIN, FLOATS_MAX // floats)):
            del held[max(held, key=partial(_turn, window))]

    def _messages(self, window: int, held: Mapping[PeerId, Table]) -> Iterator[Latencies]:
        largest = max(map(len, (table.seconds for table in held.values())), default=1)
        at_once = max(1, MESSAGE_FLOATS_MAX // largest)
        tables = [table for _, table in sorted(held.items())]
        for start in range(0, len(tables), at_once):
            yield Latencies(window, tuple(tables[start : start + at_once]))


@lru_cache(maxsize=1 << 12)
def _turn(window: int, peer: PeerId) -> bytes:
    """Those that come first are in the sample."""
    return digest("latencies", window, peer)


def _is_sound(budget: Budget, k: int) -> bool:
    """Whether a member may mean it: what it goes by in averaging k was found before."""
    return (
        1 <= budget.k <= k
        and 2 <= budget.tables <= TABLES_MAX
        and 0 < budget.tau_s <= SECONDS_MAX * MICRO_BATCHES_MAX
        and 0 <= budget.drop_rate < 1
        and math.isfinite(budget.speedup)
    )


def _size(table: Table) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    return len(table.steps), table.seconds, table.exchange_s
