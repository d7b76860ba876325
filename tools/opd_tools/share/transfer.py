"""Copying a cache to a directory, a bucket or the Hub: shards first, manifests last, every byte proven.

Nothing is a cache before its manifest is there, so a transfer that was cut off leaves nothing that anybody
could open by mistake, and the same call goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_store import CacheExistsError, layout
from opd_store.storage import resolve
from opd_tools.destination import is_local, local_path
from opd_tools.share.bucket import Bucket
from opd_tools.share.contents import Contents, File, contents
from opd_tools.share.hub import Hub
from opd_tools.share.places import Directory, Item, Place, taken
from opd_tools.share.signature import signature_of

OnBytes = Callable[[int, int], None]
"""Called with bytes that are done, and bytes in all."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Files that have to be there before those of the next stage are sent."""

    what: str
    items: list[Item]


@dataclass(frozen=True, slots=True)
class Sent:
    """What a transfer did."""

    files: int
    n_bytes: int
    there: int
    """Files that were there before."""


def upload(directory: Path, url: str, access: dict[str, Any], *, on_bytes: OnBytes | None = None) -> Sent:
    """Copy the newest version of a local cache, and the manifests of those before it, to a URL.

    What is there already is not sent again. Files of other versions that are there stay.

    Args:
        url: a path, or a URL that can be written to.
        access: keywords of `opd_store.open`; `storage_options` are used.

    Raises:
        CacheNotFoundError, FormatError, IntegrityError: the local cache is missing or damaged.
        CacheExistsError: another cache is there.
        InvalidArgumentError: an address that cannot be written to.
        StorageError: access denied, or out of reach; the same call goes on.
    """
    storage, pin = resolve(directory)
    found = contents(storage, pin)
    return transmit(place_of(url, access), stages(found, directory), on_bytes=on_bytes)


def place_of(url: str, access: dict[str, Any], *, private: bool = False) -> Place:
    """What is at an address that may be written to.

    Args:
        private: for a repository of the Hub that has to be created.
    """
    if url.startswith("hf://"):
        return Hub(url, access, private=private)
    if is_local(url):
        return Directory(local_path(url))
    return Bucket(url, access)


def stages(found: Contents, root: Path, *, extras: tuple[Item, ...] = ()) -> list[Stage]:
    """What to send for a local cache, in order.

    Args:
        extras: files beside the cache, sent after its index and before its manifests.
    """
    older = tuple(file for file in found.older if (root / file.name).is_file())
    manifests = [Item.of_bytes(name, data, create_only=True) for name, data in found.manifests]
    signatures = [
        Item.of_bytes(signature_of(name), path.read_bytes())
        for name, _ in found.manifests
        if (path := root / signature_of(name)).is_file()
    ]
    return [
        Stage("shards", _items(found.shards, root)),
        Stage("index", _items((*found.tables, *older), root)),
        Stage("manifest and description" if extras else "manifest", [*extras, *signatures, *manifests]),
    ]


def transmit(place: Place, stages: list[Stage], *, on_bytes: OnBytes | None = None) -> Sent:
    """Send what is not there, stage by stage.

    Raises:
        CacheExistsError: another cache is there.
        IntegrityError: other bytes arrive than were sent.
        StorageError: access denied, or out of reach.
    """
    items = [item for stage in stages for item in stage.items]
    manifests = {item.name: item for item in items if item.create_only}
    versions, newest = place.versions(), max(manifests)
    if later := [version for version in versions if layout.manifest_path(version) > newest]:
        raise CacheExistsError(
            f"{place.shown}: holds version {later[-1]}, which this cache does not; pull it and continue it, "
            "or choose another place"
        )
    for name in sorted(manifests.keys() & {layout.manifest_path(version) for version in versions}):
        if not place.proves(manifests[name]):
            raise taken(f"{place.shown}/{name}")
    declared = place.declared(items)
    total, done, sent = sum(item.n_bytes for item in items), 0, []

    def count(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if on_bytes is not None:
            on_bytes(done, total)

    # Its manifests are only there if everything else was proven before.
    is_trusted = manifests.keys() <= declared
    for stage in stages:
        there = {
            item.name for item in stage.items if item.name in declared and (is_trusted or place.proves(item))
        }
        count(sum(item.n_bytes for item in stage.items if item.name in there))
        missing = [item for item in stage.items if item.name not in there]
        if missing:
            place.send(missing, stage.what, count)
        sent += missing
    return Sent(len(sent), sum(item.n_bytes for item in sent), len(items) - len(sent))


def _items(files: tuple[File, ...], root: Path) -> list[Item]:
    return [Item(file.name, root / file.name, file.n_bytes, file.sha256) for file in files]
