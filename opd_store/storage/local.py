"""A cache in a local directory.

What is published is complete, flushed and never changed again: files are written under a temporary name,
fsynced, and linked to their final name, which fails if the name is taken. That link is also the commit, so no
lock decides anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from opd_store import kernels, layout
from opd_store.errors import CacheNotFoundError, IntegrityError, StorageError
from opd_store.shard import file_digest

TEMP_DIR = "tmp"


@contextlib.contextmanager
def _explained(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{path}: cannot {action}: {error.strerror or error}. What was committed before is intact."
        raise StorageError(message, errno=error.errno, filename=str(path)) from error


class LocalStorage:
    """A directory on a POSIX file system with hard links."""

    is_local = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prefix = os.path.join(root, "")

    @property
    def uri(self) -> str:
        """The root as the user wrote it."""
        return str(self.root)

    def describe(self, name: str) -> str:
        """The full name of a file, for messages."""
        # Not by `Path`, which takes ten times as long.
        return self._prefix + name

    def versions(self) -> list[int]:
        """Numbers of all manifests, rising; empty where there is no cache."""
        directory = self.root / layout.MANIFEST_DIR
        try:
            names = [name for name in os.listdir(directory) if layout.MANIFEST_NAME.fullmatch(name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            message = f"{directory}: cannot list: {error.strerror}"
            raise StorageError(message, errno=error.errno, filename=str(directory)) from error
        return sorted(int(name[:8]) for name in names)

    def is_empty(self) -> bool:
        """Whether nothing but our own leftovers is there."""
        ours = {TEMP_DIR, layout.SHARD_DIR, layout.INDEX_DIR, layout.TABLE_DIR, layout.MANIFEST_DIR}
        try:
            return set(os.listdir(self.root)) <= ours
        except FileNotFoundError:
            return True
        except OSError as error:
            message = f"{self.root}: cannot list: {error.strerror}"
            raise StorageError(message, errno=error.errno, filename=str(self.root)) from error

    def read(self, name: str, limit: int) -> bytes:
        """A whole small file.

        Raises:
            CacheNotFoundError: there is no such file.
            IntegrityError: larger than `limit`.
        """
        path = self.root / name
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except FileNotFoundError as error:
            raise CacheNotFoundError(f"{path}: no such file") from error
        except OSError as error:
            raise StorageError(
                f"{path}: cannot read: {error.strerror}", errno=error.errno, filename=str(path)
            ) from error
        if len(data) > limit:
            raise IntegrityError(f"{path}: larger than the limit of {limit} bytes", uri=str(path))
        return data

    def map(self, name: str) -> pa.Buffer:
        """A whole file, memory-mapped.

        Raises:
            IntegrityError: the file is missing although a manifest names it.
        """
        return self.map_pages(name)[0]

    def map_pages(self, name: str) -> tuple[pa.Buffer, os.stat_result | None, Callable[[], None]]:
        """Like `map`, with what `fstat` says of the file, and what takes the pages that were read out of this
        process's memory again: they stay in the system's cache, and come back when they are read.
        """
        path = self.describe(name)
        try:
            # Not Python's mmap, which keeps a file descriptor as long as it lives.
            with pa.memory_map(path) as file:
                found, buffer = os.fstat(file.fileno()), file.read_buffer()
        except FileNotFoundError as error:
            raise IntegrityError(
                f"{path}: missing, although the manifest names it. Fetch it again.", uri=path
            ) from error
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"{path}: cannot map: {error}", filename=path) from error
        return buffer, found, lambda: kernels.let_go(buffer)

    def load(self, name: str, n_bytes: int, sha256: bytes) -> pa.Buffer:
        """A whole file, memory-mapped and compared with its digest.

        Raises:
            IntegrityError: it is missing, or not the one with this digest.
        """
        buffer = self.map(name)
        if buffer.size != n_bytes or file_digest(buffer) != sha256:
            where = self.describe(name)
            raise IntegrityError(
                f"{where}: not the {n_bytes} bytes with the digest in its name. Fetch it again.", uri=where
            )
        return buffer

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.root / name).is_file()

    def create_temp(self) -> TempFile:
        """A new file to write to, to be published or thrown away."""
        return TempFile(self.root)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Publish a small file. False when the name is taken, whatever it holds."""
        with self.create_temp() as temp:
            temp.write(data)
            return temp.publish(name)

    def remove_leftovers(self) -> None:
        """Delete temporary files whose writer is gone.

        A live writer holds a lock on its file; the lock of a killed one vanished with it. Nothing but this
        tidying depends on the lock.
        """
        directory = self.root / TEMP_DIR
        for path in directory.glob("*") if directory.is_dir() else ():
            if not is_held(path):
                with contextlib.suppress(OSError):
                    path.unlink()


def is_held(path: Path) -> bool:
    """Whether a live writer has a lock on its temporary file, or nobody can tell."""
    try:
        # For writing, although nothing is written: NFS gives no exclusive lock without it.
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


class TempFile:
    """A file under a temporary name. Leaving the context without `publish` deletes it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / TEMP_DIR / secrets.token_hex(8)
        with _explained("create", self._path):
            make_directory(self._path.parent)
            self._file = self._path.open("xb", buffering=1 << 20)
            fcntl.flock(self._file, fcntl.LOCK_SH)
            while not self._path.exists():
                # Another writer tidied up between the two calls above.
                self._file.close()
                self._file = self._path.open("xb", buffering=1 << 20)
                fcntl.flock(self._file, fcntl.LOCK_SH)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write(self, data: bytes) -> int:
        """Append bytes. Raises StorageError, for one when the disk is full."""
        with _explained("write", self._path):
            return self._file.write(data)

    def publish(self, name: str) -> bool:
        """Flush to disk and give the file its final name, durably. False when that name is taken."""
        target = self._root / name
        with _explained("write", self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        with _explained("publish", target):
            make_directory(target.parent)
            try:
                os.link(self._path, target)
                is_new = True
            except FileExistsError:
                is_new = False
                # As young as if it were new, for whoever removes what no version refers to.
                with contextlib.suppress(OSError):
                    os.utime(target)
            # Also for a taken name: a writer that was killed may have linked it without this.
            sync_directory(target.parent)
        return is_new

    def discard(self) -> None:
        """Remove the temporary name; a published file keeps its final one."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        with contextlib.suppress(OSError):
            self._file.close()


def make_directory(path: Path) -> None:
    """Create a directory durably, if it is not there."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        # The new entry has to survive a power cut as well as what is put inside.
        for parent in (path.parent, path.parent.parent):
            sync_directory(parent)


def sync_directory(path: Path) -> None:
    """Make names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
