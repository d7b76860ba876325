"""How long a training step waits for its data.

    python bench/waiting.py [--steps 30] [--rollouts 256] [--workers 0,1]

A Llama of 14 million parameters with a vocabulary of 32,000 learns from a cache of its own top-64 over
random tokens, in the real trainer: reading, checking, decoding and packing against forward, backward and
optimizer. Where the student is fast for its batch, waiting weighs more. With 0 workers nothing is prepared
ahead.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import machine
import numpy as np
import torch
import transformers
from opd_tools.console import quiet_libraries
from paper import task

import opd_store
from opd_store import CacheMeta, Rollout
from opd_train import (
    CacheStream,
    CausalLM,
    DistillConfig,
    LossConfig,
    Objective,
    Stopwatch,
    Trainer,
    load_causal_lm,
    score_cache,
)

VOCAB, TOPK, BATCH_TOKENS, WARM_UP = 32_000, 64, 4096, 3
TARGET = 0.01


def build_student(path: Path) -> CausalLM:
    """Random weights; the tokenizer has fewer entries than the head."""
    tokenizer = task.build_tokenizer(path)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return load_causal_lm(path)


def build_cache(path: Path, lm: CausalLM, n_rollouts: int) -> None:
    """Random tokens of log-normal length, scored by the student itself."""
    rng = np.random.default_rng(0)
    rollouts = []
    for length in np.clip(rng.lognormal(5.3, 0.6, n_rollouts), 16, 900).astype(int):
        ids = rng.integers(0, VOCAB, length + 16, dtype=np.uint32)
        rollouts.append(Rollout(token_ids=ids, prompt_len=16))
    meta = CacheMeta(vocab_size=VOCAB, tokenizer_fingerprint=lm.tokenizer_fingerprint)
    score_cache(lm, rollouts, meta, path, topk=TOPK)


def seconds(student: CausalLM, stream: CacheStream, steps: int) -> dict[str, float]:
    """Seconds by activity over some steps, the first few left out."""
    stopwatch = Stopwatch()
    before: dict[str, float] = {}

    def on_step(step: int, _: object) -> None:
        if step == WARM_UP:
            before.update(stopwatch.seconds)

    loss = LossConfig(objective=Objective.FORWARD_KL)
    config = DistillConfig(loss=loss, steps=steps + WARM_UP, lr=1e-4)
    Trainer(student, stream, config, stopwatch=stopwatch, on_step=on_step).run()
    return {name: value - before[name] for name, value in stopwatch.seconds.items()}


def main(argv: list[str] | None = None) -> None:
    """Print one row for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--workers", default="0,1", help="comma-separated")
    args = parser.parse_args(argv)
    quiet_libraries()
    print(machine.header(seed=0, packages=("torch", "transformers", "numpy", "pyarrow")), "\n")
    rows = []
    with tempfile.TemporaryDirectory() as root:
        build_cache(Path(root) / "cache", build_student(Path(root) / "student"), args.rollouts)
        cache = opd_store.open(Path(root) / "cache")
        for workers in map(int, args.workers.split(",")):
            student = load_causal_lm(Path(root) / "student")
            stream = CacheStream(cache, batch_tokens=BATCH_TOKENS, seed=0, epochs=None, workers=workers)
            spent = seconds(student, stream, args.steps)
            share = spent["data"] / sum(spent.values())
            rows.append(
                (
                    f"{workers} threads ahead",
                    f"{1000 * spent['data'] / args.steps:.2f} ms",
                    f"{1000 * spent['student'] / args.steps:.0f} ms",
                    f"{share:.2%}",
                    f"< {TARGET:.0%}",
                    "yes" if share < TARGET else "no",
                )
            )
    columns = (
        f"batches of {BATCH_TOKENS:,} tokens, K = {TOPK}",
        "wait a step",
        "step",
        "share",
        "target",
        "met",
    )
    print(machine.table(columns, rows))


if __name__ == "__main__":
    main()
