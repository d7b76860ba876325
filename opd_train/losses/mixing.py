"""Sums of losses: with the data, and over several teachers.

Axes: N = response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_store import InvalidArgumentError


def mix_cross_entropy(loss_N: Tensor, student_logprob_N: Tensor, *, share: float) -> Tensor:
    """[N] (1 - share) loss + share (-log pi_theta of the sampled token).

    On samples of the student the cross-entropy teaches it to repeat itself; it belongs to text that is worth
    imitating, such as the teacher's own.

    Args:
        loss_N: [N] any loss, nats.
        student_logprob_N: [N] of the sampled token, with gradient.
        share: of the cross-entropy, from 0 to 1.

    Raises:
        InvalidArgumentError: `share` outside its range.
    """
    if not 0 <= share <= 1:
        raise InvalidArgumentError(f"mix_cross_entropy: share has to be from 0 to 1, found {share}")
    return (1 - share) * loss_N - share * student_logprob_N


def mix_teachers(losses: Sequence[Tensor], weights: Sequence[Tensor | float]) -> Tensor:
    """[N] weighted mean of the losses against several teachers, each on ids of its own.

    For the forward KL it is, up to a constant, the KL from the teachers' mixture sum w p; for the reverse KL
    the KL to their product p_1^w_1 p_2^w_2 ..., normalised.

    Args:
        losses: each [N].
        weights: for each loss a number, or [N] where it differs between positions; >= 0, any scale. A loss
            does not count where its weight is 0, even if it is not finite there; the backward pass still runs
            through it, so its own derivative has to be finite.

    Returns:
        [N]; 0 where all weights are.

    Raises:
        InvalidArgumentError: not one weight per loss, no loss, or a number below 0.
    """
    if not losses or len(losses) != len(weights):
        raise InvalidArgumentError(f"mix_teachers: {len(losses)} losses and {len(weights)} weights")
    for weight in weights:
        if not isinstance(weight, Tensor) and not weight >= 0:
            raise InvalidArgumentError(f"mix_teachers: weights have to be >= 0, found {weight}")
    loss_JN = torch.stack(tuple(losses))
    weight_JN = torch.stack(
        [torch.as_tensor(weight).to(losses[0]).expand_as(losses[0]) for weight in weights]
    )
    total_N = weight_JN.sum(dim=0)
    weight_JN = weight_JN / torch.where(total_N > 0, total_N, 1.0)
    return torch.where(weight_JN > 0, weight_JN * loss_JN, 0.0).sum(dim=0)
