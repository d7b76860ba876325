"""`opd rollouts`: sample responses."""

from __future__ import annotations

import hashlib
from pathlib import Path

import click

from opd_tools.console import AT_LEAST_0, AT_LEAST_1, Meter, command, load_model, model_options, printable


@click.command("rollouts")
@click.argument("model")
@click.argument("prompts")
@click.argument("out")
@click.option("--temperature", default=1.0, show_default=True, help="Sampling temperature; 0 is greedy.")
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    help="Nucleus mass. Below 1 some tokens can never be drawn, which no importance weight repairs.",
)
@click.option("--top-k", type=AT_LEAST_1, help="Sample from so many tokens only; same warning. Default: all.")
@click.option(
    "--max-new-tokens", type=AT_LEAST_1, default=256, show_default=True, help="Longest response, in tokens."
)
@click.option("--samples", type=AT_LEAST_1, default=1, show_default=True, help="Responses per prompt.")
@click.option("--limit", type=AT_LEAST_1, help="Use only so many prompts. Default: all.")
@click.option("--seed", type=AT_LEAST_0, default=0, show_default=True, help="Seed of the draws.")
@click.option(
    "--batch-rows", type=AT_LEAST_1, default=64, show_default=True, help="Prompts sampled together."
)
@click.option("--commit-every", type=AT_LEAST_1, default=1024, show_default=True, help="Rollouts per commit.")
@model_options
@command
def rollouts(
    model: str,
    prompts: str,
    out: str,
    temperature: float,
    top_p: float,
    top_k: int | None,
    max_new_tokens: int,
    samples: int,
    limit: int | None,
    seed: int,
    batch_rows: int,
    commit_every: int,
    dtype: str,
    device: str,
) -> None:
    """Sample responses from MODEL to PROMPTS into OUT, a cache of unscored rollouts.

    MODEL is a Hugging Face directory. PROMPTS is JSONL, one object a line with `prompt` (text as the model
    sees it), `messages` (chat turns) or `prompt_ids`, and optionally `id` and `answer`. Stored are the ids as
    sampled, the stop token included, with behaviour log-probs (as drawn) and reference log-probs (raw). A
    killed run goes on when the same command is given again.

    \b
    Example: opd rollouts models/student prompts.jsonl runs/rollouts --max-new-tokens 512
    """
    from opd_store import SamplerInfo
    from opd_train import read_prompts, roll_out

    lm = load_model(model, dtype=dtype, device=device)
    sampler = SamplerInfo(
        temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed
    )
    found = read_prompts(prompts, lm, limit=limit)
    with Meter("sampling", "rollouts") as meter:
        version = roll_out(
            lm,
            found,
            out,
            sampler,
            samples_per_prompt=samples,
            batch_rows=batch_rows,
            commit_rollouts=commit_every,
            prompt_dataset=Path(prompts).name,
            prompt_revision="sha256:" + hashlib.sha256(Path(prompts).read_bytes()).hexdigest(),
            on_progress=meter.update,
        )
    click.echo(printable(version.uri, None))
