"""What the head adds to a process's peak memory, against the dense log-softmax."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

N, H, V, K, CHUNK = 2048, 32, 32000, 8, 64
DENSE = 4 * N * V
"""Bytes of one [N, V] in float32."""

SCRIPT = f"""
import json, re, torch
from pathlib import Path
from opd_train.head import HeadWeights, fused_loss, topk_logprobs

torch.set_num_threads(1)

def run(form, n):
    hidden = torch.ones(n, {H}, requires_grad=True)
    weight = torch.ones({V}, {H}, requires_grad=True)
    ids = torch.arange(n * {K}).view(n, {K}) % {V}
    if form == "naive":
        torch.log_softmax(hidden @ weight.T, dim=-1).gather(-1, ids).sum().backward()
        return
    head = HeadWeights(weight=weight)
    if form == "recompute":
        topk_logprobs(hidden, head, ids, chunk={CHUNK}).sum().backward()
    else:
        fused_loss(hidden, head, ids, lambda logprob, _: logprob.sum(), chunk={CHUNK}).loss.backward()

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

# Libraries and their threads first, with one chunk.
for form in ("fused", "recompute", "naive"):
    run(form, {CHUNK})
found = dict()
for form in ("fused", "recompute", "naive"):
    # Forget the peak so far, that of loading libraries.
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    run(form, {N})
    found[form] = kilobytes("VmHWM") - before
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_stays_well_below_the_logits_of_all_positions():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        # What is freed goes back to the system, so that each form is measured from the same start.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    extra = {form: 1024 * kilobytes for form, kilobytes in json.loads(done.stdout).items()}
    assert extra["naive"] > DENSE
    assert extra["fused"] < DENSE / 4
    assert extra["recompute"] < DENSE / 4
