"""Reading fewer ranks than are stored: what is left out joins the tail."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store.caches import some_rollouts, write

import opd_store
from opd_store.testing import example_meta, rollouts

# Sums of at most 40 positive float64 terms, then one rounding to float32.
REL = 2.0**-24 * 1.01
ABS = 1e-9


def naive_tail(rollout: opd_store.Rollout, ranks: int) -> np.ndarray:
    """[R] float64: log of the probability outside the first `ranks`, summed in the plainest way."""
    outside = np.exp(rollout.topk_logprob[:, ranks:].astype(np.float64)).sum(axis=1)
    with np.errstate(divide="ignore"):
        return np.log(outside + np.exp(rollout.log_tail.astype(np.float64)))


@settings(deadline=None, max_examples=25)
@given(
    rollout=rollouts(vocab_size=40, topk=20),
    bands=st.sets(st.integers(1, 19)).map(lambda ends: (*sorted(ends), 20)),
)
def test_every_number_of_ranks_has_its_tail(rollout, bands):
    with tempfile.TemporaryDirectory() as name:
        write(Path(name) / "cache", [rollout], topk=20, bands=bands, meta=example_meta(40))
        cache = opd_store.open(Path(name) / "cache")
        for ranks in range(1, 21):
            found = cache.rollout(0, ranks=ranks)
            assert found.topk_ids.tobytes() == rollout.topk_ids[:, :ranks].tobytes()
            assert found.topk_logprob.tobytes() == rollout.topk_logprob[:, :ranks].tobytes()
            assert found.log_tail.dtype == np.float32
            # A band's own tail is float32 already; folding it once more rounds a second time.
            tail = np.minimum(naive_tail(rollout, ranks), 0)
            np.testing.assert_allclose(found.log_tail, tail, rtol=3 * REL, atol=ABS + 2.0**-23)
        assert cache.rollout(0).log_tail.tobytes() == rollout.log_tail.tobytes()


def test_a_tail_is_rounded_once_at_a_band_end(tmp_path):
    rollout = some_rollouts(1, topk=20, response_len=200)[0]
    write(tmp_path / "cache", [rollout], topk=20, bands=(5, 20))
    found = opd_store.open(tmp_path / "cache").rollout(0, ranks=5)
    tail = np.minimum(naive_tail(rollout, 5), 0)
    np.testing.assert_allclose(found.log_tail, tail, rtol=REL, atol=ABS)


def test_the_whole_vocabulary_leaves_no_tail(tmp_path):
    rollout = some_rollouts(1, vocab_size=12, topk=12)[0]
    assert np.isneginf(rollout.log_tail).all()
    write(tmp_path / "cache", [rollout], topk=12, meta=example_meta(12))
    cache = opd_store.open(tmp_path / "cache")
    assert np.isneginf(cache[0].log_tail).all()
    for ranks in range(1, 12):
        tail = naive_tail(rollout, ranks)
        assert np.isfinite(tail).all()
        found = cache.rollout(0, ranks=ranks).log_tail
        np.testing.assert_allclose(found, tail, rtol=3 * REL, atol=2.0**-23)


def test_a_folded_tail_never_exceeds_one(tmp_path):
    """Ranks whose probabilities sum to a little more than 1, as rounding and the tolerance allow."""
    topk = 2000
    even = np.full((2, topk), np.log(1.0009 / topk), np.float32)
    ids = np.tile(np.arange(topk, dtype=np.uint32), (2, 1))
    rollout = opd_store.Rollout(
        token_ids=np.arange(3, dtype=np.uint32),
        prompt_len=1,
        topk_ids=ids,
        topk_logprob=even,
        log_tail=np.full(2, -20, np.float32),
    )
    assert (naive_tail(rollout, 1) > 0).all()
    write(tmp_path / "cache", [rollout], topk=topk, bands=(1, topk), meta=example_meta(topk))
    cache = opd_store.open(tmp_path / "cache")
    for ranks in (1, 2, 3):
        assert (cache.rollout(0, ranks=ranks).log_tail <= 0).all()
    assert opd_store.verify(tmp_path / "cache").ok


@pytest.mark.parametrize("vocab_size", [3, 4])
def test_more_ranks_than_tokens(tmp_path, vocab_size):
    meta = example_meta(vocab_size)
    if vocab_size < 4:
        with pytest.raises(opd_store.InvalidArgumentError, match="4 ids of a vocabulary of 3"):
            opd_store.create(tmp_path / "cache", meta=meta, topk=4)
    else:
        opd_store.create(tmp_path / "cache", meta=meta, topk=4).close()
