"""Batches from a cache in a shuffled order that is a pure function of cache, seed and epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from opd_store import Cache, InvalidArgumentError, InvalidRolloutError, MismatchError
from opd_train.batches import TeacherBatch, collate

STATE_VERSION = 1
_COLUMNS = (
    "loss_mask",
    "teacher_logprob",
    "behaviour_logprob",
    "reference_logprob",
    "topk_ids",
    "topk_logprob",
    "log_tail",
)


class CacheStream:
    """Iterates over a cache in packed batches; stops and goes on exactly where its state says.

    Every rollout comes once an epoch over all ranks. A batch is filled in shuffled order until the next
    rollout would pass `batch_tokens` or `batch_rollouts`; batches do not span epochs.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        batch_tokens: int = 16384,
        batch_rollouts: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        ranks: int | None = None,
        epochs: int | None = 1,
        device: torch.device | str = "cpu",
        vocab_size: int | None = None,
        context: int | None = None,
    ) -> None:
        """
        Args:
            batch_tokens: most tokens in a batch, prompts included.
            batch_rollouts: most rollouts in a batch; None for no such limit.
            rank, world_size: this process takes every `world_size`-th rollout of the shuffled order.
            ranks: how many of the cached top-k ranks to read; None means all.
            epochs: passes over the cache; None means without end.
            device: where batches are delivered.
            vocab_size: logits of the student, if fewer than the teacher's; every id is proven below it.
            context: longest rollout the student takes; None for no limit.

        Raises:
            InvalidArgumentError: an argument out of range, an empty cache, or a rollout longer than
            `batch_tokens`
                (raised when it is met, with its row).
        """
        if not 0 <= rank < world_size:
            raise InvalidArgumentError(f"rank: expected 0..{world_size - 1}, found {rank}")
        if len(cache) < world_size:
            raise InvalidArgumentError(f"{cache.uri}: {len(cache)} rollouts cannot feed {world_size} ranks")
        if batch_tokens < 2 or (batch_rollouts is not None and batch_rollouts < 1):
            raise InvalidArgumentError(
                f"batch_tokens and batch_rollouts: expected >= 2 and >= 1, found {batch_tokens} and "
                f"{batch_rollouts}"
            )
        self._cache = cache
        self._batch_tokens, self._batch_rollouts = batch_tokens, batch_rollouts
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._ranks, self._epochs, self._device = ranks, epochs, device
        self._vocab_size = min(cache.meta.vocab_size, vocab_size or cache.meta.vocab_size)
        self._context = context
        self._columns = _COLUMNS if cache.topk else _COLUMNS[:4]
        self._epoch = self._position = 0
        self._order_of: tuple[int, np.ndarray[Any, Any]] | None = None

    def __iter__(self) -> Iterator[TeacherBatch]:
        while (batch := self.next_batch()) is not None:
            yield batch

    def next_batch(self) -> TeacherBatch | None:
        """The next batch, or None after the last epoch."""
        order = self._order()
        if self._position >= len(order):
            self._epoch, self._position = self._epoch + 1, 0
            order = self._order()
        if self._epochs is not None and self._epoch >= self._epochs:
            return None
        rows: list[int] = []
        rollouts = []
        n_tokens = 0
        limit = self._batch_rollouts or len(order)
        while self._position + len(rows) < len(order) and len(rows) < limit:
            row = int(order[self._position + len(rows)])
            rollout = self._cache.rollout(row, ranks=self._ranks, columns=self._columns)
            n_tokens += len(rollout.token_ids)
            if self._context is not None and len(rollout.token_ids) > self._context:
                raise InvalidRolloutError(
                    f"{self._cache.uri}: row {row} has {len(rollout.token_ids)} tokens, the student's "
                    "context is "
                    f"{self._context}; use a student with a longer one, or a cache of shorter rollouts",
                    field="token_ids",
                )
            if n_tokens > self._batch_tokens:
                if not rows:
                    raise InvalidArgumentError(
                        f"{self._cache.uri}: row {row} has {n_tokens} tokens, more than batch_tokens "
                        f"{self._batch_tokens}; raise batch_tokens"
                    )
                break
            rows.append(row)
            rollouts.append(rollout)
        self._position += len(rows)
        return collate(rollouts, vocab_size=self._vocab_size, row_ids=rows).to(self._device)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as JSON values; the next batch is not part of it yet."""
        return {
            "version": STATE_VERSION,
            **self._identity(),
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            MismatchError: it belongs to another cache, seed, world size, batch size or number of ranks, with
            both values.
        """
        for name, value in {"version": STATE_VERSION, **self._identity()}.items():
            if state.get(name) != value:
                raise MismatchError(
                    f"stream state: {name} is {state.get(name)!r}, this stream has {value!r}",
                    field=name,
                    expected=str(value),
                    found=str(state.get(name)),
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {
            "cache": self._cache.digest,
            "seed": self._seed,
            "rank": self._rank,
            "world_size": self._world_size,
            "batch_tokens": self._batch_tokens,
            "batch_rollouts": self._batch_rollouts,
            "ranks": self._ranks,
        }

    def _order(self) -> np.ndarray[Any, Any]:
        if self._order_of is None or self._order_of[0] != self._epoch:
            order = epoch_order(len(self._cache), self._cache.digest, self._seed, self._epoch)
            self._order_of = self._epoch, order[self._rank :: self._world_size]
        return self._order_of[1]


def epoch_order(n_rollouts: int, digest: str, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """[n_rollouts] int64: a uniform permutation, the same for the same arguments on every machine."""
    digest_of_all = hashlib.sha256(f"{digest} {seed} {epoch}".encode()).digest()
    key = int.from_bytes(digest_of_all[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).permutation(n_rollouts)
