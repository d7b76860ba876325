"""One optimizer step: the learning rate, the mean gradient and its norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from opd_train.training.config import DistillConfig
from opd_train.training.distributed import whole


def learning_rate(config: DistillConfig, step: int) -> float:
    """The rate of step `step`, counted from 0."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (config.steps - step) / max(1, config.steps - config.warmup_steps)
    return config.lr * warm * (config.final_lr_share + (1 - config.final_lr_share) * min(1.0, left))


def make_optimizer(parameters: Sequence[nn.Parameter], config: DistillConfig) -> torch.optim.Optimizer:
    """AdamW over all of them."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def clip_mean_gradient(parameters: Sequence[nn.Parameter], n_kept: float, limit: float) -> float:
    """Turn summed gradients into those of the mean over `n_kept` tokens, and cap their norm.

    One denominator for the whole step and all ranks, so that accumulating equals one large batch.

    Args:
        limit: largest norm; 0 for none.

    Returns:
        The norm over all ranks' shards, before it was capped. Not finite: nothing was capped to any use.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(max(n_kept, 1.0))
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return float(whole(norm))
