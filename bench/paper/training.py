"""One training and what it gave; results are files, so that a stopped program goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

import opd_store
from opd_store import MismatchError, OpdError, SamplerInfo
from opd_train import (
    CacheStream,
    CausalLM,
    DistillConfig,
    LiveSource,
    Stopwatch,
    Trainer,
    check_cache,
    sample_rollouts,
    sequence_kl,
)
from paper import task
from paper.methods import BATCH, STEPS, Method
from paper.world import World, accuracy

N_KL = 500


def result_path(root: Path, method: Method, seed: int) -> Path:
    """Where the result of a training lies."""
    return root / "results" / f"{method.key}-{seed}.json"


def start_path(root: Path, student: str, seed: int) -> Path:
    """Where the figures of a student before distillation lie."""
    return root / "results" / f"start-{student}-{seed}.json"


def measure_start(root: Path, student: str, seed: int) -> None:
    """What a student can before it is distilled."""
    path = start_path(root, student, seed)
    if not path.exists():
        world = World(root, seed)
        lm = world.model(student)
        _write(path, _measured(world, lm, student.partition("-of-")[2]))


def run(root: Path, method: Method, seed: int) -> None:
    """Train one student by one method and measure it, unless that was done before."""
    path = result_path(root, method, seed)
    if path.exists():
        return
    torch.set_num_threads(1)
    world = World(root, seed, method.pair)
    student = world.model(method.student)
    stopwatch = Stopwatch()
    refused = False
    if method.live:
        source: Any = live_source(world, method, student, stopwatch)
    else:
        uri, seconds = world.cache(method.student, method.teacher, method.sampler)
        cache = opd_store.open(uri)
        try:
            check_cache(cache.meta, student)
        except MismatchError as error:
            if error.field != "teacher_consistency":
                raise
            refused = True
        stopwatch.seconds.update(seconds)
        source = CacheStream(cache, batch_rollouts=BATCH, seed=seed, ranks=method.ranks, epochs=None)
    config = DistillConfig(loss=method.loss, steps=STEPS, lr=method.lr, weight_decay=0.0, seed=seed)
    watched: list[dict[str, float]] = []
    trainer = Trainer(
        student, source, config, stopwatch=stopwatch, on_step=lambda _, metrics: watched.append(metrics)
    )
    failed = None
    try:
        trainer.run()
    except OpdError as error:
        failed = str(error)
    student.model.eval()
    found = _measured(world, student, method.teacher) | {
        "seconds": dict(stopwatch.seconds),
        "refused": refused,
        "failed": failed,
        "metrics": watched[:: max(1, STEPS // 25)],
    }
    _write(path, {"method": dataclasses.asdict(method)} | found)


def live_source(world: World, method: Method, student: CausalLM, stopwatch: Stopwatch) -> LiveSource:
    """Fresh rollouts and a teacher in memory."""
    sampler = SamplerInfo(
        max_new_tokens=task.MAX_RESPONSE_TOKENS + 1, stop_token_ids=student.stop_token_ids, seed=world.seed
    )
    return LiveSource(
        student,
        world.model(method.teacher),
        world.prompts("opd", student),
        sampler,
        batch_rollouts=BATCH,
        topk=method.ranks,
        stopwatch=stopwatch,
    )


def _measured(world: World, lm: CausalLM, teacher: str) -> dict[str, Any]:
    prompts = world.prompts("test", lm)
    sampler = SamplerInfo(
        max_new_tokens=task.MAX_RESPONSE_TOKENS + 1, stop_token_ids=lm.stop_token_ids, seed=1
    )
    rollouts = sample_rollouts(lm, prompts[:N_KL], sampler, batch_rows=512)
    kl = sequence_kl(lm, world.model(teacher), rollouts, batch_tokens=32768).mean
    return {"accuracy": accuracy(lm, prompts), "n_problems": len(prompts), "kl": kl}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n")
    partial.rename(path)
