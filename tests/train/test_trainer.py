"""The training loop: one denominator, exact resumption, and what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train.tiny_models import ARCHITECTURES, EOS, loaded, random_rollouts, save_tiny, scored_cache
from train.training import (
    CONFIG,
    TIMINGS,
    TIS,
    Stop,
    assert_close,
    assert_equal,
    make_cache,
    metrics_of,
    run,
    trainer,
    weights,
)

from opd_store import IntegrityError, InvalidArgumentError, MismatchError, OpdError, SamplerInfo, StorageError
from opd_train import (
    CacheStream,
    CorrectionConfig,
    CorrectionKind,
    LiveSource,
    LossConfig,
    Objective,
    Prompt,
    load_causal_lm,
)
from opd_train.model_identity import read_provenance
from opd_train.training.checkpoint import read_state
from opd_train.training.export import save_model
from opd_train.training.monitors import DriftConfig, DriftMonitor
from opd_train.training.run_directory import append_metrics, latest_checkpoint, read_metrics
from opd_train.training.trainer import learning_rate


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("trainer") / "cache", teacher)


@pytest.mark.parametrize("objective", [objective for objective in Objective if not objective.needs_draws])
def test_it_learns(cache, models, objective):
    log = []
    config = dataclasses.replace(
        CONFIG,
        loss=LossConfig(objective=objective, clip=1e9),
        steps=25,
        lr=1e-2,
        save_every=0,
    )
    run(cache, models["llama"], config, log=log, batch_tokens=10_000)
    name = {"lightning": "log_gap"}.get(objective.value, "loss")
    first, last = abs(log[0][1][name]), abs(log[-1][1][name])
    assert last < 0.7 * first


@pytest.mark.parametrize("grad_clip", [0.0, 0.5])
@pytest.mark.parametrize("correction", [CorrectionConfig(), TIS], ids=["none", "token_tis"])
def test_accumulating_four_batches_equals_one_large_batch(cache, models, correction, grad_clip):
    config = dataclasses.replace(
        CONFIG,
        loss=dataclasses.replace(CONFIG.loss, correction=correction),
        steps=3,
        accumulate=4,
        save_every=0,
        grad_clip=grad_clip,
    )
    large = dataclasses.replace(config, accumulate=1)
    # Batches of different size: a mean of means would show.
    small, log = [], []
    parts, _ = run(cache, models["llama"], config, batch_rollouts=2, batch_tokens=10_000, log=small)
    whole, _ = run(cache, models["llama"], large, batch_rollouts=8, batch_tokens=10_000, log=log)
    # Adam turns the rounding of a gradient near zero into a part of a whole step, which is 3e-3.
    assert_close(parts, whole, 3e-5)
    for (_, left), (_, right) in zip(small, log, strict=True):
        for name in set(left) - TIMINGS:
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), name


def test_the_gradient_is_the_mean_over_counted_tokens(cache, models):
    # One step of plain gradient descent in disguise: the norm that is logged is that of the mean loss.
    from opd_train.objective.batch_loss import distill_loss
    from opd_train.training.forward import response_hidden

    config = dataclasses.replace(CONFIG, steps=1, accumulate=2, grad_clip=0.0, save_every=0)
    _, metrics = run(cache, models["llama"], config)
    lm = load_causal_lm(models["llama"])
    lm.model.train()
    stream = CacheStream(cache, batch_tokens=60, seed=0)
    losses = []
    for _ in range(2):
        batch = stream.next_batch()
        hidden = response_hidden(lm, batch)
        losses.append(distill_loss(config.loss, hidden=hidden, lm_head=lm.logits, batch=batch))
    (sum(loss.loss for loss in losses) / sum(loss.n_kept for loss in losses)).backward()
    norm = torch.stack([p.grad.norm() for p in lm.model.parameters()]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_gradient_checkpointing_changes_nothing(cache, models):
    config = dataclasses.replace(CONFIG, steps=3, save_every=0)
    plain, _ = run(cache, models["llama"], config)
    saved, _ = run(cache, models["llama"], dataclasses.replace(config, gradient_checkpointing=True))
    assert_close(plain, saved, 1e-7)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "cohere", "granite"])
def test_every_architecture_trains_and_resumes(cache, models, tmp_path, kind):
    # GPT-2 with its dropout on, whose random numbers are part of the state.
    config = dataclasses.replace(CONFIG, steps=4, gradient_checkpointing=kind == "gemma2")
    whole, _ = run(cache, models[kind], config, tmp_path / "whole")
    assert any(not torch.equal(whole[name], tensor) for name, tensor in weights(loaded(models[kind])).items())
    with pytest.raises(Stop):
        run(cache, models[kind], config, tmp_path / "cut", stop=3)
    resumed, _ = run(cache, models[kind], config, tmp_path / "cut")
    assert_equal(resumed, whole)


@pytest.fixture(scope="module")
def uninterrupted(cache, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    found, _ = run(cache, models["llama"], CONFIG, out)
    return out, found


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8, 9])
def test_a_run_cut_after_any_step_ends_bit_for_bit_the_same(cache, models, tmp_path, uninterrupted, stop):
    with pytest.raises(Stop):
        run(cache, models["llama"], CONFIG, tmp_path / "out", stop=stop)
    log = []
    resumed, _ = run(cache, models["llama"], CONFIG, tmp_path / "out", log=log)
    expected_out, expected = uninterrupted
    assert_equal(resumed, expected)
    # The checkpoint of step n is written after step n was reported.
    assert log[0][0] == (stop - 1) // 2 * 2 + 1
    final = (tmp_path / "out/final/model.safetensors").read_bytes()
    assert final == (expected_out / "final/model.safetensors").read_bytes()
    found = metrics_of(tmp_path / "out")
    assert [row["step"] for row in found] == list(range(1, 10))
    assert found == metrics_of(expected_out)


def test_cut_again_and_again(cache, models, tmp_path, uninterrupted):
    for stop in (3, 4, 5, 7):
        with pytest.raises(Stop):
            run(cache, models["llama"], CONFIG, tmp_path / "out", stop=stop)
    resumed, _ = run(cache, models["llama"], CONFIG, tmp_path / "out")
    assert_equal(resumed, uninterrupted[1])


def test_a_line_cut_short_by_a_kill_is_dropped(cache, models, tmp_path, uninterrupted):
    with pytest.raises(Stop):
        run(cache, models["llama"], CONFIG, tmp_path / "out", stop=4)
    with (tmp_path / "out/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run(cache, models["llama"], CONFIG, tmp_path / "out")
    assert metrics_of(tmp_path / "out") == metrics_of(uninterrupted[0])


def test_a_finished_run_does_nothing(cache, models, uninterrupted):
    out, _ = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    made = trainer(cache, models["llama"], out=out)
    assert made.run() == {}
    assert made.step == CONFIG.steps
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_what_is_written(cache, models, uninterrupted):
    out, found = uninterrupted
    assert {path.name for path in out.iterdir()} == {".lock", "final", "metrics.jsonl", "step-00000008"}
    # Nothing that runs code when it is opened.
    assert (out / ".lock").read_bytes() == b""
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".jinja", ".txt"}
    for path in out.rglob("*"):
        if path.is_file():
            assert path.read_bytes()[:1] != b"\x80", "a pickle"
            assert path.read_bytes()[:2] != b"PK", "a zip, which is how torch.save packs pickles"
    stored = load_file(out / "final/model.safetensors")
    assert all(torch.equal(stored[name], found[name]) for name in stored)
    lm = load_causal_lm(out / "final")
    assert_equal(weights(lm), found)
    assert lm.tokenizer_fingerprint == loaded(models["llama"]).tokenizer_fingerprint
    assert lm.provenance["config"]["loss"]["objective"] == "forward_kl"
    assert lm.provenance["student"]["weights_digest"] == loaded(models["llama"]).info.weights_digest
    assert lm.provenance["source"]["cache"] == cache.digest


@pytest.fixture(scope="module")
def cut(cache, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("cut") / "out"
    with pytest.raises(Stop):
        run(cache, models["llama"], CONFIG, out, stop=5)
    return out


@pytest.mark.parametrize(
    ("field", "there", "here", "change"),
    [
        ("config.lr", "0.003", "0.004", {"config": dataclasses.replace(CONFIG, lr=4e-3)}),
        ("config.steps", "9", "10", {"config": dataclasses.replace(CONFIG, steps=10)}),
        ("config.loss.correction.cap", "2.0", "3.0", {"config": dataclasses.replace(
            CONFIG, loss=dataclasses.replace(CONFIG.loss, correction=dataclasses.replace(TIS, cap=3.0)))}),
        ("source.batch_tokens", "60", "61", {"batch_tokens": 61}),
        ("source.ranks", "None", "3", {"ranks": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_checkpoint_of_another_run_is_refused(cache, models, cut, field, there, here, change):
    before = sorted(cut.rglob("*"))
    with pytest.raises(MismatchError) as caught:
        run(cache, models["llama"], **({"config": CONFIG} | change), out=cut)
    assert caught.value.field == field
    assert (caught.value.found, caught.value.expected) == (there, here)
    assert f"{field} is {there} there, {here} here" in str(caught.value)
    assert sorted(cut.rglob("*")) == before


def test_the_checkpoint_of_another_student_or_cache_is_refused(cache, models, cut, teacher, tmp_path):
    other = save_tiny(tmp_path / "llama", seed=9)
    with pytest.raises(MismatchError, match=r"student\.weights_digest is 'sha256:"):
        run(cache, other, out=cut)
    cache = scored_cache(tmp_path / "cache", teacher, random_rollouts(24, seed=12), topk=6)
    with pytest.raises(MismatchError, match=f"source.cache is .* there, '{cache.digest}' here"):
        run(cache, models["llama"], out=cut)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_resumes_exactly(cache, models, tmp_path, kind):
    config = dataclasses.replace(CONFIG, steps=4, save_every=2)
    expected, _ = run(cache, models[kind], config)
    with pytest.raises(Stop):
        run(cache, models[kind], config, out=tmp_path / "out", stop=3)
    found, _ = run(cache, models[kind], config, out=tmp_path / "out")
    assert_equal(found, expected)


def test_a_finished_run_gives_the_trained_student_and_not_the_one_it_started_from(
    cache, models, uninterrupted
):
    out, trained = uninterrupted[0], uninterrupted[1]
    again, metrics = run(cache, models["llama"], out=out)
    assert metrics == {}
    assert_equal(again, trained)


def test_how_often_a_run_is_saved_may_change(cache, models, cut, tmp_path, uninterrupted):
    shutil.copytree(cut, tmp_path / "out")
    config = dataclasses.replace(CONFIG, save_every=0)
    resumed, _ = run(cache, models["llama"], config, out=tmp_path / "out")
    assert_equal(resumed, uninterrupted[1])


def test_a_run_goes_on_at_another_world_size(cache, models, cut, tmp_path):
    for rank in range(2):
        out = tmp_path / str(rank)
        shutil.copytree(cut, out)
        made = trainer(cache, models["llama"], out=out, rank=rank, world_size=2)
        made.run()
        assert made.step == CONFIG.steps
        state = made._source.state_dict()
        assert state["world_size"] == 2
        # What the one rank before was given is not given again.
        assert state["stages"] or state["epoch"] > 0
    with pytest.raises(MismatchError, match=r"source\.seed is 0 there, 1 here"):
        run(cache, models["llama"], out=cut, seed=1)


@pytest.mark.parametrize(
    "change",
    [
        {"grad_clip": float("inf")},
        {"lr": float("nan")},
        {"final_lr_share": float("nan")},
        {"final_lr_share": 1.5},
        {"betas": (0.9, 2.0)},
        {"head_chunk": 0},
    ],
    ids=str,
)
def test_settings_that_are_no_numbers_are_refused_before_the_first_step(change):
    with pytest.raises(InvalidArgumentError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change)
    with pytest.raises(InvalidArgumentError, match="cap"):
        CorrectionConfig(kind=CorrectionKind.TOKEN_TIS, cap=float("inf"))


def test_a_final_model_of_another_run_is_refused(cache, models, uninterrupted):
    with pytest.raises(MismatchError, match=r"config\.lr"):
        run(cache, models["llama"], dataclasses.replace(CONFIG, lr=1.0), uninterrupted[0])


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "trainer.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_a_damaged_checkpoint_is_refused(cache, models, cut, tmp_path, name, damage):
    out = tmp_path / "out"
    shutil.copytree(cut, out)
    path = out / "step-00000004" / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif name == "trainer.json":
        path.write_text('{"version": 99}')
    else:
        path.write_bytes((models["gpt2"] / "model.safetensors").read_bytes())
    with pytest.raises(IntegrityError, match="step-00000004"):
        run(cache, models["llama"], out=out)


def test_every_flipped_bit_of_a_checkpoint_is_refused(cache, models, cut, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(cut, out)
    rng = random.Random(0)
    state = out / "step-00000004/trainer.json"
    content = state.read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        state.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"trainer\.json"):
            read_state(state.parent)
    state.write_bytes(content)
    tensors = state.with_name("rank-00000.safetensors")
    content = tensors.read_bytes()
    for at in (0, 9, len(content) // 3, len(content) - 1):
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.randrange(8)
        tensors.write_bytes(damaged)
        with pytest.raises(
            IntegrityError, match=r"step-00000004: cannot be read \(rank-00000\.safetensors has"
        ):
            run(cache, models["llama"], out=out)


def test_half_a_checkpoint_is_none(cache, models, cut, tmp_path, uninterrupted):
    out = tmp_path / "out"
    shutil.copytree(cut, out)
    # What a kill leaves while a checkpoint is written, and while an old one is deleted.
    shutil.copytree(out / "step-00000004", out / ".step-00000006.partial")
    (out / ".step-00000006.partial/rank-00000.safetensors").write_bytes(b"half")
    shutil.copytree(out / ".step-00000006.partial", out / ".step-00000005.partial")
    shutil.copytree(out / ".step-00000006.partial", out / ".final.partial")
    (out / "step-00000002").mkdir()
    assert latest_checkpoint(out) == out / "step-00000004"
    resumed, _ = run(cache, models["llama"], out=out)
    assert_equal(resumed, uninterrupted[1])
    assert {path.name for path in out.iterdir()} == {".lock", "final", "metrics.jsonl", "step-00000008"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_stop_the_run_and_name_the_rows(cache, models, tmp_path, bad):
    made = trainer(cache, models["llama"], out=tmp_path / "out")
    with torch.no_grad():
        made.student.model.model.layers[0].mlp.down_proj.weight[0, 0] = bad
    rows = []
    next_batch = made._source.next_batch

    def spy():
        batch = next_batch()
        rows.extend(batch.row_ids.tolist())
        return batch

    made._source.next_batch = spy
    before = weights(made.student)
    with pytest.raises(OpdError, match=r"step 1: .* on cache rows \[\d+, ") as caught:
        made.run()
    assert str(rows) in str(caught.value)
    for name, tensor in weights(made.student).items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), "no step was made"
    assert not (tmp_path / "out/final").exists()


def test_a_loss_that_is_not_finite_stops_the_run(cache, models, monkeypatch):
    def broken(*args, **kwargs):
        return kl(*args, **kwargs) * float("inf")

    import opd_train.objective.batch_loss as module

    kl = module.topk_forward_kl
    monkeypatch.setattr(module, "topk_forward_kl", broken)
    with pytest.raises(OpdError, match=r"step 1: loss is (inf|nan|-inf) on cache rows \["):
        run(cache, models["llama"])


def test_a_step_without_a_counted_token_changes_nothing(cache, models):
    config = dataclasses.replace(CONFIG, steps=4, accumulate=1, weight_decay=0.5, save_every=0)
    log, seen = [], []
    made = trainer(cache, models["llama"], config, log=log)
    draw = made._source.next_batch

    def next_batch():
        # Weight decay and, from the second step on, momentum would move the weights.
        seen.append(weights(made.student))
        batch = draw()
        masked = torch.zeros_like(batch.loss_mask)
        return dataclasses.replace(batch, loss_mask=masked) if len(seen) in (1, 3) else batch

    made._source.next_batch = next_batch
    made.run()
    after = [*seen[1:], weights(made.student)]
    assert [metrics["skipped"] for _, metrics in log] == [1, 0, 1, 0]
    assert [metrics["loss"] == metrics["grad_norm"] == 0 for _, metrics in log] == [True, False, True, False]
    for step, (left, right) in enumerate(zip(seen, after, strict=True)):
        same = all(torch.equal(left[name], right[name]) for name in left)
        assert same == (step in (0, 2)), step


def test_metrics_that_are_not_finite_are_null_in_the_file(tmp_path):
    row = {"step": 1, "loss": math.nan, "gap": -math.inf, "ess": 0.5, "alarms": [{"value": math.inf}]}
    append_metrics(tmp_path, row)
    text = (tmp_path / "metrics.jsonl").read_text()
    # NaN and Infinity are no JSON, though Python reads them.
    found = json.loads(text, parse_constant=pytest.fail)
    assert found == {"step": 1, "loss": None, "gap": None, "ess": 0.5, "alarms": [{"value": None}]}
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["loss"])
    assert read["ess"] == 0.5
    # As at the step itself, it raises the alarm.
    monitor = DriftMonitor(DriftConfig(smooth_steps=1))
    monitor.replay([read | {"ess": read["loss"]}])
    assert monitor.active == ("ess_min",)


def test_a_source_that_ends_early(cache, models):
    with pytest.raises(OpdError, match="the source has no more batches; give it more epochs"):
        run(cache, models["llama"], dataclasses.replace(CONFIG, steps=1000, save_every=0), epochs=1)


def live(models):
    prompts = [Prompt(ids=torch.tensor([7 + i, 9, 20]).numpy(), sample_id=f"p{i}") for i in range(5)]
    sampler = SamplerInfo(max_new_tokens=6, seed=5, stop_token_ids=(EOS,))
    teacher = loaded(models["teacher"])
    return lambda lm: LiveSource(lm, teacher, prompts, sampler, batch_rollouts=3, topk=6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_live_teacher_trains_and_resumes_bit_for_bit(cache, models, tmp_path, kind):
    config = dataclasses.replace(CONFIG, steps=5)
    whole, metrics = run(cache, models[kind], config, tmp_path / "whole", source=live(models))
    assert metrics["ratio_mean"] > 0
    for stop in (3, 5):
        with pytest.raises(Stop):
            run(cache, models[kind], config, tmp_path / f"cut{stop}", stop=stop, source=live(models))
        resumed, _ = run(cache, models[kind], config, tmp_path / f"cut{stop}", source=live(models))
        assert_equal(resumed, whole)


def test_live_batches_start_on_policy(cache, models):
    # The student without dropout is the policy that sampled, so the first step's ratios are one.
    log = []
    config = dataclasses.replace(CONFIG, steps=1, save_every=0)
    run(cache, models["llama"], config, source=live(models), log=log)
    assert log[0][1]["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert log[0][1]["ess"] == pytest.approx(1.0, abs=1e-4)


def test_a_full_disk_keeps_the_earlier_checkpoint(cache, models, tmp_path, monkeypatch, uninterrupted):
    import opd_train.training.checkpoint as module

    save_file, calls = module.safetensors.torch.save_file, []

    def full(tensors, path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, *args, **kwargs)

    monkeypatch.setattr(module.safetensors.torch, "save_file", full)
    with pytest.raises(
        StorageError, match=r"No space left on device.*Earlier checkpoints are intact"
    ) as caught:
        run(cache, models["llama"], out=tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "step-00000002", "metrics.jsonl"}
    monkeypatch.undo()
    resumed, _ = run(cache, models["llama"], out=tmp_path / "out")
    assert_equal(resumed, uninterrupted[1])


def test_a_model_that_cannot_be_put_in_place_leaves_the_one_there(models, tmp_path, monkeypatch):
    lm, target = loaded(models["llama"]), tmp_path / "model"
    save_model(lm, target, {"run": 1})
    rename = Path.rename

    def refused(self, other):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "no")
        return rename(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(StorageError, match="cannot write"):
            save_model(lm, target, {"run": 2})
    assert read_provenance(target) == {"run": 1}
    save_model(lm, target, {"run": 2})
    assert read_provenance(target) == {"run": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_as_tokenizers_reports_it(cache, models, tmp_path, monkeypatch):
    made = trainer(cache, models["llama"], out=tmp_path / "out")

    def full(*_: object, **__: object):
        raise Exception("No space left on device (os error 28)")  # noqa: TRY002

    monkeypatch.setattr(made.student.tokenizer, "save_pretrained", full)
    with pytest.raises(StorageError, match=r"final: cannot write: No space left"):
        made.run()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "metrics.jsonl", "step-00000008"}


def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(cache, models, tmp_path):
    (tmp_path / "file").write_text("mine")
    log = []
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(StorageError, match=str(out)):
            run(cache, models["llama"], out=out, log=log)
    assert log == []
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"accumulate": 0},
        {"grad_clip": -1.0},
        {"weight_decay": -0.1},
        {"warmup_steps": -1},
        {"save_every": -1},
        {"seed": -1},
        {"seed": 1 << 63},
    ],
    ids=str,
)
def test_settings_out_of_range(change):
    (name,) = change
    with pytest.raises(InvalidArgumentError, match=f"{name}: expected"):
        dataclasses.replace(CONFIG, **change)


def test_the_learning_rate_warms_up_and_decays():
    config = dataclasses.replace(CONFIG, lr=1.0, warmup_steps=4, steps=10, final_lr_share=0.2)
    found = [learning_rate(config, step) for step in range(10)]
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[4:] == pytest.approx([1.0 - 0.8 * i / 6 for i in range(6)])
    flat = dataclasses.replace(config, final_lr_share=1.0, warmup_steps=0)
    assert {learning_rate(flat, step) for step in range(10)} == {1.0}
