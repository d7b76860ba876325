"""Every fault of the input is one line on standard error, with the right exit code, and leaves nothing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tools.commands import snapshot
from train.tiny_models import CONTEXT, VOCAB, loaded, random_rollouts, rollouts_jsonl, write_jsonl

import opd_store
from opd_store import Rollout


def jsonl(path, text):
    path.write_text(text)
    return path


BAD_PROMPTS = {
    "empty": ("", ["no prompts in it", "one JSON object per line"]),
    "broken": ('{"prompt": "ab"}\n{"prompt": \n', ["line 2", "not JSON"]),
    "deep": ("[" * 99_999, ["line 1", "not JSON"]),
    "no field": ('{"text": "ab"}\n', ["line 1", "exactly one of prompt_ids, messages and prompt", "none"]),
    "empty prompt": ('{"prompt": ""}\n', ["line 1, field prompt", "at least one token", "none"]),
    "too long": (
        json.dumps({"prompt": "a" * 99}),
        ["line 1, field prompt", "99 tokens", str(CONTEXT), "shorten"],
    ),
    "bad id": (f'{{"prompt_ids": [{VOCAB}]}}', ["line 1, field prompt_ids", f"id {VOCAB}", f"below {VOCAB}"]),
    "twice": ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', ["occur twice", "its own id"]),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts(opd, work, tmp_path, name):
    text, parts = BAD_PROMPTS[name]
    path = jsonl(tmp_path / "prompts.jsonl", text)
    line = opd("rollouts", work / "student", path, tmp_path / "out").refused(
        2 if name == "twice" else 1, *parts
    )
    assert name == "twice" or str(path) in line
    assert not (tmp_path / "out").exists()


def replaced(tmp_path, work, **change):
    """Twelve good rollouts and a bad one, as JSONL."""
    lm = loaded(work / "teacher")
    path = rollouts_jsonl(tmp_path / "rollouts.jsonl", lm, random_rollouts(12))
    row = {"id": "bad", "prompt_ids": [4, 5], "response_ids": [6, 7, 8], "behaviour_logprob": [-1, -1, -1]}
    with path.open("a") as file:
        file.write(json.dumps(row | change) + "\n")
    return path


BAD_ROLLOUTS = {
    "empty response": ({"response_ids": []}, ["line 14, field response_ids", "at least one token", "none"]),
    "empty prompt": ({"prompt_ids": []}, ["line 14, field prompt_ids"]),
    "not ids": ({"response_ids": [1, "x"]}, ["line 14, field response_ids", "a list of token ids"]),
    "wrong length": (
        {"behaviour_logprob": [-1]},
        ["line 14, field behaviour_logprob", "expected 3", "found 1"],
    ),
    "outside": (
        {"response_ids": [6, VOCAB, 8]},
        ["'bad', token_ids, position 3", f"id {VOCAB}", "tokenizer"],
    ),
    "too long": (
        {"response_ids": [6] * 99, "behaviour_logprob": None},
        ["'bad'", "101 tokens", str(CONTEXT)],
    ),
    "above zero": (
        {"behaviour_logprob": [-1, 0.5, -1]},
        ["line 14, field behaviour_logprob, position 1", "0.5"],
    ),
    "nan": (
        {"behaviour_logprob": [-1, float("nan"), 0]},
        ["line 14, field behaviour_logprob, position 1", "nan"],
    ),
    "reason": ({"finish_reason": "tired"}, ["line 14, field finish_reason", "tired", "stop, length"]),
}


@pytest.mark.parametrize("name", BAD_ROLLOUTS)
def test_bad_rollouts(opd, work, tmp_path, name):
    change, parts = BAD_ROLLOUTS[name]
    path = replaced(tmp_path, work, **change)
    opd("score", work / "teacher", path, tmp_path / "out", "--topk", 3).refused(1, *parts)
    # All or nothing: the one commit that they would have shared does not exist.
    assert not list((tmp_path / "out").rglob("*.json")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize("change", [{"finish_reason": "tired"}, {"response_ids": [6, VOCAB, 8]}])
def test_earlier_commits_stay_when_a_later_rollout_is_bad(opd, work, tmp_path, change):
    path = replaced(tmp_path, work)
    args = ("score", work / "teacher", path, tmp_path / "out", "--topk", 3, "--commit-every", 5)
    opd(*args).ok()
    before = opd_store.open(tmp_path / "out").digest
    replaced(tmp_path, work, **change)
    opd(*args).refused(1, "line 14" if "finish_reason" in change else "'bad'")
    assert opd_store.open(tmp_path / "out").digest == before
    opd("verify", tmp_path / "out").ok()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"loss_mask": ["false", 0, 1]}, ["field loss_mask", "list of bool"]),
        ({"behaviour_logprob": ["-1", "-1", "-1"]}, ["field behaviour_logprob", "list of float or int"]),
        ({"behaviour_logpob": [-1, -1, -1]}, ["unknown field 'behaviour_logpob'", "behaviour_logprob"]),
        ({"id": ["a"]}, ["field id", "text or a number"]),
        ({"id": "0"}, ["field id", "'0' occurs twice"]),
    ],
)
def test_rollouts_are_not_guessed_at(opd, work, tmp_path, change, parts):
    path = replaced(tmp_path, work, **change)
    if change.get("id") == "0":
        lines = path.read_text().splitlines()
        lines[1] = json.dumps(json.loads(lines[1]) | {"id": "0"})
        path.write_text("\n".join(lines) + "\n")
    opd("score", work / "teacher", path, tmp_path / "out").refused(1, path, "line 14", *parts)


def test_options_of_the_other_mode_are_refused(opd, work, cache, tmp_path):
    args = ("train", "--student", work / "student", "--out", tmp_path / "run", "--steps", 1)
    opd(*args, cache, "--teacher", work / "teacher").refused(2, "--teacher", "no effect with a CACHE")
    live = ("--live", "--teacher", work / "teacher", "--prompts", work / "prompts.jsonl")
    opd(*args, *live, "--ranks", 3).refused(2, "--ranks", "no effect with --live")
    opd("eval", work / "student", "--cache", cache, "--teacher", work / "teacher").refused(2, "--teacher")
    opd(*args, *live, "--allow-mismatch", "nonsense").refused(2, "allow_mismatch", "nonsense")
    assert not (tmp_path / "run").exists()


def test_a_reference_that_is_not_the_sampler_is_refused(opd, work, tmp_path):
    opd("rollouts", work / "student", work / "prompts.jsonl", tmp_path / "r", "--max-new-tokens", 3).ok()
    args = ("score", work / "teacher", tmp_path / "r", tmp_path / "out")
    opd(*args, "--reference", work / "teacher").refused(1, "reference", "give the behaviour checkpoint")
    assert not (tmp_path / "out").exists()
    opd(*args, "--reference", work / "student").ok()


def test_fewer_prompts_than_the_rollouts_that_are_there(opd, work, tmp_path):
    args = ("rollouts", work / "student", work / "prompts.jsonl", tmp_path / "r", "--max-new-tokens", 3)
    opd(*args).ok()
    opd(*args, "--limit", 2).refused(1, tmp_path / "r", "choose another path")


def test_rollouts_of_another_tokenizer(opd, work, tmp_path):
    mine, theirs = (loaded(work / name).tokenizer_fingerprint for name in ("teacher", "other"))
    args = ("score", work / "other", work / "rollouts.jsonl", tmp_path / "out")
    opd(*args).refused(1, "tokenizer_fingerprint", mine, theirs, "score with a model of the same tokenizer")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", ["{}", '{"rollouts": 2}', '{"rollouts": 1, "vocab_size": 9}', "[]", "{"])
def test_a_bad_head_line(opd, work, tmp_path, head):
    path = jsonl(tmp_path / "r.jsonl", head + '\n{"prompt_ids": [4], "response_ids": [5]}\n')
    opd("score", work / "teacher", path, tmp_path / "out").refused(1, path, "line 1")


@pytest.fixture
def nan_model(work, tmp_path):
    path = tmp_path / "nan-model"
    shutil.copytree(work / "student", path)
    tensors = load_file(path / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_weights_that_are_not_numbers(opd, work, cache, nan_model, tmp_path):
    out = tmp_path / "out"
    opd("score", nan_model, work / "rollouts.jsonl", out).refused(
        1, "'r", "position 0", "NaN", "check weights"
    )
    assert not out.exists()
    opd("rollouts", nan_model, work / "prompts.jsonl", out, "--max-new-tokens", 3).refused(1, "nan")
    assert not (out / "manifests").exists()
    args = ("train", cache, "--student", nan_model, "--out", tmp_path / "run", "--steps", 2)
    opd(*args).refused(1, nan_model, "before the first step", "check weights")
    assert not (tmp_path / "run/final").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_a_place_that_cannot_be_written(opd, work, cache, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / place
    runs = [
        ("rollouts", work / "student", work / "prompts.jsonl", out, "--max-new-tokens", 3),
        ("score", work / "teacher", work / "rollouts.jsonl", out),
        ("train", cache, "--student", work / "student", "--out", out, "--steps", 1),
    ]
    for args in runs:
        done = opd(*args)
        assert done.status in (1, 2)
        done.refused(done.status, out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_that_holds_something_else(opd, work, cache, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    opd("rollouts", work / "student", work / "prompts.jsonl", out).refused(
        2, out, "already exists", "another path"
    )
    opd("score", work / "teacher", work / "rollouts.jsonl", out).refused(
        2, out, "already exists", "another path"
    )
    # Rollouts of another run, and a cache of another teacher.
    before = snapshot(cache)
    opd("score", work / "student", work / "rollouts.jsonl", cache, "--topk", 6).refused(1, cache, "teacher")
    opd("score", work / "teacher", work / "rollouts.jsonl", cache, "--topk", 2).refused(1, cache, "topk is 6")
    assert snapshot(cache) == before
    # A model that somebody else trained.
    shutil.copytree(work / "student", out / "final")
    args = ("train", cache, "--student", work / "student", "--out", out, "--steps", 1)
    opd(*args).refused(1, out / "final", "belongs to another run")
    assert {path.name for path in out.iterdir()} == {"notes.txt", "final"}
    assert not (out / "final/opd.json").exists()


def test_what_is_not_there(opd, work, cache, tmp_path):
    gone = tmp_path / "gone"
    prompts, rollouts = work / "prompts.jsonl", work / "rollouts.jsonl"
    train = ("train", cache, "--out", tmp_path / "run", "--steps", 1)
    for args in (
        ("rollouts", gone, prompts, tmp_path / "out"),
        ("rollouts", work / "student", gone, tmp_path / "out"),
        ("score", gone, rollouts, tmp_path / "out"),
        ("score", work / "teacher", gone, tmp_path / "out"),
        ("score", work / "teacher", rollouts, tmp_path / "out", "--reference", gone),
        (*train, "--student", gone),
        ("train", gone, *train[2:], "--student", work / "student"),
        ("eval", gone, "--cache", cache),
        ("eval", work / "student", "--cache", gone),
        ("eval", work / "student", "--prompts", gone),
        ("inspect", gone),
        ("verify", gone),
        ("verify", f"{cache}@sha256:{'0' * 64}"),
    ):
        opd(*args).refused(2, "sha256:0000" if args[0] == "verify" and args[1] != gone else gone)
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there(opd, work, tmp_path):
    for device in ("warp", "cuda:99"):
        args = ("score", work / "teacher", work / "rollouts.jsonl", tmp_path / "out", "--device", device)
        opd(*args).refused(2, "--device", device)


def test_eval_of_a_model_of_other_tokens(opd, work, cache):
    opd("eval", work / "other", "--cache", cache).refused(1, "tokenizer_fingerprint")


SETTINGS = {
    "steps": 0,
    "lr": -1,
    "clip": 0,
    "grad-clip": -1,
    "save-every": -1,
    "weight-decay": -1,
    "warmup-steps": -1,
    "accumulate": 0,
    "cap": 0.5,
    "ranks": 99,
    "batch-tokens": 1,
    "batch-rollouts": 0,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_out_of_range(opd, work, cache, tmp_path, name):
    args = ("train", cache, "--student", work / "student", "--out", tmp_path / "run")
    settings = {"steps": 1, name: SETTINGS[name]}
    flags = [part for key, item in settings.items() for part in (f"--{key}", item)]
    done = opd(*args, *flags)
    assert done.status == 2
    assert name.replace("-", "_") in done.err.replace("-", "_")
    assert "Traceback" not in done.err
    assert not (tmp_path / "run/final").exists()


def damaged(cache, tmp_path, how):
    """A copy of the cache whose largest shard is damaged."""
    path = tmp_path / "cache"
    shutil.copytree(cache, path)
    shard = max((path / "shards").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(shard.read_bytes())
    if how == "missing":
        shard.unlink()
        return path, shard
    if how == "cut":
        data = data[:-100]
    elif how == "flipped":
        data[len(data) // 2] ^= 4
    else:
        data = bytearray()
    shard.write_bytes(data)
    return path, shard


@pytest.mark.parametrize("how", ["cut", "flipped", "missing", "emptied"])
def test_a_damaged_shard_is_found_by_verify_and_refused_by_train(opd, work, cache, tmp_path, how):
    path, shard = damaged(cache, tmp_path, how)
    done = opd("verify", path)
    assert done.status == 1
    assert shard.name in done.err
    assert done.out.startswith("DAMAGED")
    report = opd("verify", path, "--json")
    assert report.status == 1
    found = json.loads(report.out)
    assert not found["ok"]
    assert any(shard.name in problem["message"] for problem in found["problems"])
    assert {problem["error"] for problem in found["problems"]} <= {
        "IntegrityError",
        "StorageError",
        "FormatError",
    }
    args = ("train", path, "--student", work / "student", "--out", tmp_path / "run", "--steps", 8)
    line = opd(*args, "--batch-tokens", 100).refused(1, shard.name)
    assert "Traceback" not in line
    assert not (tmp_path / "run/final").exists()


def test_every_flipped_byte_of_the_manifest_is_refused_or_means_the_same(opd, cache, tmp_path):
    path = tmp_path / "cache"
    shutil.copytree(cache, path)
    newest = max((path / "manifests").iterdir())
    data = newest.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.choice(len(data), 12, replace=False):
        newest.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        done = opd("inspect", f"{path}@{opd_store.open(cache).digest}")
        assert done.status in (1, 2)
        done.refused(done.status, path)


def test_no_space_for_a_longer_batch_names_the_row(opd, work, cache, tmp_path):
    args = ("train", cache, "--student", work / "student", "--out", tmp_path / "run", "--steps", 1)
    opd(*args, "--batch-tokens", 3).refused(2, "row ", "more than batch_tokens 3", "raise batch_tokens")


def test_a_cache_without_what_the_objective_needs(opd, work, tmp_path):
    bare = [
        Rollout(token_ids=r.token_ids, prompt_len=r.prompt_len, sample_id=r.sample_id)
        for r in random_rollouts(3)
    ]
    path = rollouts_jsonl(tmp_path / "r.jsonl", loaded(work / "teacher"), bare)
    opd("score", work / "teacher", path, tmp_path / "cache", "--topk", 0).ok()
    args = (
        "train",
        tmp_path / "cache",
        "--student",
        work / "student",
        "--out",
        tmp_path / "run",
        "--steps",
        1,
    )
    opd(*args).refused(2, "needs behaviour_logprob", "or pass --correction none")
    loss = tmp_path / "loss.json"
    loss.write_text('{"objective": "lightning", "correction": {"kind": "token_tis"}}')
    opd(*args, "--loss", loss).refused(2, "needs behaviour_logprob", f"or change {loss}")
    opd(*args, "--objective", "forward_kl").refused(2, "'forward_kl' needs top-k", "--topk")
    opd(*args, "--objective", "lightning").ok()
    opd("eval", work / "student", "--cache", tmp_path / "cache").refused(2, "top-k")
    assert write_jsonl(tmp_path / "none", []).read_text() == ""
