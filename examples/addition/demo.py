"""From nothing to a student distilled from a cached teacher, compared with a live one. Run by `make demo`.

teacher -> SFT student on teacher samples -> rollouts -> scored cache -> inspect, verify -> offline training
with each objective -> live training with as many steps -> a table and an HTML report.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import methods
import models
import report
import task
import torch
from opd_tools.console import quiet_libraries
from opd_tools.main import main as opd

import opd_store
from opd_store import SamplerInfo
from opd_train import CausalLM, read_prompts, roll_out, save_model, score_cache

N_TEST, N_VALIDATION, N_TEACHER, N_SFT = methods.FINAL_PROBLEMS, 256, 40_000, 6000
SEEDS = (0, 1, 2)
OTHER_DIALECT_SHARE = 0.9
SFT_TARGET = 0.4
"""SFT stops soon after the student answers this share, so that it has room to improve. A count of steps would
not do: how fast so small a model learns the task depends on rounding."""


def held_out() -> list[task.Problem]:
    """Problems no model is trained on: test, then validation."""
    return task.problems(N_TEST + N_VALIDATION, seed=1)


def train_teacher(root: Path) -> float:
    """A Llama of 109 thousand parameters that learns dialect A from worked examples."""
    problems = task.problems(N_TEACHER, seed=2, exclude=held_out())
    lm = models.create(root / "teacher.new", hidden=64, intermediate=192, heads=4, seed=0)
    examples = models.worked_examples(lm, problems, 0.0, seed=0)
    models.train_supervised(lm, examples, steps=350, lr=5e-3, warmup=50, seed=0, final_share=0.05)
    save_model(lm, root / "teacher", {})
    return _validation_accuracy(models.load(root / "teacher"), root)


def train_other_teacher(root: Path) -> float:
    """The same teacher, fine-tuned on worked examples mostly in dialect B: as able, but of another mind."""
    torch.set_num_threads(1)
    problems = task.problems(N_TEACHER, seed=3, exclude=held_out())
    lm = models.load(root / "teacher")
    examples = models.worked_examples(lm, problems, OTHER_DIALECT_SHARE, seed=1)
    models.train_supervised(lm, examples, steps=140, lr=3e-3, warmup=10, seed=1)
    save_model(lm, root / "other-teacher", {})
    return _validation_accuracy(models.load(root / "other-teacher"), root)


def train_student(root: Path) -> tuple[int, float]:
    """SFT of a Llama of 28 thousand parameters on samples of the teacher."""
    torch.set_num_threads(1)
    teacher = models.load(root / "teacher")
    _sample(teacher, root / "sft-prompts.jsonl", root / "sft-rollouts", seed=100)
    samples = opd_store.open(root / "sft-rollouts")
    examples = [(sample.token_ids.tolist(), sample.prompt_len) for sample in samples]
    lm = models.create(root / "student.new", hidden=32, intermediate=96, heads=2, seed=1)
    validation = read_prompts(root / "validation.jsonl", lm)

    def good_enough() -> bool:
        lm.model.eval()
        return sum(methods.judge(lm, validation)) >= SFT_TARGET * len(validation)

    steps = models.train_supervised(
        lm, examples, steps=600, lr=6e-3, warmup=20, seed=2, stop_when=good_enough
    )
    save_model(lm, root / "student", {"sft_teacher": teacher.info.to_json()})
    return steps, _validation_accuracy(models.load(root / "student"), root)


def build_cache(root: Path, seed: int) -> dict[str, dict[str, float]]:
    """Rollouts of the student, scored by both teachers. Returns seconds by teacher and activity."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    _sample(models.load(root / "student"), root / "prompts.jsonl", root / f"rollouts-{seed}", seed=seed)
    sampling = time.perf_counter() - started
    rollouts = opd_store.open(root / f"rollouts-{seed}")
    seconds = {}
    for teacher in ("teacher", "other-teacher"):
        started = time.perf_counter()
        score_cache(
            models.load(root / teacher),
            rollouts,
            rollouts.meta,
            root / f"cache-{teacher}-{seed}",
            topk=methods.TOPK,
            # Responses of a dozen tokens, read three times: unpacking would cost more than it saves.
            encoding="plain",
            batch_tokens=16384,
            commit_rollouts=3200,
        )
        seconds[teacher] = {"sampling": sampling, "teacher": time.perf_counter() - started}
    return seconds


def _sample(lm: CausalLM, prompts: Path, out: Path, *, seed: int) -> None:
    sampler = SamplerInfo(max_new_tokens=task.MAX_RESPONSE_TOKENS + 1, seed=seed)
    found = read_prompts(prompts, lm)
    roll_out(lm, found, out, sampler, batch_rows=512, commit_rollouts=3200, prompt_dataset=prompts.name)


def _validation_accuracy(lm: CausalLM, root: Path) -> float:
    prompts = read_prompts(root / "validation.jsonl", lm)
    return sum(methods.judge(lm, prompts)) / len(prompts)


def write_prompts(root: Path) -> None:
    """Disjoint problems for test, validation, SFT and distillation."""
    taken = held_out()
    task.write_prompts_jsonl(root / "test.jsonl", taken[:N_TEST])
    task.write_prompts_jsonl(root / "validation.jsonl", taken[N_TEST:])
    for name, n, seed in (("sft-prompts", N_SFT, 5), ("prompts", methods.N_OPD, 6)):
        problems = task.problems(n, seed=seed, exclude=taken)
        task.write_prompts_jsonl(root / f"{name}.jsonl", problems)
        taken += problems


def show(command: list[str]) -> None:
    """Run an `opd` command as a person would, and show it."""
    click.echo(f"\n$ opd {' '.join(command)}")
    opd(command, standalone_mode=False)


def say(text: str, started: float) -> None:
    """One line of progress."""
    click.echo(f"[{time.perf_counter() - started:5.0f} s] {text}")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to fill.")
@click.option("--workers", default=2, show_default=True, help="Processes of one thread each.")
def main(out: Path, workers: int) -> None:
    """Train the models, build the caches, compare the methods."""
    quiet_libraries()
    started = time.perf_counter()
    marker = out / ".opd-demo"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise click.UsageError(f"{out} is not empty and not from an earlier demo; choose another directory")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()
    write_prompts(out)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=quiet_libraries) as pool:
        say(f"teacher: {train_teacher(out):.1%} of held-out sums right", started)
        other, student = pool.submit(train_other_teacher, out), pool.submit(train_student, out)
        say(f"inconsistent teacher: {other.result():.1%} right, in another dialect", started)
        say(
            "student after {} steps of SFT on teacher samples: {:.1%} right".format(*student.result()),
            started,
        )

        caches = {seed: pool.submit(build_cache, out, seed) for seed in SEEDS}
        start = pool.submit(methods.evaluate_student, out)
        cache_seconds = {seed: future.result() for seed, future in caches.items()}
        say(f"{len(SEEDS)} x {methods.N_OPD:,} rollouts sampled and scored by both teachers", started)
        show(["inspect", str(out / "cache-teacher-0")])
        show(["verify", str(out / "cache-teacher-0")])
        show_refusal(out)

        futures = [
            pool.submit(methods.run_method, out, method, seed, cache_seconds[seed][method.teacher])
            for seed in SEEDS
            for method in methods.METHODS
        ]
        results = [start.result()]
        for done, future in enumerate(futures, start=1):
            results.append(future.result())
            if done % len(methods.METHODS) == 0:
                say(f"{done} of {len(futures)} trainings done", started)
    (out / "results.json").write_text(json.dumps([dataclasses.asdict(result) for result in results]) + "\n")
    table = report.table(results)
    click.echo(f"\n{table}")
    (out / "table.txt").write_text(table + "\n")
    (out / "report.html").write_text(report.html(results, table))
    say(f"report: {out / 'report.html'}", started)


def show_refusal(out: Path) -> None:
    """What the trainer says to a cache of the wrong teacher."""
    cache, student = str(out / "cache-other-teacher-0"), str(out / "student")
    try:
        show(["train", cache, "--student", student, "--out", str(out / "refused"), "--steps", "1"])
    except SystemExit as refusal:
        click.echo(f"(exit code {refusal.code})\n")


if __name__ == "__main__":
    main()
