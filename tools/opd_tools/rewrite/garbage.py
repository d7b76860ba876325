"""Files of a local cache that no version refers to, and old versions that somebody wants to be rid of."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opd_store import CacheNotFoundError, IntegrityError, StorageError, layout
from opd_store.index import decode_shard_table
from opd_store.manifest import Manifest, decode_manifest, manifest_digest
from opd_store.storage import LocalStorage, is_held, sync_directory
from opd_store.storage.local import TEMP_DIR

_MARKERS = "[0-9]" * 8 + ".removed"
_DIRECTORIES = (layout.SHARD_DIR, layout.INDEX_DIR, layout.TABLE_DIR)


@dataclass(frozen=True, slots=True)
class Garbage:
    """A file that can go."""

    name: str
    """Below the cache's address."""
    n_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Found:
    """What is in a cache besides its versions."""

    garbage: list[Garbage]
    young: list[Garbage]
    """Referred to by nothing, but too young to be sure that nothing will."""
    writers: list[str]
    """Temporary files that a live writer holds."""


def read_manifests(storage: LocalStorage) -> dict[int, Manifest]:
    """Every version by its number.

    Raises:
        CacheNotFoundError: there is none.
        FormatError, IntegrityError: one is damaged, so what it refers to is not known.
    """
    manifests = {}
    for number in storage.versions():
        name = layout.manifest_path(number)
        where = storage.describe(name)
        manifests[number] = decode_manifest(storage.read(name, layout.MAX_MANIFEST_BYTES), where=where)
    if not manifests:
        raise CacheNotFoundError(f"{storage.uri}: no cache here")
    return manifests


def referenced(storage: LocalStorage, manifests: list[Manifest]) -> set[str]:
    """Every file that one of these versions consists of, but manifests.

    Raises:
        FormatError, IntegrityError: a shard table is damaged.
    """
    names: set[str] = set()
    for manifest in manifests:
        if manifest.id_table is not None:
            names.add(manifest.id_table.path)
        for segment in manifest.segments:
            names.add(segment.rollouts.path)
            if segment.shards.path in names:
                continue
            names.add(segment.shards.path)
            ref = segment.shards
            data = storage.load(ref.path, ref.n_bytes, ref.sha256)
            shards = decode_shard_table(data, manifest.schema.n_parts, where=storage.describe(ref.path))
            names.update(shard.path for shard in shards)
    return names


def find(storage: LocalStorage, kept: set[str], *, min_age_s: float) -> Found:
    """Look for shards, index files and id tables beside `kept`, and for what dead writers left."""
    found = Found([], [], [])
    now = time.time()
    for directory in _DIRECTORIES:
        for path in _files(storage.root / directory):
            name = f"{directory}/{path.name}"
            if name in kept or not layout.BLOB_NAME.fullmatch(path.name):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                item = Garbage(name, status.st_size, "no version refers to it")
                (found.garbage if now - status.st_mtime >= min_age_s else found.young).append(item)
    for path in _files(storage.root / TEMP_DIR):
        with contextlib.suppress(FileNotFoundError):
            item = Garbage(f"{TEMP_DIR}/{path.name}", path.stat().st_size, "its writer is gone")
            if is_held(path):
                found.writers.append(item.name)
            else:
                found.garbage.append(item)
    return found


def remove_versions(storage: LocalStorage, manifests: dict[int, Manifest], dropped: list[int]) -> None:
    """Remove the manifests of these versions, the oldest ones, and leave word of it.

    Killed at any moment, the newer versions and their history stay valid.
    """
    newest = max(dropped)
    name = layout.manifest_path(newest)
    digest = manifest_digest(storage.read(name, layout.MAX_MANIFEST_BYTES))
    word = f"{digest}\n".encode()
    marker = layout.removed_path(newest)
    if not storage.put_if_absent(marker, word) and storage.read(marker, len(word)) != word:
        raise IntegrityError(f"{storage.describe(marker)}: is about another version than {name}")
    # The newest of them first: what is before a version that is gone is out of reach.
    for number in sorted(dropped, reverse=True):
        _remove(storage.root / layout.manifest_path(number))
    # Of an earlier removal that was cut off, the file may be about a newer version than this one.
    for path in sorted((storage.root / layout.MANIFEST_DIR).glob(_MARKERS))[:-1]:
        _remove(path)
    sync_directory(storage.root / layout.MANIFEST_DIR)


def remove(storage: LocalStorage, garbage: list[Garbage], *, min_age_s: float) -> Iterator[Garbage]:
    """Delete files, each after another look at whether it is still garbage; gives those that went."""
    versions, kept = storage.versions(), None
    for item in garbage:
        path = storage.root / item.name
        if storage.versions() != versions or kept is None:
            # Somebody committed meanwhile.
            versions = storage.versions()
            kept = referenced(storage, list(read_manifests(storage).values()))
        try:
            in_use = item.name in kept or (
                is_held(path)
                if item.name.startswith(TEMP_DIR + "/")
                else time.time() - path.stat().st_mtime < min_age_s
            )
        except FileNotFoundError:
            continue
        if not in_use:
            _remove(path)
            yield item


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot remove: {error.strerror}", errno=error.errno, filename=str(path)
        ) from error


def _files(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.is_file() and not path.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(
            f"{directory}: cannot list: {error.strerror}", errno=error.errno, filename=str(directory)
        ) from error
