"""A directory that keeps what was fetched, shared by any number of processes.

Files are named by the digest of what they hold, written under a temporary name and renamed, and checked by
the caller at every use, so a damaged one is only a file to fetch again. Nothing else in the directory is
followed, changed or deleted.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator

import pyarrow as pa

from opd_store.errors import InvalidArgumentError

DEFAULT_CACHE_BYTES = 20 << 30
_OURS = re.compile(r"([0-9a-f]{64}(\.[0-9]+\.[0-9a-f]+)?|[0-9a-f]{32}\.tmp)\Z")
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LOW_WATER = 0.9
"""Evicting stops here, so that not every new file costs a look at the whole directory."""


class DiskCache:
    """Files by key, the least recently used of which go when there are too many bytes."""

    def __init__(self, directory: str, limit: int) -> None:
        """Args:
        directory: created when something is kept.
        limit: bytes on disk, holes of sparse files not counted.

        Raises:
            InvalidArgumentError: no room for anything.
        """
        if limit <= 0:
            raise InvalidArgumentError(f"cache_bytes: expected more than 0, found {limit}")
        self.directory, self.limit = directory, limit
        # What is there by our last look and our own writes; other processes add to it unseen.
        self._known: int | None = None
        self._unseen = 0
        self._warned = False

    def __getstate__(self) -> tuple[str, int]:
        return self.directory, self.limit

    def __setstate__(self, state: tuple[str, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def has(self, key: str) -> bool:
        """Whether there is something under this key, which may still prove damaged."""
        return os.path.lexists(self._path(key))

    def get(self, key: str, size: int, is_intact: Callable[[pa.Buffer], bool]) -> pa.Buffer | None:
        """The mapped file, or None where there is none or a damaged one, which is deleted."""
        try:
            descriptor = os.open(self._path(key), _FLAGS)
        except OSError:
            return None
        try:
            found = os.fstat(descriptor)
            if not _is_our_file(found):
                return None
            if found.st_size == size > 0:
                buffer = _map(descriptor, size)
                if is_intact(buffer):
                    with contextlib.suppress(OSError):
                        os.utime(descriptor)
                    return buffer
        except (OSError, ValueError):
            return None
        finally:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(self._path(key))
        return None

    def put(self, key: str, size: int, pieces: list[tuple[int, bytes]]) -> pa.Buffer | None:
        """Keep a file of `size` bytes that is zero but for pieces at their offsets.

        Returns:
            The mapped file; None where it could not be kept: the disk is full, for one, which warns once.
        """
        n_bytes = sum(len(data) for _, data in pieces)
        if size == 0 or n_bytes > self.limit:
            return None
        temp = os.path.join(self.directory, f"{secrets.token_hex(16)}.tmp")
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            descriptor = os.open(
                temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            try:
                # Written, not stored through the mapping: on a full disk that would end the process.
                for offset, data in pieces:
                    _write(descriptor, data, offset)
                os.ftruncate(descriptor, size)
                self._make_room(os.fstat(descriptor).st_blocks * 512)
                buffer = _map(descriptor, size)
                self._publish(temp, self._path(key))
                return buffer
            finally:
                os.close(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temp)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self.directory}: cannot keep fetched data: {error.strerror or error}. "
                    "Reading goes on without it.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return None

    def _publish(self, temp: str, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not _is_our_file(os.lstat(path)):
                os.unlink(temp)
                return
        # Another process that makes room may have taken the temporary file; the mapping is still good.
        with contextlib.suppress(FileNotFoundError):
            os.rename(temp, path)

    def _make_room(self, n_bytes: int) -> None:
        """Delete until the directory is within its limit. The new file is in it already."""
        self._unseen += n_bytes
        if (
            self._known is not None
            and self._unseen <= self.limit // 32
            and self._known + n_bytes <= self.limit
        ):
            self._known += n_bytes
            return
        files = sorted(self._files())
        total = sum(used for _, used, _ in files)
        if total > self.limit:
            for _, used, path in files[:-1]:
                if total <= self.limit * _LOW_WATER:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                total -= used
        self._known, self._unseen = total, 0

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """(last use, bytes on disk, path) of every file that is ours."""
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if _OURS.match(entry.name):
                    with contextlib.suppress(OSError):
                        found = entry.stat(follow_symlinks=False)
                        if _is_our_file(found):
                            yield found.st_mtime_ns, found.st_blocks * 512, entry.path

    def _path(self, key: str) -> str:
        return os.path.join(self.directory, key)


def _is_our_file(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()


def _map(descriptor: int, size: int) -> pa.Buffer:
    return pa.py_buffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
