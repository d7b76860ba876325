"""Arrow's metadata is looked at before Arrow is: what passes costs no more than it weighs."""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa
import pytest
from faults import corpus
from faults.cost import measured
from hypothesis import given, settings
from hypothesis import strategies as st

import opd_store
from fuzz.structure import pieces_of, seal_cache
from opd_store import arrow_message
from opd_store.arrow_message import check_record_batch, record_batches

SCHEMA = pa.schema([("a", pa.int64()), ("b", pa.binary())])
BATCH = pa.record_batch([pa.array([1, 2, 3]), pa.array([b"x", b"", b"yz"])], schema=SCHEMA)
LARGE = pa.record_batch([pa.array(np.zeros(1 << 23, np.int64))], names=["a"])


def file_of(*batches: pa.RecordBatch, compression: str | None = None) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, batches[0].schema, options=options) as out:
        for batch in batches:
            out.write_batch(batch)
    return sink.getvalue()


def messages_of(file: pa.Buffer) -> list[pa.Buffer]:
    return [file.slice(offset, length) for offset, length in record_batches(file)]


def test_what_arrow_writes_passes():
    file = file_of(BATCH, BATCH.slice(1), BATCH.slice(0, 0))
    messages = messages_of(file)
    assert len(messages) == 3
    for message, batch in zip(messages, (BATCH, BATCH.slice(1), BATCH.slice(0, 0)), strict=True):
        check_record_batch(message)
        assert pa.ipc.read_record_batch(message, SCHEMA).equals(batch)
    check_record_batch(BATCH.serialize())


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_compressed_body_is_refused_before_it_is_opened(codec):
    (message,) = messages_of(file_of(LARGE, compression=codec))
    assert message.size < 1 << 20
    error, n_bytes, seconds = measured(lambda: check_record_batch(message))
    assert type(error) is ValueError
    assert "compressed" in str(error)
    assert n_bytes < 1 << 20
    assert seconds < 0.1


def test_variable_buffers_are_refused():
    views = pa.record_batch([pa.array(["a", "long enough not to be inlined"], pa.string_view())], names=["a"])
    (message,) = messages_of(file_of(views))
    with pytest.raises(ValueError, match="variable buffers"):
        check_record_batch(message)


def test_other_messages_are_refused():
    dictionary = pa.record_batch([pa.array(["a", "b"]).dictionary_encode()], names=["a"])
    with pytest.raises(ValueError, match="dictionaries"):
        record_batches(file_of(dictionary))
    with pytest.raises(ValueError, match="type 1, expected a record batch"):
        check_record_batch(SCHEMA.serialize())
    reader = pa.ipc.MessageReader.open_stream(dictionary_stream(dictionary))
    reader.read_next_message()
    with pytest.raises(ValueError, match="type 2, expected a record batch"):
        check_record_batch(reader.read_next_message().serialize())


def dictionary_stream(batch: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as out:
        out.write_batch(batch)
    return sink.getvalue()


@pytest.mark.parametrize("length", range(BATCH.serialize().size))
def test_a_cut_message_is_refused(length):
    with pytest.raises(ValueError, match=r"Arrow metadata does not parse|bytes of body"):
        check_record_batch(BATCH.serialize().slice(0, length))


def test_a_longer_message_is_refused():
    for extra in (b"\0", bytes(8), b"\xff" * 8):
        with pytest.raises(ValueError, match="bytes of body"):
            check_record_batch(pa.py_buffer(BATCH.serialize().to_pybytes() + extra))


def test_a_cut_file_is_refused():
    file = file_of(BATCH)
    for length in range(file.size):
        with pytest.raises(ValueError, match=r"Arrow metadata|record batch"):
            record_batches(file.slice(0, length))


@pytest.mark.parametrize("position", [*range(16), -1])
@pytest.mark.parametrize("value", [0, 1, 0x7F, 0x80, 0xFF])
def test_lengths_at_their_limits(position, value):
    data = bytearray(BATCH.serialize().to_pybytes())
    data[position] = value
    parse(bytes(data))


def parse(data: bytes) -> None:
    """Whatever the bytes are: ValueError, or a message that Arrow reads in place or refuses."""
    message = pa.py_buffer(data)
    try:
        check_record_batch(message)
    except ValueError:
        return
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    try:
        batch = pa.ipc.read_record_batch(message, SCHEMA)
        batch.validate(full=True)
    except (pa.ArrowException, OSError):
        return
    assert pool.bytes_allocated() - before < 4096


def test_every_bit_of_the_metadata():
    """No flip, whatever it turns the tables into, ends in anything but ValueError."""
    data = BATCH.serialize().to_pybytes()
    n_metadata = struct.unpack_from("<i", data, 4)[0]
    for bit in range(8 * (8 + n_metadata)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        parse(bytes(flipped))
    file = file_of(BATCH).to_pybytes()
    for bit in range(8 * len(file)):
        flipped = bytearray(file)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = record_batches(pa.py_buffer(bytes(flipped)))
        except ValueError:
            continue
        assert all(0 <= offset <= offset + length <= len(file) for offset, length in found)


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=64), st.integers(0, 63), st.integers(0, 2**32 - 1))
def test_noise(noise, at, word):
    parse(noise)
    parse(struct.pack("<Ii", 0xFFFFFFFF, len(noise) & ~7) + noise)
    data = bytearray(BATCH.serialize().to_pybytes())
    struct.pack_into("<I", data, 4 * at % (len(data) - 3), word)
    parse(bytes(data))
    with pytest.raises(ValueError, match=r"Arrow metadata|record batch|dictionaries"):
        record_batches(pa.py_buffer(noise + struct.pack("<i6s", word >> 1, b"ARROW1")))


@pytest.fixture(scope="module")
def intact():
    with corpus.memory_folder() as folder:
        corpus.write(folder / "cache", "plain", corpus.rollouts("plain", response_len=3))
        yield folder / "cache"


def test_every_bit_of_a_resealed_message(intact, tmp_path):
    """Metadata that says anything, under right checksums, through the public API.

    Some flips leave rows that make sense, such as the offset of a buffer of missing values; no other is read.
    """
    head, message, footer = pieces_of(intact)
    n_metadata = struct.unpack_from("<i", message, 4)[0]
    refused = 0
    for bit in range(0, 8 * (8 + n_metadata), 13):
        changed = bytearray(message)
        changed[bit // 8] ^= 1 << bit % 8
        path = tmp_path / str(bit)
        seal_cache(path, intact, pieces=[head, bytes(changed), footer])
        try:
            list(opd_store.open(path))
        except opd_store.FormatError:
            refused += 1
    assert refused > 300


def test_half_an_item_at_the_end_of_a_buffer(intact, tmp_path):
    """Arrow asks only for enough bytes; a buffer of one more is no array of numbers."""
    head, message, footer = pieces_of(intact)
    n_metadata = struct.unpack_from("<i", message, 4)[0]
    metadata = message[8 : 8 + n_metadata]
    batch = opd_store.open(intact).shard_reader(0).batch(0)
    refused = 0
    for width, column in ((4, batch.column("token_ids").values), (4, batch.column("teacher_logprob").values)):
        length = len(column) * width
        for at in range(0, len(metadata) - 7):
            if struct.unpack_from("<q", metadata, at)[0] != length:
                continue
            changed = bytearray(message)
            struct.pack_into("<q", changed, 8 + at, length + 1)
            path = tmp_path / f"{width}-{length}-{at}"
            seal_cache(path, intact, pieces=[head, bytes(changed), footer])
            try:
                list(opd_store.open(path))
            except opd_store.FormatError as error:
                refused += "-byte items" in str(error)
    assert refused >= 2


def with_pages_at(message: bytes, by: int, slack: int) -> bytes:
    """The last column, of pages, with its values `by` bytes further on, and `slack` bytes after them."""
    body = 8 + struct.unpack_from("<i", message, 4)[0]
    batch = arrow_message._Table.root(message[8:body]).table(arrow_message._MESSAGE_HEADER)
    (at, n_ends), (start, length) = batch.structs(arrow_message._BATCH_BUFFERS, arrow_message._BUFFER)[-2:]
    ends = np.frombuffer(message[body + at : body + at + n_ends], np.int32) + np.int32(by)
    values = bytes(by) + message[body + start : body + start + length] + bytes(slack)
    values += bytes(-len(values) % 8)
    metadata = message[:body]
    for old, new in (
        (struct.pack("<qq", start, length), struct.pack("<qq", start, by + length + slack)),
        (struct.pack("<q", len(message) - body), struct.pack("<q", start + len(values))),
    ):
        assert metadata.count(old) == 1
        metadata = metadata.replace(old, new)
    return (
        metadata
        + message[body : body + at]
        + ends.tobytes()
        + message[body + at + n_ends :][: start - at - n_ends]
        + values
    )


@pytest.mark.parametrize("slack", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("by", [0, 1, 2, 4, 8])
def test_pages_that_are_not_aligned(intact, tmp_path, by, slack):
    """`gather` reads pages as words: what it cannot read as such is refused, and no other page is read."""
    head, message, footer = pieces_of(intact)
    seal_cache(tmp_path / "cache", intact, pieces=[head, with_pages_at(message, by, slack), footer])
    expected = opd_store.gather(opd_store.open(intact), [0, 1])
    cache = opd_store.open(tmp_path / "cache")
    for _ in range(2):  # The second time, as proven before.
        if by % 8:
            with pytest.raises(opd_store.FormatError, match=r"a page that is not aligned"):
                opd_store.gather(cache, [0, 1])
            continue
        found = opd_store.gather(cache, [0, 1])
        assert found.topk_ids.tolist() == expected.topk_ids.tolist()
        assert found.topk_logprob.tolist() == expected.topk_logprob.tolist()
        assert found.log_tail.tolist() == expected.log_tail.tolist()


def test_record_batches_that_are_not_aligned(intact, tmp_path):
    head, message, footer = pieces_of(intact)
    seal_cache(tmp_path / "cache", intact, pieces=[head + bytes(4), message, footer])
    with pytest.raises(opd_store.FormatError, match=r"a record batch is not aligned"):
        opd_store.open(tmp_path / "cache")
