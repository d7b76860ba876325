"""Plain container layouts of top-k rows: raw, npz, safetensors, Arrow IPC, Parquet.

Pairs of encode and decode for `peers.py`, which says what they have in common.
"""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray

Decoded = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32] | None]

SHAPE = struct.Struct("<QQ")
ONE_PAGE_BYTES = 1 << 28
DICTIONARY = "RLE_DICTIONARY"
PARQUET_ENCODINGS = ("BYTE_STREAM_SPLIT", "PLAIN", DICTIONARY)
ZSTD_LEVELS = (1, 3, 9)
ALL_ROWS = 1 << 30
HALF_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def narrow(logprob: NDArray[np.float32], kind: str) -> NDArray[np.generic]:
    """To fp16, bf16 (its bits as uint16, rounded to nearest even) or f32."""
    if kind == "fp16":
        return logprob.astype(np.float16)
    if kind == "bf16":
        bits = logprob.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return logprob


def widen(stored: NDArray[np.generic], kind: str) -> NDArray[np.float32]:
    """Back to float32. A table is the fastest way from fp16 that numpy has."""
    if kind == "fp16":
        return HALF_VALUES.take(stored.view(np.uint16))
    if kind == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float32)


def compact(ids: NDArray[np.uint32], vocab_size: int) -> NDArray[np.generic]:
    """uint16 ids while they fit, else int32."""
    return ids.astype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def raw_encode(ids: NDArray[np.uint32], logprob: NDArray[np.float32], _: NDArray[np.float32]) -> bytes:
    return b"".join([SHAPE.pack(*ids.shape), ids.astype("<i4").tobytes(), logprob.tobytes()])


def raw_decode(data: bytes, ranks: int | None = None) -> Decoded:
    """Copies, as a loader copies into its batch; views would cost nothing and could not be compared."""
    shape = SHAPE.unpack_from(data)
    count = shape[0] * shape[1]
    ids = np.frombuffer(data, np.int32, count, SHAPE.size).reshape(shape)
    logprob = np.frombuffer(data, np.float32, count, SHAPE.size + 4 * count).reshape(shape)
    return ids[:, :ranks].copy(), logprob[:, :ranks].copy(), None


def npz_encode(
    ids: NDArray[np.uint32], logprob: NDArray[np.float32], _: NDArray[np.float32], *, vocab_size: int
) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, ids=compact(ids, vocab_size), logprob=narrow(logprob, "fp16"))
    return file.getvalue()


def npz_decode(data: bytes) -> Decoded:
    with np.load(io.BytesIO(data)) as arrays:
        return arrays["ids"].astype(np.int32, copy=False), widen(arrays["logprob"], "fp16"), None


def safetensors_encode(
    ids: NDArray[np.uint32], logprob: NDArray[np.float32], _: NDArray[np.float32], *, vocab_size: int
) -> bytes:
    return safetensors.numpy.save({"ids": compact(ids, vocab_size), "logprob": narrow(logprob, "fp16")})


def safetensors_decode(data: bytes) -> Decoded:
    arrays = safetensors.numpy.load(data)
    return arrays["ids"].astype(np.int32, copy=False), widen(arrays["logprob"], "fp16"), None


def cells(values: NDArray[np.generic]) -> pa.Array:
    """A flat Arrow column without nulls; two-byte values as binary, Parquet has no two-byte integers."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.itemsize == 2:
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(2), flat.size, [None, pa.py_buffer(flat)])
    return pa.array(flat)


def column(table: pa.Table, name: str, dtype: type[np.generic]) -> NDArray[np.generic]:
    """The values of a flat column, without a copy where it is one chunk."""
    found = table.column(name)
    chunk = found.chunk(0) if found.num_chunks == 1 else pa.concat_arrays(found.chunks)
    return np.frombuffer(chunk.buffers()[1], dtype)[chunk.offset : chunk.offset + len(chunk)]


def parquet_file(
    columns: dict[str, pa.Array], *, encodings: dict[str, str], levels: dict[str, int], page_bytes: int
) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(columns),
        sink,
        compression="zstd",
        compression_level=levels,
        use_dictionary=[name for name in columns if encodings[name] == DICTIONARY],
        column_encoding={name: encodings[name] for name in columns if encodings[name] != DICTIONARY} or None,
        dictionary_pagesize_limit=page_bytes,
        write_statistics=False,
        store_schema=False,
        data_page_size=page_bytes,
        row_group_size=ALL_ROWS,
        max_rows_per_page=ALL_ROWS,
    )
    return sink.getvalue().to_pybytes()


def fast_parquet(columns: dict[str, pa.Array]) -> bytes:
    """Settings that are quick to write and to read."""
    encodings = dict.fromkeys(columns, "BYTE_STREAM_SPLIT")
    return parquet_file(columns, encodings=encodings, levels=dict.fromkeys(columns, 1), page_bytes=1 << 20)


def smallest_parquet(columns: dict[str, pa.Array]) -> bytes:
    """For each column the encoding and zstd level that end smallest; a column is one page."""
    chosen: dict[str, tuple[str, int]] = {}
    for name, values in columns.items():
        sizes = {
            (encoding, level): len(
                parquet_file(
                    {name: values},
                    encodings={name: encoding},
                    levels={name: level},
                    page_bytes=ONE_PAGE_BYTES,
                )
            )
            for encoding, level in itertools.product(PARQUET_ENCODINGS, ZSTD_LEVELS)
        }
        chosen[name] = min(sizes, key=sizes.__getitem__)
    return parquet_file(
        columns,
        encodings={name: encoding for name, (encoding, _) in chosen.items()},
        levels={name: level for name, (_, level) in chosen.items()},
        page_bytes=ONE_PAGE_BYTES,
    )


def parquet_encode(
    ids: NDArray[np.uint32],
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    *,
    kind: str,
    vocab_size: int,
    write: Callable[[dict[str, pa.Array]], bytes],
    tail: bool = False,
    band: int | None = None,
) -> bytes:
    """Columns of P * K rows, or of P * band rows for each band; a tail has P rows, hence its own file."""
    topk = ids.shape[1]
    stored = {"ids": compact(ids, vocab_size), "logprob": narrow(logprob, kind)}
    step = band or topk
    columns = {
        f"{name}_{start}": cells(values[:, start : start + step])
        for start in range(0, topk, step)
        for name, values in stored.items()
    }
    rows = write(columns)
    tails = write({"log_tail": pa.array(log_tail)}) if tail else b""
    return b"".join([SHAPE.pack(len(rows), topk), rows, tails])


def open_parquet(data: bytes) -> tuple[pq.ParquetFile, bytes, int]:
    """The rows' file, the bytes of the tail's file, K."""
    n_bytes, topk = SHAPE.unpack_from(data)
    rows = pa.py_buffer(data)[SHAPE.size : SHAPE.size + n_bytes]
    return pq.ParquetFile(pa.BufferReader(rows)), data[SHAPE.size + n_bytes :], topk


def parquet_decode(
    data: bytes, ranks: int | None = None, *, kind: str, vocab_size: int, band: int | None = None
) -> Decoded:
    file, tail_bytes, topk = open_parquet(data)
    step = band or topk
    starts = range(0, ranks or topk, step)
    names = [f"{name}_{start}" for start in starts for name in ("ids", "logprob")]
    table = file.read(columns=names, use_threads=False)
    id_type = np.uint16 if vocab_size <= 1 << 16 else np.int32
    value_type = np.float32 if kind == "f32" else np.uint16
    parts = [
        (
            column(table, f"ids_{start}", id_type).reshape(-1, step),
            column(table, f"logprob_{start}", value_type).reshape(-1, step),
        )
        for start in starts
    ]
    ids, logprob = parts[0]
    if len(parts) > 1:
        ids, logprob = (np.concatenate(some, axis=1) for some in zip(*parts, strict=True))
    log_tail = None
    if tail_bytes:
        tails = pq.ParquetFile(pa.BufferReader(tail_bytes)).read(use_threads=False)
        log_tail = column(tails, "log_tail", np.float32)
    return ids.astype(np.int32, copy=False), widen(logprob, kind), log_tail


def list_parquet_encode(
    ids: NDArray[np.uint32], logprob: NDArray[np.float32], _: NDArray[np.float32]
) -> bytes:
    """A row a position, lists of int32 and float16, everything else at pyarrow's defaults."""
    offsets = pa.array(np.arange(0, ids.size + 1, ids.shape[1], dtype=np.int32))
    columns = {"ids": ids.astype(np.int32), "logprob": logprob.astype(np.float16)}
    table = pa.table(
        {
            name: pa.ListArray.from_arrays(offsets, pa.array(part.reshape(-1)))
            for name, part in columns.items()
        }
    )
    sink = pa.BufferOutputStream()
    split = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in columns}
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, column_encoding=split)
    return SHAPE.pack(sink.tell(), ids.shape[1]) + sink.getvalue().to_pybytes()


def list_parquet_decode(data: bytes) -> Decoded:
    file, _, topk = open_parquet(data)
    table = file.read(use_threads=False)
    ids, logprob = (table.column(name).combine_chunks().values for name in ("ids", "logprob"))
    values = np.frombuffer(logprob.buffers()[1], np.float16)[logprob.offset :][: len(logprob)]
    return ids.to_numpy().reshape(-1, topk), values.reshape(-1, topk).astype(np.float32), None


def parquet_prefix_bytes(data: bytes, ranks: int, *, band: int) -> int:
    """Column chunks of the first bands, and the footer."""
    file, _, _ = open_parquet(data)
    group = file.metadata.row_group(0)
    chunks = [group.column(place) for place in range(group.num_columns)]
    wanted = [chunk for chunk in chunks if int(chunk.path_in_schema.rpartition("_")[2]) < ranks]
    return sum(chunk.total_compressed_size for chunk in wanted) + file.metadata.serialized_size


def arrow_encode(
    ids: NDArray[np.uint32], logprob: NDArray[np.float32], _: NDArray[np.float32], *, vocab_size: int
) -> bytes:
    columns = {"ids": pa.array(compact(ids, vocab_size).reshape(-1))}
    columns["logprob"] = pa.array(narrow(logprob, "fp16").reshape(-1))
    table = pa.table(columns).replace_schema_metadata({"topk": str(ids.shape[1])})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=9), use_threads=False)
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def arrow_decode(data: bytes, *, vocab_size: int) -> Decoded:
    options = pa.ipc.IpcReadOptions(use_threads=False)
    table = pa.ipc.open_file(pa.BufferReader(data), options=options).read_all()
    topk = int(table.schema.metadata[b"topk"])
    ids = column(table, "ids", np.uint16 if vocab_size <= 1 << 16 else np.int32).reshape(-1, topk)
    logprob = column(table, "logprob", np.float16).reshape(-1, topk)
    return ids.astype(np.int32, copy=False), widen(logprob, "fp16"), None
