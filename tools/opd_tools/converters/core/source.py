"""Foreign files at a path or URL, read as streams; nothing in them names another file."""

from __future__ import annotations

import contextlib
import gzip
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
_JSON = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz")


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
        self._first: list[Any] | None = None
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
            try:
                return zlib.decompressobj(31).decompress(data, _HEAD)
            except zlib.error:
                return b""
        return data

    def json_names(self) -> list[str]:
        """Files that hold JSON by their names; a single file may have any name."""
        return self.names if self.names == [self.root] else self.named(*_JSON)

    def first_json(self) -> Any:  # noqa: ANN401
        """The first JSON value of the first file that `json_names` gives; None if there is none."""
        if self._first is None:
            self._first = [None]
            names = self.json_names()
            if names and self.head(names[0]).lstrip()[:1] in (b"{", b"["):
                with contextlib.suppress(FormatError):
                    self._first = [next(self.json_values(names[0]), ("", None))[1]]
        return self._first[0]

    def json_values(self, name: str) -> Iterator[tuple[str, Any]]:
        """Values of a file, one a line, or one over many lines, or a list of them; with their places.

        Raises:
            FormatError: not JSON, or longer than `MAX_LINE`.
        """
        with self._unpacked(name) as file:
            lines = io.BufferedReader(file, 1 << 20)  # type: ignore[type-var]
            number, several = 0, False
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    if not several:
                        line += lines.read(MAX_LINE + 1 - len(line))
                    value = _parsed(line, self.shown(name), number)
                where = f"{self.shown(name)}, line {number}"
                if isinstance(value, list):
                    yield from ((f"{where}, item {at}", item) for at, item in enumerate(value))
                else:
                    yield where, value
                several = True

    def digest(self) -> str:
        """Over names, sizes, beginnings and ends of all files: tells sources apart without reading them."""
        digest = hashlib.sha256()
        for name in self.names:
            size = self.size(name)
            with self.open(name) as file:
                ends = hashlib.sha256(file.read(_HEAD))
                file.seek(max(0, size - _HEAD))
                ends.update(file.read(_HEAD))
            digest.update(f"{self.shown(name)}\0{size}\0{ends.hexdigest()}\n".encode())
        return "sha256:" + digest.hexdigest()

    @contextlib.contextmanager
    def _unpacked(self, name: str) -> Iterator[IO[bytes]]:
        """A file, or what is in it if it is gzip. Raises FormatError: its gzip is damaged or cut off."""
        with self.open(name) as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            try:
                yield gzip.open(raw) if packed else raw  # type: ignore[misc]  # noqa: SIM115
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise FormatError(f"{self.shown(name)}: damaged, or cut off: {error!s:.200}") from error


def _parsed(text: bytes, name: str, number: int) -> Any:  # noqa: ANN401
    """A JSON value that begins at a line, NaN and infinities included as Python writes them."""
    if len(text) > MAX_LINE:
        raise FormatError(f"{name}, line {number}: more than {MAX_LINE} bytes; write one JSON value a line")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        number += getattr(error, "lineno", 1) - 1
        raise FormatError(f"{name}, line {number}: not JSON, or cut off: {error!s:.200}") from error


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
