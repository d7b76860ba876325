"""The Arrow schema of a shard, and rollouts to record batches.

Whatever is small stays native Arrow, so that any Arrow tool reads it; top-k goes into one binary column a
rank band.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from opd_store import layout
from opd_store.encodings import Band, check_encoding, encode_pages
from opd_store.errors import FormatError, InvalidArgumentError, InvalidRolloutError, UnsupportedVersionError
from opd_store.rollout import Rollout, Scalar, is_text

USER_TYPES: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "utf8": pa.utf8(),
}
TOKEN_LISTS = {"token_ids": pa.uint32()}
RESPONSE_LISTS = {
    "loss_mask": pa.uint8(),
    "teacher_logprob": pa.float32(),
    "behaviour_logprob": pa.float32(),
    "reference_logprob": pa.float32(),
}
SCALARS = {
    "rollout_hash": (pa.binary(layout.HASH_BYTES), False),
    "sample_id": (pa.utf8(), True),
    "prompt_len": (pa.uint32(), False),
    "finish_reason": (pa.utf8(), False),
    "policy_version": (pa.int64(), True),
    "teacher": (pa.uint16(), False),
    "reward": (pa.float32(), True),
    "label": (pa.utf8(), True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSchema:
    """What every shard of a cache holds; part of the manifest."""

    topk: int = 0
    """K, ranks stored at every response position; 0 for none."""
    bands: tuple[int, ...] = ()
    """Ends of the rank bands, rising, the last one K."""
    encoding: str = "plain"
    user_columns: dict[str, str] = field(default_factory=dict)
    """Name of an `x_*` column to its type: bool, int64, float64 or utf8."""

    def __post_init__(self) -> None:
        if not 0 <= self.topk <= layout.MAX_TOPK:
            raise InvalidArgumentError(f"topk: expected 0..{layout.MAX_TOPK}, found {self.topk}")
        if self.topk == 0 and self.bands:
            raise InvalidArgumentError(f"bands: expected none for topk=0, found {self.bands}")
        rising = all(a < b for a, b in zip((0, *self.bands), self.bands, strict=False))
        if self.topk and (not self.bands or self.bands[-1] != self.topk or not rising):
            raise InvalidArgumentError(
                f"bands: expected rising ends, the last one {self.topk}, found {self.bands}"
            )
        check_encoding(self.encoding)
        for name, kind in self.user_columns.items():
            if not layout.USER_COLUMN.fullmatch(name) or kind not in USER_TYPES:
                raise InvalidArgumentError(
                    f"user column {name!r:.100} of type {kind!r:.100}: expected a name like x_domain "
                    f"and one of {', '.join(USER_TYPES)}"
                )

    def band_ranges(self, ranks: int | None = None) -> list[tuple[int, int]]:
        """(start, end) of every band needed for the first `ranks` ranks; None means all."""
        wanted = self.topk if ranks is None else ranks
        starts = (0, *self.bands[:-1])
        return [(a, b) for a, b in zip(starts, self.bands, strict=True) if a < wanted] if self.bands else []

    def to_json(self) -> dict[str, Any]:
        """A JSON object; column names and types follow from it."""
        bands = list(self.bands)
        return {
            "bands": bands,
            "encoding": self.encoding,
            "topk": self.topk,
            "user_columns": dict(sorted(self.user_columns.items())),
        }

    @classmethod
    def from_json(cls, value: object, *, where: str) -> CacheSchema:
        """Read what `to_json` wrote. Raises FormatError, and UnsupportedVersionError for a later encoding."""
        kinds = {"bands": list, "encoding": str, "topk": int, "user_columns": dict}
        well_formed = (
            isinstance(value, dict)
            and value.keys() == kinds.keys()
            and all(type(value[name]) is kind for name, kind in kinds.items())
            and all(type(end) is int for end in value["bands"])
            and all(isinstance(kind, str) for kind in value["user_columns"].values())
        )
        if not isinstance(value, dict) or not well_formed:
            raise FormatError(f"{where}: not a cache schema: {value!r:.200}")
        try:
            check_encoding(value["encoding"])
        except InvalidArgumentError as error:
            raise UnsupportedVersionError(f"{where}: {error}; upgrade opd-store") from error
        try:
            return cls(**{**value, "bands": tuple(value["bands"])})
        except InvalidArgumentError as error:
            raise FormatError(f"{where}: {error}") from error


def band_column(start: int, end: int) -> str:
    """Name of the packed column of ranks [start, end), such as `topk_8_16`."""
    return f"topk_{start}_{end}"


def arrow_schema(schema: CacheSchema) -> pa.Schema:
    """The schema of every shard, columns in file order."""

    def list_of(value_type: pa.DataType) -> pa.DataType:
        return pa.list_(pa.field("item", value_type, nullable=False))

    fields = [pa.field(name, kind, nullable=nullable) for name, (kind, nullable) in SCALARS.items()]
    fields += [pa.field(name, USER_TYPES[kind]) for name, kind in sorted(schema.user_columns.items())]
    fields += [pa.field(name, list_of(kind), nullable=False) for name, kind in TOKEN_LISTS.items()]
    fields += [pa.field(name, list_of(kind)) for name, kind in RESPONSE_LISTS.items()]
    fields += [pa.field(band_column(a, b), pa.binary(), nullable=False) for a, b in schema.band_ranges()]
    return pa.schema(fields)


class BatchBuilder:
    """Collects encoded rollouts until they are worth a record batch."""

    def __init__(self, schema: CacheSchema) -> None:
        self._schema = schema
        self._arrow = arrow_schema(schema)
        self._clear()

    def _clear(self) -> None:
        self._values: dict[str, list[Any]] = {name: [] for name in self._arrow.names}
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._values["rollout_hash"])

    def add(self, rollout: Rollout, rollout_hash: bytes) -> None:
        """Encode one rollout that `rollout.checked` passed.

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
        if self._schema.topk:
            assert rollout.topk_ids is not None
            assert rollout.topk_logprob is not None
            assert rollout.log_tail is not None
            pages = encode_pages(
                Band(rollout.topk_ids, rollout.topk_logprob, rollout.log_tail),
                encoding=self._schema.encoding,
                bands=self._schema.bands,
                rollout_hash=rollout_hash,
            )
            for (start, end), page in zip(self._schema.band_ranges(), pages, strict=True):
                if len(page) > layout.MAX_PAGE_BYTES:
                    limit = layout.MAX_PAGE_BYTES
                    raise _invalid(
                        rollout, band_column(start, end), f"a page of at most {limit} bytes", len(page)
                    )
                row[band_column(start, end)] = page
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


def _invalid(rollout: Rollout, name: str, expected: str, found: object) -> InvalidRolloutError:
    message = f"rollout {rollout.sample_id!r:.100}, field {name}: expected {expected}, found {found!s:.100}"
    return InvalidRolloutError(message, sample_id=rollout.sample_id or "", field=name)
