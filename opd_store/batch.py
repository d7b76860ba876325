"""A record batch seen as numpy arrays: rollouts are slices of it, without a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import layout
from opd_store.encodings import (
    Band,
    IdTable,
    PageStreams,
    check_page_crc,
    decode_into,
    decode_page,
    keep_ranks,
    parse_page,
    value_tolerance,
)
from opd_store.errors import FormatError
from opd_store.rollout import FINISH_REASONS, SUPPORTS, Rollout, Scalar
from opd_store.schema import RESPONSE_LISTS, SCALARS, TOKEN_LISTS, CacheSchema, PackedColumn
from opd_store.values import Problem, ids_problem, logprobs_problem, support_problem

LOGPROB_LISTS = ("teacher_logprob", "behaviour_logprob", "reference_logprob")
ARRAY_FIELDS = (*TOKEN_LISTS, *RESPONSE_LISTS)
SUPPORT_FIELDS = tuple(name for fields in SUPPORTS.values() for name in fields if name)
_SCALAR_FIELDS = tuple(name for name in SCALARS if name not in ("rollout_hash", "prompt_len"))
_ALWAYS = {"token_ids", "prompt_len"}
_Read = TypeVar("_Read")


class Proven:
    """Which values of a record batch were found possible so far; outlives the view of it."""

    def __init__(self, n_rows: int) -> None:
        self.native: set[int] = set()
        """Parts of native columns."""
        # A byte a row: a set of row numbers would take a hundred, in the end for every row of the cache.
        self._n_rows = n_rows
        self._rows: dict[tuple[str, int], bytearray] = {}

    def rows(self, kind: str, ranks: int) -> bytearray:
        """For every row, 1 if its first `ranks` ranks, with the tail outside them, are possible."""
        found = self._rows.get((kind, ranks))
        return found or self._rows.setdefault((kind, ranks), bytearray(self._n_rows))


class BatchView:
    """Rows of one record batch, as far as its parts are there.

    R = response tokens of a row, P = positions of a page = R.
    """

    def __init__(
        self,
        batch: pa.RecordBatch,
        schema: CacheSchema,
        *,
        row_tokens: NDArray[np.uint32],
        row_response_tokens: NDArray[np.uint32],
        vocab_size: int,
        id_table: IdTable | None = None,
        proven: Proven | None = None,
        tolerance: float | None = None,
        where: str,
    ) -> None:
        """Find the buffers and check that all lengths agree.

        Args:
            batch: columns of some parts, those of part 0 among them.
            row_tokens, row_response_tokens: [rows] lengths of its rollouts, as the index says.
            id_table: what the ids of packed pages may refer to.
            proven: what was checked before; the rest is when it is read, and noted here. None checks nothing.
            tolerance: how far probabilities of a position may exceed 1 in sum; None means as far as values
                that were rounded once.
            where: names file and record batch in errors.

        Raises:
            FormatError: lengths that contradict each other, or native columns with impossible values.
        """
        self._batch, self._schema, self.where = batch, schema, where
        self._vocab_size, self._id_table, self._proven = vocab_size, id_table, proven
        self._tolerance = value_tolerance(schema.encoding) if tolerance is None else tolerance
        self.n_rows: int = batch.num_rows
        self.prompt_len = _values(batch.column("prompt_len"), np.uint32)[: self.n_rows].astype(np.int64)
        self._tokens = row_tokens.astype(np.int64)
        self._response_tokens = row_response_tokens.astype(np.int64)
        self._offsets: dict[str, NDArray[np.int32]] = {}
        self._items: dict[str, NDArray[Any]] = {}
        self._missing: dict[str, NDArray[np.bool_]] = {}
        self._words: dict[str, tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.int32]]] = {}
        self._scalars: dict[str, _ScalarColumn] = {}
        self._bands: dict[int, list[PackedColumn]] = {}
        names = set(batch.schema.names)
        self._has_lists = not names.isdisjoint(TOKEN_LISTS)
        for name, kind in (TOKEN_LISTS | RESPONSE_LISTS).items() if self._has_lists else ():
            column = batch.column(name)
            self._offsets[name] = _offsets(column)
            self._items[name] = _values(column.values, kind.to_pandas_dtype())
            if column.null_count:
                self._missing[name] = ~_bits(column.buffers()[0])[: self.n_rows]
        for packed in schema.packed_columns():
            if packed.name not in names:
                continue
            column = batch.column(packed.name)
            offsets = self._offsets[packed.name] = _offsets(column)
            if (offsets & (layout.PAGE_ALIGNMENT - 1)).any():
                raise FormatError(f"{where}, column {packed.name}: a page that is not aligned")
            self._items[packed.name] = _values(column, np.uint8, buffer=2)[: offsets[-1]]
        hashes = _values(batch.column("rollout_hash"), np.uint8)
        self.hashes = hashes[: self.n_rows * layout.HASH_BYTES].reshape(self.n_rows, layout.HASH_BYTES)
        self._check_lengths()
        # Values of all rows at once; what depends on pages is checked row by row when it is read.
        if proven is not None and 0 not in proven.native:
            self._check_scalars()
            proven.native.add(0)
        if proven is not None and 1 not in proven.native and self._has_lists:
            self._check_lists()
            proven.native.add(1)

    def _check_lists(self) -> None:
        problem = ids_problem("token_ids", self._items["token_ids"], self._vocab_size)
        for name in LOGPROB_LISTS:
            problem = problem or logprobs_problem(name, self._items[name])
        if problem is not None:
            self._refuse_item(*problem)

    def _check_scalars(self) -> None:
        reasons, rewards = self._batch.column("finish_reason"), self._batch.column("reward")
        if not set(reasons.unique().to_pylist()).issubset(FINISH_REASONS):
            for row, reason in enumerate(reasons.to_pylist()):
                if reason not in FINISH_REASONS:
                    expected = f"one of {', '.join(FINISH_REASONS)}"
                    self._refuse(row, ("finish_reason", expected, repr(reason), -1))
        # What stands where there is none may be anything.
        if not np.isfinite(_values(rewards, np.float32)[: self.n_rows]).all():
            for row, reward in enumerate(rewards.to_pylist()):
                if reward is not None and not math.isfinite(reward):
                    self._refuse(row, ("reward", "a finite number", reward, -1))

    def _refuse(self, row: int, problem: Problem) -> NoReturn:
        name, expected, found, at = problem
        place = f", position {at}" if at >= 0 else ""
        raise FormatError(
            f"{self.where}, row {row}{place}, column {name}: expected {expected}, found {found!s:.200}",
            row=row,
            column=name,
        )

    def _refuse_item(self, name: str, expected: str, found: object, at: int) -> NoReturn:
        """Refuse item `at` of all rows of a list column end to end."""
        row = int(np.searchsorted(self._offsets[name], at, side="right")) - 1
        self._refuse(row, (name, expected, found, at - int(self._offsets[name][row])))

    def _check_lengths(self) -> None:
        """Against the index, which was checked when the cache was opened."""
        wrong = self.prompt_len != self._tokens - self._response_tokens
        if wrong.any():
            row = int(np.argmax(wrong))
            expected_len = int(self._tokens[row] - self._response_tokens[row])
            self._refuse(row, ("prompt_len", f"{expected_len}, by the index", int(self.prompt_len[row]), -1))
        for name in (*TOKEN_LISTS, *RESPONSE_LISTS) if self._has_lists else ():
            expected = self._tokens if name in TOKEN_LISTS else self._response_tokens
            if name in self._missing:
                expected = np.where(self._missing[name], 0, expected)
            wrong = np.diff(self._offsets[name]) != expected
            if wrong.any():
                row = int(np.argmax(wrong))
                found = int(np.diff(self._offsets[name])[row])
                raise FormatError(
                    f"{self.where}, row {row}, column {name}: {found} values, expected {int(expected[row])}",
                    row=row,
                    column=name,
                )
        if self._has_lists and (wrong := self._items["loss_mask"] > 1).any():
            at = int(np.argmax(wrong))
            self._refuse_item("loss_mask", "0 or 1", self._items["loss_mask"][at], at)

    def column(self, name: str) -> pa.Array:
        """A native column as Arrow sees it."""
        return self._batch.column(name)

    def policy_versions(self, first: int, end: int) -> NDArray[np.int64] | None:
        """[end - first] which version of the policy sampled each of some rows; None if one does not say."""
        column = self._batch.column("policy_version")
        if column.null_count and column.slice(first, end - first).null_count:
            return None
        return _values(column, np.int64)[first:end]

    def list_row(self, name: str, row: int) -> NDArray[Any] | None:
        """One row of a list column as a view, None where absent."""
        if name in self._missing and self._missing[name][row]:
            return None
        offsets = self._offsets[name]
        return self._items[name][offsets[row] : offsets[row + 1]]

    def list_items(self, name: str) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """The items of all rows of a list column, and which is the first of each row."""
        return self._items[name], self._offsets[name]

    def missing(self, name: str, first: int, end: int) -> NDArray[np.bool_] | None:
        """Which of some rows have nothing in a list column; None where all have."""
        found = self._missing.get(name)
        return None if found is None or not found[first:end].any() else found[first:end]

    def plain_words(self, name: str) -> tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.int32]]:
        """All `plain` pages of a column as words of either type, and at which byte each row's begins."""
        found = self._words.get(name)
        if found is None:
            data = self._items[name]
            found = data.view(np.uint32), data.view(np.float32), self._offsets[name]
            self._words[name] = found
        return found

    def are_proven(self, first: int, end: int, ranks: int) -> bool:
        """Whether the first ranks of these rows were read before and found possible."""
        return self._proven is not None and all(self._proven.rows("topk", ranks)[first:end])

    def topk_into(
        self,
        row: int,
        columns: Sequence[PackedColumn],
        ids: NDArray[np.uint32],
        logprob: NDArray[np.float32],
        log_tail: NDArray[np.float32],
    ) -> None:
        """Decode whole bands of one row, the first and those that follow it, into [P, k], [P, k] and [P].

        Errors as for `topk`; the arrays then hold anything.
        """
        for column in columns:
            part = slice(column.rank_start, column.rank_end)
            self._with_page(
                decode_into,
                column,
                row,
                ids=ids[:, part],
                logprob=logprob[:, part],
                log_tail=log_tail if column is columns[-1] else None,
            )
        self._prove("topk", columns[-1].rank_end, Band(ids, logprob, log_tail), row)

    def topk(self, row: int, ranks: int | None = None) -> Band:
        """The first `ranks` ranks of one row (None: all). One band is a view, several are copied.

        Raises:
            FormatError: a page that breaks the specification, or values that are not possible.
        """
        wanted = self._schema.topk if ranks is None else ranks
        columns = self._bands.get(wanted)
        if columns is None:
            columns = self._bands[wanted] = self._schema.topk_columns(wanted)
        if len(columns) == 1:
            whole = self._decoded(columns[0], row)
            self._prove("topk", columns[0].rank_end, whole, row)
        else:
            n, k = self.response_len(row), columns[-1].rank_end
            whole = Band(np.empty((n, k), np.uint32), np.empty((n, k), np.float32), np.empty(n, np.float32))
            self.topk_into(row, columns, whole.ids, whole.logprob, whole.log_tail)
        return keep_ranks(whole, wanted)

    def check_inner_bands(self, row: int) -> None:
        """Prove what a reader of fewer ranks would get: each band carries a tail of its own."""
        for end in self._schema.bands[:-1]:
            self._require_possible("topk", self.topk(row, end), row)

    def support(self, kind: str, row: int) -> Band:
        """The ids of one row that were "chosen" or "sampled". Errors as for `topk`."""
        (column,) = self._schema.support_columns(kind)
        band = self._decoded(column, row)
        self._prove(kind, column.rank_end, band, row)
        return band

    def page_streams(self, row: int, ranks: int | None = None) -> list[PageStreams]:
        """Like `topk`, but for somebody else to put together; values are proven first."""
        wanted = self._schema.topk if ranks is None else ranks
        columns = self._schema.topk_columns(wanted)
        if self._proven is not None and not self._proven.rows("topk", columns[-1].rank_end)[row]:
            self.topk(row, wanted)
        return [self._with_page(parse_page, column, row) for column in columns]

    def _decoded(self, column: PackedColumn, row: int) -> Band:
        return self._with_page(decode_page, column, row)

    def _with_page(
        self,
        read: Callable[..., _Read],
        column: PackedColumn,
        row: int,
        **more: NDArray[Any] | None,
    ) -> _Read:
        """What one of the readers of pages makes of a page."""
        return read(
            self._page(column.name, row),
            column.page_shape(self.response_len(row)),
            encoding=self._schema.encoding,
            id_table=self._id_table,
            where=f"{self.where}, row {row}, column {column.name}",
            **more,
        )

    def _prove(self, kind: str, ranks: int, band: Band, row: int) -> None:
        """Show at the first read that the values are possible; each band has a tail of its own."""
        if self._proven is not None and not (proven := self._proven.rows(kind, ranks))[row]:
            self._require_possible(kind, band, row)
            proven[row] = 1

    def _require_possible(self, kind: str, band: Band, row: int) -> None:
        problem = support_problem(
            kind,
            band.ids,
            band.logprob,
            band.log_tail,
            draws=band.draws,
            vocab_size=self._vocab_size,
            ragged=kind != "topk" or self._schema.cut is not None,
            tolerance=self._tolerance,
        )
        if problem is not None:
            self._refuse(row, problem)

    def check_pages(self, row: int) -> None:
        """Compare every page of a row with its own checksum. Raises IntegrityError."""
        for column in self._schema.packed_columns():
            self.page(column, row)

    def page(self, column: PackedColumn, row: int) -> NDArray[np.uint8]:
        """A page, compared with its own checksum. Raises IntegrityError."""
        page = self._page(column.name, row)
        table_digest = None if self._id_table is None else self._id_table.digest
        where = f"{self.where}, row {row}, column {column.name}"
        check_page_crc(page, self.hashes[row].tobytes(), table_digest, where=where)
        return page

    def _page(self, name: str, row: int) -> NDArray[np.uint8]:
        offsets = self._offsets[name]
        return self._items[name][offsets[row] : offsets[row + 1]]

    def column_bytes(self) -> dict[str, int]:
        """Bytes of every column's data in this record batch."""
        return {name: self._batch.column(name).nbytes for name in self._batch.schema.names}

    @property
    def n_response_tokens(self) -> int:
        """R of all rows."""
        return int(self._response_tokens.sum())

    def response_lens(self, first: int, end: int) -> NDArray[np.int64]:
        """R of some rows."""
        return self._response_tokens[first:end]

    def response_len(self, row: int) -> int:
        """R of one row."""
        return int(self._response_tokens[row])

    def rollout(
        self, row: int, *, ranks: int | None = None, columns: Collection[str] | None = None
    ) -> Rollout:
        """One row. Fields outside `columns` stay None; token_ids and prompt_len are always there.

        All of `CacheSchema.parts(ranks, columns)` has to be there.
        """
        wanted = columns if columns is None else _ALWAYS | set(columns)
        fields: dict[str, Any] = {"prompt_len": int(self.prompt_len[row])}
        for name in ARRAY_FIELDS:
            if wanted is None or name in wanted:
                fields[name] = self.list_row(name, row)
        if fields.get("loss_mask") is not None:
            fields["loss_mask"] = fields["loss_mask"].view(np.bool_)
        for kind in self._schema.wanted_supports(ranks, wanted):
            band = self.topk(row, ranks) if kind == "topk" else self.support(kind, row)
            parts = (band.ids, band.logprob, band.log_tail, band.draws)
            fields |= {name: part for name, part in zip(SUPPORTS[kind], parts, strict=True) if name}
        for name in _SCALAR_FIELDS:
            if wanted is None or name in wanted:
                fields[name] = self._scalar(name, row)
        users = [name for name in self._schema.user_columns if wanted is None or name in wanted]
        if users:
            extra = {name: self._scalar(name, row) for name in users}
            fields["extra"] = {name: value for name, value in extra.items() if value is not None}
        return Rollout(**fields)

    def _scalar(self, name: str, row: int) -> Scalar | None:
        column = self._scalars.get(name)
        if column is None:
            column = self._scalars[name] = _ScalarColumn(self._batch.column(name))
        return column[row]


class _ScalarColumn:
    """A column of numbers or texts, in place. Arrow itself takes microseconds to give one of them."""

    def __init__(self, array: pa.Array) -> None:
        self._is_present = memoryview(_bits(array.buffers()[0])) if array.null_count else None
        self._starts: memoryview | None = None
        if pa.types.is_string(array.type):
            self._starts = memoryview(_offsets(array))
            self._items = memoryview(_values(array, np.uint8, buffer=2))
        elif pa.types.is_boolean(array.type):
            self._items = memoryview(_bits(array.buffers()[1]))
        else:
            self._items = memoryview(_values(array, array.type.to_pandas_dtype()))

    def __getitem__(self, row: int) -> Scalar | None:
        if self._is_present is not None and not self._is_present[row]:
            return None
        if self._starts is not None:
            return str(self._items[self._starts[row] : self._starts[row + 1]], "utf-8")
        value: Scalar = self._items[row]
        return value


def _bits(buffer: pa.Buffer) -> NDArray[np.bool_]:
    """The bits of a buffer, lowest first, and up to seven more."""
    return np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little").view(np.bool_)


def _values(array: pa.Array, dtype: Any, *, buffer: int = 1) -> NDArray[Any]:  # noqa: ANN401
    data = array.buffers()[buffer]
    return np.frombuffer(data, dtype) if data is not None and data.size else np.empty(0, dtype)


def _offsets(array: pa.Array) -> NDArray[np.int32]:
    return np.frombuffer(array.buffers()[1], np.int32)[: len(array) + 1]
