"""Index segments: which shards a commit added, and where each rollout is.

A segment is two Arrow files. The shard table is small and is all that opening a cache reads. The rollout
table maps hash -> (shard, row), sorted by hash, and is read when somebody looks a rollout up.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import layout
from opd_store.arrow_message import check_record_batch, record_batches
from opd_store.errors import FormatError
from opd_store.shard import Region, ShardInfo, check_regions, require_in_place, require_no_nulls


def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


def _required(fields: dict[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])


SHARD_TABLE = _required(
    {
        "sha256": pa.binary(layout.HASH_BYTES),
        "n_bytes": pa.uint64(),
        "rows": pa.uint32(),
        "tokens": pa.uint64(),
        "response_tokens": pa.uint64(),
        "region_offset": _list_of(pa.uint64()),
        "region_length": _list_of(pa.uint64()),
        "region_crc32c": _list_of(pa.uint32()),
        "region_rows": _list_of(pa.uint32()),
    }
)
ROLLOUT_TABLE = _required(
    {"rollout_hash": pa.binary(layout.HASH_BYTES), "shard": pa.uint32(), "row": pa.uint32()}
)


@dataclass(frozen=True, slots=True)
class FileRef:
    """An index file or id table as the manifest names it."""

    sha256: bytes
    n_bytes: int
    directory: str = layout.INDEX_DIR

    @property
    def path(self) -> str:
        """Name relative to the cache's root."""
        suffix = layout.TABLE_SUFFIX if self.directory == layout.TABLE_DIR else ".arrow"
        return f"{self.directory}/{self.sha256.hex()}{suffix}"


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """One index segment as the manifest names it."""

    shards: FileRef
    rollouts: FileRef
    n_shards: int
    rows: int
    tokens: int
    response_tokens: int
    n_bytes: int
    """Bytes of the shards."""
    max_error: float
    """Nats: how far log-probs and tails of packed pages are from those appended, at most."""


def encode_shard_table(shards: Sequence[ShardInfo]) -> bytes:
    """The shard table as an Arrow IPC file."""
    scalars = [[getattr(shard, name) for shard in shards] for name in SHARD_TABLE.names[:5]]
    regions = [
        [[getattr(region, name.removeprefix("region_")) for region in shard.regions] for shard in shards]
        for name in SHARD_TABLE.names[5:]
    ]
    return _encode(SHARD_TABLE, scalars + regions)


def decode_shard_table(buffer: pa.Buffer, *, where: str) -> list[ShardInfo]:
    """Read a shard table whose digest was checked.

    Raises:
        FormatError: not a shard table, or regions that do not cover their shard.
    """
    table = _decode(buffer, SHARD_TABLE, where)
    shards = []
    for row in table.to_pylist():
        columns = (row[f"region_{name}"] for name in ("offset", "length", "crc32c", "rows"))
        try:
            regions = tuple(Region(*values) for values in zip(*columns, strict=True))
        except ValueError as error:
            raise FormatError(f"{where}: region columns of different lengths") from error
        shard = ShardInfo(**{name: row[name] for name in SHARD_TABLE.names[:5]}, regions=regions)
        check_regions(shard.regions, shard.n_bytes, shard.rows, where=f"{where}, shard {shard.sha256.hex()}")
        shards.append(shard)
    return shards


def encode_rollout_table(hashes: Sequence[Sequence[bytes]]) -> bytes:
    """The rollout table, as an Arrow IPC file, of shards whose row hashes are given in shard order."""
    flat = b"".join(row_hash for shard in hashes for row_hash in shard)
    shard = np.repeat(np.arange(len(hashes), dtype=np.uint32), [len(rows) for rows in hashes])
    row = np.concatenate([np.arange(len(rows), dtype=np.uint32) for rows in hashes])
    return _encode_rollouts(np.frombuffer(flat, np.uint8), shard, row)


def merge_rollout_tables(tables: Sequence[RolloutTable], n_shards: Sequence[int]) -> bytes:
    """Join the tables of consecutive segments, which hold `n_shards` shards each."""
    first_shard = np.cumsum([0, *n_shards])
    return _encode_rollouts(
        np.concatenate([table.hashes for table in tables]),
        np.concatenate([table.shard + np.uint32(at) for table, at in zip(tables, first_shard, strict=False)]),
        np.concatenate([table.row for table in tables]),
    )


def _encode_rollouts(hashes: NDArray[np.uint8], shard: NDArray[np.uint32], row: NDArray[np.uint32]) -> bytes:
    hashes = hashes.reshape(-1, layout.HASH_BYTES)
    # Rows are in storage order, so a stable sort by hash keeps equal rollouts in that order.
    order = np.argsort(np.ascontiguousarray(hashes).view(f"S{layout.HASH_BYTES}").ravel(), kind="stable")
    packed = pa.Array.from_buffers(
        ROLLOUT_TABLE.types[0], len(order), [None, pa.py_buffer(hashes[order].tobytes())]
    )
    return _encode(ROLLOUT_TABLE, [packed, pa.array(shard[order]), pa.array(row[order])])


class RolloutTable:
    """A mapped rollout table."""

    def __init__(self, buffer: pa.Buffer, shard_rows: Sequence[int], *, where: str) -> None:
        """Open a table whose digest was checked.

        Args:
            shard_rows: rows of every shard of the segment.

        Raises:
            FormatError: not a rollout table, or one that points outside its segment.
        """
        n_rows = sum(shard_rows)
        table = _decode(buffer, ROLLOUT_TABLE, where)
        if table.num_rows != n_rows:
            raise FormatError(f"{where}: {table.num_rows} rollouts, the manifest says {n_rows}")
        columns = [table.column(name) for name in ROLLOUT_TABLE.names]
        kinds = (np.uint8, np.uint32, np.uint32)
        sizes = (layout.HASH_BYTES * n_rows, n_rows, n_rows)
        self.hashes, self.shard, self.row = (
            np.frombuffer(column.buffers()[1], kind)[:size]
            for column, kind, size in zip(columns, kinds, sizes, strict=True)
        )
        limits = np.array([*shard_rows, 0], np.uint32)
        if (self.row >= limits[np.minimum(self.shard, len(shard_rows))]).any():
            raise FormatError(f"{where}: points to a row that its shard does not have")
        self._bytes = memoryview(self.hashes)
        self._n_rows = n_rows

    def _hash(self, index: int) -> bytes:
        return self._bytes[index * layout.HASH_BYTES : (index + 1) * layout.HASH_BYTES].tobytes()

    def find(self, rollout_hash: bytes) -> Iterator[tuple[int, int]]:
        """(shard of the segment, row of the shard) of every rollout with this hash, in storage order."""
        index = bisect.bisect_left(range(self._n_rows), rollout_hash, key=self._hash)
        while index < self._n_rows and self._hash(index) == rollout_hash:
            yield int(self.shard[index]), int(self.row[index])
            index += 1

    def in_order(self) -> bool:
        """Whether the table is in the order that `find` relies on: by hash, then by place."""
        view = self.hashes.reshape(-1, layout.HASH_BYTES).view(f"S{layout.HASH_BYTES}").ravel()
        place = self.shard.astype(np.uint64) << np.uint64(32) | self.row
        rising = (view[1:] > view[:-1]) | ((view[1:] == view[:-1]) & (place[1:] > place[:-1]))
        return bool(rising.all())


def _encode(schema: pa.Schema, columns: list[Any]) -> bytes:
    arrays = [
        values if isinstance(values, pa.Array) else pa.array(values, column.type)
        for column, values in zip(schema, columns, strict=True)
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return bytes(sink.getvalue())


def _decode(buffer: pa.Buffer, schema: pa.Schema, where: str) -> pa.RecordBatch:
    try:
        # Before Arrow makes anything of it: one record batch, and nothing compressed.
        blocks = record_batches(buffer)
        if len(blocks) == 1:
            check_record_batch(buffer.slice(*blocks[0]))
        reader = pa.ipc.open_file(buffer)
        if not reader.schema.equals(schema, check_metadata=True) or reader.num_record_batches != 1:
            raise FormatError(f"{where}: not an index file of this format: {reader.schema!s:.200}")
        batch = reader.get_batch(0)
        batch.validate(full=True)
        require_no_nulls(batch)
        require_in_place(batch, buffer)
    except FormatError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FormatError(f"{where}: index file does not parse: {error}") from error
    return batch
