"""Loops in C, where the package was installed with a compiler at hand; elsewhere numpy does the same.

What is decoded and accepted does not depend on it. `decode_streams` and `rows_are_fine` give False for all
that they are not made for, a machine without a compiler and damaged data among it. Then their callers go on
in numpy, which is the reference and words the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

try:
    import opd_store._kernels as _kernels
except ImportError:
    COMPILED = False
else:
    COMPILED = True
"""Whether the C code is there and used."""

MAX_STAMPS = 1 << 20
"""Rows of larger vocabularies are left to numpy, which needs no memory for every id."""


def decode_streams(
    body: NDArray[np.uint8],
    decompress: Callable[[memoryview], bytes | None],
    *,
    max_window: int,
    ranks: tuple[int, int],
    ragged: bool,
    scale: int,
    words: bool,
    limit: int,
    id_table: tuple[NDArray[np.uint32], NDArray[np.uint32]] | None,
    ids: NDArray[np.uint32],
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32] | None,
    draws: NDArray[np.uint32] | None,
    has_draws: bool,
) -> bool:
    """Decode the body of an `f32` or `ladder` page into arrays of the caller, if nothing is wrong with it.

    Args:
        decompress: gives the content of one zstd frame, or None. It is called with frames that declare the
            right size, no dictionary and no checksum.
        max_window: largest window of a frame, bytes.
        ranks: the page's ranks [start, end), by which steps are grouped.
        ragged: whether the body starts with row lengths.
        scale: units a nat of `ladder/s`, 0 for `ladder16` and `f32`.
        words: whether steps are words of `f32`.
        limit: largest unit or word.
        id_table: `by_rank` [V] and `padded_lists` [C * 256], if the page may refer to them.
        ids, logprob: [P, k], where rows may be further apart than k.
        log_tail: [P], None if not wanted.
        draws: [P, k], None if not wanted.
        has_draws: whether the body ends with draws.

    Returns:
        Whether it was decoded. If not, the arrays hold anything.

    Raises:
        ValueError: arrays of other shapes, or not laid out as described.
    """
    if not COMPILED:
        return False
    by_rank, lists = id_table or (None, None)
    return _kernels.decode_streams(
        body,
        decompress,
        max_window,
        *ranks,
        ragged,
        has_draws,
        scale,
        words,
        limit,
        by_rank,
        lists,
        ids,
        logprob,
        log_tail,
        draws,
    )


def rows_are_fine(
    ids: NDArray[np.uint32],
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    *,
    draws: NDArray[np.uint32] | None,
    vocab_size: int,
    ragged: bool,
    may_be_empty: bool,
    limit: float,
) -> bool:
    """Whether `values.support_problem` certainly finds nothing in the rows. False says nothing.

    Sums of probabilities are taken in float32, and have to stay 1e-5 of themselves below the limit.

    Args:
        ids, logprob, draws: [P, k].
        log_tail: [P].
        ragged: whether rows may end early.
        may_be_empty: whether a row may have no ids at all.
        limit: what probabilities and tail of a position may sum to.
    """
    usable = COMPILED and 0 < vocab_size <= MAX_STAMPS
    usable = usable and log_tail.dtype == np.float32 and log_tail.flags.aligned
    if not (usable and _is_rows(ids, np.uint32) and _is_rows(logprob, np.float32)):
        return False
    if draws is not None and not _is_rows(draws, np.uint32):
        return False
    return _kernels.rows_are_fine(ids, logprob, log_tail, draws, vocab_size, ragged, may_be_empty, limit)


def copy_rows(
    dst: NDArray[Any],
    dst_starts: Sequence[int] | NDArray[np.int64],
    sources: Sequence[NDArray[Any]],
    src_starts: Sequence[int] | NDArray[np.int64],
    counts: Sequence[int] | NDArray[np.int64],
) -> None:
    """Copy rows [src_starts[i], src_starts[i] + counts[i]) of every source to `dst` from dst_starts[i] on.

    Args:
        dst: [N] or [N, w]; rows may be further apart than w.
        sources: [n] or [n, w] each, of the type of `dst`, or uint32 where that is int64. A flat source of
            [N, w] holds rows end to end, and the start that is given for it counts items.

    Raises:
        ValueError: rows outside an array, or arrays of other types or widths. Nothing is copied then.
    """
    dtype, widened = dst.dtype, np.uint32 if dst.dtype == np.int64 else dst.dtype
    if dtype.hasobject:
        raise ValueError(f"expected numbers in dst, found {dtype}")
    for number, source in enumerate(sources):
        if source.dtype != dtype and source.dtype != widened:
            raise ValueError(f"source {number}: expected {dtype}, found {source.dtype}")
    starts, firsts, sizes = (np.ascontiguousarray(n, np.int64) for n in (dst_starts, src_starts, counts))
    if COMPILED:
        _kernels.copy_rows(dst, starts, tuple(sources), firsts, sizes)
        return
    if not len(starts) == len(firsts) == len(sizes) == len(sources):
        raise ValueError(f"expected a start, a first row and a count for each of {len(sources)} sources")
    parts = [
        (to, *_as_rows(source, first, dst), size)
        for to, source, first, size in zip(
            starts.tolist(), sources, firsts.tolist(), sizes.tolist(), strict=True
        )
    ]
    for number, (to, source, first, size) in enumerate(parts):
        if source.shape[1:] != dst.shape[1:]:
            raise ValueError(f"source {number}: rows of {source.shape[1:]}, expected {dst.shape[1:]}")
        if not (size >= 0 and 0 <= to <= len(dst) - size and 0 <= first <= len(source) - size):
            raise ValueError(
                f"source {number}: {size} rows from {first} of {len(source)} to {to} of {len(dst)}"
            )
    for to, source, first, size in parts:
        dst[to : to + size] = source[first : first + size]


def let_go(mapped: pa.Buffer) -> None:
    """Take the pages of a mapped file out of this process's memory; they come back when they are read.

    Does nothing without the C code: then the system takes them back when it needs memory.

    Args:
        mapped: a whole file, shared and read-only. Of other memory the content could be lost.
    """
    if COMPILED:
        _kernels.let_go(mapped)


def _as_rows(source: NDArray[Any], first: int, dst: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """A source, and its first row, where it may be flat."""
    is_flat = source.ndim == 1 and dst.ndim == 2 and source.strides[0] == source.itemsize
    width = dst.shape[-1]
    if not is_flat or not width or not 0 <= first <= len(source):
        return source, first
    n_rows = (len(source) - first) // width
    return source[first : first + n_rows * width].reshape(n_rows, width), 0


def _is_rows(values: NDArray[Any], dtype: type[np.generic]) -> bool:
    """Whether C can walk along the rows."""
    return values.dtype == dtype and values.strides[1] == values.itemsize and values.flags.aligned
