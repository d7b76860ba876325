"""tf.train.Example without TensorFlow: the protobuf wire format of four small messages.

Example { features = 1 }, Features { map<string, Feature> feature = 1 }, Feature { bytes_list = 1,
float_list = 2, int64_list = 3 }, each list { repeated value = 1 }, packed or not.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_VARINT = 10


def parse(data: bytes) -> dict[str, NDArray[np.float32] | NDArray[np.int64] | list[bytes]]:
    """Features by name. Raises ValueError: not such a message, or cut off."""
    found: dict[str, NDArray[np.float32] | NDArray[np.int64] | list[bytes]] = {}
    for number, features in _messages(memoryview(data)):
        if number != 1:
            raise ValueError(f"field {number} of an Example")
        for _, entry in _messages(features):
            parts = dict(_messages(entry))
            found[bytes(parts.get(1, b"")).decode()] = _feature(parts.get(2, memoryview(b"")))
    return found


def _feature(data: memoryview) -> NDArray[np.float32] | NDArray[np.int64] | list[bytes]:
    for number, values in _messages(data):
        if number == 1:
            return [bytes(value) for _, value in _messages(values)]
        if number == 2:
            return _floats(values)
        if number == 3:
            return _integers(values)
    return []


def _floats(data: memoryview) -> NDArray[np.float32]:
    parts = [bytes(value) for _, value in _messages(data)]
    joined = b"".join(parts)
    if len(joined) % 4:
        raise ValueError("floats that are cut off")
    return np.frombuffer(joined, "<f4")


def _integers(data: memoryview) -> NDArray[np.int64]:
    return varints(np.frombuffer(b"".join(bytes(value) for _, value in _messages(data)), np.uint8))


def varints(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """All varints of a buffer, as signed 64-bit integers. Raises ValueError."""
    ends = np.flatnonzero(data < 0x80)
    if len(data) and (not len(ends) or ends[-1] != len(data) - 1):
        raise ValueError("integers that are cut off")
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    lengths = ends - starts + 1
    longest = int(lengths.max(initial=0))
    if longest > _MOST_VARINT:
        raise ValueError("an integer of more than 64 bits")
    values = np.zeros(len(ends), np.uint64)
    for place in range(longest):
        has = lengths > place
        part = (data[starts[has] + place] & 0x7F).astype(np.uint64)
        values[has] |= part << np.uint64(7 * place)
    return values.view(np.int64)


def _messages(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Fields of a message: number and bytes; a number that is not packed as the bytes of its value."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            size, at = _varint(data, at)
            end = at + size
        elif kind == _VARINT:
            _, end = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            end = at + (4 if kind == _FIXED32 else 8)
        else:
            raise ValueError(f"wire type {kind}")
        if end > len(data):
            raise ValueError("a field that is cut off")
        yield number, data[at:end]
        at = end


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for place in range(_MOST_VARINT):
        if at + place >= len(data):
            raise ValueError("a number that is cut off")
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("a number of more than 64 bits")
