"""Batches assembled in reused buffers, from one cache or several, and sent to a device."""

from __future__ import annotations

import gc
import os
import pickle
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

import opd_store
from opd_store import CacheMeta, Cut, InvalidArgumentError, InvalidRolloutError, MismatchError
from opd_store.testing import FINGERPRINT, example_meta, random_rollout
from opd_train import BatchAssembler, DeviceFeed, collate
from opd_train.data.packing import BufferPool
from opd_train.data.transfer import _wait_for_all

VOCAB = 500
N = 12
TOPK = 20


def make_rollouts(n=N, *, seed=0, topk=TOPK, vocab_size=VOCAB):
    rng = np.random.default_rng(seed)
    rollouts = [
        random_rollout(
            rng,
            vocab_size=vocab_size,
            prompt_len=1 + i % 4,
            response_len=1 + (7 * i) % 11,
            topk=topk,
            sample_id=str(i),
        )
        for i in range(n)
    ]
    # Some say which tokens count and some do not.
    return [replace(r, loss_mask=r.loss_mask if i % 2 else None) for i, r in enumerate(rollouts)]


def write(path, rollouts, **options):
    options = {"meta": example_meta(VOCAB), "topk": TOPK, "encoding": "plain"} | options
    with opd_store.create(path, **options) as writer:
        writer.append_batch(rollouts)
    return opd_store.open(path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write(tmp_path_factory.mktemp("transfer") / "cache", make_rollouts())


def same(left, right):
    found, expected = left.tensors(), right.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert left.n_padding == right.n_padding
    return True


def expected(cache, rows, *, ranks=None, multiple_of=1):
    rollouts = [cache.rollout(row, ranks=ranks) for row in rows]
    return collate(rollouts, vocab_size=VOCAB, row_ids=rows, multiple_of=multiple_of)


# The pool


def test_a_simple_loop_takes_two_buffers(cache):
    assembler = BatchAssembler([cache])
    for _ in range(20):
        batch = assembler.assemble(0, [0, 1, 2])
        assert same(batch, expected(cache, [0, 1, 2]))
    assert assembler.pool.n_made == 2


def test_batches_that_are_kept_stay_what_they_were(cache):
    assembler = BatchAssembler([cache])
    order = np.random.default_rng(0).permutation(N).reshape(-1, 3).tolist() * 3
    # Every third only as one of its tensors.
    kept = [assembler.assemble(0, rows) for rows in order]
    parts = {i: batch.teacher_logprob[1:] for i, batch in enumerate(kept)}
    for i in range(0, len(kept), 3):
        kept[i] = None
    gc.collect()
    later = [assembler.assemble(0, rows) for rows in reversed(order)]
    for i, rows in enumerate(order):
        assert torch.equal(parts[i], expected(cache, rows).teacher_logprob[1:])
        assert kept[i] is None or same(kept[i], expected(cache, rows))
        assert same(later[-1 - i], expected(cache, rows))


def test_buffers_grow_and_few_are_kept():
    pool = BufferPool(keep=2)
    sizes = [100, 5000, 100, 5200, 6300]
    for size in sizes:
        array = pool.take(size)
        assert len(array) >= size
        assert array.ctypes.data % 64 == 0
        array[:] = 1
        del array
    assert pool.n_made == 3, "a buffer that is too small makes one a quarter larger"
    held = [pool.take(5000) for _ in range(5)]
    assert len({array.ctypes.data for array in held}) == 5
    made = pool.n_made
    del held
    again = [pool.take(5000) for _ in range(3)]
    assert pool.n_made == made + 1
    assert len(again) == 3


def test_another_thread_may_take_away_what_was_counted():
    class Raced(BufferPool):
        _counted = property(lambda self: np.arange(3), lambda self, value: None)

    assert Raced().counted(10).tolist() == list(range(10))


def test_threads_share_an_assembler(cache):
    assembler = BatchAssembler([cache], multiple_of=8)
    rows = [[i % N, (i * 5 + 1) % N] for i in range(60)]
    with ThreadPoolExecutor(4) as threads:
        for found, wanted in zip(threads.map(lambda r: assembler.assemble(0, r), rows), rows, strict=True):
            assert same(found, expected(cache, wanted, multiple_of=8))


def test_another_process_gets_buffers_of_its_own(cache):
    assembler = BatchAssembler([cache])
    batch = assembler.assemble(0, [3, 4])
    again = pickle.loads(pickle.dumps(assembler))
    assert same(again.assemble(0, [3, 4]), batch)
    assert again.pool.n_made == 1
    # As after a fork: the free buffers are the parent's.
    del batch
    assembler.pool._pid = 0
    assert same(assembler.assemble(0, [3, 4]), expected(cache, [3, 4]))
    assert assembler.pool.n_made == 2


def test_copies_of_the_parent_are_not_waited_for():
    class Event:
        def synchronize(self):
            raise RuntimeError("CUDA in a forked process")

    in_flight = deque([(Event(), None)])
    _wait_for_all(in_flight, os.getpid() + 1)
    assert in_flight
    with pytest.raises(RuntimeError, match="CUDA"):
        _wait_for_all(in_flight, os.getpid())


# Assembling


@pytest.mark.parametrize("multiple_of", [1, 16])
@pytest.mark.parametrize("ranks", [0, 1, 8, 13, None])
@pytest.mark.parametrize(
    "options",
    [{}, {"encoding": "ladder/128"}, {"encoding": "f32", "cut": Cut("mass", 0.7)}, {"cut": Cut("mass", 0.7)}],
    ids=str,
)
def test_a_batch_is_what_its_rollouts_are(tmp_path, options, ranks, multiple_of):
    cache = write(tmp_path / "cache", make_rollouts(), **options)
    assembler = BatchAssembler([cache], ranks=ranks, multiple_of=multiple_of)
    for rows in ([5], [11, 0, 4, 4], list(range(N))):
        assembler.prefetch(0, rows)
        batch = assembler.assemble(np.zeros(len(rows), np.int64), np.array(rows))
        assert same(batch, expected(cache, rows, ranks=ranks, multiple_of=multiple_of))
        assert (batch.topk_ids is None) == (ranks == 0)


def test_one_copy_moves_everything(cache):
    batch = BatchAssembler([cache], multiple_of=32).assemble(0, [1, 2, 3])
    assert same(batch.rebased(batch.buffer.clone()), batch)
    # Nothing is in there but the batch, and the ends of fields.
    needed = sum(tensor.nbytes for tensor in batch.tensors().values())
    assert needed <= len(batch.buffer) <= needed + 64 * len(batch.tensors())


def test_a_field_that_one_rollout_lacks_is_absent(tmp_path):
    rollouts = make_rollouts(topk=0)
    rollouts[3] = replace(rollouts[3], reference_logprob=None)
    cache = write(tmp_path / "cache", rollouts, topk=0)
    assembler = BatchAssembler([cache])
    assert assembler.assemble(0, [2, 4]).reference_logprob is not None
    batch = assembler.assemble(0, [2, 3, 4])
    assert batch.reference_logprob is batch.topk_ids is batch.log_tail is None
    assert same(batch, expected(cache, [2, 3, 4]))


def test_rollouts_of_several_caches_keep_their_order(cache, tmp_path):
    other = write(tmp_path / "other", make_rollouts(5, seed=1), encoding="ladder/64")
    bare = write(tmp_path / "bare", make_rollouts(4, seed=2, topk=0), topk=0)
    caches = [cache, other, bare]
    assembler = BatchAssembler(caches, ranks=9, multiple_of=8)
    for pairs in (
        [(0, 3), (0, 4), (1, 2), (1, 0), (0, 3)],
        [(1, 1)],
        [(0, 2), (2, 1), (1, 4), (2, 0), (2, 3)],
    ):
        source, rows = np.array(pairs).T
        batch = assembler.assemble(source, rows)
        rollouts = [caches[s].rollout(r, ranks=min(9, caches[s].topk)) for s, r in pairs]
        wanted = collate(rollouts, vocab_size=VOCAB, row_ids=rows, multiple_of=8)
        assert batch.source_ids.tolist() == source.tolist()
        assert same(replace(batch, source_ids=wanted.source_ids), wanted)
        assert (batch.topk_ids is None) == (2 in source)


def test_rollouts_are_cut(cache):
    longest = max(range(N), key=lambda row: len(cache[row].token_ids))
    rows, limit = [longest, 1, 2], len(cache[longest].token_ids) - 3
    batch = BatchAssembler([cache], max_tokens=limit).assemble(0, rows)
    whole = expected(cache, rows)
    assert batch.lengths.tolist() == [min(limit, n) for n in whole.lengths.tolist()]
    first = batch.cu_responses[1].item()
    assert whole.cu_responses[1] == first + 3
    for name in ("loss_mask", "target_ids", "teacher_logprob", "topk_ids", "topk_logprob", "log_tail"):
        found, uncut = getattr(batch, name), getattr(whole, name)
        assert torch.equal(found, torch.cat([uncut[:first], uncut[first + 3 :]])), name


def test_ids_are_proven_below_the_vocabulary_of_the_student(tmp_path, cache):
    rollouts = make_rollouts(4, topk=3)
    tokens, topk = rollouts[2].token_ids.copy(), rollouts[1].topk_ids.copy()
    tokens[-1] = topk[-1, 2] = 499
    rollouts = [
        replace(
            r,
            token_ids=np.minimum(r.token_ids, 400),
            topk_ids=np.sort(r.topk_ids % 130, 1) + np.arange(3, dtype=np.uint32) * 130,
        )
        for r in rollouts
    ]
    for name, row, ids in (("token_ids", 2, tokens), ("topk_ids", 1, topk)):
        bad = [replace(r, **{name: ids}) if i == row else r for i, r in enumerate(rollouts)]
        path = tmp_path / name
        write(path, bad, topk=3)
        for check_values in (True, False):
            cache = opd_store.open(path, check_values=check_values)
            BatchAssembler([cache], vocab_size=500).assemble(0, [3, row])
            with pytest.raises(
                InvalidRolloutError, match=f"{name}: row {row}, {name}: id 499 outside.* 499$"
            ):
                BatchAssembler([cache], vocab_size=499).assemble(0, [3, row, 0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda c, o: BatchAssembler([]), InvalidArgumentError, "caches: expected one or more"),
        (
            lambda c, o: BatchAssembler([c], ranks=TOPK + 1),
            InvalidArgumentError,
            rf"ranks: expected 0\.\.{TOPK}",
        ),
        (lambda c, o: BatchAssembler([c, o]), InvalidArgumentError, "different top-k .*say how many"),
        (lambda c, o: BatchAssembler([c], multiple_of=0), InvalidArgumentError, "multiple_of and max_tokens"),
        (lambda c, o: BatchAssembler([c], max_tokens=1), InvalidArgumentError, "found 1 and 1"),
        (lambda c, o: BatchAssembler([c, o], ranks=3, joined=[(o, [])]), InvalidArgumentError, "found 2"),
        (
            lambda c, o: BatchAssembler([c], joined=[(o, np.zeros(3, int))]),
            InvalidArgumentError,
            r"shape \[3\]",
        ),
        (
            lambda c, o: BatchAssembler([c], joined=[(o, np.full(N, 99))]),
            InvalidArgumentError,
            r"in 0\.\.2, or -1",
        ),
        (
            lambda c, o: BatchAssembler([c]).assemble(0, []),
            InvalidArgumentError,
            "rows: expected one or more",
        ),
        (lambda c, o: BatchAssembler([c]).assemble(0, [0, N]), IndexError, f"row {N} of {N}"),
        (lambda c, o: BatchAssembler([c]).assemble(0, [-1]), IndexError, f"row -1 of {N}"),
        (
            lambda c, o: BatchAssembler([c], max_tokens=4).assemble(0, [2, 3]),
            InvalidArgumentError,
            "row 3 has a prompt of 4 tokens; max_tokens=4 leaves no response",
        ),
    ],
)
def test_what_makes_no_batch(cache, tmp_path, make, error, message):
    other = write(tmp_path / "other", make_rollouts(3, topk=8), topk=8)
    with pytest.raises(error, match=message):
        make(cache, other)


def test_caches_of_different_tokenizers_are_not_mixed(cache, tmp_path):
    meta = CacheMeta(vocab_size=VOCAB, tokenizer_fingerprint="sha256:" + "ab" * 32)
    other = write(tmp_path / "other", make_rollouts(1), meta=meta)
    for caches, joined in (([cache, other], ()), ([cache], [(other, np.zeros(N, int))])):
        with pytest.raises(MismatchError, match="tokenizer_fingerprint") as caught:
            BatchAssembler(caches, joined=joined)
        assert caught.value.field == "tokenizer_fingerprint"


# Joined teachers


def rescored(rollouts, *, topk, seed=5):
    """The same tokens as another teacher sees them."""
    others = make_rollouts(len(rollouts), seed=seed, topk=topk)
    names = ("teacher_logprob", "topk_ids", "topk_logprob", "log_tail")
    return [replace(r, **{n: getattr(o, n) for n in names}) for r, o in zip(rollouts, others, strict=True)]


@pytest.mark.parametrize("encoding", ["plain", "ladder/32"])
def test_another_teacher_speaks_of_the_same_tokens(cache, tmp_path, monkeypatch, encoding):
    rollouts = rescored(make_rollouts(), topk=6)
    meta = CacheMeta(vocab_size=VOCAB + 12, tokenizer_fingerprint=FINGERPRINT)
    other = write(tmp_path / "other", rollouts[::-1][:9], topk=6, meta=meta, encoding=encoding)
    bare = write(tmp_path / "bare", [replace(r, teacher_logprob=None) for r in make_rollouts(topk=0)], topk=0)
    joined = []
    for theirs in (other, bare):
        mapping = np.full(N, -1)
        ours, found = opd_store.join(cache, theirs)
        mapping[ours] = found
        joined.append((theirs, mapping))
    assembler = BatchAssembler([cache], ranks=9, joined=joined, multiple_of=4)
    rows = [7, 11, 3, 4]
    assembler.prefetch(0, [*rows, 0])
    batch = assembler.assemble(0, rows)
    assert same(replace(batch, joined=()), expected(cache, rows, ranks=9, multiple_of=4))
    wanted = collate([other[N - 1 - row] for row in rows], vocab_size=VOCAB)
    for name in ("teacher_logprob", "topk_ids", "topk_logprob", "log_tail"):
        assert torch.equal(getattr(batch.joined[0], name), getattr(wanted, name)), name
        assert getattr(batch.joined[1], name) is None
    # Row 2 is one that the other teacher has not seen, so that nothing of theirs is asked for.
    asked = []
    monkeypatch.setattr(opd_store.Cache, "prefetch", lambda cache, *args, **options: asked.append(cache))
    assembler.prefetch(0, [7, 2])
    assert asked == [cache]
    assert not any(name.startswith("joined") for name in assembler.assemble(0, [7, 2]).tensors())


def test_rollouts_that_only_look_joined_are_refused(cache, tmp_path):
    rollouts = make_rollouts()
    rollouts[2] = replace(make_rollouts(seed=9)[2], sample_id="2")
    moved = rollouts[3]
    rollouts[3] = replace(
        moved,
        prompt_len=moved.prompt_len - 1,
        **{
            name: np.concatenate([getattr(moved, name)[:1], getattr(moved, name)])
            for name in (
                "loss_mask",
                "teacher_logprob",
                "behaviour_logprob",
                "reference_logprob",
                "topk_ids",
                "topk_logprob",
                "log_tail",
            )
            if getattr(moved, name) is not None
        },
    )
    other = write(tmp_path / "other", rollouts)
    assembler = BatchAssembler([cache], joined=[(other, np.arange(N))])
    assert assembler.assemble(0, [0, 1]).joined[0].topk_ids is not None
    for rows, message, field in (
        ([1, 2], r"row 2 of \S+ and row 2 of \S+ hold different tokens", "token_ids"),
        ([3, 1], r"row 3 of \S+ has 11 response tokens, row 3 of \S+ has 12", "prompt_len"),
    ):
        with pytest.raises(MismatchError, match=message) as caught:
            assembler.assemble(0, rows)
        assert caught.value.field == field
    shifted = BatchAssembler([cache], joined=[(other, np.arange(N) - 1)])
    with pytest.raises(MismatchError, match=r"row 5 of \S+ has .* tokens, row 4 of"):
        shifted.assemble(0, [5])


# Sending


def test_on_the_cpu_a_batch_is_handed_back(cache):
    assembler = BatchAssembler([cache])
    feed = DeviceFeed("cpu")
    batch = assembler.assemble(0, [0, 5])
    assert feed.send(batch) is batch
    groups = [[0, 1], [2], [3, 4, 5]]
    found = list(feed.feed(assembler.assemble(0, rows) for rows in groups))
    assert [b.row_ids.tolist() for b in found] == groups


def test_a_feed_is_one_batch_ahead(cache):
    assembler = BatchAssembler([cache])
    asked = []
    made = (asked.append(row) or assembler.assemble(0, [row]) for row in range(4))
    seen = [(batch.row_ids.item(), len(asked)) for batch in DeviceFeed("cpu").feed(made)]
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(DeviceFeed("cpu").feed([])) == []


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize("cut", [None, Cut("probability", 0.05)])
@pytest.mark.parametrize("encoding", [name for name in opd_store.ENCODINGS if name != "plain"])
def test_pages_put_together_later_give_the_same_bits(tmp_path, encoding, cut, with_table):
    rollouts = make_rollouts()
    table = opd_store.build_id_table([r.topk_ids for r in rollouts[:4]], vocab_size=VOCAB, n_lists=3)
    options = {"encoding": encoding, "cut": cut, "id_table": table if with_table else None}
    cache = write(tmp_path / "cache", rollouts, **options)
    feed = DeviceFeed("cpu")
    for ranks in (8, None):
        for limit in (None, 9):
            lengths = {"ranks": ranks, "max_tokens": limit, "multiple_of": 8}
            on_cpu, later = (BatchAssembler([cache], device_decode=on, **lengths) for on in (False, True))
            for rows in ([4], [3, 9, 0, 3], list(range(N))):
                batch = later.assemble(0, rows)
                assert batch.topk_ids is batch.topk_logprob is batch.log_tail is None
                sent = feed.send(batch)
                assert not sent.pending
                assert same(sent, on_cpu.assemble(0, rows))
                copy = batch.rebased(batch.buffer.clone())
                batch.buffer.zero_()
                with pytest.raises(InvalidArgumentError, match="send it with a DeviceFeed"):
                    copy.to("cpu")


def test_pages_of_several_caches(tmp_path):
    rollouts = make_rollouts()
    table = opd_store.build_id_table([r.topk_ids for r in rollouts], vocab_size=VOCAB, n_lists=3)
    one = write(tmp_path / "one", rollouts, encoding="ladder/64", id_table=table)
    two = write(tmp_path / "two", rollouts[:5], encoding="f32", topk=TOPK)
    on_cpu, later = (BatchAssembler([one, two], device_decode=on) for on in (False, True))
    source, rows = np.array([0, 0, 1, 0, 1, 1]), np.array([1, 5, 3, 2, 0, 4])
    batch = later.assemble(source, rows)
    assert batch.pending
    assert same(DeviceFeed("cpu").send(batch), on_cpu.assemble(source, rows))


@pytest.mark.parametrize(
    "options",
    [{"ranks": 9}, {"ranks": 0}, {"vocab_size": VOCAB - 1}, {"plain": True}],
    ids=str,
)
def test_what_a_device_cannot_put_together_is_decoded_at_once(tmp_path, cache, options):
    wanted = dict(options)
    limit = make_rollouts(vocab_size=VOCAB - 1)
    packed = cache if wanted.pop("plain", False) else write(tmp_path / "packed", limit, encoding="ladder/128")
    batch = BatchAssembler([packed], device_decode=True, **wanted).assemble(0, [3, 4])
    assert not batch.pending
    assert same(batch, BatchAssembler([packed], **wanted).assemble(0, [3, 4]))
