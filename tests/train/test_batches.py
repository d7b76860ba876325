"""Packing, padding, and what a batch refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from train.tiny_models import VOCAB, random_rollouts, scored_cache

from opd_store import NO_ID, InvalidArgumentError, InvalidRolloutError, Rollout
from opd_train import BatchAssembler, TeacherTargets, collate
from opd_train.training.forward import response_hidden


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
    dtypes |= {"topk_ids": torch.int32, "topk_logprob": torch.float32, "log_tail": torch.float32}
    for name, dtype in dtypes.items():
        assert getattr(batch, name).dtype == dtype, name
    assert batch.reference_logprob is None
    assert batch.source_ids.tolist() == [0] * n
    assert all(tensor.data_ptr() % 64 == 0 for tensor in batch.tensors().values())


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


def same(left, right):
    """Equal tensors under equal names."""
    found, expected = left.tensors(), right.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    return True


def test_a_batch_moves_in_one_piece(rollouts):
    batch = collate(rollouts, vocab_size=VOCAB, multiple_of=16)
    assert batch.to("cpu") is batch
    copy = batch.rebased(batch.buffer.clone())
    assert same(copy, batch)
    assert copy.n_padding == batch.n_padding > 0
    for name, tensor in copy.tensors().items():
        offset = tensor.data_ptr() - copy.buffer.data_ptr()
        assert 0 <= offset <= len(copy.buffer) - tensor.nbytes, name
        tensor.zero_()
    assert same(batch, collate(rollouts, vocab_size=VOCAB, multiple_of=16)), "nothing is shared"


def test_nothing_to_pack_is_refused():
    with pytest.raises(InvalidArgumentError, match="expected 1 or more to pack, found none"):
        collate([], vocab_size=VOCAB)


def test_what_is_not_in_the_buffer_moves_too(rollouts):
    mixed = dataclasses.replace(
        collate(rollouts, vocab_size=VOCAB),
        loss_mask=torch.ones(3, dtype=torch.bool),
        log_tail=None,
        joined=(TeacherTargets(teacher_logprob=torch.arange(6.0)[::2]),),
    )
    moved = mixed.rebased(mixed.buffer.clone())
    assert same(moved, mixed)
    assert moved.log_tail is None
    assert moved.tensors()["joined.0.teacher_logprob"].tolist() == [0.0, 2.0, 4.0]
    loose = dataclasses.replace(mixed, buffer=None)
    assert same(loose.to("cpu"), mixed)


@pytest.mark.parametrize("multiple_of", [1, 7, 64, 500])
def test_padding_is_behind_the_last_rollout(rollouts, multiple_of):
    plain, batch = (collate(rollouts, vocab_size=VOCAB, multiple_of=n) for n in (1, multiple_of))
    assert batch.n_padded_tokens % multiple_of == 0
    assert batch.n_padding == batch.n_padded_tokens - plain.n_tokens < multiple_of
    assert batch.n_tokens == plain.n_tokens == plain.n_padded_tokens
    assert batch.input_ids.tolist() == plain.input_ids.tolist() + [0] * batch.n_padding
    longest = max(len(rollout.token_ids) for rollout in rollouts)
    positions = [at % longest for at in range(batch.n_padding)]
    assert batch.position_ids.tolist() == plain.position_ids.tolist() + positions
    assert batch.cu_seqlens[:-1].tolist() == plain.cu_seqlens[:-1].tolist()
    assert batch.cu_seqlens[-1] == batch.n_padded_tokens
    assert batch.lengths.tolist() == plain.lengths.tolist() == [len(r.token_ids) for r in rollouts]
    for name in set(plain.tensors()) - {"input_ids", "position_ids", "cu_seqlens"}:
        assert torch.equal(batch.tensors()[name], plain.tensors()[name]), name
    for found, expected in zip(batch.padded(), plain.padded(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("multiple_of", [1, 5, 32])
def test_padded_rows_of_a_multiple(rollouts, multiple_of):
    batch = collate(rollouts, vocab_size=VOCAB)
    ids, mask, source = batch.padded(multiple_of)
    longest = max(len(rollout.token_ids) for rollout in rollouts)
    assert ids.shape[1] % multiple_of == 0
    assert longest <= ids.shape[1] < longest + multiple_of
    assert mask.sum(1).tolist() == batch.lengths.tolist()
    assert torch.equal(ids.flatten()[source + 1], batch.target_ids)


def test_rows_with_fewer_ranks_have_ids_that_can_be_gathered(rollouts):
    ids, logprob = rollouts[0].topk_ids.copy(), rollouts[0].topk_logprob.copy()
    ids[:, 2:], logprob[:, 2:] = NO_ID, -np.inf
    cut = dataclasses.replace(rollouts[0], topk_ids=ids, topk_logprob=logprob)
    batch = collate([cut], vocab_size=VOCAB)
    assert batch.topk_ids[:, :2].tolist() == ids[:, :2].tolist()
    assert (batch.topk_ids[:, 2:] == 0).all()
    assert batch.topk_logprob[:, 2:].isneginf().all()
    assert (cut.topk_ids[:, 2:] == NO_ID).all(), "the rollout stays as it was"


def test_a_rollout_of_one_and_one_token():
    batch = collate([Rollout(token_ids=np.array([4, 5], np.uint32), prompt_len=1)], vocab_size=6)
    assert batch.padded()[2].tolist() == [0]
    assert batch.cu_responses.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("versions", "expected"),
    [([4, 0, 2**53 - 1], [4, 0, 2**53 - 1]), ([4, None, 5], None), ([None] * 3, None)],
    ids=["all", "some", "none"],
)
def test_policy_versions_come_from_rollouts_and_from_a_cache(teacher, tmp_path, versions, expected):
    plain = random_rollouts(3, seed=4)
    marked = [
        dataclasses.replace(r, policy_version=version) for r, version in zip(plain, versions, strict=True)
    ]
    cache = scored_cache(tmp_path / "cache", teacher, marked)
    packed = collate(marked, vocab_size=VOCAB)
    # One run of neighbours, and several.
    forward, mixed = (BatchAssembler([cache]).assemble(0, rows) for rows in ([0, 1, 2], [2, 0, 1]))
    if expected is None:
        assert packed.policy_version is forward.policy_version is mixed.policy_version is None
        return
    assert packed.policy_version.tolist() == forward.policy_version.tolist() == expected
    assert mixed.policy_version.tolist() == [expected[row] for row in (2, 0, 1)]
    assert packed.to("cpu").policy_version.dtype == torch.int64
    assert "policy_version" in forward.tensors()
