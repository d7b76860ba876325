"""What a format has to offer to be measured, and what loaders of rollouts have in common.

Everybody ends with the same: a dictionary of the fields of `rollouts.FIELDS` and "lengths", [S] tokens of
each rollout, as tensors that the caller owns. Ids are 32 bits wide, log-probs are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loaders.rollouts import FIELDS, Rollouts, Sample

BATCH = 16
"""Rollouts of a batch. Formats with record batches or row groups make them as large, in their favour."""
Batch = dict[str, Tensor]
DTYPES = {"token_ids": np.uint32, "loss_mask": np.bool_, "topk_ids": np.uint32}
"""Of the fields in a batch; the others are float32."""


class Reader(Protocol):
    """An open data set."""

    def __len__(self) -> int:
        """Rollouts."""

    def epoch(self) -> Iterator[Batch]:
        """All rollouts in stored order, `BATCH` at a time."""

    def rollout(self, row: int) -> Sample:
        """One rollout; views are fine, the caller copies them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to store and to read. A reader may lack what a table asks for; the table then shows a dash."""

    name: str
    note: str
    half: bool = False
    """Whether log-probs of the top-k and the tail are stored as float16."""
    checked: bool = False
    """Whether a changed byte is noticed by default."""
    write: Callable[[Rollouts, Path, int], None]
    """Into an empty folder, in about so many shards."""
    open: Callable[[str], Any]
    """Of a folder or an s3:// address."""
    shuffled: Callable[[Any, int, int], Iterator[Batch]] | None = None
    """(reader, workers, seed): an epoch in random order, token ids with 64 bits, as embeddings take them."""
    endless: Callable[[Any, int, int], Iterator[Batch]] | None = None
    """The same, epoch after epoch; None: `shuffled` is called again for each."""
    few_ranks: Callable[[Any, int], Iterator[Batch]] | None = None
    """An epoch of the first ranks only."""
    forks: bool = True
    """Whether `shuffled` can do with worker processes."""
    random: bool = True
    """Whether the reader can read one rollout."""
    stores: str | None = None
    """Name of the layout whose files this one reads; None: its own."""
    ring: bool = False
    """Whether the output of a batch is overwritten by the next one."""
    tasks: frozenset[str] | None = None
    """What it takes part in; None: everything that it offers."""


def shard_bounds(n_rollouts: int, n_shards: int, step: int = 1) -> list[tuple[int, int]]:
    """Rollouts start..stop of every shard, equal in number, multiples of `step` where there are enough."""
    per_shard = -(-n_rollouts // n_shards)
    if per_shard > step:
        per_shard = -(-per_shard // step) * step
    return [(start, min(start + per_shard, n_rollouts)) for start in range(0, n_rollouts, per_shard)]


def tensor(values: NDArray[Any]) -> Tensor:
    """Ids as int32: torch does little with unsigned ones."""
    return torch.from_numpy(values.view(np.int32) if values.dtype == np.uint32 else values)


def owned(values: NDArray[Any], name: str) -> NDArray[Any]:
    """A copy in the dtype of the batch."""
    return values.astype(DTYPES.get(name, np.float32), copy=True)


def pack(samples: Sequence[Sample]) -> Batch:
    """Rollouts end to end: one copy of each value, which widens float16 on the way."""
    lengths = np.array([len(sample["token_ids"]) for sample in samples])
    batch = {"lengths": torch.from_numpy(lengths)}
    for name in FIELDS:
        dtype = DTYPES.get(name, np.float32)
        batch[name] = tensor(np.concatenate([sample[name] for sample in samples], dtype=dtype))
    return batch


def packed(samples: Iterator[Sample]) -> Iterator[Batch]:
    """Batches of a stream of rollouts."""
    held: list[Sample] = []
    for sample in samples:
        held.append(sample)
        if len(held) == BATCH:
            yield pack(held)
            held = []
    if held:
        yield pack(held)


def wide(batch: Batch) -> Batch:
    """Token ids as int64, as our `TeacherBatch` has them for embeddings; top-k ids stay as they are."""
    return batch | {"token_ids": batch["token_ids"].to(torch.int64)}


def pack_wide(samples: Sequence[Sample]) -> Batch:
    """The usual collate function of a trainer."""
    return wide(pack(samples))


class MapDataset(torch.utils.data.Dataset[Sample]):
    """What people wrap around random access."""

    def __init__(self, reader: Reader, n_rollouts: int) -> None:
        self.reader, self.n_rollouts = reader, n_rollouts

    def __len__(self) -> int:
        return self.n_rollouts

    def __getitem__(self, row: int) -> Sample:
        return self.reader.rollout(row)


def torch_shuffled(reader: Reader, workers: int, seed: int) -> Iterator[Batch]:
    """torch's DataLoader over a map-style data set."""
    generator = torch.Generator().manual_seed(seed)
    return iter(
        torch.utils.data.DataLoader(
            MapDataset(reader, len(reader)),
            batch_size=BATCH,
            shuffle=True,
            generator=generator,
            num_workers=workers,
            collate_fn=pack_wide,
        )
    )
