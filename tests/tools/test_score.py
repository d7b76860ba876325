"""Scoring ids besides the top-k: drawn from the teacher, and chosen by the student."""

from __future__ import annotations

import json

import pytest

import opd_store


@pytest.fixture(scope="module")
def scored(opd, work, tmp_path_factory):
    """The command's arguments, and the version they made."""
    out = tmp_path_factory.mktemp("score") / "cache"
    args = ("score", work / "teacher", work / "rollouts.jsonl", out, "--topk", 4, "--commit-every", 8)
    args += ("--draws", 12, "--draw-temperature", 1.25, "--chosen", 3, "--chosen-ids-from", work / "student")
    return args, opd(*args).ok().out


def test_drawn_and_chosen_ids_are_stored(opd, scored):
    args, _ = scored
    cache = opd_store.open(args[3])
    schema = cache.schema
    assert (schema.sampled, schema.sampled_temperature, schema.chosen) == (12, 1.25, 3)
    assert all((rollout.sampled_draws.sum(axis=1) == 12).all() for rollout in cache)
    assert opd_store.verify(args[3]).ok
    shown = json.loads(opd("inspect", args[3], "--json").ok().out)["top-k"]
    assert (shown["drawn ids"], shown["chosen ids"]) == (12, 3)


def test_the_same_command_again_makes_the_same_version(opd, scored, tmp_path):
    args, out = scored
    assert opd(*args).ok().out == out
    elsewhere = opd(*args[:3], tmp_path / "cache", *args[4:]).ok().out
    assert elsewhere.partition("@")[2] == out.partition("@")[2]
    reseeded = opd(*args[:3], tmp_path / "other", *args[4:], "--draw-seed", 1).ok().out
    assert reseeded.partition("@")[2] != out.partition("@")[2]


def test_other_draws_are_refused(opd, scored):
    args, _ = scored
    opd(*args, "--draws", 5).refused(1, "sampled is 12", "but 5 is to be written")
    opd(*args, "--draw-temperature", 1).refused(1, "sampled_temperature is 1.25")


@pytest.mark.parametrize("half", [("--chosen", 3), ("--chosen-ids-from", "student")], ids=str)
def test_half_of_a_choice_is_refused(opd, work, tmp_path, half):
    half = (half[0], work / half[1] if half[1] == "student" else half[1])
    args = ("score", work / "teacher", work / "rollouts.jsonl", tmp_path / "out")
    opd(*args, *half).refused(2, "--chosen and --chosen-ids-from: give both or neither")
    assert not (tmp_path / "out").exists()


def test_training_on_draws(opd, work, scored, tmp_path):
    args = ("train", scored[0][3], "--student", work / "student", "--out", tmp_path / "run")
    args += ("--objective", "random_sampling_kd", "--steps", 3, "--lr", 1e-2, "--batch-tokens", 200)
    assert opd(*args).ok().out == f"{tmp_path / 'run/final'}\n"
