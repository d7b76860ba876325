"""Nested lists of Arrow columns as numpy arrays, without a Python object a value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import FormatError
from opd_tools.converters.core.record import NO_ENTRY, require_even


def depth(kind: pa.DataType) -> int:
    """How many lists a type is nested in; -1 if it is neither text, a number nor lists of numbers."""
    levels = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        levels += 1
        kind = kind.value_type
    if _is_number(kind) or (levels == 0 and (pa.types.is_string(kind) or pa.types.is_large_string(kind))):
        return levels
    return -1


class Rows:
    """A column of one record batch; `rows[i]` is a scalar, an array [n] or, padded, [n, k]."""

    def __init__(self, column: pa.Array, where: str) -> None:
        """
        Args:
            column: as `depth` allows.
            where: file and column, for errors.

        Raises:
            FormatError: ids or booleans that are null.
        """
        self._where = where
        self._depth = depth(column.type)
        self._present = np.asarray(column.is_valid()) if column.null_count else None
        self._scalars = column if self._depth == 0 else None
        self._bounds: list[NDArray[np.int64]] = []
        for _ in range(self._depth):
            bounds, column = _opened(column)
            # Of a slice only what belongs to it, since others may be large.
            column = column.slice(bounds[0], bounds[-1] - bounds[0])
            self._bounds.append(bounds - bounds[0])
        if self._depth:
            self._values = self._numbers(column)
        self._width = -1
        if self._depth == 2 and len(self._bounds[1]) > 1:
            widths = np.diff(self._bounds[1])
            self._width = int(widths[0]) if (widths == widths[0]).all() else -1

    def __getitem__(self, number: int) -> Any:  # noqa: ANN401
        """None for null."""
        if self._present is not None and not self._present[number]:
            return None
        if self._scalars is not None:
            return self._scalars[number].as_py()
        start, end = self._bounds[0][number : number + 2].tolist()
        if self._depth == 1:
            return self._values[start:end]
        if self._depth > 2:
            raise FormatError(f"{self._where}: lists in lists in lists; expected at most [rows][entries]")
        inner = self._bounds[1][start : end + 1]
        values = self._values[inner[0] : inner[-1]] if end > start else self._values[:0]
        if self._width >= 0:
            return values.reshape(end - start, self._width)
        return padded(values, np.diff(inner), self._where)

    def widest(self) -> int:
        """Most entries of any row of a column of depth 2."""
        return int(np.diff(self._bounds[1]).max(initial=0))

    def _numbers(self, column: pa.Array) -> NDArray[Any]:
        kind = column.type
        if column.null_count and not pa.types.is_floating(kind):
            raise FormatError(f"{self._where}: null among {kind} values")
        if pa.types.is_null(kind):
            return np.empty(0, np.int64)
        found: NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return found.astype(np.int64) if found.dtype == np.uint64 else found


def padded(values: NDArray[Any], widths: NDArray[np.int64], where: str) -> NDArray[Any]:
    """[n, max(widths)] rows of different widths, filled up with `NO_ENTRY`, floats with -inf.

    Raises:
        FormatError: as `require_even`.
    """
    require_even(widths, where)
    is_float = values.dtype.kind == "f"
    if not is_float and values.dtype.kind != "b":
        values = values.astype(np.int64, copy=False)
    out = np.full((len(widths), int(widths.max(initial=0))), -np.inf if is_float else NO_ENTRY, values.dtype)
    out[np.arange(out.shape[1]) < widths[:, None]] = values
    return out


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
    )


def _opened(column: pa.Array) -> tuple[NDArray[np.int64], pa.Array]:
    """Where each list begins and ends among its values; a null list may hide values, and holds none."""
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        first = column.offset * size
        bounds = first + np.arange(len(column) + 1, dtype=np.int64) * size
        if column.null_count:
            return _without_nulls(column, bounds)
        return bounds, column.values
    bounds = column.offsets.to_numpy().astype(np.int64)
    if column.null_count:
        return _without_nulls(column, bounds)
    return bounds, column.values


def _without_nulls(column: pa.Array, bounds: NDArray[np.int64]) -> tuple[NDArray[np.int64], pa.Array]:
    lengths = np.where(np.asarray(column.is_valid()), np.diff(bounds), 0)
    out = np.zeros(len(bounds), np.int64)
    np.cumsum(lengths, out=out[1:])
    return out, column.flatten()
