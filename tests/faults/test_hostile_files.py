"""Files made to hurt: every checksum is right, and what they say costs far more than they weigh.

Each ends in an error of this project, within 64 MiB of memory and a second of time.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import struct

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from faults import corpus
from faults.cost import MAX_BYTES, MAX_SECONDS, measured

import opd_store
from fuzz.structure import (
    Stream,
    build_body,
    join_page,
    parse_body,
    pieces_of,
    seal_cache,
    split_page,
    with_pages,
)
from opd_store import layout
from opd_store.arrow_message import record_batches
from opd_store.encodings import IdTable, PageShape, decode_page
from opd_store.encodings.planes import StreamWriter
from opd_store.index import ROLLOUT_TABLE, SHARD_TABLE

VARIANT, RAGGED = "ladder/64, by list, chosen", "f32, by list, ragged"
P, K = 3, 2
_numbers = itertools.count()
BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(256 << 20))


@pytest.fixture(scope="module")
def caches():
    with corpus.memory_folder() as folder:
        for variant in (VARIANT, RAGGED):
            corpus.write(folder / variant.split("/")[0], variant, corpus.rollouts(variant, response_len=P))
        yield folder


def read(path):
    """Everything that reads a cache."""
    cache = opd_store.open(path)
    for row, rollout in enumerate(cache):
        assert row in cache.find_all(cache.row_hash(row)), rollout


def assert_refused(call, match=""):
    error, n_bytes, seconds = measured(call)
    assert isinstance(error, opd_store.FormatError), repr(error)
    assert re.search(match, str(error)), error
    assert len(str(error)) < 1000
    assert n_bytes <= MAX_BYTES, f"{n_bytes >> 20} MiB: {error}"
    assert seconds <= MAX_SECONDS, f"{seconds} s: {error}"


def pages_of(path, column):
    cache = opd_store.open(path)
    batch = cache.shard_reader(0).batch(0)
    return batch, batch.column(column).to_pylist()


def read_with_page(folder, like, column, change):
    """Read a cache in which the first page of a column went through `change`, as header and body."""
    batch, pages = pages_of(like, column)
    header, body = split_page(pages[0])
    path = folder / f"hostile-{next(_numbers)}"
    page = change(header, body)
    head, _, footer = pieces_of(like)
    changed = with_pages(batch, column, [page, *pages[1:]]).serialize().to_pybytes()
    seal_cache(path, like, pieces=[head, changed, footer])
    read(path)


def frame(data: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def streamed(data: bytes) -> bytes:
    """A frame that does not say how much it holds."""
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return compressor.compress(data) + compressor.flush()


def frame_header(content_size: int, *, window: int | None = None, dictionary: int = 0) -> bytes:
    """Magic and header of a frame, with eight bytes of content size; RFC 8878, 3.1.1.1."""
    single = window is None
    parts = [struct.pack("<IB", 0xFD2FB528, 0b11 << 6 | single << 5 | (3 if dictionary else 0))]
    parts += [] if single else [bytes([window])]
    parts += [struct.pack("<I", dictionary)] if dictionary else []
    return b"".join(parts) + struct.pack("<Q", content_size)


RAW_6 = struct.pack("<I", 1 | 6 << 3)[:3] + bytes(6)
"""The last block of a frame: six bytes as they are."""
SKIPPABLE = struct.pack("<II", 0x184D2A50, 6) + bytes(6)
DICTIONARY = zstandard.ZstdCompressionDict(b"abcdefgh" * 100, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
FRAMES = {
    "bomb": BOMB,
    "bomb that lies": frame_header(6) + BOMB[8:],
    "no content size": streamed(bytes(6)),
    "no content size, bomb": streamed(bytes(64 << 20)),
    "content size 5": frame(bytes(5)),
    "content size 7": frame(bytes(7)),
    "says 6, holds 5": frame_header(6) + struct.pack("<I", 1 | 5 << 3)[:3] + bytes(5),
    "says 6, holds 7": frame_header(6) + struct.pack("<I", 1 | 7 << 3)[:3] + bytes(7),
    **{f"says {n}": frame_header(n) + RAW_6 for n in (0, 2**31, 2**32, 2**32 + 6, 2**63, 2**64 - 3)},
    "window of 2**41": frame_header(6, window=0xFF) + RAW_6,
    "window of 16 MiB": frame_header(6, window=14 << 3) + RAW_6,
    "two frames": frame(bytes(6)) * 2,
    "ten thousand frames": frame(bytes(6)) * 10_000,
    "frame and a byte": frame(bytes(6)) + b"\0",
    "skippable": SKIPPABLE,
    "skippable, then a frame": SKIPPABLE + frame(bytes(6)),
    "frame, then skippable": frame(bytes(6)) + SKIPPABLE,
    "ten thousand skippable": SKIPPABLE * 10_000,
    "dictionary": frame_header(6, window=0, dictionary=7) + RAW_6,
    "checksum": frame(bytes(6), write_checksum=True),
    **{f"cut to {n}": frame(bytes(6))[:n] for n in range(len(frame(bytes(6))))},
    "empty": b"",
    "another format": b"\x1f\x8b\x08" + bytes(20),
    "reserved block type": frame_header(6) + struct.pack("<I", 1 | 3 << 1 | 6 << 3)[:3] + bytes(6),
    "ten thousand empty blocks": frame_header(6) + bytes(3 * 10_000),
}


def test_the_frame_helpers():
    assert zstandard.ZstdDecompressor().decompress(frame_header(6) + RAW_6) == bytes(6)
    assert zstandard.ZstdDecompressor().decompress(frame_header(6, window=0) + RAW_6) == bytes(6)


@pytest.mark.parametrize("case", FRAMES)
def test_a_zstd_frame(caches, tmp_path, case):
    """In place of the list codes of a page, of which there are six."""

    def change(header, body):
        streams = parse_body(body)
        assert len(streams[6][0][1]) == P * K
        streams[6] = [(True, FRAMES[case])]
        return join_page(header, build_body(streams))

    assert_refused(lambda: read_with_page(tmp_path, caches / "ladder", "topk_0_2", change), "codes")


@pytest.mark.parametrize("sizes", [P * K, -1])
def test_a_good_frame_is_read(caches, tmp_path, sizes):
    def change(header, body):
        streams = parse_body(body)
        payload = streams[6][0][1]
        streams[6] = (
            [(True, frame(payload))] if sizes > 0 else [(True, frame_header(6) + RAW_6[:3] + payload)]
        )
        return join_page(header, build_body(streams))

    read_with_page(tmp_path, caches / "ladder", "topk_0_2", change)


def words(*values: int) -> Stream:
    out = StreamWriter()
    out.ints(np.array(values, np.uint64))
    return parse_body(out.body())[0]


def put(number: int, stream: Stream):
    def change(streams):
        streams[number] = stream

    return change


def rows_of_lengths(*lengths: int):
    return put(0, words(*lengths))


# Streams of a band of two ranks: tail, heads, steps, long steps, mode, lists, codes, escaped ids.
STREAMS = {
    "a value above the units": (put(1, words(0, 0, 1 << 24)), "first log-probs has"),
    "a tail above the units": (put(0, words(0, 0, (1 << 24) + 1)), "log_tail has"),
    "a long step": (lambda s: (put(2, words(255, 0, 0))(s), put(3, words(1 << 24))(s)), "long steps"),
    "heads and steps beyond the units": (put(1, words((1 << 24) - 1, 0, 0)), "units, the limit"),
    "mode 3": (put(4, words(3)), "id mode has 3"),
    "mode 2**32 - 1": (put(4, words(2**32 - 1)), "id mode has"),
    "list 2 of 2": (put(5, words(0, 1, 2)), "lists has 2, the limit is 1"),
    "list 2**32 - 1": (put(5, words(0, 0, 2**32 - 1)), "lists has"),
    "code 256": (put(6, words(0, 1, 2, 3, 4, 256)), "id codes has 256"),
    "codes all escape, without ids": (put(6, words(*[255] * 6)), "escaped ids"),
    "rank = vocab": (
        lambda s: (put(6, words(*[255] * 6))(s), put(7, words(*[corpus.VOCAB] * 6))(s)),
        "escaped ids has 300",
    ),
    "one code too few": (put(6, [(False, bytes(5))]), "5 bytes, expected 6"),
    "one code too many": (put(6, [(False, bytes(7))]), "7 bytes, expected 6"),
    "a stream too many": (lambda s: s.append([]), "after the last stream"),
    "a thousand streams too many": (lambda s: s.extend([[]] * 1000), "after the last stream"),
    "a stream too few": (lambda s: s.pop(), "page body, which has"),
    "no streams": (lambda s: s.clear(), "page body, which has"),
    "ids as they are, = vocab": (
        lambda s: (put(4, words(0))(s), s.__setitem__(slice(5, None), [words(1, 2, 1, 2, 1, corpus.VOCAB)])),
        "ids in",
    ),
    "ids as they are, padding": (
        lambda s: (put(4, words(0))(s), s.__setitem__(slice(5, None), [words(1, 2, 1, 2, 1, 2**32 - 1)])),
        "ids has 4294967295, the limit",
    ),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_stream(caches, tmp_path, case):
    edit, match = STREAMS[case]

    def change(header, body):
        streams = parse_body(body)
        assert len(streams) == 8
        if case == "heads and steps beyond the units":
            streams[2] = words(1, 1, 1)
        edit(streams)
        return join_page(header, build_body(streams))

    assert_refused(lambda: read_with_page(tmp_path, caches / "ladder", "topk_0_2", change), match)


@pytest.mark.parametrize("n_planes", [5, 6, 127, 128, 255])
def test_a_number_of_planes(caches, tmp_path, n_planes):
    def change(header, body):
        return join_page(header, bytes([n_planes]) + body[1:])

    assert_refused(
        lambda: read_with_page(tmp_path, caches / "ladder", "topk_0_2", change),
        f"{n_planes} planes, the limit is 4",
    )


@pytest.mark.parametrize("zstd", [0, 1 << 31])
@pytest.mark.parametrize("size", [0, 2, 4, 2**16, 2**24, 2**30, 2**31 - 1])
def test_a_size_of_a_plane(caches, tmp_path, size, zstd):
    def change(header, body):
        assert body[0] >= 1
        return join_page(header, body[:1] + struct.pack("<I", size | zstd) + body[5:])

    assert_refused(lambda: read_with_page(tmp_path, caches / "ladder", "topk_0_2", change))


@pytest.mark.parametrize("lengths", [(3, 1, 1), (255, 0, 0), (2**32 - 1, 1, 1), (1, 2, 65536), (0, 0, 0)])
def test_lengths_of_rows(caches, tmp_path, lengths):
    def change(header, body):
        streams = parse_body(body)
        rows_of_lengths(*lengths)(streams)
        header = header[:1] + bytes([header[1] | layout.PAGE_RAGGED]) + header[2:]
        return join_page(header, build_body(streams))

    assert_refused(lambda: read_with_page(tmp_path, caches / "f32, by list, ragged", "topk_0_2", change))


HEADERS = {
    f"{name} {value}": (field, value)
    for field, name, values in (
        (0, "encoding", (0, 1, 3, 255)),
        (1, "flags", (2 | 4, 2 | 8, 2 | 16, 2 | 32, 2 | 48, 2 | 128, 255)),
        (2, "rank_start", (1, 2, 65535)),
        (3, "rank_end", (0, 1, 3, 65535)),
        (4, "reserved", (1, 65535)),
        (5, "n_positions", (0, 2, 4, 2**31, 2**32 - 1)),
        (7, "parameter", (0, 1, 32, 128, 2**32 - 1)),
    )
    for value in values
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_page_header(caches, tmp_path, case):
    field, value = HEADERS[case]

    def change(header, body):
        fields = list(layout.PAGE_HEADER.unpack(header))
        assert fields[field] != value
        fields[field] = value
        return join_page(layout.PAGE_HEADER.pack(*fields), body)

    assert_refused(lambda: read_with_page(tmp_path, caches / "ladder", "topk_0_2", change))


@pytest.mark.parametrize("body_bytes", [0, 1, 2**31 - 1, 2**31, 2**32 - 33, 2**32 - 24, 2**32 - 1])
def test_a_body_length(caches, tmp_path, body_bytes):
    def change(header, body):
        page = join_page(header, body)
        return page[:12] + struct.pack("<I", body_bytes) + page[16:]

    assert_refused(lambda: read_with_page(tmp_path, caches / "ladder", "topk_0_2", change))


@pytest.mark.parametrize("length", [0, 1, 8, 23, 24])
def test_a_short_page(caches, tmp_path, length):
    assert_refused(
        lambda: read_with_page(tmp_path, caches / "ladder", "topk_0_2", lambda h, b: (h + b)[:length])
    )


@pytest.mark.parametrize("encoding", corpus.PACKED)
@pytest.mark.parametrize(
    ("positions", "ranks"), [(1 << 22, 2), (2048, 4096), (1 << 31, 1), (2**32 - 1, 4096)]
)
def test_decoded_size(encoding, positions, ranks):
    """Pages of empty streams, so that a few bytes would decode to as many zeros as the header says."""
    codec = opd_store.encodings._CODECS[encoding]
    fields = (codec.CODE, 0, 0, ranks, 0, positions, 0, codec.NAMES[encoding], 0)
    page = join_page(layout.PAGE_HEADER.pack(*fields), bytes(100))
    shape = PageShape(layout.KIND_TOPK, 0, ranks, positions)
    assert_refused(
        lambda: decode_page(np.frombuffer(page, np.uint8), shape, encoding=encoding, where="page"),
        "bytes once decoded, the limit is",
    )


def id_table(vocab_size: int, n_lists: int, *streams: Stream) -> bytes:
    return struct.pack("<8sII", b"OPDIDS1\0", vocab_size, n_lists) + build_body(list(streams))


VOCAB = corpus.VOCAB
ORDER = words(*range(VOCAB))
LIST = tuple(range(255))
TABLES = {
    "not a permutation": id_table(VOCAB, 0, words(*range(VOCAB - 1), 0), []),
    "all the same": id_table(VOCAB, 0, [], []),
    "an id too high": id_table(VOCAB, 0, words(*range(1, VOCAB + 1)), []),
    "another vocabulary": id_table(VOCAB - 1, 0, words(*range(VOCAB - 1)), []),
    "twice in a list": id_table(VOCAB, 1, ORDER, words(*LIST[:-1], 0)),
    "twice in the last list": id_table(VOCAB, 2, ORDER, words(*LIST, 7, *LIST[:-1])),
    "a rank too high": id_table(VOCAB, 1, ORDER, words(*LIST[:-1], VOCAB)),
    "a list too many": id_table(VOCAB, 2, ORDER, words(*LIST)),
    "a list too few": id_table(VOCAB, 0, ORDER, words(*LIST)),
    "4,097 lists": id_table(VOCAB, 4097, ORDER, []),
    "2**32 - 1 lists": id_table(VOCAB, 2**32 - 1, ORDER, []),
    "lists of a small vocabulary": id_table(254, 1, words(*range(254)), words(*LIST)),
    "no vocabulary": id_table(0, 0, [], []),
    "2**24 + 1 ids": id_table(2**24 + 1, 0, [], []),
    "2**32 - 1 ids": id_table(2**32 - 1, 0, [], []),
    "100,000 ids in a few bytes": id_table(100_000, 0, [], []),
    "4,096 lists in a few bytes": id_table(VOCAB, 4096, ORDER, []),
    "a zstd bomb": id_table(VOCAB, 0, [(True, BOMB)], []),
    "a frame that lies": id_table(VOCAB, 0, [(True, frame_header(VOCAB) + BOMB[8:])], []),
    "bytes after": id_table(VOCAB, 0, ORDER, [], []),
    "no streams": id_table(VOCAB, 0),
    "only a header": struct.pack("<8sII", b"OPDIDS1\0", VOCAB, 0),
    "another magic": b"OPDIDS2\0" + id_table(VOCAB, 0, ORDER, [])[8:],
    "empty header": b"OPDIDS1\0",
    "one byte": b"O",
}


@pytest.mark.parametrize("case", TABLES)
def test_an_id_table(caches, tmp_path, case):
    seal_cache(tmp_path / "hostile", caches / "ladder", table=TABLES[case])
    assert_refused(lambda: opd_store.open(tmp_path / "hostile").id_table)


@pytest.mark.parametrize(
    "streams",
    [
        [],
        [(False, b"")],
        [(True, frame(bytes(1 << 24)))] * 3,
    ],
)
def test_a_vocabulary_that_a_table_only_declares(caches, tmp_path, streams):
    """A hundred bytes and less that speak of 2^24 ids, in a cache that has far fewer."""
    seal_cache(tmp_path / "hostile", caches / "ladder", table=id_table(1 << 24, 0, streams, []))
    assert_refused(lambda: opd_store.open(tmp_path / "hostile").id_table)


def file_of(batch: pa.RecordBatch, codec: str | None) -> tuple[bytes, bytes]:
    """An Arrow file of one record batch, and the message of that record batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as out:
        out.write_batch(batch)
    file = sink.getvalue()
    ((offset, length),) = record_batches(file)
    return file.to_pybytes(), file.slice(offset, length).to_pybytes()


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_compressed_record_batch(caches, tmp_path, codec):
    """A label of 256 MiB, which a compressed body of some kilobytes would unfold to."""
    batch, _ = pages_of(caches / "ladder", "topk_0_2")
    at = batch.schema.get_field_index("label")
    bomb = batch.set_column(at, batch.schema.field(at), pa.array(["x" * (200 << 20), None]))
    head, _, footer = pieces_of(caches / "ladder")
    _, message = file_of(bomb, codec)
    assert len(message) < 2 << 20
    del bomb
    seal_cache(tmp_path / "hostile", caches / "ladder", pieces=[head, message, footer])
    assert_refused(lambda: read(tmp_path / "hostile"), "compressed record batch")


@pytest.mark.parametrize("which", ["shard_table", "rollout_table"])
def test_a_compressed_index(caches, tmp_path, which):
    if which == "rollout_table":
        n_rows = 4_000_000
        arrays = [pa.repeat(pa.scalar(b"\0" * 32, ROLLOUT_TABLE.types[0]), n_rows)]
        arrays += [pa.repeat(pa.scalar(0, kind), n_rows) for kind in ROLLOUT_TABLE.types[1:]]
        batch = pa.RecordBatch.from_arrays(arrays, schema=ROLLOUT_TABLE)
    else:
        regions = [[0] * 8_000_000]
        values = [[b"\0" * 32], [1], [1], [1], [1], *[regions] * 6]
        arrays = [pa.array(v, kind) for v, kind in zip(values, SHARD_TABLE.types, strict=True)]
        batch = pa.RecordBatch.from_arrays(arrays, schema=SHARD_TABLE)
    data, _ = file_of(batch, "zstd")
    del arrays, batch
    seal_cache(tmp_path / "hostile", caches / "ladder", **{which: data})
    assert_refused(lambda: read(tmp_path / "hostile"))


def test_a_compressed_record_batch_that_only_the_footer_names(caches, tmp_path):
    """Readers go by the index, other tools by the footer, and `verify` compares the two."""
    batch, _ = pages_of(caches / "ladder", "topk_0_2")
    at = batch.schema.get_field_index("label")
    bomb = batch.set_column(at, batch.schema.field(at), pa.array(["x" * (200 << 20), None]))
    file, _ = file_of(bomb, "zstd")
    _, message, _ = pieces_of(caches / "ladder")
    assert len(file) < 2 << 20
    del bomb
    # Its own footer still fits, since the intact record batch comes after everything that it names.
    ((offset, length),) = record_batches(pa.py_buffer(file))
    pieces = [file[: offset + length], message, file[offset + length :]]
    seal_cache(tmp_path / "hostile", caches / "ladder", pieces=pieces)
    assert_refused(lambda: raise_first(opd_store.verify(tmp_path / "hostile").problems))


def raise_first(problems):
    if problems:
        raise problems[0]


def test_a_duplicate_among_many_keys(caches, tmp_path):
    keys = ",".join(f'"{i:x}":0' for i in itertools.chain(range(100_000), [99_999]))
    seal_cache(
        tmp_path / "hostile",
        caches / "ladder",
        edit=lambda text: text.replace(b'"sequence"', keys.encode() + b', "sequence"', 1),
    )
    assert_refused(lambda: read(tmp_path / "hostile"), "duplicate key")


LARGE = {
    "many numbers": '"optional_features": [' + ",".join(["0"] * 500_000) + "]",
    "many lists": '"optional_features": [' + ",".join(["[]"] * 340_000) + "]",
    "many features": '"required_features": [' + ",".join(f'"{i}"' for i in range(120_000)) + "]",
    "long texts": '"required_features": [' + ",".join(['"' + "x" * 4096 + '"'] * 250) + "]",
    "many segments": '"segments": [' + ",".join(["{}"] * 300_000) + "]",
    "a long number": '"sequence": 1' + "0" * 1_000_000,
    "a long fraction": '"sequence": 1.' + "0" * 1_000_000,
    "a deep list": '"segments": ' + "[" * 500_000 + "]" * 500_000,
}


@pytest.mark.parametrize("case", LARGE)
def test_a_large_manifest(caches, tmp_path, case):
    name = LARGE[case].split(":")[0].encode()

    def edit(text: bytes) -> bytes:
        start = text.index(name)
        end = re.compile(rb',\n "|\Z').search(text, start).start()
        return text[:start] + LARGE[case].encode() + text[end:]

    seal_cache(tmp_path / "hostile", caches / "ladder", edit=edit)
    assert_refused(lambda: read(tmp_path / "hostile"))


def test_bands_without_end(caches, tmp_path):
    """An error quotes what it found, but not a megabyte of it."""
    numbers = ",".join(["1"] * 400_000).encode()
    seal_cache(
        tmp_path / "hostile",
        caches / "ladder",
        edit=lambda text: re.sub(rb'"bands": \[[^]]*\]', b'"bands": [' + numbers + b"]", text),
    )
    assert_refused(lambda: read(tmp_path / "hostile"))


@pytest.mark.parametrize(
    "extra", [b"\0\0\0\0\0\0\0\0", b"\xff\xff\xff\xff\0\0\0\0", b"PK\5\6" + bytes(20), b"a"]
)
def test_bytes_between_record_batches(caches, tmp_path, extra):
    head, batch, footer = pieces_of(caches / "ladder")
    seal_cache(tmp_path / "hostile", caches / "ladder", pieces=[head, batch + extra, footer])
    assert_refused(lambda: read(tmp_path / "hostile"))


@pytest.mark.parametrize("head", [b"A", b"ARROW1\0", b"ARROW1\0\0", b"ARROW2\0\0", b"ARROW1\0\0" + bytes(64)])
def test_a_head_that_is_none(caches, tmp_path, head):
    _, batch, footer = pieces_of(caches / "ladder")
    seal_cache(tmp_path / "hostile", caches / "ladder", pieces=[head, batch, footer])
    assert_refused(lambda: read(tmp_path / "hostile"))


@pytest.mark.parametrize("rows", [1, 3, 2**31])
def test_a_number_of_rows(caches, tmp_path, rows):
    seal_cache(tmp_path / "hostile", caches / "ladder", rows=rows)
    assert_refused(lambda: read(tmp_path / "hostile"))


def test_a_table_of_the_largest_vocabulary_is_not_refused_for_its_size():
    """The limits above leave room for what is real."""
    table = IdTable(np.arange(1 << 20, dtype=np.uint32), np.empty((0, 255), np.uint32))
    data = np.frombuffer(table.to_bytes(), np.uint8)
    error, n_bytes, seconds = measured(lambda: IdTable.from_bytes(data, where="table"))
    assert error is None
    assert n_bytes <= MAX_BYTES
    assert seconds <= MAX_SECONDS


@pytest.mark.parametrize("encoding", corpus.PACKED)
def test_a_page_without_positions(encoding):
    """No rollout has one, but whoever decodes one gets an empty page, or an error of this project."""
    codec = opd_store.encodings._CODECS[encoding]
    header = layout.PAGE_HEADER.pack(codec.CODE, 0, 0, 3, 0, 0, 0, codec.NAMES[encoding], 0)
    shape = PageShape(layout.KIND_TOPK, 0, 3, 0)
    for n_streams in range(12):
        page = np.frombuffer(join_page(header, bytes(n_streams)), np.uint8)
        with contextlib.suppress(opd_store.OpdError):
            band = decode_page(page, shape, encoding=encoding, where="page")
            assert band.ids.shape == band.logprob.shape == (0, 3)
