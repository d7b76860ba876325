"""`--where` and other words of the command line as arguments of `opd_store.select`."""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import Cache, InvalidArgumentError
from opd_store.schema import SCALARS, USER_TYPES
from opd_store.select import row_hashes

_CONDITION = re.compile(r"(!?)([a-z_][a-z0-9_]*)(?:(>=|<=|!=|==?|>|<)(.*))?", re.DOTALL)
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_SAMPLE_TAG = b"opd filter --sample 1\0"
Mask = NDArray[np.bool_]
Condition = Callable[[Any], Mask]


def conditions(cache: Cache, texts: Iterable[str]) -> dict[str, Condition]:
    """Column to a function for `opd_store.select(where=...)`.

    Args:
        texts: COLUMN=VALUE, or another comparison; COLUMN for rows that have a value, !COLUMN for those that
            have none. All have to hold. A row without a value meets no comparison.

    Raises:
        InvalidArgumentError: no condition, no such column, or a value that its column cannot hold.
    """
    found: dict[str, list[Condition]] = {}
    for text in texts:
        name, condition = _condition(cache, text)
        found.setdefault(name, []).append(condition)
    return {name: _all_of(several) for name, several in found.items()}


def _all_of(several: list[Condition]) -> Condition:
    return lambda column: np.logical_and.reduce([condition(column) for condition in several])


def _condition(cache: Cache, text: str) -> tuple[str, Condition]:
    match = _CONDITION.fullmatch(text)
    if match is None or (match[1] and match[3]):
        raise InvalidArgumentError(
            f"--where: expected COLUMN=VALUE, COLUMN>=VALUE, COLUMN or !COLUMN, found {text!r:.100}"
        )
    missing, name, comparison, value = match.groups()
    kinds = {name: kind for name, (kind, _) in SCALARS.items() if name != "rollout_hash"}
    kinds |= {name: USER_TYPES[kind] for name, kind in cache.schema.user_columns.items()}
    if name not in kinds:
        raise InvalidArgumentError(f"--where: {name!r:.100} is not one of {', '.join(kinds)}")
    if comparison is None:
        return name, lambda column: _is_missing(column) == bool(missing)
    wanted = _value(text, value, kinds[name])
    if isinstance(wanted, bool) and comparison not in ("=", "==", "!="):
        raise InvalidArgumentError(f"--where {text:.100}: {name} is true or false")
    return name, lambda column: _compared(column, _COMPARISONS[comparison], wanted)


def _value(text: str, value: str, kind: pa.DataType) -> Any:  # noqa: ANN401
    try:
        if pa.types.is_boolean(kind):
            return {"true": True, "false": False}[value.lower()]
        if pa.types.is_integer(kind):
            return int(value)
        if pa.types.is_floating(kind):
            # Rounded as the column is: 0.1 is meant, not the float64 next to it.
            return pa.scalar(float(value), kind).as_py()
    except (KeyError, ValueError) as error:
        raise InvalidArgumentError(f"--where {text!r:.100}: expected a value of type {kind}") from error
    return value


def _is_missing(column: NDArray[Any]) -> Mask:
    if column.dtype == object:
        return np.array([value is None for value in column], bool)
    return np.isnan(column) if column.dtype.kind == "f" else np.zeros(len(column), bool)


def _compared(column: NDArray[Any], compare: Callable[[Any, Any], Any], wanted: object) -> Mask:
    if column.dtype == object:
        return np.array([value is not None and compare(value, wanted) for value in column], bool)
    mask: Mask = compare(column, wanted) & ~_is_missing(column)
    return mask


def read_rows(path: Path) -> NDArray[np.int64]:
    """Row numbers from a file, one a line.

    Raises:
        InvalidArgumentError: a line that is no row number.
    """
    found = []
    for number, line in enumerate(_lines(path), 1):
        if line and not (line.isascii() and line.isdigit() and len(line) < 19):
            raise InvalidArgumentError(f"{path}, line {number}: expected a row number, found {line!r:.60}")
        found += [int(line)] if line else []
    return np.array(found, np.int64)


def read_hashes(path: Path) -> list[bytes]:
    """Rollout hashes from a file, 64 hexadecimal digits a line.

    Raises:
        InvalidArgumentError: a line that is no hash.
    """
    found = []
    for number, line in enumerate(_lines(path), 1):
        if line and not re.fullmatch(r"[0-9a-fA-F]{64}", line):
            raise InvalidArgumentError(
                f"{path}, line {number}: expected a rollout hash of 64 hexadecimal digits, found {line!r:.80}"
            )
        found += [bytes.fromhex(line)] if line else []
    return found


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path}: cannot be read as text: {error!s:.200}") from error


def sample(cache: Cache, rows: NDArray[np.int64], size: int, *, seed: int) -> NDArray[np.int64]:
    """As many of the rows, in storage order; all if there are no more.

    Hash and seed decide, so a rollout that is drawn from a cache is likely to be
    drawn from the next version of it.
    """
    if len(rows) <= size:
        return rows
    prefix = hashlib.sha256(_SAMPLE_TAG + str(seed).encode()).digest()
    hashes = row_hashes(cache)
    draws = [hashlib.sha256(prefix + hashes[row].tobytes()).digest()[:8] for row in rows.tolist()]
    order = np.argsort(np.frombuffer(b"".join(draws), ">u8"), kind="stable")
    return np.sort(rows[order[:size]])
