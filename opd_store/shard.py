"""One shard: an Arrow IPC file, cut into regions that together cover every byte and each have a CRC-32C.

Region 0 is the magic and the schema, the last one the footer. Those between are the parts of the record
batches, one batch after the other: part 0 is the message's metadata with the scalar columns, part 1 the lists
of tokens and log-probs, and each packed column is a part. So a few columns of a batch can be read and checked
without the others.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import layout
from opd_store.arrow_message import check_record_batch
from opd_store.errors import FormatError, IntegrityError
from opd_store.hashing import Buffer, crc32c
from opd_store.schema import part_columns


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes [offset, offset + length) of a shard."""

    offset: int
    length: int
    crc32c: int
    rows: int
    """Rollouts of the record batch for its first part; 0 for all other regions."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What the index records of a shard."""

    sha256: bytes
    n_bytes: int
    rows: int
    tokens: int
    """All tokens, prompts included."""
    response_tokens: int
    regions: tuple[Region, ...]
    n_parts: int
    """Regions of every record batch."""
    row_tokens: NDArray[np.uint32] = field(compare=False, repr=False)
    """[rows] tokens of every rollout, prompt included."""
    row_response_tokens: NDArray[np.uint32] = field(compare=False, repr=False)
    """[rows] response tokens of every rollout."""

    @property
    def path(self) -> str:
        """Name relative to the cache's root."""
        return f"{layout.SHARD_DIR}/{self.sha256.hex()}.arrow"

    @property
    def n_batches(self) -> int:
        """Number of record batches."""
        return (len(self.regions) - 2) // self.n_parts

    def parts(self, number: int) -> tuple[Region, ...]:
        """The regions of record batch `number`, in file order."""
        first = 1 + number * self.n_parts
        return self.regions[first : first + self.n_parts]


def part_slices(info: ShardInfo, number: int) -> list[tuple[int, int, int]]:
    """(offset in the file, length, CRC-32C) of every part of record batch `number`."""
    return [(part.offset, part.length, part.crc32c) for part in info.parts(number)]


class ShardSource(Protocol):
    """Where the checked bytes of one shard come from."""

    def batch(self, number: int, parts: tuple[int, ...]) -> pa.Buffer:
        """Record batch `number`, as a buffer of its whole length, starting at its first byte.

        The bytes of `parts` (0, 1, ...; always with 0) are there and were compared with their checksums;
        other bytes may be anything.

        Raises:
            IntegrityError: they are missing, or not the ones that were written.
        """

    def prefetch(self, number: int, parts: tuple[int, ...]) -> None:
        """Say that these parts will be asked for, and return at once."""


class Proof:
    """What was found right about a shard so far. It outlives the mapping of its file."""

    def __init__(self, identity: Hashable = None) -> None:
        """`identity` tells the file from another one under its name."""
        self.identity = identity
        self.head = False
        self.regions: set[int] = set()
        """Regions whose bytes were compared with their checksums."""
        self.parts: dict[int, frozenset[int]] = {}
        """Parts of record batches whose columns were found well formed."""


class MappedShard:
    """A shard that is mapped into memory; a region is compared with its checksum before its first use."""

    def __init__(
        self,
        buffer: pa.Buffer,
        info: ShardInfo,
        schema: pa.Schema,
        *,
        uri: str,
        current_size: Callable[[], int] | None = None,
        proof: Proof | None = None,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        """Check size, schema and footer.

        Args:
            buffer: the whole file.
            schema: what the manifest says it holds.
            current_size: how many bytes the mapped file has now; None where nobody can cut it.
            proof: what was checked before, and where to note what is checked from now on.
            let_go: takes what was read of the mapped file out of this process's memory.

        Raises:
            IntegrityError: the file is not the one the index describes.
            FormatError: intact, but with another schema.
        """
        self._buffer, self._info, self.uri = buffer, info, uri
        self._current_size, self.let_go = current_size, let_go
        self._proof = Proof() if proof is None else proof
        if buffer.size != info.n_bytes:
            raise IntegrityError(
                f"{uri}: {buffer.size} bytes, expected {info.n_bytes}. Fetch this shard again.", uri=uri
            )
        if not self._proof.head:
            self.require_whole()
            self._require_intact(0)
            self._require_intact(len(info.regions) - 1)
            require_schema(buffer.slice(0, info.regions[0].length), schema, uri=uri)
            self._proof.head = True

    def batch(self, number: int, parts: tuple[int, ...]) -> pa.Buffer:
        """Record batch `number` as it is mapped. See `ShardSource`."""
        self.require_whole()
        first = 1 + number * self._info.n_parts
        for part in parts:
            if first + part not in self._proof.regions:
                self._require_intact(first + part)
        regions = self._info.parts(number)
        start, last = regions[0].offset, regions[-1]
        return self._buffer.slice(start, last.offset + last.length - start)

    def prefetch(self, number: int, parts: tuple[int, ...]) -> None:
        """Nothing: the system reads ahead by itself."""

    def require_whole(self) -> None:
        """Raise IntegrityError where the file was cut."""
        if self._current_size is not None:
            require_size(self._current_size(), self._info.n_bytes, uri=self.uri)

    def _require_intact(self, number: int) -> None:
        region = self._info.regions[number]
        require_crc(self._buffer.slice(region.offset, region.length), region, uri=self.uri)
        self._proof.regions.add(number)


def require_size(found: int, expected: int, *, uri: str) -> None:
    """Raise IntegrityError where a mapped file was cut: reading what is gone would end the process."""
    if found < expected:
        raise IntegrityError(
            f"{uri}: shrank from {expected} to {found} bytes while it was read. "
            "Fetch this file again, and open the cache anew.",
            uri=uri,
        )


def require_crc(data: pa.Buffer, region: Region, *, uri: str) -> None:
    """Raise IntegrityError unless these are the bytes of the region."""
    found = crc32c(data)
    if found != region.crc32c:
        end = region.offset + region.length
        raise IntegrityError(
            f"{uri}: bytes [{region.offset}, {end}) have crc32c {found:#010x}, expected "
            f"{region.crc32c:#010x}. Run `opd verify` on this cache, then fetch this shard again.",
            uri=uri,
        )


def require_schema(head: pa.Buffer, schema: pa.Schema, *, uri: str) -> None:
    """Raise FormatError unless the first region of a shard is the magic and this schema."""
    n_magic = len(layout.ARROW_MAGIC)
    if head.size <= n_magic or head.slice(0, n_magic).to_pybytes() != layout.ARROW_MAGIC:
        raise FormatError(f"{uri}: not an Arrow file", uri=uri)
    try:
        stored = pa.ipc.read_schema(head.slice(n_magic))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FormatError(f"{uri}: its schema does not parse: {error}", uri=uri) from error
    if not stored.equals(schema, check_metadata=True):
        pairs = itertools.zip_longest(map(str, stored), map(str, schema))
        found, expected = next((pair for pair in pairs if pair[0] != pair[1]), ("other metadata", "none"))
        raise FormatError(
            f"{uri}: column {found!s:.100}, but the manifest declares {expected!s:.100}", uri=uri
        )


class ShardReader:
    """The record batches of a shard, from checked bytes to columns that are well formed."""

    def __init__(
        self, source: ShardSource, info: ShardInfo, schema: pa.Schema, *, uri: str, proof: Proof | None = None
    ) -> None:
        """Args as for `MappedShard`; nothing is read yet."""
        self.source = source
        self._info, self._schema, self.uri = info, schema, uri
        self._proof = Proof() if proof is None else proof
        self._columns = part_columns(schema)

    def batch(self, number: int, parts: tuple[int, ...] | None = None) -> pa.RecordBatch:
        """The columns of some parts (None: of all) of record batch `number`, in place.

        Args:
            parts: rising, always with 0.

        Raises:
            IntegrityError: its bytes changed.
            FormatError: intact bytes that are not the promised batch.
        """
        if parts is None:
            parts = tuple(range(len(self._columns)))
        view = self.source.batch(number, parts)
        known = self._proof.parts.get(number, frozenset())
        try:
            if not known:
                self._require_parts(number, view)
            batch = pa.ipc.read_record_batch(view, self._schema)
            unknown = [part for part in parts if part not in known]
            if unknown:
                found = self._select(batch, unknown)
                found.validate(full=True)
                require_no_nulls(found)
                require_in_place(found, view)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise FormatError(
                f"{self.uri}: record batch {number} does not parse: {error}", uri=self.uri
            ) from error
        rows = self._info.parts(number)[0].rows
        if batch.num_rows != rows:
            raise FormatError(
                f"{self.uri}: record batch {number} has {batch.num_rows} rows, the index says {rows}",
                uri=self.uri,
            )
        self._proof.parts[number] = known.union(parts)
        return self._select(batch, parts)

    def _select(self, batch: pa.RecordBatch, parts: tuple[int, ...] | list[int]) -> pa.RecordBatch:
        return batch.select([column for part in parts for column in self._columns[part]])

    def _require_parts(self, number: int, view: pa.Buffer) -> None:
        """Raise ValueError unless Arrow may parse it and the metadata has the parts of the index."""
        starts = part_starts(check_record_batch(view), self._schema, view.size)
        regions = self._info.parts(number)
        listed = [region.offset - regions[0].offset for region in regions]
        if starts != listed:
            raise ValueError(f"its parts start at {starts}, the index says at {listed}")


def part_starts(buffers: list[tuple[int, int]], schema: pa.Schema, size: int) -> list[int]:
    """Where the parts of a record batch start, counted from the first byte of its message.

    Args:
        buffers: (start, length) of every buffer of the message, as from `check_record_batch`.
        size: of the message.

    Raises:
        ValueError: buffers of other columns, or one outside its part.
    """
    first = [0, *itertools.accumulate(len(_buffer_widths(column.type)) for column in schema)]
    if len(buffers) != first[-1]:
        raise ValueError(f"{len(buffers)} buffers, expected {first[-1]}")
    parts = part_columns(schema)
    starts = [0, *(buffers[first[columns.start]][0] for columns in parts[1:])]
    for columns, start, end in zip(parts, starts, [*starts[1:], size], strict=True):
        for at, length in buffers[first[columns.start] : first[columns.stop]]:
            if not start <= at <= at + length <= end:
                raise ValueError(f"a buffer of {length} bytes at {at}, outside its part [{start}, {end})")
    return starts


def require_no_nulls(batch: pa.RecordBatch) -> None:
    """Raise ValueError where a column or list declared without nulls has some; Arrow does not look."""
    for declared, column in zip(batch.schema, batch.columns, strict=True):
        nulls = 0 if declared.nullable else column.null_count
        if column.type.id == _LIST:
            nulls += column.values.null_count
        if nulls:
            raise ValueError(f"column {declared.name} has {nulls} nulls, but is declared without")


def require_in_place(batch: pa.RecordBatch, view: pa.Buffer) -> None:
    """Raise ValueError where Arrow had to make a copy, and where a buffer has half an item at its end."""
    start, end = view.address, view.address + view.size
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for buffer, width in zip(column.buffers(), _buffer_widths(column.type), strict=True):
            size = 0 if buffer is None else buffer.size
            if not size:
                continue
            if not start <= buffer.address <= end - size:
                raise ValueError(f"column {name} is compressed or big-endian")
            if size % width:
                raise ValueError(f"column {name} has {size} bytes of {width}-byte items")


_WIDTHS = {pa.string().id: (1, 4, 1), pa.binary().id: (1, 4, 1), pa.binary(1).id: (1, 1)}
_LIST = pa.list_(pa.null()).id


def _buffer_widths(kind: pa.DataType) -> tuple[int, ...]:
    """Bytes of an item of each buffer of a column: validity, offsets or values, and what a list holds."""
    number = kind.id
    if number == _LIST:
        return (1, 4, *_buffer_widths(kind.value_type))
    return _WIDTHS.get(number) or (1, max(kind.bit_width // 8, 1))


def file_digest(buffer: Buffer) -> bytes:
    """Raw SHA-256 of a whole file."""
    return hashlib.sha256(buffer).digest()
