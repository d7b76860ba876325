"""What to watch while training: sums over the tokens of a batch, and means over those of a step.

Sums add up over accumulated batches and over ranks; only `summarise` divides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_train.corrections import log_ratio
from opd_train.losses import log_tail_of, topk_forward_kl, topk_reverse_kl
from opd_train.objective.loss_config import LossConfig
from opd_train.objective.targets import Targets


def batch_sums(
    config: LossConfig,
    loss: Tensor,
    logprob_NC: Tensor,
    targets: Targets,
    weight_N: Tensor,
    kept_N: Tensor,
    truncated_N: Tensor,
) -> dict[str, float]:
    """Sums over the counted tokens of one batch, for `summarise`.

    Args:
        loss: the summed loss, detached.
        logprob_NC: [N, C] the student's log-probs at `targets.ids`, detached.
        weight_N, kept_N: what the correction gave.
        truncated_N: [N] the weights that the correction's cap is held against, after it.
    """
    student_N = logprob_NC[:, -1]
    sums = {
        "loss": loss,
        "n": torch.tensor(float(len(student_N)), device=loss.device),
        "kept": kept_N.sum(),
        "w": weight_N.sum(),
        "w2": (weight_N**2).sum(),
    }
    if config.correction.needs_behaviour and config.correction.cap is not None:
        sums["capped"] = (truncated_N[kept_N] >= config.correction.cap).sum()
    if targets.behaviour_logprob is not None:
        log_rho_N = log_ratio(student_N, targets.behaviour_logprob)
        log_rho_N = log_rho_N[torch.isfinite(log_rho_N)]
        rho_N = log_rho_N.exp()
        sums |= {
            "rho": rho_N.sum(),
            "rho2": (rho_N**2).sum(),
            "k3": (rho_N - 1 - log_rho_N).sum(),
            "n_rho": torch.tensor(float(len(rho_N)), device=loss.device),
        }
    if targets.teacher_logprob is not None:
        gap_N = targets.teacher_logprob - student_N
        sums |= {"log_gap": -gap_N.sum(), "clipped": (gap_N.abs() >= config.clip).sum()}
    if config.objective.needs_topk:
        sums |= _topk_sums(logprob_NC, targets)
    values = torch.stack([value.double() for value in sums.values()])
    # One transfer for all of them: each would otherwise wait for the device.
    return dict(zip(sums, values.tolist(), strict=True))


def _topk_sums(logprob_NC: Tensor, targets: Targets) -> dict[str, Tensor]:
    teacher = targets.teachers[0]
    assert teacher.columns is not None
    assert teacher.topk_logprob is not None
    assert teacher.log_tail is not None
    teacher_NK = teacher.topk_logprob
    student_NK = logprob_NC[:, teacher.columns].masked_fill(teacher_NK.isneginf(), -torch.inf)
    tail_N = teacher.log_tail.exp()
    gap_N = torch.where(tail_N > 0, teacher.log_tail - log_tail_of(student_NK), 0.0)
    return {
        "forward_kl": topk_forward_kl(student_NK, teacher_NK, teacher.log_tail).sum(),
        "reverse_kl": topk_reverse_kl(student_NK, teacher_NK, teacher.log_tail).sum(),
        "tail_kl": (tail_N * gap_N).sum(),
        "student_mass": student_NK.exp().sum(),
        "teacher_mass": teacher_NK.exp().sum(),
        "top1": (student_NK.argmax(dim=-1) == teacher_NK.argmax(dim=-1)).sum(),
    }


def summarise(sums: dict[str, float]) -> dict[str, float]:
    """Means over the tokens of a step.

    - `ess`: effective sample size of the ratios as a share of the tokens, (sum rho)^2 / (n sum rho^2);
      `weight_ess`: the same of the weights in use, over kept tokens.
    - `chi2`: mean(rho^2) - 1. `k3`: mean(rho - 1 - log rho), an estimate of KL(sampler || student).
    - `ratio_mean`: mean rho, 1 in expectation on tokens that were not trained on.
    - `log_gap`: mean log pi_theta - log pi_T of the sampled token; `clipped`: share of tokens where it
      reaches the clip.
    - `dropped`, `capped`: share of tokens out of the loss, and at the cap, before any modifier
      and PPO's step.
    - `student_mass`, `teacher_mass`: probability on the cached ranks; `tail_kl`: what the rest adds to
      `forward_kl`.
    - `top1`: share of positions where, of the cached ids, student and teacher rank the same one highest.
    """
    n, kept = max(sums["n"], 1.0), max(sums["kept"], 1.0)
    row = {"loss": sums["loss"] / kept, "dropped": 1.0 - sums["kept"] / n}
    row["weight_mean"] = sums["w"] / kept
    row["weight_ess"] = sums["w"] ** 2 / (kept * sums["w2"]) if sums["w2"] else 0.0
    if "n_rho" in sums:
        n_rho = max(sums["n_rho"], 1.0)
        row["ratio_mean"] = sums["rho"] / n_rho
        row["chi2"] = sums["rho2"] / n_rho - 1.0
        row["k3"] = sums["k3"] / n_rho
        row["ess"] = sums["rho"] ** 2 / (n_rho * sums["rho2"]) if sums["rho2"] else 0.0
    if "capped" in sums:
        row["capped"] = sums["capped"] / kept
    for name in (
        "log_gap",
        "clipped",
        "forward_kl",
        "reverse_kl",
        "tail_kl",
        "student_mass",
        "teacher_mass",
        "top1",
    ):
        if name in sums:
            row[name] = sums[name] / n
    return row
