"""When a run cannot go on: it says why, leaves what is needed to look into it, and harms nothing."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import subprocess
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch
from train.training import CONFIG, Stop, assert_equal, make_cache, run, trainer, weights

from opd_store import FormatError, InvalidArgumentError, MismatchError, OpdError
from opd_train import CacheStream, CorrectionConfig, CorrectionKind, LossConfig, Objective
from opd_train.objective.batch_loss import distill_loss
from opd_train.training.forward import response_hidden


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("failures") / "cache", teacher)


def with_ppo(config, **changes):
    """The config with the one correction that has a proximal policy."""
    correction = CorrectionConfig(kind=CorrectionKind.PPO)
    loss = LossConfig(objective=Objective.LIGHTNING, correction=correction)
    return dataclasses.replace(config, loss=loss, **changes)


def poisoned(made, number):
    """The trainer, with a NaN in what the teacher said in the `number`-th batch that it draws."""
    draw, given = made._source.next_batch, itertools.count(1)

    def next_batch():
        batch = draw()
        if next(given) == number:
            batch.topk_logprob[0, 0] = batch.teacher_logprob[0] = torch.nan
        return batch

    made._source.next_batch = next_batch
    return made


@pytest.mark.parametrize("every", [1, 2])
def test_a_failed_step_is_recorded_and_can_be_replayed(cache, models, tmp_path, every):
    # PPO leaves the token out of the loss, though not out of the gradient.
    config, what = (CONFIG, "loss") if every == 1 else (with_ppo(CONFIG, proximal_every=2), "gradient")
    seen = []
    # Five whole steps of two batches; the sixth step's second is bad.
    made = poisoned(trainer(cache, models["gpt2"], config, tmp_path / "out"), 12)
    draw = made._source.next_batch
    made._source.next_batch = lambda: seen.append(draw()) or seen[-1]
    with pytest.raises(OpdError, match=rf"step 6: {what} is nan .*replay-step-00000006\.json") as caught:
        made.run()
    assert made.step == 5
    failed = seen[10:12]
    rows = [row for batch in failed for row in batch.row_ids.tolist()]
    assert str(rows) in str(caught.value)
    path = tmp_path / "out/replay-step-00000006.json"
    report = json.loads(path.read_text())
    assert (report["step"], report["reason"]) == (6, f"{what} is nan")
    assert report["checkpoint"] == "step-00000004"
    assert report["sums"]["log_gap"] == "nan"
    assert report["sums"]["n"] > 0
    assert report["provenance"]["config"]["seed"] == CONFIG.seed
    (rank,) = report["ranks"]
    assert [rollout["row"] for rollout in rank["rollouts"]] == rows
    assert [cache.find(bytes.fromhex(rollout["rollout_hash"])) for rollout in rank["rollouts"]] == rows

    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*"))
    # From the checkpoint of step 4 on.
    again = poisoned(trainer(cache, models["gpt2"], config, tmp_path / "out"), 4)
    batches = again.replay(path)
    assert again.step == 5
    assert_equal(weights(again.student), weights(made.student))
    for batch, expected in zip(batches, failed, strict=True):
        assert torch.equal(batch.row_ids, expected.row_ids)
    finite = []
    for batch in batches:
        hidden = response_hidden(again.student, batch).detach().requires_grad_()
        result = distill_loss(config.loss, hidden=hidden, lm_head=again.student.logits, batch=batch)
        result.loss.backward()
        finite.append(bool(torch.isfinite(result.loss) and torch.isfinite(hidden.grad).all()))
    assert finite == [True, False]
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*")) == before


def test_the_trainer_that_failed_replays_without_what_it_drew_ahead(cache, models, tmp_path):
    config = with_ppo(CONFIG, proximal_every=2, save_every=2)
    # The first batch of step 5, with which those of step 6 are drawn.
    made = poisoned(trainer(cache, models["llama"], config, tmp_path / "out"), 9)
    with pytest.raises(OpdError, match="step 5: gradient is nan"):
        made.run()
    path = tmp_path / "out/replay-step-00000005.json"
    found = [batch.row_ids.tolist() for batch in made.replay(path)]
    rollouts = json.loads(path.read_text())["ranks"][0]["rollouts"]
    assert list(itertools.chain(*found)) == [rollout["row"] for rollout in rollouts]


def test_a_replay_of_another_run_is_refused(cache, models, tmp_path):
    made = poisoned(trainer(cache, models["llama"], out=tmp_path / "out"), 1)
    with pytest.raises(OpdError, match="step 1: loss is nan"):
        made.run()
    path = tmp_path / "out/replay-step-00000001.json"
    other = dataclasses.replace(CONFIG, lr=1.0)
    with pytest.raises(MismatchError, match=r"config\.lr"):
        trainer(cache, models["llama"], other, tmp_path / "out").replay(path)
    content = json.loads(path.read_text())
    content["ranks"][0]["source"]["batches"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="source batches was 3 before the step, and is 0 now"):
        trainer(cache, models["llama"], out=tmp_path / "out").replay(path)
    content["ranks"] *= 2
    path.write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="a run with 2 ranks, this one has 1; start as many"):
        trainer(cache, models["llama"], out=tmp_path / "out").replay(path)
    for text in ("{}", '{"version": 9}', '{"version": 1}', "[", "7"):
        path.write_text(text)
        with pytest.raises(FormatError, match="replay"):
            trainer(cache, models["llama"]).replay(path)


def test_out_of_memory_says_which_settings_help(cache, models, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand much more")

    monkeypatch.setattr("opd_train.training.passes.distill_loss", full)
    with pytest.raises(OpdError, match="step 1: out of memory") as caught:
        run(cache, models["llama"], out=tmp_path / "out")
    for part in ("head_chunk (is 7", "batch_tokens (is 60", "accumulate (is 2", "off, turn it on", "2 GiB"):
        assert part in str(caught.value)
    assert "much more" not in str(caught.value)


def test_settings_that_only_trade_time_for_memory_may_change(cache, models, tmp_path):
    with pytest.raises(Stop):
        run(cache, models["llama"], out=tmp_path / "out", stop=3)
    config = dataclasses.replace(CONFIG, gradient_checkpointing=True, head_chunk=3, save_every=0)
    made = trainer(cache, models["llama"], config, tmp_path / "out")
    made.run()
    assert made.step == CONFIG.steps


HOLD = """
import sys, time
from pathlib import Path
from opd_train.training.distributed import World
from opd_train.training.run_directory import locked
with locked(Path(sys.argv[1]), World()):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_directory(cache, models, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(OpdError, match="out: another process trains there"):
                run(cache, models["llama"], out=tmp_path / "out")
        finally:
            other.kill()
        other.wait()
    # The system took the lock back, and a run lets go of it.
    for stop in (1, 2, None):
        made = trainer(cache, models["llama"], out=tmp_path / "out", stop=stop)
        if stop:
            with pytest.raises(Stop):
                made.run()
        else:
            made.run()


def test_a_file_system_without_locks(cache, models, tmp_path, monkeypatch):
    import errno

    import opd_train.training.run_directory as module

    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", none)
    config = dataclasses.replace(CONFIG, steps=1, save_every=0)
    with pytest.warns(UserWarning, match="this file system has no locks"):
        run(cache, models["llama"], config, tmp_path / "out")


def test_the_source_hears_of_every_step(cache, models, tmp_path):
    class Watched:
        """A cache stream that was told `seen`; what it saw is part of its state."""

        def __init__(self, stream):
            self._stream, self.seen = stream, []
            self.next_batch, self.identity = stream.next_batch, stream.identity

        def observe(self, metrics):
            self.seen.append(metrics["loss"])

        def state_dict(self):
            return {"stream": self._stream.state_dict(), "seen": list(self.seen)}

        def load_state_dict(self, state):
            self._stream.load_state_dict(state["stream"])
            self.seen = state["seen"]

    def source(_):
        return Watched(trainer(cache, models["llama"])._source)

    log = []
    made = trainer(cache, models["llama"], source=source, out=tmp_path / "whole", log=log)
    made.run()
    assert made._source.seen == [metrics["loss"] for _, metrics in log]
    with pytest.raises(Stop):
        run(cache, models["llama"], source=source, out=tmp_path / "out", stop=5)
    again = trainer(cache, models["llama"], source=source, out=tmp_path / "out")
    again.run()
    assert again._source.seen == made._source.seen


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("stop", [None, 3])
def test_a_run_leaves_no_threads_and_no_cycle(cache, models, every, stop):
    def source(lm):
        return CacheStream(cache, batch_tokens=60, epochs=None, workers=2)

    config = with_ppo(CONFIG, steps=4, proximal_every=every, save_every=0)
    made = trainer(cache, models["llama"], config, source=source, stop=stop)
    with pytest.raises(Stop) if stop else nullcontext():
        made.run()
    assert made._source._ahead is None
    left = weakref.ref(made)
    gc.disable()  # Reference counts alone have to do it.
    try:
        del made
        assert left() is None
    finally:
        gc.enable()


def test_waiting_for_data_is_measured(cache, models):
    log = []
    run(cache, models["llama"], log=log)
    assert all(0 <= metrics["data_share"] < 1 for _, metrics in log)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_proximal_log_probs_are_those_at_the_start_of_a_block(cache, models, monkeypatch, kind):
    # GPT-2 has dropout, which is no part of the policy.
    import opd_train.training.passes as module

    seen = []

    def spy(config, **kwargs):
        assert made.student.model.training
        seen.append((made.step, kwargs["proximal_logprob"], kwargs["batch"]))
        return distill_loss(config, **kwargs)

    monkeypatch.setattr(module, "distill_loss", spy)
    config = with_ppo(CONFIG, steps=5, proximal_every=2, save_every=0, lr=1e-2)
    made = trainer(cache, models[kind], config)
    expected = {0: weights(made.student)}
    made._on_step = lambda step, _: expected.setdefault(step, weights(made.student))
    made.run()
    assert [step for step, _, _ in seen] == [step for step in range(5) for _ in range(2)]
    lm = trainer(cache, models[kind]).student
    for step, proximal, batch in seen:
        lm.model.load_state_dict(expected[step - step % 2])
        with torch.no_grad():
            logits = lm.logits(response_hidden(lm, batch))
        own = logits.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
        torch.testing.assert_close(proximal, own, rtol=0, atol=1e-5)
        assert not proximal.requires_grad


def test_a_run_with_a_proximal_policy_resumes_bit_for_bit(cache, models, tmp_path):
    config = with_ppo(CONFIG, steps=7, proximal_every=3, save_every=3)
    whole, _ = run(cache, models["gpt2"], config)
    with pytest.raises(Stop):
        run(cache, models["gpt2"], config, tmp_path / "out", stop=5)
    resumed, _ = run(cache, models["gpt2"], config, tmp_path / "out")
    assert_equal(resumed, whole)
    with pytest.raises(InvalidArgumentError, match="save_every: expected a multiple of proximal_every 3"):
        with_ppo(CONFIG, proximal_every=3)
    with pytest.raises(InvalidArgumentError, match=r"proximal_every: expected 1, since .* 'token_tis'"):
        dataclasses.replace(CONFIG, proximal_every=2)


def test_autocast_trains_close_to_float32(cache, models):
    config = dataclasses.replace(CONFIG, steps=3, save_every=0, lr=1e-3)
    plain, _ = run(cache, models["llama"], config)
    half, metrics = run(cache, models["llama"], dataclasses.replace(config, autocast=True))
    assert all(tensor.dtype == torch.float32 for tensor in half.values())
    start = weights(trainer(cache, models["llama"]).student)
    moved = [torch.sign(half[name] - start[name]) == torch.sign(plain[name] - start[name]) for name in start]
    assert torch.cat([same.flatten() for same in moved]).float().mean() > 0.9
    assert metrics["loss"] > 0
