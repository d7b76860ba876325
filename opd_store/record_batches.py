"""The record batches of a cache: which are open, and what was found right about them."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import layout
from opd_store.batch import BatchView, Proven
from opd_store.encodings import IdTable
from opd_store.index import ShardTable
from opd_store.schema import CacheSchema
from opd_store.shard import MappedShard, Proof, ShardReader, ShardSource
from opd_store.storage import LocalStorage, RemoteStorage
from opd_store.watch import FileWatch

_OPEN_BATCHES = 4096
"""Record batches kept parsed. Each costs a few kilobytes; mapped data stays in the page cache."""
_FETCHED_BYTES = 512 << 20
"""Most bytes of record batches kept in memory, where they cannot be mapped."""
_OPEN_SHARDS = 512
"""Shards kept mapped or connected."""


@dataclass(slots=True)
class _Known:
    """What was found right about a shard; kept when the shard is no longer open."""

    proof: Proof
    proven: dict[int, Proven] = field(default_factory=dict)
    """By record batch of the shard."""


@dataclass(frozen=True, slots=True)
class _OpenBatch:
    view: BatchView
    parts: frozenset[int]
    n_bytes: int
    """That it keeps in memory."""
    require_whole: Callable[[], None]


class RecordBatches:
    """Opens record batches by their number in the cache. Threads may share it."""

    def __init__(
        self,
        storage: LocalStorage | RemoteStorage,
        shards: ShardTable,
        schema: CacheSchema,
        arrow: pa.Schema,
        *,
        vocab_size: int,
        id_table: Callable[[], IdTable | None],
        check_values: bool,
    ) -> None:
        """
        Args:
            arrow: the schema of the shards.
            id_table: called when the first page is needed.
            check_values: as for `opd_store.open`.
        """
        self._storage, self._shards, self._schema, self._arrow = storage, shards, schema, arrow
        self._vocab_size, self._id_table, self._check_values = vocab_size, id_table, check_values
        self.first_row: NDArray[np.int64] = np.concatenate([[0], np.cumsum(shards.batch_rows)])
        """[B + 1] first row of every record batch; last the number of rows."""
        self._lock = threading.Lock()
        self._open: OrderedDict[int, tuple[ShardReader, _Known]] = OrderedDict()
        self._known: dict[int, _Known] = {}
        self._batches: OrderedDict[int, _OpenBatch] = OrderedDict()
        self._n_bytes = 0
        self._making: dict[int, threading.Lock] = {}
        """Record batches that some thread is making."""
        _ALL.add(self)

    def __len__(self) -> int:
        return len(self._shards.batch_rows)

    def view(self, number: int, parts: tuple[int, ...]) -> BatchView:
        """A record batch that has at least these parts; kept open for a while.

        Raises:
            IntegrityError, FormatError: its shard is damaged.
            StorageError: it cannot be read.
        """
        with self._lock:
            found, missing = self._look_up(number, parts)
            making = self._making.setdefault(number, threading.Lock()) if missing else None
        if making is not None:
            # Of threads that want the same one, one fetches and checks it.
            with making:
                with self._lock:
                    found, missing = self._look_up(number, parts)
                if missing:
                    return self._kept(number, missing).view
        assert found is not None
        found.require_whole()
        return found.view

    def fresh_view(self, number: int, parts: tuple[int, ...]) -> BatchView:
        """A record batch that is not kept open."""
        return self._make(number, parts).view

    def prefetch(self, number: int, parts: tuple[int, ...]) -> None:
        """Start to fetch what `view` will be asked for, and return at once."""
        if self._storage.is_local:
            return
        shard, batch = self._place(number)
        source = self.shard(shard).source
        # Under the lock: what `view` takes meanwhile would be fetched once more.
        with self._lock:
            _, missing = self._look_up(number, parts)
            if missing and number not in self._making:
                source.prefetch(batch, missing)

    def shard(self, number: int) -> ShardReader:
        """An open shard."""
        return self._open_shard(number)[0]

    def _look_up(self, number: int, parts: tuple[int, ...]) -> tuple[_OpenBatch | None, tuple[int, ...]]:
        """What is open, and the parts to make it anew with: none if it will do. Needs the lock."""
        found = self._batches.get(number)
        if found is None:
            return None, parts
        self._batches.move_to_end(number)
        return found, () if found.parts.issuperset(parts) else tuple(sorted(found.parts.union(parts)))

    def _kept(self, number: int, parts: tuple[int, ...]) -> _OpenBatch:
        """A record batch made anew, and kept open."""
        try:
            made = self._make(number, parts)
            with self._lock:
                self._forget(number)
                self._batches[number] = made
                self._n_bytes += made.n_bytes
                while len(self._batches) > _OPEN_BATCHES or (
                    self._n_bytes > _FETCHED_BYTES and len(self._batches) > 1
                ):
                    self._forget(next(iter(self._batches)))
            return made
        finally:
            # What another thread still waits for is open by now; if it is not, that thread makes it.
            self._making.pop(number, None)

    def _forget(self, number: int) -> None:
        found = self._batches.pop(number, None)
        if found is not None:
            self._n_bytes -= found.n_bytes

    def _make(self, number: int, parts: tuple[int, ...]) -> _OpenBatch:
        shard, batch = self._place(number)
        reader, known = self._open_shard(shard)
        first, end = self.first_row[number : number + 2].tolist()
        proven = known.proven.setdefault(batch, Proven(end - first))
        arrow_batch = reader.batch(batch, parts)
        view = BatchView(
            arrow_batch,
            self._schema,
            row_tokens=self._shards.row_tokens[first:end],
            row_response_tokens=self._shards.row_response_tokens[first:end],
            vocab_size=self._vocab_size,
            id_table=self._id_table() if parts[-1] >= layout.NATIVE_PARTS else None,
            proven=proven if self._check_values else None,
            where=f"{reader.uri}, record batch {batch}",
        )
        source = reader.source
        if isinstance(source, MappedShard):
            return _OpenBatch(view, frozenset(parts), 0, source.require_whole)
        is_mapped = isinstance(self._storage, LocalStorage) or self._storage.is_mapped
        return _OpenBatch(view, frozenset(parts), 0 if is_mapped else arrow_batch.nbytes, _nothing)

    def _place(self, number: int) -> tuple[int, int]:
        """Shard of a record batch, and which of its record batches it is."""
        shard = int(self._shards.batch_shard[number])
        return shard, number - int(self._shards.first_batch[shard])

    def _open_shard(self, number: int) -> tuple[ShardReader, _Known]:
        with self._lock:
            found = self._open.get(number)
            if found is not None:
                self._open.move_to_end(number)
                return found
        info = self._shards[number]
        uri = self._storage.describe(info.path)
        source: ShardSource
        if isinstance(self._storage, LocalStorage):
            buffer = self._storage.map(info.path)
            watch = FileWatch(uri, buffer.size)
            known = self._remembered(number, watch.identity)
            source = MappedShard(
                buffer, info, self._arrow, uri=uri, current_size=watch.size, proof=known.proof
            )
        else:
            known = self._remembered(number, info.sha256)
            source = self._storage.open_shard(info)
        made = ShardReader(source, info, self._arrow, uri=uri, proof=known.proof), known
        with self._lock:
            self._open[number] = made
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return made

    def _remembered(self, number: int, identity: Hashable) -> _Known:
        """What is known about a shard, forgotten where its file is not the one that was read before."""
        with self._lock:
            known = self._known.get(number)
            if known is None or known.proof.identity != identity:
                known = self._known[number] = _Known(Proof(identity))
            return known


def _nothing() -> None:
    """What a shard needs that nobody can cut under its reader."""


_ALL: weakref.WeakSet[RecordBatches] = weakref.WeakSet()


def _renew_locks() -> None:
    # Another thread of the parent may have held one at the moment of the fork.
    for batches in _ALL:
        batches._lock, batches._making = threading.Lock(), {}


os.register_at_fork(after_in_child=_renew_locks)
