"""How far the student is from the policy that sampled, as numbers to put alarms on.

Axes: N = response tokens end to end, S = rollouts. `log_ratio_N` is `log_ratio(student, behaviour)`; tokens
where it is NaN are left out. Every figure is a plain float. Sums of one batch are not enough for a verdict:
`rollout_ratios` of many batches, or ranks, can be concatenated before `martingale_test`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_train.corrections.ratios import bounded_exp, rollouts_of


def effective_share(weight_N: Tensor, kept_N: Tensor) -> float:
    """Effective sample size as a share of the kept tokens, (sum w)^2 / (n sum w^2): 1 for equal weights.

    0 where nothing is kept or all weights are 0.

    Source: Kong, "A note on importance sampling using standardized weights", TR 348, Chicago, 1992.
    """
    weight = weight_N[kept_N].double()
    squares = weight.square().sum().item()
    return weight.sum().item() ** 2 / (len(weight) * squares) if squares > 0 else 0.0


def chi_square(log_ratio_N: Tensor, mask_N: Tensor) -> float:
    """mean(rho^2) - 1 over masked-in tokens: an estimate of chi^2(pi_theta, mu) per token.

    It bounds how wrong a gradient without weights is (arXiv 2604.13010, thm 3.5). NaN without tokens.
    """
    rho = bounded_exp(log_ratio_N[_counted(log_ratio_N, mask_N)].double())
    return rho.square().mean().item() - 1.0 if len(rho) else math.nan


def rollout_ratios(log_ratio_N: Tensor, mask_N: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """[S] sum of rho over each rollout's tokens that count, and [S] how many these are; both float64."""
    counted_N = _counted(log_ratio_N, mask_N)
    rollouts = rollouts_of(cu_seqlens, len(log_ratio_N))
    rho_N = torch.where(counted_N, bounded_exp(log_ratio_N.double()), 0.0)
    return rollouts.sum(rho_N), rollouts.sum(counted_N)


def _counted(log_ratio_N: Tensor, mask_N: Tensor) -> Tensor:
    return mask_N & ~torch.isnan(log_ratio_N)


@dataclass(frozen=True, slots=True)
class MartingaleTest:
    """Whether mean rho is 1."""

    mean: float
    """Mean rho over tokens."""
    stderr: float
    """Of the mean, with rollouts as clusters; infinite with fewer than two rollouts."""
    z: float
    """(mean - 1) / stderr: about standard normal if the behaviour log-probs are right."""
    n_tokens: int
    n_rollouts: int
    """Rollouts with at least one token."""


def martingale_test(ratio_sum_S: Tensor, tokens_S: Tensor) -> MartingaleTest:
    """Test that the mean ratio is 1, as it is for any student on tokens it was not trained on.

    E_{a ~ mu}[pi_theta(a) / mu(a)] = 1 at every state. A mean off 1 on held-out rollouts says that the cached
    behaviour log-probs are not those of the policy that really sampled (temperature, top-p, engine), or that
    tokens were changed. On tokens that were trained on, a mean below 1 is ordinary drift.

    With very many tokens, z also sees the rounding of two engines, which moves the mean by half their squared
    difference: an alarm wants a large z and a mean that is off by more than that.

    Args:
        ratio_sum_S, tokens_S: from `rollout_ratios`, of any number of batches.

    Source: ratio estimator with cluster-robust variance, Cochran, Sampling Techniques, 3rd ed., ch. 6.
    """
    used_S = tokens_S > 0
    ratio_sum_S, tokens_S = ratio_sum_S[used_S].double(), tokens_S[used_S].double()
    n_rollouts, n_tokens = len(tokens_S), int(tokens_S.sum())
    if not n_rollouts:
        return MartingaleTest(math.nan, math.inf, 0.0, 0, 0)
    mean = ratio_sum_S.sum().item() / n_tokens
    if n_rollouts < 2:
        return MartingaleTest(mean, math.inf, 0.0, n_tokens, n_rollouts)
    residual = (ratio_sum_S - mean * tokens_S).square().sum().item()
    stderr = math.sqrt(residual * n_rollouts / (n_rollouts - 1)) / n_tokens
    off = mean - 1.0
    z = off / stderr if stderr > 0 else math.copysign(math.inf, off) if off else 0.0
    return MartingaleTest(mean, stderr, z, n_tokens, n_rollouts)


def capped_share(weight_N: Tensor, kept_N: Tensor, cap: float) -> float:
    """Share of kept tokens whose importance weight reaches the cap. Weights before any modifier."""
    return _share(weight_N[kept_N] >= cap)


def silent_share(weight_N: Tensor, kept_N: Tensor) -> float:
    """Share of kept tokens with weight 0: clipped by ppo or gspo, or closed by a gate."""
    return _share(weight_N[kept_N] == 0)


def dropped_share(loss_mask_N: Tensor, kept_N: Tensor) -> float:
    """Share of the tokens in the loss mask that a correction removed, also from the denominator."""
    return _share(~kept_N[loss_mask_N])


def _share(hit: Tensor) -> float:
    return hit.double().mean().item() if len(hit) else 0.0
