"""Packing, padding, and what a batch refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from train.tiny_models import VOCAB, random_rollouts, scored_cache

from opd_store import InvalidRolloutError, Rollout
from opd_train import collate
from opd_train.forward import response_hidden


@pytest.fixture(scope="module")
def rollouts(teacher, tmp_path_factory):
    cache = scored_cache(tmp_path_factory.mktemp("batches") / "cache", teacher, random_rollouts(9), topk=4)
    return list(cache)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_every_field_is_the_rollouts_end_to_end(rollouts, n):
    chosen = rollouts[:n]
    batch = collate(chosen, vocab_size=VOCAB, row_ids=list(range(50, 50 + n)))
    assert batch.row_ids.tolist() == list(range(50, 50 + n))
    assert batch.n_tokens == sum(len(rollout.token_ids) for rollout in chosen)
    for number, rollout in enumerate(chosen):
        first, last = batch.cu_seqlens[number : number + 2].tolist()
        assert batch.input_ids[first:last].tolist() == rollout.token_ids.tolist()
        assert batch.position_ids[first:last].tolist() == list(range(last - first))
        start, end = batch.cu_responses[number : number + 2].tolist()
        assert batch.response_index[start:end].tolist() == list(range(first + rollout.prompt_len, last))
        assert batch.target_ids[start:end].tolist() == rollout.response_ids.tolist()
        mask = [True] * (end - start) if rollout.loss_mask is None else rollout.loss_mask.tolist()
        assert batch.loss_mask[start:end].tolist() == mask
        for name in ("teacher_logprob", "behaviour_logprob", "topk_ids", "topk_logprob", "log_tail"):
            assert getattr(batch, name)[start:end].tolist() == getattr(rollout, name).tolist(), name
    dtypes = {"input_ids": torch.int64, "cu_seqlens": torch.int32, "loss_mask": torch.bool}
    dtypes |= {"topk_ids": torch.int64, "topk_logprob": torch.float32, "log_tail": torch.float32}
    for name, dtype in dtypes.items():
        assert getattr(batch, name).dtype == dtype, name
    assert batch.reference_logprob is None


def test_a_field_that_one_rollout_lacks_is_absent(rollouts):
    lacking = dataclasses.replace(rollouts[1], teacher_logprob=None)
    batch = collate([rollouts[0], lacking], vocab_size=VOCAB)
    assert batch.teacher_logprob is None
    assert batch.topk_logprob is not None
    assert batch.row_ids.tolist() == [-1, -1]


def test_padded_rows_hold_every_token_and_nothing_else(rollouts):
    batch = collate(rollouts, vocab_size=VOCAB)
    ids, mask, source = batch.padded()
    assert ids.shape == mask.shape == (9, max(len(rollout.token_ids) for rollout in rollouts))
    for row, rollout in enumerate(rollouts):
        size = len(rollout.token_ids)
        assert ids[row, :size].tolist() == rollout.token_ids.tolist()
        assert mask[row].tolist() == [1] * size + [0] * (ids.shape[1] - size)
        assert (ids[row, size:] == 0).all()
    # One after the source is the token itself, in the same row.
    assert torch.equal(ids.flatten()[source + 1], batch.target_ids)
    assert torch.equal(source // ids.shape[1], (source + 1) // ids.shape[1])


def test_hidden_states_are_those_of_each_rollout_alone(any_model, rollouts):
    batch = collate(rollouts, vocab_size=VOCAB)
    with torch.no_grad():
        together = response_hidden(any_model, batch)
        for number, rollout in enumerate(rollouts):
            ids = torch.from_numpy(rollout.token_ids.astype(np.int64))[None]
            alone = any_model.hidden(ids, None)[0, rollout.prompt_len - 1 : -1]
            start, end = batch.cu_responses[number : number + 2].tolist()
            torch.testing.assert_close(together[start:end], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("field", ["token_ids", "topk_ids"])
def test_an_id_outside_the_vocabulary_is_refused(rollouts, field):
    ids = getattr(rollouts[2], field).copy()
    ids[-1] = VOCAB
    bad = dataclasses.replace(rollouts[2], **{field: ids})
    with pytest.raises(InvalidRolloutError, match=f"row 7, {field}: id {VOCAB} outside.*{VOCAB}") as caught:
        collate([rollouts[0], bad], vocab_size=VOCAB, row_ids=[3, 7])
    assert caught.value.field == field


def test_moving_a_batch_keeps_every_field(rollouts):
    batch = collate(rollouts, vocab_size=VOCAB)
    moved = batch.to("cpu")
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        assert (getattr(moved, field.name) is None) == (value is None)
        assert value is None or torch.equal(getattr(moved, field.name), value)


def test_a_rollout_of_one_and_one_token():
    batch = collate([Rollout(token_ids=np.array([4, 5], np.uint32), prompt_len=1)], vocab_size=6)
    assert batch.padded()[2].tolist() == [0]
    assert batch.cu_responses.tolist() == [0, 1]
