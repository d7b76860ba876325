"""Where a cache lives: a directory, or a bucket that is read through fsspec. Other modules see relative names
only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from opd_store.errors import InvalidArgumentError
from opd_store.storage.address import WRITE_LOCALLY, parse
from opd_store.storage.disk_cache import DEFAULT_CACHE_BYTES, DiskCache
from opd_store.storage.local import LocalStorage, TempFile, is_held, make_directory, sync_directory
from opd_store.storage.remote import RemoteShard, RemoteStorage
from opd_store.storage.retry import Retry
from opd_store.storage.session import Stats

__all__ = [
    "DEFAULT_CACHE_BYTES",
    "LocalStorage",
    "RemoteShard",
    "RemoteStorage",
    "Retry",
    "Stats",
    "Storage",
    "TempFile",
    "is_held",
    "make_directory",
    "resolve",
    "resolve_writable",
    "sync_directory",
]


Storage = LocalStorage | RemoteStorage
"""What reading takes: both know `describe`, `versions`, `read`, `load` and `map`; see there."""


def resolve(
    uri: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    retry: Retry | None = None,
) -> tuple[Storage, str | None]:
    """Split `path[@sha256:...]` or `url[@sha256:...]` into storage and pin. Nothing is read yet.

    Args:
        storage_options: what the fsspec file system of the URL takes, such as `key` and `secret`.
        cache_dir: directory that keeps what was fetched; None keeps nothing. Local caches need none.
        cache_bytes: what the directory may hold; the least recently used goes first.
        retry: how long to try again; None is the default.

    Raises:
        InvalidArgumentError: a protocol that cannot be read, a package that it needs and that is missing, or
            storage options for a local path.
    """
    address, pin = parse(os.fspath(uri))
    if address.protocol == "file":
        if storage_options:
            raise InvalidArgumentError(f"{address.shown}: a local path takes no storage options")
        return LocalStorage(Path(address.url)), pin
    cache = None if cache_dir is None else DiskCache(os.path.abspath(cache_dir), cache_bytes)
    return RemoteStorage(address, storage_options or {}, cache=cache, retry=retry or Retry()), pin


def resolve_writable(uri: str | os.PathLike[str]) -> LocalStorage:
    """The directory that a writer may use.

    Raises:
        InvalidArgumentError: a URL, or a pinned version.
    """
    address, pin = parse(os.fspath(uri))
    if address.protocol != "file":
        raise InvalidArgumentError(f"{address.shown}: {WRITE_LOCALLY}")
    if pin is not None:
        raise InvalidArgumentError(f"{uri}: a pinned version cannot be written to")
    return LocalStorage(Path(address.url))
