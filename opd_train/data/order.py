"""Which rollout comes when, and to which rank: pure functions of digests, seed, epoch and world size.

An epoch is a list of *entries*, numbered 0..n - 1 in storage order: the rollouts that take part, each as
often as it comes in that epoch. A *block* is what is fetched together: the entries of one record batch. How
entries get their order is written down where it is done:

1. `epoch_order` draws one permutation of all entries; `place[i]` is where it puts entry i.
2. `deal` gives every rank its entries and their order. A block order comes from the same function, with
   another purpose.
3. `opd_train.data.plan.plan_batches` cuts them into batches; one of several caches is then sorted by cache.
4. After a change of world size the entries that nobody consumed are dealt again by the same rules, with the
   same `place` and block order.

Axes: n = entries of the epoch, m <= n = those still to be dealt, B = blocks, W = ranks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class Shuffle(StrEnum):
    """How far rollouts travel from their place in the cache."""

    BLOCK = "block"
    """Record batches in random order; rollouts at random inside a window of some of them. Every rank fetches
    other record batches, and each only once."""
    GLOBAL = "global"
    """Every order is equally likely. Every batch touches record batches from all over the cache."""
    NONE = "none"
    """As stored."""


def epoch_order(n: int, digest: str, seed: int, epoch: int, purpose: str = "") -> Integers:
    """[n] int64: a uniform permutation of 0..n - 1, the same for the same arguments on every machine.

    It is `Generator(Philox(key=key)).permutation(n)` of numpy; key is the first 16 bytes, little-endian, of
    the SHA-256 of "DIGEST SEED EPOCH" or, with a purpose, "DIGEST SEED EPOCH PURPOSE".
    """
    text = f"{digest} {seed} {epoch} {purpose}".rstrip(" ")
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).permutation(n)


def place_of(order: Integers) -> Integers:
    """The inverse permutation: where each entry comes in `order`."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place


def epoch_share(n: int, weight: Fraction, digest: str, seed: int, epoch: int, cache: int) -> list[Integers]:
    """Which of `n` rollouts of a cache come in an epoch, for a weight w = k + f with whole k and 0 <= f < 1.

    k times all of them. Then, for f > 0, those that `epoch_order(n, digest, seed, 0, "part CACHE")` puts at
    floor(e * f * n) .. floor((e + 1) * f * n) - 1, counted modulo n. Part follows part, so f = 1/2 gives
    every rollout exactly once in any two epochs that follow each other.

    Returns:
        Ascending rollout numbers of each of these passes over the cache.
    """
    whole, part = divmod(weight, 1)
    passes = [np.arange(n)] * whole
    if part:
        first, last = int(epoch * part * n), int((epoch + 1) * part * n)
        order = epoch_order(n, digest, seed, 0, f"part {cache}")
        passes.append(np.sort(order[np.arange(first, last) % n]))
    return passes


@dataclass(frozen=True, slots=True)
class Shares:
    """What every rank gets, in order."""

    entries: Integers
    """[m] those of rank 0, then those of rank 1, and so on."""
    starts: Integers
    """[W + 1] first of each rank; last m."""


def deal(
    left: Integers,
    place: Integers,
    block: Integers,
    block_order: Integers,
    *,
    world_size: int,
    shuffle: Shuffle,
    window: int,
) -> Shares:
    """Give entries to ranks; the numbers of entries that two ranks get differ by at most one.

    "none": rank r gets entries r, r + W, r + 2W, ... of `left`.
    "global": the same of `left` sorted by `place`.
    "block":
    - The blocks that have entries left are counted 0, 1, ... in block order. Block j goes to rank j mod W. A
      rank's entries are those of its blocks in that order, and by place inside a block.
    - Rank r is due m // W entries, and one more if r < m mod W. What a rank has beyond that is cut off its
      end. These pieces, laid end to end in the order of the ranks, are handed in that order to the ranks that
      lack entries, and come after their own.
    - Each rank cuts its list into windows of `window` blocks that follow each other (part of a block counts
      as one) and sorts every window by place.
    So with one rank and no more than `window` blocks the order is that of "global", a uniform permutation.

    Args:
        left: [m] ascending entries to deal.
        place: [n] where `epoch_order` puts each entry.
        block: [n] in 0..B - 1.
        block_order: [B] a permutation of the blocks.
    """
    m = len(left)
    share = m // world_size + (np.arange(world_size) < m % world_size)
    starts = np.concatenate([[0], np.cumsum(share)])
    if shuffle is not Shuffle.BLOCK or not m:
        order = left if shuffle is Shuffle.NONE else left[np.argsort(place[left])]
        return Shares(np.concatenate([order[rank::world_size] for rank in range(world_size)]), starts)
    entries = _blocks_of_ranks(left, place, block, block_order, share)
    new = np.ones(m, np.bool_)
    new[1:] = block[entries[1:]] != block[entries[:-1]]
    new[starts[:-1][share > 0]] = True
    piece = np.cumsum(new) - 1
    # Pieces are counted from 0 in each rank; its first window comes after all windows of ranks before.
    first_piece = np.append(piece, piece[-1:] + 1)[starts]
    n_windows = -(-np.diff(first_piece) // window)
    first_window = np.cumsum(n_windows) - n_windows
    number = np.repeat(first_window, share) + (piece - np.repeat(first_piece[:-1], share)) // window
    return Shares(entries[np.argsort(number * len(place) + place[entries])], starts)


def _blocks_of_ranks(
    left: Integers, place: Integers, block: Integers, block_order: Integers, share: NDArray[Any]
) -> Integers:
    """Whole blocks dealt in turn, then the surplus moved: `share[r]` entries for rank r, rank after rank."""
    world_size = len(share)
    present = np.zeros(len(block_order), np.bool_)
    present[block[left]] = True
    present_order = block_order[present[block_order]]
    turn = np.zeros(len(block_order), np.int64)
    turn[present_order] = np.arange(len(present_order))
    turn_of = turn[block[left]]
    rank_of = turn_of % world_size
    key = (rank_of * len(block_order) + turn_of) * len(place) + place[left]
    entries = left[np.argsort(key)]
    if world_size == 1:
        return entries
    count = np.bincount(rank_of, minlength=world_size)
    own = np.split(entries, np.cumsum(count)[:-1])
    surplus = np.concatenate([mine[due:] for mine, due in zip(own, share, strict=True)])
    given = np.split(surplus, np.cumsum(np.maximum(share - count, 0))[:-1])
    parts = [part for mine, due, more in zip(own, share, given, strict=True) for part in (mine[:due], more)]
    return np.concatenate(parts)
