"""`opd dedup`: rollouts that were sampled more than once."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from opd_store.select import row_hashes
from opd_tools.console import AT_LEAST_1, Meter, access_options, command
from opd_tools.rewrite.duplicates import occurrences
from opd_tools.rewrite.plan import Part, open_source, schema_of, write
from opd_tools.rewrite.telling import json_option, shard_option, tell


@click.command("dedup")
@click.argument("src")
@click.argument("dst")
@click.option(
    "--keep", type=AT_LEAST_1, default=1, show_default=True, help="How many of equal rollouts to keep."
)
@shard_option
@json_option
@access_options
@command
def dedup(src: str, dst: str, keep: int, as_json: bool, shard_mib: int, access: dict[str, Any]) -> None:
    """Write the cache SRC to a new cache DST without rollouts that occur again.

    Of equal rollouts, prompt and response, the first ones stay, whatever their sample_id. Values do not
    change. Draws that are left out make what the student samples often look rare: count them before you
    train without them.

    \b
    Example: opd dedup runs/cache runs/unique
    """
    source = open_source(src, access)
    rows = np.flatnonzero(occurrences(row_hashes(source)) < keep).astype(np.int64)
    with Meter("copying", "rollouts") as meter:
        made = write(
            dst,
            [Part(source, rows)],
            verb="dedup",
            asked=[keep],
            meta=source.meta,
            schema=schema_of(source),
            access=access,
            on_progress=meter.update,
            shard_mib=shard_mib,
        )
    tell(made, {"duplicates left out": len(source) - len(rows)}, as_json=as_json)
