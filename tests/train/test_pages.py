"""Pages decoded by torch give the bits that the store gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import opd_store
from opd_store import NO_ID, Cut, InvalidArgumentError
from opd_store.testing import example_meta, random_rollout
from opd_train import PageDecoder

VOCAB = 1000
PACKED = [name for name in opd_store.ENCODINGS if name != "plain"]


def make_cache(path, encoding, *, cut=None, with_table=False, topk=20):
    rng = np.random.default_rng(3)
    rollouts = [
        random_rollout(
            rng, vocab_size=VOCAB, response_len=1 + 7 * n, topk=topk, decimals=n % 3 or None, sample_id=str(n)
        )
        for n in range(6)
    ]
    table = None
    if with_table:
        table = opd_store.build_id_table([r.topk_ids for r in rollouts[:4]], vocab_size=VOCAB, n_lists=5)
    with opd_store.create(
        path, meta=example_meta(VOCAB), topk=topk, encoding=encoding, cut=cut, id_table=table
    ) as writer:
        writer.append_batch(rollouts)
    return opd_store.open(path)


def assert_same_bits(found, rollout, ranks):
    assert found.ids.dtype == torch.int64
    assert np.array_equal(found.ids.cpu().numpy(), rollout.topk_ids.astype(np.int64))
    for tensor, array in ((found.logprob, rollout.topk_logprob), (found.log_tail, rollout.log_tail)):
        assert tensor.dtype == torch.float32
        assert tensor.cpu().numpy().tobytes() == array.tobytes()
    assert found.ids.shape == (rollout.response_len, ranks)


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize("cut", [None, Cut("probability", 0.05), Cut("mass", 0.7)])
@pytest.mark.parametrize("encoding", PACKED)
def test_torch_decodes_the_same_bits(tmp_path, encoding, cut, with_table):
    cache = make_cache(tmp_path / "cache", encoding, cut=cut, with_table=with_table)
    decoder = PageDecoder(cache)
    n_padding = n_zero = 0
    for row in range(len(cache)):
        for ranks in cache.schema.bands:
            rollout = cache.rollout(row, ranks=ranks)
            assert_same_bits(decoder.topk(row, ranks), rollout, ranks)
            n_padding += int((rollout.topk_ids == NO_ID).sum())
            n_zero += int(np.isneginf(rollout.log_tail).sum())
    assert (n_padding > 0) == (cut is not None)


def test_long_steps_and_a_tail_of_zero(tmp_path):
    rng = np.random.default_rng(0)
    rollout = random_rollout(rng, vocab_size=VOCAB, response_len=4, topk=3)
    logprob = np.array([[0.0, -40.0, -90.5], [-0.5, -2.0, -300.0], [-1e-3, -8, -8], [-1, -2, -3]], np.float32)
    ids = np.tile(np.arange(3, dtype=np.uint32), (4, 1))
    tail = np.array([-np.inf, -9.0, -np.inf, -200.25], np.float32)
    fields = {"topk_ids": ids, "topk_logprob": logprob, "log_tail": tail}
    rollout = opd_store.Rollout(token_ids=rollout.token_ids, prompt_len=rollout.prompt_len, **fields)
    for encoding in PACKED:
        path = tmp_path / encoding.replace("/", "-")
        with opd_store.create(path, meta=example_meta(VOCAB), topk=3, encoding=encoding) as writer:
            writer.append(rollout)
        cache = opd_store.open(path)
        assert_same_bits(PageDecoder(cache).topk(0), cache[0], 3)


def test_what_cannot_be_decoded_is_named(tmp_path):
    cache = make_cache(tmp_path / "packed", "ladder/64")
    with pytest.raises(InvalidArgumentError, match=r"ranks: expected the end of a band \(8, 20\), found 9"):
        PageDecoder(cache).topk(0, 9)
    plain = make_cache(tmp_path / "plain", "plain")
    with pytest.raises(InvalidArgumentError, match="plain has nothing to decode"):
        PageDecoder(plain)
    with pytest.raises(InvalidArgumentError, match="plain pages have no streams"):
        plain.page_streams(0)


def test_streams_are_a_fraction_of_what_they_become(tmp_path):
    cache = make_cache(tmp_path / "cache", "ladder/128", with_table=True)
    page = cache.page_streams(5)[1]
    steps = sum(part.small.nbytes + part.more.nbytes for part in page.logprobs.steps)
    streams = steps + page.ids.values.nbytes + page.ids.lists.nbytes + page.ids.escaped.nbytes
    assert streams < 0.5 * 8 * page.shape.n_positions * page.shape.n_ranks
