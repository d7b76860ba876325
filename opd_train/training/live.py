"""Live on-policy distillation, the baseline: fresh rollouts and a teacher in memory at every step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_store import InvalidArgumentError, MismatchError, SamplerInfo
from opd_train.capture.sampling import Prompt, sample_rollouts
from opd_train.capture.scoring import score_rollouts, with_teacher
from opd_train.data.batches import TeacherBatch, collate
from opd_train.models import CausalLM
from opd_train.training.stopwatch import Stopwatch

_SHUFFLES = 1 << 63
"""Random streams from here on shuffle prompts; those below draw tokens."""


class LiveSource:
    """Batches of rollouts the student samples now, scored by a teacher in memory."""

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM,
        prompts: Sequence[Prompt],
        sampler: SamplerInfo,
        *,
        batch_rollouts: int,
        topk: int = 0,
        batch_tokens: int = 16384,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """
        Args:
            student: sampled from as it is when a batch is asked for.
            sampler: its seed also shuffles the prompts.
            topk: K to score; 0 for the sampled token only.
            batch_tokens: padded tokens of one teacher pass.
            stopwatch: gets the seconds of "sampling" and "teacher".

        Raises:
            MismatchError: student and teacher differ in tokenizer or number of logits.
            InvalidArgumentError: no prompts.
        """
        check_pair(student, teacher)
        if not prompts:
            raise InvalidArgumentError("prompts: none to sample from")
        self._student, self._teacher, self._prompts, self._sampler = student, teacher, prompts, sampler
        self._batch_rollouts, self._topk, self._batch_tokens = batch_rollouts, topk, batch_tokens
        self._stopwatch = stopwatch or Stopwatch()
        self._prompts_digest = prompts_digest(prompts)
        self._drawn = 0

    def next_batch(self) -> TeacherBatch:
        """Sample, score and pack the next `batch_rollouts` prompts, over and over through all of them."""
        chosen = draw_prompts(self._prompts, self._sampler.seed or 0, self._drawn, self._batch_rollouts)
        self._student.model.eval()
        with self._stopwatch.measure("sampling"):
            rollouts = sample_rollouts(
                self._student,
                chosen,
                self._sampler,
                first_stream=self._drawn,
                batch_rows=self._batch_rollouts,
            )
        with self._stopwatch.measure("teacher"):
            scores = score_rollouts(self._teacher, rollouts, topk=self._topk, batch_tokens=self._batch_tokens)
        self._drawn += self._batch_rollouts
        scored = [with_teacher(rollout, score) for rollout, score in zip(rollouts, scores, strict=True)]
        return collate(scored, vocab_size=self._teacher.vocab_size).to(self._student.device)

    def state_dict(self) -> dict[str, Any]:
        """How many rollouts were drawn, and from what."""
        return {"version": 1, "drawn": self._drawn, **self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after so many rollouts. Raises MismatchError for the state of another run."""
        for name, value in self.identity().items():
            if state.get(name) != value:
                raise MismatchError(
                    f"live state: {name} is {state.get(name)!r:.200}, this run has {value!r:.200}",
                    field=name,
                    expected=str(value),
                    found=str(state.get(name)),
                )
        self._drawn = int(state["drawn"])

    def identity(self) -> dict[str, Any]:
        """What a state that is loaded has to agree in: teacher, prompts and how they are sampled."""
        return {
            "teacher": self._teacher.info.weights_digest,
            "prompts": self._prompts_digest,
            "sampler": json.loads(json.dumps(dataclasses.asdict(self._sampler))),
            "batch_rollouts": self._batch_rollouts,
            "topk": self._topk,
        }


def check_pair(student: CausalLM, teacher: CausalLM) -> None:
    """Raise MismatchError if student and teacher differ in tokenizer or number of logits."""
    pairs = {
        "tokenizer_fingerprint": (teacher.tokenizer_fingerprint, student.tokenizer_fingerprint),
        "vocab_size": (str(teacher.vocab_size), str(student.vocab_size)),
    }
    for field, (expected, found) in pairs.items():
        if expected != found:
            message = f"{field}: the teacher has {expected}, the student {found}"
            raise MismatchError(message, field=field, expected=expected, found=found)


def draw_prompts(prompts: Sequence[Prompt], seed: int, first: int, n: int) -> list[Prompt]:
    """Numbers `first` to `first + n` of an endless sequence, in which all prompts come once, in an order of
    their own, before any comes again."""
    chosen: list[Prompt] = []
    for number in range(first, first + n):
        epoch, place = divmod(number, len(prompts))
        if place == 0 or not chosen:
            rng = np.random.Generator(np.random.Philox(key=[seed, _SHUFFLES + epoch]))
            order = rng.permutation(len(prompts))
        chosen.append(prompts[int(order[place])])
    return chosen


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Hex SHA-256 of what is sampled from."""
    content = [(prompt.sample_id, prompt.ids.tolist()) for prompt in prompts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
