"""What is sent, where to, and the simplest place: a directory. See `bucket.py` and `hub.py` for others.

A place proves that what was sent has arrived: by a checksum that the store computed itself from what it
received, as S3 and Google do, or by reading it back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from opd_store import CacheExistsError, IntegrityError, StorageError
from opd_store.storage import LocalStorage, RemoteStorage

TRIES = 3
"""How often a file is sent that arrives as another one."""
_WINDOW = 32 << 20
"""Bytes that reading keeps in memory."""


@dataclass(frozen=True, slots=True)
class Item:
    """One file to send."""

    name: str
    """Below the address of the place."""
    source: Path | bytes
    n_bytes: int
    sha256: bytes
    create_only: bool = False
    """Never put in the place of another file: a manifest, whose creation is the commit."""

    @classmethod
    def of_bytes(cls, name: str, data: bytes, *, create_only: bool = False) -> Item:
        """A small file from memory."""
        return cls(name, data, len(data), hashlib.sha256(data).digest(), create_only)

    def pieces(self) -> Iterator[bytes]:
        """What it holds, a megabyte at a time."""
        if isinstance(self.source, bytes):
            yield self.source
            return
        try:
            with self.source.open("rb") as file:
                while data := file.read(1 << 20):
                    yield data
        except OSError as error:
            raise StorageError(
                f"{self.source}: cannot read: {error.strerror}", errno=error.errno, filename=str(self.source)
            ) from error


class Place(Protocol):
    """Somewhere files can be sent to."""

    shown: str
    """Address for messages."""

    def versions(self) -> list[int]:
        """Numbers of the manifests there."""

    def declared(self, items: list[Item]) -> set[str]:
        """Names of those that seem to be there, by size and by the checksums that the place lists."""

    def proves(self, item: Item) -> bool:
        """Whether it is there, byte by byte."""

    def send(self, items: list[Item], what: str, on_bytes: Callable[[int], None]) -> None:
        """Send files and prove that they arrived. `what` describes them, for a log.

        Raises:
            CacheExistsError: there is another file where one may only be created.
            IntegrityError: other bytes arrive than were sent.
            StorageError: refused.
        """


class Directory:
    """A directory of this machine."""

    def __init__(self, path: Path) -> None:
        self._storage, self.shown = LocalStorage(path), str(path)

    def versions(self) -> list[int]:
        return self._storage.versions()

    def declared(self, items: list[Item]) -> set[str]:
        paths = ((item, self._storage.root / item.name) for item in items)
        return {
            item.name for item, path in paths if path.is_file() and path.stat().st_size == item.n_bytes
        } - self._changed(items)

    def proves(self, item: Item) -> bool:
        path = self._storage.root / item.name
        if not path.is_file() or path.stat().st_size != item.n_bytes:
            return False
        return digest_of(Item(item.name, path, item.n_bytes, item.sha256).pieces()) == item.sha256

    def send(self, items: list[Item], what: str, on_bytes: Callable[[int], None]) -> None:
        for item in items:
            for _ in range(TRIES):
                self._copy(item)
                if self.proves(item):
                    break
                if item.create_only:
                    raise taken(self._storage.describe(item.name))
            else:
                raise arrived_wrong(self._storage.describe(item.name), item)
            on_bytes(item.n_bytes)

    def _changed(self, items: list[Item]) -> set[str]:
        """Small files that are made here have no digest in their name."""
        return {item.name for item in items if isinstance(item.source, bytes) and not self.proves(item)}

    def _copy(self, item: Item) -> None:
        with self._storage.create_temp() as temp:
            for data in item.pieces():
                temp.write(data)
            if not temp.publish(item.name) and not item.create_only and not self.proves(item):
                try:
                    (self._storage.root / item.name).unlink()
                except OSError as error:
                    where = self._storage.describe(item.name)
                    raise StorageError(f"{where}: cannot replace: {error.strerror}") from error
                temp.publish(item.name)


def digest_of(pieces: Iterable[bytes]) -> bytes:
    """Raw SHA-256."""
    hasher = hashlib.sha256()
    for data in pieces:
        hasher.update(data)
    return hasher.digest()


def read_windows(storage: RemoteStorage, name: str, n_bytes: int, start: int = 0) -> Iterator[bytes]:
    """A file from `start` on in order, in ranges of which a few are on their way at once."""
    for at in range(start, n_bytes, _WINDOW):
        yield from storage.span(name, at, min(at + _WINDOW, n_bytes))


def read_digest(storage: RemoteStorage, name: str, n_bytes: int) -> bytes:
    """Raw SHA-256 of the first bytes of a file, read now."""
    return digest_of(read_windows(storage, name, n_bytes))


def taken(where: str) -> CacheExistsError:
    """The error for a manifest that is not ours."""
    return CacheExistsError(
        f"{where}: holds another version; choose another place, or pull that one and continue it"
    )


def require_intact(item: Item, digest: bytes) -> None:
    """Refuse a file that is damaged here. Raises IntegrityError."""
    if digest != item.sha256:
        where = str(item.source) if isinstance(item.source, Path) else item.name
        raise IntegrityError(
            f"{where}: not the {item.n_bytes} bytes with the digest in its name, so it was not sent. "
            "Run `opd verify` on this cache, then fetch the file again.",
            uri=where,
        )


def arrived_wrong(where: str, item: Item) -> IntegrityError:
    """The error for a file that keeps arriving as another one."""
    require_intact(item, digest_of(item.pieces()))
    return IntegrityError(
        f"{where}: sent {TRIES} times, and what arrived was never the {item.n_bytes} bytes that were sent. "
        "Something on the way or the store damages them; the same command tries again.",
        uri=where,
    )
