"""The same results on a GPU as on the CPU. Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from train.tiny_models import VOCAB, save_tiny

import opd_store
from opd_store import CacheMeta
from opd_store.testing import example_meta, random_rollout
from opd_train import (
    CacheStream,
    DistillConfig,
    Objective,
    PageDecoder,
    Trainer,
    load_causal_lm,
    score_cache,
    score_rollouts,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("gpu") / "llama", "llama")


def _rollouts(n):
    rng = np.random.default_rng(0)
    return [random_rollout(rng, vocab_size=VOCAB, response_len=5 + i, sample_id=str(i)) for i in range(n)]


def test_scores_agree_with_the_cpu(model_dir):
    found = score_rollouts(load_causal_lm(model_dir, device="cuda"), _rollouts(6), topk=4)
    expected = score_rollouts(load_causal_lm(model_dir), _rollouts(6), topk=4)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.logprob, theirs.logprob, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(ours.topk_logprob, theirs.topk_logprob, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(ours.log_tail, theirs.log_tail, rtol=1e-3, atol=1e-4)


def test_training_in_bfloat16_lowers_the_loss(model_dir, tmp_path):
    teacher, student = load_causal_lm(model_dir, device="cuda"), load_causal_lm(model_dir, device="cuda")
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    meta = CacheMeta(vocab_size=VOCAB, tokenizer_fingerprint=teacher.tokenizer_fingerprint)
    score_cache(teacher, _rollouts(32), meta, tmp_path / "cache", topk=4, encoding="plain")
    stream = CacheStream(opd_store.open(tmp_path / "cache"), batch_rollouts=8, epochs=None, device="cuda")
    losses = []
    config = DistillConfig(objective=Objective.FORWARD_KL, steps=20, lr=1e-3, autocast=True)
    Trainer(student, stream, config, on_step=lambda _, metrics: losses.append(metrics["loss"])).run()
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.parametrize("encoding", ["f32", "ladder16", "ladder/128", "ladder/64", "ladder/32"])
@pytest.mark.parametrize("cut", [None, opd_store.Cut("mass", 0.7)])
def test_pages_decode_to_the_same_bits(tmp_path, encoding, cut):
    rollouts = [
        random_rollout(np.random.default_rng(n), response_len=40 * n + 1, topk=20, sample_id=str(n))
        for n in range(5)
    ]
    table = opd_store.build_id_table([r.topk_ids for r in rollouts[:3]], vocab_size=1000, n_lists=4)
    with opd_store.create(
        tmp_path / "cache", meta=example_meta(), topk=20, encoding=encoding, cut=cut, id_table=table
    ) as writer:
        writer.append_batch(rollouts)
    cache = opd_store.open(tmp_path / "cache")
    decoder = PageDecoder(cache, "cuda")
    for row, rollout in enumerate(cache):
        found = decoder.topk(row)
        assert np.array_equal(found.ids.cpu().numpy(), rollout.topk_ids.astype(np.int64))
        assert found.logprob.cpu().numpy().tobytes() == rollout.topk_logprob.tobytes()
        assert found.log_tail.cpu().numpy().tobytes() == rollout.log_tail.tobytes()
