"""Arrow IPC metadata, looked at before Arrow acts on it.

Arrow decompresses a body while it parses the message, so a small hostile file would cost as much memory as it
likes. What decides about that is a few fields of a flatbuffer, read here and bounds-checked.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import pyarrow as pa

_CONTINUATION = 0xFFFFFFFF
_PREFIX = struct.Struct("<Ii")
_END = b"ARROW1"
_TRAILER = struct.Struct("<i6s")
_BLOCK = struct.Struct("<qi4xq")
_BUFFER = struct.Struct("<qq")
_ALIGNMENT = 8
_RECORD_BATCH = 3
"""Type of a message's header, and of the tables below the numbers of their fields: `Message.fbs`, `File.fbs`
of Apache Arrow."""
_MESSAGE_TYPE, _MESSAGE_HEADER, _MESSAGE_BODY_LENGTH = 1, 2, 3
_BATCH_BUFFERS, _BATCH_COMPRESSION, _BATCH_VARIADIC = 2, 3, 4
_FOOTER_DICTIONARIES, _FOOTER_BATCHES = 2, 3


class _Table:
    """A flatbuffer table. Positions outside the bytes raise struct.error."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._vtable = at - _read(data, "<i", at)
        self._vtable_bytes = _read(data, "<H", self._vtable)

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, _read(data, "<I", 0))

    def _field(self, number: int) -> int | None:
        place = 4 + 2 * number
        if place + 2 > self._vtable_bytes:
            return None
        offset = _read(self._data, "<H", self._vtable + place)
        return self._at + offset if offset else None

    def __contains__(self, number: int) -> bool:
        return self._field(number) is not None

    def scalar(self, number: int, kind: str) -> int:
        at = self._field(number)
        return 0 if at is None else _read(self._data, kind, at)

    def table(self, number: int) -> _Table:
        at = self._field(number)
        if at is None:
            raise struct.error(f"table {number} is missing")
        return _Table(self._data, at + _read(self._data, "<I", at))

    def structs(self, number: int, kind: struct.Struct) -> list[tuple[int, ...]]:
        at = self._field(number)
        if at is None:
            return []
        at += _read(self._data, "<I", at)
        count = _read(self._data, "<I", at)
        # Compared before anything of that size is made.
        if count * kind.size > len(self._data) - at - 4:
            raise struct.error(f"a vector of {count} entries")
        return [kind.unpack_from(self._data, at + 4 + i * kind.size) for i in range(count)]


def _read(data: bytes, kind: str, at: int) -> int:
    # Negative positions would count from the end.
    if at < 0:
        raise struct.error(f"position {at}")
    value: int = struct.unpack_from(kind, data, at)[0]
    return value


def check_record_batch(message: pa.Buffer) -> list[tuple[int, int]]:
    """Refuse what Arrow should not be given: anything but one whole uncompressed record batch.

    Args:
        message: the encapsulated message: continuation mark, metadata length, metadata, body. Nothing of the
            body is read.

    Returns:
        (start, length) of its buffers, in the order of the columns, counted from the start of the message.

    Raises:
        ValueError: compressed, of variable or unaligned buffers, of another type, or of other lengths than it
            says.
    """
    found: list[tuple[int, int]] = []

    def check() -> None:
        mark, n_metadata = _PREFIX.unpack_from(message)
        body_start = _PREFIX.size + n_metadata
        if mark != _CONTINUATION or not 0 < n_metadata <= message.size - _PREFIX.size or body_start % 8:
            raise struct.error(f"metadata of {n_metadata} bytes")
        root = _Table.root(message.slice(_PREFIX.size, n_metadata).to_pybytes())
        found_type = root.scalar(_MESSAGE_TYPE, "<B")
        if found_type != _RECORD_BATCH:
            raise ValueError(f"an Arrow message of type {found_type}, expected a record batch")
        body_bytes = root.scalar(_MESSAGE_BODY_LENGTH, "<q")
        if body_bytes != message.size - body_start:
            raise ValueError(
                f"a record batch with {body_bytes} bytes of body, expected {message.size - body_start}"
            )
        batch = root.table(_MESSAGE_HEADER)
        if _BATCH_COMPRESSION in batch or _BATCH_VARIADIC in batch:
            raise ValueError("a compressed record batch, or one with variable buffers")
        for offset, length in batch.structs(_BATCH_BUFFERS, _BUFFER):
            # Aligned, or arrays in it could not be used where they are.
            if not 0 <= offset <= offset + length <= body_bytes or length < 0 or offset % _ALIGNMENT:
                raise ValueError(f"a buffer of {length} bytes at {offset} of {body_bytes}")
            found.append((body_start + offset, length))

    _explained(check)
    return found


def record_batches(file: pa.Buffer) -> list[tuple[int, int]]:
    """(offset, length) of the record batches that the footer of an Arrow file names; nothing is read there.

    Raises:
        ValueError: no footer, one that names dictionaries, or blocks outside the file.
    """
    found: list[tuple[int, int]] = []

    def check() -> None:
        if file.size < _TRAILER.size:
            raise struct.error(f"{file.size} bytes")
        end = file.size - _TRAILER.size
        n_footer, magic = _TRAILER.unpack_from(file, end)
        if magic != _END or not 0 < n_footer <= end:
            raise struct.error(f"a footer of {n_footer} bytes before {magic!r}")
        footer = _Table.root(file.slice(end - n_footer, n_footer).to_pybytes())
        if footer.structs(_FOOTER_DICTIONARIES, _BLOCK):
            raise ValueError("an Arrow file with dictionaries")
        for offset, n_metadata, n_body in footer.structs(_FOOTER_BATCHES, _BLOCK):
            if min(offset, n_metadata, n_body) < 0 or offset + n_metadata + n_body > end - n_footer:
                raise ValueError(f"a record batch at {offset} of {n_metadata} and {n_body} bytes")
            found.append((offset, n_metadata + n_body))

    _explained(check)
    return found


def _explained(check: Callable[[], None]) -> None:
    try:
        check()
    except struct.error as error:
        raise ValueError(f"Arrow metadata does not parse: {error}") from error
