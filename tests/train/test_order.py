"""Orders and batches as plans: nothing is decoded here."""

from __future__ import annotations

import hashlib
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from store.caches import run_python

from opd_train.data.order import Shuffle, epoch_order, epoch_share
from opd_train.data.plan import Planner, Rollouts, plan_batches

DIGEST = "sha256:" + "ab" * 32
SIZES = (1, 2, 3, 4, 8)


def planner(
    n, *, per_block=4, weights=(1,), shuffle="block", window=3, limit=60, most=None, seed=0, caches=1
):
    """`n` rollouts of 1 to 20 tokens, in record batches of `per_block`, dealt to `caches` in equal parts."""
    tokens = np.random.default_rng(n).integers(1, 21, n)
    rollouts = Rollouts(
        digest=DIGEST,
        source=np.arange(n) * caches // max(n, 1),
        rows=np.arange(n),
        block=np.arange(n) // per_block,
        tokens=tokens,
        weights=tuple(Fraction(weight) for weight in weights),
    )
    return Planner(
        rollouts=rollouts,
        seed=seed,
        shuffle=Shuffle(shuffle),
        window=window,
        batch_tokens=limit,
        batch_rollouts=most,
    )


def orders(plan):
    """Rollouts of every rank, in order."""
    ranks = range(len(plan.first_batch) - 1)
    return [
        [row for index in range(plan.n_batches(rank)) for row in plan.batch(rank, index).tolist()]
        for rank in ranks
    ]


PLANS = {
    "n": st.integers(0, 90),
    "size": st.integers(1, 9),
    "per_block": st.integers(1, 12),
    "window": st.integers(1, 5),
    "shuffle": st.sampled_from(list(Shuffle)),
    "limit": st.integers(20, 90),
    "most": st.none() | st.integers(1, 5),
    "epoch": st.integers(0, 3),
}


@settings(max_examples=150, deadline=None)
@given(**PLANS)
@example(n=0, size=3, per_block=1, window=1, shuffle=Shuffle.BLOCK, limit=20, most=None, epoch=0)
@example(n=5, size=8, per_block=5, window=1, shuffle=Shuffle.BLOCK, limit=20, most=None, epoch=0)
def test_every_rollout_once_in_equal_shares(n, size, per_block, window, shuffle, limit, most, epoch):
    made = planner(n, per_block=per_block, window=window, shuffle=shuffle, limit=limit, most=most)
    plan = made.plan(epoch, size)
    found = orders(plan)
    assert sorted(row for rank in found for row in rank) == list(range(n))
    shares = [len(rank) for rank in found]
    assert max(shares) - min(shares) <= 1
    counts = [plan.n_batches(rank) for rank in range(size)]
    for rank, count in enumerate(counts):
        batches = [plan.batch(rank, index) for index in range(count)]
        for batch in batches:
            assert 1 <= len(batch) <= (most or n)
            assert made.rollouts.tokens[batch].sum() <= limit
        # Fewer batches than others only where no batch can be split.
        assert count == max(counts) or all(len(batch) == 1 for batch in batches)


@settings(max_examples=100, deadline=None)
@given(**{name: PLANS[name] for name in ("n", "size", "per_block", "window", "epoch")})
def test_a_window_touches_so_many_blocks_and_ranks_fetch_different_ones(n, size, per_block, window, epoch):
    made = planner(n, per_block=per_block, window=window)
    fetched = 0
    for order in orders(made.plan(epoch, size)):
        blocks = made.rollouts.block[order]
        begin = {block: at for at, block in reversed(list(enumerate(blocks)))}
        end = {block: at for at, block in enumerate(blocks)}
        fetched += len(begin)
        # Blocks of which something was given and something is to come, which have to be at hand.
        for at in range(len(order)):
            assert sum(begin[block] <= at <= end[block] for block in begin) <= window
    # Only what is moved for equal shares is fetched by two ranks.
    assert fetched <= -(-n // per_block) + 2 * (size - 1)


@pytest.mark.parametrize(("shuffle", "window"), [("block", 25), ("global", 1)])
def test_one_window_is_the_permutation_of_all(shuffle, window):
    made = planner(100, shuffle=shuffle, window=window)
    for epoch in range(3):
        assert orders(made.plan(epoch, 1)) == [epoch_order(100, DIGEST, 0, epoch).tolist()]


@pytest.mark.parametrize("shuffle", ["global", "none"])
def test_other_orders_are_dealt_in_turn(shuffle):
    whole = orders(planner(50, shuffle=shuffle).plan(1, 1))[0]
    if shuffle == "none":
        assert whole == list(range(50))
    assert orders(planner(50, shuffle=shuffle).plan(1, 4)) == [whole[rank::4] for rank in range(4)]


def test_blocks_come_in_another_order_each_epoch_and_seed():
    found = {tuple(orders(planner(40, seed=seed).plan(epoch, 1))[0]) for seed in (0, 1) for epoch in (0, 1)}
    assert len(found) == 4


def test_the_plan_is_the_same_in_every_process_and_release():
    found = orders(planner(12, per_block=2, window=2).plan(1, 2))
    assert found == [[11, 10, 0, 1, 7, 6], [9, 2, 3, 8, 4, 5]]
    code = (
        "import hashlib; from train.test_order import *; plan = planner(500, weights=(1.5,)).plan(3, 4)\n"
        "print(hashlib.sha256(plan.entries.tobytes() + plan.bounds.tobytes()).hexdigest())"
    )
    plan = planner(500, weights=(1.5,)).plan(3, 4)
    here = hashlib.sha256(plan.entries.tobytes() + plan.bounds.tobytes()).hexdigest()
    assert run_python(code).strip() == here


def test_batches_are_as_full_as_the_next_rollout_allows():
    made = planner(200)
    plan = made.plan(0, 1)
    order = orders(plan)[0]
    tokens = made.rollouts.tokens[order]
    for first, last in pairwise(plan.bounds[:-1]):
        assert tokens[first:last].sum() <= 60 < tokens[first : last + 1].sum()


def test_the_largest_batches_are_split_where_a_rank_has_too_few():
    # Rank 0 needs four batches. Rank 1 would take one of 8 rollouts and 23 tokens.
    tokens = np.array([30, 30, 30, 30, 1, 1, 9, 1, 1, 1, 8, 1])
    bounds, first = plan_batches(tokens, np.array([0, 4, 12]), 30, None)
    assert first.tolist() == [0, 4, 8]
    # 4 + 4 rollouts of 12 and 11 tokens, then the larger into 2 + 2 of 2 and 10, then the 11 into 2 and 9.
    assert bounds.tolist() == [0, 1, 2, 3, 4, 6, 8, 10, 12]


def test_windows_mix_what_is_sorted():
    lag = {}
    for window in (1, 8, 64):
        order = orders(planner(4096, per_block=16, window=window).plan(0, 1))[0]
        lag[window] = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert lag[1] > 0.9
    assert lag[8] < 0.3
    assert abs(lag[64]) < 0.1


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shuffle=PLANS["shuffle"],
    weights=st.sampled_from([(1,), (2,), (0.5,), (1.5, 0.25)]),
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=4),
    last=st.sampled_from(SIZES),
)
def test_stages_leave_nothing_out_and_repeat_nothing(data, shuffle, weights, sizes, last):
    made = planner(50, shuffle=shuffle, weights=weights, caches=len(weights))
    expected = Counter(orders(made.plan(2, 1))[0])
    given_out: Counter[int] = Counter()
    stages = []
    for size in sizes:
        plan = made.plan(2, size, stages)
        consumed = [data.draw(st.integers(0, plan.n_batches(rank))) for rank in range(size)]
        for rank, count in enumerate(consumed):
            for index in range(count):
                given_out.update(plan.batch(rank, index).tolist())
        stages.append((2, size, tuple(consumed)))
    plan = made.plan(2, last, [(1, 3, (9, 9, 9)), *stages])
    given_out.update(row for order in orders(plan) for row in order)
    assert given_out == expected
    shares = [len(order) for order in orders(plan)]
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("consumed", [(1, 99), (-1, 0), (1,)])
def test_a_stage_that_cannot_have_been_is_refused(consumed):
    with pytest.raises(ValueError, match="batches consumed of"):
        planner(50).plan(0, 2, [(0, 2, consumed)])


@pytest.mark.parametrize("n", [1, 7, 20])
@pytest.mark.parametrize("weight", ["1/2", "1/3", "3/4", "1", "2", "5/2"])
def test_weights_say_how_often(n, weight):
    weight = Fraction(weight)
    epochs = weight.denominator
    for start in (0, 5):
        seen: Counter[int] = Counter()
        for epoch in range(start, start + epochs):
            passes = epoch_share(n, weight, DIGEST, 3, epoch, 0)
            counts = Counter(row for rows in passes for row in rows.tolist())
            assert all(weight // 1 <= counts[row] <= -(-weight // 1) for row in range(n))
            assert abs(sum(counts.values()) - weight * n) < 1
            seen += counts
        assert seen == {row: weight.numerator for row in range(n)}


def test_copies_of_a_rollout_are_not_neighbours():
    plan = planner(400, weights=(2,), window=1).plan(0, 1)
    order = np.array(orders(plan)[0])
    apart = [int(np.diff(np.flatnonzero(order == row))[0]) for row in range(400)]
    # Two random places among 800 are 267 apart on average; in the same window they would be within 8.
    assert np.mean(apart) > 200


def test_a_batch_has_the_caches_in_turn():
    made = planner(60, weights=(1, 1, 1), caches=3, shuffle="global")
    plan = made.plan(0, 2)
    steps = made.walk(1, 2, epoch=0, index=0, epochs=1, stages=())
    for step in steps:
        planned = plan.batch(1, step.number)
        assert step.rows.tolist() == sorted(planned, key=lambda rollout: made.rollouts.source[rollout])
        assert step.source.tolist() == sorted(made.rollouts.source[planned])


def test_parts_of_two_caches_are_drawn_apart():
    made = planner(60, weights=(0.5, 0.5), caches=2)
    halves = [sorted(orders(made.plan(epoch, 1))[0]) for epoch in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(60))
    first = {row for row in halves[0] if row < 30}
    assert len(first) == 15
    assert first != {row - 30 for row in halves[0] if row >= 30}
