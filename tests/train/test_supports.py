"""Drawn and chosen ids on their way from a cache into a loss."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from train.tiny_models import VOCAB, loaded, meta_of, random_rollouts

import opd_store
from opd_store import InvalidArgumentError, InvalidRolloutError
from opd_train import BatchAssembler, CacheLoader, CacheStream, collate, score_cache
from opd_train.capture.drawing import Draws
from opd_train.losses import draw_weights, random_sampling_kd

FIELDS = ("drawn_ids", "drawn_logprob", "drawn_weight", "chosen_ids", "chosen_logprob", "chosen_log_tail")
WANTED = {"draws": True, "chosen": True}


@pytest.fixture(scope="module")
def cache(teacher, models, tmp_path_factory):
    """Draws at another temperature than 1, and the student's likeliest ids."""
    return make_cache(tmp_path_factory.mktemp("caches") / "c", teacher, models, Draws(8, 1.5))


def make_cache(path, teacher, models, draws, *, seed=0, **options):
    rollouts = random_rollouts(7, seed=seed)
    options = {"topk": 3, "chosen": 4, "chooser": loaded(models["llama"]), "encoding": "plain"} | options
    score_cache(teacher, rollouts, meta_of(teacher), path, draws=draws, commit_rollouts=4, **options)
    return opd_store.open(path)


def expected_fields(rollouts, temperatures):
    """What a batch of these rollouts holds, position by position."""
    rows = {name: [] for name in FIELDS}
    for rollout, temperature in zip(rollouts, temperatures, strict=True):
        for kind, third in (("sampled", "draws"), ("chosen", "log_tail")):
            ids, logprob, last = (getattr(rollout, f"{kind}_{name}") for name in ("ids", "logprob", third))
            if kind == "sampled":
                shares = last * np.exp(np.where(last > 0, logprob, 0) * (1 - 1 / temperature))
                last = shares / shares.sum(axis=1, keepdims=True)
            name = "drawn" if kind == "sampled" else kind
            rows[f"{name}_ids"].append(np.where(ids == opd_store.NO_ID, 0, ids).astype(np.int64))
            rows[f"{name}_logprob"].append(logprob)
            rows[f"{name}_{'weight' if kind == 'sampled' else third}"].append(last)
    return {name: np.concatenate(values) for name, values in rows.items()}


def check(batch, expected):
    for name, values in expected.items():
        found = getattr(batch, name)
        assert found.dtype == (torch.int32 if name.endswith("ids") else torch.float32), name
        np.testing.assert_allclose(found.numpy(), values, rtol=2e-6, atol=0, err_msg=name)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5, 6], [5, 1, 3], [2]], ids=str)
def test_a_cache_and_its_rollouts_give_the_same_batch(cache, rows):
    rollouts = [cache[row] for row in rows]
    assembled = BatchAssembler([cache], **WANTED).assemble(0, rows)
    collated = collate(rollouts, vocab_size=VOCAB, draw_temperature=1.5, **WANTED)
    expected = expected_fields(rollouts, [1.5] * len(rows))
    check(assembled, expected)
    for name in FIELDS:
        assert torch.equal(getattr(assembled, name), getattr(collated, name)), name
    assert (assembled.drawn_weight == 0).any(), "a position with fewer ids than draws"
    torch.testing.assert_close(assembled.drawn_weight.sum(dim=1), torch.ones(len(expected["drawn_ids"])))


def test_nobody_pays_who_did_not_ask(cache):
    rollouts = list(cache)
    plain = [BatchAssembler([cache]).assemble(0, [0, 1]), collate(rollouts, vocab_size=VOCAB)]
    for batch in plain:
        assert all(getattr(batch, name) is None for name in FIELDS)
    assert len(plain[0].buffer) < len(BatchAssembler([cache], **WANTED).assemble(0, [0, 1]).buffer)
    one = BatchAssembler([cache], chosen=True).assemble(0, [0, 1])
    assert one.drawn_ids is None
    assert one.chosen_ids is not None


def test_caches_of_other_widths_and_temperatures_share_a_batch(cache, teacher, models, tmp_path):
    other = make_cache(tmp_path / "c", teacher, models, Draws(5), seed=1, chosen=6)
    batch = BatchAssembler([cache, other], **WANTED).assemble(np.array([0, 0, 1, 1]), [1, 2, 0, 4])
    rollouts = [cache[1], cache[2], other[0], other[4]]
    wide = []
    for rollout in rollouts:
        fields = {}
        for kind, width, third in (("sampled", 8, "draws"), ("chosen", 6, None)):
            room = ((0, 0), (0, width - getattr(rollout, f"{kind}_ids").shape[1]))
            names = {"ids": opd_store.NO_ID, "logprob": -np.inf} | ({third: 0} if third else {})
            for name, padding in names.items():
                values = getattr(rollout, f"{kind}_{name}")
                fields[f"{kind}_{name}"] = np.pad(values, room, constant_values=padding)
        wide.append(dataclasses.replace(rollout, **fields))
    check(batch, expected_fields(wide, [1.5, 1.5, 1.0, 1.0]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_delivers_them_and_cuts_them(cache, workers):
    limit = min(len(rollout.token_ids) for rollout in cache if rollout.response_len > 3) - 1
    options = {"context": limit, "too_long": "truncate", "seed": 1, **WANTED}
    stream = CacheStream(cache, batch_tokens=3 * limit, workers=workers, **options)
    batches = list(stream)
    assert len(batches) > 1
    assert stream.n_truncated
    for batch in batches:
        rollouts = []
        for row in batch.row_ids.tolist():
            n = min(len(cache[row].token_ids), limit) - cache[row].prompt_len
            cut = {
                name: getattr(cache[row], name)[:n]
                for name in (
                    *("sampled_ids", "sampled_logprob", "sampled_draws"),
                    *("chosen_ids", "chosen_logprob", "chosen_log_tail"),
                )
            }
            rollouts.append(dataclasses.replace(cache[row], **cut))
        check(batch, expected_fields(rollouts, [1.5] * len(rollouts)))


def test_worker_processes_deliver_them(cache):
    expected = list(CacheStream(cache, batch_tokens=40, **WANTED))
    stream = CacheStream(cache, batch_tokens=40, **WANTED)
    found = list(CacheLoader(stream, num_workers=1, multiprocessing_context="fork"))
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        for name in FIELDS:
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize(("wanted", "option"), [("draws", "--draws"), ("chosen", "--chosen")])
def test_a_cache_without_them_is_refused(cache, teacher, tmp_path, wanted, option):
    score_cache(teacher, random_rollouts(2), meta_of(teacher), tmp_path / "c", topk=2)
    bare = opd_store.open(tmp_path / "c")
    with pytest.raises(InvalidArgumentError, match=rf"has no \w+ ids; score with {option}"):
        CacheStream([cache, bare], ranks=2, **{wanted: True})
    assert collate(list(bare), vocab_size=VOCAB, **{wanted: True}).tensors().keys().isdisjoint(FIELDS)


def test_ids_beyond_the_students_vocabulary_are_refused(cache):
    rollout = max(cache, key=lambda r: r.sampled_ids[r.sampled_ids != opd_store.NO_ID].max())
    ids = rollout.sampled_ids[rollout.sampled_ids != opd_store.NO_ID]
    limit = int(ids.max())
    bare = {"topk_ids": None, "topk_logprob": None, "log_tail": None}
    tokens = np.minimum(rollout.token_ids, limit - 1)
    small = dataclasses.replace(rollout, token_ids=tokens, **bare)
    with pytest.raises(
        InvalidRolloutError, match=rf"drawn_ids: id {limit} outside the vocabulary of {limit}"
    ):
        collate([small], vocab_size=limit, draws=True)
    with pytest.raises(InvalidRolloutError, match=r"id \d+ outside the vocabulary of 3"):
        BatchAssembler([cache], vocab_size=3, **WANTED).assemble(0, [0])


def test_the_loss_of_a_batch_is_that_of_the_stored_arrays(cache):
    rows = [0, 3, 6]
    batch = BatchAssembler([cache], draws=True).assemble(0, rows)
    n = len(batch.response_index)
    logits = torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logprob = torch.log_softmax(logits, dim=-1)
    student = logprob.gather(-1, batch.drawn_ids.long())
    loss = random_sampling_kd(student, batch.drawn_logprob, batch.drawn_weight)
    (found,) = torch.autograd.grad(loss.sum(), logits)
    # The same, one position at a time, from what the cache holds.
    values, target = [], np.zeros((n, VOCAB))
    for rollout in (cache[row] for row in rows):
        for ids, teacher, draws in zip(
            rollout.sampled_ids, rollout.sampled_logprob, rollout.sampled_draws, strict=True
        ):
            ids, teacher, draws = (array[draws > 0] for array in (ids.astype(np.int64), teacher, draws))
            weight = draw_weights(
                torch.from_numpy(teacher.copy())[None],
                torch.from_numpy(draws.astype(np.int64))[None],
                temperature=1.5,
            )[0].numpy()
            target[len(values), ids] = weight
            own = logprob[len(values), ids].detach().numpy()
            values.append(float((weight * (teacher - own)).sum()))
    np.testing.assert_allclose(loss.detach(), values, rtol=1e-5, atol=1e-6)
    expected = torch.softmax(logits.detach(), dim=-1).numpy() - target
    np.testing.assert_allclose(found, expected, atol=1e-6)
