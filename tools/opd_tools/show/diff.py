"""`opd diff`: what is different between two caches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

import opd_store
from opd_store import Cache, diff_meta
from opd_tools.console import AT_LEAST_1, Meter, access_options, command, print_json, printable
from opd_tools.show.compare import Comparison
from opd_tools.show.pairing import Pairing, pair

_AHEAD = 64
"""Rows that are asked for at once from a URL."""
_LISTED = 10
"""Rows that only one cache has and that are named in text."""


@click.command("diff")
@click.argument("a")
@click.argument("b")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Log-probs (nats) and other real numbers that differ by at most this count as equal.",
)
@click.option(
    "--values-only",
    is_flag=True,
    help="Other provenance, schema or order of rollouts is shown, but is no reason for exit code 1.",
)
@click.option(
    "--limit",
    type=AT_LEAST_1,
    metavar="N",
    help="Compare N of the rollouts that both have, evenly spread. Default: all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@access_options
@command
def diff(
    a: str,
    b: str,
    tolerance: float,
    values_only: bool,
    limit: int | None,
    as_json: bool,
    access: dict[str, Any],
) -> None:
    """Compare the caches A and B: provenance, schema, rollouts and values.

    Rollouts are found by their hash, so their order does not matter. Of top-k with different K, the ranks
    that both have are compared. The KL divergence from A to B, in nats, is the least that both top-k and
    tails allow. Exits with 0 if nothing differs, else with 1.

    \b
    Example: opd diff runs/cache runs/recoded --values-only --tolerance 0.004
    """
    first, second = opd_store.open(a, **access), opd_store.open(b, **access)
    with Meter("comparing", "rollouts") as meter:
        found = difference(first, second, tolerance=tolerance, limit=limit, on_progress=meter.update)
    found["equal"] = not (found["provenance"] or found["schema"]) or values_only
    found["equal"] &= not (
        found["only in A"]["rollouts"] or found["only in B"]["rollouts"] or found["fields"]
    )
    found["equal"] &= found["comparable"]
    if as_json:
        print_json(found)
    else:
        _show(found)
    if not found["equal"]:
        sys.exit(1)


def difference(
    first: Cache,
    second: Cache,
    *,
    tolerance: float,
    limit: int | None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Everything that differs, as JSON has it.

    Raises:
        IntegrityError, FormatError: one of the caches is damaged.
    """
    pairs = zip(("a", "b"), (first, second), strict=True)
    found: dict[str, Any] = {name: {"uri": cache.uri, "digest": cache.digest} for name, cache in pairs}
    found["provenance"] = _rows(diff_meta(first.meta, second.meta))
    schemas = [cache.schema.to_json() for cache in (first, second)]
    found["schema"] = _rows(
        (name, str(schemas[0][name]), str(schemas[1][name]))
        for name in schemas[0]
        if schemas[0][name] != schemas[1][name]
    )
    # Hashes depend on the tokenizer, so nothing can be found without it.
    found["comparable"] = first.meta.tokenizer_fingerprint == second.meta.tokenizer_fingerprint
    if first.digest == second.digest:
        same = np.arange(len(first))
        none = same[:0]
        pairing = Pairing(same, same, none, none)
    elif found["comparable"]:
        pairing = pair(first, second)
    else:
        pairing = Pairing(*(np.arange(n) for n in (0, 0, len(first), len(second))))
    comparison = Comparison(tolerance)
    if first.digest != second.digest:
        _compare(first, second, pairing, comparison, limit, on_progress)
    for name, rows in (("only in A", pairing.only_first), ("only in B", pairing.only_second)):
        found[name] = {"rollouts": len(rows), "first rows": rows[:_LISTED].tolist()}
    found["in both"] = {
        "rollouts": len(pairing.first),
        "in the same order": bool((np.diff(pairing.second) > 0).all()),
        "compared": len(pairing.first) if first.digest == second.digest else comparison.rollouts,
        "different": comparison.different,
    }
    found["fields"] = {
        name: {
            "rollouts": field.rollouts,
            "values": field.values,
            # JSON has no infinity, as between a tail and none.
            "largest difference": field.largest if np.isfinite(field.largest) else None,
            "row in A": field.rows[0],
            "row in B": field.rows[1],
            "position": None if field.position < 0 else field.position,
            "A": field.shown[0],
            "B": field.shown[1],
        }
        for name, field in comparison.fields.items()
    }
    found["KL"] = None
    if comparison.kl_mean is not None:
        found["KL"] = {
            "mean": comparison.kl_mean,
            "largest": comparison.kl_largest,
            "row in A": comparison.kl_rows[0],
            "row in B": comparison.kl_rows[1],
            "position": comparison.kl_position,
            "positions": comparison.kl_positions,
        }
    return found


def _compare(
    first: Cache,
    second: Cache,
    pairing: Pairing,
    comparison: Comparison,
    limit: int | None,
    on_progress: Callable[[int, int], None],
) -> None:
    total = len(pairing.first)
    wanted = np.arange(total) if limit is None or limit >= total else np.arange(limit) * total // limit
    ranks = min(first.topk, second.topk)
    for start in range(0, len(wanted), _AHEAD):
        some = wanted[start : start + _AHEAD]
        sides: list[tuple[Cache, NDArray[np.int64]]] = [
            (first, pairing.first[some]),
            (second, pairing.second[some]),
        ]
        for cache, rows in sides:
            cache.prefetch(rows.tolist(), ranks=ranks)
        for rows_ in zip(*(rows.tolist() for _, rows in sides), strict=True):
            rollouts = (cache.rollout(row, ranks=ranks) for (cache, _), row in zip(sides, rows_, strict=True))
            comparison.add(rows_, *rollouts)
        on_progress(min(start + _AHEAD, len(wanted)), len(wanted))


def _rows(rows: Iterable[tuple[str, str, str]]) -> list[dict[str, str]]:
    return [{"field": name, "A": left, "B": right} for name, left, right in rows]


def _show(found: dict[str, Any]) -> None:
    for name in ("provenance", "schema"):
        for row in found[name]:
            click.echo(
                f"{name} {printable(row['field'], 80)}: {printable(row['A'])} -> {printable(row['B'])}"
            )
    if not found["comparable"]:
        click.echo("the tokenizers differ, so no rollout of one can be found in the other")
    for name in ("only in A", "only in B"):
        if n := found[name]["rollouts"]:
            rows = ", ".join(map(str, found[name]["first rows"]))
            click.echo(f"{name}: {n:,} rollouts, rows {rows}{', ...' if n > _LISTED else ''}")
    both = found["in both"]
    order = "" if both["in the same order"] else ", in another order"
    click.echo(
        f"in both: {both['rollouts']:,} rollouts{order}; {both['compared']:,} compared, "
        f"{both['different']:,} differ"
    )
    for name, field in found["fields"].items():
        place = f"row {field['row in A']} of A, {field['row in B']} of B"
        if field["position"] is not None:
            place += f", position {field['position']}"
        size = field["largest difference"]
        largest = ", infinitely" if size is None else f", by up to {size:.3g}" if size else ""
        counts = f"{field['values']:,} values in {field['rollouts']:,} rollouts{largest}"
        values = f"{printable(field['A'], 80)} -> {printable(field['B'], 80)}"
        click.echo(f"  {printable(name, 64)}: {counts}: {values} ({place})")
    if (kl := found["KL"]) is not None:
        click.echo(
            f"  KL from A to B: at least {kl['mean']:.3g} nat a position, largest {kl['largest']:.3g} "
            f"(row {kl['row in A']} of A, {kl['row in B']} of B, position {kl['position']})"
        )
    click.echo("equal" if found["equal"] else "different")
