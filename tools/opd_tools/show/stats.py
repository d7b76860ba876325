"""`opd stats`: what the numbers of a cache look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

import opd_store
from opd_tools.console import AT_LEAST_1, Meter, access_options, command, print_json, printable
from opd_tools.show.measures import summary
from opd_tools.show.sampling import Sample, collect, require_groupable

_BRIEF = (
    ("rollouts", None, "rollouts"),
    ("response tokens a rollout", "mean", "tokens"),
    ("teacher log-prob", "mean", "log-prob"),
    ("entropy", "mean, at least", "entropy"),
    ("sampled token", "is rank 1", "rank 1"),
    ("ratio, teacher to behaviour", "mean", "ratio"),
    ("effective sample size", "of all tokens", "ESS"),
)
"""What is told of each group: name, part of it, heading."""


@click.command("stats")
@click.argument("uri")
@click.option(
    "--by",
    "by",
    multiple=True,
    metavar="COLUMN",
    help="Also apart for each value of teacher, finish_reason or an x_* column. Repeatable.",
)
@click.option(
    "--limit",
    type=AT_LEAST_1,
    default=10_000,
    show_default=True,
    help="Rollouts to read, evenly spread over the cache.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@access_options
@command
def stats(uri: str, by: tuple[str, ...], limit: int, as_json: bool, access: dict[str, Any]) -> None:
    """Show lengths, log-probs, entropy, mass of k ranks, ratios and ESS of URI.

    Log-probs and entropies are in nats. The entropy is between two bounds, since of what is outside the top-k
    only the sum is known. Mass, mean and ESS are exact for the rollouts read; quantiles are right to 4 %.

    \b
    Example: opd stats runs/cache --by finish_reason
    """
    cache = opd_store.open(uri, **access)
    columns = tuple(dict.fromkeys(by))
    require_groupable(cache, columns)
    with Meter("measuring", "rollouts") as meter:
        sample = collect(
            cache, by=tuple(dict.fromkeys(("finish_reason", *columns))), limit=limit, on_progress=meter.update
        )
    found = document(sample, columns)
    if as_json:
        print_json(found)
        return
    click.echo(f"read {found['read']}")
    show_numbers(found["all"], found["finish reasons"])
    for name, groups in found["by"].items():
        click.echo(f"\nby {printable(name, 64)}")
        click.echo(brief_table(groups))


def document(sample: Sample, columns: tuple[str, ...]) -> dict[str, Any]:
    """Everything, as JSON has it."""
    groups = sample.collector.groups
    return {
        "read": sample.said,
        "rollouts read": sample.n_read,
        "rollouts": sample.n_rollouts,
        "all": summary(sample.collector.whole),
        "finish reasons": {value: group.rollouts for value, group in groups["finish_reason"].items()},
        "by": {name: {value: summary(group) for value, group in groups[name].items()} for name in columns},
    }


def show_numbers(numbers: Mapping[str, Any], finish_reasons: Mapping[str, int]) -> None:
    """Print a summary, a line a measure."""
    rows = {**numbers, "finish reasons": finish_reasons}
    for name, value in rows.items():
        if isinstance(value, Mapping):
            shown = ", ".join(f"{printable(part, 40)} {number(inner)}" for part, inner in value.items())
        else:
            shown = number(value)
        click.echo(f"  {name:<32} {shown}")


def brief(numbers: Mapping[str, Any]) -> list[str]:
    """A few of the numbers of a group, as text; "-" where unknown."""
    cells = []
    for name, part, _ in _BRIEF:
        value = numbers.get(name)
        if part is not None and isinstance(value, Mapping):
            value = value[part]
        cells.append(number(value))
    return cells


def brief_heads() -> list[str]:
    """What `brief` tells."""
    return [head for _, _, head in _BRIEF]


def brief_table(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a group, aligned."""
    lines = [
        ["", *brief_heads()],
        *([printable(value, 40), *brief(group)] for value, group in groups.items()),
    ]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return "\n".join(
        "  "
        + "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def number(value: object) -> str:
    """A number with as many digits as mean something."""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return "-"
    if 0.99 < value < 1:
        return f"{value:.6f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
