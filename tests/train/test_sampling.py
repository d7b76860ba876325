"""What is drawn, with which probability, and what is written down about it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from train.tiny_models import CONTEXT, EOS, VOCAB, naive_logprobs

from opd_store import InvalidArgumentError, InvalidRolloutError, SamplerInfo
from opd_train import Prompt, sample_rollouts, score_rollouts
from opd_train.capture.sampling import _draw, make_processor

SAMPLER = SamplerInfo(temperature=1.0, max_new_tokens=12, seed=7, stop_token_ids=(EOS, 5, 6))
SAMPLERS = {
    "raw": SAMPLER,
    "cool": dataclasses.replace(SAMPLER, temperature=0.6),
    "nucleus": dataclasses.replace(SAMPLER, temperature=1.3, top_p=0.8),
    "top-k": dataclasses.replace(SAMPLER, top_k=4),
    "all": dataclasses.replace(SAMPLER, temperature=0.9, top_k=9, top_p=0.7, min_p=0.05),
}


def some_prompts(n=7, *, longest=9, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest, n, endpoint=True)
    return [
        Prompt(ids=rng.integers(7, VOCAB, size).astype(np.uint32), sample_id=f"p{i}", label=str(i))
        for i, size in enumerate(sizes)
    ]


def processed(logprob, sampler):
    """[V] float64 log-probs after temperature, top-k, nucleus and min-p, written from their definitions."""
    logits = logprob / sampler.temperature
    if sampler.top_k is not None:
        logits = np.where(logits >= np.sort(logits)[-sampler.top_k], logits, -np.inf)
    if sampler.top_p < 1:
        order = np.argsort(-logits, kind="stable")
        probability = np.exp(logits - np.logaddexp.reduce(logits))[order]
        # The smallest set whose mass reaches top_p: a token stays while the mass before it is below.
        before = np.cumsum(probability) - probability
        logits[order[before >= sampler.top_p]] = -np.inf
    if sampler.min_p is not None:
        logits = np.where(logits - logits.max() >= np.log(sampler.min_p), logits, -np.inf)
    return logits - np.logaddexp.reduce(logits)


@pytest.mark.parametrize("name", SAMPLERS)
def test_behaviour_is_processed_and_reference_is_raw(teacher, name):
    sampler = SAMPLERS[name]
    drawn_everything = True
    for rollout in sample_rollouts(teacher, some_prompts(), sampler):
        raw = naive_logprobs(teacher, rollout)
        at = np.arange(rollout.response_len), rollout.response_ids
        np.testing.assert_allclose(rollout.reference_logprob, raw[at], rtol=1e-5, atol=3e-5)
        expected = np.array([processed(row, sampler) for row in raw])
        assert np.isfinite(expected[at]).all(), "drew a token that the rules forbid"
        np.testing.assert_allclose(rollout.behaviour_logprob, expected[at], rtol=1e-5, atol=3e-5)
        drawn_everything &= bool(np.isfinite(expected).all())
    assert drawn_everything == sampler.full_support


def test_the_architectures_sample_as_they_score(any_model):
    # Longer than the sliding window of one of them, with padding and with rows leaving the batch.
    sampler = dataclasses.replace(SAMPLER, max_new_tokens=25, stop_token_ids=(EOS, 2, 3, 4, 5))
    rollouts = sample_rollouts(any_model, some_prompts(), sampler, batch_rows=4)
    assert len({rollout.response_len for rollout in rollouts}) > 2
    for rollout, scores in zip(rollouts, score_rollouts(any_model, rollouts), strict=True):
        np.testing.assert_allclose(rollout.reference_logprob, scores.logprob, rtol=1e-5, atol=5e-5)


def test_the_stop_token_is_kept_and_ends_the_response(teacher):
    rollouts = sample_rollouts(teacher, some_prompts(20), SAMPLER)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        response = rollout.response_ids.tolist()
        assert not set(response[:-1]) & set(SAMPLER.stop_token_ids)
        if rollout.finish_reason == "stop":
            assert response[-1] in SAMPLER.stop_token_ids
        else:
            assert len(response) == SAMPLER.max_new_tokens
            assert response[-1] not in SAMPLER.stop_token_ids
        assert len(rollout.behaviour_logprob) == len(rollout.reference_logprob) == len(response)


def test_prompts_come_back_in_order_and_unchanged(teacher):
    prompts = some_prompts(9)
    for prompt, rollout in zip(prompts, sample_rollouts(teacher, prompts, SAMPLER), strict=True):
        np.testing.assert_array_equal(rollout.token_ids[: rollout.prompt_len], prompt.ids)
        assert (rollout.sample_id, rollout.label) == (prompt.sample_id, prompt.label)
        assert rollout.token_ids.dtype == np.uint32


def tokens(rollouts):
    return [(rollout.token_ids.tolist(), rollout.finish_reason) for rollout in rollouts]


@pytest.mark.parametrize("batch_rows", [1, 2, 64])
def test_draws_do_not_depend_on_the_batch(teacher, batch_rows):
    expected = sample_rollouts(teacher, some_prompts(), SAMPLER, batch_rows=3)
    found = sample_rollouts(teacher, some_prompts(), SAMPLER, batch_rows=batch_rows)
    assert tokens(found) == tokens(expected)
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left.behaviour_logprob, right.behaviour_logprob, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("batch_rows", [1, 2, 64])
def test_nor_near_the_end_of_the_context(any_model, batch_rows):
    # A long prompt may not shorten the response of a short one that shares its batch.
    sampler = dataclasses.replace(SAMPLER, max_new_tokens=20, stop_token_ids=())
    prompts = [
        Prompt(ids=np.full(size, 9, np.uint32), sample_id=str(size)) for size in (3, 40, 50, CONTEXT - 1)
    ]
    rollouts = sample_rollouts(any_model, prompts, sampler, batch_rows=batch_rows)
    assert [rollout.response_len for rollout in rollouts] == [20, 20, 14, 1]
    assert {rollout.finish_reason for rollout in rollouts} == {"length"}
    for rollout, scores in zip(rollouts, score_rollouts(any_model, rollouts), strict=True):
        np.testing.assert_allclose(rollout.reference_logprob, scores.logprob, rtol=1e-5, atol=5e-5)


def test_the_stream_of_draws_is_named_by_seed_and_number(teacher):
    prompts = some_prompts(6)
    whole = tokens(sample_rollouts(teacher, prompts, SAMPLER))
    assert tokens(sample_rollouts(teacher, prompts[2:], SAMPLER, first_stream=2)) == whole[2:]
    assert tokens(sample_rollouts(teacher, prompts, dataclasses.replace(SAMPLER, seed=8))) != whole
    same = [dataclasses.replace(prompts[0], sample_id=str(i)) for i in range(5)]
    assert len({str(row) for row in tokens(sample_rollouts(teacher, same, SAMPLER))}) > 1


def test_greedy_takes_the_likeliest_token_with_certainty(teacher):
    sampler = dataclasses.replace(SAMPLER, temperature=0.0)
    for rollout in sample_rollouts(teacher, some_prompts(), sampler):
        raw = naive_logprobs(teacher, rollout)
        np.testing.assert_array_equal(rollout.response_ids, raw.argmax(axis=1))
        assert (rollout.behaviour_logprob == 0).all()
        np.testing.assert_allclose(rollout.reference_logprob, raw.max(axis=1), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("name", ["raw", "nucleus"])
def test_frequencies_follow_the_distribution(teacher, name):
    # One token from one prompt, often; chi-square over the outcomes expected at least five times.
    n = 4000
    sampler = dataclasses.replace(SAMPLERS[name], max_new_tokens=1, temperature=2.0)
    prompts = [Prompt(ids=np.array([9, 30], np.uint32), sample_id=str(i)) for i in range(n)]
    rollouts = sample_rollouts(teacher, prompts, sampler, batch_rows=n)
    counts = np.bincount([int(rollout.response_ids[0]) for rollout in rollouts], minlength=VOCAB)
    expected = n * np.exp(processed(naive_logprobs(teacher, rollouts[0])[0], sampler))
    assert (counts[expected == 0] == 0).all()
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    assert freedom > 4
    # Wilson and Hilferty's approximation of the 99.9 % point; the seed is fixed.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_a_draw_never_lands_on_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(4, 1)
    uniform = torch.tensor([0.0, 0.5 - 1e-12, 0.5, 1 - 2**-53], dtype=torch.float64)
    drawn, logprob = _draw(logits, uniform, greedy=False)
    assert drawn.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(logprob, torch.full((4,), -np.log(2), dtype=torch.float32))


def test_a_prompt_without_tokens_or_room_is_refused(teacher):
    empty = Prompt(ids=np.array([], np.uint32), sample_id="empty")
    with pytest.raises(InvalidRolloutError, match="'empty': no tokens"):
        sample_rollouts(teacher, [*some_prompts(1), empty], SAMPLER)
    full = Prompt(ids=np.full(CONTEXT, 9, np.uint32), sample_id="full")
    with pytest.raises(InvalidRolloutError, match=f"'full': {CONTEXT} tokens leave no room.*{CONTEXT}"):
        sample_rollouts(teacher, [full], SAMPLER)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": None},
        {"max_new_tokens": 0},
        {"seed": None},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"min_p": 2.0},
        {"repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_settings_outside_their_range(teacher, changes):
    with pytest.raises(InvalidArgumentError):
        sample_rollouts(teacher, some_prompts(1), dataclasses.replace(SAMPLER, **changes))


def test_no_prompts_give_no_rollouts(teacher):
    assert make_processor(SAMPLER)(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]
    assert sample_rollouts(teacher, [], SAMPLER) == []
