"""What tests of the trainer share: a run of nine steps, everything about it new each time."""

from __future__ import annotations

import json

import torch
from train.tiny_models import random_rollouts, scored_cache

import opd_store
from opd_train import (
    CacheStream,
    CorrectionConfig,
    CorrectionKind,
    DistillConfig,
    LossConfig,
    Objective,
    Trainer,
    load_causal_lm,
)

TIS = CorrectionConfig(kind=CorrectionKind.TOKEN_TIS, cap=2.0)
CONFIG = DistillConfig(
    loss=LossConfig(objective=Objective.FORWARD_KL, correction=TIS),
    steps=9,
    lr=3e-3,
    warmup_steps=3,
    final_lr_share=0.5,
    accumulate=2,
    save_every=2,
    head_chunk=7,
)
TIMINGS = {"tokens_per_s", "data_share", "seconds"}
"""Metrics that no two runs share."""


class Stop(Exception):
    """The end of a run that a test cuts short."""


def make_cache(path, teacher):
    """24 rollouts with six ranks."""
    return scored_cache(path, teacher, random_rollouts(24, seed=11), topk=6)


def trainer(cache, student, config=CONFIG, out=None, stop=None, source=None, log=None, world=None, **stream):
    """Everything new, as a new process would have it."""
    lm = load_causal_lm(student)
    options = {"batch_tokens": 60, "epochs": None, "seed": config.seed} | stream
    source = CacheStream(opd_store.open(cache.uri), **options) if source is None else source(lm)

    def on_step(step, metrics):
        if log is not None:
            log.append((step, metrics))
        if step == stop:
            raise Stop

    return Trainer(lm, source, config, out=out, on_step=on_step, world=world)


def weights(lm):
    """Copies of a model's tensors, by name."""
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def run(*args, **kwargs):
    """Train; the weights afterwards and the last step's metrics."""
    made = trainer(*args, **kwargs)
    metrics = made.run()
    return weights(made.student), metrics


def assert_close(left, right, atol):
    """The same names, and values that differ by `atol` at most."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_equal(left, right):
    """The same names and bits."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def metrics_of(out):
    """The lines of a run's metrics file, without timings."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]
