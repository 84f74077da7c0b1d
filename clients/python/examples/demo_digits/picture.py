"""Draws an `Outcome`: four panels, in colours that colour-blind people can tell apart, with shapes beside them."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot looks for a screen

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from network import CLASSES
from outcome import Outcome

# Okabe and Ito's palette.
SWARM, LONE, ALL_DATA, THEORY = "#0072B2", "#D55E00", "#000000", "#009E73"


def draw(outcome: Outcome, path: Path, subtitle: str) -> None:
    """Writes the PNG."""
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
        figure.suptitle(f"Eight peers learn together what none of them could learn alone\n{subtitle}", fontsize=13)
        _draw_losses(axes[0, 0], outcome)
        _draw_spread(axes[0, 1], outcome)
        _draw_accuracies(axes[1, 0], outcome)
        _draw_shards(axes[1, 1], outcome)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_losses(axes: Axes, outcome: Outcome) -> None:
    averagings = np.arange(1, len(outcome.all_data.losses) + 1)
    for peer, course in enumerate(outcome.lone):
        label = "each peer alone, on its shard" if peer == 0 else None
        axes.plot(averagings, course.losses, color=LONE, linewidth=0.9, linestyle=(0, (4, 2)), label=label)
    for peer, losses in enumerate(outcome.losses):
        label = "each peer of the swarm, before it averages" if peer == 0 else None
        axes.plot(averagings, losses, color=SWARM, linewidth=0.9, alpha=0.8, label=label)
    axes.plot(averagings, outcome.all_data.losses, color=ALL_DATA, linewidth=2, label="one process, all data")
    axes.plot(
        [len(averagings)],
        [outcome.final_loss],
        "*",
        color=SWARM,
        markersize=12,
        label="all, after the exact averaging",
    )
    axes.set(yscale="log", xlabel="averaging", ylabel="cross-entropy", title="Loss on the digits of all shards")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.76), frameon=False, fontsize=9)


def _draw_spread(axes: Axes, outcome: Outcome) -> None:
    rounds = outcome.rounds
    numbers = np.arange(1, len(rounds) + 1)
    axes.plot(numbers, [r.before for r in rounds], color="#999999", linewidth=1, label="before the round")
    # A full grid cuts the swarm in two ways, in turn; a round that somebody missed is shown, but makes no line.
    usual = [groups for groups, count in Counter(r.groups for r in rounds).most_common(2)]
    for groups, marker, line in zip(sorted(usual, reverse=True), "so", ("-", "--"), strict=False):
        chosen = [(number, r) for number, r in zip(numbers, rounds, strict=True) if r.groups == groups]
        where = [number for number, _ in chosen]
        axes.plot(
            where, [r.theory for _, r in chosen], color=THEORY, linewidth=1.4, linestyle=line,
            label=f"theory, {groups} groups, these seats",
        )  # fmt: skip
        axes.plot(
            where, [r.theory_random_seats for _, r in chosen], color=LONE, linewidth=1, linestyle=line,
            label=f"theory, random seats: {groups - 1}/{len(outcome.averagings) - 1} of the fresh drift",
        )  # fmt: skip
        axes.plot(
            where, [r.after for _, r in chosen], marker, color=SWARM, markersize=4, fillstyle="none",
            label=f"after a round in {groups} groups",
        )  # fmt: skip
    odd = [(number, r.after) for number, r in zip(numbers, rounds, strict=True) if r.groups not in usual]
    if odd:
        axes.plot(
            *zip(*odd, strict=True), "x", color=ALL_DATA, markersize=5, label="after a round that somebody missed"
        )
    final = outcome.final_spread
    floor = min(r.after for r in rounds) / 300
    axes.plot([len(rounds) + 1], [max(final, floor)], "*", color=SWARM, markersize=13, clip_on=False)
    said = "0: the same bits" if final == 0 else f"{final:.1e}"
    axes.annotate(
        f"after the exact averaging: {said} ", (len(rounds) + 1, max(final, floor)),
        xytext=(-10, 0), textcoords="offset points", ha="right", va="center",
    )  # fmt: skip
    axes.set(yscale="log", xlabel="averaging", ylabel="mean squared distance from the mean")
    axes.set_title("Spread between the peers after each Moshpit round")
    axes.set_ylim(bottom=floor / 1.6)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.1), frameon=False, fontsize=9)


def _draw_accuracies(axes: Axes, outcome: Outcome) -> None:
    rows = [
        ("one process,\nall data", [100 * outcome.all_data_accuracy], ALL_DATA, "D"),
        ("every peer\nof the swarm", [100 * each for each in outcome.accuracies], SWARM, "o"),
        ("a peer alone,\non its shard", [100 * each for each in outcome.lone_accuracies], LONE, "s"),
    ]
    for height, (_, values, colour, marker) in enumerate(reversed(rows)):
        mean = statistics.mean(values)
        axes.barh(height, mean, height=0.55, color=colour, alpha=0.25)
        axes.plot(values, [height] * len(values), marker, color=colour, markersize=6, fillstyle="none")
        axes.annotate(f"{mean:.1f} %", (max(values), height), xytext=(8, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    axes.set(xlim=(0, 110), xticks=range(0, 101, 20), xlabel="per cent right")
    axes.set_title(f"Accuracy on {len(outcome.test.labels)} test digits (bars: means)")


def _draw_shards(axes: Axes, outcome: Outcome) -> None:
    counts = np.stack([np.bincount(shard.labels, minlength=CLASSES) for shard in outcome.shards])
    axes.imshow(counts, cmap="cividis", aspect="auto")
    for (peer, label), count in np.ndenumerate(counts):
        axes.text(
            label, peer, str(count), ha="center", va="center", color="black" if count > counts.max() / 2 else "white"
        )
    axes.set_xticks(range(CLASSES))
    axes.set_yticks(range(len(counts)), [f"peer {peer}" for peer in range(len(counts))])
    axes.set(xlabel="digit", title="Examples of each digit on each shard")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
