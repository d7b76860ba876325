"""Page encodings. A new one is one module and one entry in each table."""

from __future__ import annotations

import numpy as np

from opd_store.encodings import plain
from opd_store.encodings.page import Band, Bytes, check_page_crc, open_page, seal_page
from opd_store.errors import FormatError, InvalidArgumentError

__all__ = ["Band", "check_encoding", "check_page_crc", "decode_page", "encode_pages", "merge_bands"]

_CODECS = (plain,)
_BY_NAME = {codec.NAME: codec for codec in _CODECS}
_BY_CODE = {codec.CODE: codec for codec in _CODECS}


def check_encoding(name: str) -> None:
    """Raise InvalidArgumentError unless this release reads and writes the encoding."""
    if name not in _BY_NAME:
        raise InvalidArgumentError(f"encoding: this release knows {', '.join(_BY_NAME)}; found {name!r:.100}")


def encode_pages(topk: Band, *, encoding: str, bands: tuple[int, ...], rollout_hash: bytes) -> list[bytes]:
    """One sealed page per rank band of a rollout.

    Each page carries the tail outside its own last rank, so that a reader of few ranks has a true tail.

    Args:
        topk: all K ranks and the tail beyond them.
        bands: rank band ends, the last one K.
    """
    codec = _BY_NAME[encoding]
    pages = []
    start = 0
    for end in bands:
        band = Band(topk.ids[:, start:end], topk.logprob[:, start:end], fold_tail(topk, end))
        shape = {"rank_start": start, "rank_end": end, "n_positions": len(topk.log_tail)}
        pages.append(seal_page(codec.encode(band), encoding=codec.CODE, rollout_hash=rollout_hash, **shape))
        start = end
    return pages


def decode_page(page: Bytes, *, rank_start: int, rank_end: int, n_positions: int, where: str) -> Band:
    """Decode one page whose bytes are already trusted; `plain` without a copy.

    Raises:
        FormatError: the page breaks the specification.
    """
    encoding, body = open_page(
        page, rank_start=rank_start, rank_end=rank_end, n_positions=n_positions, where=where
    )
    if encoding not in _BY_CODE:
        raise FormatError(f"{where}: page encoding {encoding}, which this release does not know")
    band: Band = _BY_CODE[encoding].decode(body, n_positions, rank_end - rank_start, where=where)
    return band


def merge_bands(bands: list[Band], ranks: int) -> Band:
    """Ranks [0, ranks) out of consecutive bands that hold at least so many. One band stays a view."""
    if len(bands) == 1:
        whole = bands[0]
    else:
        ids = np.concatenate([band.ids for band in bands], axis=1)
        logprob = np.concatenate([band.logprob for band in bands], axis=1)
        whole = Band(ids, logprob, bands[-1].log_tail)
    if ranks == whole.ids.shape[1]:
        return whole
    return Band(whole.ids[:, :ranks], whole.logprob[:, :ranks], fold_tail(whole, ranks))


def fold_tail(band: Band, ranks: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """[P] float32: the tail outside the first `ranks`, from float64 sums of the ranks that join it."""
    folded = band.log_tail
    if ranks < band.logprob.shape[1]:
        rest = band.logprob[:, ranks:].astype(np.float64)
        folded = np.logaddexp(folded.astype(np.float64), np.logaddexp.reduce(rest, axis=1))
        # Rounding to float32 can lift the log of a probability of one above zero.
        folded = np.minimum(folded, 0.0)
    return folded.astype(np.float32, copy=False)
