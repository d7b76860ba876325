"""Index segments: which shards a commit added, and where each rollout is.

A segment is two Arrow files. The shard table is small and is all that opening a cache reads. The rollout
table maps hash -> (shard, row), sorted by hash, and is read when somebody looks a rollout up.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from opd_store import layout
from opd_store.arrow_message import check_record_batch, record_batches
from opd_store.errors import FormatError
from opd_store.shard import Region, ShardInfo, require_in_place, require_no_nulls


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
        "row_tokens": _list_of(pa.uint32()),
        "row_response_tokens": _list_of(pa.uint32()),
    }
)
_COUNTS, _REGIONS, _LENGTHS = SHARD_TABLE.names[1:5], SHARD_TABLE.names[5:9], SHARD_TABLE.names[9:]
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
    columns: list[Any] = [[getattr(shard, name) for shard in shards] for name in ("sha256", *_COUNTS)]
    columns += [
        [[getattr(region, name.removeprefix("region_")) for region in shard.regions] for shard in shards]
        for name in _REGIONS
    ]
    for name in _LENGTHS:
        lists = [getattr(shard, name) for shard in shards]
        ends = np.cumsum([0, *map(len, lists)])
        values = np.concatenate([np.empty(0, np.uint32), *lists])
        array = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values, pa.uint32()))
        columns.append(array.cast(SHARD_TABLE.field(name).type))
    return _encode(SHARD_TABLE, columns)


class ShardTable(Sequence[ShardInfo]):
    """Shards of one or more segments, as arrays. `table[i]` makes the entry of one.

    Axes: S = shards, B = record batches of all of them, N = rollouts of all of them.
    """

    def __init__(
        self, columns: dict[str, NDArray[Any]], at: dict[str, NDArray[np.int64]], n_parts: int
    ) -> None:
        """Take arrays that were checked.

        Args:
            columns: those of the file, lists end to end.
            at: [S + 1] where the "region" and the "row" lists of each shard start.
            n_parts: regions of a record batch.
        """
        self._columns, self._at, self._n_parts = columns, at, n_parts
        region_rows = columns["region_rows"]
        self.first_row = at["row"]
        """[S + 1] row of the table at which each shard starts."""
        self.first_batch = np.concatenate([[0], np.cumsum((np.diff(at["region"]) - 2) // n_parts)])
        """[S + 1] record batch of the table at which each shard starts."""
        self.batch_rows: NDArray[np.int64] = region_rows[region_rows > 0].astype(np.int64)
        """[B] rollouts of each record batch."""
        self.batch_shard: NDArray[np.int64] = np.repeat(np.arange(len(self)), np.diff(self.first_batch))
        """[B] shard of each record batch."""
        self.row_tokens: NDArray[np.uint32] = columns["row_tokens"]
        """[N] tokens of each rollout, prompt included."""
        self.row_response_tokens: NDArray[np.uint32] = columns["row_response_tokens"]
        """[N] response tokens of each rollout."""
        for array in (self.batch_rows, self.batch_shard, self.row_tokens, self.row_response_tokens):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self._at["row"]) - 1

    @overload
    def __getitem__(self, index: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardInfo]: ...
    def __getitem__(self, index: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"shard {index} of {len(self)}")
        index %= len(self)
        regions, rows = (slice(*self._at[name][index : index + 2].tolist()) for name in ("region", "row"))
        listed = (self._columns[name][regions].tolist() for name in _REGIONS)
        n_bytes, n_rows, tokens, response_tokens = (int(self._columns[name][index]) for name in _COUNTS)
        return ShardInfo(
            sha256=self._columns["sha256"][index].tobytes(),
            n_bytes=n_bytes,
            rows=n_rows,
            tokens=tokens,
            response_tokens=response_tokens,
            regions=tuple(map(Region, *listed)),
            n_parts=self._n_parts,
            row_tokens=self.row_tokens[rows],
            row_response_tokens=self.row_response_tokens[rows],
        )

    def part_bytes(self) -> list[int]:
        """What each part of the record batches takes in all of them together."""
        at = self._at["region"]
        place = np.arange(at[-1]) - np.repeat(at[:-1], np.diff(at))
        inner = (place > 0) & (place < np.repeat(np.diff(at), np.diff(at)) - 1)
        sums = np.zeros(self._n_parts, np.int64)
        np.add.at(sums, (place[inner] - 1) % self._n_parts, self._columns["region_length"][inner])
        return [int(size) for size in sums]

    def total(self, name: str) -> int:
        """Sum over all shards of "n_bytes", "rows", "tokens" or "response_tokens"."""
        return int(self._columns[name].sum())

    @classmethod
    def join(cls, tables: Sequence[ShardTable], n_parts: int) -> ShardTable:
        """The tables of all segments as one; of none, an empty one."""
        if len(tables) == 1:
            return tables[0]
        tables = [_empty_table(n_parts), *tables]
        columns = {
            name: np.concatenate([table._columns[name] for table in tables]) for name in SHARD_TABLE.names
        }
        at = {}
        for name in ("region", "row"):
            sizes = np.concatenate([np.diff(table._at[name]) for table in tables])
            at[name] = np.concatenate([[0], np.cumsum(sizes)])
        return cls(columns, at, n_parts)


def _empty_table(n_parts: int) -> ShardTable:
    columns: dict[str, NDArray[Any]] = {"sha256": np.empty((0, layout.HASH_BYTES), np.uint8)}
    columns |= {name: np.empty(0, np.int64) for name in (*_COUNTS, *_REGIONS[:2])}
    columns |= {name: np.empty(0, np.uint32) for name in (*_REGIONS[2:], *_LENGTHS)}
    return ShardTable(columns, {name: np.zeros(1, np.int64) for name in ("region", "row")}, n_parts)


def decode_shard_table(buffer: pa.Buffer, n_parts: int, *, where: str) -> ShardTable:
    """Read a shard table whose digest was checked.

    Args:
        n_parts: regions of a record batch, as the manifest's schema says.

    Raises:
        FormatError: not a shard table, regions that do not cover their shard or are not the parts of record
            batches, or lengths of rollouts that contradict the rest.
    """
    batch = _decode(buffer, SHARD_TABLE, where)
    n_shards = batch.num_rows
    columns: dict[str, NDArray[Any]] = {
        "sha256": _items(batch.column("sha256"), np.uint8)[: layout.HASH_BYTES * n_shards].reshape(
            n_shards, -1
        )
    }
    for name in _COUNTS:
        column = batch.column(name)
        columns[name] = _items(column, column.type.to_pandas_dtype())[:n_shards]
    at: dict[str, NDArray[np.int64]] = {}
    for name in (*_REGIONS, *_LENGTHS):
        column = batch.column(name)
        ends = _items(column, np.int32)[: n_shards + 1].astype(np.int64)
        # Arrow allows lists to start anywhere in their items.
        items = _items(column.values, column.type.value_type.to_pandas_dtype())
        columns[name] = items[ends[0] : ends[-1]]
        ends -= ends[0]
        kind = name.split("_")[0]
        at.setdefault(kind, ends)
        wrong = np.diff(ends) != np.diff(at[kind])
        _refuse_if(wrong, columns, where, f"its {kind} columns have different lengths")
    _check_regions(columns, at["region"], n_parts, where)
    _check_lengths(columns, at["row"], where)
    # Now small enough, all of them.
    columns |= {name: columns[name].astype(np.int64) for name in (*_COUNTS, *_REGIONS[:2])}
    return ShardTable(columns, at, n_parts)


def _check_regions(columns: dict[str, NDArray[Any]], at: NDArray[np.int64], n_parts: int, where: str) -> None:
    offset, length, rows = (columns[f"region_{name}"] for name in ("offset", "length", "rows"))
    counts = np.diff(at)
    shard = np.repeat(np.arange(len(counts)), counts)
    _refuse_if(
        (counts < 2) | ((counts - 2) % n_parts != 0),
        columns,
        where,
        f"regions that are not 2 and {n_parts} a record batch",
    )
    # Before they are added up, so that no sum wraps around.
    wrong = (length < 1) | (length > layout.MAX_BATCH_BYTES)
    _refuse_if(_any_of(wrong, at), columns, where, f"a region of 0 or over {layout.MAX_BATCH_BYTES} bytes")
    ends = np.concatenate([[0], np.cumsum(length, dtype=np.int64)])
    wrong = offset != (ends[:-1] - ends[at[:-1]][shard]).astype(np.uint64)
    _refuse_if(_any_of(wrong, at), columns, where, "a region does not start where the one before it ends")
    wrong = columns["n_bytes"] != np.diff(ends[at]).astype(np.uint64)
    _refuse_if(wrong, columns, where, "the last region does not end where the file ends")
    place = np.arange(len(shard)) - at[:-1][shard]
    is_first = ((place - 1) % n_parts == 0) & (place > 0) & (place < counts[shard] - 1)
    _refuse_if(
        _any_of((rows > 0) != is_first, at),
        columns,
        where,
        "the first region of each record batch, and no other, holds rows",
    )
    wrong = is_first & (offset % np.uint64(layout.PAGE_ALIGNMENT) != 0)
    _refuse_if(_any_of(wrong, at), columns, where, "a record batch is not aligned")
    sums = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
    _refuse_if(
        np.diff(sums[at]) != columns["rows"], columns, where, "rows of regions do not add up to its rows"
    )


def _check_lengths(columns: dict[str, NDArray[Any]], at: NDArray[np.int64], where: str) -> None:
    tokens, response = columns["row_tokens"], columns["row_response_tokens"]
    _refuse_if(np.diff(at) != columns["rows"], columns, where, "not one length for each of its rows")
    wrong = (response < 1) | (response >= tokens) | (tokens > layout.MAX_ROLLOUT_TOKENS)
    _refuse_if(
        _any_of(wrong, at),
        columns,
        where,
        f"a rollout needs a prompt, a response and at most {layout.MAX_ROLLOUT_TOKENS} tokens",
    )
    for name, lengths in (("tokens", tokens), ("response_tokens", response)):
        sums = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        wrong = columns[name] != np.diff(sums[at]).astype(np.uint64)
        _refuse_if(wrong, columns, where, f"lengths of rollouts do not add up to its {name}")


def _any_of(wrong: NDArray[np.bool_], at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[S] whether any item of a shard is wrong."""
    return np.diff(np.searchsorted(np.flatnonzero(wrong), at)) > 0


def _refuse_if(wrong: NDArray[np.bool_], columns: dict[str, NDArray[Any]], where: str, why: str) -> None:
    if wrong.any():
        name = columns["sha256"][int(np.argmax(wrong))].tobytes().hex()
        raise FormatError(f"{where}, shard {name}: {why}")


def _items(array: pa.Array, dtype: Any) -> NDArray[Any]:  # noqa: ANN401
    """Values of a primitive array, offsets of a list."""
    data = array.buffers()[1]
    return np.frombuffer(data, dtype) if data is not None and data.size else np.zeros(1, dtype)


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

    def __init__(self, buffer: pa.Buffer, shard_rows: ArrayLike, *, where: str) -> None:
        """Open a table whose digest was checked.

        Args:
            shard_rows: [shards] rows of every shard of the segment.

        Raises:
            FormatError: not a rollout table, or one that points outside its segment.
        """
        n_rows = int(np.sum(shard_rows, dtype=np.int64))
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
        limits = np.append(np.asarray(shard_rows, np.uint32), np.uint32(0))
        if (self.row >= limits[np.minimum(self.shard, len(limits) - 1)]).any():
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
