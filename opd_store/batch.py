"""A record batch seen as numpy arrays: rollouts are slices of it, without a copy."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import layout
from opd_store.columns import RESPONSE_LISTS, SCALARS, TOKEN_LISTS, CacheSchema, band_column
from opd_store.encodings import Band, check_page_crc, decode_page, merge_bands
from opd_store.errors import FormatError
from opd_store.rollout import Rollout

ARRAY_FIELDS = (*TOKEN_LISTS, *RESPONSE_LISTS)
TOPK_FIELDS = ("topk_ids", "topk_logprob", "log_tail")
_ALWAYS = {"token_ids", "prompt_len"}


class BatchView:
    """Rows of one record batch. R = response tokens of a row, P = positions of a page = R."""

    def __init__(self, batch: pa.RecordBatch, schema: CacheSchema, *, where: str) -> None:
        """Find the buffers and check that all lengths agree.

        Args:
            where: names file and record batch in errors.

        Raises:
            FormatError: lengths that contradict each other.
        """
        self._batch, self._schema, self.where = batch, schema, where
        self.n_rows: int = batch.num_rows
        self.prompt_len = _values(batch.column("prompt_len"), np.uint32)[: self.n_rows].astype(np.int64)
        self._offsets: dict[str, NDArray[np.int32]] = {}
        self._items: dict[str, NDArray[Any]] = {}
        self._missing: dict[str, NDArray[np.bool_]] = {}
        for name, kind in (TOKEN_LISTS | RESPONSE_LISTS).items():
            column = batch.column(name)
            self._offsets[name] = _offsets(column)
            self._items[name] = _values(column.values, kind.to_pandas_dtype())
            if column.null_count:
                self._missing[name] = ~np.array(column.is_valid().to_pylist(), bool)
        for start, end in schema.band_ranges():
            name = band_column(start, end)
            column = batch.column(name)
            self._offsets[name] = _offsets(column)
            self._items[name] = _values(column, np.uint8, buffer=2)
        hashes = _values(batch.column("rollout_hash"), np.uint8)
        self.hashes = hashes[: self.n_rows * layout.HASH_BYTES].reshape(self.n_rows, layout.HASH_BYTES)
        self._check_lengths()

    def _check_lengths(self) -> None:
        response_len = np.diff(self._offsets["token_ids"]) - self.prompt_len
        wrong = (self.prompt_len < 1) | (response_len < 1)
        if wrong.any():
            raise FormatError(f"{self.where}, row {int(np.argmax(wrong))}: prompt or response is empty")
        for name in RESPONSE_LISTS:
            expected = response_len
            if name in self._missing:
                expected = np.where(self._missing[name], 0, response_len)
            wrong = np.diff(self._offsets[name]) != expected
            if wrong.any():
                row = int(np.argmax(wrong))
                found = int(np.diff(self._offsets[name])[row])
                raise FormatError(
                    f"{self.where}, row {row}, column {name}: {found} values, expected {int(expected[row])}",
                    row=row,
                    column=name,
                )
        if (self._items["loss_mask"] > 1).any():
            raise FormatError(
                f"{self.where}, column loss_mask: a value other than 0 and 1", column="loss_mask"
            )

    def list_row(self, name: str, row: int) -> NDArray[Any] | None:
        """One row of a list column as a view, None where absent."""
        if name in self._missing and self._missing[name][row]:
            return None
        offsets = self._offsets[name]
        return self._items[name][offsets[row] : offsets[row + 1]]

    def topk(self, row: int, ranks: int | None = None) -> Band:
        """The first `ranks` ranks of one row (None: all). One band is a view, several are copied."""
        wanted = self._schema.topk if ranks is None else ranks
        positions = self.response_len(row)
        pages = [
            decode_page(
                self._page(start, end, row),
                rank_start=start,
                rank_end=end,
                n_positions=positions,
                where=f"{self.where}, row {row}, column {band_column(start, end)}",
            )
            for start, end in self._schema.band_ranges(wanted)
        ]
        return merge_bands(pages, wanted)

    def check_pages(self, row: int) -> None:
        """Compare every page of a row with its own checksum. Raises IntegrityError."""
        for start, end in self._schema.band_ranges():
            where = f"{self.where}, row {row}, column {band_column(start, end)}"
            check_page_crc(self._page(start, end, row), self.hashes[row].tobytes(), where=where)

    def _page(self, start: int, end: int, row: int) -> NDArray[np.uint8]:
        name = band_column(start, end)
        offsets = self._offsets[name]
        return self._items[name][offsets[row] : offsets[row + 1]]

    def response_len(self, row: int) -> int:
        """R of one row."""
        offsets = self._offsets["token_ids"]
        return int(offsets[row + 1] - offsets[row] - self.prompt_len[row])

    def rollout(
        self, row: int, *, ranks: int | None = None, columns: Collection[str] | None = None
    ) -> Rollout:
        """One row. Fields outside `columns` stay None; token_ids and prompt_len are always there."""
        wanted = columns if columns is None else _ALWAYS | set(columns)
        fields: dict[str, Any] = {"prompt_len": int(self.prompt_len[row])}
        for name in ARRAY_FIELDS:
            if wanted is None or name in wanted:
                fields[name] = self.list_row(name, row)
        if fields.get("loss_mask") is not None:
            fields["loss_mask"] = fields["loss_mask"].view(np.bool_)
        if self._schema.topk and (wanted is None or not wanted.isdisjoint(TOPK_FIELDS)) and ranks != 0:
            band = self.topk(row, ranks)
            fields |= {"topk_ids": band.ids, "topk_logprob": band.logprob, "log_tail": band.log_tail}
        for name in SCALARS:
            if name not in ("rollout_hash", "prompt_len") and (wanted is None or name in wanted):
                fields[name] = self._batch.column(name)[row].as_py()
        users = [name for name in self._schema.user_columns if wanted is None or name in wanted]
        if users:
            extra = {name: self._batch.column(name)[row].as_py() for name in users}
            fields["extra"] = {name: value for name, value in extra.items() if value is not None}
        return Rollout(**fields)


def _values(array: pa.Array, dtype: Any, *, buffer: int = 1) -> NDArray[Any]:  # noqa: ANN401
    data = array.buffers()[buffer]
    return np.frombuffer(data, dtype) if data is not None and data.size else np.empty(0, dtype)


def _offsets(array: pa.Array) -> NDArray[np.int32]:
    return np.frombuffer(array.buffers()[1], np.int32)[: len(array) + 1]
