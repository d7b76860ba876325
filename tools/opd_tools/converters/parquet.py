"""Rows of Parquet and Arrow files, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd_store import FormatError
from opd_tools.converters.source import Source

_BATCH_ROWS = 64
_ENDINGS = (".parquet", ".pq")


def schema_of(source: Source) -> pa.Schema | None:
    """Of the first Parquet file; None if there is none, or it cannot be read."""
    names = source.named(*_ENDINGS)
    if not names:
        return None
    try:
        with source.open(names[0]) as file:
            return pq.read_schema(file)
    except (pa.ArrowException, OSError):
        return None


def tables(source: Source) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    """Every record batch with its file and the number of its first row there. Raises FormatError."""
    names = source.named(*_ENDINGS)
    if not names:
        raise FormatError(f"{source.uri}: no Parquet files")
    for name in names:
        try:
            with source.open(name) as file:
                start = 0
                for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS):
                    yield source.shown(name), start, batch
                    start += len(batch)
        except pa.ArrowException as error:
            raise FormatError(f"{source.shown(name)}: not Parquet, or cut off: {error!s:.200}") from error


def record_batches(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row as Python values, with its place."""
    for name, start, batch in tables(source):
        for number, row in enumerate(batch.to_pylist()):
            yield f"{name}, row {start + number}", row
