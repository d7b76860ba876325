"""What a call costs at its peak."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

MAX_BYTES, MAX_SECONDS = 64 << 20, 1.0
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def measured(call: Callable[[], object]) -> tuple[Exception | None, int, float]:
    """Run a call: (what it raised, peak of additional memory in bytes, seconds of processor time).

    Memory is the larger of what the system and what the allocators of Python, numpy and Arrow saw.
    """
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # the peak becomes what is resident now
    before = _resident("VmRSS:")
    seconds, error = _timed(call)
    n_bytes = _resident("VmHWM:") - before
    # A second time, since looking at every allocation takes time, and freed memory may be used again above.
    usual_pool = pa.default_memory_pool()
    arrow_pool = pa.proxy_memory_pool(usual_pool)
    pa.set_memory_pool(arrow_pool)
    tracemalloc.start()
    _error_of(call)
    _, traced = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    pa.set_memory_pool(usual_pool)
    if seconds > MAX_SECONDS:
        # Processor time too is longer while others use the same core.
        seconds = min(seconds, _timed(call)[0], _timed(call)[0])
    return error, max(n_bytes, traced + (arrow_pool.max_memory() or 0)), seconds


def _timed(call: Callable[[], object]) -> tuple[float, Exception | None]:
    start = time.process_time()
    error = _error_of(call)
    return time.process_time() - start, error


def _error_of(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None
