"""Scoring rollouts with a teacher: the log-probs a cache stores.

Axes: B = rows, S = padded length, H = hidden size, V = vocabulary, K = top-k, M = draws, C = chosen ids,
R = response tokens of one rollout, n = positions of one chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_store import InvalidArgumentError, InvalidRolloutError, Rollout
from opd_train.capture.drawing import Draws, distinct, draw
from opd_train.models import CausalLM

LogitsProcessor = Callable[[Tensor], Tensor]
"""[n, V] raw logits to [n, V] logits as the sampler used them."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model says about one rollout's response."""

    logprob: NDArray[np.float32]
    """[R] of the sampled token."""
    topk_ids: NDArray[np.uint32] | None = None
    """[R, K], by falling log-prob, ties by rising id."""
    topk_logprob: NDArray[np.float32] | None = None
    log_tail: NDArray[np.float32] | None = None
    """[R] log of the probability outside the K ranks, summed over the vocabulary, not by subtraction."""
    sampled_ids: NDArray[np.uint32] | None = None
    """[R, M] distinct ids drawn from the model, in the order of the top-k, padded."""
    sampled_logprob: NDArray[np.float32] | None = None
    sampled_log_tail: NDArray[np.float32] | None = None
    sampled_draws: NDArray[np.uint32] | None = None
    """[R, M] how often each was drawn."""
    chosen_ids: NDArray[np.uint32] | None = None
    """[R, C] the ids that were asked for, in the same order."""
    chosen_logprob: NDArray[np.float32] | None = None
    chosen_log_tail: NDArray[np.float32] | None = None


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group rows by length so that none pads to more than `batch_tokens`; a longer row stands alone."""
    groups: list[list[int]] = []
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if group and lengths[group[0]] * (len(group) + 1) > batch_tokens:
            groups.append(group)
            group = []
        group.append(row)
    return [*groups, group] if group else groups


@torch.inference_mode()
def score_rollouts(
    lm: CausalLM,
    rollouts: Sequence[Rollout],
    *,
    topk: int = 0,
    draws: Draws | None = None,
    chosen_ids: Sequence[NDArray[np.uint32]] | None = None,
    batch_tokens: int = 8192,
    chunk: int = 1024,
    processor: LogitsProcessor | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Scores]:
    """Score every response token of every rollout, given everything before it.

    Args:
        lm: the model; log-probs are float32 whatever its dtype.
        topk: K; 0 scores only the sampled tokens.
        draws: ids to draw at every position; None draws none. The same rollout and seed give the same draws
            in any batch, but for the rounding of the model itself.
        chosen_ids: for each rollout [R, C] ids to score besides, distinct within a position.
        batch_tokens: padded tokens of one forward pass.
        chunk: positions whose [chunk, V] logits exist at a time.
        processor: scores everything under the processed distribution instead.
        on_batch: called with the response tokens scored so far after each forward pass.

    Returns:
        Scores in the order of `rollouts`.

    Raises:
        InvalidRolloutError: a rollout longer than the context, an id the model does not have, or logits that
            are NaN, with rollout and position.
        InvalidArgumentError: more ranks than logits, or chosen ids that are not of these rollouts.
    """
    if topk > lm.vocab_size:
        raise InvalidArgumentError(f"topk: {topk} ranks of a model with {lm.vocab_size} logits")
    for number, rollout in enumerate(rollouts):
        check_fits(lm, rollout, number)
    if chosen_ids is not None:
        _check_chosen(lm, rollouts, chosen_ids)
    found: list[Scores | None] = [None] * len(rollouts)
    done = 0
    for group in plan_batches([len(rollout.token_ids) for rollout in rollouts], batch_tokens):
        members = [rollouts[row] for row in group]
        extra = {}
        if draws is not None:
            extra["uniform"] = np.concatenate([draws.uniforms(rollout) for rollout in members])
        if chosen_ids is not None:
            extra["chosen"] = np.concatenate([chosen_ids[row].astype(np.int64) for row in group])
        score = _Scorer(lm, topk, 1.0 if draws is None else draws.temperature, processor)
        for row, scores in zip(group, score(members, extra, chunk), strict=True):
            found[row] = scores
            done += len(scores.logprob)
        if on_batch is not None:
            on_batch(done)
    return [scores for scores in found if scores is not None]


def _check_chosen(
    lm: CausalLM, rollouts: Sequence[Rollout], chosen_ids: Sequence[NDArray[np.uint32]]
) -> None:
    shapes = [ids.shape for ids in chosen_ids]
    width = shapes[0][1] if shapes and len(shapes[0]) == 2 else 0
    if not width or shapes != [(rollout.response_len, width) for rollout in rollouts]:
        raise InvalidArgumentError(
            f"chosen_ids: expected an array [response tokens, C] for each of {len(rollouts)} rollouts, found "
            f"{shapes!s:.100}"
        )
    highest = max(int(ids.max()) for ids in chosen_ids)
    if highest >= lm.vocab_size:
        raise InvalidArgumentError(
            f"chosen_ids: id {highest}, but {lm.path} has {lm.vocab_size} logits; choose among those"
        )


def check_fits(lm: CausalLM, rollout: Rollout, number: int) -> None:
    """Raise InvalidRolloutError unless the model can score the rollout, the `number`-th of its source."""
    name = rollout.sample_id if rollout.sample_id is not None else f"number {number}"
    if not 1 <= rollout.prompt_len < len(rollout.token_ids):
        raise InvalidRolloutError(
            f"rollout {name!r:.100}: prompt_len {rollout.prompt_len} of {len(rollout.token_ids)} tokens; "
            "prompt and response each need at least one token",
            sample_id=str(name),
            field="prompt_len",
        )
    if len(rollout.token_ids) > lm.context:
        raise InvalidRolloutError(
            f"rollout {name!r:.100}: {len(rollout.token_ids)} tokens, but {lm.path} has a context of "
            f"{lm.context}; "
            "leave it out or shorten it",
            sample_id=str(name),
            field="token_ids",
        )
    highest = int(np.max(rollout.token_ids))
    if highest >= lm.vocab_size:
        position = int(np.argmax(rollout.token_ids))
        raise InvalidRolloutError(
            f"rollout {name!r:.100}, token_ids, position {position}: id {highest}, but {lm.path} has "
            f"{lm.vocab_size} logits; it was made with another tokenizer",
            sample_id=str(name),
            field="token_ids",
            position=position,
        )


@dataclass(frozen=True, slots=True)
class _Scorer:
    """Scores rollouts that fit into one forward pass."""

    lm: CausalLM
    topk: int
    draw_temperature: float
    processor: LogitsProcessor | None

    def __call__(
        self,
        rollouts: Sequence[Rollout],
        extra: dict[str, NDArray[np.float64] | NDArray[np.int64]],
        chunk: int,
    ) -> Iterator[Scores]:
        """Scores of each rollout.

        Args:
            extra: for all response tokens end to end, "uniform" [N, M] numbers to draw by, "chosen" [N, C]
                ids; either may be left out.
        """
        hidden_NH, target_N = self._hidden(rollouts)
        more = {name: torch.from_numpy(values).split(chunk) for name, values in extra.items()}
        pieces = []
        for number, (hidden_nH, target_n) in enumerate(
            zip(hidden_NH.split(chunk), target_N.split(chunk), strict=True)
        ):
            parts = {name: values[number].to(self.lm.device) for name, values in more.items()}
            pieces.append(self._chunk(self.lm.logits(hidden_nH), target_n, **parts))
        columns = {name: torch.cat([piece[name] for piece in pieces]).cpu().numpy() for name in pieces[0]}
        start = 0
        for rollout in rollouts:
            part = {name: column[start : start + rollout.response_len] for name, column in columns.items()}
            _check_finite(rollout, part)
            start += rollout.response_len
            yield Scores(**{name: _of_format(values) for name, values in part.items()})

    def _hidden(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
        """[N, H] hidden states before each response token, and [N] those tokens."""
        longest = max(len(rollout.token_ids) for rollout in rollouts)
        ids_BS = torch.zeros(len(rollouts), longest, dtype=torch.int64)
        mask_BS = torch.zeros_like(ids_BS)
        for row, rollout in enumerate(rollouts):
            ids_BS[row, : len(rollout.token_ids)] = torch.from_numpy(rollout.token_ids.astype(np.int64))
            mask_BS[row, : len(rollout.token_ids)] = 1
        ids_BS, mask_BS = ids_BS.to(self.lm.device), mask_BS.to(self.lm.device)
        hidden_BSH = self.lm.hidden(ids_BS, mask_BS)
        # Row t of a response is predicted at the position before it.
        sources = [
            hidden_BSH[row, rollout.prompt_len - 1 : len(rollout.token_ids) - 1]
            for row, rollout in enumerate(rollouts)
        ]
        targets = [
            ids_BS[row, rollout.prompt_len : len(rollout.token_ids)] for row, rollout in enumerate(rollouts)
        ]
        return torch.cat(sources), torch.cat(targets)

    def _chunk(
        self,
        logits_nV: Tensor,
        target_n: Tensor,
        uniform: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The fields of `Scores` for some positions."""
        if self.processor is not None:
            logits_nV = self.processor(logits_nV)
        lse_n = torch.logsumexp(logits_nV, dim=-1)
        found = {"logprob": (logits_nV.gather(-1, target_n[:, None])[:, 0] - lse_n).clamp(max=0.0)}
        if self.topk:
            ids_nK = logits_nV.topk(self.topk, dim=-1).indices
            names = ("topk_ids", "topk_logprob", "log_tail")
            found |= zip(names, _support(logits_nV, lse_n, ids_nK), strict=True)
        if uniform is not None:
            drawn_nM = draw(logits_nV, uniform, self.draw_temperature)
            ids, logprob, log_tail = _support(logits_nV, lse_n, drawn_nM)
            ids, logprob, counts = distinct(ids, logprob)
            found |= {"sampled_ids": ids, "sampled_logprob": logprob}
            found |= {"sampled_log_tail": log_tail, "sampled_draws": counts}
        if chosen is not None:
            names = ("chosen_ids", "chosen_logprob", "chosen_log_tail")
            found |= zip(names, _support(logits_nV, lse_n, chosen), strict=True)
        return found


def _of_format(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.dtype == np.float32 else values.astype(np.uint32)


def _support(logits_nV: Tensor, lse_n: Tensor, ids_nK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[n, K] ids by falling log-prob, ties by rising id; [n, K] log-probs; [n] log of what is outside them.

    Ids that come twice stay, next to each other.
    """
    # The format orders ties by rising id; topk leaves their order open.
    ids_nK = ids_nK.sort(dim=-1).values
    logprob_nK = (logits_nV.gather(-1, ids_nK) - lse_n[:, None]).clamp(max=0.0)
    logprob_nK, by_logprob = logprob_nK.sort(dim=-1, descending=True, stable=True)
    rest_nV = logits_nV.scatter(-1, ids_nK, -torch.inf)
    log_tail_n = (torch.logsumexp(rest_nV, dim=-1) - lse_n).clamp(max=0.0)
    return ids_nK.gather(-1, by_logprob), logprob_nK, log_tail_n


def _check_finite(rollout: Rollout, columns: dict[str, NDArray[Any]]) -> None:
    wrong = ~np.isfinite(columns["logprob"])
    for kind in ("topk", "chosen"):
        if (logprob := columns.get(f"{kind}_logprob")) is not None:
            wrong |= ~np.isfinite(logprob).all(axis=-1)
    for tail in ("log_tail", "sampled_log_tail", "chosen_log_tail"):
        if (log_tail := columns.get(tail)) is not None:
            wrong |= np.isnan(log_tail)
    if wrong.any():
        position = int(np.argmax(wrong))
        raise InvalidRolloutError(
            f"rollout {rollout.sample_id!r:.100}, response position {position}: the logits are NaN or give "
            "the sampled token, or an id that is to be stored, no probability; check weights, dtype (try "
            "float32) and sampler",
            sample_id=rollout.sample_id or "",
            field="logits",
            position=position,
        )


def with_teacher(rollout: Rollout, scores: Scores) -> Rollout:
    """The rollout with a teacher's scores filled in."""
    fields = {field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)}
    return dataclasses.replace(rollout, teacher_logprob=fields.pop("logprob"), **fields)
