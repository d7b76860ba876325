"""Log-ratios of policies, per token, per prefix and per rollout.

Axes: N = response tokens end to end, S = rollouts, G = groups of tokens (rollouts or blocks of them).

A token that does not count (masked, or with a log-prob that is not finite) has log-ratio 0 here: it leaves
products as they are and is no part of means. For tokens the policy did not choose, such as a tool's output,
that is exact: their probability is the same under both policies and cancels. Sums are taken in float64, so
that the order, and what else is packed into a batch, do not show in a float32 weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_store import InvalidArgumentError

# exp(20) is far beyond any useful weight and far below float32's overflow; verl's SAFETY_BOUND.
MAX_LOG_RATIO = 20.0


def log_ratio(student_logprob_N: Tensor, behaviour_logprob_N: Tensor) -> Tensor:
    """[N] detached log rho, clamped to +-20; NaN stays NaN."""
    return (student_logprob_N - behaviour_logprob_N).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def counted_log_ratio(numerator_N: Tensor, denominator_N: Tensor, counted_N: Tensor) -> Tensor:
    """[N] float64 log-ratio, clamped to +-20; 0 where a token does not count."""
    ratio_N = log_ratio(numerator_N.double(), denominator_N.double())
    return torch.where(counted_N, ratio_N, 0.0)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp() of log-ratios and of sums of them, held to +-20 first."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@dataclass(frozen=True, slots=True)
class Groups:
    """Which group each token belongs to."""

    index_N: Tensor
    """int64."""
    n: int

    def sum(self, value_N: Tensor) -> Tensor:
        """[G] float64."""
        zeros_G = value_N.new_zeros(self.n, dtype=torch.float64)
        return zeros_G.index_add_(0, self.index_N, value_N.double())

    def mean(self, value_N: Tensor, counted_N: Tensor) -> Tensor:
        """[G] float64, over tokens that count; 0 for a group without any."""
        total_G = self.sum(torch.where(counted_N, value_N, 0.0))
        return total_G / self.sum(counted_N).clamp(min=1.0)

    def spread(self, value_G: Tensor) -> Tensor:
        """[N] each token's group's value."""
        return value_G[self.index_N]


def rollouts_of(cu_seqlens: Tensor, n_tokens: int) -> Groups:
    """The rollouts of a packed batch.

    Args:
        cu_seqlens: [S + 1] integers: first 0, last N, never falling. Rollouts may be empty.

    Raises:
        InvalidArgumentError: it does not end at the number of tokens.
    """
    length_S = cu_seqlens.diff().long()
    n = len(length_S)
    index = torch.arange(n, device=cu_seqlens.device)
    index_N = torch.repeat_interleave(index, length_S)
    if len(index_N) != n_tokens:
        raise InvalidArgumentError(f"cu_seqlens: expected to end at {n_tokens} tokens, found {len(index_N)}")
    return Groups(index_N, n)


def blocks_of(cu_seqlens: Tensor, rollouts: Groups, block: int) -> Groups:
    """Blocks of `block` consecutive response positions; each rollout starts a new one."""
    length_S = cu_seqlens.diff().long()
    blocks_S = (length_S + block - 1).div(block, rounding_mode="floor")
    first_S = blocks_S.cumsum(0) - blocks_S
    position_N = torch.arange(len(rollouts.index_N), device=cu_seqlens.device) - rollouts.spread(
        cu_seqlens[:-1].long()
    )
    index_N = rollouts.spread(first_S) + position_N.div(block, rounding_mode="floor")
    return Groups(index_N, int(blocks_S.sum()))


def prefix_sum(value_N: Tensor, cu_seqlens: Tensor, rollouts: Groups) -> Tensor:
    """[N] float64: sum of the values before each token within its rollout, its own left out."""
    total = torch.cat([value_N.new_zeros(1, dtype=torch.float64), value_N.double().cumsum(0)])
    return total[:-1] - rollouts.spread(total[cu_seqlens[:-1].long()])
