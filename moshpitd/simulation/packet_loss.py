"""Which packets get through: evenly lost, in bursts, or differently on each link.

Knows one state a link: good or bad, Gilbert's and Elliott's two-state chain, moved by each packet. A link that loses
evenly has one state. Does not know what packets hold, or time.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from moshpitd.averaging.names import PeerId


@dataclass(frozen=True, slots=True)
class LossModel:
    """How a link loses packets."""

    good: float = 0.0
    """The share lost in the good state ..."""
    bad: float = 1.0
    """... and in the bad one."""
    to_bad: float = 0.0
    """The chance with each packet that a good link turns bad ..."""
    to_good: float = 1.0
    """... and that a bad one turns good."""

    @classmethod
    def even(cls, loss: float) -> LossModel:
        return cls(good=loss)

    @classmethod
    def bursts(cls, loss: float, *, length: float) -> LossModel:
        """The share `loss` in all, in bursts of `length` packets on average."""
        assert 0 <= loss < 1 <= length
        return cls(to_bad=min(1.0, loss / (1 - loss) / length), to_good=1 / length)

    @property
    def loss(self) -> float:
        """In the long run."""
        share_bad = self.to_bad / (self.to_bad + self.to_good) if self.to_bad else 0.0
        return (1 - share_bad) * self.good + share_bad * self.bad


class PacketLoss:
    """The links of a swarm; `by_link` (sender, receiver), `usual` for all others."""

    def __init__(
        self,
        usual: LossModel,
        rng: random.Random,
        by_link: Mapping[tuple[PeerId, PeerId], LossModel] | None = None,
    ) -> None:
        self.packets = 0
        self.lost = 0
        self._usual = usual
        self._by_link = dict(by_link or {})
        self._rng = rng
        self._bad: set[tuple[PeerId, PeerId]] = set()

    def model(self, sender: PeerId, receiver: PeerId) -> LossModel:
        return self._by_link.get((sender, receiver), self._usual)

    def arrives(self, sender: PeerId, receiver: PeerId, *, later: bool = False) -> bool:
        """The fate of the link's next packet. `later`: it comes after a pause, in which every burst ends."""
        link, model = (sender, receiver), self.model(sender, receiver)
        if later:
            self._bad.discard(link)
        elif model.to_bad:
            if link in self._bad and self._rng.random() < model.to_good:
                self._bad.discard(link)
            elif link not in self._bad and self._rng.random() < model.to_bad:
                self._bad.add(link)
        loss = model.loss if later else model.bad if link in self._bad else model.good
        self.packets += 1
        arrives = not loss or self._rng.random() >= loss
        self.lost += not arrives
        return arrives
