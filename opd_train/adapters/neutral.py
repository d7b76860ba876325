"""Rollouts as padded tensors under names that belong to no framework, and back.

Every row is label-aligned: position t holds what was said *of* token t, given the tokens before it. Models
give at t the logits of token t + 1, so a loss compares `logits[:, :-1]` with `teacher_*[:, 1:]`.

Axes: B = rollouts, S = longest of them, K = ranks; N = response tokens end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from opd_store import Cache, InvalidArgumentError, MismatchError
from opd_train.data.assemble import BatchAssembler
from opd_train.data.batches import TeacherBatch

IGNORED = -100
"""What `labels` holds where a token is not in the loss."""
# Padded name, its name in a TeacherBatch, and what stands where there is no response token. Ids come with the
# log-probs that say where a position has fewer of them.
_OF_TOKENS = (
    ("loss_mask", "loss_mask", False),
    ("teacher_logprob_sampled", "teacher_logprob", 0.0),
    ("rollout_logprobs", "behaviour_logprob", 0.0),
    ("reference_logprobs", "reference_logprob", 0.0),
    ("teacher_ids", "topk_ids", -1),
    ("teacher_logprobs", "topk_logprob", -torch.inf),
    ("teacher_log_tail", "log_tail", 0.0),
    ("drawn_ids", "drawn_ids", -1),
    ("drawn_logprobs", "drawn_logprob", -torch.inf),
    ("drawn_weights", "drawn_weight", 0.0),
    ("chosen_ids", "chosen_ids", -1),
    ("chosen_logprobs", "chosen_logprob", -torch.inf),
    ("chosen_log_tail", "chosen_log_tail", 0.0),
)
_LOGPROB_OF = {"topk_ids": "topk_logprob", "drawn_ids": "drawn_logprob", "chosen_ids": "chosen_logprob"}
_OF_ROLLOUTS = (("row_ids", "row_ids"), ("policy_version", "policy_version"))
_REQUIRED = ("input_ids", "attention_mask", "prompt_lens", "row_ids", "loss_mask")


def to_padded(batch: TeacherBatch) -> dict[str, Tensor]:
    """The rollouts of a batch as right-padded rows.

    Optional fields of the batch that are None are left out, and so is what other teachers said.

    Returns:
        input_ids: [B, S] int64, 0 where padded.
        attention_mask: [B, S] int64.
        position_ids: [B, S] int64 from 0, 0 where padded.
        labels: [B, S] int64, the token itself where it is in the loss, else -100. Not shifted.
        loss_mask: [B, S] bool.
        teacher_ids: [B, S, K] int32, -1 where there is none.
        teacher_logprobs: [B, S, K] float32, -inf where there is none.
        teacher_log_tail: [B, S] float32, 0 outside the response: there, all is in the tail.
        teacher_logprob_sampled, rollout_logprobs, reference_logprobs: [B, S] float32 of the token itself
            under the teacher, the sampler and the reference policy, 0 outside the response.
        drawn_ids, drawn_logprobs, drawn_weights: [B, S, M], chosen_ids, chosen_logprobs: [B, S, C], and
            chosen_log_tail: [B, S], padded in the same way; see `TeacherBatch`.
        prompt_lens: [B] int64, where each response begins.
        row_ids: [B] int64, rows of the cache.
        policy_version: [B] int64.
    """
    lengths, n_responses = batch.lengths, batch.cu_responses.diff().long()
    n_rows, longest = len(lengths), int(lengths.max())
    first = torch.arange(n_rows, device=lengths.device) * longest
    positions = batch.position_ids[: batch.n_tokens]
    token_at = torch.repeat_interleave(first, lengths) + positions
    response_at = token_at[batch.response_index]

    def spread(values: Tensor, at: Tensor, fill: float) -> Tensor:
        whole = values.new_full((n_rows * longest, *values.shape[1:]), fill)
        whole[at] = values
        return whole.view(n_rows, longest, *values.shape[1:])

    in_loss = torch.where(batch.loss_mask, batch.target_ids, IGNORED)
    found = {
        "input_ids": spread(batch.input_ids[: batch.n_tokens], token_at, 0),
        "attention_mask": spread(torch.ones_like(positions), token_at, 0),
        "position_ids": spread(positions, token_at, 0),
        "labels": spread(in_loss, response_at, IGNORED),
        "prompt_lens": lengths - n_responses,
    }
    for name, own, fill in _OF_TOKENS:
        values = getattr(batch, own)
        if values is None:
            continue
        if own in _LOGPROB_OF:
            values = values.masked_fill(getattr(batch, _LOGPROB_OF[own]).isneginf(), -1)
        found[name] = spread(values, response_at, fill)
    for name, own in _OF_ROLLOUTS:
        if (values := getattr(batch, own)) is not None:
            found[name] = values.clone()
    return found


def from_padded(fields: Mapping[str, Tensor]) -> TeacherBatch:
    """What `to_padded` was given, on the device where the fields are.

    Fields of other names are ignored. `labels` is not read: `loss_mask` says the same.

    Raises:
        InvalidArgumentError: a required field is missing.
    """
    for name in _REQUIRED:
        if name not in fields:
            raise InvalidArgumentError(
                f"batch: expected {name!r}, found {', '.join(sorted(fields))}; "
                "batches come from a CacheCollator, and `remove_unused_columns` has to be False"
            )
    real = fields["attention_mask"].bool()
    positions = torch.arange(real.shape[1], device=real.device).expand_as(real)
    response = real & (positions >= fields["prompt_lens"][:, None])
    own: dict[str, Any] = {
        name: fields[padded][response] for padded, name, _ in _OF_TOKENS if padded in fields
    }
    own |= {name: fields[padded] for padded, name in _OF_ROLLOUTS if padded in fields}
    for name in own.keys() & _LOGPROB_OF.keys():
        own[name] = own[name].clamp(min=0)
    return TeacherBatch(
        source_ids=torch.zeros_like(fields["row_ids"]),
        input_ids=fields["input_ids"][real],
        position_ids=positions[real],
        cu_seqlens=_offsets(real.sum(dim=1)),
        response_index=torch.nonzero(response[real])[:, 0],
        cu_responses=_offsets(response.sum(dim=1)),
        **own,
    )


def cache_key(cache: Cache) -> int:
    """The first 60 bits of the cache's digest: enough to notice rows of another one."""
    return int(cache.digest.removeprefix("sha256:")[:15], 16)


def checked_rows(cache: Cache, rows: Sequence[int] | NDArray[np.integer] | None) -> NDArray[np.int64]:
    """[n] row numbers of a cache, all of it for None.

    Raises:
        InvalidArgumentError: none, or one that the cache does not have.
    """
    found = np.arange(len(cache)) if rows is None else np.asarray(rows)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"rows: expected one or more row numbers of {cache.uri}, found {found.dtype} of shape "
            f"{list(found.shape)}"
        )
    if not 0 <= found.min() <= found.max() < len(cache):
        raise InvalidArgumentError(
            f"rows: expected 0..{len(cache) - 1} of {cache.uri}, found {found.min()}..{found.max()}"
        )
    return found.astype(np.int64)


class CacheDataset(Dataset[dict[str, int]]):
    """Rows of a cache, map-style. Items are row numbers; a `CacheCollator` reads a whole batch at a time."""

    def __init__(self, cache: Cache, rows: Sequence[int] | NDArray[np.integer] | None = None) -> None:
        """
        Args:
            rows: which rows, such as those of `opd_store.select` or `opd_store.split`; None means all.

        Raises:
            InvalidArgumentError: no rows, or one that the cache does not have.
        """
        self.rows = checked_rows(cache, rows)
        self._key = cache_key(cache)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"row": int(self.rows[index]), "cache": self._key}


class CacheCollator:
    """Reads the rows of a batch from a cache into padded tensors, see `to_padded`.

    Worker processes may share it: pickling passes the cache's address.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        ranks: int | None = None,
        max_tokens: int | None = None,
        vocab_size: int | None = None,
        draws: bool = False,
        chosen: bool = False,
    ) -> None:
        """
        Args:
            ranks: how many of the cached top-k ranks to read; the rest joins the tail. None means all.
            max_tokens: rollouts are cut after so many tokens; None for no limit.
            vocab_size: logits of the student, if fewer than the teacher's; every id is proven below it.
            draws, chosen: whether to read drawn, and chosen, ids.

        Raises:
            InvalidArgumentError: an argument out of range, or ids that the cache does not have.
        """
        self.cache, self.max_tokens = cache, max_tokens
        self.ranks = cache.topk if ranks is None else ranks
        self.vocab_size = cache.meta.vocab_size if vocab_size is None else vocab_size
        self.draws, self.chosen = draws, chosen
        self._key = cache_key(cache)
        self._assembler = BatchAssembler(
            [cache], ranks=ranks, vocab_size=vocab_size, max_tokens=max_tokens, draws=draws, chosen=chosen
        )

    def __call__(self, items: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
        """Read rows into tensors on the CPU.

        Args:
            items: of a `CacheDataset` or of `opd_train.adapters.trl.row_dataset`, one or more.

        Raises:
            MismatchError: a row number of another cache.
            InvalidArgumentError: items of another data set, or a prompt that `max_tokens` leaves no response.
            InvalidRolloutError: an id outside the vocabulary, with row and column.
            IntegrityError, FormatError: a shard is damaged.
        """
        for item in items:
            if not {"row", "cache"} <= item.keys():
                raise InvalidArgumentError(
                    f"batch: expected items with 'row' and 'cache', found {sorted(item)}; "
                    "use a CacheDataset, and set `remove_unused_columns` to False"
                )
            if item["cache"] != self._key:
                raise MismatchError(
                    f"row {item['row']} is of another cache than this collator's {self.cache.uri}; "
                    "make data set and collator from the same opened cache",
                    field="cache",
                    expected=f"{self._key:015x}",
                    found=f"{item['cache']:015x}",
                )
        return to_padded(self._assembler.assemble(0, [item["row"] for item in items]))


def _offsets(sizes: Tensor) -> Tensor:
    """[B + 1] int32, where each begins."""
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
