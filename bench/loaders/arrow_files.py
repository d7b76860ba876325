"""Arrow IPC and Parquet through pyarrow: a row a rollout, list columns, 16 rollouts a batch or row group.

From a bucket, Arrow IPC files are fetched whole, which is the fewest requests for an epoch; Parquet fetches
the column chunks of a row group at once (`pre_buffer`). pyarrow's own S3 client does both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from loaders import layout
from loaders.layout import BATCH, Batch, Layout
from loaders.rollouts import FIELDS, Rollouts, Sample

with contextlib.suppress(ImportError):
    import pandas  # noqa: F401  pyarrow imports it at the first conversion, which is not what is measured

File = pa.ipc.RecordBatchFileReader | pq.ParquetFile
Rows = pa.RecordBatch | pa.Table | tuple[pa.Table, pa.Table]
TOPK = ("topk_ids", "topk_logprob")
PAGE_BYTES = 1 << 20
SPLIT = "BYTE_STREAM_SPLIT"
FIRST_BAND = 8


def list_columns(data: Rollouts, *, half: bool, bands: tuple[int, ...] = ()) -> pa.Table:
    """One row a rollout. The mask is a byte a position, which is faster than Arrow's bits.

    Args:
        half: `rollouts.HALF` as float16.
        bands: ends of rank bands, a pair of columns each; none for one pair.
    """
    columns = {}
    for name in FIELDS:
        values = getattr(data, name)
        starts = data.token_start if name == "token_ids" else data.response_start
        for key, part in split_bands(name, values, bands):
            width = part.shape[1] if part.ndim == 2 else 1
            flat = np.ascontiguousarray(part).reshape(-1)
            if flat.dtype == bool:
                flat = flat.view(np.uint8)
            elif half and name in ("topk_logprob", "log_tail"):
                flat = flat.astype(np.float16)
            columns[key] = pa.ListArray.from_arrays(
                pa.array((starts * width).astype(np.int32)), pa.array(flat)
            )
    return pa.table(columns)


def split_bands(
    name: str, values: NDArray[Any], bands: tuple[int, ...]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Column names and values."""
    if name not in TOPK or not bands:
        yield name, values
        return
    start = 0
    for stop in bands:
        yield f"{name}_{stop}", values[:, start:stop]
        start = stop


def values_of(column: pa.Array | pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[Any]]:
    """Values and row bounds of a list column, without a copy where it is one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    bounds = column.offsets.to_numpy()
    return column.values.to_numpy()[bounds[0] : bounds[-1]], bounds - bounds[0]


def fields_of(table: pa.Table | pa.RecordBatch) -> tuple[Sample, NDArray[Any]]:
    """All rows end to end, and the number of tokens of each."""
    found: Sample = {}
    for name in table.schema.names:
        values, bounds = values_of(table.column(name))
        if name == "token_ids":
            tokens = bounds
        elif name == "log_tail":
            rows = bounds[-1]
        found[name] = values.view(np.bool_) if name == "loss_mask" else values
    for name in table.schema.names:
        if name.startswith(TOPK):
            found[name] = found[name].reshape(rows, -1)
    join_bands(found)
    return found, np.diff(tokens).astype(np.int64)


def join_bands(found: Sample) -> None:
    """Rank bands side by side, widening float16 on the way."""
    for name in TOPK:
        keys = sorted(
            (key for key in found if key.startswith(f"{name}_")), key=lambda key: int(key.split("_")[-1])
        )
        if keys:
            dtype = layout.DTYPES.get(name, np.float32)
            found[name] = np.concatenate([found.pop(key) for key in keys], axis=1, dtype=dtype)


def batch_of(table: pa.Table | pa.RecordBatch) -> Batch:
    """Owned tensors."""
    found, lengths = fields_of(table)
    batch = {name: layout.tensor(layout.owned(values, name)) for name, values in found.items()}
    return batch | {"lengths": torch.from_numpy(lengths)}


def row_of(table: pa.Table | pa.RecordBatch, row: int) -> Sample:
    """One row."""
    return fields_of(table.slice(row, 1))[0]


def bucket() -> pyarrow.fs.S3FileSystem:
    """Of the server that the environment names."""
    scheme, _, host = os.environ["AWS_ENDPOINT_URL"].partition("://")
    return pyarrow.fs.S3FileSystem(
        access_key=os.environ["AWS_ACCESS_KEY_ID"],
        secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=host,
        scheme=scheme,
        region="us-east-1",
    )


def listed(uri: str) -> tuple[list[str], pyarrow.fs.S3FileSystem | None]:
    """Files of a folder or prefix, sorted; None as file system where they are local."""
    if not uri.startswith("s3://"):
        return sorted(map(str, Path(uri).iterdir())), None
    remote = bucket()
    found = remote.get_file_info(pyarrow.fs.FileSelector(uri.removeprefix("s3://")))
    return sorted(info.path for info in found), remote


class Sharded:
    """Files with the same number of rollouts but the last."""

    def __init__(self, uri: str) -> None:
        self.paths, self.remote = listed(uri)
        self.opened: dict[int, Any] = {}
        self.held: tuple[tuple[int, int], Any] | None = None
        self.per_shard = self.rows(0)

    def __len__(self) -> int:
        last = len(self.paths) - 1
        return last * self.per_shard + self.rows(last)

    def shard(self, number: int) -> File:
        if number not in self.opened:
            self.opened[number] = self.open(number)
        return self.opened[number]

    def group(self, shard: int, group: int) -> Rows:
        """The last one is kept: random rows of the same group then cost nothing."""
        if self.held is None or self.held[0] != (shard, group):
            self.held = (shard, group), self.read(shard, group)
        return self.held[1]

    def epoch(self) -> Iterator[Batch]:
        for number in range(len(self.paths)):
            for group in range(-(-self.rows(number) // BATCH)):
                yield batch_of(self.read(number, group))
            if self.remote:
                self.opened.pop(number)

    def rollout(self, row: int) -> Sample:
        shard, row = divmod(row, self.per_shard)
        group, row = divmod(row, BATCH)
        return row_of(self.group(shard, group), row)

    def open(self, number: int) -> File:
        raise NotImplementedError

    def rows(self, number: int) -> int:
        raise NotImplementedError

    def read(self, shard: int, group: int) -> Rows:
        raise NotImplementedError


class IpcReader(Sharded):
    """Memory-mapped files, or whole objects."""

    def open(self, number: int) -> File:
        path = self.paths[number]
        if self.remote is None:
            return pa.ipc.open_file(pa.memory_map(path))
        with self.remote.open_input_file(path) as file:
            return pa.ipc.open_file(pa.py_buffer(file.read_at(file.size(), 0)))

    def rows(self, number: int) -> int:
        file = self.shard(number)
        last = file.num_record_batches - 1
        return last * BATCH + file.get_batch(last).num_rows

    def read(self, shard: int, group: int) -> pa.RecordBatch:
        return self.shard(shard).get_batch(group)


class ParquetReader(Sharded):
    """One row group at a time."""

    columns: list[str] | None = None

    def open(self, number: int) -> pq.ParquetFile:
        return pq.ParquetFile(self.paths[number], filesystem=self.remote, pre_buffer=self.remote is not None)

    def rows(self, number: int) -> int:
        return self.shard(number).metadata.num_rows

    def read(self, shard: int, group: int) -> pa.Table:
        return self.shard(shard).read_row_group(group, columns=self.columns, use_threads=False)


class FlatParquetReader(ParquetReader):
    """Pairs of files: top-k as flat columns of values, the rest as lists."""

    def __init__(self, uri: str) -> None:
        self.flat: dict[int, pq.ParquetFile] = {}
        super().__init__(uri)

    def open(self, number: int) -> pq.ParquetFile:
        folder = self.paths[number]
        files = [
            pq.ParquetFile(
                f"{folder}/{name}.parquet", filesystem=self.remote, pre_buffer=self.remote is not None
            )
            for name in ("topk", "rollouts")
        ]
        self.flat[number] = files[0]
        return files[1]

    def read(self, shard: int, group: int) -> tuple[pa.Table, pa.Table]:
        rest = super().read(shard, group)
        return rest, self.flat[shard].read_row_group(group, use_threads=False)

    def epoch(self) -> Iterator[Batch]:
        for number in range(len(self.paths)):
            for group in range(-(-self.rows(number) // BATCH)):
                rest, topk = self.read(number, group)
                batch = batch_of(rest)
                for name in TOPK:
                    values = flat_values(topk.column(name)).reshape(len(batch["log_tail"]), -1)
                    batch[name] = layout.tensor(layout.owned(values, name))
                yield batch

    def rollout(self, row: int) -> Sample:
        shard, row = divmod(row, self.per_shard)
        group, row = divmod(row, BATCH)
        rest, topk = self.group(shard, group)
        found = row_of(rest, row)
        bounds = values_of(rest.column("log_tail"))[1]
        for name in TOPK:
            values = flat_values(topk.column(name)).reshape(bounds[-1], -1)
            found[name] = values[bounds[row] : bounds[row + 1]]
        return found


def flat_values(column: pa.ChunkedArray) -> NDArray[Any]:
    """Of a flat column."""
    return (column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)).to_numpy()


def write_ipc(data: Rollouts, folder: Path, n_shards: int, *, half: bool, zstd: bool) -> None:
    """Files of record batches."""
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1) if zstd else None)
    for number, (start, stop) in enumerate(layout.shard_bounds(len(data), n_shards, BATCH)):
        table = list_columns(data.part(start, stop), half=half)
        with pa.ipc.new_file(str(folder / f"{number:05d}.arrow"), table.schema, options=options) as file:
            for row in range(0, len(table), BATCH):
                file.write_batch(table.slice(row, BATCH).combine_chunks().to_batches()[0])


def write_parquet(
    data: Rollouts, folder: Path, n_shards: int, *, split: bool, bands: tuple[int, ...] = ()
) -> None:
    """Defaults with zstd, or BYTE_STREAM_SPLIT for every float and integer column."""
    for number, (start, stop) in enumerate(layout.shard_bounds(len(data), n_shards, BATCH)):
        table = list_columns(data.part(start, stop), half=True, bands=bands)
        write_table(
            table, folder / f"{number:05d}.parquet", row_group_size=BATCH, split=split, leaf=".list.element"
        )


def write_bands(data: Rollouts, folder: Path, n_shards: int) -> None:
    """Two pairs of columns: the first 8 ranks and the others."""
    write_parquet(data, folder, n_shards, split=True, bands=(FIRST_BAND, data.topk))


def write_flat(data: Rollouts, folder: Path, n_shards: int) -> None:
    """As bench/peers.py tunes Parquet: no lists where the bytes are, pages of 1 MiB."""
    for number, (start, stop) in enumerate(layout.shard_bounds(len(data), n_shards, BATCH)):
        part = data.part(start, stop)
        shard = folder / f"{number:05d}"
        shard.mkdir()
        rest = list_columns(part, half=True).drop_columns(list(TOPK))
        write_table(rest, shard / "rollouts.parquet", row_group_size=BATCH, split=True, leaf=".list.element")
        flat = [
            pa.table(
                {
                    "topk_ids": group.topk_ids.reshape(-1),
                    "topk_logprob": group.topk_logprob.astype(np.float16).reshape(-1),
                }
            )
            for group in (part.part(row, min(row + BATCH, len(part))) for row in range(0, len(part), BATCH))
        ]
        write_table(flat, shard / "topk.parquet", row_group_size=1 << 30, split=True, leaf="")


def write_table(
    groups: pa.Table | list[pa.Table], path: Path, *, row_group_size: int, split: bool, leaf: str
) -> None:
    """One file; a list of tables is a row group each."""
    groups = [groups] if isinstance(groups, pa.Table) else groups
    schema = groups[0].schema
    tuned: dict[str, Any] = {}
    if split:
        encodings = {f"{name}{leaf}": SPLIT for name in schema.names if name != "loss_mask"}
        tuned = {"use_dictionary": False, "column_encoding": encodings, "compression_level": 1}
        tuned |= {"max_rows_per_page": 1 << 30, "data_page_size": PAGE_BYTES, "write_statistics": False}
    with pq.ParquetWriter(path, schema, compression="zstd", **tuned) as file:
        for table in groups:
            file.write_table(table, row_group_size=row_group_size)


def first_ranks(reader: ParquetReader, _: int) -> Iterator[Batch]:
    """The first band's columns, and the small ones."""
    names = (f"topk_ids_{FIRST_BAND}", f"topk_logprob_{FIRST_BAND}")
    reader.columns = [*(name for name in FIELDS if name not in TOPK), *names]
    return reader.epoch()


LAYOUTS = (
    Layout(
        name="Arrow IPC",
        note="memory-mapped, no compression",
        write=lambda data, folder, n: write_ipc(data, folder, n, half=False, zstd=False),
        open=IpcReader,
        shuffled=layout.torch_shuffled,
    ),
    Layout(
        name="Arrow IPC zstd, fp16",
        note="zstd-1",
        half=True,
        write=lambda data, folder, n: write_ipc(data, folder, n, half=True, zstd=True),
        open=IpcReader,
    ),
    Layout(
        name="Parquet zstd, fp16",
        note="pyarrow's defaults with zstd",
        half=True,
        write=lambda data, folder, n: write_parquet(data, folder, n, split=False),
        open=ParquetReader,
    ),
    Layout(
        name="Parquet BSS, fp16",
        note="BYTE_STREAM_SPLIT and zstd-1, list columns",
        half=True,
        write=lambda data, folder, n: write_parquet(data, folder, n, split=True),
        open=ParquetReader,
    ),
    Layout(
        name="Parquet BSS, fp16, flat",
        note="the same with top-k in flat columns of a file beside it",
        half=True,
        write=write_flat,
        open=FlatParquetReader,
        tasks=frozenset({"epoch", "random"}),
    ),
    Layout(
        name="Parquet BSS, fp16, 2 bands",
        note="list columns, the first 8 ranks in their own",
        half=True,
        write=write_bands,
        open=ParquetReader,
        few_ranks=first_ranks,
        tasks=frozenset({"bucket"}),
    ),
)
