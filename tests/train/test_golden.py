"""A 20-step run has to give the stored loss curve."""

from __future__ import annotations

import json

import pytest
from train.make_golden import GOLDEN, OBJECTIVES, STEPS, curves


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return curves(tmp_path_factory.mktemp("golden"))


def test_the_golden_file_is_complete():
    content = json.loads(GOLDEN.read_text())
    assert set(content["curves"]) == set(OBJECTIVES)
    assert set(content["versions"]) == {"torch", "transformers"}
    for rows in content["curves"].values():
        assert len(rows) == STEPS
        assert all("loss" in row and "grad_norm" in row for row in rows)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_curve_is_the_stored_one(found, objective):
    expected = json.loads(GOLDEN.read_text())["curves"][objective]
    for step, (left, right) in enumerate(zip(found[objective], expected, strict=True), start=1):
        assert left.keys() == right.keys()
        for name in left:
            # Other machines order float32 sums differently; a step grows the difference.
            assert left[name] == pytest.approx(right[name], rel=2e-3, abs=1e-4), f"step {step}, {name}"
