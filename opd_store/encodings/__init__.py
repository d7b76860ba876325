"""Page encodings: rows of ids and log-probs to sealed pages and back.

`plain` is mapped as it is. The others are streams of byte planes: counts of short rows, log-probs and tails
(`f32`, `ladder`), ids (`ids`), draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from opd_store import layout
from opd_store.encodings import ladder, plain
from opd_store.encodings.decoding import CODECS as _CODECS
from opd_store.encodings.decoding import PageStreams, decode_into, decode_page, parse_page
from opd_store.encodings.f32 import FloatStreams
from opd_store.encodings.ids import write_ids
from opd_store.encodings.idtable import IdTable, build_id_table
from opd_store.encodings.ladder import LadderStreams
from opd_store.encodings.page import Band, PageShape, check_page_crc, seal_page
from opd_store.encodings.planes import StreamWriter
from opd_store.errors import InvalidArgumentError

__all__ = [
    "ENCODINGS",
    "Band",
    "EncodedPages",
    "FloatStreams",
    "IdTable",
    "LadderStreams",
    "PageShape",
    "PageStreams",
    "Unencodable",
    "build_id_table",
    "check_encoding",
    "check_page_crc",
    "decode_into",
    "decode_page",
    "encode_pages",
    "fold_tail",
    "join_tail",
    "keep_ranks",
    "parse_page",
    "sum_error",
    "value_tolerance",
]

ENCODINGS = tuple(_CODECS)
"""Names that this release reads and writes."""


class Unencodable(Exception):
    """A value that an encoding cannot hold: (whether it is a tail, position, expected, found)."""


@dataclass(frozen=True, slots=True)
class EncodedPages:
    """The pages of one rollout, and how far their values are from those given."""

    pages: list[bytes]
    ids: NDArray[np.uint32]
    """[P, K] in stored order."""
    max_error: float
    """Nats, over log-probs and tails, found by decoding the pages."""


def check_encoding(name: str) -> None:
    """Raise InvalidArgumentError unless this release reads and writes the encoding."""
    if name not in _CODECS:
        raise InvalidArgumentError(
            f"encoding: this release knows {', '.join(ENCODINGS)}; found {name!r:.100}"
        )


def sum_error(encoding: str) -> float:
    """Nats by which rounding to an encoding may lift the log of a sum of probabilities, at most."""
    codec, parameter = _CODECS[encoding], _CODECS[encoding].NAMES[encoding]
    if codec is not ladder:
        return 0.0
    # float16 is off by 2^-11 of the log-prob, and the sum of p |log p| over 4,097 outcomes is below 8.4.
    return 0.5 / parameter if parameter else 2.0**-7


def value_tolerance(encoding: str, max_error: float = 0.0) -> float:
    """How far the decoded probabilities of one position may exceed 1 in sum.

    Writers refuse more than PROBABILITY_TOLERANCE in what they are given. `plain` and `f32` keep that, but
    for the rounding of the tails of inner bands; the others may add their largest error to every log-prob,
    which multiplies every probability by at most exp(error). So may, in any encoding, the `max_error` of a
    cache whose values were rounded in another cache before.
    """
    worst = max(sum_error(encoding), min(max_error, layout.LARGEST_SUM_ERROR))
    exact = layout.PROBABILITY_TOLERANCE + layout.READER_SLACK
    return math.exp(worst) * (1 + exact) - 1


def encode_pages(
    support: Band,
    *,
    encoding: str,
    kind: int = layout.KIND_TOPK,
    bands: tuple[int, ...],
    rollout_hash: bytes,
    id_table: IdTable | None = None,
    tails: Mapping[int, NDArray[np.float32]] | None = None,
) -> EncodedPages:
    """One sealed page per rank band of a rollout.

    Each page carries the tail outside its own last rank, so that a reader of few ranks has a true tail.
    Values that become equal are put in order of their ids. Every page is decoded again and compared.

    Args:
        support: all ranks and the tail beyond them, padded where rows are shorter.
        kind: which support this is.
        bands: rank band ends, the last one the number of ranks.
        id_table: what ids may refer to; `plain` does not.
        tails: where they are known, [P] tails outside the bands that end at these ranks; used if no log-prob
            changes. The others are summed from `support`.

    Raises:
        Unencodable: a value further from what would be decoded than the encoding allows.
    """
    codec = _CODECS[encoding]
    parameter = codec.NAMES[encoding]
    tails = tails or {}
    if codec is not plain:
        decoded_logprob = codec.quantise(support.logprob, parameter)
        for is_tail, given, found in (
            (False, support.logprob, decoded_logprob),
            (True, support.log_tail[:, None], codec.quantise(support.log_tail[:, None], parameter)),
        ):
            _require_encodable(given, found, codec, encoding, is_tail=is_tail)
        if not np.array_equal(decoded_logprob, support.logprob):
            # Ranks that become equal may change places across the end of a band.
            tails = {}
        support = _in_decoded_order(support, decoded_logprob)
    pages = []
    start, max_error = 0, 0.0
    for end in bands:
        part = slice(start, end)
        draws = None if support.draws is None else support.draws[:, part]
        tail = tails[end] if end in tails else fold_tail(support, end)
        band = Band(support.ids[:, part], support.logprob[:, part], tail, draws)
        shape = PageShape(kind, start, end, len(support.log_tail))
        flags, body = 0, b""
        if codec is plain:
            body = plain.encode(band)
        else:
            flags, body = _encode_streams(band, shape, codec, parameter, id_table)
        owner = rollout_hash
        if id_table is not None and flags & layout.PAGE_USES_TABLE:
            owner += id_table.digest
        page = seal_page(body, shape, encoding=codec.CODE, parameter=parameter, flags=flags, owner=owner)
        if codec is not plain:
            decoded = decode_page(
                np.frombuffer(page, np.uint8), shape, encoding=encoding, id_table=id_table, where="page"
            )
            max_error = max(max_error, _largest_error(band, decoded, codec, parameter, encoding))
        pages.append(page)
        start = end
    return EncodedPages(pages, support.ids, max_error)


def _encode_streams(
    band: Band, shape: PageShape, codec: ModuleType, parameter: int, id_table: IdTable | None
) -> tuple[int, bytes]:
    streams = StreamWriter()
    is_id = band.ids != layout.NO_ID
    present = None if is_id.all() else is_id
    flags = 0
    if present is not None:
        flags |= layout.PAGE_RAGGED
        streams.ints(present.sum(axis=1))
    codec.write_logprobs(streams, band.logprob, band.log_tail, present, shape, parameter=parameter)
    write_ids(streams, band.ids, present, id_table)
    if id_table is not None:
        flags |= layout.PAGE_USES_TABLE
    if band.draws is not None:
        streams.ints(band.draws if present is None else band.draws[present])
    return flags, streams.body()


def _in_decoded_order(support: Band, decoded: NDArray[np.float32]) -> Band:
    """The same rows by falling decoded log-prob, ties by rising id."""
    magnitude = np.abs(decoded).view(np.uint32).astype(np.int64)
    order = np.argsort(magnitude << 32 | support.ids, axis=1, kind="stable")
    draws = support.draws
    return Band(
        np.take_along_axis(support.ids, order, axis=1),
        np.take_along_axis(support.logprob, order, axis=1),
        support.log_tail,
        None if draws is None else np.take_along_axis(draws, order, axis=1),
    )


def _require_encodable(
    given: NDArray[np.float32],
    found: NDArray[np.float32],
    codec: ModuleType,
    encoding: str,
    *,
    is_tail: bool,
) -> None:
    """Raise Unencodable where a value is further from what will be decoded than the encoding allows."""
    finite = np.isfinite(given)
    with np.errstate(invalid="ignore"):
        error = np.abs(given.astype(np.float64) - found)
    wrong = (finite & (error > codec.error_bound(given, codec.NAMES[encoding]))).any(axis=1)
    if wrong.any():
        at = int(np.argmax(wrong))
        lowest = float(given[at].min(where=finite[at], initial=0.0))
        raise Unencodable(is_tail, at, f"a value that {encoding} can hold (f32 holds any)", lowest)


def _largest_error(band: Band, decoded: Band, codec: ModuleType, parameter: int, encoding: str) -> float:
    """How far a decoded page is from what it was made of. A page that is further off is our mistake."""
    assert np.array_equal(band.ids, decoded.ids), f"{encoding} changed an id"
    if band.draws is not None and decoded.draws is not None:
        assert np.array_equal(band.draws, decoded.draws), f"{encoding} changed a number of draws"
    largest = 0.0
    for given, found in ((band.logprob, decoded.logprob), (band.log_tail, decoded.log_tail)):
        finite = np.isfinite(given)
        error = np.abs(given[finite].astype(np.float64) - found[finite])
        assert (error <= codec.error_bound(given[finite], parameter)).all(), f"{encoding} missed its bound"
        assert np.array_equal(given[~finite], found[~finite]), f"{encoding} changed an infinite value"
        largest = max(largest, float(error.max(initial=0.0)))
    return largest


def keep_ranks(band: Band, ranks: int) -> Band:
    """The first ranks as views; the others join the tail."""
    if ranks == band.ids.shape[1]:
        return band
    return Band(band.ids[:, :ranks], band.logprob[:, :ranks], fold_tail(band, ranks))


def fold_tail(band: Band, ranks: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """[P] float32: the tail outside the first `ranks`, from float64 sums of the ranks that join it."""
    if ranks < band.logprob.shape[1]:
        return join_tail(band.log_tail, band.logprob[:, ranks:])
    return band.log_tail.astype(np.float32, copy=False)


def join_tail(
    log_tail: NDArray[np.float32], rest: NDArray[np.float32]
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """[P] float32: the tail with the ranks `rest` [P, n] in it; -inf adds nothing."""
    total = np.logaddexp(log_tail.astype(np.float64), np.logaddexp.reduce(rest.astype(np.float64), axis=1))
    # Rounding to float32 can lift the log of a probability of one above zero.
    return np.minimum(total, 0.0).astype(np.float32)
