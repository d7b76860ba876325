"""Hugging Face datasets: memory-mapped Arrow files behind `load_from_disk`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from loaders import arrow_files, layout
from loaders.layout import BATCH, Batch, Layout
from loaders.rollouts import FIELDS, Rollouts, Sample

datasets.disable_progress_bars()


def write(data: Rollouts, folder: Path, n_shards: int) -> None:
    """The list columns of Arrow IPC."""
    table = arrow_files.list_columns(data, half=False)
    datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(folder, num_shards=n_shards)


class Reader:
    """One of its output formats."""

    def __init__(self, folder: str, kind: str) -> None:
        self.kind = kind
        self.data = datasets.load_from_disk(folder).with_format(kind)

    def __len__(self) -> int:
        return len(self.data)

    def epoch(self) -> Iterator[Batch]:
        for found in self.data.iter(batch_size=BATCH):
            if self.kind == "arrow":
                yield arrow_files.batch_of(found)
            else:
                rows = [{name: found[name][row] for name in FIELDS} for row in range(len(found["log_tail"]))]
                yield layout.pack([sample(row) for row in rows])

    def rollout(self, row: int) -> Sample:
        found = self.data[row]
        return arrow_files.row_of(found, 0) if self.kind == "arrow" else sample(found)


def sample(row: dict[str, Any]) -> Sample:
    """Arrays in the shapes of a rollout."""
    if torch.is_tensor(row["log_tail"]):
        row = {name: value.numpy() for name, value in row.items()}
    shaped = {name: np.asarray(row[name]) for name in FIELDS}
    n_rows = len(shaped["log_tail"])
    for name in arrow_files.TOPK:
        shaped[name] = shaped[name].reshape(n_rows, -1)
    ids = {name: shaped[name].astype(np.uint32, copy=False) for name in ("token_ids", "topk_ids")}
    return shaped | ids | {"loss_mask": shaped["loss_mask"].astype(np.bool_)}


def _layout(kind: str, stores: str | None) -> Layout:
    return Layout(
        name=f"HF datasets, {kind}",
        note=f"with_format({kind!r})",
        write=write,
        open=lambda folder: Reader(folder, kind),
        shuffled=layout.torch_shuffled if kind == "arrow" else None,
        stores=stores,
    )


LAYOUTS = (
    _layout("arrow", None),
    _layout("numpy", "HF datasets, arrow"),
    _layout("torch", "HF datasets, arrow"),
)
