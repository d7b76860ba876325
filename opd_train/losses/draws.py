"""Losses on ids drawn at random: few of them stand for the whole vocabulary without bias.

Axes: N = response tokens, M = distinct ids drawn at a position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0


def draw_weights(teacher_NM: Tensor, draws_NM: Tensor, *, temperature: float = 1.0) -> Tensor:
    """[N, M] share of each drawn id in the target: draws * p / proposal, normalised over a row.

    The proposal is the teacher at the temperature, so p / proposal goes as p^(1 - 1/temperature), and its
    constant cancels. At temperature 1 a share is draws / total, and the target is the teacher on average;
    elsewhere the normalisation leaves a bias that falls as 1 / total.

    Args:
        teacher_NM: [N, M] teacher log-probs of the drawn ids at temperature 1; -inf at padding.
        draws_NM: [N, M] integers or floats, how often each was drawn; 0 at padding.
        temperature: of the proposal.

    Returns:
        [N, M] in the dtype of `teacher_NM`, rows sum to 1; 0 at padding, and in a row of padding alone.

    Source: Sparse Logit Sampling, arXiv 2503.16870.
    """
    absent_NM = draws_NM == 0
    log_weight_NM = draws_NM.to(teacher_NM.dtype).log() + (1 - 1 / temperature) * teacher_NM
    # A finite stand-in: a softmax of -inf alone is NaN.
    return torch.softmax(log_weight_NM.masked_fill(absent_NM, -1e30), dim=-1).masked_fill(absent_NM, 0.0)


def random_sampling_kd(student_NM: Tensor, teacher_NM: Tensor, weight_NM: Tensor) -> Tensor:
    """[N] estimate of KL(teacher || student) over the whole vocabulary, from ids drawn from the teacher.

    sum of w (log p - log q). With draws at temperature 1 the mean over draws of value and gradient is that of
    the full KL, so a single value may be negative; its gradient g = -w is that of the cross-entropy to a
    sparse target. A top-k, in contrast, says nothing of the tail beyond its sum.

    Args:
        student_NM: [N, M] student log-probs at the drawn ids, with gradient.
        teacher_NM: [N, M] the teacher's; anything at padding.
        weight_NM: [N, M] of `draw_weights`; 0 at padding.

    Source: Sparse Logit Sampling, arXiv 2503.16870.
    """
    gap_NM = torch.where(weight_NM > 0, teacher_NM - student_NM, 0.0)
    return (weight_NM * gap_NM).sum(dim=-1)


def drawn_reverse_kl(
    student_NM: Tensor,
    teacher_NM: Tensor,
    weight_NM: Tensor,
    *,
    clip: float = 10.0,
    cap: float = math.inf,
) -> Tensor:
    """[N] surrogate for KL(student || teacher) over the whole vocabulary, from the same draws.

    sum of -w min(q / p, cap) A log q with A = clip(log p - log q); ratio and advantage are detached. Uncapped
    and unclipped, with draws at temperature 1, the mean of its gradient over draws is that of the full
    reverse KL. What the student likes and the teacher almost never draws comes seldom and with a large ratio:
    the variance grows with chi^2(student, teacher) and falls as 1 / draws. A cap trades it for bias.

    Args:
        student_NM, teacher_NM, weight_NM: as for `random_sampling_kd`.
        clip: largest advantage, nats.
        cap: largest ratio; e^20 if above.

    Source: several draws a position: AsyncOPD, arXiv 2606.24143, which draws from the behaviour policy.
    """
    drawn_NM = weight_NM > 0
    gap_NM = torch.where(drawn_NM, teacher_NM - student_NM, 0.0).detach()
    # Capped before exp(), which would overflow.
    ratio_NM = (-gap_NM).clamp(max=min(math.log(cap), _MAX_LOG_RATIO)).exp()
    return -(weight_NM * ratio_NM * gap_NM.clamp(-clip, clip) * student_NM).sum(dim=-1)
