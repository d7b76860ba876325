"""`opd eval`: accuracy on problems with known answers, and distance to a teacher."""

from __future__ import annotations

import dataclasses
import re
from math import isfinite
from typing import Any

import click

from opd_store import InvalidArgumentError, Rollout
from opd_tools.console import (
    AT_LEAST_1,
    Meter,
    access_options,
    command,
    load_model,
    model_options,
    print_json,
)

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_match(rule: str, text: str, answer: str) -> bool:
    """Whether a response gives the answer.

    "exact": equal but for surrounding white space. "last-number": the last number of the text equals that of
    the answer. "suffix": the text ends with the answer.
    """
    if rule == "exact":
        return text.strip() == answer.strip()
    if rule == "suffix":
        return bool(answer.strip()) and text.rstrip().endswith(answer.strip())
    found, wanted = _NUMBER.findall(text), _NUMBER.findall(answer)
    return bool(found and wanted) and _value(found[-1]) == _value(wanted[-1])


def _value(number: str) -> float:
    return float(number.replace(",", ""))


@click.command("eval")
@click.argument("model")
@click.option("--prompts", help="Problems as JSONL with `answer`: greedy accuracy.")
@click.option(
    "--match",
    type=click.Choice(["last-number", "exact", "suffix"]),
    default="last-number",
    show_default=True,
    help="When a response counts as right.",
)
@click.option("--cache", help="A cache with top-k, not trained on: KL to its teacher, nats per token.")
@click.option("--teacher", help="With --prompts: directory of a teacher, for the KL of sampled responses.")
@click.option(
    "--max-new-tokens", type=AT_LEAST_1, default=256, show_default=True, help="Longest response, in tokens."
)
@click.option("--limit", type=AT_LEAST_1, help="Use only so many prompts. Default: all.")
@click.option(
    "--batch-rows", type=AT_LEAST_1, default=64, show_default=True, help="Prompts sampled together."
)
@click.option("--seed", default=1, show_default=True, help="Seed of the samples for the KL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@model_options
@access_options
@command
def evaluate(
    model: str,
    prompts: str | None,
    match: str,
    cache: str | None,
    teacher: str | None,
    max_new_tokens: int,
    limit: int | None,
    batch_rows: int,
    seed: int,
    as_json: bool,
    dtype: str,
    device: str,
    access: dict[str, Any],
) -> None:
    """Measure MODEL: accuracy on PROMPTS (greedy, 95 % Wilson interval), KL to a teacher from a CACHE or
    live.

    \b
    Example: opd eval runs/distilled/final --prompts test.jsonl --cache runs/heldout
    """
    import opd_store
    from opd_store import SamplerInfo
    from opd_train import accuracy, cache_divergence, read_prompts, sample_rollouts, sequence_kl

    if prompts is None and cache is None:
        raise InvalidArgumentError("nothing to measure: give --prompts, --cache or both")
    if teacher is not None and prompts is None:
        raise InvalidArgumentError("--teacher needs --prompts to sample from")
    lm = load_model(model, dtype=dtype, device=device)
    found: dict[str, Any] = {}
    if prompts is not None:
        problems = read_prompts(prompts, lm, limit=limit)
        unanswered = [problem.sample_id for problem in problems if problem.label is None]
        if unanswered and (teacher is None or len(unanswered) < len(problems)):
            raise InvalidArgumentError(f"{prompts}: {unanswered[0]!r:.80} has no `answer` to compare with")

        def sample(name: str, temperature: float) -> list[Rollout]:
            sampler = SamplerInfo(
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed,
                stop_token_ids=lm.stop_token_ids,
            )
            with Meter(name, "rollouts") as meter:
                return sample_rollouts(
                    lm,
                    problems,
                    sampler,
                    batch_rows=batch_rows,
                    on_batch=lambda done: meter.update(done, len(problems)),
                )

        if not unanswered:

            def is_correct(rollout: Rollout) -> bool:
                text = lm.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
                return is_match(match, text, str(rollout.label))

            found["accuracy"] = accuracy(sample("answering", 0.0), is_correct)
        if teacher is not None:
            live = load_model(teacher, dtype=dtype, device=device)
            found["reverse KL, nats per response"] = sequence_kl(lm, live, sample("sampling", 1.0))
    if cache is not None:
        divergence = cache_divergence(lm, opd_store.open(cache, **access))
        found["forward KL, nats per token"] = divergence["forward_kl"]
        found["reverse KL, nats per token"] = divergence["reverse_kl"]
    if as_json:
        # One value alone has no interval, and JSON no infinity.
        rows = {name: dataclasses.asdict(estimate) for name, estimate in found.items()}
        print_json(
            {name: {k: v if isfinite(v) else None for k, v in row.items()} for name, row in rows.items()}
        )
    else:
        for name, estimate in found.items():
            click.echo(f"{name}: {estimate}")
