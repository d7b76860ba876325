"""Makes the pictures of the command line that the documentation shows, from a cache that it makes itself.

    python docs/screenshots.py [--out docs/figures] [--browser chromium]

The rollouts are worked additions with filler letters (bench/paper/task.py), written by a program and not by a
model; the teacher's distributions are the task's own, so surprises are where the task has a choice, and where
a mistake was put in. `opd inspect` and `opd cat` become SVGs through rich. The report is photographed by a
headless Chromium if one is given with --browser, else one of its plots is copied out. Needs tokenizers,
transformers and matplotlib.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from numpy.typing import NDArray
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from opd_tools.main import main as opd
from opd_tools.show.rollout_view import facts, flowing, legend, table, view_of
from opd_tools.show.token_text import TokenTexts
from paper import task
from paper.addition import Problem
from paper.addition import task as demo
from transformers import PreTrainedTokenizerFast

import opd_store
from opd_store import CacheMeta, ModelInfo, Rollout, SamplerInfo

N_ROLLOUTS, TOPK, WIDTH = 400, 16, 104
MAX_BYTES = 200_000
_MISTAKES = 0.02
"""Share of the digits that are wrong."""


def make_cache(root: Path, seed: int) -> tuple[Path, Path]:
    """The cache, and its tokenizer."""
    rng = np.random.default_rng(seed)
    tokenizer = task.build_tokenizer(root / "tokenizer")
    file = (root / "tokenizer" / "tokenizer.json").read_bytes()
    meta = CacheMeta(
        vocab_size=len(task.SYMBOLS),
        tokenizer_fingerprint=opd_store.tokenizer_fingerprint(file),
        teacher=ModelInfo(name="addition-teacher", dtype="float32", engine="docs/screenshots.py"),
        sampler=SamplerInfo(temperature=1.0, max_new_tokens=task.MAX_RESPONSE_TOKENS, seed=seed),
        prompt_dataset="three-digit additions",
        licence="Apache-2.0",
        code_version=f"opd-store {opd_store.__version__}",
        extra={"note": "made by docs/screenshots.py; no model was run"},
    )
    columns = {"x_carries": "int64"}
    path = root / "cache"
    with opd_store.create(path, meta=meta, topk=TOPK, encoding="ladder/128", user_columns=columns) as writer:
        for number, problem in enumerate(demo.problems(N_ROLLOUTS, seed)):
            writer.append(_rollout(problem, f"problem-{number}", tokenizer, rng))
    return path, root / "tokenizer"


def _rollout(
    problem: Problem, name: str, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator
) -> Rollout:
    prompt = tokenizer.encode(task.prompt_text(problem))
    text = task.solution_text(problem, task.Dialect.A, rng)
    right = [*tokenizer.encode(text), task.SYMBOLS.index(demo.EOS)]
    written = list(right)
    digits = [at for at, char in enumerate(text) if char.isdigit()]
    for at in digits:
        if rng.random() < _MISTAKES:
            written[at] = task.SYMBOLS.index(str(rng.integers(10)))
    sums = [int(part.partition(":")[2]) for part in text.partition(";")[0].split(",")]
    logprobs = np.log(np.stack([_distribution(at, text, right[at], rng) for at in range(len(right))]))
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ordered = np.take_along_axis(logprobs, order, axis=1)
    teacher = logprobs[np.arange(len(written)), written].astype(np.float32)
    noise = rng.normal(0, 0.15, len(written))
    return Rollout(
        token_ids=np.array(prompt + written, np.uint32),
        prompt_len=len(prompt),
        teacher_logprob=np.minimum(teacher, 0),
        behaviour_logprob=np.minimum(teacher * np.exp(noise), 0).astype(np.float32),
        loss_mask=np.array([*[True] * (len(written) - 1), False]),
        topk_ids=order[:, :TOPK].astype(np.uint32),
        topk_logprob=np.minimum(ordered[:, :TOPK], 0).astype(np.float32),
        log_tail=np.log(np.exp(ordered[:, TOPK:]).sum(axis=1)).astype(np.float32),
        sample_id=name,
        finish_reason="stop",
        reward=float(written == right),
        extra={"x_carries": sum(value >= 10 for value in sums)},
    )


def _distribution(at: int, text: str, right: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """[V] what comes here: a filler letter by the task's law, or the one right character nearly always."""
    n = len(task.SYMBOLS)
    probability = rng.dirichlet(np.full(n, 0.05)) + 1e-9
    probability *= 10 ** rng.uniform(-6, -1.5) / probability.sum()
    if at < len(text) and text[at] in task.FILLERS:
        ranks = 1 / np.arange(1, len(task.FILLERS) + 1)
        others = [task.SYMBOLS.index(letter) for letter in task.FILLERS]
        place = rng.choice(len(others), p=ranks / ranks.sum())
        others.remove(right)
        rng.shuffle(others)
        others.insert(int(place), right)
        probability[others] += ranks
    else:
        probability[right] += 1
    return probability / probability.sum()


def screenshot(path: Path, title: str, lines: list[Text | Padding]) -> None:
    """What a terminal shows, as an SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    for line in lines:
        console.print(line)
    path.write_text(console.export_svg(title=title), "utf-8")


def inspect_lines(cache: Path) -> list[Text | Padding]:
    """`opd inspect`, section titles bold, as on a terminal."""
    done = CliRunner().invoke(opd, ["inspect", str(cache)])
    lines = done.stdout.replace(str(cache), "runs/cache").splitlines()
    return [Text(line, style="" if line.startswith(" ") else "bold", overflow="ellipsis") for line in lines]


def cat_lines(cache: Path, tokenizer: Path) -> list[Text | Padding]:
    """`opd head`, then the start of one rollout with alternatives."""
    opened = opd_store.open(cache)
    texts = TokenTexts(tokenizer, opened.meta)
    lines: list[Text | Padding] = [legend()]
    for row in range(8):
        view = view_of(row, opened[row], texts, alternatives=0, max_tokens=None)
        lines += [Text("  ".join(facts(view)), style="bold"), Padding(flowing(view), (0, 0, 0, 2))]
    view = view_of(1, opened[1], texts, alternatives=5, max_tokens=12)
    return [*lines, Text(""), Text("  ".join(facts(view)), style="bold"), table(view, colour=True)]


def report_picture(page: Path, out: Path, browser: str | None) -> Path:
    """A PNG of the page, or without a browser one of its plots."""
    if browser is not None:
        picture = out / "cli-report.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--window-size=1100,1500", f"--screenshot={picture.resolve()}", page.resolve().as_uri()]
        subprocess.run(command, check=True, timeout=300, env=os.environ.copy())
        return picture
    plots = dict(
        re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)">', page.read_text())
    )
    picture = out / "cli-report.svg"
    picture.write_bytes(base64.b64decode(plots["Surprise, minus log-prob of the sampled token"]))
    return picture


def main(argv: list[str] | None = None) -> None:
    """Make the pictures and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    parser.add_argument("--browser", help="a Chromium; without one, a plot stands for the report")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        cache, tokenizer = make_cache(Path(folder), args.seed)
        screenshot(args.out / "cli-inspect.svg", "opd inspect runs/cache", inspect_lines(cache))
        title = "opd head runs/cache -n 8 --tokenizer tokenizer"
        screenshot(args.out / "cli-cat.svg", title, cat_lines(cache, tokenizer))
        page = Path(folder, "page.html")
        CliRunner().invoke(opd, ["report", str(cache), "--out", str(page)], catch_exceptions=False)
        page.write_text(page.read_text().replace(str(cache), "runs/cache"))
        report = report_picture(page, args.out, args.browser)
    for path in (args.out / "cli-inspect.svg", args.out / "cli-cat.svg", report):
        print(f"{path}: {path.stat().st_size:,} bytes")
        if path.stat().st_size > MAX_BYTES:
            raise SystemExit(f"{path}: larger than {MAX_BYTES:,} bytes")


if __name__ == "__main__":
    main()
