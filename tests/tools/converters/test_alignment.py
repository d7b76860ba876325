"""Rows that are about the neighbours of their tokens are noticed, others are not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from opd_tools.converters.core.alignment import Evidence, checked, shifted
from opd_tools.converters.core.record import NO_ENTRY, Record, Tally

from opd_store import FormatError

VOCAB = 1000


def scored(n, *, liked=0.7, size=40, seed=0, own=True):
    """Records of a teacher that holds what was sampled likeliest with this probability."""
    rng = np.random.default_rng(seed)
    for number in range(n):
        tokens = rng.integers(0, VOCAB, size + 3)
        ids = rng.integers(0, VOCAB, (size, 4))
        hit = rng.random(size) < liked
        ids[hit, 0] = tokens[3:][hit]
        ids[~hit, 2] = tokens[3:][~hit]
        logprob = -np.sort(rng.exponential(2, (size, 4)), axis=1)
        yield Record(
            where=f"line {number}",
            token_ids=tokens,
            prompt_len=3,
            topk_ids=ids,
            topk_logprob=logprob,
            teacher_logprob=np.where(hit, logprob[:, 0], logprob[:, 2]) if own else None,
        )


def rolled(record, by, names=("topk_ids", "topk_logprob", "teacher_logprob")):
    rows = {name: np.roll(array, by, 0) for name in names if (array := getattr(record, name)) is not None}
    return dataclasses.replace(record, **rows)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("liked", [0.3, 0.7, 1.0])
def test_good_records_come_through_unchanged(own, liked):
    records = list(scored(150, liked=liked, own=own))
    assert list(checked(iter(records), name="x")) == records


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("by", [-1, 1])
def test_rows_of_neighbours_are_refused_and_the_shift_that_is_named_mends_them(own, by):
    records = [rolled(record, by) for record in scored(20, own=own)]
    with pytest.raises(FormatError, match=f"x: rows are off by one.*--shift {-by} ") as caught:
        list(checked(iter(records), name="x"))
    assert ("next" if by < 0 else "previous") in str(caught.value)
    moved = [shifted(record, -by, Tally()) for record in records]
    assert len(list(checked(iter(moved), name="x"))) == 20


@pytest.mark.parametrize("by", [-1, 1])
def test_rows_that_contradict_the_log_probs_beside_them_are_refused(by):
    # Nothing is likeliest here, so that only the tokens' own log-probs tell.
    records = [rolled(record, by, ("topk_ids", "topk_logprob")) for record in scored(20, liked=0.0)]
    with pytest.raises(FormatError, match="the file contradicts itself"):
        list(checked(iter(records), name="x"))


def test_what_proves_nothing_is_let_through():
    unlikely = [rolled(record, 1) for record in scored(20, liked=0.05, own=False)]
    assert len(list(checked(iter(unlikely), name="x"))) == 20
    few = [rolled(record, 1) for record in scored(1, size=10)]
    assert len(list(checked(iter(few), name="x"))) == 1
    same = [dataclasses.replace(record, token_ids=np.full(43, 7)) for record in scored(5)]
    same = [dataclasses.replace(record, topk_ids=np.full((40, 4), 7)) for record in same]
    assert len(list(checked(iter(same), name="x"))) == 5


def test_only_the_beginning_is_held_back_with_rows_or_without():
    for change in ({}, {"topk_ids": None, "topk_logprob": None}):
        taken = []

        def counted(change=change, taken=taken):
            for record in scored(1000):
                taken.append(record)
                yield dataclasses.replace(record, **change)

        next(checked(counted(), name="x"))
        assert len(taken) == 100


def test_rows_that_are_empty_do_not_count():
    records = []
    for record in scored(20):
        ids = record.topk_ids.copy()
        ids[::2] = NO_ENTRY
        records.append(dataclasses.replace(record, topk_ids=ids))
    assert len(list(checked(iter(records), name="x"))) == 20
    evidence = Evidence()
    for record in records:
        evidence.look(rolled(record, -1))
    assert evidence.shift() == 1


def test_a_shift_moves_rows_and_leaves_the_sampler_alone():
    (record,) = scored(1, size=5)
    record = dataclasses.replace(record, behaviour_logprob=-np.arange(5.0), loss_mask=np.arange(5) > 2)
    later = shifted(record, 1, Tally())
    assert later.prompt_len == 4
    np.testing.assert_array_equal(later.token_ids, record.token_ids)
    np.testing.assert_array_equal(later.topk_ids, record.topk_ids[:4])
    np.testing.assert_array_equal(later.behaviour_logprob, record.behaviour_logprob[1:])
    earlier = shifted(record, -2, Tally())
    assert earlier.prompt_len == 3
    np.testing.assert_array_equal(earlier.token_ids, record.token_ids[:-2])
    np.testing.assert_array_equal(earlier.teacher_logprob, record.teacher_logprob[2:])
    np.testing.assert_array_equal(earlier.loss_mask, record.loss_mask[:3])
    assert shifted(record, 0, Tally()) is record
    tally = Tally()
    assert shifted(record, 5, tally) is None
    assert tally == {"rollouts too short for --shift, left out": 1}


def test_a_row_too_few_is_refused_before_anything_is_moved():
    (record,) = scored(1)
    short = dataclasses.replace(record, topk_ids=record.topk_ids[1:])
    with pytest.raises(FormatError, match="line 0, topk_ids: expected 40 rows"):
        shifted(short, 1, Tally())
    with pytest.raises(FormatError, match="line 0, topk_ids: expected 40 rows"):
        list(checked(iter([short]), name="x"))
