"""Corrections for the mismatch between the policy that sampled the cache and the student being trained.

Axes: N = response tokens. rho_t = pi_theta(a_t) / mu(a_t), mu the sampler as it really drew (processed
log-probs). All weights are detached. Pure functions; no logging, no collectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from opd_store import InvalidArgumentError

# exp(20) is far beyond any useful weight and far below float32's overflow.
_MAX_LOG_RATIO = 20.0


class CorrectionKind(StrEnum):
    """How a token's loss is weighted."""

    NONE = "none"
    """Weight 1: Lightning OPD as published (arXiv 2604.13010)."""
    TOKEN_TIS = "token_tis"
    """min(rho_t, cap): truncated importance sampling (Ionides, J. Comput. Graph. Stat. 17(2), 2008)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionConfig:
    """Which correction, and its one parameter."""

    kind: CorrectionKind = CorrectionKind.NONE
    cap: float = 2.0
    """Largest weight, dimensionless, at least 1. Used by token_tis."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", CorrectionKind(self.kind))
        if not 1.0 <= self.cap < math.inf:
            raise InvalidArgumentError(f"cap: expected at least 1, found {self.cap}")

    @property
    def needs_behaviour(self) -> bool:
        """Whether the cache has to carry behaviour log-probs."""
        return self.kind is not CorrectionKind.NONE


def log_ratio(student_logprob_N: Tensor, behaviour_logprob_N: Tensor) -> Tensor:
    """[N] detached log rho, clamped to +-20; NaN stays NaN."""
    return (student_logprob_N - behaviour_logprob_N).detach().clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def correction_weights(
    config: CorrectionConfig,
    student_logprob: Tensor,
    behaviour_logprob: Tensor | None,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weights of the sampled tokens, and which of them count.

    Args:
        student_logprob: [N] float32, nats, of the sampled token under the current student.
        behaviour_logprob: [N] float32, nats, as processed by the sampler; may be None for kind "none".
        loss_mask: [N] bool.
        cu_seqlens: [S + 1] integers, where each rollout's tokens start; last N. Sequence-level kinds need it.

    Returns:
        weights: [N] float32, detached, 0 where not kept.
        kept: [N] bool; False where masked or where a needed log-prob is not finite. Those tokens leave the
            denominator too.

    Raises:
        InvalidArgumentError: the kind needs behaviour log-probs and there are none.
    """
    if config.kind is CorrectionKind.NONE:
        kept = loss_mask & torch.isfinite(student_logprob.detach())
        return kept.to(torch.float32), kept
    if behaviour_logprob is None:
        raise InvalidArgumentError(
            f"correction {config.kind.value!r} needs behaviour_logprob, which this cache does not carry; "
            "score it again with the sampler's model, or use kind 'none'"
        )
    finite = torch.isfinite(student_logprob.detach()) & torch.isfinite(behaviour_logprob)
    kept = loss_mask & finite
    weights = log_ratio(student_logprob, behaviour_logprob).exp().clamp(max=config.cap)
    return torch.where(kept, weights, 0.0), kept
