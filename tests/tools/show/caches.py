"""Small caches with every kind of column, made without a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import opd_store
from opd_store import CacheMeta, ModelInfo, Rollout
from opd_store.testing import random_rollout

WORDS = ["<s>", "</s>", "the", "cat", "sat", "on", "a", "mat", "\n", "\t", "\x1b[31mred", "\u202eevil"]
VOCAB = 40


def save_tokenizer(path: Path, words: list[str] = WORDS) -> str:
    """A tokenizer.json with a word an id; its fingerprint."""
    vocab = {
        word: number for number, word in enumerate([*words, *(f"w{n}" for n in range(len(words), VOCAB))])
    }
    core = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    core.decoder = decoders.Fuse()
    path.mkdir(parents=True, exist_ok=True)
    core.save(str(path / "tokenizer.json"))
    return opd_store.tokenizer_fingerprint((path / "tokenizer.json").read_bytes())


def some_rollouts(n: int = 12, *, seed: int = 0, topk: int = 4, **options: Any) -> list[Rollout]:
    """Rollouts whose teacher log-probs agree with their top-k, with two finish reasons and three domains."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(n):
        rollout = random_rollout(
            rng,
            vocab_size=VOCAB,
            topk=topk,
            response_len=5 + number % 4,
            sample_id=f"r{number}",
            peaked=True,
            **options,
        )
        changes: dict[str, Any] = {
            "finish_reason": "stop" if number % 3 else "length",
            "extra": {"x_domain": ("maths", "code", "prose")[number % 3], "x_level": number % 2},
        }
        if topk:
            # The sampled token is the first rank at even positions, else any token.
            tokens = rollout.token_ids.copy()
            even = np.arange(rollout.response_len) % 2 == 0
            tokens[rollout.prompt_len :][even] = rollout.topk_ids[even, 0]
            teacher = rollout.teacher_logprob.copy()
            hit = rollout.topk_ids == tokens[rollout.prompt_len :, None]
            teacher[hit.any(axis=1)] = rollout.topk_logprob[hit]
            changes |= {"token_ids": tokens, "teacher_logprob": teacher}
        found.append(dataclasses.replace(rollout, **changes))
    return found


def write(
    path: Path, rollouts: list[Rollout], *, fingerprint: str = "sha256:" + "5e" * 32, **options: Any
) -> Path:
    """A cache of one version; `meta` and everything of `opd_store.create` may be given."""
    meta = CacheMeta(vocab_size=VOCAB, tokenizer_fingerprint=fingerprint, teacher=ModelInfo(name="a teacher"))
    options = {
        "meta": meta,
        "topk": 4,
        "user_columns": {"x_domain": "utf8", "x_level": "int64"},
    } | options
    with opd_store.create(path, **options) as writer:
        writer.append_batch(rollouts)
    return path
