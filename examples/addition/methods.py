"""The compared ways to distil, each a function of a seed, run in a worker process with one thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import task
import torch

import opd_store
from opd_store import Rollout, SamplerInfo
from opd_train import (
    CacheStream,
    CausalLM,
    CorrectionConfig,
    CorrectionKind,
    DistillConfig,
    LiveSource,
    LossConfig,
    Objective,
    Prompt,
    Stopwatch,
    Trainer,
    check_cache,
    read_prompts,
    sample_rollouts,
    sequence_kl,
)

STEPS = 150
BATCH = 128
N_OPD = STEPS * BATCH // 3
"""Rollouts in a cache: each is trained on three times."""
LR = 2e-4
TOPK = 8
CURVE_EVERY = 50
CURVE_PROBLEMS, FINAL_PROBLEMS, KL_PROBLEMS = 500, 2000, 500
"""Every point of a curve is on the same first problems; the table's accuracy is on all of them."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    name: str
    objective: Objective
    correction: CorrectionKind = CorrectionKind.NONE
    teacher: str = "teacher"
    """Which teacher scored the cache, or is live."""
    live: bool = False


METHODS = (
    Method(name="live OPD, sampled token", objective=Objective.LIGHTNING, live=True),
    Method(name="live OPD, top-8 forward KL", objective=Objective.FORWARD_KL, live=True),
    Method(name="Lightning, w = 1", objective=Objective.LIGHTNING),
    Method(
        name="Lightning, truncated weights",
        objective=Objective.LIGHTNING,
        correction=CorrectionKind.TOKEN_TIS,
    ),
    Method(name="top-8 with tail, forward KL", objective=Objective.FORWARD_KL),
    Method(name="top-8 with tail, reverse KL", objective=Objective.REVERSE_KL),
    Method(name="top-8 with tail, JSD (default)", objective=Objective.JSD),
    Method(name="inconsistent teacher, w = 1", objective=Objective.LIGHTNING, teacher="other-teacher"),
    Method(name="inconsistent teacher, forward KL", objective=Objective.FORWARD_KL, teacher="other-teacher"),
)


@dataclass
class Result:
    """What one method gave for one seed."""

    method: str
    seed: int
    n_correct: int = 0
    n_problems: int = 0
    kl: float = 0.0
    """KL(student || teacher) of whole responses, nats, on samples of the student."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By activity. Offline, sampling and scoring of the cache count in full."""
    seconds_before: float = 0.0
    """What of them was spent before the first step."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Accuracy and KL against steps and seconds."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """The trainer's own, each step."""


def greedy(lm: CausalLM) -> SamplerInfo:
    """Settings of the demo's sampler: temperature 0."""
    return SamplerInfo(
        temperature=0.0,
        max_new_tokens=task.MAX_RESPONSE_TOKENS + 1,
        stop_token_ids=lm.stop_token_ids,
        seed=0,
    )


def judge(lm: CausalLM, prompts: Sequence[Prompt]) -> list[bool]:
    """Which problems are answered right by greedy decoding; only the final number counts."""
    rollouts = sample_rollouts(lm, prompts, greedy(lm), batch_rows=512)
    texts = lm.tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    return [task.answer_of(text) == int(str(r.label)) for r, text in zip(rollouts, texts, strict=True)]


def distance(lm: CausalLM, teacher: CausalLM, prompts: Sequence[Prompt]) -> float:
    """KL(student || teacher) of whole responses, on one sample per prompt."""
    sampler = SamplerInfo(
        max_new_tokens=task.MAX_RESPONSE_TOKENS + 1, stop_token_ids=lm.stop_token_ids, seed=1
    )
    rollouts: list[Rollout] = sample_rollouts(lm, prompts, sampler, batch_rows=512)
    return sequence_kl(lm, teacher, rollouts, batch_tokens=32768).mean


def evaluate_student(root: Path) -> Result:
    """The starting point of every method."""
    torch.set_num_threads(1)
    student, teacher = models.load(root / "student"), models.load(root / "teacher")
    result = Result("SFT student", 0)
    measure(result, 0, 0.0, student, teacher, read_prompts(root / "test.jsonl", student))
    return result


def measure(
    result: Result, step: int, seconds: float, lm: CausalLM, teacher: CausalLM, test: Sequence[Prompt]
) -> None:
    """Add a point to the curve; at the start and the end also the figures of the table."""
    lm.model.eval()
    right = judge(lm, test if step in (0, STEPS) else test[:CURVE_PROBLEMS])
    result.n_correct, result.n_problems = sum(right), len(right)
    result.kl = distance(lm, teacher, test[:KL_PROBLEMS])
    accuracy = sum(right[:CURVE_PROBLEMS]) / CURVE_PROBLEMS
    result.curve.append({"step": step, "seconds": seconds, "accuracy": accuracy, "kl": result.kl})


def run_method(root: Path, method: Method, seed: int, cache_seconds: dict[str, float]) -> Result:
    """Train one student by one method and measure it."""
    torch.set_num_threads(1)
    student, reference = models.load(root / "student"), models.load(root / "teacher")
    test = read_prompts(root / "test.jsonl", student)
    stopwatch = Stopwatch()
    config = DistillConfig(
        loss=LossConfig(objective=method.objective, correction=CorrectionConfig(kind=method.correction)),
        steps=STEPS,
        lr=LR,
        weight_decay=0.0,
        seed=seed,
    )
    if method.live:
        source: Any = LiveSource(
            student,
            models.load(root / method.teacher),
            read_prompts(root / "prompts.jsonl", student),
            SamplerInfo(
                max_new_tokens=task.MAX_RESPONSE_TOKENS + 1, stop_token_ids=student.stop_token_ids, seed=seed
            ),
            batch_rollouts=BATCH,
            topk=TOPK if method.objective.needs_topk else 0,
            stopwatch=stopwatch,
        )
    else:
        cache = opd_store.open(root / f"cache-{method.teacher}-{seed}")
        # The inconsistent teacher is refused unless this field is named; the demo shows the refusal.
        allow = ("teacher_consistency",) if method.teacher != "teacher" else ()
        check_cache(cache.meta, student, allow=allow)
        ranks = TOPK if method.objective.needs_topk else 0
        source = CacheStream(cache, batch_rollouts=BATCH, seed=seed, ranks=ranks, epochs=None)
        stopwatch.seconds.update(cache_seconds)

    result = Result(method.name, seed)
    result.seconds_before = sum(stopwatch.seconds.values())

    def on_step(step: int, metrics: dict[str, float]) -> None:
        result.metrics.append({"step": step, **metrics})
        if step % CURVE_EVERY == 0:
            measure(result, step, sum(stopwatch.seconds.values()), student, reference, test)

    Trainer(student, source, config, stopwatch=stopwatch, on_step=on_step).run()
    result.seconds = dict(stopwatch.seconds)
    return result
