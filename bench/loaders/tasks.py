"""What is measured of one layout, in a process of its own. Every function returns JSON values."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.random
import torch

from loaders import layout, rollouts
from loaders.layout import Batch, Layout, Reader
from loaders.rollouts import FIELDS

WARM_ROWS_S = 3.0
"""Slow formats stop a table of random rows after so long."""


def cpu_s() -> float:
    """All threads of this process and all worker processes that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def positions(batches: Iterator[Batch]) -> int:
    """Read everything."""
    count = 0
    for batch in batches:
        count += len(batch["log_tail"])
    return count


def timed(batches: Iterator[Batch]) -> dict[str, float]:
    """One pass."""
    cpu, wall = cpu_s(), time.perf_counter()
    count = positions(batches)
    del batches
    return {"positions": count, "wall": time.perf_counter() - wall, "cpu": cpu_s() - cpu}


def epoch(chosen: Layout, uri: str, *, passes: int = 2) -> list[dict[str, float]]:
    """Passes in stored order, after opening."""
    reader = chosen.open(uri)
    return [timed(reader.epoch()) for _ in range(passes)]


def opened_epoch(chosen: Layout, uri: str, *, ranks: int | None = None) -> dict[str, float]:
    """Opening and one pass, or one pass of the first ranks: what a bucket is asked for."""
    cpu, wall = cpu_s(), time.perf_counter()
    reader = chosen.open(uri)
    batches = reader.epoch() if ranks is None else chosen.few_ranks(reader, ranks)
    first = next(batches)
    first_s = time.perf_counter() - wall
    count = len(first["log_tail"]) + positions(batches)
    return {
        "positions": count,
        "wall": time.perf_counter() - wall,
        "cpu": cpu_s() - cpu,
        "first": first_s,
        "batches": record_batches(reader),
    }


def opened(chosen: Layout, uri: str) -> int:
    """Opening alone, for counting its requests."""
    chosen.open(uri)
    return 0


def record_batches(reader: Reader) -> int:
    """Of a cache of ours; 0 for others."""
    cache = getattr(reader, "cache", None)
    return 0 if cache is None else len(cache.batch_rows)


def shuffled(chosen: Layout, uri: str, *, workers: int, seed: int) -> list[dict[str, float]]:
    """Two passes in random order, after opening."""
    reader = chosen.open(uri)
    return [timed(chosen.shuffled(reader, workers, seed + number)) for number in range(2)]


def random(chosen: Layout, uri: str, *, seed: int, count: int) -> dict[str, float]:
    """Microseconds of one rollout, every value copied out as 32 bits, after a pass over the same ones."""
    reader = chosen.open(uri)
    rows = np.random.default_rng(seed).permutation(len(reader))[:count]
    times = []
    for again in range(2):
        stop = time.perf_counter() + WARM_ROWS_S
        times.clear()
        for row in np.random.default_rng(seed + again).permutation(rows):
            start = time.perf_counter()
            found = reader.rollout(int(row))
            kept = {name: layout.owned(found[name], name) for name in FIELDS}
            times.append((time.perf_counter() - start) * 1e6)
            del found, kept
            if time.perf_counter() > stop:
                break
    return {
        "p50": float(np.percentile(times, 50)),
        "p99": float(np.percentile(times, 99)),
        "count": len(times),
    }


def of_length(chosen: Layout, uri: str, *, length: int, count: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a rollout of about `length` positions: the median over the `count` nearest to it, read
    in turns. And their mean length.
    """
    reader = chosen.open(uri)
    lengths = np.array([len(reader.rollout(row)["log_tail"]) for row in range(min(300, len(reader)))])
    rows = np.abs(lengths - length).argsort()[:count]
    times = []
    for row in np.tile(rows, repeats):
        start = time.perf_counter()
        reader.rollout(int(row))
        times.append((time.perf_counter() - start) * 1e3)
    return {"p50": statistics.median(times), "length": float(lengths[rows].mean())}


def first(chosen: Layout, uri: str) -> dict[str, float]:
    """Milliseconds to an open data set, and to its first batch."""
    start = time.perf_counter()
    reader = chosen.open(uri)
    opened = time.perf_counter()
    batch = next(iter(reader.epoch()))
    done = time.perf_counter()
    assert len(batch["log_tail"])
    return {"open": (opened - start) * 1e3, "first": (done - start) * 1e3}


def anonymous_mb() -> float:
    """Memory of this process that no file is behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Growth of anonymous memory over what the process had, in MB: one number, complete at the end."""
    before = anonymous_mb()
    peak = [0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_mb() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def mapped_mb(folder: str) -> float:
    """Resident pages of files below a folder, which the kernel may take back at any time."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            inside = folder in rest
        elif inside and name == "Rss:":
            total += int(rest.split()[0])
    return total / 1024


def memory(chosen: Layout, uri: str, *, order: str) -> dict[str, float]:
    """Over opening and one epoch, and the size of its largest batch."""
    if ours := sys.modules.get("opd_store.record_batches"):
        # By itself it gives mapped pages back after 256 MiB, which is more than these caches have.
        vars(ours)["_RESIDENT_BYTES"] = 8 << 20
    largest, mapped = 0, 0.0
    with peak_memory() as peak:
        reader = chosen.open(uri)
        for batch in reader.epoch() if order == "stored" else chosen.shuffled(reader, 0, 1):
            largest = max(largest, sum(value.nbytes for value in batch.values()))
            mapped = max(mapped, mapped_mb(uri))
    return {"anon": peak[0], "mapped": mapped, "batch": largest / 2**20}


def cold(chosen: Layout, uri: str) -> dict[str, dict[str, float]]:
    """The first pass with the files dropped from the page cache, then with checks done."""
    for path in Path(uri).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader = chosen.open(uri)
    passes = [timed(reader.epoch()) for _ in range(3)]
    fresh = timed(chosen.open(uri).epoch())
    return {"cold": passes[0], "warm": passes[2], "checks": fresh}


def stall(
    chosen: Layout, uri: str, *, tokens_per_s: float, seconds: float, workers: int, seed: int
) -> dict[str, float]:
    """A trainer that takes so many tokens a second: share of the time that it waits after the first batch."""
    reader = chosen.open(uri)
    start = time.perf_counter()
    waited, longest, first_wait, n_batches, n_tokens = 0.0, 0.0, 0.0, 0, 0
    again = (batch for epoch in itertools.count() for batch in chosen.shuffled(reader, workers, seed + epoch))
    batches = again if chosen.endless is None else chosen.endless(reader, workers, seed)
    begun = start
    while time.perf_counter() - begun < seconds:
        asked = time.perf_counter()
        batch = next(batches)
        wait = time.perf_counter() - asked
        if n_batches == 0:
            first_wait, begun = wait, time.perf_counter()
        else:
            waited += wait
            longest = max(longest, wait)
        n_batches += 1
        count = len(batch["token_ids"])
        n_tokens += count
        time.sleep(count / tokens_per_s)
    total = time.perf_counter() - begun
    return {
        "share": waited / total,
        "longest": longest * 1e3,
        "first": first_wait * 1e3,
        "batches": n_batches,
        "tokens": n_tokens,
    }


def check(chosen: Layout, uri: str, *, source: str) -> str:
    """Every value of an epoch, in every order, and some single rollouts, against the source."""
    data = rollouts.load(Path(source))
    reader = chosen.open(uri)
    tolerance = {"topk_logprob": 0.0, "log_tail": 0.0}
    if "ladder" in chosen.name:
        tolerance = dict.fromkeys(tolerance, 1 / 256 + 1e-6)
    row = 0
    in_order = chosen.tasks is None or {"epoch", "bucket"} & chosen.tasks
    for batch in reader.epoch() if in_order else ():
        n_rows = len(batch["lengths"])
        compare(data.part(row, row + n_rows), batch, tolerance, half=chosen.half)
        row += n_rows
    if in_order and row != len(data):
        raise AssertionError(f"{row} rollouts, expected {len(data)}")
    if hasattr(reader, "rollout"):
        for number in (0, len(data) - 1, len(data) // 2):
            found = {
                name: layout.tensor(layout.owned(value, name))
                for name, value in reader.rollout(number).items()
            }
            compare(data.part(number, number + 1), found, tolerance, half=chosen.half)
    if chosen.shuffled is not None:
        batches = list(chosen.shuffled(reader, 0, 1))
        lengths = torch.cat([batch["lengths"] for batch in batches]).numpy()
        sums = [sum(int(batch[name].sum()) for batch in batches) for name in ("token_ids", "topk_ids")]
        wanted = [int(getattr(data, name).sum(dtype=np.int64)) for name in ("token_ids", "topk_ids")]
        if sums != wanted or (np.sort(lengths) != np.sort(np.diff(data.token_start))).any():
            raise AssertionError("the shuffled epoch is not the same rollouts")
        if len(data) > 64 and (lengths[:64] == np.diff(data.token_start)[:64]).all():
            raise AssertionError("the shuffled epoch is in stored order")
    return "ok"


def compare(data: rollouts.Rollouts, batch: Batch, tolerance: dict[str, float], *, half: bool) -> None:
    """Equal ids, and log-probs as near as the layout keeps them.

    Rounding makes ties, and a cache of ours keeps ties by rising id: its ranks are compared by id.
    """
    if tolerance["topk_logprob"]:
        order = np.argsort(data.topk_ids, axis=1)
        data = dataclasses.replace(
            data,
            topk_ids=np.take_along_axis(data.topk_ids, order, 1),
            topk_logprob=np.take_along_axis(data.topk_logprob, order, 1),
        )
        by_id = batch["topk_ids"].argsort(dim=1)
        batch = batch | {name: batch[name].gather(1, by_id) for name in ("topk_ids", "topk_logprob")}
    for name in FIELDS:
        wanted = np.array(getattr(data, name))
        if half and name in rollouts.HALF:
            wanted = wanted.astype(np.float16).astype(np.float32)
        found = batch[name].numpy()
        if found.shape != wanted.shape:
            raise AssertionError(f"{name}: shape {found.shape}, expected {wanted.shape}")
        error = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max()
        if not error <= tolerance.get(name, 0.0):
            raise AssertionError(f"{name}: largest difference {error}")


TASKS = {
    task.__name__: task
    for task in (epoch, opened, opened_epoch, shuffled, random, of_length, first, memory, cold, stall, check)
}
