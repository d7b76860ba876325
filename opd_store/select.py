"""Rows of a cache by what they are: by their columns, by their hash, held out, or found in another cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from opd_store import layout
from opd_store.cache import Cache
from opd_store.errors import InvalidArgumentError, MismatchError
from opd_store.schema import SCALARS

_SPLIT_TAG = b"opd-store split 1\0"
_HASHES_AT_A_TIME = 1 << 16


def select(
    cache: Cache,
    *,
    finish_reason: str | Collection[str] | None = None,
    teacher: int | Collection[int] | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    min_response_tokens: int | None = None,
    max_response_tokens: int | None = None,
    where: Mapping[str, object] | None = None,
    hashes: Collection[bytes] | None = None,
    rows: Sequence[int] | NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.int64]:
    """Rows that meet every condition, in storage order. Reads the index, and the columns that are named.

    Args:
        finish_reason, teacher: the value, or a collection of values.
        min_tokens, max_tokens, min_response_tokens, max_response_tokens: both ends belong to the range.
        where: name of a scalar or `x_*` column to what it has to be: a value, a collection of values (None
            stands for rows without one), or a function. The function gets the column as a numpy array, None
            or NaN where a row has no value, and returns a bool for each row.
        hashes: rollout hashes, 32 bytes each; those not in the cache are left out.
        rows: only these rows are considered; None means all.

    Returns:
        [n] row numbers, rising, each once; n may be 0.

    Raises:
        InvalidArgumentError: an unknown column, a value that its column cannot hold, a function that returns
            anything else, or something that is not a hash.
        IndexError: one of `rows` does not exist.
        IntegrityError, FormatError: the index or a shard is damaged.
    """
    kept = _mask_of(cache, rows)
    for sizes, low, high in (
        ("row_tokens", min_tokens, max_tokens),
        ("row_response_tokens", min_response_tokens, max_response_tokens),
    ):
        if low is not None:
            kept &= getattr(cache, sizes) >= low
        if high is not None:
            kept &= getattr(cache, sizes) <= high
    conditions = dict(where or {})
    for name, value in (("finish_reason", finish_reason), ("teacher", teacher)):
        if value is not None:
            if name in conditions:
                raise InvalidArgumentError(f"{name}: given twice, as an argument and in `where`")
            conditions[name] = value
    for name, wanted in conditions.items():
        kept &= _meets(cache, name, wanted)
    if hashes is not None:
        kept &= np.isin(_sortable(row_hashes(cache)), _sortable(_as_rows(hashes)))
    return np.flatnonzero(kept).astype(np.int64, copy=False)


def split(
    cache: Cache,
    held_out: float,
    *,
    seed: int = 0,
    rows: Sequence[int] | NDArray[np.integer[Any]] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and rows to hold out.

    The hash of a rollout and the seed decide, so that the same rollout is on the same side in every cache and
    every version of it, whatever else is there.

    Args:
        held_out: expected share of the rollouts held out, in (0, 1).
        rows: only these rows are considered; None means all.

    Returns:
        Two arrays of row numbers, rising.

    Raises:
        InvalidArgumentError: a share outside (0, 1).
        IndexError: one of `rows` does not exist.
        IntegrityError, FormatError: the index is damaged.
    """
    if not 0 < held_out < 1:
        raise InvalidArgumentError(f"held_out: expected a share in (0, 1), found {held_out!r:.100}")
    kept = np.flatnonzero(_mask_of(cache, rows)).astype(np.int64, copy=False)
    prefix = hashlib.sha256(_SPLIT_TAG + str(int(seed)).encode()).digest()
    hashes = row_hashes(cache)
    draws = np.empty(len(kept), np.uint64)
    for start in range(0, len(kept), _HASHES_AT_A_TIME):
        data = hashes[kept[start : start + _HASHES_AT_A_TIME]].tobytes()
        pieces = (data[at : at + layout.HASH_BYTES] for at in range(0, len(data), layout.HASH_BYTES))
        drawn = b"".join(hashlib.sha256(prefix + piece).digest()[:8] for piece in pieces)
        draws[start : start + _HASHES_AT_A_TIME] = np.frombuffer(drawn, ">u8")
    is_held_out = draws < np.uint64(int(held_out * 2.0**64))
    return kept[~is_held_out], kept[is_held_out]


def join(left: Cache, right: Cache) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of two caches that hold the same tokens, such as one scored by two teachers.

    Returns:
        Row numbers of both, pair by pair: every row of `left` that `right` has, rising, with the first such
        row of `right`. Where the prompts end is not compared.

    Raises:
        MismatchError: the caches have different tokenizers.
        IntegrityError, FormatError: an index is damaged.
    """
    ours, theirs = left.meta.tokenizer_fingerprint, right.meta.tokenizer_fingerprint
    if ours != theirs:
        raise MismatchError(
            f"tokenizer_fingerprint: {left.uri} has {ours}, {right.uri} has {theirs}; only rollouts of one "
            "tokenizer can be joined",
            field="tokenizer_fingerprint",
            expected=ours,
            found=theirs,
        )
    wanted, known = _sortable(row_hashes(left)), _sortable(row_hashes(right))
    # Looking up in order is an order of magnitude faster than at random; equal hashes stay in storage order.
    left_order, right_order = np.argsort(wanted, kind="stable"), np.argsort(known, kind="stable")
    wanted, known = wanted[left_order], known[right_order]
    place = np.searchsorted(known, wanted)
    found = place < len(known)
    found[found] = known[place[found]] == wanted[found]
    rows_left, rows_right = left_order[found], right_order[place[found]]
    order = np.argsort(rows_left)
    return rows_left[order].astype(np.int64), rows_right[order].astype(np.int64)


def row_hashes(cache: Cache) -> NDArray[np.uint8]:
    """[rows, 32] the rollout hash of every row, from the index. Internal to the package."""
    hashes = np.zeros((len(cache), layout.HASH_BYTES), np.uint8)
    shard_start = np.cumsum([0, *(shard.rows for shard in cache.shards)])
    first_shard = 0
    for number, segment in enumerate(cache.manifest.segments):
        table = cache.rollout_table(number)
        place = shard_start[first_shard + table.shard.astype(np.int64)] + table.row
        hashes[place] = table.hashes.reshape(-1, layout.HASH_BYTES)
        first_shard += segment.n_shards
    return hashes


def _mask_of(cache: Cache, rows: Sequence[int] | NDArray[np.integer[Any]] | None) -> NDArray[np.bool_]:
    if rows is None:
        return np.ones(len(cache), bool)
    wanted = np.asarray(rows)
    if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
        raise InvalidArgumentError(
            f"rows: expected row numbers in one dimension, found {wanted.dtype} of shape {list(wanted.shape)}"
        )
    mask = np.zeros(len(cache), bool)
    mask[cache.require_rows(wanted.astype(np.int64))] = True
    return mask


def _meets(cache: Cache, name: str, wanted: object) -> NDArray[np.bool_]:
    known = [name for name in (*SCALARS, *cache.schema.user_columns) if name != "rollout_hash"]
    if name not in known:
        raise InvalidArgumentError(f"where: {name!r:.100} is not one of {', '.join(known)}")
    column = cache.column(name)
    if callable(wanted):
        return _called(name, wanted, column)
    several = isinstance(wanted, Collection) and not isinstance(wanted, str | bytes)
    values = list(wanted) if isinstance(wanted, Collection) and several else [wanted]
    try:
        value_set = pa.array(values, column.type)
        # Arrow cuts 1.5 to 1 without a word; rounding to the precision of the column is fine.
        if not pa.types.is_floating(column.type) and value_set.to_pylist() != values:
            raise TypeError("would be rounded")
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise InvalidArgumentError(
            f"{name}: expected values of type {column.type}, found {values!r:.100} ({error!s:.100})"
        ) from error
    return _numpy(pc.is_in(column, value_set=value_set))


def _called(name: str, function: Callable[[Any], object], column: pa.ChunkedArray) -> NDArray[np.bool_]:
    found = np.asarray(function(column.to_numpy()))
    if found.dtype != np.bool_ or found.shape != (len(column),):
        raise InvalidArgumentError(
            f"{name}: expected a function that gives {len(column)} bools, found {found.dtype} of shape "
            f"{list(found.shape)}"
        )
    return found


def _numpy(mask: pa.ChunkedArray) -> NDArray[np.bool_]:
    array: NDArray[np.bool_] = mask.to_numpy()
    return array


def _as_rows(hashes: Collection[bytes]) -> NDArray[np.uint8]:
    given = [bytes(value) if isinstance(value, bytes | bytearray | memoryview) else value for value in hashes]
    for value in given:
        if not isinstance(value, bytes) or len(value) != layout.HASH_BYTES:
            raise InvalidArgumentError(
                f"hashes: expected {layout.HASH_BYTES} bytes each, from `opd_store.rollout_hash`, "
                f"found {value!r:.100}"
            )
    return np.frombuffer(b"".join(given), np.uint8).reshape(-1, layout.HASH_BYTES)


def _sortable(hashes: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Of one width each, so that numpy's zeros at the end make no two of them equal."""
    return np.ascontiguousarray(hashes).view(f"S{layout.HASH_BYTES}").ravel()
