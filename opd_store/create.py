"""Starting to write: a new cache, or the next versions of one."""

from __future__ import annotations

import os
from typing import Literal

from opd_store import layout
from opd_store.cache import Cache
from opd_store.encodings import IdTable
from opd_store.errors import CacheExistsError, InvalidArgumentError
from opd_store.manifest import Manifest, encode_manifest
from opd_store.meta import CacheMeta
from opd_store.schema import CacheSchema, Cut
from opd_store.storage import resolve_writable
from opd_store.versions import load_manifest
from opd_store.writer import (
    DEFAULT_BATCH_BYTES,
    DEFAULT_SHARD_BYTES,
    Writer,
    require_equal_meta,
    require_known,
    table_ref,
)


def create(
    uri: str | os.PathLike[str],
    *,
    meta: CacheMeta,
    topk: int = 0,
    encoding: str = "plain",
    bands: tuple[int, ...] | None = None,
    id_table: IdTable | Literal["auto"] | None = "auto",
    cut: Cut | None = None,
    chosen: int = 0,
    sampled: int = 0,
    sampled_temperature: float = 1.0,
    user_columns: dict[str, str] | None = None,
    batch_bytes: int = DEFAULT_BATCH_BYTES,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Writer:
    """Start a new cache. Nothing is visible before the first `commit`.

    Args:
        meta: identity and provenance; the same for every version of a cache.
        topk: K, ranks stored at every response position; 0 for a cache of native columns only.
        encoding: how pages are stored: "plain" (mapped as it is), "f32" (every bit), "ladder16" (float16
            values), "ladder/128", "ladder/64" or "ladder/32" (units of 1/128, 1/64, 1/32 nat).
        bands: ends of the rank bands, each fetched and decoded alone; None means 8 and 64, cut at `topk`,
            and one band for "plain", so that it is mapped without a copy.
        id_table: what ids are coded by. "auto" learns a table from the first 65,536 positions and uses it
            from then on; `plain` pages never have one.
        cut: keep only some of the `topk` ranks at each position; None keeps all.
        chosen: most ids a position may have that somebody else chose, such as the student's own top-k.
        sampled: most distinct ids a position may have that were drawn from the teacher.
        sampled_temperature: at which they were drawn.
        user_columns: `x_*` column name to "bool", "int64", "float64" or "utf8".
        batch_bytes: encoded bytes after which a record batch is written; bounds the writer's memory.
        shard_bytes: size after which a shard is finished.

    Raises:
        CacheExistsError: something is already there; continue a cache with `append`.
        InvalidArgumentError: an argument outside its range, or a URL: buckets are read only.
        StorageError: the place cannot be written to.
    """
    storage = resolve_writable(uri)
    if storage.versions() or not storage.is_empty():
        raise CacheExistsError(
            f"{storage.uri}: already exists. Choose another path, or continue it with `append`."
        )
    schema = CacheSchema(
        topk=topk,
        bands=_default_bands(topk, encoding) if bands is None else bands,
        encoding=encoding,
        id_table=_table_policy(encoding, topk, chosen, sampled, id_table),
        cut=cut,
        chosen=chosen,
        sampled=sampled,
        sampled_temperature=sampled_temperature,
        user_columns=user_columns or {},
    )
    widest = max(topk, chosen, sampled)
    if widest > meta.vocab_size:
        raise InvalidArgumentError(
            f"topk, chosen, sampled: {widest} ids of a vocabulary of {meta.vocab_size}"
        )
    table = id_table if isinstance(id_table, IdTable) else None
    if table is not None and table.vocab_size != meta.vocab_size:
        raise InvalidArgumentError(
            f"id_table: made for a vocabulary of {table.vocab_size}, the cache has {meta.vocab_size}"
        )
    try:
        empty = encode_manifest(
            Manifest(
                sequence=1,
                parent=None,
                meta=meta,
                schema=schema,
                segments=(),
                id_table=None if table is None else table_ref(table),
            )
        )
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"meta: no reader would accept it: {error}") from error
    if len(empty) > layout.MAX_MANIFEST_BYTES // 2:
        raise InvalidArgumentError(
            f"meta: {len(empty)} bytes of JSON, the limit is {layout.MAX_MANIFEST_BYTES // 2}"
        )
    return Writer(storage, meta, schema, None, table, batch_bytes=batch_bytes, shard_bytes=shard_bytes)


def _default_bands(topk: int, encoding: str) -> tuple[int, ...]:
    return layout.band_ends(topk) if encoding != "plain" or not topk else (topk,)


def _table_policy(
    encoding: str, topk: int, chosen: int, sampled: int, id_table: IdTable | Literal["auto"] | None
) -> str:
    if isinstance(id_table, IdTable):
        return "given"
    if id_table not in ("auto", None):
        raise InvalidArgumentError(f'id_table: expected an IdTable, "auto" or None, found {id_table!r:.100}')
    # Tables are learnt from the teacher's top-k.
    return "auto" if id_table == "auto" and encoding != "plain" and topk else "none"


def append(
    uri: str | os.PathLike[str],
    *,
    meta: CacheMeta | None = None,
    batch_bytes: int = DEFAULT_BATCH_BYTES,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Writer:
    """Continue a cache at its newest version.

    Args:
        meta: what the caller believes the cache to be; None skips the comparison.
        batch_bytes, shard_bytes: as for `create`.

    Raises:
        CacheNotFoundError: nothing to continue.
        InvalidArgumentError: a URL: buckets are read only.
        MismatchError: `meta` differs from the cache's, with the field and both values.
        UnsupportedVersionError: a newer release wrote it.
    """
    storage = resolve_writable(uri)
    cache = Cache(storage, *load_manifest(storage))
    require_known(cache)
    if meta is not None:
        require_equal_meta(cache, meta)
    return Writer(
        storage,
        cache.meta,
        cache.schema,
        cache,
        cache.id_table,
        batch_bytes=batch_bytes,
        shard_bytes=shard_bytes,
    )
