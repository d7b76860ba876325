"""Where a command's new cache goes: built out of sight, there whole or not at all, resumable until it is."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec

import opd_store
from opd_store import (
    Cache,
    CacheExistsError,
    CacheMeta,
    CacheNotFoundError,
    FormatError,
    InvalidArgumentError,
    InvalidRolloutError,
    MismatchError,
    Rollout,
    Version,
    Writer,
    diff_meta,
    snapshot,
)

REQUEST = "opd_request"
"""Field of `CacheMeta.extra` that tells whether a cache is what a command would make."""


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
    commit_every: int = 4096,
    on_progress: Callable[[int], None] | None = None,
    shard_bytes: int = 256 << 20,
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
        on_progress: called with rollouts seen.
        schema: as for `opd_store.create`.

    Returns:
        The version, and whether it was there before.

    Raises:
        CacheExistsError: something else is there.
        FormatError, InvalidRolloutError, InvalidArgumentError: the rollouts are at fault; nothing is kept.
        StorageError: the disk refused; the same command goes on.
    """
    if (found := _existing(uri, meta, access)) is not None:
        return Version(found.version, found.digest, f"{found.uri}@{found.digest}"), True
    partial = partial_path(uri)
    writer = _writer(partial, meta, shard_bytes, schema)
    try:
        with writer:
            for number, rollout in enumerate(rollouts(), 1):
                writer.append(rollout)
                if number % commit_every == 0:
                    writer.commit()
                if on_progress is not None:
                    on_progress(number)
    except (FormatError, InvalidRolloutError, InvalidArgumentError, MismatchError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    cache = opd_store.open(partial)
    return publish(cache, uri, access, meta=meta if final_meta is None else final_meta()), False


def publish(cache: Cache, uri: str, access: dict[str, Any], *, meta: CacheMeta) -> Version:
    """Give a finished local cache its place, and remove it where it was built."""
    source, partial = Path(cache.uri), partial_path(uri)
    whole = partial.with_name(partial.name + ".whole")
    shutil.rmtree(whole, ignore_errors=True)
    version = snapshot(cache, whole, meta=meta)
    shutil.rmtree(whole / "tmp", ignore_errors=True)
    if is_local(uri):
        whole.rename(local_path(uri))
    else:
        from opd_tools.share.transfer import upload

        upload(whole, uri, access)
        shutil.rmtree(whole)
    shutil.rmtree(source)
    return dataclasses.replace(version, uri=f"{uri}@{version.digest}")


def is_local(uri: str) -> bool:
    """Whether it is a path."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def local_path(uri: str) -> Path:
    """The path that a local URI means."""
    return Path(fsspec.core.strip_protocol(uri)) if "://" in uri else Path(uri)


def partial_path(uri: str) -> Path:
    """Where a cache that goes to `uri` is built."""
    if is_local(uri):
        path = local_path(uri)
        return path.with_name(path.name + ".partial")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "opd" / "building" / hashlib.sha256(uri.encode()).hexdigest()[:24]


def _existing(uri: str, meta: CacheMeta, access: dict[str, Any]) -> Cache | None:
    if "@sha256:" in uri:
        raise InvalidArgumentError(f"{uri}: a pinned version cannot be written to")
    try:
        cache = opd_store.open(uri, **({} if is_local(uri) else access))
    except CacheNotFoundError:
        if is_local(uri) and local_path(uri).exists() and any(local_path(uri).iterdir()):
            raise CacheExistsError(f"{uri}: not empty, and no cache; choose another path") from None
        return None
    if cache.meta.extra.get(REQUEST) != meta.extra[REQUEST]:
        raise CacheExistsError(f"{uri}: holds another cache; choose another path, or remove it")
    return cache


def _writer(partial: Path, meta: CacheMeta, shard_bytes: int, schema: dict[str, Any]) -> Writer:
    try:
        base = opd_store.open(partial)
    except CacheNotFoundError:
        return opd_store.create(partial, meta=meta, shard_bytes=shard_bytes, **schema)
    for name, expected, found in diff_meta(meta, base.meta):
        raise MismatchError(
            f"{partial}: was begun by another command ({name} is {found}, not {expected}); "
            "remove it to start anew",
            field=name,
            expected=expected,
            found=found,
        )
    return opd_store.append(partial, meta=meta, shard_bytes=shard_bytes)
