"""The order of a cache: every rollout once an epoch, and going on from any step."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from train.tiny_models import random_rollouts, scored_cache

import opd_store
from opd_store import InvalidArgumentError, InvalidRolloutError, MismatchError
from opd_train import CacheStream
from opd_train.stream import epoch_order

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
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert (a is None) == (b is None), field.name
        assert a is None or torch.equal(a, b), field.name


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
    with pytest.raises(MismatchError, match="version is 2"):
        stream(cache).load_state_dict(state | {"version": 2})
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
    "options",
    [
        {"rank": 1},
        {"rank": -1},
        {"world_size": 0},
        {"world_size": N + 1},
        {"batch_tokens": 1},
        {"batch_rollouts": 0},
    ],
    ids=str,
)
def test_arguments_out_of_range(cache, options):
    with pytest.raises(InvalidArgumentError):
        stream(cache, **options)


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
