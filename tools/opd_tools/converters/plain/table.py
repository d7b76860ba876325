"""Any Parquet or Arrow table, and `datasets` directories: a row a rollout, columns as --column says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from opd_store import FormatError, InvalidArgumentError
from opd_store.schema import USER_TYPES
from opd_tools.converters.core.format import Format, ReadSettings
from opd_tools.converters.core.record import Contents, Record, Values
from opd_tools.converters.core.source import Source
from opd_tools.converters.plain.table_export import Origin, origin_of, write
from opd_tools.converters.reading.arrow_lists import Rows, depth
from opd_tools.converters.reading.field_rows import to_record
from opd_tools.converters.reading.fields import Fields, resolve
from opd_tools.converters.reading.parquet import FEW_ROWS, n_rows, schema_of, tables

_NOT_OURS = (
    {"compressed_logprobs", "bytepacked_indices"},
    {"packed_indices", "exact_values"},
    {"target_token_ids", "target_logprobs"},
)
"""Columns of formats that have an importer of their own."""


def detect(source: Source) -> bool:
    """Whether a table's columns can be told by their names."""
    schema = schema_of(source)
    if schema is None or any(columns.issubset(schema.names) for columns in _NOT_OURS):
        return False
    try:
        resolve(_depths(schema), ReadSettings(vocab_size=1, topk=1), source.uri)
    except InvalidArgumentError:
        return False
    return True


def read(source: Source, settings: ReadSettings) -> Contents:
    """Columns by the names that settings state, the others by usual ones.

    Raises:
        FormatError: no such files.
        InvalidArgumentError: columns that cannot be told.
    """
    schema = schema_of(source)
    if schema is None:
        raise FormatError(f"{source.uri}: no Parquet or Arrow files, or the first cannot be read")
    fields = resolve(_depths(schema), settings, source.uri)
    extra = {column.name: kind for column in schema if (kind := _user_type(column))}

    def outer(name: str) -> str:
        return name if name in schema.names else name.partition(".")[0]

    topk, origin = _topk(source, fields, outer), origin_of(schema)
    return Contents(
        records=_records(source, fields, extra, outer, topk if settings.topk is None else None, origin),
        topk=topk,
        values=Values.RENORMALISED if origin.renormalised else fields.values,
        lost=fields.lost,
        max_error=origin.max_error,
        columns=extra,
        total=n_rows(source),
    )


def _user_type(column: pa.Field) -> str | None:
    """Which type a user column of a cache has to have for it; None if it is none."""
    if not column.name.startswith("x_"):
        return None
    if pa.types.is_boolean(column.type):
        return "bool"
    if pa.types.is_integer(column.type):
        return "int64"
    if pa.types.is_floating(column.type):
        return "float64"
    return "utf8" if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) else None


def _depths(schema: pa.Schema) -> dict[str, int]:
    """Columns that could hold a field, those inside structs as struct.field."""
    found: dict[str, int] = {}
    for column in schema:
        if pa.types.is_struct(column.type):
            for inner in column.type:
                found[f"{column.name}.{inner.name}"] = depth(inner.type)
        else:
            found[column.name] = depth(column.type)
    return {name: levels for name, levels in found.items() if levels >= 0}


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name in batch.schema.names:
        return batch.column(name)
    outer, _, inner = name.partition(".")
    return pc.struct_field(batch.column(outer), inner)


def _topk(source: Source, fields: Fields, outer: Callable[[str], str]) -> int:
    """Most entries of a row, as the type says or else the first rows."""
    name = fields.names.get("topk_ids")
    if name is None:
        return fields.kept
    if fields.flat:
        return fields.flat
    for file, _, batch in tables(source, [outer(name)], FEW_ROWS):
        if widest := Rows(_column(batch, name), f"{file}, {name}").widest():
            return widest
    return 0


def _records(
    source: Source,
    fields: Fields,
    extra: Mapping[str, str],
    outer: Callable[[str], str],
    topk: int | None,
    origin: Origin,
) -> Iterator[Record]:
    """Raises FormatError: a row has more than `topk` entries, if that is not None; or another origin."""
    read = sorted({outer(name) for name in (*fields.names.values(), *extra)})
    for file, start, batch in tables(source, read):
        if origin_of(batch.schema) != origin:
            raise FormatError(f"{file}: exported from another cache than the first file; convert one by one")
        rows = f"rows {start} to {start + len(batch) - 1}"
        found = {
            field: Rows(_column(batch, name), f"{file}, {rows}, {name}")
            for field, name in fields.names.items()
        }
        users = {name: batch.column(name).cast(USER_TYPES[kind]).to_pylist() for name, kind in extra.items()}
        for number in range(len(batch)):
            where = f"{file}, row {start + number}"
            record = to_record({name: rows[number] for name, rows in found.items()}, fields, where)
            if users:
                values = {name: column[number] for name, column in users.items()}
                given = {name: value for name, value in values.items() if value is not None}
                record = dataclasses.replace(record, extra=given)
            width = 0 if record.topk_ids is None else record.topk_ids.shape[-1]
            if topk is not None and width > topk:
                raise FormatError(
                    f"{where}: {width} entries a row, the first rows had {topk}; state how many to "
                    f"keep, such as --topk {width}"
                )
            yield record


FORMAT = Format(
    name="table",
    title="Parquet, Arrow or datasets table",
    alignment=(
        "as many rows as tokens: label (row t is about token t), or source (about token t + 1) with --column "
        "rows=source; one row less: about tokens 1, 2, ...; as many as response tokens: about those"
    ),
    keeps="every field of a rollout that has a column",
    loses="ids chosen by the student and drawn from the teacher; which of several teachers scored a rollout",
    tested="files of pyarrow and datasets",
    detect=detect,
    read=read,
    write=write,
)
