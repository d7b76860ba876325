"""Rows of Parquet and Arrow files, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileOpener

from opd_store import FormatError
from opd_tools.converters.core.source import Source

_BATCH_BYTES = 16 << 20
_MOST_ROWS = 1024
_MOST_ROW_BYTES = 1 << 30
"""Of a row once it is decoded: a few bytes of Parquet can stand for any number of equal values."""
FEW_ROWS = 32
_READ_AHEAD = 1 << 20
"""Bytes of a column read at a time; pyarrow would fetch the whole of a row group's column."""
PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather", ".ipc")
_FAULTS = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What pyarrow makes of damaged files."""
_MAGIC = b"ARROW1"
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT96": 12}


def schema_of(source: Source) -> pa.Schema | None:
    """Of the first Parquet or Arrow file; None if there is none, or it cannot be read."""
    names = table_names(source)
    try:
        return table_schema_of(source, names[0]) if names else None
    except FormatError:
        return None


def table_schema_of(source: Source, name: str) -> pa.Schema:
    """Of one file. Raises FormatError."""
    try:
        with source.open(name) as file:
            return pq.read_schema(file) if name.endswith(PARQUET) else _ipc(file).schema
    except _FAULTS as error:
        raise _damaged(source, name, error) from error


def table_names(source: Source) -> list[str]:
    """Parquet files; else Arrow files, of a saved `datasets` directory only those that hold rows."""
    names = source.named(*PARQUET) or source.named(*ARROW)
    saved = {name.rpartition("/")[0] for name in source.names if name.endswith("/state.json")}

    def holds_rows(name: str) -> bool:
        folder, _, last = name.rpartition("/")
        return folder not in saved or last.startswith(("data-", "dataset"))

    return [name for name in names if holds_rows(name)]


def n_rows(source: Source) -> int | None:
    """Rows in all, where the files tell without being read."""
    total = 0
    for name in table_names(source):
        if not name.endswith(PARQUET):
            return None
        try:
            with source.open(name) as file:
                total += pq.read_metadata(file).num_rows
        except _FAULTS:
            return None
    return total


def tables(
    source: Source, columns: Sequence[str] | None = None, most_rows: int = _MOST_ROWS
) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    """Every record batch with its file and the number of its first row there, of about 16 MiB.

    Args:
        columns: which to read; None for all.
        most_rows: of a batch; few where only the first one is looked at.

    Raises:
        FormatError: no such files, or one is damaged, cut off, or lacks a column.
    """
    names = table_names(source)
    if not names:
        raise FormatError(f"{source.uri}: no Parquet or Arrow files")
    for name in names:
        yield from tables_of(source, name, columns, most_rows)


def tables_of(
    source: Source, name: str, columns: Sequence[str] | None = None, most_rows: int = _MOST_ROWS
) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    """As `tables`, of one file."""
    try:
        with source.open(name) as file:
            start = 0
            opened = _parquet if name.endswith(PARQUET) else _arrow
            for batch in opened(file, columns, most_rows):
                # pyarrow takes offsets and text from the file as they are, and would read beyond its buffers.
                batch.validate(full=True)
                yield source.shown(name), start, batch
                start += len(batch)
    except KeyError as error:
        raise FormatError(
            f"{source.shown(name)}: {error.args[0]!s:.200}; all files need the columns of the first"
        ) from error
    except _FAULTS as error:
        raise _damaged(source, name, error) from error


def _damaged(source: Source, name: str, error: Exception) -> FormatError:
    return FormatError(
        f"{source.shown(name)}: not a Parquet or Arrow file, damaged, or cut off: {error!s:.200}"
    )


def record_batches(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row as Python values, with its place. Slow; for files with few numbers a row."""
    for name, start, batch in tables(source):
        for number, row in enumerate(batch.to_pylist()):
            yield f"{name}, row {start + number}", row


def _parquet(file: IO[bytes], columns: Sequence[str] | None, most_rows: int) -> Iterator[pa.RecordBatch]:
    reader = pq.ParquetFile(file, buffer_size=_READ_AHEAD, pre_buffer=False)
    missing = set(columns or ()) - set(reader.schema_arrow.names)
    if missing:
        raise KeyError(f"no column {', '.join(sorted(missing))}")
    for number in range(reader.num_row_groups):
        # Damage in what a row group says of its columns is an error here, and the end of the process below.
        next(reader.iter_batches(1, row_groups=[number], columns=columns, use_threads=False), None)
    rows = _rows_a_batch(reader, columns, most_rows)
    yield from reader.iter_batches(rows, columns=columns, use_threads=False)


def _rows_a_batch(reader: pq.ParquetFile, columns: Sequence[str] | None, most_rows: int) -> int:
    """So many rows of any row group that they have about `_BATCH_BYTES` once they are decoded."""
    names = [reader.schema.column(place).path.partition(".")[0] for place in range(len(reader.schema))]
    places = [place for place, name in enumerate(names) if columns is None or name in columns]
    most = 1.0
    for number in range(reader.num_row_groups):
        group = reader.metadata.row_group(number)
        sizes = 0
        for place in places:
            chunk = group.column(place)
            decoded = chunk.num_values * _WIDTHS.get(chunk.physical_type, 8)
            if chunk.physical_type.endswith("BYTE_ARRAY"):
                decoded += chunk.total_uncompressed_size
            sizes += decoded
        most = max(most, sizes / max(1, group.num_rows))
    if most > _MOST_ROW_BYTES:
        raise FormatError(f"rows of {most / 2**20:,.0f} MiB; expected at most {_MOST_ROW_BYTES >> 20} MiB")
    return int(min(most_rows, max(1, _BATCH_BYTES // most)))


def _arrow(file: IO[bytes], columns: Sequence[str] | None, most_rows: int) -> Iterator[pa.RecordBatch]:
    reader = _ipc(file)
    is_file = isinstance(reader, pa.RecordBatchFileReader)
    whole = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
    for batch in whole:
        found = batch if columns is None else batch.select(list(columns))
        rows = int(min(most_rows, max(1, _BATCH_BYTES * len(found) // max(1, found.nbytes))))
        for start in range(0, len(found), rows):
            yield found.slice(start, rows)


def _ipc(file: IO[bytes]) -> Any:  # noqa: ANN401
    """A reader of Arrow's file or stream form; a local file is mapped, since its batches may be large."""
    source = pa.memory_map(file.name) if isinstance(file, LocalFileOpener) else file
    head = file.read(len(_MAGIC))
    file.seek(0)
    return pa.ipc.open_file(source) if head == _MAGIC else pa.ipc.open_stream(source)
