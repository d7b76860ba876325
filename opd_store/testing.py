"""Rollouts for tests and benchmarks that keep every rule of the format. Strategies need `hypothesis`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from opd_store.encodings import Band
from opd_store.layout import NO_ID
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
    peaked: bool = False,
    ragged: bool = False,
    chosen: int = 0,
    sampled: int = 0,
) -> Rollout:
    """A rollout with random tokens and self-consistent log-probs.

    Args:
        decimals: round log-probs to so many decimals, which makes ties; None keeps float32.
        peaked: top-k like that of a language model (`peaked_topk`) instead of `random_topk`.
        ragged: some positions have fewer than `topk` ranks.
        chosen, sampled: most ids a position has in these supports; 0 for none.
    """
    token_ids = rng.integers(0, vocab_size, prompt_len + response_len).astype(np.uint32)
    teacher, behaviour, reference = -rng.exponential(size=(3, response_len)).astype(np.float32)
    make = peaked_topk if peaked else random_topk
    top = make(rng, response_len, topk, vocab_size, decimals) if topk else None
    loss_mask = rng.random(response_len) < 0.9
    if top is not None and ragged:
        top = shortened(rng, top)
    supports = {
        kind: shortened(rng, make(rng, response_len, size, vocab_size, decimals), least=0)
        for kind, size in (("chosen", chosen), ("sampled", sampled))
        if size
    }
    fields = {
        f"{kind}_{name}": getattr(band, name)
        for kind, band in supports.items()
        for name in ("ids", "logprob", "log_tail")
    }
    if sampled:
        ids = supports["sampled"].ids
        fields["sampled_draws"] = np.where(ids == NO_ID, 0, rng.geometric(0.3, ids.shape)).astype(np.uint32)
    return Rollout(
        token_ids=token_ids,
        prompt_len=prompt_len,
        loss_mask=loss_mask,
        sample_id=sample_id,
        finish_reason="stop",
        teacher_logprob=teacher,
        behaviour_logprob=behaviour,
        reference_logprob=reference,
        topk_ids=None if top is None else top.ids,
        topk_logprob=None if top is None else top.logprob,
        log_tail=None if top is None else top.log_tail,
        **fields,
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


def peaked_topk(
    rng: np.random.Generator, positions: int, topk: int, vocab_size: int, decimals: int | None = None
) -> Band:
    """Top-k as language models give it: most positions nearly certain, some flat; few ids make up most rows.

    Shapes as for `random_topk`. Log-probs reach far below those, so their differences do too.
    """
    sharpness = 10 ** rng.uniform(-1, 1.5, (positions, 1))
    gaps = rng.exponential(size=(positions, topk)) * sharpness / np.arange(1, topk + 1)
    gaps[:, 0] = 0
    scores = -np.cumsum(gaps, axis=1)
    tail = np.full(positions, -np.inf)
    if topk < vocab_size:
        tail = scores[:, -1] + rng.normal(2, 2, positions)
    total = np.logaddexp(np.logaddexp.reduce(scores, axis=1), tail)
    logprob = np.minimum(scores - total[:, None], 0).astype(np.float32)
    if decimals is not None:
        logprob = np.floor(logprob * 10**decimals).astype(np.float32) / np.float32(10**decimals)
    # A few contexts, each with its own favourites; the smallest keys of a row are its ids.
    favour = np.random.default_rng(7).random((8, vocab_size)) ** 0.2
    keys = rng.exponential(size=(positions, vocab_size)) ** 0.5 * favour[rng.integers(0, 8, positions)]
    ids = np.argsort(keys, axis=1)[:, :topk].astype(np.uint32)
    order = np.lexsort((ids, -logprob), axis=1)
    log_tail = np.minimum(tail - total, 0).astype(np.float32)
    return Band(np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprob, order, axis=1), log_tail)


def shortened(rng: np.random.Generator, support: Band, *, least: int = 1) -> Band:
    """The same rows cut at random places, but not before `least` ids; what is cut joins the tail."""
    size = support.ids.shape[1]
    kept = np.arange(size) < rng.integers(least, size + 1, (len(support.ids), 1))
    outside = np.where(kept, -np.inf, support.logprob.astype(np.float64))
    tail = np.logaddexp(support.log_tail.astype(np.float64), np.logaddexp.reduce(outside, axis=1))
    return Band(
        np.where(kept, support.ids, np.uint32(NO_ID)),
        np.where(kept, support.logprob, np.float32(-np.inf)),
        np.where(kept.all(axis=1), support.log_tail, np.minimum(tail, 0)).astype(np.float32),
    )


def rollouts(
    *,
    vocab_size: int = 1000,
    topk: int = 0,
    ragged: bool = False,
    chosen: int = 0,
    sampled: int = 0,
) -> SearchStrategy[Rollout]:
    """Hypothesis strategy: valid rollouts of 1 to 40 response tokens, flat and peaked, with and without ties.

    Args:
        ragged, chosen, sampled: as for `random_rollout`.
    """
    from hypothesis import strategies as st

    return st.builds(
        lambda seed, prompt_len, response_len, decimals, peaked: random_rollout(
            np.random.default_rng(seed),
            vocab_size=vocab_size,
            prompt_len=prompt_len,
            response_len=response_len,
            topk=topk,
            decimals=decimals,
            peaked=peaked,
            ragged=ragged,
            chosen=chosen,
            sampled=sampled,
        ),
        st.integers(0, 2**32 - 1),
        st.integers(1, 8),
        st.integers(1, 40),
        st.none() | st.integers(0, 3),
        st.booleans(),
    )
