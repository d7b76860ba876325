"""Rollouts to record batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import layout
from opd_store.encodings import (
    Band,
    EncodedPages,
    IdTable,
    Unencodable,
    decode_page,
    encode_pages,
    join_tail,
    value_tolerance,
)
from opd_store.errors import InvalidRolloutError
from opd_store.rollout import SUPPORTS, Rollout, Scalar, is_text
from opd_store.schema import RESPONSE_LISTS, TOKEN_LISTS, CacheSchema, Cut, PackedColumn, arrow_schema


@dataclass(frozen=True, slots=True)
class Stored:
    """What a rollout is in the cache that it is copied from."""

    pages: Mapping[str, bytes]
    """Column to a page that needs no change."""
    tails: Mapping[int, NDArray[np.float32]]
    """Rank to the tail outside as many ranks."""
    is_cut: bool
    """Whether the ranks that this cache's cut drops are dropped already."""
    error: float
    """Nats, of everything there."""


class BatchBuilder:
    """Collects encoded rollouts until they are worth a record batch."""

    def __init__(self, schema: CacheSchema) -> None:
        self._schema = schema
        self._arrow = arrow_schema(schema)
        self.id_table: IdTable | None = None
        """What the ids of pages may refer to from now on."""
        self.max_error = 0.0
        """Nats, of everything encoded so far."""
        self._clear()

    def _clear(self) -> None:
        self._values: dict[str, list[Any]] = {name: [] for name in self._arrow.names}
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._values["rollout_hash"])

    def add(
        self, rollout: Rollout, rollout_hash: bytes, stored: Stored | None = None
    ) -> NDArray[np.uint32] | None:
        """Encode one rollout that `rollout.checked` passed.

        Args:
            stored: what another cache knows of it; its pages are taken as they are.

        Returns:
            [R, K] top-k ids as they will be read, None without top-k.

        Raises:
            InvalidRolloutError: an undeclared user column, or a value that does not fit its column.
        """
        row: dict[str, Any] = {
            "rollout_hash": rollout_hash,
            "sample_id": rollout.sample_id,
            "prompt_len": rollout.prompt_len,
            "finish_reason": rollout.finish_reason,
            "policy_version": rollout.policy_version,
            "teacher": rollout.teacher,
            "reward": rollout.reward,
            "label": rollout.label,
            **self._user_values(rollout),
        }
        for name in TOKEN_LISTS | RESPONSE_LISTS:
            value = getattr(rollout, name)
            item_type = (TOKEN_LISTS | RESPONSE_LISTS)[name].to_pandas_dtype()
            row[name] = None if value is None else np.array(value, item_type, copy=True)
        topk_ids, max_error = None, self.max_error
        for kind in SUPPORTS:
            columns = self._schema.support_columns(kind)
            if not columns:
                continue
            encoded = self._encoded(kind, columns, rollout, rollout_hash, stored)
            error = encoded.max_error if stored is None else stored.error + encoded.max_error
            if stored is not None and encoded.max_error:
                self._require_sums(rollout, kind, columns, encoded.pages, error)
            max_error = max(max_error, error)
            if kind == "topk":
                topk_ids = encoded.ids
            for column, page in zip(columns, encoded.pages, strict=True):
                if len(page) > layout.MAX_PAGE_BYTES:
                    raise _invalid(
                        rollout, column.name, f"a page of at most {layout.MAX_PAGE_BYTES} bytes", len(page)
                    )
                row[column.name] = page
        sizes = (
            value.nbytes if isinstance(value, np.ndarray) else len(value)
            for value in row.values()
            if isinstance(value, bytes | str | np.ndarray)
        )
        n_bytes = sum(sizes)
        # Together with the largest batch_bytes, well below the limit of a record batch.
        if n_bytes > layout.MAX_BATCH_BYTES // 4:
            raise _invalid(
                rollout, "token_ids", f"at most {layout.MAX_BATCH_BYTES // 4} bytes a rollout", n_bytes
            )
        for name, value in row.items():
            self._values[name].append(value)
        self.n_bytes += n_bytes
        self.max_error = max_error
        return topk_ids

    def _encoded(
        self,
        kind: str,
        columns: list[PackedColumn],
        rollout: Rollout,
        rollout_hash: bytes,
        stored: Stored | None,
    ) -> EncodedPages:
        ids_field, logprob_field, tail_field, draws_field = SUPPORTS[kind]
        if stored is not None and all(column.name in stored.pages for column in columns):
            pages = [stored.pages[column.name] for column in columns]
            return EncodedPages(pages, getattr(rollout, ids_field), 0.0)
        support = Band(
            getattr(rollout, ids_field),
            getattr(rollout, logprob_field),
            getattr(rollout, tail_field),
            None if draws_field is None else getattr(rollout, draws_field),
        )
        if kind == "topk" and self._schema.cut is not None and not (stored is not None and stored.is_cut):
            support = _cut(support, self._schema.cut)
        largest = max(column.page_shape(rollout.response_len).decoded_bytes for column in columns)
        if self._schema.encoding != "plain" and largest > layout.MAX_DECODED_BYTES:
            limit = layout.MAX_DECODED_BYTES // (largest // rollout.response_len)
            raise _invalid(
                rollout, ids_field, f"at most {limit} response tokens a page", rollout.response_len
            )
        try:
            return encode_pages(
                support,
                encoding=self._schema.encoding,
                kind=columns[0].kind,
                bands=tuple(column.rank_end for column in columns),
                rollout_hash=rollout_hash,
                id_table=self.id_table,
                tails=stored.tails if stored is not None and kind == "topk" else None,
            )
        except Unencodable as error:
            is_tail, position, expected, found = error.args
            name = tail_field if is_tail else logprob_field
            raise _invalid(rollout, name, expected, found, position) from error

    def _require_sums(
        self, rollout: Rollout, kind: str, columns: list[PackedColumn], pages: list[bytes], error: float
    ) -> None:
        """Refuse values that were rounded once more and now sum to more than readers of this cache accept."""
        limit = 1 + value_tolerance(self._schema.encoding, error)
        ranks = np.zeros(rollout.response_len)
        for column, page in zip(columns, pages, strict=True):
            band = decode_page(
                np.frombuffer(page, np.uint8),
                column.page_shape(rollout.response_len),
                encoding=self._schema.encoding,
                id_table=self.id_table,
                where="page",
            )
            ranks += np.exp(band.logprob.astype(np.float64)).sum(axis=1)
            total = ranks + np.exp(band.log_tail.astype(np.float64))
            if (total > limit).any():
                at = int(np.argmax(total > limit))
                expected = f"probabilities and tail of at most {limit:.4g} after rounding"
                raise _invalid(rollout, SUPPORTS[kind][1], expected, total[at], at)

    def _user_values(self, rollout: Rollout) -> dict[str, Scalar | None]:
        unknown = rollout.extra.keys() - self._schema.user_columns.keys()
        if unknown:
            declared = ", ".join(sorted(self._schema.user_columns)) or "none"
            raise _invalid(
                rollout, min(unknown), f"a user column declared at creation ({declared})", "it undeclared"
            )
        values: dict[str, Scalar | None] = {}
        for name, kind in self._schema.user_columns.items():
            value = rollout.extra.get(name)
            if value is not None and not _fits(value, kind):
                raise _invalid(rollout, name, f"a value that fits {kind}", repr(value))
            values[name] = value
        return values

    def take(self) -> pa.RecordBatch:
        """The rollouts collected so far as one record batch; the builder is empty afterwards."""
        try:
            arrays = [self._array(column, self._values[column.name]) for column in self._arrow]
        except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError) as error:
            raise InvalidRolloutError(f"a value does not fit its column: {error}") from error
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._arrow)
        self._clear()
        return batch

    def _array(self, column: pa.Field, values: list[Any]) -> pa.Array:
        if pa.types.is_list(column.type):
            return _list_array(column.type, values)
        if pa.types.is_binary(column.type):
            return _binary_array(values)
        return pa.array(values, column.type)


def _fits(value: Scalar, kind: str) -> bool:
    if kind == "utf8":
        return is_text(value)
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    if kind == "int64":
        return isinstance(value, int) and -(1 << 63) <= value < 1 << 63
    # Larger integers have no exact float64.
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= 1 << 53)


def _list_array(list_type: pa.DataType, values: list[Any]) -> pa.Array:
    lengths = [0 if value is None else len(value) for value in values]
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    present = [value for value in values if value is not None]
    item_type = list_type.value_field.type.to_pandas_dtype()
    items = np.concatenate(present) if present else np.empty(0, item_type)
    validity = None
    if len(present) < len(values):
        validity = pa.array([value is not None for value in values]).buffers()[1]
    child = pa.Array.from_buffers(list_type.value_field.type, len(items), [None, pa.py_buffer(items)])
    return pa.Array.from_buffers(list_type, len(values), [validity, pa.py_buffer(offsets)], children=[child])


def _binary_array(values: list[bytes]) -> pa.Array:
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    return pa.Array.from_buffers(
        pa.binary(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    )


def _cut(support: Band, cut: Cut) -> Band:
    """Drop the ranks that the rule does not keep, and add them to the tail."""
    present = support.ids != layout.NO_ID
    if cut.rule == "probability":
        assert cut.value is not None
        kept = present & (support.logprob >= np.float32(math.log(cut.value)))
    elif cut.rule == "mass":
        probability = np.exp(support.logprob.astype(np.float64))
        before = np.cumsum(probability, axis=1) - probability
        kept = present & (before < cut.value)
    else:
        return support
    kept[:, 0] = True
    joined = join_tail(support.log_tail, np.where(kept, np.float32(-np.inf), support.logprob))
    return Band(
        np.where(kept, support.ids, np.uint32(layout.NO_ID)),
        np.where(kept, support.logprob, np.float32(-np.inf)),
        np.where((present & ~kept).any(axis=1), joined, support.log_tail),
    )


def _invalid(
    rollout: Rollout, name: str, expected: str, found: object, position: int = -1
) -> InvalidRolloutError:
    place = f", position {position}" if position >= 0 else ""
    return InvalidRolloutError(
        f"rollout {rollout.sample_id!r:.100}, field {name}{place}: expected {expected}, found {found!s:.100}",
        sample_id=rollout.sample_id or "",
        field=name,
        position=position,
    )
