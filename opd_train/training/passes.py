"""The student over one batch: the pass that leaves a gradient, and the one that only scores."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from opd_train.data.batches import TeacherBatch
from opd_train.head import LmHead, topk_logprobs
from opd_train.models import CausalLM
from opd_train.objective.batch_loss import BatchLoss, distill_loss
from opd_train.training.config import DistillConfig
from opd_train.training.distributed import World, whole_head
from opd_train.training.forward import response_hidden


class StudentPasses:
    """What a trainer does with a batch between two optimizer steps."""

    def __init__(self, student: CausalLM, config: DistillConfig, world: World) -> None:
        self._student, self._config, self._world = student, config, world

    def backward(self, batch: TeacherBatch, proximal: Tensor | None, *, step: int) -> BatchLoss:
        """Add a batch's summed gradient to the parameters'.

        Args:
            proximal: [N] log-probs of the sampled tokens under the proximal policy; None is the student.
            step: how many were made, from which the age of rollouts follows.
        """
        # What follows is computed again in backward, so the head stays whole until then.
        with whole_head(self._student):
            self._student.model.train()
            with self._autocast():
                age = None if batch.policy_version is None else (step - batch.policy_version).clamp(min=0)
                result = distill_loss(
                    self._config.loss,
                    hidden=self._hidden(batch),
                    lm_head=self._head(),
                    batch=batch,
                    chunk=self._config.head_chunk,
                    proximal_logprob=proximal,
                    age=age,
                )
            result.loss.backward()
        return result

    @torch.no_grad()
    def sampled_logprob(self, batch: TeacherBatch) -> Tensor:
        """[N] float32 log-probs of the sampled tokens under the student as it is now, without dropout."""
        was_training = self._student.model.training
        self._student.model.eval()
        try:
            with whole_head(self._student), self._autocast():
                ids, chunk = batch.target_ids[:, None], self._config.head_chunk
                return topk_logprobs(self._hidden(batch), self._head(), ids, chunk=chunk)[:, 0]
        finally:
            self._student.model.train(was_training)

    def _hidden(self, batch: TeacherBatch) -> Tensor:
        return response_hidden(self._student, batch, agree=self._world.max if self._world.size > 1 else None)

    def _head(self) -> LmHead:
        head: LmHead | None = self._student.head
        return self._student.logits if head is None else head

    def _autocast(self) -> AbstractContextManager[object]:
        if not self._config.autocast:
            return nullcontext()
        return torch.autocast(self._student.device.type, dtype=torch.bfloat16)
