"""What a cache says about its error is the largest there is, and bounds what a student could lose by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store import supports
from store.caches import VOCAB, add, manifest, some_rollouts, write
from store.supports import in_order_of, naive_tail

import opd_store
from opd_store import ENCODINGS, layout
from opd_store.encodings import Band
from opd_store.testing import example_meta

SIZES = {"topk": 9, "chosen": 3, "sampled": 4}
FIELDS = {
    "topk": ("topk_ids", "topk_logprob", "log_tail"),
    "chosen": ("chosen_ids", "chosen_logprob", "chosen_log_tail"),
    "sampled": ("sampled_ids", "sampled_logprob", "sampled_log_tail"),
}
LOSSY = [name for name in ENCODINGS if name not in ("plain", "f32")]


def band_of(rollout: opd_store.Rollout, kind: str) -> Band:
    return Band(*(getattr(rollout, name) for name in FIELDS[kind]))


def difference(left: np.ndarray, right: np.ndarray) -> float:
    finite = np.isfinite(left)
    assert (finite == np.isfinite(right)).all()
    return float(np.abs(left[finite].astype(np.float64) - right[finite]).max(initial=0))


def recomputed(cache: opd_store.Cache, row: int, value: opd_store.Rollout) -> float:
    """The largest difference of any log-prob or tail, every band's included, from the values given."""
    errors = []
    for kind in FIELDS:
        found = band_of(cache[row], kind)
        given_band = in_order_of(band_of(value, kind), found.ids)
        errors += [difference(given_band.logprob, found.logprob)]
        if kind == "topk":
            for end in cache.schema.bands:
                tail = np.float32(naive_tail(given_band, end))
                if end == 9:
                    tail = value.log_tail
                errors += [difference(tail, cache.rollout(row, ranks=end).log_tail)]
        else:
            errors += [difference(given_band.log_tail, found.log_tail)]
    return max(errors)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_recorded_error_is_the_largest_one(tmp_path, encoding):
    values = some_rollouts(14, response_len=7, peaked=True, **SIZES)
    path = tmp_path / "cache"
    write(path, values[:4], encoding=encoding, bands=(1, 4, 9), batch_bytes=2000, **SIZES)
    # A large segment and small ones after it: some are merged, some are not.
    ends = [(4, 5), (5, 6), (6, 13), (13, 14)]
    errors = []
    for start, end in ends:
        add(path, values[start:end])
    cache = opd_store.open(path)
    errors = [recomputed(cache, row, value) for row, value in enumerate(values)]
    # Folding in another order may round a band's tail to the next float32.
    rounding = 2.0**-21 if encoding not in ("plain", "f32") else 0
    assert abs(cache.max_error - max(errors)) <= rounding
    segments = manifest(path, 5)["segments"]
    start = 0
    for segment in segments:
        end = start + segment["rows"]
        assert abs(segment["max_error"] - max(errors[start:end])) <= rounding
        start = end
    assert len(segments) < 5
    assert start == 14
    if encoding not in ("plain", "f32"):
        assert cache.max_error > 0


@pytest.mark.parametrize("encoding", LOSSY)
def test_the_error_of_merged_segments_is_that_of_the_worst(tmp_path, encoding):
    """Exact values before, between and after the only ones that are off."""
    exact = [
        replace(
            value,
            topk_logprob=np.tile(np.array([-1, -2, -3], np.float32), (3, 1)),
            topk_ids=np.tile(np.array([1, 2, 3], np.uint32), (3, 1)),
            log_tail=np.full(3, -3, np.float32),
        )
        for value in some_rollouts(4)
    ]
    off = replace(exact[1], topk_logprob=exact[1].topk_logprob - np.float32(2.0**-12))
    path = tmp_path / "cache"
    write(path, exact[:1], encoding=encoding, bands=(3,))
    assert opd_store.open(path).max_error == 0
    add(path, [off])
    assert opd_store.open(path).max_error == 2.0**-12
    add(path, exact[2:3])
    assert opd_store.open(path).max_error == 2.0**-12
    with opd_store.append(path) as writer:
        writer.append(replace(off, sample_id="again"))
        writer.commit()
        writer.append(exact[3])
    # The last segment holds an exact rollout only.
    assert opd_store.open(path).max_error == 2.0**-12
    assert opd_store.verify(path).problems == []


def test_one_commits_error_is_not_that_of_the_next(tmp_path):
    values = some_rollouts(4)
    exact = replace(
        values[3],
        topk_logprob=np.tile(np.array([-1, -2, -3], np.float32), (3, 1)),
        topk_ids=np.tile(np.array([1, 2, 3], np.uint32), (3, 1)),
        log_tail=np.full(3, -3, np.float32),
    )
    options = {"meta": example_meta(VOCAB), "topk": 3, "encoding": "ladder/32"}
    with opd_store.create(tmp_path / "cache", **options) as writer:
        writer.append_batch(values[:3])
        writer.commit()
        writer.append(exact)
    first, second = manifest(tmp_path / "cache", 2)["segments"]
    assert first["max_error"] > 0
    assert second["max_error"] == 0


def test_a_refused_rollout_leaves_no_error(tmp_path):
    good = some_rollouts(1, topk=0)[0]
    exact = replace(
        good,
        topk_logprob=np.tile(np.array([-1, -2, -3], np.float32), (3, 1)),
        topk_ids=np.tile(np.array([1, 2, 3], np.uint32), (3, 1)),
        log_tail=np.full(3, -3, np.float32),
    )
    off = replace(exact, topk_logprob=exact.topk_logprob - np.float32(0.01), extra={"x_unknown": 1})
    late = replace(off, label="\ud800", extra={})
    with opd_store.create(
        tmp_path / "cache", meta=example_meta(VOCAB), topk=3, chosen=1, encoding="ladder/32"
    ) as writer:
        chosen = {
            "chosen_ids": np.zeros((3, 1), np.uint32),
            "chosen_logprob": np.full((3, 1), -1, np.float32),
            "chosen_log_tail": np.full(3, -1, np.float32),
        }
        for bad in (off, late):
            with pytest.raises(opd_store.InvalidRolloutError):
                writer.append(replace(bad, **chosen))
        # Encoded, and refused for its size only.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "MAX_BATCH_BYTES", 4)
            with pytest.raises(opd_store.InvalidRolloutError, match="bytes a rollout"):
                writer.append(replace(off, extra={}, **chosen))
        writer.append(replace(exact, **chosen))
    assert opd_store.open(tmp_path / "cache").max_error == 0


def test_what_was_rounded_before_counts(tmp_path):
    """Probabilities may exceed 1 by what the values were rounded by, and no further."""
    value = some_rollouts(1, topk=3)[0]
    off = replace(value, topk_logprob=value.topk_logprob, log_tail=None)
    ones = np.exp(value.topk_logprob.astype(np.float64)).sum(axis=1)
    off = replace(off, log_tail=np.log(1.02 - ones).astype(np.float32))
    for encoding in ("plain", "ladder/128"):
        path = tmp_path / encoding.replace("/", "-")
        with opd_store.create(path, meta=example_meta(VOCAB), topk=3, encoding=encoding) as writer:
            for error in (0.0, 0.015):
                with pytest.raises(opd_store.InvalidRolloutError, match=r"log_tail|topk_logprob"):
                    writer.append(off, max_error=error)
            for error in (-0.1, np.inf, np.nan):
                with pytest.raises(opd_store.InvalidArgumentError, match="max_error"):
                    writer.append(off, max_error=error)
            assert writer.append(off, max_error=0.02)
        cache = opd_store.open(path)
        assert 0.02 <= cache.max_error <= 0.02 + 1 / 256
        assert not opd_store.verify(path).problems


def log_normalised(band: Band) -> np.ndarray:
    """[P, k + 1] float64: log-probs and tail, summing to one."""
    joined = np.column_stack([band.logprob, band.log_tail]).astype(np.float64)
    return joined - np.logaddexp.reduce(joined, axis=1, keepdims=True)


def divergence(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[P] nats: KL(left || right) of rows of log-probs; nothing on both sides counts nothing."""
    with np.errstate(invalid="ignore"):
        terms = np.exp(left) * (left - right)
    return np.where(np.isneginf(left), 0, terms).sum(axis=1)


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(deadline=None, max_examples=30)
@given(data=st.data(), ragged=st.booleans())
def test_the_divergence_is_bounded_by_the_error(encoding, data, ragged):
    """Log-probs off by at most e give a KL of at most e * e / 2 (Hoeffding's lemma), either way round."""
    given_band = data.draw(supports.supports(ragged=ragged))
    n_positions, size = given_band.ids.shape
    pages, max_error = supports.encode(given_band, encoding)
    (found,) = supports.decode(pages, encoding, n_positions, bands=(size,))
    left = log_normalised(in_order_of(given_band, found.ids))
    right = log_normalised(found)
    for kl in (divergence(left, right), divergence(right, left)):
        # Sums of a few hundred float64 terms of about 1.
        assert (kl <= max_error**2 / 2 + 1e-13).all()
        assert (kl >= -1e-13).all()
    finite = np.isfinite(given_band.log_tail)
    assert max_error == max(
        difference(in_order_of(given_band, found.ids).logprob, found.logprob),
        difference(given_band.log_tail[finite], found.log_tail[finite]),
    )
