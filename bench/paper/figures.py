"""Plots of the results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from paper.methods import BY_DISTANCE, BY_RATE, CORE, GROUPS, RATES, Method
from paper.tables import half_width, load, load_start


def draw(root: Path, seeds: Sequence[int], out: Path) -> None:
    """results-methods.png and results-axes.png."""
    out.mkdir(parents=True, exist_ok=True)
    _methods(root, seeds, out / "results-methods.png")
    _axes(root, seeds, out / "results-axes.png")


def _methods(root: Path, seeds: Sequence[int], path: Path) -> None:
    methods = [method for method in GROUPS["main"] if load(root, method, seeds)]
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(methods) + 1.2), layout="constrained")
    start = statistics.fmean(r["accuracy"] for r in load_start(root, "near-of-teacher", seeds))
    axes.axvline(start, color="grey", linestyle=":", label="SFT student")
    for place, method in enumerate(methods):
        values = [result["accuracy"] for result in load(root, method, seeds)]
        colour = "C1" if method.live else ("C2" if method.ranks else "C0")
        axes.plot(values, [place] * len(values), ".", color=colour, alpha=0.4)
        axes.errorbar(statistics.fmean(values), place, xerr=half_width(values), fmt="o", color=colour)
    axes.set_yticks(range(len(methods)), [method.name for method in methods], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy; dots are seeds, bars 95 % intervals of the mean")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _axes(root: Path, seeds: Sequence[int], path: Path) -> None:
    students = [f"{distance}-of-teacher" for distance in ("weak", "near", "strong")]
    starts = [statistics.fmean(r["accuracy"] for r in load_start(root, s, seeds)) for s in students]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for number, core in enumerate(CORE):
        by_rate = [next(m for m in (*BY_RATE, *CORE) if _same(m, core) and m.lr == lr) for lr in RATES]
        by_student = [
            next(m for m in (*BY_DISTANCE, *CORE) if _same(m, core) and m.student == s) for s in students
        ]
        label = core.name if core.live else f"offline: {core.name}"
        _line(left, RATES, root, seeds, by_rate, f"C{number}", label)
        _line(right, starts, root, seeds, by_student, f"C{number}", label)
    left.set_xscale("log")
    left.set_xlabel("learning rate")
    right.plot(starts, starts, ":", color="grey", label="SFT student")
    right.set_xlabel("accuracy of the SFT student")
    left.set_ylabel("accuracy")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _same(method: Method, core: Method) -> bool:
    return (method.loss, method.ranks, method.live) == (core.loss, core.ranks, core.live)


def _line(
    axes: plt.Axes,
    places: Sequence[float],
    root: Path,
    seeds: Sequence[int],
    methods: Sequence[Method],
    colour: str,
    label: str,
) -> None:
    values = [[result["accuracy"] for result in load(root, method, seeds)] for method in methods]
    means = [statistics.fmean(found) for found in values]
    bars = [half_width(found) for found in values]
    axes.errorbar(places, means, yerr=bars, fmt="o-", color=colour, label=label, capsize=3)
