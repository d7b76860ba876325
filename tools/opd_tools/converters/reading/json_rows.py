"""What importers of JSON share: values with their places, ragged rows as arrays, how wide rows are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError, OpdError
from opd_tools.converters.core.format import ReadSettings
from opd_tools.converters.core.record import NO_ENTRY, Record, require_even
from opd_tools.converters.core.source import Source

T = TypeVar("T")
Rows = tuple[NDArray[np.int64], NDArray[np.float64]]
_LOOKED_AT = 4096
"""Positions whose entries are counted to tell how wide rows are."""
FINISH_REASONS = {"stop": "stop", "eos": "stop", "length": "length", "limit": "length", "abort": "abort"}
"""Words of servers for the reasons that a cache knows."""


def records(
    source: Source,
    one: Callable[[Any, str], Iterable[T]],
    values: Callable[[Source], Iterable[tuple[str, Any]]] | None = None,
) -> Iterator[T]:
    """What `one` makes of every JSON value of a source, or of `values`.

    Raises:
        FormatError: there is no file of JSON, a value is not JSON, or `one` stumbled over its layout.
    """
    for where, value in (values or json_values)(source):
        try:
            yield from one(value, where)
        except OpdError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else f"{error!s:.200}"
            raise FormatError(f"{where}: not laid out as this format is: {what}") from error


def json_values(source: Source) -> Iterator[tuple[str, Any]]:
    """All values of all files of JSON, with their places. Raises FormatError."""
    names = source.json_names()
    if not names:
        raise FormatError(f"{source.uri}: no files of JSON")
    for name in names:
        yield from source.json_values(name)


def width(found: Iterator[Record], settings: ReadSettings) -> int:
    """Entries of the widest row among the first few thousand, or of all where more ranks were asked for.

    0 if one of these rollouts has no top-k.
    """
    widest = positions = 0
    for record in found:
        if record.topk_ids is None:
            return 0
        widest = max(widest, record.topk_ids.shape[1])
        positions += len(record.token_ids)
        if positions >= _LOOKED_AT and (settings.topk is None or settings.topk <= widest):
            break
    return widest


def integers(value: Any, where: str, what: str) -> NDArray[np.int64]:  # noqa: ANN401
    """[n] integers of a JSON list. Raises FormatError."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and array.dtype.kind != "i"):
        raise FormatError(f"{where}, {what}: expected a list of integers")
    return array.astype(np.int64)


def numbers(value: Any, where: str, what: str) -> NDArray[np.float64]:  # noqa: ANN401
    """[n] numbers of a JSON list, NaN for null. Raises FormatError."""
    try:
        array = np.asarray(value)
        if array.dtype.kind in "OSU":  # nulls, or text, which numpy would read as numbers
            array = np.array([np.nan if item is None else item + 0.0 for item in value])
    except (TypeError, ValueError):
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "fi":
        raise FormatError(f"{where}, {what}: expected a list of numbers")
    return array.astype(np.float64)


def padded(
    ids: Sequence[Sequence[int] | None], logprobs: Sequence[Sequence[float] | None], where: str
) -> Rows:
    """Ragged rows as arrays [R, k], filled up with `NO_ENTRY` and -inf; None is a row without entries.

    Raises:
        FormatError: rows of ids and of log-probs differ in length, or are no lists of numbers.
    """
    if len(ids) != len(logprobs):
        raise FormatError(f"{where}: {len(ids)} rows of ids, but {len(logprobs)} of log-probs")
    sizes = np.array([0 if row is None else len(row) for row in ids], np.int64)
    others = np.array([0 if row is None else len(row) for row in logprobs], np.int64)
    if (sizes != others).any():
        at = int(np.argmax(sizes != others))
        raise FormatError(f"{where}, row {at}: {sizes[at]} ids, but {others[at]} log-probs")
    flat_ids = integers(list(itertools.chain.from_iterable(row or () for row in ids)), where, "ids")
    flat = numbers(list(itertools.chain.from_iterable(row or () for row in logprobs)), where, "log-probs")
    return filled(flat_ids, flat, sizes, where)


def filled(
    flat_ids: NDArray[np.int64], flat: NDArray[np.float64], sizes: NDArray[np.int64], where: str
) -> Rows:
    """Rows that lie end to end as arrays [R, k], given their sizes [R]. Raises FormatError: too uneven."""
    widest = max(1, int(sizes.max(initial=0)))
    cells = len(sizes) * widest
    if len(flat) == cells:
        return flat_ids.reshape(-1, widest), flat.reshape(-1, widest)
    require_even(sizes, where)
    there = np.arange(widest) < sizes[:, None]
    ids = np.full(there.shape, NO_ENTRY, np.int64)
    logprob = np.full(there.shape, -np.inf)
    ids[there], logprob[there] = flat_ids, flat
    return ids, logprob


def name_of(*values: Any) -> str | None:  # noqa: ANN401
    """The first that can name a rollout, as text."""
    for value in values:
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
    return None
