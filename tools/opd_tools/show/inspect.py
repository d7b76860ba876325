"""`opd inspect`: what a cache is, for whom, and how big."""

from __future__ import annotations

import os
from typing import Any

import click

import opd_store
from opd_store import Cache, InvalidArgumentError, ModelInfo
from opd_tools.console import access_options, command, print_json, printable


@click.command("inspect")
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@click.option(
    "--consistency",
    is_flag=True,
    help="Estimate from log-probs whether this teacher is the one that the student learnt from.",
)
@click.option(
    "--sft-samples",
    help="With --consistency: samples of the SFT teacher, scored by the teacher of URI; these decide.",
)
@access_options
@command
def inspect_cache(
    uri: str, as_json: bool, consistency: bool, sft_samples: str | None, access: dict[str, Any]
) -> None:
    """Show what the cache URI holds: size, columns, provenance, teacher consistency.

    Reads manifest, index and, for the size of each column, up to 16 record batches; of a URL only manifest
    and index, which is five requests, and one more for every further segment of the index. With --consistency
    also up to 2000 rollouts, without their top-k.

    \b
    Example: opd inspect runs/cache
    """
    if sft_samples is not None and not consistency:
        raise InvalidArgumentError("--sft-samples has no effect without --consistency; leave it out")
    cache = opd_store.open(uri, **access)
    found = describe(cache)
    if consistency:
        samples = None if sft_samples is None else opd_store.open(sft_samples, **access)
        found["consistency"] = describe_consistency(cache, samples)
    if as_json:
        print_json({**found, "meta": cache.meta.to_json(), "schema": cache.schema.to_json()})
        return
    for title, rows in found.items():
        click.echo(title if "NO_COLOR" in os.environ else click.style(title, bold=True))
        for name, value in rows.items():
            shown = f"{value:,}" if isinstance(value, int | float) else printable(value)
            click.echo(f"  {printable(name, 40):<20} {shown}")


def describe(cache: Cache) -> dict[str, dict[str, Any]]:
    """Sections of names and values."""
    meta, schema = cache.meta, cache.schema
    positions = cache.n_response_tokens
    per_position = round(cache.n_bytes / positions, 2) if positions else None
    sampler = meta.sampler
    models = {
        "teacher": meta.teacher,
        **{f"teacher {route}": info for route, info in enumerate(meta.other_teachers, 1)},
        "SFT teacher": meta.sft_teacher,
        "behaviour policy": meta.behaviour,
        "reference policy": meta.reference,
    }
    template_args = ", ".join(f"{name}={value}" for name, value in sorted(meta.chat_template_args.items()))
    return {
        "cache": {
            "uri": cache.uri,
            "version": cache.version,
            "digest": cache.digest,
            "parent": cache.parent or "none",
            "rollouts": len(cache),
            "tokens": cache.n_tokens,
            "response tokens": positions,
            "longest rollout": int(cache.row_tokens.max(initial=0)),
            "longest response": int(cache.row_response_tokens.max(initial=0)),
            "shards": cache.n_shards,
            "record batches": len(cache.batch_rows),
            "bytes": cache.n_bytes,
            "bytes per position": per_position,
        },
        "top-k": {
            "ranks": cache.topk,
            "rank bands end at": ", ".join(map(str, schema.bands)) or "none",
            "encoding": _encoding(cache),
            "ranks kept": _cut(cache),
            "id table": _id_table(cache),
            "largest error": _error(cache),
            "chosen ids": schema.chosen or "none",
            "drawn ids": schema.sampled or "none",
            **({"draw temperature": schema.sampled_temperature} if schema.sampled else {}),
            "user columns": ", ".join(
                f"{name} ({kind})" for name, kind in sorted(schema.user_columns.items())
            )
            or "none",
        },
        "bytes per position": _column_sizes(cache),
        "provenance": {
            **{title: _model(info) for title, info in models.items()},
            "teacher consistency": opd_store.teacher_consistency(meta),
            "sampler": "unknown" if sampler is None else _sampler(sampler),
            "full support": "unknown" if sampler is None else ("yes" if sampler.full_support else "no"),
            "vocabulary": meta.vocab_size,
            "tokenizer": meta.tokenizer_fingerprint,
            "chat template": ", ".join(filter(None, (meta.chat_template_digest, template_args))) or "none",
            "prompts": " ".join(filter(None, (meta.prompt_dataset, meta.prompt_revision))) or "unknown",
            "truncation": meta.truncation or "unknown",
            "licence": meta.licence or "unknown",
            "written by": meta.code_version or "unknown",
        },
        **({"notes": dict(sorted(meta.extra.items()))} if meta.extra else {}),
    }


def describe_consistency(cache: Cache, sft_samples: Cache | None) -> dict[str, Any]:
    """The estimate, what the digests say, and what neither can know."""
    report = opd_store.check_consistency(cache, sft_samples=sft_samples)
    statistics = {
        "gap on sure tokens": report.sure_gap,
        "shocks": report.shocks,
        "KL to teacher": report.kl,
        "KL on SFT samples": report.samples_kl,
    }
    return {
        "estimate": report.verdict.value,
        "because": report.reason,
        "by weight digests": opd_store.teacher_consistency(cache.meta),
        "rollouts": report.n_rollouts,
        "tokens": report.n_tokens,
        "sure tokens": report.n_sure,
        **{name: str(interval) for name, interval in statistics.items() if interval is not None},
        "note": "an estimate: teachers that agree on these rollouts cannot be told apart, and an overfitted "
        "student looks inconsistent; digests decide where both are known",
    }


def _packed(cache: Cache) -> bool:
    return bool(cache.topk or cache.schema.chosen or cache.schema.sampled)


def _encoding(cache: Cache) -> str:
    return cache.encoding if _packed(cache) else "none"


def _cut(cache: Cache) -> str:
    cut = cache.schema.cut
    if cut is None:
        return "all" if cache.topk else "none"
    if cut.rule == "given":
        return "as given"
    rule = "probability at least" if cut.rule == "probability" else "as many as sum to"
    return f"{rule} {cut.value:g}"


def _id_table(cache: Cache) -> str:
    if cache.manifest.id_table is None:
        return "not yet (auto)" if cache.schema.id_table == "auto" else "none"
    if cache.stats is not None:
        # Over a network its size has to do: it may be large.
        file = cache.manifest.id_table
        return f"{file.n_bytes:,} bytes, sha256:{file.sha256.hex()[:16]}"
    table = cache.id_table
    assert table is not None
    return f"{len(table.lists):,} lists, {len(table.to_bytes()):,} bytes, sha256:{table.digest.hex()[:16]}"


def _error(cache: Cache) -> str:
    if not _packed(cache):
        return "none"
    if not cache.max_error:
        return "0 (exact float32)"
    # Hoeffding's lemma: log-probs off by at most e, renormalised, are at most e^2 / 2 apart in KL.
    return f"{cache.max_error:.3g} nat (KL at most {cache.max_error**2 / 2:.1e} nat a position)"


def _column_sizes(cache: Cache) -> dict[str, Any]:
    """Bytes a response token of the columns that take any; over a network, small columns are one figure."""
    if cache.stats is None:
        sizes, tokens = cache.column_bytes()
    else:
        sizes, tokens = cache.part_bytes(), cache.n_response_tokens
    return {name: round(n_bytes / tokens, 2) for name, n_bytes in sizes.items() if tokens and n_bytes}


def _model(info: ModelInfo | None) -> str:
    if info is None:
        return "unknown"
    temperature = info.logprob_temperature
    parts = (
        info.name if info.revision is None else f"{info.name} at {info.revision}",
        (info.weights_digest or "digest unknown")[:23],
        info.dtype,
        info.quantisation,
        " ".join(filter(None, (info.engine, info.engine_version))),
        None if temperature is None else f"log-probs at temperature {temperature:g}",
        info.logprob_mode,
    )
    return ", ".join(filter(None, parts))


def _sampler(sampler: opd_store.SamplerInfo) -> str:
    parts = [f"temperature {sampler.temperature:g}", f"top-p {sampler.top_p:g}"]
    for name, value in (
        ("top-k", sampler.top_k),
        ("min-p", sampler.min_p),
        ("repetition penalty", sampler.repetition_penalty),
    ):
        if value is not None:
            parts.append(f"{name} {value:g}")
    if sampler.max_new_tokens is not None:
        parts.append(f"at most {sampler.max_new_tokens} tokens")
    if sampler.seed is not None:
        parts.append(f"seed {sampler.seed}")
    return ", ".join([*parts, *filter(None, (sampler.engine, sampler.engine_version))])
