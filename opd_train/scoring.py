"""Scoring rollouts with a teacher: the log-probs a cache stores.

Axes: B = rows, S = padded length, H = hidden size, V = vocabulary, K = top-k, R = response tokens of one
rollout, n = positions of one chunk.
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
    batch_tokens: int = 8192,
    chunk: int = 1024,
    processor: LogitsProcessor | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Scores]:
    """Score every response token of every rollout, given everything before it.

    Args:
        lm: the model; log-probs are float32 whatever its dtype.
        topk: K; 0 scores only the sampled tokens.
        batch_tokens: padded tokens of one forward pass.
        chunk: positions whose [chunk, V] logits exist at a time.
        processor: scores the sampled tokens under the processed distribution instead; not with `topk`.
        on_batch: called with the response tokens scored so far after each forward pass.

    Returns:
        Scores in the order of `rollouts`.

    Raises:
        InvalidRolloutError: a rollout longer than the context, an id the model does not have, or logits that
        are NaN,
            with rollout and position.
        InvalidArgumentError: more ranks than logits.
    """
    if topk > lm.vocab_size:
        raise InvalidArgumentError(f"topk: {topk} ranks of a model with {lm.vocab_size} logits")
    for number, rollout in enumerate(rollouts):
        check_fits(lm, rollout, number)
    found: list[Scores | None] = [None] * len(rollouts)
    done = 0
    for group in plan_batches([len(rollout.token_ids) for rollout in rollouts], batch_tokens):
        members = [rollouts[row] for row in group]
        for row, scores in zip(group, _score_group(lm, members, topk, chunk, processor), strict=True):
            found[row] = scores
            done += len(scores.logprob)
        if on_batch is not None:
            on_batch(done)
    return [scores for scores in found if scores is not None]


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


def _score_group(
    lm: CausalLM, rollouts: Sequence[Rollout], topk: int, chunk: int, processor: LogitsProcessor | None
) -> Iterator[Scores]:
    longest = max(len(rollout.token_ids) for rollout in rollouts)
    ids_BS = torch.zeros(len(rollouts), longest, dtype=torch.int64)
    mask_BS = torch.zeros_like(ids_BS)
    for row, rollout in enumerate(rollouts):
        ids_BS[row, : len(rollout.token_ids)] = torch.from_numpy(rollout.token_ids.astype(np.int64))
        mask_BS[row, : len(rollout.token_ids)] = 1
    ids_BS, mask_BS = ids_BS.to(lm.device), mask_BS.to(lm.device)
    hidden_BSH = lm.hidden(ids_BS, mask_BS)
    # Row t of a response is predicted at the position before it.
    sources = [
        hidden_BSH[row, rollout.prompt_len - 1 : len(rollout.token_ids) - 1]
        for row, rollout in enumerate(rollouts)
    ]
    targets = [
        ids_BS[row, rollout.prompt_len : len(rollout.token_ids)] for row, rollout in enumerate(rollouts)
    ]
    hidden_NH, target_N = torch.cat(sources), torch.cat(targets)
    pairs = zip(hidden_NH.split(chunk), target_N.split(chunk), strict=True)
    pieces = [_score_chunk(lm.logits(hidden_nH), target_n, topk, processor) for hidden_nH, target_n in pairs]
    columns = [torch.cat(column).cpu().numpy() for column in zip(*pieces, strict=True)]
    start = 0
    for rollout in rollouts:
        part = [column[start : start + rollout.response_len] for column in columns]
        _check_finite(rollout, part)
        start += rollout.response_len
        yield Scores(part[0], part[1].astype(np.uint32), part[2], part[3]) if topk else Scores(part[0])


def _score_chunk(
    logits_nV: Tensor, target_n: Tensor, topk: int, processor: LogitsProcessor | None
) -> tuple[Tensor, ...]:
    if processor is not None:
        logits_nV = processor(logits_nV)
    lse_n = torch.logsumexp(logits_nV, dim=-1)
    logprob_n = (logits_nV.gather(-1, target_n[:, None])[:, 0] - lse_n).clamp(max=0.0)
    if not topk:
        return (logprob_n,)
    top_nK, ids_nK = logits_nV.topk(topk, dim=-1)
    top_nK = (top_nK - lse_n[:, None]).clamp(max=0.0)
    # The format orders ties by rising id; topk leaves their order open.
    ids_nK, by_id = ids_nK.sort(dim=-1)
    top_nK, by_logprob = top_nK.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    ids_nK = ids_nK.gather(-1, by_logprob)
    rest_nV = logits_nV.scatter(-1, ids_nK, -torch.inf)
    log_tail_n = (torch.logsumexp(rest_nV, dim=-1) - lse_n).clamp(max=0.0)
    return logprob_n, ids_nK, top_nK, log_tail_n


def _check_finite(rollout: Rollout, columns: Sequence[NDArray[Any]]) -> None:
    wrong = ~np.isfinite(columns[0])
    if len(columns) > 1:
        wrong |= ~np.isfinite(columns[2]).all(axis=-1) | np.isnan(columns[3])
    if wrong.any():
        position = int(np.argmax(wrong))
        raise InvalidRolloutError(
            f"rollout {rollout.sample_id!r:.100}, response position {position}: the logits are NaN or give "
            "the sampled token no probability; check weights, dtype (try float32) and sampler",
            sample_id=rollout.sample_id or "",
            field="logits",
            position=position,
        )


def with_teacher(rollout: Rollout, scores: Scores) -> Rollout:
    """The rollout with a teacher's scores filled in."""
    return dataclasses.replace(
        rollout,
        teacher_logprob=scores.logprob,
        topk_ids=scores.topk_ids,
        topk_logprob=scores.topk_logprob,
        log_tail=scores.log_tail,
    )
