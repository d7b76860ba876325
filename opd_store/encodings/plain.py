"""`plain`: uncompressed and aligned, for reading straight from the mapped file.

Body of P positions and k ranks: u32 ids [P, k], f32 log-probs [P, k], f32 log_tail [P], and where the column
has them u32 draws [P, k], all little-endian. Rows with fewer ranks are padded.
"""

from __future__ import annotations

from opd_store.encodings.page import Band, Bytes
from opd_store.errors import FormatError

CODE = 0
NAMES = {"plain": 0}
"""Name to header parameter."""


def encode(band: Band) -> bytes:
    """Body bytes of one band; 8 * P * k + 4 * P of them, and 4 * P * k more for draws."""
    parts = [
        band.ids.astype("<u4", copy=False),
        band.logprob.astype("<f4", copy=False),
        band.log_tail.astype("<f4"),
    ]
    if band.draws is not None:
        parts.append(band.draws.astype("<u4", copy=False))
    return b"".join(part.tobytes() for part in parts)


def decode(body: Bytes, n_positions: int, n_ranks: int, *, has_draws: bool, where: str) -> Band:
    """Views of the body, without a copy.

    Raises:
        FormatError: the body's length does not fit its shape.
    """
    entries = n_positions * n_ranks
    expected = (12 if has_draws else 8) * entries + 4 * n_positions
    if len(body) != expected:
        raise FormatError(f"{where}: plain body of {len(body)} bytes, expected {expected}")
    words = body.view("<u4")
    floats = body.view("<f4")
    shape = (n_positions, n_ranks)
    tail_end = 2 * entries + n_positions
    return Band(
        words[:entries].reshape(shape),
        floats[entries : 2 * entries].reshape(shape),
        floats[2 * entries : tail_end],
        words[tail_end:].reshape(shape) if has_draws else None,
    )
