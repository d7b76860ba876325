"""From offline to live: what each setting yields, and going on exactly after a kill at any point."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from train.tiny_models import EOS, VOCAB, loaded, random_rollouts, save_tiny, scored_cache

import opd_store
from opd_store import InvalidArgumentError, MismatchError, SamplerInfo
from opd_train import (
    CacheStream,
    CorrectionConfig,
    DistillConfig,
    LiveSource,
    LoraConfig,
    LossConfig,
    Objective,
    Prompt,
    Trainer,
    load_causal_lm,
)
from opd_train.training.monitors import DriftConfig
from opd_train.training.refresh import RefreshConfig, RefreshingSource, StreamConfig

SAMPLER = SamplerInfo(max_new_tokens=6, seed=5, stop_token_ids=(EOS,))
PROMPTS = [Prompt(ids=np.array([7 + i, 9], np.uint32), sample_id=f"p{i}") for i in range(5)]
IN_ORDER = StreamConfig(shuffle="none", batch_rollouts=4, workers=0)
LIVE = RefreshConfig(rollouts=4, every=1)


@pytest.fixture
def student(models):
    """Trained in place by some tests."""
    return load_causal_lm(models["llama"])


@pytest.fixture(scope="module")
def start(teacher, tmp_path_factory):
    return scored_cache(
        tmp_path_factory.mktemp("refresh") / "start", teacher, random_rollouts(12, seed=2), topk=4
    )


def source(student, teacher, path, config=LIVE, *, start=None, stream=IN_ORDER, prompts=PROMPTS, **options):
    return RefreshingSource(
        student,
        teacher,
        prompts,
        SAMPLER,
        path,
        config,
        start=start,
        stream=stream,
        **({"topk": 4} | options),
    )


def hashes(path):
    cache = opd_store.open(path)
    return [cache.row_hash(row) for row in range(len(cache))]


def shrink(student):
    """Another student than before, as a step of training makes one."""
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(0.9)


def assert_equal(found, expected, *, without=()):
    names = expected.tensors().keys() - {*without}
    assert names <= found.tensors().keys()
    for name in names:
        assert torch.equal(found.tensors()[name], expected.tensors()[name]), name


def test_every_step_is_live_distillation(student, teacher, tmp_path):
    live = LiveSource(student, teacher, PROMPTS, SAMPLER, batch_rollouts=4, topk=4)
    fresh = source(student, teacher, tmp_path / "own")
    for step in range(5):
        batch, expected = fresh.next_batch(), live.next_batch()
        # All but where the rollouts are kept.
        assert_equal(batch, expected, without=("row_ids",))
        assert batch.row_ids.tolist() == list(range(4 * step, 4 * step + 4))
        assert batch.policy_version.tolist() == [step] * 4
        shrink(student)
        fresh.observe({})
    own = opd_store.open(tmp_path / "own")
    assert own.version == fresh.n_refreshes == 5
    assert own.column("policy_version").to_pylist() == [step for step in range(5) for _ in range(4)]


def test_never_is_a_plain_stream(student, teacher, tmp_path, start):
    stream = StreamConfig(batch_rollouts=3, seed=8, workers=0)
    offline = source(
        student, teacher, tmp_path / "own", RefreshConfig(rollouts=4), start=start, stream=stream
    )
    plain = CacheStream(start, batch_rollouts=3, seed=8, epochs=None, vocab_size=VOCAB)
    for _ in range(9):
        batch = offline.next_batch()
        assert_equal(batch, plain.next_batch())
        assert batch.policy_version.tolist() == [0] * 3
        offline.observe({"ess": 0.0})
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1, [{0}, {0}, {2}, {2}, {4}, {4}]),
        (2, [{0}, {0}, {0, 2}, {0, 2}, {2, 4}, {2, 4}]),
        (9, [{0}, {0}, {0, 2}, {0, 2}, {0, 2, 4}, {0, 2, 4}]),
    ],
)
def test_how_many_versions_are_streamed(student, teacher, tmp_path, start, keep, expected):
    config = RefreshConfig(rollouts=4, every=2, keep=keep)
    made = source(student, teacher, tmp_path / "own", config, start=start, stream=StreamConfig(workers=0))
    for versions in expected:
        batch = made.next_batch()
        found = batch.policy_version.tolist()
        own = [
            row
            for row, source_id in zip(batch.row_ids, batch.source_ids, strict=True)
            if source_id or keep == 1
        ]
        assert set(found) == versions
        # An epoch in one batch: whole versions, each rollout once.
        assert [found.count(version) for version in sorted(versions)] == [
            4 if version else 12 for version in sorted(versions)
        ]
        assert len({int(row) for row in own}) == len(own)
        made.observe({})


def test_drift_asks_for_new_rollouts(student, teacher, tmp_path, start):
    config = RefreshConfig(rollouts=4, on_drift=True, drift=DriftConfig(smooth_steps=2))
    made = source(student, teacher, tmp_path / "own", config, start=start)
    found = []
    for ess in (0.9, 0.9, 0.3, 0.3, 0.9, 0.1, 0.9, 0.9):
        found += sorted(set(made.next_batch().policy_version.tolist()))
        made.observe({"ess": ess})
    # (0.9 + 0.3) / 2 is no drift; after a refresh two new steps are needed.
    assert found == [0, 0, 0, 0, 4, 4, 4, 4]
    assert made.n_refreshes == 1
    found = []
    for _ in range(4):
        found += sorted(set(made.next_batch().policy_version.tolist()))
        made.observe({"ess": 0.1})
    assert found == [4, 4, 10, 10]


def test_a_prompt_that_comes_again_is_another_draw(student, teacher, tmp_path):
    greedy = dataclasses.replace(SAMPLER, temperature=0.0)
    made = RefreshingSource(
        student, teacher, PROMPTS, greedy, tmp_path / "own", RefreshConfig(rollouts=10, every=1), topk=4
    )
    for _ in range(2):
        made.next_batch()
        made.observe({})
    assert len(hashes(tmp_path / "own")) == 20
    assert len(set(hashes(tmp_path / "own"))) == 5


CONFIG = RefreshConfig(rollouts=6, every=2, keep=2, on_drift=True, drift=DriftConfig(smooth_steps=3))
ESS = [0.9, 0.9, 0.2, 0.2, 0.2, 0.9, 0.9, 0.2, 0.9]


@pytest.mark.parametrize("saved", range(0, 9, 2))
@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_run_killed_and_resumed_repeats_the_same_batches(models, teacher, tmp_path, start, saved, lost):
    """State is saved after `saved` steps; `lost` more are made, with their commits, before the kill."""
    stream = StreamConfig(batch_rollouts=4, seed=1, workers=saved % 4)

    def run(made, student, first, last):
        found = []
        for step in range(first, last):
            found.append(made.next_batch())
            shrink(student)
            made.observe({"ess": ESS[step]})
        return found

    def student_after(steps):
        student = load_causal_lm(models["llama"])
        for _ in range(steps):
            shrink(student)
        return student

    student = student_after(0)
    expected = run(
        source(student, teacher, tmp_path / "whole", CONFIG, start=start, stream=stream), student, 0, 9
    )
    student = student_after(0)
    first = source(student, teacher, tmp_path / "cut", CONFIG, start=start, stream=stream)
    run(first, student, 0, saved)
    state = json.loads(json.dumps(first.state_dict()))
    run(first, student, saved, min(9, saved + lost))
    first.close()
    student = student_after(saved)
    resumed = source(student, teacher, tmp_path / "cut", CONFIG, start=start, stream=stream)
    resumed.load_state_dict(state)
    for found, batch in zip(run(resumed, student, saved, 9), expected[saved:], strict=True):
        assert_equal(found, batch)
    resumed.close()
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    assert opd_store.open(tmp_path / "cut").version == opd_store.open(tmp_path / "whole").version


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=3, alpha=6)], ids=["all", "lora"])
def test_in_the_trainer_a_killed_run_ends_bit_for_bit_the_same(models, teacher, tmp_path, start, lora):
    loss = LossConfig(objective=Objective.FORWARD_KL, correction=CorrectionConfig(kind="token_tis", cap=5.0))
    config = DistillConfig(loss=loss, steps=7, lr=1e-2, save_every=2, lora=lora)
    refresh = RefreshConfig(rollouts=6, every=3)

    class Stop(Exception):
        pass

    def run(out, stop=None):
        student = load_causal_lm(models["llama"])
        made = source(student, teacher, out / "own", refresh, start=start)

        def on_step(step, metrics):
            ratios[step] = metrics["ratio_mean"], metrics["ess"]
            if step == stop:
                raise Stop

        trainer = Trainer(student, made, config, out=out / "run", on_step=on_step)
        trainer.run()
        return trainer.student.model.state_dict()

    ratios = {}
    expected = run(tmp_path / "whole")
    # What was sampled is the student's as it was then, adapters included.
    assert [ratios[step] for step in (4, 7)] == [pytest.approx((1, 1), abs=1e-4)] * 2
    assert ratios[6] != pytest.approx((1, 1), abs=1e-2)
    for stop in (4, 5):
        with pytest.raises(Stop):
            run(tmp_path / "cut", stop)
    found = run(tmp_path / "cut")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert hashes(tmp_path / "cut/own") == hashes(tmp_path / "whole/own")
    assert opd_store.open(tmp_path / "cut/own").column("policy_version").to_pylist() == [3] * 6 + [6] * 6


def test_what_somebody_else_put_there_is_refused(student, teacher, tmp_path):
    made = source(student, teacher, tmp_path / "own")
    made.next_batch()
    state = made.state_dict()
    with opd_store.append(tmp_path / "own") as writer:
        stranger = dataclasses.replace(
            opd_store.open(tmp_path / "own")[0], sample_id="stranger", policy_version=9
        )
        writer.append(stranger)
    made.observe({})
    with pytest.raises(MismatchError, match="not its own"):
        made.next_batch()
    # Another run in the same place, at its first step.
    other = source(student, teacher, tmp_path / "own", dataclasses.replace(LIVE, rollouts=3))
    with pytest.raises(MismatchError, match="not its own"):
        other.next_batch()
    with pytest.raises(MismatchError, match="identity"):
        other.load_state_dict(state)
    with pytest.raises(MismatchError, match="one process"):
        made.load_state_dict([state, state])


def test_what_does_not_belong_together_is_refused(student, teacher, tmp_path, start, models):
    path = tmp_path / "own"
    with pytest.raises(MismatchError, match="scored by the same teacher"):
        source(student, loaded(models["llama"]), path, start=start)
    with pytest.raises(MismatchError, match="topk"):
        source(student, teacher, path, start=start, topk=3)
    with pytest.raises(InvalidArgumentError, match="expected a cache"):
        source(student, teacher, path, RefreshConfig(rollouts=4, on_drift=True))
    with pytest.raises(InvalidArgumentError, match="none to sample from"):
        source(student, teacher, path, prompts=[])
    with pytest.raises(MismatchError, match="vocab_size"):
        source(load_causal_lm(save_tiny(tmp_path / "m", vocab_size=VOCAB + 2)), teacher, path)
    for field in ("rollouts", "every", "keep"):
        with pytest.raises(InvalidArgumentError, match=field):
            RefreshConfig(**({"rollouts": 1} | {field: -1}))
