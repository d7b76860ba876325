"""`opd inspect --consistency`: the estimate beside the digests, on a terminal and as JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

import opd_store
from opd_store import CacheMeta, ModelInfo, Rollout

TEACHER = ModelInfo(name="t", weights_digest="sha256:" + "a" * 64)
OTHER = ModelInfo(name="o", weights_digest="sha256:" + "b" * 64)


def made(path, *, teacher_p, sft_teacher=None, teacher=TEACHER):
    meta = CacheMeta(
        vocab_size=50, tokenizer_fingerprint="sha256:" + "0" * 64, teacher=teacher, sft_teacher=sft_teacher
    )
    rng = np.random.default_rng(0)
    with opd_store.create(path, meta=meta) as writer:
        for number in range(40):
            writer.append(
                Rollout(
                    token_ids=rng.integers(0, 50, 9).astype(np.uint32),
                    prompt_len=3,
                    sample_id=str(number),
                    reference_logprob=np.log(np.full(6, 0.95, np.float32)),
                    teacher_logprob=np.log(np.full(6, teacher_p, np.float32)),
                )
            )
    return path


@pytest.mark.parametrize(
    ("teacher_p", "sft_teacher", "estimate", "digests"),
    [
        (0.95, None, "likely consistent", "unknown"),
        (0.8, None, "likely inconsistent", "unknown"),
        # Digests know better than an estimate; both are shown.
        (0.8, TEACHER, "likely inconsistent", "consistent"),
        (0.95, OTHER, "likely consistent", "inconsistent"),
    ],
)
def test_the_estimate_is_shown_beside_the_digests(opd, tmp_path, teacher_p, sft_teacher, estimate, digests):
    path = made(tmp_path / "cache", teacher_p=teacher_p, sft_teacher=sft_teacher)
    shown = opd("inspect", path, "--consistency").ok().out
    found = json.loads(opd("inspect", path, "--consistency", "--json").ok().out)["consistency"]
    assert found["estimate"] == estimate
    assert found["by weight digests"] == digests
    assert found["sure tokens"] == found["tokens"] == 240
    for name, value in found.items():
        assert name in shown
        assert isinstance(value, int) or value[:60] in shown
    assert "cannot be told apart" in shown
    assert "consistency" not in json.loads(opd("inspect", path, "--json").ok().out)


def test_samples_of_the_sft_teacher(opd, tmp_path):
    path, samples = made(tmp_path / "cache", teacher_p=0.95), made(tmp_path / "samples", teacher_p=0.8)
    args = ("inspect", path, "--consistency", "--json", "--sft-samples", samples)
    found = json.loads(opd(*args).ok().out)["consistency"]
    assert found["estimate"] == "likely inconsistent"
    assert found["KL on SFT samples"].startswith("0.1719")
    opd("inspect", path, "--sft-samples", samples).refused(2, "--consistency")
    other = made(tmp_path / "other", teacher_p=0.95, teacher=OTHER)
    opd("inspect", path, "--consistency", "--sft-samples", other).refused(2, "score them with that one")
