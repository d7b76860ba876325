"""A rollout of one cache as another one will hold it: what can be kept, and what has to be encoded anew."""

from __future__ import annotations

from collections.abc import Collection

from opd_store import layout
from opd_store.batch import ARRAY_FIELDS
from opd_store.cache import Cache
from opd_store.columns import Stored
from opd_store.encodings import IdTable, sum_error
from opd_store.errors import IntegrityError
from opd_store.hashing import rollout_hash
from opd_store.rollout import SUPPORTS, Rollout
from opd_store.schema import SCALARS, CacheSchema


def read_rollout(
    source: Cache, row: int, schema: CacheSchema, columns: Collection[str] | None = None
) -> Rollout:
    """The fields that a cache of this schema has room for, and as many ranks.

    Args:
        columns: native and user columns to take; None takes all.

    Raises:
        IntegrityError: its tokens are not those that it was found by.
    """
    kinds = [kind for kind in SUPPORTS if getattr(schema, kind)]
    wanted = {name for kind in kinds for name in SUPPORTS[kind] if name}
    native = {*ARRAY_FIELDS, *SCALARS, *source.schema.user_columns} - {"rollout_hash"}
    wanted |= native if columns is None else native.intersection(columns)
    rollout = source.rollout(row, ranks=min(schema.topk, source.topk), columns=wanted)
    if rollout_hash(rollout.token_ids, source.meta.tokenizer_fingerprint) != source.row_hash(row):
        raise IntegrityError(
            f"{source.uri}, row {row}: rollout_hash is not the hash of its tokens. Run `opd verify` on it.",
            row=row,
            column="rollout_hash",
        )
    return rollout


def read_stored(source: Cache, row: int, schema: CacheSchema, id_table: IdTable | None) -> Stored:
    """Pages and tails of the source that a cache of this schema and id table can use."""
    cut = schema.cut
    is_cut = cut is None or cut.rule == "given" or cut == source.schema.cut
    ends = (end for end in schema.bands[:-1] if end < source.topk) if is_cut else ()
    # Also where pages are taken as they are: reading it proves that the tail is possible.
    tails = {end: source.rollout(row, ranks=end, columns=("log_tail",)).log_tail for end in ends}
    error = source.max_error
    if source.encoding != schema.encoding:
        # What the values may be off by, even where somebody wrote less into the manifest.
        error = max(error, sum_error(source.encoding))
    return Stored(
        pages=_pages(source, row, schema, id_table) if is_cut else {},
        tails={end: tail for end, tail in tails.items() if tail is not None},
        is_cut=is_cut,
        error=error,
    )


def _pages(source: Cache, row: int, schema: CacheSchema, id_table: IdTable | None) -> dict[str, bytes]:
    if source.encoding != schema.encoding:
        return {}
    tables = [None if table is None else table.digest for table in (source.id_table, id_table)]
    known = source.schema.packed_columns()
    pages = {}
    for column in schema.packed_columns():
        if column not in known:
            continue
        page = source.page(row, column)
        # A page from before the source had a table refers to none.
        if tables[0] == tables[1] or (id_table is None and not page[1] & layout.PAGE_USES_TABLE):
            pages[column.name] = page.tobytes()
    return pages
