"""Distillation losses: pure functions of log-probs.

Axes: N = response tokens, K = stored top-k. All log-probs are natural logs at temperature 1, normalised over
the whole vocabulary. Each function returns per-token values; the caller masks, weights, sums and owns the
denominator.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below log(1 - 1e-7) float32 cannot tell a probability from one: exp() and 1 - exp() lose all digits there.
_MAX_LOG_MASS = -1e-7


def log_tail_of(logprob_NK: Tensor) -> Tensor:
    """[N] log of the probability outside K ranks, from their log-probs; differentiable, finite.

    log(1 - sum exp(x)) computed as log(-expm1(logsumexp x)), with the sum held below one.
    """
    log_mass_N = torch.logsumexp(logprob_NK, dim=-1).clamp(max=_MAX_LOG_MASS)
    return torch.log(-torch.expm1(log_mass_N))


def advantage(teacher_logprob_N: Tensor, student_logprob_N: Tensor, *, clip: float) -> Tensor:
    """[N] detached clip(log pi_T - log pi_theta, -clip, clip), nats.

    Source: Lightning OPD, arXiv 2604.13010, eq. 2 and Alg. 1.
    """
    return (teacher_logprob_N - student_logprob_N).detach().clamp(-clip, clip)


def sampled_token_loss(
    student_logprob_N: Tensor, teacher_logprob_N: Tensor, weight_N: Tensor, *, clip: float
) -> Tensor:
    """[N] surrogate -w A log pi_theta of the sampled token, A the detached, clipped advantage.

    With w = 1 its gradient is that of the Huber loss with threshold `clip` between the two log-probs.

    Args:
        student_logprob_N: [N] with gradient.
        teacher_logprob_N: [N].
        weight_N: [N] importance weights, detached here.
        clip: nats.

    Source: arXiv 2604.13010, eq. 4 (w = 1).
    """
    return -weight_N.detach() * advantage(teacher_logprob_N, student_logprob_N, clip=clip) * student_logprob_N


def topk_forward_kl(student_NK: Tensor, teacher_NK: Tensor, log_tail_N: Tensor) -> Tensor:
    """[N] KL(teacher || student) over K + 1 outcomes: the stored ranks, and everything else as one bucket.

    Merging outcomes can only lower a KL, so this is a lower bound of the full-vocabulary value, and never
    negative.

    Args:
        student_NK: [N, K] student log-probs at the teacher's ids, with gradient.
        teacher_NK: [N, K] teacher log-probs; -inf where a row has fewer ranks, which then do not count.
        log_tail_N: [N] teacher's log-probability outside the K ranks; -inf where nothing is left.

    Source: log-sum inequality, Cover & Thomas, Elements of Information Theory, 2nd ed., thm 2.7.1.
    """
    student_NK, gap_NK = _without_padding(student_NK, teacher_NK)
    tail_N = log_tail_N.exp()
    ranks_N = (teacher_NK.exp() * -gap_NK).sum(dim=-1)
    gap_N = torch.where(tail_N > 0, log_tail_N - log_tail_of(student_NK), 0.0)
    return ranks_N + tail_N * gap_N


def _without_padding(student_NK: Tensor, teacher_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The student's log-probs with -inf at padding, and student - teacher with 0 there."""
    absent_NK = teacher_NK.isneginf()
    gap_NK = torch.where(absent_NK, 0.0, student_NK - teacher_NK.masked_fill(absent_NK, 0.0))
    return student_NK.masked_fill(absent_NK, -torch.inf), gap_NK


def topk_reverse_kl(student_NK: Tensor, teacher_NK: Tensor, log_tail_N: Tensor) -> Tensor:
    """[N] KL(student || teacher) over the same K + 1 outcomes. Arguments as for `topk_forward_kl`.

    A teacher tail of exactly zero would make it infinite for any student mass outside; it is floored at 1e-7.
    """
    student_NK, gap_NK = _without_padding(student_NK, teacher_NK)
    student_tail_N = log_tail_of(student_NK)
    teacher_tail_N = log_tail_N.clamp(min=-16.118)  # log(1e-7), the smallest tail the student side resolves
    ranks_N = (student_NK.exp() * gap_NK).sum(dim=-1)
    return ranks_N + student_tail_N.exp() * (student_tail_N - teacher_tail_N)
