"""Rows that occur more than once, found by their hashes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from opd_store import Cache
from opd_store.select import row_hashes


def occurrences(hashes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[n] how many rows before each one have the same hash, or other bytes.

    Args:
        hashes: [n, bytes].
    """
    names = sortable(hashes)
    # Stable: of equal rows, the first in storage stays the first.
    order = np.argsort(names, kind="stable")
    is_first = np.ones(len(names), bool)
    is_first[1:] = names[order[1:]] != names[order[:-1]]
    starts = np.flatnonzero(is_first)
    places = np.arange(len(names)) - np.repeat(starts, np.diff([*starts, len(names)]))
    found = np.empty(len(names), np.int64)
    found[order] = places
    return found


def sortable(rows: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """[n] rows of bytes, as values that compare; all have one width, so zeros at the end do no harm."""
    return np.ascontiguousarray(rows).view(f"S{rows.shape[1]}").ravel()


def first_rows(caches: Sequence[Cache]) -> list[NDArray[np.int64]]:
    """Rows of each cache but those whose tokens and sample_id an earlier row of these caches has."""
    hashes = np.concatenate([row_hashes(cache) for cache in caches])
    again = occurrences(hashes) > 0
    starts = np.cumsum([0, *map(len, caches)])
    kept = ~_same_sample(caches, hashes, again, starts) if again.any() else ~again
    pieces = (kept[first:end] for first, end in pairwise(starts.tolist()))
    return [np.flatnonzero(piece).astype(np.int64) for piece in pieces]


def _same_sample(
    caches: Sequence[Cache],
    hashes: NDArray[np.uint8],
    again: NDArray[np.bool_],
    starts: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Of rows with a hash that was seen before, those whose sample_id was, too."""
    shared = {hashes[row].tobytes() for row in np.flatnonzero(again)}
    names = sortable(hashes)
    known = np.frombuffer(b"".join(shared), names.dtype)
    suspects = np.flatnonzero(np.isin(names, known))
    seen: set[tuple[bytes, str | None]] = set()
    found = np.zeros(len(hashes), bool)
    for number, cache in enumerate(caches):
        rows = suspects[(suspects >= starts[number]) & (suspects < starts[number + 1])]
        if not len(rows):
            continue
        samples = cache.column("sample_id")
        for row in rows.tolist():
            key = hashes[row].tobytes(), samples[row - int(starts[number])].as_py()
            found[row] = key in seen
            seen.add(key)
    return found
