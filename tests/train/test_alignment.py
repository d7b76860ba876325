"""No off-by-one anywhere between a model and the loss.

The teacher gives (id + 1) % VOCAB after any id, so a wrong shift by one shows as a hit rate of zero.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from train.tiny_models import CONTEXT, VOCAB, loaded, meta_of, random_rollouts, scored_cache

import opd_store
from opd_store import Rollout, SamplerInfo
from opd_train import CacheStream, Objective, Prompt, cache_divergence, sample_rollouts, score_cache
from opd_train.capture.drawing import Draws
from opd_train.objective.batch_loss import distill_loss
from opd_train.objective.loss_config import LossConfig
from opd_train.objective.step_metrics import summarise
from opd_train.training.forward import response_hidden

OBJECTIVES = list(Objective)
# What is bounded, or sees no more than proportions among three ids, cannot cost tens of nats.
LEAST = {Objective.JSD: 0.69, Objective.RENORMALISED_FORWARD_KL: 1.0}
SHIFTED = ("teacher_logprob", "topk_ids", "topk_logprob", "log_tail")
DRAWN = ("drawn_ids", "drawn_logprob", "drawn_weight")


@pytest.fixture(scope="module")
def successor(models):
    return loaded(models["successor"])


@pytest.fixture(scope="module")
def counting(successor, tmp_path_factory):
    """A cache of rollouts that count up from different starts, scored by the teacher that counts."""
    rng = np.random.default_rng(0)
    rollouts = []
    for number in range(30):
        start, size, prompt = rng.integers(0, VOCAB), rng.integers(2, 20), rng.integers(1, 5)
        tokens = ((start + np.arange(prompt + size)) % VOCAB).astype(np.uint32)
        rollouts.append(Rollout(token_ids=tokens, prompt_len=int(prompt), sample_id=str(number)))
    path = tmp_path_factory.mktemp("counting") / "cache"
    score_cache(successor, rollouts, meta_of(successor), path, topk=3, draws=Draws(4), encoding="plain")
    return opd_store.open(path)


def batches(cache):
    return list(CacheStream(cache, batch_tokens=100, seed=1, draws=True))


def hit_rate(cache, shift):
    hits = n = 0
    for batch in batches(cache):
        first = batch.topk_ids[:, 0].roll(shift)
        hits += int((first == batch.target_ids).sum())
        n += len(first)
    return hits / n


def test_the_top_rank_is_the_token_itself_and_never_a_neighbour(counting):
    assert hit_rate(counting, 0) == 1.0
    assert hit_rate(counting, 1) < 0.02
    assert hit_rate(counting, -1) < 0.02
    for batch in batches(counting):
        assert batch.teacher_logprob.min() > -1e-6
        torch.testing.assert_close(batch.topk_logprob[:, 0], batch.teacher_logprob, rtol=0, atol=1e-6)


def test_the_students_hidden_state_is_the_one_before_the_token(counting, successor):
    for batch in batches(counting):
        with torch.no_grad():
            hidden = response_hidden(successor, batch)
            predicted = successor.logits(hidden).argmax(dim=-1)
        assert torch.equal(predicted, batch.target_ids)
        assert not torch.equal(predicted.roll(1), batch.target_ids)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equal_models_have_nothing_to_learn(counting, successor, objective):
    for batch in batches(counting):
        with torch.no_grad():
            result = distill_loss(
                LossConfig(objective=objective),
                hidden=response_hidden(successor, batch),
                lm_head=successor.logits,
                batch=batch,
                chunk=7,
            )
        assert abs(result.loss.item()) / result.n_kept < 1e-6
        metrics = summarise(result.sums)
        if objective.needs_topk:
            assert metrics["top1"] == 1.0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shift_by_one_would_cost_tens_of_nats(counting, successor, objective, shift):
    batch = batches(counting)[0]
    rolled = {name: getattr(batch, name).roll(shift, dims=0) for name in (*SHIFTED, *DRAWN)}
    # The sampled-token objectives have no ids of their own to shift, so there the hidden states are.
    with torch.no_grad():
        hidden = response_hidden(successor, batch)
        if objective.dense:
            batch = dataclasses.replace(batch, **rolled)
        else:
            hidden = hidden.roll(shift, dims=0)
        result = distill_loss(
            LossConfig(objective=objective, clip=1e9), hidden=hidden, lm_head=successor.logits, batch=batch
        )
    size = abs(result.loss.item())
    assert size / result.n_kept > LEAST.get(objective, 10)


def test_an_equal_random_model_has_zero_divergence(teacher, tmp_path):
    cache = scored_cache(tmp_path / "cache", teacher, random_rollouts(8), topk=6)
    found = cache_divergence(teacher, cache, batch_tokens=64)
    assert abs(found["forward_kl"].mean) < 1e-5
    assert abs(found["reverse_kl"].mean) < 1e-5
    assert found["forward_kl"].n == 8


def test_sampling_from_the_counter_counts_on(successor):
    prompts = [Prompt(ids=np.array([5, 9, 30], np.uint32), sample_id="a")]
    sampler = SamplerInfo(temperature=1.0, max_new_tokens=20, seed=0, stop_token_ids=(1,))
    rollout = sample_rollouts(successor, prompts, sampler)[0]
    assert rollout.response_ids.tolist() == [31, 32, 33, 34, 35, 36, 0, 1]
    assert rollout.finish_reason == "stop"
    assert len(rollout.token_ids) < CONTEXT
