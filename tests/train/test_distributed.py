"""Two processes train what one process trains."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train.distributed_jobs import COMMAND, SCENARIOS, STEPS, Dealt, config_of
from train.tiny_models import save_tiny
from train.training import TIMINGS, Stop, make_cache, metrics_of, run, trainer

import opd_store
from opd_store import InvalidArgumentError
from opd_train.training.distributed import World, join_world

TESTS = Path(__file__).parents[1]
LOSS_TOLERANCE = 1e-5
"""Relative; measured: 1e-7 for the loss, 4e-7 for the norm of the gradient."""
WEIGHT_TOLERANCE = 2e-5
"""Absolute, of weights of order 0.3 after steps of 3e-3; measured: 2e-7. Adam makes a step of every rounding
of a gradient near zero."""


def torchrun(*args):
    """Two processes on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent, TESTS.parent / "tools")))
    return subprocess.Popen(
        [*command, *map(str, args)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    """What a process that succeeds prints."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    assert process.returncode == 0, out + err
    return out, err


@pytest.fixture(scope="module")
def root(models, teacher, tmp_path_factory):
    """Everything that two ranks did, and what they started from."""
    root = tmp_path_factory.mktemp("distributed")
    for kind in ("llama", "gemma2", "mixtral"):
        shutil.copytree(models[kind], root / kind)
    save_tiny(root / "tied", "llama", tie_word_embeddings=True)
    cache = make_cache(root / "cache", teacher)
    # A checkpoint of one rank, for two to go on from.
    config = dataclasses.replace(config_of("tied", 1), steps=4)
    with pytest.raises(Stop):
        run(cache, root / "tied", config, root / "from_one", stop=3)
    finished(torchrun(TESTS / "train" / "distributed_jobs.py", root))
    return root


@pytest.fixture(scope="module")
def found(root):
    return json.loads((root / "found.json").read_text())


def alone(root, name, out=None, **kwargs):
    cache = opd_store.open(root / "cache")
    model = root / name if (root / name).exists() else root / "llama"
    return run(cache, model, config_of(name, 1), out, source=lambda _: Dealt(cache), **kwargs)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_train_what_one_trains(root, found, name, tmp_path):
    log = []
    alone(root, name, tmp_path / "out", log=log)
    assert len(log) == len(found[name]) == STEPS
    for (step, one), (_, two) in zip(log, found[name], strict=True):
        assert one.keys() == two.keys()
        for metric in one.keys() - TIMINGS:
            expected = pytest.approx(one[metric], rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE)
            assert two[metric] == expected, f"step {step}, {metric}"
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        if file.startswith("adapter") and name != "lora":
            continue
        one, two = (load_file(out / "final" / file) for out in (tmp_path / "out", root / "two" / name))
        assert one.keys() == two.keys()
        for tensor in one:
            torch.testing.assert_close(two[tensor], one[tensor], rtol=0, atol=WEIGHT_TOLERANCE)


@pytest.mark.parametrize("name", ["tied", "lora"])
def test_two_ranks_resume_bit_for_bit(root, name):
    whole, cut = (root / kind / name for kind in ("two", "cut"))
    assert (cut / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()
    assert metrics_of(cut) == metrics_of(whole)
    assert {path.name for path in (cut / "step-00000004").iterdir()} == {
        *("rank-00000.safetensors", "rank-00001.safetensors"),
        *("trainer.json", "opd.json"),
    }


def test_each_rank_writes_its_own_part(root):
    parts = [load_file(root / f"two/llama/step-00000004/rank-0000{rank}.safetensors") for rank in (0, 1)]
    weights = load_file(root / "two/llama/final/model.safetensors")
    for name, tensor in weights.items():
        halves = [part[f"student/{name}"] for part in parts if f"student/{name}" in part]
        assert torch.cat(halves).shape == tensor.shape
        assert abs(len(halves[0]) - len(halves[1])) <= 1


def test_one_rank_goes_on_where_two_were(root, tmp_path):
    # Two ranks with one batch each step are one rank with two, but for the config that says so.
    shutil.copytree(root / "two/tied", tmp_path / "out")
    shutil.rmtree(tmp_path / "out/final")
    cache = opd_store.open(root / "cache")
    config = dataclasses.replace(config_of("tied", 2), accumulate=1)
    made = trainer(cache, root / "tied", config, tmp_path / "out", source=lambda _: Dealt(cache))
    made._begin(write=False)
    assert made.step == 4
    assert made._source.state_dict() == {"batches": 8}
    one = {name: p.detach() for name, p in made.student.model.named_parameters()}
    state = {name: made._optimizer.state[p] for name, p in made.student.model.named_parameters()}
    parts = [load_file(root / f"two/tied/step-00000004/rank-0000{rank}.safetensors") for rank in (0, 1)]
    for name, tensor in one.items():
        assert torch.equal(tensor, torch.cat([part[f"student/{name}"] for part in parts])), name
        for field in ("exp_avg", "exp_avg_sq"):
            whole = torch.cat([part[f"optimizer/{name}/{field}"] for part in parts])
            assert torch.equal(state[name][field], whole)
        assert state[name]["step"] == 4


def test_two_ranks_go_on_where_one_was(root, found):
    assert found["from_one"] == [3, 4]
    rows = metrics_of(root / "from_one")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_a_bad_batch_of_one_rank_stops_all(root, found):
    own, other = found["bad"]
    assert own == other
    assert "step 1: " in own
    report = json.loads((root / "bad/replay-step-00000001.json").read_text())
    rows = [rollout["row"] for rank in report["ranks"] for rollout in rank["rollouts"]]
    assert len(report["ranks"]) == 2
    assert str(rows[:32]) in own


def test_ranks_that_were_started_differently(found):
    assert found["differ"].startswith("rank 1 has config.seed 1, another rank 0;")


def test_a_full_disk_of_one_rank_is_an_error_of_all(root, found):
    kind, message = found["full"]
    assert kind == "StorageError"
    assert "rank 1: [Errno 28] No space left on device" in message
    assert {path.name for path in (root / "full").iterdir()} == {".lock", "metrics.jsonl"}


def test_the_command_under_torchrun(root):
    """One rank is killed, the other is ended for it, and the same command goes on to the same bits."""
    options = {"steps": COMMAND.steps, "lr": COMMAND.lr, "save-every": COMMAND.save_every}
    args = [word for name, value in options.items() for word in (f"--{name}", value)]
    args = ["-m", "opd_tools.main", "train", root / "cache", "--student", root / "llama", *args]
    args += ["--out", root / "cli", "--batch-tokens", 60, "--device", "cpu"]
    with torchrun(*args) as process:
        metrics, deadline = root / "cli/metrics.jsonl", time.monotonic() + 200
        while not metrics.exists() or metrics.read_text().count("\n") < 6:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        process.communicate(timeout=200)
        assert process.returncode != 0
    assert not (root / "cli/final").exists()
    with torchrun(*args) as process:
        out, err = finished(process)
    assert out == f"{root}/cli/final\n"
    assert err.count(f"step {COMMAND.steps}/{COMMAND.steps}") == 1
    for name in ("final/model.safetensors", "step-00000024/rank-00001.safetensors"):
        assert (root / "cli" / name).read_bytes() == (root / "api" / name).read_bytes()
    # The command also watches for drift.
    rows = [{k: v for k, v in row.items() if k != "alarms"} for row in metrics_of(root / "cli")]
    assert rows == metrics_of(root / "api")


def test_a_world_of_one_needs_no_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_world() as world:
        assert world == World()
        assert world.sum({"a": 1.5}) == {"a": 1.5}
        assert world.gather([1]) == [[1]]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidArgumentError, match="'cuda:1': with 2 ranks"), join_world("cuda:1"):
        pass
