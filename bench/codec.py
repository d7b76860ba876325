"""Encode and decode speed of every peer layout and encoding of ours, as ratios to Parquet.

    python bench/codec.py runs/bench-data [--positions 8192] [--topk 8,16,32,64,128] [--repeats 9] [--numpy]

DATA_DIR is what bench/data.py wrote. All sides start from the same arrays in memory and end with int32 ids
and float32 log-probs of all positions in two arrays; nothing touches a disk, and each side is one thread. A
ratio is the median of CPU-time ratios of back-to-back pairs in this run: 2.00 means twice the positions per
second of "Parquet BSS fp16" (peers.py). Ours encodes and decodes rollout by rollout, into rows of the batch,
and checks every page's checksum; peers hold all positions in one file without checksums.

The last table reads the first 8 of 64 ranks, for every layout that can do so without decoding the others.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import machine
import numpy as np
import ours
import windows
from numpy.typing import NDArray
from peers import PARQUET, Peer, peers
from windows import Windows

from opd_store import IdTable, kernels

FEW_RANKS = 8
ALL_RANKS = 64


def encode_ours(data: Windows, variant: ours.Variant) -> list[list[bytes]]:
    """Pages of every rollout."""
    log_tail = data.log_tail.astype(np.float32)
    return [
        ours.encode(data.ids[number], data.logprob[number], log_tail[number], variant)
        for number in range(len(data.ids))
    ]


def decode_ours(
    data: Windows, rollouts: list[list[bytes]], variant: ours.Variant, *, ranks: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """The first ranks of every rollout, in one batch."""
    length = data.ids.shape[1]
    ids = np.empty((data.n_positions, ranks), np.int32)
    logprob = np.empty((data.n_positions, ranks), np.float32)
    log_tail = np.empty(data.n_positions, np.float32)
    for number, pages in enumerate(rollouts):
        rows = slice(number * length, (number + 1) * length)
        ours.decode_into(ids[rows], logprob[rows], log_tail[rows], pages, variant)
    return ids, logprob, log_tail


def speeds(data: Windows, table: IdTable, repeats: int) -> list[tuple[str, ...]]:
    """Rows of name, bytes, encode ratio, decode ratio; the baseline's row gives positions per CPU-second."""
    topk = data.ids.shape[-1]
    rows = data.rows()
    layouts = {peer.name: peer for peer in peers(data.vocab_size, sequence=data.ids.shape[1])}
    base = layouts[PARQUET]
    base_bytes = base.encode(*rows)
    base_encode = functools.partial(base.encode, *rows)
    base_decode = functools.partial(base.decode, base_bytes)

    def row(
        name: str, n_bytes: int, encode: Callable[[], object] | None, decode: Callable[[], object]
    ) -> tuple[str, ...]:
        size = f"{n_bytes / data.n_positions:.1f}"
        encoding = "-" if encode is None else f"{machine.median_ratio(encode, base_encode, repeats):.2f}"
        return name, size, encoding, f"{machine.median_ratio(decode, base_decode, repeats):.2f}"

    found = []
    for peer in layouts.values():
        if peer is base or data.vocab_size > peer.max_vocab:
            continue
        encoded = peer.encode(*rows)
        encode = None if peer.searches else functools.partial(peer.encode, *rows)
        found.append(row(peer.name, len(encoded), encode, functools.partial(peer.decode, encoded)))
    for variant in ours.variants(topk, table):
        encode_all = functools.partial(encode_ours, data, variant)
        rollouts = encode_all()
        decode = functools.partial(decode_ours, data, rollouts, variant, ranks=topk)
        n_bytes = sum(len(page) for pages in rollouts for page in pages)
        found.append(row(variant.name, n_bytes, encode_all, decode))
    rates = [
        data.n_positions / statistics.median(machine.cpu_seconds(work) for _ in range(repeats)) / 1e6
        for work in (base_encode, base_decode)
    ]
    base_size = f"{len(base_bytes) / data.n_positions:.1f}"
    found.insert(0, (PARQUET, base_size, *(f"1 ({rate:.2f} M/s)" for rate in rates)))
    return found


def few_ranks(data: Windows, table: IdTable, repeats: int) -> list[tuple[str, ...]]:
    """Rows of name, bytes and time of few ranks relative to all, and time relative to all of Parquet."""
    rows = data.rows()
    layouts = peers(data.vocab_size, sequence=data.ids.shape[1])
    base: Peer = next(peer for peer in layouts if peer.name == PARQUET)
    base_decode = functools.partial(base.decode, base.encode(*rows))

    def row(
        name: str, few_bytes: int, all_bytes: int, few: Callable[[], object], everything: Callable[[], object]
    ) -> tuple[str, ...]:
        share = 1 / machine.median_ratio(few, everything, repeats)
        against = 1 / machine.median_ratio(few, base_decode, repeats)
        few_size = f"{few_bytes / data.n_positions:.1f}"
        return name, few_size, f"{few_bytes / all_bytes:.3f}", f"{share:.3f}", f"{against:.3f}"

    found = []
    for peer in layouts:
        if peer.read_ranks is not None and peer.prefix_bytes is not None:
            encoded = peer.encode(*rows)
            read = functools.partial(peer.read_ranks, encoded, FEW_RANKS)
            few_bytes = peer.prefix_bytes(encoded, FEW_RANKS)
            found.append(
                row(peer.name, few_bytes, len(encoded), read, functools.partial(peer.decode, encoded))
            )
    for variant in ours.variants(ALL_RANKS, table):
        if len(variant.bands) == 1:
            continue
        rollouts = encode_ours(data, variant)
        few_pages = [pages[:1] for pages in rollouts]
        few = functools.partial(decode_ours, data, few_pages, variant, ranks=FEW_RANKS)
        everything = functools.partial(decode_ours, data, rollouts, variant, ranks=ALL_RANKS)
        few_bytes = sum(len(pages[0]) for pages in rollouts)
        all_bytes = sum(len(page) for pages in rollouts for page in pages)
        found.append(row(variant.name, few_bytes, all_bytes, few, everything))
    return found


def main(argv: list[str] | None = None) -> None:
    """Print one table for each K, then the table of few ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--positions", type=int, default=8192, help="in whole windows")
    parser.add_argument("--topk", default="8,16,32,64,128", help="ranks kept, comma-separated")
    parser.add_argument("--repeats", type=int, default=9, help="pairs behind each median")
    parser.add_argument("--numpy", action="store_true", help="ours without the compiled loops")
    args = parser.parse_args(argv)
    kernels.COMPILED = kernels.COMPILED and not args.numpy
    print(machine.header(packages=(*machine.PACKAGES, "safetensors")))
    print(f"ours: {'compiled loops' if kernels.COMPILED else 'numpy'}")
    data = windows.load(args.data_dir, positions=args.positions)
    table = ours.id_table(args.data_dir)
    about = f"{data.label}; vocabulary {data.vocab_size:,}; {data.n_positions:,} positions"
    for topk in map(int, args.topk.split(",")):
        print(f"\n{about}; K = {topk}; positions per CPU-second relative to {PARQUET}\n")
        found = speeds(windows.keep_ranks(data, topk), table, args.repeats)
        print(machine.table(("layout", "B/position", "encode", "decode"), found), flush=True)
    print(f"\n{about}; the first {FEW_RANKS} of {ALL_RANKS} ranks relative to all, and to all of {PARQUET}\n")
    columns = ("layout", "B/position read", "bytes", "time", f"time / {PARQUET}")
    print(machine.table(columns, few_ranks(windows.keep_ranks(data, ALL_RANKS), table, args.repeats)))


if __name__ == "__main__":
    main()
