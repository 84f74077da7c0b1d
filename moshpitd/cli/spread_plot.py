"""The picture of a simulated run: the spread after each averaging, on a logarithmic axis, beside what theory expects.

The only module that knows matplotlib, which comes with the demo extra.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from moshpitd.simulation.workloads import AGREED, InStepOptions, Report

FLOOR = 1e-16
"""Where an exact agreement, which no logarithm has, is drawn."""


def draw(report: Report, options: InStepOptions, path: Path) -> None:
    """Raises OSError where the file cannot be written."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    spreads = report.spreads
    theory = list(accumulate(report.theory, lambda spread, factor: spread * factor, initial=spreads[0]))
    moments = range(len(spreads))
    label = "theory: times p + (1 - p)/M a round, p absent, M in a line"
    axes.plot(moments, [max(v, FLOOR) for v in theory], "--", color="#888888", lw=1.5, label=label, zorder=2)
    axes.plot(moments, [max(v, FLOOR) for v in spreads], "-", color="#1f6fb4", lw=2, zorder=3)
    seen = [(k, v) for k, v in enumerate(spreads) if v > FLOOR]
    axes.plot(*zip(*seen, strict=True), "o", color="#1f6fb4", ms=6, zorder=4, label="spread over all peers")
    if exact := [k for k, v in enumerate(spreads) if v <= FLOOR]:
        axes.plot(exact, [FLOOR] * len(exact), "v", color="#2c8a3d", ms=9, zorder=5, label="exact: no spread at all")
    axes.axhline(AGREED, color="#c0392b", lw=1, ls=":", zorder=1)
    axes.annotate(
        "agreed", (1, AGREED), xycoords=("axes fraction", "data"), xytext=(-4, 3), textcoords="offset points",
        ha="right", color="#c0392b", fontsize=9,
    )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(min(max(v, FLOOR) for v in (*spreads, *theory)) / 10, max(10.0, 10 * max(spreads)))
    axes.set_xlim(-0.2, len(spreads) - 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(LogLocator(numticks=10))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#e4e4e4", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("averagings" if options.rounds != 1 else "rounds")
    axes.set_ylabel("variance over all peers")
    axes.set_title(_title(report, options), fontsize=11)
    axes.legend(loc="upper right", frameon=True, framealpha=1.0, edgecolor="#dddddd")
    figure.savefig(path)


def _title(report: Report, options: InStepOptions) -> str:
    faults = [
        f"{100 * share:.3g} % {what}"
        for share, what in ((options.absent, "absent"), (options.crash, "crashing"), (options.pause, "pausing"))
        if share
    ]
    faults += [f"{100 * burst.share:.3g} % absent from {burst.at}" for burst in options.bursts]
    return ", ".join([f"{report.peers} peers on {report.grid or 'no grid'}", *faults, f"seed {report.seed}"])
