"""What a new cache is made of: rows of other caches, its schema, its provenance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import opd_store
from opd_store import Cache, CacheMeta, CacheSchema, IdTable, InvalidArgumentError, Version, Writer
from opd_store.encodings import sum_error
from opd_tools.destination import REQUEST, Add, build_from, is_local, request

Rows = NDArray[np.int64]
MADE_BY, MADE_FROM = "made_by", "made_from"
"""Fields of `CacheMeta.extra`: the verb, and digests of what it read."""
SHARD_MIB = 256
_NAMED_SOURCES = 50
_AT_A_TIME = 64


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a cache, in the order in which they are to be written."""

    cache: Cache
    rows: Rows
    routes: Mapping[int, int] = field(default_factory=dict)
    """Teacher there to teacher here; those that are not named stay."""


@dataclass(frozen=True, slots=True)
class Made:
    """A cache that was written, or was there before."""

    version: Version
    existed: bool
    cache: Cache
    error_before: float
    """Nats, of the values that were read."""

    @property
    def error_added(self) -> float:
        """Nats."""
        return max(0.0, self.cache.max_error - self.error_before)

    def to_json(self) -> dict[str, Any]:
        """What every verb tells of a new cache."""
        return {
            "uri": self.version.uri,
            "existed": self.existed,
            "rollouts": len(self.cache),
            "tokens": self.cache.n_tokens,
            "response_tokens": self.cache.n_response_tokens,
            "bytes": self.cache.n_bytes,
            "max_error": self.cache.max_error,
            "error_added": self.error_added,
        }


def open_source(uri: str, access: dict[str, Any]) -> Cache:
    """Open a cache to read from; options of file systems are for URLs."""
    return opd_store.open(uri, **({} if is_local(uri) else access))


def schema_of(cache: Cache) -> dict[str, Any]:
    """Keywords of `opd_store.create` for another cache like this one, id table included."""
    schema = cache.schema
    return {
        "topk": schema.topk,
        "bands": schema.bands,
        "encoding": schema.encoding,
        "id_table": _same_table(cache),
        "cut": schema.cut,
        "chosen": schema.chosen,
        "sampled": schema.sampled,
        "sampled_temperature": schema.sampled_temperature,
        "user_columns": dict(schema.user_columns),
    }


def _same_table(cache: Cache) -> IdTable | str | None:
    if cache.id_table is not None:
        return cache.id_table
    return "auto" if cache.schema.id_table == "auto" else None


def write(
    uri: str,
    parts: Sequence[Part],
    *,
    verb: str,
    asked: Collection[object] = (),
    meta: CacheMeta,
    schema: dict[str, Any],
    access: dict[str, Any],
    on_progress: Callable[[int, int], None],
    shard_mib: int = SHARD_MIB,
) -> Made:
    """Write rows of caches to a new cache at `uri`; goes on where a killed command stopped.

    Args:
        asked: everything else that the result depends on.
        meta: identity; provenance of this command is added.
        schema: as `schema_of` gives it.
        on_progress: called with rollouts done, and in all.

    Raises:
        CacheExistsError: something else is at `uri`.
        InvalidRolloutError, MismatchError: rows that do not fit.
        IntegrityError, FormatError: a source is damaged.
        StorageError: the disk refused.
    """
    digests = list(dict.fromkeys(part.cache.digest for part in parts))
    named = digests[:_NAMED_SOURCES]
    if len(digests) > len(named):
        named.append(f"and {len(digests) - len(named)} more")
    # Not the rows themselves, which follow from the sources and from what was asked.
    key = request(verb, opd_store.__version__, *digests, *asked, shard_mib)
    extra = {**meta.extra, REQUEST: key, MADE_BY: f"opd {verb}", MADE_FROM: " ".join(named)}
    total = sum(len(part.rows) for part in parts)
    start = 0

    def additions(there: int) -> Iterator[Add]:
        nonlocal start
        start = there
        return adding(parts, there, ranks=schema["topk"])

    version, existed = build_from(
        uri,
        additions,
        meta=dataclasses.replace(meta, extra=extra),
        access=access,
        on_progress=lambda done: on_progress(start + done, total),
        shard_bytes=shard_mib << 20,
        **schema,
    )
    return Made(version, existed, open_source(version.uri, access), _error(parts, schema["encoding"]))


def adding(parts: Iterable[Part], skip: int, *, ranks: int) -> Iterator[Add]:
    """What copies every row after the first `skip`, in order; what comes next is asked for ahead."""
    for part in parts:
        rows = part.rows[skip:]
        skip = max(0, skip - len(part.rows))
        part.cache.prefetch(rows[:_AT_A_TIME].tolist(), ranks=min(ranks, part.cache.topk))
        for first in range(0, len(rows), _AT_A_TIME):
            ahead = rows[first + _AT_A_TIME : first + 2 * _AT_A_TIME].tolist()
            part.cache.prefetch(ahead, ranks=min(ranks, part.cache.topk))
            for row in rows[first : first + _AT_A_TIME].tolist():
                yield _copy(part, row)


def _copy(part: Part, row: int) -> Add:
    def add(writer: Writer) -> None:
        teacher = None
        if part.routes:
            found = part.cache.rollout(row, columns=("teacher",)).teacher
            teacher = part.routes.get(found, found)
        writer.copy(part.cache, row, teacher=teacher)

    return add


def _error(parts: Sequence[Part], encoding: str) -> float:
    """What the values are off by that are read, as `Writer.copy` counts it."""
    errors = [0.0]
    for cache in (part.cache for part in parts):
        errors += [cache.max_error, sum_error(cache.encoding) if cache.encoding != encoding else 0.0]
    return max(errors)


def require_rows(rows: Rows, what: str) -> None:
    """Refuse to write a cache without rollouts.

    Raises:
        InvalidArgumentError: there are none.
    """
    if not len(rows):
        raise InvalidArgumentError(what)


def all_rows(cache: Cache) -> Rows:
    """Every row."""
    return np.arange(len(cache), dtype=np.int64)


def kept_bands(schema: CacheSchema, topk: int) -> tuple[int, ...]:
    """The same rank bands, cut at fewer ranks."""
    return (*(end for end in schema.bands if end < topk), topk) if topk else ()
