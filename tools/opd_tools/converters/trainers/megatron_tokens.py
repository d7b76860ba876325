"""The tokens that Megatron-LM's files of log-probs are about, from a file beside them.

An .npy array [n, S + 1] or [n, S] of integers, or a Parquet or Arrow file with a list a row. A row is a
sequence, in the order in which the teacher's run consumed them from the first stored iteration on. Megatron
itself ties the two by order alone: it needs the same seed, blend and batch sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError, InvalidArgumentError
from opd_tools.converters.core.format import ReadSettings
from opd_tools.converters.core.source import Source
from opd_tools.converters.reading.arrow_lists import Rows, depth
from opd_tools.converters.reading.parquet import table_schema_of, tables_of

_ENDINGS = (".npy", ".parquet", ".pq", ".arrow", ".feather")
_COLUMNS = ("input_ids", "tokens", "token_ids", "text")


def find(source: Source, settings: ReadSettings) -> str:
    """The file that --column tokens=NAME names, relative to the source, or the only one of its kind.

    Raises:
        InvalidArgumentError: none, or several.
    """
    stated = settings.columns.get("tokens")
    found = source.named(*_ENDINGS)
    if stated is not None:
        found = [name for name in found if source.shown(name) == stated]
    if len(found) != 1:
        problem = "none" if not found else ", ".join(map(source.shown, found))[:200]
        raise InvalidArgumentError(
            f"{source.uri}: the tar files hold no tokens; put these beside, as .npy [sequences, tokens] or "
            "as Parquet with a list a row, in the order of training, and give --column tokens=NAME (found: "
            f"{problem})"
        )
    return found[0]


def sequences(source: Source, name: str) -> Iterator[NDArray[np.int64]]:
    """The tokens of each sequence. Raises FormatError."""
    return _arrays(source, name) if name.endswith(".npy") else _lists(source, name)


def _arrays(source: Source, name: str) -> Iterator[NDArray[np.int64]]:
    with source.open(name) as file:
        try:
            version = np.lib.format.read_magic(file)
            old = version == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, column_major, dtype = read(file)
            if len(shape) != 2 or column_major or dtype.kind not in "iu":
                raise ValueError(f"expected rows of integers, found {dtype} of shape {shape}")
            for _ in range(shape[0]):
                data = file.read(shape[1] * dtype.itemsize)
                yield np.frombuffer(data, dtype, shape[1]).astype(np.int64)
        except ValueError as error:
            raise FormatError(
                f"{source.shown(name)}: not an .npy file of tokens, or cut off: {error!s:.200}"
            ) from error


def _lists(source: Source, name: str) -> Iterator[NDArray[np.int64]]:
    shown = source.shown(name)
    schema = table_schema_of(source, name)
    columns = [column for column in _COLUMNS if column in schema.names]
    if len(columns) != 1 or depth(schema.field(columns[0]).type) != 1:
        raise FormatError(f"{shown}: expected one column of lists, called {' or '.join(_COLUMNS)}")
    for _, start, batch in tables_of(source, name, columns):
        rows = Rows(batch.column(columns[0]), shown)
        for number in range(len(batch)):
            if (row := rows[number]) is None:
                raise FormatError(f"{shown}, row {start + number}: no tokens")
            yield row.astype(np.int64)
