"""The Arrow schema of a shard, and rollouts to record batches.

Whatever is small stays native Arrow, so that any Arrow tool reads it; top-k goes into one binary column a
rank band, other supports into one each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from opd_store import layout
from opd_store.encodings import (
    Band,
    IdTable,
    Unencodable,
    check_encoding,
    encode_pages,
    value_tolerance,
)
from opd_store.errors import FormatError, InvalidArgumentError, InvalidRolloutError, UnsupportedVersionError
from opd_store.rollout import SUPPORTS, Rollout, Scalar, SupportSizes, is_text

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


@dataclass(frozen=True, slots=True)
class Cut:
    """Which ranks of the top-k are kept at each position; the rest joins the tail."""

    rule: str
    """"probability": those of at least `value`. "mass": as few as sum to `value`. "given": whatever was
    appended. The first rank always stays."""
    value: float | None = None

    def __post_init__(self) -> None:
        wanted = "none" if self.rule == "given" else "a number in (0, 1)"
        fits = self.value is None if self.rule == "given" else _is_share(self.value)
        if self.rule not in ("probability", "mass", "given") or not fits:
            raise InvalidArgumentError(
                f"cut: expected the rule probability, mass or given with {wanted} as value, "
                f"found {self.rule!r:.100} with {self.value!r:.100}"
            )


def _is_share(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1


@dataclass(frozen=True, slots=True)
class PackedColumn:
    """A binary column of pages."""

    name: str
    kind: int
    """layout.KIND_TOPK, KIND_CHOSEN or KIND_SAMPLED."""
    rank_start: int
    rank_end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSchema:
    """What every shard of a cache holds; part of the manifest."""

    topk: int = 0
    """K, ranks stored at every response position; 0 for none."""
    bands: tuple[int, ...] = ()
    """Ends of the rank bands, rising, the last one K."""
    encoding: str = "plain"
    id_table: str = "none"
    """Whether pages may refer to an id table: "none", "given" by the creator, or "auto", built from the first
    65,536 positions and used from then on."""
    cut: Cut | None = None
    """Which of the K ranks a position keeps; None for all of them."""
    chosen: int = 0
    """Most ids a position may have that somebody else chose, such as the student; 0 for none."""
    sampled: int = 0
    """Most distinct ids a position may have that were drawn from the teacher; 0 for none."""
    sampled_temperature: float = 1.0
    """At which the draws were made; their log-probs are at temperature 1."""
    user_columns: dict[str, str] = field(default_factory=dict)
    """Name of an `x_*` column to its type: bool, int64, float64 or utf8."""

    def __post_init__(self) -> None:
        for name in ("topk", "chosen", "sampled"):
            if not 0 <= getattr(self, name) <= layout.MAX_TOPK:
                raise InvalidArgumentError(
                    f"{name}: expected 0..{layout.MAX_TOPK}, found {getattr(self, name)}"
                )
        if self.topk == 0 and (self.bands or self.cut):
            raise InvalidArgumentError(
                f"bands, cut: expected none for topk=0, found {self.bands}, {self.cut}"
            )
        rising = all(a < b for a, b in zip((0, *self.bands), self.bands, strict=False))
        if self.topk and (not self.bands or self.bands[-1] != self.topk or not rising):
            raise InvalidArgumentError(
                f"bands: expected rising ends, the last one {self.topk}, found {self.bands}"
            )
        temperature = self.sampled_temperature
        usual = self.sampled > 0 or temperature == 1.0
        if type(temperature) is not float or not 0 < temperature <= 100 or not usual:
            raise InvalidArgumentError(
                f"sampled_temperature: expected a number in (0, 100], and 1.0 without draws, "
                f"found {temperature!r:.100}"
            )
        check_encoding(self.encoding)
        packed = self.encoding != "plain" and bool(self.topk or self.chosen or self.sampled)
        if self.id_table not in (("none", "auto", "given") if packed else ("none",)):
            raise InvalidArgumentError(
                f"id_table: expected none{', auto or given' if packed else ' for plain pages'}, "
                f"found {self.id_table!r:.100}"
            )
        for name, kind in self.user_columns.items():
            if not layout.USER_COLUMN.fullmatch(name) or kind not in USER_TYPES:
                raise InvalidArgumentError(
                    f"user column {name!r:.100} of type {kind!r:.100}: expected a name like x_domain "
                    f"and one of {', '.join(USER_TYPES)}"
                )

    @property
    def sizes(self) -> SupportSizes:
        """How many ids a position may hold."""
        ragged = self.cut is not None
        return SupportSizes(topk=self.topk, ragged=ragged, chosen=self.chosen, sampled=self.sampled)

    @property
    def tolerance(self) -> float:
        """How far stored probabilities of one position may exceed 1 in sum."""
        return value_tolerance(self.encoding)

    def topk_columns(self, ranks: int | None = None) -> list[PackedColumn]:
        """The columns of every band needed for the first `ranks` ranks; None means all."""
        wanted = self.topk if ranks is None else ranks
        starts = (0, *self.bands[:-1])
        return [
            PackedColumn(f"topk_{start}_{end}", layout.KIND_TOPK, start, end)
            for start, end in zip(starts, self.bands, strict=False)
            if start < wanted
        ]

    def support_columns(self, kind: str) -> list[PackedColumn]:
        """The columns of one kind of support: "topk", "chosen" or "sampled"."""
        if kind == "topk":
            return self.topk_columns()
        width, code = (
            (self.chosen, layout.KIND_CHOSEN) if kind == "chosen" else (self.sampled, layout.KIND_SAMPLED)
        )
        return [PackedColumn(kind, code, 0, width)] if width else []

    def packed_columns(self) -> list[PackedColumn]:
        """All packed columns, in file order."""
        return [column for kind in SUPPORTS for column in self.support_columns(kind)]

    def to_json(self) -> dict[str, Any]:
        """A JSON object; column names and types follow from it."""
        return {
            "bands": list(self.bands),
            "chosen": self.chosen,
            "cut": None if self.cut is None else {"rule": self.cut.rule, "value": self.cut.value},
            "encoding": self.encoding,
            "id_table": self.id_table,
            "sampled": self.sampled,
            "sampled_temperature": self.sampled_temperature,
            "topk": self.topk,
            "user_columns": dict(sorted(self.user_columns.items())),
        }

    @classmethod
    def from_json(cls, value: object, *, where: str) -> CacheSchema:
        """Read what `to_json` wrote. Raises FormatError, and UnsupportedVersionError for a later encoding."""
        kinds = {
            "bands": list,
            "chosen": int,
            "cut": dict,
            "encoding": str,
            "id_table": str,
            "sampled": int,
            "sampled_temperature": float,
            "topk": int,
            "user_columns": dict,
        }
        well_formed = (
            isinstance(value, dict)
            and value.keys() == kinds.keys()
            and all(
                type(value[name]) is kind or (name == "cut" and value[name] is None)
                for name, kind in kinds.items()
            )
            and all(type(end) is int for end in value["bands"])
            and (value["cut"] is None or value["cut"].keys() == {"rule", "value"})
            and all(isinstance(kind, str) for kind in value["user_columns"].values())
        )
        if not isinstance(value, dict) or not well_formed:
            raise FormatError(f"{where}: not a cache schema: {value!r:.200}")
        try:
            check_encoding(value["encoding"])
        except InvalidArgumentError as error:
            raise UnsupportedVersionError(f"{where}: {error}; upgrade opd-store") from error
        try:
            cut = None if value["cut"] is None else Cut(**value["cut"])
            return cls(**{**value, "bands": tuple(value["bands"]), "cut": cut})
        except (InvalidArgumentError, TypeError) as error:
            raise FormatError(f"{where}: {error}") from error


def arrow_schema(schema: CacheSchema) -> pa.Schema:
    """The schema of every shard, columns in file order."""

    def list_of(value_type: pa.DataType) -> pa.DataType:
        return pa.list_(pa.field("item", value_type, nullable=False))

    fields = [pa.field(name, kind, nullable=nullable) for name, (kind, nullable) in SCALARS.items()]
    fields += [pa.field(name, USER_TYPES[kind]) for name, kind in sorted(schema.user_columns.items())]
    fields += [pa.field(name, list_of(kind), nullable=False) for name, kind in TOKEN_LISTS.items()]
    fields += [pa.field(name, list_of(kind)) for name, kind in RESPONSE_LISTS.items()]
    fields += [pa.field(column.name, pa.binary(), nullable=False) for column in schema.packed_columns()]
    return pa.schema(fields)


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
        for kind in SUPPORTS:
            for column, page in self._pages(kind, rollout, rollout_hash):
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

    def _pages(self, kind: str, rollout: Rollout, rollout_hash: bytes) -> list[tuple[PackedColumn, bytes]]:
        columns = self._schema.support_columns(kind)
        if not columns:
            return []
        ids_field, logprob_field, tail_field, draws_field = SUPPORTS[kind]
        support = Band(
            getattr(rollout, ids_field),
            getattr(rollout, logprob_field),
            getattr(rollout, tail_field),
            None if draws_field is None else getattr(rollout, draws_field),
        )
        if kind == "topk" and self._schema.cut is not None:
            support = _cut(support, self._schema.cut)
        ranks = max(column.rank_end - column.rank_start for column in columns)
        decoded_bytes = (12 * ranks + 4) * rollout.response_len
        if self._schema.encoding != "plain" and decoded_bytes > layout.MAX_DECODED_BYTES:
            limit = layout.MAX_DECODED_BYTES // (12 * ranks + 4)
            raise _invalid(
                rollout, ids_field, f"at most {limit} response tokens a page", rollout.response_len
            )
        try:
            encoded = encode_pages(
                support,
                encoding=self._schema.encoding,
                kind=columns[0].kind,
                bands=tuple(column.rank_end for column in columns),
                rollout_hash=rollout_hash,
                id_table=self.id_table,
            )
        except Unencodable as error:
            position, expected, found = error.args
            raise _invalid(rollout, logprob_field, expected, found, position) from error
        self.max_error = max(self.max_error, encoded.max_error)
        return list(zip(columns, encoded.pages, strict=True))

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
    dropped = np.where(kept, -np.inf, support.logprob.astype(np.float64))
    tail = np.logaddexp(support.log_tail.astype(np.float64), np.logaddexp.reduce(dropped, axis=1))
    return Band(
        np.where(kept, support.ids, np.uint32(layout.NO_ID)),
        np.where(kept, support.logprob, np.float32(-np.inf)),
        np.where((present & ~kept).any(axis=1), np.minimum(tail, 0.0), support.log_tail).astype(np.float32),
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
