"""Batches of an epoch, planned from lengths alone, and what is left of it when the world size changes.

Axes: n = entries of the epoch, m = entries dealt, W = ranks, B = batches of all ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from opd_train.data.order import Integers, Shuffle, deal, epoch_order, epoch_share, place_of

Stage = tuple[int, int, tuple[int, ...]]
"""A part of an epoch that is over: (epoch, world size, batches that each rank consumed)."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What takes part: caches in turn, each in storage order. [N] unless said otherwise."""

    digest: str
    """Of the caches and of the rows that take part."""
    source: Integers
    """Which cache."""
    rows: Integers
    """Which row of it."""
    block: Integers
    """Its record batch, counted over all caches."""
    tokens: Integers
    """Its length, after it was cut."""
    weights: tuple[Fraction, ...]
    """Of each cache: how often its rollouts come in an epoch."""


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """The batches of every rank in an epoch, or in what an earlier world size left of it."""

    entries: Integers
    """[m] rank after rank, in order."""
    bounds: Integers
    """[B + 1] first entry of each batch; last m."""
    first_batch: Integers
    """[W + 1] first batch of each rank; last B."""
    rollout: Integers
    """[n] which rollout each entry is."""

    def n_batches(self, rank: int) -> int:
        """Batches of a rank."""
        return int(self.first_batch[rank + 1] - self.first_batch[rank])

    def batch(self, rank: int, index: int) -> Integers:
        """Rollouts of a batch of a rank."""
        start, end = self.bounds[self.first_batch[rank] + index :][:2]
        return self.rollout[self.entries[start:end]]

    def left(self, consumed: Sequence[int]) -> Integers:
        """Ascending entries that remain after rank r consumed its first `consumed[r]` batches."""
        starts = self.bounds[self.first_batch[:-1] + np.array(consumed, np.int64)]
        ends = self.bounds[self.first_batch[1:]]
        parts = [self.entries[start:end] for start, end in zip(starts, ends, strict=True)]
        return np.sort(np.concatenate(parts))


class Step(NamedTuple):
    """One batch before it is built."""

    epoch: int
    number: int
    """Which batch of this rank in its part of the epoch, from 0."""
    source: Integers
    """[S] which cache, ascending: a cache is read once for a batch."""
    rows: Integers
    """[S] which row of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Everything that the plan of an epoch depends on, but for the world size and earlier stages."""

    rollouts: Rollouts
    seed: int
    shuffle: Shuffle
    window: int
    batch_tokens: int
    """Most tokens of a batch; no rollout has more."""
    batch_rollouts: int | None

    def plan(self, epoch: int, world_size: int, stages: Sequence[Stage] = ()) -> EpochPlan:
        """The batches of an epoch after the given stages; those of other epochs do not matter.

        Raises:
            ValueError: a stage consumed more batches than it had.
        """
        rollout, block = self._entries(epoch)
        n = len(rollout)
        digest = self.rollouts.digest
        place = place_of(epoch_order(n, digest, self.seed, epoch))
        n_blocks = int(block.max(initial=-1)) + 1
        block_order = epoch_order(n_blocks, digest, self.seed, epoch, "blocks")
        left = np.arange(n)
        earlier = [(size, consumed) for number, size, consumed in stages if number == epoch]
        for size, consumed in (*earlier, (world_size, None)):
            shares = deal(
                left,
                place,
                block,
                block_order,
                world_size=size,
                shuffle=self.shuffle,
                window=self.window,
            )
            tokens = self.rollouts.tokens[rollout[shares.entries]]
            bounds, first = plan_batches(tokens, shares.starts, self.batch_tokens, self.batch_rollouts)
            plan = EpochPlan(shares.entries, bounds, first, rollout)
            if consumed is not None:
                available = [plan.n_batches(rank) for rank in range(size)]
                if len(consumed) != size or not all(
                    0 <= n <= most for n, most in zip(consumed, available, strict=True)
                ):
                    raise ValueError(f"{list(consumed)} batches consumed of {available}")
                left = plan.left(consumed)
        return plan

    def walk(
        self,
        rank: int,
        world_size: int,
        *,
        epoch: int,
        index: int,
        epochs: int | None,
        stages: Sequence[Stage],
    ) -> Iterator[Step]:
        """All batches of a rank from one on, through the end of the last epoch (None: without end).

        In a batch the rollouts of the first cache come first, and so on; those of one cache keep their order.
        """
        while epochs is None or epoch < epochs:
            plan = self.plan(epoch, world_size, stages)
            for number in range(index, plan.n_batches(rank)):
                chosen = plan.batch(rank, number)
                chosen = chosen[np.argsort(self.rollouts.source[chosen], kind="stable")]
                yield Step(epoch, number, self.rollouts.source[chosen], self.rollouts.rows[chosen])
            epoch, index = epoch + 1, 0

    def _entries(self, epoch: int) -> tuple[Integers, Integers]:
        """[n] rollout and block of every entry. Each pass over a cache has blocks of its own, so that two
        copies of a rollout are not neighbours."""
        rollouts = self.rollouts
        counts = np.bincount(rollouts.source, minlength=len(rollouts.weights))
        chosen, blocks = [], []
        n_blocks = int(rollouts.block.max(initial=-1)) + 1
        n_passes = 0
        for cache, (count, weight) in enumerate(zip(counts, rollouts.weights, strict=True)):
            first = int(counts[:cache].sum())
            for rows in epoch_share(int(count), weight, rollouts.digest, self.seed, epoch, cache):
                chosen.append(first + rows)
                blocks.append(rollouts.block[first + rows] + n_passes * n_blocks)
                n_passes += 1
        block = np.concatenate(blocks)
        # Number those that occur 0, 1, ... in storage order.
        present = np.zeros(n_passes * n_blocks, np.bool_)
        present[block] = True
        return np.concatenate(chosen), (np.cumsum(present) - 1)[block]


def plan_batches(
    tokens: Integers, starts: Integers, batch_tokens: int, batch_rollouts: int | None
) -> tuple[Integers, Integers]:
    """Cut every rank's entries into batches.

    A batch takes entries in order until the next would pass `batch_tokens` or `batch_rollouts`. Then all
    ranks are given as many batches as the one with the most: a rank with fewer halves, again and again, its
    largest batch by tokens (the first of those that are equal) that has two entries or more; the first half
    gets the odd one. A rank with fewer entries than that ends with one entry a batch and has fewer batches.

    Args:
        tokens: [m] of every entry, rank after rank; none above `batch_tokens`.
        starts: [W + 1] first entry of each rank; last m.

    Returns:
        bounds: [B + 1] first entry of each batch; last m.
        first_batch: [W + 1] first batch of each rank; last B.
    """
    total = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
    # Where the batch would end that starts at each entry; then only those ends that are reached.
    ends = np.searchsorted(total, total[:-1] + batch_tokens, side="right") - 1
    if batch_rollouts is not None:
        ends = np.minimum(ends, np.arange(len(tokens)) + batch_rollouts)
    # Through a memoryview single numbers are read as fast as from a list, which would take 40 bytes each.
    following = memoryview(np.minimum(ends, np.repeat(starts[1:], np.diff(starts))))
    reached, at = [0], 0
    while at < len(following):
        at = following[at]
        reached.append(at)
    bounds = np.array(reached, np.int64)
    first = np.searchsorted(bounds, starts)
    counts = np.diff(first)
    cuts = [
        cut
        for rank in np.flatnonzero(counts < counts.max())
        for cut in _halves(bounds[first[rank] : first[rank + 1] + 1], total, int(counts.max() - counts[rank]))
    ]
    bounds = np.sort(np.concatenate([bounds, np.array(cuts, np.int64)]))
    return bounds, np.searchsorted(bounds, starts)


def _halves(bounds: Integers, total: Integers, missing: int) -> list[int]:
    """Where to cut so that there are `missing` batches more, as far as there are entries."""
    start, end = bounds[:-1], bounds[1:]
    size = np.where(end - start > 1, total[end] - total[start], 0)
    # No more of them than this can be among the largest.
    largest = np.argsort(-size, kind="stable")[:missing]
    heap = [(-int(size[i]), int(start[i]), int(end[i])) for i in largest if size[i]]
    heapq.heapify(heap)
    cuts: list[int] = []
    while heap and len(cuts) < missing:
        _, first, last = heapq.heappop(heap)
        cut = (first + last + 1) // 2
        cuts.append(cut)
        for low, high in ((first, cut), (cut, last)):
            if high - low > 1:
                heapq.heappush(heap, (-int(total[high] - total[low]), low, high))
    return cuts
