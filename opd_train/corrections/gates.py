"""What multiplies or drops tokens beside the importance weight.

Axes: N = response tokens end to end, S = rollouts. Each function takes and returns float64 or bool tensors;
`counted` are the tokens whose log-probs can be used, and log-ratios are 0 elsewhere (see `ratios`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_train.corrections.config import DriftGate, Normalise, StalenessDecay
from opd_train.corrections.ratios import MAX_LOG_RATIO, Groups, blocks_of, bounded_exp, prefix_sum


def within(log_ratio: Tensor, low: float, high: float) -> Tensor:
    """Where low <= ratio <= high."""
    ratio = bounded_exp(log_ratio)
    return (ratio >= low) & (ratio <= high)


def unclipped(log_ratio_N: Tensor, advantage_N: Tensor, low: float, high: float) -> Tensor:
    """[N] bool: where min(r A, clip(r, low, high) A) is r A, so that a gradient passes.

    Source: Schulman et al., arXiv 1707.06347, eq. 7.
    """
    ratio_N = bounded_exp(log_ratio_N)
    return ~(((advantage_N > 0) & (ratio_N > high)) | ((advantage_N < 0) & (ratio_N < low)))


def k2_drift(log_ratio_N: Tensor, counted_N: Tensor, rollouts: Groups) -> Tensor:
    """[S] mean of 1/2 (log rho)^2."""
    return rollouts.mean(log_ratio_N.square() / 2, counted_N)


def k3_drift(log_ratio_N: Tensor, counted_N: Tensor, rollouts: Groups) -> Tensor:
    """[S] mean of rho - 1 - log rho, an unbiased estimate of KL(mu || pi_theta); never negative."""
    return rollouts.mean(log_ratio_N.expm1() - log_ratio_N, counted_N)


def normalised(weight_N: Tensor, kept_N: Tensor, rollouts: Groups, by: Normalise) -> Tensor:
    """[N] weights divided by their mean over the batch; as they are where that mean is zero."""
    if by is Normalise.NONE:
        return weight_N
    if by is Normalise.TOKENS:
        mean = weight_N[kept_N].sum() / kept_N.sum().clamp(min=1)
    else:
        used_S = rollouts.sum(kept_N) > 0
        mean = rollouts.mean(weight_N, kept_N).sum() / used_S.sum().clamp(min=1)
    return torch.where(mean > 0, weight_N / mean, weight_N)


def drift_gate(
    log_ratio_N: Tensor,
    counted_N: Tensor,
    kept_N: Tensor,
    cu_seqlens: Tensor,
    rollouts: Groups,
    gate: DriftGate,
) -> Tensor:
    """[N] factors with mean 1 over kept tokens; small where a block of tokens has drifted as a whole."""
    blocks = blocks_of(cu_seqlens, rollouts, gate.block)
    drift_N = blocks.spread(blocks.mean(log_ratio_N, counted_N)).abs()
    return normalised((-gate.rate * drift_N).exp(), kept_N, rollouts, Normalise.TOKENS)


def opsm(
    log_ratio_N: Tensor, counted_N: Tensor, advantage_N: Tensor, rollouts: Groups, delta: float
) -> Tensor:
    """[N] bool: False for tokens with a negative advantage in rollouts where mean(-log rho) > delta.

    Source: DeepSeek-V3.2's off-policy sequence masking, as in slime. Such tokens stay in the denominator.
    """
    drifted_S = -rollouts.mean(log_ratio_N, counted_N) > delta
    return ~((advantage_N < 0) & rollouts.spread(drifted_S))


def staleness(age_S: Tensor, decay: StalenessDecay) -> tuple[Tensor, Tensor]:
    """[S] factors and [S] bool which rollouts are young enough to be used at all."""
    late_S = (age_S.double() - decay.full_until).clamp(min=0.0)
    return (-decay.rate * late_S).exp(), age_S <= decay.drop_after


def position_weight(
    advantage_N: Tensor, counted_N: Tensor, cu_seqlens: Tensor, rollouts: Groups, gain: float
) -> Tensor:
    """[N] 1 + gain * (1 - share of the rollout's sum of |A| that comes before the token).

    |A| is held to 20 nats; a rollout whose advantages are all zero weighs 1 + gain.

    Source: IW-OPD, arXiv 2606.22600, as in TRL's iw_opd_trainer.
    """
    size_N = torch.where(counted_N, advantage_N.abs().clamp(max=MAX_LOG_RATIO), 0.0)
    total_N = rollouts.spread(rollouts.sum(size_N))
    before_N = prefix_sum(size_N, cu_seqlens, rollouts)
    share_N = torch.where(total_N > 0, before_N / total_N, 0.0).clamp(0.0, 1.0)
    return 1.0 + gain * (1.0 - share_N)
