"""HDF5 through h5py: flat data sets in one file a shard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import torch

from loaders import layout
from loaders.layout import BATCH, Batch, Layout
from loaders.rollouts import FIELDS, HALF, Rollouts, Sample

CHUNK = 4096
"""Positions of a compressed chunk."""
STARTS = ("token_start", "response_start")

os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")


def write(data: Rollouts, folder: Path, n_shards: int, *, blosc: bool) -> None:
    """Whole arrays, or chunks of shuffled bytes under blosc's zstd-1."""
    for number, (start, stop) in enumerate(layout.shard_bounds(len(data), n_shards)):
        part = data.part(start, stop)
        with h5py.File(folder / f"{number:05d}.h5", "w") as file:
            for name in STARTS:
                file[name] = getattr(part, name)
            for name in FIELDS:
                values = getattr(part, name)
                if not blosc:
                    file[name] = values
                    continue
                values = values.astype(np.float16) if name in HALF else values
                chunk = (min(CHUNK, len(values)), *values.shape[1:])
                file.create_dataset(
                    name, data=values, chunks=chunk, compression=hdf5plugin.Blosc(cname="zstd", clevel=1)
                )


class Reader:
    """Shards are opened at first use."""

    def __init__(self, folder: str) -> None:
        self.paths = sorted(Path(folder).iterdir())
        self.opened: dict[int, tuple[Any, ...]] = {}
        self.per_shard = len(self.shard(0)[0][0]) - 1

    def __len__(self) -> int:
        last = len(self.paths) - 1
        return last * self.per_shard + len(self.shard(last)[0][0]) - 1

    def shard(self, number: int) -> tuple[Any, ...]:
        """Bounds and data sets."""
        if number not in self.opened:
            file = h5py.File(self.paths[number], "r")
            topk = file["topk_ids"].shape[1]
            # Two chunks or the library's default: what reads fastest, and too little for all of top-k.
            cache_bytes = max(1 << 20, 2 * CHUNK * topk * 4)
            file = h5py.File(self.paths[number], "r", rdcc_nbytes=cache_bytes)
            self.opened[number] = [file[name][:] for name in STARTS], {name: file[name] for name in FIELDS}
        return self.opened[number]

    def part(self, shard: int, start: int, stop: int) -> Sample:
        """Rollouts start..stop of a shard, end to end, in arrays of their own."""
        starts, sets = self.shard(shard)
        bounds = {name: starts[name != "token_ids"] for name in FIELDS}
        return {name: sets[name][bounds[name][start] : bounds[name][stop]] for name in FIELDS}

    def epoch(self) -> Iterator[Batch]:
        for number in range(len(self.paths)):
            bounds = self.shard(number)[0][0]
            for start in range(0, len(bounds) - 1, BATCH):
                stop = min(start + BATCH, len(bounds) - 1)
                batch = {"lengths": torch.from_numpy(np.diff(bounds[start : stop + 1]))}
                for name, values in self.part(number, start, stop).items():
                    dtype = layout.DTYPES.get(name, np.float32)
                    batch[name] = layout.tensor(values.astype(dtype, copy=False))
                yield batch

    def rollout(self, row: int) -> Sample:
        shard, row = divmod(row, self.per_shard)
        return self.part(shard, row, row + 1)


LAYOUTS = (
    Layout(
        name="HDF5",
        note="contiguous data sets",
        write=lambda data, folder, n: write(data, folder, n, blosc=False),
        open=Reader,
        shuffled=layout.torch_shuffled,
    ),
    Layout(
        name="HDF5 blosc zstd, fp16",
        note="chunks of 4,096 positions, bytes shuffled, blosc's zstd-1 (hdf5plugin)",
        half=True,
        write=lambda data, folder, n: write(data, folder, n, blosc=True),
        open=Reader,
    ),
)
