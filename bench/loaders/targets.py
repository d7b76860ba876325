"""What reading has to reach, from the numbers that the tables found."""

from __future__ import annotations

import math
from collections.abc import Iterator

from loaders.bench import LADDER, PLAIN, RING, Bench

COLUMNS = ("what", "measured", "target", "met")
PARQUET = ("Parquet BSS, fp16", "Parquet BSS, fp16, flat")
COMPRESSED = ("Arrow IPC zstd, fp16", "HDF5 blosc zstd, fp16")


def at_least(name: str, found: float, limit: float, unit: str = "x") -> tuple[str, ...]:
    """A row."""
    return name, shown(found, unit), f">= {limit:g}{unit}", verdict(found, found >= limit)


def at_most(name: str, found: float, limit: float, unit: str = "x") -> tuple[str, ...]:
    """A row."""
    return name, shown(found, unit), f"<= {limit:g}{unit}", verdict(found, found <= limit)


def verdict(found: float, met: bool) -> str:
    """A dash for what was not measured."""
    return "-" if math.isnan(found) else "yes" if met else "no"


def shown(found: float, unit: str) -> str:
    """Three digits."""
    return "not measured" if math.isnan(found) else f"{found:.3g}{unit}"


def targets(bench: Bench) -> list[tuple[str, ...]]:
    """All rows."""
    return [
        *epoch_rows(bench),
        *random_rows(bench),
        *first_rows(bench),
        *shuffle_rows(bench),
        *stream_rows(bench),
    ]


def value(bench: Bench, table: str, data: str, layout: str, key: str) -> float:
    """nan where it is missing."""
    return float(bench.found.get((table, data, layout), {}).get(key, math.nan))


def epoch_rows(bench: Bench) -> Iterator[tuple[str, ...]]:
    """An epoch into tensors per CPU-second. The best of ours is its ring or its new memory, as for memmap."""
    for data in ("k16", "k64"):
        ratio = value(bench, "epoch", data, f"{PLAIN}, gather, ring", RING)
        yield at_least(f"epoch, {data}: plain / memmap with reused buffers", ratio, 0.8)
        ours = value(bench, "epoch", data, f"{LADDER}, gather, ring", "cpu")
        for names, limit, what in ((PARQUET[:1], 3, "Parquet BSS"), (PARQUET[1:], 3, "Parquet BSS, flat")):
            peer = best(value(bench, "epoch", data, name, "cpu") for name in names)
            yield at_least(f"epoch, {data}: ladder/128 / {what}", ours / peer, limit)
        peer = best(value(bench, "epoch", data, name, "cpu") for name in COMPRESSED)
        yield at_least(f"epoch, {data}: ladder/128 / Arrow IPC zstd or HDF5 blosc", ours / peer, 1.5)


def best(values: Iterator[float]) -> float:
    """The largest that there is."""
    return max((found for found in values if not math.isnan(found)), default=math.nan)


def random_rows(bench: Bench) -> Iterator[tuple[str, ...]]:
    """Random rollouts."""
    ratio = value(bench, "random", "k64", f"{PLAIN}, gather, ring", "ratio")
    yield at_most("random rollout, k64, p50: plain / memmap", ratio, 1.6)
    found = value(bench, "of length", "k64", f"{LADDER}, gather, ring", "p50")
    yield at_most("rollout of 512 positions, k64, p50: ladder/128", found, 0.3, " ms")


def first_rows(bench: Bench) -> Iterator[tuple[str, ...]]:
    """Opening."""
    for data, limit in (("open-250", 15), ("open-1000", 30)):
        for name in (PLAIN, LADDER):
            found = value(bench, "first", data, f"{name}, gather, ring", "first")
            shards = data.partition("-")[2]
            yield at_most(f"first batch, {shards} shards: {name.removeprefix('ours: ')}", found, limit, " ms")


def shuffle_rows(bench: Bench) -> Iterator[tuple[str, ...]]:
    """Random order and memory."""
    table = {
        name: found
        for (kind, data, name), found in bench.found.items()
        if (kind, data) == ("shuffled", "k16")
    }
    peer = best(found.get("wall 0", math.nan) for name, found in table.items() if not name.startswith("ours"))
    for order in ("global", "block"):
        ours = value(bench, "shuffled", "k16", f"{PLAIN}, stream, {order}", "wall 0")
        yield at_least(
            f"shuffled epoch, k16, one process: plain, {order} / best existing loader", ours / peer, 1.5
        )
    for name in (PLAIN, LADDER):
        found = bench.found.get(("shuffled memory", "k16", f"{name}, stream, global"), {})
        limit = 2 * found.get("batch", math.nan) + 40
        what = f"anonymous memory, shuffled, k16: {name.removeprefix('ours: ')}"
        yield at_most(what, found.get("anon", math.nan), round(limit) if found else math.nan, " MB")
        share = value(bench, "memory", "k16", f"{name}, gather, ring", "resident of added")
        short = name.removeprefix("ours: ")
        what = f"resident memory, 4x the cache, given back after 8 MiB: {short}, share of the added bytes"
        yield at_most(what, share, 0.25, "")


def stream_rows(bench: Bench) -> Iterator[tuple[str, ...]]:
    """From a bucket, and a trainer's waiting."""
    for name in (PLAIN, LADDER):
        layout, short = f"{name}, gather, ring", name.removeprefix("ours: ")
        found = bench.found.get(("bucket", "s3", layout), {})
        share = found.get("bytes", math.nan) / found.get("stored", math.nan)
        yield at_most(f"S3 epoch: {short}, bytes / stored", share, 1.05)
        what = f"S3 epoch: {short}, requests a record batch after opening"
        yield at_most(what, found.get("per batch", math.nan), 1.2, "")
        yield at_most(
            f"S3, 8 of 64 ranks: {short}, bytes", value(bench, "bucket few", "s3", layout, "share"), 0.25
        )
    for place in ("local", "S3 + 50 ms"):
        for name in (PLAIN, LADDER):
            for order in ("global", "block"):
                share = 100 * value(bench, "stall", place, f"{name}, stream, {order}", "share")
                what = f"waiting at 20,000 tokens/s, {place}: {name.removeprefix('ours: ')}, {order}"
                yield at_most(what, share, 1, " %")
