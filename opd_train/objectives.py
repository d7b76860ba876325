"""What one batch contributes: the summed loss, how many tokens it counts, and what to watch.

Axes: N = response tokens that count, K = ranks used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from opd_store import InvalidArgumentError
from opd_train.batches import TeacherBatch
from opd_train.corrections import CorrectionConfig, correction_weights, log_ratio
from opd_train.head import LmHead, topk_logprobs
from opd_train.losses import sampled_token_loss, topk_forward_kl, topk_reverse_kl


class Objective(StrEnum):
    """What the student minimises."""

    LIGHTNING = "lightning"
    """Clipped log-prob regression on the sampled token (arXiv 2604.13010)."""
    FORWARD_KL = "forward_kl"
    """KL(teacher || student) on the cached top-k, the tail as one bucket."""
    REVERSE_KL = "reverse_kl"
    """KL(student || teacher) on the same support."""
    CROSS_ENTROPY = "cross_entropy"
    """-log pi_theta of the sampled token: supervised fine-tuning, no teacher log-probs needed."""

    @property
    def needs_topk(self) -> bool:
        """Whether the cache has to carry top-k."""
        return self in (Objective.FORWARD_KL, Objective.REVERSE_KL)


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """Sums over the tokens of one batch; the caller divides by the step's count."""

    loss: Tensor
    """Scalar with gradient."""
    n_kept: int
    """Tokens in the loss."""
    sums: dict[str, float]
    """Detached sums for `summarise`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What one token contributes to the loss."""

    objective: Objective
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    clip: float = 10.0
    """Largest advantage in nats, for objective "lightning" (arXiv 2604.13010, table 6)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", Objective(self.objective))
        if not 0 < self.clip < math.inf:
            raise InvalidArgumentError(f"clip: expected more than 0, found {self.clip}")


def distill_loss(
    config: LossConfig,
    *,
    hidden: Tensor,
    lm_head: LmHead,
    batch: TeacherBatch,
    chunk: int = 1024,
) -> BatchLoss:
    """The summed loss of one batch.

    Args:
        hidden: [N, H] hidden states that predict each response token, in the order of `batch.response_index`.
        chunk: positions whose logits exist at a time.

    Raises:
        InvalidArgumentError: the batch lacks what the objective or the correction needs.
    """
    objective, correction, clip = config.objective, config.correction, config.clip
    mask = batch.loss_mask
    target_N = batch.target_ids[mask]
    student_logprob_all = hidden.new_zeros(len(mask), dtype=torch.float32)
    if objective.needs_topk:
        if batch.topk_ids is None or batch.topk_logprob is None or batch.log_tail is None:
            raise InvalidArgumentError(
                f"objective {objective.value!r} needs top-k, which these rollouts do not carry"
            )
        # The sampled token rides along as the last column, for weights and monitors.
        ids = torch.cat([batch.topk_ids[mask].long(), target_N[:, None]], dim=1)
        logprob = topk_logprobs(hidden[mask], lm_head, ids, chunk=chunk)
        student_NK, student_N = logprob[:, :-1], logprob[:, -1]
    else:
        student_N = topk_logprobs(hidden[mask], lm_head, target_N[:, None], chunk=chunk)[:, 0]
    student_logprob_all[mask] = student_N.detach()

    weight_all, kept_all = correction_weights(
        correction, student_logprob_all, batch.behaviour_logprob, mask, batch.cu_responses
    )
    weight_N, kept_N = weight_all[mask], kept_all[mask]
    if objective is Objective.CROSS_ENTROPY:
        loss_N = -weight_N * student_N
    elif objective is Objective.LIGHTNING:
        if batch.teacher_logprob is None:
            raise InvalidArgumentError(
                "objective 'lightning' needs teacher_logprob; score the rollouts first"
            )
        loss_N = sampled_token_loss(student_N, batch.teacher_logprob[mask], weight_N, clip=clip)
    else:
        assert batch.topk_logprob is not None
        assert batch.log_tail is not None
        divergence = topk_forward_kl if objective is Objective.FORWARD_KL else topk_reverse_kl
        loss_N = weight_N * divergence(student_NK, batch.topk_logprob[mask], batch.log_tail[mask])
    loss = torch.where(kept_N, loss_N, 0.0).sum()

    with torch.no_grad():
        sums = _ratio_sums(student_N, batch, weight_N, kept_N, correction)
        if objective.needs_topk:
            sums |= _topk_sums(student_NK, batch)
        sums |= {"loss": loss.item(), "n": float(len(student_N))}
    return BatchLoss(loss, int(kept_N.sum()), sums)


def _ratio_sums(
    student_N: Tensor, batch: TeacherBatch, weight_N: Tensor, kept_N: Tensor, correction: CorrectionConfig
) -> dict[str, float]:
    sums = {"kept": float(kept_N.sum()), "w": weight_N.sum().item(), "w2": (weight_N**2).sum().item()}
    if correction.needs_behaviour:
        sums["capped"] = float((weight_N[kept_N] >= correction.cap).sum())
    mask = batch.loss_mask
    if batch.behaviour_logprob is not None:
        rho_N = log_ratio(student_N, batch.behaviour_logprob[mask]).exp()
        rho_N = rho_N[torch.isfinite(rho_N)]
        sums |= {"rho": rho_N.sum().item(), "rho2": (rho_N**2).sum().item(), "n_rho": float(len(rho_N))}
    if batch.teacher_logprob is not None:
        sums["log_gap"] = (student_N - batch.teacher_logprob[mask]).sum().item()
    return sums


def _topk_sums(student_NK: Tensor, batch: TeacherBatch) -> dict[str, float]:
    mask = batch.loss_mask
    assert batch.topk_logprob is not None
    assert batch.log_tail is not None
    teacher_NK, log_tail_N = batch.topk_logprob[mask], batch.log_tail[mask]
    student_NK = student_NK.masked_fill(teacher_NK.isneginf(), -torch.inf)
    return {
        "forward_kl": topk_forward_kl(student_NK, teacher_NK, log_tail_N).sum().item(),
        "reverse_kl": topk_reverse_kl(student_NK, teacher_NK, log_tail_N).sum().item(),
        "student_mass": student_NK.exp().sum().item(),
        "teacher_mass": teacher_NK.exp().sum().item(),
        "top1": float((student_NK.argmax(dim=-1) == 0).sum()),
    }


def summarise(sums: dict[str, float]) -> dict[str, float]:
    """Means over the tokens of a step.

    `ess`: effective sample size of the ratios as a share of the tokens, (sum rho)^2 / (n sum rho^2).
    `chi2`: mean(rho^2) - 1. `ratio_mean`: mean rho, 1 in expectation on tokens that were not trained on.
    `log_gap`: mean log pi_theta - log pi_T of the sampled token. `student_mass`, `teacher_mass`: probability
    on the cached ranks. `top1`: share of positions where, of the cached ids, the student ranks the teacher's
    first highest.
    """
    n, kept = max(sums["n"], 1.0), max(sums["kept"], 1.0)
    row = {"loss": sums["loss"] / kept, "dropped": 1.0 - sums["kept"] / n}
    if "n_rho" in sums:
        n_rho = max(sums["n_rho"], 1.0)
        row["ratio_mean"] = sums["rho"] / n_rho
        row["chi2"] = sums["rho2"] / n_rho - 1.0
        row["ess"] = sums["rho"] ** 2 / (n_rho * sums["rho2"]) if sums["rho2"] else 0.0
    if "capped" in sums:
        row["capped"] = sums["capped"] / kept
        row["weight_mean"] = sums["w"] / kept
    for name in ("log_gap", "forward_kl", "reverse_kl", "student_mass", "teacher_mass", "top1"):
        if name in sums:
            row[name] = sums[name] / n
    return row
