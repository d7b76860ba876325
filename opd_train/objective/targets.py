"""What the loss compares the student with: the counted tokens of a batch, teacher by teacher.

Axes: N = response tokens that count, K = ranks of one teacher, M = ids drawn from it, C = all ids looked at.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd_store import InvalidArgumentError
from opd_train.data.batches import TeacherBatch, TeacherTargets
from opd_train.objective.loss_config import LossConfig, Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class OneTeacher:
    """One teacher's part; None where the objective does not ask for it."""

    columns: slice | None = None
    """Which columns of the head's log-probs are at this teacher's ids."""
    logprob: Tensor | None = None
    """[N] of the sampled token."""
    topk_logprob: Tensor | None = None
    """[N, K]."""
    log_tail: Tensor | None = None
    """[N]."""
    drawn_logprob: Tensor | None = None
    """[N, M]."""
    drawn_weight: Tensor | None = None
    """[N, M] its share in the target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Counted tokens; what rollouts do not carry is None."""

    ids: Tensor
    """[N, C] int64; the last column is the sampled token."""
    teachers: tuple[OneTeacher, ...]
    teacher_logprob: Tensor | None
    """[N] of the first teacher, whether or not the objective asks for it."""
    behaviour_logprob: Tensor | None
    reference_logprob: Tensor | None

    def piece(self, rows: slice) -> Targets:
        """The same of some tokens."""
        if rows == slice(None):
            return self
        teachers = tuple(_cut(teacher, rows) for teacher in self.teachers)
        return dataclasses.replace(_cut(self, rows), teachers=teachers)


_Part = TypeVar("_Part", OneTeacher, Targets)


def _cut(value: _Part, rows: slice) -> _Part:
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    pieces: dict[str, Any] = {
        name: found[rows] for name, found in fields.items() if isinstance(found, Tensor)
    }
    return dataclasses.replace(value, **pieces)


def gather_targets(config: LossConfig, batch: TeacherBatch) -> Targets:
    """The counted tokens' targets.

    Raises:
        InvalidArgumentError: the batch lacks what objective, correction or teacher weights need.
    """
    mask, objective = batch.loss_mask, config.objective
    sources: list[TeacherBatch | TeacherTargets] = [batch]
    if config.teacher_weights:
        sources += batch.joined
        if len(sources) != len(config.teacher_weights):
            raise InvalidArgumentError(
                f"teacher_weights: {len(config.teacher_weights)} for {len(sources)} teachers; give one each"
            )
    teachers, ids, width = [], [], 0
    for number, source in enumerate(sources):
        where = f"joined teacher {number}: " if number else ""
        if not objective.dense:
            if objective is Objective.LIGHTNING:
                teachers.append(OneTeacher(logprob=_need(source.teacher_logprob, config, where)[mask]))
            continue
        if objective.needs_draws:
            found = (batch.drawn_ids, batch.drawn_logprob, batch.drawn_weight)
            names = ("drawn_logprob", "drawn_weight")
        elif config.chosen_ids:
            found = (batch.chosen_ids, batch.chosen_logprob, batch.chosen_log_tail)
            names = ("topk_logprob", "log_tail")
        else:
            found = (source.topk_ids, source.topk_logprob, source.log_tail)
            names = ("topk_logprob", "log_tail")
        own_ids, *values = (_need(tensor, config, where)[mask] for tensor in found)
        ids.append(own_ids.long())
        columns = slice(width, width + own_ids.shape[1])
        teachers.append(OneTeacher(columns=columns, **dict(zip(names, values, strict=True))))
        width = columns.stop
    if config.correction.needs_reference and batch.reference_logprob is None:
        raise InvalidArgumentError(
            "reference_kl needs reference_logprob, which these rollouts do not carry; score with --reference"
        )

    def counted(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[mask]

    return Targets(
        # The sampled token rides along as the last column, for weights and monitors.
        ids=torch.cat([*ids, batch.target_ids[mask][:, None]], dim=1),
        teachers=tuple(teachers),
        teacher_logprob=counted(batch.teacher_logprob),
        behaviour_logprob=counted(batch.behaviour_logprob),
        reference_logprob=counted(batch.reference_logprob),
    )


def _need(values: Tensor | None, config: LossConfig, where: str) -> Tensor:
    if values is None:
        objective = config.objective
        what, remedy = "teacher_logprob", "score the rollouts first"
        if objective.needs_draws:
            what, remedy = "drawn ids", "score with --draws"
        elif objective.dense:
            what, remedy = (
                ("chosen ids", "score with --chosen") if config.chosen_ids else ("top-k", "score with --topk")
            )
        raise InvalidArgumentError(
            f"{where}objective {objective.value!r} needs {what}, which these rollouts do not carry; {remedy}"
        )
    return values
