"""The requests of one process to one place: how many at once, tried how often, checked how."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from opd_store import layout
from opd_store.errors import OpdError, StorageError
from opd_store.hashing import crc32c
from opd_store.storage.address import Address
from opd_store.storage.explain import damaged, describe_credentials, explain
from opd_store.storage.failures import Failure, Kind, TransportError, judge, secrets_of
from opd_store.storage.pieces import Piece, Slice, what_is_wrong
from opd_store.storage.retry import GaveUp, Retry
from opd_store.storage.transport import Transport, connect

T = TypeVar("T")

_CONCURRENT = 16
_RANGE_BYTES = 8 << 20
"""Whole files are fetched in ranges of this size."""


_made: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
"""Every file system object of this process, by address: those with equal options are equal."""
_inherited: list[object] = []
"""Those of the parent of a forked process. Kept for ever: for one that is collected, its library waits a
second for a thread that is not there."""


class Stats:
    """Counts what went over the network. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests = 0
        """Attempts, those that failed included."""
        self.n_bytes = 0
        """Bytes of file data received, damaged ones included."""

    def add(self, requests: int, n_bytes: int) -> None:
        """Count."""
        with self._lock:
            self.requests += requests
            self.n_bytes += n_bytes


class Session:
    """Connections of one process. Its coroutines run in fsspec's thread, see `start`."""

    def __init__(self, address: Address, options: Mapping[str, object], retry: Retry) -> None:
        """Makes no connection yet.

        Raises:
            StorageError: the library does not take these options.
        """
        import fsspec.asyn

        self._address, self._options, self._retry = address, options, retry
        self._secrets = address.secrets | secrets_of(options)
        self._loop: asyncio.AbstractEventLoop = fsspec.asyn.get_loop()
        self._slots = asyncio.Semaphore(_CONCURRENT)
        self._transport = self._connect()
        self.stats = Stats()
        _made[id(self._transport.fs)] = self._transport.fs

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine of this object."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def versions(self) -> list[int]:
        """Numbers of all manifests, rising."""
        if not self._transport.can_list:
            return list(range(1, await self._last_version() + 1))
        try:
            names = await self._twice(lambda: self._counted(self._transport.list(layout.MANIFEST_DIR)))
        except GaveUp as error:
            failure = error
        else:
            return sorted({int(name[:8]) for name in names if layout.MANIFEST_NAME.fullmatch(name)})
        if failure.failure.kind is Kind.MISSING:
            return []
        raise self._explained(failure, layout.MANIFEST_DIR, is_named=False)

    async def small(self, name: str, n_bytes: int) -> bytes:
        """The first bytes of a file whose digest nobody knows."""
        try:
            return await self._twice(lambda: self._get(name, 0, n_bytes))
        except GaveUp as error:
            failure = error
        raise self._explained(failure, name, is_named=False)

    async def size(self, name: str) -> int:
        """Bytes of a file that must be there."""
        try:
            return await self._try(lambda: self._counted(self._transport.size(name)))
        except GaveUp as error:
            failure = error
        raise self._explained(failure, name)

    async def whole(self, name: str, n_bytes: int, first: int = 0) -> list[Piece]:
        """Bytes [first, n_bytes) of a file, unchecked, by concurrent ranges."""
        starts = range(first, n_bytes, _RANGE_BYTES)
        return await self.pieces(
            name, [[(start, min(_RANGE_BYTES, n_bytes - start), -1)] for start in starts]
        )

    async def pieces(self, name: str, spans: list[list[Slice]]) -> list[Piece]:
        """What each span covers, gaps included. Slices are compared with their CRC-32C, unless that is -1.

        Raises:
            IntegrityError: missing, too short, or other bytes than were written.
            StorageError: out of reach.
        """
        return await asyncio.gather(*(self._piece(name, span) for span in spans))

    async def _piece(self, name: str, span: list[Slice]) -> Piece:
        start, end = span[0][0], span[-1][0] + span[-1][1]
        wrong: set[tuple[int, int]] = set()

        async def attempt() -> bytes:
            data = await self._get(name, start, end)
            text = what_is_wrong(data, start, end, span)
            if not text:
                return data
            found = (len(data), crc32c(data))
            # The same wrong bytes twice are no accident on the way.
            kind = Kind.DAMAGED if found in wrong else Kind.PASSING
            wrong.add(found)
            raise TransportError(Failure(kind, text))

        try:
            return start, await self._try(attempt, n_bytes=end - start)
        except GaveUp as error:
            failure = error
        if wrong:
            where, text = self._address.describe(name), f"bytes [{start}, {end}): {failure.failure.text}"
            raise damaged(where, text, came_twice=failure.failure.kind is Kind.DAMAGED)
        raise self._explained(failure, name)

    async def _last_version(self) -> int:
        """Versions have no gaps, so double the number while it exists, then halve the interval."""
        low, high = 0, 1
        while high <= layout.MAX_VERSION and await self._has_version(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if await self._has_version(middle) else (low, middle)
        if low and not await self._has_version(low):
            # Access ended in the meantime, so what exists may have seemed not to.
            raise StorageError(f"{self._address.shown}: access denied while versions were looked for")
        return low

    async def _has_version(self, version: int) -> bool:
        name = layout.manifest_path(version)
        for _ in range(2):
            try:
                await self._try(lambda: self._get(name, 0, 1))
            except GaveUp as error:
                failure = error
            else:
                return True
            # Buckets that may not be listed say 403, and say it again, for what is not there.
            if failure.failure.kind is Kind.MISSING:
                return False
            if failure.failure.kind is not Kind.DENIED or version == 1:
                raise self._explained(failure, name, is_named=False)
        return False

    async def _get(self, name: str, start: int, end: int) -> bytes:
        data = await self._counted(self._transport.get(name, start, end))
        self.stats.add(0, len(data))
        return data

    def _counted(self, request: Awaitable[T]) -> Awaitable[T]:
        self.stats.add(1, 0)
        return request

    async def _try(self, attempt: Callable[[], Awaitable[T]], *, n_bytes: int = 0) -> T:
        async with self._slots:
            await self._prepare()
            return await self._retry.run(attempt, lambda error: judge(error, self._secrets), n_bytes=n_bytes)

    async def _prepare(self) -> None:
        try:
            return await self._transport.prepare()
        except Exception as error:
            failure = judge(error, self._secrets)
        raise GaveUp(failure, 1, 0.0)

    async def _twice(self, get: Callable[[], Awaitable[T]]) -> T:
        """What two requests agree on: a checksum for what has none."""

        async def attempt() -> T:
            first, second = await asyncio.gather(get(), get())
            if first != second:
                raise TransportError(Failure(Kind.PASSING, "two requests brought different bytes"))
            return first

        return await self._try(attempt)

    def _explained(self, error: GaveUp, name: str, *, is_named: bool = True) -> OpdError:
        credentials = describe_credentials(self._address, self._options)
        return explain(error, self._address.describe(name), credentials, is_named=is_named)

    def _connect(self) -> Transport:
        try:
            return connect(self._address, self._options, self._retry)
        except OpdError:
            raise
        except Exception as error:
            failure = judge(error, self._secrets)
        raise StorageError(f"{self._address.shown}: cannot use these storage options: {failure.text}")


def _keep_inherited() -> None:
    _inherited.extend(_made.values())
    _made.clear()


os.register_at_fork(after_in_child=_keep_inherited)
