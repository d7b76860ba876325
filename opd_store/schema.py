"""What the shards of a cache hold, as the manifest says it, and the Arrow schema that follows.

Whatever is small stays native Arrow, so that any Arrow tool reads it; top-k goes into one binary column a
rank band, other supports into one each.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from opd_store import layout
from opd_store.encodings import PageShape, check_encoding
from opd_store.errors import FormatError, InvalidArgumentError, UnsupportedVersionError
from opd_store.rollout import SUPPORTS, SupportSizes

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

    def page_shape(self, n_positions: int) -> PageShape:
        """What a page of so many positions in this column is."""
        return PageShape(self.kind, self.rank_start, self.rank_end, n_positions)


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
                f"bands, cut: expected none for topk=0, found {self.bands!s:.100}, {self.cut}"
            )
        rising = all(a < b for a, b in zip((0, *self.bands), self.bands, strict=False))
        if self.topk and (not self.bands or self.bands[-1] != self.topk or not rising):
            raise InvalidArgumentError(
                f"bands: expected rising ends, the last one {self.topk}, found {self.bands!s:.100}"
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

    def wanted_supports(self, ranks: int | None, columns: Collection[str] | None) -> list[str]:
        """Which supports some fields of a rollout come from. Internal to the package."""
        wanted = None if columns is None else set(columns)
        return [
            kind
            for kind, fields in SUPPORTS.items()
            if getattr(self, kind)
            and (wanted is None or not wanted.isdisjoint(fields))
            and not (kind == "topk" and ranks == 0)
        ]

    def parts(self, ranks: int | None = None, columns: Collection[str] | None = None) -> tuple[int, ...]:
        """Parts of a record batch with some fields of rollouts. Internal to the package."""
        wanted: set[str] = set()
        for kind in self.wanted_supports(ranks, columns):
            found = self.topk_columns(ranks) if kind == "topk" else self.support_columns(kind)
            wanted |= {column.name for column in found}
        packed = enumerate(self.packed_columns(), layout.NATIVE_PARTS)
        return (*range(layout.NATIVE_PARTS), *(part for part, column in packed if column.name in wanted))

    @property
    def n_parts(self) -> int:
        """Parts of a record batch. Internal to the package."""
        return layout.NATIVE_PARTS + len(self.packed_columns())

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


def _list_field(name: str, kind: pa.DataType, *, nullable: bool) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("item", kind, nullable=False)), nullable=nullable)


# Made once, since they would take a third of the time that opening a small cache does.
_SCALAR_FIELDS = [pa.field(name, kind, nullable=nullable) for name, (kind, nullable) in SCALARS.items()]
_LIST_FIELDS = [_list_field(name, kind, nullable=False) for name, kind in TOKEN_LISTS.items()]
_LIST_FIELDS += [_list_field(name, kind, nullable=True) for name, kind in RESPONSE_LISTS.items()]


def arrow_schema(schema: CacheSchema) -> pa.Schema:
    """The schema of every shard, columns in file order."""
    fields = [*_SCALAR_FIELDS]
    fields += [pa.field(name, USER_TYPES[kind]) for name, kind in sorted(schema.user_columns.items())]
    fields += [*_LIST_FIELDS]
    fields += [pa.field(column.name, pa.binary(), nullable=False) for column in schema.packed_columns()]
    return pa.schema(fields)


def part_columns(schema: pa.Schema) -> list[range]:
    """Which columns of `arrow_schema` each part of a record batch holds: numbers of columns, part by part."""
    lists = schema.get_field_index(next(iter(TOKEN_LISTS)))
    packed = lists + len(TOKEN_LISTS) + len(RESPONSE_LISTS)
    return [range(lists), range(lists, packed), *(range(n, n + 1) for n in range(packed, len(schema)))]
