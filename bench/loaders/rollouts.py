"""The rollouts that every format stores: real teacher rows cut into lengths that rollouts have.

Axes: S = rollouts, T = all tokens, N = response tokens, K = ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import windows
from numpy.typing import NDArray

FIELDS = (
    "token_ids",
    "loss_mask",
    "teacher_logprob",
    "behaviour_logprob",
    "topk_ids",
    "topk_logprob",
    "log_tail",
)
"""What a rollout has, and a batch as well."""
MEAN_TOKENS = 990
SIGMA = 0.6
"""Of the lengths' logarithms."""
MAX_TOKENS = 4096
HALF = ("topk_logprob", "log_tail")
"""Stored as float16 by the layouts that are called so; everybody stores the other log-probs as float32."""

Sample = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """S rollouts end to end. Response arrays are label-aligned, as in `opd_store.Rollout`."""

    token_start: NDArray[np.int64]
    """[S + 1] first token of each rollout."""
    response_start: NDArray[np.int64]
    """[S + 1] first response token of each rollout."""
    token_ids: NDArray[np.uint32]
    """[T]."""
    loss_mask: NDArray[np.bool_]
    """[N], as are the next three."""
    teacher_logprob: NDArray[np.float32]
    behaviour_logprob: NDArray[np.float32]
    log_tail: NDArray[np.float32]
    topk_ids: NDArray[np.uint32]
    """[N, K]."""
    topk_logprob: NDArray[np.float32]
    """[N, K]."""

    def __len__(self) -> int:
        return len(self.token_start) - 1

    @property
    def n_positions(self) -> int:
        """N."""
        return len(self.log_tail)

    @property
    def n_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def topk(self) -> int:
        """K."""
        return self.topk_ids.shape[1]

    def sample(self, row: int, *, half: bool = False) -> Sample:
        """One rollout as contiguous views, or with `HALF` as float16."""
        found: Sample = {}
        for name in FIELDS:
            start = self.token_start if name == "token_ids" else self.response_start
            values = getattr(self, name)[start[row] : start[row + 1]]
            found[name] = values.astype(np.float16) if half and name in HALF else values
        return found

    def samples(self, *, half: bool = False) -> Iterator[Sample]:
        """Every rollout in turn."""
        return (self.sample(row, half=half) for row in range(len(self)))

    def part(self, start: int, stop: int) -> Rollouts:
        """Rollouts start..stop, without a copy."""
        tokens = slice(self.token_start[start], self.token_start[stop])
        rows = slice(self.response_start[start], self.response_start[stop])
        cut = {name: getattr(self, name)[tokens if name == "token_ids" else rows] for name in FIELDS}
        return Rollouts(
            token_start=self.token_start[start : stop + 1] - self.token_start[start],
            response_start=self.response_start[start : stop + 1] - self.response_start[start],
            **cut,
        )

    def save(self, folder: Path) -> None:
        """As .npy files, which `load` maps."""
        folder.mkdir(parents=True, exist_ok=True)
        for field in dataclasses.fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))


def load(folder: Path) -> Rollouts:
    """What `save` wrote, mapped."""
    return Rollouts(
        **{
            field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r")
            for field in dataclasses.fields(Rollouts)
        }
    )


def make(data_dir: Path, *, topk: int, positions: int, seed: int, mean_tokens: int = MEAN_TOKENS) -> Rollouts:
    """Cut what bench/data.py wrote into rollouts of lognormal lengths, going round until there are enough.

    A prompt of 16 to 128 tokens is the text before the response. The teacher's log-prob of the sampled token
    is the stored one, or 1 nat below the tail where the token is not among the 128 stored ranks; the
    behaviour's is that and normal noise of 0.1 nat; 1 position in 50 is masked.
    """
    parts = [windows.load(data_dir, part="eval"), windows.load(data_dir, part="train")]
    sampled = np.concatenate([part.token_ids[:, 1:].reshape(-1) for part in parts])
    stored_ids = np.concatenate([part.ids.reshape(-1, part.ids.shape[-1]) for part in parts])
    stored = np.concatenate([part.logprob.reshape(-1, part.ids.shape[-1]) for part in parts])
    rest = np.concatenate([part.log_tail.reshape(-1) for part in parts])
    hit = stored_ids == sampled[:, None]
    teacher = np.where(hit.any(1), stored[np.arange(len(hit)), hit.argmax(1)], rest - 1).astype(np.float32)
    parts = [windows.keep_ranks(part, topk) for part in parts]
    ids = np.concatenate([part.ids.reshape(-1, topk) for part in parts])
    logprob = np.concatenate([part.logprob.reshape(-1, topk) for part in parts])
    log_tail = np.concatenate([part.log_tail.reshape(-1) for part in parts]).astype(np.float32)

    rng = np.random.default_rng(seed)
    mean = np.log(mean_tokens) - SIGMA**2 / 2
    responses, prompts, index = [], [], []
    used, place = 0, 128
    while used < positions:
        length = int(np.clip(rng.lognormal(mean, SIGMA), 8, MAX_TOKENS))
        prompt = int(rng.integers(16, 129))
        if place + length > len(sampled):
            place = 128 + int(rng.integers(0, 1024))
        responses.append(np.arange(place, place + length))
        prompts.append(prompt)
        index.append(np.arange(place - prompt, place + length))
        place += length
        used += length
    rows = np.concatenate(responses)
    noise = rng.normal(0, 0.1, len(rows)).astype(np.float32)
    return Rollouts(
        token_start=_starts([len(part) for part in index]),
        response_start=_starts([len(part) for part in responses]),
        token_ids=sampled[np.concatenate(index)],
        loss_mask=rng.random(len(rows)) >= 0.02,
        teacher_logprob=teacher[rows],
        behaviour_logprob=np.minimum(teacher[rows] + noise, 0),
        log_tail=log_tail[rows],
        topk_ids=ids[rows],
        topk_logprob=logprob[rows],
    )


def _starts(lengths: list[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
