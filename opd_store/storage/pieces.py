"""Pieces of files: which ranges to ask for, whether they are right, and putting them together. No I/O."""

from __future__ import annotations

import itertools
import mmap

import pyarrow as pa

from opd_store.hashing import crc32c
from opd_store.shard import ShardInfo

Piece = tuple[int, bytes]
"""Offset in the file, and the bytes from there on."""
Slice = tuple[int, int, int]
"""Offset in the file, length, and CRC-32C, or -1 where it is not known."""

GAP_BYTES = 64 << 10
"""Unwanted bytes that are fetched rather than making one more request."""


def key(info: ShardInfo, number: int, parts: tuple[int, ...]) -> str:
    """What a disk cache calls these parts of record batch `number`."""
    return f"{info.sha256.hex()}.{number}.{sum(1 << part for part in set(parts)):x}"


def spans(slices: list[Slice]) -> list[list[Slice]]:
    """Rising slices, in groups that are one request each."""
    spans = [slices[:1]]
    for before, after in itertools.pairwise(slices):
        if after[0] - (before[0] + before[1]) <= GAP_BYTES:
            spans[-1].append(after)
        else:
            spans.append([after])
    return spans


def what_is_wrong(data: bytes, start: int, end: int, sums: list[Slice]) -> str:
    """Why these are not bytes [start, end) of the file with these slices; empty if they are."""
    if len(data) != end - start:
        return f"{len(data)} bytes, expected {end - start}"
    view = memoryview(data)
    for offset, length, expected in sums:
        found = crc32c(view[offset - start : offset - start + length])
        if expected not in (found, -1):
            return f"[{offset}, {offset + length}) have crc32c {found:#010x}, expected {expected:#010x}"
    return ""


def is_intact(data: pa.Buffer, slices: list[Slice], parts: tuple[int, ...]) -> bool:
    """Whether a buffer, which starts where the slices do, has the right bytes in the wanted parts."""
    start = slices[0][0]
    wanted = (slices[part] for part in parts)
    return all(crc32c(data.slice(offset - start, length)) == crc for offset, length, crc in wanted)


def assemble(size: int, pieces: list[Piece], start: int) -> pa.Buffer:
    """Read-only bytes [start, start + size) of a file; zeros where there is no piece."""
    if len(pieces) == 1 and len(pieces[0][1]) == size:
        return pa.py_buffer(pieces[0][1])
    if size == 0:
        return pa.py_buffer(b"")
    # Fresh private pages are zero and take memory only where something is written.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset, data in pieces:
        pages[offset - start : offset - start + len(data)] = data
    return pa.py_buffer(memoryview(pages).toreadonly())
