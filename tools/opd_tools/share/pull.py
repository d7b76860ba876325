"""`opd pull`: a cache, or a part of one, from anywhere to here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import click

import opd_store
from opd_store import Cache, CacheMeta, CacheSchema, InvalidArgumentError, Writer
from opd_store.batch import ARRAY_FIELDS
from opd_store.schema import SCALARS
from opd_tools.console import AT_LEAST_0, AT_LEAST_1, Meter, access_options, command, print_json, printable
from opd_tools.destination import REQUEST, Add, build_from, is_local, local_path, request
from opd_tools.share.fetch import download
from opd_tools.show.cat import parse_rows

_KEPT = frozenset({"sample_id", "finish_reason", "teacher"})
"""Without these a rollout would be another one, or say something else."""
_AHEAD = 64
"""Rollouts asked for at once."""


@click.command("pull")
@click.argument("uri")
@click.argument("dst")
@click.option("--ranks", type=AT_LEAST_0, help="Only so many of the top-k ranks; the rest joins the tail.")
@click.option(
    "--columns",
    metavar="NAME,...",
    help="Only these native columns, such as teacher_logprob,x_domain. Token ids, sample_id, finish_reason, "
    "teacher, and the top-k as --ranks has it, always come along.",
)
@click.option("--rows", metavar="FIRST:END", help="Only these rollouts, such as 0:100 or 3,7,20:30.")
@click.option("--limit", type=AT_LEAST_1, help="Only the first so many rollouts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@access_options
@command
def pull(
    uri: str,
    dst: str,
    access: dict[str, Any],
    ranks: int | None,
    columns: str | None,
    rows: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Copy the cache URI, best pinned by @sha256:..., to DST. Every byte is checked on the way.

    The whole cache is the same files under the same digest. A part (--ranks, --columns, --rows, --limit) is a
    new cache, which says in its provenance what it is a part of; only what it needs is fetched. A killed run
    goes on when the same command is given again; a finished one changes nothing.

    \b
    Example: opd pull hf://datasets/me/cache@v1.0.0 runs/cache --ranks 8 --limit 1000
    """
    is_part = any(option is not None for option in (ranks, columns, rows, limit))
    if not is_part:
        if not is_local(dst):
            raise InvalidArgumentError(f"{dst}: a whole cache is pulled to a path; `opd publish` sends it on")
        with Meter("pulling", "bytes") as meter:
            whole = download(uri, local_path(dst), access, on_bytes=meter.update)
        found = {"uri": f"{dst}@{whole.digest}", "digest": whole.digest, "existed": whole.existed}
        found |= {"from": whole.uri, "rollouts": whole.rollouts, "n_bytes": whole.n_bytes}
    else:
        cache = opd_store.open(uri, **access)
        wanted = _rows(cache, rows, limit)
        version, existed = _pull_part(
            cache, dst, access, ranks=ranks, columns=_columns(cache, columns), rows=wanted
        )
        found = {"uri": version.uri, "digest": version.digest, "existed": existed}
        found |= {"from": f"{cache.uri}@{cache.digest}", "rollouts": len(wanted)}
        if cache.stats is not None:
            found |= {"n_bytes": cache.stats.n_bytes}
    if as_json:
        print_json(found)
        return
    if found["existed"]:
        click.echo("opd: note: pulled before, nothing to do", err=True)
    click.echo(f"opd: note: from {printable(found['from'], None)}", err=True)
    click.echo(printable(found["uri"], None))


def _pull_part(
    cache: Cache,
    dst: str,
    access: dict[str, Any],
    *,
    ranks: int | None,
    columns: frozenset[str] | None,
    rows: range | list[int],
) -> tuple[opd_store.Version, bool]:
    """A new cache of some rollouts, ranks and columns of another."""
    schema = cache.schema
    topk = schema.topk if ranks is None else ranks
    if topk > schema.topk:
        raise InvalidArgumentError(f"--ranks {topk}: {printable(cache.uri)} has {schema.topk}")
    is_packed = schema.encoding != "plain" and bool(topk or schema.chosen or schema.sampled)
    users = {name: kind for name, kind in schema.user_columns.items() if columns is None or name in columns}
    source = f"{cache.uri}@{cache.digest}"
    meta = _meta(cache, source, topk, columns, rows)

    def additions(there: int) -> Iterator[Add]:
        for at, row in enumerate(rows):
            if at % _AHEAD == 0 and at + _AHEAD > there:
                cache.prefetch(rows[at : at + 2 * _AHEAD], ranks=topk)
            if at < there:
                yield _nothing
            else:
                yield _adder(cache, row, columns)

    with Meter("pulling", "rollouts") as meter:
        return build_from(
            dst,
            additions,
            meta=meta,
            access=access,
            on_progress=lambda done: meter.update(done, len(rows)),
            topk=topk,
            encoding=schema.encoding,
            bands=_bands(schema, topk),
            id_table=cache.id_table if is_packed else None,
            cut=schema.cut if topk else None,
            chosen=schema.chosen,
            sampled=schema.sampled,
            sampled_temperature=schema.sampled_temperature,
            user_columns=users,
        )


def _adder(cache: Cache, row: int, columns: frozenset[str] | None) -> Add:
    return lambda writer: writer.copy(cache, row, columns=columns)


def _nothing(writer: Writer) -> None:
    """For a rollout that is there."""


def _meta(
    cache: Cache, source: str, topk: int, columns: frozenset[str] | None, rows: range | list[int]
) -> CacheMeta:
    chosen = "all" if columns is None else ",".join(sorted(columns))
    shown = _shown(rows, len(cache))
    extra = {**cache.meta.extra, "pulled_from": source, "pulled_rows": shown}
    extra |= {"pulled_ranks": str(topk), "pulled_columns": chosen}
    extra[REQUEST] = request("pull", source, topk, chosen, list(rows) if isinstance(rows, list) else rows)
    return dataclasses.replace(cache.meta, extra=extra)


def _shown(rows: range | list[int], n_rows: int) -> str:
    if isinstance(rows, range):
        return "all" if len(rows) == n_rows else f"{rows.start}:{rows.stop}"
    return f"{len(rows)} of {n_rows}"


def _bands(schema: CacheSchema, topk: int) -> tuple[int, ...] | None:
    """Those of the source, as far as they go, so that pages can be copied as they are."""
    if topk == 0:
        return None
    return (*(end for end in schema.bands if end < topk), topk)


def _rows(cache: Cache, rows: str | None, limit: int | None) -> range | list[int]:
    wanted: range | list[int] = range(len(cache)) if rows is None else parse_rows(rows, len(cache))
    return wanted if limit is None else wanted[:limit]


def _columns(cache: Cache, text: str | None) -> frozenset[str] | None:
    if text is None:
        return None
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    known = {*SCALARS, *ARRAY_FIELDS, *cache.schema.user_columns} - {"rollout_hash"}
    if unknown := sorted(names - known):
        raise InvalidArgumentError(
            f"--columns: {printable(unknown[0], 80)!r} is not one of {', '.join(sorted(known))}"
        )
    return names | _KEPT
