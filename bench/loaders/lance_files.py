"""Lance data sets, through pylance."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np

from loaders import arrow_files, layout
from loaders.layout import BATCH, Batch, Layout
from loaders.rollouts import Rollouts, Sample


def write(data: Rollouts, folder: Path, n_shards: int) -> None:
    """The list columns of Arrow IPC, a fragment a shard."""
    table = arrow_files.list_columns(data, half=True)
    per_shard = layout.shard_bounds(len(data), n_shards, BATCH)[0][1]
    lance.write_dataset(table, str(folder), max_rows_per_file=per_shard, mode="overwrite")


class Reader:
    """It decodes in threads of its own."""

    def __init__(self, uri: str) -> None:
        options = None
        if uri.startswith("s3://"):
            options = {
                "aws_endpoint": os.environ["AWS_ENDPOINT_URL"],
                "allow_http": "true",
                "region": "us-east-1",
            }
            options |= {"access_key_id": os.environ["AWS_ACCESS_KEY_ID"]}
            options |= {"secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"]}
        self.data = lance.dataset(uri, storage_options=options)

    def __len__(self) -> int:
        return self.data.count_rows()

    def epoch(self) -> Iterator[Batch]:
        for found in self.data.to_batches(batch_size=BATCH):
            yield arrow_files.batch_of(found)

    def rollout(self, row: int) -> Sample:
        return arrow_files.row_of(self.data.take([row]), 0)


def shuffled(reader: Reader, _: int, seed: int) -> Iterator[Batch]:
    """A batch is one `take`. Forked workers hang (its issues 2204, 2405)."""
    order = np.random.default_rng(seed).permutation(len(reader))
    for start in range(0, len(order), BATCH):
        yield layout.wide(arrow_files.batch_of(reader.data.take(order[start : start + BATCH])))


LAYOUTS = (
    Layout(
        name="Lance, fp16",
        note="defaults; it compresses by itself and uses threads of its own",
        half=True,
        write=write,
        open=Reader,
        shuffled=shuffled,
        forks=False,
    ),
)
