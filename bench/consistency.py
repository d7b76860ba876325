"""Can a cache alone tell whether its teacher is the one the student learnt from? Calibrates
`opd_store.consistency`.

For each seed of the addition demo: a teacher (dialect A), another of the other dialect, and three students,
two from the first teacher (one of them cut short) and one from the other. Rollouts of every student are
scored by both teachers and by the first teacher of the seed before, an independent model of the same dialect.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import click
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "examples" / "addition"))

import demo
import methods
import models
import task
import torch

from opd_store import SamplerInfo
from opd_store.consistency import compare_policies
from opd_train import CausalLM, read_prompts, sample_rollouts, save_model, score_rollouts

N_ROLLOUTS = 1000
N_FIXTURE = 50
VARIANTS = ((6000, 100), (6000, 140), (6000, 200), (6000, 300), (300, 500), (1000, 500))
"""Examples and steps of students that were trained for too short a time, or on too few samples."""
SHORT_STEPS = 60
"""What "short" is trained: it has seen a sixth of what "student" has."""


def build(root: Path, seed: int) -> None:
    """Models of one seed, unless they are there: about three minutes of one core."""
    held_out = demo.held_out()
    if not (root / "teacher").exists():
        lm = models.create(root / "teacher.new", hidden=64, intermediate=192, heads=4, seed=100 + seed)
        problems = task.problems(demo.N_TEACHER, seed=100 + seed, exclude=held_out)
        examples = models.worked_examples(lm, problems, 0.0, seed=seed)
        models.train_supervised(lm, examples, steps=350, lr=5e-3, warmup=50, seed=seed, final_share=0.05)
        save_model(lm, root / "teacher", {})
    if not (root / "other").exists():
        lm = models.load(root / "teacher")
        problems = task.problems(demo.N_TEACHER, seed=200 + seed, exclude=held_out)
        examples = models.worked_examples(lm, problems, demo.OTHER_DIALECT_SHARE, seed=seed)
        models.train_supervised(lm, examples, steps=140, lr=3e-3, warmup=10, seed=seed)
        save_model(lm, root / "other", {})
    for name, source in (("student", "teacher"), ("short", "teacher"), ("other-student", "other")):
        if not (root / name).exists():
            _train_student(root, name, models.load(root / source), seed)


def _train_student(root: Path, name: str, teacher: CausalLM, seed: int) -> None:
    lm = models.create(root / f"{name}.new", hidden=32, intermediate=96, heads=2, seed=300 + seed)
    samples = _sample(teacher, root.parent / "sft.jsonl", seed)
    examples = [(sample.token_ids.tolist(), sample.prompt_len) for sample in samples]
    if name == "short":
        models.train_supervised(lm, examples, steps=SHORT_STEPS, lr=6e-3, warmup=20, seed=seed)
    else:
        validation = read_prompts(root.parent / "validation.jsonl", lm)

        def good_enough() -> bool:
            lm.model.eval()
            return sum(methods.judge(lm, validation)) >= demo.SFT_TARGET * len(validation)

        models.train_supervised(lm, examples, steps=600, lr=6e-3, warmup=20, seed=seed, stop_when=good_enough)
    right = sum(methods.judge(lm, read_prompts(root.parent / "validation.jsonl", lm))) / demo.N_VALIDATION
    click.echo(f"  {root.name} {name}: {right:.0%} right")
    save_model(lm, root / name, {})


def _sample(lm: CausalLM, prompts: Path, seed: int) -> list:
    sampler = SamplerInfo(
        max_new_tokens=task.MAX_RESPONSE_TOKENS + 1, seed=seed, stop_token_ids=lm.stop_token_ids
    )
    return sample_rollouts(lm, read_prompts(prompts, lm), sampler, batch_rows=512)


def measure(root: Path, seed: int) -> dict[str, np.ndarray]:
    """Log-probs of the sampled tokens: "{student}/student", "{student}/{teacher}" and "{student}/starts"."""
    found: dict[str, np.ndarray] = {}
    teachers = {"teacher": root / "teacher", "other": root / "other"}
    if (before := root.parent / str(seed - 1) / "teacher").exists():
        teachers["independent"] = before
    for name in ("student", "short", "other-student"):
        rollouts = _sample(models.load(root / name), root.parent / "prompts.jsonl", 1000 + seed)
        found[f"{name}/student"] = np.concatenate([r.reference_logprob for r in rollouts])
        found[f"{name}/starts"] = np.cumsum([0, *(r.response_len for r in rollouts)])
        for teacher, path in teachers.items():
            scores = score_rollouts(models.load(path), rollouts, batch_tokens=16384)
            found[f"{name}/{teacher}"] = np.concatenate([score.logprob for score in scores])
    # What the teacher itself samples, for the probe on SFT samples.
    rollouts = _sample(models.load(root / "teacher"), root.parent / "prompts.jsonl", 2000 + seed)
    found["sft/starts"] = np.cumsum([0, *(r.response_len for r in rollouts)])
    found["sft/student"] = np.concatenate([r.reference_logprob for r in rollouts])
    for teacher, path in {**teachers, "the-student": root / "student"}.items():
        scores = score_rollouts(models.load(path), rollouts, batch_tokens=16384)
        found[f"sft/{teacher}"] = np.concatenate([score.logprob for score in scores])
    return found


def show_variants(root: Path) -> None:
    """What becomes of students of the first teacher that were trained in other ways."""
    teachers = {name: models.load(root / name) for name in ("teacher", "other")}
    samples = _sample(teachers["teacher"], root.parent / "sft.jsonl", 0)
    examples = [(sample.token_ids.tolist(), sample.prompt_len) for sample in samples]
    for n, steps in VARIANTS:
        lm = models.create(root / "variant.new", hidden=32, intermediate=96, heads=2, seed=900)
        models.train_supervised(lm, examples[:n], steps=steps, lr=6e-3, warmup=20, seed=0)
        rollouts = _sample(lm, root.parent / "prompts.jsonl", 77)
        own = np.concatenate([r.reference_logprob for r in rollouts]).astype(np.float64)
        starts = np.cumsum([0, *(r.response_len for r in rollouts)])
        for name, teacher in teachers.items():
            scores = score_rollouts(teacher, rollouts, batch_tokens=16384)
            report = compare_policies(
                own, np.concatenate([score.logprob for score in scores]).astype(np.float64), starts
            )
            figures = f"gap {report.sure_gap}, KL {report.kl}, sure of {report.n_sure} of {len(own)}"
            click.echo(f"  {n} examples, {steps} steps, {name:8} {report.verdict:20} {figures}")


def write_fixture(out: Path, seeds: list[int], path: Path) -> None:
    """The first rollouts of some seeds, in float16, for the tests."""
    arrays = {}
    for seed in seeds:
        found = np.load(out / f"{seed}.npz")
        for kind in ("student", "short", "other-student", "sft"):
            starts = found[f"{kind}/starts"][: N_FIXTURE + 1]
            arrays[f"{seed}/{kind}/starts"] = starts.astype(np.uint16)
            for name in found.files:
                if name.startswith(f"{kind}/") and not name.endswith("starts"):
                    arrays[f"{seed}/{name}"] = found[name][: starts[-1]].astype(np.float16)
    np.savez_compressed(path, **arrays)


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Directory for models and log-probs."
)
@click.option("--seeds", default=8, show_default=True, help="How many families of models.")
@click.option(
    "--fixture", type=click.Path(path_type=Path), help="Write the last three seeds for the tests here."
)
def main(out: Path, seeds: int, fixture: Path | None) -> None:
    """Build the models, write OUT/SEED.npz and print what `opd_store.consistency` makes of them."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    taken = demo.held_out()
    task.write_prompts_jsonl(out / "validation.jsonl", taken[demo.N_TEST :])
    for name, n, seed in (("sft", demo.N_SFT, 5), ("prompts", N_ROLLOUTS, 6)):
        task.write_prompts_jsonl(out / f"{name}.jsonl", task.problems(n, seed=seed, exclude=taken))
    for seed in range(seeds):
        started = time.perf_counter()
        root = out / str(seed)
        build(root, seed)
        if not (out / f"{seed}.npz").exists():
            np.savez_compressed(out / f"{seed}.npz", **measure(root, seed))
        for scrap in root.glob("*.new"):
            shutil.rmtree(scrap)
        click.echo(f"seed {seed}: {time.perf_counter() - started:.0f} s")
        show(out, seed)
    show_variants(out / "0")
    if fixture is not None:
        write_fixture(out, list(range(seeds))[-3:], fixture)


def show(out: Path, seed: int) -> None:
    """One line for each student and teacher."""
    found = np.load(out / f"{seed}.npz")
    for name in found.files:
        kind, _, teacher = name.partition("/")
        if teacher in ("student", "starts") or kind == "sft":
            continue
        pair = (found[f"{kind}/student"].astype(np.float64), found[name].astype(np.float64))
        report = compare_policies(*pair, found[f"{kind}/starts"])
        figures = f"gap {report.sure_gap}, shocks {report.shocks}"
        click.echo(f"  {seed} {kind:14} {teacher:12} {report.verdict:20} {figures}")


if __name__ == "__main__":
    main()
