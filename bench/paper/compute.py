"""Seconds of live and offline distillation, one after the other in one process."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path

import torch

import opd_store
from opd_train import CacheStream, DistillConfig, Stopwatch, Trainer
from paper.methods import BATCH, LR, STEPS, Method
from paper.training import live_source
from paper.world import World

ACTIVITIES = ("sampling", "teacher", "student", "data")


def _seconds(root: Path, method: Method, teacher_hidden: int | None) -> dict[str, float]:
    """Of one run, by activity; offline from nothing, the cache included."""
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory), 0)
        shutil.copytree(root / "seed-0" / method.student, world.path / method.student)
        if teacher_hidden is None:
            shutil.copytree(root / "seed-0" / method.teacher, world.path / method.teacher)
        else:
            world.create(
                method.teacher,
                hidden=teacher_hidden,
                intermediate=3 * teacher_hidden,
                heads=teacher_hidden // 32,
                seed=0,
            )
        shutil.copy(root / "seed-0" / "opd.jsonl", world.path)
        student = world.model(method.student)
        if method.live:
            source = live_source(world, method, student, stopwatch)
        else:
            uri, seconds = world.cache(method.student, method.teacher, method.sampler)
            stopwatch.seconds.update(seconds)
            cache = opd_store.open(uri)
            source = CacheStream(cache, batch_rollouts=BATCH, seed=0, ranks=method.ranks, epochs=None)
        config = DistillConfig(loss=method.loss, steps=STEPS, lr=LR, weight_decay=0.0)
        Trainer(student, source, config, stopwatch=stopwatch).run()
    return {name: stopwatch.seconds.get(name, 0.0) for name in ACTIVITIES}


def compute_table(
    root: Path, live: Method, offline: Method, *, teacher_hidden: int | None = None, n: int = 3
) -> tuple[tuple[str, ...], list[tuple[str, ...]], float]:
    """Columns and rows of seconds, medians of rounds in turn, and the median ratio of live to offline.

    Args:
        teacher_hidden: width of a teacher to take instead, with random weights, which cost what others do.
    """
    torch.set_num_threads(1)
    found = [
        (_seconds(root, live, teacher_hidden), _seconds(root, offline, teacher_hidden)) for _ in range(n)
    ]
    rows = []
    for name, place in ((live.name, 0), (f"offline: {offline.name}", 1)):
        medians = [statistics.median(pair[place][activity] for pair in found) for activity in ACTIVITIES]
        rows.append((name, *(f"{value:.1f}" for value in medians), f"{sum(medians):.1f}"))
    ratio = statistics.median(sum(a.values()) / sum(b.values()) for a, b in found)
    return ("seconds", *ACTIVITIES, "all"), rows, ratio
