"""What the format has to reach, measured in one run: `make bench-format`.

    python bench/targets.py runs/bench-data [--positions 12276] [--repeats 9]

DATA_DIR is what bench/data.py wrote. Sizes and errors are of evaluation windows, the id table is learnt from
the training windows. Speeds are of one thread, in CPU time, and ratios are medians of interleaved pairs.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path

import codec
import machine
import ours
import size
import windows
from peers import LIST_PARQUET, PARQUET, peers
from windows import Windows

from opd_store import IdTable

TOPK = 64
ENCODING = "ladder/128"
MAX_KL = 4e-6
MAX_ERROR = 1 / 256


def verdict(name: str, found: str, wanted: str, met: bool) -> tuple[str, ...]:
    """One row."""
    return name, found, wanted, "yes" if met else "no"


def sizes(data: Windows, table: IdTable, in_bands: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Rows about bytes and errors."""
    rows = []
    for bands in ((TOPK,), in_bands):
        for chosen, limits in ((None, (152,)), (table, (130, 115))):
            one = size.measure_variant(data, ours.Variant(ENCODING, bands, chosen))
            rows += [
                verdict(
                    one.name.removeprefix("ours: "),
                    f"{one.bytes_per_position:.1f} B",
                    f"<= {limit}",
                    one.bytes_per_position <= limit,
                )
                for limit in limits
            ]
    rows.append(verdict("  its mean KL", f"{one.kl:.1e}", f"<= {MAX_KL:.0e}", one.kl <= MAX_KL))
    error = one.max_error
    rows.append(verdict("  its largest error", f"{error:.6f}", f"<= {MAX_ERROR:.6f}", error <= MAX_ERROR))
    return rows


def speeds(data: Windows, table: IdTable, in_bands: tuple[int, ...], repeats: int) -> list[tuple[str, ...]]:
    """Rows about decoding."""
    layouts = {peer.name: peer for peer in peers(data.vocab_size, sequence=data.ids.shape[1])}
    rows = []
    for chosen in (None, table):
        variant = ours.Variant(ENCODING, (TOPK,), chosen)
        rollouts = codec.encode_ours(data, variant)
        decode = functools.partial(codec.decode_ours, data, rollouts, variant, ranks=TOPK)
        for name in (LIST_PARQUET, PARQUET):
            peer_decode = functools.partial(layouts[name].decode, layouts[name].encode(*data.rows()))
            ratio = machine.median_ratio(decode, peer_decode, repeats)
            what = f"decode {variant.name.removeprefix('ours: ')} / {name}"
            rows.append(verdict(what, f"{ratio:.2f}x", ">= 2x", ratio >= 2))
    rate = data.n_positions / statistics.median(machine.cpu_seconds(decode) for _ in range(repeats)) / 1e6
    rows.append(verdict("  positions a second, one core", f"{rate:.2f} M", ">= 1 M", rate >= 1))
    variant = ours.Variant(ENCODING, in_bands, table)
    rollouts = codec.encode_ours(data, variant)
    first = [pages[:1] for pages in rollouts]
    share = sum(len(pages[0]) for pages in first) / sum(len(page) for pages in rollouts for page in pages)
    few = functools.partial(codec.decode_ours, data, first, variant, ranks=8)
    everything = functools.partial(codec.decode_ours, data, rollouts, variant, ranks=TOPK)
    time_share = 1 / machine.median_ratio(few, everything, repeats)
    rows.append(verdict("8 of 64 ranks, bytes", f"{share:.3f}", "<= 0.25", share <= 0.25))
    rows.append(verdict("8 of 64 ranks, time", f"{time_share:.3f}", "<= 0.25", time_share <= 0.25))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--positions", type=int, default=12_276, help="in whole windows")
    parser.add_argument("--repeats", type=int, default=9, help="pairs behind each median")
    args = parser.parse_args(argv)
    print(machine.header())
    data = windows.keep_ranks(windows.load(args.data_dir, positions=args.positions), TOPK)
    train = windows.load(args.data_dir, part="train")
    table = ours.id_table(args.data_dir)
    in_bands = ours.layout.band_ends(TOPK)
    print(
        f"\n{data.label}; K = {TOPK}; {data.n_positions:,} positions; id table of {len(table.lists):,} "
        f"lists, {len(table.to_bytes()):,} bytes, learnt from {train.n_positions:,} other positions\n"
    )
    found = sizes(data, table, in_bands) + speeds(data, table, in_bands, args.repeats)
    print(machine.table(("what", "measured", "target", "met"), found))


if __name__ == "__main__":
    main()
