"""Supervised fine-tuning that ends at a chosen accuracy.

A student this small learns the task within a few dozen steps, and when differs from seed to seed. So its
state is kept every few steps of constant learning rate, and where to let the rate fall to zero is found by
bisection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from opd_train import CausalLM
from paper.addition import models

LR, BATCH, EVERY, COOLDOWN, MOST = 4e-3, 128, 10, 40, 2500
TOLERANCE, TRIES, NEIGHBOURS = 0.06, 7, 16


class Fit:
    """Cross-entropy on responses, with AdamW."""

    def __init__(self, lm: CausalLM, data: Sequence[models.Example], seed: int) -> None:
        self._lm = lm
        self._ids, self._labels = models.padded(data)
        self._optimizer = torch.optim.AdamW(
            lm.model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        rng = np.random.default_rng(seed)
        epochs = -(-(MOST + COOLDOWN) * BATCH // len(data))
        self._order = np.concatenate([rng.permutation(len(data)) for _ in range(epochs)])

    def until(self, target: float, accuracy: Callable[[], float]) -> int:
        """Train up to the target, or as near as it gets. Returns the steps made."""
        states, found = [self._state()], 0.0
        while len(states) * EVERY <= MOST and found < min(0.98, target + 0.1):
            for step in range((len(states) - 1) * EVERY, len(states) * EVERY):
                self._step(step, min(1.0, (step + 1) / 20))
            states.append(self._state())
            if len(states) > 10:
                found = accuracy()
        low, high, tried = 0, len(states) - 1, {}
        for _ in range(TRIES):
            middle = (low + high) // 2
            if middle in tried:
                break
            tried[middle] = self._ended(states[middle], middle, accuracy)
            low, high = (middle, high) if tried[middle][0] < target else (low, middle)
        # Accuracy does not rise with every step: look around where bisection ended.
        for place in sorted(range(1, len(states)), key=lambda place: abs(place - middle))[:NEIGHBOURS]:
            if min(abs(entry[0] - target) for entry in tried.values()) <= TOLERANCE:
                break
            if place not in tried:
                tried[place] = self._ended(states[place], place, accuracy)
        best = min(tried, key=lambda place: abs(tried[place][0] - target))
        self._restore(tried[best][1])
        self._lm.model.eval()
        return best * EVERY + COOLDOWN

    def _ended(
        self, state: tuple[Any, Any], place: int, accuracy: Callable[[], float]
    ) -> tuple[float, tuple[Any, Any]]:
        """Accuracy and state after the rate has fallen to zero from a kept state on."""
        self._restore(state)
        for step in range(COOLDOWN):
            self._step(place * EVERY + step, 1 - step / COOLDOWN)
        return accuracy(), self._state()

    def _step(self, number: int, share: float) -> None:
        model = self._lm.model
        model.train()
        rows = torch.from_numpy(self._order[number * BATCH : (number + 1) * BATCH])
        for group in self._optimizer.param_groups:
            group["lr"] = LR * share
        logits = model(input_ids=self._ids[rows]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), self._labels[rows, 1:].flatten(), ignore_index=models.IGNORED
        )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self._optimizer.step()
        model.eval()

    def _state(self) -> tuple[Any, Any]:
        return copy.deepcopy((self._lm.model.state_dict(), self._optimizer.state_dict()))

    def _restore(self, state: tuple[Any, Any]) -> None:
        self._lm.model.load_state_dict(state[0])
        self._optimizer.load_state_dict(copy.deepcopy(state[1]))
