"""A cache that grows by whole chunks: opened where an earlier call stopped, committed as each is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import opd_store
from opd_store import (
    CacheExistsError,
    CacheMeta,
    Cut,
    IdTable,
    MismatchError,
    Rollout,
    Version,
    Writer,
)


def open_writer(
    uri: str | os.PathLike[str],
    meta: CacheMeta,
    *,
    topk: int,
    chosen: int = 0,
    sampled: int = 0,
    sampled_temperature: float = 1.0,
    encoding: str = "plain",
    id_table: IdTable | Literal["auto"] | None = None,
    cut: Cut | None = None,
) -> Writer:
    """Create a cache, or go on with one that was made with the same settings.

    Raises:
        MismatchError: the cache at `uri` was made with others.
        CacheExistsError, StorageError: as for `opd_store.create`.
    """
    if not topk:
        # A table is learnt from the top-k.
        cut, id_table = None, None if id_table == "auto" else id_table
    if not (topk or chosen or sampled):
        encoding, id_table = "plain", None
    try:
        return opd_store.create(
            uri,
            meta=meta,
            topk=topk,
            chosen=chosen,
            sampled=sampled,
            sampled_temperature=sampled_temperature,
            encoding=encoding,
            id_table=id_table,
            cut=cut,
        )
    except CacheExistsError:
        if not (Path(uri) / "manifests").is_dir():
            raise
    writer = opd_store.append(uri, meta=meta)
    table = writer.base.id_table if writer.base is not None else None
    policy = "none" if id_table is None or encoding == "plain" else "auto" if id_table == "auto" else "given"
    pairs = {
        "topk": (writer.schema.topk, topk),
        "chosen": (writer.schema.chosen, chosen),
        "sampled": (writer.schema.sampled, sampled),
        "sampled_temperature": (writer.schema.sampled_temperature, sampled_temperature),
        "encoding": (writer.schema.encoding, encoding),
        "cut": (writer.schema.cut, cut),
        "id_table": (writer.schema.id_table, policy),
    }
    if isinstance(id_table, IdTable) and writer.schema.id_table == "given" and table is not None:
        pairs["id_table"] = (table.digest.hex(), id_table.digest.hex())
    for field, (found, expected) in pairs.items():
        if found != expected:
            writer.close()
            raise MismatchError(
                f"{uri}: {field} is {found} in the cache, but {expected} is to be written; "
                "choose another path",
                field=field,
                expected=str(expected),
                found=str(found),
            )
    return writer


def commit_chunks(
    writer: Writer,
    starts: Iterable[int],
    n_rollouts: int,
    size: int,
    make: Callable[[int, int], Sequence[Rollout]],
) -> Version:
    """Make and commit the chunks that begin at `starts`, each of `size` rollouts or what is left."""
    for start in starts:
        writer.append_batch(make(start, min(start + size, n_rollouts)))
        writer.commit()
    return writer.commit()
