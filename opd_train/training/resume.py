"""Going on from a checkpoint: source, counters, weights and random state as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from opd_store import IntegrityError, OpdError
from opd_train.model_identity import read_provenance
from opd_train.models import CausalLM
from opd_train.training.checkpoint import load_checkpoint, read_state
from opd_train.training.distributed import World
from opd_train.training.provenance import check_same_run
from opd_train.training.stopwatch import Stopwatch
from opd_train.training.supply import BatchSource


def resume(
    checkpoint: Path,
    student: CausalLM,
    optimizer: torch.optim.Optimizer,
    source: BatchSource,
    *,
    provenance: dict[str, Any],
    stopwatch: Stopwatch,
    world: World,
) -> int:
    """Put everything back as a checkpoint has it, in place. Every rank calls it.

    Args:
        provenance: of this run, which has to be that of the checkpoint.

    Returns:
        The step it was written after.

    Raises:
        MismatchError: it is of another run.
        IntegrityError: it is damaged.
    """
    check_same_run(checkpoint, provenance, read_provenance(checkpoint))
    state = read_state(checkpoint)
    try:
        sources = state["source"]
        same_size = len(sources) == world.size
        # One state may be of a source that does not know of ranks.
        own = sources[world.rank] if same_size else sources if len(sources) > 1 else sources[0]
        source.load_state_dict(own)
        stopwatch.seconds.update(state["seconds"])
        step = int(state["step"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, OpdError):
            raise
        raise IntegrityError(
            f"{checkpoint}: its state lacks {error!s:.200}; delete it to start again"
        ) from error
    load_checkpoint(student, optimizer, checkpoint, state, world=world)
    return step
