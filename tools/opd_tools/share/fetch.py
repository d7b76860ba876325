"""Copying a whole cache from anywhere into a directory, file by file, every byte proven."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import opd_store
from opd_store import CacheExistsError, CacheNotFoundError, IntegrityError, StorageError
from opd_store.storage import LocalStorage, RemoteStorage, Storage, resolve
from opd_store.storage.explain import damaged
from opd_tools.share.contents import Contents, File, contents
from opd_tools.share.places import TRIES, Item, digest_of, read_windows
from opd_tools.share.signature import signature_of
from opd_tools.share.transfer import OnBytes

ORIGIN = "origin.json"
"""File beside a fetched cache that says where it came from."""
_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Fetched:
    """A cache that is here now."""

    uri: str
    """Where it came from, pinned."""
    digest: str
    rollouts: int
    n_bytes: int
    """Of its files; what a run before this one had fetched is counted too."""
    existed: bool
    """Whether it was here before, whole."""


def download(
    url: str, directory: Path, access: dict[str, Any], *, on_bytes: OnBytes | None = None
) -> Fetched:
    """Copy one version of a cache, and the manifests of those before it: the same files, the same digest.

    Work lies beside the directory as NAME.partial until it is complete; the same call goes on there, inside
    of a file too.

    Args:
        url: a path or URL, pinned by @sha256:... or else the newest version.
        access: keywords of `opd_store.open`; `storage_options` are used.

    Raises:
        CacheExistsError: something else is there, or another call is at work there.
        CacheNotFoundError, FormatError, IntegrityError: the source is missing or damaged.
        StorageError: the source is out of reach, or the disk refused; the same call goes on.
    """
    storage, pin = resolve(url, storage_options=access.get("storage_options"))
    found = contents(storage, pin)
    pinned = f"{found.cache.uri}@{found.cache.digest}"
    n_bytes = found.n_bytes
    if _is_here(directory, found.cache.digest):
        return Fetched(pinned, found.cache.digest, len(found.cache), n_bytes, True)
    partial = directory.with_name(directory.name + ".partial")
    with _locked(partial):
        _fetch_files(storage, found, partial, on_bytes)
        for name, data in found.manifests:
            _write(partial / name, data)
            with contextlib.suppress(CacheNotFoundError):
                _write(partial / signature_of(name), storage.read(signature_of(name), 1 << 20))
        _write(partial / ORIGIN, json.dumps({"uri": found.cache.uri, "digest": found.cache.digest}).encode())
        shutil.rmtree(partial / "tmp", ignore_errors=True)
        with _explained(directory):
            if directory.is_dir():
                directory.rmdir()
            partial.rename(directory)
    return Fetched(pinned, found.cache.digest, len(found.cache), n_bytes, False)


def _is_here(directory: Path, digest: str) -> bool:
    try:
        found = opd_store.open(directory)
    except CacheNotFoundError:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise CacheExistsError(f"{directory}: not empty, and no cache; choose another path") from None
        return False
    if found.digest != digest:
        raise CacheExistsError(
            f"{directory}: holds {found.digest}, not {digest}; choose another path, or remove it"
        )
    return True


def _fetch_files(storage: Storage, found: Contents, partial: Path, on_bytes: OnBytes | None) -> None:
    wanted = [*found.shards, *found.tables]
    total, done, lock = sum(file.n_bytes for file in wanted), 0, threading.Lock()

    def count(n_bytes: int) -> None:
        nonlocal done
        with lock:
            done += n_bytes
            if on_bytes is not None:
                on_bytes(min(done, total), total)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures = [pool.submit(_fetch, storage, file, partial, count) for file in wanted]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for file in found.older:
        # Somebody may have tidied up what only older versions need; this one does without.
        with contextlib.suppress(IntegrityError):
            _fetch(storage, file, partial, lambda _: None)


def _fetch(storage: Storage, file: File, root: Path, on_bytes: Callable[[int], None]) -> None:
    """One file into its place. Raises IntegrityError where it is missing or damaged."""
    target = root / file.name
    if target.is_file() and target.stat().st_size == file.n_bytes:
        if digest_of(Item(file.name, target, file.n_bytes, file.sha256).pieces()) == file.sha256:
            on_bytes(file.n_bytes)
            return
        target.unlink()
    part = root / "tmp" / file.sha256.hex()
    seen: set[bytes] = set()
    for _ in range(TRIES):
        found = _append(storage, file, part, on_bytes)
        if found == file.sha256:
            with _explained(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                part.rename(target)
            return
        part.unlink()
        if found in seen:
            break
        seen.add(found)
    text = f"not the {file.n_bytes} bytes with the digest in its name"
    raise damaged(storage.describe(file.name), text, came_twice=found in seen and len(seen) == 1)


def _append(storage: Storage, file: File, part: Path, on_bytes: Callable[[int], None]) -> bytes:
    """Go on with a file of which some bytes may be here, and its digest."""
    with _explained(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a+b") as out:
            out.truncate(min(out.tell(), file.n_bytes))
            out.seek(0)
            hasher, start = hashlib.sha256(), 0
            while data := out.read(1 << 20):
                hasher.update(data)
                start += len(data)
            on_bytes(start)
            for data in _pieces(storage, file, start):
                out.write(data)
                hasher.update(data)
                on_bytes(len(data))
            out.flush()
            os.fsync(out.fileno())
    return hasher.digest()


def _pieces(storage: Storage, file: File, start: int) -> Iterator[bytes]:
    if isinstance(storage, RemoteStorage):
        yield from read_windows(storage, file.name, file.n_bytes, start)
        return
    assert isinstance(storage, LocalStorage)
    path = storage.root / file.name
    try:
        with path.open("rb") as source:
            source.seek(start)
            while data := source.read(1 << 20):
                yield data
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: missing, although the manifest names it.", uri=str(path)) from error


def _write(path: Path, data: bytes) -> None:
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except opd_store.OpdError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write: {error.strerror}. The same command goes on.",
            errno=error.errno,
            filename=str(path),
        ) from error


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    with _explained(partial):
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheExistsError(f"{partial}: another command is at work there; wait for it") from None
        yield
    finally:
        os.close(descriptor)
