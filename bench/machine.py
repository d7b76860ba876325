"""What a measurement ran on, and how the programs of this folder time and print.

    python bench/machine.py

Machines are shared and noisy, so times are never compared across runs: `median_ratio` interleaves two
callables in one process and keeps only the ratio, in CPU time.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = ("numpy", "pyarrow", "zstandard")


def cpu_model() -> str:
    """The name the kernel gives the processor, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    """Physical memory; nan where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):
        return float("nan")


def header(*, seed: int | None = None, packages: Sequence[str] = PACKAGES) -> str:
    """Two lines for the top of every table. Packages that are not installed are left out."""
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = f"{cpu_model()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB, {platform.system()}"
    seeds = [] if seed is None else [f"seed {seed}"]
    return "\n".join([f"Machine: {machine} {platform.machine()}", ", ".join([*versions, *seeds])])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned for reading as plain text: first column left, others right."""
    widths = [max(len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *rest])} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(columns), line(rule), *(line(row) for row in rows)])


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of one call, over all threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def median_ratio(ours: Callable[[], object], peer: Callable[[], object], repeats: int) -> float:
    """How many times faster `ours` is: the median of time(peer) / time(ours) over interleaved pairs.

    Each pair runs back to back, in turns first, after one call of each that is not timed.
    """
    ours()
    peer()
    ratios = []
    for number in range(repeats):
        if number % 2:
            peer_s = cpu_seconds(peer)
            ours_s = cpu_seconds(ours)
        else:
            ours_s = cpu_seconds(ours)
            peer_s = cpu_seconds(peer)
        ratios.append(peer_s / max(ours_s, 1e-9))
    return statistics.median(ratios)


if __name__ == "__main__":
    print(header())
