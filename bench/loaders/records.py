"""ArrayRecord files with grain's loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from loaders import layout
from loaders.layout import BATCH, Batch, Layout
from loaders.rollouts import FIELDS, HALF, Rollouts, Sample

THREADS = 2


def to_bytes(sample: Sample) -> bytes:
    """Token and response counts and K, then the arrays."""
    shape = np.array([len(sample["token_ids"]), *sample["topk_ids"].shape], np.int64)
    return b"".join([shape.tobytes(), *(sample[name].tobytes() for name in FIELDS)])


def from_bytes(data: bytes, *, half: bool) -> Sample:
    """Views."""
    n_tokens, n_rows, topk = np.frombuffer(data, np.int64, 3)
    found, place = {}, 24
    for name in FIELDS:
        dtype = np.dtype(np.float16 if half and name in HALF else layout.DTYPES.get(name, np.float32))
        shape = (
            (n_tokens,) if name == "token_ids" else (n_rows, topk) if name.startswith("topk") else (n_rows,)
        )
        count = int(np.prod(shape))
        found[name] = np.frombuffer(data, dtype, count, place).reshape(shape)
        place += count * dtype.itemsize
    return found


def write(data: Rollouts, folder: Path, n_shards: int, *, zstd: bool) -> None:
    """A record a rollout."""
    options = "group_size:1,zstd:1" if zstd else "group_size:1,uncompressed"
    for number, (start, stop) in enumerate(layout.shard_bounds(len(data), n_shards)):
        writer = ArrayRecordWriter(str(folder / f"{number:05d}.array_record"), options)
        for row in range(start, stop):
            writer.write(to_bytes(data.sample(row, half=zstd)))
        writer.close()


class Reader:
    """grain's data source."""

    def __init__(self, folder: str, *, half: bool) -> None:
        self.half = half
        self.source = grain.sources.ArrayRecordDataSource(sorted(map(str, Path(folder).iterdir())))

    def __len__(self) -> int:
        return len(self.source)

    def parse(self, record: bytes) -> Sample:
        """One record."""
        return from_bytes(record, half=self.half)

    def epoch(self) -> Iterator[Batch]:
        for start in range(0, len(self), BATCH):
            rows = range(start, min(start + BATCH, len(self)))
            yield layout.pack([self.parse(record) for record in self.source.__getitems__(rows)])

    def rollout(self, row: int) -> Sample:
        return self.parse(self.source[row])


def shuffled(reader: Reader, _: int, seed: int) -> Iterator[Batch]:
    """grain's own shuffle and threads; its worker processes are not used."""
    data = grain.MapDataset.source(reader.source).shuffle(seed=seed).map(reader.parse)
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=4 * BATCH)
    return iter(data.to_iter_dataset(options).batch(BATCH, batch_fn=layout.pack_wide))


LAYOUTS = (
    Layout(
        name="ArrayRecord",
        note="group_size 1; shuffled by grain with 2 threads",
        checked=True,
        write=lambda data, folder, n: write(data, folder, n, zstd=False),
        open=lambda folder: Reader(folder, half=False),
        shuffled=shuffled,
        forks=False,
    ),
    Layout(
        name="ArrayRecord zstd, fp16",
        note="group_size 1, zstd-1",
        half=True,
        checked=True,
        write=lambda data, folder, n: write(data, folder, n, zstd=True),
        open=lambda folder: Reader(folder, half=True),
    ),
)
