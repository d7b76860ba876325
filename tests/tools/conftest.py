"""What the tests of the command line start from: models on disk, data made once, and the command."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from tools.commands import CommandServer
from train.tiny_models import loaded, random_rollouts, rollouts_jsonl, save_tiny, tiny_tokenizer, write_jsonl


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def opd() -> Iterator[CommandServer]:
    """Runs the command in processes of their own."""
    with CommandServer() as server:
        yield server


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/, student/, other/ (another tokenizer), prompts.jsonl, rollouts.jsonl."""
    root = tmp_path_factory.mktemp("work")
    save_tiny(root / "teacher", "gpt2", seed=1)
    save_tiny(root / "student", "gpt2")
    save_tiny(root / "other", tokenizer=tiny_tokenizer(first="A"))
    rows = [{"prompt": a + b, "id": a + b, "answer": 3} for a, b in itertools.product("abcdef", repeat=2)]
    write_jsonl(root / "prompts.jsonl", rows)
    rollouts_jsonl(root / "rollouts.jsonl", loaded(root / "teacher"), random_rollouts(20, seed=1))
    return root


@pytest.fixture(scope="session")
def cache(opd: CommandServer, work: Path) -> Path:
    """rollouts.jsonl scored in four commits. Never written to by a test."""
    args = ("score", work / "teacher", work / "rollouts.jsonl", work / "cache")
    opd(*args, "--topk", 6, "--commit-every", 5).ok()
    return work / "cache"
