"""The estimate of teacher consistency: on models it was not calibrated on, and on numbers made up."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

import opd_store
from opd_store import CacheMeta, InvalidArgumentError, ModelInfo, Rollout, SamplerInfo, check_consistency
from opd_store.consistency import Verdict, compare_policies

MEASURED = np.load(Path(__file__).with_name("consistency.npz"))
"""By bench/consistency.py --fixture: seeds that were not looked at when the thresholds were chosen."""
SEEDS = sorted({name.split("/")[0] for name in MEASURED.files})
EXPECTED = {
    ("student", "teacher"): Verdict.CONSISTENT,
    ("student", "other"): Verdict.INCONSISTENT,
    ("other-student", "other"): Verdict.CONSISTENT,
    ("other-student", "teacher"): Verdict.INCONSISTENT,
    # Another model that learnt the same: nothing in the student's rollouts tells them apart.
    ("student", "independent"): Verdict.CONSISTENT,
    ("other-student", "independent"): Verdict.INCONSISTENT,
    # Far from every teacher.
    ("short", "teacher"): Verdict.UNDECIDED,
    ("short", "other"): Verdict.UNDECIDED,
}
TEACHER, OTHER = (ModelInfo(name=digit, weights_digest="sha256:" + digit * 64) for digit in "ab")
RAW = SamplerInfo(temperature=1.0)


def measured(seed, student, teacher):
    names = (f"{seed}/{student}/{name}" for name in ("student", teacher, "starts"))
    one, other, starts = (MEASURED[name] for name in names)
    return one.astype(np.float64), other.astype(np.float64), starts.astype(np.int64)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("student", "teacher"), EXPECTED)
def test_verdicts_on_held_out_models(seed, student, teacher):
    assert compare_policies(*measured(seed, student, teacher)).verdict is EXPECTED[student, teacher]


def test_the_statistics_are_the_means_they_say():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 60)
    starts = np.cumsum([0, *sizes])
    student, teacher = (np.log(rng.uniform(0.01, 1.0, starts[-1]) ** power) for power in (0.1, 0.6))
    report = compare_policies(student, teacher, starts)
    sure = np.exp(student) >= 0.9
    assert (report.n_rollouts, report.n_tokens) == (60, starts[-1])
    assert report.n_sure == sure.sum()
    assert report.sure_gap.value == pytest.approx((np.exp(student) - np.exp(teacher))[sure].mean())
    assert report.shocks.value == pytest.approx((np.exp(teacher) < 0.1)[sure].mean())
    assert report.kl.value == pytest.approx((student - teacher).mean())
    for found in (report.sure_gap, report.shocks, report.kl):
        assert found.low <= found.value <= found.high
    assert report == compare_policies(student, teacher, starts)


def test_the_interval_covers_the_truth_though_tokens_of_a_rollout_are_alike():
    # All tokens of a rollout share one gap; an interval over tokens would be three times too narrow.
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        gap = np.repeat(rng.normal(0.02, 0.01, 50), 10)
        teacher = np.log(0.95 - gap)
        found = compare_policies(np.full(500, np.log(0.95)), teacher, np.arange(0, 501, 10)).sure_gap
        covered += found.low <= 0.02 <= found.high
    assert 85 <= covered <= 99


def cache_of(path, *, n=60, sampler=RAW, teacher=TEACHER, gap=0.0, student_p=0.95, **drop):
    """Rollouts of 8 tokens that the sampler is sure of, and the teacher a little less."""
    meta = CacheMeta(
        vocab_size=50, tokenizer_fingerprint="sha256:" + "0" * 64, sampler=sampler, teacher=teacher
    )
    rng = np.random.default_rng(1)
    with opd_store.create(path, meta=meta) as writer:
        for number in range(n):
            student = np.log(np.full(8, student_p, np.float32))
            rollout = Rollout(
                token_ids=rng.integers(0, 50, 10).astype(np.uint32),
                prompt_len=2,
                sample_id=str(number),
                reference_logprob=student,
                behaviour_logprob=student,
                teacher_logprob=np.log(np.exp(student) - gap),
                loss_mask=np.arange(8) < 6,
            )
            writer.append(dataclasses.replace(rollout, **drop))
    return opd_store.open(path)


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({}, Verdict.CONSISTENT),
        ({"gap": 0.1}, Verdict.INCONSISTENT),
        ({"gap": 0.02}, Verdict.UNDECIDED),
        ({"n": 20}, Verdict.UNDECIDED),
        ({"student_p": 0.5}, Verdict.UNDECIDED),
        ({"gap": -0.04}, Verdict.UNDECIDED),
        ({"reference_logprob": None}, Verdict.CONSISTENT),
        ({"reference_logprob": None, "sampler": SamplerInfo(temperature=0.8)}, Verdict.UNDECIDED),
        ({"reference_logprob": None, "sampler": SamplerInfo(top_p=0.9)}, Verdict.UNDECIDED),
        ({"reference_logprob": None, "sampler": None}, Verdict.UNDECIDED),
        ({"teacher_logprob": None}, Verdict.UNDECIDED),
        ({"n": 0}, Verdict.UNDECIDED),
    ],
    ids=str,
)
def test_what_a_cache_offers(tmp_path, options, verdict):
    report = check_consistency(cache_of(tmp_path / "cache", **options))
    assert report.verdict is verdict
    assert report.reason


def test_masked_tokens_and_rows_beyond_the_limit_do_not_count(tmp_path):
    cache = cache_of(tmp_path / "cache")
    assert check_consistency(cache).n_tokens == 60 * 6
    assert check_consistency(cache, max_rollouts=40).n_rollouts == 40


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("teacher", [Verdict.CONSISTENT]),
        # Few samples of two models that learnt the same: rarely one finds a token of the other impossible.
        ("independent", [Verdict.CONSISTENT, Verdict.UNDECIDED]),
        ("other", [Verdict.INCONSISTENT]),
    ],
)
def test_samples_of_the_sft_teacher_decide(tmp_path, teacher, expected):
    # The student alone says nothing.
    cache = cache_of(tmp_path / "cache", student_p=0.5)
    sft, scored, starts = measured(SEEDS[-1], "sft", teacher)
    meta = dataclasses.replace(cache.meta, sampler=None)
    with opd_store.create(tmp_path / "samples", meta=meta) as writer:
        for number, (first, last) in enumerate(itertools.pairwise(starts)):
            writer.append(
                Rollout(
                    token_ids=np.ones(last - first + 1, np.uint32),
                    prompt_len=1,
                    sample_id=str(number),
                    reference_logprob=np.minimum(sft[first:last], 0).astype(np.float32),
                    teacher_logprob=np.minimum(scored[first:last], 0).astype(np.float32),
                )
            )
    report = check_consistency(cache, sft_samples=opd_store.open(tmp_path / "samples"))
    assert report.verdict in expected
    assert report.samples_kl.value == pytest.approx((sft - scored).mean(), abs=1e-4)
    assert report.n_rollouts == 60


def test_samples_that_cannot_decide(tmp_path):
    cache = cache_of(tmp_path / "cache")
    few = cache_of(tmp_path / "few", n=10)
    assert check_consistency(cache, sft_samples=few).verdict is Verdict.UNDECIDED
    between = cache_of(tmp_path / "between", n=400)
    assert check_consistency(cache, sft_samples=between).verdict is Verdict.CONSISTENT
    with pytest.raises(InvalidArgumentError, match="score them with that one"):
        check_consistency(cache, sft_samples=cache_of(tmp_path / "other", teacher=OTHER))
    with pytest.raises(InvalidArgumentError, match="its sampler's raw log-probs"):
        check_consistency(
            cache, sft_samples=cache_of(tmp_path / "bare", reference_logprob=None, sampler=None)
        )
