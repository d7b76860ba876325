"""One version of a cache as a cache of its own, without a copy of what it holds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from opd_store import layout
from opd_store.cache import Cache
from opd_store.errors import (
    CacheExistsError,
    IntegrityError,
    InvalidArgumentError,
    MismatchError,
    StorageError,
)
from opd_store.manifest import Manifest, encode_manifest, manifest_digest
from opd_store.meta import CacheMeta
from opd_store.storage import LocalStorage, make_directory, resolve_writable, sync_directory
from opd_store.writer import Version, require_known


def snapshot(cache: Cache, out: str | os.PathLike[str], *, meta: CacheMeta | None = None) -> Version:
    """Make a new cache whose only version holds what `cache` holds, in the same files.

    Its digest depends on these files and on `meta` alone, not on the versions before. Files are hard links
    where the file system has them, so it takes neither time nor room; else copies.

    Args:
        cache: a local one.
        out: a directory that does not exist, or is empty.
        meta: other provenance; None keeps it. Vocabulary and tokenizer have to stay, since hashes and ids
            depend on them.

    Raises:
        CacheExistsError: something is already there.
        IntegrityError: a file of the cache is missing.
        InvalidArgumentError: a cache behind a URL, or provenance that no reader would accept.
        MismatchError: another vocabulary or tokenizer.
        StorageError: the disk refused.
        UnsupportedVersionError: a newer release wrote the cache.
    """
    meta = cache.meta if meta is None else meta
    for name in ("vocab_size", "tokenizer_fingerprint"):
        expected, found = getattr(cache.meta, name), getattr(meta, name)
        if expected != found:
            raise MismatchError(
                f"meta: {name} is {expected} in the cache, so it cannot become {found}",
                field=name,
                expected=str(expected),
                found=str(found),
            )
    if cache.stats is not None:
        raise InvalidArgumentError(f"{cache.uri}: expected a local cache; fetch it first")
    require_known(cache)
    storage = resolve_writable(out)
    if not storage.is_empty() or storage.versions():
        raise CacheExistsError(f"{storage.uri}: already exists; choose another path")
    old = cache.manifest
    new = Manifest(
        sequence=1, parent=None, meta=meta, schema=old.schema, segments=old.segments, id_table=old.id_table
    )
    try:
        data = encode_manifest(new)
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"meta: no reader would accept it: {error}") from error
    for name in files_of(cache):
        _share(Path(cache.uri, name), storage, name)
    if not storage.put_if_absent(layout.manifest_path(1), data):
        raise CacheExistsError(f"{storage.uri}: somebody else writes there")
    digest = manifest_digest(data)
    return Version(1, digest, f"{storage.uri}@{digest}")


def files_of(cache: Cache) -> list[str]:
    """Every file that a version consists of but its manifest, as paths below the cache's address."""
    manifest = cache.manifest
    refs = [ref for segment in manifest.segments for ref in (segment.shards, segment.rollouts)]
    if manifest.id_table is not None:
        refs.append(manifest.id_table)
    return [*dict.fromkeys(shard.path for shard in cache.shards), *dict.fromkeys(ref.path for ref in refs)]


def _share(source: Path, storage: LocalStorage, name: str) -> None:
    target = storage.root / name
    try:
        make_directory(target.parent)
        try:
            os.link(source, target)
        except FileExistsError:
            # Whoever made it may have been killed before the next line but one.
            pass
        except FileNotFoundError as error:
            raise IntegrityError(
                f"{source}: missing, although the manifest names it. Fetch it again.", uri=str(source)
            ) from error
        except OSError:
            # Another file system, or one without links.
            with storage.create_temp() as temp, source.open("rb") as file:
                shutil.copyfileobj(file, temp, 1 << 20)
                temp.publish(name)
        sync_directory(target.parent)
    except OSError as error:
        raise StorageError(
            f"{target}: cannot write: {error.strerror or error}", errno=error.errno, filename=str(target)
        ) from error
