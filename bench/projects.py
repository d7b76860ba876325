"""Layouts of two projects that store teacher log-probs, modelled from descriptions of their files.

Our own code for `peers.py`. Sizes and errors are meant; speeds only indicate, the projects' own differ.

- Megatron-LM, offline logits: one zstd-3 frame of the tensors, without the zip of torch.save and the tar.
- DistillKit, recommended configuration. Its float32 fit over ranks 0, 1, 2, ... goes wrong by tens of nats at
  112 fitted ranks; here the fit is float64 over ranks scaled to [0, 1], which is kinder and costs the same
  bytes. At 16 ranks and fewer nothing is fitted.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from layouts import SHAPE, Decoded, narrow, widen
from numpy.typing import NDArray

MEGATRON_MAX_VOCAB = 131_072
DISTILLKIT_EXACT = 16
"""Ranks that DistillKit's recommended configuration keeps exactly, in bfloat16."""


def megatron_encode(
    ids: NDArray[np.uint32], logprob: NDArray[np.float32], _: NDArray[np.float32], *, kind: str
) -> bytes:
    """The three tensors of a payload: values, the low 16 bits of the ids, one byte an id for bit 17."""
    if ids.max(initial=0) >= MEGATRON_MAX_VOCAB:
        raise ValueError(f"ids up to {ids.max()}, the layout holds ids below {MEGATRON_MAX_VOCAB}")
    parts = (narrow(logprob, kind), ids.astype(np.uint16), (ids >> 16).astype(np.uint8))
    payload = b"".join([SHAPE.pack(*ids.shape), *(part.tobytes() for part in parts)])
    return zstandard.ZstdCompressor(level=3).compress(payload)


def megatron_decode(data: bytes, *, kind: str) -> Decoded:
    payload = zstandard.ZstdDecompressor().decompress(data)
    shape = SHAPE.unpack_from(payload)
    count = shape[0] * shape[1]
    halves = np.frombuffer(payload, np.uint16, 2 * count, SHAPE.size)
    top_bit = np.frombuffer(payload, np.uint8, count, SHAPE.size + 4 * count)
    ids = halves[count:].astype(np.int32)
    ids |= top_bit.astype(np.int32) << 16
    return ids.reshape(shape), widen(halves[:count], kind).reshape(shape), None


def pack_ids(ids: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """[P, ceil(K * bits / 8)] the low bits of each id, most significant first, rows padded to bytes."""
    if bits == 16:
        return ids.astype(">u2").view(np.uint8)
    flags = np.unpackbits(ids.astype(">u4").view(np.uint8).reshape(*ids.shape, 4), axis=-1)[..., 32 - bits :]
    return np.packbits(flags.reshape(len(ids), -1), axis=1)


def unpack_ids(packed: NDArray[np.uint8], bits: int, topk: int) -> NDArray[np.int32]:
    """Undo `pack_ids`."""
    if bits == 16:
        return packed.view(">u2").astype(np.int32)
    flags = np.unpackbits(packed, axis=1, count=topk * bits).reshape(len(packed), topk, bits)
    padded = np.zeros((len(packed), topk, 32), np.uint8)
    padded[..., 32 - bits :] = flags
    return np.packbits(padded, axis=-1).view(">u4")[..., 0].astype(np.int32)


def distillkit_terms(count: int) -> NDArray[np.float64]:
    """[count, 6] powers 0 to 4 and the square root of the rank, which runs from 0 to 1."""
    place = np.linspace(0.0, 1.0, count)
    return np.stack([*(place**power for power in range(5)), np.sqrt(place)], axis=1)


def byte_lists(rows: NDArray[np.uint8], sequence: int) -> pa.Array:
    """list<list<uint8>>: a row of the file is a sequence of positions."""
    n_positions, width = rows.shape
    inner = pa.ListArray.from_arrays(
        pa.array(np.arange(0, rows.size + 1, width, dtype=np.int32)), pa.array(rows.reshape(-1))
    )
    ends = np.append(np.arange(0, n_positions, sequence, dtype=np.int32), np.int32(n_positions))
    return pa.ListArray.from_arrays(pa.array(ends), inner)


def distillkit_encode(
    ids: NDArray[np.uint32],
    logprob: NDArray[np.float32],
    _: NDArray[np.float32],
    *,
    vocab_size: int,
    sequence: int,
) -> bytes:
    """Exact ranks, then six coefficients for the others, by least squares in float64."""
    exact = narrow(logprob[:, :DISTILLKIT_EXACT], "bf16").view(np.uint8)
    parts = [exact]
    rest = logprob[:, DISTILLKIT_EXACT:].astype(np.float64)
    if rest.shape[1]:
        fit = np.linalg.pinv(distillkit_terms(rest.shape[1]))
        parts.append((rest @ fit.T).astype(np.float32).view(np.uint8))
    table = pa.table(
        {
            "ids": byte_lists(pack_ids(ids, (vocab_size - 1).bit_length()), sequence),
            "logprob": byte_lists(np.concatenate(parts, axis=1), sequence),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"topk": str(ids.shape[1])}), sink)
    return sink.getvalue().to_pybytes()


def distillkit_decode(data: bytes, *, vocab_size: int) -> Decoded:
    table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    topk = int(table.schema.metadata[b"topk"])

    def rows(name: str) -> NDArray[np.uint8]:
        positions = table.column(name).combine_chunks().flatten()
        return positions.flatten().to_numpy().reshape(len(positions), -1)

    ids = unpack_ids(rows("ids"), (vocab_size - 1).bit_length(), topk)
    packed = rows("logprob")
    exact = min(topk, DISTILLKIT_EXACT)
    logprob = np.empty(ids.shape, np.float32)
    logprob[:, :exact] = widen(np.ascontiguousarray(packed[:, : 2 * exact]).view(np.uint16), "bf16")
    if topk > exact:
        fitted = np.ascontiguousarray(packed[:, 2 * exact :]).view(np.float32)
        terms = distillkit_terms(topk - exact).astype(np.float32)
        np.minimum(fitted @ terms.T, 0, out=logprob[:, exact:])
    return ids, logprob, None
