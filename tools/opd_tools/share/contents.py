"""What has to be copied for one version of a cache to be somewhere else, and in which order."""

from __future__ import annotations

from dataclasses import dataclass

from opd_store import IntegrityError, layout
from opd_store.cache import Cache
from opd_store.index import FileRef
from opd_store.manifest import Manifest, decode_manifest, manifest_digest
from opd_store.storage import Storage
from opd_store.versions import load_manifest, was_removed


@dataclass(frozen=True, slots=True)
class File:
    """A file whose name holds its digest."""

    name: str
    """Below the cache's address."""
    n_bytes: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything a version consists of, and the index of its ancestors."""

    cache: Cache
    shards: tuple[File, ...]
    tables: tuple[File, ...]
    """Index files and the id table of this version."""
    older: tuple[File, ...]
    """Index files that only ancestors name; those may have been removed."""
    manifests: tuple[tuple[str, bytes], ...]
    """Name and bytes, oldest first; the last one is this version's. Where older ones were removed on purpose,
    the file that says so comes before them."""

    @property
    def n_bytes(self) -> int:
        """Bytes of all files but those of ancestors."""
        return sum(file.n_bytes for file in (*self.shards, *self.tables))


def contents(storage: Storage, pin: str | None) -> Contents:
    """Read the manifests and shard tables of a version.

    Raises:
        CacheNotFoundError, FormatError, IntegrityError, StorageError: as for `opd_store.open`.
        IntegrityError: also where a manifest is not the one that the next version names.
    """
    manifest, digest = load_manifest(storage, pin)
    cache = Cache(storage, manifest, digest)
    tables = _tables(manifest)
    older: dict[str, File] = {}
    manifests = [_manifest(storage, manifest.sequence, digest)]
    parent = manifest
    sequences = set(storage.versions())
    # Where a version is gone, those before it cannot be reached by their digests.
    while parent.parent is not None and parent.sequence - 1 in sequences:
        name, data = _manifest(storage, parent.sequence - 1, parent.parent)
        manifests.append((name, data))
        parent = decode_manifest(data, where=storage.describe(name))
        older |= {file.name: file for file in _tables(parent)}
    if parent.parent is not None and was_removed(storage, parent.sequence - 1, parent):
        manifests.append((layout.removed_path(parent.sequence - 1), f"{parent.parent}\n".encode()))
    shards = {shard.path: File(shard.path, shard.n_bytes, shard.sha256) for shard in cache.shards}
    known = {file.name for file in tables}
    return Contents(
        cache=cache,
        shards=tuple(shards.values()),
        tables=tables,
        older=tuple(file for name, file in older.items() if name not in known),
        manifests=tuple(reversed(manifests)),
    )


def _tables(manifest: Manifest) -> tuple[File, ...]:
    refs: list[FileRef] = [ref for part in manifest.segments for ref in (part.shards, part.rollouts)]
    if manifest.id_table is not None:
        refs.append(manifest.id_table)
    return tuple({ref.path: File(ref.path, ref.n_bytes, ref.sha256) for ref in refs}.values())


def _manifest(storage: Storage, sequence: int, digest: str) -> tuple[str, bytes]:
    name = layout.manifest_path(sequence)
    data = storage.read(name, layout.MAX_MANIFEST_BYTES)
    if manifest_digest(data) != digest:
        where = storage.describe(name)
        raise IntegrityError(
            f"{where}: {manifest_digest(data)}, expected {digest}. Run `opd verify` on this cache, then "
            "fetch it again.",
            uri=where,
        )
    return name, data
