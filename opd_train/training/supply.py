"""The batches of each step: drawn when they are needed, or ahead for as long as the proximal policy stays."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor

from opd_store import OpdError
from opd_train.data.batches import TeacherBatch
from opd_train.training.config import DistillConfig
from opd_train.training.stopwatch import Stopwatch


class BatchSource(Protocol):
    """Where batches come from: a cache stream, or a live teacher.

    It may also have `observe(metrics)`, which is called after every step, before its state is asked for, and
    `close()`, which is called when a run ends and frees what only the next batch needs.
    """

    def next_batch(self) -> TeacherBatch | None: ...

    def identity(self) -> dict[str, Any]:
        """What a run that goes on from a checkpoint of another has to agree in, as JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """Where it is, as JSON values. Asked for before every step, so it has to be cheap."""

    def load_state_dict(self, state: Any) -> None:  # noqa: ANN401
        """Go on where `state` was taken; at another number of ranks that is a list of all old states."""


class Supply:
    """Deals a source's batches to steps."""

    def __init__(self, source: BatchSource, config: DistillConfig, stopwatch: Stopwatch) -> None:
        """
        Args:
            stopwatch: gets the seconds of "data".
        """
        self._source, self._config, self._stopwatch = source, config, stopwatch
        self._ahead: deque[tuple[TeacherBatch, Tensor | None]] = deque()
        self.before: dict[str, Any] = {}
        """The source's state before the first batch of the step, or of the steps drawn ahead with it."""

    def clear(self) -> None:
        """Forget what was drawn ahead: the source goes on from elsewhere."""
        self._ahead.clear()

    def of_step(
        self, step: int, score: Callable[[TeacherBatch], Tensor]
    ) -> Iterator[tuple[TeacherBatch, Tensor | None]]:
        """Each batch of a step with its log-probs under the proximal policy; None if that is the student.

        Args:
            step: counted from 0. Steps come in order, each once.
            score: [N] log-probs of a batch's sampled tokens under the student as it is now. Not held, since
                it holds whoever holds this, and so the source's threads.

        Raises:
            OpdError: the source has no more.
        """
        config = self._config
        if not self._ahead:
            self.before = self._source.state_dict()
            if config.proximal_every > 1:
                n_steps = min(config.proximal_every, config.steps - step)
                drawn = [self._draw(step) for _ in range(n_steps * config.accumulate)]
                self._ahead.extend((batch, score(batch)) for batch in drawn)
        for _ in range(config.accumulate):
            yield self._ahead.popleft() if self._ahead else (self._draw(step), None)

    def _draw(self, step: int) -> TeacherBatch:
        with self._stopwatch.measure("data"):
            batch = self._source.next_batch()
        if batch is None:
            raise OpdError(f"step {step + 1}: the source has no more batches; give it more epochs")
        return batch
