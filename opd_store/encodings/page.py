"""The envelope of one encoded page: 24 bytes of header, a body, zeros up to a multiple of eight.

A page holds one rollout's ranks [rank_start, rank_end) at every response position. Its checksum starts from
the rollout hash, so a page read alone from a bucket proves both its bytes and whose they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_store import layout
from opd_store.errors import FormatError, IntegrityError
from opd_store.hashing import crc32c

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Band:
    """Decoded ranks of one page. P = positions, k = rank_end - rank_start."""

    ids: NDArray[np.uint32]
    """[P, k] token ids; NO_ID where a row ends earlier."""
    logprob: NDArray[np.float32]
    """[P, k] nats, falling along a row; -inf where a row ends earlier."""
    log_tail: NDArray[np.float32]
    """[P] nats, the teacher's probability outside ranks [0, rank_end)."""
    draws: NDArray[np.uint32] | None = None
    """[P, k] how often each id was drawn, 0 where a row ends earlier; None for columns without draws."""


def page_size(body_bytes: int) -> int:
    """Bytes of a page with this body, padding included."""
    unpadded = layout.PAGE_HEADER.size + body_bytes
    return unpadded + -unpadded % layout.PAGE_ALIGNMENT


@dataclass(frozen=True, slots=True)
class PageShape:
    """What a row says its page is, and its header has to repeat."""

    kind: int
    """Which support the page holds: layout.KIND_TOPK, KIND_CHOSEN or KIND_SAMPLED."""
    rank_start: int
    rank_end: int
    n_positions: int

    @property
    def n_ranks(self) -> int:
        """k."""
        return self.rank_end - self.rank_start

    @property
    def decoded_bytes(self) -> int:
        """What decoding may allocate: ids, log-probs and draws of every entry, and the tails."""
        return (12 * self.n_ranks + 4) * self.n_positions

    def entries(self, start: int, end: int, counts: NDArray[np.intp] | None) -> int:
        """Entries that ranks [start, end) have, if row p has counts[p] of the page's ranks (None: all)."""
        if counts is None:
            return self.n_positions * (end - start)
        first, last = start - self.rank_start, end - self.rank_start
        return int((np.clip(counts, first, last) - first).sum())

    def rank_groups(self) -> list[tuple[int, int]]:
        """Ranks after the first, cut at 8, 16, 32, ...: their differences, of like size, share a stream."""
        cuts = [self.rank_start + 1]
        cut = 8
        while cut < self.rank_end:
            if cut > self.rank_start + 1:
                cuts.append(cut)
            cut *= 2
        ends = [*cuts[1:], self.rank_end]
        return [(start, end) for start, end in zip(cuts, ends, strict=True) if start < end]


def seal_page(
    body: bytes, shape: PageShape, *, encoding: int, parameter: int, flags: int, owner: bytes
) -> bytes:
    """Put the envelope around an encoded body.

    Args:
        owner: what the page belongs to: its rollout's hash, followed by the digest of the id table if its
            ids refer to one.
    """
    flags |= shape.kind << layout.PAGE_KIND_SHIFT
    fields = (encoding, flags, shape.rank_start, shape.rank_end, 0, shape.n_positions, len(body), parameter)
    header = layout.PAGE_HEADER.pack(*fields, 0)[: layout.PAGE_CRC_OFFSET]
    padded = body + bytes(page_size(len(body)) - layout.PAGE_HEADER.size - len(body))
    checksum = crc32c(padded, crc32c(owner + header))
    return header + checksum.to_bytes(4, "little") + padded


def open_page(
    page: Bytes, shape: PageShape, *, encoding: int, parameter: int, where: str
) -> tuple[int, Bytes]:
    """Check the envelope against what the row and the manifest say it holds.

    Args:
        page: all bytes of the page, uint8.
        where: names file, row and column in errors.

    Returns:
        The flags without the kind, and a view of the body.

    Raises:
        FormatError: impossible or unexpected header fields, or padding that is not zero.
    """
    if len(page) < layout.PAGE_HEADER.size:
        raise FormatError(
            f"{where}: page of {len(page)} bytes, shorter than its {layout.PAGE_HEADER.size}-byte header"
        )
    if len(page) > layout.MAX_PAGE_BYTES:
        raise FormatError(f"{where}: page of {len(page)} bytes, the limit is {layout.MAX_PAGE_BYTES}")
    found_encoding, flags, start, end, reserved, positions, body_bytes, found_parameter, _ = (
        layout.PAGE_HEADER.unpack_from(page)
    )
    if (found_encoding, found_parameter) != (encoding, parameter):
        raise FormatError(
            f"{where}: page encoding {found_encoding} with parameter {found_parameter}, "
            f"the manifest declares {encoding} with {parameter}"
        )
    kind, flags = flags >> layout.PAGE_KIND_SHIFT, flags & (1 << layout.PAGE_KIND_SHIFT) - 1
    if reserved or flags & ~layout.PAGE_FLAGS:
        raise FormatError(f"{where}: reserved page header fields are not zero: {flags}, {reserved}")
    if (kind, start, end, positions) != (shape.kind, shape.rank_start, shape.rank_end, shape.n_positions):
        raise FormatError(
            f"{where}: page of kind {kind}, ranks [{start}, {end}) at {positions} positions, expected kind "
            f"{shape.kind}, [{shape.rank_start}, {shape.rank_end}) at {shape.n_positions}"
        )
    if page_size(body_bytes) != len(page):
        raise FormatError(f"{where}: page of {len(page)} bytes, but its header gives {page_size(body_bytes)}")
    body_end = layout.PAGE_HEADER.size + body_bytes
    if page[body_end:].tobytes().strip(b"\0"):
        raise FormatError(f"{where}: padding after the page body is not zero")
    return flags, page[layout.PAGE_HEADER.size : body_end]


def check_page_crc(page: Bytes, rollout_hash: bytes, table_digest: bytes | None, *, where: str) -> None:
    """Compare a page with its own checksum.

    Raises:
        IntegrityError: changed bytes, another rollout's page, or another id table.
        FormatError: a page that refers to an id table where there is none.
    """
    start = layout.PAGE_CRC_OFFSET
    if len(page) < layout.PAGE_HEADER.size:
        raise FormatError(f"{where}: page of {len(page)} bytes, shorter than its header")
    owner = rollout_hash
    if page[1] & layout.PAGE_USES_TABLE:
        if table_digest is None:
            raise FormatError(f"{where}: the page refers to an id table, and the cache has none")
        owner += table_digest
    stored = int.from_bytes(page[start : start + 4].tobytes(), "little")
    found = crc32c(page[start + 4 :], crc32c(owner + page[:start].tobytes()))
    if stored != found:
        raise IntegrityError(
            f"{where}: page checksum is crc32c {found:#010x}, expected {stored:#010x}. "
            "Run `opd verify` on this cache, then fetch the file again."
        )
