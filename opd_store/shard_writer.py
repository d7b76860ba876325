"""Writing one shard, region by region."""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import layout
from opd_store.arrow_message import check_record_batch
from opd_store.hashing import crc32c
from opd_store.schema import part_columns
from opd_store.shard import Region, ShardInfo, part_starts


class ByteSink(Protocol):
    """What a shard is written to."""

    def write(self, data: bytes, /) -> int: ...


class ShardWriter:
    """Streams record batches into a sink; keeps digests and the lengths of rollouts, not data."""

    def __init__(self, sink: ByteSink, schema: pa.Schema) -> None:
        self._tee = _RegionSink(sink)
        self._schema = schema
        self._schema_end = len(layout.ARROW_MAGIC) + schema.serialize().size
        self._file = pa.PythonFile(self._tee, mode="w")
        # pyarrow writes the schema together with the first batch, so its region is cut by position.
        self._tee.cut_at(self._schema_end, rows=0)
        self._writer = pa.ipc.new_file(self._file, schema)
        self._row_tokens: list[NDArray[np.uint32]] = []
        self._row_response_tokens: list[NDArray[np.uint32]] = []
        self.hashes: list[bytes] = []
        """Rollout hash of every row so far."""

    @property
    def n_bytes(self) -> int:
        """Bytes written so far."""
        return self._tee.position

    def write(self, batch: pa.RecordBatch) -> None:
        """Append one record batch, each part of which becomes one region."""
        start = max(self._tee.position, self._schema_end)
        message = batch.serialize()
        ends = [*part_starts(check_record_batch(message), self._schema, message.size)[1:], message.size]
        for number, end in enumerate(ends):
            self._tee.cut_at(start + end, rows=0 if number else batch.num_rows)
        self._writer.write_batch(batch)
        assert self._tee.position == start + message.size
        tokens = np.diff(_numpy(batch.column("token_ids").offsets, np.uint32))
        self._row_tokens.append(tokens)
        self._row_response_tokens.append(tokens - _numpy(batch.column("prompt_len"), np.uint32))
        self.hashes += batch.column("rollout_hash").to_pylist()

    def finish(self) -> ShardInfo:
        """Write the footer."""
        self._writer.close()
        self._tee.cut(rows=0)
        none = np.empty(0, np.uint32)
        row_tokens = np.concatenate([none, *self._row_tokens])
        row_response_tokens = np.concatenate([none, *self._row_response_tokens])
        return ShardInfo(
            sha256=self._tee.sha256.digest(),
            n_bytes=self._tee.position,
            rows=len(row_tokens),
            tokens=int(row_tokens.sum(dtype=np.int64)),
            response_tokens=int(row_response_tokens.sum(dtype=np.int64)),
            regions=tuple(self._tee.regions),
            n_parts=len(part_columns(self._schema)),
            row_tokens=row_tokens,
            row_response_tokens=row_response_tokens,
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
        self._cuts: deque[tuple[int, int]] = deque()

    def cut_at(self, position: int, *, rows: int) -> None:
        """Close a region as soon as this position is reached; positions rise."""
        self._cuts.append((position, rows))

    def cut(self, *, rows: int) -> None:
        """Close a region here."""
        self.regions.append(Region(self._start, self.position - self._start, self._crc, rows))
        self._start, self._crc = self.position, 0

    def write(self, data: bytes) -> int:
        n_bytes = len(data)
        while self._cuts and self.position + len(data) >= self._cuts[0][0]:
            position, rows = self._cuts.popleft()
            head = position - self.position
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


def _numpy(array: pa.Array, dtype: type[np.generic]) -> NDArray[np.uint32]:
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]
