"""From prompts to rollouts to a scored cache, in chunks that are committed as they are done.

Chunks are cut from the whole input, so a run that was killed and started again commits the same versions,
with the same digests, as one that was not.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import opd_store
from opd_store import (
    Cache,
    CacheMeta,
    Cut,
    IdTable,
    InvalidArgumentError,
    MismatchError,
    ModelInfo,
    Rollout,
    SamplerInfo,
    Version,
)
from opd_train.capture.chunks import commit_chunks, open_writer
from opd_train.capture.drawing import Draws
from opd_train.capture.sampling import Prompt, make_processor, sample_rollouts
from opd_train.capture.scoring import check_fits, score_rollouts, with_teacher
from opd_train.models import CausalLM

Progress = Callable[[int, int], None]
"""Called with (units done, units in all)."""
CODE_VERSION = f"opd-store {opd_store.__version__}"


def roll_out(
    lm: CausalLM,
    prompts: Sequence[Prompt],
    uri: str | os.PathLike[str],
    sampler: SamplerInfo,
    *,
    samples_per_prompt: int = 1,
    batch_rows: int = 64,
    commit_rollouts: int = 1024,
    prompt_dataset: str | None = None,
    prompt_revision: str | None = None,
    on_progress: Progress | None = None,
) -> Version:
    """Sample responses and store them as a cache of unscored rollouts; continues where an earlier call
    stopped.

    Args:
        lm: the behaviour policy.
        sampler: `max_new_tokens` and `seed` have to be set; empty `stop_token_ids` means the model's own.
        prompt_dataset, prompt_revision: where the prompts came from, for the record.
        samples_per_prompt: draws per prompt; draw i > 0 has "#i" after its sample_id.
        on_progress: in rollouts.

    Raises:
        MismatchError: the cache at `uri` was made with other settings.
        CacheExistsError, StorageError: as for `opd_store.create`.
        InvalidRolloutError: a prompt that leaves no room in the context.
    """
    sampler = dataclasses.replace(
        sampler,
        stop_token_ids=sampler.stop_token_ids or lm.stop_token_ids,
        engine=lm.info.engine,
        engine_version=lm.info.engine_version,
    )
    meta = CacheMeta(
        vocab_size=lm.vocab_size,
        tokenizer_fingerprint=lm.tokenizer_fingerprint,
        chat_template_digest=lm.chat_template_digest,
        behaviour=dataclasses.replace(
            lm.info, logprob_temperature=sampler.temperature, logprob_mode="processed"
        ),
        reference=lm.info,
        sampler=sampler,
        sft_teacher=lm.sft_teacher,
        prompt_dataset=prompt_dataset,
        prompt_revision=prompt_revision,
        code_version=CODE_VERSION,
    )
    draws = [
        dataclasses.replace(prompt, sample_id=prompt.sample_id if i == 0 else f"{prompt.sample_id}#{i}")
        for prompt in prompts
        for i in range(samples_per_prompt)
    ]
    repeated = len(draws) - len({draw.sample_id for draw in draws})
    if repeated:
        raise InvalidArgumentError(
            f"prompts: {repeated} of the ids occur twice; every prompt needs its own id"
        )

    def sample(start: int, end: int) -> Sequence[Rollout]:
        report = None if on_progress is None else (lambda done: on_progress(start + done, len(draws)))
        return sample_rollouts(
            lm, draws[start:end], sampler, first_stream=start, batch_rows=batch_rows, on_batch=report
        )

    with open_writer(uri, meta, topk=0) as writer:
        first = _check_prefix(writer.base, draws)
        starts = range(first, len(draws), commit_rollouts)
        return commit_chunks(writer, starts, len(draws), commit_rollouts, sample)


def _check_prefix(done: Cache | None, draws: Sequence[Prompt]) -> int:
    """How many draws a cache holds; raises MismatchError unless they are the first of these."""
    if done is None:
        return 0
    if len(done) > len(draws):
        raise MismatchError(
            f"{done.uri}: holds {len(done)} rollouts, this run samples {len(draws)}; choose another path",
            field="prompts",
            expected=str(len(draws)),
            found=str(len(done)),
        )
    rollouts = done.scan(ranks=0, columns=("sample_id",))
    for draw, rollout in zip(draws, rollouts, strict=False):
        prompt = rollout.token_ids[: rollout.prompt_len]
        if draw.sample_id != rollout.sample_id or not np.array_equal(draw.ids, prompt):
            raise MismatchError(
                f"{done.uri}: holds rollouts of other prompts, the first at id {rollout.sample_id!r:.100}, "
                f"where this run has {draw.sample_id!r:.100}; choose another path",
                field="prompts",
                expected=draw.sample_id,
                found=str(rollout.sample_id),
            )
    return len(done)


def score_cache(
    lm: CausalLM,
    rollouts: Sequence[Rollout],
    source: CacheMeta,
    uri: str | os.PathLike[str],
    *,
    topk: int,
    draws: Draws | None = None,
    chosen: int = 0,
    chooser: CausalLM | None = None,
    encoding: str = "ladder/128",
    id_table: IdTable | Literal["auto"] | None = "auto",
    cut: Cut | None = None,
    reference: CausalLM | None = None,
    sft_teacher: ModelInfo | None = None,
    licence: str | None = None,
    batch_tokens: int = 8192,
    commit_rollouts: int = 512,
    on_progress: Progress | None = None,
) -> Version:
    """Score rollouts with a teacher and store them as a cache; continues where an earlier call stopped.

    Args:
        lm: the teacher.
        source: what is known of the rollouts; passes into the new cache.
        topk: K; 0 stores none.
        draws: ids to draw from the teacher at every position, for random-sampling distillation. Their
            temperature is recorded in the cache, their seed is not.
        chosen: how many of the ids that `chooser` holds most likely at a position the teacher scores besides,
            for a reverse KL where the student has its mass.
        chooser: the student, or another model of its tokenizer; needed where `chosen` is not 0.
        encoding, id_table, cut: how ids and log-probs are stored, as for `opd_store.create`.
        reference: the behaviour checkpoint, to fill in reference log-probs (raw) and, where the sampler is
            known and they are missing, behaviour log-probs (processed).
        sft_teacher: what the behaviour policy was fine-tuned on, where `source` does not say.
        on_progress: in response tokens.

    Raises:
        InvalidArgumentError: more ranks or chosen ids than there are logits, or `chosen` without `chooser`.
        MismatchError: the rollouts were made with another tokenizer, or the cache at `uri` with other
        settings. InvalidRolloutError: a rollout the model cannot score, or NaN logits, with rollout and
        position. CacheExistsError, StorageError: as for `opd_store.create`.
    """
    if (chosen > 0) != (chooser is not None):
        raise InvalidArgumentError(
            f"chosen, chooser: expected both or neither, found {chosen} ids chosen by {chooser}"
        )
    if chooser is not None and chosen > min(lm.vocab_size, chooser.vocab_size):
        raise InvalidArgumentError(
            f"chosen: {chosen} ids of a teacher with {lm.vocab_size} logits and a chooser with "
            f"{chooser.vocab_size}; ask for no more than both have"
        )
    for model in (lm, reference, chooser):
        if model is not None and model.tokenizer_fingerprint != source.tokenizer_fingerprint:
            raise MismatchError(
                f"tokenizer_fingerprint: the rollouts have {source.tokenizer_fingerprint}, {model.path} has "
                f"{model.tokenizer_fingerprint}; score with a model of the same tokenizer",
                field="tokenizer_fingerprint",
                expected=source.tokenizer_fingerprint,
                found=model.tokenizer_fingerprint,
            )
    behaviour = source.behaviour and source.behaviour.weights_digest
    if reference is not None and behaviour not in (None, reference.info.weights_digest):
        raise MismatchError(
            f"reference: the rollouts were sampled by weights {behaviour}, {reference.path} has "
            f"{reference.info.weights_digest}; give the behaviour checkpoint",
            field="reference",
            expected=str(behaviour),
            found=str(reference.info.weights_digest),
        )
    # All of them before the first is scored, so that a bad row far down does not cost the rows before it.
    for number, rollout in enumerate(rollouts):
        for model in (lm, reference, chooser):
            if model is not None:
                check_fits(model, rollout, number)
    meta = dataclasses.replace(
        source,
        vocab_size=lm.vocab_size,
        teacher=lm.info,
        reference=source.reference if reference is None else reference.info,
        sft_teacher=source.sft_teacher or sft_teacher,
        licence=licence or source.licence,
        code_version=CODE_VERSION,
    )
    response_tokens = [rollout.response_len for rollout in rollouts]
    total = sum(response_tokens)

    def score(start: int, end: int) -> Sequence[Rollout]:
        chunk = [rollouts[row] for row in range(start, end)]
        before = sum(response_tokens[:start])
        report = None if on_progress is None else (lambda done: on_progress(before + done, total))
        ids = None if chooser is None else _most_likely(chooser, chunk, chosen, lm.vocab_size, batch_tokens)
        scores = score_rollouts(
            lm,
            chunk,
            topk=topk,
            draws=draws,
            chosen_ids=ids,
            batch_tokens=batch_tokens,
            on_batch=report,
        )
        scored = [with_teacher(rollout, score) for rollout, score in zip(chunk, scores, strict=True)]
        return (
            scored if reference is None else _with_reference(scored, reference, source.sampler, batch_tokens)
        )

    options: dict[str, Any] = {"topk": topk, "chosen": chosen}
    if draws is not None:
        options |= {"sampled": draws.n, "sampled_temperature": float(draws.temperature)}
    with open_writer(uri, meta, encoding=encoding, id_table=id_table, cut=cut, **options) as writer:
        missing = [
            start
            for start in range(0, len(rollouts), commit_rollouts)
            if any(
                rollouts[row] not in writer
                for row in range(start, min(start + commit_rollouts, len(rollouts)))
            )
        ]
        return commit_chunks(writer, missing, len(rollouts), commit_rollouts, score)


def _most_likely(
    lm: CausalLM, rollouts: Sequence[Rollout], n: int, below: int, batch_tokens: int
) -> list[NDArray[np.uint32]]:
    """[R, n] for each rollout: of the ids that both models have, those that this one holds most likely."""
    scores = score_rollouts(
        lm, rollouts, topk=n, batch_tokens=batch_tokens, processor=lambda logits: logits[:, :below]
    )
    return [ids for score in scores if (ids := score.topk_ids) is not None]


def _with_reference(
    rollouts: Sequence[Rollout], reference: CausalLM, sampler: SamplerInfo | None, batch_tokens: int
) -> list[Rollout]:
    raw = score_rollouts(reference, rollouts, batch_tokens=batch_tokens)
    found: list[dict[str, Any]] = [
        {} if rollout.reference_logprob is not None else {"reference_logprob": scores.logprob}
        for rollout, scores in zip(rollouts, raw, strict=True)
    ]
    if sampler is not None and any(rollout.behaviour_logprob is None for rollout in rollouts):
        processor = make_processor(sampler)
        processed = score_rollouts(reference, rollouts, batch_tokens=batch_tokens, processor=processor)
        for fields, rollout, scores in zip(found, rollouts, processed, strict=True):
            if rollout.behaviour_logprob is None:
                # Greedy decoding draws its token with certainty.
                certain = sampler.temperature == 0
                fields["behaviour_logprob"] = np.zeros_like(scores.logprob) if certain else scores.logprob
    return [dataclasses.replace(rollout, **fields) for rollout, fields in zip(rollouts, found, strict=True)]
