"""Bare numpy memmaps of flat arrays: what hardware and kernel allow, and what no format is faster than."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loaders import layout
from loaders.layout import BATCH, Batch, Layout
from loaders.rollouts import FIELDS, Rollouts, Sample

STARTS = ("token_start", "response_start")


def write(data: Rollouts, folder: Path, n_shards: int) -> None:
    """A folder of .npy files a shard."""
    for number, (start, stop) in enumerate(layout.shard_bounds(len(data), n_shards)):
        data.part(start, stop).save(folder / f"{number:05d}")


class Shard:
    """One folder, mapped."""

    def __init__(self, folder: Path) -> None:
        self.starts = [np.load(folder / f"{name}.npy") for name in STARTS]
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in FIELDS}

    def part(self, start: int, stop: int) -> Sample:
        """Rollouts start..stop, end to end, as views."""
        found: Sample = {}
        for name, values in self.arrays.items():
            bounds = self.starts[name != "token_ids"]
            found[name] = values[bounds[start] : bounds[stop]]
        return found


class Reader:
    """Shards are mapped at first use; the first one tells how many rollouts they hold."""

    def __init__(self, folder: str, *, ring: bool = False) -> None:
        self.folders = sorted(Path(folder).iterdir())
        self.shards: dict[int, Shard] = {}
        self.per_shard = len(self.shard(0).starts[0]) - 1
        self.ring: dict[str, Tensor] | None = {} if ring else None

    def __len__(self) -> int:
        last = len(self.folders) - 1
        return last * self.per_shard + len(self.shard(last).starts[0]) - 1

    def shard(self, number: int) -> Shard:
        """Mapped."""
        if number not in self.shards:
            self.shards[number] = Shard(self.folders[number])
        return self.shards[number]

    def epoch(self) -> Iterator[Batch]:
        """One copy a field."""
        for number in range(len(self.folders)):
            shard = self.shard(number)
            n_rollouts = len(shard.starts[0]) - 1
            for start in range(0, n_rollouts, BATCH):
                stop = min(start + BATCH, n_rollouts)
                batch = {"lengths": torch.from_numpy(np.diff(shard.starts[0][start : stop + 1]))}
                for name, values in shard.part(start, stop).items():
                    batch[name] = self.room(name, values)
                yield batch

    def room(self, name: str, values: NDArray[Any]) -> Tensor:
        """A copy, in memory of the batch before it if there is a ring."""
        if self.ring is None:
            return layout.tensor(np.array(values))
        held = self.ring.get(name)
        if held is None or len(held) < len(values):
            held = layout.tensor(np.empty((int(1.5 * len(values)), *values.shape[1:]), values.dtype))
            self.ring[name] = held
        found = held[: len(values)]
        np.copyto(found.numpy().view(values.dtype), values)
        return found

    def rollout(self, row: int) -> Sample:
        """Views."""
        number, row = divmod(row, self.per_shard)
        return self.shard(number).part(row, row + 1)


LAYOUTS = (
    Layout(
        name="memmap, ring",
        note="bare numpy memmap, copied into memory that the next batch reuses",
        write=write,
        open=lambda folder: Reader(folder, ring=True),
        ring=True,
        tasks=frozenset({"epoch", "memory"}),
    ),
    Layout(
        name="memmap",
        note="bare numpy memmap, copied into new memory; shuffled by torch's DataLoader",
        write=write,
        open=Reader,
        stores="memmap, ring",
        shuffled=layout.torch_shuffled,
    ),
)
