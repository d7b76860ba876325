"""Batches built in worker processes, in the stream's order; an error says what a dead worker was at."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess, parent_process
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal

import torch

# Teaches pipes to pass tensors as shared memory.
import torch.multiprocessing

from opd_store import InvalidArgumentError, OpdError
from opd_train.data.assemble import BatchAssembler
from opd_train.data.batches import TeacherBatch
from opd_train.data.plan import Step
from opd_train.data.position import State
from opd_train.data.stream import CacheStream
from opd_train.data.transfer import in_shared_memory

_AHEAD = 2
"""Batches a worker is asked for at a time, so that it does not wait for the next order."""
_EXIT_S = 5.0
"""How long a process is given to end."""
_HINTS = {
    "SIGKILL": "the kernel does this when memory runs out: use fewer workers or smaller batches",
    "SIGBUS": "a shard was cut while it was mapped, or /dev/shm is full; run `opd verify` to see",
}


class WorkerError(OpdError):
    """A worker process died or fell silent. Nothing of its batch was delivered; the next call starts anew."""

    def __init__(
        self,
        message: str,
        *,
        pid: int = -1,
        exit_code: int | None = None,
        source: Sequence[int] = (),
        rows: Sequence[int] = (),
        shards: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.pid, self.exit_code = pid, exit_code
        self.source, self.rows, self.shards = tuple(source), tuple(rows), tuple(shards)


@dataclass(slots=True, eq=False)
class _Worker:
    process: BaseProcess
    requests: Connection
    replies: Connection
    asked: deque[Step] = field(default_factory=deque)
    """What it was asked to build and was not received yet, in order."""


class CacheLoader:
    """Iterates over the batches of a stream, built in worker processes.

    Order, position and errors are those of the stream, whatever the number of workers: `state_dict` counts
    the batches that were delivered, and loads into a loader with another number of workers or into a stream.
    Every worker builds up to two batches ahead, in shared memory that has no name and so cannot stay behind.
    This process sends them to the stream's device.

    Every worker fetches what its batches need for itself. A record batch is spread over the batches of a
    window, so without a `cache_dir` nearly all of a bucket is fetched once by each worker: there, prefer the
    stream's threads.
    """

    def __init__(
        self,
        stream: CacheStream,
        *,
        num_workers: int = 2,
        multiprocessing_context: Literal["fork", "forkserver", "spawn"] | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        """
        Args:
            stream: moves as batches are delivered; do not iterate over it at the same time.
            num_workers: processes, at least 1.
            multiprocessing_context: how they are started; None is Python's default. "fork" starts at once,
                but a process with threads should use another.
            timeout_s: a worker that takes longer for a batch is taken for hung. One that dies is noticed at
                once.

        Raises:
            InvalidArgumentError: an argument out of range.
        """
        methods = multiprocessing.get_all_start_methods()
        if multiprocessing_context not in (None, *methods):
            raise InvalidArgumentError(
                f"multiprocessing_context: expected one of {methods}, found {multiprocessing_context!r}"
            )
        if num_workers < 1 or not timeout_s > 0:
            raise InvalidArgumentError(
                f"num_workers and timeout_s: expected 1 or more and more than 0, found {num_workers} and "
                f"{timeout_s}"
            )
        self._stream, self._n_workers, self._timeout_s = stream, num_workers, timeout_s
        self._context: BaseContext = multiprocessing.get_context(multiprocessing_context)
        self._reset()

    def __iter__(self) -> Iterator[TeacherBatch]:
        """Batches from the present position on; closing the iterator ends the workers."""
        try:
            while (batch := self.next_batch()) is not None:
                yield batch
        finally:
            self.close()

    def __len__(self) -> int:
        """As for the stream."""
        return len(self._stream)

    def next_batch(self) -> TeacherBatch | None:
        """The next batch, or None after the last epoch.

        After an error the position is that of before: another call tries the same batch again.

        Raises:
            WorkerError: the worker that was to build it died or fell silent.
            OpdError: what building it raised, as for `CacheStream.next_batch`.
        """
        try:
            self._ask()
            if not self._order:
                return None
            worker = self._order[0]
            batch = self._receive(worker)
            self._order.popleft()
            step = worker.asked.popleft()
            self._ask()
            # Last, since what fails after a batch was counted would lose it.
            return self._stream.deliver(step, batch)
        except BaseException:
            self.close()
            raise

    def identity(self) -> dict[str, Any]:
        """That of the stream."""
        return self._stream.identity()

    def state_dict(self) -> dict[str, Any]:
        """That of the stream; batches built ahead are not part of it."""
        return self._stream.state_dict()

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """As for the stream."""
        self._stream.load_state_dict(state)
        self.close()

    def close(self) -> None:
        """End the workers and drop what they built ahead. The loader remains usable, from where it is."""
        self._end()
        self._reset()

    def _reset(self) -> None:
        self._workers: list[_Worker] = []
        self._order: deque[_Worker] = deque()
        """Whose batch comes next."""
        self._steps: Iterator[Step] | None = None
        self._announced: deque[tuple[_Worker, Step]] = deque()
        self._n_steps = 0
        self._end = weakref.finalize(self, _end, self._workers, os.getpid())

    def _ask(self) -> None:
        """Keep every worker busy; batch i is built by worker i modulo their number."""
        if self._steps is None:
            self._steps = self._stream.walk()
        n_ahead = self._stream.prefetch_batches
        while len(self._order) < _AHEAD * self._n_workers:
            while len(self._announced) <= n_ahead and (step := next(self._steps, None)) is not None:
                while len(self._workers) < self._n_workers:
                    self._workers.append(_start(self._context, self._stream.assembler))
                worker = self._workers[self._n_steps % self._n_workers]
                self._n_steps += 1
                self._announced.append((worker, step))
                self._send(worker, step, build=False)
            if not self._announced:
                return
            worker, step = self._announced.popleft()
            worker.asked.append(step)
            self._order.append(worker)
            self._send(worker, step, build=True)

    def _send(self, worker: _Worker, step: Step, *, build: bool) -> None:
        try:
            worker.requests.send((build, step.source, step.rows))
        except OSError as error:
            raise self._death(worker, 0) from error

    def _receive(self, worker: _Worker) -> TeacherBatch:
        ready = connection.wait([worker.replies, worker.process.sentinel], self._timeout_s)
        if not ready:
            message = f"worker {worker.process.pid} gave nothing for {self._timeout_s} s while it built "
            raise self._error(worker, worker.asked[0], message, "raise timeout_s if that is not enough")
        n_built = 0
        if worker.replies in ready:
            try:
                sent = worker.replies.recv_bytes()
                n_built = 1
                reply: TeacherBatch | Exception = ForkingPickler.loads(sent)
            except (EOFError, OSError) as error:
                # Tensors are handed over by the worker itself, so that a dead one's last words are lost.
                worker.process.join(_EXIT_S)
                if worker.process.is_alive():
                    raise
                raise self._death(worker, n_built) from error
            if isinstance(reply, Exception):
                raise reply
            return reply
        raise self._death(worker, n_built)

    def _death(self, worker: _Worker, n_built: int) -> WorkerError:
        """What to raise for a worker that dies or is dead, and gave `n_built` batches not counted yet."""
        worker.process.join(_EXIT_S)
        try:
            while worker.replies.poll():
                worker.replies.recv_bytes()
                n_built += 1
        except (EOFError, OSError):
            pass
        code = worker.process.exitcode
        name = signal.Signals(-code).name if code is not None and code < 0 else None
        how = f"was killed by {name}" if name else f"ended with exit code {code}"
        step = worker.asked[n_built] if n_built < len(worker.asked) else None
        hint = _HINTS.get(name or "", "see what it wrote to standard error")
        if step is None:
            return WorkerError(f"worker {worker.process.pid} {how} while it was idle; {hint}")
        return self._error(worker, step, f"worker {worker.process.pid} {how} while it built ", hint)

    def _error(self, worker: _Worker, step: Step, message: str, hint: str) -> WorkerError:
        shards = self._stream.shards_of(step)
        rows = step.rows.tolist()
        shown = ", ".join(str(row) for row in rows[:32]) + (", ..." if len(rows) > 32 else "")
        return WorkerError(
            f"{message}batch {step.number} of epoch {step.epoch}: rows {shown} in {', '.join(shards[:8])}; "
            f"{hint}",
            pid=worker.process.pid or -1,
            exit_code=worker.process.exitcode,
            source=step.source.tolist(),
            rows=rows,
            shards=shards,
        )


def _start(context: BaseContext, assembler: BatchAssembler) -> _Worker:
    requests, parent_requests = context.Pipe(duplex=False)
    parent_replies, replies = context.Pipe(duplex=False)
    process = context.Process(  # type: ignore[attr-defined]
        target=_work, args=(assembler, requests, replies), name="opd-loader", daemon=True
    )
    process.start()
    # With the worker's ends open only there, its death is the end of what can be read here.
    requests.close()
    replies.close()
    return _Worker(process, parent_requests, parent_replies)


def _end(workers: list[_Worker], pid: int) -> None:
    if os.getpid() != pid:
        return  # After a fork they are not ours.
    # They own nothing that has to be tidied up.
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join(_EXIT_S)
        worker.requests.close()
        worker.replies.close()


def _work(assembler: BatchAssembler, requests: Connection, replies: Connection) -> None:
    """The life of a worker process."""
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    # A parent that is interrupted ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # A copy; what it builds is whole.
    assembler.device_decode = False
    parent = parent_process()
    assert parent is not None
    while requests in connection.wait([requests, parent.sentinel]):
        try:
            build, source, rows = requests.recv()
        except EOFError:
            return
        reply: TeacherBatch | Exception | None = None
        try:
            if build:
                reply = in_shared_memory(assembler.assemble(source, rows))
            else:
                assembler.prefetch(source, rows)
        except Exception as error:
            # One in prefetch comes again when the batch is built, where it has a place in the order.
            reply = _portable(error) if build else None
        if reply is not None:
            try:
                replies.send(reply)
            except BrokenPipeError:
                return


def _portable(error: Exception) -> Exception:
    """The error, or if it cannot be sent an `OpdError` of the same words, with the worker's traceback."""
    text = "".join(traceback.format_exception(error)).rstrip()
    try:
        portable: Exception = ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        portable = OpdError(f"{type(error).__name__}: {error}")
    portable.add_note(f"In worker process {os.getpid()}:\n{text}")
    return portable
