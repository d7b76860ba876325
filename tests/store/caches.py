"""Small caches and exact comparisons, shared by the tests of the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import opd_store
from opd_store import Rollout
from opd_store.testing import example_meta, random_rollout

ROOT = Path(__file__).parents[2]
VOCAB = 100

ARRAYS = {
    "token_ids": np.uint32,
    "loss_mask": np.bool_,
    "teacher_logprob": np.float32,
    "behaviour_logprob": np.float32,
    "reference_logprob": np.float32,
    "topk_ids": np.uint32,
    "topk_logprob": np.float32,
    "log_tail": np.float32,
}
SUPPORTS = {
    f"{kind}_{name}": dtype
    for kind in ("chosen", "sampled")
    for name, dtype in (("ids", np.uint32), ("logprob", np.float32), ("log_tail", np.float32))
} | {"sampled_draws": np.uint32}
SCALARS = ("prompt_len", "sample_id", "finish_reason", "policy_version", "teacher", "reward", "label")


def some_rollouts(n: int, *, seed: int = 0, topk: int = 3, **options: Any) -> list[Rollout]:
    """`n` different rollouts of a few tokens, named r0, r1, ..."""
    rng = np.random.default_rng(seed)
    options = {"vocab_size": VOCAB, "prompt_len": 2, "response_len": 3, "topk": topk} | options
    return [random_rollout(rng, sample_id=f"r{i}", **options) for i in range(n)]


def write(path: Path, rollouts: Iterable[Rollout], **options: Any) -> opd_store.Version:
    """A new cache with one version."""
    options = {"meta": example_meta(VOCAB), "topk": 3} | options
    with opd_store.create(path, **options) as writer:
        writer.append_batch(rollouts)
        return writer.commit()


def add(path: Path, rollouts: Iterable[Rollout], **options: Any) -> opd_store.Version:
    """One more version of a cache."""
    with opd_store.append(path, **options) as writer:
        writer.append_batch(rollouts)
        return writer.commit()


def assert_same(found: Rollout, expected: Rollout) -> None:
    """Every field has the same presence, dtype, shape and bytes."""
    for name, dtype in (ARRAYS | SUPPORTS).items():
        left, right = getattr(found, name), getattr(expected, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == dtype, name
            assert left.shape == np.shape(right), name
            assert left.tobytes() == np.asarray(right, dtype).tobytes(), name
    for name in SCALARS:
        assert getattr(found, name) == getattr(expected, name), name
    assert dict(found.extra) == {name: value for name, value in expected.extra.items() if value is not None}


def assert_holds(cache: opd_store.Cache, expected: list[Rollout]) -> None:
    """The cache holds these rollouts, in this order, and finds each by its hash."""
    assert len(cache) == len(expected)
    for row, (found, rollout) in enumerate(zip(cache, expected, strict=True)):
        assert_same(found, rollout)
        assert row in cache.find_all(hash_of(rollout))


def hash_of(rollout: Rollout) -> bytes:
    """The rollout hash under the tokenizer of `example_meta`."""
    return opd_store.rollout_hash(rollout.token_ids, example_meta(VOCAB).tokenizer_fingerprint)


def files(path: Path) -> dict[str, bytes]:
    """Every file of a cache but temporary ones, by relative name."""
    found = (p for p in sorted(path.rglob("*")) if p.is_file() and p.parent.name != "tmp")
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def manifest(path: Path, sequence: int) -> dict[str, Any]:
    """A manifest as any JSON parser sees it."""
    value: dict[str, Any] = json.loads((path / f"manifests/{sequence:08d}.json").read_text())
    return value


def run_python(code: str, *args: object, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
