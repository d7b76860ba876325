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
    """[P, k] token ids."""
    logprob: NDArray[np.float32]
    """[P, k] nats, falling along a row."""
    log_tail: NDArray[np.float32]
    """[P] nats, the teacher's probability outside ranks [0, rank_end)."""


def page_size(body_bytes: int) -> int:
    """Bytes of a page with this body, padding included."""
    unpadded = layout.PAGE_HEADER.size + body_bytes
    return unpadded + -unpadded % layout.PAGE_ALIGNMENT


def seal_page(
    body: bytes, *, encoding: int, rank_start: int, rank_end: int, n_positions: int, rollout_hash: bytes
) -> bytes:
    """Put the envelope around an encoded body."""
    fields = (encoding, 0, rank_start, rank_end, 0, n_positions, len(body), 0)
    header = layout.PAGE_HEADER.pack(*fields, 0)[: layout.PAGE_CRC_OFFSET]
    padded = body + bytes(page_size(len(body)) - layout.PAGE_HEADER.size - len(body))
    checksum = crc32c(padded, crc32c(rollout_hash + header))
    return header + checksum.to_bytes(4, "little") + padded


def open_page(
    page: Bytes, *, rank_start: int, rank_end: int, n_positions: int, where: str
) -> tuple[int, Bytes]:
    """Check the envelope against what the row says it holds.

    Args:
        page: all bytes of the page, uint8.
        where: names file, row and column in errors.

    Returns:
        The encoding code, and a view of the body.

    Raises:
        FormatError: impossible or unexpected header fields, or padding that is not zero.
    """
    if len(page) < layout.PAGE_HEADER.size:
        raise FormatError(
            f"{where}: page of {len(page)} bytes, shorter than its {layout.PAGE_HEADER.size}-byte header"
        )
    if len(page) > layout.MAX_PAGE_BYTES:
        raise FormatError(f"{where}: page of {len(page)} bytes, the limit is {layout.MAX_PAGE_BYTES}")
    encoding, flags, start, end, reserved, positions, body_bytes, parameter, _ = (
        layout.PAGE_HEADER.unpack_from(page)
    )
    if flags or reserved or parameter:
        raise FormatError(
            f"{where}: reserved page header fields are not zero: {flags}, {reserved}, {parameter}"
        )
    if (start, end, positions) != (rank_start, rank_end, n_positions):
        raise FormatError(
            f"{where}: page of ranks [{start}, {end}) at {positions} positions, "
            f"expected [{rank_start}, {rank_end}) at {n_positions}"
        )
    if page_size(body_bytes) != len(page):
        raise FormatError(f"{where}: page of {len(page)} bytes, but its header gives {page_size(body_bytes)}")
    body_end = layout.PAGE_HEADER.size + body_bytes
    if page[body_end:].any():
        raise FormatError(f"{where}: padding after the page body is not zero")
    return encoding, page[layout.PAGE_HEADER.size : body_end]


def check_page_crc(page: Bytes, rollout_hash: bytes, *, where: str) -> None:
    """Compare a page with its own checksum.

    Raises:
        IntegrityError: changed bytes, or another rollout's page.
    """
    start = layout.PAGE_CRC_OFFSET
    stored = int.from_bytes(page[start : start + 4].tobytes(), "little")
    found = crc32c(page[start + 4 :], crc32c(rollout_hash + page[:start].tobytes()))
    if stored != found:
        raise IntegrityError(
            f"{where}: page checksum is crc32c {found:#010x}, expected {stored:#010x}. "
            "Run `opd verify` on this cache, then fetch the file again."
        )
