"""Rollouts end to end as a few large arrays: what a trainer's batch is made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store.cache import Cache

Allocate = Callable[[str, tuple[int, ...], Any], NDArray[Any]]
"""Makes the array for a named field: (name, shape, dtype) -> array to be filled."""


@dataclass(frozen=True, slots=True)
class Packed:
    """S rollouts end to end: T tokens, N response tokens, K ranks. A field that any of them lacks is None."""

    lengths: NDArray[np.int64]
    """[S] tokens of each rollout."""
    response_lengths: NDArray[np.int64]
    """[S] response tokens of each rollout."""
    token_ids: NDArray[np.uint32]
    """[T]."""
    loss_mask: NDArray[np.bool_] | None
    """[N]."""
    teacher_logprob: NDArray[np.float32] | None
    """[N] nats, as are the next two."""
    behaviour_logprob: NDArray[np.float32] | None
    reference_logprob: NDArray[np.float32] | None
    topk_ids: NDArray[np.uint32] | None
    """[N, K]; NO_ID where a position has fewer ranks."""
    topk_logprob: NDArray[np.float32] | None
    """[N, K] nats; -inf where a position has fewer ranks."""
    log_tail: NDArray[np.float32] | None
    """[N] nats."""


FIELDS = (
    "loss_mask",
    "teacher_logprob",
    "behaviour_logprob",
    "reference_logprob",
    "topk_ids",
    "topk_logprob",
    "log_tail",
)


def gather(
    cache: Cache,
    rows: Sequence[int] | NDArray[np.int64],
    *,
    ranks: int | None = None,
    columns: Collection[str] = FIELDS,
    max_tokens: int | None = None,
    allocate: Allocate | None = None,
) -> Packed:
    """Read rollouts into packed arrays, in the given order.

    Args:
        rows: [S] row numbers, at least one.
        ranks: how many of the top-k ranks to read; the rest joins `log_tail`. None means all.
        columns: which of `FIELDS` to read; `token_ids` is always read.
        max_tokens: rollouts are cut after this many tokens; None for no limit.
        allocate: makes the arrays that are filled; None makes new ones.

    Raises:
        IndexError: no such row.
        InvalidArgumentError: more ranks than stored, an unknown column, or a prompt that `max_tokens` leaves
            no response to.
        IntegrityError, FormatError: a shard is damaged.
    """
    make = allocate or (lambda _, shape, dtype: np.empty(shape, dtype))
    stored = [name for name in columns if cache.topk or name not in FIELDS[4:]]
    found = [cache.rollout(int(row), ranks=ranks, columns=stored) for row in rows]
    ends = [len(r.token_ids) if max_tokens is None else min(max_tokens, len(r.token_ids)) for r in found]
    responses = [end - r.prompt_len for end, r in zip(ends, found, strict=True)]
    fields: dict[str, Any] = {}
    for name in ("token_ids", *FIELDS):
        values = [getattr(rollout, name) for rollout in found]
        if any(value is None for value in values):
            fields[name] = None
            continue
        cuts = ends if name == "token_ids" else responses
        whole = np.concatenate([value[:n] for value, n in zip(values, cuts, strict=True)])
        fields[name] = make(name, whole.shape, whole.dtype)
        fields[name][...] = whole
    return Packed(np.array(ends, np.int64), np.array(responses, np.int64), **fields)
