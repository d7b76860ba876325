"""`opd split`: a cache in two, or one for each value of a column."""

from __future__ import annotations

import posixpath
from typing import Any
from urllib.parse import quote

import click
import numpy as np

import opd_store
from opd_store import Cache, InvalidArgumentError
from opd_tools.console import Meter, access_options, command
from opd_tools.rewrite.plan import Part, Rows, open_source, require_rows, schema_of, write
from opd_tools.rewrite.telling import json_option, several, shard_option, total_of

_MOST_VALUES = 256
_MISSING, _EMPTY = "+missing", "+empty"
"""No value gives these names: of those, a plus sign is written otherwise."""


@click.command("split")
@click.argument("src")
@click.argument("outputs", metavar="TRAIN HELD_OUT | DIRECTORY", nargs=-1, required=True)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the rollouts that goes to HELD_OUT. Default: 0.1.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Decides, with its hash, where a rollout goes."
)
@click.option("--by", metavar="COLUMN", help="Instead: a cache for each value of this column, in DIRECTORY.")
@shard_option
@json_option
@access_options
@command
def split(
    src: str,
    outputs: tuple[str, ...],
    held_out: float | None,
    seed: int,
    by: str | None,
    as_json: bool,
    shard_mib: int,
    access: dict[str, Any],
) -> None:
    """Divide the cache SRC into TRAIN and HELD_OUT, or by the values of a column.

    A rollout goes to the same side whatever else is in the cache, and equal rollouts go together. With --by,
    caches are named after values, with what is not fit for a file name as %XX, +missing for rollouts without
    one and +empty for the empty text. Values do not change.

    \b
    Example: opd split runs/cache runs/train runs/held-out --held-out 0.05
    """
    source = open_source(src, access)
    if by is None:
        if len(outputs) != 2:
            raise InvalidArgumentError(f"expected two new caches, TRAIN and HELD_OUT, found {len(outputs)}")
        if outputs[0] == outputs[1]:
            raise InvalidArgumentError(f"{outputs[0]}: given twice")
        share = 0.1 if held_out is None else held_out
        sides = opd_store.split(source, share, seed=seed)
        for uri, rows in zip(outputs, sides, strict=True):
            require_rows(rows, f"{uri}: would have no rollout of {len(source)}; choose another share or seed")
        parts = dict(zip(outputs, sides, strict=True))
        names = dict(zip(outputs, ("train", "held_out"), strict=True))
        asked: list[object] = [share, seed]
    else:
        if len(outputs) != 1 or held_out is not None:
            raise InvalidArgumentError("--by: expected one DIRECTORY for the new caches, and no --held-out")
        parts = {posixpath.join(outputs[0], name): rows for name, rows in by_value(source, by).items()}
        names = {uri: posixpath.basename(uri) for uri in parts}
        asked = [by]
    made, done = {}, 0
    total = sum(map(len, parts.values()))
    with Meter("splitting", "rollouts") as meter:
        for uri, rows in parts.items():
            made[names[uri]] = write(
                uri,
                [Part(source, rows)],
                verb="split",
                asked=[*asked, names[uri]],
                meta=source.meta,
                schema=schema_of(source),
                access=access,
                on_progress=total_of(meter.update, done, total),
                shard_mib=shard_mib,
            )
            done += len(rows)
    several(made, as_json=as_json)


def by_value(source: Cache, column: str) -> dict[str, Rows]:
    """Rows by the value of a column, as a name that is fit for a file.

    Raises:
        InvalidArgumentError: no such column, or too many values.
    """
    values = source.column(column).to_pylist()
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        rows.setdefault(_MISSING if value is None else _file_name(value), []).append(row)
        if len(rows) > _MOST_VALUES:
            raise InvalidArgumentError(
                f"--by {column}: more than {_MOST_VALUES} values; use `opd filter` for those you want"
            )
    return {name: np.array(rows[name], np.int64) for name in sorted(rows)}


def _file_name(value: object) -> str:
    # Everything but letters, digits, "_", "-" and "~"; dots too, so that no name is "..".
    name = quote(str(value).lower() if isinstance(value, bool) else str(value), safe="").replace(".", "%2E")
    if len(name) > 200:
        raise InvalidArgumentError(f"--by: a value of {len(str(value))} characters cannot name a cache")
    return name or _EMPTY
