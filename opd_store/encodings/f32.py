"""`f32`: every bit of the log-probs kept, as byte planes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store.encodings.page import PageShape
from opd_store.encodings.planes import StreamReader, StreamWriter

CODE = 1
NAMES = {"f32": 0}
"""Name to header parameter."""
_SIGN = np.uint32(0x80000000)


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
    *,
    rank_start: int,
    parameter: int,
) -> None:
    """Append [P, k] log-probs and [P] tails, both as the 32 bits of the magnitude's float, sign last."""
    streams.ints(_to_bits(log_tail))
    streams.ints(_to_bits(logprob if present is None else logprob[present]))


@dataclass(frozen=True, slots=True)
class FloatStreams:
    """What a page holds, before it is put together."""

    log_tail: NDArray[Any]
    """[P] magnitude bits."""
    logprob: NDArray[Any]
    """[n] magnitude bits of all entries."""


def parse(
    streams: StreamReader, counts: NDArray[np.intp] | None, shape: PageShape, *, parameter: int
) -> FloatStreams:
    """Take what `write_logprobs` appended."""
    n_entries = shape.n_positions * shape.n_ranks if counts is None else int(counts.sum())
    log_tail = streams.ints(shape.n_positions, limit=0xFFFFFFFF, what="log_tail")
    return FloatStreams(log_tail, streams.ints(n_entries, limit=0xFFFFFFFF, what="log-probs"))


def assemble(
    parsed: FloatStreams, present: NDArray[np.bool_] | None, shape: PageShape, *, parameter: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[P, k] log-probs, -inf where not present, and [P] tails."""
    size = (shape.n_positions, shape.n_ranks)
    values, log_tail = _from_bits(parsed.logprob), _from_bits(parsed.log_tail)
    if present is None:
        return values.reshape(size), log_tail
    logprob = np.full(size, -np.inf, np.float32)
    logprob[present] = values
    return logprob, log_tail


def _to_bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    # Log-probs are negative: with the sign bit turned over, the highest plane is that much smaller.
    bits: NDArray[np.uint32] = np.ascontiguousarray(values, np.float32).view(np.uint32) ^ _SIGN
    return bits


def _from_bits(words: NDArray[Any]) -> NDArray[np.float32]:
    return (words.astype(np.uint32) ^ _SIGN).view(np.float32)
