"""Rows of a cache in TRL's own SFTTrainer, and batches in the form of its async distillation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from train.adapter_problems import (
    COMMON,
    Recording,
    assert_close,
    counting_rollouts,
    reference_run,
    weights,
)
from train.tiny_models import loaded, random_rollouts, save_tiny, scored_cache, tiny_tokenizer
from trl import SFTConfig

from opd_store import InvalidArgumentError, MismatchError
from opd_train import BatchAssembler, CorrectionConfig, LossConfig, Objective, load_causal_lm
from opd_train.adapters.trl import (
    CacheCollator,
    DistillSFTTrainer,
    async_distillation_fields,
    async_distillation_samples,
    row_dataset,
)
from opd_train.losses import log_tail_of, topk_forward_kl

LOSS = LossConfig(objective=Objective.FORWARD_KL, correction=CorrectionConfig(kind="token_tis", cap=2.0))
PREPARED = {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": None}


class Recorded(Recording, DistillSFTTrainer):
    pass


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")
    # Read when `trl.experimental` is first imported.
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("trl") / "cache"
    return scored_cache(path, teacher, random_rollouts(24, seed=3), topk=6)


@pytest.fixture(scope="module")
def counting(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("trl-counting") / "cache"
    return scored_cache(path, loaded(models["successor"]), counting_rollouts(30), topk=3)


def sft_trainer(cache, student, out, *, eval_dataset=None, **options):
    return Recorded(
        load_causal_lm(student),
        SFTConfig(str(out), **COMMON | PREPARED | options),
        CacheCollator(cache),
        loss=LOSS,
        train_dataset=row_dataset(cache),
        eval_dataset=eval_dataset,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_steps_equal_our_own_trainers(cache, models, tmp_path, accumulate):
    trainer = sft_trainer(cache, models["llama"], tmp_path, gradient_accumulation_steps=accumulate)
    trainer.train()
    batches = [rows for rows, _ in trainer.seen]
    assert len(batches) == 2 * accumulate
    expected, losses = reference_run(cache, models["llama"], LOSS, batches, accumulate=accumulate)
    parts = [loss for _, loss in trainer.seen]
    found = [sum(parts[at : at + accumulate]) for at in range(0, len(parts), accumulate)]
    assert found == pytest.approx(losses, rel=1e-5)
    assert_close(weights(trainer.model), expected)
    assert trainer.state.log_history[0]["forward_kl"] > 0.1
    # TRL's own metrics would need another forward.
    assert "mean_token_accuracy" not in trainer.state.log_history[0]


def test_it_evaluates_saves_and_resumes(cache, models, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "epoch"}
    options |= {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
    held_out = row_dataset(cache, np.array([1, 5, 9]))
    whole = sft_trainer(cache, models["llama"], tmp_path / "whole", eval_dataset=held_out, **options)
    whole.train()
    assert whole.evaluate()["eval_loss"] > 0.1
    again = sft_trainer(cache, models["llama"], tmp_path / "again", eval_dataset=held_out, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert_close(weights(again.model), weights(whole.model), atol=0)
    assert load_causal_lm(tmp_path / "whole/checkpoint-4").provenance["source"]["cache"] == cache.digest


def test_a_shift_costs_tens_of_nats(counting, models, tmp_path):
    trainer = sft_trainer(counting, models["successor"], tmp_path)
    collator, dataset = CacheCollator(counting), row_dataset(counting)
    losses = []
    for shift in (-1, 0, 1):
        batch = collator([dataset[row] for row in range(30)])
        for name in ("teacher_ids", "teacher_logprobs", "teacher_log_tail"):
            batch[name] = batch[name].roll(shift, dims=1)
        batch["loss_mask"] &= batch["teacher_ids"][..., 0] >= 0
        batch["rollout_logprobs"] = torch.zeros(batch["loss_mask"].shape)
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] > 20
    assert abs(losses[1]) < 1e-6
    assert losses[2] > 20


REFUSED = {
    "remove_unused_columns": (True, "remove_unused_columns: found True"),
    "dataset_kwargs": (None, "skip_prepare_dataset"),
    "packing": (True, "packing and padding_free: expected False"),
    "padding_free": (True, "packing and padding_free: expected False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_it_cannot_honour_are_refused(cache, models, tmp_path, name):
    value, message = REFUSED[name]
    with pytest.raises(InvalidArgumentError, match=message):
        sft_trainer(cache, models["llama"], tmp_path, **{name: value})


def test_a_cache_of_another_tokenizer_is_refused(cache, tmp_path):
    student = save_tiny(tmp_path / "model", tokenizer=tiny_tokenizer(first="A"))
    with pytest.raises(MismatchError, match="tokenizer_fingerprint"):
        sft_trainer(cache, student, tmp_path)


def test_async_names_hold_every_candidate_once(cache):
    rows = [3, 0, 17]
    fields = async_distillation_fields(BatchAssembler([cache]).assemble(0, rows))
    at, n_outside = 0, 0
    for rollout in (cache[row] for row in rows):
        for position, token in enumerate(rollout.token_ids):
            one = {name: tensor[0, at] for name, tensor in fields.items()}
            at += 1
            assert one["input_ids"] == token
            assert one["position_ids"] == position
            pairs = zip(one["teacher_topk_ids"].tolist(), one["teacher_topk_logprobs"].tolist(), strict=True)
            found = [pair for pair in pairs if pair != (-1, -np.inf)]
            step = position - rollout.prompt_len
            if step < 0:
                assert not found
                assert one["completion_mask"] == 0
                continue
            in_loss = rollout.loss_mask is None or rollout.loss_mask[step]
            assert one["completion_mask"] == int(in_loss)
            said = zip(rollout.topk_ids[step].tolist(), rollout.topk_logprob[step].tolist(), strict=True)
            expected = list(said)
            if token not in rollout.topk_ids[step]:
                expected.append((int(token), float(rollout.teacher_logprob[step])))
                n_outside += 1
            assert found == expected
    assert at == fields["input_ids"].shape[1]
    assert 0 < n_outside < fields["completion_mask"].sum()


def test_trls_collator_packs_our_samples_to_the_same_tensors(cache):
    from trl.experimental.async_distillation.async_distillation_trainer import DataCollatorForRollout

    batch = BatchAssembler([cache], multiple_of=32).assemble(0, [3, 0, 17])
    fields, samples = async_distillation_fields(batch), async_distillation_samples(batch)
    found = DataCollatorForRollout(pad_token_id=0)([[samples]])
    for name, expected in fields.items():
        assert found[name].dtype == expected.dtype, name
        assert torch.equal(found[name], expected), name
    assert found["global_n_tokens"].item() == batch.loss_mask.sum()


@pytest.mark.parametrize(("which", "student"), [("cache", "llama"), ("counting", "successor")])
def test_trls_loss_on_async_names_is_the_kl(request, models, which, student):
    from trl.experimental.async_distillation.async_distillation_trainer import _chunked_jsd_loss

    lm = loaded(models[student])
    batch = BatchAssembler([request.getfixturevalue(which)]).assemble(0, [3, 0, 17])
    fields = async_distillation_fields(batch)

    def loss(shift):
        # As in the trainer's compute_loss: hidden state t against what is recorded at t + 1.
        ids, logprobs = (
            fields[name].roll(shift, dims=1)[:, 1:] for name in ("teacher_topk_ids", "teacher_topk_logprobs")
        )
        valid = fields["completion_mask"][:, 1:].bool() & (ids != -1).any(dim=-1)
        with torch.no_grad():
            hidden = torch.cat(
                [
                    lm.hidden(ids[None], None)[0]
                    for ids in fields["input_ids"][0].split(batch.lengths.tolist())
                ]
            )[None, :-1]
            head = lm.model.lm_head.weight
            total, *_ = _chunked_jsd_loss(
                hidden[valid], head, None, 1.0, None, ids[valid], logprobs[valid], ids[valid] != -1,
                0.0, 1.0, True, None, 1, 16,
            )  # fmt: skip
            student_logprobs = torch.log_softmax(hidden[valid] @ head.T, dim=-1)
            gathered = student_logprobs.gather(-1, ids[valid].clamp(min=0))
            expected = topk_forward_kl(gathered, logprobs[valid], log_tail_of(logprobs[valid]))
        return total.item() / int(valid.sum()), expected.mean().item()

    found, expected = loss(0)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    if which == "counting":
        assert abs(found) < 1e-5
        assert loss(1)[0] > 20
        assert loss(-1)[0] > 20
    else:
        assert found > 0.1


def test_async_names_need_a_teacher(teacher, tmp_path):
    bare = scored_cache(tmp_path / "bare", teacher, random_rollouts(2), topk=0)
    with pytest.raises(InvalidArgumentError, match="needs top-k and teacher_logprob"):
        async_distillation_fields(BatchAssembler([bare]).assemble(0, [0]))
