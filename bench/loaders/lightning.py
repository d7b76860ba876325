"""litdata: chunks of samples with an index."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

warnings.simplefilter("ignore")
import litdata  # noqa: E402
import litdata.streaming.downloader  # noqa: E402
from litdata.streaming.cache import Cache  # noqa: E402

from loaders import layout  # noqa: E402
from loaders.layout import BATCH, Batch, Layout  # noqa: E402
from loaders.rollouts import FIELDS, Rollouts, Sample  # noqa: E402

# Its other client refuses plain http and its options cannot be told to allow it.
litdata.streaming.downloader._OBSTORE_AVAILABLE = False


def write(data: Rollouts, folder: Path, n_shards: int, *, zstd: bool) -> None:
    """One sample a rollout, arrays in the order of `FIELDS`."""
    n_bytes = sum(value.nbytes for sample in data.samples(half=zstd) for value in sample.values())
    cache = Cache(
        str(folder), chunk_bytes=int(n_bytes / n_shards * 1.02) + 4096, compression="zstd:1" if zstd else None
    )
    for row, sample in enumerate(data.samples(half=zstd)):
        cache[row] = [sample[name] for name in FIELDS]
    cache.done()
    cache.merge()


class Reader:
    """Chunks from a bucket, and packed ones, go through a local folder."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.held = tempfile.mkdtemp()
        self.options = None
        if uri.startswith("s3://"):
            self.options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
        self.data = self.open(shuffle=False, seed=0)

    def open(self, *, shuffle: bool, seed: int) -> litdata.StreamingDataset:
        """An iterable and random-access data set."""
        return litdata.StreamingDataset(
            self.uri,
            cache_dir=self.held if self.options else None,
            shuffle=shuffle,
            seed=seed,
            drop_last=False,
            storage_options=self.options,
        )

    def close(self) -> None:
        """Remove what was fetched."""
        shutil.rmtree(self.held, ignore_errors=True)

    def __len__(self) -> int:
        return len(self.data)

    def epoch(self) -> Iterator[Batch]:
        return layout.packed(map(sample_of, self.data))

    def rollout(self, row: int) -> Sample:
        return sample_of(self.data[row])


def sample_of(found: list) -> Sample:
    """By name."""
    return dict(zip(FIELDS, found, strict=True))


def collate(found: list) -> Batch:
    """For its DataLoader."""
    return layout.pack_wide([sample_of(sample) for sample in found])


def shuffled(reader: Reader, workers: int, seed: int) -> Iterator[Batch]:
    """Its own shuffle and loader."""
    data = reader.open(shuffle=True, seed=seed)
    return iter(litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=collate))


LAYOUTS = (
    Layout(
        name="litdata",
        note="no compression",
        write=lambda data, folder, n: write(data, folder, n, zstd=False),
        open=Reader,
        shuffled=shuffled,
    ),
    Layout(
        name="litdata zstd, fp16",
        note="zstd-1",
        half=True,
        write=lambda data, folder, n: write(data, folder, n, zstd=True),
        open=Reader,
    ),
)
