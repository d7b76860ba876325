"""Foreign files at a path or URL, read as streams; nothing in them names another file."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec

from opd_store import CacheNotFoundError, FormatError, InvalidArgumentError, StorageError

MAX_LINE = 256 << 20
"""Bytes of one line of JSON."""
_HEAD = 1 << 16


class Source:
    """One file, or all files below a directory, in the order of their names."""

    def __init__(self, uri: str, storage_options: Mapping[str, object] | None = None) -> None:
        """
        Raises:
            CacheNotFoundError: nothing is there.
            InvalidArgumentError: a protocol that is not known, or whose package is missing.
            StorageError: the place cannot be read.
        """
        self.uri = uri
        try:
            self.fs, self.root = fsspec.core.url_to_fs(uri, **(storage_options or {}))
            if self.fs.isfile(self.root):
                self.names = [self.root]
            else:
                self.names = sorted(self.fs.find(self.root))
        except (ValueError, ImportError) as error:
            raise InvalidArgumentError(f"{uri}: {error!s:.300}") from error
        except OSError as error:
            raise StorageError(f"{uri}: {error!s:.300}") from error
        if not self.names:
            raise CacheNotFoundError(f"{uri}: no such file, or a directory without files")

    def named(self, *endings: str) -> list[str]:
        """Files whose names end so, numbers in them by value: data_2 before data_10."""
        return sorted((name for name in self.names if name.endswith(endings)), key=_by_number)

    def shown(self, name: str) -> str:
        """A file's name for people, relative to the source."""
        if name == self.root:
            return PurePosixPath(name).name
        return str(PurePosixPath(name).relative_to(self.root))

    def open(self, name: str) -> IO[bytes]:
        """A file, seekable. Raises StorageError."""
        try:
            return self.fs.open(name, "rb")  # type: ignore[no-any-return]
        except OSError as error:
            raise StorageError(f"{self.shown(name)}: {error!s:.300}") from error

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return int(self.fs.size(name))

    def head(self, name: str, n_bytes: int = _HEAD) -> bytes:
        """The first bytes of a file, unpacked if it is gzip."""
        with self.open(name) as file:
            data = file.read(n_bytes)
        if data[:2] == b"\x1f\x8b":
            return zlib.decompressobj(31).decompress(data, _HEAD)
        return data

    def first_json(self, name: str) -> Any:  # noqa: ANN401
        """The first line of a file as a JSON value, or the whole of a small file; None if it is no JSON."""
        data = self.head(name, 16 * _HEAD)
        for text in (data, data.split(b"\n", 1)[0]):
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                continue
        return None

    def json_lines(self, name: str) -> Iterator[tuple[str, Any]]:
        """Each line's place and value. Raises FormatError for a line that is not JSON, or too long."""
        with self.open(name) as raw:
            file: IO[bytes] = raw
            if raw.read(2) == b"\x1f\x8b":
                import gzip

                raw.seek(0)
                file = gzip.open(raw)  # type: ignore[assignment]  # noqa: SIM115
            else:
                raw.seek(0)
            lines = io.BufferedReader(file, 1 << 20)  # type: ignore[type-var]
            number = 0
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                where = f"{self.shown(name)}, line {number}"
                if len(line) > MAX_LINE:
                    raise FormatError(f"{where}: longer than {MAX_LINE} bytes")
                if not line.strip():
                    continue
                yield where, parsed(line, where)

    def digest(self) -> str:
        """Over names, sizes and beginnings of all files: tells sources apart without reading them."""
        digest = hashlib.sha256()
        for name in self.names:
            head = hashlib.sha256(self.head(name)).hexdigest()
            digest.update(f"{self.shown(name)}\0{self.size(name)}\0{head}\n".encode())
        return "sha256:" + digest.hexdigest()


def parsed(line: bytes | str, where: str) -> Any:  # noqa: ANN401
    """A JSON value, NaN and infinities included as Python writes them. Raises FormatError."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON, or cut off: {error!s:.200}") from error


def _by_number(name: str) -> list[tuple[int, str]]:
    parts: list[tuple[int, str]] = []
    digits = ""
    for char in [*name, "\0"]:
        if char.isdigit():
            digits += char
            continue
        if digits:
            parts.append((int(digits), ""))
            digits = ""
        parts.append((-1, char))
    return parts
