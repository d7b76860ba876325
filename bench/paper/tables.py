"""From results to tables and figures: means over seeds, 95 % intervals, and differences seed by seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from paper.methods import (
    BY_DISTANCE,
    BY_RATE,
    CONSISTENCY,
    CORE,
    GROUPS,
    LIVE_METHODS,
    ONE_PAIR,
    RATES,
    TRUNCATED,
    Method,
)
from paper.training import result_path, start_path

_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % points of Student's t, by number of seeds."""

Result = dict[str, Any]


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % t-interval of the mean over seeds."""
    if len(values) < 2:
        return math.nan
    return _T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def load(root: Path, method: Method, seeds: Sequence[int]) -> list[Result]:
    """Results of the seeds that are there."""
    paths = [result_path(root, method, seed) for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def load_start(root: Path, student: str, seeds: Sequence[int]) -> list[Result]:
    """The same of a student before distillation."""
    paths = [start_path(root, student, seed) for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and half-width."""
    if not values:
        return "-"
    return f"{statistics.fmean(values):.{digits}f} ± {half_width(values):.{digits}f}"


def accuracy(results: Sequence[Result]) -> str:
    """Mean accuracy and half-width."""
    return spread([result["accuracy"] for result in results])


def main_table(root: Path, seeds: Sequence[int]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Every method at the middle learning rate, from the middle student."""
    columns = ("", "accuracy", "minus live sampled", "minus live top-64", "KL, nats")
    live = [_by_seed(root, method, seeds) for method in LIVE_METHODS[:2]]
    start = load_start(root, "near-of-teacher", seeds)
    rows = [("SFT student", accuracy(start), "", "", spread([r["kl"] for r in start], 2))]
    for method in (*GROUPS["main"], *TRUNCATED):
        found = _by_seed(root, method, seeds)
        if not found:
            continue
        label = method.name if method.live else f"offline: {method.name}"
        if method.sampler == "truncated":
            label += ", T 0.7 / top-p 0.9"
        differences = [
            spread([found[s]["accuracy"] - other[s]["accuracy"] for s in found if s in other])
            for other in live
        ]
        rows.append(
            (
                label,
                spread([r["accuracy"] for r in found.values()]),
                *differences,
                spread([r["kl"] for r in found.values()], 2),
            )
        )
    return columns, rows


def one_pair_table(root: Path, seeds: Sequence[int]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One teacher and student, for every seed with rollouts and an order of its own."""
    rows = []
    for method in ONE_PAIR:
        found = load(root, method, seeds)
        label = method.name if method.live else f"offline: {method.name}"
        rows.append((label, accuracy(found), spread([r["kl"] for r in found], 2)))
    start = load_start(root, "near-of-teacher", [0])
    return ("", "accuracy", "KL, nats"), [
        ("SFT student", *(f"{r['accuracy']:.3f}" for r in start), *(f"{r['kl']:.2f}" for r in start)),
        *rows,
    ]


def axis_table(
    root: Path,
    seeds: Sequence[int],
    headings: Sequence[str],
    variants: Sequence[Sequence[Method]],
    students: Sequence[str],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The core methods, one column for each setting. `students` are where the columns start from."""
    rows = [
        (
            "SFT student",
            *(spread([r["accuracy"] for r in load_start(root, name, seeds)]) for name in students),
        )
    ]
    for number, method in enumerate(CORE):
        cells = [spread([r["accuracy"] for r in load(root, column[number], seeds)]) for column in variants]
        rows.append((method.name if method.live else f"offline: {method.name}", *cells))
    return ("", *headings), rows


def rate_table(root: Path, seeds: Sequence[int]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Accuracy against the learning rate."""
    methods = {lr: [m for m in (*BY_RATE, *CORE) if m.lr == lr] for lr in RATES}
    return axis_table(
        root, seeds, [f"{lr:g}" for lr in RATES], list(methods.values()), ["near-of-teacher"] * len(RATES)
    )


def distance_table(root: Path, seeds: Sequence[int]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Accuracy against how far SFT had come."""
    students = [f"{distance}-of-teacher" for distance in ("weak", "near", "strong")]
    methods = [[m for m in (*BY_DISTANCE, *CORE) if m.student == student] for student in students]
    return axis_table(root, seeds, ("weak", "near", "strong"), methods, students)


def consistency_table(root: Path, seeds: Sequence[int]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Accuracy for each SFT teacher and each teacher of the distillation."""
    teachers = ("teacher", "other-teacher")
    columns = ("", *(f"SFT {s[0].upper()}, OPD {o[0].upper()}" for s in ("a", "b") for o in ("a", "b")))
    by_cell: dict[str, list[str]] = {}
    starts = []
    for sft_teacher in teachers:
        for teacher in teachers:
            student = f"near-of-{sft_teacher}"
            starts.append(accuracy(load_start(root, student, seeds)))
            for method in CONSISTENCY:
                if (method.student, method.teacher) == (student, teacher):
                    label = method.name if method.live else f"offline: {method.name}"
                    by_cell.setdefault(label, []).append(accuracy(load(root, method, seeds)))
    return columns, [("SFT student", *starts), *((label, *cells) for label, cells in by_cell.items())]


def all_tables(root: Path, seeds: Sequence[int]) -> dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Titles and tables."""
    return {
        "Methods": main_table(root, seeds),
        "One pair": one_pair_table(root, seeds),
        "Accuracy against the learning rate": rate_table(root, seeds),
        "Accuracy against the SFT student": distance_table(root, seeds),
        "Accuracy by teacher of SFT and of distillation": consistency_table(root, seeds),
    }


def targets(root: Path, seeds: Sequence[int], default: Method) -> list[tuple[str, str, str, str]]:
    """What was aimed at: (what, measured, target, met). Intervals of a mean say something about methods only
    where all seeds start from the same student; where they do not, differences do."""
    rows = []
    for where, pair in (("one pair", 0), ("own pairs", None)):
        methods = (replace(method, pair=pair) for method in (*LIVE_METHODS[:2], default))
        live, dense, found = (_by_seed(root, method, seeds) for method in methods)
        above = [found[seed]["accuracy"] - live[seed]["accuracy"] for seed in found]
        within = [found[seed]["accuracy"] - dense[seed]["accuracy"] for seed in found]
        own = _mean_and_half(found)[0]
        live_top, dense_low = sum(_mean_and_half(live)), _mean_and_half(dense)[0] - _mean_and_half(dense)[1]
        rows += [
            (
                f"{where}: accuracy above the interval of live sampled-token OPD",
                f"{own:.3f}",
                f"> {live_top:.3f}",
                _met(own > live_top),
            ),
            (
                f"{where}: minus live sampled-token OPD, seed by seed",
                spread(above),
                "> 0",
                _met(statistics.fmean(above) > half_width(above)),
            ),
            (
                f"{where}: accuracy within the interval of live top-64 OPD, or above",
                f"{own:.3f}",
                f">= {dense_low:.3f}",
                _met(own >= dense_low),
            ),
            (
                f"{where}: minus live top-64 OPD, seed by seed",
                spread(within),
                "not below 0",
                _met(statistics.fmean(within) > -half_width(within)),
            ),
        ]
    return rows


def _mean_and_half(results: dict[int, Result]) -> tuple[float, float]:
    values = [result["accuracy"] for result in results.values()]
    return statistics.fmean(values), half_width(values)


def _met(condition: bool) -> str:
    return "yes" if condition else "no"


def _by_seed(root: Path, method: Method, seeds: Sequence[int]) -> dict[int, Result]:
    found = {}
    for seed in seeds:
        path = result_path(root, method, seed)
        if path.exists():
            found[seed] = json.loads(path.read_text())
    return found
