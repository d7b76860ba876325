"""One small cache for every way in which pages are stored, shared by the tests of damage and hostility."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import opd_store
from opd_store import Rollout, encodings, writer
from opd_store.encodings import Band, IdTable, build_id_table
from opd_store.layout import NO_ID
from opd_store.rollout import SUPPORTS
from opd_store.testing import example_meta, random_rollout, random_topk

VOCAB = 300
"""More than the 255 ids of a list."""
TOPK, CHOSEN, SAMPLED = 5, 3, 4
BANDS = (2, 5)
PACKED = ("f32", "ladder16", "ladder/128", "ladder/64", "ladder/32")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"encoding": "plain"},
    "plain, ragged, chosen, sampled": {
        "encoding": "plain",
        "ragged": True,
        "chosen": CHOSEN,
        "sampled": SAMPLED,
    },
    **{name: {"encoding": name} for name in PACKED},
    "f32, by list, ragged": {"encoding": "f32", "table": 2, "ragged": True},
    "ladder16, by frequency, sampled": {"encoding": "ladder16", "table": 0, "sampled": SAMPLED},
    "ladder/64, by list, chosen": {"encoding": "ladder/64", "table": 2, "chosen": CHOSEN},
    "ladder/32, by list, ragged, chosen, sampled": {
        "encoding": "ladder/32",
        "table": 2,
        "ragged": True,
        "chosen": CHOSEN,
        "sampled": SAMPLED,
    },
}


def fast_folder() -> Path | None:
    """In memory where there is such a place; None for the usual one."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A temporary folder that costs no disk."""
    with tempfile.TemporaryDirectory(prefix="opd-faults-", dir=fast_folder()) as name:
        yield Path(name)


@cache
def table(n_lists: int) -> IdTable:
    """An id table with so many lists, made from other rows than those that are stored."""
    rng = np.random.default_rng(99)
    rows = [random_topk(rng, 40, TOPK, VOCAB).ids]
    return build_id_table(rows, vocab_size=VOCAB, n_lists=n_lists)


def options(variant: str) -> dict[str, Any]:
    """Arguments of `opd_store.create`."""
    chosen = dict(VARIANTS[variant])
    ragged, n_lists = chosen.pop("ragged", False), chosen.pop("table", None)
    return {
        "meta": example_meta(VOCAB),
        "topk": TOPK,
        "bands": BANDS,
        "cut": opd_store.Cut("given") if ragged else None,
        "id_table": None if n_lists is None else table(n_lists),
        **chosen,
    }


def rollouts(variant: str, n: int = 2, *, seed: int = 0, response_len: int = 3) -> list[Rollout]:
    """`n` different rollouts that fit the variant, named r0, r1, ..."""
    return [rollout(variant, f"r{i}", seed=seed * 1000 + i, response_len=response_len) for i in range(n)]


def rollout(
    variant: str,
    name: str | None = None,
    *,
    seed: int,
    prompt_len: int = 1,
    response_len: int = 3,
    decimals: int | None = None,
) -> Rollout:
    """One rollout that fits the variant."""
    rng = np.random.default_rng(seed)
    chosen = VARIANTS[variant]
    base = random_rollout(
        rng,
        vocab_size=VOCAB,
        prompt_len=prompt_len,
        response_len=response_len,
        topk=TOPK,
        sample_id=name,
        decimals=decimals,
    )
    more: dict[str, Any] = {}
    if chosen.get("ragged"):
        lengths = rng.integers(1, TOPK + 1, response_len)
        assert base.topk_ids is not None
        assert base.topk_logprob is not None
        more["topk_ids"], more["topk_logprob"] = shortened(base.topk_ids, base.topk_logprob, lengths)
    for kind in ("chosen", "sampled"):
        if width := chosen.get(kind, 0):
            band = random_topk(rng, response_len, width, VOCAB, decimals)
            ids, logprob = shortened(band.ids, band.logprob, rng.integers(0, width + 1, response_len))
            more |= {f"{kind}_ids": ids, f"{kind}_logprob": logprob, f"{kind}_log_tail": band.log_tail}
            if kind == "sampled":
                draws = rng.integers(1, 9, ids.shape).astype(np.uint32)
                more["sampled_draws"] = np.where(ids == NO_ID, np.uint32(0), draws)
    return dataclasses.replace(base, **more)


def settled(values: Rollout, variant: str) -> Rollout:
    """The same rollout as it will be decoded, so that an encoder that skips its own care stores it whole."""
    codec = encodings._CODECS[VARIANTS[variant]["encoding"]]
    if codec is encodings.plain:
        return values
    parameter = codec.NAMES[VARIANTS[variant]["encoding"]]
    fields = {}
    for names in SUPPORTS.values():
        parts = [getattr(values, name) if name else None for name in names]
        if parts[0] is not None:
            quantised = codec.quantise(parts[1], parameter)
            band = encodings._in_decoded_order(Band(parts[0], quantised, *parts[2:]), quantised)
            logprob = np.where(band.ids == NO_ID, np.float32(-np.inf), band.logprob)
            found = (band.ids, logprob, band.log_tail, band.draws)
            fields |= {name: part for name, part in zip(names, found, strict=True) if name}
    return dataclasses.replace(values, **fields)


def shortened(ids: np.ndarray, logprob: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows cut to `lengths` and padded."""
    gone = np.arange(ids.shape[1]) >= lengths[:, None]
    return np.where(gone, np.uint32(NO_ID), ids), np.where(gone, np.float32(-np.inf), logprob)


def write(path: Path, variant: str, values: list[Rollout], **more: Any) -> opd_store.Version:
    """A new cache with one version."""
    with opd_store.create(path, **options(variant), **more) as out:
        out.append_batch(values)
        return out.commit()


@contextmanager
def unchecked() -> Iterator[None]:
    """Write what no writer would: values pass unseen, and every checksum is made over them as they are."""
    with (
        mock.patch.object(writer, "checked", lambda rollout, **_: rollout),
        mock.patch.object(encodings, "_in_decoded_order", lambda support, _: support),
        mock.patch.object(encodings, "decode_page"),
        mock.patch.object(encodings, "_largest_error", return_value=0.0),
        np.errstate(all="ignore"),
    ):
        yield
