"""Figures that say how good a student is."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from train.tiny_models import (
    VOCAB,
    loaded,
    naive_logprobs,
    random_rollouts,
    save_tiny,
    scored_cache,
    tiny_tokenizer,
)

from opd_store import InvalidArgumentError, MismatchError
from opd_train import accuracy, cache_divergence, load_causal_lm, sequence_kl
from opd_train.evaluation import mean_estimate, proportion
from opd_train.head import HeadWeights, topk_logprobs


@pytest.fixture(scope="module")
def student(models):
    return loaded(models["llama"])


def test_sequence_kl_is_the_sum_over_the_response(student, teacher):
    rollouts = random_rollouts(6)
    totals = []
    for rollout in rollouts:
        q, p = naive_logprobs(student, rollout), naive_logprobs(teacher, rollout)
        totals.append((np.exp(q) * (q - p)).sum())
    found = sequence_kl(student, teacher, rollouts, batch_tokens=30, chunk=4)
    assert found.mean == pytest.approx(np.mean(totals), rel=1e-4)
    assert found.n == 6
    assert found.high - found.mean == pytest.approx(1.96 * np.std(totals, ddof=1) / 6**0.5, rel=1e-3)
    assert sequence_kl(teacher, teacher, rollouts).mean == pytest.approx(0, abs=1e-4)


def test_divergence_of_a_cache_with_every_rank_is_the_full_kl(student, teacher, tmp_path):
    rollouts = random_rollouts(5)
    cache = scored_cache(tmp_path / "cache", teacher, rollouts, topk=VOCAB)
    forward, reverse = [], []
    for rollout in rollouts:
        q, p = naive_logprobs(student, rollout), naive_logprobs(teacher, rollout)
        # Masked tokens were not trained on, and do not count.
        mask = slice(None) if rollout.loss_mask is None else rollout.loss_mask
        forward.append((np.exp(p) * (p - q)).sum(axis=1)[mask].mean())
        reverse.append((np.exp(q) * (q - p)).sum(axis=1)[mask].mean())
    assert any(rollout.loss_mask is not None and not rollout.loss_mask.all() for rollout in rollouts)
    found = cache_divergence(student, cache, batch_tokens=25)
    assert found["forward_kl"].mean == pytest.approx(np.mean(forward), rel=1e-4)
    assert found["reverse_kl"].mean == pytest.approx(np.mean(reverse), rel=1e-4)


def test_what_a_larger_student_gives_to_ids_beyond_the_teachers_is_tail(teacher, tmp_path):
    wide = load_causal_lm(save_tiny(tmp_path / "wide", vocab_size=VOCAB + 11, tokenizer=tiny_tokenizer()))
    rollouts = random_rollouts(5)
    cache = scored_cache(tmp_path / "cache", teacher, rollouts, topk=VOCAB)
    forward = []
    for rollout in rollouts:
        q, p = naive_logprobs(wide, rollout)[:, :VOCAB], naive_logprobs(teacher, rollout)
        assert (np.exp(q).sum(axis=1) < 0.95).any()
        mask = slice(None) if rollout.loss_mask is None else rollout.loss_mask
        forward.append((np.exp(p) * (p - q)).sum(axis=1)[mask].mean())
    found = cache_divergence(wide, cache)
    assert found["forward_kl"].mean == pytest.approx(np.mean(forward), rel=1e-4)
    assert found["reverse_kl"].mean > found["forward_kl"].mean


def test_divergence_looks_at_counted_positions_only(student, teacher, tmp_path, monkeypatch):
    cache = scored_cache(tmp_path / "cache", teacher, random_rollouts(5))
    seen = []

    def counting(hidden, head, ids):
        assert isinstance(head, HeadWeights)
        seen.append(len(ids))
        return topk_logprobs(hidden, head, ids)

    monkeypatch.setattr("opd_train.evaluation.topk_logprobs", counting)
    cache_divergence(student, cache)
    masks = [r.loss_mask if r.loss_mask is not None else np.ones(r.response_len) for r in cache]
    assert sum(seen) == sum(map(np.sum, masks)) < sum(map(len, masks))


def test_divergence_needs_topk_and_rollouts(student, teacher, tmp_path):
    for name, rollouts, topk in (("a", random_rollouts(2), 0), ("b", [], 3)):
        with pytest.raises(InvalidArgumentError, match="divergence needs a cache with top-k"):
            cache_divergence(student, scored_cache(tmp_path / name, teacher, rollouts, topk=topk))


def test_models_of_other_tokens_are_not_compared(teacher, tmp_path):
    cache = scored_cache(tmp_path / "cache", teacher, random_rollouts(2))
    tokens = load_causal_lm(save_tiny(tmp_path / "tokens", tokenizer=tiny_tokenizer(first="A")))
    small = load_causal_lm(save_tiny(tmp_path / "small", vocab_size=VOCAB - 9, tokenizer=tiny_tokenizer()))
    for other, field in ((tokens, "tokenizer_fingerprint"), (small, "vocab_size")):
        with pytest.raises(MismatchError, match=field):
            cache_divergence(other, cache)
        with pytest.raises(MismatchError, match=field):
            sequence_kl(other, teacher, random_rollouts(2))


def test_wilson_interval():
    # Newcombe, Statistics in Medicine 17, 1998, table I, method 3.
    found = proportion(81, 263)
    assert (found.mean, found.low, found.high) == pytest.approx((0.3080, 0.2553, 0.3662), abs=6e-5)
    assert proportion(0, 10).low == 0
    assert proportion(10, 10).high == 1
    assert 0 < proportion(0, 10).high < 0.31
    with pytest.raises(InvalidArgumentError, match="nothing was counted"):
        proportion(0, 0)


def test_one_value_has_no_interval():
    found = mean_estimate([3.0])
    assert (found.mean, found.low, found.high) == (3.0, -math.inf, math.inf)
    assert json.loads(json.dumps(found.n)) == 1


def test_no_value_has_no_mean(student, teacher):
    with pytest.raises(InvalidArgumentError, match="nothing was counted"):
        sequence_kl(student, teacher, [])


def test_accuracy_counts():
    rollouts = random_rollouts(8)
    assert accuracy(rollouts, lambda rollout: rollout.sample_id in ("r1", "r5")).mean == 0.25
