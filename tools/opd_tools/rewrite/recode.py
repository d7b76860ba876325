"""`opd recode`: the same rollouts in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import opd_store
from opd_store import ENCODINGS, Cache, Cut, InvalidArgumentError
from opd_tools.console import AT_LEAST_0, Meter, access_options, command
from opd_tools.rewrite.plan import Part, all_rows, kept_bands, open_source, schema_of, write
from opd_tools.rewrite.telling import json_option, shard_option, tell

_SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)


@click.command("recode")
@click.argument("src")
@click.argument("dst")
@click.option(
    "--encoding", type=click.Choice(ENCODINGS), help="How top-k pages are stored. Default: as in SRC."
)
@click.option(
    "--topk", type=AT_LEAST_0, help="Ranks to keep; less likely ones join the tail. Default: all of SRC."
)
@click.option(
    "--min-probability",
    type=_SHARE,
    help="Keep ranks of at least this probability; the others join the tail. The first rank stays.",
)
@click.option(
    "--mass", type=_SHARE, help="Keep as few ranks as sum to this probability; the others join the tail."
)
@click.option(
    "--bands",
    metavar="END,...",
    help="Ends of the rank bands, each of which is read alone. Default: those of SRC; one band for plain.",
)
@click.option(
    "--id-table",
    metavar="auto|none|CACHE",
    help="What ids are coded by: a table learnt from the first rollouts, none, or the table of another "
    "cache. Default: that of SRC; auto where SRC is plain.",
)
@shard_option
@json_option
@access_options
@command
def recode(src: str, dst: str, as_json: bool, shard_mib: int, access: dict[str, Any], **options: Any) -> None:  # noqa: ANN401
    """Write the cache SRC to DST in another encoding, with fewer ranks, or in other shards.

    Values that the new encoding holds stay as they are, bit for bit, and pages that need no change are
    copied. What rounding adds is printed, and counted in the new cache's largest error. Killed and started
    again, it goes on. Both may be URLs of caches; tokens, masks and columns do not change.

    \b
    Example: opd recode runs/cache runs/small --encoding ladder/64 --topk 16
    """
    source = open_source(src, access)
    schema = recoded(source, options, access)
    table = schema["id_table"]
    asked = [schema | {"id_table": table.digest.hex() if isinstance(table, opd_store.IdTable) else table}]
    with Meter("recoding", "rollouts") as meter:
        made = write(
            dst,
            [Part(source, all_rows(source))],
            verb="recode",
            asked=asked,
            meta=source.meta,
            schema=schema,
            access=access,
            on_progress=meter.update,
            shard_mib=shard_mib,
        )
    tell(made, {"bytes before": source.n_bytes}, as_json=as_json)


def recoded(source: Cache, options: dict[str, Any], access: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `opd_store.create` for what was asked.

    Raises:
        InvalidArgumentError: more ranks than there are, or a cut that the source's own contradicts.
    """
    schema = schema_of(source)
    if options["encoding"] is not None:
        schema["encoding"] = options["encoding"]
    topk = source.topk if options["topk"] is None else options["topk"]
    if topk > source.topk:
        raise InvalidArgumentError(f"--topk: {source.uri} holds {source.topk} ranks, {topk} were asked for")
    schema["topk"] = topk
    schema["cut"] = _cut(source, options) if topk else None
    schema["bands"] = kept_bands(source.schema, topk)
    if "plain" in (schema["encoding"], source.encoding) and schema["encoding"] != source.encoding:
        schema["bands"] = None
    if options["bands"] is not None:
        schema["bands"] = _bands(options["bands"])
    packed = schema["encoding"] != "plain" and any(schema[name] for name in ("topk", "chosen", "sampled"))
    if source.encoding == "plain":
        schema["id_table"] = "auto"
    schema["id_table"] = _table(options["id_table"], schema["id_table"], access) if packed else None
    return schema


def _cut(source: Cache, options: dict[str, Any]) -> Cut | None:
    given = {"probability": options["min_probability"], "mass": options["mass"]}
    asked = {rule: value for rule, value in given.items() if value is not None}
    if len(asked) > 1:
        raise InvalidArgumentError("--min-probability and --mass: give one of them")
    old = source.schema.cut
    if not asked:
        return old
    ((rule, value),) = asked.items()
    if old is not None and old.value is not None:
        looser = value < old.value if rule == "probability" else value > old.value
        if old.rule != rule or looser:
            raise InvalidArgumentError(
                f"{source.uri}: was cut before, at {old.rule} {old.value:g}, so ranks that {rule} {value:g} "
                "would keep are gone; recode what it was made from"
            )
    return Cut(rule, value)


def _bands(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(end) for end in text.split(","))
    except ValueError:
        raise InvalidArgumentError(f"--bands: expected numbers such as 8,64, found {text!r:.60}") from None


def _table(asked: str | None, same: Any, access: dict[str, Any]) -> Any:  # noqa: ANN401
    if asked is None:
        return same
    if asked in ("auto", "none"):
        return "auto" if asked == "auto" else None
    if "://" not in asked and not Path(asked.partition("@sha256:")[0]).exists():
        raise InvalidArgumentError(f"--id-table: expected auto, none or a cache, found {asked!r:.200}")
    table = open_source(asked, access).id_table
    if table is None:
        raise InvalidArgumentError(f"--id-table: {asked!s:.200} has no id table")
    return table
