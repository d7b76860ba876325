"""The models and caches of one seed, below one directory. What exists already is not made again.

Two teachers of 0.4 million parameters that know the task but write in different dialects; students of 33
thousand, fine-tuned on samples of one of them up to a chosen accuracy; their rollouts; and the rollouts
scored by a teacher. Every seed has models, problems and rollouts of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import opd_store
from opd_store import SamplerInfo
from opd_train import CausalLM, Prompt, read_prompts, roll_out, sample_rollouts, save_model, score_cache
from paper import task
from paper.addition import models, problems
from paper.fit import Fit

TOPK = 64
N_TEST, N_VALIDATION, N_TEACHER, N_SFT, N_OPD = 1000, 300, 40_000, 6000, 2400
STUDENTS = {"weak": 0.4, "near": 0.75, "strong": 0.93}
"""Validation accuracy of the SFT student that is looked for."""
SAMPLERS = {"full": (1.0, 1.0), "truncated": (0.7, 0.9)}
"""Temperature and top-p."""
TEACHERS = ("teacher", "other-teacher")


class World:
    """Everything one seed's trainings start from."""

    def __init__(self, root: Path, seed: int, pair: int | None = None) -> None:
        """
        Args:
            pair: the seed whose models and problems these are, to be trained on rollouts of `seed`'s own.
        """
        self.seed = seed
        self.path = root / f"seed-{seed if pair is None else pair}"
        self._rollouts = self.path if pair in (None, seed) else self.path / f"rollouts-{seed}"
        self._rollouts.mkdir(parents=True, exist_ok=True)

    def model(self, name: str) -> CausalLM:
        """A teacher, or a student `<distance>-of-<teacher>`."""
        return models.load(self.path / name)

    def prompts(self, name: str, lm: CausalLM) -> list[Prompt]:
        """Problems of "test", "validation", "sft" or "opd"."""
        return read_prompts(self.path / f"{name}.jsonl", lm)

    def write_prompts(self) -> None:
        """Disjoint problems for each use."""
        taken: list[task.Problem] = []
        sizes = {"test": N_TEST, "validation": N_VALIDATION, "sft": N_SFT, "opd": N_OPD}
        for number, (name, n) in enumerate(sizes.items()):
            found = problems(n, seed=100 * self.seed + number, exclude=taken)
            task.write_prompts(self.path / f"{name}.jsonl", found)
            taken += found

    def train_teachers(self) -> None:
        """Dialect A from scratch; then the other one from it, mostly in dialect B."""
        held_out = [
            task.Problem(*map(int, json.loads(line)["id"].split("-")[1:]))
            for name in ("test", "validation")
            for line in (self.path / f"{name}.jsonl").read_text().splitlines()
        ]
        lm = self.create("teacher.new", hidden=128, intermediate=384, heads=4, seed=self.seed)
        shown = problems(N_TEACHER, seed=100 * self.seed + 10, exclude=held_out)
        data = task.examples(lm.tokenizer, shown, 0.0, seed=self.seed)
        models.train_supervised(lm, data, steps=350, lr=3e-3, warmup=50, seed=self.seed, final_share=0.05)
        save_model(lm, self.path / "teacher", {})
        lm = self.model("teacher")
        data = task.examples(lm.tokenizer, shown, 0.9, seed=self.seed + 1)
        models.train_supervised(lm, data, steps=130, lr=2e-3, warmup=10, seed=self.seed, final_share=0.05)
        save_model(lm, self.path / "other-teacher", {})

    def train_student(self, distance: str, teacher: str) -> None:
        """SFT on samples of the teacher."""
        name = f"{distance}-of-{teacher}"
        teacher_lm = self.model(teacher)
        uri = self.path / f"samples-of-{teacher}"
        if not uri.exists():
            prompts = self.prompts("sft", teacher_lm)
            roll_out(teacher_lm, prompts, uri, _sampler("full", self.seed), batch_rows=512)
        data = [(sample.token_ids.tolist(), sample.prompt_len) for sample in opd_store.open(uri)]
        lm = self.create(f"{name}.new", hidden=32, intermediate=96, heads=2, seed=1000 + self.seed)
        validation = self.prompts("validation", lm)
        fit = Fit(lm, data, self.seed)
        steps = fit.until(STUDENTS[distance], lambda: accuracy(lm, validation))
        provenance = {"sft_teacher": teacher_lm.info.to_json(), "sft_steps": steps}
        save_model(lm, self.path / name, provenance)

    def cache(self, student: str, teacher: str, sampler: str) -> tuple[Path, dict[str, float]]:
        """A scored cache of a student's rollouts, and the seconds that its two steps took."""
        uri = self._rollouts / f"cache-{student}-{teacher}-{sampler}"
        rollouts = self._rollouts / f"rollouts-{student}-{sampler}"
        sampling = self._timed(
            rollouts,
            lambda: roll_out(
                self.model(student),
                self.prompts("opd", self.model(student)),
                rollouts,
                _sampler(sampler, self.seed),
                batch_rows=512,
                commit_rollouts=N_OPD,
            ),
        )
        found = opd_store.open(rollouts)
        scoring = self._timed(
            uri,
            lambda: score_cache(
                self.model(teacher),
                found,
                found.meta,
                uri,
                topk=TOPK,
                encoding="plain",
                batch_tokens=16384,
                commit_rollouts=N_OPD,
            ),
        )
        return uri, {"sampling": sampling, "teacher": scoring}

    def _timed(self, uri: Path, make: Callable[[], object]) -> float:
        record = uri.with_suffix(".seconds")
        if not record.exists():
            started = time.perf_counter()
            make()
            record.write_text(json.dumps(time.perf_counter() - started))
        return float(json.loads(record.read_text()))

    def create(self, name: str, *, hidden: int, intermediate: int, heads: int, seed: int) -> CausalLM:
        """A model of two layers with random weights."""
        torch.manual_seed(seed)
        path = self.path / name
        tokenizer = task.build_tokenizer(path)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=2,
            num_attention_heads=heads,
            max_position_embeddings=task.CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(path)
        return models.load(path)


def _sampler(name: str, seed: int) -> SamplerInfo:
    temperature, top_p = SAMPLERS[name]
    return SamplerInfo(
        temperature=temperature, top_p=top_p, max_new_tokens=task.MAX_RESPONSE_TOKENS + 1, seed=seed
    )


def accuracy(lm: CausalLM, prompts: list[Prompt]) -> float:
    """Share of problems that greedy decoding answers right."""
    greedy = SamplerInfo(
        temperature=0.0,
        max_new_tokens=task.MAX_RESPONSE_TOKENS + 1,
        stop_token_ids=lm.stop_token_ids,
        seed=0,
    )
    rollouts = sample_rollouts(lm, prompts, greedy, batch_rows=512)
    texts = lm.tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    right = [task.correct(text, str(r.label)) for r, text in zip(rollouts, texts, strict=True)]
    return sum(right) / len(right)
