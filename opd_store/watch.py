"""Whether a mapped file still has its bytes: reading a mapping of a file that was cut ends the process."""

from __future__ import annotations

import os
from collections.abc import Hashable


class FileWatch:
    """A file as it was when it was mapped."""

    def __init__(self, path: str, size: int, found: os.stat_result | None = None) -> None:
        """Remember the file.

        Args:
            path: of a file that was mapped just now.
            size: bytes that were mapped.
            found: what `fstat` said of it; None asks by the name, which may be another file's by now.
        """
        self._path, self._size = os.path.abspath(path), size
        self._file: tuple[int, int] | None = None
        self.identity: Hashable = object()
        """Differs from that of another file under the same name, and of the same file after a change."""
        try:
            found = found or os.stat(self._path)
        except OSError:
            return
        self._file = (found.st_dev, found.st_ino)
        self.identity = (*self._file, found.st_size, found.st_mtime_ns)

    def size(self) -> int:
        """Bytes of the file now. One that lost its name, or whose name is another's, keeps its bytes."""
        try:
            found = os.stat(self._path)
        except OSError:
            return self._size
        return found.st_size if (found.st_dev, found.st_ino) == self._file else self._size
