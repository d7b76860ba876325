"""One buffer a batch: fields end to end, reused once nobody looks at them.

Axes: S = rollouts, T = all tokens, N = response tokens.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 64
"""Every field starts at a multiple of so many bytes: a cache line, and what vector loads like."""


class BufferPool:
    """Buffers that come back by themselves once the last array or tensor made from them is gone.

    Fresh memory costs a page fault every 4 KiB, more than filling it. A consumer may keep what it got as long
    as it likes: it is never written again while anybody can see it. Threads may share a pool.
    """

    def __init__(self, *, pinned: bool = False, keep: int = 3) -> None:
        """
        Args:
            pinned: page-locked memory, which CUDA copies from without a copy of its own. Needs CUDA.
            keep: free buffers kept at most.
        """
        self._pinned, self._keep, self._pid = pinned, keep, os.getpid()
        # Operations on a deque are atomic: a lock could be held by the thread that frees a buffer.
        self._free: deque[memoryview] = deque(maxlen=keep)
        self._inherited: list[deque[memoryview]] = []
        self._size = 0
        self._counted = np.arange(0)
        self.n_made = 0
        """Buffers allocated so far."""

    def __reduce__(self) -> tuple[object, ...]:
        # A process that only builds batches has no use for CUDA.
        return functools.partial(BufferPool, keep=self._keep), ()

    def take(self, n_bytes: int) -> NDArray[np.uint8]:
        """A writable array of at least `n_bytes` with any content, its start aligned. Views of it, and
        tensors of those, keep the buffer from being reused."""
        if self._pid != os.getpid():
            # CUDA does not survive a fork; what it pinned must not even be freed here.
            self._inherited.append(self._free)
            self._pinned, self._free, self._pid = False, deque(maxlen=self._keep), os.getpid()
        slab = None
        while slab is None or len(slab) < n_bytes:
            try:
                slab = self._free.pop()
            except IndexError:
                slab = self._make(n_bytes)
        # Made from a memoryview, so that every view has this array as its base and nothing below it.
        root = np.frombuffer(slab, np.uint8)
        weakref.finalize(root, self._free.append, slab).atexit = False
        return root

    def counted(self, n: int) -> NDArray[np.int64]:
        """[n] 0, 1, 2, ..., to be read only."""
        # Of two threads each may put its own here, and has to go on with that.
        counted = self._counted
        if len(counted) < n:
            counted = self._counted = np.arange(n + n // 4)
        return counted[:n]

    def _make(self, n_bytes: int) -> memoryview:
        if n_bytes > self._size:
            self._size = aligned(max(n_bytes, self._size * 5 // 4))
        self.n_made += 1
        size = self._size + ALIGNMENT
        memory: NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned).numpy()
        start = -memory.ctypes.data % ALIGNMENT
        return memoryview(memory)[start : start + self._size]


class Packing:
    """The arrays of one batch while they are filled, and where its rollouts begin."""

    def __init__(
        self,
        pool: BufferPool,
        lengths: NDArray[np.int64],
        response_lengths: NDArray[np.int64],
        *,
        multiple_of: int,
        response_bytes: int,
        more_bytes: int = 0,
    ) -> None:
        """Take a buffer and fill what follows from the lengths alone.

        Args:
            lengths, response_lengths: [S].
            multiple_of: T is padded to a multiple of it.
            response_bytes: at most so many bytes will be placed for each response token.
            more_bytes: and so many besides, gaps between arrays included.
        """
        n_rollouts = len(lengths)
        self.token_starts, self.response_starts = _starts(lengths), _starts(response_lengths)
        """[S + 1] int64 first token, and first response token, of each rollout."""
        self.n_tokens, n_responses = int(self.token_starts[-1]), int(self.response_starts[-1])
        """T without padding."""
        self.n_padding = -self.n_tokens % multiple_of
        n_all = self.n_tokens + self.n_padding
        fixed = 16 * n_all + (8 + response_bytes) * n_responses + 32 * (n_rollouts + 1)
        self._root = pool.take(fixed + more_bytes + _GAPS)
        self._end = 0
        self._arrays: dict[str, NDArray[Any]] = {}

        self.row_ids = self.place("row_ids", (n_rollouts,), np.int64)
        self.source_ids = self.place("source_ids", (n_rollouts,), np.int64)
        self.place("cu_seqlens", (n_rollouts + 1,), np.int32)[:] = self.token_starts
        self._arrays["cu_seqlens"][-1] = n_all
        self.place("cu_responses", (n_rollouts + 1,), np.int32)[:] = self.response_starts
        self._input_ids = self.place("input_ids", (n_all,), np.int64)
        self._input_ids[self.n_tokens :] = 0
        counted = pool.counted(n_all)
        positions = self.place("position_ids", (n_all,), np.int64)
        own = positions[: self.n_tokens]
        np.subtract(counted[: self.n_tokens], self.token_starts[:-1].repeat(lengths), out=own)
        # None that the student may have no room for, or that would change how it scales its positions.
        np.remainder(counted[: self.n_padding], lengths.max(), out=positions[self.n_tokens :])
        skipped = self.token_starts[1:] - self.response_starts[1:]
        index = self.place("response_index", (n_responses,), np.int64)
        np.add(counted[:n_responses], skipped.repeat(response_lengths), out=index)
        self.tokens = np.empty(self.n_tokens, np.uint32)
        """[T] without padding, to be filled from the outside."""
        self.loss_mask = self.place("loss_mask", (n_responses,), np.bool_)

    def place(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:  # noqa: ANN401
        """The array of this name, laid out at the first call."""
        array = self._arrays.get(name)
        if array is None:
            array = np.ndarray(shape, dtype, self._root, self._end)
            self._end += aligned(array.nbytes)
            self._arrays[name] = array
        return array

    def hold(self, values: NDArray[Any]) -> NDArray[Any]:
        """A copy of an array in the buffer, under no name."""
        array: NDArray[Any] = np.ndarray(values.shape, values.dtype, self._root, self._end)
        array[...] = values
        self._end += aligned(array.nbytes)
        return array

    def get(self, name: str) -> NDArray[Any]:
        """An array that was placed."""
        return self._arrays[name]

    def drop(self, name: str) -> None:
        """Leave a field out after all."""
        self._arrays.pop(name, None)

    def finish(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The buffer as far as it is used, [bytes] uint8, and every array as a tensor that looks into it."""
        self._input_ids[: self.n_tokens] = self.tokens
        tensors = {}
        for name, array in self._arrays.items():
            signed = array.view(np.int32) if array.dtype == np.uint32 else array
            tensors[name] = torch.from_numpy(signed)
        return torch.from_numpy(self._root[: self._end]), tensors


_GAPS = 64 * ALIGNMENT
"""Room for the ends of fields to be aligned; a batch has a dozen and a few for each joined cache."""


def aligned(n_bytes: int) -> int:
    """What an array of so many bytes takes in a buffer."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    starts = np.zeros(len(lengths) + 1, np.int64)
    lengths.cumsum(out=starts[1:])
    return starts
