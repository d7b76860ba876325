"""Batches before they are asked for: their bytes are announced first, then threads build them."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from opd_store import Cache
from opd_train.data.assemble import BatchAssembler
from opd_train.data.batches import TeacherBatch
from opd_train.data.plan import Step

PREFETCH_BATCHES = 8
"""How many batches ahead their bytes are asked for, so that requests to a bucket overlap."""
PREFETCH_BYTES = 128 << 20
"""Fewer if they have more bytes, so that with a window of 256 MiB no request is dropped (at 384 MiB)."""


def batches_to_announce(caches: Sequence[Cache], batch_tokens: int) -> int:
    """How many batches have `PREFETCH_BYTES`, 1..PREFETCH_BATCHES."""
    per_token = max(cache.n_bytes / max(cache.n_tokens, 1) for cache in caches)
    return max(1, min(PREFETCH_BATCHES, int(PREFETCH_BYTES / max(per_token * batch_tokens, 1))))


def announced(steps: Iterator[Step], assembler: BatchAssembler, n_ahead: int) -> Iterator[Step]:
    """The same steps; each was announced to the assembler `n_ahead` steps before."""
    waiting: deque[Step] = deque()
    for step in steps:
        assembler.prefetch(step.source, step.rows)
        waiting.append(step)
        if len(waiting) > n_ahead:
            yield waiting.popleft()
    yield from waiting


class BuildAhead:
    """The batches of some steps, in their order, built by threads."""

    def __init__(self, steps: Iterator[Step], assembler: BatchAssembler, workers: int) -> None:
        """
        Args:
            workers: threads, each with one batch; 0 builds when asked.
        """
        self._steps, self._assembler, self._workers = steps, assembler, workers
        self._executor: ThreadPoolExecutor | None = None
        self._building: deque[tuple[Step, Callable[[], TeacherBatch]]] = deque()

    def next(self) -> tuple[Step, TeacherBatch] | None:
        """The next step and its batch, or None after the last. Raises what building it raised."""
        self._fill()
        if not self._building:
            return None
        step, built = self._building.popleft()
        batch = built()
        self._fill()
        return step, batch

    def close(self) -> None:
        """Stop the threads, without waiting for them, and drop what they built."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
        self._building.clear()

    def _fill(self) -> None:
        # Threads hold neither this object nor the iterator, so that they end when it is dropped.
        while len(self._building) < max(1, self._workers) and (step := next(self._steps, None)) is not None:
            built: Callable[[], TeacherBatch]
            if not self._workers:
                built = functools.partial(self._assembler.assemble, step.source, step.rows)
            else:
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(self._workers, thread_name_prefix="opd-stream")
                future = self._executor.submit(self._assembler.assemble, step.source, step.rows)
                built = future.result
            self._building.append((step, built))
