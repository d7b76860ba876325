"""`opd score`: a teacher's log-probs of rollouts, into a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

import opd_store
from opd_store import ENCODINGS, Cut, IdTable, InvalidArgumentError, ModelInfo
from opd_tools.console import AT_LEAST_0, AT_LEAST_1, Meter, command, load_model, model_options, printable

if TYPE_CHECKING:
    from opd_train import CausalLM

SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)


@click.command("score")
@click.argument("teacher")
@click.argument("rollouts")
@click.argument("out")
@click.option(
    "--topk", type=AT_LEAST_0, default=64, show_default=True, help="Ranks stored per position; 0 stores none."
)
@click.option(
    "--encoding",
    type=click.Choice(ENCODINGS),
    default="ladder/128",
    show_default=True,
    help="How top-k pages are stored: plain and f32 keep every bit, ladder/s keeps log-probs to 1/(2s) nat.",
)
@click.option(
    "--id-table",
    default="auto",
    show_default=True,
    help="What ids are coded by: auto (learnt on the way), none, or a cache of the same teacher with one.",
)
@click.option(
    "--draws",
    type=AT_LEAST_0,
    default=0,
    show_default=True,
    help="Ids drawn from TEACHER per position, stored with their counts, for random-sampling distillation.",
)
@click.option(
    "--draw-temperature",
    type=click.FloatRange(0, 100, min_open=True),
    default=1.0,
    show_default=True,
    help="Temperature of those draws; at 1 training on them is unbiased.",
)
@click.option("--draw-seed", type=AT_LEAST_0, default=0, show_default=True, help="Seed of those draws.")
@click.option(
    "--chosen",
    type=AT_LEAST_0,
    default=0,
    show_default=True,
    help="Ids per position that TEACHER scores because another model holds them most likely.",
)
@click.option("--chosen-ids-from", help="Directory of that model, the student.")
@click.option("--min-probability", type=SHARE, help="Keep only ranks of at least this probability.")
@click.option("--mass", type=SHARE, help="Keep only as many ranks as sum to this probability.")
@click.option("--reference", help="Directory of the behaviour checkpoint, to fill in its log-probs.")
@click.option(
    "--sft-teacher",
    help="Directory of the model whose samples the student was fine-tuned on, if not recorded.",
)
@click.option("--licence", help="Terms the teacher's outputs come under, for the record.")
@click.option(
    "--batch-tokens", type=AT_LEAST_1, default=8192, show_default=True, help="Padded tokens per forward pass."
)
@click.option("--commit-every", type=AT_LEAST_1, default=512, show_default=True, help="Rollouts per commit.")
@model_options
@command
def score(
    teacher: str,
    rollouts: str,
    out: str,
    topk: int,
    encoding: str,
    id_table: str,
    draws: int,
    draw_temperature: float,
    draw_seed: int,
    chosen: int,
    chosen_ids_from: str | None,
    min_probability: float | None,
    mass: float | None,
    reference: str | None,
    sft_teacher: str | None,
    licence: str | None,
    batch_tokens: int,
    commit_every: int,
    dtype: str,
    device: str,
) -> None:
    """Score ROLLOUTS with TEACHER into the cache OUT.

    TEACHER is a Hugging Face directory. ROLLOUTS is a cache from `opd rollouts`, or JSONL whose first line is
    {"rollouts": 1, "tokenizer_fingerprint": "sha256:...", "vocab_size": N} and whose other lines have
    `prompt_ids`, `response_ids` and optionally `id`, `behaviour_logprob`, `reference_logprob`, `loss_mask`,
    `finish_reason`. A killed run goes on when the same command is given again; committed rollouts are not
    scored twice.

    \b
    Example: opd score models/teacher runs/rollouts runs/cache --topk 64 --encoding ladder/128
    """
    from opd_train import read_rollouts, score_cache
    from opd_train.capture.drawing import Draws

    if bool(chosen) != bool(chosen_ids_from):
        raise InvalidArgumentError("--chosen and --chosen-ids-from: give both or neither")
    if Path(rollouts).is_file():
        meta, found = read_rollouts(rollouts)
    else:
        cache = opd_store.open(rollouts)
        meta, found = cache.meta, cache  # type: ignore[assignment]

    def load(directory: str | None) -> CausalLM | None:
        return None if directory is None else load_model(directory, dtype=dtype, device=device)

    lm = load_model(teacher, dtype=dtype, device=device)
    with Meter("scoring", "tokens") as meter:
        version = score_cache(
            lm,
            found,
            meta,
            out,
            topk=min(topk, lm.vocab_size),
            draws=Draws(draws, draw_temperature, draw_seed) if draws else None,
            chosen=min(chosen, lm.vocab_size),
            chooser=load(chosen_ids_from),
            encoding=encoding,
            id_table=_id_table(id_table),
            cut=_cut(min_probability, mass),
            reference=load(reference),
            sft_teacher=_describe(sft_teacher),
            licence=licence,
            batch_tokens=batch_tokens,
            commit_rollouts=commit_every,
            on_progress=meter.update,
        )
    click.echo(printable(version.uri, None))


def _id_table(choice: str) -> IdTable | Literal["auto"] | None:
    if choice in ("auto", "none"):
        return "auto" if choice == "auto" else None
    cache = opd_store.open(choice)
    if cache.id_table is None:
        raise InvalidArgumentError(f"--id-table: {choice} has no id table; give another cache, or auto")
    return cache.id_table


def _cut(min_probability: float | None, mass: float | None) -> Cut | None:
    if min_probability is not None and mass is not None:
        raise InvalidArgumentError("--min-probability and --mass: give one of them")
    if min_probability is not None:
        return Cut("probability", min_probability)
    return None if mass is None else Cut("mass", mass)


def _describe(directory: str | None) -> ModelInfo | None:
    from opd_train import weights_digest

    if directory is None:
        return None
    return ModelInfo(name=Path(directory).resolve().name, weights_digest=weights_digest(directory))
