"""What was measured, for people: a table in the terminal, a page with pictures under docs/.

Knows `.bench/results.json`, where each benchmark has a record of its last run: when, at which commit, under which load,
what it found. Records of another machine or of other versions are forgotten when new ones come. Does not measure.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from tests.benchmarks.figures import Figure, Goal, Measured
from tests.benchmarks.rivals import BESIDE, GLOO, HIVEMIND

ROOT = BESIDE.parent.parent
RESULTS = ROOT / ".bench" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "benchmarks"
PACKAGES = ("moshpitd", "moshpit_client", "grpcio", "protobuf", "numpy", "ml_dtypes", "kademlia", "uvloop")
RIVAL_PACKAGES = {GLOO: "torch", HIVEMIND: "hivemind"}
COLOURS = {"Gloo": "#7f7f7f", "hivemind": "#d62728", "plain TCP": "#bbbbbb"}
OUR_COLOURS = ("#1f77b4", "#2ca02c", "#9467bd", "#17becf")


@dataclass(frozen=True, slots=True)
class Record:
    """One benchmark's last run."""

    at: str
    """UTC."""
    commit: str
    load_before: float
    """Of the machine, in processes that wanted to run."""
    seconds: float
    quick: bool
    measured: Measured
    failure: str = ""
    """Why its result is wrong or there is none."""


def record(began: float, load: float, *, quick: bool, measured: Measured, failure: str = "") -> Record:
    """Of a run that ends now; `began` is of the monotonic clock."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    at = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return Record(at, commit, load, time.monotonic() - began, quick, measured, failure)


def load() -> dict[str, Record]:
    """By benchmark's name, what this machine measured with these versions."""
    try:
        stored = json.loads(RESULTS.read_text())
    except (OSError, ValueError):
        return {}
    if {key: stored.get(key) for key in ("machine", "versions")} != {"machine": machine(), "versions": versions()}:
        return {}
    return {name: _read(each) for name, each in stored["benchmarks"].items()}


def store(records: Mapping[str, Record]) -> dict[str, object]:
    """Write results.json; returns what it holds."""
    report = {
        "machine": machine(),
        "versions": versions(),
        "benchmarks": {name: _plain(each) for name, each in records.items()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _plain(one: Record) -> dict[str, object]:
    figures = [
        dataclasses.asdict(each) | {"goal": each.goal and each.goal.value, "reached": each.reached}
        for each in one.measured.figures
    ]
    measured = {"figures": figures, "details": one.measured.details, "missing": one.measured.missing}
    return {each.name: getattr(one, each.name) for each in dataclasses.fields(one)} | {"measured": measured}


def _read(raw: dict[str, Any]) -> Record:
    figures: list[Figure] = []
    for each in raw["measured"]["figures"]:
        del each["reached"]
        figures.append(Figure(**each | {"goal": each["goal"] and Goal(each["goal"])}))
    measured = Measured(tuple(figures), raw["measured"]["details"], tuple(raw["measured"]["missing"]))
    return Record(**raw | {"measured": measured})


def machine() -> dict[str, object]:
    """What the figures are measured on."""
    model = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        names = [line.partition(":")[2].strip() for line in described.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Ours, and those that the rivals' environments are pinned to."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    for rival, package in RIVAL_PACKAGES.items():
        pins = dict(line.split("==") for line in (BESIDE / rival.requirements).read_text().splitlines() if "==" in line)
        found[package] = pins[package]
    return found


def ordered(records: Mapping[str, Record]) -> list[Figure]:
    """Ratios first, then what has a target, then the rest; each as measured."""
    figures = [figure for each in records.values() for figure in each.measured.figures]
    return sorted(figures, key=lambda figure: (figure.unit != "x", figure.goal is None))


def show(console: Console, records: Mapping[str, Record]) -> None:
    """The table, and below it what is not in it."""
    table = Table(title=f"moshpitd on {machine()['processor']}, {os.cpu_count()} cores", title_justify="left")
    for heading in ("benchmark", "figure", "target", "measured", "", "note"):
        table.add_column(heading, justify="right" if heading in ("target", "measured") else "left", overflow="fold")
    for figure in ordered(records):
        verdict = {None: "", True: "[green]reached[/]", False: "[red]missed[/]"}[figure.reached]
        table.add_row(figure.benchmark, figure.name, _target(figure), _value(figure), verdict, figure.note)
    console.print(table)
    for reason in _missing(records):
        console.print(f"not measured: {reason}", style="yellow", markup=False)
    for name, each in records.items():
        if each.failure:
            console.print(f"WRONG: {name}: {each.failure}", style="bold red", markup=False)
    console.print(f"written to {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")


def write_page(records: Mapping[str, Record]) -> None:
    """docs/benchmarks.md and its pictures, from the records alone."""
    figures = ordered(records)
    missed = [figure for figure in figures if figure.reached is False]
    promised = [figure for figure in figures if figure.reached is not None]
    here = machine()
    named = "; ".join(f"{each.name} ({_value(each)}, {_target(each)})" for each in missed)
    used = ", ".join(f"{name} {each}" for name, each in versions().items() if each)
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m tests.benchmarks --write-docs` from what `make bench` measured; not by hand.",
        "",
        f"Machine: {here['processor']}, {here['cores']} cores, {here['memory_gb']} GB, {here['system']}.",
        "Everything ran on this one machine: peers, trainers and whoever they are compared with share its cores.",
        f"Versions: {used}.",
        "",
        "Those compared take turns in one run, so that whatever else the machine does falls on all; figures are",
        "medians unless they say otherwise. An all-reduce is timed from a group that is bound to its result, at the",
        "slowest peer; a step from the moment all callers are released to the last one's return. A share of a line",
        "counts the bytes an all-reduce cannot do without. The heads of the files in `tests/benchmarks/` say how each",
        "figure is made.",
        "",
        f"{len(promised) - len(missed)} of {len(promised)} promised figures are reached.",
        *([f"Missed: {named}."] if missed else []),
        "",
    ]
    for picture in _pictures(records):
        lines += [f"![{picture.stem.replace('_', ' ')}](benchmarks/{picture.name})", ""]
    lines += ["## Promised", *_head("benchmark", "figure", "target", "measured", "", "note")]
    for each in promised:
        verdict = "reached" if each.reached else "**missed**"
        lines.append(_row(each.benchmark, each.name, _target(each), _value(each), verdict, each.note))
    lines += ["", "## Told for context", *_head("benchmark", "figure", "measured", "note")]
    lines += [_row(each.benchmark, each.name, _value(each), each.note) for each in figures if each.reached is None]
    if missing := _missing(records):
        lines += ["", "## Not measured", "", *(f"- {reason}" for reason in missing)]
    lines += ["", "## Runs", *_head("benchmark", "when (UTC)", "commit", "load before", "took", "")]
    for name, run in records.items():
        what = f"**wrong**: {run.failure}".replace("\n", " ") if run.failure else "quick" if run.quick else ""
        lines.append(_row(name, run.at, run.commit, f"{run.load_before:.2f}", f"{run.seconds:.0f} s", what))
    PAGE.write_text("\n".join(lines) + "\n")


def _head(*columns: str) -> tuple[str, str, str]:
    right = ("target", "measured", "load before", "took")
    return "", _row(*columns), _row(*("---:" if each in right else "---" for each in columns))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _target(figure: Figure) -> str:
    return f"{figure.goal.value} {figure.target:g} {figure.unit}".strip() if figure.goal else ""


def _value(figure: Figure) -> str:
    return f"{figure.value:.3g} {figure.unit}".strip()


def _missing(records: Mapping[str, Record]) -> list[str]:
    return list(dict.fromkeys(reason for each in records.values() for reason in each.measured.missing))


# ---- pictures


def _pictures(records: Mapping[str, Record]) -> list[Path]:
    """As many as there are records for; none, and said so, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install '.[demo]')")
        return []
    matplotlib.use("Agg")
    PICTURES.mkdir(exist_ok=True)
    drawn: list[Path] = []
    if "all_reduce" in records:
        drawn.append(_draw_all_reduce(records["all_reduce"].measured.details))
    if "arc" in records and not records["arc"].failure:
        drawn.append(_draw_arc(records["arc"].measured.details))
    if "training" in records and not records["training"].failure:
        drawn.append(_draw_training(records["training"].measured.details))
    if "packet_loss" in records and not records["packet_loss"].failure:
        drawn += _draw_packet_loss(records["packet_loss"].measured.details)
    if "codecs" in records:
        drawn.append(_draw_codecs(records["codecs"].measured.details))
    if "codec_links" in records:
        drawn.append(_draw_codec_links(records["codec_links"].measured.details))
    if "loss_over_time" in records and records["loss_over_time"].measured.details:
        drawn.append(_draw_losses(records["loss_over_time"].measured.details))
    for name, unit, title in (
        ("links", "%", "of the nominal rate, or of plain TCP in the same net"),
        ("local_hop", "%", "what the local hop adds to a step"),
        ("slow_peer", "x", "one slow peer of four: round time by the best split's"),
    ):
        figures = [each for each in records[name].measured.figures if each.unit == unit] if name in records else []
        if figures:
            drawn.append(_draw_bars(name, f"{title}, {unit}", figures))
    return drawn


def _draw_all_reduce(details: Mapping[str, Any]) -> Path:
    """Throughput over size, one panel a number of peers."""
    from matplotlib import pyplot

    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for what, samples in details.items():
        peers, _, size = what.partition(", ")
        megabytes = float(size.split()[0])
        for name, each in samples.items():
            seconds = sorted(sample["data_s"] for sample in each)[len(each) // 2]
            panels.setdefault(peers, {}).setdefault(name, []).append((megabytes, megabytes / 1e3 / seconds))
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), sharey=True, squeeze=False)
    for axes, (peers, lines) in zip(all_axes[0], panels.items(), strict=True):
        ours = iter(OUR_COLOURS)
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name, color=COLOURS.get(name) or next(ours))
        axes.set(title=peers, xlabel="MB of float32 a peer", xscale="log", yscale="log")
        axes.set_xticks([4, 16, 64, 256], ["4", "16", "64", "256"])
        axes.grid(alpha=0.3, which="both")
    all_axes[0][0].set_ylabel("GB of vector a second")
    all_axes[0][-1].legend(fontsize=7)
    return _save(figure, "all_reduce")


def _draw_codecs(details: Mapping[str, Any]) -> Path:
    """What a codec loses over what it sends, each half of a codec once."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4))
    points: dict[str, list[tuple[float, float, str]]] = {}
    for each in details["moshpitd"]:
        name, loss = each["codec"], each["normal"]
        if each["half"] != "both" or not loss["relative_error"]:
            continue
        kind = next((kind for kind in ("anchored", "spikes", ":32", "flash") if kind in name), "cast")
        points.setdefault(kind, []).append((loss["bits_per_element"], loss["relative_error"], name))
    theirs = details.get("hivemind", {"codecs": []})["codecs"]
    points["hivemind"] = [(each["bits_per_element"], each["relative_error"], each["codec"]) for each in theirs]
    ours = iter((*OUR_COLOURS, "#8c564b"))
    for kind, each in points.items():
        bits, errors, names = zip(*sorted(each), strict=True) if each else ((), (), ())
        joined = "-" if kind in ("flash", ":32", "anchored") else ""
        axes.plot(bits, errors, marker="o", linestyle=joined, color=COLOURS.get(kind) or next(ours))
        for at, off, name in zip(bits, errors, names, strict=True):
            named, below = (f"hivemind {name}", -9) if kind == "hivemind" else (name, 3)
            axes.annotate(named, (at, off), xytext=(5, below), textcoords="offset points", fontsize=7)
    axes.set(xlabel="bits an element", ylabel="error, by norm", yscale="log")
    axes.set_title("normally distributed values; anchored: 1 % from their anchor", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.18)
    return _save(figure, "codecs")


def _draw_codec_links(details: Mapping[str, Any]) -> Path:
    """Round time by codec, one group of bars a link."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for samples in details.values() for name in samples))
    figure, axes = pyplot.subplots(figsize=(8.4, 4.2))
    ours = iter((*OUR_COLOURS, "#8c564b", "#e377c2"))
    for place, name in enumerate(names):
        colour = COLOURS["hivemind"] if "hivemind" in name else next(ours)
        for link, samples in enumerate(details.values()):
            if name in samples:
                seconds = sorted(sample["data_s"] for sample in samples[name])[len(samples[name]) // 2]
                at = link + (place - len(names) / 2) * 0.8 / len(names)
                axes.bar(at, seconds, 0.75 / len(names), color=colour, label=name if link < 1 or "hive" in name else "")
                axes.annotate(f"{seconds:.2g}", (at, seconds), ha="center", va="bottom", fontsize=6)
    axes.set_xticks(range(len(details)), list(details))
    axes.set(ylabel="seconds of a round", yscale="log")
    axes.set_title("4 peers, 16 MB of float32", fontsize=9)
    axes.legend(fontsize=7)
    return _save(figure, "codec_links")


def _draw_losses(details: Mapping[str, Any]) -> Path:
    """Loss over wall clock, one panel a way to deal the data: of the mean of all models, fainter of trainers' own."""
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(details), figsize=(5.6 * len(details), 4.0), sharey=True, squeeze=False)
    colours = {"synchronous": "#000000", "groups": "#D55E00", "wait-avoiding": "#0072B2"}
    for axes, (dealt, curves) in zip(all_axes[0], details.items(), strict=True):
        for name, curve in curves.items():
            axes.plot(curve["seconds"], curve["mean"], label=name, color=colours[name])
            axes.plot(curve["seconds"], curve["own"], color=colours[name], alpha=0.35, linestyle="--")
        axes.axhline(curves["synchronous"]["mean"][-1], color="#999999", linewidth=0.8, linestyle=":")
        axes.set(yscale="log", xlabel="seconds")
        axes.set_title(f"two of eight late in each step, {dealt} shards (dashed: own models)", fontsize=9)
        axes.grid(alpha=0.3, which="both")
    all_axes[0][0].set_ylabel("cross-entropy on all shards")
    all_axes[0][0].legend(fontsize=8)
    return _save(figure, "loss_over_time")


def _draw_arc(details: Mapping[str, Any]) -> Path:
    """Distance to the optimum over steps."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    for (name, distances), colour in zip(details["distances"].items(), OUR_COLOURS, strict=False):
        axes.plot(range(0, details["every"] * len(distances), details["every"]), distances, label=name, color=colour)
    axes.set(xlabel="averagings", ylabel="distance to the optimum", yscale="log")
    axes.set_title("two camps whose gradients cancel: ten daemons, a twentieth of the rows", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, "arc")


def _draw_training(details: Mapping[str, Any]) -> Path:
    """The same losses twice: over steps, and over what the daemons sent."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 3.6), sharey=True)
    for (name, course), colour in zip(details["courses"].items(), OUR_COLOURS, strict=False):
        losses, every = course["losses"], details["every"]
        steps = range(0, every * len(losses), every)
        megabytes = [course["bytes_sent"] / 1e6 * step / steps[-1] for step in steps]
        panels[0].plot(steps, losses, label=name, color=colour)
        panels[1].plot(megabytes[1:], losses[1:], label=name, color=colour)
    panels[0].set(xlabel="averagings", ylabel="loss over all digits", yscale="log")
    panels[1].set(xlabel="MB that eight daemons sent", xscale="log")
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return _save(figure, "training")


def _draw_packet_loss(details: Mapping[str, Any]) -> list[Path]:
    """Times over loss; losses and drift of peers that learn. docs/packet-loss.md shows them too."""
    from matplotlib import pyplot

    drawn: list[Path] = []
    if cells := [each for each in details["net"]["rounds"] if not each["uplink_mbit"]]:
        sizes = sorted({each["megabytes"] for each in cells})
        figure, all_axes = pyplot.subplots(1, len(sizes) + 1, figsize=(3.6 * (len(sizes) + 1), 3.6))
        _draw_times(all_axes[0], "plain TCP", details["net"]["messages"], COLOURS["plain TCP"])
        all_axes[0].set_title("1 MiB, two peers", fontsize=9)
        for axes, size in zip(all_axes[1:], sizes, strict=True):
            for transport, label, colour in (("reliable", "gRPC", "#D55E00"), ("lossy", "lossy", "#0072B2")):
                its = [each for each in cells if (each["megabytes"], each["transport"]) == (size, transport)]
                _draw_times(axes, label, its, colour)
            axes.set_title(f"a round of {size:g} MB, four daemons", fontsize=9)
        for axes in all_axes:
            axes.set(xlabel="packets lost, %", yscale="log")
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize=7)
        all_axes[0].set_ylabel("ms")
        drawn.append(_save(figure, "packet_loss_rounds"))
    if courses := details["training"]:
        figure, (learning, apart) = pyplot.subplots(1, 2, figsize=(10.0, 3.8))
        styles = {"averaging": ":", "owners": "-", "increments": "--"}
        losses = sorted({each["loss"] for each in courses})
        for each in courses:
            if each["codec"] != "float32" or each["way"] == "averaging":
                continue
            colour = OUR_COLOURS[losses.index(each["loss"])]
            steps = range(10, 10 * len(each["own"]) + 1, 10)
            label = f"{each['way']}, {each['loss']:.0%} lost"
            learning.plot(steps, each["own"], styles[each["way"]], color=colour, label=label)
            if each["loss"]:
                apart.plot(steps, each["apart"], styles[each["way"]], color=colour, label=label)
        learning.set(xlabel="steps", ylabel="peers' cross-entropy on all digits", yscale="log")
        apart.set(xlabel="steps", ylabel="E |th_i - th_j|^2 of an element", yscale="log")
        for axes in (learning, apart):
            axes.grid(alpha=0.3, which="both")
        learning.legend(fontsize=7)
        learning.set_title("absolute values (lines) and increments (dashes) to eight peers", fontsize=9)
        apart.set_title("how far two peers are apart", fontsize=9)
        drawn.append(_save(figure, "packet_loss_training"))
    return drawn


def _draw_times(axes: Any, label: str, cells: Sequence[Mapping[str, Any]], colour: str) -> None:
    """p99 over loss, and the median as dashes."""
    at = [100 * each["loss"] for each in cells]
    for share, style, what in ((99, "-", "p99"), (50, "--", "median")):
        times = [1e3 * float(np.percentile(each["seconds"], share)) for each in cells]
        axes.plot(at, times, style, marker="o", markersize=3, color=colour, label=f"{label}, {what}")


def _draw_bars(name: str, title: str, figures: Sequence[Figure]) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.4, 0.8 + 0.34 * len(figures)))
    for index, each in enumerate(figures):
        colour = {None: "#7f7f7f", True: "#2ca02c", False: "#d62728"}[each.reached]
        axes.barh(index, each.value, color=colour)
        axes.annotate(
            _value(each), (each.value, index), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
        )
        if each.target is not None:
            axes.plot([each.target] * 2, [index - 0.45, index + 0.45], color="black")
    axes.set_yticks(range(len(figures)), [each.name for each in figures], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(f"{title} (black: promised)", fontsize=9)
    return _save(figure, name)


def _save(figure: Any, name: str) -> Path:
    from matplotlib import pyplot

    path = PICTURES / f"{name}.png"
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path
