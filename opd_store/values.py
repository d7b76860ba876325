"""Which values are possible. Checks give the first problem as (field, expected, found, position) or None."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import kernels, layout

Problem = tuple[str, str, object, int]
LOWEST = float(np.finfo(np.float32).min)
_ENTRIES_AT_ONCE = 1 << 19


def ids_problem(field: str, ids: NDArray[Any], vocab_size: int) -> Problem | None:
    """Ids of any shape, positions along the first axis, have to be below `vocab_size`."""
    if not ids.size or 0 <= ids.min() <= ids.max() < vocab_size:
        return None
    wrong = (ids < 0) | (ids >= vocab_size)
    return field, f"ids in [0, vocab_size {vocab_size})", int(ids[wrong][0]), _first(wrong)


def logprobs_problem(field: str, values: NDArray[np.float32], low: float = LOWEST) -> Problem | None:
    """Log-probs have to be at most 0 and at least `low`, which is -inf where nothing may be left."""
    # NaN makes the comparison false.
    if not values.size or low <= values.min() <= values.max() <= 0:
        return None
    wrong = ~((values <= 0) & (values >= low))
    return field, "log-probs that are finite and <= 0", values[wrong][0], _first(wrong)


def support_problem(
    name: str,
    ids: NDArray[np.uint32],
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    *,
    draws: NDArray[np.uint32] | None = None,
    vocab_size: int,
    ragged: bool,
    tolerance: float = layout.PROBABILITY_TOLERANCE,
) -> Problem | None:
    """Rows of ids with their log-probs: order, distinct ids, probabilities, padding.

    Args:
        name: "topk", "chosen" or "sampled".
        ids, logprob: [R, k].
        log_tail: [R].
        draws: [R, k] of a sampled support.
        ragged: whether rows may be shorter, padded with NO_ID, -inf and 0.
        tolerance: how far probabilities may exceed 1 in sum.
    """
    if kernels.rows_are_fine(
        ids,
        logprob,
        log_tail,
        draws=draws,
        vocab_size=vocab_size,
        ragged=ragged,
        may_be_empty=name != "topk",
        limit=1 + tolerance,
    ):
        return None
    # In parts, since the float64 sums below would take several times what a large page does.
    step = max(1, _ENTRIES_AT_ONCE // max(ids.shape[1], 1))
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        part = None if draws is None else draws[rows]
        found = _part_problem(
            name, ids[rows], logprob[rows], log_tail[rows], part, vocab_size, ragged, tolerance
        )
        if found is not None:
            return (*found[:3], found[3] + start)
    return None


def _part_problem(
    name: str,
    ids: NDArray[np.uint32],
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    draws: NDArray[np.uint32] | None,
    vocab_size: int,
    ragged: bool,
    tolerance: float,
) -> Problem | None:
    ids_field, logprob_field = f"{name}_ids", f"{name}_logprob"
    tail_field = "log_tail" if name == "topk" else f"{name}_log_tail"
    if problem := logprobs_problem(tail_field, log_tail, -np.inf):
        return problem
    padding = ids == layout.NO_ID
    if not padding.any():
        if problem := ids_problem(ids_field, ids, vocab_size):
            return problem
        if problem := logprobs_problem(logprob_field, logprob):
            return problem
    else:
        if not ragged:
            return ids_field, f"ids in [0, vocab_size {vocab_size})", layout.NO_ID, _first(padding)
        if problem := ids_problem(ids_field, np.where(padding, 0, ids), vocab_size):
            return problem
        if problem := logprobs_problem(logprob_field, np.where(padding, np.float32(0), logprob)):
            return problem
        wrong = padding & (logprob != -np.inf)
        if wrong.any():
            return logprob_field, "-inf at padding", logprob[wrong][0], _first(wrong)
        wrong = padding[:, :-1] & ~padding[:, 1:]
        if wrong.any():
            return ids_field, "padding at the end of rows only", "an id after it", _first(wrong)
        if name == "topk" and padding[:, 0].any():
            return ids_field, "at least one rank", "none", _first(padding[:, :1])
    if problem := _order_problem(ids, logprob, padding, ids_field, logprob_field):
        return problem
    total = np.exp(logprob.astype(np.float64)).sum(axis=1) + np.exp(log_tail.astype(np.float64))
    wrong = total > 1 + tolerance
    if wrong.any():
        found = total[wrong][0]
        return logprob_field, f"probabilities and tail of at most 1 + {tolerance:.4g}", found, _first(wrong)
    if draws is not None:
        wrong = (draws == 0) != padding
        if wrong.any():
            return (
                f"{name}_draws",
                "at least 1 draw of every id, 0 at padding",
                draws[wrong][0],
                _first(wrong),
            )
    return None


def _order_problem(
    ids: NDArray[np.uint32],
    logprob: NDArray[np.float32],
    padding: NDArray[np.bool_],
    ids_field: str,
    logprob_field: str,
) -> Problem | None:
    level = logprob[:, 1:] == logprob[:, :-1]
    wrong = (logprob[:, 1:] > logprob[:, :-1]) | (level & (ids[:, 1:] <= ids[:, :-1]) & ~padding[:, 1:])
    if wrong.any():
        at = _first(wrong)
        return logprob_field, "falling log-probs, ties by rising id", f"ids {ids[at]}, {logprob[at]}", at
    in_order = np.sort(ids, axis=1)
    wrong = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != layout.NO_ID)
    if wrong.any():
        at = _first(wrong)
        return ids_field, "distinct ids", ids[at], at
    return None


def _first(wrong: NDArray[np.bool_]) -> int:
    return int(np.argmax(wrong.reshape(len(wrong), -1).any(axis=1)))
