"""Rows as a first value and differences, grouped by rank: what `f32` and `ladder` share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store.encodings.page import PageShape


def split_rows(
    values: NDArray[Any], present: NDArray[np.bool_] | None, shape: PageShape
) -> Iterator[NDArray[Any]]:
    """The first value of every row that has one, then the differences of each rank group, flat."""
    yield values[:, 0] if present is None else values[present[:, 0], 0]
    steps = np.diff(values, axis=1)
    for start, end in shape.rank_groups():
        first, last = start - shape.rank_start, end - shape.rank_start
        part = steps[:, first - 1 : last - 1]
        yield part.reshape(-1) if present is None else part[present[:, first:last]]


def join_rows(
    heads: NDArray[Any],
    steps: Iterable[tuple[int, int, NDArray[Any]]],
    present: NDArray[np.bool_] | None,
    shape: PageShape,
    dtype: type[np.integer[Any]],
) -> NDArray[Any]:
    """[P, k] values again; a row that ends early stays at its last.

    Args:
        steps: (start, end, differences) of each rank group.
        dtype: sums are modulo its range.
    """
    values: NDArray[Any] = np.zeros((shape.n_positions, shape.n_ranks), dtype)
    if present is None:
        values[:, 0] = heads
    else:
        values[present[:, 0], 0] = heads
    for start, end, part in steps:
        columns = slice(start - shape.rank_start, end - shape.rank_start)
        if present is None:
            values[:, columns] = part.reshape(shape.n_positions, end - start)
        else:
            values[:, columns][present[:, columns]] = part
    return np.cumsum(values, axis=1, dtype=dtype, out=values)
