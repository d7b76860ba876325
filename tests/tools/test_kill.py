"""SIGKILL at any moment: the same command again ends where an uninterrupted run ends, byte for byte."""

from __future__ import annotations

import json
import random
import time

import pytest
from tools.commands import snapshot
from tools.converters.converting import FINGERPRINT
from tools.converters.samples import SAMPLES, VOCAB, good_rollouts
from train.tiny_models import loaded, random_rollouts, rollouts_jsonl

import opd_store

MOMENTS = range(10)


def cache_files(path):
    """What readers see of a cache."""
    return {name: data for name, data in snapshot(path).items() if not name.startswith("tmp/")}


def finished(path):
    """What a training run leaves, without its timings."""
    files = snapshot(path)
    rows = [json.loads(line) for line in files.pop("metrics.jsonl").splitlines()]
    for row in rows:
        del row["seconds"], row["tokens_per_s"], row["data_share"]
    checkpoints = {name for name in files if not name.startswith("final/")}
    return {name: files[name] for name in files.keys() - checkpoints}, rows


class Job:
    """A command, how many events it has when nothing interrupts it, and what it leaves then."""

    def __init__(self, opd, args, out, look):
        self._opd, self.args, self._look = opd, args, look
        self.events = self.run(out).ok().events
        self.expected = look(out)
        assert self.events > 40

    def run(self, out, **request):
        return self._opd(*(out if arg == "OUT" else arg for arg in self.args), count_events=True, **request)

    def kill_and_finish(self, out, moment):
        assert self.run(out, kill_at=moment).killed
        self.run(out).ok()
        assert self._look(out) == self.expected

    def kill_until_finished(self, out, rng):
        kills = 0
        # Often before any progress, and at most about two commits or checkpoints later.
        while (done := self.run(out, kill_at=rng.randint(1, self.events // 2))).killed:
            kills += 1
            assert kills < 100
        done.ok()
        assert self._look(out) == self.expected
        return kills


@pytest.fixture(scope="module")
def rollouts(opd, work, tmp_path_factory):
    args = ("rollouts", work / "student", work / "prompts.jsonl", "OUT", "--max-new-tokens", 4, "--limit", 12)
    args += ("--commit-every", 4, "--batch-rows", 2)
    return Job(opd, args, tmp_path_factory.mktemp("rollouts") / "out", cache_files)


@pytest.fixture(scope="module")
def score(opd, work, tmp_path_factory):
    args = ("score", work / "teacher", work / "rollouts.jsonl", "OUT", "--topk", 6, "--commit-every", 5)
    return Job(opd, (*args, "--batch-tokens", 40), tmp_path_factory.mktemp("score") / "out", cache_files)


@pytest.fixture(scope="module")
def train(opd, work, cache, tmp_path_factory):
    args = ("train", cache, "--student", work / "student", "--out", "OUT", "--steps", 7, "--save-every", 2)
    args += ("--batch-tokens", 60, "--lr", 1e-2, "--accumulate", 2)
    return Job(opd, args, tmp_path_factory.mktemp("train") / "out", finished)


@pytest.fixture(scope="module", params=["table", "jsonl"])
def convert(request, opd, tmp_path_factory):
    """Of files with several batches and commits; what is left are whole files under the cache's own name."""
    root = tmp_path_factory.mktemp("convert")
    source = SAMPLES[request.param].write(root, good_rollouts(40))
    args = ("convert", source, "OUT", "--tokenizer-fingerprint", FINGERPRINT, "--vocab-size", VOCAB)
    return Job(opd, (*args, "--commit-every", 6, "--json"), root / "out", cache_files)


def moments(job, seed):
    """Ten different moments of a run, and its first and last."""
    inner = random.Random(seed).sample(range(2, job.events), len(MOMENTS) - 2)
    return [1, job.events, *inner]


@pytest.mark.parametrize("number", MOMENTS)
def test_score_killed_at_ten_moments(score, tmp_path, number):
    out = tmp_path / "out"
    score.kill_and_finish(out, moments(score, 1)[number])
    assert opd_store.verify(out).ok


@pytest.mark.parametrize("number", MOMENTS)
def test_train_killed_at_ten_moments(train, tmp_path, number):
    train.kill_and_finish(tmp_path / "out", moments(train, 2)[number])
    rows = finished(tmp_path / "out")[1]
    assert [row["step"] for row in rows] == list(range(1, 8))


@pytest.mark.parametrize("options", [(), ("--proximal-every", 2, "--correction", "ppo")], ids=len)
def test_train_killed_by_the_clock(opd, work, cache, tmp_path, options):
    args = ("train", cache, "--student", work / "student", "--steps", 12, "--save-every", 2, "--lr", 1e-2)
    args += ("--batch-tokens", 60, "--objective", "lightning", *options)
    started = time.monotonic()
    opd(*args, "--out", tmp_path / "whole").ok()
    duration = time.monotonic() - started
    rng, out = random.Random(5), tmp_path / "out"
    for share in (0.6, 0.5, 0.3, 0.3):
        # One that is done before it can be killed ends as it should, too.
        opd(*args, "--out", out, kill_after_s=rng.uniform(share / 2, share) * duration)
    opd(*args, "--out", out).ok()
    assert finished(out) == finished(tmp_path / "whole")


@pytest.mark.parametrize("number", MOMENTS)
def test_convert_killed_at_ten_moments(convert, tmp_path, number):
    convert.kill_and_finish(tmp_path / "out", moments(convert, 5)[number])
    assert opd_store.verify(tmp_path / "out").ok
    # Nothing stays beside it, and the same command again changes nothing.
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads(convert.run(tmp_path / "out").ok().out)["existed"]
    assert cache_files(tmp_path / "out") == convert.expected


def test_convert_killed_again_and_again(convert, tmp_path):
    assert convert.kill_until_finished(tmp_path / "out", random.Random(6)) >= 3


def test_a_conversion_that_was_killed_goes_on_only_as_the_same(opd, convert, tmp_path):
    assert convert.run(tmp_path / "out", kill_at=convert.events * 3 // 4).killed
    assert not (tmp_path / "out").exists()
    args = [tmp_path / "out" if arg == "OUT" else arg for arg in convert.args]
    opd(*args, "--topk", 3).refused(2, "was begun by another command")
    convert.run(tmp_path / "out").ok()
    assert cache_files(tmp_path / "out") == convert.expected


@pytest.mark.parametrize("number", [2, 3, 4])
def test_rollouts_killed(rollouts, tmp_path, number):
    rollouts.kill_and_finish(tmp_path / "out", moments(rollouts, 3)[number])


@pytest.mark.parametrize("name", ["rollouts", "score", "train"])
def test_killed_again_and_again(request, tmp_path, name):
    job = request.getfixturevalue(name)
    assert job.kill_until_finished(tmp_path / "out", random.Random(4)) >= 3


def test_what_was_committed_before_a_kill_can_be_read(score, tmp_path):
    out = tmp_path / "out"
    assert score.run(out, kill_at=score.events * 3 // 4).killed
    report = opd_store.verify(out)
    assert report.ok
    assert report.rollouts in (5, 10, 15)


@pytest.fixture
def growing(work, tmp_path):
    """Four chunks of rollouts, each longer than the one before."""
    chunks = [random_rollouts(5, seed=n, prompt=(1, 2), response=(12 * n + 1, 12 * n + 9)) for n in range(4)]
    rollouts = [rollout for chunk in chunks for rollout in chunk]
    lm = loaded(work / "teacher")
    for number, rollout in enumerate(rollouts):
        object.__setattr__(rollout, "sample_id", f"g{number}")
    return rollouts_jsonl(tmp_path / "growing.jsonl", lm, rollouts)


def test_a_full_disk_while_scoring(opd, work, growing, tmp_path):
    def score(out, **request):
        return opd("score", work / "teacher", growing, out, "--topk", 30, "--commit-every", 5, **request)

    score(tmp_path / "whole").ok()
    expected = cache_files(tmp_path / "whole")
    sizes = sorted(len(data) for name, data in expected.items() if name.startswith("shards/"))
    assert len(sizes) == 4
    out = tmp_path / "out"
    for done, limit in ((0, sizes[0] - 1), (1, sizes[1] - 1), (3, sizes[3] - 1)):
        line = score(out, file_bytes=limit).refused(
            1, out, "cannot write", "What was committed before is intact"
        )
        assert "too large" in line
        # Nothing but whole files, and nothing half-written.
        assert all(expected[name] == data for name, data in snapshot(out).items())
        if done:
            assert len(opd_store.open(out)) == 5 * done
            assert opd_store.verify(out).ok
        else:
            assert not (out / "manifests").exists()
    score(out).ok()
    assert cache_files(out) == expected


@pytest.mark.parametrize("what", ["checkpoint", "model", "metrics"])
def test_a_full_disk_while_training(train, tmp_path, what):
    out = tmp_path / "out"
    moment = train.events * 2 // 3
    assert train.run(out, kill_at=moment).killed
    (checkpoint,) = out.glob("step-*")
    before = snapshot(checkpoint)
    sizes = {name: len(data) for name, data in before.items()}
    assert sizes["rank-00000.safetensors"] > 3 * 10_000
    limit = {
        "checkpoint": sizes["rank-00000.safetensors"] - 1,
        "model": sizes["rank-00000.safetensors"] // 4,
        "metrics": (out / "metrics.jsonl").stat().st_size + 1,
    }[what]
    train.run(out, file_bytes=limit).refused(1, out, "cannot write", "Earlier checkpoints are intact")
    assert snapshot(checkpoint) == before
    assert [path.name for path in out.glob("step-*")] == [checkpoint.name]
    assert not (out / "final").exists()
    assert not list(out.glob(".*.partial"))
    train.run(out).ok()
    assert finished(out) == train.expected
