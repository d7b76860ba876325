"""Importance weights: caps, masks, and values that are not numbers."""

from __future__ import annotations

import math

import pytest
import torch

from opd_store import InvalidArgumentError
from opd_train import CorrectionConfig, CorrectionKind, correction_weights

NONE = CorrectionConfig()
TIS = CorrectionConfig(kind=CorrectionKind.TOKEN_TIS, cap=2.0)


def weigh(config, student, behaviour, mask=None):
    student = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    behaviour = None if behaviour is None else torch.tensor(behaviour, dtype=torch.float32)
    mask = torch.ones(len(student), dtype=torch.bool) if mask is None else torch.tensor(mask)
    cu_seqlens = torch.tensor([0, len(student)], dtype=torch.int32)
    weights, kept = correction_weights(config, student, behaviour, mask, cu_seqlens)
    assert weights.dtype == torch.float32
    assert kept.dtype == torch.bool
    assert not weights.requires_grad
    return weights.tolist(), kept.tolist()


def test_weights_are_ratios_up_to_the_cap():
    student, behaviour = [-1.0, -3.0, -1.0, -5.0], [-1.5, -1.0, -4.0, -5.5]
    weights, kept = weigh(TIS, student, behaviour)
    expected = [min(math.exp(s - b), 2.0) for s, b in zip(student, behaviour, strict=True)]
    assert weights == pytest.approx(expected, rel=1e-6)
    assert weights[2] == 2.0
    assert all(kept)
    assert weigh(CorrectionConfig(kind=CorrectionKind.TOKEN_TIS, cap=100.0), student, behaviour)[0][
        2
    ] == pytest.approx(math.exp(3.0), rel=1e-5)


@pytest.mark.parametrize("config", [NONE, TIS], ids=["none", "token_tis"])
def test_equal_policies_give_weight_exactly_one(config):
    values = [-0.1, -1.7, -33.3, 0.0, -1e-30]
    weights, kept = weigh(config, values, values)
    assert weights == [1.0] * 5
    assert all(kept)


def test_none_ignores_the_behaviour():
    expected = ([1.0, 1.0], [True, True])
    assert weigh(NONE, [-1.0, -9.0], None) == expected
    assert weigh(NONE, [-1.0, -9.0], [-5.0, float("nan")]) == expected


@pytest.mark.parametrize("config", [NONE, TIS], ids=["none", "token_tis"])
def test_masked_tokens_weigh_nothing(config):
    weights, kept = weigh(config, [-1.0] * 3, [-1.0] * 3, [True, False, True])
    assert weights == [1.0, 0.0, 1.0]
    assert kept == [True, False, True]


@pytest.mark.parametrize("bad", [float("nan"), -math.inf, math.inf])
def test_values_that_are_not_finite_are_dropped(bad):
    assert weigh(TIS, [-1.0, bad, -1.0], [-1.0, -1.0, bad]) == ([1.0, 0.0, 0.0], [True, False, False])
    assert weigh(NONE, [-1.0, bad], None) == ([1.0, 0.0], [True, False])


def test_huge_ratios_neither_overflow_nor_vanish_to_nan():
    assert weigh(TIS, [0.0, -3e38], [-3e38, 0.0])[0] == pytest.approx([2.0, math.exp(-20)], abs=1e-9)
    wide = CorrectionConfig(kind=CorrectionKind.TOKEN_TIS, cap=1e30)
    assert weigh(wide, [0.0], [-200.0])[0] == pytest.approx([math.exp(20)], rel=1e-5)


def test_missing_behaviour_log_probs_are_an_error_that_says_so():
    with pytest.raises(InvalidArgumentError, match=r"'token_tis' needs behaviour_logprob"):
        weigh(TIS, [-1.0], None)


@pytest.mark.parametrize("cap", [0.99, 0.0, -1.0, float("nan")])
def test_a_cap_below_one_is_refused(cap):
    with pytest.raises(InvalidArgumentError, match="cap: expected at least 1"):
        CorrectionConfig(kind=CorrectionKind.TOKEN_TIS, cap=cap)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="sometimes"):
        CorrectionConfig(kind="sometimes")
    assert CorrectionConfig(kind="token_tis").kind is CorrectionKind.TOKEN_TIS
