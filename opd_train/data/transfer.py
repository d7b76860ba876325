"""Batches to a device while the device is busy with the one before."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_store import Cache
from opd_train.data.batches import TeacherBatch, rebase
from opd_train.data.pages import PageDecoder


class DeviceFeed:
    """Takes batches to a device, each in one copy, and puts together the top-k that is still in pages.

    On CUDA, copies run on a stream of their own; the stream that is current when a batch is handed out waits
    for them, not the host. A pinned buffer is not reused before its copy is done. Not for several threads.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._decoders: dict[str, PageDecoder] = {}
        self._cuda = self._device.type == "cuda"
        self._in_flight: deque[tuple[torch.cuda.Event, TeacherBatch]] = deque()
        if self._cuda:
            self._stream = torch.cuda.Stream(self._device)
            weakref.finalize(self, _wait_for_all, self._in_flight, os.getpid())

    def send(self, batch: TeacherBatch) -> TeacherBatch:
        """The batch on the device, for use on the current stream. A batch that is there already, and has
        nothing left in pages, is handed back."""
        return self._hand_out(*self._start(batch))

    def feed(self, batches: Iterable[TeacherBatch]) -> Iterator[TeacherBatch]:
        """The same batches on the device; the next one is on its way while the last is in use.

        `batches` is therefore asked for one more than was handed out.
        """
        ahead: deque[tuple[TeacherBatch, torch.cuda.Event | None]] = deque()
        for batch in batches:
            ahead.append(self._start(batch))
            if len(ahead) > 1:
                yield self._hand_out(*ahead.popleft())
        for sent in ahead:
            yield self._hand_out(*sent)

    def _start(self, batch: TeacherBatch) -> tuple[TeacherBatch, torch.cuda.Event | None]:
        if not self._cuda or batch.input_ids.is_cuda:
            if batch.buffer is None:
                return batch.to(self._device), None
            buffer = batch.buffer.to(self._device)
            return self._finished(batch.rebased(buffer), batch.buffer, buffer), None
        while self._in_flight and self._in_flight[0][0].query():
            self._in_flight.popleft()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if batch.buffer is None:
                sent = batch.to(self._device)
            else:
                buffer = torch.empty_like(batch.buffer, device=self._device)
                buffer.copy_(batch.buffer, non_blocking=True)
                sent = self._finished(batch.rebased(buffer), batch.buffer, buffer)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._in_flight.append((event, batch))
        return sent, event

    def _hand_out(self, sent: TeacherBatch, event: torch.cuda.Event | None) -> TeacherBatch:
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            # Memory of the copying stream: it may have it back only when the consumer's work is done.
            for tensor in sent.tensors().values():
                tensor.record_stream(current)
        return sent

    def _finished(self, batch: TeacherBatch, old: Tensor, new: Tensor) -> TeacherBatch:
        """The batch with nothing left in pages; their arrays were in `old`, of which `new` is a copy."""
        if not batch.pending:
            return batch

        def send(array: NDArray[Any]) -> Tensor:
            return rebase(torch.from_numpy(array), old, new)

        (pending,) = batch.pending
        topk = pending.finish(self._decoder, send)
        return dataclasses.replace(
            batch, topk_ids=topk.ids, topk_logprob=topk.logprob, log_tail=topk.log_tail, pending=()
        )

    def _decoder(self, cache: Cache) -> PageDecoder:
        if cache.digest not in self._decoders:
            self._decoders[cache.digest] = PageDecoder(cache, self._device)
        return self._decoders[cache.digest]


def _wait_for_all(in_flight: deque[tuple[torch.cuda.Event, TeacherBatch]], pid: int) -> None:
    """A buffer whose copy is under way stays out of the pool."""
    if os.getpid() != pid:
        return  # CUDA does not survive a fork.
    while in_flight:
        in_flight[0][0].synchronize()
        in_flight.popleft()


def in_shared_memory(batch: TeacherBatch) -> TeacherBatch:
    """The batch in memory that another process can map: without this each tensor would be copied, and the
    buffer once more. Internal to the package."""
    if batch.buffer is None:
        return batch
    storage = torch.UntypedStorage._new_shared(batch.buffer.nbytes, device="cpu")
    shared = torch.empty(0, dtype=torch.uint8).set_(storage)
    shared.copy_(batch.buffer)
    return batch.rebased(shared)
