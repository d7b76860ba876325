"""Sampling rollouts, token by token, with the log-probs of what was really drawn.

Axes: B = rows, V = vocabulary.

Each rollout draws from its own counter-based random stream, so what is sampled does not depend on which
rollouts share a batch, beyond the rounding of the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from opd_store import InvalidArgumentError, InvalidRolloutError, Rollout, SamplerInfo
from opd_train.capture.scoring import LogitsProcessor
from opd_train.models import CausalLM

_COMPACT_AT = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What to sample from."""

    ids: NDArray[np.uint32]
    """[P] token ids, at least one."""
    sample_id: str
    label: str | None = None
    """The right answer, where there is one."""


def make_processor(sampler: SamplerInfo) -> LogitsProcessor:
    """Raw logits to the logits that are sampled from, by transformers' own rules.

    Raises:
        InvalidArgumentError: settings outside their range, or a repetition penalty (it needs the history).
    """
    if sampler.repetition_penalty not in (None, 1.0):
        raise InvalidArgumentError(
            "repetition_penalty: not supported by this sampler; it changes the policy per token"
        )
    if not 0 <= sampler.temperature < math.inf or not 0 < sampler.top_p <= 1:
        raise InvalidArgumentError(
            f"sampler: expected temperature >= 0 and 0 < top_p <= 1, "
            f"found {sampler.temperature} and {sampler.top_p}"
        )
    if (sampler.top_k is not None and sampler.top_k < 1) or not 0 <= (sampler.min_p or 0.0) <= 1:
        raise InvalidArgumentError(
            f"sampler: expected top_k >= 1 and 0 <= min_p <= 1, found {sampler.top_k} and {sampler.min_p}"
        )
    steps: list[Callable[[None, Tensor], Tensor]] = []
    if sampler.temperature not in (0.0, 1.0):
        steps.append(transformers.TemperatureLogitsWarper(float(sampler.temperature)))
    if sampler.top_k is not None:
        steps.append(transformers.TopKLogitsWarper(sampler.top_k))
    if sampler.top_p < 1.0:
        steps.append(transformers.TopPLogitsWarper(sampler.top_p))
    if sampler.min_p is not None:
        steps.append(transformers.MinPLogitsWarper(sampler.min_p))

    def process(logits_BV: Tensor) -> Tensor:
        for step in steps:
            logits_BV = step(None, logits_BV)
        return logits_BV

    return process


@torch.inference_mode()
def sample_rollouts(
    lm: CausalLM,
    prompts: Sequence[Prompt],
    sampler: SamplerInfo,
    *,
    first_stream: int = 0,
    batch_rows: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """Sample one response per prompt. The stop token, where one was drawn, is the last token of the response.

    Args:
        sampler: temperature 0 means greedy; `max_new_tokens` and `seed` have to be set.
        first_stream: number of the first prompt's random stream under `sampler.seed`.
        batch_rows: prompts sampled together; prompts of similar length share a batch.
        on_batch: called with the prompts done so far.

    Returns:
        Rollouts in the order of `prompts`, with behaviour (processed) and reference (raw) log-probs.

    Raises:
        InvalidRolloutError: a prompt that is empty or leaves no room in the context.
        InvalidArgumentError: unusable sampler settings.
    """
    if sampler.max_new_tokens is None or sampler.max_new_tokens < 1 or sampler.seed is None:
        raise InvalidArgumentError("sampler: max_new_tokens >= 1 and seed are needed")
    for prompt in prompts:
        if not len(prompt.ids):
            raise InvalidRolloutError(
                f"prompt {prompt.sample_id!r:.100}: no tokens", sample_id=prompt.sample_id
            )
        if len(prompt.ids) >= lm.context:
            raise InvalidRolloutError(
                f"prompt {prompt.sample_id!r:.100}: {len(prompt.ids)} tokens leave no room in a context of "
                f"{lm.context}; shorten it or leave it out",
                sample_id=prompt.sample_id,
                field="token_ids",
            )
    process = make_processor(sampler)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    found: dict[int, Rollout] = {}
    for start in range(0, len(order), batch_rows):
        rows = order[start : start + batch_rows]
        rngs = [np.random.Generator(np.random.Philox(key=[sampler.seed, first_stream + row])) for row in rows]
        found |= zip(
            rows, _sample_batch(lm, [prompts[row] for row in rows], sampler, process, rngs), strict=True
        )
        if on_batch is not None:
            on_batch(len(found))
    return [found[row] for row in range(len(prompts))]


def _sample_batch(
    lm: CausalLM,
    prompts: Sequence[Prompt],
    sampler: SamplerInfo,
    process: LogitsProcessor,
    rngs: Sequence[np.random.Generator],
) -> list[Rollout]:
    assert sampler.max_new_tokens is not None
    device = lm.device
    longest = max(len(prompt.ids) for prompt in prompts)
    # Each row has its own limit, so that a long prompt does not shorten the response of a short one.
    limits = [min(sampler.max_new_tokens, lm.context - len(prompt.ids)) for prompt in prompts]
    limit = max(limits)
    # Left padding, so that every row's next token is at the same place.
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.ids) :] = torch.from_numpy(prompt.ids.astype(np.int64))
        mask[row, longest - len(prompt.ids) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    uniforms = torch.from_numpy(np.stack([rng.random(limit) for rng in rngs])).to(device)
    stops = torch.tensor(sampler.stop_token_ids, dtype=torch.int64, device=device)

    rows = torch.arange(len(prompts), device=device)
    cache = DynamicCache(config=lm.model.config)
    tokens: list[list[int]] = [[] for _ in prompts]
    behaviour: list[list[float]] = [[] for _ in prompts]
    reference: list[list[float]] = [[] for _ in prompts]
    stopped, drew_stop = [False] * len(prompts), [False] * len(prompts)
    for step in range(limit):
        output = lm.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        logits_BV = lm.logits(output.last_hidden_state[:, -1])
        drawn, processed = _draw(process(logits_BV), uniforms[:, step], greedy=sampler.temperature == 0)
        raw = logits_BV.gather(-1, drawn[:, None])[:, 0] - torch.logsumexp(logits_BV, dim=-1)
        if not bool(torch.isfinite(raw).all()):
            row = int(rows[~torch.isfinite(raw)][0])
            raise InvalidRolloutError(
                f"prompt {prompts[row].sample_id!r:.100}, response position {step}: the logits of "
                f"{lm.path} are not "
                "finite; check its weights and the dtype (try float32)",
                sample_id=prompts[row].sample_id,
                field="logits",
                position=step,
            )
        ended = torch.isin(drawn, stops)
        columns = (rows.tolist(), drawn.tolist(), processed.tolist(), raw.tolist(), ended.tolist())
        for row, token, lp_processed, lp_raw, end in zip(*columns, strict=True):
            if not stopped[row]:
                tokens[row].append(token)
                behaviour[row].append(min(lp_processed, 0.0))
                reference[row].append(min(lp_raw, 0.0))
                drew_stop[row] = end
                stopped[row] = end or len(tokens[row]) == limits[row]
        n_live = len(stopped) - sum(stopped)
        if not n_live or step + 1 == limit:
            break
        # A row at its end may still ride along; its position stays inside the context.
        ids, positions = drawn[:, None], (positions[:, -1:] + 1).clamp(max=lm.context - 1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        # Removing rows copies the whole key-value cache, so it waits until a quarter of them has ended.
        if n_live <= _COMPACT_AT * len(rows):
            kept = torch.tensor([i for i, row in enumerate(rows.tolist()) if not stopped[row]], device=device)
            cache.batch_select_indices(kept)
            ids, positions, mask = ids[kept], positions[kept], mask[kept]
            rows, uniforms = rows[kept], uniforms[kept]
    return [
        Rollout(
            token_ids=np.concatenate([prompt.ids, np.array(tokens[row], np.uint32)]).astype(np.uint32),
            prompt_len=len(prompt.ids),
            behaviour_logprob=np.array(behaviour[row], np.float32),
            reference_logprob=np.array(reference[row], np.float32),
            sample_id=prompt.sample_id,
            finish_reason="stop" if drew_stop[row] else "length",
            label=prompt.label,
        )
        for row, prompt in enumerate(prompts)
    ]


def _draw(logits_BV: Tensor, uniform_B: Tensor, *, greedy: bool) -> tuple[Tensor, Tensor]:
    """[B] tokens by inverting the cumulative distribution, and [B] their log-probs under it."""
    if greedy:
        best_B = logits_BV.argmax(dim=-1)
        return best_B, torch.zeros_like(uniform_B, dtype=torch.float32)
    # float64, so that the sum over a large vocabulary does not favour its first half.
    cumulative_BV = torch.softmax(logits_BV.double(), dim=-1).cumsum(dim=-1)
    point_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    drawn_B = torch.searchsorted(cumulative_BV, point_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)
    logprob_B = logits_BV.gather(-1, drawn_B[:, None])[:, 0] - torch.logsumexp(logits_BV, dim=-1)
    return drawn_B, logprob_B
