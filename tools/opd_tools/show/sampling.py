"""Which rollouts are read where not all are, and reading them as chunks of measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_store import Cache, InvalidArgumentError, Rollout
from opd_tools.show.measures import Collector, measure

_CHUNK_VALUES = 1 << 20
"""Top-k values of a chunk, so that memory is bounded."""
_SPREAD_BATCHES = 64
"""Record batches that a sample comes from: of a few, each row is worth its cost, and order matters little."""
GROUPABLE = ("teacher", "finish_reason")


@dataclass(frozen=True, slots=True)
class Sample:
    """What was measured."""

    collector: Collector
    n_read: int
    n_rollouts: int
    """In the cache."""

    @property
    def said(self) -> str:
        """How many of how many were read."""
        if self.n_read == self.n_rollouts:
            return f"all {self.n_rollouts:,} rollouts"
        return f"{self.n_read:,} of {self.n_rollouts:,} rollouts, evenly spread"


def groupable(cache: Cache) -> list[str]:
    """Columns that rollouts can be told apart by: all but real numbers."""
    users = (name for name, kind in sorted(cache.schema.user_columns.items()) if kind != "float64")
    return [*GROUPABLE, *users]


def require_groupable(cache: Cache, columns: Sequence[str]) -> None:
    """Raises InvalidArgumentError for any other column."""
    known = groupable(cache)
    for name in columns:
        if name not in known:
            raise InvalidArgumentError(f"--by: {name!r:.80} is not one of {', '.join(known)}")


def spread_rows(batch_rows: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """At most `limit` rows, rising: as many from each of some record batches, evenly over the cache.

    Args:
        batch_rows: [B] rollouts of each record batch.
    """
    first = np.concatenate([[0], np.cumsum(batch_rows)])
    total = int(first[-1])
    if limit >= total:
        return np.arange(total)
    n_batches = min(len(batch_rows), _SPREAD_BATCHES, limit)
    # More batches where these have too few rows.
    while batch_rows[_evenly(len(batch_rows), n_batches)].sum() < limit:
        n_batches = min(2 * n_batches, len(batch_rows))
    chosen = _evenly(len(batch_rows), n_batches)
    rows = np.concatenate([np.arange(first[batch], first[batch + 1]) for batch in chosen.tolist()])
    return rows[_evenly(len(rows), limit)]


def _evenly(n: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` different numbers below n, rising."""
    return np.arange(wanted) * n // wanted


def collect(
    cache: Cache,
    *,
    by: Sequence[str],
    limit: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sample:
    """Measure rollouts of a cache.

    Args:
        by: columns by whose values they are told apart.
        limit: read at most so many.
        on_progress: called with rollouts read, and how many there are to read.
    """
    rows = spread_rows(cache.batch_rows, limit)
    collector = Collector(by)
    columns = {"teacher_logprob", "behaviour_logprob", "reference_logprob", *by}
    if cache.topk:
        columns |= {"topk_ids", "topk_logprob", "log_tail"}
    row_values = cache.row_response_tokens[rows].astype(np.int64) * max(cache.topk, 1)
    chunk_of_row = (np.cumsum(row_values) - row_values) // _CHUNK_VALUES
    pieces = np.split(rows, np.flatnonzero(np.diff(chunk_of_row)) + 1) if len(rows) else []
    done = 0
    for number, piece in enumerate(pieces):
        for ahead in pieces[number : number + 2]:
            cache.prefetch(ahead.tolist(), columns=columns)
        rollouts: list[Rollout] = [cache.rollout(row, columns=columns) for row in piece.tolist()]
        collector.add(measure(rollouts, vocab_size=cache.meta.vocab_size, labels=by))
        done += len(rollouts)
        on_progress(done, len(rows))
    return Sample(collector, len(rows), len(cache))
