"""Pages of every encoding, kind, band and id table hold what was given, within their bound."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store import supports
from store.caches import some_rollouts, write
from store.supports import (
    KINDS,
    OWNER,
    TABLES,
    VOCAB,
    assert_decoded,
    band_ends,
    decode,
    encode,
    in_order_of,
    largest_error,
    merge_bands,
    naive_tail,
)

import opd_store
from opd_store import ENCODINGS, layout
from opd_store.encodings import (
    Band,
    PageShape,
    check_page_crc,
    decode_page,
    encode_pages,
    keep_ranks,
    value_tolerance,
)
from opd_store.encodings.page import seal_page
from opd_store.errors import FormatError
from opd_store.testing import example_meta, peaked_topk
from opd_store.values import support_problem

LOSSY = [name for name in ENCODINGS if name not in ("plain", "f32")]


@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_a_support_comes_back(encoding, kind, ragged, data):
    given_band = data.draw(supports.supports(kind, ragged=ragged))
    table = TABLES[data.draw(st.sampled_from(sorted(TABLES)))]
    n_positions, size = given_band.ids.shape
    pages, _ = encode(given_band, encoding, kind=kind, table=table)
    (found,) = decode(pages, encoding, n_positions, kind=kind, bands=(size,), table=table)
    assert_decoded(found, given_band, encoding)
    for page in pages:
        assert len(page) % layout.PAGE_ALIGNMENT == 0
        digest = None if table is None else table.digest
        check_page_crc(np.frombuffer(page, np.uint8), OWNER, digest, where="test")
    problem = support_problem(
        kind,
        found.ids,
        found.logprob,
        found.log_tail,
        draws=found.draws,
        vocab_size=VOCAB,
        ragged=ragged,
        tolerance=value_tolerance(encoding),
    )
    assert problem is None
    # What was decoded once is a fixed point: nothing moves any more.
    again, second_error = encode(found, encoding, kind=kind, table=table)
    assert again == pages
    assert second_error == 0


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(deadline=None, max_examples=25)
@given(data=st.data(), ragged=st.booleans())
def test_bands_are_read_alone_and_joined(encoding, data, ragged):
    given_band = data.draw(supports.supports(ragged=ragged))
    table = TABLES[data.draw(st.sampled_from(sorted(TABLES)))]
    n_positions, size = given_band.ids.shape
    ends = data.draw(band_ends(size))
    pages, _ = encode(given_band, encoding, bands=ends, table=table)
    bands = decode(pages, encoding, n_positions, bands=ends, table=table)
    whole = keep_ranks(merge_bands(bands), size)
    assert_decoded(whole, given_band, encoding)
    sorted_band = in_order_of(given_band, whole.ids)
    for end, band in zip(ends, bands, strict=True):
        # The band's own tail is that of the values given, within the bound and one rounding to float32.
        given_tail = naive_tail(sorted_band, end)
        empty = np.isneginf(given_tail)
        assert (np.isneginf(band.log_tail) == empty).all()
        error = np.abs(band.log_tail[~empty] - given_tail[~empty])
        rounding = 2.0**-22 * np.maximum(1, np.abs(given_tail[~empty]))
        allowed = largest_error(encoding, given_tail[~empty].astype(np.float32))
        assert (error <= allowed * (1 + 2.0**-10) + rounding).all()
    if len(ends) == 1:
        return
    again, _ = encode(whole, encoding, bands=ends, table=table)
    same = keep_ranks(merge_bands(decode(again, encoding, n_positions, bands=ends, table=table)), size)
    for name in ("ids", "logprob", "log_tail"):
        assert getattr(same, name).tobytes() == getattr(whole, name).tobytes()
    assert again[-1] == pages[-1]


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(deadline=None, max_examples=20)
@given(data=st.data(), ragged=st.booleans())
def test_few_ranks_are_a_prefix_and_the_rest_joins_the_tail(encoding, data, ragged):
    given_band = data.draw(supports.supports(ragged=ragged))
    n_positions, size = given_band.ids.shape
    ends = data.draw(band_ends(size))
    pages, _ = encode(given_band, encoding, bands=ends)
    bands = decode(pages, encoding, n_positions, bands=ends)
    whole = keep_ranks(merge_bands(bands), size)
    for ranks in range(1, size + 1) if size < 50 else (1, 2, 100, size - 1, size):
        n_bands = next(number for number, end in enumerate(ends, 1) if end >= ranks)
        found = keep_ranks(merge_bands(bands[:n_bands]), ranks)
        assert found.ids.tobytes() == np.ascontiguousarray(whole.ids[:, :ranks]).tobytes()
        assert found.logprob.tobytes() == np.ascontiguousarray(whole.logprob[:, :ranks]).tobytes()
        read = keep_ranks(merge_bands(bands[:n_bands]), ends[n_bands - 1])
        tail = naive_tail(read, ranks)
        np.testing.assert_allclose(found.log_tail, tail, rtol=2.0**-22, atol=2.0**-22)
        problem = support_problem(
            "topk",
            found.ids,
            found.logprob,
            found.log_tail,
            vocab_size=VOCAB,
            ragged=ragged,
            tolerance=value_tolerance(encoding),
        )
        assert problem is None


@pytest.mark.parametrize("encoding", LOSSY)
def test_values_that_become_equal_are_ordered_by_id(encoding):
    """Given in falling order with falling ids; one unit holds all four."""
    ids = np.array([[9, 7, 5, 3]], np.uint32)
    step = 2.0**-13
    logprob = np.array([[-3.0, -3.0 - step, -3.0 - 2 * step, -3.0 - 3 * step]], np.float32)
    draws = np.array([[1, 2, 3, 4]], np.uint32)
    band = Band(ids, logprob, np.array([-0.3], np.float32), draws)
    pages, _ = encode(band, encoding, kind="sampled")
    (found,) = decode(pages, encoding, 1, kind="sampled", bands=(4,))
    assert found.ids.tolist() == [[3, 5, 7, 9]]
    assert found.draws.tolist() == [[4, 3, 2, 1]]
    assert set(found.logprob[0].tolist()) == {-3.0}
    # Across a band's end: the first band holds the smaller ids.
    band = Band(ids, logprob, band.log_tail)
    first, second = decode(encode(band, encoding, bands=(2, 4))[0], encoding, 1, bands=(2, 4))
    assert (first.ids.tolist(), second.ids.tolist()) == ([[3, 5]], [[7, 9]])


@pytest.mark.parametrize("encoding", ["plain", "f32"])
def test_the_sign_of_zero_is_kept(encoding):
    logprob = np.array([[-0.0, -60.0], [0.0, -60.0]], np.float32)
    band = Band(np.array([[4, 2], [4, 2]], np.uint32), logprob, np.array([-np.inf, -np.inf], np.float32))
    (found,) = decode(encode(band, encoding)[0], encoding, 2, bands=(2,))
    assert found.logprob.tobytes() == logprob.tobytes()
    tail = np.array([-0.0, 0.0], np.float32)
    band = Band(band.ids[:, :1], np.full((2, 1), -60, np.float32), tail)
    (found,) = decode(encode(band, encoding)[0], encoding, 2, bands=(1,))
    assert found.log_tail.tobytes() == tail.tobytes()


@pytest.mark.parametrize("encoding", LOSSY)
def test_a_certain_token_is_zero_without_a_sign(encoding):
    band = Band(np.zeros((2, 1), np.uint32), np.array([[-0.0], [0.0]], np.float32), np.zeros(2, np.float32))
    (found,) = decode(encode(band, encoding)[0], encoding, 2, bands=(1,))
    assert found.logprob.tobytes() == bytes(8)
    assert found.log_tail.tobytes() == bytes(8)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("step", [0, 1, 254, 255, 256, 510, 511, 65535, 65536 + 255])
def test_steps_around_the_escape(encoding, step):
    """In units of each encoding, between ranks that share a stream and at the head of a band."""
    units = {"plain": 128, "f32": 128, "ladder16": 0}.get(encoding) or int(encoding.partition("/")[2] or 0)
    if units:
        values = [-1.0, -1.0 - step / units, -1.0 - step / units - 1 / units]
    else:
        # The last pattern of a finite float16 is 0x7BFF.
        pattern = np.minimum([0x3C00, 0x3C00 + step, 0x3C00 + step + 1], [0x3C00, 0x7BFE, 0x7BFF])
        values = (-pattern.astype(np.uint16).view(np.float16).astype(np.float32)).tolist()
    band = Band(
        np.array([[1, 2, 3]], np.uint32),
        np.array([values], np.float32),
        np.array([-2.0], np.float32),
    )
    for ends in ((3,), (1, 3), (1, 2, 3)):
        found = keep_ranks(
            merge_bands(decode(encode(band, encoding, bands=ends)[0], encoding, 1, bands=ends)), 3
        )
        assert found.logprob.tobytes() == band.logprob.tobytes()


@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "ends",
    [(8, 64, 128), (128,), (1, 7, 9, 15, 16, 17, 31, 33, 64, 65, 128)],
    ids=lambda ends: str(len(ends)),
)
def test_rank_groups_of_every_band(encoding, ends, ragged):
    rng = np.random.default_rng(3)
    band = peaked_topk(rng, 30, 128, VOCAB)
    if ragged:
        band = supports.shortened(rng, band)
    found = keep_ranks(
        merge_bands(decode(encode(band, encoding, bands=ends)[0], encoding, 30, bands=ends)), 128
    )
    assert_decoded(found, band, encoding)


def test_id_tables_make_pages_smaller():
    """The check that they are used at all."""
    band = peaked_topk(np.random.default_rng(2), 300, 20, VOCAB)
    sizes = {name: len(encode(band, "ladder/64", table=table)[0][0]) for name, table in TABLES.items()}
    assert sizes["lists"] < sizes["frequency"] < sizes["none"]


# Values that an encoding cannot hold.

LOWEST = {"ladder16": -65504.0, "ladder/128": -131071.0, "ladder/64": -262143.0, "ladder/32": -524287.0}


def with_value(value: float, where: str) -> opd_store.Rollout:
    """A rollout of 4 positions with one very low value at position 2."""
    rollout = some_rollouts(1, response_len=4, topk=9, chosen=2, sampled=2)[0]
    field, rank = where.rsplit(" ", 1)
    values = np.array(getattr(rollout, field))
    if field.endswith("tail"):
        values[2] = value
        return replace(rollout, **{field: values})
    kind = field.partition("_")[0]
    size = values.shape[1]
    values[2, int(rank) :] = value
    ids = np.array(getattr(rollout, f"{kind}_ids"))
    ids[2] = np.arange(size)
    values[2, : int(rank)] = -40
    fields = {field: values, f"{kind}_ids": ids}
    if kind == "sampled":
        fields["sampled_draws"] = np.where(ids == layout.NO_ID, 0, 1)
    return replace(rollout, **fields)


PLACES = [
    "topk_logprob 0",
    "topk_logprob 1",
    "topk_logprob 8",
    "log_tail 0",
    "chosen_logprob 0",
    "chosen_log_tail 0",
    "sampled_logprob 1",
    "sampled_log_tail 0",
]


@pytest.mark.parametrize("encoding", LOWEST)
def test_a_value_too_low_is_refused_and_the_writer_goes_on(tmp_path, encoding):
    lowest = LOWEST[encoding]
    options = {"topk": 9, "chosen": 2, "sampled": 2, "encoding": encoding, "bands": (1, 8, 9)}
    with opd_store.create(tmp_path / "cache", meta=example_meta(100), **options) as writer:
        for where in PLACES:
            writer.append(replace(with_value(lowest, where), sample_id=where))
            for value in (lowest - 100, float(np.finfo(np.float32).min)):
                with pytest.raises(opd_store.InvalidRolloutError) as caught:
                    writer.append(replace(with_value(value, where), sample_id="too low"))
                error = caught.value
                assert (error.sample_id, error.field, error.position) == ("too low", where.split()[0], 2)
                for part in ("'too low'", "position 2", encoding, "f32"):
                    assert part in str(error)
    cache = opd_store.open(tmp_path / "cache")
    assert [rollout.sample_id for rollout in cache] == PLACES
    assert opd_store.verify(tmp_path / "cache").problems == []


@pytest.mark.parametrize("encoding", ["plain", "f32"])
def test_exact_encodings_hold_the_lowest_value(tmp_path, encoding):
    rollout = with_value(float(np.finfo(np.float32).min), "topk_logprob 1")
    write(tmp_path / "cache", [rollout], topk=9, chosen=2, sampled=2, encoding=encoding)
    found = opd_store.open(tmp_path / "cache")[0]
    assert found.topk_logprob.tobytes() == rollout.topk_logprob.tobytes()


# Sizes.


@pytest.mark.parametrize("encoding", ENCODINGS[1:])
def test_a_page_too_large_once_decoded_is_refused_by_the_writer(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(layout, "MAX_DECODED_BYTES", (12 * 6 + 4) * 10)
    options = {"topk": 9, "bands": (6, 9), "encoding": encoding}
    long, fits = (some_rollouts(1, response_len=n, topk=9)[0] for n in (11, 10))
    with opd_store.create(tmp_path / "cache", meta=example_meta(100), **options) as writer:
        with pytest.raises(
            opd_store.InvalidRolloutError, match="at most 10 response tokens a page"
        ) as caught:
            writer.append(long)
        assert caught.value.field == "topk_ids"
        assert "found 11" in str(caught.value)
        writer.append(fits)
    assert len(opd_store.open(tmp_path / "cache")) == 1


@pytest.mark.parametrize("encoding", ENCODINGS[1:])
def test_a_small_page_of_many_zeros_is_refused_before_it_is_decoded(encoding):
    """Streams without planes: 60 bytes that would decode to 400 MB."""
    n_positions, n_ranks = 1 << 20, 32
    shape = PageShape(layout.KIND_TOPK, 0, n_ranks, n_positions)
    codec, parameter = {"f32": (1, 0), "ladder16": (2, 0)}.get(encoding) or (2, int(encoding[7:]))
    page = seal_page(bytes(9), shape, encoding=codec, parameter=parameter, flags=0, owner=OWNER)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"406847488 bytes once decoded, the limit is 67108864"):
            decode_page(np.frombuffer(page, np.uint8), shape, encoding=encoding, where="here")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_page_too_large_is_refused_by_the_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "MAX_PAGE_BYTES", 24 + 100 * 4)
    rollouts = {n: some_rollouts(1, response_len=n, topk=9)[0] for n in (5, 6)}
    with opd_store.create(tmp_path / "cache", meta=example_meta(100), topk=9, bands=(9,)) as writer:
        with pytest.raises(opd_store.InvalidRolloutError, match="a page of at most 424 bytes, found 480"):
            writer.append(rollouts[6])
        writer.append(rollouts[5])
    assert len(opd_store.open(tmp_path / "cache")) == 1


@pytest.mark.parametrize("encoding", LOSSY)
def test_probabilities_at_the_limit_stay_readable(tmp_path, encoding):
    """A sum that the writer just accepts, of values that are all rounded up by almost half a step."""
    half = 0.5 / int(encoding.partition("/")[2]) if "/" in encoding else 2.0**-8
    # n whole steps and almost half of one: these are decoded as n steps.
    steps = np.floor(np.log(4000) / (2 * half))
    lowest = np.nextafter(np.float32(-(2 * steps + 1) * half), np.float32(0))
    total = 1 + 0.99999e-3
    size = int(total / np.exp(np.float64(lowest)))
    rest = total - size * np.exp(np.float64(lowest))
    assert 0 < rest < 1e-3
    rollout = opd_store.Rollout(
        token_ids=np.arange(2, dtype=np.uint32),
        prompt_len=1,
        topk_ids=np.arange(size, dtype=np.uint32)[None],
        topk_logprob=np.full((1, size), lowest),
        log_tail=np.array([np.log(rest)], np.float32),
    )
    write(tmp_path / "cache", [rollout], topk=size, meta=example_meta(5000), encoding=encoding)
    found = opd_store.open(tmp_path / "cache")[0]
    assert found.topk_logprob[0, 0] > lowest
    assert opd_store.verify(tmp_path / "cache").problems == []


@pytest.mark.parametrize("encoding", ["plain", "f32"])
def test_folding_a_sum_at_the_limit_stays_readable(tmp_path, encoding):
    """The folded tail is rounded to float32, which may lift a sum that the writer accepted."""
    rng = np.random.default_rng(0)
    n = 200
    logprob = np.sort(np.log(rng.dirichlet(np.ones(9), n)).astype(np.float32), axis=1)[:, ::-1]
    logprob = np.minimum(logprob + np.float32(np.log1p(0.98e-3)), np.float32(0))
    rest = 1 + 1e-3 - np.exp(logprob.astype(np.float64)).sum(axis=1)
    tail = np.nextafter(np.log(rest).astype(np.float32), np.float32(-np.inf))
    rollout = opd_store.Rollout(
        token_ids=np.arange(n + 1, dtype=np.uint32) % 100,
        prompt_len=1,
        topk_ids=np.tile(np.arange(9, dtype=np.uint32), (n, 1)),
        topk_logprob=logprob,
        log_tail=tail,
    )
    write(tmp_path / "cache", [rollout], topk=9, bands=(4, 9), encoding=encoding)
    for ranks in range(1, 10):
        found = opd_store.open(tmp_path / "cache").rollout(0, ranks=ranks)
        assert found.topk_ids.shape == (n, ranks)


def test_an_unknown_kind_of_page_is_refused():
    band = peaked_topk(np.random.default_rng(0), 3, 4, VOCAB)
    for made, read in (("topk", "chosen"), ("chosen", "sampled"), ("sampled", "topk")):
        page = encode_pages(
            Band(band.ids, band.logprob, band.log_tail, band.ids if made == "sampled" else None),
            encoding="f32",
            kind=KINDS[made],
            bands=(4,),
            rollout_hash=OWNER,
        ).pages[0]
        with pytest.raises(FormatError, match=f"page of kind {KINDS[made]}, .* expected kind {KINDS[read]}"):
            decode([page], "f32", 3, kind=read, bands=(4,))
