"""Are the numbers of this cache about these tokens? A look at a sample of rollouts before the first step.

`check_cache` compares what a cache says of itself with the run. Here the log-probs themselves are compared:
with the student's, with each other, and with themselves one token on, since rows that are off by one are the
most common mistake of converters and look like ordinary data.

Axes: N = response tokens of the sample, K = ranks, S = rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from opd_store import Cache, InvalidRolloutError, MismatchError, Rollout
from opd_train.capture.scoring import score_rollouts
from opd_train.corrections import log_ratio
from opd_train.corrections.diagnostics import MartingaleTest, martingale_test, rollout_ratios
from opd_train.models import CausalLM

START_FIELDS = ("behaviour_logprob", "teacher_logprob", "topk_ids")
"""What `check_start` refuses, and what may be named to be ignored."""
Floats = NDArray[np.float64]
_LEAST_Z = 4.0
"""Two-sided chance of 6e-5 in a cache that is right."""
_LEAST_OFF = 0.05
"""A mean ratio that is off by less is the rounding of two engines, whatever its z."""
_CLOSER = 0.8
"""Shifted rows have to be nearer by a fifth, beside being so for certain."""
_SAME_NATS = 0.01
"""How far two stored numbers for one log-prob may lie apart, beside the encoding's error."""
_LEAST_AGREEMENT, _LEAST_FOUND, _LEAST_ROLLOUTS = 0.95, 20, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StartReport:
    """What `check_start` saw."""

    n_rollouts: int
    n_tokens: int
    ratio: MartingaleTest | None
    """Mean ratio of student to sampler, with its standard error over rollouts; None without behaviour
    log-probs."""
    topk_agreement: float | None
    """Where the sampled token is among the cached ranks, the share that have the same log-prob there; None if
    there is too little to compare."""
    notes: tuple[str, ...]
    """What is odd and was not refused, one sentence each."""


@dataclass(frozen=True, slots=True)
class _Finding:
    field: str
    found: str
    remedy: str
    certain: bool = True


def check_start(
    cache: Cache,
    student: CausalLM,
    *,
    n: int = 64,
    batch_tokens: int = 8192,
    allow: Collection[str] = (),
    teacher_used: bool = True,
    behaviour_used: bool = True,
) -> StartReport:
    """Compare a sample of a cache with the student, which has not been trained on it yet.

    The mean ratio of student to sampler is 1 for every student on tokens it was not trained on, so a mean
    that is not says that the stored behaviour log-probs are not the sampler's.

    Args:
        n: rollouts, evenly spread; those longer than the student's context are left out.
        batch_tokens: padded tokens of one forward pass.
        allow: fields of START_FIELDS that are noted instead of refused.
        teacher_used, behaviour_used: whether objective or correction reads the field; what is not read is
            noted instead of refused.

    Raises:
        MismatchError: log-probs that are not of these tokens, or not of this sampler, with what to do.
        InvalidRolloutError: an id outside the student's vocabulary, or a student whose logits are not finite.
        IntegrityError, FormatError: a shard is damaged.
    """
    fits = np.flatnonzero(cache.row_tokens <= student.context)
    rows = [int(fits[index * len(fits) // min(n, len(fits))]) for index in range(min(n, len(fits)))]
    rollouts = [cache[row] for row in rows]
    for row, rollout in zip(rows, rollouts, strict=True):
        _require_known_ids(cache, row, rollout, student)
    student.model.eval()
    try:
        scores = score_rollouts(student, rollouts, batch_tokens=batch_tokens)
    except InvalidRolloutError as error:
        raise InvalidRolloutError(
            f"{student.path}, before the first step, on {cache.uri}: {error}",
            sample_id=error.sample_id,
            field=error.field,
            position=error.position,
        ) from error
    own = [score.logprob.astype(np.float64) for score in scores]
    findings: list[_Finding] = []
    ratio = _ratio(rollouts, own)
    if ratio is not None and abs(ratio.mean - 1) > _LEAST_OFF and abs(ratio.z) > _LEAST_Z:
        findings.append(_explain_ratio(cache, student, ratio))
    agreement, finding = _topk_agreement(rollouts, tolerance=_SAME_NATS + cache.max_error)
    findings += [finding] if finding is not None else []
    findings += _shifted(rollouts, own)

    ignored = {*allow}
    ignored |= set() if behaviour_used else {"behaviour_logprob"}
    ignored |= set() if teacher_used else {"teacher_logprob", "topk_ids"}
    for finding in findings:
        if finding.certain and finding.field not in ignored:
            raise MismatchError(
                f"{cache.uri}: {finding.found}. {finding.remedy}, or pass --allow-mismatch {finding.field}.",
                field=finding.field,
                found=finding.found,
            )
    return StartReport(
        n_rollouts=len(rollouts),
        n_tokens=sum(len(values) for values in own),
        ratio=ratio,
        topk_agreement=agreement,
        notes=tuple(f"{finding.found}. {finding.remedy}." for finding in findings),
    )


def _require_known_ids(cache: Cache, row: int, rollout: Rollout, student: CausalLM) -> None:
    present = [("token_ids", rollout.token_ids)]
    if rollout.topk_ids is not None:
        present.append(("topk_ids", rollout.ragged_topk()[0]))
    for name, ids in present:
        if len(ids) and int(ids.max()) >= student.vocab_size:
            raise InvalidRolloutError(
                f"{cache.uri}: row {row}, {name}: id {ids.max()}, but {student.path} has "
                f"{student.vocab_size} logits; use a cache of the student's own tokenizer and vocabulary",
                field=name,
            )


def _ratio(rollouts: list[Rollout], own: list[Floats]) -> MartingaleTest | None:
    if not rollouts or any(rollout.behaviour_logprob is None for rollout in rollouts):
        return None
    behaviour = np.concatenate([rollout.behaviour_logprob for rollout in rollouts])
    masks = [np.ones(r.response_len, bool) if r.loss_mask is None else r.loss_mask for r in rollouts]
    starts = torch.tensor(np.cumsum([0, *map(len, own)]))
    log_rho_N = log_ratio(
        torch.from_numpy(np.concatenate(own)), torch.from_numpy(behaviour.astype(np.float64))
    )
    return martingale_test(*rollout_ratios(log_rho_N, torch.from_numpy(np.concatenate(masks)), starts))


def _explain_ratio(cache: Cache, student: CausalLM, ratio: MartingaleTest) -> _Finding:
    found = (
        f"behaviour_logprob: the student's probability over the sampler's has mean {ratio.mean:.3f} +- "
        f"{ratio.stderr:.3f} on {ratio.n_tokens} tokens, where 1 is expected"
    )
    sampler, behaviour = cache.meta.sampler, cache.meta.behaviour
    if sampler is not None and not sampler.full_support:
        remedy = (
            "The sampler left tokens out (top-p, top-k or min-p), which no weight repairs: sample at top-p 1"
        )
        return _Finding("behaviour_logprob", found, remedy, certain=False)
    digest = behaviour and behaviour.weights_digest
    if digest not in (None, student.info.weights_digest):
        remedy = "The rollouts are of another model, and the student is far from it: sample from this student"
        return _Finding("behaviour_logprob", found, remedy, certain=False)
    remedy = (
        "The stored numbers are not those of the policy that sampled (temperature, engine or another "
        "checkpoint): store its processed log-probs, or score again with --reference"
    )
    return _Finding("behaviour_logprob", found, remedy)


def _topk_agreement(rollouts: list[Rollout], *, tolerance: float) -> tuple[float | None, _Finding | None]:
    """Share of sampled tokens whose two stored log-probs agree, and what is wrong if they do not."""
    shares = {name: _agreement(rollouts, *shifts, tolerance) for name, shifts in _SHIFTS.items()}
    aligned = shares[_ALIGNED]
    if aligned is None or aligned >= _LEAST_AGREEMENT:
        return aligned, None
    better = [name for name, share in shares.items() if share is not None and share >= _LEAST_AGREEMENT]
    found = (
        f"topk_ids: of the sampled tokens that are among the cached ranks, {aligned:.0%} have the log-prob "
        "that teacher_logprob gives"
    )
    if better:
        return aligned, _Finding(
            "topk_ids", f"{found}; {better[0]}", "Convert the cache again with aligned rows"
        )
    return aligned, _Finding("topk_ids", found, "Score the rollouts again, both in one pass of one teacher")


_ALIGNED = "aligned"
_SHIFTS = {
    _ALIGNED: (0, 0),
    "its row t is of the token before, in all columns of the top-k": (1, 0),
    "its row t is of the next token, in all columns of the top-k": (-1, 0),
    "row t of teacher_logprob is of the token before": (0, 1),
    "row t of teacher_logprob is of the next token": (0, -1),
}
"""How far on the top-k rows, and the log-probs of sampled tokens, are looked for."""


def _agreement(rollouts: list[Rollout], topk_shift: int, shift: int, tolerance: float) -> float | None:
    found = same = 0
    for rollout in rollouts:
        if rollout.topk_ids is None or rollout.topk_logprob is None or rollout.teacher_logprob is None:
            continue
        size = rollout.response_len
        t = np.arange(size)[max(0, -topk_shift, -shift) : size - max(0, topk_shift, shift)]
        hit_NK = rollout.topk_ids[t + topk_shift] == rollout.response_ids[t, None]
        at = hit_NK.any(axis=1)
        in_topk = rollout.topk_logprob[t + topk_shift][at][hit_NK[at]]
        found += int(at.sum())
        same += int((np.abs(in_topk - rollout.teacher_logprob[t + shift][at]) <= tolerance).sum())
    return same / found if found >= _LEAST_FOUND else None


def _shifted(rollouts: list[Rollout], own: list[Floats]) -> Iterator[_Finding]:
    """Columns that are nearer to the student's log-probs one token on or back than where they are."""
    for name in ("teacher_logprob", "behaviour_logprob"):
        pairs = [(mine, getattr(r, name)) for mine, r in zip(own, rollouts, strict=True) if len(mine) > 1]
        if len(pairs) < _LEAST_ROLLOUTS or any(theirs is None for _, theirs in pairs):
            continue
        for shift, what in ((1, "token before"), (-1, "next token")):
            here, moved = slice(0, -1), slice(1, None)
            if shift < 0:
                here, moved = moved, here
            aligned = np.array([np.abs(mine[here] - theirs[here]).mean() for mine, theirs in pairs])
            other = np.array([np.abs(mine[here] - theirs[moved]).mean() for mine, theirs in pairs])
            gain = aligned - other
            stderr = gain.std(ddof=1) / math.sqrt(len(gain))
            if other.mean() < _CLOSER * aligned.mean() and gain.mean() > _LEAST_Z * stderr:
                found = (
                    f"{name}: off by one: row t fits the {what} better (mean distance to the student "
                    f"{other.mean():.3f} nats) than its own ({aligned.mean():.3f})"
                )
                field = "teacher_logprob" if name.startswith("teacher") else "behaviour_logprob"
                yield _Finding(
                    field, found, "Convert the cache again: row t is of token t given those before it"
                )
