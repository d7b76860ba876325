"""Divergences on the teacher's top-k, with everything outside it as one more outcome.

Axes: N = response tokens, K = stored top-k.

Every divergence of this package is called as (student_NK, teacher_NK, log_tail_N, *, temperature) and returns
[N] nats. Let p be the teacher, q the student, over the K ids and the tail; the gradients given are
g = dL / d log q. Through a softmax s over the whole vocabulary, with G = sum of g over ids and tail,

    dL/dz_i = g_i - G q_i              for an id i of the top-k
    dL/dz_v = s_v (g_tail / q_tail - G)   for every other v.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_store import InvalidArgumentError

# Below log(1 - 1e-7) float32 cannot tell a probability from one: exp() and 1 - exp() lose all digits there.
_MAX_LOG_MASS = -1e-7
# log(1e-7), the smallest tail the student side resolves.
_MIN_LOG_TAIL = -16.118


def log_tail_of(logprob_NK: Tensor) -> Tensor:
    """[N] log of the probability outside K ranks, from their log-probs; differentiable, finite.

    log(1 - sum exp(x)) computed as log(-expm1(logsumexp x)), with the sum held below one.

    Where that binds, at a tail of less than 1e-7, there is no gradient: a divergence does not pull such a
    student towards the teacher's tail. float32 log-probs of the ranks do not tell 1e-9 from 1e-7 or from
    nothing; a gradient guessed from them is off by their ratio, and its sum over the ranks, which should
    cancel against the softmax, leaves rounding as large as the teacher's tail. More ranks leave less there.
    """
    log_mass_N = torch.logsumexp(logprob_NK, dim=-1).clamp(max=_MAX_LOG_MASS)
    return torch.log(-torch.expm1(log_mass_N))


def topk_forward_kl(
    student_NK: Tensor, teacher_NK: Tensor, log_tail_N: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """[N] KL(teacher || student) over K + 1 outcomes: the stored ranks, and everything else as one bucket.

    Merging outcomes can only lower a KL, so this is a lower bound of the full-vocabulary value, and never
    negative. g = -p.

    Args:
        student_NK: [N, K] student log-probs at the teacher's ids, with gradient.
        teacher_NK: [N, K] teacher log-probs; -inf where a row has fewer ranks, which then do not count.
        log_tail_N: [N] teacher's log-probability outside the K ranks; -inf where nothing is left.
        temperature: 1 is all that a tail allows.

    Raises:
        InvalidArgumentError: another temperature.

    Source: log-sum inequality, Cover & Thomas, Elements of Information Theory, 2nd ed., thm 2.7.1.
    """
    _require_temperature_one("topk_forward_kl", temperature)
    student_NK, gap_NK = _without_padding(student_NK, teacher_NK)
    tail_N = log_tail_N.exp()
    ranks_N = (teacher_NK.exp() * -gap_NK).sum(dim=-1)
    gap_N = torch.where(tail_N > 0, log_tail_N - log_tail_of(student_NK), 0.0)
    return ranks_N + tail_N * gap_N


def topk_reverse_kl(
    student_NK: Tensor, teacher_NK: Tensor, log_tail_N: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """[N] KL(student || teacher) over the same K + 1 outcomes. Arguments as for `topk_forward_kl`.

    Also a lower bound of the full value. A teacher tail of exactly zero would make it infinite for any
    student mass outside; it is floored at 1e-7. g = q (log(q / p) + 1).
    """
    _require_temperature_one("topk_reverse_kl", temperature)
    student_NK, gap_NK = _without_padding(student_NK, teacher_NK)
    student_tail_N = log_tail_of(student_NK)
    ranks_N = (student_NK.exp() * gap_NK).sum(dim=-1)
    return ranks_N + student_tail_N.exp() * (student_tail_N - log_tail_N.clamp(min=_MIN_LOG_TAIL))


def topk_jsd(
    student_NK: Tensor,
    teacher_NK: Tensor,
    log_tail_N: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """[N] generalised Jensen-Shannon divergence over the same K + 1 outcomes.

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. Between 0 and the entropy of a
    coin of bias beta, so at most log 2; symmetric at 1/2. Divided by beta it tends to the forward KL as beta
    falls to 0, divided by 1 - beta to the reverse KL as beta rises to 1. A lower bound of the full value.
    g = (1 - beta) q log(q / m).

    Args:
        student_NK, teacher_NK, log_tail_N, temperature: as for `topk_forward_kl`.
        beta: share of the teacher in the mixture, between 0 and 1, neither of them.

    Raises:
        InvalidArgumentError: `beta` outside its range, or a temperature other than 1.

    Source: On-Policy Distillation of Language Models, arXiv 2306.13649, section 2; Lin, "Divergence Measures
    Based on the Shannon Entropy", IEEE Trans. Inf. Theory 37(1), 1991.
    """
    _require_temperature_one("topk_jsd", temperature)
    if not 0 < beta < 1:
        raise InvalidArgumentError(
            f"topk_jsd: beta has to be between 0 and 1, found {beta}; its limits are topk_forward_kl and "
            "topk_reverse_kl"
        )
    absent_NK = teacher_NK.isneginf()
    tail_q_N = log_tail_of(student_NK.masked_fill(absent_NK, -torch.inf))
    ranks_N = _jsd_terms(student_NK, teacher_NK, beta).masked_fill(absent_NK, 0.0).sum(dim=-1)
    return ranks_N + _jsd_terms(tail_q_N, log_tail_N, beta)


def _jsd_terms(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """What each outcome adds; the student's log-probs are finite, the teacher's may be -inf."""
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    from_teacher = torch.where(teacher.isneginf(), 0.0, teacher - mixture)
    return beta * teacher.exp() * from_teacher + (1 - beta) * student.exp() * (student - mixture)


def truncated_forward_kl(
    student_NK: Tensor,
    teacher_NK: Tensor,
    log_tail_N: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """[N] sum of p log(p / q) over the stored ranks alone: what several trainers call a top-k KL.

    It is no divergence: it can be negative where the student puts more mass on the ranks than the teacher
    does, and is lowest not at q = p but with all of the student's mass on them. `topk_forward_kl` is the
    cure. g = -p, and none for the tail.

    Args:
        student_NK, teacher_NK: as for `topk_forward_kl`.
        log_tail_N: not read; here so that all divergences are called alike.
        temperature: 1, since the student's sum over the vocabulary is not known at another.

    Raises:
        InvalidArgumentError: another temperature.
    """
    _require_temperature_one("truncated_forward_kl", temperature)
    _, gap_NK = _without_padding(student_NK, teacher_NK)
    return (teacher_NK.exp() * -gap_NK).sum(dim=-1)


def _without_padding(student_NK: Tensor, teacher_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The student's log-probs with -inf at padding, and student - teacher with 0 there."""
    absent_NK = teacher_NK.isneginf()
    gap_NK = torch.where(absent_NK, 0.0, student_NK - teacher_NK.masked_fill(absent_NK, 0.0))
    return student_NK.masked_fill(absent_NK, -torch.inf), gap_NK


def _require_temperature_one(name: str, temperature: float) -> None:
    if temperature != 1:
        raise InvalidArgumentError(
            f"{name}: temperature {temperature}, but what is outside the top-k is known as a sum at "
            "temperature 1, which cannot be taken to another; use 1, or a renormalised form, which does "
            "without that sum"
        )
