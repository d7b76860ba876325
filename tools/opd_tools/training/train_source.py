"""What `opd train` trains on: a cache, or fresh rollouts and a teacher in memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from opd_store import CacheMeta, InvalidArgumentError
from opd_tools.console import load_model
from opd_tools.training.drift import is_refreshing, look_before_start, refreshing_source, split_allowed
from opd_tools.training.idle_options import refuse_idle
from opd_tools.training.loss_options import read_loss

if TYPE_CHECKING:
    from opd_train import CausalLM, Stopwatch
    from opd_train.training.supply import BatchSource

Prepared = tuple["BatchSource", dict[str, Any], dict[str, Any]]
"""A source, fields of `DistillConfig` that follow from it, and what `opd.json` says of it."""


def offline_source(uri: str | None, lm: CausalLM, stopwatch: Stopwatch, options: dict[str, Any]) -> Prepared:
    """Batches of a cache, and with --refresh-* of what the student samples later."""
    import opd_store
    from opd_train import CacheStream, Objective, check_cache

    assert uri is not None
    cache = opd_store.open(uri, **options["access"])
    topk = cache.topk if options["ranks"] is None else options["ranks"]
    fields = {"loss": read_loss(options, topk=topk, chosen=cache.schema.chosen)}
    refuse_idle(options, fields["loss"])
    distilled = fields["loss"].objective is not Objective.CROSS_ENTROPY
    teacher_used = distilled or fields["loss"].correction.needs_advantage
    allow, allow_start = split_allowed(options["allow_mismatch"])
    renormalised = fields["loss"].objective.renormalised
    allowed = check_cache(cache.meta, lm, allow=allow, teacher_used=teacher_used, renormalised=renormalised)
    if fields["loss"].correction.needs_behaviour and len(cache) and cache[0].behaviour_logprob is None:
        how = "pass --correction none" if options["loss"] is None else f"change {options['loss']}"
        raise InvalidArgumentError(
            f"{cache.uri}: correction {fields['loss'].correction.kind.value!r} needs behaviour_logprob, "
            f"which row 0 lacks; score again with --reference, or {how}"
        )
    needs_topk = fields["loss"].objective.needs_topk and not fields["loss"].chosen_ids
    look_before_start(
        cache,
        lm,
        fields["loss"],
        options["out"],
        allow_start,
        teacher_used=teacher_used,
        speak=options["world"].first,
    )
    ranks = options["ranks"] if needs_topk else 0
    source: BatchSource
    if is_refreshing(options):
        source = refreshing_source(cache, lm, stopwatch, options, loss=fields["loss"], ranks=ranks)
    else:
        source = CacheStream(
            cache,
            batch_tokens=options["batch_tokens"],
            batch_rollouts=options["batch_rollouts"],
            seed=options["seed"],
            rank=options["world"].rank,
            world_size=options["world"].size,
            ranks=ranks,
            epochs=None,
            device=lm.device,
            vocab_size=lm.vocab_size,
            context=lm.context,
            workers=options["workers"],
            shuffle=options["shuffle"],
            window=options["window"],
            too_long=options["too_long"],
            draws=fields["loss"].objective.needs_draws,
            chosen=fields["loss"].chosen_ids,
        )
    teacher = cache.meta.sft_teacher
    if not distilled:
        teacher = cache.meta.behaviour
    provenance = {
        "cache": cache.digest,
        "allowed_mismatches": [dataclasses.asdict(mismatch) for mismatch in allowed],
        "doubts": _report_doubts(cache.meta, lm, options),
        "sft_teacher": None if teacher is None else teacher.to_json(),
    }
    return source, fields, provenance


def _report_doubts(meta: CacheMeta, lm: CausalLM, options: dict[str, Any]) -> list[str]:
    from opd_train import find_doubts

    doubts = find_doubts(meta, lm)
    for doubt in doubts if options["world"].first else ():
        click.echo(f"opd: note: {doubt}", err=True)
    return doubts


def live_source(uri: str | None, lm: CausalLM, stopwatch: Stopwatch, options: dict[str, Any]) -> Prepared:
    """Fresh rollouts at every step, scored by a teacher in memory."""
    from opd_store import SamplerInfo
    from opd_train import LiveSource, check_cache, read_prompts

    if not options["teacher"] or not options["prompts"]:
        raise InvalidArgumentError("--live needs --teacher and --prompts")
    teacher = load_model(options["teacher"], dtype="float32", device=str(lm.device))
    fields = {"loss": read_loss(options, topk=min(options["topk"], teacher.vocab_size))}
    refuse_idle(options, fields["loss"])
    if fields["loss"].objective.needs_draws:
        raise InvalidArgumentError(
            "--live draws no ids, which objective 'random_sampling_kd' needs; give a CACHE"
        )
    described = CacheMeta(
        vocab_size=teacher.vocab_size,
        tokenizer_fingerprint=teacher.tokenizer_fingerprint,
        chat_template_digest=teacher.chat_template_digest,
        teacher=teacher.info,
        sft_teacher=lm.sft_teacher,
    )
    allowed = check_cache(described, lm, allow=options["allow_mismatch"])
    sampler = SamplerInfo(
        max_new_tokens=options["max_new_tokens"], seed=options["seed"], stop_token_ids=lm.stop_token_ids
    )
    source = LiveSource(
        lm,
        teacher,
        read_prompts(options["prompts"], lm),
        sampler,
        batch_rollouts=options["batch_rollouts"] or 64,
        topk=min(options["topk"], teacher.vocab_size) if fields["loss"].objective.needs_topk else 0,
        batch_tokens=options["batch_tokens"],
        stopwatch=stopwatch,
    )
    provenance = {
        "live_teacher": teacher.info.to_json(),
        "allowed_mismatches": [dataclasses.asdict(mismatch) for mismatch in allowed],
        "doubts": _report_doubts(described, lm, options),
        "sft_teacher": lm.sft_teacher and lm.sft_teacher.to_json(),
    }
    return source, fields, provenance
