"""From a foreign record to a rollout: order, padding, fillers, the tail. What had to be given up is counted.

Axes: R = response tokens, k = entries of a foreign row, K = ranks kept.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_store import NO_ID, FormatError, Rollout
from opd_tools.converters.record import NO_ENTRY, OVERFULL, Record, Tally, Values

FILLER = -900.0
"""Log-probs at or below it are fillers: -1e3 (Megatron), -9999 (vLLM), -1e9 (axolotl), -inf. float32 softmax
gives no probability below exp(-104)."""
_NOTICED = 1e-5
"""By how much a sum above 1 is more than float32 rounding, and is scaled."""
_AGREES = 0.13
"""Nats that a token's own log-prob and its entry may be apart: two roundings to bfloat16 of log-probs to -16.
"""
ROWS = (
    *("teacher_logprob", "topk_ids", "topk_logprob", "log_tail"),
    *("behaviour_logprob", "reference_logprob", "loss_mask"),
)
"""Fields of a record with a row per response token."""

Support = tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What the cache can hold."""

    vocab_size: int
    topk: int
    """Ranks kept; likelier ones stay. 0 for none."""
    values: Values
    overfull: float = OVERFULL


def to_rollout(record: Record, target: Target, tally: Tally) -> Rollout:
    """The rollout that a record describes.

    Raises:
        FormatError: values that no reading of the format explains; names file, row and position.
    """
    require_rows(record)
    ids = logprob = None
    if target.topk:
        if record.topk_ids is None:
            raise FormatError(f"{record.where}: no top-k, which other rollouts have")
        ids, logprob = _entries(record, target.vocab_size, tally)
        filled = (ids != NO_ENTRY).any(axis=1)
        if not filled.all():
            record, rows = _trimmed(record, filled, tally)
            ids, logprob = ids[rows], logprob[rows]
    tokens = record.token_ids
    if tokens.min() < 0 or tokens.max() >= target.vocab_size:
        at = int(((tokens < 0) | (tokens >= target.vocab_size)).argmax())
        raise FormatError(
            f"{record.where}, token {at}: id {tokens[at]} is not below the vocabulary size "
            f"{target.vocab_size}; is this the right tokenizer?"
        )
    support: Support | None = None
    teacher = record.teacher_logprob
    if ids is not None and logprob is not None:
        if target.values is Values.LOGPROBS:
            teacher = _own(record, _entry_of(tokens[record.prompt_len :], ids, logprob), tally)
            support = _normalised(record, ids, logprob, target, tally)
        else:
            support = _renormalised(ids, logprob, target, tally)
    return Rollout(
        token_ids=tokens.astype(np.uint32),
        prompt_len=record.prompt_len,
        teacher_logprob=_finite(record, "teacher_logprob", teacher, tally),
        behaviour_logprob=_finite(record, "behaviour_logprob", record.behaviour_logprob, tally),
        reference_logprob=_finite(record, "reference_logprob", record.reference_logprob, tally),
        loss_mask=None if record.loss_mask is None else np.asarray(record.loss_mask, np.bool_),
        topk_ids=None if support is None else support[0],
        topk_logprob=None if support is None else support[1],
        log_tail=None if support is None else support[2],
        # Without a name of its own a rollout would be taken for the one before it with the same tokens.
        sample_id=record.where if record.sample_id is None else record.sample_id,
        finish_reason=record.finish_reason,
        policy_version=record.policy_version,
        reward=record.reward,
        label=record.label,
        extra=record.extra,
    )


def require_rows(record: Record) -> None:
    """Raise FormatError unless there is a prompt, a response, and one row for each token of it."""
    tokens = record.token_ids
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise FormatError(f"{record.where}: token ids are no list of integers")
    if not 1 <= record.prompt_len < len(tokens):
        raise FormatError(
            f"{record.where}: expected a prompt and a response of at least one token each, found "
            f"{len(tokens)} tokens, {record.prompt_len} of them prompt"
        )
    size = len(tokens) - record.prompt_len
    for name in ROWS:
        array = getattr(record, name)
        if array is not None and len(array) != size:
            raise FormatError(
                f"{record.where}, {name}: expected {size} rows, one a response token, found {len(array)}"
            )


def rows_between(record: Record, first: int, end: int) -> Record:
    """The record with rows [first, end) only: tokens before them become prompt, tokens after them go."""
    fields = {name: array[first:end] for name in ROWS if (array := getattr(record, name)) is not None}
    prompt = record.prompt_len
    return dataclasses.replace(
        record, token_ids=record.token_ids[: prompt + end], prompt_len=prompt + first, **fields
    )


def _trimmed(record: Record, filled: NDArray[np.bool_], tally: Tally) -> tuple[Record, slice]:
    rows = np.flatnonzero(filled)
    if not len(rows):
        raise FormatError(f"{record.where}: no position has an entry")
    first, end = int(rows[0]), int(rows[-1]) + 1
    if len(rows) < end - first:
        at = int(np.argmin(filled[first:end])) + first
        raise FormatError(
            f"{record.where}, position {at}: no entry at all, between positions that have some; a cache "
            "needs at least one at each, so split the rollout there"
        )
    if first:
        tally["tokens before the first row, taken as prompt"] += first
    if end < len(filled):
        tally["tokens after the last row, left out"] += len(filled) - end
    return rows_between(record, first, end), slice(first, end)


def _entries(record: Record, vocab_size: int, tally: Tally) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """[R, k] ids and log-probs as they are, without fillers and repeats: `NO_ENTRY` and -inf instead."""
    ids = np.asarray(record.topk_ids, np.int64)
    logprob = np.asarray(record.topk_logprob, np.float64)
    if ids.ndim != 2 or ids.shape != logprob.shape or not ids.shape[1]:
        raise FormatError(
            f"{record.where}: expected as many ids as log-probs, found shapes {list(ids.shape)} and "
            f"{list(logprob.shape)}"
        )
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


def _entry_of(
    tokens: NDArray[np.int64], ids: NDArray[np.int64], logprob: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[R] log-prob of each token among its row's entries; NaN where it is not one."""
    entry = np.full(len(tokens), np.nan)
    rows, places = np.nonzero(ids == tokens[:, None])
    entry[rows] = logprob[rows, places]
    return entry


def _own(record: Record, entry: NDArray[np.float64], tally: Tally) -> NDArray[np.floating]:
    """[R] the tokens' own log-probs: those given, else those of their entries."""
    given = record.teacher_logprob
    if given is None:
        return entry
    given = np.asarray(given, np.float64)
    # False where either is NaN.
    apart = int((np.abs(given - entry) > _AGREES).sum())
    if apart:
        tally["tokens whose own log-prob disagrees with their entry"] += apart
    return np.where(np.isnan(given), entry, given)


def _normalised(
    record: Record, ids: NDArray[np.int64], logprob: NDArray[np.float64], target: Target, tally: Tally
) -> Support:
    """The support where values are log-probs over the vocabulary."""
    with np.errstate(over="ignore"):
        mass = np.exp(logprob).sum(axis=1)
    over = mass > 1 + target.overfull
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
    if total.max() > 1 + _NOTICED:
        rounded = total > 1 + _NOTICED
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


def _renormalised(
    ids: NDArray[np.int64], logprob: NDArray[np.float64], target: Target, tally: Tally
) -> Support:
    """The support where only ratios within a row mean something: they sum to 1, and there is no tail."""
    ids, values = _ordered(ids, logprob, tally)
    if ids.shape[1] > target.topk:
        ids, values = _cut(ids, values, target, "left out", tally)
    logprob = values.astype(np.float64)
    logprob = logprob - logprob[:, :1]
    logprob -= np.log(np.exp(logprob).sum(axis=1))[:, None]
    return _padded(ids), logprob.astype(np.float32), np.full(len(ids), -np.inf, np.float32)


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


def _finite(
    record: Record, name: str, values: NDArray[np.floating] | None, tally: Tally
) -> NDArray[np.float32] | None:
    """The values, or None where one is missing: a column has all values of a rollout or none."""
    if values is None:
        return None
    values = np.asarray(values, np.float64)
    low, high = values.min(), values.max()
    if high > 1e-3:  # False where one is NaN
        at = int(values.argmax())
        raise FormatError(f"{record.where}, {name}, position {at}: a log-prob of {values[at]:g} is above 0")
    if np.isnan(low):
        tally[f"rollouts without {name}, since some tokens lack it"] += 1
        return None
    if low <= FILLER:
        tally[f"rollouts without {name}, since some tokens have a filler for it"] += 1
        return None
    lowered: NDArray[np.float32] = np.minimum(values, 0.0).astype(np.float32)
    return lowered


def _first(mask: NDArray[np.bool_]) -> int:
    """First row with anything set."""
    return int(np.argmax(mask.reshape(len(mask), -1).any(axis=1)))
