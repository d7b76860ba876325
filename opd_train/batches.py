"""Rollouts as tensors: variable-length rows packed end to end, and the padded form models without varlen
take.

Axes: S = rollouts, T = all tokens, N = response tokens, K = ranks, L = longest rollout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_store import NO_ID, InvalidRolloutError, Rollout


@dataclass(frozen=True, kw_only=True)
class TeacherBatch:
    """Rollouts with what the teacher said of them. Optional fields are None if any rollout lacks them."""

    row_ids: Tensor
    """[S] int64 row numbers in the cache; -1 for rollouts that never were in one."""
    input_ids: Tensor
    """[T] int64 prompts and responses."""
    position_ids: Tensor
    """[T] int64, 0 at the first token of each rollout."""
    cu_seqlens: Tensor
    """[S + 1] int32, first token of each rollout; last T."""
    response_index: Tensor
    """[N] int64, index into T of each response token; the hidden state that predicts it is one before."""
    cu_responses: Tensor
    """[S + 1] int32, first response token of each rollout; last N."""
    loss_mask: Tensor
    """[N] bool."""
    teacher_logprob: Tensor | None = None
    """[N] float32, as are the next two."""
    behaviour_logprob: Tensor | None = None
    reference_logprob: Tensor | None = None
    topk_ids: Tensor | None = None
    """[N, K] int64; 0 where a row has fewer ranks, so that every id can be gathered."""
    topk_logprob: Tensor | None = None
    """[N, K] float32; -inf where a row has fewer ranks."""
    log_tail: Tensor | None = None
    """[N] float32."""

    @property
    def n_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def target_ids(self) -> Tensor:
        """[N] int64, the sampled response tokens."""
        return self.input_ids[self.response_index]

    def to(self, device: torch.device | str) -> TeacherBatch:
        """The batch with every tensor on the device."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return TeacherBatch(**moved)

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """All rollouts as right-padded rows, for attention without variable lengths.

        Returns:
            ids: [S, L] int64, 0 where padded.
            attention_mask: [S, L] int64.
            source: [N] int64, index into the flattened [S * L] of what predicts each response token.
        """
        ids, mask, source, _ = self.padded_rows(list(range(len(self.cu_seqlens) - 1)))
        return ids, mask, source

    def padded_rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Some rollouts as right-padded rows.

        Returns:
            ids, attention_mask, source: as for `padded`, of these rows and their response tokens only.
            place: int64, where in [0, N) those response tokens are.
        """
        device = self.input_ids.device
        lengths = self.cu_seqlens.diff().long()
        new_row = torch.full_like(lengths, -1)
        new_row[torch.tensor(rows, device=device)] = torch.arange(len(rows), device=device)
        row_of_token = torch.repeat_interleave(new_row, lengths)
        longest = int(lengths[new_row >= 0].max())
        flat = row_of_token * longest + self.position_ids
        chosen = row_of_token >= 0
        ids = self.input_ids.new_zeros(len(rows) * longest)
        ids[flat[chosen]] = self.input_ids[chosen]
        mask = torch.zeros_like(ids)
        mask[flat[chosen]] = 1
        place = torch.nonzero(chosen[self.response_index])[:, 0]
        source = flat[self.response_index[place]] - 1
        return ids.view(len(rows), longest), mask.view(len(rows), longest), source, place


def collate(
    rollouts: Sequence[Rollout], *, vocab_size: int, row_ids: Sequence[int] | None = None
) -> TeacherBatch:
    """Pack rollouts into tensors on the CPU.

    Args:
        vocab_size: every id is proven below it here, because an id out of range on a GPU kills the process.
        row_ids: [S] cache rows; None for rollouts not from a cache.

    Raises:
        InvalidRolloutError: an id outside the vocabulary, naming the rollout.
    """
    rows = [-1] * len(rollouts) if row_ids is None else list(row_ids)
    lengths = np.array([len(rollout.token_ids) for rollout in rollouts])
    prompts = np.array([rollout.prompt_len for rollout in rollouts])
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    is_response = positions >= np.repeat(prompts, lengths)
    for row, rollout in zip(rows, rollouts, strict=True):
        for name, ids in (("token_ids", rollout.token_ids), ("topk_ids", rollout.topk_ids)):
            if ids is not None and np.any(wrong := (ids >= vocab_size) & (ids != NO_ID)):
                raise InvalidRolloutError(
                    f"row {row}, {name}: id {ids[wrong][0]} outside the vocabulary of {vocab_size}",
                    field=name,
                )
    masks = [
        np.ones(rollout.response_len, bool) if rollout.loss_mask is None else rollout.loss_mask
        for rollout in rollouts
    ]
    return TeacherBatch(
        row_ids=torch.tensor(rows, dtype=torch.int64),
        input_ids=_tensor(np.concatenate([rollout.token_ids for rollout in rollouts]).astype(np.int64)),
        position_ids=_tensor(positions.astype(np.int64)),
        cu_seqlens=_tensor(cu_seqlens.astype(np.int32)),
        response_index=_tensor(np.flatnonzero(is_response)),
        cu_responses=_tensor(np.concatenate([[0], np.cumsum(lengths - prompts)]).astype(np.int32)),
        loss_mask=_tensor(np.concatenate(masks)),
        teacher_logprob=_joined(rollouts, "teacher_logprob", np.float32),
        behaviour_logprob=_joined(rollouts, "behaviour_logprob", np.float32),
        reference_logprob=_joined(rollouts, "reference_logprob", np.float32),
        topk_ids=_gatherable(_joined(rollouts, "topk_ids", np.int64)),
        topk_logprob=_joined(rollouts, "topk_logprob", np.float32),
        log_tail=_joined(rollouts, "log_tail", np.float32),
    )


def _gatherable(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids.masked_fill(ids == NO_ID, 0)


def _joined(rollouts: Sequence[Rollout], name: str, dtype: type[np.generic]) -> Tensor | None:
    values = [getattr(rollout, name) for rollout in rollouts]
    if any(value is None for value in values):
        return None
    return _tensor(np.concatenate(values).astype(dtype, copy=False))


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(array)
