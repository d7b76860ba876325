"""`ladder16` and `ladder/s`: sorted log-probs as integers that rise along the ranks, stored as differences.

`ladder/s` counts in units of 1/s nat, `ladder16` in steps of the magnitude's float16 pattern. Differences are
one byte, 255 and more escape to a second stream, and the differences of neighbouring ranks, which are of like
size, are compressed together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store.encodings.page import PageShape
from opd_store.encodings.planes import StreamReader, StreamWriter
from opd_store.encodings.steps import join_rows, split_rows
from opd_store.errors import FormatError

CODE = 2
NAMES = {"ladder16": 0, "ladder/128": 128, "ladder/64": 64, "ladder/32": 32}
"""Name to header parameter: units a nat, 0 for float16 patterns."""
ESCAPE = 255
MAX_UNITS = (1 << 24) - 1
"""Integers up to here are exact in float32, and so is their product with a power of two."""
MAX_HALF = 0x7BFF
"""Pattern of the largest finite float16, 65504."""


def largest_value(parameter: int) -> int:
    """The lowest log-prob, in units."""
    return MAX_UNITS if parameter else MAX_HALF


def error_bound(logprob: NDArray[np.float32], parameter: int) -> NDArray[np.float64]:
    """Largest error allowed at each value, nats."""
    if parameter:
        return np.full(logprob.shape, 0.5 / parameter)
    # Half a step of float16: 2^-11 of the value, and half its smallest step near zero.
    return np.maximum(np.abs(logprob.astype(np.float64)) * 2.0**-11, 2.0**-25)


def quantise(logprob: NDArray[np.float32], parameter: int) -> NDArray[np.float32]:
    """What will be decoded in place of each value; lower than it could be where it is too low to be held."""
    return _from_units(_to_units(logprob, parameter), parameter)


def write_logprobs(
    streams: StreamWriter,
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    present: NDArray[np.bool_] | None,
    shape: PageShape,
    *,
    parameter: int,
) -> None:
    """Append [P, k] log-probs and [P] tails that `quantise` leaves as they are."""
    empty = np.isneginf(log_tail)
    streams.ints(np.where(empty, 0, _to_units(np.where(empty, 0, log_tail), parameter) + 1))
    if present is not None:
        logprob = np.where(present, logprob, 0)
    heads, *groups = split_rows(_to_units(logprob, parameter), present, shape)
    streams.ints(heads)
    for steps in groups:
        streams.ints(np.minimum(steps, ESCAPE))
        streams.ints(steps[steps >= ESCAPE] - ESCAPE)


@dataclass(frozen=True, slots=True)
class Steps:
    """Differences of ranks [start, end) of the cache from the rank before."""

    start: int
    end: int
    small: NDArray[Any]
    """[n] position by position; 255 where `more` goes on."""
    more: NDArray[Any]
    """What is beyond 255, for each 255 in order."""


@dataclass(frozen=True, slots=True)
class LadderStreams:
    """What a page holds, before it is put together. All limits are proven."""

    log_tail: NDArray[Any]
    """[P] 0 for nothing left, else 1 + units."""
    heads: NDArray[Any]
    """Units of the first rank of every row that has one."""
    steps: list[Steps]


def parse(
    streams: StreamReader, counts: NDArray[np.intp] | None, shape: PageShape, *, parameter: int
) -> LadderStreams:
    """Take what `write_logprobs` appended.

    Raises:
        FormatError: a value lower than the encoding can hold.
    """
    limit = largest_value(parameter)
    log_tail = streams.ints(shape.n_positions, limit=limit + 1, what="log_tail")
    n_heads = shape.n_positions if counts is None else int(np.count_nonzero(counts))
    heads = streams.ints(n_heads, limit=limit, what="first log-probs")
    steps = []
    lowest = int(heads.max(initial=0))
    for start, end in shape.rank_groups():
        n_steps = shape.entries(start, end, counts)
        what = f"steps of ranks {start} to {end - 1}"
        small = streams.ints(n_steps, limit=ESCAPE, what=what)
        n_more = int(np.count_nonzero(small == ESCAPE))
        more = streams.ints(n_more, limit=limit - ESCAPE, what=f"long {what}")
        steps.append(Steps(start, end, small, more))
        largest = ESCAPE + int(more.max()) if n_more else int(small.max(initial=0))
        lowest += largest * (end - start)
    parsed = LadderStreams(log_tail, heads, steps)
    # The sum of the largest steps settles it, but for a page with steps of very different size.
    if lowest > limit:
        present = None if counts is None else np.arange(shape.n_ranks) < counts[:, None]
        lowest = int(_units(parsed, present, shape, np.int64)[:, -1].max(initial=0))
        if lowest > limit:
            raise FormatError(f"{streams.where}: log-probs of {lowest} units, the limit is {limit}")
    return parsed


def assemble(
    parsed: LadderStreams, present: NDArray[np.bool_] | None, shape: PageShape, *, parameter: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[P, k] log-probs, -inf where not present, and [P] tails."""
    logprob = _from_units(_units(parsed, present, shape, np.int32), parameter)
    if present is not None:
        logprob[~present] = -np.inf
    log_tail = _from_units(np.maximum(parsed.log_tail, 1) - 1, parameter)
    log_tail[parsed.log_tail == 0] = -np.inf
    return logprob, log_tail


def _units(
    parsed: LadderStreams,
    present: NDArray[np.bool_] | None,
    shape: PageShape,
    dtype: type[np.signedinteger[Any]],
) -> NDArray[np.signedinteger[Any]]:
    """[P, k] units below zero; a row that ends early stays at its last."""
    parts = []
    for steps in parsed.steps:
        values = steps.small
        if len(steps.more):
            values = values.astype(dtype)
            values[steps.small == ESCAPE] += steps.more.astype(dtype)
        parts.append((steps.start, steps.end, values))
    return join_rows(parsed.heads, parts, present, shape, dtype)


def _to_units(logprob: NDArray[np.float32], parameter: int) -> NDArray[np.int64]:
    """Units below zero; one more than the limit where the value is too low."""
    if parameter:
        units = np.rint(logprob.astype(np.float64) * -parameter)
        return np.minimum(units, MAX_UNITS + 1).astype(np.int64)
    with np.errstate(over="ignore"):
        pattern = np.abs(logprob).astype(np.float16).view(np.uint16).astype(np.int64)
    return np.minimum(pattern, MAX_HALF + 1)


def _from_units(units: NDArray[Any], parameter: int) -> NDArray[np.float32]:
    if parameter:
        # Multiplied first and taken from zero last, so that no units give 0.0 and not -0.0.
        values = units.astype(np.float32)
        values *= np.float32(1 / parameter)
        return np.subtract(np.float32(0), values, out=values)
    magnitude = units.astype(np.uint16).view(np.float16).astype(np.float32)
    return np.subtract(np.float32(0), magnitude, out=magnitude)
