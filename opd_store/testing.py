"""Rollouts for tests and benchmarks that keep every rule of the format. Strategies need `hypothesis`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from opd_store.encodings import Band
from opd_store.meta import CacheMeta, ModelInfo
from opd_store.rollout import Rollout

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

FINGERPRINT = "sha256:" + "5e" * 32


def example_meta(vocab_size: int = 1000) -> CacheMeta:
    """A description of models that do not exist."""
    return CacheMeta(
        vocab_size=vocab_size, tokenizer_fingerprint=FINGERPRINT, teacher=ModelInfo(name="example")
    )


def random_rollout(
    rng: np.random.Generator,
    *,
    vocab_size: int = 1000,
    prompt_len: int = 5,
    response_len: int = 20,
    topk: int = 0,
    decimals: int | None = None,
    sample_id: str | None = None,
) -> Rollout:
    """A rollout with random tokens and self-consistent log-probs.

    Args:
        decimals: round log-probs to so many decimals, which makes ties; None keeps float32.
    """
    token_ids = rng.integers(0, vocab_size, prompt_len + response_len).astype(np.uint32)
    teacher, behaviour, reference = -rng.exponential(size=(3, response_len)).astype(np.float32)
    top = random_topk(rng, response_len, topk, vocab_size, decimals) if topk else None
    return Rollout(
        token_ids=token_ids,
        prompt_len=prompt_len,
        loss_mask=rng.random(response_len) < 0.9,
        sample_id=sample_id,
        finish_reason="stop",
        teacher_logprob=teacher,
        behaviour_logprob=behaviour,
        reference_logprob=reference,
        topk_ids=None if top is None else top.ids,
        topk_logprob=None if top is None else top.logprob,
        log_tail=None if top is None else top.log_tail,
    )


def random_topk(
    rng: np.random.Generator, positions: int, topk: int, vocab_size: int, decimals: int | None = None
) -> Band:
    """The top-k of random distributions: ids and log-probs [positions, topk], log_tail [positions]."""
    ids = np.argsort(rng.random((positions, min(vocab_size, 4 * topk))), axis=1)[:, :topk].astype(np.uint32)
    ids += rng.integers(0, vocab_size - min(vocab_size, 4 * topk) + 1, (positions, 1)).astype(np.uint32)
    weights = rng.exponential(size=(positions, topk)) ** 4 + 1e-30
    tail = np.zeros(positions) if topk == vocab_size else rng.exponential(size=positions)
    total = weights.sum(axis=1) + tail
    logprob = np.log(weights / total[:, None]).astype(np.float32)
    if decimals is not None:
        logprob = np.floor(logprob * 10**decimals).astype(np.float32) / np.float32(10**decimals)
    logprob = np.minimum(logprob, np.float32(0))
    order = np.lexsort((ids, -logprob), axis=1)
    with np.errstate(divide="ignore"):
        log_tail = np.log(tail / total).astype(np.float32)
    return Band(np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprob, order, axis=1), log_tail)


def rollouts(*, vocab_size: int = 1000, topk: int = 0) -> SearchStrategy[Rollout]:
    """Hypothesis strategy: valid rollouts of 1 to 40 response tokens, with and without ties."""
    from hypothesis import strategies as st

    return st.builds(
        lambda seed, prompt_len, response_len, decimals: random_rollout(
            np.random.default_rng(seed),
            vocab_size=vocab_size,
            prompt_len=prompt_len,
            response_len=response_len,
            topk=topk,
            decimals=decimals,
        ),
        st.integers(0, 2**32 - 1),
        st.integers(1, 8),
        st.integers(1, 40),
        st.none() | st.integers(0, 3),
    )
