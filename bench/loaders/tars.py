"""WebDataset: tar files of .npy members, read front to back."""

from __future__ import annotations

import glob
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset

from loaders import layout
from loaders.layout import BATCH, Batch, Layout
from loaders.rollouts import FIELDS, Rollouts, Sample

SHUFFLED = 1000
"""Samples of its shuffle buffer."""


def write(data: Rollouts, folder: Path, n_shards: int) -> None:
    """A member a field."""
    for number, (start, stop) in enumerate(layout.shard_bounds(len(data), n_shards)):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(start, stop):
                for name, values in data.sample(row).items():
                    file = io.BytesIO()
                    np.save(file, values)
                    member = tarfile.TarInfo(f"{row:08d}.{name}.npy")
                    member.size = file.tell()
                    file.seek(0)
                    tar.addfile(member, file)


def sample_of(found: dict[str, bytes]) -> Sample:
    """Views of the members' bytes."""
    return {name: parse(found[f"{name}.npy"]) for name in FIELDS}


def parse(data: bytes) -> np.ndarray:
    """An array of a .npy file, without a copy, unlike webdataset's own decoder."""
    file = io.BytesIO(data)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


class Reader:
    """Samples come only in order."""

    def __init__(self, uri: str) -> None:
        if uri.startswith("s3://"):
            import s3fs

            self.files = s3fs.S3FileSystem(default_fill_cache=False)
            self.urls = sorted(f"s3://{path}" for path in self.files.ls(uri))
            # webdataset itself would start `aws s3 cp`; whole objects through s3fs are quicker to start.
            webdataset.gopen_schemes["s3"] = lambda url, *_, **__: io.BytesIO(self.files.cat_file(url))
        else:
            self.urls = sorted(glob.glob(f"{uri}/*.tar"))

    def samples(self, *, shuffle: int = 0, seed: int = 0) -> Iterator[Sample]:
        """In order, or through its buffer."""
        data = webdataset.WebDataset(
            self.urls,
            shardshuffle=len(self.urls) if shuffle else False,
            seed=seed,
            workersplitter=webdataset.split_by_worker,
            empty_check=False,
        )
        return (data.shuffle(shuffle) if shuffle else data).map(sample_of)

    def epoch(self) -> Iterator[Batch]:
        return layout.packed(iter(self.samples()))


def shuffled(reader: Reader, workers: int, seed: int) -> Iterator[Batch]:
    """Shards in random order, then its buffer."""
    samples = reader.samples(shuffle=SHUFFLED, seed=seed)
    return iter(
        webdataset.WebLoader(samples, batch_size=BATCH, num_workers=workers, collate_fn=layout.pack_wide)
    )


LAYOUTS = (
    Layout(
        name="WebDataset",
        note="a .npy member a field; shuffled through a buffer of 1,000",
        write=write,
        open=Reader,
        shuffled=shuffled,
        random=False,
    ),
)
