"""Caches to rewrite, and what is compared afterwards."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from store.caches import VOCAB, some_rollouts, write

import opd_store
from opd_store import CacheMeta, ModelInfo, Rollout
from opd_store.testing import FINGERPRINT

COLUMNS = {"x_domain": "utf8", "x_level": "int64", "x_good": "bool", "x_score": "float64"}
REASONS = ("stop", "length", "abort", "unknown")


def meta(**fields) -> CacheMeta:
    known = {"vocab_size": VOCAB, "tokenizer_fingerprint": FINGERPRINT, "extra": {"note": "kept"}}
    return CacheMeta(**known | {"teacher": ModelInfo(name="teacher")} | fields)


def rich_rollouts(n: int, *, seed: int = 0, **options) -> list[Rollout]:
    """Rollouts with columns; every third one lacks some."""
    values = some_rollouts(n, seed=seed, **{"topk": 12, "peaked": True, "response_len": 20} | options)
    found = []
    for i, value in enumerate(values):
        extra = {"x_domain": ("maths", "code/py", "..")[i % 3], "x_level": i, "x_good": i % 2 == 0}
        found.append(
            dataclasses.replace(
                value,
                sample_id=f"{seed}-{i}",
                reward=None if i % 3 == 2 else i / 10,
                label=None if i % 3 == 1 else f"l{i}",
                finish_reason=REASONS[i % 4],
                teacher=i % 2,
                extra=extra if i % 3 == 2 else extra | {"x_score": i / 8},
            )
        )
    return found


def make(path: Path, values: list[Rollout], **options) -> opd_store.Cache:
    usual = {"topk": 12, "bands": (4, 12), "encoding": "ladder/128", "user_columns": COLUMNS}
    write(path, values, **usual | {"meta": meta(other_teachers=(ModelInfo(name="second"),))} | options)
    return opd_store.open(path)


def sample_ids(path: object) -> list[str]:
    return opd_store.open(str(path)).column("sample_id").to_pylist()
