"""The record batches of a cache: which are open, and what was found right about them."""

from __future__ import annotations

import functools
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
from opd_store.manifest import Manifest
from opd_store.shard import MappedShard, Proof, ShardReader, ShardSource
from opd_store.storage import LocalStorage, Storage
from opd_store.watch import FileWatch

_OPEN_BATCHES = 4096
"""Record batches kept parsed. Each costs a few kilobytes; mapped data stays in the page cache."""
_FETCHED_BYTES = 512 << 20
"""Most bytes of fetched record batches that are kept open, in memory or mapped from the disk cache."""
_RESIDENT_BYTES = 256 << 20
"""How much is read from mapped shards before their pages are given back, so that a process's memory does not
grow with the cache."""
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
    let_go: Callable[[], None]


class RecordBatches:
    """Opens record batches by their number in the cache. Threads may share it."""

    def __init__(
        self,
        storage: Storage,
        shards: ShardTable,
        manifest: Manifest,
        arrow: pa.Schema,
        *,
        check_values: bool,
    ) -> None:
        """
        Args:
            arrow: the schema of the shards.
            check_values: as for `opd_store.open`.
        """
        self._storage, self._shards, self._manifest, self._arrow = storage, shards, manifest, arrow
        self._check_values = check_values
        self.first_row: NDArray[np.int64] = np.concatenate([[0], np.cumsum(shards.batch_rows)])
        """[B + 1] first row of every record batch; last the number of rows."""
        self._lock = threading.Lock()
        self._open: OrderedDict[int, tuple[ShardReader, _Known]] = OrderedDict()
        self._known: dict[int, _Known] = {}
        self._batches: OrderedDict[int, _OpenBatch] = OrderedDict()
        self._n_bytes = self._n_read = 0
        self._bytes_per_token = shards.total("n_bytes") / max(shards.total("tokens"), 1)
        self._is_large = shards.total("n_bytes") > _RESIDENT_BYTES
        self._making: dict[int, threading.Lock] = {}
        """Record batches that some thread is making."""
        _ALL.add(self)

    @functools.cached_property
    def id_table(self) -> IdTable | None:
        """What pages may refer to; loaded for the first page."""
        ref = self._manifest.id_table
        if ref is None:
            return None
        # A copy: it is used as long as the cache is open, whatever becomes of the file.
        data = self._storage.load(ref.path, ref.n_bytes, ref.sha256).to_pybytes()
        return IdTable.from_bytes(
            np.frombuffer(data, np.uint8),
            vocab_size=self._manifest.meta.vocab_size,
            where=self._storage.describe(ref.path),
        )

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

    def note_read(self, n_tokens: int) -> None:
        """Count what was read, and give mapped pages back now and then."""
        if not self._is_large:
            return
        self._n_read += int(n_tokens * self._bytes_per_token)
        if self._n_read > _RESIDENT_BYTES:
            with self._lock:
                self._n_read = 0
                opened = list(self._batches.values())
            for let_go in {found.let_go for found in opened}:
                let_go()

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
            self._manifest.schema,
            row_tokens=self._shards.row_tokens[first:end],
            row_response_tokens=self._shards.row_response_tokens[first:end],
            vocab_size=self._manifest.meta.vocab_size,
            id_table=self.id_table if parts[-1] >= layout.NATIVE_PARTS else None,
            proven=proven if self._check_values else None,
            tolerance=self._manifest.tolerance,
            where=f"{reader.uri}, record batch {batch}",
        )
        source = reader.source
        if isinstance(source, MappedShard):
            # Its checksum was compared, if it is new, which reads all of it.
            self._n_read += arrow_batch.nbytes
            return _OpenBatch(view, frozenset(parts), 0, source.require_whole, source.let_go)
        return _OpenBatch(view, frozenset(parts), arrow_batch.nbytes, _nothing, _nothing)

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
            buffer, found_file, let_go = self._storage.map_pages(info.path)
            watch = FileWatch(uri, buffer.size, found_file)
            known = self._remembered(number, watch.identity)
            source = MappedShard(
                buffer, info, self._arrow, uri=uri, current_size=watch.size, proof=known.proof, let_go=let_go
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
