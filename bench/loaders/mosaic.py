"""MosaicML streaming: MDS shards of samples with an index."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers.feature_extraction_utils  # noqa: F401  before torchvision is replaced

from loaders import layout
from loaders.layout import BATCH, Batch, Layout
from loaders.rollouts import Rollouts, Sample


def _no_torchvision() -> None:
    """`streaming` imports it for pictures, and PyPI's build of it does not load beside a CPU torch."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    sys.modules["torchvision.datasets"].CIFAR10 = object  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]


if importlib.util.find_spec("torchvision") is None:
    _no_torchvision()
warnings.simplefilter("ignore")
from streaming import MDSWriter, StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402

COLUMNS = {
    "token_ids": "ndarray:uint32",
    "loss_mask": "ndarray:uint8",
    "teacher_logprob": "ndarray:float32",
    "behaviour_logprob": "ndarray:float32",
    "topk_ids": "ndarray:uint32",
}


def write(data: Rollouts, folder: Path, n_shards: int, *, zstd: bool) -> None:
    """One sample a rollout."""
    kind = "float16" if zstd else "float32"
    columns = COLUMNS | {name: f"ndarray:{kind}" for name in ("topk_logprob", "log_tail")}
    per_sample = [sum(value.nbytes for value in sample.values()) for sample in data.samples(half=zstd)]
    # Shards close before they pass the limit, so the limit allows for the rollouts' different lengths.
    limit = math.ceil(sum(per_sample) / n_shards * 1.02) + 4096
    compression = "zstd:1" if zstd else None
    with MDSWriter(out=str(folder), columns=columns, size_limit=limit, compression=compression) as writer:
        for sample in data.samples(half=zstd):
            writer.write(sample | {"loss_mask": sample["loss_mask"].view("u1")})


class Reader:
    """`zstd` and remote shards are unpacked into a new local folder, as the first epoch of a job does."""

    def __init__(self, uri: str, *, remote: bool) -> None:
        clean_stale_shared_memory()
        if "AWS_ENDPOINT_URL" in os.environ:
            os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
        self.uri, self.held = uri, None
        if remote or uri.startswith("s3://"):
            self.held = tempfile.TemporaryDirectory()
        self.data = self.open(shuffle=False, seed=0)

    def open(self, *, shuffle: bool, seed: int) -> StreamingDataset:
        """An iterable and random-access data set."""
        places = {"local": self.uri} if self.held is None else {"remote": self.uri, "local": self.held.name}
        return StreamingDataset(
            **places, shuffle=shuffle, shuffle_seed=seed, batch_size=BATCH, num_canonical_nodes=1
        )

    def __len__(self) -> int:
        return len(self.data)

    def epoch(self) -> Iterator[Batch]:
        return layout.packed(map(sample_of, self.data))

    def rollout(self, row: int) -> Sample:
        return sample_of(self.data[row])


def sample_of(found: Sample) -> Sample:
    """The mask as bool."""
    return found | {"loss_mask": found["loss_mask"].view(bool)}


def collate(found: list[Sample]) -> Batch:
    """For torch's DataLoader."""
    return layout.pack_wide([sample_of(sample) for sample in found])


def shuffled(reader: Reader, workers: int, seed: int) -> Iterator[Batch]:
    """Its own shuffle under torch's DataLoader."""
    reader.data = None
    clean_stale_shared_memory()
    data = reader.open(shuffle=True, seed=seed)
    return iter(torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=collate))


LAYOUTS = (
    Layout(
        name="MDS",
        note="no compression",
        write=lambda data, folder, n: write(data, folder, n, zstd=False),
        open=lambda uri: Reader(uri, remote=False),
        shuffled=shuffled,
    ),
    Layout(
        name="MDS zstd, fp16",
        note="zstd-1; the first pass unpacks every shard to disk, later ones read that",
        half=True,
        write=lambda data, folder, n: write(data, folder, n, zstd=True),
        open=lambda uri: Reader(uri, remote=True),
    ),
)
