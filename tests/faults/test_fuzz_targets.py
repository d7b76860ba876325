"""A share of what `fuzz/run.py` does: seeded mutations of every target, without coverage."""

from __future__ import annotations

import random
import time

import pytest

from fuzz.targets import TARGETS, run_one

SECONDS = 16
"""In all; the number of runs follows from it, what each run does does not."""
HANG_S = 5
LEAST_RUNS = 100


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_accepted(name):
    seeds = TARGETS[name].seeds()
    assert seeds
    if name != "cache":
        assert all(run_one(name, seed) for seed in seeds)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations(name, record_property):
    target, rng = TARGETS[name], random.Random(f"0 {name}")
    pool = target.seeds()
    share = SECONDS * target.weight / sum(t.weight for t in TARGETS.values())
    end, n_runs, n_accepted = time.process_time() + share, 0, 0
    while time.process_time() < end or n_runs < LEAST_RUNS:
        data = target.mutate(rng.choice(pool), rng)
        start = time.process_time()
        try:
            n_accepted += run_one(name, data)
        except Exception as error:
            error.add_note(f"{name} {data.hex()}")
            raise
        assert time.process_time() - start < HANG_S, data.hex()
        n_runs += 1
    record_property("runs", n_runs)
    # Mutations that nothing gets past would prove nothing.
    assert 0 < n_accepted < n_runs
