"""`opd filter`: some rollouts of a cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import click

import opd_store
from opd_store import Cache, InvalidArgumentError
from opd_store.rollout import FINISH_REASONS
from opd_tools.console import AT_LEAST_0, AT_LEAST_1, Meter, access_options, command
from opd_tools.rewrite.conditions import conditions, read_hashes, read_rows, sample
from opd_tools.rewrite.plan import Part, Rows, open_source, require_rows, schema_of, write
from opd_tools.rewrite.telling import json_option, shard_option, tell

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("filter")
@click.argument("src")
@click.argument("dst")
@click.option(
    "--finish-reason",
    type=click.Choice(FINISH_REASONS),
    multiple=True,
    help="Keep rollouts that ended like this. Repeatable.",
)
@click.option(
    "--teacher", type=AT_LEAST_0, multiple=True, help="Keep rollouts of this teacher, by route. Repeatable."
)
@click.option("--min-tokens", type=AT_LEAST_0, help="Fewest tokens, prompt included.")
@click.option("--max-tokens", type=AT_LEAST_0, help="Most tokens, prompt included.")
@click.option("--min-response-tokens", type=AT_LEAST_0, help="Fewest tokens of the response.")
@click.option("--max-response-tokens", type=AT_LEAST_0, help="Most tokens of the response.")
@click.option(
    "--where",
    metavar="CONDITION",
    multiple=True,
    help="COLUMN=VALUE, ==, !=, >=, <=, > or <; COLUMN for rollouts with a value, !COLUMN for those without. "
    "Columns are reward, label, sample_id, policy_version and any x_*. Repeatable; all have to hold.",
)
@click.option("--rows", type=_FILE, help="File with row numbers, one a line; only these are considered.")
@click.option("--hashes", type=_FILE, help="File with rollout hashes, 64 hexadecimal digits a line.")
@click.option("--sample", "n_sampled", type=AT_LEAST_1, help="Of what is left, keep so many at random.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of --sample.")
@click.option("--limit", type=AT_LEAST_1, help="Of what is left, keep the first ones.")
@shard_option
@json_option
@access_options
@command
def filter_cache(
    src: str,
    dst: str,
    as_json: bool,
    shard_mib: int,
    access: dict[str, Any],
    **options: Any,  # noqa: ANN401
) -> None:
    """Write the rollouts of the cache SRC that meet every condition to a new cache DST.

    They keep their order. Lengths come from the index, so of a bucket only what is kept is fetched. Values do
    not change. Killed and started again, it goes on.

    \b
    Example: opd filter runs/cache runs/good --finish-reason stop --where "reward>=0.5" --max-tokens 4096
    """
    source = open_source(src, access)
    rows = chosen(source, options)
    require_rows(rows, f"{src}: none of its {len(source)} rollouts meets these conditions")
    with Meter("copying", "rollouts") as meter:
        made = write(
            dst,
            [Part(source, rows)],
            verb="filter",
            # Row numbers say all that any condition does.
            asked=[hashlib.sha256(rows.tobytes()).hexdigest()],
            meta=source.meta,
            schema=schema_of(source),
            access=access,
            on_progress=meter.update,
            shard_mib=shard_mib,
        )
    tell(made, {"rollouts left out": len(source) - len(rows)}, as_json=as_json)


def chosen(source: Cache, options: dict[str, Any]) -> Rows:
    """Rows that meet what was asked.

    Raises:
        InvalidArgumentError: a condition that makes no sense, or a row that does not exist.
    """
    given = None if options["rows"] is None else read_rows(options["rows"])
    if given is not None and len(given) and given.max() >= len(source):
        raise InvalidArgumentError(
            f"--rows {options['rows']}: row {given.max()}, but {source.uri} has {len(source)} rollouts"
        )
    limits = ("min_tokens", "max_tokens", "min_response_tokens", "max_response_tokens")
    rows = opd_store.select(
        source,
        finish_reason=options["finish_reason"] or None,
        teacher=options["teacher"] or None,
        where=conditions(source, options["where"]),
        hashes=None if options["hashes"] is None else read_hashes(options["hashes"]),
        rows=given,
        **{name: options[name] for name in limits},
    )
    if options["n_sampled"] is not None:
        rows = sample(source, rows, options["n_sampled"], seed=options["seed"])
    return rows[: options["limit"]]
