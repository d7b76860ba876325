"""`opd merge`: several caches of one teacher as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import click

from opd_store import ENCODINGS, Cache, CacheMeta, Cut, InvalidArgumentError, MismatchError, diff_meta
from opd_tools.console import AT_LEAST_0, Meter, access_options, command
from opd_tools.rewrite.duplicates import first_rows
from opd_tools.rewrite.plan import Part, kept_bands, open_source, schema_of, write
from opd_tools.rewrite.telling import json_option, shard_option, tell

_NEVER = ("tokenizer_fingerprint",)


@click.command("merge")
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
@click.argument("dst")
@click.option(
    "--allow",
    metavar="FIELD",
    multiple=True,
    help="Field of the provenance, such as code_version or teacher.engine, that may differ; the first "
    "cache's is kept. Repeatable.",
)
@click.option(
    "--encoding", type=click.Choice(ENCODINGS), help="How top-k pages are stored. Default: as in the first."
)
@click.option(
    "--topk", type=AT_LEAST_0, help="Ranks to keep. Default: those of the first; none may have fewer."
)
@shard_option
@json_option
@access_options
@command
def merge(
    sources: tuple[str, ...],
    dst: str,
    allow: tuple[str, ...],
    encoding: str | None,
    topk: int | None,
    as_json: bool,
    shard_mib: int,
    access: dict[str, Any],
) -> None:
    """Write the rollouts of the caches SRC... to a new cache DST, each once.

    They keep their order. The caches have to agree in everything that a trainer compares: teacher, tokenizer,
    sampler and the rest. A rollout whose tokens and sample_id an earlier one has is left out, and counted.
    Values do not change; with another --encoding they do as for `opd recode`. Killed and started again, it
    goes on.

    \b
    Example: opd merge runs/part-0 runs/part-1 runs/part-2 runs/whole
    """
    caches = [open_source(uri, access) for uri in sources]
    for cache in caches[1:]:
        require_equal(caches[0], cache, allow)
    schema = merged_schema(caches, encoding=encoding, topk=topk)
    kept = first_rows(caches)
    with Meter("merging", "rollouts") as meter:
        made = write(
            dst,
            [Part(cache, rows) for cache, rows in zip(caches, kept, strict=True)],
            verb="merge",
            # The order of the sources, also of one that is named twice.
            asked=[[cache.digest for cache in caches], encoding, topk],
            meta=caches[0].meta,
            schema=schema,
            access=access,
            on_progress=meter.update,
            shard_mib=shard_mib,
        )
    tell(made, {"duplicates left out": sum(map(len, caches)) - sum(map(len, kept))}, as_json=as_json)


def require_equal(first: Cache, other: Cache, allow: Collection[str]) -> None:
    """Refuse caches of different identity.

    Raises:
        MismatchError: a field that differs, unless it or what it is part of is in `allow`; `extra` may.
    """
    for name, expected, found in diff_meta(_identity(first.meta), _identity(other.meta)):
        parts = name.split(".")
        names = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        if name in _NEVER or names.isdisjoint(allow):
            remedy = "" if name in _NEVER else f"; --allow {name} keeps the first"
            raise MismatchError(
                f"{name}: {expected!s:.200} in {first.uri}, {found!s:.200} in {other.uri}{remedy}",
                field=name,
                expected=expected,
                found=found,
            )


def _identity(meta: CacheMeta) -> CacheMeta:
    return dataclasses.replace(meta, extra={})


def merged_schema(caches: Sequence[Cache], *, encoding: str | None, topk: int | None) -> dict[str, Any]:
    """Keywords of `opd_store.create` for a cache that all rollouts of these fit into.

    Raises:
        InvalidArgumentError: too few ranks, or columns that some of the caches lack.
    """
    first = caches[0]
    schema = schema_of(first)
    ranks = first.topk if topk is None else topk
    for cache in caches:
        if cache.topk < ranks:
            raise InvalidArgumentError(
                f"{cache.uri}: holds {cache.topk} ranks, {ranks} are needed; give --topk {cache.topk}"
            )
    schema["topk"], schema["bands"] = ranks, kept_bands(first.schema, ranks)
    if encoding is not None and encoding != first.encoding:
        schema["encoding"] = encoding
        if "plain" in (encoding, first.encoding):
            schema["bands"], schema["id_table"] = None, "auto"
    if schema["encoding"] == "plain" or not any(schema[name] for name in ("topk", "chosen", "sampled")):
        schema["id_table"] = None
    cuts = {cache.schema.cut for cache in caches}
    schema["cut"] = None if not ranks else first.schema.cut if len(cuts) == 1 else Cut("given")
    for kind in ("chosen", "sampled"):
        sizes = {getattr(cache.schema, kind) for cache in caches}
        if 0 in sizes and len(sizes) > 1:
            without = next(cache.uri for cache in caches if not getattr(cache.schema, kind))
            raise InvalidArgumentError(f"{without}: has no {kind} ids, and another of the caches has")
        schema[kind] = max(sizes)
    temperatures = {cache.schema.sampled_temperature for cache in caches}
    if len(temperatures) > 1:
        raise InvalidArgumentError(f"ids were drawn at different temperatures: {sorted(temperatures)}")
    for cache in caches:
        for name, kind in cache.schema.user_columns.items():
            if schema["user_columns"].setdefault(name, kind) != kind:
                raise InvalidArgumentError(
                    f"{cache.uri}: column {name} is {kind}, and {schema['user_columns'][name]} in another"
                )
    return schema
