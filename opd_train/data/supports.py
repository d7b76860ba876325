"""Ids of a position besides the top-k, in a batch: drawn from the teacher, or chosen by another model.

Axes: N = response tokens, M = ids a position may have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opd_store import NO_ID, Cache, InvalidArgumentError, Rollout
from opd_train.data.packing import Packing
from opd_train.losses import draw_weights


@dataclass(frozen=True, slots=True)
class Support:
    """One kind, and its fields in a rollout and in a batch."""

    kind: str
    """As the schema of a cache calls it."""
    columns: tuple[str, str, str]
    """Fields of a rollout: ids, log-probs, and draws or tail."""
    fields: tuple[str, str, str]
    """Fields of a batch: ids, log-probs, and weights or tail."""

    def width(self, caches: Sequence[Cache]) -> int:
        """Most ids a position has in any of the caches.

        Raises:
            InvalidArgumentError: a cache has none.
        """
        widths = [int(getattr(cache.schema, self.kind)) for cache in caches]
        if not all(widths):
            option = "--draws" if self is DRAWN else "--chosen"
            raise InvalidArgumentError(
                f"{caches[widths.index(0)].uri}: has no {self.kind} ids; score with {option}"
            )
        return max(widths)

    def response_bytes(self, width: int) -> int:
        """What it takes for each response token, at most."""
        return 12 * width + 4

    def place(
        self,
        packing: Packing,
        width: int,
        first: int,
        rollouts: Sequence[Rollout],
        *,
        temperature: float = 1.0,
    ) -> None:
        """Fill in neighbours of a batch.

        Args:
            width: M.
            first: number of the first of them in the batch.
            rollouts: where they have this support; cut as the batch is.
            temperature: of the draws.
        """
        starts = packing.response_starts
        n_all = int(starts[-1])
        ids = packing.place(self.fields[0], (n_all, width), np.uint32)
        logprob = packing.place(self.fields[1], (n_all, width), np.float32)
        shape = (n_all, width) if self is DRAWN else (n_all,)
        third = packing.place(self.fields[2], shape, np.float32)
        for number, rollout in enumerate(rollouts, first):
            part = slice(starts[number], starts[number + 1])
            n = part.stop - part.start
            found = [getattr(rollout, name)[:n] for name in self.columns]
            size = found[0].shape[1]
            ids[part, :size] = np.where(found[0] == NO_ID, 0, found[0])
            logprob[part, :size] = found[1]
            ids[part, size:], logprob[part, size:] = 0, -np.inf
            if self is DRAWN:
                third[part, :size] = found[2]
                third[part, size:] = 0
            else:
                third[part] = found[2]
        if self is DRAWN:
            whole = slice(starts[first], starts[first + len(rollouts)])
            draws = torch.from_numpy(third[whole])
            third[whole] = draw_weights(torch.from_numpy(logprob[whole]), draws, temperature=temperature)


DRAWN = Support(
    "sampled",
    ("sampled_ids", "sampled_logprob", "sampled_draws"),
    ("drawn_ids", "drawn_logprob", "drawn_weight"),
)
CHOSEN = Support(
    "chosen",
    ("chosen_ids", "chosen_logprob", "chosen_log_tail"),
    ("chosen_ids", "chosen_logprob", "chosen_log_tail"),
)


def asked_for(*, draws: bool, chosen: bool) -> tuple[Support, ...]:
    """The kinds somebody wants."""
    return ((DRAWN,) if draws else ()) + ((CHOSEN,) if chosen else ())
