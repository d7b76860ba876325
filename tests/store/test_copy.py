"""Rollouts copied from cache to cache keep their values, and what rounding adds is counted."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store.caches import ROOT, VOCAB, assert_same, some_rollouts, write

import opd_store
from opd_store import (
    ENCODINGS,
    Cut,
    IntegrityError,
    InvalidRolloutError,
    MismatchError,
    Rollout,
    build_id_table,
    layout,
)
from opd_store import writer as writer_module
from opd_store.testing import example_meta

LADDERS = ("ladder/128", "ladder/64", "ladder/32")
EXACT = ("plain", "f32")
LOSSLESS = [
    *itertools.product(ENCODINGS, EXACT),
    *((encoding, encoding) for encoding in ENCODINGS if encoding not in EXACT),
    *((coarse, fine) for fine, coarse in itertools.combinations(LADDERS, 2)),
]
LOSSY = [pair for pair in itertools.product(ENCODINGS, ENCODINGS) if pair not in LOSSLESS]
BANDS = (2, 5, 12)
HALF_UNIT = {"ladder/128": 1 / 256, "ladder/64": 1 / 128, "ladder/32": 1 / 64}


def source_cache(path: Path, encoding: str, seed: int = 0, n: int = 12, **options):
    """Peaked rows, many of which sum to more than 1 once they are rounded."""
    values = some_rollouts(n, seed=seed, topk=12, peaked=True, response_len=30)
    write(path, values, topk=12, encoding=encoding, bands=BANDS, **options)
    return opd_store.open(path)


def copied(path: Path, source: opd_store.Cache, **options) -> opd_store.Cache:
    options = {"topk": source.topk, "bands": BANDS, "encoding": source.encoding} | options
    with opd_store.create(path, meta=source.meta, **options) as writer:
        assert all([writer.copy(source, row) for row in range(len(source))])
        writer.commit()
    assert opd_store.verify(path).problems == []
    return opd_store.open(path)


def assert_values(found: opd_store.Cache, expected: opd_store.Cache, ends=BANDS) -> None:
    for row, end in itertools.product(range(len(expected)), ends):
        assert_same(found.rollout(row, ranks=end), expected.rollout(row, ranks=end))


def sums(cache: opd_store.Cache) -> list[float]:
    """The largest sum of probabilities of every rollout."""
    totals = [
        np.exp(r.topk_logprob.astype(float)).sum(axis=1) + np.exp(r.log_tail.astype(float)) for r in cache
    ]
    return [total.max() for total in totals]


def largest_difference(found: Rollout, expected: Rollout) -> float:
    by_id = [
        dict(zip(ids, row, strict=True)) for ids, row in zip(found.topk_ids, found.topk_logprob, strict=True)
    ]
    pairs = zip(by_id, expected.topk_ids, expected.topk_logprob, strict=True)
    differences = [abs(row[i] - v) for row, ids, values in pairs for i, v in zip(ids, values, strict=True)]
    finite = np.isfinite(expected.log_tail)
    assert (finite == np.isfinite(found.log_tail)).all()
    return max(map(float, [*differences, *np.abs(found.log_tail - expected.log_tail)[finite]]))


@pytest.mark.parametrize(("before", "after"), LOSSLESS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_values_that_an_encoding_holds_stay_bit_for_bit_in_every_band(before, after, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("copy")
    source = source_cache(path / "source", before, seed, n=3)
    found = copied(path / "copy", source, encoding=after)
    assert_values(found, source)
    assert found.max_error >= source.max_error
    bound = max(source.max_error, HALF_UNIT.get(before, 2**-7 if before == "ladder16" else 0))
    assert found.max_error <= bound


@pytest.mark.parametrize(("before", "after"), LOSSY)
def test_what_rounding_adds_is_counted(before, after, tmp_path):
    source = source_cache(tmp_path / "source", before)
    found = copied(tmp_path / "copy", source, encoding=after)
    worst = max(largest_difference(found[row], source[row]) for row in range(len(source)))
    assert 0 < worst <= found.max_error - source.max_error
    if after in HALF_UNIT:
        assert worst <= HALF_UNIT[after]


@pytest.mark.parametrize("before", LADDERS)
def test_rounded_rows_sum_to_more_than_appending_allows(before, tmp_path):
    source = source_cache(tmp_path / "source", before)
    row = int(np.argmax(sums(source)))
    assert 1.001001 < sums(source)[row] <= 1 + source.tolerance
    with opd_store.create(tmp_path / "other", meta=source.meta, topk=12, encoding=before) as writer:
        with pytest.raises(InvalidRolloutError, match="probabilities and tail of at most"):
            writer.append(source[row])
        writer.copy(source, row)


@pytest.mark.parametrize("after", ENCODINGS)
@pytest.mark.parametrize("topk", [1, 2, 3, 5, 7])
def test_fewer_ranks_are_what_reading_fewer_gives(topk, after, tmp_path):
    source = source_cache(tmp_path / "source", "ladder/128", n=4)
    ends = tuple(end for end in BANDS if end < topk)
    found = copied(tmp_path / "copy", source, topk=topk, bands=(*ends, topk), encoding="f32")
    assert_values(found, source, (*ends, topk))
    again = copied(tmp_path / "again", source, topk=topk, bands=(*ends, topk), encoding=after)
    if after in (*EXACT, "ladder/128"):
        # Of the tail outside a rank inside a band, which is a sum, only the exact ones hold every bit.
        wanted = (*ends, topk) if after in EXACT or topk in BANDS else ends
        assert_values(again, source, wanted)
    worst = max(largest_difference(again[row], found[row]) for row in range(len(found)))
    assert worst <= again.max_error


def test_other_bands_have_the_tails_of_the_source(tmp_path):
    source = source_cache(tmp_path / "source", "ladder/64")
    found = copied(tmp_path / "copy", source, bands=(2, 3, 9, 12), encoding="f32")
    assert_values(found, source, (2, 3, 9, 12))


@pytest.mark.parametrize("cut", [Cut("given"), Cut("probability", 0.05), Cut("mass", 0.8)])
@pytest.mark.parametrize("after", ["ladder/32", "plain"])
def test_a_cut_is_not_made_twice(cut, after, tmp_path):
    values = some_rollouts(12, topk=12, peaked=True, response_len=30, ragged=True)
    write(tmp_path / "source", values, topk=12, encoding="ladder/32", bands=BANDS, cut=cut)
    source = opd_store.open(tmp_path / "source")
    found = copied(tmp_path / "copy", source, cut=cut, encoding=after)
    assert_values(found, source)
    # A new one starts from what is there.
    with opd_store.create(
        tmp_path / "again", meta=source.meta, topk=12, encoding=after, cut=Cut("mass", 0.3)
    ) as w:
        for row in range(len(source)):
            w.copy(source, row)
    for row, rollout in enumerate(opd_store.open(tmp_path / "again")):
        before = source[row]
        kept = (rollout.topk_ids != layout.NO_ID).sum(axis=1)
        assert (kept <= (before.topk_ids != layout.NO_ID).sum(axis=1)).all()
        probability = np.exp(before.topk_logprob.astype(float))
        mass = np.cumsum(probability, axis=1) - probability
        assert (kept == np.maximum(1, ((mass < 0.3) & (probability > 0)).sum(axis=1))).all()


def pages_of(cache: opd_store.Cache) -> list[bytes]:
    columns = cache.schema.packed_columns()
    return [cache.page(row, column).tobytes() for row in range(len(cache)) for column in columns]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pages_that_need_no_change_are_copied(encoding, tmp_path):
    supports = {"chosen": 3, "sampled": 4}
    values = some_rollouts(6, topk=12, response_len=9, **supports)
    write(tmp_path / "source", values, topk=12, encoding=encoding, bands=BANDS, **supports)
    source = opd_store.open(tmp_path / "source")
    found = copied(tmp_path / "copy", source, **supports)
    assert pages_of(found) == pages_of(source)
    assert_values(found, source)
    assert found.max_error == source.max_error
    wider = copied(tmp_path / "wider", source, chosen=5, sampled=4)
    for left, right in zip(wider, source, strict=True):
        assert (left.chosen_ids[:, 3:] == layout.NO_ID).all()
        assert left.chosen_ids[:, :3].tobytes() == np.ascontiguousarray(right.chosen_ids).tobytes()


TABLES = [
    build_id_table([some_rollouts(20, seed=seed, topk=12, response_len=20)[0].topk_ids], vocab_size=VOCAB)
    for seed in (1, 2)
]


@pytest.mark.parametrize("after", [None, *TABLES])
@pytest.mark.parametrize("before", [None, *TABLES])
def test_id_tables_change_pages_and_no_value(before, after, tmp_path):
    source = source_cache(tmp_path / "source", "ladder/64", n=4, id_table=before)
    found = copied(tmp_path / "copy", source, id_table=after)
    assert_values(found, source)
    assert (pages_of(found) == pages_of(source)) == (before is after)


def test_the_reference_reader_accepts_rounded_values_in_exact_pages(tmp_path):
    spec = importlib.util.spec_from_file_location("reference", ROOT / "spec/reference_reader.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    source = source_cache(tmp_path / "source", "ladder/32")
    found = copied(tmp_path / "copy", source, encoding="plain", bands=(12,))
    assert max(sums(found)) > 1.002
    rows = reference.read_cache(tmp_path / "copy")["rows"]
    assert [row["log_tail"] for row in rows] == [rollout.log_tail.tolist() for rollout in found]
    # Only as long as the cache says so.
    assert found.tolerance == pytest.approx(opd_store.open(tmp_path / "source").tolerance)
    assert opd_store.open(write(tmp_path / "fresh", some_rollouts(2)).uri).tolerance == pytest.approx(
        0.001001
    )


def test_everything_else_comes_along_and_duplicates_do_not(tmp_path):
    meta = dataclasses.replace(example_meta(VOCAB), other_teachers=(example_meta(VOCAB).teacher,) * 3)
    values = some_rollouts(3)
    values[0] = dataclasses.replace(
        values[0], policy_version=4, reward=0.5, label="yes", teacher=2, extra={"x_a": 1, "x_b": "b"}
    )
    columns = {"x_a": "int64", "x_b": "utf8"}
    write(tmp_path / "source", values, meta=meta, user_columns=columns)
    source = opd_store.open(tmp_path / "source")
    with opd_store.create(tmp_path / "copy", meta=meta, topk=3, user_columns=columns) as writer:
        assert [writer.copy(source, row) for row in (0, 1, 0)] == [True, True, False]
        writer.commit()
        assert not writer.copy(source, 1)
        assert writer.copy(source, 2, teacher=3)
    found = opd_store.open(tmp_path / "copy")
    for row in range(3):
        expected = dataclasses.replace(source[row], teacher=3) if row == 2 else source[row]
        assert_same(found[row], expected)
    bare = opd_store.create(tmp_path / "bare", meta=meta)
    with pytest.raises(InvalidRolloutError, match="x_a"):
        bare.copy(source, 0)
    assert bare.copy(source, 1)
    with pytest.raises(IndexError):
        bare.copy(source, 3)
    bare.commit()
    assert opd_store.open(tmp_path / "bare")[0].topk_ids is None


def test_another_tokenizer_is_refused(tmp_path):
    write(tmp_path / "source", some_rollouts(1))
    other = dataclasses.replace(example_meta(VOCAB), tokenizer_fingerprint="sha256:" + "0" * 64)
    writer = opd_store.create(tmp_path / "copy", meta=other, topk=3)
    with pytest.raises(MismatchError, match="tokenizer_fingerprint") as caught:
        writer.copy(opd_store.open(tmp_path / "source"), 0)
    assert caught.value.field == "tokenizer_fingerprint"


def test_more_ranks_than_the_source_has_are_refused_unless_rows_may_be_short(tmp_path):
    source = source_cache(tmp_path / "source", "f32", n=1)
    with pytest.raises(InvalidRolloutError, match="topk_ids"):
        opd_store.create(tmp_path / "a", meta=source.meta, topk=13, encoding="f32").copy(source, 0)
    found = copied(tmp_path / "b", source, topk=13, bands=(2, 13), cut=Cut("given"))
    assert (found[0].topk_ids[:, 12] == layout.NO_ID).all()
    assert found[0].log_tail.tobytes() == source[0].log_tail.tobytes()
    assert found.rollout(0, ranks=2).log_tail.tobytes() == source.rollout(0, ranks=2).log_tail.tobytes()


def test_values_that_are_far_off_far_below_zero(tmp_path):
    # float16 is off by up to a quarter at -600.
    value = some_rollouts(1, topk=3)[0]
    logprob = np.array([[-0.1, -3, -700.2]] * 3, np.float32)
    value = dataclasses.replace(value, topk_logprob=logprob, log_tail=np.full(3, -4, np.float32))
    write(tmp_path / "source", [value], encoding="ladder16")
    source = opd_store.open(tmp_path / "source")
    assert source.max_error > 0.2
    for name, encoding in (("same", "ladder16"), ("exact", "f32")):
        with opd_store.create(tmp_path / name, meta=source.meta, topk=3, encoding=encoding) as writer:
            writer.copy(source, 0)
        assert_same(opd_store.open(tmp_path / name)[0], source[0])
    # That far below zero nothing is added to a sum, so the value may be rounded again, and is off by more.
    with opd_store.create(tmp_path / "lossy", meta=source.meta, topk=3, encoding="ladder/32") as writer:
        writer.copy(source, 0)
    found = opd_store.open(tmp_path / "lossy")
    assert source.max_error < found.max_error <= source.max_error + 1 / 64
    assert found.tolerance == pytest.approx(1.001001 * math.exp(layout.LARGEST_SUM_ERROR) - 1)
    assert opd_store.verify(tmp_path / "lossy").problems == []


@pytest.mark.parametrize("claimed", [0.0, 9.0])
def test_a_sum_that_no_reader_would_accept_is_refused(claimed, tmp_path, monkeypatch):
    """A source that is as far off as the limit allows is not rounded up further, whatever it claims."""
    limit = 1.001001 * math.exp(layout.LARGEST_SUM_ERROR)
    # Just above the middle between two steps of 1/32, so that each of them is rounded up.
    logprob = -(np.float32([[19.49, 42.49, 58.49]] * 3)) / 32
    total = np.exp(logprob.astype(float)).sum(axis=1)
    tail = np.log(limit - 1e-4 - total).astype(np.float32)
    value = dataclasses.replace(some_rollouts(1, topk=3)[0], topk_logprob=logprob, log_tail=tail)
    monkeypatch.setattr(writer_module, "checked", lambda rollout, **_: rollout)
    write(tmp_path / "source", [value], encoding="f32")
    source = opd_store.open(tmp_path / "source", check_values=False)
    monkeypatch.setattr(opd_store.Cache, "max_error", claimed)
    with opd_store.create(tmp_path / "exact", meta=source.meta, topk=3, encoding="f32") as writer:
        writer.copy(source, 0)
    writer = opd_store.create(tmp_path / "lossy", meta=source.meta, topk=3, encoding="ladder/32")
    with pytest.raises(
        InvalidRolloutError, match=r"probabilities and tail of at most 1\.\d+ after rounding"
    ) as e:
        writer.copy(source, 0)
    assert (e.value.field, e.value.position) == ("topk_logprob", 0)


def test_a_rollout_under_another_hash_is_refused(tmp_path, monkeypatch):
    source = source_cache(tmp_path / "source", "f32", n=2)
    monkeypatch.setattr(type(source), "row_hash", lambda self, row: bytes(32))
    writer = opd_store.create(tmp_path / "copy", meta=source.meta, topk=12, encoding="f32")
    with pytest.raises(IntegrityError, match="not the hash of its tokens"):
        writer.copy(source, 1)


def test_commits_at_the_end_of_shards_cut_none_short(tmp_path):
    source = source_cache(tmp_path / "source", "f32", n=40)
    sizes = []
    for name in ("once", "often"):
        writer = opd_store.create(
            tmp_path / name, meta=source.meta, topk=12, encoding="f32", batch_bytes=4000, shard_bytes=20000
        )
        assert not writer.at_shard_end
        with writer:
            for row in range(len(source)):
                writer.copy(source, row)
                if name == "often" and writer.at_shard_end:
                    writer.commit()
                    assert not writer.at_shard_end
        cache = opd_store.open(tmp_path / name)
        sizes.append([shard.sha256 for shard in cache.shards])
    assert len(sizes[0]) > 3
    assert sizes[0] == sizes[1]
    assert opd_store.open(tmp_path / "often").version > 3
