"""`plain`: uncompressed and aligned, for reading straight from the mapped file.

Body of P positions and k ranks: u32 ids [P, k], f32 log-probs [P, k], f32 log_tail [P], all little-endian.
"""

from __future__ import annotations

from opd_store.encodings.page import Band, Bytes
from opd_store.errors import FormatError

CODE = 0
NAME = "plain"


def encode(band: Band) -> bytes:
    """Body bytes of one band; 8 * P * k + 4 * P of them."""
    parts = (
        band.ids.astype("<u4", copy=False),
        band.logprob.astype("<f4", copy=False),
        band.log_tail.astype("<f4"),
    )
    return b"".join(part.tobytes() for part in parts)


def decode(body: Bytes, n_positions: int, n_ranks: int, *, where: str) -> Band:
    """Views of the body, without a copy.

    Raises:
        FormatError: the body's length does not fit its shape.
    """
    entries = n_positions * n_ranks
    if len(body) != 8 * entries + 4 * n_positions:
        raise FormatError(
            f"{where}: plain body of {len(body)} bytes, expected {8 * entries + 4 * n_positions}"
        )
    words = body.view("<u4")
    floats = body.view("<f4")
    shape = (n_positions, n_ranks)
    return Band(
        words[:entries].reshape(shape), floats[entries : 2 * entries].reshape(shape), floats[2 * entries :]
    )
