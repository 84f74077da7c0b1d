"""The mean of what arrived, without a lean towards who was heard: one estimator for each packet range.

Knows values, weights, which ranges of whom arrived, and how lossy each link is. Does not know packets or the clock.

With o the owner, R the senders of a range that arrived, W the weight of all, the estimate is

    x^ = x_o + sum over R of w_j (x_j - x_o) / (pi_j W)

where pi_j is the probability that j's packet is among those that arrived, *given how many did*. Any inclusion
probability makes it unbiased (Horvitz and Thompson); this one (conditional Poisson sampling) makes it the textbook rule
where that is right and right where that is not:

  - Everything arrived: pi_j = 1, the exact mean; computed as the reliable path computes it, to the same bits.
  - Equal links: pi_j = |R| / (N-1), whatever the loss. Equal weights too: own/N + (N-1)/N * mean of R.
  - Unequal links: only the odds of one link's loss against another's count, so that a wrong guess that is wrong for all
    alike does no harm. (With pi_j = 1 - p_j it would, and the estimate would be off even where everything arrived.)
  - Nothing arrived: there is no estimate; such a range has to be repaired. Repaired from all, it stays unbiased.

All hold the same: exact, because only differences are scaled. On parameters these are small. Where what peers hold has
nothing in common, as gradients, `Form.TOTAL` scales the values themselves: sum over R of w_j x_j / (pi_j W) + own. An
owner without weight has nothing to compare with, so its estimate is divided by the sum of the shares instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.vector import LARGEST, Floats, first_non_finite
from moshpitd.averaging.weighted_mean import weighted_mean

Flags = npt.NDArray[np.bool_]
"""One a range."""
Probabilities = npt.NDArray[np.float64]
OneARange = TypeVar("OneARange", Flags, Floats)

LOSS_MIN, LOSS_MAX = 1e-4, 0.999
"""No link is taken to be surer than this, in either way: a surprise must not divide by nothing."""


class Form(Enum):
    """What is scaled up in place of what did not arrive."""

    DIFFERENCE = "difference"
    """The difference to the owner's values: for parameters, which lie close together."""
    TOTAL = "horvitz-thompson"
    """The values: for gradients, by request."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What is here of one member's ranges: where `arrived` is false the values are any finite ones."""

    coordinate: int
    weight: float
    """Scaled, like everybody's."""
    loss: float
    """Of its link to the owner, as measured; of the owner itself not looked at."""
    values: Floats
    arrived: Flags


def estimate(
    members: Sequence[Heard], me: int, *, range_elements: int, form: Form = Form.DIFFERENCE
) -> tuple[Floats, Flags]:
    """The estimates of all ranges of `range_elements` elements (the last may be shorter), in the precision they are
    reduced in, and which ranges have one. The others hold the owner's own values.

    `members`: by rank, all who have weight, and the owner at place `me` even if it has none.
    """
    own = members[me]
    others = [member for place, member in enumerate(members) if place != me]
    wide = np.dtype(np.float64 if own.values.dtype == np.float64 else np.float32)
    if not others:
        return own.values.astype(wide), np.full(len(own.arrived), own.weight > 0)
    arrived = np.stack([each.arrived for each in others])
    number = arrived.sum(axis=0)
    is_full, is_known = number == len(others), number > 0
    if is_full.all():
        return _exact(members, slice(None)), is_known
    shares = _shares(own.weight, others, arrived, number)
    with np.errstate(over="ignore", invalid="ignore"):
        total = _scaled_up(own.values.astype(wide), own.weight, others, shares, range_elements, form)
    if first_non_finite(total) is not None and wide != np.float64:  # differences of the largest float32 do not fit it
        wider = _scaled_up(own.values.astype(np.float64), own.weight, others, shares, range_elements, form)
        total = np.clip(wider, -LARGEST["float32"], LARGEST["float32"]).astype(np.float32)
    for rows, chosen in _by_range(is_full, range_elements, len(total)):
        if chosen.any():
            _choose(total[rows], _exact(members, rows), chosen)
    for rows, chosen in _by_range(~is_known, range_elements, len(total)):
        _choose(total[rows], own.values[rows], chosen)
    return total, is_known


def inclusion(losses: Sequence[float]) -> Probabilities:
    """pi[r, j]: how likely j is among those that arrived, given that r did. Losses of the N-1 links, independent.

    With S the number that arrived, pi[r, j] = (1 - p_j) P(S without j = r - 1) / P(S = r), from the distribution of S
    by adding one link at a time. Rows sum to r.
    """
    m = len(losses)
    if len(set(losses)) == 1:
        return np.repeat(np.arange(m + 1) / m, m).reshape(m + 1, m)
    p = np.clip(np.asarray(losses, np.float64), LOSS_MIN, LOSS_MAX)
    whole = _count_distribution(p)
    pi = np.zeros((m + 1, m))
    for j in range(m):
        pi[1:, j] = (1 - p[j]) * _count_distribution(np.delete(p, j)) / whole[1:]
    pi[m] = 1.0
    return np.clip(pi, 1e-9, 1.0)


def _count_distribution(p: Probabilities) -> Probabilities:
    """P(S = 0), P(S = 1), ...: how many of these arrive."""
    distribution = np.ones(1)
    for loss in p:
        grown = np.zeros(len(distribution) + 1)
        grown[:-1] = distribution * loss
        grown[1:] += distribution * (1 - loss)
        distribution = grown
    return distribution


def _shares(own_weight: float, heard: Sequence[Heard], arrived: Flags, number: npt.NDArray[np.intp]) -> Probabilities:
    """By sender and range: w_j / (pi_j W) where its packet arrived, 0 where it did not."""
    total_weight = own_weight + sum(each.weight for each in heard)
    pi = inclusion([each.loss for each in heard])[number].T
    weights = np.array([each.weight for each in heard])[:, None]
    shares = np.where(arrived, weights / (np.maximum(pi, 1e-9) * total_weight), 0.0)
    if own_weight <= 0:
        shares /= np.maximum(shares.sum(axis=0), 1e-300)
    return shares


def _scaled_up(
    own: Floats, own_weight: float, heard: Sequence[Heard], shares: Probabilities, range_elements: int, form: Form
) -> Floats:
    dtype = own.dtype.type
    is_difference = form is Form.DIFFERENCE and own_weight > 0
    if is_difference:
        total = own.copy()
    else:
        total_weight = own_weight + sum(each.weight for each in heard)
        total = own * dtype(own_weight / total_weight)
    scratch = np.empty_like(own)
    for each, share in zip(heard, shares, strict=True):
        if is_difference:
            np.subtract(each.values, own, out=scratch)
        else:
            scratch[:] = each.values
        for rows, factors in _by_range(share.astype(own.dtype), range_elements, len(own)):
            scratch[rows].reshape(len(factors), -1)[:] *= factors[:, None]
        total += scratch
    return total


def _exact(members: Sequence[Heard], rows: slice) -> Floats:
    """The reliable path's mean."""
    return weighted_mean([(each.coordinate, each.weight, each.values[rows]) for each in members if each.weight > 0])


def _by_range(per_range: OneARange, range_elements: int, elements: int) -> Iterator[tuple[slice, OneARange]]:
    """Elements and what is said of their ranges: the full ranges, then the shorter last one."""
    full = elements // range_elements
    if full:
        yield slice(0, full * range_elements), per_range[:full]
    if full * range_elements < elements:
        yield slice(full * range_elements, elements), per_range[full:]


def _choose(target: Floats, source: Floats, chosen: Flags) -> None:
    """Where chosen, the target's ranges become the source's."""
    rows = target.reshape(len(chosen), -1)
    np.copyto(rows, source.reshape(len(chosen), -1), where=chosen[:, None], casting="same_kind")
