"""Which manifest is meant, and whether those before it are there."""

from __future__ import annotations

from opd_store import layout
from opd_store.errors import CacheNotFoundError, IntegrityError
from opd_store.manifest import Manifest, decode_manifest, manifest_digest
from opd_store.storage import Storage


def load_manifest(storage: Storage, pin: str | None = None) -> tuple[Manifest, str]:
    """The newest manifest, or the pinned one, and its digest.

    Raises:
        CacheNotFoundError: there is none.
        FormatError, IntegrityError: it is damaged, or was renamed.
    """
    versions = storage.versions()
    if not versions:
        raise CacheNotFoundError(
            f"{storage.uri}: no cache here ({layout.MANIFEST_DIR}/ holds no manifest). "
            "Check the path, or write one with `opd score`."
        )
    for sequence in reversed(versions) if pin else versions[-1:]:
        name = layout.manifest_path(sequence)
        data = storage.read(name, layout.MAX_MANIFEST_BYTES)
        digest = manifest_digest(data)
        if pin in (None, digest):
            manifest = decode_manifest(data, where=storage.describe(name))
            if manifest.sequence != sequence:
                raise IntegrityError(
                    f"{storage.describe(name)}: holds version {manifest.sequence}; it was renamed"
                )
            return manifest, digest
    raise CacheNotFoundError(
        f"{storage.uri}: none of its {len(versions)} versions has the pinned digest {pin}"
    )


def was_removed(storage: Storage, sequence: int, child: Manifest) -> bool:
    """Whether somebody removed this version, which is missing, and all before it on purpose."""
    try:
        data = storage.read(layout.removed_path(sequence), layout.MAX_MANIFEST_BYTES)
    except CacheNotFoundError:
        return False
    return data == f"{child.parent}\n".encode()


def read_parent(storage: Storage, name: str, child: Manifest) -> Manifest:
    """The manifest of this name, which has to be the one before `child`.

    Raises:
        FormatError, IntegrityError: it is missing, another one, or damaged.
    """
    where = storage.describe(name)
    try:
        data = storage.read(name, layout.MAX_MANIFEST_BYTES)
    except CacheNotFoundError as error:
        raise IntegrityError(f"{where}: missing, although a later version names it", uri=where) from error
    if manifest_digest(data) != child.parent:
        raise IntegrityError(
            f"{where}: {manifest_digest(data)}, but the next version names {child.parent}", uri=where
        )
    return decode_manifest(data, where=where)
