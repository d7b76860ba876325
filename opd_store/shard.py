"""One shard: an Arrow IPC file, cut into regions that together cover every byte and each have a CRC-32C.

Region 0 is the magic and the schema, the last one the footer, those between are one record batch each.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from opd_store import layout
from opd_store.arrow_message import check_record_batch
from opd_store.errors import FormatError, IntegrityError
from opd_store.hashing import Buffer, crc32c


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes [offset, offset + length) of a shard."""

    offset: int
    length: int
    crc32c: int
    rows: int
    """Rollouts in it; 0 for the schema and the footer."""


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

    @property
    def path(self) -> str:
        """Name relative to the cache's root."""
        return f"{layout.SHARD_DIR}/{self.sha256.hex()}.arrow"


class ByteSink(Protocol):
    """What a shard is written to."""

    def write(self, data: bytes, /) -> int: ...


class ShardWriter:
    """Streams record batches into a sink; keeps digests, not data."""

    def __init__(self, sink: ByteSink, schema: pa.Schema) -> None:
        self._tee = _RegionSink(sink)
        self._schema_end = len(layout.ARROW_MAGIC) + schema.serialize().size
        self._file = pa.PythonFile(self._tee, mode="w")
        # pyarrow writes the schema together with the first batch, so its region is cut by position.
        self._tee.cut_at(self._schema_end, rows=0)
        self._writer = pa.ipc.new_file(self._file, schema)
        self._rows = self._tokens = self._response_tokens = 0
        self.hashes: list[bytes] = []
        """Rollout hash of every row so far."""

    @property
    def n_bytes(self) -> int:
        """Bytes written so far."""
        return self._tee.position

    def write(self, batch: pa.RecordBatch) -> None:
        """Append one record batch, which becomes one region."""
        self._writer.write_batch(batch)
        self._tee.cut(rows=batch.num_rows)
        tokens = len(batch.column("token_ids").values)
        self._rows += batch.num_rows
        self._tokens += tokens
        self._response_tokens += tokens - int(
            _numpy(batch.column("prompt_len"), np.uint32).sum(dtype=np.int64)
        )
        self.hashes += batch.column("rollout_hash").to_pylist()

    def finish(self) -> ShardInfo:
        """Write the footer."""
        self._writer.close()
        self._tee.cut(rows=0)
        return ShardInfo(
            self._tee.sha256.digest(),
            self._tee.position,
            self._rows,
            self._tokens,
            self._response_tokens,
            tuple(self._tee.regions),
        )


class _RegionSink:
    """Passes bytes on while it hashes them, and closes a region wherever it is told to."""

    closed = False

    def __init__(self, sink: ByteSink) -> None:
        self._sink = sink
        self.sha256 = hashlib.sha256()
        self.position = 0
        self.regions: list[Region] = []
        self._start = 0
        self._crc = 0
        self._boundary: tuple[int, int] | None = None

    def cut_at(self, position: int, *, rows: int) -> None:
        self._boundary = (position, rows)

    def cut(self, *, rows: int) -> None:
        self.regions.append(Region(self._start, self.position - self._start, self._crc, rows))
        self._start, self._crc = self.position, 0

    def write(self, data: bytes) -> int:
        n_bytes = len(data)
        if self._boundary is not None and self.position + n_bytes >= self._boundary[0]:
            head = self._boundary[0] - self.position
            rows = self._boundary[1]
            self._boundary = None
            self._take(data[:head])
            self.cut(rows=rows)
            data = data[head:]
        self._take(data)
        return n_bytes

    def _take(self, data: bytes) -> None:
        self.sha256.update(data)
        self._crc = crc32c(data, self._crc)
        self._sink.write(data)
        self.position += len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def tell(self) -> int:
        return self.position


class ShardReader:
    """A mapped shard; every region is compared with its checksum before its first use."""

    def __init__(self, buffer: pa.Buffer, info: ShardInfo, schema: pa.Schema, *, uri: str) -> None:
        """Check size, schema and footer.

        Args:
            buffer: the whole file.
            schema: what the manifest says it holds.

        Raises:
            IntegrityError: the file is not the one the index describes.
            FormatError: intact, but with another schema.
        """
        self._buffer, self._info, self._schema, self.uri = buffer, info, schema, uri
        if buffer.size != info.n_bytes:
            raise IntegrityError(
                f"{uri}: {buffer.size} bytes, expected {info.n_bytes}. Fetch this shard again.", uri=uri
            )
        self._batches = [region for region in info.regions if region.rows]
        self._verified = [False] * len(self._batches)
        head = self._checked(info.regions[0])
        self._checked(info.regions[-1])
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

    def _checked(self, region: Region) -> pa.Buffer:
        view = self._buffer.slice(region.offset, region.length)
        found = crc32c(view)
        if found != region.crc32c:
            end = region.offset + region.length
            raise IntegrityError(
                f"{self.uri}: bytes [{region.offset}, {end}) have crc32c {found:#010x}, expected "
                f"{region.crc32c:#010x}. Run `opd verify` on this cache, then fetch this shard again.",
                uri=self.uri,
            )
        return view

    def batch(self, number: int) -> pa.RecordBatch:
        """Record batch `number`, zero-copy.

        Raises:
            IntegrityError: its bytes changed.
            FormatError: intact bytes that are not the promised batch.
        """
        region = self._batches[number]
        if self._verified[number]:
            view = self._buffer.slice(region.offset, region.length)
            return pa.ipc.read_record_batch(view, self._schema)
        view = self._checked(region)
        try:
            check_record_batch(view)
            batch = pa.ipc.read_record_batch(view, self._schema)
            batch.validate(full=True)
            require_no_nulls(batch)
            require_in_place(batch, view)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise FormatError(
                f"{self.uri}: record batch {number} does not parse: {error}", uri=self.uri
            ) from error
        if batch.num_rows != region.rows:
            raise FormatError(
                f"{self.uri}: record batch {number} has {batch.num_rows} rows, the index says {region.rows}",
                uri=self.uri,
            )
        self._verified[number] = True
        return batch


def require_no_nulls(batch: pa.RecordBatch) -> None:
    """Raise ValueError where a column or list declared without nulls has some; Arrow does not look."""
    for declared, column in zip(batch.schema, batch.columns, strict=True):
        nulls = 0 if declared.nullable else column.null_count
        if pa.types.is_list(column.type):
            nulls += column.values.null_count
        if nulls:
            raise ValueError(f"column {declared.name} has {nulls} nulls, but is declared without")


def require_in_place(batch: pa.RecordBatch, view: pa.Buffer) -> None:
    """Raise ValueError where Arrow had to make a copy, and where a buffer has half an item at its end."""
    for declared, column in zip(batch.schema, batch.columns, strict=True):
        for buffer, width in zip(column.buffers(), _buffer_widths(column.type), strict=True):
            if buffer is None or not buffer.size:
                continue
            if not view.address <= buffer.address <= view.address + view.size - buffer.size:
                raise ValueError(f"column {declared.name} is compressed or big-endian")
            if buffer.size % width:
                raise ValueError(f"column {declared.name} has {buffer.size} bytes of {width}-byte items")


def _buffer_widths(kind: pa.DataType) -> list[int]:
    """Bytes of an item of each buffer of a column: validity, offsets or values, and what a list holds."""
    if pa.types.is_list(kind):
        return [1, 4, *_buffer_widths(kind.value_type)]
    if pa.types.is_binary(kind) or pa.types.is_string(kind):
        return [1, 4, 1]
    if pa.types.is_fixed_size_binary(kind):
        return [1, 1]
    return [1, max(kind.bit_width // 8, 1)]


def check_regions(regions: tuple[Region, ...], n_bytes: int, rows: int, *, where: str) -> None:
    """Raise FormatError unless the regions cover [0, n_bytes) without gap or overlap and hold `rows` rows."""
    position = 0
    for region in regions:
        if region.offset != position or region.length <= 0:
            raise FormatError(f"{where}: region at {region.offset}, expected at {position}")
        if region.length > layout.MAX_BATCH_BYTES:
            raise FormatError(
                f"{where}: a region of {region.length} bytes, the limit is {layout.MAX_BATCH_BYTES}"
            )
        position += region.length
    if len(regions) < 2 or position != n_bytes:
        raise FormatError(f"{where}: {len(regions)} regions end at {position}, the file at {n_bytes}")
    if regions[0].rows or regions[-1].rows or not all(region.rows for region in regions[1:-1]):
        raise FormatError(f"{where}: the first and last region hold no rows, every other one at least one")
    if sum(region.rows for region in regions) != rows:
        raise FormatError(
            f"{where}: regions hold {sum(region.rows for region in regions)} rows, expected {rows}"
        )


def _numpy(array: pa.Array, dtype: type[np.generic]) -> np.ndarray:
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]


def file_digest(buffer: Buffer) -> bytes:
    """Raw SHA-256 of a whole file."""
    return hashlib.sha256(buffer).digest()
