"""`opd train` against drift: looks before the first step, alarms in the metrics, new rollouts when due."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from train.tiny_models import loaded, meta_of

import opd_store
from opd_store import SamplerInfo
from opd_train import read_prompts, roll_out, sample_rollouts, score_cache, score_rollouts
from opd_train.capture.scoring import with_teacher


@pytest.fixture(scope="module")
def own(work, tmp_path_factory):
    """Rollouts of the student itself, scored."""
    root = tmp_path_factory.mktemp("own")
    student, teacher = loaded(work / "student"), loaded(work / "teacher")
    roll_out(
        student,
        read_prompts(work / "prompts.jsonl", student),
        root / "r",
        SamplerInfo(max_new_tokens=5, seed=3),
    )
    rollouts = opd_store.open(root / "r")
    score_cache(teacher, rollouts, rollouts.meta, root / "cache", topk=5, encoding="plain")
    return root / "cache"


@pytest.fixture(scope="module")
def shifted(work, tmp_path_factory):
    """The same, with the teacher's log-probs one token late."""
    path = tmp_path_factory.mktemp("shifted") / "cache"
    student, teacher = loaded(work / "student"), loaded(work / "teacher")
    drawn = sample_rollouts(
        student, read_prompts(work / "prompts.jsonl", student), SamplerInfo(max_new_tokens=9, seed=3)
    )
    with opd_store.create(path, meta=meta_of(student, teacher=teacher.info), topk=9) as writer:
        for rollout, score in zip(drawn, score_rollouts(teacher, drawn, topk=9), strict=True):
            scored = with_teacher(rollout, score)
            late = scored.teacher_logprob.copy()
            late[1:] = scored.teacher_logprob[:-1]
            writer.append(dataclasses.replace(scored, teacher_logprob=late))
    return path


def train(opd, cache, work, out, *more, **request):
    options = ("--steps", 4, "--lr", 0.01, "--batch-rollouts", 8)
    return opd("train", cache, "--student", work / "student", "--out", out, *options, *more, **request)


def test_a_cache_that_is_off_by_one_is_refused_before_the_first_step(opd, work, shifted, tmp_path):
    line = train(opd, shifted, work, tmp_path / "run").refused(1, "topk_ids", "--allow-mismatch topk_ids")
    assert "of the token before" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    done = train(opd, shifted, work, tmp_path / "run", "--allow-mismatch", "topk_ids").ok()
    assert "opd: note: topk_ids" in done.err
    # What a fine-tuning does not read is no reason to stop it.
    train(opd, shifted, work, tmp_path / "sft", "--objective", "cross_entropy").ok()


def test_a_run_that_goes_on_is_not_looked_at_again(opd, work, shifted, tmp_path):
    allow = ("--allow-mismatch", "topk_ids", "--save-every", 2)
    train(opd, shifted, work, tmp_path / "run", *allow).ok()
    assert "topk_ids" not in train(opd, shifted, work, tmp_path / "run", *allow).ok().err


def test_alarms_are_in_the_metrics_and_said_once(opd, work, own, tmp_path):
    done = train(opd, own, work, tmp_path / "run", "--lr", 0.5, "--steps", 16, "--weight-decay", 0).ok()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    raised = [alarm for row in rows for alarm in row.get("alarms", []) if alarm["raised"]]
    said = [line for line in done.err.splitlines() if "drift alarm" in line]
    drift = [alarm for alarm in raised if alarm["kind"] == "drift"]
    assert len(said) == len(drift) >= 1
    assert all("re-roll out now" in line for line in said)
    assert {alarm["step"] for alarm in raised} <= {row["step"] for row in rows}
    assert len(raised) < 10


def refresh(work, *more):
    options = ("--teacher", work / "teacher", "--prompts", work / "prompts.jsonl")
    return ("--refresh-every", 2, "--refresh-rollouts", 12, "--save-every", 1, *options, *more)


def test_new_rollouts_are_sampled_and_kept_beside_the_run(opd, work, own, tmp_path):
    before = opd_store.open(own).digest
    train(opd, own, work, tmp_path / "run", *refresh(work)).ok()
    made = opd_store.open(tmp_path / "run/rollouts")
    assert made.column("policy_version").to_pylist() == [2] * 12
    assert made.topk == 5
    assert made.meta.sampler.max_new_tokens == 5
    assert made.meta.teacher == opd_store.open(own).meta.teacher
    assert opd_store.open(own).digest == before
    assert opd_store.verify(tmp_path / "run/rollouts").ok
    # Another order of rollouts than without.
    train(opd, own, work, tmp_path / "offline").ok()
    weights = [load_file(tmp_path / name / "final/model.safetensors") for name in ("run", "offline")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_adapters_are_part_of_what_is_sampled_from(opd, work, own, tmp_path):
    train(opd, own, work, tmp_path / "run", *refresh(work, "--lora-rank", 2)).ok()
    assert opd_store.open(tmp_path / "run/rollouts").column("policy_version").to_pylist() == [2] * 12
    assert (tmp_path / "run/final/adapter").is_dir()


@pytest.fixture(scope="module")
def whole(opd, work, own, tmp_path_factory):
    """A run that nothing interrupts, and how many moments it could be killed at."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train(opd, own, work, out, *refresh(work), count_events=True).ok().events


@pytest.mark.parametrize("part", [0.3, 0.5, 0.6, 0.7, 0.9])
def test_a_killed_run_ends_in_the_same_weights_and_rollouts(opd, work, own, whole, tmp_path, part):
    args = (own, work, tmp_path / "run", *refresh(work))
    assert train(opd, *args, count_events=True, kill_at=int(whole[1] * part)).killed
    train(opd, *args).ok()
    weights, rollouts = zip(
        *(
            ((out / "final/model.safetensors").read_bytes(), opd_store.open(out / "rollouts"))
            for out in (whole[0], tmp_path / "run")
        ),
        strict=True,
    )
    assert weights[0] == weights[1]
    hashes = [[cache.row_hash(row) for row in range(len(cache))] for cache in rollouts]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--refresh-every", 1), "--teacher and --prompts"),
        (("--refresh-keep", 2), "no effect with neither"),
        (("--refresh-every", 1, "--topk", 3, "--teacher", "t", "--prompts", "p"), "--topk"),
        (("--teacher", "t"), "--teacher has no effect with a CACHE"),
        (("--proximal-every", 2, "--correction", "cispo"), "--proximal-every has no effect with correction"),
        (("--normalise", "tokens"), "--normalise has no effect with correction none"),
        (("--shuffle", "global", "--window", 2), "--window has no effect with --shuffle global"),
        (("--objective", "lightning", "--ranks", 2), "--ranks has no effect with objective lightning"),
        (
            ("--refresh-every", 1, "--objective", "random_sampling_kd", "--teacher", "t", "--prompts", "p"),
            "scores no draws",
        ),
    ],
)
def test_options_that_do_not_go_together(opd, work, own, tmp_path, options, part):
    train(opd, own, work, tmp_path / "run", *options).refused(2, part)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--storage-option", "anon=true"), "--storage-option has no effect with --live"),
        (("--cache-gib", 2), "--cache-gib has no effect with --live"),
        (("--objective", "lightning", "--topk", 3), "--topk has no effect with objective lightning"),
        (("--objective", "random_sampling_kd"), "--live draws no ids"),
    ],
)
def test_options_that_do_not_go_with_live(opd, work, tmp_path, options, part):
    args = ("train", "--live", "--student", work / "student", "--teacher", work / "teacher", "--steps", 1)
    args += ("--prompts", work / "prompts.jsonl", "--out", tmp_path / "run")
    opd(*args, *options).refused(2, part)


def test_another_teacher_is_refused(opd, work, own, tmp_path):
    options = ("--teacher", work / "student", "--prompts", work / "prompts.jsonl", "--refresh-every", 2)
    train(opd, own, work, tmp_path / "run", *options).refused(1, "scored by the same teacher")
