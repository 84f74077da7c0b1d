"""How fast to send datagrams to one member: a token bucket whose rate the member's reports correct.

Loss alone does not say that we are too fast: lossy paths are what this is for. Loss that comes with our rate does. So
when more is lost than usual the rate is cut, and the next report judges: if the loss fell with the rate we were the
cause, and stay slow; if it did not, the path is like that, and the rate is what it was.

Knows counts, durations and the moments handed in. Does not know sockets, or the clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PaceConfig:
    """The bounds of a rate, and how it moves."""

    first_bytes_s: float = 60e6
    """Where nothing is known of the line. Too fast costs packets until the first report, too slow a few milliseconds a
    megabyte until the rate has grown."""
    min_bytes_s: float = 1e6
    max_bytes_s: float = 1e9
    burst_s: float = 0.004
    """What may be sent at once, as time of sending: event loops do not wake up more exactly."""
    growth: float = 1.15
    """Of the rate with each report that bears it."""
    cut: float = 0.6
    """Of the rate when more is lost than usual."""
    usual_s: float = 0.1
    """Weight of a report in what is believed to be the path's own loss."""
    noticed: float = 0.02
    """More loss than usual by less than this, or by less than chance allows, is no reason."""
    sent_min: int = 50
    """Reports of fewer packets say nothing."""


class Pace:
    """One sender's rate on one path."""

    def __init__(self, config: PaceConfig, bytes_s: float = 0.0) -> None:
        """`bytes_s`: what is known of the line; 0: nothing."""
        self._config = config
        self.bytes_s = min(max(bytes_s or config.first_bytes_s, config.min_bytes_s), config.max_bytes_s)
        self.path_loss = 0.0
        """What is believed to be lost at any rate."""
        self.backed_off = 0
        """How often our rate was found to be the cause of loss."""
        self._tried: tuple[float, float] | None = None
        """The loss that made us cut the rate, and the rate before: the next report judges."""
        self._tokens = 0.0
        self._filled_at = -math.inf

    def delay(self, size: int, now: float) -> float:
        """How long to wait before sending so many bytes; 0: send, they are paid for."""
        burst = max(self.bytes_s * self._config.burst_s, float(size))
        self._tokens = min(burst, self._tokens + (now - self._filled_at) * self.bytes_s)
        self._filled_at = now
        if self._tokens > size - 1:  # no sleep is shorter than what a byte takes
            self._tokens -= size
            return 0.0
        return (size - self._tokens) / self.bytes_s

    def report(self, *, sent: int, heard: int, is_full: bool) -> None:
        """Of `sent` packets in a row so many arrived. `is_full`: they were sent as fast as the rate allows."""
        config = self._config
        if sent < config.sent_min:
            return
        loss = 1 - min(heard, sent) / sent
        chance = 3 * math.sqrt(max(self.path_loss * (1 - self.path_loss), 1 / sent) / sent)
        is_unusual = loss > self.path_loss + max(config.noticed, chance)
        if self._tried is not None:
            loss_before, bytes_s_before = self._tried
            self._tried = None
            by_chance = 3 * math.sqrt(loss_before * (1 - loss_before) / sent)
            if loss - self.path_loss < 0.6 * (loss_before - self.path_loss) and loss_before - loss > by_chance:
                self.backed_off += 1
                return
            self.path_loss = min(loss, loss_before)
            self.bytes_s = bytes_s_before
        elif is_unusual and self.bytes_s > config.min_bytes_s:
            self._tried = (loss, self.bytes_s)
            self.bytes_s = max(config.min_bytes_s, self.bytes_s * config.cut)
        else:
            self.path_loss += config.usual_s * (loss - self.path_loss)
            if is_full:
                self.bytes_s = min(config.max_bytes_s, self.bytes_s * config.growth)
