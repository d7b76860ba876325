"""Write `vectors/`: caches every reader accepts, with their values, and caches every reader refuses.

    python spec/make_vectors.py [FOLDER]

Run it when the format or the cases change, and never for a released version: its vectors stay as they are.
Uses the internals of `opd_store` to break one rule at a time with every checksum above it put right.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import opd_store
from opd_store import CacheSchema, Rollout, layout
from opd_store.columns import BatchBuilder, arrow_schema
from opd_store.encodings.page import seal_page
from opd_store.hashing import crc32c, rollout_hash, tokenizer_fingerprint
from opd_store.index import ROLLOUT_TABLE, FileRef, SegmentRef, encode_rollout_table, encode_shard_table
from opd_store.manifest import Manifest, encode_manifest
from opd_store.rollout import checked
from opd_store.shard import Region, ShardInfo, ShardWriter
from opd_store.testing import FINGERPRINT, example_meta, random_rollout

FORMAT_VERSION = "1.0"
VOCAB = 50
META = example_meta(VOCAB)
SCHEMA = CacheSchema(topk=3, bands=(2, 3))
USER_COLUMNS = {"x_flag": "bool", "x_count": "int64", "x_score": "float64", "x_text": "utf8"}


def rollouts(n: int, seed: int, **options: Any) -> list[Rollout]:  # noqa: ANN401
    rng = np.random.default_rng(seed)
    sizes = {"vocab_size": VOCAB, "prompt_len": 2, "response_len": 3, "topk": 3} | options
    return [random_rollout(rng, sample_id=f"r{i}", **sizes) for i in range(n)]


# --- Valid caches, through the public API ---


def write(path: Path, commits: list[list[Rollout]], **options: Any) -> None:  # noqa: ANN401
    options = {"meta": META, "topk": 3} | options
    limits = {name: options.pop(name) for name in ("batch_bytes", "shard_bytes") if name in options}
    with opd_store.create(path, **options, **limits) as writer:
        writer.append_batch(commits[0])
    for commit in commits[1:]:
        with opd_store.append(path, **limits) as writer:
            writer.append_batch(commit)


def minimal(path: Path) -> None:
    """One rollout of two tokens; nothing but token ids."""
    write(path, [[Rollout(token_ids=np.array([7, 49], np.uint32), prompt_len=1)]], topk=0)


def empty(path: Path) -> None:
    """A first version without rollouts."""
    write(path, [[]])


def topk(path: Path) -> None:
    """Top 3 in one band: ties by rising id, a tail of nothing, log-probs of -0.0 and far below zero."""
    one = rollouts(1, 1, decimals=0)[0]
    logprob = np.array([[-0.0, -200.0, -200.0], [-1.0, -1.0, -1.5], [-0.5, -2.0, -3.4e38]], np.float32)
    ids = np.array([[49, 0, 1], [3, 4, 0], [2, 1, 0]], np.uint32)
    tail = np.array([-np.inf, -5.0, -2.0], np.float32)
    two = dataclasses.replace(rollouts(1, 2)[0], sample_id="r1", topk_ids=ids, topk_logprob=logprob)
    write(path, [[one, dataclasses.replace(two, log_tail=tail)]], bands=(3,))


def bands(path: Path) -> None:
    """Top 9 in bands that end at 1, 4 and 9, at 1 and at 11 positions."""
    values = [*rollouts(1, 3, topk=9, response_len=1), *rollouts(2, 4, topk=9, response_len=11)[1:]]
    write(path, [values], topk=9, bands=(1, 4, 9))


def whole_vocabulary(path: Path) -> None:
    """As many ranks as tokens, so that no probability is left."""
    write(path, [rollouts(1, 5, vocab_size=6, topk=6)], topk=6, meta=example_meta(6))


def columns(path: Path) -> None:
    """Every column present in one row, and absent in the next."""
    full = dataclasses.replace(
        rollouts(1, 6, topk=0)[0],
        finish_reason="length",
        policy_version=-(2**53) + 1,
        teacher=65535,
        reward=-0.1,
        label="gr\u00fcn \U0001f600",
        extra={"x_flag": False, "x_count": -(2**63), "x_score": 1e-310, "x_text": "\0"},
    )
    bare = Rollout(token_ids=full.token_ids, prompt_len=1)
    text = dataclasses.replace(bare, sample_id="", label="", extra={"x_text": ""})
    write(path, [[full, bare, text]], topk=0, user_columns=USER_COLUMNS)


def versions(path: Path) -> None:
    """Four commits, the middle ones merged; several shards and batches; tokens drawn three times."""
    values = rollouts(12, 7)
    again = [dataclasses.replace(values[0], sample_id=name) for name in ("again", None)]
    commits = [[*values[:6], again[0]], values[6:7], [values[7], again[1]], values[8:]]
    write(path, commits, batch_bytes=200, shard_bytes=6000)


VALID = (minimal, empty, topk, bands, whole_vocabulary, columns, versions)


# --- Caches with one broken rule ---


@dataclasses.dataclass
class Build:
    """The parts of a small cache, each to be changed before the next is made from it."""

    values: list[Rollout] = dataclasses.field(default_factory=lambda: rollouts(2, 8))
    n_shards: int = 1
    schema: CacheSchema = SCHEMA
    page: Callable[[int, int, bytes], bytes] = lambda row, rank_start, page: page
    """Gets each page with its row and first rank."""
    column: Callable[[str, pa.Array], pa.Array] = lambda name, array: array
    batch: Callable[[pa.RecordBatch], pa.RecordBatch] = lambda batch: batch
    compression: str | None = None
    table_compression: str | None = None
    shard: Callable[[bytes], bytes] = lambda data: data
    """Gets the bytes of the first shard; region checksums and digests follow what it returns."""
    info: Callable[[ShardInfo], ShardInfo] = lambda info: info
    """Gets the first shard's entry in the index."""
    hashes: Callable[[list[list[bytes]]], list[list[bytes]]] = lambda hashes: hashes
    rollout_table: Callable[[pa.RecordBatch], pa.RecordBatch] = lambda table: table
    segment: Callable[[SegmentRef], SegmentRef] = lambda segment: segment
    manifest: Callable[[str], str] = lambda text: text
    """Gets the manifest's text before the checksum line."""

    def write(self, path: Path) -> None:
        for folder in (layout.SHARD_DIR, layout.INDEX_DIR, layout.MANIFEST_DIR):
            (path / folder).mkdir(parents=True)
        infos, hashes = [], []
        for number, rows in enumerate(np.array_split(np.arange(len(self.values)), self.n_shards)):
            info, names, data = self._shard([self.values[row] for row in rows], first=number == 0)
            infos.append(info)
            hashes.append(names)
            (path / info.path).write_bytes(data)
        table = pa.ipc.open_file(encode_rollout_table(self.hashes(hashes))).get_batch(0)
        refs = []
        for data in (
            encode_shard_table(infos),
            arrow_file(self.rollout_table(table), self.table_compression),
        ):
            refs.append(FileRef(hashlib.sha256(data).digest(), len(data)))
            (path / refs[-1].path).write_bytes(data)
        counts = {
            name: sum(getattr(i, name) for i in infos)
            for name in ("rows", "tokens", "response_tokens", "n_bytes")
        }
        segment = self.segment(SegmentRef(shards=refs[0], rollouts=refs[1], n_shards=self.n_shards, **counts))
        manifest = Manifest(sequence=1, parent=None, meta=META, schema=self.schema, segments=(segment,))
        text = encode_manifest(manifest).decode()
        body = self.manifest(text[: text.index(',\n "checksum"')]).encode()
        trailer = f',\n "checksum": "sha256:{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
        (path / layout.manifest_path(1)).write_bytes(body + trailer)

    def _shard(self, rows: list[Rollout], *, first: bool) -> tuple[ShardInfo, list[bytes], bytes]:
        builder = BatchBuilder(self.schema)
        names = [rollout_hash(r.token_ids, FINGERPRINT) for r in rows]
        for rollout, name in zip(rows, names, strict=True):
            builder.add(rollout, name)
        batch = builder.take()
        if first:
            batch = self.batch(self._changed(batch))
        sink = io.BytesIO()
        shard = ShardWriter(sink, arrow_schema(self.schema))
        if first and self.compression:
            options = pa.ipc.IpcWriteOptions(compression=self.compression)
            shard._writer = pa.ipc.new_file(shard._file, arrow_schema(self.schema), options=options)
        shard.write(batch)
        info, data = shard.finish(), sink.getvalue()
        if first:
            changed = self.shard(data)
            if changed != data:
                info, data = resealed(info, changed), changed
            info = self.info(info)
        return info, names, data

    def _changed(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        arrays = []
        for field, array in zip(batch.schema, batch.columns, strict=True):
            if field.name.startswith("topk_"):
                start = int(field.name.split("_")[1])
                pages = [self.page(row, start, page) for row, page in enumerate(array.to_pylist())]
                array = pa.array(pages, pa.binary())
            arrays.append(self.column(field.name, array))
        return pa.RecordBatch.from_arrays(arrays, schema=batch.schema)


def arrow_file(batch: pa.RecordBatch, compression: str | None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def resealed(info: ShardInfo, data: bytes) -> ShardInfo:
    """The index entry of a changed shard, with right digests."""
    regions = tuple(
        dataclasses.replace(r, crc32c=crc32c(data[r.offset : r.offset + r.length])) for r in info.regions
    )
    return dataclasses.replace(info, sha256=hashlib.sha256(data).digest(), regions=regions)


def with_header(position: int, value: int, size: int = 1) -> Callable[[int, int, bytes], bytes]:
    """Change header bytes of the first page of row 0, and make its own checksum right again."""

    def change(row: int, rank_start: int, page: bytes) -> bytes:
        if (row, rank_start) != (0, 0):
            return page
        return with_crc(page[:position] + value.to_bytes(size, "little") + page[position + size :])

    return change


def with_crc(page: bytes) -> bytes:
    name = rollout_hash(rollouts(2, 8)[0].token_ids, FINGERPRINT)
    checksum = crc32c(page[24:], crc32c(name + page[:20]))
    return page[:20] + checksum.to_bytes(4, "little") + page[24:]


def with_body(change: Callable[[bytes], bytes], padding: bytes = b"") -> Callable[[int, int, bytes], bytes]:
    """Change the body of the first page of row 0; header and checksum fit it."""

    def page_of(row: int, rank_start: int, page: bytes) -> bytes:
        if (row, rank_start) != (0, 0):
            return page
        body_bytes = int.from_bytes(page[12:16], "little")
        name = rollout_hash(rollouts(2, 8)[0].token_ids, FINGERPRINT)
        shape = {"rank_start": 0, "rank_end": 2, "n_positions": 3}
        sealed = seal_page(change(page[24 : 24 + body_bytes]), encoding=0, rollout_hash=name, **shape)
        return with_crc(sealed[: len(sealed) - len(padding)] + padding) if padding else sealed

    return page_of


def with_word(index: int, value: float | int) -> Callable[[int, int, bytes], bytes]:
    """Set 4 bytes of the first page of row 0: ids are words 0-5, log-probs 6-11, tails 12-14."""
    raw = np.array(value, np.uint32 if index < 6 else np.float32).tobytes()
    return with_body(lambda body: body[: 4 * index] + raw + body[4 * index + 4 :])


def with_value(name: str, row: int, value: object) -> Callable[[str, pa.Array], pa.Array]:
    """Replace one value of a column."""

    def change(found: str, array: pa.Array) -> pa.Array:
        if found != name:
            return array
        values = array.to_pylist()
        values[row] = value
        return pa.array(values, array.type)

    return change


def with_null_item(found: str, array: pa.Array) -> pa.Array:
    """A null inside a list, where the schema promises there is none."""
    if found != "teacher_logprob":
        return array
    kind = array.type.value_field.type
    values = array.values.to_pylist()
    child = pa.array([None, *values[1:]], kind)
    return pa.Array.from_buffers(array.type, len(array), array.buffers()[:2], children=[child])


def with_region(number: int, **changes: Any) -> Callable[[ShardInfo], ShardInfo]:  # noqa: ANN401
    def change(info: ShardInfo) -> ShardInfo:
        regions = list(info.regions)
        regions[number] = dataclasses.replace(regions[number], **changes)
        return dataclasses.replace(info, regions=tuple(regions))

    return change


def split_last_region(info: ShardInfo) -> ShardInfo:
    last = info.regions[-1]
    empty_one = Region(last.offset, 0, 0, 0)
    return dataclasses.replace(info, regions=(*info.regions[:-1], empty_one, last))


def flip(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def text(old: str, new: str) -> Callable[[str], str]:
    def change(whole: str) -> str:
        assert old in whole, old
        return whole.replace(old, new, 1)

    return change


def table(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    def apply(batch: pa.RecordBatch) -> pa.RecordBatch:
        arrays = [
            pa.array(change(array.to_pylist()), array.type) if field.name == name else array
            for field, array in zip(batch.schema, batch.columns, strict=True)
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=ROLLOUT_TABLE)

    return apply


def unsorted(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.take(pa.array(range(batch.num_rows - 1, -1, -1)))


def misnamed(path: Path) -> None:
    Build().write(path)
    (path / layout.manifest_path(1)).rename(path / layout.manifest_path(2))


def without(pattern: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        Build().write(path)
        sorted(path.glob(pattern))[0].unlink()

    return make


def damaged(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        Build().write(path)
        file = sorted(path.glob(pattern))[0]
        file.write_bytes(change(file.read_bytes()))

    return make


def swapped(path: Path) -> None:
    Build(n_shards=2).write(path)
    one, two = sorted((path / "shards").iterdir())
    left, right = one.read_bytes(), two.read_bytes()
    one.write_bytes(right)
    two.write_bytes(left)


def built(**parts: Any) -> Callable[[Path], None]:  # noqa: ANN401
    return lambda path: Build(**parts).write(path)


NAN = float("nan")
Case = tuple[str, str, Callable[[Path], None], str]
INVALID: dict[str, Case] = {
    # name: (stage at which opd_store refuses, error class, maker, rule)
    "manifest-none": ("open", "CacheNotFoundError", without("manifests/*"), "a cache has a manifest"),
    "manifest-bit": ("open", "IntegrityError", damaged("manifests/*", lambda d: flip(d, 99)), "checksum"),
    "manifest-cut": ("open", "IntegrityError", damaged("manifests/*", lambda d: d[:-1]), "last line"),
    "manifest-longer": ("open", "IntegrityError", damaged("manifests/*", lambda d: d + b"\n"), "last line"),
    "manifest-renamed": ("open", "IntegrityError", misnamed, "sequence is the number in the name"),
    "manifest-byte-order-mark": (
        "open",
        "FormatError",
        built(manifest=lambda whole: "\ufeff" + whole),
        "UTF-8 without byte order mark",
    ),
    "manifest-duplicate-key": (
        "open",
        "FormatError",
        built(manifest=text('"sequence": 1', '"sequence": 1, "sequence": 1')),
        "no duplicate keys",
    ),
    "manifest-nan": (
        "open",
        "FormatError",
        built(manifest=text(f'"vocab_size": {VOCAB}', '"vocab_size": NaN')),
        "no NaN",
    ),
    "manifest-large-integer": (
        "open",
        "FormatError",
        built(manifest=text(f'"vocab_size": {VOCAB}', '"vocab_size": 9007199254740992')),
        "integers within 2**53 - 1",
    ),
    "manifest-unknown-field": (
        "open",
        "FormatError",
        built(manifest=text('"sequence": 1', '"sequence": 1, "colour": "red"')),
        "no unknown fields in the version that is known",
    ),
    "manifest-missing-field": (
        "open",
        "FormatError",
        built(manifest=text('"unreleased": true,', "")),
        "all fields are there",
    ),
    "manifest-major-2": (
        "open",
        "UnsupportedVersionError",
        built(manifest=text('"1.0"', '"2.0"')),
        "another major version",
    ),
    "manifest-required-feature": (
        "open",
        "UnsupportedVersionError",
        built(manifest=text('"required_features": []', '"required_features": ["zip"]')),
        "unknown required feature",
    ),
    "manifest-later-encoding": (
        "open",
        "UnsupportedVersionError",
        built(manifest=text('"plain"', '"cubic"')),
        "unknown encoding",
    ),
    "manifest-bands": (
        "open",
        "FormatError",
        built(manifest=text('"topk": 3', '"topk": 4')),
        "the last band ends at topk",
    ),
    "manifest-small-vocabulary": (
        "open",
        "FormatError",
        built(manifest=text(f'"vocab_size": {VOCAB}', '"vocab_size": 2')),
        "topk <= vocab_size",
    ),
    "manifest-orphan": (
        "open",
        "FormatError",
        built(manifest=text('"parent": null', f'"parent": "sha256:{"0" * 64}"')),
        "the first version has no parent",
    ),
    "manifest-path": (
        "open",
        "FormatError",
        built(manifest=text('"sha256": "', '"sha256": "../')),
        "files are named by digest",
    ),
    "manifest-counts": (
        "open",
        "IntegrityError",
        built(segment=lambda s: dataclasses.replace(s, rows=3)),
        "counts of a segment are those of its shard table",
    ),
    "index-missing": ("open or find", "IntegrityError", without("index/*"), "index files are there"),
    "index-bit": (
        "open or find",
        "IntegrityError",
        damaged("index/*", lambda d: flip(d, len(d) // 2)),
        "digest of an index file",
    ),
    "index-gap": (
        "open",
        "FormatError",
        built(info=lambda i: with_region(1, offset=i.regions[1].offset + 8)(i)),
        "regions follow each other",
    ),
    "index-overlap": (
        "open",
        "FormatError",
        built(info=lambda i: with_region(1, offset=i.regions[1].offset - 8)(i)),
        "regions follow each other",
    ),
    "index-short": (
        "open",
        "FormatError",
        built(info=lambda i: dataclasses.replace(i, n_bytes=i.n_bytes + 8)),
        "regions end where the file ends",
    ),
    "index-empty-region": ("open", "FormatError", built(info=split_last_region), "no empty region"),
    "index-rows": ("open", "FormatError", built(info=with_region(1, rows=3)), "rows of regions add up"),
    "index-row-of-no-shard": (
        "find",
        "FormatError",
        built(rollout_table=table("shard", lambda v: [*v[:-1], 1])),
        "rollouts point into their segment",
    ),
    "index-row-of-no-batch": (
        "find",
        "FormatError",
        built(rollout_table=table("row", lambda v: [*v[:-1], 2])),
        "rollouts point into their shard",
    ),
    "index-order-of-equals": (
        "verify",
        "FormatError",
        built(
            values=[dataclasses.replace(rollouts(1, 8)[0], sample_id=name) for name in "ab"],
            rollout_table=unsorted,
        ),
        "rollouts of equal hash are sorted by place",
    ),
    "index-compressed": (
        "find",
        "FormatError",
        built(table_compression="zstd"),
        "bodies of record batches are not compressed",
    ),
    "index-unsorted": ("verify", "FormatError", built(rollout_table=unsorted), "sorted by hash"),
    "index-twice-the-same-row": (
        "verify",
        "FormatError",
        built(rollout_table=table("row", lambda v: [0] * len(v))),
        "every row is listed",
    ),
    "index-tokens": (
        "verify",
        "FormatError",
        built(info=lambda i: dataclasses.replace(i, tokens=i.tokens + 1)),
        "tokens of a shard",
    ),
    "shard-missing": ("read", "IntegrityError", without("shards/*"), "shards are there"),
    "shard-cut": ("read", "IntegrityError", damaged("shards/*", lambda d: d[:-1]), "length of a shard"),
    "shard-longer": ("read", "IntegrityError", damaged("shards/*", lambda d: d + b"\0"), "length of a shard"),
    "shard-bit": (
        "read",
        "IntegrityError",
        damaged("shards/*", lambda d: flip(d, len(d) // 2)),
        "checksum of a region",
    ),
    "shard-swapped": ("read", "IntegrityError", swapped, "a shard is known by its digest"),
    "shard-schema": (
        "read",
        "FormatError",
        built(manifest=text('"user_columns": {}', '"user_columns": {"x_a": "int64"}')),
        "a shard has the columns of the manifest",
    ),
    "shard-footer": (
        "verify",
        "FormatError",
        built(shard=lambda d: d[:-10] + b"\0\0\0\0" + d[-6:]),
        "the footer leads other Arrow tools to the same batches",
    ),
    "shard-compressed": (
        "read",
        "FormatError",
        built(compression="zstd"),
        "bodies of record batches are not compressed",
    ),
    "column-null": (
        "read",
        "FormatError",
        built(column=with_value("finish_reason", 0, None)),
        "no null in a column declared without",
    ),
    "column-null-item": ("read", "FormatError", built(column=with_null_item), "no null inside a list"),
    "column-short": (
        "read",
        "FormatError",
        built(column=with_value("teacher_logprob", 1, [-1.0, -2.0])),
        "one value for each response token",
    ),
    "column-long": (
        "read",
        "FormatError",
        built(column=with_value("loss_mask", 0, [1, 1, 1, 1])),
        "one value for each response token",
    ),
    "column-mask-of-2": (
        "read",
        "FormatError",
        built(column=with_value("loss_mask", 0, [1, 2, 1])),
        "loss_mask is 0 or 1",
    ),
    "column-no-prompt": (
        "read",
        "FormatError",
        built(column=with_value("prompt_len", 0, 0)),
        "a prompt has a token",
    ),
    "column-no-response": (
        "read",
        "FormatError",
        built(column=with_value("prompt_len", 0, 5)),
        "a response has a token",
    ),
    "column-hash": (
        "verify",
        "FormatError",
        built(column=with_value("token_ids", 1, [1, 2, 3, 4, 5])),
        "rollout_hash is the hash of the tokens",
    ),
    "column-token": (
        "verify",
        "FormatError",
        built(column=with_value("token_ids", 1, [1, 2, 3, 4, VOCAB])),
        "ids are below vocab_size",
    ),
    "column-nan": (
        "verify",
        "FormatError",
        built(column=with_value("teacher_logprob", 0, [-1.0, NAN, -1.0])),
        "log-probs are finite and at most 0",
    ),
    "column-positive": (
        "verify",
        "FormatError",
        built(column=with_value("behaviour_logprob", 0, [-1.0, 0.5, -1.0])),
        "log-probs are finite and at most 0",
    ),
    "column-infinite": (
        "verify",
        "FormatError",
        built(column=with_value("reference_logprob", 0, [-1.0, -1.0, float("-inf")])),
        "log-probs are finite and at most 0",
    ),
    "column-finish-reason": (
        "verify",
        "FormatError",
        built(column=with_value("finish_reason", 0, "eos")),
        "finish_reason is one of four words",
    ),
    "column-policy-version": (
        "verify",
        "FormatError",
        built(column=with_value("policy_version", 0, 2**53)),
        "policy_version is within 2**53 - 1",
    ),
    "column-reward": (
        "verify",
        "FormatError",
        built(column=with_value("reward", 0, NAN)),
        "reward is finite",
    ),
    "column-long-text": (
        "verify",
        "FormatError",
        built(column=with_value("label", 0, "x" * 4097)),
        "a text has at most 4096 bytes",
    ),
    "page-none": ("read", "FormatError", built(page=lambda *_: b""), "a page has a header"),
    "page-encoding": ("read", "FormatError", built(page=with_header(0, 255)), "encoding code"),
    "page-flags": ("read", "FormatError", built(page=with_header(1, 1)), "flags are zero"),
    "page-rank-start": ("read", "FormatError", built(page=with_header(2, 1, 2)), "ranks of the column"),
    "page-rank-end": ("read", "FormatError", built(page=with_header(4, 3, 2)), "ranks of the column"),
    "page-reserved": ("read", "FormatError", built(page=with_header(6, 1, 2)), "reserved is zero"),
    "page-positions": ("read", "FormatError", built(page=with_header(8, 4, 4)), "one position a token"),
    "page-body-bytes": ("read", "FormatError", built(page=with_header(12, 2**32 - 1, 4)), "length of a page"),
    "page-parameter": ("read", "FormatError", built(page=with_header(16, 1, 4)), "parameter is zero"),
    "page-padding": ("read", "FormatError", built(page=with_body(bytes, b"\1")), "padding is zero"),
    "page-body-short": (
        "read",
        "FormatError",
        built(page=with_body(lambda body: body[:-8])),
        "length of a plain body",
    ),
    "page-checksum": (
        "verify",
        "IntegrityError",
        built(page=lambda row, start, page: flip(page, 20) if row == start == 0 else page),
        "checksum of a page",
    ),
    "page-of-another-rollout": (
        "verify",
        "IntegrityError",
        built(
            batch=lambda b: b.set_column(
                b.schema.get_field_index("topk_0_2"),
                b.schema.field("topk_0_2"),
                b.column("topk_0_2").take(pa.array([1, 0])),
            )
        ),
        "the checksum of a page starts from its rollout's hash",
    ),
    "page-id": ("verify", "FormatError", built(page=with_word(0, VOCAB)), "ids are below vocab_size"),
    "page-nan": ("verify", "FormatError", built(page=with_word(6, NAN)), "log-probs are finite"),
    "page-infinite": ("verify", "FormatError", built(page=with_word(7, -np.inf)), "log-probs are finite"),
    "page-rising": ("verify", "FormatError", built(page=with_word(6, -300.0)), "log-probs fall"),
    "page-twice": (
        "verify",
        "FormatError",
        built(page=with_body(lambda body: body[4:8] + body[4:])),
        "ids are distinct",
    ),
    "page-sum": ("verify", "FormatError", built(page=with_word(6, -0.0)), "probabilities sum to at most 1"),
}


def bits(array: np.ndarray | None) -> list[Any] | None:
    """Exact: integers as they are, floats as the hexadecimal digits of their bits."""
    if array is None:
        return None
    if array.dtype == np.float32:
        words = array.astype("<f4").view("<u4")
        return [f"{word:08x}" for word in words.ravel().tolist()]
    return array.ravel().astype(int).tolist()


def scalar(value: object) -> object:
    return value.hex() if isinstance(value, float) else value


def expected(cache: opd_store.Cache) -> dict[str, Any]:
    """What a reader of the newest version finds."""
    rows = []
    for row, rollout in enumerate(cache):
        values = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
        extra = {name: scalar(value) for name, value in values.pop("extra").items()}
        plain = {
            name: bits(value) if isinstance(value, np.ndarray) else scalar(value)
            for name, value in values.items()
            if value is not None
        }
        rows.append({"rollout_hash": cache.row_hash(row).hex(), **plain, **extra})
    return {"version": cache.version, "digest": cache.digest, "topk": cache.topk, "rows": rows}


def main(folder: Path) -> None:
    found = f"{layout.FORMAT_MAJOR}.{layout.FORMAT_MINOR}"
    if found != FORMAT_VERSION:
        raise SystemExit(
            f"opd_store writes format {found}, these vectors are of {FORMAT_VERSION}. Released vectors never "
            "change: copy this script for the new version."
        )
    valid, invalid = folder / "valid" / FORMAT_VERSION, folder / "invalid" / FORMAT_VERSION
    for place in (valid, invalid):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    accepted = {}
    for make in VALID:
        name = make.__name__.replace("_", "-")
        make(valid / name)
        shutil.rmtree(valid / name / "tmp", ignore_errors=True)
        report = opd_store.verify(valid / name)
        assert report.ok, (name, report.problems)
        accepted[name] = {"what": make.__doc__, **expected(opd_store.open(valid / name))}
    tokenizers = [{"description": t, "fingerprint": tokenizer_fingerprint(json.dumps(t))} for t in TOKENIZERS]
    refused = {}
    for name, (stage, error, make_case, rule) in INVALID.items():
        make_case(invalid / name)
        refused[name] = {"rule": rule, "error": error, "stage": stage}
    example = checked(worked_example(), vocab_size=VOCAB, topk=2)
    builder = BatchBuilder(CacheSchema(topk=2, bands=(2,)))
    name_of = rollout_hash(example.token_ids, FINGERPRINT)
    builder.add(example, name_of)
    (page,) = builder.take().column("topk_0_2").to_pylist()
    (valid / "page-example.bin").write_bytes(page)
    header = {"format_version": FORMAT_VERSION, "opd_store": opd_store.__version__, "unreleased": True}
    page_case = {"file": "page-example.bin", "rollout_hash": name_of.hex(), "rank_start": 0, "rank_end": 2}
    for place, cases in ((valid, accepted), (invalid, refused)):
        listed = (
            header
            | ({"page": page_case, "tokenizers": tokenizers} if place == valid else {})
            | {"cases": cases}
        )
        (place / "cases.json").write_text(json.dumps(listed, indent=1) + "\n")
    print(f"{len(accepted)} valid and {len(refused)} invalid caches in {folder}")


MERGES = {"type": "BPE", "vocab": {"a": 1, "b": 2, "ab": 3, "\u0120a": 4, "<s>": 0}}
ADDED = [{"id": 5, "content": "\U0001f600"}, {"id": 0, "content": "<s>", "special": True}]
TOKENIZERS = (
    {"model": {**MERGES, "merges": ["a b", "\u0120 a", "a  b"]}, "added_tokens": ADDED, "padding": {}},
    {"model": {**MERGES, "merges": [["a", "b"]]}, "added_tokens": [{"id": 2, "content": "\ud800"}]},
    {"model": {"type": "Unigram", "vocab": [["<unk>", 0], ["a", -1.5]]}, "added_tokens": None},
    {"model": {"vocab": {}}},
)


def worked_example() -> Rollout:
    """The page of the example in format.md: one position, two ranks."""
    return Rollout(
        token_ids=np.array([1, 2], np.uint32),
        prompt_len=1,
        topk_ids=np.array([[2, 5]], np.uint32),
        topk_logprob=np.array([[-0.5, -1.5]], np.float32),
        log_tail=np.array([-2.0], np.float32),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("vectors"))
