"""Did the student learn from the teacher that scored this cache? An estimate from log-probs, without any
model.

A student that was fitted to samples of a teacher is *calibrated* against it: where it gives a token
probability 0.95, the teacher does so too, on average. This holds for a weak student too, which is only sure
less often. Another teacher finds some of the tokens that the student is sure of nearly impossible, since it
would have written something else. `bench/consistency.py` calibrates the thresholds.

Axes: N = response tokens of all rollouts, S = rollouts, B = resamples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store.cache import Cache
from opd_store.errors import InvalidArgumentError
from opd_store.rollout import Rollout

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
SURE = 0.9
"""The student is sure of a token that it gives at least this probability."""
SHOCK = 0.1
"""A shock: the student is sure, and the teacher gives the token less than this."""
CONSISTENT_BELOW, INCONSISTENT_ABOVE = 0.015, 0.03
"""Of the gap on sure tokens. Measured on the addition demo: its own teacher -0.013 to 0.008, another 0.055 to
0.29."""
TOO_UNSURE, LEAST_SURE_SHARE = -0.025, 0.3
"""A student with a lower gap, or sure of fewer tokens, is too little trained for its calibration to say
anything."""
SAMPLES_KL = 0.02
"""Nats a token between the SFT teacher and the scoring teacher, on samples of the first. The same model gives
0 up to the rounding of its engine, models trained alike up to 0.01, another dialect at least 0.14."""
_LEAST_ROLLOUTS = 30
_RESAMPLES = 1000


class Verdict(StrEnum):
    """What the numbers say."""

    CONSISTENT = "likely consistent"
    INCONSISTENT = "likely inconsistent"
    UNDECIDED = "cannot tell"


@dataclass(frozen=True, slots=True)
class Interval:
    """A statistic with its 95 % bootstrap interval over rollouts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsistencyReport:
    """What `check_consistency` found."""

    verdict: Verdict
    reason: str
    """One sentence."""
    n_rollouts: int = 0
    n_tokens: int = 0
    n_sure: int = 0
    """Tokens that the student is sure of."""
    sure_gap: Interval | None = None
    """Mean over these of the student's probability less the teacher's."""
    shocks: Interval | None = None
    """Share of these that the teacher finds nearly impossible."""
    kl: Interval | None = None
    """Mean log-ratio of student to teacher, nats a token: KL(student || teacher) if sampled at temperature
    1."""
    samples_kl: Interval | None = None
    """Nats a token, from the SFT teacher to the scoring teacher; None without samples of the first."""


def check_consistency(
    cache: Cache, *, sft_samples: Cache | None = None, max_rollouts: int = 2000, seed: int = 0
) -> ConsistencyReport:
    """Estimate whether the SFT teacher was the scoring teacher.

    It cannot tell apart two teachers that agree on these rollouts. A student that is sure and wrong, as one
    trained long on few samples may be, looks inconsistent with its own teacher. `teacher_consistency`
    compares weight digests, and is the better answer where both are known.

    Args:
        cache: rollouts of the student with its own raw log-probs (`reference_logprob`, or `behaviour_logprob`
            where the sampler was at temperature 1 and left nothing out), scored by the teacher in question.
        sft_samples: rollouts of the SFT teacher with its own log-probs, such as the data of the fine-tuning,
            scored by the same teacher as `cache`. Then these decide: they need no student.
        max_rollouts: read at most so many, evenly spread.
        seed: of the resamples.

    Raises:
        InvalidArgumentError: `sft_samples` were scored by another teacher, or lack log-probs.
        IntegrityError, FormatError: a shard is damaged.
    """
    rows = _spread(len(cache), max_rollouts)
    pairs = list(_pairs(cache, rows))
    if not pairs:
        reason = "no rollout has both the student's raw log-probs and the teacher's; score with --reference"
        report = ConsistencyReport(verdict=Verdict.UNDECIDED, reason=reason)
    else:
        report = compare_policies(*_joined(pairs), seed=seed)
    if sft_samples is None:
        return report
    teachers = [c.meta.teacher and c.meta.teacher.weights_digest for c in (cache, sft_samples)]
    if None in teachers or teachers[0] != teachers[1]:
        raise InvalidArgumentError(
            f"{sft_samples.uri}: expected rollouts scored by the teacher of {cache.uri}, {teachers[0]}, "
            f"found {teachers[1]}; score them with that one"
        )
    pairs = list(_pairs(sft_samples, _spread(len(sft_samples), max_rollouts)))
    if not pairs:
        raise InvalidArgumentError(
            f"{sft_samples.uri}: no rollout has both its sampler's raw log-probs and the teacher's"
        )
    return _with_samples(report, *_joined(pairs), seed=seed)


def compare_policies(
    student: Floats, teacher: Floats, starts: NDArray[np.int64], *, seed: int = 0
) -> ConsistencyReport:
    """The statistics and the verdict, from log-probs of sampled tokens.

    Args:
        student, teacher: [N] nats, raw, at temperature 1.
        starts: [S + 1] where each rollout begins; last N.
        seed: of the resamples.
    """
    n_rollouts = len(starts) - 1
    rollout = np.repeat(np.arange(n_rollouts), np.diff(starts))
    p_student, p_teacher = np.exp(student), np.exp(teacher)
    sure = p_student >= SURE

    def mean(values: Floats, counted: Bools) -> Interval | None:
        return _interval(
            _sums(rollout, values * counted, n_rollouts), _sums(rollout, counted, n_rollouts), seed
        )

    gap = mean(p_student - p_teacher, sure)
    shocks = mean((p_teacher < SHOCK).astype(np.float64), sure)
    kl = mean(student - teacher, np.ones(len(student), bool))
    verdict, reason = _judge(gap, shocks, n_rollouts, float(sure.mean()) if len(sure) else 0.0)
    return ConsistencyReport(
        verdict=verdict,
        reason=reason,
        n_rollouts=n_rollouts,
        n_tokens=len(student),
        n_sure=int(sure.sum()),
        sure_gap=gap,
        shocks=shocks,
        kl=kl,
    )


def _judge(
    gap: Interval | None, shocks: Interval | None, n_rollouts: int, sure_share: float
) -> tuple[Verdict, str]:
    if n_rollouts < _LEAST_ROLLOUTS or gap is None or shocks is None:
        return (
            Verdict.UNDECIDED,
            f"{n_rollouts} rollouts with log-probs of both; {_LEAST_ROLLOUTS} are needed",
        )
    if sure_share < LEAST_SURE_SHARE or gap.low < TOO_UNSURE:
        return (
            Verdict.UNDECIDED,
            f"the student is sure of {sure_share:.0%} of the tokens, too few to be calibrated",
        )
    if gap.high < CONSISTENT_BELOW:
        return Verdict.CONSISTENT, "where the student is sure, this teacher agrees"
    if gap.low > INCONSISTENT_ABOVE:
        return Verdict.INCONSISTENT, (
            f"where the student is sure, this teacher gives {gap.value:.1%} less, and finds "
            f"{shocks.value:.1%} of the tokens nearly impossible"
        )
    between = f"{CONSISTENT_BELOW} (consistent) and {INCONSISTENT_ABOVE} (inconsistent)"
    return Verdict.UNDECIDED, f"the gap on sure tokens lies between {between}, or is not known well enough"


def _with_samples(
    report: ConsistencyReport, sft: Floats, teacher: Floats, starts: NDArray[np.int64], *, seed: int
) -> ConsistencyReport:
    """The report with the verdict of the SFT teacher's own samples."""
    size = np.diff(starts).astype(np.float64)
    rollout = np.repeat(np.arange(len(size)), np.diff(starts))
    kl = _interval(_sums(rollout, sft - teacher, len(size)), size, seed)
    if kl is None or len(size) < _LEAST_ROLLOUTS:
        verdict, reason = (
            Verdict.UNDECIDED,
            f"{len(size)} samples of the SFT teacher; {_LEAST_ROLLOUTS} are needed",
        )
    elif kl.high < SAMPLES_KL:
        verdict, reason = Verdict.CONSISTENT, "on its own samples the SFT teacher and this one agree"
    elif kl.low > SAMPLES_KL:
        verdict = Verdict.INCONSISTENT
        reason = f"on its own samples the SFT teacher is {kl.value:.3f} nats a token from this one"
    else:
        verdict, reason = (
            Verdict.UNDECIDED,
            f"on its samples the SFT teacher is {kl} nats a token from this one",
        )
    return dataclasses.replace(report, verdict=verdict, reason=reason, samples_kl=kl)


def _sums(rollout_N: NDArray[np.int64], values_N: NDArray[Any], n_rollouts: int) -> Floats:
    """[S] over the tokens of each rollout."""
    return np.bincount(rollout_N, values_N, minlength=n_rollouts).astype(np.float64)


def _interval(sums_S: Floats, counts_S: Floats, seed: int) -> Interval | None:
    """Bootstrap of a ratio of sums over rollouts, since tokens of one are not independent; None if nothing
    counts.

    Source: Davison & Hinkley, Bootstrap Methods and their Application, 1997, section 2.4.
    """
    if not counts_S.sum():
        return None
    rng = np.random.default_rng(seed)
    size = len(sums_S)
    drawn_BS = rng.multinomial(size, np.full(size, 1 / size), size=_RESAMPLES)
    counts_B = drawn_BS @ counts_S
    ratios_B = (drawn_BS @ sums_S)[counts_B > 0] / counts_B[counts_B > 0]
    low, high = np.quantile(ratios_B, [0.025, 0.975])
    return Interval(float(sums_S.sum() / counts_S.sum()), float(low), float(high))


def _spread(n_rows: int, limit: int) -> list[int]:
    """At most `limit` row numbers, evenly spread, rising."""
    n = min(n_rows, limit)
    return [index * n_rows // n for index in range(n)]


def _pairs(cache: Cache, rows: list[int]) -> Iterator[tuple[Floats, Floats]]:
    """Log-probs of the sampler, raw, and of the teacher, of the unmasked tokens of each rollout that has
    both."""
    sampler = cache.meta.sampler
    is_raw = sampler is not None and sampler.temperature == 1.0 and sampler.full_support
    columns = ("teacher_logprob", "reference_logprob", "behaviour_logprob", "loss_mask")
    for row in rows:
        rollout = cache.rollout(row, ranks=0, columns=columns)
        raw = _raw(rollout, is_raw=is_raw)
        if raw is None or rollout.teacher_logprob is None:
            continue
        mask = slice(None) if rollout.loss_mask is None else rollout.loss_mask
        yield raw[mask].astype(np.float64), rollout.teacher_logprob[mask].astype(np.float64)


def _raw(rollout: Rollout, *, is_raw: bool) -> NDArray[np.float32] | None:
    if rollout.reference_logprob is not None:
        return rollout.reference_logprob
    return rollout.behaviour_logprob if is_raw else None


def _joined(pairs: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats, NDArray[np.int64]]:
    starts = np.cumsum([0, *(len(one) for one, _ in pairs)])
    one, other = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return one, other, starts
