"""Losses on the sampled token: the teacher gives one log-prob per position.

Axes: N = response tokens.
"""

from __future__ import annotations

from torch import Tensor


def advantage(teacher_logprob_N: Tensor, student_logprob_N: Tensor, *, clip: float) -> Tensor:
    """[N] detached clip(log pi_T - log pi_theta, -clip, clip), nats.

    Source: Lightning OPD, arXiv 2604.13010, eq. 2 and Alg. 1.
    """
    return (teacher_logprob_N - student_logprob_N).detach().clamp(-clip, clip)


def sampled_token_loss(
    student_logprob_N: Tensor, teacher_logprob_N: Tensor, weight_N: Tensor, *, clip: float
) -> Tensor:
    """[N] surrogate -w A log pi_theta of the sampled token, A the detached, clipped advantage.

    Its value means nothing by itself; its gradient is that of `huber_logprob_loss`, at any weights.

    Args:
        student_logprob_N: [N] with gradient.
        teacher_logprob_N: [N].
        weight_N: [N] importance weights, detached here.
        clip: nats.

    Source: arXiv 2604.13010, eq. 4 (w = 1).
    """
    return -weight_N.detach() * advantage(teacher_logprob_N, student_logprob_N, clip=clip) * student_logprob_N


def huber_logprob_loss(
    student_logprob_N: Tensor, teacher_logprob_N: Tensor, weight_N: Tensor, *, clip: float
) -> Tensor:
    """[N] w times the Huber loss between the two log-probs of the sampled token, >= 0.

    d^2 / 2 for a difference |d| <= clip, clip (|d| - clip / 2) beyond: the regression that
    `sampled_token_loss` descends, with a value that can be watched. Arguments as there.

    Source: Huber, "Robust Estimation of a Location Parameter", Ann. Math. Statist. 35(1), 1964.
    """
    gap_N = (student_logprob_N - teacher_logprob_N).abs()
    near_N = gap_N.clamp(max=clip)
    return weight_N.detach() * near_N * (gap_N - near_N / 2)
