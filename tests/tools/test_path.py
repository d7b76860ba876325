"""The whole path, on a model directory that transformers wrote and we did not."""

from __future__ import annotations

import json

import pytest

import opd_store
from opd_train import load_causal_lm


@pytest.fixture(scope="module")
def walked(opd, work, tmp_path_factory):
    """Everything from prompts to a trained model."""
    root = tmp_path_factory.mktemp("path")
    sample = ("rollouts", work / "student", work / "prompts.jsonl", root / "rollouts")
    sampled = opd(*sample, "--max-new-tokens", 8, "--commit-every", 20).ok()
    score = ("score", work / "teacher", root / "rollouts", root / "cache", "--topk", 5)
    scored = opd(*score, "--sft-teacher", work / "teacher", "--licence", "CC0").ok()
    train = ("train", root / "cache", "--student", work / "student", "--out", root / "run")
    trained = opd(*train, "--steps", 4, "--lr", 1e-2, "--batch-tokens", 200, "--save-every", 2).ok()
    return root, sampled, scored, trained


def test_each_command_prints_where_its_result_is(walked):
    root, sampled, scored, trained = walked
    for done, name in ((sampled, "rollouts"), (scored, "cache")):
        digest = opd_store.open(root / name).digest
        assert done.out == f"{root / name}@{digest}\n"
        assert len(opd_store.open(done.out.strip())) == 36
    assert trained.out == f"{root / 'run/final'}\n"


def test_inspect_shows_where_it_comes_from(opd, walked):
    root = walked[0]
    shown = opd("inspect", root / "cache").ok().out
    found = json.loads(opd("inspect", root / "cache", "--json").ok().out)
    assert found["provenance"]["teacher consistency"] == "consistent"
    assert found["provenance"]["licence"] == "CC0"
    assert found["cache"]["rollouts"] == 36
    assert found["top-k"]["ranks"] == 5
    for section, rows in found.items():
        if section in ("meta", "schema"):
            # For programs, all fields.
            continue
        assert section in shown
        for name, value in rows.items():
            assert name in shown
            if isinstance(value, str) and len(value) < 200:
                assert value in shown
    assert "consistent" in shown


def test_verify_reads_all_of_it(opd, walked):
    root = walked[0]
    assert opd("verify", root / "cache").ok().out.startswith("ok: 36 rollouts")
    found = json.loads(opd("verify", root / "cache", "--json").ok().out)
    cache = opd_store.open(root / "cache")
    assert (found["ok"], found["problems"], found["rollouts"]) == (True, [], 36)
    assert (found["digest"], found["response_tokens"]) == (cache.digest, cache.n_response_tokens)
    pinned = f"{root / 'cache'}@{cache.digest}"
    assert json.loads(opd("verify", pinned, "--json").ok().out)["ok"]


def test_the_trained_model_is_an_ordinary_directory(walked, work):
    final = walked[0] / "run/final"
    lm = load_causal_lm(final)
    before = load_causal_lm(work / "student")
    assert lm.tokenizer_fingerprint == before.tokenizer_fingerprint
    assert lm.info.weights_digest != before.info.weights_digest
    # The cache's SFT teacher goes on with the model, so that the next round can check it.
    assert (
        lm.provenance["sft_teacher"]["weights_digest"] == load_causal_lm(work / "teacher").info.weights_digest
    )
    assert lm.provenance["cache"] == opd_store.open(walked[0] / "cache").digest
    steps = [json.loads(line)["step"] for line in (walked[0] / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_eval_measures_accuracy_and_divergence(opd, walked, work):
    root = walked[0]
    args = ("eval", root / "run/final", "--prompts", work / "prompts.jsonl", "--cache", root / "cache")
    found = json.loads(opd(*args, "--max-new-tokens", 5, "--limit", 6, "--json").ok().out)
    assert set(found) == {"accuracy", "forward KL, nats per token", "reverse KL, nats per token"}
    assert found["accuracy"]["n"] == 6
    before = json.loads(opd("eval", work / "student", "--cache", root / "cache", "--json").ok().out)
    name = "forward KL, nats per token"
    assert found[name]["mean"] < before[name]["mean"]
    args = ("eval", work / "student", "--prompts", work / "prompts.jsonl", "--teacher", work / "teacher")
    text = opd(*args, "--max-new-tokens", 4, "--limit", 1).ok().out
    assert text.splitlines()[-1].startswith("reverse KL, nats per response: ")

    # One rollout has no interval; the document is JSON all the same.
    def refuse(name):
        raise AssertionError(name)

    alone = opd(*args, "--max-new-tokens", 4, "--limit", 1, "--json").ok().out
    assert json.loads(alone, parse_constant=refuse)["reverse KL, nats per response"]["low"] is None


def test_the_same_command_again_does_nothing(opd, walked, work):
    root = walked[0]
    before = opd_store.open(root / "cache").digest
    opd("score", work / "teacher", root / "rollouts", root / "cache", "--topk", 5, "--sft-teacher",
        work / "teacher", "--licence", "CC0").ok()  # fmt: skip
    assert opd_store.open(root / "cache").digest == before


def test_training_live(opd, work, tmp_path):
    args = ("train", "--live", "--student", work / "student", "--teacher", work / "teacher")
    args += ("--prompts", work / "prompts.jsonl", "--out", tmp_path / "run", "--steps", 2)
    opd(*args, "--max-new-tokens", 4, "--batch-rollouts", 3, "--topk", 4).ok()
    assert (tmp_path / "run/final/model.safetensors").is_file()


def test_a_mismatch_is_refused_or_recorded(opd, work, cache, tmp_path):
    other = ("train", cache, "--student", work / "other", "--out", tmp_path / "run", "--steps", 1)
    line = opd(*other).refused(1, "tokenizer_fingerprint", "--allow-mismatch tokenizer_fingerprint")
    fingerprints = [load_causal_lm(work / name).tokenizer_fingerprint for name in ("other", "teacher")]
    assert all(fingerprint in line for fingerprint in fingerprints)
    assert not (tmp_path / "run").exists()
    opd(*other, "--allow-mismatch", "tokenizer_fingerprint").ok()
    recorded = json.loads((tmp_path / "run/final/opd.json").read_text())["allowed_mismatches"]
    assert [(row["field"], row["expected"], row["found"]) for row in recorded] == [
        ("tokenizer_fingerprint", *fingerprints)
    ]
    opd(*other, "--allow-mismatch", "color").refused(2, "'color' is not one of")


def test_inconsistent_teachers_are_refused(opd, work, tmp_path):
    score = ("score", work / "teacher", work / "rollouts.jsonl", tmp_path / "cache", "--topk", 2)
    opd(*score, "--sft-teacher", work / "student").ok()
    shown = json.loads(opd("inspect", tmp_path / "cache", "--json").ok().out)
    assert shown["provenance"]["teacher consistency"] == "inconsistent"
    train = ("train", tmp_path / "cache", "--student", work / "student", "--out", tmp_path / "run")
    opd(*train, "--steps", 1).refused(1, "teacher_consistency", "student sha256:", "teacher sha256:")
    opd(*train, "--steps", 1, "--allow-mismatch", "teacher_consistency").ok()


@pytest.mark.parametrize(
    ("options", "objective", "kind", "cap", "clip"),
    [
        ((), "jsd", "none", None, 10.0),
        (("--ranks", 0), "lightning", "token_tis", 2.0, 1.0),
        (("--ranks", 0, "--cap", 3, "--clip", 5), "lightning", "token_tis", 3.0, 5.0),
        (("--objective", "lightning"), "lightning", "none", None, 10.0),
        (
            ("--objective", "reverse_kl", "--correction", "token_tis", "--cap", 5),
            "reverse_kl",
            "token_tis",
            5.0,
            10.0,
        ),
    ],
    ids=str,
)
def test_what_is_trained_by_default(opd, work, cache, tmp_path, options, objective, kind, cap, clip):
    args = ("train", cache, "--student", work / "student", "--out", tmp_path / "run", "--steps", 1)
    opd(*args, *options).ok()
    config = json.loads((tmp_path / "run/final/opd.json").read_text())["config"]
    loss = config["loss"]
    correction = loss["correction"]
    assert (loss["objective"], correction["kind"], correction["cap"]) == (objective, kind, cap)
    assert loss["clip"] == clip


def test_a_loss_from_a_file(opd, work, cache, tmp_path):
    path = tmp_path / "loss.json"
    path.write_text(
        json.dumps({"objective": "lightning", "correction": {"kind": "prefix_is", "step_cap": 1.5}})
    )
    args = ("train", cache, "--student", work / "student", "--out", tmp_path / "run", "--steps", 1)
    opd(*args, "--loss", path).ok()
    loss = json.loads((tmp_path / "run/final/opd.json").read_text())["config"]["loss"]
    assert (loss["objective"], loss["correction"]["kind"]) == ("lightning", "prefix_is")
    assert loss["correction"]["step_cap"] == 1.5
    opd(*args, "--loss", path, "--clip", 2).refused(2, "--clip: not together with --loss")
    path.write_text('{"objective": "lightning", "corection": {}}')
    opd(*args, "--loss", path).refused(2, "loss.json: 'corection' is not one of")
    opd(*args, "--objective", "reverse_kl", "--chosen-ids").refused(
        2, "chosen_ids: the cache stores none", "--chosen"
    )


def test_training_on_ids_that_the_student_chose(opd, work, tmp_path):
    args = ("score", work / "teacher", work / "rollouts.jsonl", tmp_path / "cache", "--topk", 0)
    opd(*args, "--chosen", 5, "--chosen-ids-from", work / "student").ok()
    train = (
        "train",
        tmp_path / "cache",
        "--student",
        work / "student",
        "--out",
        tmp_path / "run",
        "--steps",
        1,
    )
    opd(*train, "--objective", "reverse_kl", "--chosen-ids").ok()
    metrics = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert metrics["loss"] == pytest.approx(metrics["reverse_kl"])
