"""What is fuzzed: every parser of bytes that come from somewhere else.

A target takes bytes and either returns or raises an `opd_store.OpdError`; anything else is a finding. It puts
checksums and lengths of envelopes right, so that inputs reach what lies behind them.

Needs the project's root and its `tests` folder on the path.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
from faults import corpus

import opd_store
from fuzz.mutate import mutate_body, mutate_bytes
from fuzz.structure import (
    MemoryStorage,
    PartialShard,
    Parts,
    join_page,
    manifest_text,
    seal_manifest,
    split_page,
)
from opd_store import layout
from opd_store.arrow_message import check_record_batch, record_batches
from opd_store.batch import BatchView, Proven
from opd_store.columns import arrow_schema
from opd_store.encodings import ENCODINGS, IdTable, PageShape, check_page_crc, decode_page
from opd_store.index import RolloutTable, decode_shard_table, encode_shard_table
from opd_store.manifest import decode_manifest, encode_manifest
from opd_store.shard import MappedShard, ShardReader
from opd_store.values import support_problem

Mutator = Callable[[bytes, random.Random], bytes]
VARIANTS = tuple(corpus.VARIANTS)
SHAPES = ((3, 0, 2), (3, 2, 5), (3, 0, 3), (3, 0, 4), (1, 0, 4), (17, 0, 40), (0, 0, 3))
"""Positions, first and last rank of pages."""
MAX_TABLE_IDS = 1 << 16
"""Larger vocabularies are left to a test of their own, which looks at memory."""


@dataclass(frozen=True)
class Target:
    """One parser."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    mutate: Mutator
    weight: int = 1
    """Share of the time."""


@cache
def parts(variant: str) -> Parts:
    """A small intact cache of a variant, taken apart."""
    with tempfile.TemporaryDirectory(dir=corpus.fast_folder()) as folder:
        corpus.write(Path(folder) / "cache", variant, corpus.rollouts(variant))
        return Parts.of(Path(folder) / "cache")


@cache
def id_table(variant: str) -> IdTable | None:
    data = parts(variant).table
    return None if data is None else IdTable.from_bytes(np.frombuffer(data, np.uint8), where="table")


@cache
def batch(variant: str) -> pa.RecordBatch:
    schema = arrow_schema(parts(variant).manifest.schema)
    return pa.ipc.read_record_batch(pa.py_buffer(parts(variant).pieces[1]), schema)


@cache
def pages(variant: str) -> list[tuple[str, int, bytes]]:
    """(column, row, page) of every page."""
    columns = [column.name for column in parts(variant).manifest.schema.packed_columns()]
    return [(n, row, p) for n in columns for row, p in enumerate(batch(variant).column(n).to_pylist())]


def run_page(data: bytes) -> None:
    """Shape, encoding, id table, flags with kind: a byte each; then the body."""
    if len(data) < 4:
        return
    positions, start, end = SHAPES[data[0] % len(SHAPES)]
    encoding = ENCODINGS[data[1] % len(ENCODINGS)]
    table = (None, corpus.table(0), corpus.table(2))[data[2] % 3]
    kind, flags = data[3] >> layout.PAGE_KIND_SHIFT, data[3]
    codec = opd_store.encodings._CODECS[encoding]
    fields = (codec.CODE, flags, start, end, 0, positions, 0, codec.NAMES[encoding], 0)
    page = np.frombuffer(join_page(layout.PAGE_HEADER.pack(*fields), data[4:]), np.uint8)
    shape = PageShape(kind, start, end, positions)
    digest = None if table is None else table.digest
    with contextlib.suppress(opd_store.OpdError):
        check_page_crc(page, bytes(32), digest, where="page")
    band = decode_page(page, shape, encoding=encoding, id_table=table, where="page")
    size = (positions, end - start)
    assert band.ids.shape == band.logprob.shape == size
    assert band.log_tail.shape == (positions,)
    assert (band.ids.dtype, band.logprob.dtype, band.log_tail.dtype) == (np.uint32, np.float32, np.float32)
    assert (band.draws is not None) == (kind == layout.KIND_SAMPLED)
    support_problem(
        "topk", band.ids, band.logprob, band.log_tail, draws=band.draws, vocab_size=corpus.VOCAB, ragged=True
    )


def page_seeds() -> list[bytes]:
    seeds = []
    for variant in VARIANTS:
        encoding = ENCODINGS.index(corpus.VARIANTS[variant]["encoding"])
        n_lists = corpus.VARIANTS[variant].get("table")
        for column, _, page in pages(variant)[::2]:
            header, body = split_page(page)
            shape = ("topk_0_2", "topk_2_5", "chosen", "sampled").index(column)
            table = {None: 0, 0: 1, 2: 2}[n_lists]
            seeds.append(bytes([shape, encoding, table, header[1]]) + body)
    return seeds


def run_raw_page(data: bytes) -> None:
    """A page with its header, as it stands."""
    page, shape = np.frombuffer(data, np.uint8), PageShape(layout.KIND_TOPK, 0, 2, 3)
    accepted = False
    for encoding in ENCODINGS:
        with contextlib.suppress(opd_store.OpdError):
            decode_page(page, shape, encoding=encoding, id_table=corpus.table(2), where="page")
            accepted = True
    if not accepted:
        raise opd_store.FormatError("no encoding accepts it")


def raw_page_seeds() -> list[bytes]:
    return [page for variant in VARIANTS for column, _, page in pages(variant) if column == "topk_0_2"]


def run_table(data: bytes) -> None:
    if len(data) >= 12 and int.from_bytes(data[8:12], "little") > MAX_TABLE_IDS:
        return
    table = IdTable.from_bytes(np.frombuffer(data, np.uint8), where="table")
    again = IdTable.from_bytes(np.frombuffer(table.to_bytes(), np.uint8), where="table")
    assert np.array_equal(np.sort(table.by_rank), np.arange(table.vocab_size))
    assert np.array_equal(again.lists, table.lists)


def run_manifest(data: bytes) -> None:
    """Everything before the checksum line."""
    manifest = decode_manifest(seal_manifest(data), where="manifest")
    if not manifest.newer:
        assert decode_manifest(encode_manifest(manifest), where="manifest") == manifest


def run_shard_table(data: bytes) -> None:
    accepted = False
    for n_parts in sorted({parts(variant).info.n_parts for variant in VARIANTS}):
        with contextlib.suppress(opd_store.OpdError):
            shards = decode_shard_table(pa.py_buffer(data), n_parts, where="index")
            again = decode_shard_table(pa.py_buffer(encode_shard_table(shards[:])), n_parts, where="index")
            assert again[:] == shards[:]
            assert np.array_equal(again.row_tokens, shards.row_tokens)
            assert len(shards.batch_rows) == len(shards.batch_shard) == sum(s.n_batches for s in shards)
            assert shards.batch_rows.sum() == len(shards.row_response_tokens) == shards.total("rows")
            accepted = True
    if not accepted:
        raise opd_store.FormatError("no number of parts accepts it")


def run_rollout_table(data: bytes) -> None:
    table = RolloutTable(pa.py_buffer(data), [2], where="index")
    table.in_order()
    for row_hash in (bytes(32), bytes(table.hashes[:32])):
        assert all(0 <= row < 2 and shard == 0 for shard, row in table.find(row_hash))


def use_rows(view: BatchView, rows: list[int]) -> None:
    """Read rows in every way, and raise the last refusal of any."""
    refusal = None
    for row in rows:
        for ranks in (None, 1):
            try:
                view.rollout(row, ranks=ranks)
            except opd_store.OpdError as error:
                refusal = error
        with contextlib.suppress(opd_store.OpdError):
            view.check_pages(row)
    if refusal is not None:
        raise refusal


def run_batch(data: bytes) -> None:
    """A variant, by the first byte, with another page in one column and row, by the second."""
    if len(data) < 2 + layout.PAGE_HEADER.size:
        return
    variant = VARIANTS[data[0] % len(VARIANTS)]
    places = pages(variant)
    column, row, _ = places[data[1] % len(places)]
    header, body = data[2 : 2 + layout.PAGE_HEADER.size], data[2 + layout.PAGE_HEADER.size :]
    intact = batch(variant)
    changed = intact.column(column).to_pylist()
    changed[row] = join_page(header, body)
    at = intact.schema.get_field_index(column)
    found = intact.set_column(at, intact.schema.field(at), pa.array(changed, pa.binary()))
    view = BatchView(
        found,
        parts(variant).manifest.schema,
        row_tokens=parts(variant).info.row_tokens,
        row_response_tokens=parts(variant).info.row_response_tokens,
        vocab_size=corpus.VOCAB,
        id_table=id_table(variant),
        proven=Proven(intact.num_rows) if data[1] < 128 else None,
        where="shard",
    )
    use_rows(view, [row])


def batch_seeds() -> list[bytes]:
    return [
        bytes([number, at]) + b"".join(split_page(page))
        for number, variant in enumerate(VARIANTS)
        for at, (_, _, page) in enumerate(pages(variant))
    ]


def run_message(data: bytes) -> None:
    """A record batch as a shard has it, flatbuffer and all; the variant by the first byte."""
    if len(data) < 2:
        return
    variant = VARIANTS[data[0] % len(VARIANTS)]
    known = parts(variant)
    pieces = [known.pieces[0], data[1:], known.pieces[-1]]
    file, info = b"".join(pieces), known.described(pieces)
    schema = known.manifest.schema
    arrow = arrow_schema(schema)
    sources = PartialShard(file, info), MappedShard(pa.py_buffer(file), info, arrow, uri="shard")
    for source, ranks in zip(sources, (2, None), strict=True):
        view = BatchView(
            ShardReader(source, info, arrow, uri="shard").batch(0, schema.parts(ranks)),
            schema,
            row_tokens=info.row_tokens,
            row_response_tokens=info.row_response_tokens,
            vocab_size=corpus.VOCAB,
            id_table=id_table(variant),
            proven=Proven(info.rows),
            where="shard",
        )
        if ranks is None:
            use_rows(view, [0, 1])
        else:
            view.rollout(1, ranks=ranks)


def run_arrow_metadata(data: bytes) -> None:
    """The two looks at Arrow's metadata, whose error is a plain ValueError for their callers to explain."""
    accepted = False
    for call in (check_record_batch, record_batches):
        with contextlib.suppress(ValueError):
            call(pa.py_buffer(data))
            accepted = True
    if not accepted:
        raise opd_store.FormatError("neither a message nor a file")


PARTS = ("manifest", "shard table", "rollout table", "id table", "head", "record batch", "footer")


def run_cache(data: bytes) -> None:
    """A whole cache in memory: variant, replaced part, and its bytes."""
    if len(data) < 3:
        return
    known = parts(VARIANTS[data[0] % len(VARIANTS)])
    part, rest = PARTS[data[1] % len(PARTS)], data[2:]
    try:
        if part == "manifest":
            files = known.sealed(edit=lambda _: rest)
        elif part in ("shard table", "rollout table"):
            files = known.sealed(**{part.replace(" ", "_"): rest})
        elif part == "id table":
            files = known.sealed(table=rest)
        else:
            pieces = list(known.pieces)
            pieces[PARTS.index(part) - 4] = rest
            files = known.sealed(pieces=pieces)
    except opd_store.OpdError:
        return  # what no writer would name in a manifest
    storage = MemoryStorage(files)
    modules = [sys.modules[f"opd_store.{name}"] for name in ("cache", "verify")]
    with mock.patch.object(modules[0], "resolve", return_value=(storage, None)):
        for check_values in (True, False):
            found = opd_store.open("memory", check_values=check_values)
            for row in range(len(found)):
                try:
                    found.rollout(row)
                    found.row_hash(row)
                except opd_store.OpdError:
                    break
            found.find(bytes(32))
    with mock.patch.object(modules[1], "resolve", return_value=(storage, None)):
        opd_store.verify("memory")


def cache_seeds() -> list[bytes]:
    seeds = []
    for number, variant in list(enumerate(VARIANTS))[::3]:
        known = parts(variant)
        files = known.sealed()
        contents = {
            "manifest": manifest_text(files[layout.manifest_path(1)]),
            "shard table": encode_shard_table([known.info]),
            "rollout table": known.rollout_table,
            "id table": known.table or b"",
            "head": known.pieces[0],
            "record batch": known.pieces[1],
            "footer": known.pieces[-1],
        }
        seeds += [bytes([number, PARTS.index(name)]) + data for name, data in contents.items()]
    return seeds


def after(n_bytes: int, mutate: Mutator) -> Mutator:
    """Leave the first bytes alone most of the time."""

    def run(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.1:
            return mutate_bytes(data[:n_bytes], rng)[:n_bytes].ljust(n_bytes, b"\0") + data[n_bytes:]
        return data[:n_bytes] + mutate(data[n_bytes:], rng)

    return run


def tables() -> list[bytes]:
    return [corpus.table(n).to_bytes() for n in (0, 1, 2)]


def manifests() -> list[bytes]:
    return [manifest_text(parts(v).sealed()[layout.manifest_path(1)]) for v in VARIANTS[::2]]


TARGETS: dict[str, Target] = {
    "page": Target(run_page, page_seeds, after(4, mutate_body), weight=4),
    "raw-page": Target(run_raw_page, raw_page_seeds, mutate_bytes),
    "id-table": Target(run_table, tables, after(16, mutate_body), weight=2),
    "manifest": Target(run_manifest, manifests, mutate_bytes, weight=2),
    "shard-table": Target(
        run_shard_table, lambda: [encode_shard_table([parts(v).info]) for v in VARIANTS[::4]], mutate_bytes
    ),
    "rollout-table": Target(
        run_rollout_table, lambda: [parts(v).rollout_table for v in VARIANTS[::4]], mutate_bytes
    ),
    "batch": Target(run_batch, batch_seeds, after(2 + layout.PAGE_HEADER.size, mutate_body), weight=2),
    "message": Target(
        run_message,
        lambda: [bytes([n]) + parts(v).pieces[1] for n, v in enumerate(VARIANTS)],
        after(1, mutate_bytes),
        weight=2,
    ),
    "arrow-metadata": Target(
        run_arrow_metadata,
        lambda: [data for v in VARIANTS[::3] for data in (parts(v).pieces[1], b"".join(parts(v).pieces))],
        mutate_bytes,
    ),
    "cache": Target(run_cache, cache_seeds, after(2, mutate_bytes), weight=2),
}


def run_one(name: str, data: bytes) -> bool:
    """Run a target once: whether it accepted the input. Raises whatever is a finding."""
    try:
        TARGETS[name].run(data)
    except opd_store.OpdError as error:
        message = str(error)
    else:
        return True
    # Errors are printed.
    assert len(message) < 4096
    return False
