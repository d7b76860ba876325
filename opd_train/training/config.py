"""What a training run is told."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from opd_store import InvalidArgumentError
from opd_train.corrections import CorrectionKind
from opd_train.objective.loss_config import LossConfig

_RERUN_MAY_CHANGE = ("save_every", "head_chunk", "gradient_checkpointing")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters instead of all weights; needs `peft`."""

    rank: int
    alpha: int
    """The adapters' product counts alpha / rank times."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the layers that get one, such as "q_proj"; () for every linear layer but the head.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        for name in ("rank", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidArgumentError(f"lora {name}: expected more than 0, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """One training run. Two runs with equal configs, students and sources end in equal weights."""

    loss: LossConfig
    steps: int
    """Optimizer steps."""
    lr: float = 2e-6
    """Peak learning rate (arXiv 2604.13010, table 6, which keeps it constant)."""
    warmup_steps: int = 0
    final_lr_share: float = 1.0
    """After warm-up the rate falls linearly to this share of its peak at the end; 1 keeps it constant."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    accumulate: int = 1
    """Batches per step and rank; their tokens share one denominator."""
    proximal_every: int = 1
    """Steps between refreshes of the proximal policy; above 1 only for kind ppo, which has one. The batches
    of so many steps are then drawn ahead and scored by the student as it is; 1 takes the student itself."""
    head_chunk: int = 1024
    """Positions whose logits exist at a time."""
    gradient_checkpointing: bool = False
    autocast: bool = False
    """bfloat16 forward and backward over float32 weights; for GPUs."""
    lora: LoraConfig | None = None
    """Train adapters only; None trains all weights."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves only the end. A multiple of `proximal_every`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "accumulate", "head_chunk", "proximal_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidArgumentError(f"{name}: expected more than 0, found {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "grad_clip", "save_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidArgumentError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        if not all(0 <= share <= 1 for share in (self.final_lr_share, *self.betas)):
            raise InvalidArgumentError(
                f"final_lr_share and betas: expected 0..1, found {self.final_lr_share} and {self.betas}"
            )
        if not 0 <= self.seed < 1 << 63:
            raise InvalidArgumentError(f"seed: expected 0..2**63 - 1, found {self.seed}")
        kind = self.loss.correction.kind
        if self.proximal_every > 1 and kind is not CorrectionKind.PPO:
            raise InvalidArgumentError(
                f"proximal_every: expected 1, since correction {kind.value!r} has no proximal policy, found "
                f"{self.proximal_every}; use kind 'ppo', or leave it out"
            )
        if self.save_every % self.proximal_every:
            raise InvalidArgumentError(
                f"save_every: expected a multiple of proximal_every {self.proximal_every}, "
                f"found {self.save_every}; a checkpoint between two refreshes could not be resumed exactly"
            )

    def to_json(self) -> dict[str, Any]:
        """What a run has to agree in to go on from a checkpoint; a rerun may change how often it saves and
        how it trades time for memory."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _RERUN_MAY_CHANGE}
