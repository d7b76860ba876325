"""Staying near the reference policy."""

from __future__ import annotations

from torch import Tensor

from opd_train.corrections.ratios import MAX_LOG_RATIO


def k3(student_logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """[N] e^-d - 1 + d with d = log pi_theta - log pi_ref of the sampled token; at least 0, differentiable.

    Its gradient is (1 - e^-d) grad log pi_theta, and none beyond |d| = 20. Of tokens drawn from pi_theta, or
    weighted by pi_theta / mu, the mean value is KL(pi_theta || pi_ref) and the mean gradient that of
    KL(pi_ref || pi_theta): the two differ, since the drawing is not differentiated.

    Args:
        student_logprob: [N], nats, with gradient.
        reference_logprob: [N], nats; NaN where there is none gives NaN.

    Source: Schulman, "Approximating KL divergence" (2020); DeepSeek-V3.2; slime's compute_approx_kl.
    """
    d_N = (student_logprob - reference_logprob.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # expm1 keeps the digits that e^-d - 1 loses near agreement, where k3 is of second order.
    return (-d_N).expm1() + d_N
