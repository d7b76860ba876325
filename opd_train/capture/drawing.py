"""Ids drawn from a model at a position: which, by a seed of their own, and how often each.

Axes: V = vocabulary, M = draws, R = response tokens of one rollout, n = positions of one chunk.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_store import NO_ID, InvalidArgumentError, Rollout

# Their cumulative distributions are float64: 80 MB for a vocabulary of 150,000.
_POSITIONS = 64


@dataclass(frozen=True, slots=True)
class Draws:
    """How many ids to draw from the model at every position, and how."""

    n: int
    temperature: float = 1.0
    """Above 1 rare ids come more often. The drawn ids' log-probs are at temperature 1 in any case."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 < self.temperature <= 100 or not 0 <= self.seed < 1 << 64:
            raise InvalidArgumentError(
                f"draws: expected n >= 1, 0 < temperature <= 100 and 0 <= seed < 2^64, found {self}"
            )

    def uniforms(self, rollout: Rollout) -> NDArray[np.float64]:
        """[R, M] in [0, 1), from the seed and the rollout alone: its draws do not depend on what else is
        scored with it. Rollouts of equal tokens differ by their sample_id."""
        identity = hashlib.sha256(b"opd draws 1" + self.seed.to_bytes(8, "little"))
        identity.update(np.ascontiguousarray(rollout.token_ids, "<u4").tobytes())
        if rollout.sample_id is not None:
            identity.update(b"id " + rollout.sample_id.encode("utf-8", "surrogatepass"))
        key = np.frombuffer(identity.digest()[:16], "<u8")
        return np.random.Generator(np.random.Philox(key=key)).random((rollout.response_len, self.n))


def draw(logits_nV: Tensor, uniform_nM: Tensor, temperature: float) -> Tensor:
    """[n, M] ids by inverting the cumulative distribution."""
    drawn = []
    pairs = zip(logits_nV.split(_POSITIONS), uniform_nM.split(_POSITIONS), strict=True)
    for logits, uniform in pairs:
        # float64, so that the sum over a large vocabulary does not favour its first half.
        cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
        points = uniform * cumulative[:, -1:]
        drawn.append(torch.searchsorted(cumulative, points, right=True))
    return torch.cat(drawn).clamp(max=logits_nV.shape[-1] - 1)


def distinct(ids_nM: Tensor, logprob_nM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with each id once.

    Args:
        ids_nM, logprob_nM: equal ids next to each other.

    Returns:
        ids, log-probs, and how often each came, all [n, M], in the same order, padded as in the format.
    """
    is_first = torch.ones_like(ids_nM, dtype=torch.bool)
    is_first[:, 1:] = ids_nM[:, 1:] != ids_nM[:, :-1]
    run = is_first.cumsum(dim=-1) - 1
    counts = torch.zeros_like(ids_nM).scatter_add(-1, run, torch.ones_like(ids_nM))
    # All of a run write the same value.
    ids = torch.full_like(ids_nM, NO_ID).scatter(-1, run, ids_nM)
    logprob = torch.full_like(logprob_nM, -torch.inf).scatter(-1, run, logprob_nM)
    return ids, logprob, counts
