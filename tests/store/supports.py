"""Bands of every shape, and the slow checks of what an encoding may do to them."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from opd_store import layout
from opd_store.encodings import Band, IdTable, PageShape, build_id_table, decode_page, encode_pages
from opd_store.testing import peaked_topk, random_topk, shortened

VOCAB = 300
OWNER = bytes(range(32))
KINDS = {
    "topk": layout.KIND_TOPK,
    "chosen": layout.KIND_CHOSEN,
    "sampled": layout.KIND_SAMPLED,
}
TABLES: dict[str, IdTable | None] = {
    "none": None,
    "frequency": build_id_table(
        [peaked_topk(np.random.default_rng(1), 50, 20, VOCAB).ids], vocab_size=VOCAB, n_lists=0
    ),
    "lists": build_id_table(
        [peaked_topk(np.random.default_rng(2), 300, 20, VOCAB).ids], vocab_size=VOCAB, n_lists=5
    ),
}


def largest_error(encoding: str, given: NDArray[np.float32]) -> NDArray[np.float64]:
    """Nats that an encoding may add to or take from each value, from its description alone."""
    if encoding in ("plain", "f32"):
        return np.zeros(given.shape)
    if encoding == "ladder16":
        finite = np.where(np.isfinite(given), given, np.float32(-1))
        # float16 has 10 bits after the leading one; below 2^-14 its steps stay 2^-24.
        exponent = np.floor(np.log2(np.maximum(np.abs(finite.astype(np.float64)), 2.0**-14)))
        return 2.0 ** (exponent - 11)
    return np.full(given.shape, 0.5 / int(encoding.partition("/")[2]))


@st.composite
def free_rows(draw: st.DrawFn, positions: int, size: int) -> Band:
    """Rows of single values that hypothesis chooses: zeros of both signs, subnormals, ties, huge gaps."""
    value = st.floats(-60000, 0, width=32) | st.sampled_from([0.0, -0.0, -1e-40, -1.0, -2.0, -np.inf])
    rows = [[draw(value) for _ in range(size + 1)] for _ in range(positions)]
    values = np.array(rows, np.float32)
    sums = np.exp(values.astype(np.float64)).sum(axis=1, keepdims=True)
    values = np.where(sums > 1, values - np.float32(np.log(size + 1) + 1e-6), values).astype(np.float32)
    tail, values = values[:, 0], np.maximum(values[:, 1:], np.float32(-60000))
    first = draw(st.integers(0, VOCAB - size))
    ids = np.array([draw(st.permutations(range(first, first + size))) for _ in range(positions)], np.uint32)
    order = np.lexsort((ids, -values), axis=1)
    return Band(np.take_along_axis(ids, order, axis=1), np.take_along_axis(values, order, axis=1), tail)


@st.composite
def supports(draw: st.DrawFn, kind: str = "topk", *, ragged: bool = False) -> Band:
    """All ranks of a rollout: flat, peaked or free, with ties, tails of nothing, zeros of both signs."""
    how = draw(st.sampled_from(["flat", "peaked", "free"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if how == "free":
        band = draw(free_rows(draw(st.integers(1, 3)), draw(st.integers(1, 6))))
    else:
        positions = draw(st.integers(1, 12))
        size = draw(st.sampled_from([1, 2, 7, 8, 9, 17, 40, VOCAB]))
        make = random_topk if how == "flat" else peaked_topk
        band = make(rng, positions, size, VOCAB, draw(st.none() | st.integers(0, 3)))
    if ragged:
        band = shortened(rng, band, least=1 if kind == "topk" else 0)
    if kind != "sampled":
        return band
    draws = rng.integers(1, draw(st.sampled_from([2, 300, 2**32 - 1])), band.ids.shape, np.uint32)
    return Band(
        band.ids, band.logprob, band.log_tail, np.where(band.ids == layout.NO_ID, np.uint32(0), draws)
    )


def band_ends(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Any way to cut `size` ranks into at most 6 bands."""
    ends = st.sets(st.integers(1, max(size - 1, 1)), max_size=5)
    return ends.map(lambda chosen: (*sorted(chosen - {size}), size))


def encode(
    band: Band,
    encoding: str,
    *,
    kind: str = "topk",
    bands: tuple[int, ...] | None = None,
    table: IdTable | None = None,
) -> tuple[list[bytes], float]:
    """The pages of one support, and the error that the encoder reports."""
    encoded = encode_pages(
        band,
        encoding=encoding,
        kind=KINDS[kind],
        bands=bands or (band.ids.shape[1],),
        rollout_hash=OWNER,
        id_table=None if encoding == "plain" else table,
    )
    return encoded.pages, encoded.max_error


def decode(
    pages: list[bytes],
    encoding: str,
    positions: int,
    *,
    kind: str = "topk",
    bands: tuple[int, ...],
    table: IdTable | None = None,
) -> list[Band]:
    """Every page on its own."""
    starts = (0, *bands[:-1])
    return [
        decode_page(
            np.frombuffer(page, np.uint8),
            PageShape(KINDS[kind], start, end, positions),
            encoding=encoding,
            id_table=None if encoding == "plain" else table,
            where="test",
        )
        for page, start, end in zip(pages, starts, bands, strict=True)
    ]


def assert_decoded(found: Band, given: Band, encoding: str) -> None:
    """Ids exact in decoded order, values inside the bound, and nothing else lost, one position at a time."""
    assert found.ids.dtype == np.uint32
    assert found.logprob.dtype == found.log_tail.dtype == np.float32
    assert found.ids.shape == found.logprob.shape == given.ids.shape
    assert (found.draws is None) == (given.draws is None)
    bound = largest_error(encoding, given.logprob)
    tail_bound = largest_error(encoding, given.log_tail)
    for at in range(len(given.ids)):
        entries = {}
        for rank, token in enumerate(given.ids[at].tolist()):
            if token != layout.NO_ID:
                draws = None if given.draws is None else int(given.draws[at, rank])
                entries[token] = (float(given.logprob[at, rank]), float(bound[at, rank]), draws)
        n = len(entries)
        assert set(found.ids[at, :n].tolist()) == entries.keys()
        assert (found.ids[at, n:] == layout.NO_ID).all()
        assert np.isneginf(found.logprob[at, n:]).all()
        assert found.draws is None or not found.draws[at, n:].any()
        decoded = found.logprob[at, :n].astype(np.float64)
        for rank, token in enumerate(found.ids[at, :n].tolist()):
            value, allowed, draws = entries[token]
            assert abs(decoded[rank] - value) <= allowed, (encoding, value, decoded[rank])
            assert found.draws is None or found.draws[at, rank] == draws
        pairs = list(zip((-decoded).tolist(), found.ids[at, :n].tolist(), strict=True))
        assert pairs == sorted(pairs), "not by falling log-prob, ties by rising id"
    empty = np.isneginf(given.log_tail)
    assert (np.isneginf(found.log_tail) == empty).all()
    error = np.abs(found.log_tail[~empty].astype(np.float64) - given.log_tail[~empty])
    assert (error <= tail_bound[~empty]).all()
    if encoding in ("plain", "f32"):
        assert found.ids.tobytes() == given.ids.tobytes()
        assert found.logprob.tobytes() == given.logprob.tobytes()
        assert found.log_tail.tobytes() == given.log_tail.tobytes()


def naive_tail(band: Band, ranks: int) -> NDArray[np.float64]:
    """[P] log of the probability outside the first `ranks`, at most 0, one position at a time."""
    tails = []
    for row, tail in zip(band.logprob[:, ranks:].tolist(), band.log_tail.tolist(), strict=True):
        outside = [value for value in (*row, tail) if value != -math.inf]
        largest = max(outside, default=-math.inf)
        # Relative to the largest, since exp() of -746 and less is 0.
        total = math.fsum(math.exp(value - largest) for value in outside)
        tails.append(min(largest + math.log(total), 0.0) if outside else -math.inf)
    return np.array(tails)


def in_order_of(band: Band, ids: NDArray[np.uint32]) -> Band:
    """The same values where the same ids stand in another order, padding last."""
    lookups = [dict(zip(*rows, strict=True)) for rows in zip(band.ids.tolist(), band.logprob, strict=True)]
    values = [
        [lookup[token] if token != layout.NO_ID else -np.inf for token in row]
        for lookup, row in zip(lookups, ids.tolist(), strict=True)
    ]
    return Band(ids, np.array(values, np.float32), band.log_tail)


def merge_bands(bands: list[Band]) -> Band:
    """Consecutive bands from the first one on, side by side. One band stays a view."""
    if len(bands) == 1:
        return bands[0]
    ids = np.concatenate([band.ids for band in bands], axis=1)
    logprob = np.concatenate([band.logprob for band in bands], axis=1)
    return Band(ids, logprob, bands[-1].log_tail)
