"""The order of a cache: every rollout once an epoch, and going on from any step."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pickle
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from store.caches import VOCAB, run_python, write
from torch.utils.data import DataLoader
from train.tiny_models import random_rollouts, scored_cache

import opd_store
from opd_store import FormatError, InvalidArgumentError, InvalidRolloutError, MismatchError
from opd_store.testing import example_meta, random_rollout
from opd_train import CacheLoader, CacheStream
from opd_train.data.order import epoch_order

# Python 3.12 and later warn of forks in a process that has threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
N = 23


@pytest.fixture(scope="module")
def path(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "cache"
    scored_cache(path, teacher, random_rollouts(N), topk=9)
    return path


@pytest.fixture(scope="module")
def cache(path):
    return opd_store.open(path)


def stream(cache, **options):
    return CacheStream(cache, **({"batch_tokens": 50, "seed": 3} | options))


def rows(batches):
    return [batch.row_ids.tolist() for batch in batches]


def flat(batches):
    return [row for batch in batches for row in batch.row_ids.tolist()]


def same(left, right):
    found, expected = left.tensors(), right.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rollout_once_an_epoch_over_all_ranks(cache, world_size):
    epochs = 3
    seen = [[] for _ in range(epochs)]
    for rank in range(world_size):
        share = stream(cache, rank=rank, world_size=world_size, epochs=epochs)
        while (batch := share.next_batch()) is not None:
            seen[share.state_dict()["epoch"]] += batch.row_ids.tolist()
    for epoch in seen:
        assert sorted(epoch) == list(range(N))
    assert len({tuple(epoch) for epoch in seen}) == epochs, "every epoch has its own order"


def test_batches_carry_the_rows_they_name(cache):
    for batch in stream(cache):
        assert batch.n_tokens <= 50
        at = batch.cu_seqlens.tolist()
        for number, row in enumerate(batch.row_ids.tolist()):
            ids = batch.input_ids[at[number] : at[number + 1]]
            assert ids.tolist() == cache[row].token_ids.tolist()


def test_batches_are_as_full_as_the_next_rollout_allows(cache):
    order = epoch_order(N, cache.digest, 3, 0).tolist()
    batches = list(stream(cache))
    assert flat(batches) == order
    following = [batch.row_ids[0].item() for batch in batches[1:]]
    for batch, row in zip(batches, following, strict=False):
        assert batch.n_tokens + len(cache[row].token_ids) > 50
    assert [len(row) for row in rows(stream(cache, batch_tokens=10_000, batch_rollouts=5))] == [5, 5, 5, 5, 3]


def test_the_order_depends_on_digest_seed_and_epoch_and_on_nothing_else(cache, tmp_path, teacher):
    digest = cache.digest
    base = epoch_order(N, digest, 3, 0).tolist()
    assert epoch_order(N, digest, 3, 0).tolist() == base
    other = "sha256:" + "0" * 64
    for different in ((other, 3, 0), (digest, 4, 0), (digest, 3, 1)):
        assert epoch_order(N, *different).tolist() != base
    # The same bytes at another place are the same cache.
    copy = scored_cache(tmp_path / "copy", teacher, random_rollouts(N), topk=9)
    assert copy.digest == digest
    assert flat(stream(copy, batch_tokens=33)) == base


def test_the_order_is_the_same_on_every_machine_and_in_every_release():
    assert epoch_order(8, "sha256:" + "ab" * 32, 5, 2).tolist() == [1, 3, 2, 5, 7, 0, 4, 6]


def test_the_order_is_uniform():
    n, draws = 5, 3000
    first = np.bincount([epoch_order(n, "sha256:x", seed, 0)[0] for seed in range(draws)], minlength=n)
    expected = draws / n
    assert ((first - expected) ** 2 / expected).sum() < 18.5  # 99.9 % point with 4 degrees of freedom


OPTIONS = [
    {"epochs": 2},
    {"epochs": 3, "batch_rollouts": 2},
    {"epochs": 2, "rank": 1, "world_size": 3, "batch_tokens": 40},
    {"epochs": 2, "ranks": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_rest_of_the_sequence_is_the_same_from_every_step(path, options):
    reader = stream(opd_store.open(path), **options)
    states, batches = [reader.state_dict()], []
    while (batch := reader.next_batch()) is not None:
        batches.append(batch)
        states.append(reader.state_dict())
    assert len(batches) >= 4
    for step, state in enumerate(states):
        resumed = stream(opd_store.open(path), **options)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.state_dict() == state
        rest = list(resumed)
        assert len(rest) == len(batches) - step
        for left, right in zip(rest, batches[step:], strict=True):
            same(left, right)
        assert resumed.next_batch() is None
        assert resumed.next_batch() is None


def test_asking_for_the_state_changes_nothing(cache):
    watched, plain = stream(cache), stream(cache)
    found = []
    while True:
        assert watched.state_dict() == watched.state_dict()
        if (batch := watched.next_batch()) is None:
            break
        found.append(batch)
    assert rows(found) == rows(plain)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("seed", {"seed": 4}),
        ("rank", {"rank": 1, "world_size": 2}),
        ("world_size", {"world_size": 4}),
        ("batch_tokens", {"batch_tokens": 51}),
        ("batch_rollouts", {"batch_rollouts": 2}),
        ("ranks", {"ranks": 3}),
    ],
)
def test_the_state_of_another_run_is_refused_with_both_values(cache, field, options):
    base = {"world_size": 2} if field in ("rank", "world_size") else {}
    state = stream(cache, **base).state_dict()
    other = stream(cache, **(base | options))
    before = other.state_dict()
    with pytest.raises(MismatchError) as caught:
        other.load_state_dict(state)
    assert caught.value.field == field
    assert (caught.value.found, caught.value.expected) == (str(state[field]), str(before[field]))
    assert repr(state[field]) in str(caught.value)
    assert repr(before[field]) in str(caught.value)
    assert other.state_dict() == before


def test_the_state_of_another_cache_or_version_is_refused(cache, path, tmp_path, teacher):
    other = scored_cache(tmp_path / "other", teacher, random_rollouts(N, seed=1), topk=9)
    state = stream(cache).state_dict()
    with pytest.raises(MismatchError, match="cache is") as caught:
        stream(other).load_state_dict(state)
    assert (caught.value.found, caught.value.expected) == (cache.digest, other.digest)
    with pytest.raises(MismatchError, match="version is 3"):
        stream(cache).load_state_dict(state | {"version": 3})
    with pytest.raises(MismatchError, match="version is None"):
        stream(cache).load_state_dict({})


def test_a_rollout_longer_than_a_batch_is_named(cache):
    longest = max(range(N), key=lambda row: len(cache[row].token_ids))
    size = len(cache[longest].token_ids)
    with pytest.raises(InvalidArgumentError, match=rf"row {longest} has {size} tokens.*raise batch_tokens"):
        list(stream(cache, batch_tokens=size - 1))
    assert sorted(flat(stream(cache, batch_tokens=size))) == list(range(N))


@pytest.mark.parametrize("ranks", [0, 1, 8, None])
def test_fewer_ranks_join_the_tail(cache, ranks):
    for batch in stream(cache, ranks=ranks):
        if ranks == 0:
            assert batch.topk_ids is batch.topk_logprob is batch.log_tail is None
            continue
        assert batch.topk_ids.shape[1] == (ranks or 9)
        total = batch.topk_logprob.double().exp().sum(-1) + batch.log_tail.double().exp()
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1}, r"rank: expected 0\.\.0"),
        ({"rank": -1}, "rank"),
        ({"world_size": 0}, "rank"),
        ({"world_size": N + 1}, f"{N} rollouts an epoch cannot feed {N + 1} ranks"),
        ({"world_size": N, "weights": [0.5]}, f"{N // 2} rollouts an epoch cannot feed {N} ranks"),
        ({"batch_tokens": 1}, "batch_tokens: expected 2 or more, found 1"),
        ({"batch_rollouts": 0}, "batch_rollouts"),
        ({"epochs": -1}, "epochs"),
        ({"context": 1}, "context"),
        ({"workers": -1}, "workers"),
        ({"window": 0}, "window"),
        ({"multiple_of": 0}, "multiple_of: expected 1"),
        ({"multiple_of": 64}, "multiple_of: expected at most batch_tokens 50"),
        ({"shuffle": "rows"}, "shuffle: expected one of block, global, none; found 'rows'"),
        ({"too_long": "cut"}, "too_long: expected one of error, truncate, skip"),
        ({"weights": [1.0, 1.0]}, "weights: expected one for each of 1 caches, found 2"),
        ({"weights": [0.0]}, "weights: expected more than 0 and at most 1000, found 0"),
        ({"weights": [float("nan")]}, "weights: .* found nan"),
        ({"weights": [float("inf")]}, "weights: .* found inf"),
        ({"rows": []}, "the filter leaves nothing"),
        ({"rows": [0, N]}, rf"rows: expected 0\.\.{N - 1} of .*, found {N}"),
        ({"rows": [-1]}, "rows: .* found -1"),
        ({"rows": [3, 2, 3]}, "3 of .* comes twice"),
        ({"rows": [0.5]}, "rows: expected a list of row numbers"),
        ({"rows": [True, False]}, "rows: expected a list of row numbers"),
        ({"rows": [[1], [2]]}, "rows: expected a list of row numbers"),
        ({"too_long": "skip", "context": 2}, "nothing is left"),
    ],
    ids=str,
)
def test_arguments_out_of_range(cache, options, message):
    rows = options.get("rows")
    with pytest.raises(InvalidArgumentError, match=message):
        stream(cache, **options | ({} if rows is None else {"rows": np.array(rows)}))


def test_more_ranks_than_stored(cache):
    with pytest.raises(InvalidArgumentError, match=r"ranks: expected 0\.\.9"):
        stream(cache, ranks=10).next_batch()


def test_an_empty_cache(tmp_path, teacher):
    with pytest.raises(InvalidArgumentError, match="0 rollouts"):
        stream(scored_cache(tmp_path / "empty", teacher, []))


def test_a_rollout_longer_than_the_context_of_the_student_is_named(cache):
    longest = max(len(rollout.token_ids) for rollout in cache)
    assert len(list(stream(cache, context=longest))) > 0
    with pytest.raises(InvalidRolloutError, match=f"row [0-9]+ has {longest} tokens.*{longest - 1}"):
        list(stream(cache, batch_tokens=1000, context=longest - 1))


def test_an_id_beyond_a_smaller_student_is_refused_before_it_reaches_a_device(cache):
    highest = max(int(rollout.token_ids.max()) for rollout in cache)
    with pytest.raises(InvalidRolloutError, match=f"outside the vocabulary of {highest}"):
        list(stream(cache, vocab_size=highest))


SIZES = (1, 2, 3, 4, 8)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """40 rollouts of 4 to 23 tokens, a few a record batch, some without a reference log-prob."""
    return made_cache(tmp_path_factory.mktemp("blocks") / "cache", 40)


def made_cache(path, n, *, seed=0, **options):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 21, n)
    rollouts = [random_rollout(rng, vocab_size=VOCAB, prompt_len=3, response_len=r, topk=3) for r in lengths]
    write(path, rollouts, batch_bytes=1200, **options)
    return opd_store.open(path)


def team(cache, size, **options):
    """One stream for each rank."""
    return [stream(cache, rank=rank, world_size=size, **options) for rank in range(size)]


def take(streams, steps, seen):
    """Let all ranks go on in lockstep; where they stand after."""
    for _ in range(steps):
        for reader in streams:
            if (batch := reader.next_batch()) is not None:
                seen.update(batch.row_ids.tolist())
    return [json.loads(json.dumps(reader.state_dict())) for reader in streams]


def test_the_cache_has_many_blocks(blocks):
    assert len(blocks.batch_rows) > 8
    assert stream(blocks, window=2).state_dict()["rollouts"] == blocks.digest


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_goes_on_from_every_step_as_if_nothing_had_been(blocks, size):
    options = {"epochs": 2, "window": 2, "world_size": size, "rank": size - 1, "batch_rollouts": 4}
    reader = stream(blocks, **options)
    states, batches = [reader.state_dict()], []
    for batch in reader:
        batches.append(batch)
        states.append(reader.state_dict())
    for step, state in enumerate(states):
        resumed = stream(blocks, **options)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        rest = list(resumed)
        assert len(rest) == len(batches) - step
        for left, right in zip(rest, batches[step:], strict=True):
            same(left, right)


@pytest.mark.parametrize("new", SIZES)
@pytest.mark.parametrize("old", SIZES)
def test_another_world_size_takes_what_is_left(blocks, old, new):
    options = {"window": 2, "workers": 0}
    n_steps = max(len(reader) for reader in team(blocks, old, **options))
    for steps in range(n_steps + 1):
        seen = Counter()
        states = take(team(blocks, old, **options), steps, seen)
        streams = team(blocks, new, **options)
        for reader in streams:
            reader.load_state_dict(states[::-1])
        take(streams, 50, seen)
        assert seen == dict.fromkeys(range(40), 1), steps


def test_world_sizes_change_again_and_again(blocks):
    options = {"window": 2, "epochs": 2, "batch_tokens": 24, "workers": 0}
    seen, states = Counter(), None
    for size in (2, 3, 1, 8, 4):
        streams = team(blocks, size, **options)
        for reader in streams:
            if states is not None:
                reader.load_state_dict(states)
        states = take(streams, 1, seen)
    assert [stage[1] for stage in states[0]["stages"]] == [2, 3, 1, 8]
    # The end of the epoch, and all of the next, whose order is that of ranks that never changed.
    for reader in streams:
        reader.load_state_dict(states)
    take(streams, 50, seen)
    assert seen == dict.fromkeys(range(40), 2)
    undisturbed = team(blocks, 4, **options)
    for left, right in zip(streams, undisturbed, strict=True):
        left.load_state_dict(states)
        second = [batch.row_ids.tolist() for batch in left if left.state_dict()["epoch"] == 1]
        assert second == [batch.row_ids.tolist() for batch in right if right.state_dict()["epoch"] == 1]
        assert left.state_dict()["stages"] == []


def test_ranks_that_are_not_in_step_lose_nothing_either(blocks):
    options = {"epochs": 3, "batch_tokens": 40, "workers": 0}
    streams = team(blocks, 3, **options)
    seen = Counter()
    # The second is an epoch ahead, the third two.
    states = [
        take([reader], steps, seen)[0]
        for reader, steps in zip(streams, (2, len(streams[1]) + 1, 2 * len(streams[2]) + 3), strict=True)
    ]
    assert [state["epoch"] for state in states] == [0, 1, 2]
    streams = team(blocks, 2, **options)
    for reader in streams:
        reader.load_state_dict(states)
    states = take(streams, 3, seen)
    assert {stage[0] for stage in states[0]["stages"]} == {0, 1, 2}
    alone = stream(blocks, **options)
    alone.load_state_dict(states)
    take([alone], 200, seen)
    assert seen == dict.fromkeys(range(40), 3)


def test_the_list_of_all_states_is_as_good_as_ones_own(blocks):
    states = take(team(blocks, 3), 2, Counter())
    for rank in range(3):
        reader = stream(blocks, rank=rank, world_size=3)
        reader.load_state_dict(states)
        assert reader.state_dict() == states[rank]


UNFIT = {
    "a rank is missing": (lambda s: s[:1], "rank"),
    "one comes twice": (lambda s: [s[0], s[0]], "rank"),
    "one too many": (lambda s: [*s, s[1]], "rank"),
    "none": (lambda s: [], "world_size"),
    "of two sizes": (lambda s: [s[0], s[1] | {"world_size": 3}], "world_size"),
    "another seed": (lambda s: [s[0], s[1] | {"seed": 8}], "seed"),
    "all of another run": (lambda s: [s[0] | {"batch_tokens": 51}, s[1]], "batch_tokens"),
    "another past": (lambda s: [s[0], s[1] | {"stages": [[0, 2, [1, 0]]]}], "stages"),
    "more than there were": (lambda s: [s[0], s[1] | {"batches": 99}], "stages"),
    "negative": (lambda s: [s[0], s[1] | {"batches": -1}], "batches"),
    "text": (lambda s: [s[0], s[1] | {"epoch": "0"}], "epoch"),
    "too few counts": (lambda s: [s[0], s[1] | {"stages": [[0, 2, [1]]]}], "stages"),
    "no list": (lambda s: [s[0], s[1] | {"stages": None}], "stages"),
    "of a worker": (lambda s: [s[0], s[1] | {"worker": [0, 2]}], "worker"),
    "one of two": (lambda s: s[0], "world_size"),
}


@pytest.mark.parametrize(("change", "field"), UNFIT.values(), ids=UNFIT)
def test_states_that_do_not_belong_together_are_refused(blocks, change, field):
    states = take(team(blocks, 2), 1, Counter())
    reader = stream(blocks, rank=1, world_size=3)
    before = reader.state_dict()
    with pytest.raises(MismatchError) as caught:
        reader.load_state_dict(change(states))
    assert caught.value.field == field
    assert caught.value.expected in str(caught.value)
    assert reader.state_dict() == before


def test_a_position_beyond_the_plan_or_of_a_worker_is_refused(blocks):
    reader = stream(blocks)
    for field, value in (("batches", 99), ("worker", [1, 2]), ("worker", [2, 2]), ("worker", "x")):
        with pytest.raises(MismatchError) as caught:
            reader.load_state_dict(reader.state_dict() | {field: value})
        assert caught.value.field == field


@pytest.mark.parametrize(
    "options",
    [{"context": 60}, {"shuffle": "global"}, {"window": 3}, {"too_long": "skip"}, {"multiple_of": 2},
     {"weights": [2]}, {"rows": np.arange(39)}],
    ids=str,
)  # fmt: skip
def test_every_setting_that_changes_batches_is_in_the_state(blocks, options):
    with pytest.raises(MismatchError):
        stream(blocks, **options).load_state_dict(stream(blocks).state_dict())


class Watched:
    """An assembler that counts what is alive and fails where told to."""

    def __init__(self, inner, fail_row=None):
        self.inner, self.fail_row = inner, fail_row
        self.prefetched, self.threads, self.alive, self.most = [], set(), 0, 0

    def prefetch(self, source, rows):
        self.prefetched.append(rows.tolist())

    def assemble(self, source, rows):
        if self.fail_row in rows:
            self.fail_row = None
            raise FormatError(f"row {rows[0]} is broken")
        self.threads.add(threading.current_thread().name)
        batch = self.inner.assemble(source, rows)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(batch, self.gone)
        return batch

    def gone(self):
        self.alive -= 1


def watched(cache, fail_row=None, **options):
    reader = stream(cache, **options)
    reader.assembler = Watched(reader.assembler, fail_row)
    return reader


def stream_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("opd-stream")]


def eventually(condition):
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_change_nothing_but_who_builds(blocks, workers):
    expected = list(stream(blocks, epochs=2, workers=0))
    reader = watched(blocks, epochs=2, workers=workers)
    for left, right in zip(reader, expected, strict=True):
        same(left, right)
    main = threading.current_thread().name
    assert reader.assembler.threads == {main} if workers == 0 else main not in reader.assembler.threads
    assert reader.assembler.prefetched == rows(expected)
    assert eventually(lambda: not stream_threads())


def test_few_batches_are_alive(blocks):
    reader = watched(blocks, workers=1)
    held = None
    for batch in reader:
        held = batch
        del batch
        # So that the thread is as far ahead as it will be.
        assert eventually(
            lambda: not reader._ahead._building or reader._ahead._building[0][1].__self__.done()
        )
    assert held is not None
    assert reader.assembler.most <= 3
    assert len(reader.assembler.prefetched) == len(reader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_not_lost_where_the_next_cannot_be_announced(blocks, workers):
    expected = rows(stream(blocks))
    reader = watched(blocks, workers=workers)
    inner, found, fails = reader.assembler.prefetch, [], iter([True])

    def prefetch(source, rows):
        if rows.tolist() == expected[12] and next(fails, False):
            raise OSError("no connection")
        inner(source, rows)

    reader.assembler.prefetch = prefetch
    with pytest.raises(OSError, match="no connection"):
        found.extend(batch.row_ids.tolist() for batch in iter(reader.next_batch, None))
    assert reader.state_dict()["batches"] == len(found) > 0
    assert found + rows(reader) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_at_its_place_and_the_batch_can_be_tried_again(blocks, workers):
    expected = rows(stream(blocks))
    reader = watched(blocks, fail_row=expected[3][1], workers=workers)
    found = [reader.next_batch().row_ids.tolist() for _ in range(3)]
    with pytest.raises(FormatError, match=f"row {expected[3][0]} is broken"):
        reader.next_batch()
    assert reader.state_dict()["batches"] == 3
    assert found + rows(reader) == expected


@pytest.mark.parametrize("end", ["close", "break", "drop", "load", "garbage"])
def test_threads_end(blocks, end):
    reader = stream(blocks, workers=2)
    state = reader.state_dict()
    if end == "break":
        for _ in reader:
            break
    elif end == "drop":
        iterator = iter(reader)
        next(iterator)
        del iterator
    else:
        reader.next_batch()
        assert stream_threads()
    if end == "close":
        reader.close()
    elif end == "load":
        reader.load_state_dict(state)
    elif end == "garbage":
        gc.disable()  # Reference counts alone have to do it.
        del reader
    try:
        assert eventually(lambda: not stream_threads())
    finally:
        gc.enable()


def test_an_interpreter_ends_with_batches_under_way(path):
    code = (
        "import sys, opd_store; from opd_train import CacheStream\n"
        "s = CacheStream(opd_store.open(sys.argv[1]), batch_tokens=50, workers=3)\n"
        "s.next_batch(); i = iter(CacheStream(opd_store.open(sys.argv[1]), batch_tokens=50)); next(i)"
    )
    assert run_python(code, path) == ""


def test_it_is_pickled_and_forked_where_it_stands(blocks):
    expected = rows(stream(blocks))
    reader = stream(blocks, workers=2)
    for _ in range(3):
        reader.next_batch()
    assert rows(pickle.loads(pickle.dumps(reader))) == expected[3:]
    child = os.fork()
    if child == 0:
        os._exit(0 if rows(reader) == expected[3:] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert rows(reader) == expected[3:]


# A machine may have fewer cores.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_data_loader_keeps_the_order(blocks, workers):
    reader = stream(blocks, epochs=2, workers=2)
    expected = list(stream(blocks, epochs=2))
    reader.load_state_dict(reader.state_dict() | {"batches": 2})
    loader = DataLoader(reader, batch_size=None, num_workers=workers, multiprocessing_context=fork(workers))
    for left, right in zip(loader, expected[2:], strict=True):
        same(left, right)


def fork(workers):
    return "fork" if workers else None


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
# torchdata calls it.
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stateful_data_loader_goes_on_from_every_step(blocks, workers):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def made():
        return torchdata.StatefulDataLoader(
            stream(blocks, batch_tokens=90),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=fork(workers),
        )

    expected = rows(stream(blocks, batch_tokens=90))
    loader = made()
    states, found = [], []
    for batch in loader:
        found.append(batch.row_ids.tolist())
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert found == expected
    for step, state in enumerate(states[:-1], start=1):
        loader = made()
        loader.load_state_dict(state)
        assert rows(loader) == expected[step:]


@pytest.fixture(scope="module")
def mixed(blocks, tmp_path_factory):
    other = made_cache(tmp_path_factory.mktemp("mixed") / "other", 21, seed=1)
    return [blocks, other]


def test_caches_are_mixed_by_weight(mixed):
    seen = Counter()
    reader = stream(mixed, weights=[1.5, 1 / 3], epochs=6)
    for batch in reader:
        starts = batch.cu_seqlens.tolist()
        for at, (source, row) in enumerate(
            zip(batch.source_ids.tolist(), batch.row_ids.tolist(), strict=True)
        ):
            seen[source, row] += 1
            ids = batch.input_ids[starts[at] : starts[at + 1]].tolist()
            assert ids == mixed[source][row].token_ids.tolist()
    assert seen == {(0, row): 9 for row in range(40)} | {(1, row): 2 for row in range(21)}


def test_mixed_caches_go_on_at_another_world_size(mixed):
    options = {"weights": [0.5, 2.0], "window": 2, "workers": 0, "epochs": 2}
    expected, seen = Counter(), Counter()
    for batch in stream(mixed, **options):
        expected.update(zip(batch.source_ids.tolist(), batch.row_ids.tolist(), strict=True))
    states = None
    for size, steps in ((2, 2), (3, 100)):
        streams = team(mixed, size, **options)
        for reader in streams:
            if states is not None:
                reader.load_state_dict(states)
            for _ in range(steps):
                if (batch := reader.next_batch()) is not None:
                    seen.update(zip(batch.source_ids.tolist(), batch.row_ids.tolist(), strict=True))
        states = [reader.state_dict() for reader in streams]
    assert seen == expected


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("tokenizer_fingerprint", {"meta": dataclasses.replace(
            example_meta(VOCAB), tokenizer_fingerprint="sha256:" + "0" * 64)}),
        ("vocab_size", {"meta": example_meta(VOCAB + 1)}),
        ("topk", {"topk": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_caches_that_cannot_be_mixed(blocks, tmp_path, field, options):
    write(tmp_path / "other", [], **options)
    with pytest.raises(MismatchError, match=field) as caught:
        stream([blocks, opd_store.open(tmp_path / "other")])
    assert caught.value.field == field
    assert caught.value.found in str(caught.value)
    assert caught.value.expected in str(caught.value)


def test_no_caches_or_rows_of_too_few(mixed):
    with pytest.raises(InvalidArgumentError, match="at least one"):
        stream([])
    with pytest.raises(InvalidArgumentError, match="rows: expected one array for each of 2 caches"):
        stream(mixed, rows=[np.arange(3)])


def test_only_rows_that_were_asked_for(mixed):
    wanted = np.array([30, 2, 17])
    assert sorted(flat(stream(mixed[0], rows=wanted))) == [2, 17, 30]
    found = stream(mixed, rows=[wanted, None])
    assert sorted(flat(found)) == sorted([2, 17, 30, *range(21)])
    digests = {stream(mixed[0], rows=rows).state_dict()["rollouts"] for rows in (wanted, wanted[::-1])}
    assert len(digests) == 1
    assert stream(mixed[0], rows=np.arange(40)).state_dict()["rollouts"] == mixed[0].digest


def test_long_rollouts_are_cut_or_left_out(blocks):
    lengths = blocks.row_tokens
    limit = int(np.median(lengths))
    longer = np.flatnonzero(lengths > limit)
    skipping = stream(blocks, context=limit, too_long="skip")
    assert sorted(flat(skipping)) == np.flatnonzero(lengths <= limit).tolist()
    assert (skipping.n_skipped, skipping.n_truncated) == (len(longer), 0)
    cutting = stream(blocks, context=limit, too_long="truncate")
    assert (cutting.n_skipped, cutting.n_truncated) == (0, len(longer))
    seen = []
    for batch in cutting:
        starts = batch.cu_seqlens.tolist()
        for at, row in enumerate(batch.row_ids.tolist()):
            ids = batch.input_ids[starts[at] : starts[at + 1]].tolist()
            assert ids == blocks[row].token_ids[:limit].tolist()
            seen.append(row)
    assert sorted(seen) == list(range(40))
    # Prompts have three tokens, so that nothing of a response fits.
    with pytest.raises(InvalidArgumentError, match="nothing is left"):
        stream(blocks, context=3, too_long="truncate")


@pytest.mark.parametrize("multiple", [8, 16])
def test_batches_are_padded_within_their_limit(blocks, multiple):
    seen = []
    for batch in stream(blocks, batch_tokens=50, multiple_of=multiple):
        assert len(batch.input_ids) % multiple == 0
        assert len(batch.input_ids) <= 50
        seen += batch.row_ids.tolist()
    assert sorted(seen) == list(range(40))


def test_no_position_is_beyond_the_context(blocks):
    context = int(blocks.row_tokens.max())
    for batch in stream(blocks, batch_tokens=300, multiple_of=100, context=context):
        assert batch.position_ids.max() < context


def test_fewer_batches_are_announced_where_they_are_large(blocks, monkeypatch):
    assert stream(blocks).prefetch_batches == 8
    batch_bytes = 50 * blocks.n_bytes / blocks.n_tokens
    for n_bytes, most in ((3.5 * batch_bytes, 3), (1, 1)):
        monkeypatch.setattr("opd_train.data.ahead.PREFETCH_BYTES", n_bytes)
        assert stream(blocks).prefetch_batches == most
        assert flat(stream(blocks)) == flat(stream(blocks, workers=0))


def test_joined_rows_are_in_the_state(blocks):
    state = stream(blocks, joined=[(blocks, np.arange(40))]).state_dict()
    stream(blocks, joined=[(blocks, list(range(40)))]).load_state_dict(state)
    with pytest.raises(MismatchError, match="joined"):
        stream(blocks, joined=[(blocks, np.full(40, -1))]).load_state_dict(state)


def test_top_k_is_put_together_later(tmp_path):
    packed = made_cache(tmp_path / "packed", 40, encoding="ladder/128")
    expected = list(stream(packed))
    later = stream(packed, device_decode=True)
    assert later.assembler.assemble(0, [3]).pending
    later.load_state_dict(stream(packed).state_dict())
    # Worker processes, whose batches go to no device, do not put it off.
    ways = (
        later,
        DataLoader(
            stream(packed, device_decode=True),
            batch_size=None,
            num_workers=2,
            multiprocessing_context="fork",
        ),
        CacheLoader(stream(packed, device_decode=True), num_workers=2, multiprocessing_context="fork"),
    )
    for way in ways:
        for left, right in zip(way, expected, strict=True):
            assert not left.pending
            same(left, right)


@pytest.fixture(scope="module")
def bucket(blocks):
    """The same cache, as an address of what is fetched."""
    files = fsspec.filesystem("memory")
    root = Path(blocks.uri)
    for path in root.rglob("*"):
        if path.is_file():
            files.pipe(f"/stream-bucket/{path.relative_to(root)}", path.read_bytes())
    yield "memory://stream-bucket"
    files.rm("/stream-bucket", recursive=True)


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_a_record_batch_is_fetched_once_an_epoch(bucket, blocks, workers):
    cache = opd_store.open(bucket)
    before = cache.stats.requests
    assert flat(stream(cache, window=4, workers=workers)) == flat(stream(blocks, window=4))
    assert cache.stats.requests - before == len(cache.batch_rows)
    assert not cache._storage._process().pending


def test_of_threads_that_want_a_record_batch_one_fetches_it(bucket):
    cache = opd_store.open(bucket)
    before = cache.stats.requests
    start = threading.Barrier(4)

    def read(_):
        start.wait()
        return cache[0].token_ids.tolist()

    with ThreadPoolExecutor(4) as threads:
        assert len({tuple(ids) for ids in threads.map(read, range(4))}) == 1
    assert cache.stats.requests - before == 1


def test_the_length_is_the_number_of_batches(blocks):
    reader = stream(blocks, epochs=2, world_size=2)
    n_first = len(reader)
    epochs = [reader.state_dict()["epoch"] for _ in reader]
    assert epochs.count(0) == n_first
    assert epochs.count(1) == len(reader)
