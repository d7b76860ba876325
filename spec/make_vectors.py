"""Write `vectors/`: caches every reader accepts, with their values, and caches every reader refuses.

    python spec/make_vectors.py [FOLDER]

Run it when the format or the cases change, and never for a released version: its vectors stay as they are.
Uses the internals of `opd_store` to break one rule at a time with every checksum above it put right.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import math
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

import opd_store
from opd_store import CacheSchema, Rollout, arrow_message, layout
from opd_store.columns import BatchBuilder
from opd_store.encodings import EncodedPages, IdTable, PageShape, build_id_table
from opd_store.encodings.page import seal_page
from opd_store.hashing import crc32c, rollout_hash, tokenizer_fingerprint
from opd_store.index import (
    ROLLOUT_TABLE,
    SHARD_TABLE,
    FileRef,
    SegmentRef,
    encode_rollout_table,
    encode_shard_table,
)
from opd_store.manifest import Manifest, encode_manifest
from opd_store.rollout import checked
from opd_store.schema import Cut, arrow_schema
from opd_store.shard import Region, ShardInfo, part_starts
from opd_store.shard_writer import ShardWriter
from opd_store.testing import FINGERPRINT, example_meta, random_rollout

FORMAT_VERSION = "1.0"
NAN, INF = float("nan"), float("inf")
VOCAB = 50
META = example_meta(VOCAB)
SCHEMA = CacheSchema(topk=3, bands=(2, 3))
PACKED = CacheSchema(topk=3, bands=(3,), encoding="ladder/128")
NO_ID = layout.NO_ID
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
    text = dataclasses.replace(bare, sample_id="", label="", extra={"x_text": "", "x_score": NAN})
    write(path, [[full, bare, text]], topk=0, user_columns=USER_COLUMNS)


def versions(path: Path) -> None:
    """Four commits, the middle ones merged; several shards and batches; tokens drawn three times."""
    values = rollouts(12, 7)
    again = [dataclasses.replace(values[0], sample_id=name) for name in ("again", None)]
    commits = [[*values[:6], again[0]], values[6:7], [values[7], again[1]], values[8:]]
    write(path, commits, batch_bytes=200, shard_bytes=6000)


def exact(path: Path) -> None:
    """`f32` in bands that end at 2 and 9: float32 from -0.0 down, a tail of nothing, compressed planes."""
    first, *rest = rollouts(3, 11, topk=9, response_len=70)
    far = [-80.0, -90.0, -90.0, -1e3, -65536.0, -1e30, -3.4e38, -3.4028235e38]
    extremes = dataclasses.replace(
        rollouts(1, 12, topk=9, response_len=2)[0],
        sample_id="extremes",
        topk_ids=np.array([[40, 1, 2, 3, 4, 5, 6, 7, 8]] * 2, np.uint32),
        topk_logprob=np.float32([[-0.0, *far], [-1e-45, *far]]),
        log_tail=np.float32([-np.inf, -80.0]),
    )
    write(path, [[first, extremes, *rest]], topk=9, bands=(2, 9), encoding="f32")


def _ladder(path: Path, encoding: str) -> None:
    """Bands that end at 1, 8 and 20: ties after rounding, long steps, the lowest value, compressed planes."""
    lowest = np.float32(-65504.0 if encoding == "ladder16" else -(2**24 - 1) / int(encoding[7:]))
    ids = np.arange(20, dtype=np.uint32)[None]
    falling = -np.float32([np.r_[0.0, 7.0 + np.arange(18) ** 2 * 3.0, -lowest]])
    tail = np.array([-np.inf], np.float32)
    head = dict.fromkeys(("prompt_len",), 1)
    values = [
        *rollouts(2, 13, topk=20, response_len=80),
        *rollouts(1, 14, topk=20, response_len=5, decimals=1),
        Rollout(
            token_ids=np.array([1, 2], np.uint32), **head, topk_ids=ids, topk_logprob=falling, log_tail=tail
        ),
        Rollout(
            token_ids=np.array([1, 3], np.uint32),
            **head,
            topk_ids=ids,
            topk_logprob=np.full((1, 20), lowest),
            log_tail=np.array([-0.0], np.float32),
        ),
    ]
    values = [dataclasses.replace(value, sample_id=str(i)) for i, value in enumerate(values)]
    write(path, [values], topk=20, bands=(1, 8, 20), encoding=encoding, id_table=None)


def ladder16(path: Path) -> None:
    _ladder(path, "ladder16")


def ladder_128(path: Path) -> None:
    _ladder(path, "ladder/128")


def ladder_64(path: Path) -> None:
    _ladder(path, "ladder/64")


def ladder_32(path: Path) -> None:
    _ladder(path, "ladder/32")


def rank_groups(path: Path) -> None:
    """Ranks 0 to 139 in bands that end at 6, 7, 9, 70 and 140, so that groups of steps are cut everywhere."""
    values = rollouts(1, 15, vocab_size=300, topk=140, response_len=2)
    bands = (6, 7, 9, 70, 140)
    write(path, [values], meta=META300, topk=140, bands=bands, encoding="ladder/64", id_table=None)


def ragged_rollouts(topk: int, *, vocab_size: int = VOCAB, response_len: int = 12) -> list[Rollout]:
    """Rows of 1, 2, ... ranks, the rest padding."""
    values = rollouts(2, 16, vocab_size=vocab_size, topk=topk, response_len=response_len)
    out = []
    for value in values:
        lengths = 1 + np.arange(response_len) % topk
        kept = np.arange(topk) < lengths[:, None]
        out.append(
            dataclasses.replace(
                value,
                topk_ids=np.where(kept, value.topk_ids, np.uint32(NO_ID)),
                topk_logprob=np.where(kept, value.topk_logprob, np.float32(-np.inf)),
            )
        )
    return out


def _ragged(path: Path, encoding: str, **options: Any) -> None:  # noqa: ANN401
    """Rows of 1 to 7 ranks in bands that end at 2 and 7, where the second band of a row may be empty."""
    write(path, [ragged_rollouts(7)], topk=7, bands=(2, 7), encoding=encoding, cut=Cut("given"), **options)


def ragged_plain(path: Path) -> None:
    _ragged(path, "plain")


def ragged_f32(path: Path) -> None:
    _ragged(path, "f32", id_table=None)


def ragged_ladder(path: Path) -> None:
    _ragged(path, "ladder/128", id_table=None)


def cut_by_mass(path: Path) -> None:
    """As few ranks as hold 0.75 of the probability; the others are in the tail."""
    write(
        path, [rollouts(2, 17, topk=9, response_len=9)], topk=9, encoding="ladder/64", cut=Cut("mass", 0.75)
    )


def supports(n: int) -> list[Rollout]:
    """Rollouts with top 3, up to 4 chosen ids, up to 5 sampled ones, and rows without any."""
    values = []
    for number, value in enumerate(rollouts(n, 18, topk=3, response_len=6)):
        wide = rollouts(1, 19 + number, topk=5, response_len=6)[0]
        few = np.arange(5) < (np.arange(6) % 6)[:, None]
        parts = wide.topk_ids, wide.topk_logprob, wide.log_tail
        ids = np.where(few, parts[0], np.uint32(NO_ID))
        logprob = np.where(few, parts[1], np.float32(-np.inf))
        draws = np.where(few, 1 + 255 * np.arange(5, dtype=np.uint32) ** 8, 0).astype(np.uint32)
        values.append(
            dataclasses.replace(
                value,
                chosen_ids=ids[:, :4],
                chosen_logprob=logprob[:, :4],
                chosen_log_tail=parts[2],
                sampled_ids=ids,
                sampled_logprob=logprob,
                sampled_log_tail=parts[2],
                sampled_draws=draws,
            )
        )
    return values


def supports_plain(path: Path) -> None:
    """Chosen and sampled ids beside the top 3, with empty rows, draws of many bytes, temperature 0.7."""
    write(path, [supports(2)], chosen=4, sampled=5, sampled_temperature=0.7)


def supports_f32(path: Path) -> None:
    """The same as `supports-plain`."""
    write(path, [supports(2)], chosen=4, sampled=5, sampled_temperature=0.7, encoding="f32")


def supports_ladder(path: Path) -> None:
    """The same as `supports-plain`, but rounded."""
    options = {"encoding": "ladder/128", "id_table": "auto"}
    write(path, [supports(2)], chosen=4, sampled=5, sampled_temperature=0.7, **options)


def only_sampled(path: Path) -> None:
    """No top-k at all."""
    values = [
        dataclasses.replace(value, topk_ids=None, topk_logprob=None, log_tail=None, chosen_ids=None)
        for value in supports(1)
    ]
    values = [dataclasses.replace(value, chosen_logprob=None, chosen_log_tail=None) for value in values]
    write(path, [values], topk=0, sampled=5, encoding="ladder16")


def example_table(n_lists: int) -> IdTable:
    """A permutation of 300 ids, and lists of overlapping stretches of it."""
    by_rank = (np.arange(300) * 7 % 300).astype(np.uint32)
    lists = [by_rank[start : start + 255] for start in range(0, 15 * n_lists, 15)]
    return IdTable(by_rank, np.array(lists, np.uint32).reshape(-1, 255))


def table_frequency(path: Path) -> None:
    """Ids as frequency ranks; the id table has no lists."""
    values = rollouts(2, 20, vocab_size=300, topk=5, response_len=30)
    write(path, [values], meta=META300, topk=5, bands=(2, 5), encoding="f32", id_table=example_table(0))


def table_lists(path: Path) -> None:
    """Ids as codes in lists, with escapes, two bands, and compressed planes."""
    values = rollouts(3, 21, vocab_size=300, topk=20, response_len=40)
    table = build_id_table([value.topk_ids for value in values[:2]], vocab_size=300, n_lists=3)
    write(path, [values], meta=META300, topk=20, encoding="ladder/128", id_table=table)


def table_ragged(path: Path) -> None:
    """Ids as codes in lists, in rows of 1 to 7 ranks, and for sampled ids."""
    values = [
        dataclasses.replace(
            value,
            sampled_ids=value.topk_ids[:, :2],
            sampled_logprob=value.topk_logprob[:, :2],
            sampled_log_tail=value.log_tail,
            sampled_draws=(value.topk_ids[:, :2] != NO_ID).astype(np.uint32) * 3,
        )
        for value in ragged_rollouts(7, vocab_size=300)
    ]
    options = {"meta": META300, "topk": 7, "bands": (2, 7), "cut": Cut("given"), "sampled": 2}
    write(path, [values], encoding="ladder/32", id_table=example_table(4), **options)


def table_not_yet(path: Path) -> None:
    """The schema says `auto`, and there is no id table so far."""
    write(path, [rollouts(1, 22)], encoding="f32", id_table="auto")


def table_later(path: Path) -> None:
    """The schema says `auto`; the second version has an id table, and pages with and without it."""
    values = rollouts(3, 23, vocab_size=300)
    write(path, [values[:1]], meta=META300, encoding="ladder/128", id_table="auto")
    with opd_store.append(path) as writer:
        writer.append(values[1])
        writer._builder.id_table, writer._sample = example_table(2), None
        writer.append(values[2])


def table_raw(path: Path) -> None:
    """An id table of four raw planes a stream, which this package would have written with two."""
    data = table_bytes(planes=4)
    schema = dataclasses.replace(PACKED, id_table="given")
    modes = {"mode": [2], "lists": [0, 1, 0], "codes": CODES, "escaped": ESCAPED}
    page = replaced("topk_0_3", lambda: packed_page(modes, flags=2, table=data))
    Build(values=small(), schema=schema, meta=META300, table=data, page=page).write(path)


def plane_choices(path: Path) -> None:
    """Streams of four planes each, all frames where there is a value; later readers write otherwise."""
    page = replaced("topk_0_3", lambda: packed_page({}, planes=4, frames=True))
    Build(values=small(), schema=PACKED, meta=META300, page=page).write(path)


def rounded_sum(path: Path) -> None:
    """Probabilities that sum to 1.0156 after rounding, and to 1 before: allowed for `ladder/32` only."""
    logprob = -(np.float32([[1.49, 8.49, 58.49]]) + 21) / 32
    tail = np.float32([math.log(1 - np.exp(logprob.astype(np.float64)).sum())])
    rollout = Rollout(
        token_ids=np.array([1, 2], np.uint32),
        prompt_len=1,
        topk_ids=np.array([[3, 4, 5]], np.uint32),
        topk_logprob=logprob,
        log_tail=tail,
    )
    write(path, [[rollout]], encoding="ladder/32")


def rounded_copy(path: Path) -> None:
    """`plain`, copied from a `ladder/32` cache whose values sum to 1.0156; `max_error` came along."""
    _copied(path, "plain")


def rounded_copy_f32(path: Path) -> None:
    """The same as `rounded-copy` in `f32`."""
    _copied(path, "f32")


def _copied(path: Path, encoding: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rounded_sum(Path(folder))
        source = opd_store.open(folder)
        options = {"meta": META, "topk": 3, "bands": (2, 3), "encoding": encoding, "id_table": None}
        with opd_store.create(path, **options) as writer:
            writer.copy(source, 0)


def of_sum(total: float) -> list[Rollout]:
    """A rollout whose only position has ranks of 0.5, 0.3 and 0.2 of a sum, and nothing outside."""
    logprob = np.log(total * np.float64([[0.5, 0.3, 0.2]])).astype(np.float32)
    return [
        Rollout(
            token_ids=np.array([1, 2], np.uint32),
            prompt_len=1,
            topk_ids=np.array([[3, 4, 5]], np.uint32),
            topk_logprob=logprob,
            log_tail=np.float32([-np.inf]),
        )
    ]


def summing(total: float, max_error: float, encoding: str = "plain") -> Build:
    """Such a rollout in a cache that claims a largest error."""
    return Build(
        values=of_sum(total),
        schema=dataclasses.replace(SCHEMA, encoding=encoding),
        segment=lambda segment: dataclasses.replace(segment, max_error=max_error),
    )


EXACT_SUM = 1 + layout.PROBABILITY_TOLERANCE + layout.READER_SLACK
NEAR = 1e-6


def largest_sum(path: Path) -> None:
    """A `max_error` of 9 nats, of which 1/16 counts for the sum of probabilities."""
    summing(EXACT_SUM * math.exp(1 / 16) - NEAR, 9.0, "f32").write(path)


def renormalised(path: Path) -> None:
    """`logprob_mode` says that the source had lost what is outside the ranks: they sum to 1."""
    teacher = dataclasses.replace(META.teacher, logprob_mode=opd_store.RENORMALISED_TOPK)
    write(path, [of_sum(1.0)], meta=dataclasses.replace(META, teacher=teacher))


def removed(path: Path) -> None:
    """Versions 1 and 2 of four were removed, and a file says so."""
    versions(path)
    say_removed(path, 2)
    for number in (1, 2):
        (path / layout.manifest_path(number)).unlink()


def removed_midway(path: Path) -> None:
    """As `removed`, but whoever did it was cut off after the second version; the first is still there."""
    versions(path)
    say_removed(path, 2)
    (path / layout.manifest_path(2)).unlink()


def removal_begun(path: Path) -> None:
    """As `removed`, but whoever did it was cut off before the first manifest went."""
    versions(path)
    say_removed(path, 2)


def say_removed(path: Path, number: int) -> None:
    data = (path / layout.manifest_path(number)).read_bytes()
    (path / layout.removed_path(number)).write_text(f"sha256:{hashlib.sha256(data).hexdigest()}\n")


def later_minor(path: Path) -> None:
    """Format 1.1 with fields and an optional feature that nobody knows yet."""
    changes = (
        text('"1.0"', '"1.1"'),
        text('"sequence": 1', '"sequence": 1, "colour": {"depth": ' + nested(14) + "}"),
        text('"optional_features": []', '"optional_features": ["colour"]'),
        text('"vocab_size"', '"vowels": 6, "vocab_size"'),
        text('"n_shards"', '"n_sheds": 0, "n_shards"'),
    )

    def change(whole: str) -> str:
        for one in changes:
            whole = one(whole)
        return whole

    Build(manifest=change).write(path)


VALID = (
    *(minimal, empty, topk, bands, whole_vocabulary, columns, versions),
    *(exact, ladder16, ladder_128, ladder_64, ladder_32, rank_groups, plane_choices, rounded_sum),
    *(ragged_plain, ragged_f32, ragged_ladder, cut_by_mass),
    *(supports_plain, supports_f32, supports_ladder, only_sampled),
    *(table_frequency, table_lists, table_ragged, table_not_yet, table_later, table_raw, later_minor),
    *(rounded_copy, rounded_copy_f32, largest_sum, renormalised, removed, removed_midway, removal_begun),
)


# --- A small page, stream by stream ---

META300 = example_meta(300)
UNITS = np.array([[200, 210, 510], [256, 256, 261], [180, 434, 734]])
IDS = np.array([[4, 9, 7], [1, 2, 3], [299, 0, 5]], np.uint32)
TAIL_UNITS = [128, None, 76]
PARTS: dict[str, Sequence[int] | bytes] = {
    "tail": [129, 0, 77],
    "heads": [200, 256, 180],
    "steps": [10, 255, 0, 5, 254, 255],
    "long": [45, 45],
    "mode": [0],
    "ids": IDS.ravel().tolist(),
}
"""The streams of the page of ranks [0, 3) of the first rollout of `small`, in `ladder/128`."""


def small() -> list[Rollout]:
    """Two rollouts, the first one with round numbers in units of 1/128 nat."""
    one, two = rollouts(2, 24, vocab_size=300)
    tail = np.float32([-np.inf if n is None else -n / 128 for n in TAIL_UNITS])
    logprob = (-UNITS / 128).astype(np.float32)
    return [dataclasses.replace(one, topk_ids=IDS, topk_logprob=logprob, log_tail=tail), two]


def f32_parts(**changes: Sequence[float]) -> dict[str, Sequence[int] | bytes]:
    """The streams of the same page in `f32`."""

    def words(values: Sequence[float]) -> list[int]:
        return (np.float32(values).view(np.uint32) ^ np.uint32(1 << 31)).tolist()

    given = {"tail": small()[0].log_tail, "logprob": small()[0].topk_logprob.ravel()} | changes
    rows = np.array(words(given["logprob"]), np.uint32).reshape(3, 3)
    return {
        "tail": words(given["tail"]),
        "heads": rows[:, 0].tolist(),
        "steps": np.diff(rows, axis=1).ravel().tolist(),
        "mode": [0],
        "ids": PARTS["ids"],
    }


def stream(values: Sequence[int], *, planes: int | None = None, frames: bool = False) -> bytes:
    """One stream; by default with as few planes as hold the values, all of them raw."""
    if planes is None:
        planes = (max(values, default=0).bit_length() + 7) // 8
    return bytes([planes]) + b"".join(
        plane(bytes(value >> 8 * number & 255 for value in values), frame=frames) for number in range(planes)
    )


def plane(data: bytes, *, frame: bool = False) -> bytes:
    if frame and data:
        return framed(zstandard.ZstdCompressor(level=1, write_checksum=False).compress(data))
    return struct.pack("<I", len(data)) + data


def framed(payload: bytes) -> bytes:
    """A plane whose payload claims to be a zstd frame."""
    return struct.pack("<I", len(payload) | 1 << 31) + payload


def packed_body(parts: dict[str, Sequence[int] | bytes], **options: Any) -> bytes:  # noqa: ANN401
    return b"".join(v if isinstance(v, bytes) else stream(v, **options) for v in parts.values())


def packed_page(
    changes: dict[str, Any],
    *,
    base: dict[str, Sequence[int] | bytes] = PARTS,
    flags: int = 0,
    table: bytes | None = None,
    encoding: int = 2,
    parameter: int = 128,
    kind: int = 0,
    ranks: int = 3,
    positions: int = 3,
    rest: bytes = b"",
    first: dict[str, Any] | None = None,
    **options: Any,  # noqa: ANN401
) -> bytes:
    """The small page with streams replaced or added; None drops one. Its checksum is right."""
    parts = {**(first or {}), **base, **changes}
    if "lists" in changes or "ranks" in changes:
        parts.pop("ids")
    body = packed_body({name: value for name, value in parts.items() if value is not None}, **options) + rest
    owner = name_of(small()[0]) + (hashlib.sha256(table).digest() if table is not None else b"")
    shape = PageShape(kind, 0, ranks, positions)
    return seal_page(body, shape, encoding=encoding, parameter=parameter, flags=flags, owner=owner)


def name_of(rollout: Rollout) -> bytes:
    return rollout_hash(rollout.token_ids, FINGERPRINT)


def replaced(column: str, make: Callable[[], bytes]) -> Callable[[int, str, bytes], bytes]:
    """The page of row 0 in this column is another one."""
    return lambda row, name, page: make() if (row, name) == (0, column) else page


TABLE_LISTS = 2


def table_bytes(
    *,
    magic: bytes = b"OPDIDS1\0",
    vocab_size: int = 300,
    n_lists: int = TABLE_LISTS,
    by_rank: Sequence[int] | None = None,
    lists: Sequence[int] | bytes | None = None,
    rest: bytes = b"",
    planes: int | None = None,
) -> bytes:
    """An id table of 300 ids: rank r is id 7 r modulo 300, list i is ranks 15 i to 15 i + 254."""
    if by_rank is None:
        by_rank = [7 * rank % 300 for rank in range(300)]
    if lists is None:
        lists = [15 * number + code for number in range(TABLE_LISTS) for code in range(255)]
    listed = lists if isinstance(lists, bytes) else stream(lists, planes=planes)
    return struct.pack("<8sII", magic, vocab_size, n_lists) + stream(by_rank, planes=planes) + listed + rest


TABLE = table_bytes()
RANK_OF = {7 * rank % 300: rank for rank in range(300)}
RANKS = [RANK_OF[i] for i in IDS.ravel().tolist()]
_STARTS = np.repeat([0, 15, 0], 3).tolist()
CODES = [r - s if 0 <= r - s < 255 else 255 for r, s in zip(RANKS, _STARTS, strict=True)]
ESCAPED = [rank for rank, code in zip(RANKS, CODES, strict=True) if code == 255]


# --- Caches with one broken rule ---


@dataclasses.dataclass
class Build:
    """The parts of a small cache, each to be changed before the next is made from it."""

    values: list[Rollout] = dataclasses.field(default_factory=lambda: rollouts(2, 8))
    n_shards: int = 1
    schema: CacheSchema = SCHEMA
    meta: opd_store.CacheMeta = META
    table: bytes | None = None
    """The id table file; pages do not refer to it unless `page` makes them."""
    page: Callable[[int, str, bytes], bytes] = lambda row, column, page: page
    """Gets each page with its row and column."""
    column: Callable[[str, pa.Array], pa.Array] = lambda name, array: array
    batch: Callable[[pa.RecordBatch], pa.RecordBatch] = lambda batch: batch
    arrow: Callable[[pa.Schema], pa.Schema] = lambda schema: schema
    encode: Callable[[Rollout], dict[str, bytes]] | None = None
    """Gives all pages of a rollout, instead of `opd_store`."""
    compression: str | None = None
    table_compression: str | None = None
    shard: Callable[[bytes], bytes] = lambda data: data
    """Gets the bytes of the first shard; region checksums and digests follow what it returns."""
    cuts: Callable[[list[Region]], list[Region]] = lambda regions: regions
    """Gets the regions of the first shard; their checksums follow what it returns."""
    info: Callable[[ShardInfo], ShardInfo] = lambda info: info
    """Gets the first shard's entry in the index."""
    hashes: Callable[[list[list[bytes]]], list[list[bytes]]] = lambda hashes: hashes
    shard_table: Callable[[bytes], bytes] = lambda data: data
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
            self.shard_table(encode_shard_table(infos)),
            arrow_file(self.rollout_table(table), self.table_compression),
        ):
            refs.append(FileRef(hashlib.sha256(data).digest(), len(data)))
            (path / refs[-1].path).write_bytes(data)
        counts = {
            name: sum(getattr(i, name) for i in infos)
            for name in ("rows", "tokens", "response_tokens", "n_bytes")
        }
        segment = SegmentRef(
            shards=refs[0], rollouts=refs[1], n_shards=self.n_shards, **counts, max_error=0.0
        )
        segment = self.segment(segment)
        table_ref = None
        if self.table is not None:
            table_ref = FileRef(hashlib.sha256(self.table).digest(), len(self.table), layout.TABLE_DIR)
            (path / layout.TABLE_DIR).mkdir()
            (path / table_ref.path).write_bytes(self.table)
        manifest = Manifest(
            sequence=1,
            parent=None,
            meta=self.meta,
            schema=self.schema,
            segments=(segment,),
            id_table=table_ref,
        )
        text = encode_manifest(manifest).decode()
        body = self.manifest(text[: text.index(',\n "checksum"')])
        (path / layout.manifest_path(1)).write_bytes(signed(body))

    def _shard(self, rows: list[Rollout], *, first: bool) -> tuple[ShardInfo, list[bytes], bytes]:
        builder = BatchBuilder(self.schema)
        if self.encode is not None:
            builder._encoded = lambda kind, columns, rollout, name, stored: EncodedPages(
                [self.encode(rollout)[column.name] for column in columns], rollout.topk_ids, 0.0
            )
        names = [name_of(r) for r in rows]
        for rollout, name in zip(rows, names, strict=True):
            builder.add(rollout, name)
        batch = builder.take()
        if first:
            batch = self.batch(self._changed(batch))
        sink = io.BytesIO()
        schema = self.arrow(arrow_schema(self.schema))
        batch = batch.replace_schema_metadata(schema.metadata)
        shard = ShardWriter(sink, schema)
        shard.write(batch)
        # Of the rollouts as given, whatever a column was changed to.
        row_tokens = np.array([len(rollout.token_ids) for rollout in rows], np.uint32)
        row_response_tokens = np.array([rollout.response_len for rollout in rows], np.uint32)
        info = dataclasses.replace(
            shard.finish(),
            tokens=int(row_tokens.sum()),
            response_tokens=int(row_response_tokens.sum()),
            row_tokens=row_tokens,
            row_response_tokens=row_response_tokens,
        )
        data = sink.getvalue()
        if first:
            if self.compression:
                data = arrow_file(batch, self.compression)
                info = recut(info, data, schema)
            data = self.shard(data)
            info = resealed(dataclasses.replace(info, regions=tuple(self.cuts(list(info.regions)))), data)
            info = self.info(info)
        return info, names, data

    def _changed(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        arrays = []
        for field, array in zip(batch.schema, batch.columns, strict=True):
            if pa.types.is_binary(field.type):
                pages = [self.page(row, field.name, page) for row, page in enumerate(array.to_pylist())]
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


def buffers_of(message: bytes) -> tuple[int, list[tuple[int, int]], int]:
    """Start of the body, (offset in it, length) of its buffers, and where the message lists them."""
    body = 8 + int.from_bytes(message[4:8], "little")
    root = arrow_message._Table.root(message[8:body])
    buffers = root.table(arrow_message._MESSAGE_HEADER).structs(
        arrow_message._BATCH_BUFFERS, arrow_message._BUFFER
    )
    listed = b"".join(arrow_message._BUFFER.pack(*buffer) for buffer in buffers)
    assert message.count(listed) == 1
    return body, buffers, message.index(listed)


def recut(info: ShardInfo, data: bytes, schema: pa.Schema) -> ShardInfo:
    """The index entry of another file with one record batch, cut where its metadata says."""
    ((offset, length),) = arrow_message.record_batches(pa.py_buffer(data))
    body, buffers, _ = buffers_of(data[offset : offset + length])
    starts = part_starts([(body + at, size) for at, size in buffers], schema, length)
    ends = [0, *(offset + start for start in starts), offset + length, len(data)]
    regions = [Region(start, end - start, 0, 0) for start, end in itertools.pairwise(ends)]
    regions[1] = dataclasses.replace(regions[1], rows=info.rows)
    return dataclasses.replace(info, n_bytes=len(data), regions=tuple(regions))


def signed(body: str) -> bytes:
    """A manifest file out of its text before the checksum line."""
    raw = body.encode("utf-8", "surrogatepass")
    return raw + f',\n "checksum": "sha256:{hashlib.sha256(raw).hexdigest()}"\n}}\n'.encode()


def with_header(position: int, value: int, size: int = 1) -> Callable[[int, str, bytes], bytes]:
    """Change header bytes of the first page of row 0, and make its own checksum right again."""

    def change(row: int, column: str, page: bytes) -> bytes:
        if (row, column) != (0, "topk_0_2"):
            return page
        return with_crc(page[:position] + value.to_bytes(size, "little") + page[position + size :])

    return change


def with_crc(page: bytes) -> bytes:
    checksum = crc32c(page[24:], crc32c(name_of(rollouts(1, 8)[0]) + page[:20]))
    return page[:20] + checksum.to_bytes(4, "little") + page[24:]


def with_body(
    change: Callable[[bytes], bytes], padding: bytes = b"", column: str = "topk_0_2"
) -> Callable[[int, str, bytes], bytes]:
    """Change the body of a page of row 0; header and checksum fit it."""

    def page_of(row: int, name: str, page: bytes) -> bytes:
        if (row, name) != (0, column):
            return page
        _, flags, start, end, _, positions, body_bytes, _, _ = layout.PAGE_HEADER.unpack_from(page)
        shape = PageShape(flags >> 4, start, end, positions)
        body = change(page[24 : 24 + body_bytes])
        sealed = seal_page(body, shape, encoding=0, parameter=0, flags=0, owner=name_of(rollouts(1, 8)[0]))
        return with_crc(sealed[: len(sealed) - len(padding)] + padding) if padding else sealed

    return page_of


def with_words(words: dict[int, float | int], column: str = "topk_0_2") -> Callable[[int, str, bytes], bytes]:
    """Set 4-byte words of a plain page of row 0.

    `topk_0_2` has ids in words 0-5, log-probs in 6-11, tails in 12-14; `topk_2_3` ids in 0-2, log-probs in
    3-5, tails in 6-8.
    """

    def change(body: bytes) -> bytes:
        raw = bytearray(body)
        for index, value in words.items():
            kind = np.uint32 if isinstance(value, int) else np.float32
            raw[4 * index : 4 * index + 4] = np.array(value, kind).tobytes()
        return bytes(raw)

    return with_body(change, column=column)


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


def with_null_list_of_items(found: str, array: pa.Array) -> pa.Array:
    """A null list whose offsets still span values."""
    if found != "teacher_logprob":
        return array
    validity = pa.array([False] + [True] * (len(array) - 1)).buffers()[1]
    return pa.Array.from_buffers(
        array.type, len(array), [validity, array.buffers()[1]], children=[array.values]
    )


def with_bad_utf8(found: str, array: pa.Array) -> pa.Array:
    if found != "label":
        return array
    offsets = pa.py_buffer(np.array([0, 1, 1], np.int32).tobytes())
    return pa.Array.from_buffers(pa.utf8(), 2, [None, offsets, pa.py_buffer(b"\xff")])


def with_region(number: int, **changes: Any) -> Callable[[ShardInfo], ShardInfo]:  # noqa: ANN401
    def change(info: ShardInfo) -> ShardInfo:
        regions = list(info.regions)
        regions[number] = dataclasses.replace(regions[number], **changes)
        return dataclasses.replace(info, regions=tuple(regions))

    return change


def joined(first: int) -> Callable[[list[Region]], list[Region]]:
    """Two regions as one."""

    def change(regions: list[Region]) -> list[Region]:
        one, two = regions[first : first + 2]
        both = dataclasses.replace(one, length=one.length + two.length)
        return [*regions[:first], both, *regions[first + 2 :]]

    return change


def halved(number: int) -> Callable[[list[Region]], list[Region]]:
    """One region as two."""

    def change(regions: list[Region]) -> list[Region]:
        one = regions[number]
        half = one.length // 16 * 8
        left = dataclasses.replace(one, length=half)
        right = Region(one.offset + half, one.length - half, 0, 0)
        return [*regions[:number], left, right, *regions[number + 1 :]]

    return change


def shifted(number: int, by: int) -> Callable[[list[Region]], list[Region]]:
    """The start of a region, and with it the end of the one before, is moved."""

    def change(regions: list[Region]) -> list[Region]:
        left, right = regions[number - 1 : number + 1]
        left = dataclasses.replace(left, length=left.length + by)
        right = dataclasses.replace(right, offset=right.offset + by, length=right.length - by)
        return [*regions[: number - 1], left, right, *regions[number + 1 :]]

    return change


def emptied(number: int) -> Callable[[list[Region]], list[Region]]:
    """A region of no bytes, the next one takes them."""
    return lambda regions: shifted(number + 1, -regions[number].length)(regions)


def buffer_elsewhere(data: bytes) -> bytes:
    """The values of token_ids lie in the part of the first packed column."""
    ((offset, length),) = arrow_message.record_batches(pa.py_buffer(data))
    _, buffers, place = buffers_of(data[offset : offset + length])
    # Scalars have 2 buffers or 3 for a text, lists 4; of the last one of two packed columns the pages.
    at, n_bytes = 3 * 3 + 2 * 5 + 3, 4 * sum(len(rollout.token_ids) for rollout in rollouts(2, 8))
    assert buffers[at][1] == n_bytes
    place += offset + 16 * at
    return data[:place] + struct.pack("<qq", buffers[-1][0], n_bytes) + data[place + 16 :]


def buffer_unaligned(data: bytes) -> bytes:
    """The first buffer, which holds nothing, begins 4 bytes later."""
    ((offset, length),) = arrow_message.record_batches(pa.py_buffer(data))
    _, buffers, place = buffers_of(data[offset : offset + length])
    place += offset
    assert buffers[0] == (0, 0)
    return data[:place] + struct.pack("<qq", 4, 0) + data[place + 16 :]


def buffer_too_many(data: bytes) -> bytes:
    """The list of buffers ends one early."""
    ((offset, length),) = arrow_message.record_batches(pa.py_buffer(data))
    _, buffers, place = buffers_of(data[offset : offset + length])
    place += offset - 4
    assert data[place : place + 4] == struct.pack("<I", len(buffers))
    return data[:place] + struct.pack("<I", len(buffers) - 1) + data[place + 4 :]


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


def without(pattern: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        Build(values=small(), schema=GIVEN, meta=META300, table=TABLE).write(path)
        sorted(path.glob(pattern))[0].unlink()

    return make


def damaged(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        Build(values=small(), schema=GIVEN, meta=META300, table=TABLE).write(path)
        file = sorted(path.glob(pattern))[0]
        file.write_bytes(change(file.read_bytes()))

    return make


def misnamed(path: Path) -> None:
    Build().write(path)
    (path / layout.manifest_path(1)).rename(path / layout.manifest_path(2))


def swapped(path: Path) -> None:
    Build(n_shards=2).write(path)
    one, two = sorted((path / "shards").iterdir())
    left, right = one.read_bytes(), two.read_bytes()
    one.write_bytes(right)
    two.write_bytes(left)


def built(**parts: Any) -> Callable[[Path], None]:  # noqa: ANN401
    return lambda path: Build(**parts).write(path)


def manifest(old: str, new: str, **parts: Any) -> Callable[[Path], None]:  # noqa: ANN401
    """One replacement in the text of a manifest."""
    return built(manifest=text(old, new), **parts)


def later(field: str) -> Callable[[Path], None]:
    """Format 1.1 with an unknown field, which is ignored but keeps the limits."""

    def change(whole: str) -> str:
        return text('"sequence": 1', f'"sequence": 1, {field}')(text('"1.0"', '"1.1"')(whole))

    return built(manifest=change)


def rewrite_history(path: Path, change: Callable[[str], str], versions: int) -> None:
    """Change the first version, and let every later one name the digest of the one before it."""
    for number in range(1, versions + 1):
        file = path / layout.manifest_path(number)
        whole = file.read_text()
        body = whole[: whole.index(',\n "checksum"')]
        if number == 1:
            body = change(body)
        else:
            start = body.index('"parent": "') + 11
            before = (path / layout.manifest_path(number - 1)).read_bytes()
            body = body[:start] + "sha256:" + hashlib.sha256(before).hexdigest() + body[start + 71 :]
        file.write_bytes(signed(body))


def first_version(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Three versions, of which the first is another one."""

    def make(path: Path) -> None:
        write(path, [[value] for value in rollouts(3, 8)], bands=(2, 3))
        shutil.rmtree(path / "tmp", ignore_errors=True)
        rewrite_history(path, change, 3)

    return make


def history(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path, [rollouts(2, 8)[:1], rollouts(2, 8)[1:]], bands=(2, 3))
        shutil.rmtree(path / "tmp", ignore_errors=True)
        change(path / layout.manifest_path(1))

    return make


def removed_under(word: Callable[[str], str], number: int = 2) -> Callable[[Path], None]:
    """Versions 1 and 2 of three are gone; `word` makes what the file of that number says of a digest."""

    def make(path: Path) -> None:
        write(path, [[value] for value in rollouts(3, 8)], bands=(2, 3))
        shutil.rmtree(path / "tmp", ignore_errors=True)
        digest = hashlib.sha256((path / layout.manifest_path(2)).read_bytes()).hexdigest()
        for version in (1, 2):
            (path / layout.manifest_path(version)).unlink()
        (path / layout.removed_path(number)).write_text(word("sha256:" + digest))

    return make


def tables_differ(path: Path) -> None:
    """The first version names another id table than the second; no page of it uses one."""
    values = small()
    write(path, [values[:1]], meta=META300, bands=(3,), encoding="ladder/128", id_table="auto")
    with opd_store.append(path) as writer:
        writer._builder.id_table, writer._sample = example_table(1), None
        writer.append(values[1])
    shutil.rmtree(path / "tmp", ignore_errors=True)
    other = example_table(2).to_bytes()
    digest = hashlib.sha256(other).hexdigest()
    (path / layout.TABLE_DIR / f"{digest}.ids").write_bytes(other)
    entry = f'"id_table": {{"sha256": "{digest}", "n_bytes": {len(other)}}}'
    rewrite_history(path, text('"id_table": null', entry), 2)


def many_segments(whole: str) -> str:
    start = whole.index('"segments": [') + 13
    end = whole.rindex("]")
    return whole[:start] + ",".join([whole[start:end]] * (layout.MAX_SEGMENTS + 1)) + whole[end:]


def large_region(info: ShardInfo) -> ShardInfo:
    last = dataclasses.replace(info.regions[-1], length=layout.MAX_BATCH_BYTES + 1)
    return dataclasses.replace(info, regions=(*info.regions[:-1], last), n_bytes=last.offset + last.length)


def without_batch(data: bytes) -> bytes:
    """The schema's message again where the metadata of the record batch was."""
    start = data.index(b"\xff\xff\xff\xff", 12)
    return data[: start + 8] + bytes(64) + data[start + 72 :]


def pages_swapped(batch: pa.RecordBatch) -> pa.RecordBatch:
    swapped_pages = batch.column("topk_0_3").take(pa.array([1, 0]))
    return batch.set_column(len(batch.schema) - 1, batch.schema.field("topk_0_3"), swapped_pages)


def longer(row: int, column: str, page: bytes) -> bytes:
    return with_crc(page + bytes(8)) if (row, column) == (0, "topk_0_2") else page


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def shard_table(change: Callable[[dict[str, Any]], None], **parts: Any) -> Callable[[Path], None]:  # noqa: ANN401
    """Change the row of the first shard in the shard table, without `opd_store` looking."""

    def apply(data: bytes) -> bytes:
        rows = pa.ipc.open_file(data).get_batch(0).to_pylist()
        change(rows[0])
        return arrow_file(pa.RecordBatch.from_pylist(rows, schema=SHARD_TABLE), None)

    return built(shard_table=apply, **parts)


def other_index(path: Path) -> None:
    """The rollout table in the place of the shard table."""
    build = Build()
    build.segment = lambda segment: dataclasses.replace(segment, shards=segment.rollouts)
    build.write(path)


def two_batches(data: bytes) -> bytes:
    batch = pa.ipc.open_file(data).get_batch(0)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def renamed_shard(path: Path) -> None:
    """A shard under the digest of other bytes, with right lengths and region checksums."""
    Build(info=lambda info: dataclasses.replace(info, sha256=bytes(32))).write(path)


def packed(changes: dict[str, Any], **options: Any) -> Callable[[Path], None]:  # noqa: ANN401
    """A cache whose first page has other streams; see `packed_page`."""
    schema = options.pop("schema", PACKED)
    parts = {"table": options.pop("file")} if "file" in options else {}
    page = replaced("topk_0_3", lambda: packed_page(changes, **options))
    return built(values=small(), schema=schema, meta=META300, page=page, **parts)


def f32(changes: dict[str, Any], **options: Any) -> Callable[[Path], None]:  # noqa: ANN401
    schema = dataclasses.replace(PACKED, encoding="f32")
    return packed(changes, schema=schema, base=f32_parts(), encoding=1, parameter=0, **options)


def listed(changes: dict[str, Any], **options: Any) -> Callable[[Path], None]:  # noqa: ANN401
    """The small page with ids as codes in lists."""
    codes = {"mode": [2], "lists": [0, 1, 0], "codes": CODES, "escaped": ESCAPED}
    options = {"schema": GIVEN, "file": TABLE, "table": TABLE, "flags": 2} | options
    return packed({**codes, **changes}, **options)


def ragged(counts: Sequence[int], changes: dict[str, Any], **options: Any) -> Callable[[Path], None]:  # noqa: ANN401
    """The small page as one with rows of `counts` ranks, streams cut to fit."""
    keep = [min(count, 3) for count in counts]
    rows = [list(range(3))[:count] for count in keep]
    units = [UNITS[t].tolist()[: len(row)] for t, row in enumerate(rows)]
    steps = [b - a for row in units for a, b in itertools.pairwise(row)]
    base: dict[str, Sequence[int] | bytes] = {
        "counts": list(counts),
        "tail": PARTS["tail"],
        "heads": [row[0] for row in units if row],
        "steps": [min(step, 255) for step in steps],
        "long": [step - 255 for step in steps if step >= 255],
        "mode": [0],
        "ids": [int(IDS[t, j]) for t, row in enumerate(rows) for j in row],
    }
    schema = options.pop("schema", dataclasses.replace(PACKED, cut=Cut("given")))
    return packed(changes, schema=schema, base=base, flags=1, **options)


def frame_case(payload: bytes, **options: Any) -> Callable[[Path], None]:  # noqa: ANN401
    """The nine bytes of the id stream are claimed to be in this zstd frame."""
    return packed({"ids": b"\x01" + framed(payload)}, schema=PACKED, **options)


def zstd_frame(content: bytes, *, declared: int, descriptor: int = 0x80, window: int = 0) -> bytes:
    """A frame of one raw block, by RFC 8878, section 3.1.1."""
    header = struct.pack("<IBBI", 0xFD2FB528, descriptor, window, declared)
    return header + (len(content) << 3 | 1).to_bytes(3, "little") + content


NINE = bytes(i % 256 for i in IDS.ravel().tolist())
assert len(NINE) == 9
COMPRESSOR = zstandard.ZstdCompressor(level=1, write_checksum=False)
FRAME = zstd_frame(NINE, declared=9)
SKIPPABLE = struct.pack("<II", 0x184D2A50, 0)


def sampled_values() -> list[Rollout]:
    """Rows of two, one and no drawn ids."""
    ids = np.array([[1, 2], [3, NO_ID], [NO_ID, NO_ID]], np.uint32)
    logprob = np.where(ids == NO_ID, np.float32(-np.inf), np.float32([[-1, -2], [-1, 0], [0, 0]]))
    return [
        dataclasses.replace(
            value,
            sampled_ids=ids,
            sampled_logprob=logprob,
            sampled_log_tail=np.float32([-1, -1, -0.0]),
            sampled_draws=np.array([[5, 1], [7, 0], [0, 0]], np.uint32),
        )
        for value in rollouts(2, 8, topk=0)
    ]


def sampled(words: dict[int, float | int]) -> Callable[[Path], None]:
    """Words of a plain page of two draws: ids 0-5, log-probs 6-11, tails 12-14, draws 15-20."""
    schema = CacheSchema(sampled=2)
    return built(values=sampled_values(), schema=schema, page=with_words(words, "sampled"))


def chosen(words: dict[int, float | int]) -> Callable[[Path], None]:
    """The same for chosen ids, which have no draws."""
    values = [
        dataclasses.replace(
            value,
            sampled_ids=None,
            sampled_logprob=None,
            sampled_log_tail=None,
            sampled_draws=None,
            chosen_ids=value.sampled_ids,
            chosen_logprob=value.sampled_logprob,
            chosen_log_tail=value.sampled_log_tail,
        )
        for value in sampled_values()
    ]
    return built(values=values, schema=CacheSchema(chosen=2), page=with_words(words, "chosen"))


def plain(words: dict[int, float | int], **parts: Any) -> Callable[[Path], None]:  # noqa: ANN401
    return built(page=with_words(words), **parts)


def second(words: dict[int, float | int], **parts: Any) -> Callable[[Path], None]:  # noqa: ANN401
    return built(page=with_words(words, "topk_2_3"), **parts)


def table_file(*, meta: opd_store.CacheMeta = META300, **changes: Any) -> Callable[[Path], None]:  # noqa: ANN401
    return built(values=small(), schema=GIVEN, meta=meta, table=table_bytes(**changes))


def oversized(path: Path) -> None:
    """Nothing in it is large but what the page would be once decoded: 1,366 positions of 4,096 ranks."""
    schema = CacheSchema(topk=4096, bands=(4096,), encoding="f32", id_table="none")
    token_ids = np.zeros(1367, np.uint32)
    owner = rollout_hash(token_ids, FINGERPRINT)
    page = seal_page(
        b"\0\0\1" + plane(b"\0") + b"\0",
        PageShape(0, 0, 4096, 1366),
        encoding=1,
        parameter=0,
        flags=0,
        owner=owner,
    )
    build = Build(values=[Rollout(token_ids=token_ids, prompt_len=1)], schema=schema, meta=example_meta(5000))
    build.encode = lambda rollout: {"topk_0_4096": page}
    build.write(path)


GIVEN = dataclasses.replace(PACKED, id_table="given")
AUTO = dataclasses.replace(PACKED, id_table="auto")
CUT = dataclasses.replace(SCHEMA, cut=Cut("given"))
Case = tuple[str, str, Callable[[Path], None], str]
INVALID: dict[str, Case] = {}
"""Name: (stage at which opd_store refuses, error class, maker, rule)."""


def add(
    name: str, make: Callable[[Path], None], rule: str, *, stage: str = "", error: str = "FormatError"
) -> None:
    assert name not in INVALID, name
    at_open = ("manifest", "meta", "schema", "segment", "index")
    usual = "open" if name.split("-")[0] in at_open else "read"
    INVALID[name] = (stage or usual, error, make, rule)


INTEGRITY = {"error": "IntegrityError"}
UNSUPPORTED = {"error": "UnsupportedVersionError"}
VERIFY = {"stage": "verify"}

# manifest.md, section 2: bytes
add("manifest-none", without("manifests/*"), "a cache has a manifest", error="CacheNotFoundError")
add("manifest-bit", damaged("manifests/*", lambda d: flip(d, 99)), "checksum", **INTEGRITY)
add("manifest-cut", damaged("manifests/*", lambda d: d[:-1]), "last line", **INTEGRITY)
add("manifest-longer", damaged("manifests/*", lambda d: d + b"\n"), "last line", **INTEGRITY)
add("manifest-empty", damaged("manifests/*", lambda d: b""), "last line", **INTEGRITY)
add("manifest-renamed", misnamed, "sequence is the number in the name", **INTEGRITY)
add("manifest-large", manifest("{", "{" + " " * (1 << 20)), "at most MAX_MANIFEST_BYTES", **INTEGRITY)
add("manifest-byte-order-mark", built(manifest=lambda whole: "\ufeff" + whole), "no byte order mark")
add("manifest-not-utf8", manifest('"name": "example"', '"name": "\udcff"'), "UTF-8")
add("manifest-not-json", manifest('"sequence": 1', '"sequence": 01'), "JSON")
add("manifest-array", built(manifest=lambda whole: "[" + whole), "one JSON object")
add("manifest-duplicate-key", manifest('"sequence": 1', '"sequence": 1, "sequence": 1'), "no duplicate keys")
add("manifest-nan", manifest('"vocab_size": 50', '"vocab_size": NaN'), "no NaN")
add("manifest-infinity", manifest('"max_error": 0.0', '"max_error": Infinity'), "no infinities")
add("manifest-overflow", manifest('"max_error": 0.0', '"max_error": 1e999'), "numbers fit float64")
add("manifest-large-integer", manifest('"vocab_size": 50', '"vocab_size": 9007199254740992'), "integers")
add("manifest-half-pair", manifest('"name": "example"', '"name": "\\ud800"'), "no half of a surrogate pair")
add("manifest-long-string", manifest('"example"', f'"{"x" * 4097}"'), "at most MAX_JSON_STRING characters")
add("manifest-long-key", manifest('"meta": {', f'"meta": {{"{"x" * 4097}": 1,'), "keys are strings too")
add("manifest-deep", later(f'"colour": {nested(16)}'), "at most MAX_JSON_DEPTH levels")
add("manifest-very-deep", later(f'"colour": {nested(20000)}'), "at most MAX_JSON_DEPTH levels")
add("manifest-long-integer", manifest('"vocab_size": 50', f'"vocab_size": {"9" * 5000}'), "integers")

# manifest.md, section 3: fields
add("manifest-format", manifest('"opd-store"', '"opd-shop"'), "the format's name")
add("manifest-version-text", manifest('"1.0"', '"1.00"'), "MAJOR.MINOR without leading zeros")
add("manifest-major-2", manifest('"1.0"', '"2.0"'), "another major version", **UNSUPPORTED)
add(
    "manifest-unknown-field",
    manifest('"sequence": 1', '"sequence": 1, "colour": 1'),
    "no unknown fields in 1.0",
)
add("manifest-missing-field", manifest('"unreleased": true,', ""), "all fields are there")
add("manifest-no-id-table", manifest('"id_table": null,\n', ""), "all fields are there")
add("manifest-unreleased-1", manifest('"unreleased": true', '"unreleased": 1'), "a boolean is not a number")
add("manifest-sequence-0", manifest('"sequence": 1', '"sequence": 0'), "versions are numbered from 1")
add("manifest-sequence-1.0", manifest('"sequence": 1', '"sequence": 1.0'), "a fraction is not an integer")
add("manifest-sequence-true", manifest('"sequence": 1', '"sequence": true'), "a boolean is not a number")
add(
    "manifest-orphan", manifest('"parent": null', f'"parent": "sha256:{"0" * 64}"'), "version 1 has no parent"
)
add("manifest-parent-text", manifest('"parent": null', '"parent": "none"'), "a parent is a digest")
add(
    "manifest-required-feature",
    manifest('"required_features": []', '"required_features": ["zip"]'),
    "unknown required feature",
    **UNSUPPORTED,
)
add(
    "manifest-feature-1",
    manifest('"optional_features": []', '"optional_features": [1]'),
    "features are names",
)

# manifest.md, section 4: meta
add("meta-vocabulary-0", manifest('"vocab_size": 50', '"vocab_size": 0'), "vocab_size is at least 1")
add("meta-vocabulary-large", manifest('"vocab_size": 50', '"vocab_size": 16777217'), "at most MAX_VOCAB")
add("meta-vocabulary-small", manifest('"vocab_size": 50', '"vocab_size": 2'), "topk <= vocab_size")
add("meta-fingerprint", manifest('"sha256:5e', '"sha256:5E'), "digests are lower-case")
add("meta-no-fingerprint", manifest('"tokenizer_fingerprint"', '"licence"'), "the fingerprint is there")
add("meta-unknown-field", manifest('"vocab_size"', '"colour": 1, "vocab_size"'), "no unknown fields in 1.0")
add("meta-null", manifest('"vocab_size"', '"licence": null, "vocab_size"'), "unknown is absent, not null")
add("meta-model", manifest('"name": "example"', '"name": 1'), "types of a model")
add("meta-sampler", manifest('"vocab_size"', '"sampler": {"top_k": 1.0}, "vocab_size"'), "types of a sampler")
add("meta-extra", manifest('"vocab_size"', '"extra": {"a": 1}, "vocab_size"'), "a map of strings")

# manifest.md, section 5: schema
add("schema-later-encoding", manifest('"plain"', '"cubic"'), "unknown encoding", **UNSUPPORTED)
add("schema-unknown-field", manifest('"topk": 3', '"topk": 3, "colour": 1'), "no unknown fields")
add(
    "schema-later-field",
    built(manifest=lambda m: text('"topk": 3', '"topk": 3, "a": 1')(text('"1.0"', '"1.1"')(m))),
    "no unknown fields in a schema, also of a later minor version",
)
add("schema-missing-field", manifest('"sampled": 0,\n', ""), "all fields are there")
add("schema-topk-true", manifest('"topk": 3', '"topk": true'), "a boolean is not a number")
add("schema-topk-large", manifest('"topk": 3', '"topk": 4097', meta=example_meta(5000)), "topk <= MAX_TOPK")
add("schema-topk-negative", manifest('"topk": 3', '"topk": -1'), "topk >= 0")
add("schema-bands-end", manifest('"topk": 3', '"topk": 4'), "the last band ends at topk")
add("schema-bands-order", manifest("   2,\n   3", "   3,\n   3"), "bands rise")
add("schema-bands-zero", manifest("   2,\n   3", "   0,\n   3"), "bands rise from 0")
add("schema-bands-fraction", manifest("   2,\n   3", "   2.0,\n   3"), "ends are integers")
add("schema-bands-without-topk", manifest('"topk": 3', '"topk": 0'), "no bands without top-k")
add("schema-no-bands", manifest("   2,\n   3", ""), "top-k has bands")
add("schema-chosen-large", manifest('"chosen": 0', '"chosen": 51'), "chosen <= vocab_size")
add("schema-chosen-negative", manifest('"chosen": 0', '"chosen": -1'), "chosen >= 0")
add("schema-sampled-large", manifest('"sampled": 0', '"sampled": 4097', meta=example_meta(5000)), "MAX_TOPK")
add("schema-sampled-text", manifest('"sampled": 0', '"sampled": "0"'), "types of the schema")
CUTS = {
    "rule": ('{"rule": "best", "value": 0.5}', "rules of a cut"),
    "value-1": ('{"rule": "mass", "value": 1.0}', "a share is below 1"),
    "value-0": ('{"rule": "mass", "value": 0.0}', "a share is above 0"),
    "integer": ('{"rule": "mass", "value": 1}', "a share has a fraction or exponent"),
    "no-value": ('{"rule": "probability", "value": null}', "a share is there"),
    "given-value": ('{"rule": "given", "value": 0.5}', "given has no share"),
    "unknown-field": ('{"rule": "given", "value": null, "colour": 1}', "no unknown fields"),
    "text": ('"given"', "a cut is an object"),
}
for key, (value, why) in CUTS.items():
    add(f"schema-cut-{key}", manifest('"cut": null', f'"cut": {value}'), why)
_native = {"values": rollouts(1, 8, topk=0), "schema": CacheSchema()}
add(
    "schema-cut-without-topk",
    manifest('"cut": null', '"cut": {"rule": "given", "value": null}', **_native),
    "no cut without top-k",
)
_drawn = {"values": sampled_values(), "schema": CacheSchema(sampled=2)}
for key, number in (("integer", "1"), ("0", "0.0"), ("large", "100.5"), ("negative", "-1.0")):
    change = manifest('"sampled_temperature": 1.0', f'"sampled_temperature": {number}', **_drawn)
    add(f"schema-temperature-{key}", change, "a number in (0, 100] with fraction or exponent")
add(
    "schema-temperature-unused",
    manifest('"sampled_temperature": 1.0', '"sampled_temperature": 0.5'),
    "1.0 without draws",
)
add(
    "schema-table-of-plain",
    manifest('"id_table": "none"', '"id_table": "auto"'),
    "plain pages use no id table",
)
add(
    "schema-table-without-pages",
    manifest(
        '"id_table": "none"',
        '"id_table": "auto"',
        values=rollouts(1, 8, topk=0),
        schema=CacheSchema(encoding="f32"),
    ),
    "no id table without pages",
)
add(
    "schema-table-word",
    manifest('"id_table": "none"', '"id_table": "some"', values=small(), schema=PACKED, meta=META300),
    "none, auto or given",
)
add(
    "schema-table-not-given",
    built(
        values=small(),
        schema=PACKED,
        meta=META300,
        manifest=text('"id_table": "none"', '"id_table": "given"'),
    ),
    "a given id table is there",
)
add(
    "schema-table-unexpected",
    built(
        values=small(),
        schema=GIVEN,
        meta=META300,
        table=TABLE,
        manifest=text('"id_table": "given"', '"id_table": "none"'),
    ),
    "no id table where the schema says none",
)
add(
    "schema-user-name",
    manifest('"user_columns": {}', '"user_columns": {"y_a": "int64"}'),
    "names of user columns",
)
add(
    "schema-user-long-name",
    manifest('"user_columns": {}', f'"user_columns": {{"x_{"a" * 63}": "int64"}}'),
    "names of user columns",
)
add(
    "schema-user-type",
    manifest('"user_columns": {}', '"user_columns": {"x_a": "int32"}'),
    "types of user columns",
)
add("schema-user-type-1", manifest('"user_columns": {}', '"user_columns": {"x_a": 1}'), "types are texts")

# manifest.md, section 6: segments
add("segment-rows-0", manifest('"rows": 2', '"rows": 0'), "counts are at least 1")
add("segment-rows-text", manifest('"rows": 2', '"rows": "2"'), "counts are integers")
add("segment-unknown-field", manifest('"rows": 2', '"rows": 2, "colour": 1'), "no unknown fields in 1.0")
add("segment-missing-field", manifest(',\n   "max_error": 0.0', ""), "all fields are there")
add(
    "segment-error-integer",
    manifest('"max_error": 0.0', '"max_error": 0'),
    "max_error has a fraction or exponent",
)
add("segment-error-negative", manifest('"max_error": 0.0', '"max_error": -0.5'), "max_error is at least 0")
add("segment-path", manifest('"sha256": "', '"sha256": "../'), "files are named by digest")
add(
    "segment-file-empty",
    manifest('"n_bytes": ', '"n_bytes": 0, "n_sheets": '),
    "a file has a byte, and no other fields",
)
add("segment-file-text", manifest('"shards": {', '"shards": "a", "x": {'), "a file is an object")
add("segment-too-many", built(manifest=many_segments), "at most MAX_SEGMENTS")
for key in ("n_shards", "rows", "tokens", "response_tokens", "n_bytes"):
    change = built(segment=lambda s, key=key: dataclasses.replace(s, **{key: getattr(s, key) + 1}))
    add(f"segment-{key.replace('_', '-')}", change, f"{key} is that of the shard table", **INTEGRITY)
add(
    "segment-table-path",
    built(
        values=small(),
        schema=GIVEN,
        meta=META300,
        table=TABLE,
        manifest=text('"id_table": {\n  "sha256": "', '"id_table": {\n  "sha256": "../'),
    ),
    "files are named by digest",
)
add(
    "segment-table-large",
    built(
        values=small(),
        schema=GIVEN,
        meta=META300,
        table=TABLE,
        manifest=text(f'"n_bytes": {len(TABLE)}', '"n_bytes": 67108865'),
    ),
    "at most MAX_ID_TABLE_BYTES",
)

# manifest.md, sections 4 and 7: history
add(
    "manifest-no-parent",
    history(lambda file: file.unlink()),
    "every earlier version is there",
    **INTEGRITY,
    **VERIFY,
)
for _name, _word, _rule in (
    (
        "digest",
        lambda digest: "sha256:" + "0" * 64 + "\n",
        "the digest of the newest version that was removed",
    ),
    ("line", lambda digest: digest, "one line feed"),
    ("longer", lambda digest: digest + "\n\n", "nothing after the line feed"),
):
    add(f"manifest-removed-{_name}", removed_under(_word), _rule, **INTEGRITY, **VERIFY)
add(
    "manifest-removed-number",
    removed_under(lambda digest: digest + "\n", number=1),
    "the number of the newest version that was removed",
    **INTEGRITY,
    **VERIFY,
)
add(
    "manifest-other-parent",
    history(
        lambda file: file.write_bytes(
            signed(file.read_text()[: file.read_text().index(',\n "checksum"')] + "\n")
        )
    ),
    "the parent has its digest",
    **INTEGRITY,
    **VERIFY,
)
add(
    "manifest-broken-parent",
    first_version(text('"sequence": 1', '"sequence": 1, "colour": 1')),
    "all versions keep the rules",
    **VERIFY,
)
add(
    "manifest-other-meta",
    first_version(text('"name": "example"', '"name": "another"')),
    "all versions have the same meta",
    **VERIFY,
)
add(
    "manifest-other-schema",
    first_version(text('"user_columns": {}', '"user_columns": {"x_a": "bool"}')),
    "all versions have the same schema",
    **VERIFY,
)
add("manifest-other-id-table", tables_differ, "an id table stays the same", **VERIFY)
add(
    "manifest-falling-version", first_version(text('"1.0"', '"1.1"')), "format versions do not fall", **VERIFY
)

# format.md, section 5: index files
_find = {"stage": "find"}
add("index-missing", without("index/*"), "index files are there", stage="open or find", **INTEGRITY)
add(
    "index-bit",
    damaged("index/*", lambda d: flip(d, len(d) // 2)),
    "digest of an index file",
    stage="open or find",
    **INTEGRITY,
)
add(
    "index-cut",
    damaged("index/*", lambda d: d[:-1]),
    "length of an index file",
    stage="open or find",
    **INTEGRITY,
)
add("index-schema", other_index, "columns of an index file")
add("index-two-batches", built(shard_table=two_batches), "one record batch")
add("index-not-arrow", built(shard_table=lambda data: data[:-6] + b"ARROW2"), "an Arrow file")
add(
    "index-gap",
    built(info=lambda i: with_region(1, offset=i.regions[1].offset + 8)(i)),
    "regions follow each other",
)
add(
    "index-overlap",
    built(info=lambda i: with_region(1, offset=i.regions[1].offset - 8)(i)),
    "regions follow each other",
)
add(
    "index-short",
    built(info=lambda i: dataclasses.replace(i, n_bytes=i.n_bytes + 8)),
    "regions end where the file ends",
)
add("index-empty-region", built(cuts=emptied(3)), "no empty region")
add("index-large-region", built(info=large_region), "at most MAX_BATCH_BYTES")
add(
    "index-huge-region",
    shard_table(lambda row: row["region_length"].__setitem__(1, (1 << 64) - 8)),
    "sums do not wrap around",
)
add(
    "index-one-region",
    shard_table(
        lambda row: row.update({name: value[:1] for name, value in row.items() if name.startswith("region_")})
    ),
    "first and last region",
)
add(
    "index-lists",
    shard_table(lambda row: row.update(region_rows=row["region_rows"][:-1])),
    "lists of equal lengths",
)
add("index-rows", built(info=with_region(1, rows=3)), "rows of regions add up")
add(
    "index-rows-of-schema",
    shard_table(lambda row: row.update(region_rows=[1, 1, 0, 0, 0, 0])),
    "rows are in record batches",
)
add(
    "index-rows-of-footer",
    shard_table(lambda row: row.update(region_rows=[0, 1, 0, 0, 0, 1])),
    "rows are in record batches",
)
add(
    "index-rows-of-part",
    shard_table(lambda row: row.update(region_rows=[0, 1, 1, 0, 0, 0])),
    "only the first part of a record batch has rows",
)
add(
    "index-rows-of-last-part",
    shard_table(lambda row: row.update(region_rows=[0, 0, 0, 0, 2, 0])),
    "the first part of a record batch has its rows",
)
add("index-no-rows", shard_table(lambda row: row.update(region_rows=[0] * 6)), "a record batch has a row")
add("index-parts-joined", built(cuts=joined(2)), "a region for each part")
add("index-parts-not-cut", built(cuts=lambda r: joined(1)(joined(1)(joined(1)(r)))), "a region for each part")
add("index-parts-halved", built(cuts=halved(4)), "a region for each part")
add(
    "index-lengths-none",
    shard_table(lambda row: row.update(row_tokens=[], row_response_tokens=[])),
    "one length a rollout",
)
add(
    "index-lengths-more",
    shard_table(lambda row: row.update(row_tokens=[4, 4, 2], row_response_tokens=[3, 2, 1])),
    "one length a rollout",
)
add(
    "index-lengths-differ",
    shard_table(lambda row: row.update(row_response_tokens=[3])),
    "lists of equal lengths",
)
add(
    "index-no-response",
    shard_table(
        lambda row: row.update(row_response_tokens=[0, 3], response_tokens=3),
        segment=lambda s: dataclasses.replace(s, response_tokens=3),
    ),
    "a response has a token",
)
add(
    "index-no-prompt",
    shard_table(lambda row: row.update(row_response_tokens=[5, 1])),
    "a prompt has a token",
)
add(
    "index-long-response",
    shard_table(lambda row: row.update(row_tokens=[2, 8], row_response_tokens=[3, 3])),
    "a prompt has a token",
)
add(
    "index-long-rollout",
    shard_table(
        lambda row: row.update(row_tokens=[(1 << 22) + 1, 5], tokens=(1 << 22) + 6),
        segment=lambda s: dataclasses.replace(s, tokens=(1 << 22) + 6),
    ),
    "at most MAX_ROLLOUT_TOKENS",
)
add(
    "index-lengths-sum",
    shard_table(lambda row: row.update(row_tokens=[5, 6])),
    "lengths add up to the tokens of a shard",
)
add(
    "index-response-lengths-sum",
    shard_table(lambda row: row.update(row_response_tokens=[3, 2])),
    "lengths add up to the positions of a shard",
)
add(
    "index-row-of-no-shard",
    built(rollout_table=table("shard", lambda v: [*v[:-1], 1])),
    "rollouts point into their segment",
    **_find,
)
add(
    "index-row-of-no-batch",
    built(rollout_table=table("row", lambda v: [*v[:-1], 2])),
    "rollouts point into their shard",
    **_find,
)
add("index-rollouts", built(rollout_table=lambda b: b.slice(0, 1)), "every row is listed", **_find)
add("index-compressed", built(table_compression="zstd"), "bodies are not compressed", **_find)
add(
    "index-order-of-equals",
    built(
        values=[dataclasses.replace(rollouts(1, 8)[0], sample_id=name) for name in "ab"],
        rollout_table=unsorted,
    ),
    "rollouts of equal hash are sorted by place",
    **VERIFY,
)
add("index-unsorted", built(rollout_table=unsorted), "sorted by hash", **VERIFY)
add(
    "index-twice-the-same-row",
    built(rollout_table=table("row", lambda v: [0] * len(v))),
    "every row is listed",
    **VERIFY,
)
add(
    "index-other-hash",
    built(rollout_table=table("rollout_hash", lambda v: [bytes(32), *v[1:]])),
    "rows are listed with their hash",
    **VERIFY,
)
add(
    "index-tokens",
    built(info=lambda i: dataclasses.replace(i, tokens=i.tokens + 1)),
    "tokens of a shard",
)
add(
    "index-response-tokens",
    built(info=lambda i: dataclasses.replace(i, response_tokens=i.response_tokens + 1)),
    "positions of a shard",
)

# format.md, section 4: shards
add("shard-missing", without("shards/*"), "shards are there", **INTEGRITY)
add("shard-cut", damaged("shards/*", lambda d: d[:-1]), "length of a shard", **INTEGRITY)
add("shard-longer", damaged("shards/*", lambda d: d + b"\0"), "length of a shard", **INTEGRITY)
add("shard-bit", damaged("shards/*", lambda d: flip(d, len(d) // 2)), "checksum of a region", **INTEGRITY)
add("shard-bit-of-magic", damaged("shards/*", lambda d: flip(d, 6)), "checksum of a region", **INTEGRITY)
add("shard-swapped", swapped, "a shard is known by its digest", **INTEGRITY)
add("shard-other-digest", renamed_shard, "the digest of a shard is its name", **INTEGRITY, **VERIFY)
add(
    "shard-schema",
    manifest('"user_columns": {}', '"user_columns": {"x_a": "int64"}'),
    "columns of the manifest",
)
add("shard-metadata", built(arrow=lambda schema: schema.with_metadata({"a": "b"})), "no metadata in a schema")
add("shard-magic", built(shard=lambda d: b"ARROW2" + d[6:]), "an Arrow file", stage="read or verify")
add(
    "shard-footer",
    built(shard=lambda d: d[:-10] + b"\0\0\0\0" + d[-6:]),
    "the footer lists the record batches",
    **VERIFY,
)
add("shard-compressed", built(compression="zstd"), "bodies are not compressed")
add("shard-not-a-batch", built(shard=without_batch), "a region is a record batch")
add(
    "shard-rows",
    shard_table(
        lambda row: row.update(
            rows=3, region_rows=[0, 3, 0, 0, 0, 0], row_tokens=[4, 4, 2], row_response_tokens=[3, 2, 1]
        ),
        segment=lambda s: dataclasses.replace(s, rows=3),
        hashes=lambda h: [[*h[0], bytes(32)]],
    ),
    "rows of a record batch",
)

for number, part in enumerate(("lists", "first-band", "second-band"), 2):
    for by, where in ((8, "later"), (-8, "earlier")):
        add(f"shard-{part}-{where}", built(cuts=shifted(number, by)), "parts start where the metadata says")
add("shard-buffer-elsewhere", built(shard=buffer_elsewhere), "a buffer lies in the part of its column")
add("shard-buffer-unaligned", built(shard=buffer_unaligned), "buffers start at multiples of 8 bytes")
add("shard-buffers", built(shard=buffer_too_many), "the buffers of the columns")
add(
    "shard-lengths",
    shard_table(lambda row: row.update(row_tokens=[6, 4])),
    "rollouts of a record batch have the lengths of the index",
)
add(
    "shard-response-lengths",
    shard_table(lambda row: row.update(row_response_tokens=[2, 4])),
    "rollouts of a record batch have the lengths of the index",
)

# columns.md, sections 1 to 3
add("column-null", built(column=with_value("finish_reason", 0, None)), "no null where there is none")
add("column-null-item", built(column=with_null_item), "no null inside a list")
add("column-null-list", built(column=with_null_list_of_items), "a null list is empty")
add("column-not-utf8", built(column=with_bad_utf8), "texts are UTF-8")
add(
    "column-short", built(column=with_value("teacher_logprob", 1, [-1.0, -2.0])), "one value a response token"
)
add("column-long", built(column=with_value("loss_mask", 0, [1, 1, 1, 1])), "one value a response token")
add("column-mask-of-2", built(column=with_value("loss_mask", 0, [1, 2, 1])), "loss_mask is 0 or 1")
add("column-no-prompt", built(column=with_value("prompt_len", 0, 0)), "a prompt has a token")
add("column-no-response", built(column=with_value("prompt_len", 0, 5)), "a response has a token")
add("column-long-prompt", built(column=with_value("prompt_len", 0, 6)), "a response has a token")
add(
    "column-hash",
    built(column=with_value("token_ids", 1, [1, 2, 3, 4, 5])),
    "rollout_hash is the hash of the tokens",
    **VERIFY,
)
add("column-token", built(column=with_value("token_ids", 1, [1, 2, 3, 4, VOCAB])), "ids are below vocab_size")
add("column-nan", built(column=with_value("teacher_logprob", 0, [-1.0, NAN, -1.0])), "log-probs are finite")
add(
    "column-positive",
    built(column=with_value("behaviour_logprob", 0, [-1.0, 0.5, -1.0])),
    "log-probs are at most 0",
)
add(
    "column-infinite",
    built(column=with_value("reference_logprob", 0, [-1.0, -1.0, -INF])),
    "log-probs are finite",
)
add(
    "column-finish-reason",
    built(column=with_value("finish_reason", 0, "eos")),
    "finish_reason is one of four words",
)
add(
    "column-policy-version",
    built(column=with_value("policy_version", 0, 2**53)),
    "policy_version is within 2**53 - 1",
    **VERIFY,
)
add("column-reward", built(column=with_value("reward", 0, NAN)), "reward is finite")
add(
    "column-long-text",
    built(column=with_value("label", 0, "x" * 4097)),
    "a text has at most 4096 bytes",
    **VERIFY,
)

# format.md, section 6: pages
add("page-none", built(page=lambda *_: b""), "a page has a header")
add("page-short", built(page=lambda *_: bytes(16)), "a page has a header")
add("page-encoding", built(page=with_header(0, 1)), "the encoding of the manifest")
add("page-unknown-encoding", built(page=with_header(0, 255)), "the encoding of the manifest")
add("page-parameter", built(page=with_header(16, 1, 4)), "the parameter of the encoding")
add("page-scale", packed({}, parameter=64), "the parameter of the encoding")
add("page-flag-4", built(page=with_header(1, 4)), "flag bits 2 and 3 are zero")
add("page-flag-8", packed({}, flags=8), "flag bits 2 and 3 are zero")
add("page-plain-ragged", built(page=with_header(1, 1)), "plain pages have no flags")
add("page-plain-table", built(page=with_header(1, 2)), "plain pages have no flags", stage="read or verify")
add("page-kind", built(page=with_header(1, 16)), "the kind of support of the column")
add("page-unknown-kind", packed({}, kind=15), "the kind of support of the column")
add("page-rank-start", built(page=with_header(2, 1, 2)), "ranks of the column")
add("page-rank-end", built(page=with_header(4, 3, 2)), "ranks of the column")
add("page-reserved", built(page=with_header(6, 1, 2)), "reserved is zero")
add("page-positions", built(page=with_header(8, 4, 4)), "one position a response token")
add("page-body-bytes", built(page=with_header(12, 2**32 - 1, 4)), "length of a page")
add("page-body-bytes-0", built(page=with_header(12, 0, 4)), "length of a page")
add("page-longer", built(page=longer), "length of a page")
add("page-padding", built(page=with_body(bytes, b"\1")), "padding is zero")
add("page-body-short", built(page=with_body(lambda body: body[:-8])), "length of a plain body")
add("page-body-long", built(page=with_body(lambda body: body + bytes(4))), "length of a plain body")
add(
    "page-checksum",
    built(page=lambda row, name, page: flip(page, 20) if (row, name) == (0, "topk_0_2") else page),
    "checksum of a page",
    **INTEGRITY,
    **VERIFY,
)
add(
    "page-of-another-rollout",
    built(schema=CacheSchema(topk=3, bands=(3,)), batch=pages_swapped),
    "the checksum starts from the rollout hash",
    **INTEGRITY,
    **VERIFY,
)
add(
    "page-of-another-table",
    listed({}, table=table_bytes(planes=3)),
    "the checksum goes on with the id table",
    **INTEGRITY,
    **VERIFY,
)
add(
    "page-without-table-seed",
    listed({}, table=None),
    "the checksum goes on with the id table",
    **INTEGRITY,
    **VERIFY,
)
add("page-table-missing", packed({}, flags=2), "flag bit 1 needs an id table", stage="read or verify")
add("page-decoded-bytes", oversized, "at most MAX_DECODED_BYTES once decoded")

# encodings.md, section 2: streams
add("plane-count", packed({"ids": b"\5" + plane(NINE) * 5}), "at most 4 planes")
add("plane-short", packed({"ids": b"\1" + plane(NINE[:-1])}), "a raw plane has one byte a value")
add("plane-long", packed({"ids": b"\1" + plane(NINE + b"\0")}), "a raw plane has one byte a value")
add("plane-size", packed({"ids": b"\1\xff\xff\xff\x7f" + NINE}), "a plane ends inside the body")
add("plane-size-cut", packed({"ids": b"\1\x09"}), "a plane has a size")
add("plane-missing", packed({"ids": b"\2" + plane(NINE)}), "all planes are there")
add("plane-no-stream", packed({"ids": b""}), "all streams are there")
add("plane-left-over", packed({}, rest=b"\0"), "no bytes are left over")
add("plane-empty-body", packed(dict.fromkeys(PARTS, b"")), "all streams are there")
add("zstd-not-a-frame", frame_case(NINE), "a frame is a zstd frame")
add("zstd-empty", frame_case(b""), "a frame is a zstd frame")
add("zstd-cut", frame_case(FRAME[:-1]), "a frame is whole")
add("zstd-extra", frame_case(FRAME + b"\0"), "nothing follows the frame")
add(
    "zstd-two-frames",
    frame_case(zstd_frame(NINE[:4], declared=4) + zstd_frame(NINE[4:], declared=5)),
    "exactly one frame",
)
add("zstd-then-empty-frame", frame_case(FRAME + COMPRESSOR.compress(b"")), "exactly one frame")
add("zstd-skippable", frame_case(SKIPPABLE + FRAME), "no skippable frame")
add("zstd-then-skippable", frame_case(FRAME + SKIPPABLE), "no skippable frame")
add("zstd-only-skippable", frame_case(struct.pack("<II", 0x184D2A50, 9) + NINE), "no skippable frame")
add(
    "zstd-no-size",
    frame_case(zstd_frame(NINE, declared=9, descriptor=0)[:6] + FRAME[10:]),
    "the content size is declared",
)
add("zstd-size-short", frame_case(zstd_frame(NINE[:-1], declared=8)), "one byte a value")
add("zstd-size-long", frame_case(zstd_frame(NINE + b"\0", declared=10)), "one byte a value")
add(
    "zstd-bomb",
    frame_case(COMPRESSOR.compress(bytes(1 << 26))),
    "one byte a value, before anything is allocated",
)
add(
    "zstd-bomb-of-4-gib",
    frame_case(zstd_frame(NINE, declared=(1 << 32) - 1)),
    "one byte a value, before anything is allocated",
)
add("zstd-lies-short", frame_case(zstd_frame(NINE[:-1], declared=9)), "the declared size is true")
add("zstd-lies-long", frame_case(zstd_frame(NINE + b"\0", declared=9)), "the declared size is true")
add(
    "zstd-dictionary", frame_case(FRAME[:4] + bytes([0x81]) + FRAME[5:6] + b"\7" + FRAME[6:]), "no dictionary"
)
add("zstd-checksum", frame_case(zstandard.ZstdCompressor(write_checksum=True).compress(NINE)), "no checksum")
add("zstd-window", frame_case(zstd_frame(NINE, declared=9, window=0x69)), "a window of at most 8 MiB")
add("zstd-large-window", frame_case(zstd_frame(NINE, declared=9, window=0xA8)), "a window of at most 8 MiB")
add("zstd-reserved-bit", frame_case(zstd_frame(NINE, declared=9, descriptor=0x88)), "a frame is a zstd frame")
add("zstd-damaged", frame_case(FRAME[:10] + b"\xff" + FRAME[11:]), "a frame opens")
_none = {"heads": [400] * 3, "steps": [10, 1, 0, 5, 1, 1], "long": b"\1" + framed(COMPRESSOR.compress(b""))}
add("zstd-of-nothing", packed(_none), "a plane of no values is raw")
add(
    "zstd-of-nothing-and-more",
    packed({**_none, "long": b"\1" + framed(COMPRESSOR.compress(b"") + b"more")}),
    "a plane of no values is raw",
)
add(
    "zstd-of-nothing-skippable",
    packed({**_none, "long": b"\1" + framed(SKIPPABLE)}),
    "a plane of no values is raw",
)

# encodings.md, sections 1, 3 and 4: values of streams
add("ragged-long-row", ragged([3, 4, 3], {}), "a row has at most k ranks")
add(
    "ragged-missing-ids",
    ragged([3, 2, 3], {"ids": IDS.ravel().tolist()}),
    "one id for each rank that is there",
)
add("ladder-step", packed({"steps": [10, 256, 0, 5, 254, 255]}), "a step is at most 255")
add("ladder-head", packed({"heads": [1 << 24, 256, 180]}), "at most 2^24 - 1 units")
add("ladder-long-step", packed({"long": [(1 << 24) - 255, 45]}), "at most 2^24 - 1 units")
add("ladder-sum", packed({"long": [(1 << 24) - 256, 45]}), "at most 2^24 - 1 units in sum")
add("ladder-tail", packed({"tail": [(1 << 24) + 1, 0, 77]}), "at most 2^24 - 1 units")
add("ladder-long-steps", packed({"long": [45, 45, 45]}), "one long step for each 255")
_half = {"schema": dataclasses.replace(PACKED, encoding="ladder16"), "parameter": 0}
_low = {"heads": [0x4400] * 3, "steps": [0] * 6, "long": [], "tail": [0] * 3}
add("ladder16-head", packed({**_low, "heads": [0x7C00, 0x4400, 0x4400]}, **_half), "at most 0x7BFF")
add(
    "ladder16-sum",
    packed({**_low, "steps": [255, 0, 0, 0, 0, 0], "long": [0x3800]}, **_half),
    "at most 0x7BFF in sum",
)
add("ladder16-tail", packed({**_low, "tail": [0x7C01, 0, 0]}, **_half), "at most 0x7BFF")
add("ids-mode", packed({"mode": [3]}), "modes 0, 1 and 2")
add("ids-padding", packed({"ids": [4, 9, NO_ID, 1, 2, 3, 299, 0, 5]}), "no padding among stored ids")
add("ids-vocabulary", packed({"ids": [4, 9, 300, 1, 2, 3, 299, 0, 5]}), "ids are below vocab_size")
add("ids-frequency-without-table", packed({"mode": [1]}), "mode 1 needs flag bit 1")
add("ids-lists-without-table", packed({"mode": [2]}), "mode 2 needs flag bit 1")
add(
    "ids-table-unused",
    packed({"mode": [1], "ranks": RANKS}, schema=GIVEN, file=TABLE),
    "mode 1 needs flag bit 1",
)
add(
    "ids-frequency-rank",
    packed({"mode": [1], "ranks": [300, *RANKS[1:]]}, schema=GIVEN, file=TABLE, table=TABLE, flags=2),
    "frequency ranks are below vocab_size",
)
_listless = table_bytes(n_lists=0, lists=[])
add("ids-no-lists", listed({}, file=_listless, table=_listless), "mode 2 needs lists")
add("ids-list", listed({"lists": [0, 2, 0]}), "lists of the table")
add("ids-code", listed({"codes": [*CODES[:-1], 256]}), "codes are at most 255")
add("ids-escaped", listed({"escaped": [300, *ESCAPED[1:]]}), "frequency ranks are below vocab_size")
add(
    "ids-missing-escape",
    listed({"escaped": b"\1" + plane(bytes(len(ESCAPED) - 1))}),
    "one frequency rank for each 255",
)

# encodings.md, section 5: id tables
add("table-missing", without("tables/*"), "the id table is there", **INTEGRITY)
add("table-bit", damaged("tables/*", lambda d: flip(d, len(d) // 2)), "digest of an id table", **INTEGRITY)
add("table-cut", damaged("tables/*", lambda d: d[:-1]), "length of an id table", **INTEGRITY)
add(
    "table-short",
    built(values=small(), schema=GIVEN, meta=META300, table=TABLE[:15]),
    "an id table has a header",
)
add("table-magic", table_file(magic=b"OPDIDS2\0"), "an id table starts with its magic")
add("table-other-vocabulary", table_file(meta=example_meta(301)), "the vocabulary of the manifest")
add(
    "table-vocabulary-0",
    table_file(vocab_size=0, n_lists=0, by_rank=[], lists=[]),
    "the vocabulary of the manifest",
)
add(
    "table-vocabulary-large",
    table_file(vocab_size=(1 << 24) + 1, n_lists=0, by_rank=b"", lists=[]),
    "MAX_VOCAB",
)
add("table-many-lists", table_file(n_lists=4097, lists=b"\0"), "at most 4096 lists")
_tiny = {"vocab_size": 254, "by_rank": range(254), "n_lists": 1, "lists": [*range(254), 0]}
_two_fifty_four = Build(
    values=rollouts(1, 8, vocab_size=254), schema=GIVEN, meta=example_meta(254), table=table_bytes(**_tiny)
)
add("table-small-vocabulary", _two_fifty_four.write, "lists are no longer than the vocabulary")
_order = [7 * rank % 300 for rank in range(300)]
add("table-id-twice", table_file(by_rank=[7, *_order[1:]]), "the frequency order has every id once")
add("table-id-large", table_file(by_rank=[300, *_order[1:]]), "the frequency order has every id once")
_lists = [15 * number + code for number in range(2) for code in range(255)]
add("table-list-twice", table_file(lists=[1, *_lists[1:]]), "a list has an id once")
add(
    "table-list-rank", table_file(lists=[300, *_lists[1:]]), "frequency ranks are below the vocabulary's size"
)
add("table-list-short", table_file(lists=_lists[:-1]), "255 ids a list")
add("table-left-over", table_file(rest=b"\0"), "no bytes are left over")
add("table-no-lists-stream", table_file(n_lists=0, lists=b""), "all streams are there")

# columns.md, section 4: values of pages
add("value-id", plain({0: VOCAB}), "ids are below vocab_size")
add("value-nan", plain({6: NAN}), "log-probs are finite")
add("value-infinite", plain({7: -INF}), "log-probs are finite")
add("value-positive", plain({6: 1e-6}), "log-probs are at most 0")
add(
    "value-plus-infinite",
    f32({**f32_parts(logprob=[INF, *small()[0].topk_logprob.ravel()[1:]])}),
    "log-probs are at most 0",
)
add(
    "value-nan-of-f32",
    f32({**f32_parts(logprob=[NAN, *small()[0].topk_logprob.ravel()[1:]])}),
    "log-probs are finite",
)
add("value-tail-nan", second({6: NAN}), "a tail is not NaN")
add("value-tail-positive", second({6: 0.5}), "a tail is at most 0")
add("value-inner-tail", plain({12: NAN}), "the tail of every band is not NaN", **VERIFY)
add("value-inner-sum", plain({12: -0.0}), "probabilities and tail of every band sum to at most 1", **VERIFY)
add("value-rising", plain({6: -300.0}), "log-probs fall")
add("value-rising-over-bands", second({3: -0.0}), "log-probs fall over all bands")
add("value-tie", packed({"ids": [4, 9, 7, 2, 1, 3, 299, 0, 5]}), "ids of equal log-probs rise")
add("value-twice", built(page=with_body(lambda body: body[4:8] + body[4:])), "ids are distinct")
add(
    "value-twice-over-bands",
    second({0: int(rollouts(1, 8)[0].topk_ids[0, 0])}),
    "ids are distinct over all bands",
)
add("value-sum", plain({6: -0.0}), "probabilities sum to at most 1")
add("value-sum-of-tail", second({6: -0.0}), "probabilities and tail sum to at most 1")
add("value-sum-of-ladder", packed({"heads": [1, 256, 180]}), "probabilities sum to at most 1")
add("value-sum-of-rounded", summing(math.exp(1 / 64), 0.0).write, "max_error comes along with copied values")
add(
    "value-sum-of-copy",
    summing(EXACT_SUM * math.exp(1 / 64) + NEAR, 1 / 64).write,
    "probabilities sum to at most 1.001001 exp(max_error)",
)
add(
    "value-sum-of-copy-f32",
    summing(EXACT_SUM * math.exp(1 / 64) + NEAR, 1 / 64, "f32").write,
    "probabilities sum to at most 1.001001 exp(max_error)",
)
add(
    "value-sum-of-largest",
    summing(EXACT_SUM * math.exp(1 / 16) + NEAR, 9.0).write,
    "of max_error at most LARGEST_SUM_ERROR counts",
)
add("value-padding", second({0: NO_ID, 3: -INF}), "all K ranks without a cut")
add("value-ragged", ragged([3, 2, 3], {}, schema=PACKED), "all K ranks without a cut")
add("value-no-rank", ragged([3, 0, 3], {}), "at least one rank")
add("value-padding-first", plain({0: NO_ID, 6: -INF}, schema=CUT), "padding ends a row")
add("value-padding-over-bands", plain({1: NO_ID, 7: -INF}, schema=CUT), "padding ends a row over all bands")
add("value-padding-logprob", second({0: NO_ID}, schema=CUT), "-inf at padding")
add("value-infinite-of-ragged", second({3: -INF}, schema=CUT), "-inf at padding only")
add("sampled-no-draw", sampled({15: 0}), "an id was drawn at least once")
add("sampled-draw-of-padding", sampled({18: 1}), "no draws at padding")
add("sampled-sum", sampled({6: -0.0}), "probabilities sum to at most 1")
add("sampled-order", sampled({0: 2, 1: 1, 6: -1.0, 7: -1.0}), "ids of equal log-probs rise")
add("chosen-id", chosen({0: VOCAB}), "ids are below vocab_size")
add("chosen-rising", chosen({6: -3.0}), "log-probs fall")
add("chosen-tail", chosen({12: NAN}), "a tail is not NaN")
add("chosen-twice", chosen({1: 1}), "ids are distinct")


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
        accepted[name] = {"what": make.__doc__, **expected(opd_store.open(valid / name))}
    tokenizers = [{"description": t, "fingerprint": tokenizer_fingerprint(json.dumps(t))} for t in TOKENIZERS]
    refused = {}
    for name, (stage, error, make_case, rule) in INVALID.items():
        make_case(invalid / name)
        refused[name] = {"rule": rule, "error": error, "stage": stage}
    header = {"format_version": FORMAT_VERSION, "opd_store": opd_store.__version__, "unreleased": True}
    pages = write_examples(valid)
    for place, cases in ((valid, accepted), (invalid, refused)):
        listed = {**header, **({"pages": pages, "tokenizers": tokenizers} if place == valid else {})}
        (place / "cases.json").write_text(json.dumps({**listed, "cases": cases}, indent=1) + "\n")
    print(f"{len(accepted)} valid and {len(refused)} invalid caches in {folder}")


MERGES = {"type": "BPE", "vocab": {"a": 1, "b": 2, "ab": 3, "\u0120a": 4, "<s>": 0}}
ADDED = [{"id": 5, "content": "\U0001f600"}, {"id": 0, "content": "<s>", "special": True}]
TOKENIZERS = (
    {"model": {**MERGES, "merges": ["a b", "\u0120 a", "a  b"]}, "added_tokens": ADDED, "padding": {}},
    {"model": {**MERGES, "merges": [["a", "b"]]}, "added_tokens": [{"id": 2, "content": "\ud800"}]},
    {"model": {"type": "Unigram", "vocab": [["<unk>", 0], ["a", -1.5]]}, "added_tokens": None},
    {"model": {"vocab": {}}},
)


def worked_example(token_ids: list[int], ids: Any, logprob: Any, log_tail: list[float]) -> Rollout:  # noqa: ANN401
    return Rollout(
        token_ids=np.array(token_ids, np.uint32),
        prompt_len=1,
        topk_ids=np.array(ids, np.uint32),
        topk_logprob=np.float32(logprob),
        log_tail=np.float32(log_tail),
    )


SHORT_TABLE = IdTable(np.array([5, 2, 0, 1, 3, 4, 6, 7], np.uint32), np.empty((0, 255), np.uint32))
_ONE = worked_example([1, 2], [[2, 5]], [[-0.5, -1.5]], [-2.0])
_TWO = worked_example(
    [1, 2, 3], [[2, 5, 4], [9, 1, 3]], [[-0.5, -1.5, -4.0], [-0.5, -2.0, -2.0]], [-2.0, -np.inf]
)
_ESCAPED = dataclasses.replace(_TWO, topk_ids=np.array([[2, 160, 7], [9, 1, 3]], np.uint32))
EXAMPLES = {
    # Name of the page: what it holds, its encoding, its id table.
    "page-example": (_ONE, "plain", None),
    "page-ladder": (_TWO, "ladder/128", None),
    "page-frequency": (_ONE, "ladder/128", SHORT_TABLE),
    "page-lists": (_ESCAPED, "ladder/128", example_table(2)),
}


def write_examples(place: Path) -> list[dict[str, Any]]:
    """The pages and id tables that the prose prints, as files."""
    listed = []
    for name, (rollout, encoding, id_table) in EXAMPLES.items():
        ranks = rollout.topk_ids.shape[1]
        schema = CacheSchema(
            topk=ranks, bands=(ranks,), encoding=encoding, id_table="none" if id_table is None else "given"
        )
        vocab_size = VOCAB if id_table is None else id_table.vocab_size
        builder = BatchBuilder(schema)
        builder.id_table = id_table
        builder.add(checked(rollout, vocab_size=vocab_size, sizes=schema.sizes), name_of(rollout))
        (page,) = builder.take().column(f"topk_0_{ranks}").to_pylist()
        (place / f"{name}.bin").write_bytes(page)
        entry = {
            "file": f"{name}.bin",
            "rollout_hash": name_of(rollout).hex(),
            "encoding": encoding,
            "kind": 0,
            "rank_start": 0,
            "rank_end": ranks,
            "n_positions": rollout.response_len,
            "ids": bits(rollout.topk_ids),
            "logprob": bits(rollout.topk_logprob),
            "log_tail": bits(rollout.log_tail),
        }
        if id_table is not None:
            entry |= {"table": f"{name}.ids", "vocab_size": vocab_size}
            (place / entry["table"]).write_bytes(id_table.to_bytes())
        listed.append(entry)
    return listed


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("vectors"))
