"""TRL: its `SFTTrainer` with this project's losses, and batches under the names of its async distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from trl import SFTTrainer

from opd_store import Cache, InvalidArgumentError
from opd_train.adapters.hf import DistillLossMixin
from opd_train.adapters.neutral import CacheCollator, CacheDataset, cache_key, checked_rows
from opd_train.data.batches import TeacherBatch
from opd_train.models import CausalLM

__all__ = [
    "CacheCollator",
    "CacheDataset",
    "DistillSFTTrainer",
    "async_distillation_fields",
    "async_distillation_samples",
    "row_dataset",
]


class DistillSFTTrainer(DistillLossMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's `SFTTrainer`, distilling from a cache. Data sets are those of `row_dataset`.

    Its loss and metrics of its own are not computed: they would need another forward.
    """

    def __init__(self, model: CausalLM, args: Any, *rest: Any, **options: Any) -> None:  # noqa: ANN401
        """
        Args:
            args: an SFTConfig with `remove_unused_columns=False` and
                `dataset_kwargs={"skip_prepare_dataset": True}`.
            rest, options: as for `DistillLossMixin`, then as for SFTTrainer.

        Raises:
            InvalidArgumentError, MismatchError: as for `DistillLossMixin`; or data that TRL would prepare.
        """
        if not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise InvalidArgumentError(
                f"dataset_kwargs: expected {{'skip_prepare_dataset': True}}, found {args.dataset_kwargs}; "
                "the rows are tokens already"
            )
        if args.packing or args.padding_free:
            raise InvalidArgumentError(
                "packing and padding_free: expected False, since TRL packs with a collator of its own; "
                "the student's attention decides here, see docs/adapters.md"
            )
        super().__init__(model, args, *rest, **options)


def row_dataset(cache: Cache, rows: Sequence[int] | NDArray[np.integer] | None = None) -> datasets.Dataset:
    """Row numbers of a cache as the `datasets.Dataset` that TRL insists on.

    Columns: `row`, `cache` (so that a collator of another cache notices), and `length`, tokens of the
    rollout, for `length_column_name`.

    Raises:
        InvalidArgumentError: no rows, or one that the cache does not have.
    """
    chosen = checked_rows(cache, rows)
    return datasets.Dataset.from_dict(
        {
            "row": chosen,
            "cache": np.full(len(chosen), cache_key(cache)),
            "length": cache.row_tokens[chosen].astype(np.int64),
        }
    )


def async_distillation_fields(batch: TeacherBatch) -> dict[str, Tensor]:
    """A batch under the names of TRL's async distillation (`trl.experimental.async_distillation`).

    Axes: T = all tokens without padding, K = ranks. Label-aligned, as TRL keeps it; its `compute_loss` drops
    the first position itself.

    Returns:
        input_ids, attention_mask, position_ids: [1, T] int64.
        completion_mask: [1, T] int64, 1 where a token is in the loss.
        teacher_topk_ids: [1, T, K + 1] int64 by falling probability, -1 where there is none. The last is the
            token itself where the top-k lacks it: TRL counts every id's probability, so none may come twice.
        teacher_topk_logprobs: [1, T, K + 1] float32, -inf where there is none.

    Raises:
        InvalidArgumentError: the batch has no top-k, or no log-probs of the tokens themselves.
    """
    ids, logprobs, sampled = batch.topk_ids, batch.topk_logprob, batch.teacher_logprob
    if ids is None or logprobs is None or sampled is None:
        raise InvalidArgumentError(
            "TRL's async distillation needs top-k and teacher_logprob, which these rollouts do not carry"
        )
    n_tokens, at = batch.n_tokens, batch.response_index
    known = ~logprobs.isneginf()
    listed = ((ids == batch.target_ids[:, None]) & known).any(dim=1)
    own_id = batch.target_ids.masked_fill(listed, -1)[:, None]
    own_logprob = sampled.masked_fill(listed, -torch.inf)[:, None]
    topk_ids = ids.new_full((n_tokens, ids.shape[1] + 1), -1, dtype=torch.int64)
    topk_ids[at] = torch.cat([ids.long().masked_fill(~known, -1), own_id], dim=1)
    topk_logprobs = logprobs.new_full(topk_ids.shape, -torch.inf)
    topk_logprobs[at] = torch.cat([logprobs, own_logprob], dim=1)
    completion_mask = torch.zeros_like(batch.position_ids[:n_tokens])
    completion_mask[at] = batch.loss_mask.long()
    found = {
        "input_ids": batch.input_ids[:n_tokens],
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "position_ids": batch.position_ids[:n_tokens],
        "teacher_topk_ids": topk_ids,
        "teacher_topk_logprobs": topk_logprobs,
    }
    return {name: tensor[None] for name, tensor in found.items()}


def async_distillation_samples(batch: TeacherBatch, *, teacher_id: str = "teacher") -> list[dict[str, Any]]:
    """The same, one rollout each, as TRL's `DataCollatorForRollout` takes them.

    Args:
        teacher_id: a key of the trainer's `teacher_server_urls`.

    Returns:
        For each rollout numpy arrays `input_ids`, `completion_mask`, `teacher_topk_ids`,
        `teacher_topk_logprobs`; `teacher_id`; `prompt_id`, the row in the cache; empty `metrics`.

    Raises:
        InvalidArgumentError: as for `async_distillation_fields`.
    """
    fields = async_distillation_fields(batch)
    names = ("input_ids", "completion_mask", "teacher_topk_ids", "teacher_topk_logprobs")
    pieces = [fields[name][0].cpu().split(batch.lengths.tolist()) for name in names]
    return [
        {name: piece.numpy() for name, piece in zip(names, row, strict=True)}
        | {"teacher_id": teacher_id, "prompt_id": row_id, "metrics": {}}
        for row, row_id in zip(zip(*pieces, strict=True), batch.row_ids.tolist(), strict=True)
    ]
