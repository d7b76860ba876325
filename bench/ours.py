"""This project's page encodings behind the calls that the benchmark programs use.

A rollout here is one window. Sizes are those of whole pages with their headers and checksums; `decode` checks
the checksum of every page it reads, as the cache does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opd_store import encodings as pages_of

DEFAULT_BANDS = (8, 16, 32, 64, 128)
"""Where writers split ranks unless told otherwise."""
ROLLOUT_HASH = bytes(32)


def encodings() -> list[str]:
    """Names to measure."""
    return ["plain"]


def bands_of(topk: int) -> tuple[int, ...]:
    """The default bands of a cache of `topk` ranks."""
    return (*(end for end in DEFAULT_BANDS if end < topk), topk)


def encode(
    ids: NDArray[np.uint32],
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    *,
    encoding: str,
    bands: tuple[int, ...],
    context: NDArray[np.uint32] | None = None,
) -> list[bytes]:
    """Pages of one rollout, one a band.

    Args:
        ids, logprob: [P, K].
        log_tail: [P].
        context: [P] the token before each position, for id tables keyed by it.
    """
    del context
    topk = pages_of.Band(ids, logprob, log_tail)
    return pages_of.encode_pages(topk, encoding=encoding, bands=bands, rollout_hash=ROLLOUT_HASH)


def decode(
    pages: list[bytes],
    *,
    bands: tuple[int, ...],
    n_positions: int,
    ranks: int | None = None,
    context: NDArray[np.uint32] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """The first `ranks` ranks, or all, reading no page beyond them."""
    del context
    ranks = bands[-1] if ranks is None else ranks
    found = []
    start = 0
    for page, end in zip(pages, bands, strict=False):
        if start >= ranks:
            break
        buffer = np.frombuffer(page, np.uint8)
        pages_of.check_page_crc(buffer, ROLLOUT_HASH, where="bench")
        shape = {"rank_start": start, "rank_end": end, "n_positions": n_positions}
        found.append(pages_of.decode_page(buffer, **shape, where="bench"))
        start = end
    band = pages_of.merge_bands(found, ranks)
    return band.ids.view(np.int32), band.logprob, band.log_tail
