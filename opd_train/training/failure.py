"""The errors to raise when a step cannot go on: which rows, and which settings help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opd_store import OpdError
from opd_train.data.batches import TeacherBatch
from opd_train.training.config import DistillConfig


def not_finite(step: int, what: str, rows: Sequence[int], report: Path | None) -> OpdError:
    """The error to raise where a loss or a gradient is no number.

    Args:
        step: counted from 1.
        what: such as "loss is nan".
        rows: of the cache, of all ranks' batches.
        report: what `write_replay` wrote.
    """
    hint = f" (Trainer.replay({str(report)!r}) goes there)" if report else ""
    return OpdError(
        f"step {step}: {what} on cache rows {list(rows[:32])}; lower the learning rate, or inspect "
        f"these rows and the student's weights{hint}"
    )


def out_of_memory(
    step: int,
    config: DistillConfig,
    source: Mapping[str, Any],
    batches: Sequence[TeacherBatch],
    error: torch.OutOfMemoryError,
) -> OpdError:
    """The error to raise: what the settings are that decide about memory, and which way to turn them."""
    batch_tokens = source.get("batch_tokens")
    found = f" (its last batch has {batches[-1].n_padded_tokens} tokens)" if batches else ""
    reason = str(error).partition("\n")[0]
    return OpdError(
        f"step {step}: out of memory{found}: {reason:.300}. These go on from the last checkpoint: "
        f"gradient_checkpointing (is {'on' if config.gradient_checkpointing else 'off, turn it on'}), "
        f"head_chunk (is {config.head_chunk}, halve it). This needs another output directory: "
        f"batch_tokens (is {'unknown' if batch_tokens is None else batch_tokens}, halve it) with accumulate "
        f"(is {config.accumulate}, double it), which together leave a step as large as it is"
    )
