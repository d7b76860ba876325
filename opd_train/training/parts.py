"""Which rollouts a refreshing run streams: the cache at the start, and what it sampled itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opd_store import Cache
from opd_train.data.batches import TeacherBatch
from opd_train.data.order import Shuffle
from opd_train.data.selection import Rows, TooLong
from opd_train.data.stream import CacheStream
from opd_train.models import CausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How batches are made of the rollouts there are; see `CacheStream`."""

    batch_tokens: int = 16384
    batch_rollouts: int | None = None
    seed: int = 0
    ranks: int | None = None
    shuffle: Shuffle | str = Shuffle.BLOCK
    window: int = 32
    too_long: TooLong | str = TooLong.ERROR
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """Rollouts of one version of the policy: rows [first, end) of the run's cache, or all of the one at the
    start."""

    policy_version: int
    first: int = 0
    end: int = 0
    is_start: bool = False


def stream_parts(
    parts: Sequence[Part], start: Cache | None, own: Cache | None, config: StreamConfig, student: CausalLM
) -> CacheStream:
    """Batches of these rollouts, without end.

    Args:
        start, own: the cache at the start and the run's; needed if a part is of them.
    """
    caches: list[Cache] = []
    rows: list[Rows | None] = []
    if any(part.is_start for part in parts):
        assert start is not None
        caches.append(start)
        rows.append(None)
    spans = [np.arange(part.first, part.end) for part in parts if not part.is_start]
    if spans:
        assert own is not None
        caches.append(own)
        rows.append(np.concatenate(spans))
    options = {item.name: getattr(config, item.name) for item in dataclasses.fields(StreamConfig)}
    return CacheStream(
        caches,
        rows=rows,
        epochs=None,
        device=student.device,
        vocab_size=student.vocab_size,
        context=student.context,
        **options,
    )


def policy_versions(parts: Sequence[Part], batch: TeacherBatch) -> torch.Tensor:
    """[S] int64 on the batch's device: of which version each rollout of a batch of these parts is."""
    # The start, if it is streamed, then the rest: rows of the run's cache rise from part to part.
    parts = sorted(parts, key=lambda part: not part.is_start)
    versions = torch.tensor([part.policy_version for part in parts])
    ends = torch.tensor([part.end for part in parts])
    n_start = sum(part.is_start for part in parts)
    source, row = batch.source_ids.cpu(), batch.row_ids.cpu()
    at = n_start + torch.searchsorted(ends[n_start:], row, right=True)
    if n_start:
        at = torch.where(source == 0, 0, at)
    return versions[at].to(batch.row_ids.device)
