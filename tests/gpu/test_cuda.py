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
    BatchAssembler,
    CacheStream,
    DeviceFeed,
    DistillConfig,
    LossConfig,
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
    config = DistillConfig(loss=LossConfig(objective=Objective.FORWARD_KL), steps=20, lr=1e-3, autocast=True)
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


def _cache(path, *, n=24, size=40, **options):
    rng = np.random.default_rng(1)
    rollouts = [random_rollout(rng, response_len=size + i, topk=20, sample_id=str(i)) for i in range(n)]
    with opd_store.create(path, meta=example_meta(), topk=20, **options) as writer:
        writer.append_batch(rollouts)
    return opd_store.open(path)


def _assert_same(found, expected):
    found, expected = found.tensors(), expected.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.is_cuda, name
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor.cpu(), expected[name]), name


def test_batches_arrive_as_they_left(tmp_path):
    cache = _cache(tmp_path / "cache", encoding="plain")
    options = {"multiple_of": 16, "joined": [(cache, np.arange(len(cache)))]}
    pinned, plain = BatchAssembler([cache], device="cuda", **options), BatchAssembler([cache], **options)
    groups = np.random.default_rng(0).permutation(len(cache)).reshape(-1, 3).tolist() * 4
    feed = DeviceFeed("cuda")
    first = pinned.assemble(0, groups[0])
    assert first.buffer.is_pinned()
    _assert_same(feed.send(first), plain.assemble(0, groups[0]))
    for found, rows in zip(list(feed.feed(pinned.assemble(0, r) for r in groups)), groups, strict=True):
        _assert_same(found, plain.assemble(0, rows))
    stream = CacheStream(cache, batch_tokens=200, device="cuda")
    for found in stream:
        _assert_same(found, BatchAssembler([cache]).assemble(0, found.row_ids.tolist()))


def test_a_pinned_buffer_is_not_written_before_its_copy_is_done(tmp_path):
    cache = _cache(tmp_path / "cache", n=6, size=2000, encoding="plain")
    assembler, feed = BatchAssembler([cache], device="cuda"), DeviceFeed("cuda")
    groups = [[i % 6, (i + 2) % 6] for i in range(20)]
    found = []
    for rows in groups:
        with torch.cuda.stream(feed._stream):
            torch.cuda._sleep(20_000_000)  # about 10 ms: every copy starts after the next batch was built
        found.append(feed.send(assembler.assemble(0, rows)))
    assert assembler.pool.n_made > 3
    for batch, rows in zip(found, groups, strict=True):
        _assert_same(batch, BatchAssembler([cache]).assemble(0, rows))
    torch.cuda.synchronize()
    made = assembler.pool.n_made
    for rows in groups:
        feed.send(assembler.assemble(0, rows))
        torch.cuda.synchronize()
    assert assembler.pool.n_made == made, "and is used again after that"


def test_memory_of_a_batch_is_not_reused_while_a_consumer_reads_it(tmp_path):
    cache = _cache(tmp_path / "cache", n=6, size=2000, encoding="plain")
    assembler, feed = BatchAssembler([cache], device="cuda"), DeviceFeed("cuda")
    groups = [[i % 6, (i + 3) % 6] for i in range(20)]
    sums = []
    for batch in feed.feed(assembler.assemble(0, rows) for rows in groups):
        torch.cuda._sleep(20_000_000)
        sums.append(batch.topk_logprob.double().sum() + batch.input_ids.double().sum())
        del batch
    for found, rows in zip(sums, groups, strict=True):
        batch = BatchAssembler([cache]).assemble(0, rows)
        expected = batch.topk_logprob.double().sum() + batch.input_ids.double().sum()
        torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("cut", [None, opd_store.Cut("mass", 0.7)])
@pytest.mark.parametrize("encoding", ["f32", "ladder/64"])
def test_top_k_is_put_together_on_the_device(tmp_path, encoding, cut):
    cache = _cache(tmp_path / "cache", encoding=encoding, cut=cut, id_table="auto")
    later = BatchAssembler([cache], device="cuda", device_decode=True, max_tokens=50)
    on_cpu = BatchAssembler([cache], max_tokens=50)
    groups = [[0, 5, 23], [7], list(range(24))]
    sent = DeviceFeed("cuda").feed(later.assemble(0, rows) for rows in groups)
    for found, rows in zip(list(sent), groups, strict=True):
        _assert_same(found, on_cpu.assemble(0, rows))
