"""What an id table saves, against the number of positions it is learnt from.

    python bench/tables.py runs/bench-data [--learn 10000,40000,100000,300000] [--positions 12000]

DATA_DIR is what bench/data.py wrote. Tables are learnt from training windows and used on evaluation windows,
which come from other problems, programs and pages. `pays from` is the size of a cache, in positions, whose
pages save as many bytes as the table's file has, against pages without a table.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import machine
import numpy as np
import ours
import windows
from windows import Windows

from opd_store import IdTable, build_id_table

TOPK = 64


def page_bytes(data: Windows, variant: ours.Variant) -> float:
    """Bytes a position."""
    n_bytes = 0
    for number in range(len(data.ids)):
        log_tail = data.log_tail[number].astype(np.float32)
        pages = ours.encode(data.ids[number], data.logprob[number], log_tail, variant)
        n_bytes += sum(len(page) for page in pages)
    return n_bytes / data.n_positions


def main(argv: list[str] | None = None) -> None:
    """Print one row a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--learn", default="10000,40000,100000,300000", help="positions, comma-separated")
    parser.add_argument("--lists", default="", help="numbers of lists to try at the most positions")
    parser.add_argument("--positions", type=int, default=12_000, help="measured, in whole windows")
    parser.add_argument("--encoding", default="ladder/128")
    args = parser.parse_args(argv)
    print(machine.header())
    data = windows.keep_ranks(windows.load(args.data_dir, positions=args.positions), TOPK)
    amounts = [int(amount) for amount in args.learn.split(",")]
    jobs: list[tuple[int, int | None]] = [(amount, None) for amount in amounts]
    jobs += [(max(amounts), int(n_lists)) for n_lists in args.lists.split(",") if n_lists]
    plain_size = page_bytes(data, ours.Variant(args.encoding, (TOPK,)))
    rows = [
        ("no table", "-", "-", "-", f"{plain_size:.1f}", f"{in_bands(data, args.encoding, None):.1f}", "-")
    ]
    for amount, n_lists in jobs:
        train = windows.keep_ranks(windows.load(args.data_dir, part="train", positions=amount), TOPK)
        started = time.process_time()
        table = build_id_table(list(train.ids), vocab_size=train.vocab_size, n_lists=n_lists)
        seconds = time.process_time() - started
        size = page_bytes(data, ours.Variant(args.encoding, (TOPK,), table))
        file_bytes = len(table.to_bytes())
        rows.append(
            (
                f"{train.n_positions:,} positions",
                f"{len(table.lists):,}",
                f"{file_bytes:,}",
                f"{seconds:.0f}",
                f"{size:.1f}",
                f"{in_bands(data, args.encoding, table):.1f}",
                f"{file_bytes / (plain_size - size):,.0f}",
            )
        )
    print(f"\n{data.label}; {args.encoding}; K = {TOPK}; {data.n_positions:,} positions measured\n")
    columns = ("learnt from", "lists", "table bytes", "CPU s", "B/position", "in bands", "pays from")
    print(machine.table(columns, rows))


def in_bands(data: Windows, encoding: str, table: IdTable | None) -> float:
    """Bytes a position in the default bands."""
    bands = ours.layout.band_ends(TOPK)
    return page_bytes(data, ours.Variant(encoding, bands, table))


if __name__ == "__main__":
    main()
