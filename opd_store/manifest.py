"""The manifest: small strict JSON whose creation is the commit. Defined in `spec/manifest.md`."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from opd_store import layout
from opd_store.encodings import value_tolerance
from opd_store.errors import FormatError, IntegrityError, UnsupportedVersionError
from opd_store.hashing import Buffer
from opd_store.index import FileRef, SegmentRef
from opd_store.meta import CacheMeta
from opd_store.schema import CacheSchema

KNOWN_FEATURES: frozenset[str] = frozenset()
_TRAILER = re.compile(rb',\n "checksum": "sha256:([0-9a-f]{64})"\n\}\n\Z')


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One committed version."""

    sequence: int
    """1 for the first version, then one more for each."""
    parent: str | None
    """`sha256:...` of the manifest before this one; None for the first."""
    meta: CacheMeta
    schema: CacheSchema
    segments: tuple[SegmentRef, ...]
    id_table: FileRef | None = None
    """What the ids of packed pages may refer to; once there, the same in every later version."""
    required_features: tuple[str, ...] = ()
    optional_features: tuple[str, ...] = ()
    minor: int = layout.FORMAT_MINOR
    """Of the format version it was written in."""

    @property
    def newer(self) -> bool:
        """Of a higher minor version: readable, but this release would lose what it does not know."""
        return self.minor > layout.FORMAT_MINOR

    @property
    def rows(self) -> int:
        """Rollouts in this version."""
        return sum(segment.rows for segment in self.segments)

    @property
    def max_error(self) -> float:
        """Nats: how far stored log-probs and tails are from those first written, at most; 0 if exact."""
        return max((segment.max_error for segment in self.segments), default=0.0)

    @property
    def tolerance(self) -> float:
        """How far stored probabilities of one position may exceed 1 in sum."""
        return value_tolerance(self.schema.encoding, self.max_error)


def encode_manifest(manifest: Manifest) -> bytes:
    """Bytes of the manifest file. The same content always gives the same bytes.

    Raises:
        FormatError: a value that `decode_manifest` would refuse, or a file larger than the format allows.
        ValueError, TypeError: a value that JSON cannot hold.
    """
    body = {
        "format": layout.FORMAT_NAME,
        "format_version": f"{layout.FORMAT_MAJOR}.{layout.FORMAT_MINOR}",
        "unreleased": True,
        "sequence": manifest.sequence,
        "parent": manifest.parent,
        "required_features": list(manifest.required_features),
        "optional_features": list(manifest.optional_features),
        "meta": manifest.meta.to_json(),
        "schema": manifest.schema.to_json(),
        "id_table": None if manifest.id_table is None else _file_to_json(manifest.id_table),
        "segments": [_segment_to_json(segment) for segment in manifest.segments],
    }
    text = json.dumps(body, indent=1, ensure_ascii=True, allow_nan=False).encode()
    covered = text[: -len(b"\n}")]
    trailer = f',\n "checksum": "sha256:{hashlib.sha256(covered).hexdigest()}"\n}}\n'.encode()
    # A manifest that no reader accepts would hide everything committed before it.
    decode_manifest(covered + trailer, where="manifest")
    return covered + trailer


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """Read a manifest file.

    Raises:
        IntegrityError: its own checksum does not fit.
        UnsupportedVersionError: a newer major version, or an unknown required feature.
        FormatError: anything else the specification forbids.
    """
    if len(data) > layout.MAX_MANIFEST_BYTES:
        raise FormatError(f"{where}: {len(data)} bytes, the limit is {layout.MAX_MANIFEST_BYTES}", uri=where)
    trailer = _TRAILER.search(data)
    if trailer is None:
        raise IntegrityError(
            f"{where}: does not end with its checksum; the file is cut, extended or foreign", uri=where
        )
    found = hashlib.sha256(data[: trailer.start()]).hexdigest()
    if found != trailer[1].decode():
        raise IntegrityError(
            f"{where}: sha256 {found}, expected {trailer[1].decode()}. Fetch it again.", uri=where
        )
    value = parse_strict_json(data, where=where)
    minor = _check_version(value, where)
    newer = minor > layout.FORMAT_MINOR
    expected = {
        "format": str,
        "format_version": str,
        "unreleased": bool,
        "sequence": int,
        "parent": str | None,
        "required_features": list,
        "optional_features": list,
        "meta": dict,
        "schema": dict,
        "id_table": dict | None,
        "segments": list,
        "checksum": str,
    }
    _check_object(value, expected, where, allow_unknown=newer)
    if not all(isinstance(item, str) for item in value["required_features"] + value["optional_features"]):
        raise FormatError(f"{where}: a feature that is not a name", uri=where)
    unknown = sorted(set(value["required_features"]) - KNOWN_FEATURES)
    if unknown:
        raise UnsupportedVersionError(
            f"{where}: needs feature {unknown[0]!r:.100}; upgrade opd-store", uri=where
        )
    if not 1 <= value["sequence"] <= layout.MAX_VERSION or (value["sequence"] == 1) != (
        value["parent"] is None
    ):
        raise FormatError(
            f"{where}: version {value['sequence']} with parent {value['parent']!r:.100}", uri=where
        )
    if value["parent"] is not None and not layout.DIGEST.fullmatch(value["parent"]):
        raise FormatError(f"{where}: parent {value['parent']!r:.100} is not a digest", uri=where)
    if len(value["segments"]) > layout.MAX_SEGMENTS:
        raise FormatError(
            f"{where}: {len(value['segments'])} segments, the limit is {layout.MAX_SEGMENTS}", uri=where
        )
    meta = CacheMeta.from_json(value["meta"], where=f"{where}: meta", allow_unknown=newer)
    schema = CacheSchema.from_json(value["schema"], where=f"{where}: schema")
    widest = max(schema.topk, schema.chosen, schema.sampled)
    if widest > meta.vocab_size:
        raise FormatError(f"{where}: {widest} ids of a vocabulary of {meta.vocab_size}", uri=where)
    id_table = value["id_table"]
    if id_table is not None:
        id_table = _file_from_json(id_table, where, newer, directory=layout.TABLE_DIR)
        if id_table.n_bytes > layout.MAX_ID_TABLE_BYTES:
            raise FormatError(
                f"{where}: an id table of {id_table.n_bytes} bytes, the limit is {layout.MAX_ID_TABLE_BYTES}",
                uri=where,
            )
    allowed = {"none": [False], "auto": [False, True], "given": [True]}[schema.id_table]
    if (id_table is not None) not in allowed:
        raise FormatError(
            f"{where}: the schema's id_table is {schema.id_table!r}, but the manifest names {id_table}",
            uri=where,
        )
    return Manifest(
        sequence=value["sequence"],
        parent=value["parent"],
        meta=meta,
        schema=schema,
        id_table=id_table,
        segments=tuple(_segment_from_json(item, where, newer) for item in value["segments"]),
        required_features=tuple(value["required_features"]),
        optional_features=tuple(value["optional_features"]),
        minor=minor,
    )


def parse_strict_json(data: bytes, *, where: str) -> dict[str, Any]:
    """Parse one JSON object: UTF-8 without BOM, no duplicate keys, no NaN, bounded depth, strings and
    integers.

    Raises:
        FormatError: what Python's parser would have let pass.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) != len(items):
            counts = Counter(name for name, _ in items)
            twice = next(name for name, count in counts.items() if count > 1)
            raise FormatError(f"{where}: duplicate key {twice!r:.100}")
        return value

    def constant(text: str) -> None:
        raise FormatError(f"{where}: {text} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON: {type(error).__name__}: {error!s:.200}") from error
    _check_limits(value, where, layout.MAX_JSON_DEPTH)
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _check_limits(value: object, where: str, depth: int) -> None:
    if depth == 0:
        raise FormatError(f"{where}: nested deeper than {layout.MAX_JSON_DEPTH}")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_limits(name, where, depth - 1)
            _check_limits(item, where, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_limits(item, where, depth - 1)
    elif isinstance(value, str):
        if len(value) > layout.MAX_JSON_STRING or any("\ud800" <= char <= "\udfff" for char in value):
            raise FormatError(f"{where}: a string of {len(value)} characters, or with half a surrogate pair")
    elif isinstance(value, float):
        if abs(value) == float("inf"):
            raise FormatError(f"{where}: a number too large")
    elif isinstance(value, int) and abs(value) > layout.MAX_JSON_INT:
        raise FormatError(f"{where}: an integer beyond 2**53 - 1")


def _check_version(value: dict[str, Any], where: str) -> int:
    """The minor version of the file."""
    name, version = value.get("format"), value.get("format_version")
    if name != layout.FORMAT_NAME:
        raise FormatError(f"{where}: format {name!r:.100}, expected {layout.FORMAT_NAME!r}", uri=where)
    if not isinstance(version, str) or not re.fullmatch(r"[1-9][0-9]{0,3}\.(0|[1-9][0-9]{0,3})", version):
        raise FormatError(f"{where}: format_version {version!r:.100}, expected MAJOR.MINOR", uri=where)
    major, minor = map(int, version.split("."))
    if major != layout.FORMAT_MAJOR:
        supported = f"{layout.FORMAT_MAJOR}.{layout.FORMAT_MINOR}"
        raise UnsupportedVersionError(
            f"{where}: format version {version}, this release reads {supported}; upgrade opd-store", uri=where
        )
    return minor


def _check_object(value: object, expected: dict[str, Any], where: str, *, allow_unknown: bool) -> None:
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected an object, found {type(value).__name__}", uri=where)
    for name, kind in expected.items():
        # bool is an int to Python, but not to JSON.
        if (
            name not in value
            or not isinstance(value[name], kind)
            or (kind is int and isinstance(value[name], bool))
        ):
            raise FormatError(f"{where}: field {name} is missing or of the wrong type", uri=where)
    unknown = sorted(value.keys() - expected.keys())
    if unknown and not allow_unknown:
        raise FormatError(f"{where}: unknown field {unknown[0]!r:.100}", uri=where)


_SEGMENT_COUNTS = ("n_shards", "rows", "tokens", "response_tokens", "n_bytes")


def _segment_to_json(segment: SegmentRef) -> dict[str, Any]:
    files: dict[str, Any] = {
        "shards": _file_to_json(segment.shards),
        "rollouts": _file_to_json(segment.rollouts),
    }
    counts = {name: getattr(segment, name) for name in _SEGMENT_COUNTS}
    return files | counts | {"max_error": segment.max_error}


def _file_to_json(ref: FileRef) -> dict[str, Any]:
    return {"sha256": ref.sha256.hex(), "n_bytes": ref.n_bytes}


def _segment_from_json(value: object, where: str, allow_unknown: bool) -> SegmentRef:
    where = f"{where}: segment"
    expected = {"shards": dict, "rollouts": dict, "max_error": float} | dict.fromkeys(_SEGMENT_COUNTS, int)
    _check_object(value, expected, where, allow_unknown=allow_unknown)
    assert isinstance(value, dict)
    if any(value[name] < 1 for name in _SEGMENT_COUNTS):
        raise FormatError(f"{where}: a count below 1")
    if value["max_error"] < 0:
        raise FormatError(f"{where}: max_error {value['max_error']}, expected at least 0.0")
    return SegmentRef(
        _file_from_json(value["shards"], where, allow_unknown),
        _file_from_json(value["rollouts"], where, allow_unknown),
        **{name: value[name] for name in _SEGMENT_COUNTS},
        max_error=value["max_error"],
    )


def _file_from_json(
    value: dict[str, Any], where: str, allow_unknown: bool, *, directory: str = layout.INDEX_DIR
) -> FileRef:
    _check_object(value, {"sha256": str, "n_bytes": int}, where, allow_unknown=allow_unknown)
    if not re.fullmatch(r"[0-9a-f]{64}", value["sha256"]) or value["n_bytes"] < 1:
        raise FormatError(f"{where}: {value!r:.200} does not name a file")
    return FileRef(bytes.fromhex(value["sha256"]), value["n_bytes"], directory)


def manifest_digest(data: Buffer) -> str:
    """The identity of a version: `sha256:...` of the whole manifest file."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
