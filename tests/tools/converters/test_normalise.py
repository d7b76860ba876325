"""From records to rollouts: what is kept exactly, what is repaired and counted, what is refused."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from opd_tools.converters.core.normalise import to_rollout
from opd_tools.converters.core.record import NO_ENTRY, Record, Tally, Values
from opd_tools.converters.core.support import Target

from opd_store import NO_ID, CacheMeta, FormatError, create

VOCAB = 50
TAIL = "tails computed as 1 - sum, as exact as the entries' rounding"


def record(ids, probabilities, *, prompt_len=2, tokens=None, **fields):
    """A record with these rows, given as probabilities."""
    with np.errstate(divide="ignore"):
        logprob = np.log(np.asarray(probabilities, np.float64))
    ids = np.asarray(ids, np.int64)
    tokens = np.arange(prompt_len + len(ids)) if tokens is None else np.asarray(tokens)
    return Record(
        where="a.jsonl, line 3",
        token_ids=tokens,
        prompt_len=prompt_len,
        topk_ids=ids,
        topk_logprob=logprob,
        **fields,
    )


def normalised(given, *, topk=3, values=Values.LOGPROBS, **target):
    tally = Tally()
    return to_rollout(given, Target(vocab_size=VOCAB, topk=topk, values=values, **target), tally), dict(tally)


def test_rows_in_order_are_kept_to_the_bit():
    values = np.log(np.array([[0.5, 0.25, 0.1], [0.6, 0.2, 0.2]])).astype(np.float32)
    given = dataclasses.replace(record([[4, 9, 1], [7, 3, 5]], np.ones((2, 3))), topk_logprob=values)
    rollout, tally = normalised(given)
    np.testing.assert_array_equal(rollout.topk_ids, given.topk_ids)
    assert rollout.topk_logprob.tobytes() == values.tobytes()
    assert tally.keys() == {TAIL, "rollouts without teacher_logprob, since some tokens lack it"}
    np.testing.assert_allclose(np.exp(rollout.log_tail), [0.15, 0.0], atol=1e-7)


def test_only_rows_out_of_order_are_sorted_and_counted():
    rollout, tally = normalised(record([[1, 2, 3], [4, 5, 6]], [[0.5, 0.3, 0.1], [0.1, 0.2, 0.6]]))
    assert rollout.topk_ids.tolist() == [[1, 2, 3], [6, 5, 4]]
    assert tally["positions whose entries were put in order"] == 1


def test_log_probs_that_differ_only_beyond_float32_are_ordered_by_id(tmp_path):
    near = -1.0, -1.0 - 1e-12, -1.5
    given = dataclasses.replace(record([[9, 4, 1]], np.ones((1, 3))), topk_logprob=np.array([near]))
    rollout, _ = normalised(given)
    assert rollout.topk_ids.tolist() == [[4, 9, 1]]
    with create(tmp_path / "cache", meta=META, topk=3) as writer:
        writer.append(rollout)


META = CacheMeta(vocab_size=VOCAB, tokenizer_fingerprint="sha256:" + "1" * 64)


@pytest.mark.parametrize("filler", [-np.inf, -1e9, -9999.0, -1e3])
def test_fillers_are_no_entries_whatever_their_id(filler):
    given = record([[4, 9, 99], [7, 3, -5]], [[0.5, 0.2, 1], [0.6, 0.2, 1]])
    given.topk_logprob[:, 2] = filler
    rollout, tally = normalised(given)
    assert (rollout.topk_ids[:, 2] == NO_ID).all()
    assert (rollout.topk_logprob[:, 2] == -np.inf).all()
    assert tally["entries that were fillers (-inf, -9999, ...), left out"] == 2


def test_ragged_rows_and_rows_that_begin_with_a_filler():
    given = record([[NO_ENTRY, 9, 8], [7, NO_ENTRY, NO_ENTRY]], [[0, 0.5, 0.2], [0.6, 0, 0]])
    rollout, tally = normalised(given)
    assert rollout.topk_ids.tolist() == [[9, 8, NO_ID], [7, NO_ID, NO_ID]]
    np.testing.assert_allclose(np.exp(rollout.log_tail), [0.3, 0.4], atol=1e-7)
    assert not any("filler" in what for what in tally)


def test_an_entry_that_is_there_twice_counts_once():
    rollout, tally = normalised(record([[4, 4, 9], [7, 3, 7]], [[0.5, 0.5, 0.2], [0.4, 0.3, 0.4]]))
    assert rollout.topk_ids.tolist() == [[4, 9, NO_ID], [7, 3, NO_ID]]
    np.testing.assert_allclose(np.exp(rollout.log_tail), [0.3, 0.3], atol=1e-7)
    assert tally["entries that were there twice, once left out"] == 2
    with pytest.raises(FormatError, match=r"line 3, position 1: id 7 twice, with log-probs"):
        normalised(record([[4, 5, 9], [7, 3, 7]], [[0.5, 0.4, 0.1], [0.4, 0.3, 0.2]]))


def test_rounding_above_1_is_scaled_down_and_more_is_refused():
    rollout, tally = normalised(record([[1, 2], [3, 4]], [[0.7, 0.31], [0.7, 0.2]]), topk=2)
    assert tally["positions whose rounded probabilities exceed 1, scaled down to it"] == 1
    np.testing.assert_allclose(np.exp(rollout.topk_logprob).sum(axis=1), [1, 0.9], atol=1e-6)
    assert rollout.log_tail[0] == -np.inf
    over = record([[1, 2], [3, 4]], [[0.5, 0.2], [0.8, 0.3]])
    with pytest.raises(FormatError, match=r"line 3, position 1: probabilities sum to 1\.1"):
        normalised(over, topk=2)
    assert normalised(over, topk=2, overfull=0.2)[0].log_tail[1] == -np.inf


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_rounding_does_to_full_rows_is_within_the_limit(tmp_path, dtype):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (200, VOCAB))
    logprob = -np.sort(-(logits - np.log(np.exp(logits).sum(axis=1))[:, None]), axis=1)
    rounded = logprob.astype(np.float16).astype(np.float64)
    if dtype == "bfloat16":
        bits = logprob.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)
    ids = np.tile(np.arange(VOCAB), (200, 1))
    given = dataclasses.replace(
        record(ids, np.ones((200, VOCAB)), tokens=np.zeros(202, int)), topk_logprob=rounded
    )
    rollout, tally = normalised(given, topk=VOCAB)
    assert tally["positions whose rounded probabilities exceed 1, scaled down to it"] > 50
    np.testing.assert_allclose(rollout.topk_logprob, rounded, atol=0.02)
    with create(tmp_path / "cache", meta=META, topk=VOCAB) as writer:
        writer.append(rollout)


def test_a_given_tail_is_kept_and_scaled_with_its_row():
    rows = [[0.7, 0.2], [0.7, 0.2], [0.4, 0.2]]
    given = record([[1, 2], [3, 4], [5, 6]], rows, log_tail=np.log([0.1, 0.11, 0.1]))
    rollout, tally = normalised(given, topk=2)
    np.testing.assert_allclose(np.exp(rollout.log_tail), [0.1, 0.11 / 1.01, 0.1], rtol=1e-6)
    np.testing.assert_allclose(np.exp(rollout.topk_logprob[1]), np.array([0.7, 0.2]) / 1.01, rtol=1e-6)
    assert tally["positions whose probabilities and tail do not sum to 1"] == 1
    assert TAIL not in tally
    for wrong in (np.nan, 0.5):
        with pytest.raises(FormatError, match="log_tail, position 0"):
            normalised(dataclasses.replace(given, log_tail=np.full(3, wrong)), topk=2)
    assert (
        normalised(dataclasses.replace(given, log_tail=np.full(3, -9999.0)), topk=2)[0].log_tail[0] == -np.inf
    )


def test_ranks_beyond_those_kept_join_the_tail():
    rollout, tally = normalised(record([[1, 2, 3]], [[0.3, 0.5, 0.1]]), topk=1)
    assert rollout.topk_ids.tolist() == [[2]]
    np.testing.assert_allclose(np.exp(rollout.log_tail), [0.5], rtol=1e-6)
    assert tally["entries beyond rank 1, moved into the tail"] == 2


def test_renormalised_rows_sum_to_1_without_a_tail_whatever_they_were():
    logits = np.array([[30.0, 29.0, 20.0], [-800.0, -801.0, -802.0]])
    given = dataclasses.replace(record([[1, 2, 3], [4, 5, 6]], np.ones((2, 3))), topk_logprob=logits)
    rollout, _ = normalised(given, values=Values.RENORMALISED)
    np.testing.assert_allclose(np.exp(rollout.topk_logprob.astype(float)).sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.diff(rollout.topk_logprob), np.diff(logits), rtol=1e-5)
    assert (rollout.log_tail == -np.inf).all()
    assert rollout.teacher_logprob is None
    cut, tally = normalised(given, values=Values.RENORMALISED, topk=2)
    np.testing.assert_allclose(np.exp(cut.topk_logprob.astype(float)).sum(axis=1), 1, rtol=1e-6)
    assert tally["entries beyond rank 2, left out"] == 2


def test_the_own_log_prob_is_the_given_one_or_that_of_the_entry():
    rows = record([[2, 7], [8, 3]], [[0.6, 0.2], [0.5, 0.3]])
    np.testing.assert_allclose(np.exp(normalised(rows, topk=2)[0].teacher_logprob), [0.6, 0.3], rtol=1e-6)
    given = dataclasses.replace(rows, teacher_logprob=np.array([np.nan, np.log(0.3)]))
    np.testing.assert_allclose(np.exp(normalised(given, topk=2)[0].teacher_logprob), [0.6, 0.3], rtol=1e-6)
    other = dataclasses.replace(rows, teacher_logprob=np.log([0.6, 0.1]))
    rollout, tally = normalised(other, topk=2)
    np.testing.assert_allclose(np.exp(rollout.teacher_logprob), [0.6, 0.1], rtol=1e-6)
    assert tally["tokens whose own log-prob disagrees with their entry"] == 1
    outside = record([[9, 7], [8, 3]], [[0.6, 0.2], [0.5, 0.3]])
    rollout, tally = normalised(outside, topk=2)
    assert rollout.teacher_logprob is None
    assert tally["rollouts without teacher_logprob, since some tokens lack it"] == 1


def test_rows_missing_at_the_ends_cut_the_rollout_and_in_between_refuse_it():
    rows = [[1], [NO_ENTRY], [3], [4], [NO_ENTRY]]
    fields = {"behaviour_logprob": -np.arange(5.0), "loss_mask": np.arange(5) % 2 == 0}
    rollout, tally = normalised(
        record(
            [[NO_ENTRY], *rows[2:]],
            np.full((4, 1), 0.5),
            **{name: array[1:] for name, array in fields.items()},
        ),
        topk=1,
    )
    assert rollout.prompt_len == 3
    assert rollout.token_ids.tolist() == [0, 1, 2, 3, 4]
    assert rollout.behaviour_logprob.tolist() == [-2.0, -3.0]
    assert rollout.loss_mask.tolist() == [True, False]
    assert tally["tokens before the first row, taken as prompt"] == 1
    assert tally["tokens after the last row, left out"] == 1
    with pytest.raises(FormatError, match="line 3, position 1: no entry at all"):
        normalised(record(rows, np.full((5, 1), 0.5)), topk=1)
    with pytest.raises(FormatError, match="line 3: no position has an entry"):
        normalised(record([[NO_ENTRY]] * 2, np.full((2, 1), 0.5)), topk=1)


GOOD = record([[1, 2], [3, 4]], [[0.5, 0.2], [0.5, 0.2]])
BAD = {
    "no response": ({"token_ids": np.arange(2)}, "at least one token each, found 2 tokens, 2 of them prompt"),
    "no prompt": ({"prompt_len": 0}, "at least one token each"),
    "floats": ({"token_ids": np.arange(4.0)}, "no list of integers"),
    "ids": ({"token_ids": np.array([0, 1, 2, VOCAB])}, f"token 3: id {VOCAB} is not below"),
    "negative": ({"token_ids": np.array([0, -1, 2, 3])}, "token 1: id -1 is not below"),
    "rows": ({"topk_ids": GOOD.topk_ids[:1]}, "topk_ids: expected 2 rows, one a response token, found 1"),
    "mask": ({"loss_mask": np.ones(3, bool)}, "loss_mask: expected 2 rows"),
    "shapes": ({"topk_ids": GOOD.topk_ids[:, :1]}, "expected as many ids as log-probs"),
    "NaN": ({"topk_logprob": np.array([[-1, -2], [-1, np.nan]])}, "position 1: log-prob nan"),
    "inf": ({"topk_logprob": np.array([[-1, np.inf], [-1, -2]])}, "position 0: log-prob inf"),
    "entry": ({"topk_ids": np.array([[1, 2], [3, VOCAB]])}, f"position 1: id {VOCAB} is not below"),
    "entry below": ({"topk_ids": np.array([[1, -2], [3, 4]])}, "position 0: id -2 is not below"),
    "no top-k": ({"topk_ids": None, "topk_logprob": None}, "no top-k, which other rollouts have"),
    "own above 0": (
        {"teacher_logprob": np.array([-1, 0.5])},
        "teacher_logprob, position 1: a log-prob of 0.5",
    ),
    "behaviour": (
        {"behaviour_logprob": np.array([2, -1.0])},
        "behaviour_logprob, position 0: a log-prob of 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_reading_explains_is_refused_with_its_place(name):
    change, said = BAD[name]
    with pytest.raises(FormatError, match="jsonl, line 3") as caught:
        normalised(dataclasses.replace(GOOD, **change), topk=2)
    assert said in str(caught.value)


@pytest.mark.parametrize("missing", [np.nan, -9999.0, -np.inf])
def test_a_column_with_a_hole_is_left_out_of_its_rollout(missing):
    rollout, tally = normalised(
        dataclasses.replace(GOOD, behaviour_logprob=np.array([-1.0, missing])), topk=2
    )
    assert rollout.behaviour_logprob is None
    assert sum(count for what, count in tally.items() if "behaviour_logprob" in what) == 1


def test_every_order_of_entries_gives_the_same_rollout():
    wanted, _ = normalised(record([[1, 2, 3, 4]], [[0.4, 0.3, 0.2, 0.1]]), topk=4)
    for order in itertools.permutations(range(4)):
        ids = [[(1, 2, 3, 4)[i] for i in order]]
        found, _ = normalised(record(ids, [[(0.4, 0.3, 0.2, 0.1)[i] for i in order]]), topk=4)
        np.testing.assert_array_equal(found.topk_ids, wanted.topk_ids)
        np.testing.assert_array_equal(found.topk_logprob, wanted.topk_logprob)
