"""`f32`: every bit of the log-probs kept.

A word is the float32's 32 bits with the sign turned over, so that words rise along the ranks of a row as the
log-probs fall. The first one is stored and then differences, modulo 2^32, which keep zeros of either sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store.encodings.page import PageShape
from opd_store.encodings.planes import StreamReader, StreamWriter
from opd_store.encodings.steps import join_rows, split_rows

CODE = 1
NAMES = {"f32": 0}
"""Name to header parameter."""
_SIGN = np.uint32(0x80000000)
_ANY = 0xFFFFFFFF


def largest_value(parameter: int) -> int:
    """The largest word."""
    return _ANY


def error_bound(logprob: NDArray[np.float32], parameter: int) -> NDArray[np.float64]:
    """Largest error allowed at each value, nats."""
    return np.zeros(logprob.shape)


def quantise(logprob: NDArray[np.float32], parameter: int) -> NDArray[np.float32]:
    """What will be decoded in place of each value."""
    return logprob


def write_logprobs(
    streams: StreamWriter,
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    present: NDArray[np.bool_] | None,
    shape: PageShape,
    *,
    parameter: int,
) -> None:
    """Append [P, k] log-probs and [P] tails."""
    streams.ints(_to_words(log_tail))
    for part in split_rows(_to_words(logprob), present, shape):
        streams.ints(part)


@dataclass(frozen=True, slots=True)
class WordSteps:
    """Differences of ranks [start, end) of the cache from the rank before, modulo 2^32."""

    start: int
    end: int
    words: NDArray[Any]
    """[n] position by position."""


@dataclass(frozen=True, slots=True)
class FloatStreams:
    """What a page holds, before it is put together."""

    log_tail: NDArray[Any]
    """[P] words."""
    heads: NDArray[Any]
    """Words of the first rank of every row that has one."""
    steps: list[WordSteps]


def parse(
    streams: StreamReader, counts: NDArray[np.intp] | None, shape: PageShape, *, parameter: int
) -> FloatStreams:
    """Take what `write_logprobs` appended."""
    log_tail = streams.ints(shape.n_positions, limit=_ANY, what="log_tail")
    n_heads = shape.n_positions if counts is None else int(np.count_nonzero(counts))
    heads = streams.ints(n_heads, limit=_ANY, what="first log-probs")
    steps = []
    for start, end in shape.rank_groups():
        n_steps = shape.entries(start, end, counts)
        words = streams.ints(n_steps, limit=_ANY, what=f"steps of ranks {start} to {end - 1}")
        steps.append(WordSteps(start, end, words))
    return FloatStreams(log_tail, heads, steps)


def assemble(
    parsed: FloatStreams, present: NDArray[np.bool_] | None, shape: PageShape, *, parameter: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[P, k] log-probs, -inf where not present, and [P] tails."""
    steps = ((part.start, part.end, part.words) for part in parsed.steps)
    logprob = _from_words(join_rows(parsed.heads, steps, present, shape, np.uint32))
    if present is not None:
        logprob[~present] = -np.inf
    return logprob, _from_words(parsed.log_tail)


def _to_words(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    words: NDArray[np.uint32] = np.ascontiguousarray(values, np.float32).view(np.uint32) ^ _SIGN
    return words


def _from_words(words: NDArray[Any]) -> NDArray[np.float32]:
    return (words.astype(np.uint32) ^ _SIGN).view(np.float32)
