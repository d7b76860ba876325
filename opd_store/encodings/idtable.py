"""Id tables: what a teacher's top-k rows usually hold, so that a page stores short codes instead of ids.

A table has the vocabulary in order of frequency, and up to 4,096 lists of 255 ids each, most likely first.
The lists are a codebook: every row of a page names the list that suits it best, and then has one byte for
each of its ids. An id that is not in the list is stored by its frequency rank.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from opd_store import layout
from opd_store.encodings.page import Bytes
from opd_store.encodings.planes import StreamReader, StreamWriter
from opd_store.errors import FormatError, InvalidArgumentError

LIST_LENGTH = 255
ESCAPE = 255
"""Code of an id that its list does not have."""
MAX_LISTS = 4096
_HEADER = struct.Struct("<8sII")
_ROUNDS = 8
_SMOOTHING = 8
"""How many rows of average content are added to a list's own rows when its ids are ranked."""
# Bits of a code, times ten: measured lengths, close to 4 + 0.6 log2(code + 4), and 16.5 for an escape.
_CODE_COST = np.rint(10 * np.append(4 + 0.6 * np.log2(np.arange(LIST_LENGTH) + 4.0), 16.5)).astype(np.uint8)
_CHUNK_BYTES = 1 << 24
_LISTS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class IdTable:
    """The vocabulary by frequency, and lists of ids that occur together. V = vocabulary, C = lists."""

    by_rank: NDArray[np.uint32]
    """[V] every id once, the most frequent first."""
    lists: NDArray[np.uint32]
    """[C, 255] ids, distinct within a list."""
    source: bytes | None = None
    """The file it was read from: another release might compress the same table to other bytes."""

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.by_rank)

    @cached_property
    def digest(self) -> bytes:
        """Raw SHA-256 of `to_bytes()`, by which caches name the table."""
        return hashlib.sha256(self.to_bytes()).digest()

    @cached_property
    def rank_of(self) -> NDArray[np.uint32]:
        """[V] the frequency rank of every id."""
        return invert(self.by_rank)

    @cached_property
    def padded_lists(self) -> NDArray[np.uint32]:
        """[C * 256] the lists with a place for the escape code, flat, for one gather."""
        padded = np.zeros((len(self.lists), LIST_LENGTH + 1), np.uint32)
        padded[:, :LIST_LENGTH] = self.lists
        return padded.reshape(-1)

    @cached_property
    def _codes(self) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """Row of every id in the second array, [V]; code of the listed ids in every list, [listed + 1, C]."""
        listed = np.unique(self.lists)
        row_of = np.full(self.vocab_size, len(listed), np.uint32)
        row_of[listed] = np.arange(len(listed), dtype=np.uint32)
        codes = np.full((len(listed) + 1, len(self.lists)), ESCAPE, np.uint8)
        place = np.arange(LIST_LENGTH, dtype=np.uint8)
        for number, ids in enumerate(self.lists):
            codes[row_of[ids], number] = place
        return row_of, codes

    @cached_property
    def _costs(self) -> NDArray[np.uint8]:
        costs: NDArray[np.uint8] = _CODE_COST[self._codes[1]]
        return costs

    def choose(self, ids: NDArray[np.uint32], present: NDArray[np.bool_] | None) -> NDArray[np.intp]:
        """[P] the list that codes each row of `ids` [P, k] in the fewest bits; padding is free."""
        row_of, _ = self._codes
        best = np.empty(len(ids), np.intp)
        step = max(1, _CHUNK_BYTES // (ids.shape[1] * max(len(self.lists), 1)))
        for start in range(0, len(ids), step):
            chunk = slice(start, start + step)
            if present is None:
                costs = self._costs[row_of[ids[chunk]]].sum(axis=1, dtype=np.uint32)
            else:
                safe = np.where(present[chunk], ids[chunk], 0)
                parts = self._costs[row_of[safe]] * present[chunk, :, None]
                costs = parts.sum(axis=1, dtype=np.uint32)
            best[chunk] = costs.argmin(axis=1)
        return best

    def codes(self, ids: NDArray[np.uint32], lists: NDArray[np.intp]) -> NDArray[np.uint8]:
        """[n] code of each id in its list; both [n]."""
        row_of, codes = self._codes
        found: NDArray[np.uint8] = codes[row_of[ids], lists]
        return found

    def to_bytes(self) -> bytes:
        """The file that a cache keeps beside its shards."""
        return self._file if self.source is None else self.source

    @cached_property
    def _file(self) -> bytes:
        streams = StreamWriter()
        streams.ints(self.by_rank)
        streams.ints(self.rank_of[self.lists])
        return _HEADER.pack(layout.ID_TABLE_MAGIC, self.vocab_size, len(self.lists)) + streams.body()

    @classmethod
    def from_bytes(cls, data: Bytes, *, vocab_size: int | None = None, where: str) -> IdTable:
        """Read what `to_bytes` wrote.

        Args:
            vocab_size: what V has to be; None takes any.

        Raises:
            FormatError: not a table, one that names an id twice, or one of another vocabulary.
        """
        if len(data) < _HEADER.size:
            raise FormatError(f"{where}: id table of {len(data)} bytes, shorter than its header")
        magic, found_size, n_lists = _HEADER.unpack_from(data)
        if magic != layout.ID_TABLE_MAGIC:
            raise FormatError(f"{where}: not an id table: it starts with {magic!r}")
        if vocab_size not in (None, found_size):
            raise FormatError(f"{where}: id table of {found_size} ids, the vocabulary has {vocab_size}")
        if not 1 <= found_size <= layout.MAX_VOCAB or n_lists > MAX_LISTS:
            raise FormatError(f"{where}: id table of {found_size} ids and {n_lists} lists")
        vocab_size = found_size
        if n_lists and vocab_size < LIST_LENGTH:
            raise FormatError(f"{where}: lists of {LIST_LENGTH} out of {vocab_size} ids")
        streams = StreamReader(data[_HEADER.size :], where=where)
        by_rank = streams.ints(vocab_size, limit=vocab_size - 1, what="frequency order").astype(np.uint32)
        ranks = streams.ints(n_lists * LIST_LENGTH, limit=vocab_size - 1, what="lists")
        streams.finish()
        seen = np.zeros(vocab_size, np.bool_)
        seen[by_rank] = True
        if not seen.all():
            raise FormatError(f"{where}: the frequency order does not name every id once")
        # In parts, since memory that was not used before takes longer than all of this.
        padded = np.zeros((n_lists, LIST_LENGTH + 1), np.uint32)
        for start in range(0, n_lists, _LISTS_AT_ONCE):
            part = slice(start * LIST_LENGTH, (start + _LISTS_AT_ONCE) * LIST_LENGTH)
            # All ranks are below V, and "clip" spares numpy the search for one that is not.
            lists = by_rank.take(ranks[part], mode="clip").reshape(-1, LIST_LENGTH)
            padded[start : start + _LISTS_AT_ONCE, :LIST_LENGTH] = lists
            lists.sort(axis=1)
            if (lists[:, 1:] == lists[:, :-1]).any():
                raise FormatError(f"{where}: a list names an id twice")
        table = cls(by_rank, padded[:, :LIST_LENGTH], data.tobytes())
        table.__dict__["padded_lists"] = padded.reshape(-1)
        return table


def build_id_table(
    rows: Iterable[NDArray[np.uint32]], *, vocab_size: int, n_lists: int | None = None
) -> IdTable:
    """Learn a table from top-k ids of the same teacher, by alternating assignment (k-means on code lengths).

    Integers only, so that the same rows give the same table everywhere.

    Args:
        rows: [P, K] ids of whole rollouts, by falling log-prob; padding 0xFFFFFFFF is skipped.
        n_lists: None for one a 128 positions, from 16 to 1,024; 0 for the frequency order alone.

    Raises:
        InvalidArgumentError: no rows, ids outside the vocabulary, or too many lists.
    """
    blocks = [np.ascontiguousarray(block, np.uint32) for block in rows if len(block)]
    if (
        not blocks
        or {block.ndim for block in blocks} != {2}
        or len({block.shape[1] for block in blocks}) != 1
    ):
        raise InvalidArgumentError("rows: expected at least one row, all of the same number of ranks")
    ids = np.concatenate(blocks)
    present = ids != layout.NO_ID
    if (ids[present] >= vocab_size).any():
        raise InvalidArgumentError(f"rows: an id outside the vocabulary of {vocab_size}")
    counts = np.bincount(ids[present], minlength=vocab_size)
    by_rank = np.argsort(-counts, kind="stable").astype(np.uint32)
    if n_lists is None:
        n_lists = min(max(len(ids) // 128, 16), 1024)
    if not 0 <= n_lists <= MAX_LISTS:
        raise InvalidArgumentError(f"n_lists: expected 0..{MAX_LISTS}, found {n_lists}")
    if n_lists == 0 or vocab_size < LIST_LENGTH:
        return IdTable(by_rank, np.empty((0, LIST_LENGTH), np.uint32))
    # Rows with the same most likely id start together; the rest joins whatever suits it in the first round.
    has_first = present[:, 0]
    firsts = np.bincount(ids[has_first, 0], minlength=vocab_size)
    seeds = np.argsort(-firsts, kind="stable")[:n_lists]
    assigned = np.full(vocab_size, -1, np.intp)
    assigned[seeds] = np.arange(len(seeds))
    choice = np.full(len(ids), -1, np.intp)
    choice[has_first] = assigned[ids[has_first, 0]]
    table = IdTable(by_rank, _ranked_lists(ids, present, choice, counts, by_rank, n_lists))
    for _ in range(_ROUNDS):
        choice = table.choose(ids, None if present.all() else present)
        table = IdTable(by_rank, _ranked_lists(ids, present, choice, counts, by_rank, n_lists))
    return table


def _ranked_lists(
    ids: NDArray[np.uint32],
    present: NDArray[np.bool_],
    choice: NDArray[np.intp],
    counts: NDArray[np.intp],
    by_rank: NDArray[np.uint32],
    n_lists: int,
) -> NDArray[np.uint32]:
    """[n_lists, 255]: the ids that the rows of each list hold most often, ties and gaps by frequency."""
    rank_of = invert(by_rank)
    order = np.argsort(choice, kind="stable")
    ends = np.searchsorted(choice[order], np.arange(n_lists + 1))
    usual = counts[by_rank].astype(np.int64) * _SMOOTHING
    lists = np.empty((n_lists, LIST_LENGTH), np.uint32)
    for number in range(n_lists):
        rows = order[ends[number] : ends[number + 1]]
        ranks, times = np.unique(rank_of[ids[rows][present[rows]]], return_counts=True)
        # Any id of the result is among those seen here and the 255 most frequent ones of all.
        ranks, place = np.unique(np.append(ranks, np.arange(LIST_LENGTH, dtype=np.uint32)), return_index=True)
        score = usual[ranks] + np.append(times, np.zeros(LIST_LENGTH, np.int64))[place] * len(ids)
        best = np.argsort(-score, kind="stable")[:LIST_LENGTH]
        lists[number] = by_rank[ranks[best]]
    return lists


def invert(permutation: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The inverse of a permutation."""
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation), dtype=np.uint32)
    return inverse
