"""How good is a student: exact answers, and distance to a teacher.

Axes: N = response tokens, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opd_store import Cache, InvalidArgumentError, InvalidRolloutError, MismatchError, Rollout
from opd_train.capture.scoring import plan_batches
from opd_train.data.batches import collate
from opd_train.head import topk_logprobs
from opd_train.losses import topk_forward_kl, topk_reverse_kl
from opd_train.models import CausalLM
from opd_train.training.forward import response_hidden


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with a 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n})"


def proportion(successes: int, n: int) -> Estimate:
    """A share with its Wilson score interval (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    if n == 0:
        raise InvalidArgumentError("proportion: nothing was counted")
    z = 1.959964
    centre = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(successes * (n - successes) / n + z * z / 4)
    return Estimate(successes / n, max(0.0, centre - half), min(1.0, centre + half), n)


def mean_estimate(values: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> Estimate:
    """A mean with its normal 95 % interval; independent values assumed."""
    array = np.asarray(values, np.float64)
    if not len(array):
        raise InvalidArgumentError("mean_estimate: nothing was counted")
    half = 1.959964 * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.inf
    return Estimate(float(array.mean()), float(array.mean() - half), float(array.mean() + half), len(array))


@torch.inference_mode()
def cache_divergence(student: CausalLM, cache: Cache, *, batch_tokens: int = 8192) -> dict[str, Estimate]:
    """Distance of a student to the cached teacher, on the cache's top-k with the tail as one bucket.

    Returns:
        "forward_kl" and "reverse_kl" in nats per response token. Intervals are over rollouts, since tokens of
        one rollout are not independent; each rollout counts by the mean over its unmasked tokens.

    Raises:
        InvalidArgumentError: the cache has no top-k, or no rollouts.
        MismatchError: the student has another tokenizer, or fewer logits. What it gives to ids beyond the
            teacher's is part of its tail.
    """
    # A student padded beyond the teacher's vocabulary has every id of the cache.
    vocab_size = max(cache.meta.vocab_size, student.vocab_size)
    _require_same_tokens(student, cache.meta.tokenizer_fingerprint, vocab_size, cache.uri)
    if not cache.topk or not len(cache):
        raise InvalidArgumentError(
            f"{cache.uri}: divergence needs a cache with top-k and at least one rollout"
        )
    values: dict[str, list[float]] = {"forward_kl": [], "reverse_kl": []}
    lengths = [len(rollout.token_ids) for rollout in cache.scan(ranks=0, columns=())]
    if max(lengths) > student.context:
        raise InvalidRolloutError(
            f"{cache.uri}: row {lengths.index(max(lengths))} has {max(lengths)} tokens, but the context of "
            f"{student.path} is {student.context}",
            field="token_ids",
        )
    for rows in plan_batches(lengths, batch_tokens):
        batch = collate([cache[row] for row in rows], vocab_size=cache.meta.vocab_size).to(student.device)
        assert batch.topk_ids is not None
        assert batch.topk_logprob is not None
        assert batch.log_tail is not None
        mask = batch.loss_mask
        counted = [int(piece.sum()) for piece in mask.split(batch.cu_responses.diff().tolist())]
        hidden_NH = response_hidden(student, batch)[mask]
        student_NK = topk_logprobs(hidden_NH, student.head or student.logits, batch.topk_ids[mask].long())
        for name, function in (("forward_kl", topk_forward_kl), ("reverse_kl", topk_reverse_kl)):
            pieces = function(student_NK, batch.topk_logprob[mask], batch.log_tail[mask]).split(counted)
            values[name] += [piece.mean().item() for piece in pieces if len(piece)]
    if not values["forward_kl"]:
        raise InvalidArgumentError(f"{cache.uri}: every token is masked; there is nothing to measure")
    return {name: mean_estimate(found) for name, found in values.items()}


@torch.inference_mode()
def sequence_kl(
    student: CausalLM,
    teacher: CausalLM,
    rollouts: Sequence[Rollout],
    *,
    batch_tokens: int = 8192,
    chunk: int = 1024,
) -> Estimate:
    """KL(student || teacher) of whole responses, nats per response, from samples of the student.

    The sum over a response of the full-vocabulary KL at each position is an unbiased estimate of the sequence
    KL, with less variance than the log-ratio of the sampled tokens. Not truncated to any top-k.

    Args:
        rollouts: sampled from the student at temperature 1.

    Raises:
        MismatchError: student and teacher differ in tokenizer or number of logits.
    """
    _require_same_tokens(student, teacher.tokenizer_fingerprint, teacher.vocab_size, str(teacher.path))
    totals: list[float] = []
    for rows in plan_batches([len(rollout.token_ids) for rollout in rollouts], batch_tokens):
        batch = collate([rollouts[row] for row in rows], vocab_size=student.vocab_size).to(student.device)
        hidden = (response_hidden(student, batch).split(chunk), response_hidden(teacher, batch).split(chunk))
        pieces = []
        for student_nH, teacher_nH in zip(*hidden, strict=True):
            student_nV = torch.log_softmax(student.logits(student_nH), dim=-1)
            teacher_nV = torch.log_softmax(teacher.logits(teacher_nH), dim=-1)
            pieces.append((student_nV.exp() * (student_nV - teacher_nV)).sum(dim=-1))
        lengths = batch.cu_responses.diff().tolist()
        totals += [piece.sum().item() for piece in torch.cat(pieces).split(lengths)]
    return mean_estimate(totals)


def _require_same_tokens(student: CausalLM, fingerprint: str, vocab_size: int, other: str) -> None:
    pairs = {
        "tokenizer_fingerprint": (fingerprint, student.tokenizer_fingerprint),
        "vocab_size": (str(vocab_size), str(student.vocab_size)),
    }
    for field, (expected, found) in pairs.items():
        if expected != found:
            raise MismatchError(
                f"{field}: {other} has {expected}, {student.path} has {found}; they have to be equal",
                field=field,
                expected=expected,
                found=found,
            )


def accuracy(rollouts: Sequence[Rollout], is_correct: Callable[[Rollout], bool]) -> Estimate:
    """Share of rollouts judged correct."""
    return proportion(sum(is_correct(rollout) for rollout in rollouts), len(rollouts))
