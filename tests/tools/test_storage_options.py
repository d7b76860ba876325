"""How `opd score` stores the top-k, and how `opd inspect` shows it."""

from __future__ import annotations

import json

import numpy as np
import pytest

import opd_store
from opd_store.testing import example_meta, random_rollout


@pytest.fixture
def score(opd, work, tmp_path):
    def run(name, *options):
        return opd(
            "score", work / "teacher", work / "rollouts.jsonl", tmp_path / name, "--topk", 12, *options
        )

    return run


def inspected(opd, path):
    return json.loads(opd("inspect", path, "--json").ok().out)


@pytest.mark.parametrize(
    ("encoding", "error"),
    [("plain", 0), ("f32", 0), ("ladder16", 2**-8), ("ladder/128", 2**-8), ("ladder/32", 2**-6)],
)
def test_every_encoding(opd, score, tmp_path, encoding, error):
    score("cache", "--encoding", encoding).ok()
    cache = opd_store.open(tmp_path / "cache")
    assert cache.encoding == encoding
    found = inspected(opd, tmp_path / "cache")
    assert found["top-k"]["encoding"] == encoding
    if error:
        assert 0 < cache.max_error <= error
        assert f"{cache.max_error:.3g} nat (KL at most" in found["top-k"]["largest error"]
    else:
        assert found["top-k"]["largest error"] == "0 (exact float32)"


def test_bytes_per_position_by_column(opd, score, tmp_path):
    score("plain", "--encoding", "plain").ok()
    score("packed").ok()
    plain, packed = (inspected(opd, tmp_path / name) for name in ("plain", "packed"))
    sizes = plain["bytes per position"]
    cache = opd_store.open(tmp_path / "plain")
    # Ids and log-probs of 12 ranks, a tail; a header and an offset for each of the rollouts; padding to 8.
    expected = 12 * 8 + 4 + (24 + 4) * len(cache) / cache.n_response_tokens
    assert expected <= sizes["topk_0_12"] <= expected + 8 * len(cache) / cache.n_response_tokens
    assert sizes["teacher_logprob"] >= 4
    assert sum(sizes.values()) < plain["cache"]["bytes per position"]
    in_bands = packed["bytes per position"]
    assert in_bands["topk_0_8"] + in_bands["topk_8_12"] < sizes["topk_0_12"]
    assert packed["top-k"]["id table"] == "not yet (auto)"


def test_a_table_from_another_cache(opd, score, tmp_path):
    rng = np.random.default_rng(0)
    rollouts = [random_rollout(rng, topk=8, sample_id=str(n)) for n in range(4)]
    table = opd_store.build_id_table([r.topk_ids for r in rollouts], vocab_size=1000)
    with opd_store.create(
        tmp_path / "source", meta=example_meta(), topk=8, encoding="f32", id_table=table
    ) as writer:
        writer.append_batch(rollouts)
    shown = inspected(opd, tmp_path / "source")["top-k"]["id table"]
    assert shown.startswith(f"16 lists, {len(table.to_bytes()):,} bytes, sha256:{table.digest.hex()[:16]}")
    line = score("cache", "--id-table", tmp_path / "source")
    line.refused(2, "id_table: made for a vocabulary of 1000")
    with opd_store.create(tmp_path / "bare", meta=example_meta(), topk=8, encoding="f32") as writer:
        writer.append_batch(rollouts)
    score("cache", "--id-table", tmp_path / "bare").refused(2, "has no id table; give another cache, or auto")


def test_cuts(opd, score, tmp_path):
    score("likely", "--min-probability", 0.05).ok()
    found = inspected(opd, tmp_path / "likely")
    assert found["top-k"]["ranks kept"] == "probability at least 0.05"
    score("mass", "--mass", 0.5).ok()
    assert inspected(opd, tmp_path / "mass")["top-k"]["ranks kept"] == "as many as sum to 0.5"
    assert any((rollout.topk_ids == opd_store.NO_ID).any() for rollout in opd_store.open(tmp_path / "mass"))
    score("both", "--mass", 0.5, "--min-probability", 0.1).refused(2, "--min-probability and --mass")
    assert score("both", "--mass", 1.5).status == 2
    for name in ("likely", "mass"):
        opd("verify", tmp_path / name).ok()


def test_a_student_trains_on_cut_ranks(opd, work, score, tmp_path):
    score("cut", "--mass", 0.6).ok()
    for objective in ("forward_kl", "reverse_kl"):
        out = tmp_path / objective
        args = ("train", tmp_path / "cut", "--student", work / "student", "--out", out, "--steps", 2)
        opd(*args, "--objective", objective, "--lr", 1e-3).ok()
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(row["loss"]) and row["teacher_mass"] < 0.95 for row in rows)


def test_another_encoding_is_not_appended(score):
    score("cache", "--encoding", "ladder/64").ok()
    score("cache").refused(1, "encoding is ladder/64 in the cache, but ladder/128 is to be written")
