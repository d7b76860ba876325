"""NeMo-Aligner: masks, padding, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from tools.converters.converting import (
    by_name,
    changed,
    convert,
    converted,
    refused,
)


def test_nemo_masks_and_padding(tmp_path):
    def masked(line, rollout):
        line["loss_mask"][rollout.prompt_len] = 0.0
        return line

    path, expected = changed(tmp_path, "nemo-aligner", masked)
    converted("nemo-aligner", path, tmp_path / "cache")
    for name, rollout in by_name(tmp_path / "cache").items():
        np.testing.assert_array_equal(rollout.token_ids, expected[name].token_ids)
        assert np.flatnonzero(~rollout.loss_mask).tolist() == [1]


def mislabelled(line, _):
    line["labels"][0] += 1
    return line


def one_short(line, _):
    line["log_sum_exp_logits"].pop()
    return line


def infinite(line, rollout):
    line["log_sum_exp_logits"][rollout.prompt_len] = float("nan")
    return line


@pytest.mark.parametrize(
    ("form", "said"),
    [(mislabelled, "one place later"), (one_short, "different lengths"), (infinite, "log-prob nan")],
)
def test_nemo_refusals(tmp_path, form, said):
    path, _ = changed(tmp_path, "nemo-aligner", form)
    assert said in refused(convert("nemo-aligner", path, tmp_path / "cache"), tmp_path / "cache")
