"""Rollouts as tensors: variable-length rows packed end to end, and the padded form models without varlen
take.

Axes: S = rollouts, T = all tokens with padding, N = response tokens, K = ranks, L = longest rollout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_store import NO_ID, InvalidArgumentError, InvalidRolloutError, Rollout
from opd_train.data.packing import BufferPool, Packing
from opd_train.data.pending import PendingTopK
from opd_train.data.supports import asked_for

LOGPROBS = ("teacher_logprob", "behaviour_logprob", "reference_logprob")
TOPK = ("topk_ids", "topk_logprob", "log_tail")


@dataclass(frozen=True, kw_only=True)
class TeacherTargets:
    """What another teacher said of the rollouts of a batch. A field that any of them lacks is None."""

    teacher_logprob: Tensor | None = None
    """[N] float32, nats."""
    topk_ids: Tensor | None = None
    """[N, K] int32, as in `TeacherBatch`; K is this teacher's."""
    topk_logprob: Tensor | None = None
    """[N, K] float32."""
    log_tail: Tensor | None = None
    """[N] float32."""


@dataclass(frozen=True, kw_only=True)
class TeacherBatch:
    """Rollouts with what the teacher said of them. Optional fields are None if any rollout lacks them.

    T may be padded at its end. In `cu_seqlens` padding is part of the last rollout: it comes after all of its
    tokens, so that under causal attention no real token sees it. In `position_ids` it counts from 0 again,
    and once more wherever it would pass the longest rollout: a model that finds out from positions where
    rollouts begin takes it for rollouts of their own, and none is given a position beyond those it needs.
    No response token, mask or target is padding.
    """

    row_ids: Tensor
    """[S] int64 row numbers in the cache; -1 for rollouts that never were in one."""
    source_ids: Tensor
    """[S] int64 which of the caches a rollout is from; 0 where there is only one."""
    input_ids: Tensor
    """[T] int64 prompts and responses, then padding with id 0."""
    position_ids: Tensor
    """[T] int64, 0 at the first token of each rollout and of padding."""
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
    """[N, K] int32; 0 where a row has fewer ranks, so that every id can be gathered after `.long()`."""
    topk_logprob: Tensor | None = None
    """[N, K] float32; -inf where a row has fewer ranks."""
    log_tail: Tensor | None = None
    """[N] float32."""
    drawn_ids: Tensor | None = None
    """[N, M] int32 distinct ids drawn from the teacher; 0 where a position has fewer. As what follows, here
    only if it was asked for."""
    drawn_logprob: Tensor | None = None
    """[N, M] float32, the teacher's; -inf where a position has fewer."""
    drawn_weight: Tensor | None = None
    """[N, M] float32 `opd_train.losses.draw_weights`: rows sum to 1; 0 where a position has fewer."""
    chosen_ids: Tensor | None = None
    """[N, C] int32 ids that another model chose, such as the student; padded in the same way."""
    chosen_logprob: Tensor | None = None
    """[N, C] float32, the teacher's."""
    chosen_log_tail: Tensor | None = None
    """[N] float32, the teacher's probability outside the chosen ids."""
    policy_version: Tensor | None = None
    """[S] int64, which version of the policy sampled each rollout, such as its training step."""
    joined: tuple[TeacherTargets, ...] = ()
    """What other teachers said of the same rollouts."""
    n_padding: int = 0
    """Tokens of padding at the end of T."""
    buffer: Tensor | None = field(default=None, repr=False)
    """[bytes] uint8 that the tensors above look into; None if each has memory of its own."""
    pending: tuple[PendingTopK, ...] = field(default=(), repr=False)
    """Top-k still in pages, which `DeviceFeed` puts together; the fields it will become are None until then.
    """

    @property
    def n_tokens(self) -> int:
        """Tokens of the rollouts, without padding."""
        return len(self.input_ids) - self.n_padding

    @property
    def n_padded_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def lengths(self) -> Tensor:
        """[S] int64 tokens of each rollout, without padding."""
        lengths = self.cu_seqlens.diff().long()
        if self.n_padding:
            lengths[-1] -= self.n_padding
        return lengths

    @property
    def target_ids(self) -> Tensor:
        """[N] int64, the sampled response tokens."""
        return self.input_ids[self.response_index]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is not None, by name; those of other teachers as "joined.0.log_tail"."""
        found = {name: value for name, value in _fields(self).items() if name != "buffer"}
        for number, targets in enumerate(self.joined):
            found |= {f"joined.{number}.{name}": value for name, value in _fields(targets).items()}
        return found

    def to(self, device: torch.device | str) -> TeacherBatch:
        """The batch with every tensor on the device: one copy, which is waited for; `DeviceFeed` does not
        wait.

        Raises:
            InvalidArgumentError: its top-k is still in pages.
        """
        if self.pending:
            raise InvalidArgumentError("to: this batch has top-k in pages; send it with a DeviceFeed")
        if self.buffer is None:
            return self.moved(lambda tensor: tensor.to(device))
        return self.rebased(self.buffer.to(device))

    def rebased(self, buffer: Tensor) -> TeacherBatch:
        """The batch in a copy of its buffer; what is not in the buffer is copied to where that is."""
        old = self.buffer
        if old is None or old is buffer:
            return self
        moved = self.moved(lambda tensor: rebase(tensor, old, buffer))
        return dataclasses.replace(moved, buffer=buffer)

    def moved(self, move: Callable[[Tensor], Tensor]) -> TeacherBatch:
        """The batch with a function applied to every tensor but the buffer, which is left out."""
        joined = tuple(
            TeacherTargets(**{name: move(value) for name, value in _fields(targets).items()})
            for targets in self.joined
        )
        fields = {name: move(value) for name, value in _fields(self).items() if name != "buffer"}
        return TeacherBatch(**fields, joined=joined, n_padding=self.n_padding, pending=self.pending)

    def padded(self, multiple_of: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """All rollouts as right-padded rows, for attention without variable lengths.

        Args:
            multiple_of: L is padded to a multiple of it.

        Returns:
            ids: [S, L] int64, 0 where padded.
            attention_mask: [S, L] int64.
            source: [N] int64, index into the flattened [S * L] of what predicts each response token.
        """
        every = list(range(len(self.cu_seqlens) - 1))
        ids, mask, source, _ = self.padded_rows(every, multiple_of=multiple_of)
        return ids, mask, source

    def padded_rows(
        self, rows: Sequence[int], *, multiple_of: int = 1
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Some rollouts as right-padded rows.

        Returns:
            ids, attention_mask, source: as for `padded`, of these rows and their response tokens only.
            place: int64, where in [0, N) those response tokens are.
        """
        device = self.input_ids.device
        lengths = self.lengths
        new_row = torch.full_like(lengths, -1)
        new_row[torch.tensor(rows, device=device)] = torch.arange(len(rows), device=device)
        row_of_token = torch.repeat_interleave(new_row, lengths)
        longest = -(-int(lengths[new_row >= 0].max()) // multiple_of) * multiple_of
        flat = row_of_token * longest + self.position_ids[: self.n_tokens]
        chosen = row_of_token >= 0
        ids = self.input_ids.new_zeros(len(rows) * longest)
        ids[flat[chosen]] = self.input_ids[: self.n_tokens][chosen]
        mask = torch.zeros_like(ids)
        mask[flat[chosen]] = 1
        place = torch.nonzero(chosen[self.response_index])[:, 0]
        source = flat[self.response_index[place]] - 1
        return ids.view(len(rows), longest), mask.view(len(rows), longest), source, place


def collate(
    rollouts: Sequence[Rollout],
    *,
    vocab_size: int,
    row_ids: Sequence[int] | None = None,
    multiple_of: int = 1,
    draws: bool = False,
    draw_temperature: float = 1.0,
    chosen: bool = False,
    pool: BufferPool | None = None,
) -> TeacherBatch:
    """Pack rollouts into tensors on the CPU.

    Args:
        vocab_size: every id is proven below it here, because an id out of range on a GPU kills the process.
        row_ids: [S] cache rows; None for rollouts not from a cache.
        multiple_of: T is padded to a multiple of it.
        draws, chosen: whether to pack drawn, and chosen, ids, where all rollouts have them.
        draw_temperature: at which they were drawn.
        pool: where the buffer is from; None makes a new one.

    Raises:
        InvalidArgumentError: no rollouts.
        InvalidRolloutError: an id outside the vocabulary, naming the rollout.
    """
    if not rollouts:
        raise InvalidArgumentError("rollouts: expected 1 or more to pack, found none")
    lengths = np.array([len(rollout.token_ids) for rollout in rollouts], np.int64)
    responses = lengths - np.array([rollout.prompt_len for rollout in rollouts], np.int64)
    width = max((0 if r.topk_ids is None else r.topk_ids.shape[1] for r in rollouts), default=0)
    supports = {
        support: max(ids.shape[1] for ids in found)
        for support in asked_for(draws=draws, chosen=chosen)
        if len(found := [ids for r in rollouts if (ids := getattr(r, support.columns[0])) is not None])
        == len(rollouts)
    }
    packing = Packing(
        pool or BufferPool(),
        lengths,
        responses,
        multiple_of=multiple_of,
        response_bytes=response_bytes(width) + sum(s.response_bytes(size) for s, size in supports.items()),
    )
    packing.row_ids[:] = -1 if row_ids is None else row_ids
    packing.source_ids[:] = 0
    np.concatenate([rollout.token_ids for rollout in rollouts], out=packing.tokens)
    ids_below(vocab_size, "token_ids", packing.tokens, packing.token_starts, packing.row_ids)
    masks = [np.ones(r.response_len, bool) if r.loss_mask is None else r.loss_mask for r in rollouts]
    np.concatenate(masks, out=packing.loss_mask)
    for name in (*LOGPROBS, *TOPK):
        values = [getattr(rollout, name) for rollout in rollouts]
        if any(value is None for value in values):
            continue
        size = (int(packing.response_starts[-1]), *values[0].shape[1:])
        whole = packing.place(name, size, np.uint32 if name == "topk_ids" else np.float32)
        np.concatenate(values, out=whole)
        if name == "topk_ids":
            whole[whole == NO_ID] = 0
            ids_below(vocab_size, name, whole, packing.response_starts, packing.row_ids)
    for support, size in supports.items():
        support.place(packing, size, 0, rollouts, temperature=draw_temperature)
        name = support.fields[0]
        ids_below(vocab_size, name, packing.get(name), packing.response_starts, packing.row_ids)
    versions = [rollout.policy_version for rollout in rollouts]
    if all(version is not None for version in versions):
        packing.place("policy_version", (len(rollouts),), np.int64)[:] = versions
    return packed_batch(packing)


def response_bytes(width: int) -> int:
    """What log-probs, a top-k of so many ranks and its tail take for each response token, at most."""
    return 4 * len(LOGPROBS) + 8 * width + 4 + 1


def ids_below(
    limit: int,
    name: str,
    ids: NDArray[np.uint32],
    starts: NDArray[np.int64],
    rows: NDArray[np.int64],
    where: str = "",
) -> None:
    """Prove that ids are below a limit.

    Args:
        ids: [n] or [n, K] of several rollouts end to end.
        starts: where in [0, n] each begins.
        rows: what the rollouts are called in errors.
        where: begins the message.

    Raises:
        InvalidRolloutError: names the row of the first that is not.
    """
    if ids.size and int(ids.max()) >= limit:
        at = int(np.argmax(ids.reshape(-1) >= limit))
        position = at * len(ids) // ids.size
        row = rows[np.searchsorted(starts, position, side="right") - 1]
        found = ids.reshape(-1)[at]
        raise InvalidRolloutError(
            f"{where}row {row}, {name}: id {found} outside the vocabulary of {limit}", field=name
        )


def packed_batch(packing: Packing, n_joined: int = 0, pending: tuple[PendingTopK, ...] = ()) -> TeacherBatch:
    """The batch that was packed; what other teachers said was placed under "joined.0.log_tail"."""
    buffer, tensors = packing.finish()
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    others: list[dict[str, Any]] = [{} for _ in range(n_joined)]
    for name in tensors.keys() - own.keys():
        _, number, field_name = name.split(".")
        others[int(number)][field_name] = tensors[name]
    return TeacherBatch(
        **own,
        joined=tuple(TeacherTargets(**targets) for targets in others),
        n_padding=packing.n_padding,
        buffer=buffer,
        pending=pending,
    )


def rebase(tensor: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """What a tensor that looks into `old` is in `new`, a copy of it; a copy of other tensors."""
    start, n_bytes = tensor.data_ptr() - old.data_ptr(), tensor.nbytes
    inside = tensor.device == old.device and start >= 0 and start + n_bytes <= len(old)
    if not inside or not n_bytes or not tensor.is_contiguous():
        return tensor.to(new.device)
    return new[start : start + n_bytes].view(tensor.dtype).view(tensor.shape)


def _fields(value: TeacherBatch | TeacherTargets) -> dict[str, Tensor]:
    found = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
