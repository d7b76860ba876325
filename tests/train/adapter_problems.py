"""Caches, rows and reference runs for the tests of adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from train.tiny_models import VOCAB

from opd_store import Cache, Rollout
from opd_train import BatchAssembler, DistillConfig, LossConfig, TeacherBatch, Trainer, load_causal_lm

LR = 3e-3
ATOL = 3e-5
"""Adam turns the rounding of a gradient near zero into a part of a whole step, which is LR."""
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "adam_beta2": 0.98,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "seed": 5,
    "remove_unused_columns": False,
}
"""Arguments of a framework's trainer that are also `reference_run`'s."""


def counting_rollouts(n: int) -> list[Rollout]:
    """Rollouts that count up from different starts, of different lengths."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(n):
        start, size, prompt = rng.integers(0, VOCAB), rng.integers(2, 20), int(rng.integers(1, 5))
        tokens = ((start + np.arange(prompt + size)) % VOCAB).astype(np.uint32)
        found.append(Rollout(token_ids=tokens, prompt_len=prompt, sample_id=str(number)))
    return found


class Recording:
    """Put before an adapter's trainer: keeps the rows and the loss of every batch it was given."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        vars(self).setdefault("seen", []).append((inputs["row_ids"].tolist(), float(loss.detach())))
        return loss


class _Replay:
    """The same rows again, read as this project's own trainer reads them."""

    def __init__(self, cache: Cache, batches: list[list[int]]) -> None:
        self._assembler, self._rest = BatchAssembler([cache]), list(batches)

    def next_batch(self) -> TeacherBatch | None:
        return self._assembler.assemble(0, self._rest.pop(0)) if self._rest else None

    def identity(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def reference_run(cache, student, loss: LossConfig, batches, *, accumulate=1):
    """Weights and mean losses of steps on these rows with our own trainer."""
    lm = load_causal_lm(student)
    config = DistillConfig(
        loss=loss,
        steps=len(batches) // accumulate,
        lr=LR,
        weight_decay=0.0,
        grad_clip=COMMON["max_grad_norm"],
        accumulate=accumulate,
    )
    losses: list[float] = []
    trainer = Trainer(
        lm, _Replay(cache, batches), config, on_step=lambda _, metrics: losses.append(metrics["loss"])
    )
    trainer.run()
    return weights(lm.model), losses


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_close(found, expected, atol=ATOL):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
