"""What one batch contributes: the summed loss, how many tokens it counts, and what to watch.

Axes: N = response tokens, n = those of one piece, C = ids looked at per position.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_store import InvalidArgumentError
from opd_train.corrections import AdvantageAnchor, CorrectionKind, correction_weights, k3
from opd_train.corrections.config import without_modifiers
from opd_train.data.batches import TeacherBatch
from opd_train.head import HeadWeights, LmHead, fused_loss, topk_logprobs
from opd_train.losses import (
    advantage,
    mix_cross_entropy,
    mix_teachers,
    random_sampling_kd,
    renormalised_forward_kl,
    renormalised_reverse_kl,
    sampled_token_loss,
    topk_forward_kl,
    topk_jsd,
    topk_reverse_kl,
    truncated_forward_kl,
)
from opd_train.objective.loss_config import LossConfig, Objective
from opd_train.objective.step_metrics import batch_sums
from opd_train.objective.targets import OneTeacher, Targets, gather_targets


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """Sums over the tokens of one batch; the caller divides by the step's count."""

    loss: Tensor
    """Scalar with gradient."""
    n_kept: int
    """Tokens in the loss."""
    sums: dict[str, float]
    """Detached sums for `summarise`."""


def distill_loss(
    config: LossConfig,
    *,
    hidden: Tensor,
    lm_head: LmHead,
    batch: TeacherBatch,
    chunk: int = 1024,
    proximal_logprob: Tensor | None = None,
    age: Tensor | None = None,
) -> BatchLoss:
    """The summed loss of one batch.

    Where each token's weight depends on that token alone, and the head is known by its weights, the gradient
    is computed piece by piece in the forward pass; otherwise log-probs of the whole batch come first.

    Args:
        hidden: [N, H] hidden states that predict each response token, in the order of `batch.response_index`.
        chunk: positions whose logits exist at a time.
        proximal_logprob: [N] sampled-token log-probs under the proximal policy, for correction "ppo"; None
            is the student itself.
        age: [S] updates since each rollout was sampled, for a staleness decay.

    Raises:
        InvalidArgumentError: the batch lacks what the objective or the correction needs.
    """
    mask = batch.loss_mask
    targets = gather_targets(config, batch)
    weigh = _Weights(config, batch, targets, proximal_logprob, age)
    if config.correction.pointwise and isinstance(lm_head, HeadWeights) and torch.is_grad_enabled():

        def piece_loss(logprob_nC: Tensor, rows: slice) -> Tensor:
            weight_n, kept_n = weigh(logprob_nC[:, -1].detach(), rows)
            return _summed(config, logprob_nC, targets.piece(rows), weight_n, kept_n)

        loss, logprob_NC = fused_loss(hidden[mask], lm_head, targets.ids, piece_loss, chunk=chunk)
    else:
        logprob_NC = topk_logprobs(hidden[mask], lm_head, targets.ids, chunk=chunk)
        weight_N, kept_N = weigh(logprob_NC[:, -1].detach(), slice(None))
        loss = _summed(config, logprob_NC, targets, weight_N, kept_N)
    with torch.no_grad():
        logprob_NC = logprob_NC.detach()
        weight_N, kept_N = weigh(logprob_NC[:, -1], slice(None))
        truncated_N = _truncated(config, batch, targets, logprob_NC[:, -1], weight_N, proximal_logprob)
        sums = batch_sums(config, loss.detach(), logprob_NC, targets, weight_N, kept_N, truncated_N)
    return BatchLoss(loss, int(sums["kept"]), sums)


class _Weights:
    """Correction weights of counted tokens, from their log-probs under the student."""

    def __init__(
        self,
        config: LossConfig,
        batch: TeacherBatch,
        targets: Targets,
        proximal_logprob: Tensor | None,
        age: Tensor | None,
    ) -> None:
        correction = config.correction
        if correction.needs_advantage and targets.teacher_logprob is None:
            raise InvalidArgumentError(
                f"correction {correction.kind.value!r} needs teacher_logprob; score the rollouts first"
            )
        self._config, self._batch, self._targets = config, batch, targets
        self._proximal, self._age = proximal_logprob, age

    def __call__(self, student: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """([n] weights, [n] kept) of counted tokens `rows`: of all, unless the correction is pointwise."""
        config, mask = self._config, self._batch.loss_mask
        if config.correction.pointwise:
            own = self._targets.piece(rows)
            bounds = torch.tensor([0, len(student)], device=student.device)
            proximal = None if self._proximal is None else self._proximal[mask][rows]
            return correction_weights(
                config.correction,
                student,
                own.behaviour_logprob,
                torch.ones_like(student, dtype=torch.bool),
                bounds,
                advantage=self._advantage(student, own),
                proximal_logprob=proximal,
                dense=config.objective.dense,
            )

        def everywhere(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            full = values.new_zeros(len(mask))
            full[mask] = values
            return full

        weights, kept = correction_weights(
            config.correction,
            student.new_zeros(len(mask)).masked_scatter(mask, student),
            self._batch.behaviour_logprob,
            mask,
            self._batch.cu_responses,
            advantage=everywhere(self._advantage(student, self._targets)),
            proximal_logprob=self._proximal,
            age=self._age,
            dense=config.objective.dense,
        )
        return weights[mask], kept[mask]

    def _advantage(self, student: Tensor, targets: Targets) -> Tensor | None:
        if not self._config.correction.needs_advantage:
            return None
        assert targets.teacher_logprob is not None

        against = _anchor(self._config, student, targets)
        return advantage(targets.teacher_logprob, against, clip=self._config.clip)


def _truncated(
    config: LossConfig,
    batch: TeacherBatch,
    targets: Targets,
    student_N: Tensor,
    weight_N: Tensor,
    proximal: Tensor | None,
) -> Tensor:
    """[N] what the correction's cap is held against, after it: without modifiers and without PPO's step."""
    correction = without_modifiers(config.correction)
    if correction.kind is CorrectionKind.PPO:
        # The weight of a student that is the proximal policy: nothing is clipped.
        if proximal is not None:
            student_N = proximal[batch.loss_mask]
        elif correction.anchor is AdvantageAnchor.BEHAVIOUR:
            assert targets.behaviour_logprob is not None
            student_N = targets.behaviour_logprob
        correction = dataclasses.replace(correction, anchor=AdvantageAnchor.CURRENT)
    elif correction == config.correction:
        return weight_N
    plain = dataclasses.replace(config, correction=correction)
    return _Weights(plain, batch, targets, None, None)(student_N, slice(None))[0]


def _anchor(config: LossConfig, student: Tensor, targets: Targets) -> Tensor:
    """[n] the log-probs that the advantage is taken against."""
    if config.correction.anchor is AdvantageAnchor.BEHAVIOUR:
        assert targets.behaviour_logprob is not None
        return targets.behaviour_logprob
    return student


def _summed(
    config: LossConfig, logprob_nC: Tensor, targets: Targets, weight_n: Tensor, kept_n: Tensor
) -> Tensor:
    """Scalar loss of the tokens that `targets` describes."""
    student_n = logprob_nC[:, -1]
    if config.objective is Objective.CROSS_ENTROPY:
        loss_n = -weight_n * student_n
    else:
        losses = [_one_teacher(config, logprob_nC, targets, teacher) for teacher in targets.teachers]
        loss_n = losses[0] if len(losses) == 1 else mix_teachers(losses, config.teacher_weights)
        loss_n = weight_n * loss_n
        if config.cross_entropy:
            loss_n = mix_cross_entropy(loss_n, student_n, share=config.cross_entropy)
    if config.correction.reference_kl:
        assert targets.reference_logprob is not None
        loss_n = loss_n + config.correction.reference_kl * k3(student_n, targets.reference_logprob)
    return torch.where(kept_n, loss_n, 0.0).sum()


def _one_teacher(config: LossConfig, logprob_nC: Tensor, targets: Targets, teacher: OneTeacher) -> Tensor:
    objective = config.objective
    if objective is Objective.LIGHTNING:
        assert teacher.logprob is not None
        student_n = logprob_nC[:, -1]
        # The surrogate's value is -A log pi, of which weights make the corrected gradient.
        if config.correction.anchor is AdvantageAnchor.BEHAVIOUR:
            gap_n = advantage(teacher.logprob, _anchor(config, student_n, targets), clip=config.clip)
            return -gap_n * student_n
        return sampled_token_loss(student_n, teacher.logprob, torch.ones_like(student_n), clip=config.clip)
    assert teacher.columns is not None
    student_nK = logprob_nC[:, teacher.columns]
    if objective is Objective.RANDOM_SAMPLING_KD:
        assert teacher.drawn_logprob is not None
        assert teacher.drawn_weight is not None
        return random_sampling_kd(student_nK, teacher.drawn_logprob, teacher.drawn_weight)
    assert teacher.topk_logprob is not None
    assert teacher.log_tail is not None
    if objective is Objective.JSD:
        return topk_jsd(student_nK, teacher.topk_logprob, teacher.log_tail, beta=config.beta)
    divergence = {
        Objective.FORWARD_KL: topk_forward_kl,
        Objective.REVERSE_KL: topk_reverse_kl,
        Objective.TRUNCATED_FORWARD_KL: truncated_forward_kl,
        Objective.RENORMALISED_FORWARD_KL: renormalised_forward_kl,
        Objective.RENORMALISED_REVERSE_KL: renormalised_reverse_kl,
    }[objective]
    return divergence(student_nK, teacher.topk_logprob, teacher.log_tail, temperature=config.temperature)
