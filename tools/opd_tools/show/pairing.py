"""Which rollouts two caches have in common, by their hashes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_store import Cache
from opd_store.select import row_hashes


@dataclass(frozen=True, slots=True)
class Pairing:
    """Rows of two caches. Of equal rollouts in one cache, the first goes with the first of the other, and so
    on."""

    first: NDArray[np.int64]
    """[n] rows of the first cache that the second one has too, rising."""
    second: NDArray[np.int64]
    """[n] the rows of the second cache that they go with."""
    only_first: NDArray[np.int64]
    only_second: NDArray[np.int64]


def pair(first: Cache, second: Cache) -> Pairing:
    """Find them from both indexes. The caches have to be of one tokenizer.

    Raises:
        IntegrityError, FormatError: an index is damaged.
    """
    hashes = [np.ascontiguousarray(row_hashes(cache)).view("V32").ravel() for cache in (first, second)]
    # Equal hashes get equal numbers.
    _, numbers = np.unique(np.concatenate(hashes), return_inverse=True)
    parts = np.split(numbers.astype(np.int64), [len(hashes[0])])
    places = [_occurrences(part) for part in parts]
    base = 1 + max(place.max(initial=0) for place in places)
    keys = [part * base + place for part, place in zip(parts, places, strict=True)]
    _, left, right = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    rising = np.argsort(left)
    only = [np.setdiff1d(np.arange(len(key)), found) for key, found in zip(keys, (left, right), strict=True)]
    return Pairing(left[rising], right[rising], only[0], only[1])


def _occurrences(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] how many equal numbers stand before each."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    lengths = np.diff(np.append(starts, len(ordered)))
    found = np.empty(len(numbers), np.int64)
    found[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return found
