"""The demo's models: tiny Llamas trained on the spot by plain supervised learning.

Axes: M = training sequences, B = rows of a batch, S = padded length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import task
import torch
import transformers
from torch import Tensor

from opd_train import CausalLM, load_causal_lm

CONTEXT = task.PROMPT_TOKENS + task.MAX_RESPONSE_TOKENS + 8
IGNORED = -100
Example = tuple[Sequence[int], int]
"""Token ids of prompt and response, and the prompt's length."""


def create(path: Path, *, hidden: int, intermediate: int, heads: int, seed: int) -> CausalLM:
    """A Llama of two layers with random weights, as a Hugging Face directory."""
    torch.manual_seed(seed)
    tokenizer = task.build_tokenizer(path)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return load(path)


def load(path: Path) -> CausalLM:
    """Eager attention: at these sizes it is faster than the fused kernels."""
    return load_causal_lm(path, attention="eager")


def worked_examples(
    lm: CausalLM, problems: Sequence[task.Problem], share_b: float, seed: int
) -> list[Example]:
    """Correct solutions, a share of them in dialect B."""
    rng = np.random.default_rng(seed)
    found = []
    for problem in problems:
        dialect = task.Dialect.B if rng.random() < share_b else task.Dialect.A
        prompt = lm.tokenizer(task.prompt_text(problem), add_special_tokens=False)["input_ids"]
        solution = lm.tokenizer(task.solution_text(problem, dialect), add_special_tokens=False)["input_ids"]
        found.append(([*prompt, *solution, lm.tokenizer.eos_token_id], len(prompt)))
    return found


def train_supervised(
    lm: CausalLM,
    examples: Sequence[Example],
    *,
    steps: int,
    lr: float,
    warmup: int,
    seed: int,
    final_share: float = 0.0,
    stop_when: Callable[[], bool] | None = None,
    cooldown: int = 40,
    batch: int = 128,
) -> int:
    """Cross-entropy on the responses.

    Args:
        steps: with a cosine from `lr` to `final_share * lr`; with `stop_when`, the most at constant `lr`.
        stop_when: asked every ten steps from step 100; after its yes come `cooldown` steps of linear decay.

    Returns:
        Steps made.
    """
    ids_MS, labels_MS = padded(examples)
    optimizer = torch.optim.AdamW(
        lm.model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    end = steps
    lm.model.train()
    for step in range(steps + cooldown):
        if stop_when is None:
            if step == steps:
                break
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            factor = final_share + (1 - final_share) * cosine
        else:
            if end == steps and step >= 100 and step % 10 == 0 and stop_when():
                end = step
                lm.model.train()
            if step == end + cooldown:
                break
            factor = 1.0 if step < end else 1 - (step - end) / cooldown
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(len(examples))])
        rows, order = torch.from_numpy(order[:batch]), order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = lr * factor * min(1.0, (step + 1) / warmup)
        logits = lm.model(input_ids=ids_MS[rows]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels_MS[rows, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
        optimizer.step()
    lm.model.eval()
    return step


def padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    # Padding on the right is never attended to by the tokens before it, so it needs no mask, only no label.
    longest = max(len(ids) for ids, _ in examples)
    ids_MS = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels_MS = torch.full_like(ids_MS, IGNORED)
    for row, (ids, prompt_len) in enumerate(examples):
        ids_MS[row, : len(ids)] = torch.tensor(ids)
        labels_MS[row, prompt_len : len(ids)] = ids_MS[row, prompt_len : len(ids)]
    return ids_MS, labels_MS
