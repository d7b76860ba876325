"""Where a command's new cache goes: built out of sight, there whole or not at all, resumable until it is."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import opd_store
from opd_store import (
    Cache,
    CacheExistsError,
    CacheMeta,
    CacheNotFoundError,
    FormatError,
    IntegrityError,
    InvalidArgumentError,
    InvalidRolloutError,
    MismatchError,
    OpdError,
    Rollout,
    StorageError,
    Version,
    Writer,
    snapshot,
)
from opd_store.storage import resolve_writable
from opd_store.writer import DEFAULT_BATCH_BYTES

REQUEST = "opd_request"
"""Field of `CacheMeta.extra` that tells whether a cache is what a command would make."""
_FILE = "file://"
Add = Callable[[Writer], object]
"""Adds one rollout, such as by `Writer.copy`."""


def request(verb: str, *parts: object) -> str:
    """Digest of what a command was asked to do: the verb, and everything that its result depends on."""
    text = "\0".join(map(str, (verb, *parts)))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def build(
    uri: str,
    rollouts: Callable[[], Iterable[Rollout]],
    *,
    meta: CacheMeta,
    access: dict[str, Any],
    final_meta: Callable[[], CacheMeta] | None = None,
    commit_every: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    shard_bytes: int = 256 << 20,
    max_error: float = 0.0,
    **schema: Any,  # noqa: ANN401
) -> tuple[Version, bool]:
    """Write rollouts to a new cache at `uri`, a path or a URL.

    Work lies beside a path as NAME.partial, or for a URL below the user's cache directory, until it is
    complete. The same command goes on there after a kill, and changes nothing once it is done.

    Args:
        rollouts: called for all of them, always in the same order; those that are there already are skipped.
        meta: has to have `REQUEST` in `extra`.
        final_meta: called when all are written, for provenance that is known only then; may differ in
            `extra` alone.
        commit_every: rollouts after which work is safe from a kill, each time at the cost of a shorter
            shard; None commits whenever a shard is full.
        on_progress: called with rollouts seen.
        max_error: as for `opd_store.Writer.append`.
        schema: as for `opd_store.create`.

    Returns:
        The version, and whether it was there before.

    Raises:
        CacheExistsError: something else is there, or another command is at work there.
        FormatError, InvalidRolloutError, InvalidArgumentError: the rollouts are at fault; nothing is kept.
        StorageError: the disk refused; the same command goes on.
    """

    def additions(_: int) -> Iterator[Add]:
        for rollout in rollouts():
            yield lambda writer, rollout=rollout: writer.append(rollout, max_error=max_error)  # type: ignore[misc]

    return build_from(
        uri,
        additions,
        meta=meta,
        access=access,
        final_meta=final_meta,
        commit_every=commit_every,
        on_progress=on_progress,
        shard_bytes=shard_bytes,
        **schema,
    )


def build_from(
    uri: str,
    additions: Callable[[int], Iterable[Add]],
    *,
    meta: CacheMeta,
    access: dict[str, Any],
    final_meta: Callable[[], CacheMeta] | None = None,
    commit_every: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    shard_bytes: int = 256 << 20,
    **schema: Any,  # noqa: ANN401
) -> tuple[Version, bool]:
    """As `build`, for whoever knows which rollouts a cache has that already holds so many.

    Args:
        additions: called with how many rollouts are there already; gives what adds the others, always in the
            same order. What adds one that is there changes nothing.
    """
    place = _absolute(uri)
    partial = partial_path(place)
    if (found := _existing(place, meta, access)) is not None:
        _forget(partial, meta)
        return Version(found.version, found.digest, f"{uri}@{found.digest}"), True
    with _locked(partial):
        # The command that held the lock before may have finished.
        if (found := _existing(place, meta, access)) is not None:
            _discard(partial)
            return Version(found.version, found.digest, f"{uri}@{found.digest}"), True
        try:
            writer = _writer(partial, meta, shard_bytes, schema)
        except InvalidArgumentError:
            _remove_if_empty(partial)
            raise
        there = 0 if writer.base is None else len(writer.base)
        try:
            with writer:
                for number, add in enumerate(additions(there), 1):
                    add(writer)
                    if writer.at_shard_end if commit_every is None else number % commit_every == 0:
                        writer.commit()
                    if on_progress is not None:
                        on_progress(number)
        except IntegrityError:
            # Somebody fetches the damaged file again, and then this goes on.
            raise
        except (FormatError, InvalidRolloutError, InvalidArgumentError, MismatchError):
            _discard(partial)
            raise
        final = meta if final_meta is None else final_meta()
        version = _place(opd_store.open(partial), place, partial, access, meta=final)
    return dataclasses.replace(version, uri=f"{uri}@{version.digest}"), False


def is_local(uri: str) -> bool:
    """Whether it is a path."""
    return "://" not in uri or uri.startswith(_FILE)


def local_path(uri: str) -> Path:
    """The path that a local URI means."""
    return Path(uri.removeprefix(_FILE))


def partial_path(uri: str) -> Path:
    """Where a cache that goes to `uri` is built."""
    if is_local(uri):
        path = Path(os.path.abspath(local_path(uri)))
        return path.with_name(path.name + ".partial")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "opd" / "building" / hashlib.sha256(uri.encode()).hexdigest()[:24]


def _absolute(uri: str) -> str:
    """The same place, however the address was written."""
    return os.path.abspath(local_path(uri)) if is_local(uri) else uri.rstrip("/")


def _place(cache: Cache, uri: str, partial: Path, access: dict[str, Any], *, meta: CacheMeta) -> Version:
    """Give a finished local cache its place, and remove it where it was built."""
    whole = partial.with_name(partial.name + ".whole")
    _discard(whole)
    version = snapshot(cache, whole, meta=meta)
    _discard(whole / "tmp")
    if is_local(uri):
        try:
            whole.rename(uri)
            _sync(whole.parent)
        except OSError as error:
            raise _storage_error(Path(uri), "cannot be put in place", error) from error
    else:
        # Not above: it needs `is_local` from here.
        from opd_tools.share.transfer import upload

        upload(whole, uri, access)
        _discard(whole)
    _discard(partial)
    return version


def _existing(uri: str, meta: CacheMeta, access: dict[str, Any]) -> Cache | None:
    if "@sha256:" in uri:
        raise InvalidArgumentError(f"{uri}: a pinned version cannot be written to")
    if is_local(uri) and (path := Path(uri)).exists() and not path.is_dir():
        raise CacheExistsError(f"{uri}: is a file; choose another path")
    try:
        cache = opd_store.open(uri, **({} if is_local(uri) else access))
    except CacheNotFoundError:
        if is_local(uri) and Path(uri).exists() and any(Path(uri).iterdir()):
            raise CacheExistsError(f"{uri}: not empty, and no cache; choose another path") from None
        return None
    if cache.meta.extra.get(REQUEST) != meta.extra[REQUEST]:
        raise CacheExistsError(f"{uri}: holds another cache; choose another path, or remove it")
    return cache


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold a lock while a cache is built in a directory, which is made; it vanishes with the process.

    Raises:
        CacheExistsError: another process builds there.
        StorageError: nothing can be created there, or the file system has no locks.
    """
    lock = _lock_path(partial)
    while True:
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            # Beside it, since a file in use keeps some file systems from removing a directory. For writing,
            # although nothing is written: NFS gives no exclusive lock without it.
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _storage_error(lock, "cannot create", error) from error
        try:
            if _is_ours(descriptor, lock):
                try:
                    partial.mkdir(exist_ok=True)
                except OSError as error:
                    lock.unlink()
                    raise _storage_error(partial, "cannot create", error) from error
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)


def _is_ours(descriptor: int, lock: Path) -> bool:
    """Take the lock; False where the command that had it has removed the file since it was opened."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CacheExistsError(f"{lock}: another command is at work there; wait for it") from None
    except OSError as error:
        raise _storage_error(lock, "cannot lock", error) from error
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


def _lock_path(partial: Path) -> Path:
    return partial.with_name(partial.name + ".lock")


def _storage_error(path: Path, what: str, error: OSError) -> StorageError:
    return StorageError(f"{path}: {what}: {error.strerror}", errno=error.errno, filename=str(path))


def _forget(partial: Path, meta: CacheMeta) -> None:
    """Remove what a command left that was killed when its cache had its place."""
    whole = partial.with_name(partial.name + ".whole")
    if not (partial.exists() or whole.exists() or _lock_path(partial).exists()):
        return
    # Whoever is at work there will do it.
    with contextlib.suppress(CacheExistsError, StorageError), _locked(partial):
        try:
            ours = opd_store.open(partial).meta.extra.get(REQUEST) == meta.extra[REQUEST]
        except OpdError:
            # Half removed, unless it is somebody's own.
            ours = resolve_writable(partial).is_empty()
        if ours:
            _discard(whole)
            _discard(partial)


def _discard(directory: Path) -> None:
    """Remove what is not needed any more; what cannot be removed now costs room, and nothing else."""
    shutil.rmtree(directory, ignore_errors=True)


def _remove_if_empty(partial: Path) -> None:
    with contextlib.suppress(OSError):
        partial.rmdir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _writer(partial: Path, meta: CacheMeta, shard_bytes: int, schema: dict[str, Any]) -> Writer:
    sizes: dict[str, Any] = {"shard_bytes": shard_bytes}
    if shard_bytes < DEFAULT_BATCH_BYTES:
        # A shard is not finished within a record batch.
        sizes["batch_bytes"] = shard_bytes
    try:
        base = opd_store.open(partial)
    except CacheNotFoundError:
        return opd_store.create(partial, meta=meta, **sizes, **schema)
    if base.meta.extra.get(REQUEST) != meta.extra[REQUEST] or base.meta != meta:
        raise CacheExistsError(
            f"{partial}: was begun by another command; remove it to start anew, or choose another path"
        )
    return opd_store.append(partial, meta=meta, **sizes)
