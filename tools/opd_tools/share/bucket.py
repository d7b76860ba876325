"""A bucket as a place to send files to, through fsspec."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from opd_store import InvalidArgumentError, StorageError
from opd_store.storage import RemoteStorage, resolve
from opd_store.storage.address import EXTRAS, parse
from opd_store.storage.failures import Kind
from opd_store.storage.retry import GaveUp
from opd_store.storage.transport import connect
from opd_tools.share.attempts import Attempts
from opd_tools.share.places import TRIES, Item, arrived_wrong, read_digest, require_intact, taken

T = TypeVar("T")

_PART = 8 << 20
"""Larger files go in parts of this size; S3 takes 10,000 of them."""
_AT_ONCE = 4


class Bucket:
    """A URL prefix that fsspec can write to: s3, gs, az, abfs, memory."""

    def __init__(self, url: str, access: dict[str, Any]) -> None:
        """Makes no connection yet.

        Raises:
            InvalidArgumentError: a protocol that cannot be written to, or whose package is missing.
        """
        options = dict(access.get("storage_options") or {})
        self._address, pin = parse(url)
        self.shown = self._address.shown
        if pin is not None:
            raise InvalidArgumentError(f"{self.shown}: a pinned version cannot be written to")
        kind = EXTRAS[self._address.protocol]
        if kind == "http":
            raise InvalidArgumentError(f"{self.shown}: web servers are read only; use s3, gs, az or hf")
        storage, _ = resolve(url, storage_options=options)
        assert isinstance(storage, RemoteStorage)
        self._storage, self._attempts = storage, Attempts(self._address, options)
        try:
            self._transport = connect(self._address, options, self._attempts.retry)
        except InvalidArgumentError:
            raise
        except Exception as error:
            failure = self._attempts.judge(error)
            raise StorageError(f"{self.shown}: cannot use these storage options: {failure.text}") from None
        self._fs = self._transport.fs
        self._root = str(self._fs._strip_protocol(self._address.url))
        self._how: dict[str, Any] = {"chunksize": _PART} if kind in ("s3", "gcs") else {}
        if kind == "s3":
            self._how["max_concurrency"] = _AT_ONCE
        self._sum_proves = {"s3": _etag_proves, "gcs": _md5_proves}.get(kind)

    def versions(self) -> list[int]:
        return self._storage.versions()

    def declared(self, items: list[Item]) -> set[str]:
        found: dict[str, dict[str, Any]] = {}
        for directory in sorted({item.name.rpartition("/")[0] for item in items}):
            found |= self._list(directory)
        there = set()
        for item in items:
            info = found.get(item.name)
            if info is None or int(info.get("size") or 0) != item.n_bytes:
                continue
            by_size = self._sum_proves is None and isinstance(item.source, Path)
            if by_size or self._proves(item, info):
                there.add(item.name)
        return there

    def proves(self, item: Item) -> bool:
        info = self._info(item.name)
        return info is not None and self._proves(item, info)

    def send(self, items: list[Item], what: str, on_bytes: Callable[[int], None]) -> None:
        lock = threading.Lock()

        def one(item: Item) -> None:
            self._send(item)
            with lock:
                on_bytes(item.n_bytes)

        in_order = [item for item in items if item.create_only]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            futures = [pool.submit(one, item) for item in items if not item.create_only]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for item in in_order:
            one(item)

    def _send(self, item: Item) -> None:
        where = self._address.describe(item.name)
        for _ in range(TRIES):
            self._put(item)
            # Also where a reply was lost: what is there decides.
            if self.proves(item):
                return
            if item.create_only:
                raise taken(where)
        raise arrived_wrong(where, item)

    def _put(self, item: Item) -> None:
        target = f"{self._root}/{item.name}"

        async def attempt() -> None:
            if isinstance(item.source, Path):
                await self._call("put_file", str(item.source), target, **self._how)
                return
            how = {"mode": "create"} if item.create_only else {}
            try:
                await self._call("pipe_file", target, item.source, **how)
            except FileExistsError:
                return
            except Exception as error:
                # Some say so by the status of a failed precondition only.
                if item.create_only and "HTTP 412" in self._attempts.judge(error).text:
                    return
                raise

        try:
            self._try(attempt, n_bytes=item.n_bytes)
        except GaveUp as error:
            failure = error
        else:
            return
        raise self._attempts.error(failure, item.name)

    def _list(self, directory: str) -> dict[str, dict[str, Any]]:
        """What is in a directory by name; empty where there is none."""

        async def attempt() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            path = f"{self._root}/{directory}".rstrip("/")
            return list(await self._call("ls", path, detail=True))

        try:
            found = self._try(attempt)
        except GaveUp as error:
            if error.failure.kind in (Kind.MISSING, Kind.NO_BUCKET):
                return {}
            failure = error
        else:
            prefix = f"{directory}/" if directory else ""
            return {prefix + str(info["name"]).rstrip("/").rpartition("/")[2]: info for info in found}
        raise self._attempts.error(failure, directory)

    def _info(self, name: str) -> dict[str, Any] | None:
        async def attempt() -> dict[str, Any]:
            self._fs.invalidate_cache()
            return dict(await self._call("info", f"{self._root}/{name}"))

        try:
            return self._try(attempt)
        except GaveUp as error:
            if error.failure.kind in (Kind.MISSING, Kind.NO_BUCKET):
                return None
            failure = error
        raise self._attempts.error(failure, name)

    def _proves(self, item: Item, info: dict[str, Any]) -> bool:
        if int(info.get("size") or 0) != item.n_bytes:
            return False
        if self._sum_proves is not None and self._sum_proves(item, info):
            return True
        return read_digest(self._storage, item.name, item.n_bytes) == item.sha256

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if self._fs.async_impl:
            return await getattr(self._fs, f"_{method}")(*args, **kwargs)
        return await asyncio.to_thread(getattr(self._fs, method), *args, **kwargs)

    def _try(self, attempt: Callable[[], Awaitable[T]], *, n_bytes: int = 0) -> T:
        async def prepared() -> T:
            await self._transport.prepare()
            return await attempt()

        return self._attempts.run(prepared, n_bytes=n_bytes)


def _etag_proves(item: Item, info: dict[str, Any]) -> bool:
    """Whether the ETag is the MD5 of the file, or that of the MD5s of its parts: S3 makes it of what it got.
    With encryption by a key of one's own it is something else, which proves nothing.
    """
    found = str(info.get("ETag") or "").strip('"')
    whole, parts = _md5s(item)
    of_parts = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    return found in (whole.hex(), f"{of_parts}-{len(parts)}")


def _md5_proves(item: Item, info: dict[str, Any]) -> bool:
    return info.get("md5Hash") == base64.b64encode(_md5s(item)[0]).decode()


def _md5s(item: Item) -> tuple[bytes, list[bytes]]:
    """MD5 of the file, and of its parts. Against accidents, as nothing else is known of what arrived.

    Raises IntegrityError where the file here is not what its name says: it would arrive as it is.
    """
    sha256, whole = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    parts = []
    n_bytes = 0
    for data in item.pieces():
        sha256.update(data)
        whole.update(data)
        if n_bytes % _PART == 0:
            parts.append(hashlib.md5(usedforsecurity=False))
        parts[-1].update(data)
        n_bytes += len(data)
    require_intact(item, sha256.digest())
    return whole.digest(), [part.digest() for part in parts]
