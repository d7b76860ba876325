"""From a foreign record to a rollout: order, padding, fillers, the tail. What had to be given up is counted.

Axes: R = response tokens, k = entries of a foreign row, K = ranks kept.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError, Rollout
from opd_tools.converters.core.record import NO_ENTRY, Record, Tally, Values
from opd_tools.converters.core.support import FILLER, Support, Target, entries_of, normalised, renormalised

_AGREES = 0.13
"""Nats that a token's own log-prob and its entry may be apart: two roundings to bfloat16 of log-probs to -16.
"""
ROWS = (
    *("teacher_logprob", "topk_ids", "topk_logprob", "log_tail"),
    *("behaviour_logprob", "reference_logprob", "loss_mask"),
)
"""Fields of a record with a row per response token."""


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
        ids, logprob = entries_of(record, target.vocab_size, tally)
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
            teacher = _own(record, _entry_of(tokens[record.prompt_len :], ids, logprob), target, tally)
            support = normalised(record, ids, logprob, target, tally)
        else:
            support = renormalised(ids, logprob, target, tally)
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
        # Without a name of its own a rollout would be taken for the one before it with the same tokens; those
        # of a cache are told apart already.
        sample_id=record.where if record.sample_id is None and target.max_error is None else record.sample_id,
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
    ids, logprob = record.topk_ids, record.topk_logprob
    if ids is None:
        return
    found = None if logprob is None else np.shape(logprob)
    if np.ndim(ids) != 2 or np.shape(ids) != found or not found[1]:
        raise FormatError(
            f"{record.where}: expected as many ids as log-probs, found shapes {np.shape(ids)} and {found}"
        )


def rows_between(record: Record, first: int, end: int) -> Record:
    """The record with rows [first, end) only: tokens before them become prompt, tokens after them go."""
    fields: dict[str, Any] = {
        name: array[first:end] for name in ROWS if (array := getattr(record, name)) is not None
    }
    prompt = record.prompt_len
    if end < len(record.token_ids) - prompt:
        # Its last token is another one now.
        fields["finish_reason"] = "unknown"
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


def _entry_of(
    tokens: NDArray[np.int64], ids: NDArray[np.int64], logprob: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[R] log-prob of each token among its row's entries; NaN where it is not one."""
    entry = np.full(len(tokens), np.nan)
    rows, places = np.nonzero(ids == tokens[:, None])
    entry[rows] = logprob[rows, places]
    return entry


def _own(
    record: Record, entry: NDArray[np.float64], target: Target, tally: Tally
) -> NDArray[np.floating] | None:
    """[R] the tokens' own log-probs: those given, else those of their entries unless they were rounded."""
    given = record.teacher_logprob
    if given is None:
        return entry if target.max_error is None else None
    given = np.asarray(given, np.float64)
    # False where either is NaN.
    apart = int((np.abs(given - entry) > _AGREES).sum())
    if apart:
        tally["tokens whose own log-prob disagrees with their entry"] += apart
    return np.where(np.isnan(given), entry, given)


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
