"""The trainers of one daemon that share a session: who of them averages together, when, and with which weight.

Knows who is here, who called and who is expected. Does not know vectors, peers, nor how the session averages: to the
swarm a household is one peer, whose contribution is the mean of its callers' and whose weight is their sum.

| state     | means                                              | left by                                          |
|-----------|----------------------------------------------------|--------------------------------------------------|
| IDLE      | nobody has called                                  | ask() -> GATHERING                               |
| GATHERING | callers wait for those who are expected            | all here, patience over -> AVERAGING; all        |
|           |                                                    | withdrew -> IDLE                                 |
| AVERAGING | those who began are averaged; who calls now waits  | its end -> GATHERING or IDLE                     |
|           | for the next                                       |                                                  |

Expected is whoever has not been missed twice in a row. As soon as most of the expected are here, patience is the grace
of matchmaking, learnt from how far apart the trainers' calls were. Until then those who are here are themselves the
ones out of step: they wait half of their time, as they do for one whose values are on their way. No one's wait is ever
longer. Callers that name different epochs never mix: the lowest goes first, who names none goes along.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from moshpitd.averaging.errors import NoGroup, Precondition, Unavailable
from moshpitd.averaging.matchmaking import grace_from
from moshpitd.averaging.session import Call

MISSES_MAX = 2
"""Missed so often in a row, one is not expected until it takes part again."""
OFFSETS_KEPT = 128
OFFSETS_MIN = 4
"""Before that the grace is its floor."""
WORD_S = 1.0
"""So often those who wait are told for what."""


@dataclass(frozen=True, slots=True)
class HouseholdConfig:
    """How long trainers of one daemon wait for each other."""

    grace_factor: float = 8.0
    """Most wait for the others for median + factor * MAD of earlier calls' distances from the middle one."""
    grace_floor_s: float = 1.0
    """... but at least so long: less would part trainers a hiccup apart, more would wait for one that hangs."""


@dataclass(frozen=True, slots=True)
class Share:
    """One trainer's part in an averaging."""

    trainer: str
    weight: float
    joined: bool
    """New beside others that took part before: it gives no weight and receives."""
    completed: int = 0
    """With a compute budget: its micro-batches."""


@dataclass(frozen=True, slots=True)
class Average:
    """Average the mean of these by this call; `ended` or `failed` says how it went."""

    call: Call
    shares: tuple[Share, ...]
    """In the order in which the trainers came."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Nobody waits for the averaging under way any more; `failed` says that it is over."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """This trainer's call ends here."""

    trainer: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class Tell:
    """What this trainer waits for."""

    trainer: str
    text: str


HouseholdEffect = Average | Abandon | Refuse | Tell


class State(Enum):
    """See the table above."""

    IDLE = "idle"
    GATHERING = "gathering"
    AVERAGING = "averaging"


@dataclass(frozen=True, slots=True)
class _Ask:
    call: Call
    at: float
    deadline: float


@dataclass(slots=True)
class _Trainer:
    missed: int = 0
    is_new: bool = True
    """It has taken no result from here yet."""
    is_coming: bool = False
    """It has called; its values are on their way."""


class Household:
    """The machine. Drive it by its commands and `handle_timer`, then `take_effects`."""

    def __init__(self, *, newcomers_receive: bool, config: HouseholdConfig) -> None:
        self.state = State.IDLE
        self._newcomers_receive = newcomers_receive
        self._config = config
        self._trainers: dict[str, _Trainer] = {}
        """In the order in which they came."""
        self._waiting: dict[str, _Ask] = {}
        self._averaging: dict[str, _Ask] = {}
        """Who is in the averaging under way and still waits for its result."""
        self._opened_at = 0.0
        """When those who wait now began to gather."""
        self._offsets_s: deque[float] = deque(maxlen=OFFSETS_KEPT)
        self._next_word = math.inf
        self._effects: list[HouseholdEffect] = []

    # ---- commands

    def enter(self, trainer: str, now: float) -> None:
        """A trainer opened the session."""
        self._trainers[trainer] = _Trainer()

    def leave(self, trainer: str, now: float) -> None:
        """It closed the session, or died."""
        if trainer in self._waiting or trainer in self._averaging:
            self._effects.append(Refuse(trainer, Unavailable("the session was closed")))
        del self._trainers[trainer]
        self.withdraw(trainer, now)

    def expect(self, trainer: str, now: float) -> None:
        """It called; once its values are here it asks, or else it is excused."""
        self._trainers[trainer].is_coming = True

    def excuse(self, trainer: str, now: float) -> None:
        """It will not ask: its values were refused or never came. The others need not wait for it."""
        if resident := self._trainers.get(trainer):
            resident.is_coming, resident.missed = False, MISSES_MAX
            self._step(now)

    def ask(self, trainer: str, call: Call, now: float) -> None:
        """Its values are here."""
        assert trainer not in self._waiting
        self._waiting[trainer] = _Ask(call, now, now + call.timeout_s)
        if self.state is State.IDLE:
            self._become_gathering(now)
        self._trainers[trainer].is_coming = False
        self._next_word = min(self._next_word, now + WORD_S)
        self._step(now)

    def withdraw(self, trainer: str, now: float) -> None:
        """It waits no longer. Before the beginning it is simply out; later its values count, and it gets no result."""
        self._waiting.pop(trainer, None)
        if self._averaging.pop(trainer, None) is not None and not self._averaging:
            self._effects.append(Abandon())
        self._step(now)

    def ended(self, now: float, *, delivered: bool) -> None:
        """The averaging under way ended; `delivered`: its callers have a result."""
        for trainer in self._averaging:
            self._trainers[trainer].is_new &= not delivered
        self._averaging.clear()
        self._go_on(now)

    def failed(self, error: BaseException, now: float) -> None:
        """The averaging under way failed. It had the time of its shortest caller and the epoch of those who named one:
        the others, who are not to blame for either, wait for the next."""
        assert self.state is State.AVERAGING
        shortest = min((ask.deadline for ask in self._averaging.values()), default=math.inf)
        named = any(ask.call.epoch is not None for ask in self._averaging.values())
        for trainer, ask in self._averaging.items():
            match error:
                case NoGroup():
                    may_go_on = ask.deadline > max(shortest, now)
                case Precondition():
                    may_go_on = named and ask.call.epoch is None
                case _:
                    may_go_on = False
            if may_go_on:
                self._waiting[trainer] = ask
            else:
                self._effects.append(Refuse(trainer, error))
        self._averaging.clear()
        self._go_on(now)

    def handle_timer(self, now: float) -> None:
        self._step(now)
        if now >= self._next_word:
            self._next_word = now + WORD_S if self._waiting else math.inf
            self._effects += [Tell(trainer, self.waiting_for(now)) for trainer in self._waiting]

    def next_deadline(self) -> float | None:
        if not self._waiting:
            return None
        moments = [self._next_word, *(ask.deadline for ask in self._waiting.values())]
        if self.state is State.GATHERING:
            moments.append(self._due())
        return min(moments)

    def take_effects(self) -> list[HouseholdEffect]:
        effects, self._effects = self._effects, []
        return effects

    # ---- what the owner reads

    @property
    def trainers(self) -> Sequence[str]:
        """In the order in which they came."""
        return tuple(self._trainers)

    def waiting_for(self, now: float) -> str:
        """In words; empty while nobody waits here."""
        match self.state:
            case State.GATHERING:
                _, party = self._party()
                missing = len(self._missing())
                left = max(0.0, self._due() - now)
                return (
                    f"{len(party)} of {len(party) + missing} trainers of this daemon here, "
                    f"waiting for {missing} more, {left:.0f} s left"
                )
            case State.AVERAGING if self._waiting:
                return "an averaging of other trainers of this daemon is under way, the next one is ours"
            case _:
                return ""

    def does(self, trainer: str) -> str:
        """What this trainer does: computing, waiting, averaging."""
        if trainer in self._averaging:
            return "averaging"
        return "waiting" if trainer in self._waiting or self._trainers[trainer].is_coming else "computing"

    # ---- when to begin

    def _step(self, now: float) -> None:
        for trainer in [trainer for trainer, ask in self._waiting.items() if now >= ask.deadline]:
            del self._waiting[trainer]
            text = "time ran out while an earlier averaging of other trainers of this daemon was under way: call again"
            self._effects.append(Refuse(trainer, NoGroup(text)))
        if self.state is not State.GATHERING:
            return
        if not self._waiting:
            self._become_idle()
        elif not self._missing() or now >= self._due():
            self._become_averaging(now)

    def _party(self) -> tuple[int | None, list[str]]:
        """The epoch that comes next, and who of those who wait is in it."""
        epoch = min((ask.call.epoch for ask in self._waiting.values() if ask.call.epoch is not None), default=None)
        waiting = [trainer for trainer in self._trainers if trainer in self._waiting]
        return epoch, [trainer for trainer in waiting if self._waiting[trainer].call.epoch in (None, epoch)]

    def _missing(self) -> list[str]:
        return [
            trainer
            for trainer, resident in self._trainers.items()
            if trainer not in self._waiting and (resident.missed < MISSES_MAX or resident.is_coming)
        ]

    def _due(self) -> float:
        """When patience is over."""
        _, party = self._party()
        missing = self._missing()
        asks = [self._waiting[trainer] for trainer in party]
        half = min((max(ask.at, self._opened_at) + ask.deadline) / 2 for ask in asks)
        most = (len(party) + len(missing)) // 2 + 1
        if len(party) < most or any(self._trainers[trainer].is_coming for trainer in missing):
            return half
        return min(half, sorted(max(ask.at, self._opened_at) for ask in asks)[most - 1] + self._grace_s())

    def _grace_s(self) -> float:
        factor, floor_s = self._config.grace_factor, self._config.grace_floor_s
        if len(self._offsets_s) < OFFSETS_MIN:
            return floor_s
        return grace_from(list(self._offsets_s), factor=factor, floor_s=floor_s)

    # ---- states

    def _become_idle(self) -> None:
        self.state = State.IDLE

    def _become_gathering(self, now: float) -> None:
        assert self.state is not State.GATHERING
        self.state = State.GATHERING
        self._opened_at = now

    def _become_averaging(self, now: float) -> None:
        assert self.state is State.GATHERING
        self.state = State.AVERAGING
        epoch, party = self._party()
        calls_at = sorted(self._waiting[trainer].at for trainer in party)
        middle = calls_at[len(calls_at) // 2]
        self._offsets_s.extend(abs(at - middle) for at in calls_at)
        settled = any(not resident.is_new for resident in self._trainers.values())
        shares: list[Share] = []
        rows: list[tuple[float, ...]] = []
        for trainer, resident in self._trainers.items():
            if trainer in party:
                ask = self._averaging[trainer] = self._waiting.pop(trainer)
                joined = resident.is_new and settled and self._newcomers_receive
                completed = sum(map(len, ask.call.micro_batch_s))
                shares.append(Share(trainer, 0.0 if joined else ask.call.weight, joined, completed))
                rows += ask.call.micro_batch_s
                resident.missed = 0
            elif trainer not in self._waiting:  # those who wait have named a later epoch
                resident.missed = min(MISSES_MAX, resident.missed + 1)
        call = Call(
            weight=math.fsum(share.weight for share in shares),
            timeout_s=min(ask.deadline for ask in self._averaging.values()) - now,
            epoch=epoch,
            trainers=len(shares),
            micro_batch_s=tuple(rows),
            half=next(ask.call.half for ask in self._averaging.values()),  # with shards there is one trainer
        )
        self._effects.append(Average(call, tuple(shares)))

    def _go_on(self, now: float) -> None:
        assert self.state is State.AVERAGING
        self._become_gathering(now)
        self._step(now)
