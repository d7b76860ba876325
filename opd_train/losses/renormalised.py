"""Divergences between the two models' proportions inside the top-k, blind to all mass outside.

Axes: N = response tokens, K = stored top-k.

Signature and notation as in `divergences`. With P and Q the mass of teacher and student on the ids, they
compare p / P with q / Q: a student that moves mass out of the top-k in proportion is not told so. In return
they need no sum over the vocabulary, and are exact at any temperature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_store import InvalidArgumentError

# exp() of it is zero at any temperature up to 1e28; -inf would make rows of padding alone NaN.
_NOTHING = -1e30


def at_temperature(logprob_NK: Tensor, temperature: float) -> Tensor:
    """[N, K] log-probs at another temperature, renormalised over these ids; -inf stays -inf.

    Ratios within the ids are all that top-k log-probs say of another temperature: the mass outside does not
    follow from its sum.

    Raises:
        InvalidArgumentError: a temperature that is not above 0 and finite.
    """
    if not 0 < temperature < math.inf:
        raise InvalidArgumentError(f"temperature: expected more than 0, found {temperature}")
    absent_NK = logprob_NK.isneginf()
    scaled_NK = logprob_NK.masked_fill(absent_NK, _NOTHING) / temperature
    return torch.log_softmax(scaled_NK, dim=-1).masked_fill(absent_NK, -torch.inf)


def renormalised_forward_kl(
    student_NK: Tensor,
    teacher_NK: Tensor,
    log_tail_N: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """[N] T^2 KL(teacher || student) of both renormalised over the stored ids, at temperature T. >= 0.

    At T = 1 the full KL is P times this, plus what the mass P against Q and the rest add: it bounds the full
    KL neither from above nor from below. g = T (q' - p') with p', q' the renormalised at T. The factor T^2
    keeps the gradient's size as T grows.

    Args:
        student_NK: [N, K] student log-probs at the teacher's ids at temperature 1, with gradient; a constant
            per row does not matter, so logits do as well.
        teacher_NK: [N, K] teacher log-probs at temperature 1; -inf where a row has fewer ranks.
        log_tail_N: not read; here so that all divergences are called alike.
        temperature: of both models.

    Source: factor: Hinton et al., arXiv 1503.02531, section 2.
    """
    student_NK, teacher_NK, gap_NK = _proportions(student_NK, teacher_NK, temperature)
    return temperature**2 * (teacher_NK.exp() * -gap_NK).sum(dim=-1)


def renormalised_reverse_kl(
    student_NK: Tensor,
    teacher_NK: Tensor,
    log_tail_N: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """[N] T^2 KL(student || teacher), otherwise as `renormalised_forward_kl`.

    g = T q' (log(q' / p') - D), where D is the divergence before the factor T^2.
    """
    student_NK, _, gap_NK = _proportions(student_NK, teacher_NK, temperature)
    return temperature**2 * (student_NK.exp() * gap_NK).sum(dim=-1)


def _proportions(student_NK: Tensor, teacher_NK: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both renormalised at the temperature, -inf at padding, and student - teacher with 0 there."""
    absent_NK = teacher_NK.isneginf()
    student_NK = at_temperature(student_NK.masked_fill(absent_NK, -torch.inf), temperature)
    teacher_NK = at_temperature(teacher_NK, temperature)
    return student_NK, teacher_NK, torch.where(absent_NK, 0.0, student_NK - teacher_NK)
