"""Scores against a float64 softmax of the model's own logits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from train.tiny_models import CONTEXT, VOCAB, loaded, naive_logprobs, random_rollouts, save_tiny

from opd_store import NO_ID, InvalidArgumentError, InvalidRolloutError, Rollout
from opd_train import CausalLM, load_causal_lm, score_rollouts
from opd_train.capture.drawing import Draws
from opd_train.capture.scoring import plan_batches

# float32 models of two layers; log-probs reach -40.
ATOL = 2e-5


def check(lm, rollout, scores, topk, atol=ATOL):
    reference = naive_logprobs(lm, rollout)
    rows = np.arange(rollout.response_len)
    np.testing.assert_allclose(scores.logprob, reference[rows, rollout.response_ids], rtol=1e-5, atol=atol)
    assert scores.logprob.dtype == np.float32
    assert scores.logprob.max() <= 0
    if not topk:
        assert scores.topk_ids is scores.topk_logprob is scores.log_tail is None
        return
    ids, values = scores.topk_ids, scores.topk_logprob
    assert (ids.dtype, values.dtype, scores.log_tail.dtype) == (np.uint32, np.float32, np.float32)
    assert ids.shape == values.shape == (rollout.response_len, topk)
    np.testing.assert_allclose(values, reference[rows[:, None], ids], rtol=1e-5, atol=atol)
    ranked = np.sort(reference, axis=1)[:, ::-1]
    np.testing.assert_allclose(values, ranked[:, :topk], rtol=1e-5, atol=atol)
    assert all(len(set(row)) == topk for row in ids.tolist())
    # The order that the format demands: falling, ties by rising id.
    np.testing.assert_array_equal(ids, np.take_along_axis(ids, np.lexsort((ids, -values), axis=1), axis=1))
    if topk == VOCAB:
        assert (scores.log_tail == -np.inf).all()
    else:
        tail = np.log(np.exp(ranked[:, topk:]).sum(axis=1))
        np.testing.assert_allclose(scores.log_tail, tail, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("topk", [0, 1, 7, VOCAB])
def test_every_number_against_float64(any_model, topk):
    rollouts = random_rollouts(9, seed=topk)
    assert len({len(rollout.token_ids) for rollout in rollouts}) > 3
    done = []
    found = score_rollouts(any_model, rollouts, topk=topk, batch_tokens=40, chunk=3, on_batch=done.append)
    for rollout, scores in zip(rollouts, found, strict=True):
        check(any_model, rollout, scores, topk)
    assert len(done) > 2
    assert done == sorted(done)
    assert done[-1] == sum(rollout.response_len for rollout in rollouts)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_neither_chunk_nor_batch_changes_a_number(teacher, chunk, batch_tokens):
    rollouts = random_rollouts(7, seed=3)
    for rollout, scores in zip(
        rollouts,
        score_rollouts(teacher, rollouts, topk=5, chunk=chunk, batch_tokens=batch_tokens),
        strict=True,
    ):
        check(teacher, rollout, scores, 5)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_the_head_never_sees_more_rows_than_a_chunk(teacher, chunk, monkeypatch):
    seen = []

    def spy(self, hidden):
        seen.append(len(hidden))
        return logits(self, hidden)

    logits = CausalLM.logits
    monkeypatch.setattr(CausalLM, "logits", spy)
    rollouts = random_rollouts(5, seed=1)
    score_rollouts(teacher, rollouts, topk=3, chunk=chunk)
    total = sum(rollout.response_len for rollout in rollouts)
    assert sum(seen) == total, "prompt positions need no logits"
    assert max(seen) == min(chunk, total)


def test_ties_go_by_rising_id(tmp_path):
    # Equal rows of the head give equal logits: ids 20..29 and the first ten.
    lm = load_causal_lm(save_tiny(tmp_path / "model"))
    with torch.no_grad():
        head = lm.model.get_output_embeddings().weight
        head[20:30] = head[:10]
        head[5] = head[3]
    rollouts = random_rollouts(6, seed=2)
    ties = 0
    for rollout, scores in zip(rollouts, score_rollouts(lm, rollouts, topk=VOCAB), strict=True):
        check(lm, rollout, scores, VOCAB)
        equal = np.diff(scores.topk_logprob, axis=1) == 0
        assert (np.diff(scores.topk_ids.astype(np.int64), axis=1)[equal] > 0).all()
        ties += int(equal.sum())
    assert ties > 100


def test_bfloat16_weights_give_float32_logprobs(models):
    lm = load_causal_lm(models["teacher"], dtype=torch.bfloat16)
    assert lm.info.dtype == "bfloat16"
    rollouts = random_rollouts(4, seed=5)
    scored = score_rollouts(lm, rollouts, topk=VOCAB)
    total = np.concatenate([np.exp(s.topk_logprob.astype(np.float64)).sum(axis=1) for s in scored])
    # Normalised in float32: sums of bfloat16 log-probs would miss 1 by percents.
    np.testing.assert_allclose(total, 1.0, atol=1e-5)
    exact = [loaded_scores.logprob for loaded_scores in score_rollouts(loaded(models["teacher"]), rollouts)]
    difference = np.abs(np.concatenate([s.logprob for s in scored]) - np.concatenate(exact))
    assert 0 < difference.max() < 2.0


def test_a_processor_scores_what_was_drawn_from(teacher):
    rollouts = random_rollouts(3, seed=6)
    found = score_rollouts(teacher, rollouts, processor=lambda logits: logits / 0.5)
    for rollout, scores in zip(rollouts, found, strict=True):
        reference = naive_logprobs(teacher, rollout) / 0.5
        reference -= np.log(np.exp(reference).sum(axis=1, keepdims=True))
        expected = reference[np.arange(rollout.response_len), rollout.response_ids]
        np.testing.assert_allclose(scores.logprob, expected, rtol=1e-5, atol=ATOL)


def test_order_is_that_of_the_input(teacher):
    rollouts = random_rollouts(11, seed=8)
    alone = [score_rollouts(teacher, [rollout])[0].logprob for rollout in rollouts]
    for scores, expected in zip(score_rollouts(teacher, rollouts), alone, strict=True):
        np.testing.assert_allclose(scores.logprob, expected, rtol=1e-5, atol=ATOL)


def test_plan_covers_every_row_once_and_keeps_to_the_budget():
    lengths = [3, 50, 7, 7, 1, 20, 19, 2, 2, 2]
    groups = plan_batches(lengths, 40)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or max(lengths[row] for row in group) * len(group) <= 40
    assert [1] in groups, "longer than the budget stands alone"
    assert plan_batches([], 40) == []


def refused(lm, rollout, **options):
    rollouts = [*random_rollouts(2), rollout]
    with pytest.raises(InvalidRolloutError) as caught:
        score_rollouts(lm, rollouts, **options)
    assert "'bad'" in str(caught.value)
    assert caught.value.sample_id == "bad"
    return caught.value


def ids(*values):
    return np.array(values, np.uint32)


def test_an_id_outside_the_model_is_refused_with_its_position(teacher):
    bad = Rollout(token_ids=ids(3, 4, VOCAB, 5), prompt_len=1, sample_id="bad")
    error = refused(teacher, bad)
    assert (error.field, error.position) == ("token_ids", 2)
    assert f"id {VOCAB}" in str(error)
    assert f"{VOCAB} logits" in str(error)


def test_longer_than_the_context_is_refused(teacher):
    bad = Rollout(token_ids=np.ones(CONTEXT + 1, np.uint32), prompt_len=3, sample_id="bad")
    error = refused(teacher, bad)
    assert f"{CONTEXT + 1} tokens" in str(error)
    assert str(CONTEXT) in str(error)
    fits = dataclasses.replace(bad, token_ids=bad.token_ids[:-1])
    assert len(score_rollouts(teacher, [fits])[0].logprob) == CONTEXT - 3


@pytest.mark.parametrize("prompt_len", [0, 4, 9])
def test_an_empty_prompt_or_response_is_refused(teacher, prompt_len):
    error = refused(teacher, Rollout(token_ids=ids(1, 2, 3, 4), prompt_len=prompt_len, sample_id="bad"))
    assert error.field == "prompt_len"


def test_more_ranks_than_logits(teacher):
    with pytest.raises(InvalidArgumentError, match=f"{VOCAB + 1} ranks.*{VOCAB} logits"):
        score_rollouts(teacher, random_rollouts(1), topk=VOCAB + 1)


@pytest.mark.parametrize("topk", [0, 4])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nan_logits_are_refused_with_rollout_and_position(teacher, monkeypatch, topk, value):
    def broken(self, hidden):
        found = logits(self, hidden)
        if len(hidden) > 2:
            found[2, 9] = float(value)
        return found

    logits = CausalLM.logits
    monkeypatch.setattr(CausalLM, "logits", broken)
    # The longest rollout is scored first, so the third position of the head is its third.
    bad = Rollout(token_ids=ids(3, 4, 5, 6, 6, 7), prompt_len=2, sample_id="bad")
    good = Rollout(token_ids=ids(3, 4, 5, 6), prompt_len=2, sample_id="good")
    with pytest.raises(
        InvalidRolloutError, match=r"'bad', response position 2: the logits are NaN"
    ) as caught:
        score_rollouts(teacher, [good, bad], topk=topk)
    assert (caught.value.sample_id, caught.value.field, caught.value.position) == ("bad", "logits", 2)
    assert len(score_rollouts(teacher, [good], topk=topk)) == 1


def test_nan_weights_never_give_scores(tmp_path):
    lm = load_causal_lm(save_tiny(tmp_path / "model"))
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(InvalidRolloutError, match="response position 0: the logits are NaN"):
        score_rollouts(lm, random_rollouts(2), topk=2)


def test_a_token_the_sampler_could_not_draw_is_refused(teacher):
    def processor(logits):
        return logits.index_fill(-1, torch.tensor([9]), -torch.inf)

    bad = Rollout(token_ids=ids(3, 4, 5, 9), prompt_len=2, sample_id="bad")
    with pytest.raises(InvalidRolloutError, match="response position 1"):
        score_rollouts(teacher, [bad], processor=processor)


def check_support(lm, rollout, ids, logprob, log_tail):
    """Rows of ids with the model's log-probs, in the order of the format, padded at the end."""
    reference = naive_logprobs(lm, rollout)
    for at, expected in enumerate(reference):
        n = int((ids[at] != NO_ID).sum())
        own = ids[at, :n].astype(np.int64)
        assert n == len(set(own.tolist()))
        assert (ids[at, n:] == NO_ID).all()
        assert (logprob[at, n:] == -np.inf).all()
        np.testing.assert_array_equal(own, own[np.lexsort((own, -logprob[at, :n]))])
        np.testing.assert_allclose(logprob[at, :n], expected[own], rtol=1e-5, atol=ATOL)
        rest = np.delete(np.exp(expected), own).sum()
        if rest:
            np.testing.assert_allclose(log_tail[at], np.log(rest), rtol=1e-4, atol=ATOL)
        else:
            assert log_tail[at] == -np.inf


@pytest.mark.parametrize("draws", [Draws(1), Draws(7, 1.7, 5), Draws(200, 0.5)], ids=str)
def test_drawn_ids_are_scored_at_temperature_one_and_counted(any_model, draws):
    rollouts = random_rollouts(5, seed=1)
    for rollout, scores in zip(
        rollouts, score_rollouts(any_model, rollouts, topk=3, draws=draws), strict=True
    ):
        check(any_model, rollout, scores, 3)
        args = scores.sampled_ids, scores.sampled_logprob, scores.sampled_log_tail
        check_support(any_model, rollout, *args)
        assert scores.sampled_ids.shape == (rollout.response_len, draws.n)
        assert (scores.sampled_draws.sum(axis=1) == draws.n).all()
        assert ((scores.sampled_draws > 0) == (scores.sampled_ids != NO_ID)).all()
        assert scores.sampled_draws.dtype == scores.sampled_ids.dtype == np.uint32


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_come_as_often_as_the_tempered_teacher_says(teacher, temperature):
    n = 5000
    rollouts = random_rollouts(4, seed=2)
    statistic = degrees = 0
    for rollout, scores in zip(
        rollouts, score_rollouts(teacher, rollouts, draws=Draws(n, temperature)), strict=True
    ):
        tempered = naive_logprobs(teacher, rollout) / temperature
        expected = n * np.exp(tempered - np.log(np.exp(tempered).sum(axis=1, keepdims=True)))
        found = np.zeros_like(expected)
        rows, columns = np.nonzero(scores.sampled_draws)
        found[rows, scores.sampled_ids[rows, columns]] = scores.sampled_draws[rows, columns]
        # Chi-square: ids that are expected less than five times share a cell.
        common = expected >= 5
        for seen, mean, keep in zip(found, expected, common, strict=True):
            cells = [*zip(seen[keep], mean[keep], strict=True), (seen[~keep].sum(), mean[~keep].sum())]
            cells = [(a, b) for a, b in cells if b >= 1]
            statistic += sum((a - b) ** 2 / b for a, b in cells)
            degrees += len(cells) - 1
    assert degrees > 100
    assert abs(statistic - degrees) < 4 * np.sqrt(2 * degrees), (statistic, degrees)


def test_draws_depend_on_rollout_and_seed_and_on_nothing_else(teacher):
    rollouts = random_rollouts(9, seed=3)

    def ids(rollouts, seed=0, **options):
        found = score_rollouts(teacher, rollouts, draws=Draws(6, seed=seed), **options)
        return [(scores.sampled_ids.tolist(), scores.sampled_draws.tolist()) for scores in found]

    whole = ids(rollouts)
    assert whole == ids(rollouts, batch_tokens=20, chunk=1) == ids(rollouts, topk=4)
    assert whole == ids(rollouts[::-1])[::-1]
    assert whole[4] == ids(rollouts[4:5])[0]
    assert all(ours != theirs for ours, theirs in zip(whole, ids(rollouts, seed=1), strict=True))
    twin = dataclasses.replace(rollouts[0], sample_id="twin")
    nameless = dataclasses.replace(rollouts[0], sample_id=None)
    assert len({str(ids([rollout])[0]) for rollout in (rollouts[0], twin, nameless)}) == 3


@pytest.mark.parametrize("width", [1, 4, VOCAB])
def test_chosen_ids_are_scored_in_the_teachers_order(teacher, width):
    rollouts = random_rollouts(5, seed=4)
    rng = np.random.default_rng(0)
    wanted = [
        np.stack([rng.permutation(VOCAB)[:width] for _ in range(rollout.response_len)]).astype(np.uint32)
        for rollout in rollouts
    ]
    found = score_rollouts(teacher, rollouts, chosen_ids=wanted, batch_tokens=30, chunk=2)
    for rollout, ids, scores in zip(rollouts, wanted, found, strict=True):
        check_support(teacher, rollout, scores.chosen_ids, scores.chosen_logprob, scores.chosen_log_tail)
        np.testing.assert_array_equal(np.sort(scores.chosen_ids, axis=1), np.sort(ids, axis=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chosen_ids": [np.zeros((1, 2), np.uint32)] * 3}, r"chosen_ids: expected an array"),
        ({"chosen_ids": []}, r"chosen_ids: expected an array .* for each of 3"),
        ({"chosen_ids": "beyond"}, rf"chosen_ids: id {VOCAB}, but .* has {VOCAB} logits"),
    ],
)
def test_chosen_ids_that_do_not_fit_are_refused(teacher, options, message):
    rollouts = random_rollouts(3, seed=5, response=(2, 3))
    if options["chosen_ids"] == "beyond":
        options = {"chosen_ids": [np.full((r.response_len, 1), VOCAB, np.uint32) for r in rollouts]}
    with pytest.raises(InvalidArgumentError, match=message):
        score_rollouts(teacher, rollouts, **options)


@pytest.mark.parametrize(
    "wrong", [(0,), (4, 0.0), (4, 101.0), (4, float("nan")), (4, 1.0, -1), (4, 1.0, 1 << 64)]
)
def test_impossible_draws_are_refused(wrong):
    with pytest.raises(InvalidArgumentError, match=r"draws: expected n >= 1"):
        Draws(*wrong)
