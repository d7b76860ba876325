"""Choosing rows by column, length and hash; holding rows out; joining caches."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from store.caches import VOCAB, add, hash_of, some_rollouts, write

import opd_store
from opd_store import CacheMeta, InvalidArgumentError, MismatchError, join, select, split
from opd_store.select import row_hashes
from opd_store.testing import random_rollout

REASONS = ("stop", "length", "abort", "unknown")
COLUMNS = {"x_domain": "utf8", "x_score": "float64", "x_level": "int64", "x_hard": "bool"}
N = 24


@pytest.fixture(scope="module")
def rollouts():
    rng = np.random.default_rng(0)
    found = []
    for number in range(N):
        sizes = {"prompt_len": 1 + number % 3, "response_len": 1 + number % 7}
        extra = {"x_domain": ("math", "code")[number % 2], "x_score": number / 4}
        if number % 5:
            extra |= {"x_level": number % 4, "x_hard": number % 3 == 0}
        found.append(
            replace(
                random_rollout(rng, vocab_size=VOCAB, **sizes),
                finish_reason=REASONS[number % 4],
                teacher=number % 3,
                reward=None if number % 6 == 0 else number % 2,
                sample_id=f"s{number // 2}",
                extra=extra,
            )
        )
    return found


@pytest.fixture(scope="module")
def cache(rollouts, tmp_path_factory):
    """Two versions, that is, two segments of the index."""
    path = tmp_path_factory.mktemp("select") / "cache"
    write(path, rollouts[:9], topk=0, user_columns=COLUMNS)
    add(path, rollouts[9:])
    return opd_store.open(path)


def size(rollout):
    return len(rollout.token_ids)


def named(value):
    """Without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize(
    ("conditions", "holds"),
    [
        ({}, lambda i, r: True),
        ({"finish_reason": "stop"}, lambda i, r: r.finish_reason == "stop"),
        ({"finish_reason": ["stop", "abort"]}, lambda i, r: r.finish_reason in ("stop", "abort")),
        ({"finish_reason": []}, lambda i, r: False),
        ({"teacher": 0}, lambda i, r: r.teacher == 0),
        ({"teacher": {1, 2}}, lambda i, r: r.teacher > 0),
        ({"min_tokens": 4}, lambda i, r: size(r) >= 4),
        ({"max_tokens": 4}, lambda i, r: size(r) <= 4),
        (
            {"min_response_tokens": 2, "max_response_tokens": 5},
            lambda i, r: 2 <= r.response_len <= 5,
        ),
        ({"max_tokens": 1}, lambda i, r: False),
        ({"where": {"x_domain": "math"}}, lambda i, r: r.extra["x_domain"] == "math"),
        (
            {"where": {"x_domain": "code", "x_score": lambda score: score > 2.5}},
            lambda i, r: r.extra["x_domain"] == "code" and r.extra["x_score"] > 2.5,
        ),
        ({"where": {"x_level": range(2)}}, lambda i, r: r.extra.get("x_level") in (0, 1)),
        ({"where": {"x_level": None}}, lambda i, r: "x_level" not in r.extra),
        ({"where": {"x_level": [None, 3]}}, lambda i, r: r.extra.get("x_level", 3) == 3),
        ({"where": {"x_level": lambda level: level >= 2}}, lambda i, r: r.extra.get("x_level", 0) >= 2),
        ({"where": {"x_hard": True}}, lambda i, r: r.extra.get("x_hard") is True),
        ({"where": {"reward": 1.0}}, lambda i, r: r.reward == 1.0),
        ({"where": {"label": None, "prompt_len": [1, 3]}}, lambda i, r: r.prompt_len != 2),
        ({"where": {"label": "right"}}, lambda i, r: False),
        ({"where": {"sample_id": ["s1", "s4"]}}, lambda i, r: i in (2, 3, 8, 9)),
        ({"rows": [20, 3, 3, 11]}, lambda i, r: i in (3, 11, 20)),
        ({"rows": np.array([], np.int64)}, lambda i, r: False),
        (
            {"rows": range(10), "teacher": 1, "max_tokens": 5},
            lambda i, r: i < 10 and i % 3 == 1 and size(r) <= 5,
        ),
    ],
    ids=named,
)
def test_rows_that_meet_every_condition_in_storage_order(cache, rollouts, conditions, holds):
    found = select(cache, **conditions)
    assert found.dtype == np.int64
    assert found.tolist() == [i for i, rollout in enumerate(rollouts) if holds(i, rollout)]


def test_rows_by_hash(cache, rollouts):
    strange = b"\0" * 32
    assert select(cache, hashes=[hash_of(rollouts[i]) for i in (17, 2, 9)] + [strange]).tolist() == [2, 9, 17]
    assert select(cache, hashes=[]).tolist() == []
    assert row_hashes(cache).tobytes() == b"".join(hash_of(rollout) for rollout in rollouts)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"where": {"x_topic": "math"}}, "'x_topic' is not one of sample_id, .*x_score"),
        ({"where": {"topk_ids": 3}}, "'topk_ids' is not one of"),
        ({"where": {"x_level": "high"}}, "x_level: expected values of type int64, found .'high'."),
        ({"where": {"x_level": 1.5}}, "x_level: expected values of type int64"),
        ({"where": {"x_domain": 3}}, "x_domain: expected values of type string"),
        ({"teacher": 1 << 20}, "teacher: expected values of type uint16"),
        (
            {"where": {"x_score": lambda score: score}},
            "x_score: expected a function that gives 24 bools, found float64",
        ),
        ({"where": {"x_score": lambda score: score[:2] > 0}}, r"found bool of shape \[2\]"),
        ({"where": {"teacher": 1}, "teacher": 1}, "teacher: given twice"),
        ({"hashes": [b"short"]}, "hashes: expected 32 bytes each"),
        ({"hashes": ["a" * 32]}, "hashes: expected 32 bytes each"),
        ({"rows": [0.5]}, "rows: expected row numbers in one dimension, found float64"),
    ],
    ids=named,
)
def test_conditions_that_make_no_sense(cache, conditions, message):
    with pytest.raises(InvalidArgumentError, match=message):
        select(cache, **conditions)


@pytest.mark.parametrize("row", [-1, N])
def test_rows_that_do_not_exist(cache, row):
    for function in (lambda: select(cache, rows=[0, row]), lambda: split(cache, 0.5, rows=[row])):
        with pytest.raises(IndexError, match=f"row {row} of {N}"):
            function()


def test_a_split_has_every_row_once_and_about_the_share(tmp_path):
    write(tmp_path / "cache", some_rollouts(2000, topk=0), topk=0)
    cache = opd_store.open(tmp_path / "cache")
    train, held_out = split(cache, 0.2)
    assert sorted([*train, *held_out]) == list(range(2000))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    assert 320 < len(held_out) < 480
    # A larger share holds out what a smaller one does, and more.
    assert set(held_out) < set(split(cache, 0.4)[1])
    assert len(set(held_out) & set(split(cache, 0.2, seed=1)[1])) < 0.5 * len(held_out)
    some = np.arange(0, 2000, 7)
    within = split(cache, 0.2, rows=some)
    assert [part.tolist() for part in within] == [
        np.intersect1d(part, some).tolist() for part in (train, held_out)
    ]


def test_a_rollout_is_on_the_same_side_in_every_cache_and_release(cache, rollouts, tmp_path):
    write(tmp_path / "other", rollouts[::-1], topk=0, user_columns=COLUMNS)
    held_out = split(cache, 0.5, seed=7)[1].tolist()
    other = split(opd_store.open(tmp_path / "other"), 0.5, seed=7)[1]
    assert sorted(N - 1 - other) == held_out
    # Written out, since another rule would mix the rows that older runs held out into new ones.
    prefix = hashlib.sha256(b"opd-store split 1\x00" + b"7").digest()
    draws = [hashlib.sha256(prefix + hash_of(rollout)).hexdigest() for rollout in rollouts]
    assert held_out == [row for row, draw in enumerate(draws) if int(draw[:16], 16) / 2**64 < 0.5]
    assert 0 < len(held_out) < N


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2])
def test_a_share_outside_of_zero_to_one(cache, share):
    with pytest.raises(InvalidArgumentError, match="held_out: expected a share"):
        split(cache, share)


def test_a_join_pairs_equal_rollouts(tmp_path):
    rollouts = some_rollouts(12, topk=0)

    def sampled(*numbers):
        return [replace(rollouts[number], sample_id=str(at)) for at, number in enumerate(numbers)]

    write(tmp_path / "left", sampled(0, 1, 2, 1, 3, 4, 5), topk=0)
    write(tmp_path / "right", sampled(9, 4, 1, 8), topk=0)
    add(tmp_path / "right", sampled(1, 0, 0, 7))
    left, right = (opd_store.open(tmp_path / name) for name in ("left", "right"))
    pairs = join(left, right)
    assert [rows.dtype for rows in pairs] == [np.int64] * 2
    assert list(zip(*(rows.tolist() for rows in pairs), strict=True)) == [(0, 5), (1, 2), (3, 2), (5, 1)]
    back = join(right, left)
    assert list(zip(*(rows.tolist() for rows in back), strict=True)) == [
        (1, 5),
        (2, 1),
        (4, 1),
        (5, 0),
        (6, 0),
    ]


def test_a_join_with_nothing_in_common_or_nothing_at_all(cache, tmp_path):
    write(tmp_path / "empty", [], topk=0)
    write(tmp_path / "other", some_rollouts(3, seed=9, topk=0), topk=0)
    for name in ("empty", "other"):
        other = opd_store.open(tmp_path / name)
        for pair in (join(cache, other), join(other, cache)):
            assert [rows.tolist() for rows in pair] == [[], []]
    assert select(opd_store.open(tmp_path / "empty"), finish_reason="stop").tolist() == []


def test_caches_of_different_tokenizers_do_not_join(cache, tmp_path):
    meta = CacheMeta(vocab_size=VOCAB, tokenizer_fingerprint="sha256:" + "ab" * 32)
    write(tmp_path / "other", [], topk=0, meta=meta)
    with pytest.raises(
        MismatchError, match=r"tokenizer_fingerprint: .* has sha256:5e.* has sha256:ab"
    ) as caught:
        join(cache, opd_store.open(tmp_path / "other"))
    assert caught.value.field == "tokenizer_fingerprint"
