"""A second reader of the opd-store format, written from the prose in this folder alone. Slow and obvious.

    python spec/reference_reader.py CACHE[@sha256:...] [--row N]

Needs the standard library, pyarrow and zstandard, nothing else. It checks every rule, also those marked
*(verify)*, before it returns anything. Section numbers in comments are those of the file named with them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import struct
import sys
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import zstandard

# format.md, section 7
MAX_MANIFEST_BYTES = 1048576
MAX_JSON_DEPTH = 16
MAX_JSON_STRING = 4096
MAX_JSON_INT = 9007199254740991
MAX_VERSION = 99999999
MAX_SEGMENTS = 64
MAX_TOPK = 4096
MAX_VOCAB = 16777216
MAX_ROLLOUT_TOKENS = 4194304
MAX_PAGE_BYTES = 134217728
MAX_BATCH_BYTES = 1073741824
MAX_TEXT_BYTES = 4096
MAX_DECODED_BYTES = 67108864
MAX_ID_TABLE_BYTES = 67108864
PROBABILITY_TOLERANCE = 0.001
READER_SLACK = 0.000001
LARGEST_SUM_ERROR = 0.0625

# format.md, section 2
FORMAT = "FormatError"
INTEGRITY = "IntegrityError"
UNSUPPORTED = "UnsupportedVersionError"
NOT_FOUND = "CacheNotFoundError"


class RefusedError(ValueError):
    """The cache breaks a rule. `kind` is the name of the reaction, format.md, section 2."""

    def __init__(self, why: str, kind: str = FORMAT) -> None:
        super().__init__(why)
        self.kind = kind


def refuse(why: str, kind: str = FORMAT) -> NoReturn:
    raise RefusedError(why, kind)


def require(rule: bool, why: str, kind: str = FORMAT) -> None:
    if not rule:
        refuse(why, kind)


# --- hashing.md ---


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CRC_TABLE = _crc_table()


def crc32c(data: bytes, value: int = 0) -> int:
    """Section 1. `value` is the checksum of what came before."""
    register = value ^ 0xFFFFFFFF
    for byte in data:
        register = register >> 8 ^ CRC_TABLE[(register ^ byte) & 0xFF]
    return register ^ 0xFFFFFFFF


def rollout_hash(token_ids: list[int], fingerprint: str) -> bytes:
    """Section 3."""
    raw = bytes.fromhex(fingerprint.removeprefix("sha256:"))
    ids = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return hashlib.sha256(b"opd-store rollout v1\0" + raw + ids).digest()


def tokenizer_fingerprint(description: dict[str, Any]) -> str:
    """Section 4. The lone surrogates of JSON texts are encoded like any other code point."""

    def text(value: str) -> bytes:
        raw = value.encode("utf-8", "surrogatepass")
        return struct.pack("<I", len(raw)) + raw

    model = description["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        tokens = {number: token for token, number in vocabulary.items()}
    else:
        tokens = {number: token for number, (token, _) in enumerate(vocabulary)}
    added = description.get("added_tokens") or []
    for entry in added:
        tokens[entry["id"]] = entry["content"]

    out = b"opd-store tokenizer v1\0"
    out += text(str(model.get("type")))
    out += struct.pack("<I", len(tokens))
    for number in sorted(tokens):
        out += struct.pack("<I", number) + text(tokens[number])
    merges = model.get("merges") or []
    out += struct.pack("<I", len(merges))
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        out += text(left) + text(right)
    special = sorted(entry["id"] for entry in added if entry.get("special"))
    out += struct.pack(f"<I{len(special)}I", len(special), *special)
    if not isinstance(vocabulary, dict):
        for _, score in vocabulary:
            out += struct.pack("<d", score)
    return "sha256:" + hashlib.sha256(out).hexdigest()


# --- manifest.md, section 2 ---


def parse_manifest(data: bytes) -> dict[str, Any]:
    require(len(data) <= MAX_MANIFEST_BYTES, "the manifest is too large", INTEGRITY)
    ending = re.search(rb',\n "checksum": "sha256:([0-9a-f]{64})"\n\}\n\Z', data)
    if ending is None:
        refuse("the manifest does not end with its checksum", INTEGRITY)
    found = hashlib.sha256(data[: ending.start()]).hexdigest().encode()
    require(found == ending[1], "the manifest has another checksum", INTEGRITY)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        require(len(keys) == len(set(keys)), "a key occurs twice")
        return dict(pairs)

    def constant(name: str) -> NoReturn:
        refuse(f"{name} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RefusedError:
        raise
    except (ValueError, RecursionError) as error:
        refuse(f"the manifest is not JSON: {error}")
    check_limits(value, 1)
    require(isinstance(value, dict), "the manifest is not an object")
    return dict(value)


def check_limits(value: object, level: int) -> None:
    require(level <= MAX_JSON_DEPTH, "the manifest is nested too deep")
    if isinstance(value, dict):
        for key, item in value.items():
            check_limits(key, level + 1)
            check_limits(item, level + 1)
    elif isinstance(value, list):
        for item in value:
            check_limits(item, level + 1)
    elif isinstance(value, str):
        require(len(value) <= MAX_JSON_STRING, "a string is too long")
        require(not re.search("[\ud800-\udfff]", value), "half a surrogate pair")
    elif isinstance(value, float):
        require(math.isfinite(value), "a number overflows")
    elif isinstance(value, int):
        require(abs(value) <= MAX_JSON_INT, "an integer is too large")


# --- manifest.md, sections 3 to 6: kinds of fields ---


def is_string(value: object) -> bool:
    return isinstance(value, str)


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return is_integer(value) or isinstance(value, float)


def is_fraction(value: object) -> bool:
    """A number written with a fraction or an exponent."""
    return isinstance(value, float)


def is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("sha256:[0-9a-f]{64}", value) is not None


def is_count(value: object) -> bool:
    return isinstance(value, int) and is_integer(value) and value >= 1


def is_list_of(kind: Any) -> Any:  # noqa: ANN401
    return lambda value: isinstance(value, list) and all(kind(item) for item in value)


def is_map(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_string, value.values()))


def is_object(required: dict[str, Any], optional: dict[str, Any], *, newer: bool) -> Any:  # noqa: ANN401
    def check(value: object) -> bool:
        if not isinstance(value, dict) or not required.keys() <= value.keys():
            return False
        kinds = required | optional
        known = {name: item for name, item in value.items() if name in kinds}
        if len(known) < len(value) and not newer:
            return False
        return all(kinds[name](item) for name, item in known.items())

    return check


def check_manifest(value: dict[str, Any], number: int) -> None:
    require(value.get("format") == "opd-store", "another format")
    version = value.get("format_version")
    require(
        isinstance(version, str) and bool(re.fullmatch(r"[1-9][0-9]{0,3}\.(0|[1-9][0-9]{0,3})", version)),
        "format_version is not MAJOR.MINOR",
    )
    # versioning.md, rules 1, 4 and 5
    major, minor = map(int, str(version).split("."))
    require(major == 1, f"format version {version}", UNSUPPORTED)
    newer = minor > 0
    names = is_list_of(is_string)
    require(names(value.get("required_features")), "required_features is not a list of names")
    require(not value["required_features"], "an unknown required feature", UNSUPPORTED)

    texts = ("revision", "dtype", "quantisation", "engine", "engine_version", "logprob_mode")
    model = is_object(
        {"name": is_string},
        {**dict.fromkeys(texts, is_string), "weights_digest": is_digest, "logprob_temperature": is_number},
        newer=newer,
    )
    sampler = is_object(
        {},
        {
            **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), is_number),
            **dict.fromkeys(("top_k", "max_new_tokens", "seed"), is_integer),
            **dict.fromkeys(("engine", "engine_version"), is_string),
            "stop_token_ids": is_list_of(is_integer),
        },
        newer=newer,
    )
    texts = ("prompt_dataset", "prompt_revision", "truncation", "licence", "code_version")
    meta = is_object(
        {"vocab_size": is_count, "tokenizer_fingerprint": is_digest},
        {
            **dict.fromkeys(("teacher", "sft_teacher", "behaviour", "reference"), model),
            **dict.fromkeys(texts, is_string),
            "other_teachers": is_list_of(model),
            "sampler": sampler,
            "chat_template_digest": is_digest,
            "chat_template_args": is_map,
            "extra": is_map,
        },
        newer=newer,
    )
    cut = is_object(
        {"rule": is_string, "value": lambda item: item is None or is_fraction(item)}, {}, newer=False
    )
    schema = is_object(
        {
            "bands": is_list_of(is_integer),
            "chosen": is_integer,
            "cut": lambda item: item is None or cut(item),
            "encoding": is_string,
            "id_table": is_string,
            "sampled": is_integer,
            "sampled_temperature": is_fraction,
            "topk": is_integer,
            "user_columns": is_map,
        },
        {},
        newer=False,
    )
    file = is_object(
        {"sha256": lambda text: is_digest(f"sha256:{text}"), "n_bytes": is_count}, {}, newer=newer
    )
    counts = ("n_shards", "rows", "tokens", "response_tokens", "n_bytes")
    segment = is_object(
        {
            "shards": file,
            "rollouts": file,
            **dict.fromkeys(counts, is_count),
            "max_error": lambda item: is_fraction(item) and item >= 0,
        },
        {},
        newer=newer,
    )
    fields = {
        "format": is_string,
        "format_version": is_string,
        "unreleased": lambda item: isinstance(item, bool),
        "sequence": is_count,
        "parent": lambda item: item is None or is_digest(item),
        "required_features": names,
        "optional_features": names,
        "meta": meta,
        "schema": schema,
        "id_table": lambda item: item is None or file(item),
        "segments": is_list_of(segment),
        "checksum": is_digest,
    }
    for name, kind in fields.items():
        require(name in value and kind(value[name]), f"field {name} is missing or wrong")
    require(newer or value.keys() == fields.keys(), "an unknown field")
    require(value["sequence"] <= MAX_VERSION, "sequence is too large")
    require(value["sequence"] == number, "the manifest was renamed", INTEGRITY)
    require((value["sequence"] == 1) == (value["parent"] is None), "parent does not fit the sequence")
    require(len(value["segments"]) <= MAX_SEGMENTS, "too many segments")

    require(value["meta"]["vocab_size"] <= MAX_VOCAB, "the vocabulary is too large")
    check_schema(value["schema"], value["meta"]["vocab_size"])
    table, policy = value["id_table"], value["schema"]["id_table"]
    require(table is None or table["n_bytes"] <= MAX_ID_TABLE_BYTES, "the id table is too large")
    require(
        policy == "auto" or (table is not None) == (policy == "given"), "id_table does not fit the schema"
    )


def check_schema(schema: dict[str, Any], vocab_size: int) -> None:
    """manifest.md, section 5."""
    topk, bands, cut = schema["topk"], schema["bands"], schema["cut"]
    for name in ("topk", "chosen", "sampled"):
        require(0 <= schema[name] <= min(MAX_TOPK, vocab_size), f"{name} is out of range")
    require(schema["encoding"] in ENCODINGS, "an unknown encoding", UNSUPPORTED)
    require(bands == sorted(set(bands)) and all(end > 0 for end in bands), "bands do not rise")
    require(bands[-1:] == [topk] if topk else not bands, "the last band does not end at topk")
    if cut is not None:
        require(topk > 0, "a cut without top-k")
        require(cut["rule"] in ("probability", "mass", "given"), "an unknown rule of a cut")
        given = cut["rule"] == "given"
        require(cut["value"] is None if given else cut["value"] is not None, "the value of a cut")
        require(given or 0 < cut["value"] < 1, "the value of a cut")
    require(0 < schema["sampled_temperature"] <= 100, "sampled_temperature is out of range")
    require(schema["sampled"] > 0 or schema["sampled_temperature"] == 1, "a temperature without draws")
    packed = schema["encoding"] != "plain" and any(schema[n] for n in ("topk", "chosen", "sampled"))
    require(schema["id_table"] in (("none", "auto", "given") if packed else ("none",)), "id_table")
    for name, kind in schema["user_columns"].items():
        require(bool(re.fullmatch("x_[a-z0-9_]{1,62}", name)), f"user column {name!r}")
        require(kind in USER_TYPES, f"type {kind!r} of a user column")


# --- columns.md, section 1 ---

USER_TYPES = {"bool": pa.bool_(), "int64": pa.int64(), "float64": pa.float64(), "utf8": pa.utf8()}
LOGPROBS = ("teacher_logprob", "behaviour_logprob", "reference_logprob")


def list_of(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


TOPK, CHOSEN, SAMPLED = 0, 1, 2
KINDS = {"topk": TOPK, "chosen": CHOSEN, "sampled": SAMPLED}


def packed_columns(schema: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """Name, support, rank_start and rank_end of every packed column, in order."""
    ranges = zip([0, *schema["bands"]], schema["bands"], strict=False)
    columns = [(f"topk_{start}_{end}", "topk", start, end) for start, end in ranges]
    return columns + [(name, name, 0, schema[name]) for name in ("chosen", "sampled") if schema[name]]


def shard_schema(schema: dict[str, Any]) -> pa.Schema:
    users = [(name, USER_TYPES[kind], True) for name, kind in sorted(schema["user_columns"].items())]
    columns = [
        ("rollout_hash", pa.binary(32), False),
        ("sample_id", pa.utf8(), True),
        ("prompt_len", pa.uint32(), False),
        ("finish_reason", pa.utf8(), False),
        ("policy_version", pa.int64(), True),
        ("teacher", pa.uint16(), False),
        ("reward", pa.float32(), True),
        ("label", pa.utf8(), True),
        *users,
        ("token_ids", list_of(pa.uint32()), False),
        ("loss_mask", list_of(pa.uint8()), True),
        *((name, list_of(pa.float32()), True) for name in LOGPROBS),
        *((name, pa.binary(), False) for name, *_ in packed_columns(schema)),
    ]
    return pa.schema([pa.field(name, kind, nullable=nulls) for name, kind, nulls in columns])


# --- format.md, sections 4 and 5 ---

SHARD_TABLE = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (
            ("sha256", pa.binary(32)),
            ("n_bytes", pa.uint64()),
            ("rows", pa.uint32()),
            ("tokens", pa.uint64()),
            ("response_tokens", pa.uint64()),
            ("region_offset", list_of(pa.uint64())),
            ("region_length", list_of(pa.uint64())),
            ("region_crc32c", list_of(pa.uint32())),
            ("region_rows", list_of(pa.uint32())),
            ("row_tokens", list_of(pa.uint32())),
            ("row_response_tokens", list_of(pa.uint32())),
        )
    ]
)
ROLLOUT_TABLE = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (("rollout_hash", pa.binary(32)), ("shard", pa.uint32()), ("row", pa.uint32()))
    ]
)


def check_batch(batch: pa.RecordBatch, schema: pa.Schema, source: pa.Buffer) -> None:
    """Rules 1, 2 and 4 of section 4."""
    batch.validate(full=True)
    for field, column in zip(schema, batch.columns, strict=True):
        require(field.nullable or column.null_count == 0, f"nulls in {field.name}")
        if pa.types.is_list(field.type):
            require(column.values.null_count == 0, f"nulls inside {field.name}")
        for buffer in column.buffers():
            if buffer is not None and buffer.size:
                inside = source.address <= buffer.address
                inside = inside and buffer.address + buffer.size <= source.address + source.size
                require(inside, f"{field.name} is compressed or big-endian")


def read_arrow(data: bytes, schema: pa.Schema) -> list[pa.RecordBatch]:
    """All record batches of an Arrow file, as any Arrow tool reads them."""
    source = pa.py_buffer(data)
    try:
        file = pa.ipc.open_file(source)
        require(file.schema.equals(schema, check_metadata=True), "other columns than declared")
        batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        for batch in batches:
            check_batch(batch, schema, source)
    except RefusedError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        refuse(f"not an Arrow file: {error}")
    return batches


def read_file(path: Path, n_bytes: int) -> bytes:
    """A file named by its digest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        refuse(f"{path.name} cannot be read: {error}", INTEGRITY)
    require(len(data) == n_bytes, f"{path.name} has {len(data)} bytes, expected {n_bytes}", INTEGRITY)
    require(hashlib.sha256(data).hexdigest() == path.stem, f"{path.name} has another digest", INTEGRITY)
    return data


def check_lengths(entry: dict[str, Any]) -> None:
    """Section 5, rules 2 and 3."""
    lengths, responses = entry["row_tokens"], entry["row_response_tokens"]
    require(len(lengths) == len(responses) == entry["rows"], "a length for each rollout")
    for length, response in zip(lengths, responses, strict=True):
        require(1 <= response < length <= MAX_ROLLOUT_TOKENS, "a rollout of impossible length")
    require(sum(lengths) == entry["tokens"], "tokens of a shard")
    require(sum(responses) == entry["response_tokens"], "response_tokens of a shard")


def columns_of_parts(schema: pa.Schema) -> list[list[pa.Field]]:
    """Section 4: scalars, lists, and each packed column by itself."""
    lists = ("token_ids", "loss_mask", *LOGPROBS)
    start = schema.names.index(lists[0])
    end = start + len(lists)
    fields = list(schema)
    return [fields[:start], fields[start:end], *([field] for field in fields[end:])]


def buffers_of(message: bytes) -> list[tuple[int, int]]:
    """(first byte in the message, length) of each buffer, by the metadata: Arrow's `Message.fbs`."""
    (size,) = struct.unpack_from("<i", message, 4)
    metadata = message[8 : 8 + size]

    def follow(at: int) -> int:
        return at + int(struct.unpack_from("<I", metadata, at)[0])

    def field(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        return table + int(struct.unpack_from("<H", metadata, vtable + 4 + 2 * number)[0])

    # Field 2 of a Message is its header, here a RecordBatch, whose field 2 is the vector of buffers.
    batch = follow(field(follow(0), 2))
    vector = follow(field(batch, 2))
    (count,) = struct.unpack_from("<I", metadata, vector)
    pairs = [struct.unpack_from("<qq", metadata, vector + 4 + 16 * i) for i in range(count)]
    return [(8 + size + offset, length) for offset, length in pairs]


def check_parts(message: bytes, lengths: list[int], schema: pa.Schema) -> None:
    """Section 4, rules 7 and 8: `lengths` are those of the regions that make up the message."""

    def count(kind: pa.DataType) -> int:
        if pa.types.is_list(kind):
            return 2 + count(kind.value_type)
        return 3 if pa.types.is_binary(kind) or pa.types.is_string(kind) else 2

    try:
        buffers = buffers_of(message)
    except struct.error as error:
        refuse(f"metadata of a record batch: {error}")
    parts = columns_of_parts(schema)
    counts = [sum(count(field.type) for field in part) for part in parts]
    require(len(buffers) == sum(counts), "buffers of a record batch")
    start = 0
    for number, (length, n_buffers) in enumerate(zip(lengths, counts, strict=True)):
        mine, buffers = buffers[:n_buffers], buffers[n_buffers:]
        require(number == 0 or mine[0][0] == start, "a part starts elsewhere")
        end = start + length
        for first, size in mine:
            require(start <= first <= first + size <= end, "a buffer outside its part")
            require(first % 8 == 0, "a buffer that is not aligned")
        start = end
    require(start == len(message), "the last part ends with the record batch")


def read_shard(path: Path, entry: dict[str, Any], schema: pa.Schema) -> list[dict[str, Any]]:
    columns = [entry[f"region_{name}"] for name in ("offset", "length", "crc32c", "rows")]
    require(len({len(column) for column in columns}) == 1, "region lists of different lengths")
    regions = list(zip(*columns, strict=True))
    n_parts = len(columns_of_parts(schema))
    require(len(regions) >= 2 and (len(regions) - 2) % n_parts == 0, "a region for each part")
    position = 0
    for i, (offset, length, _, rows) in enumerate(regions):
        require(offset == position and 0 < length <= MAX_BATCH_BYTES, "regions leave a gap or overlap")
        is_first_part = 0 < i < len(regions) - 1 and (i - 1) % n_parts == 0
        require((rows > 0) == is_first_part, "rows of a region")
        position += length
    require(position == entry["n_bytes"], "regions do not end with the file")
    require(sum(region[3] for region in regions) == entry["rows"], "rows of the regions")
    check_lengths(entry)

    data = read_file(path, entry["n_bytes"])
    for offset, length, checksum, _ in regions:
        found = crc32c(data[offset : offset + length])
        require(found == checksum, f"region at {offset} has another checksum", INTEGRITY)

    require(data[:8] == b"ARROW1\0\0", "an Arrow file starts with its magic")
    batches = read_arrow(data, schema)
    require(n_parts * len(batches) == len(regions) - 2, "record batches and regions differ")
    rows: list[dict[str, Any]] = []
    for number, batch in enumerate(batches):
        parts = regions[1 + number * n_parts :][:n_parts]
        offset, _, _, n_rows = parts[0]
        lengths = [length for _, length, _, _ in parts]
        require(batch.num_rows == n_rows, "rows of a record batch")
        require(offset % 8 == 0, "a record batch that is not aligned")
        message = data[offset : offset + sum(lengths)]
        try:
            alone = pa.ipc.read_record_batch(pa.py_buffer(message), schema)
        except (pa.ArrowException, OSError, ValueError) as error:
            refuse(f"regions are not a record batch: {error}")
        check_parts(message, lengths, schema)
        # Compared as text, since NaN is not equal to itself.
        require(str(alone.to_pylist()) == str(batch.to_pylist()), "the footer names another record batch")
        for name in schema.names:
            if pa.types.is_list(schema.field(name).type):
                check_null_lists(batch.column(name))
            if pa.types.is_binary(schema.field(name).type):
                starts = memoryview(batch.column(name).buffers()[1]).cast("i")[: n_rows + 1]
                require(not any(start % 8 for start in starts), "a page that is not aligned")
        rows += batch.to_pylist()
    listed = zip(rows, entry["row_tokens"], entry["row_response_tokens"], strict=True)
    for row, length, response in listed:
        same = len(row["token_ids"]) == length and length - row["prompt_len"] == response
        require(same, "a rollout of another length than the index says")
    return rows


def check_null_lists(column: pa.ListArray) -> None:
    """columns.md, section 3, rule 2: a null list is empty in the offsets."""
    offsets = column.offsets.to_pylist()
    for i, valid in enumerate(column.is_valid().to_pylist()):
        require(valid or offsets[i] == offsets[i + 1], "a null list with items")


# --- encodings.md, sections 2 and 5: streams and id tables ---

NO_ID = 0xFFFFFFFF
MAX_WINDOW = 8388608


def open_frame(frame: bytes, n_bytes: int) -> bytes:
    """Section 2, rule 4: what one zstd frame holds."""
    require(n_bytes > 0, "a frame of nothing")
    try:
        found = zstandard.get_frame_parameters(frame)
        require(frame[:4] == b"\x28\xb5\x2f\xfd", "not a zstd frame, or one to be skipped")
        require(found.content_size == n_bytes, "a frame declares another size, or none")
        require(found.dict_id == 0 and not frame[4] & 3, "a frame needs a dictionary")
        require(not found.has_checksum, "a frame with a checksum")
        require(found.window_size <= MAX_WINDOW, "a frame needs a larger window")
        data = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        refuse(f"a frame does not open: {error}")
    return data


class Streams:
    """Section 2: takes streams out of a body, in order."""

    def __init__(self, body: bytes) -> None:
        self.body, self.position = body, 0

    def take(self, n_bytes: int) -> bytes:
        end = self.position + n_bytes
        require(end <= len(self.body), "a stream passes the end of its body")
        part = self.body[self.position : end]
        self.position = end
        return part

    def ints(self, count: int, limit: int) -> list[int]:
        n_planes = self.take(1)[0]
        require(n_planes <= 4, "more than 4 planes")
        values = [0] * count
        for number in range(n_planes):
            size = int.from_bytes(self.take(4), "little")
            plane = self.take(size & 0x7FFFFFFF)
            if size >> 31:
                plane = open_frame(plane, count)
            require(len(plane) == count, "length of a plane")
            values = [value | byte << 8 * number for value, byte in zip(values, plane, strict=True)]
        require(max(values, default=0) <= limit, f"a value above {limit}")
        return values

    def finish(self) -> None:
        require(self.position == len(self.body), "bytes after the last stream")


class IdTable:
    """Section 5."""

    def __init__(self, data: bytes, vocab_size: int) -> None:
        self.digest = hashlib.sha256(data).digest()
        require(len(data) >= 16, "an id table without header")
        magic, size, n_lists = struct.unpack_from("<8sII", data)
        require(magic == b"OPDIDS1\0", "not an id table")
        require(size == vocab_size, "an id table of another vocabulary")
        require(n_lists <= 4096, "too many lists")
        require(n_lists == 0 or size >= 255, "lists longer than the vocabulary")
        streams = Streams(data[16:])
        self.by_rank = streams.ints(size, size - 1)
        require(len(set(self.by_rank)) == size, "the frequency order names an id twice")
        ranks = streams.ints(255 * n_lists, size - 1)
        streams.finish()
        self.lists = [[self.by_rank[r] for r in ranks[255 * i : 255 * i + 255]] for i in range(n_lists)]
        require(all(len(set(ids)) == 255 for ids in self.lists), "a list names an id twice")


# --- format.md, section 6, and encodings.md, sections 1, 3 and 4: pages ---

ENCODINGS = {
    "plain": (0, 0),
    "f32": (1, 0),
    "ladder16": (2, 0),
    "ladder/128": (2, 128),
    "ladder/64": (2, 64),
    "ladder/32": (2, 32),
}
Page = tuple[list[list[int]], list[list[float]], list[float], list[list[int]] | None]


def read_page(
    page: bytes,
    rollout_hash: bytes,
    *,
    kind: int,
    rank_start: int,
    rank_end: int,
    n_positions: int,
    encoding: str,
    table: IdTable | None = None,
) -> Page:
    """Ids, log-probs, tails and draws (None without), one entry a position. Shorter rows stay short."""
    require(24 <= len(page) <= MAX_PAGE_BYTES, "length of a page")
    fields = struct.unpack_from("<BBHHHIIII", page)
    code, flags, start, end, reserved, positions, body_bytes, parameter, checksum = fields
    ragged, uses_table = flags & 1, flags >> 1 & 1
    require(not uses_table or table is not None, "a page needs an id table, and there is none")
    owner = rollout_hash + (table.digest if table is not None and uses_table else b"")
    require(crc32c(page[24:], crc32c(owner + page[:20])) == checksum, "checksum of a page", INTEGRITY)
    require((code, parameter) == ENCODINGS[encoding], f"page encoding {code}, parameter {parameter}")
    require(flags & 0b1100 == reserved == 0, "a reserved field of a page is not zero")
    require(flags >> 4 == kind, "a page of another support")
    require((start, end) == (rank_start, rank_end), "a page of other ranks")
    require(positions == n_positions, "a page of other positions")
    size = 24 + body_bytes
    require(len(page) == size + (-size) % 8, "length of a page")
    require(not any(page[size:]), "padding is not zero")
    body, k = page[24:size], end - start
    if encoding == "plain":
        require(not ragged and not uses_table, "flags of a plain page")
        return read_plain(body, positions, k, has_draws=kind == SAMPLED)

    require((12 * k + 4) * positions <= MAX_DECODED_BYTES, "a page is too large once decoded")
    streams = Streams(body)
    lengths = streams.ints(positions, k) if ragged else [k] * positions
    if encoding == "f32":
        logprobs, tails = read_f32(streams, lengths, start, k)
    else:
        logprobs, tails = read_ladder(streams, lengths, start, k, parameter)
    ids = read_ids(streams, lengths, table if uses_table else None)
    draws = rows_of(streams.ints(sum(lengths), 0xFFFFFFFF), lengths) if kind == SAMPLED else None
    streams.finish()
    return rows_of(ids, lengths), logprobs, tails, draws


def rows_of(flat: list[Any], lengths: list[int]) -> list[list[Any]]:
    items = iter(flat)
    return [[next(items) for _ in range(length)] for length in lengths]


def read_plain(body: bytes, positions: int, k: int, *, has_draws: bool) -> Page:
    n = positions * k
    require(len(body) == (12 if has_draws else 8) * n + 4 * positions, "length of a plain body")
    ids = struct.unpack_from(f"<{n}I", body)
    logprobs = struct.unpack_from(f"<{n}f", body, 4 * n)
    tails = struct.unpack_from(f"<{positions}f", body, 8 * n)
    drawn = struct.unpack_from(f"<{n}I", body, 8 * n + 4 * positions) if has_draws else (0,) * n
    rows: Page = ([], [], list(tails), [])
    for t in range(positions):
        at = range(t * k, (t + 1) * k)
        length = sum(ids[i] != NO_ID for i in at)
        for i in at[length:]:
            require(ids[i] == NO_ID, "an id after padding")
            require(logprobs[i] == -math.inf and drawn[i] == 0, "a value at padding")
        rows[0].append([ids[i] for i in at[:length]])
        rows[1].append([logprobs[i] for i in at[:length]])
        if rows[3] is not None:
            rows[3].append([drawn[i] for i in at[:length]])
    return rows if has_draws else (*rows[:3], None)


def rank_groups(first: int, end: int) -> list[tuple[int, int]]:
    """Section 3: the ranks after the first one of a page, cut at 8, 16, 32, ..."""
    groups = []
    start = first + 1
    while start < end:
        cut = 8
        while cut <= start:
            cut *= 2
        groups.append((start, min(cut, end)))
        start = min(cut, end)
    return groups


def steps_in(lengths: list[int], rank_start: int, group: tuple[int, int]) -> list[int]:
    """How many ranks of a group each row has."""
    return [max(0, min(group[1], rank_start + length) - group[0]) for length in lengths]


def read_f32(
    streams: Streams, lengths: list[int], rank_start: int, k: int
) -> tuple[list[list[float]], list[float]]:
    def value(word: int) -> float:
        (number,) = struct.unpack("<f", struct.pack("<I", word ^ 0x80000000))
        return float(number)

    tails = [value(word) for word in streams.ints(len(lengths), 0xFFFFFFFF)]
    heads = iter(streams.ints(sum(length > 0 for length in lengths), 0xFFFFFFFF))
    words = [[next(heads)] if length else [] for length in lengths]
    for group in rank_groups(rank_start, rank_start + k):
        counts = steps_in(lengths, rank_start, group)
        step = iter(streams.ints(sum(counts), 0xFFFFFFFF))
        for row, count in zip(words, counts, strict=True):
            for _ in range(count):
                row.append((row[-1] + next(step)) % 2**32)
    return [[value(word) for word in row] for row in words], tails


def read_ladder(
    streams: Streams, lengths: list[int], rank_start: int, k: int, parameter: int
) -> tuple[list[list[float]], list[float]]:
    largest = 0xFFFFFF if parameter else 0x7BFF

    def value(units: int) -> float:
        # From zero, so that no units are 0.0 and not -0.0.
        return 0.0 - (units / parameter if parameter else struct.unpack("<e", struct.pack("<H", units))[0])

    tails = [value(stored - 1) if stored else -math.inf for stored in streams.ints(len(lengths), largest + 1)]
    heads = iter(streams.ints(sum(length > 0 for length in lengths), largest))
    units = [[next(heads)] if length else [] for length in lengths]
    for group in rank_groups(rank_start, rank_start + k):
        counts = steps_in(lengths, rank_start, group)
        short = streams.ints(sum(counts), 255)
        more = iter(streams.ints(short.count(255), largest - 255))
        step = iter(one + (next(more) if one == 255 else 0) for one in short)
        for row, count in zip(units, counts, strict=True):
            for _ in range(count):
                row.append(row[-1] + next(step))
    require(all(row[-1] <= largest for row in units if row), "a log-prob below the lowest")
    return [[value(n) for n in row] for row in units], tails


def read_ids(streams: Streams, lengths: list[int], table: IdTable | None) -> list[int]:
    n = sum(lengths)
    (mode,) = streams.ints(1, 2)
    if mode == 0:
        return streams.ints(n, NO_ID - 1)
    if table is None:
        refuse("ids need an id table that the page does not use")
    last = len(table.by_rank) - 1
    if mode == 1:
        return [table.by_rank[rank] for rank in streams.ints(n, last)]
    require(bool(table.lists), "ids need lists, and the id table has none")
    lists = streams.ints(len(lengths), len(table.lists) - 1)
    codes = streams.ints(n, 255)
    escaped = iter(streams.ints(codes.count(255), last))
    owners = [number for number, length in zip(lists, lengths, strict=True) for _ in range(length)]
    return [
        table.by_rank[next(escaped)] if code == 255 else table.lists[number][code]
        for number, code in zip(owners, codes, strict=True)
    ]


# --- columns.md, sections 3 and 4 ---


def check_logprobs(values: list[float], name: str, *, may_be_nothing: bool = False) -> None:
    for value in values:
        finite = math.isfinite(value) or (may_be_nothing and value == -math.inf)
        require(finite and value <= 0, f"{name} holds {value}")


def check_row(row: dict[str, Any], manifest: dict[str, Any], table: IdTable | None) -> dict[str, Any]:
    """The row with ids and log-probs in place of its pages: flat lists, position by position, padded."""
    meta, schema = manifest["meta"], manifest["schema"]
    tokens, prompt_len = row["token_ids"], row["prompt_len"]
    n_positions = len(tokens) - prompt_len
    require(prompt_len >= 1 and n_positions >= 1, "an empty prompt or response")
    require(max(tokens) < meta["vocab_size"], "a token outside the vocabulary")
    require(
        rollout_hash(tokens, meta["tokenizer_fingerprint"]) == row["rollout_hash"], "another rollout_hash"
    )
    for name in ("loss_mask", *LOGPROBS):
        require(row[name] is None or len(row[name]) == n_positions, f"length of {name}")
    require(row["loss_mask"] is None or set(row["loss_mask"]) <= {0, 1}, "loss_mask is not 0 or 1")
    for name in LOGPROBS:
        check_logprobs(row[name] or [], name)
    require(row["finish_reason"] in ("stop", "length", "abort", "unknown"), "finish_reason")
    policy, reward = row["policy_version"], row["reward"]
    require(policy is None or abs(policy) <= MAX_JSON_INT, "policy_version")
    require(reward is None or math.isfinite(reward), "reward")
    for value in row.values():
        require(not isinstance(value, str) or len(value.encode()) <= MAX_TEXT_BYTES, "a text is too long")

    pages: dict[str, list[tuple[int, Page]]] = {}
    for name, support, start, end in packed_columns(schema):
        page = read_page(
            row.pop(name),
            row["rollout_hash"],
            kind=KINDS[support],
            rank_start=start,
            rank_end=end,
            n_positions=n_positions,
            encoding=schema["encoding"],
            table=table,
        )
        pages.setdefault(support, []).append((end, page))
    for support, bands in pages.items():
        check_support(row, support, bands, manifest)
    return row


def tolerance(encoding: str, max_error: float = 0.0) -> float:
    """Section 4, rule 6."""
    code, parameter = ENCODINGS[encoding]
    error = 0.0 if code < 2 else 0.5 / parameter if parameter else 1 / 128
    error = max(error, min(max_error, LARGEST_SUM_ERROR))
    return math.exp(error) * (1 + PROBABILITY_TOLERANCE + READER_SLACK) - 1


def check_support(
    row: dict[str, Any], support: str, bands: list[tuple[int, Page]], manifest: dict[str, Any]
) -> None:
    """Section 4, over all bands of a support; puts the values into the row."""
    schema, vocab_size = manifest["schema"], manifest["meta"]["vocab_size"]
    max_error = max(segment["max_error"] for segment in manifest["segments"])
    limit = 1 + tolerance(schema["encoding"], max_error)
    width = schema[support]
    all_ids: list[int] = []
    all_logprobs: list[float] = []
    all_draws: list[int] = []
    for t in range(len(bands[-1][1][2])):
        ids, logprobs, draws = [], [], []
        start, worst = 0, 0.0
        for end, (page_ids, page_logprobs, page_tails, page_draws) in bands:
            check_logprobs([page_tails[t]], "a tail", may_be_nothing=True)
            require(len(ids) == start or not page_ids[t], "an id after padding")
            ids += page_ids[t]
            logprobs += page_logprobs[t]
            draws += page_draws[t] if page_draws is not None else []
            check_logprobs(logprobs, support)
            worst = max(worst, math.fsum(map(math.exp, [*logprobs, page_tails[t]])))
            start = end
        if support == "topk":
            require(len(ids) == width or schema["cut"] is not None, "fewer ranks than K")
            require(len(ids) >= 1, "no rank")
        require(len(set(ids)) == len(ids), "an id occurs twice")
        require(max(ids, default=0) < vocab_size, "an id outside the vocabulary")
        for j in range(1, len(ids)):
            falls = logprobs[j] < logprobs[j - 1]
            ties = logprobs[j] == logprobs[j - 1] and ids[j] > ids[j - 1]
            require(falls or ties, f"{support} is not in order")
        require(worst <= limit, f"probabilities sum to {worst}")
        require(all(draws), "an id that was not drawn")
        missing = width - len(ids)
        all_ids += ids + [NO_ID] * missing
        all_logprobs += logprobs + [-math.inf] * missing
        all_draws += draws + [0] * missing if support == "sampled" else []
    tail_name = "log_tail" if support == "topk" else f"{support}_log_tail"
    row |= {f"{support}_ids": all_ids, f"{support}_logprob": all_logprobs, tail_name: bands[-1][1][2]}
    if support == "sampled":
        row["sampled_draws"] = all_draws
    if support == "topk":
        row["band_tails"] = {end: page[2] for end, page in bands}


def first_ranks(row: dict[str, Any], topk: int, ranks: int) -> tuple[list[int], list[float], list[float]]:
    """Section 4: the first ranks of a row, the rest of their band added to its tail."""
    ids, logprobs, tails = [], [], []
    end = min(end for end in row["band_tails"] if end >= ranks)
    for t, tail in enumerate(row["band_tails"][end]):
        position = row["topk_logprob"][t * topk : (t + 1) * topk]
        ids += row["topk_ids"][t * topk : t * topk + ranks]
        logprobs += position[:ranks]
        if ranks < end:
            parts = [tail, *position[ranks:end]]
            largest = max(parts)
            # Relative to the largest part, which exp() of all would otherwise round to nothing.
            if largest > -math.inf:
                total = math.fsum(math.exp(part - largest) for part in parts)
                tail = min(0.0, largest + math.log(total))
        tails.append(tail)
    return ids, logprobs, tails


# --- manifest.md, section 7 ---


def read_cache(path: Path, pin: str | None = None) -> dict[str, Any]:
    """The newest version, or the one whose manifest has the digest `pin`, checked whole.

    Returns:
        version, digest, parent, topk, manifest, and rows: one dictionary a rollout, with the names of the
        columns, `topk_ids`, `topk_logprob`, `log_tail`, and the same of `chosen` and `sampled`; absent
        values are None.

    Raises:
        RefusedError: a rule is broken.
    """
    folder = path / "manifests"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    numbers = sorted(int(name[:8]) for name in names if re.fullmatch(r"[0-9]{8}\.json", name))
    manifests = {}
    for number in numbers:
        data = (folder / f"{number:08d}.json").read_bytes()
        manifests[number] = (data, "sha256:" + hashlib.sha256(data).hexdigest())
    matching = [number for number in numbers if pin in (None, manifests[number][1])]
    require(bool(matching), "no version here, or none with that digest", NOT_FOUND)
    version = matching[-1]
    data, digest = manifests[version]
    manifest = parse_manifest(data)
    check_manifest(manifest, version)

    newer = manifest
    for number in range(version - 1, 0, -1):
        removed = folder / f"{number:08d}.removed"
        if number not in manifests and removed.is_file():
            same = removed.read_bytes() == f"{newer['parent']}\n".encode()
            require(same, f"version {number} was removed, and is not the parent of the next", INTEGRITY)
            break
        require(number in manifests, f"version {number} is missing", INTEGRITY)
        same = manifests[number][1] == newer["parent"]
        require(same, f"version {number} is not the parent of the next", INTEGRITY)
        older = parse_manifest(manifests[number][0])
        check_manifest(older, number)
        same = older["meta"] == newer["meta"] and older["schema"] == newer["schema"]
        require(same, f"version {number} has another meta or schema")
        require(older["id_table"] in (None, newer["id_table"]), f"version {number} has another id table")
        numbers_of = [tuple(map(int, m["format_version"].split("."))) for m in (older, newer)]
        require(numbers_of[0] <= numbers_of[1], f"version {number} has a later format")
        newer = older

    table = None
    if manifest["id_table"] is not None:
        entry = manifest["id_table"]
        data = read_file(path / f"tables/{entry['sha256']}.ids", entry["n_bytes"])
        table = IdTable(data, manifest["meta"]["vocab_size"])
    schema = shard_schema(manifest["schema"])
    rows: list[dict[str, Any]] = []
    for segment in manifest["segments"]:
        rows += read_segment(path, segment, schema, manifest, table)
    return {
        "version": version,
        "digest": digest,
        "parent": manifest["parent"],
        "topk": manifest["schema"]["topk"],
        "manifest": manifest,
        "rows": rows,
    }


def read_segment(
    path: Path, segment: dict[str, Any], schema: pa.Schema, manifest: dict[str, Any], table: IdTable | None
) -> list[dict[str, Any]]:
    tables = []
    for name, table_schema in (("shards", SHARD_TABLE), ("rollouts", ROLLOUT_TABLE)):
        data = read_file(path / f"index/{segment[name]['sha256']}.arrow", segment[name]["n_bytes"])
        batches = read_arrow(data, table_schema)
        require(len(batches) == 1, "an index file has one record batch")
        tables.append(batches[0].to_pylist())
    shards, listed = tables
    require(len(shards) == segment["n_shards"], "n_shards of a segment", INTEGRITY)
    for name in ("rows", "tokens", "response_tokens", "n_bytes"):
        total = sum(shard[name] for shard in shards)
        require(total == segment[name], f"{name} of a segment", INTEGRITY)

    places = []
    rows = []
    for number, shard in enumerate(shards):
        raw = read_shard(path / f"shards/{shard['sha256'].hex()}.arrow", shard, schema)
        checked = [check_row(row, manifest, table) for row in raw]
        places += [(row["rollout_hash"], number, i) for i, row in enumerate(checked)]
        rows += checked
    found = [(entry["rollout_hash"], entry["shard"], entry["row"]) for entry in listed]
    require(found == sorted(places), "the rollout table does not list every row in order")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Read a cache with every check of the specification.")
    parser.add_argument("cache", help="folder of the cache, optionally with @sha256:...")
    parser.add_argument("--row", type=int, help="print this rollout as JSON")
    arguments = parser.parse_args()
    text, _, pin = arguments.cache.partition("@sha256:")
    try:
        cache = read_cache(Path(text), f"sha256:{pin}" if pin else None)
    except RefusedError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    if arguments.row is None:
        tokens = sum(len(row["token_ids"]) for row in cache["rows"])
        print(f"version {cache['version']}, {cache['digest']}")
        print(f"{len(cache['rows'])} rollouts, {tokens} tokens, top-{cache['topk']}: every rule holds")
    else:
        row = cache["rows"][arguments.row]
        print(json.dumps({k: v.hex() if isinstance(v, bytes) else v for k, v in row.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
