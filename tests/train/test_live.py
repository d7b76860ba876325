"""Live distillation: what a batch is made of, and going on exactly."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from train.tiny_models import EOS, VOCAB, loaded, naive_logprobs, save_tiny, tiny_tokenizer

from opd_store import InvalidArgumentError, MismatchError, Rollout, SamplerInfo
from opd_train import LiveSource, Prompt, load_causal_lm

SAMPLER = SamplerInfo(max_new_tokens=6, seed=5, stop_token_ids=(EOS,))
PROMPTS = [Prompt(ids=np.array([7 + i, 9], np.uint32), sample_id=f"p{i}") for i in range(5)]


@pytest.fixture(scope="module")
def student(models):
    return loaded(models["llama"])


def source(student, teacher, prompts=PROMPTS, sampler=SAMPLER, **options):
    return LiveSource(student, teacher, prompts, sampler, **({"batch_rollouts": 3, "topk": 4} | options))


def rollouts_of(batch):
    at = batch.cu_seqlens.tolist()
    sizes = batch.cu_responses.diff().tolist()
    for number, size in enumerate(sizes):
        ids = batch.input_ids[at[number] : at[number + 1]].numpy().astype(np.uint32)
        yield Rollout(token_ids=ids, prompt_len=len(ids) - size)


def test_a_batch_is_sampled_from_the_student_and_scored_by_the_teacher(student, teacher):
    batch = source(student, teacher).next_batch()
    rollouts = list(rollouts_of(batch))
    assert len(rollouts) == 3
    assert batch.row_ids.tolist() == [-1] * 3
    said = np.concatenate([naive_logprobs(teacher, rollout) for rollout in rollouts])
    drawn = np.concatenate([naive_logprobs(student, rollout) for rollout in rollouts])
    at = np.arange(len(said)), batch.target_ids.numpy()
    np.testing.assert_allclose(batch.teacher_logprob, said[at], rtol=1e-5, atol=3e-5)
    np.testing.assert_allclose(batch.behaviour_logprob, drawn[at], rtol=1e-5, atol=3e-5)
    ids = batch.topk_ids.numpy()
    np.testing.assert_allclose(batch.topk_logprob, said[at[0][:, None], ids], rtol=1e-5, atol=3e-5)
    assert source(student, teacher, topk=0).next_batch().topk_ids is None


def test_every_prompt_once_a_pass(student, teacher):
    live = source(student, teacher, batch_rollouts=5)
    for _ in range(3):
        prompts = {tuple(r.token_ids[: r.prompt_len].tolist()) for r in rollouts_of(live.next_batch())}
        assert len(prompts) == len(PROMPTS)
    many = source(student, teacher, batch_rollouts=12).next_batch()
    counts = np.unique([rollout.token_ids[0] for rollout in rollouts_of(many)], return_counts=True)[1]
    assert sorted(counts.tolist()) == [2, 2, 2, 3, 3]


@pytest.mark.parametrize("step", range(5))
def test_the_rest_of_the_sequence_is_the_same_from_every_step(student, teacher, step):
    whole = source(student, teacher)
    expected = [whole.next_batch() for _ in range(5)]
    first = source(student, teacher)
    for _ in range(step):
        first.next_batch()
    resumed = source(student, teacher)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in expected[step:]:
        found = resumed.next_batch()
        assert torch.equal(found.input_ids, batch.input_ids)
        assert torch.equal(found.teacher_logprob, batch.teacher_logprob)


def test_the_student_is_sampled_as_it_is_now(models, teacher):
    student = load_causal_lm(models["llama"])
    before = source(student, teacher).next_batch()
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(0.2)
    after = source(student, teacher).next_batch()
    assert after.input_ids.tolist() != before.input_ids.tolist()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("sampler", {"sampler": dataclasses.replace(SAMPLER, temperature=0.5)}),
        ("prompts", {"prompts": PROMPTS[:4]}),
        ("batch_rollouts", {"batch_rollouts": 4}),
        ("topk", {"topk": 2}),
    ],
)
def test_the_state_of_another_run_is_refused(student, teacher, field, change):
    state = json.loads(json.dumps(source(student, teacher).state_dict()))
    with pytest.raises(MismatchError, match=f"{field} is") as caught:
        source(student, teacher, **change).load_state_dict(state)
    assert caught.value.field == field


def test_a_teacher_of_another_tokenizer_or_vocabulary_is_refused(student, tmp_path):
    other = load_causal_lm(save_tiny(tmp_path / "tokens", tokenizer=tiny_tokenizer(first="A")))
    with pytest.raises(MismatchError, match="tokenizer_fingerprint: the teacher has"):
        source(student, other)
    large = load_causal_lm(save_tiny(tmp_path / "large", vocab_size=VOCAB + 3, tokenizer=tiny_tokenizer()))
    with pytest.raises(MismatchError, match=f"vocab_size: the teacher has {VOCAB + 3}, the student {VOCAB}"):
        source(student, large)


def test_no_prompts(student, teacher):
    with pytest.raises(InvalidArgumentError, match="none to sample from"):
        source(student, teacher, prompts=[])
