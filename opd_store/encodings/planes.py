"""Unsigned integers as byte planes: all low bytes, then all second bytes, and so on.

A stream is one byte with the number of planes, then each plane, low byte first: u32 size, whose highest bit
says that the payload is one zstd frame, and the payload. No planes at all means that every value is 0.
Planes of one stream compress better apart, because each gets its own Huffman table.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from opd_store.encodings.page import Bytes
from opd_store.errors import FormatError

MAX_PLANES = 4
ZSTD_FLAG = 1 << 31
ZSTD_LEVEL = 1
"""Higher levels look for repeated strings, of which there are none, and came out larger."""
MAX_WINDOW = 1 << 23
_DTYPES = (np.uint8, np.uint8, np.dtype("<u2"), np.dtype("<u4"), np.dtype("<u4"))


class _Zstd(threading.local):
    """Contexts are costly to make and not to be shared by threads."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)


_zstd = _Zstd()


def compress(data: bytes) -> tuple[bool, bytes]:
    """The data as one zstd frame if that is smaller: (whether it is one, payload)."""
    frame = _zstd.compressor.compress(data)
    return (True, frame) if len(frame) < len(data) else (False, data)


def decompress(frame: memoryview, n_bytes: int, *, where: str) -> Bytes:
    """Open one zstd frame that has to hold exactly `n_bytes`; its header is believed only where it agrees.

    Raises:
        FormatError: not one frame, of that size, without dictionary and checksum.
    """
    try:
        found = zstandard.get_frame_parameters(frame)
        # The declared sizes are what gets allocated, so they are compared before anything is decompressed.
        sizes_fit = found.content_size == n_bytes > 0 and found.window_size <= MAX_WINDOW
        if not sizes_fit or found.dict_id or found.has_checksum:
            raise FormatError(
                f"{where}: a zstd frame of {found.content_size} bytes, window {found.window_size}, "
                f"dictionary {found.dict_id}, checksum {found.has_checksum}; expected {n_bytes} bytes, more "
                f"than none, a window of at most {MAX_WINDOW}, no dictionary and no checksum"
            )
        data = _zstd.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"{where}: zstd frame does not decompress: {error}") from error
    if len(data) != n_bytes:
        raise FormatError(f"{where}: a zstd frame of {len(data)} bytes, expected {n_bytes}")
    return np.frombuffer(data, np.uint8)


def frame_content(frame: memoryview) -> bytes | None:
    """What a zstd frame holds, None if it does not decompress. The size it declares is allocated unseen."""
    try:
        return _zstd.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError:
        return None


class StreamWriter:
    """Collects streams into a page body."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def ints(self, values: NDArray[Any]) -> None:
        """Append a stream of unsigned integers, with as few planes as hold the largest."""
        n_planes = (int(values.max(initial=0)).bit_length() + 7) // 8
        self._parts.append(bytes([n_planes]))
        words = np.ascontiguousarray(values, "<u4").reshape(-1).view(np.uint8).reshape(-1, MAX_PLANES)
        for plane in range(n_planes):
            compressed, payload = compress(words[:, plane].tobytes())
            self._parts += [(len(payload) | ZSTD_FLAG * compressed).to_bytes(4, "little"), payload]

    def body(self) -> bytes:
        """Everything so far."""
        return b"".join(self._parts)


class StreamReader:
    """Takes streams out of a page body, in order, trusting no length."""

    def __init__(self, body: Bytes, *, where: str) -> None:
        self._body, self.where = memoryview(body), where
        self._position = 0

    def ints(self, count: int, *, limit: int, what: str) -> NDArray[Any]:
        """The next stream: [count] u8, u16 or u32.

        Args:
            limit: the largest value allowed.
            what: names the stream in errors.

        Raises:
            FormatError: sizes that do not fit, or a value above the limit.
        """
        n_planes = self._take(1, what)[0]
        if n_planes > MAX_PLANES:
            raise FormatError(f"{self.where}: {what} has {n_planes} planes, the limit is {MAX_PLANES}")
        if n_planes == 1:
            values: NDArray[Any] = self._plane(count, what)
        else:
            planes = [self._plane(count, what) for _ in range(n_planes)]
            dtype = np.dtype(_DTYPES[n_planes])
            values = np.zeros(count, dtype)
            for number, plane in enumerate(planes):
                values.view(np.uint8)[number :: dtype.itemsize] = plane
        if limit < (1 << 8 * n_planes) - 1 and count and int(values.max()) > limit:
            raise FormatError(f"{self.where}: {what} has {int(values.max())}, the limit is {limit}")
        return values

    def _take(self, n_bytes: int, what: str) -> memoryview:
        start = self._position
        end = self._position = start + n_bytes
        if end > len(self._body):
            raise FormatError(
                f"{self.where}: {what} ends at byte {end} of the page body, which has {len(self._body)}"
            )
        return self._body[start:end]

    def _plane(self, count: int, what: str) -> Bytes:
        size = int.from_bytes(self._take(4, what), "little")
        if size & ZSTD_FLAG:
            return decompress(self._take(size ^ ZSTD_FLAG, what), count, where=f"{self.where}, {what}")
        if size != count:
            raise FormatError(f"{self.where}: {what} has {size} bytes, expected {count}")
        return np.frombuffer(self._take(size, what), np.uint8)

    def finish(self) -> None:
        """Raise FormatError unless the whole body was taken."""
        if self._position != len(self._body):
            left = len(self._body) - self._position
            raise FormatError(f"{self.where}: {left} bytes after the last stream of the page body")
