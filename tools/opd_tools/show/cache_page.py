"""The page of `opd report` for a cache: what it is, how big, and what its numbers look like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_tools.console import printable
from opd_tools.show.histograms import Histogram
from opd_tools.show.html_page import document, figure_tag, grid, plt, table
from opd_tools.show.measures import Stats, summary
from opd_tools.show.sampling import Sample
from opd_tools.show.stats import brief, brief_heads, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVES = 8
"""Values of a column that are drawn; a legend of more cannot be read."""
_COLUMNS = 12
"""Columns that are drawn by their values."""
_PER_OCTAVE = 4


def page(name: str, sections: Mapping[str, Mapping[str, Any]], sample: Sample) -> str:
    """The whole page.

    Args:
        name: of the cache.
        sections: what `opd inspect` shows; the first comes first, the others last.
        sample: what was measured, by all columns that it is to be shown by.
    """
    whole, groups = sample.collector.whole, sample.collector.groups
    facts = [f"<h2>{title.capitalize()}</h2>\n{_facts(rows)}" for title, rows in sections.items()]
    parts = [
        f"<p>Numbers and plots are of {sample.said}. Log-probs and entropies are in nats.</p>",
        *facts[:1],
        "<h2>Distributions</h2>",
        *_figures(whole, groups["finish_reason"]),
        *_size_figure(sections.get("bytes per position", {})),
        "<h2>Numbers</h2>",
        table(_lines(summary(whole))),
    ]
    several = [(column, found) for column, found in groups.items() if len(found) > 1]
    for column, found in several[:_COLUMNS]:
        ranked = dict(sorted(found.items(), key=lambda item: -item[1].rollouts))
        lines = [[value, *brief(summary(stats))] for value, stats in ranked.items()]
        parts += [f"<h2>By {printable(column, 64)}</h2>", grid(["", *brief_heads()], lines)]
        parts += _group_figures(column, ranked)
    parts += facts[1:]
    return document(f"Cache {name}", "\n".join(parts))


def _facts(rows: Mapping[str, Any]) -> str:
    return table((name, f"{value:,}" if isinstance(value, int) else value) for name, value in rows.items())


def _lines(numbers: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            yield name, ", ".join(f"{part} {number(inner)}" for part, inner in value.items())
        else:
            yield name, number(value)


def _figures(whole: Stats, finish_reasons: Mapping[str, Stats]) -> Iterable[str]:
    histograms = whole.histograms
    yield _drawn(
        "Length",
        "tokens",
        {"with prompt": histograms["tokens"], "response": histograms["response_tokens"]},
    )
    surprises = {name: histograms[f"{name}_surprise"] for name in ("teacher", "behaviour", "reference")}
    yield _drawn("Surprise, minus log-prob of the sampled token", "nats", surprises)
    yield _drawn("Entropy of the teacher, between its bounds", "nats", {"": histograms["entropy"]})
    if whole.missing_mass:
        yield _mass_figure(whole)
    yield _drawn("Ratio, teacher to behaviour policy", "ratio", {"": histograms["ratio"]}, line=1.0)
    yield _drawn("Effective sample size of a rollout", "share", {"": histograms["rollout_ess"]})
    figure, axes = _axes("Finish reasons", "rollouts")
    reasons = {reason: stats.rollouts for reason, stats in finish_reasons.items()}
    axes.barh([_label(reason) for reason in reasons], list(reasons.values()))
    yield figure_tag("Finish reasons", figure, "svg")


def _mass_figure(whole: Stats) -> str:
    title = "Probability outside the first k ranks"
    figure, axes = _axes(title, "k")
    ks = list(whole.missing_mass)
    least = 2.0**-26
    for label, values in (
        ("mean", [found.mean for found in whole.missing_mass.values()]),
        ("95 % of positions have less", [found.quantile(0.95) for found in whole.missing_mass.values()]),
    ):
        axes.plot(ks, np.maximum(values, least), ".-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ks, list(map(str, ks)))
    axes.set_ylabel("probability")
    axes.legend(fontsize=8)
    return figure_tag(title, figure, "svg")


def _size_figure(sizes: Mapping[str, Any]) -> Iterable[str]:
    found = {name: size for name, size in sizes.items() if isinstance(size, int | float)}
    if found:
        figure, axes = _axes("Size by column", "bytes per position")
        axes.barh([_label(name) for name in found], list(found.values()))
        axes.invert_yaxis()
        yield figure_tag("Size by column", figure, "svg")


def _group_figures(column: str, groups: Mapping[str, Stats]) -> Iterable[str]:
    drawn = list(groups.items())[:_CURVES]
    for title, unit, name in (
        ("Surprise", "nats", "teacher_surprise"),
        ("Response length", "tokens", "response_tokens"),
    ):
        found = {value or "(empty)": stats.histograms[name] for value, stats in drawn}
        yield _drawn(f"{title} by {printable(column, 64)}", unit, found)


def _drawn(title: str, unit: str, found: Mapping[str, Histogram], *, line: float | None = None) -> str:
    """Histograms as outlines, each of area 1 over the logarithm of the value; nothing without values."""
    present = {label: histogram for label, histogram in found.items() if histogram.n}
    if not present:
        return ""
    figure, axes = _axes(title, unit)
    for label, histogram in present.items():
        edges, counts = histogram.coarse(_PER_OCTAVE)
        axes.stairs(
            counts / histogram.n, edges, fill=len(present) == 1, label=_label(label) if label else None
        )
    if line is not None:
        axes.axvline(line, color="black", linestyle=":", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_ylabel("share")
    if any(present):
        axes.legend(fontsize=8)
    return figure_tag(title, figure, "svg")


def _axes(title: str, unit: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(unit)
    axes.grid(alpha=0.3)
    return figure, axes


def _label(text: str) -> str:
    """Text from a file in a figure."""
    # A leading underscore would hide it, a dollar sign begins a formula.
    return (" " + printable(text, 40)).replace("$", r"\$")
