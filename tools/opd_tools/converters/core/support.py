"""Entries of a position: order, padding, fillers, repeats, the tail. What had to be given up is counted.

Axes: R = response tokens, k = entries of a foreign row, K = ranks kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_store import NO_ID, FormatError
from opd_store.encodings import value_tolerance
from opd_tools.converters.core.record import NO_ENTRY, OVERFULL, Record, Tally, Values

FILLER = -900.0
"""Log-probs at or below it are fillers: -1e3 (Megatron), -9999 (vLLM), -1e9 (axolotl), -inf. float32 softmax
gives no probability below exp(-104)."""
_NOTICED = 1e-5
"""By how much a sum above 1 is more than float32 rounding, and is scaled."""

Support = tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What the cache can hold."""

    vocab_size: int
    topk: int
    """Ranks kept; likelier ones stay. 0 for none."""
    values: Values
    overfull: float = OVERFULL
    max_error: float | None = None
    """As `Contents.max_error`."""

    @property
    def allowed(self) -> float:
        """How far probabilities may exceed 1 in sum, or miss it where they are renormalised, and be kept."""
        return _NOTICED if self.max_error is None else value_tolerance("plain", self.max_error)


def entries_of(
    record: Record, vocab_size: int, tally: Tally
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """[R, k] ids and log-probs as they are, without fillers and repeats: `NO_ENTRY` and -inf instead."""
    ids = np.asarray(record.topk_ids)
    logprob = np.asarray(record.topk_logprob, np.float64)
    if ids.dtype.kind not in "iu":
        raise FormatError(f"{record.where}: ids of entries are {ids.dtype}; expected integers")
    ids = ids.astype(np.int64, copy=False)
    # False for NaN, and where anything is absent.
    plain = FILLER < logprob.min() <= logprob.max() < np.inf and 0 <= ids.min() <= ids.max() < vocab_size
    if not plain:
        ids, logprob = _without_fillers(record, ids, logprob, vocab_size, tally)
    by_id = np.sort(ids, axis=1)
    if ((by_id[:, 1:] == by_id[:, :-1]) & (by_id[:, 1:] != NO_ENTRY)).any():
        ids, logprob = _without_repeats(record, ids, logprob, tally)
    return ids, logprob


def _without_fillers(
    record: Record, ids: NDArray[np.int64], logprob: NDArray[np.float64], vocab_size: int, tally: Tally
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    absent = ids == NO_ENTRY
    wrong = ~absent & (np.isnan(logprob) | (logprob == np.inf))
    if wrong.any():
        raise FormatError(f"{record.where}, position {_first(wrong)}: log-prob {logprob[wrong][0]}")
    filler = ~absent & (logprob <= FILLER)
    if filler.any():
        tally["entries that were fillers (-inf, -9999, ...), left out"] += int(filler.sum())
        absent |= filler
    wrong = ~absent & ((ids < 0) | (ids >= vocab_size))
    if wrong.any():
        raise FormatError(
            f"{record.where}, position {_first(wrong)}: id {ids[wrong][0]} is not below the vocabulary size "
            f"{vocab_size}; is this the right tokenizer?"
        )
    return np.where(absent, NO_ENTRY, ids), np.where(absent, -np.inf, logprob)


def _without_repeats(
    record: Record, ids: NDArray[np.int64], logprob: NDArray[np.float64], tally: Tally
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    order = np.argsort(ids, axis=1, kind="stable")
    by_id, values = np.take_along_axis(ids, order, 1), np.take_along_axis(logprob, order, 1)
    again = np.zeros(ids.shape, np.bool_)
    again[:, 1:] = (by_id[:, 1:] == by_id[:, :-1]) & (by_id[:, 1:] != NO_ENTRY)
    rows, places = np.nonzero(again)
    differs = np.flatnonzero(values[rows, places] != values[rows, places - 1])
    if len(differs):
        row, place = rows[differs[0]], places[differs[0]]
        raise FormatError(
            f"{record.where}, position {row}: id {by_id[row, place]} twice, with log-probs "
            f"{values[row, place - 1]:g} and {values[row, place]:g}"
        )
    tally["entries that were there twice, once left out"] += len(rows)
    ids, logprob = ids.copy(), logprob.copy()
    ids[rows, order[rows, places]] = NO_ENTRY
    logprob[rows, order[rows, places]] = -np.inf
    return ids, logprob


def normalised(
    record: Record, ids: NDArray[np.int64], logprob: NDArray[np.float64], target: Target, tally: Tally
) -> Support:
    """The support where values are log-probs over the vocabulary."""
    with np.errstate(over="ignore"):
        mass = np.exp(logprob).sum(axis=1)
    over = mass > 1 + max(target.overfull, target.allowed)
    if over.any():
        at = _first(over)
        raise FormatError(
            f"{record.where}, position {at}: probabilities sum to {mass[at]:.4f}; these are no log-probs "
            "of one distribution (logits, another temperature, or a wrong decoding?)"
        )
    if record.log_tail is None:
        with np.errstate(divide="ignore"):
            tail = np.log1p(-np.minimum(mass, 1.0))
        total = mass
        tally["tails computed as 1 - sum, as exact as the entries' rounding"] += len(tail)
    else:
        tail = _given_tail(record)
        total = mass + np.exp(tail)
        short = int((total < 1 - target.overfull).sum())
        if short:
            tally["positions whose probabilities and tail do not sum to 1"] += short
    if total.max() > 1 + target.allowed:
        rounded = total > 1 + target.allowed
        tally["positions whose rounded probabilities exceed 1, scaled down to it"] += int(rounded.sum())
        scale = np.where(rounded, np.log(total), 0.0)
        logprob, tail = logprob - scale[:, None], tail - scale
    ids, values = _ordered(ids, logprob, tally)
    if ids.shape[1] > target.topk:
        cut = np.exp(values[:, target.topk :].astype(np.float64)).sum(axis=1)
        with np.errstate(divide="ignore"):
            tail = np.logaddexp(tail, np.log(cut))
        ids, values = _cut(ids, values, target, "moved into the tail", tally)
    return _padded(ids), np.minimum(values, np.float32(0)), np.minimum(tail, 0.0).astype(np.float32)


def renormalised(
    ids: NDArray[np.int64], logprob: NDArray[np.float64], target: Target, tally: Tally
) -> Support:
    """The support where only ratios within a row mean something: they sum to 1, and there is no tail."""
    ids, values = _ordered(ids, logprob, tally)
    if ids.shape[1] > target.topk:
        ids, values = _cut(ids, values, target, "left out", tally)
    logprob = values.astype(np.float64)
    shifted = logprob - logprob[:, :1]
    shifted -= np.log(np.exp(shifted).sum(axis=1))[:, None]
    if target.max_error is not None:
        kept = np.abs(np.expm1(logprob[:, 0] - shifted[:, 0])) <= target.allowed
        shifted[kept] = logprob[kept]
    return _padded(ids), shifted.astype(np.float32), np.full(len(ids), -np.inf, np.float32)


def _given_tail(record: Record) -> NDArray[np.float64]:
    tail = np.asarray(record.log_tail, np.float64)
    wrong = ~(tail <= _NOTICED)
    if wrong.any():
        at = _first(wrong)
        raise FormatError(f"{record.where}, log_tail, position {at}: expected a log-prob, found {tail[at]}")
    return np.where(tail <= FILLER, -np.inf, tail)


def _ordered(
    ids: NDArray[np.int64], logprob: NDArray[np.float64], tally: Tally
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """By falling log-prob in float32, which makes ties of near ones, ties by rising id, absent ones last."""
    values = logprob.astype(np.float32)
    here, after = values[:, :-1], values[:, 1:]
    wrong = (after > here) | ((after == here) & (ids[:, 1:] <= ids[:, :-1]) & (ids[:, 1:] != NO_ENTRY))
    if wrong.any():
        rows = np.flatnonzero(wrong.any(axis=1))
        tally["positions whose entries were put in order"] += len(rows)
        order = np.lexsort((ids[rows], -values[rows]), axis=-1)
        ids = ids.copy()
        ids[rows] = np.take_along_axis(ids[rows], order, 1)
        values[rows] = np.take_along_axis(values[rows], order, 1)
    return ids, values


def _cut(
    ids: NDArray[np.int64], values: NDArray[np.float32], target: Target, where_to: str, tally: Tally
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    dropped = int((ids[:, target.topk :] != NO_ENTRY).sum())
    if dropped:
        tally[f"entries beyond rank {target.topk}, {where_to}"] += dropped
    return ids[:, : target.topk], values[:, : target.topk]


def _padded(ids: NDArray[np.int64]) -> NDArray[np.uint32]:
    return np.where(ids == NO_ENTRY, NO_ID, ids).astype(np.uint32)


def _first(mask: NDArray[np.bool_]) -> int:
    """First row with anything set."""
    return int(np.argmax(mask.reshape(len(mask), -1).any(axis=1)))
