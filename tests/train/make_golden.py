"""Write golden/loss_curve.json: a 20-step run on the CPU. Run it by hand when the mathematics changes.

PYTHONPATH=.:tests python tests/train/make_golden.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from train.tiny_models import VOCAB, random_rollouts, save_tiny

from opd_store import Rollout
from opd_train import (
    CorrectionConfig,
    CorrectionKind,
    DistillConfig,
    LossConfig,
    TeacherBatch,
    Trainer,
    collate,
    load_causal_lm,
    score_rollouts,
)
from opd_train.capture.scoring import with_teacher

GOLDEN = Path(__file__).parent / "golden" / "loss_curve.json"
STEPS = 20
OBJECTIVES = ("lightning", "forward_kl", "reverse_kl", "cross_entropy")
WATCHED = ("loss", "grad_norm", "log_gap", "ess", "capped", "forward_kl", "reverse_kl", "top1")


def build_models(root: Path) -> tuple[Path, Path]:
    """A teacher and a student whose weights come from numbers that every release of torch computes alike."""
    paths = save_tiny(root / "teacher"), save_tiny(root / "student")
    for scale, path in zip((0.37, 0.73), paths, strict=True):
        lm = load_causal_lm(path)
        for number, parameter in enumerate(lm.model.parameters()):
            at = torch.arange(parameter.numel(), dtype=torch.float64) + 17 * number
            value = (at * scale + at * at * 0.01).sin() * 0.5 + (parameter.ndim == 1)
            parameter.data.copy_(value.view_as(parameter))
        lm.model.save_pretrained(path)
    return paths


class Listed:
    """Batches in a fixed order. That of a cache depends on its digest, and so on versions and rounding."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        self._rollouts, self._next = rollouts, 0

    def next_batch(self) -> TeacherBatch:
        """The next five rollouts, round and round."""
        rows = [(self._next + i) % len(self._rollouts) for i in range(5)]
        self._next += 5
        return collate([self._rollouts[row] for row in rows], vocab_size=VOCAB, row_ids=rows)

    def identity(self) -> dict[str, Any]:
        """Not compared in these runs."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Not saved in these runs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Not loaded in these runs."""


def curves(root: Path) -> dict[str, list[dict[str, float]]]:
    """Metrics of each step, by objective."""
    teacher, student = build_models(root)
    lm, rollouts = load_causal_lm(teacher), random_rollouts(40, seed=3)
    scores = score_rollouts(lm, rollouts, topk=5)
    scored = [with_teacher(rollout, score) for rollout, score in zip(rollouts, scores, strict=True)]
    found: dict[str, list[dict[str, float]]] = {}
    for objective in OBJECTIVES:
        rows: list[dict[str, float]] = []

        def log(_: int, metrics: dict[str, float], rows: list[dict[str, float]] = rows) -> None:
            rows.append({name: metrics[name] for name in WATCHED if name in metrics})

        config = DistillConfig(
            loss=LossConfig(
                objective=objective,  # type: ignore[arg-type]
                correction=CorrectionConfig(kind=CorrectionKind.TOKEN_TIS, cap=2.0),
            ),
            steps=STEPS,
            lr=3e-3,
            warmup_steps=4,
            accumulate=2,
        )
        Trainer(load_causal_lm(student), Listed(scored), config, on_step=log).run()
        found[objective] = rows
    return found


def main() -> None:
    """Write the golden file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        content = {
            "made_by": "tests/train/make_golden.py",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "curves": curves(Path(root)),
        }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
    print(GOLDEN)


if __name__ == "__main__":
    main()
