"""How others lay out the same rows: pairs of encode and decode with one starting point and one end.

    encode(ids u32 [P, K], logprob f32 [P, K], log_tail f32 [P]) -> bytes
    decode(bytes) -> ids i32 [P, K], logprob f32 [P, K], log_tail f32 [P] or None

All positions go into one file, so that footers and headers weigh nothing. Where a layout leaves a choice, it
is made in the peer's favour: flat columns besides lists, ids as uint16 while the vocabulary allows, no
statistics. Parquet layouts named "smallest" try zstd levels 1, 3 and 9 and three encodings for each column.

A name that begins with "model of" is our own code, written to a description of that project's layout
(projects.py); the others are the libraries themselves (layouts.py).

Input ids are not counted, neither here nor on our side: they cost everybody the same. Needs safetensors, and
pyarrow >= 23 for Parquet pages of more than 20,000 rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import layouts
import numpy as np
import projects
from layouts import Decoded
from numpy.typing import NDArray

Encode = Callable[[NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32]], bytes]

PARQUET = "Parquet BSS fp16"
"""The peer that speeds are compared with: zstd-1, the fastest to write and as fast as any level to read."""
LIST_PARQUET = "Parquet BSS fp16, lists"
"""The same as people write it."""
BAND = 8
"""Ranks of one column pair in the Parquet layout that can read few ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One layout. `decode` gives no tail where none is stored."""

    name: str
    note: str
    stores_tail: bool = False
    searches: bool = False
    """`encode` tries many settings, so its time says nothing."""
    max_vocab: int = 1 << 31
    encode: Encode
    decode: Callable[[bytes], Decoded]
    read_ranks: Callable[[bytes, int], Decoded] | None = None
    """The first ranks of every position, without decoding the others."""
    prefix_bytes: Callable[[bytes, int], int] | None = None
    """Bytes that `read_ranks` needs of the file."""


def peers(vocab_size: int, *, sequence: int = 1023) -> list[Peer]:
    """All layouts for ids below `vocab_size`; `sequence` is the number of positions of one rollout."""
    by_vocab = {"vocab_size": vocab_size}
    known = functools.partial

    def smallest(kind: str, *, tail: bool = False) -> Peer:
        return Peer(
            name=f"Parquet {kind}, smallest" + (" + tail" if tail else ""),
            note="for each column the best of BSS, plain and dictionary at zstd-1, 3 and 9, in one page"
            + ("; log_tail f32 added" if tail else ""),
            stores_tail=tail,
            searches=True,
            encode=known(
                layouts.parquet_encode, kind=kind, write=layouts.smallest_parquet, tail=tail, **by_vocab
            ),
            decode=known(layouts.parquet_decode, kind=kind, **by_vocab),
        )

    banded = {"kind": "fp16", "band": BAND, **by_vocab}
    banded_decode = known(layouts.parquet_decode, **banded)
    return [
        Peer(
            name="raw int32 + f32",
            note="the two arrays, read by copy; every memory page of it is touched for any rank",
            encode=layouts.raw_encode,
            decode=layouts.raw_decode,
            read_ranks=layouts.raw_decode,
            prefix_bytes=lambda data, _: len(data),
        ),
        Peer(
            name="npz, fp16",
            note="np.savez_compressed",
            encode=known(layouts.npz_encode, **by_vocab),
            decode=layouts.npz_decode,
        ),
        Peer(
            name="safetensors, fp16",
            note="no compression",
            encode=known(layouts.safetensors_encode, **by_vocab),
            decode=layouts.safetensors_decode,
        ),
        Peer(
            name="Arrow IPC zstd, fp16",
            note="flat columns in one batch, zstd-9",
            encode=known(layouts.arrow_encode, **by_vocab),
            decode=known(layouts.arrow_decode, **by_vocab),
        ),
        Peer(
            name=PARQUET,
            note="flat columns, zstd-1, pages of 1 MiB",
            encode=known(layouts.parquet_encode, kind="fp16", write=layouts.fast_parquet, **by_vocab),
            decode=known(layouts.parquet_decode, kind="fp16", **by_vocab),
        ),
        Peer(
            name=LIST_PARQUET,
            note="a row a position, list<int32> and list<float16>, pyarrow's defaults with zstd",
            encode=layouts.list_parquet_encode,
            decode=layouts.list_parquet_decode,
        ),
        smallest("fp16"),
        smallest("fp16", tail=True),
        smallest("bf16"),
        smallest("bf16", tail=True),
        smallest("f32"),
        Peer(
            name="Parquet BSS fp16, by 8 ranks",
            note="a column pair for every 8 ranks, zstd-1, pages of 1 MiB: can read few ranks",
            encode=known(layouts.parquet_encode, write=layouts.fast_parquet, **banded),
            decode=banded_decode,
            read_ranks=banded_decode,
            prefix_bytes=known(layouts.parquet_prefix_bytes, band=BAND),
        ),
        *(
            Peer(
                name=f"model of Megatron-LM, {kind}",
                note="17-bit ids as uint16 and a byte, one zstd-3 frame; no torch.save or tar overhead",
                max_vocab=projects.MEGATRON_MAX_VOCAB,
                encode=known(projects.megatron_encode, kind=kind),
                decode=known(projects.megatron_decode, kind=kind),
            )
            for kind in ("fp16", "bf16")
        ),
        Peer(
            name="model of DistillKit",
            note="16 exact bf16, six f32 terms fitted in float64 over ranks scaled to [0, 1], packed ids, "
            "snappy Parquet of byte lists",
            encode=known(projects.distillkit_encode, sequence=sequence, **by_vocab),
            decode=known(projects.distillkit_decode, **by_vocab),
        ),
    ]
