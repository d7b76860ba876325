"""A head whose vocabulary is split over two processes, against the whole head in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train.heads import CURVES, assert_close_to, problem, solve
from train.sharded_head import FORMS, SHAPES, SPLITS, shards

SCRIPT = Path(__file__).with_name("sharded_head.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), folder / "store", out],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(out, weights_only=True) for out in outs]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", SPLITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_one_process(results, shape, share, form, dtype):
    logprob, (hidden, weight, bias) = solve(problem(*shape, CURVES["all"]), "naive")
    for found, rows in zip(results, shards(shape[2], share), strict=True):
        own = (logprob, [hidden, weight[rows], bias[rows]])
        assert_close_to(own, found[shape, share, dtype, form], dtype, 30.0)
