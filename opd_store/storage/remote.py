"""Reading a cache from a bucket or web server: few large range requests, every byte checked."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import pyarrow as pa

from opd_store.errors import IntegrityError
from opd_store.shard import ShardInfo, part_slices
from opd_store.storage import pieces
from opd_store.storage.address import Address
from opd_store.storage.disk_cache import DiskCache
from opd_store.storage.explain import damaged
from opd_store.storage.pieces import Piece
from opd_store.storage.retry import Retry
from opd_store.storage.session import Session, Stats
from opd_store.storage.transport import file_system_class

T = TypeVar("T")

_MAX_PREFETCH_BYTES = 384 << 20
"""What may be on its way or waiting to be used; the oldest goes first."""


class _Process:
    """What belongs to one process: its connections, and what is on its way."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.lock = threading.Lock()
        self.pending: dict[str, tuple[Future[list[Piece]], int]] = {}

    def take(self, key: str) -> Future[list[Piece]] | None:
        with self.lock:
            return self.pending.pop(key, (None, 0))[0]

    def expect(self, key: str, n_bytes: int, work: Coroutine[Any, Any, list[Piece]]) -> None:
        with self.lock:
            self.pending[key] = self.session.start(work), n_bytes
            total = sum(size for _, size in self.pending.values())
            for oldest in list(self.pending)[:-1]:
                if total <= _MAX_PREFETCH_BYTES:
                    break
                future, size = self.pending.pop(oldest)
                future.cancel()
                total -= size


class RemoteStorage:
    """A URL prefix that is read through fsspec.

    May be shared by threads, inherited by forked processes and pickled; connections are never passed on.
    Pickling passes the storage options, credentials included.
    """

    is_local = False

    def __init__(
        self,
        address: Address,
        options: Mapping[str, object],
        *,
        cache: DiskCache | None = None,
        retry: Retry | None = None,
    ) -> None:
        """Makes no connection yet.

        Raises:
            InvalidArgumentError: the package for this protocol is missing.
        """
        file_system_class(address)
        self._address, self._options, self._cache = address, dict(options), cache
        self._retry = retry or Retry()
        # By process id: what another process made is never used.
        self._processes: dict[int, _Process] = {}

    def __repr__(self) -> str:
        return f"<RemoteStorage {self.uri}>"

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_processes": {}}

    @property
    def uri(self) -> str:
        """The root as the user wrote it, without passwords and query."""
        return self._address.shown

    @property
    def stats(self) -> Stats:
        """Requests and bytes of this process."""
        return self._process().session.stats

    def describe(self, name: str) -> str:
        """The full name of a file, for messages."""
        return self._address.describe(name)

    def versions(self) -> list[int]:
        """Numbers of all manifests, rising; empty where there is no cache.

        A web server has no listings, so it is asked for single versions.

        Raises:
            CacheNotFoundError: there is no such bucket.
            StorageError: access denied, or out of reach.
        """
        session = self._process().session
        return _result(session.start(session.versions()))

    def read(self, name: str, limit: int) -> bytes:
        """A whole small file. As nobody knows its digest beforehand, it is fetched twice and compared.

        Raises:
            CacheNotFoundError: there is no such file.
            IntegrityError: larger than `limit`.
            StorageError: access denied, or out of reach.
        """
        session = self._process().session
        data = _result(session.start(session.small(name, limit + 1)))
        if len(data) > limit:
            where = self.describe(name)
            raise IntegrityError(f"{where}: larger than the limit of {limit} bytes", uri=where)
        return data

    def load(self, name: str, n_bytes: int, sha256: bytes) -> pa.Buffer:
        """A whole file, compared with its digest; kept in the disk cache.

        Raises:
            IntegrityError: it is missing, or not the one with this digest.
            StorageError: access denied, or out of reach.
        """
        key = sha256.hex()
        if self._cache is not None:
            cached = self._cache.get(key, n_bytes, lambda data: hashlib.sha256(data).digest() == sha256)
            if cached is not None:
                return cached
        session = self._process().session
        seen: set[bytes] = set()
        came_twice = False
        for _ in range(self._retry.tries):
            found = _result(session.start(session.whole(name, n_bytes)))
            hasher = hashlib.sha256()
            for _, data in found:
                hasher.update(data)
            if hasher.digest() == sha256:
                return self._keep(key, n_bytes, found, 0)
            came_twice = hasher.digest() in seen
            if came_twice:
                break
            seen.add(hasher.digest())
        text = f"not the {n_bytes} bytes with the digest in its name"
        raise damaged(self.describe(name), text, came_twice=came_twice)

    def map(self, name: str) -> pa.Buffer:
        """A whole file, unchecked, fetched by concurrent ranges and not kept.

        Raises:
            IntegrityError: the file is missing although a manifest names it.
            StorageError: access denied, or out of reach.
        """
        session = self._process().session
        n_bytes = _result(session.start(session.size(name)))
        return pieces.assemble(n_bytes, _result(session.start(session.whole(name, n_bytes))), 0)

    def span(self, name: str, start: int, end: int) -> list[bytes]:
        """Bytes [start, end) of a file in order, unchecked, fetched by concurrent ranges and not kept.

        Raises:
            IntegrityError: the file is missing, or ends before.
            StorageError: access denied, or out of reach.
        """
        session = self._process().session
        return [data for _, data in _result(session.start(session.whole(name, end, start)))]

    def open_shard(self, info: ShardInfo) -> RemoteShard:
        """A shard, of which nothing is fetched yet."""
        return RemoteShard(self, info)

    def batch(self, info: ShardInfo, number: int, parts: tuple[int, ...]) -> pa.Buffer:
        """Parts of a record batch. See `RemoteShard.batch`."""
        key = pieces.key(info, number, parts)
        slices = part_slices(info, number)
        start, end = slices[0][0], slices[-1][0] + slices[-1][1]
        if self._cache is not None:
            cached = self._cache.get(key, end - start, lambda data: pieces.is_intact(data, slices, parts))
            if cached is not None:
                return cached
        process = self._process()
        future = process.take(key) or process.session.start(self._fetch(process, info, number, parts))
        return self._keep(key, end - start, _result(future), start)

    def prefetch(self, info: ShardInfo, number: int, parts: tuple[int, ...]) -> None:
        """Start to fetch what `batch` will be asked for."""
        key = pieces.key(info, number, parts)
        process = self._process()
        if key in process.pending or (self._cache is not None and self._cache.has(key)):
            return
        slices = part_slices(info, number)
        n_bytes = sum(slices[part][1] for part in parts)
        process.expect(key, n_bytes, self._fetch(process, info, number, parts))

    def _fetch(
        self, process: _Process, info: ShardInfo, number: int, parts: tuple[int, ...]
    ) -> Coroutine[Any, Any, list[Piece]]:
        slices = part_slices(info, number)
        return process.session.pieces(info.path, pieces.spans([slices[part] for part in parts]))

    def _keep(self, key: str, size: int, found: list[Piece], start: int) -> pa.Buffer:
        kept = None
        if self._cache is not None:
            kept = self._cache.put(key, size, [(offset - start, data) for offset, data in found])
        return pieces.assemble(size, found, start) if kept is None else kept

    def _process(self) -> _Process:
        process = self._processes.get(os.getpid())
        if process is None:
            made = _Process(Session(self._address, self._options, self._retry))
            # Of two threads that come here at once, both go on with what one made.
            process = self._processes.setdefault(os.getpid(), made)
        return process


class RemoteShard:
    """A shard in a bucket: a `ShardSource` with one range request for parts that touch."""

    def __init__(self, storage: RemoteStorage, info: ShardInfo) -> None:
        self._storage, self._info = storage, info

    def batch(self, number: int, parts: tuple[int, ...]) -> pa.Buffer:
        """Record batch `number` as a read-only buffer of its whole length with the bytes of `parts`.

        They were compared with their checksums. Other bytes are mostly zeros, which take no memory.

        Raises:
            IntegrityError: they are missing, or not the ones that were written.
            StorageError: access denied, or out of reach.
        """
        return self._storage.batch(self._info, number, parts)

    def prefetch(self, number: int, parts: tuple[int, ...]) -> None:
        """Start to fetch these parts, and return at once. What goes wrong is said by `batch`."""
        self._storage.prefetch(self._info, number, parts)


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except BaseException:
        # What nobody waits for after Ctrl-C need not go on.
        future.cancel()
        raise
