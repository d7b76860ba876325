"""Rollouts that no teacher can have produced are refused one by one; the others are kept."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from store.caches import VOCAB, assert_holds, some_rollouts

import opd_store
from opd_store.testing import example_meta

GOOD = some_rollouts(1, topk=3, response_len=4)[0]
NAN, INF = np.nan, np.inf


def poke(name, *index_and_value):
    """The good rollout with one value of one array changed."""
    *index, value = index_and_value
    array = getattr(GOOD, name).copy()
    array[tuple(index)] = value
    return replace(GOOD, **{name: array})


def topk_row(position, logprobs, ids=(1, 2, 3)):
    bad = poke("topk_logprob", position, logprobs)
    table = GOOD.topk_ids.copy()
    table[position] = ids
    return replace(bad, topk_ids=table)


LOGPROBS = ("teacher_logprob", "behaviour_logprob", "reference_logprob", "log_tail")
CASES = {
    **{
        f"{name} {value}": (poke(name, 2, value), name, 2)
        for name in LOGPROBS
        for value in (NAN, INF, 1e-6, -INF)
        if (name, value) != ("log_tail", -INF)
    },
    **{
        f"{name} shape": (replace(GOOD, **{name: getattr(GOOD, name)[:-1]}), name, -1)
        for name in (*LOGPROBS, "loss_mask", "topk_ids", "topk_logprob")
    },
    **{
        f"{name} two axes": (replace(GOOD, **{name: getattr(GOOD, name)[:, None]}), name, -1)
        for name in (*LOGPROBS, "loss_mask", "token_ids")
    },
    **{f"{name} integers": (replace(GOOD, **{name: np.zeros(4, np.int32)}), name, -1) for name in LOGPROBS},
    **{
        f"{name} {value}": (poke(name, 3, 1, value), name, 3)
        for name in ("topk_logprob",)
        for value in (NAN, INF, -INF, 0.5)
    },
    "topk_ids vocabulary": (poke("topk_ids", 0, 0, VOCAB), "topk_ids", 0),
    "topk_ids 2**32 - 1": (poke("topk_ids", 3, 2, 2**32 - 1), "topk_ids", 3),
    "topk_ids negative": (
        replace(GOOD, topk_ids=GOOD.topk_ids.astype(np.int64) - 2**40),
        "topk_ids",
        0,
    ),
    "topk_ids floats": (replace(GOOD, topk_ids=GOOD.topk_ids.astype(np.float64)), "topk_ids", -1),
    "topk_ids twice": (topk_row(1, [-1, -2, -3], (7, 8, 7)), "topk_ids", 1),
    "topk_ids ties by falling id": (topk_row(1, [-2, -2, -3], (8, 7, 9)), "topk_logprob", 1),
    "topk_ids twice in a tie": (topk_row(1, [-2, -2, -3], (8, 8, 9)), "topk_logprob", 1),
    "topk_logprob rising": (topk_row(2, [-3, -2, -4]), "topk_logprob", 2),
    "topk_logprob sum": (topk_row(0, [-0.5, -0.9, -3]), "topk_logprob", 0),
    "log_tail sum": (poke("log_tail", 3, 0.0), "topk_logprob", 3),
    "topk missing": (replace(GOOD, topk_ids=None), "topk_ids", -1),
    "topk_logprob missing": (replace(GOOD, topk_logprob=None), "topk_logprob", -1),
    "log_tail missing": (replace(GOOD, log_tail=None), "log_tail", -1),
    "loss_mask of numbers": (replace(GOOD, loss_mask=np.ones(4, np.uint8)), "loss_mask", -1),
    "token_ids vocabulary": (poke("token_ids", 4, VOCAB), "token_ids", 4),
    "token_ids negative": (
        replace(GOOD, token_ids=np.array([1, 2, 3, 4, -1, 5], np.int64)),
        "token_ids",
        4,
    ),
    "token_ids floats": (replace(GOOD, token_ids=GOOD.token_ids.astype(float)), "token_ids", -1),
    "token_ids texts": (replace(GOOD, token_ids=["a", "b", "c"]), "token_ids", -1),
    "token_ids of unequal lists": (replace(GOOD, token_ids=[[1], [1, 2]]), "token_ids", -1),
    "token_ids none": (replace(GOOD, token_ids=None), "token_ids", -1),
    "token_ids empty": (replace(GOOD, token_ids=GOOD.token_ids[:0]), "token_ids", -1),
    "empty prompt": (replace(GOOD, prompt_len=0), "prompt_len", -1),
    "empty response": (replace(GOOD, prompt_len=6), "prompt_len", -1),
    "prompt too long": (replace(GOOD, prompt_len=7), "prompt_len", -1),
    "prompt negative": (replace(GOOD, prompt_len=-1), "prompt_len", -1),
    "prompt float": (replace(GOOD, prompt_len=2.0), "prompt_len", -1),
    "prompt text": (replace(GOOD, prompt_len="2"), "prompt_len", -1),
    "finish_reason": (replace(GOOD, finish_reason="eos"), "finish_reason", -1),
    "finish_reason none": (replace(GOOD, finish_reason=None), "finish_reason", -1),
    "policy_version large": (replace(GOOD, policy_version=2**53), "policy_version", -1),
    "policy_version float": (replace(GOOD, policy_version=1.5), "policy_version", -1),
    "policy_version text": (replace(GOOD, policy_version="1"), "policy_version", -1),
    "teacher negative": (replace(GOOD, teacher=-1), "teacher", -1),
    "teacher large": (replace(GOOD, teacher=65536), "teacher", -1),
    "teacher float": (replace(GOOD, teacher=0.5), "teacher", -1),
    "teacher none": (replace(GOOD, teacher=None), "teacher", -1),
    "reward text": (replace(GOOD, reward="1"), "reward", -1),
    "reward nan": (replace(GOOD, reward=NAN), "reward", -1),
    "reward too large": (replace(GOOD, reward=1e39), "reward", -1),
    "label number": (replace(GOOD, label=3), "label", -1),
    "label long": (replace(GOOD, label="é" * 2049), "label", -1),
    "label surrogate": (replace(GOOD, label="\ud800"), "label", -1),
    "undeclared column": (replace(GOOD, extra={"x_other": 1}), "x_other", -1),
    "x_flag number": (replace(GOOD, extra={"x_flag": 1}), "x_flag", -1),
    "x_count bool": (replace(GOOD, extra={"x_count": True}), "x_count", -1),
    "x_count float": (replace(GOOD, extra={"x_count": 1.0}), "x_count", -1),
    "x_count large": (replace(GOOD, extra={"x_count": 2**63}), "x_count", -1),
    "x_score text": (replace(GOOD, extra={"x_score": "1"}), "x_score", -1),
    "x_score large": (replace(GOOD, extra={"x_score": 10**400}), "x_score", -1),
    "x_text number": (replace(GOOD, extra={"x_text": 1}), "x_text", -1),
    "x_text long": (replace(GOOD, extra={"x_text": "x" * 4097}), "x_text", -1),
    "x_text surrogate": (replace(GOOD, extra={"x_text": "\udfff"}), "x_text", -1),
}
COLUMNS = {"x_flag": "bool", "x_count": "int64", "x_score": "float64", "x_text": "utf8"}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_rollout_is_refused_and_the_rest_is_kept(tmp_path, case):
    bad, field, position = CASES[case]
    bad = replace(bad, sample_id="the bad one")
    others = some_rollouts(4, seed=1)
    path = tmp_path / "cache"
    with opd_store.create(path, meta=example_meta(VOCAB), topk=3, user_columns=COLUMNS) as writer:
        writer.append_batch(others[:2])
        with pytest.raises(opd_store.InvalidRolloutError) as caught:
            writer.append(bad)
        writer.append_batch(others[2:])
    error = caught.value
    assert (error.sample_id, error.field, error.position) == ("the bad one", field, position)
    assert "'the bad one'" in str(error)
    assert f"field {field}" in str(error)
    assert "expected" in str(error)
    assert len(str(error)) < 500
    if position >= 0:
        assert f"position {position}" in str(error)
    assert_holds(opd_store.open(path), others)


def test_a_refused_rollout_can_be_appended_once_repaired(tmp_path):
    with opd_store.create(tmp_path / "cache", meta=example_meta(VOCAB), topk=3) as writer:
        with pytest.raises(opd_store.InvalidRolloutError):
            writer.append(replace(GOOD, extra={"x_other": 1}))
        assert writer.append(GOOD)
    assert_holds(opd_store.open(tmp_path / "cache"), [GOOD])


@pytest.mark.parametrize("bad", [3, "\ud800", "x" * 4097], ids=["number", "surrogate", "long"])
def test_a_bad_sample_id(tmp_path, bad):
    with opd_store.create(tmp_path / "cache", meta=example_meta(VOCAB), topk=3) as writer:
        with pytest.raises(opd_store.InvalidRolloutError) as caught:
            writer.append(replace(GOOD, sample_id=bad))
        writer.append(GOOD)
    assert caught.value.field == "sample_id"
    assert_holds(opd_store.open(tmp_path / "cache"), [GOOD])


@pytest.mark.parametrize("name", ["topk_ids", "topk_logprob", "log_tail"])
def test_topk_for_a_cache_without(tmp_path, name):
    bare = replace(GOOD, topk_ids=None, topk_logprob=None, log_tail=None)
    writer = opd_store.create(tmp_path / "cache", meta=example_meta(VOCAB))
    with pytest.raises(opd_store.InvalidRolloutError, match="created with topk=0"):
        writer.append(replace(bare, **{name: getattr(GOOD, name)}))
    assert writer.append(bare)
    writer.close()


def test_the_sum_may_exceed_one_by_rounding_only(tmp_path):
    with opd_store.create(tmp_path / "cache", meta=example_meta(VOCAB), topk=1) as writer:
        for total, accepted in ((1.0005, True), (1.002, False)):
            rollout = replace(
                GOOD,
                sample_id=str(total),
                topk_ids=np.ones((4, 1), np.uint32),
                topk_logprob=np.zeros((4, 1), np.float32),
                log_tail=np.full(4, np.log(total - 1), np.float32),
            )
            if accepted:
                assert writer.append(rollout)
            else:
                with pytest.raises(
                    opd_store.InvalidRolloutError, match=r"at most 1 \+ 0\.001, found 1\.0019"
                ):
                    writer.append(rollout)


def test_appending_does_not_touch_the_callers_arrays(tmp_path):
    copy = replace(GOOD, **{f.name: getattr(GOOD, f.name) for f in dataclasses.fields(GOOD)})
    before = {f.name: np.array(getattr(copy, f.name)) for f in dataclasses.fields(copy)}
    with opd_store.create(tmp_path / "cache", meta=example_meta(VOCAB), topk=3) as writer:
        writer.append(copy)
        assert copy.token_ids.flags.writeable
        copy.token_ids[...] = 0
        copy.teacher_logprob[...] = -9
    stored = opd_store.open(tmp_path / "cache")[0]
    for name in ("token_ids", "teacher_logprob"):
        assert stored.__getattribute__(name).tolist() == before[name].tolist()
        getattr(copy, name)[...] = before[name]
