"""What a correction may be asked for, what it needs, and figures about weights."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from opd_tools.training.loss_options import CORRECTIONS

from opd_store import InvalidArgumentError
from opd_train.corrections import (
    AdvantageAnchor,
    CorrectionConfig,
    CorrectionKind,
    DriftGate,
    StalenessDecay,
    capped_share,
    chi_square,
    dropped_share,
    effective_share,
    k3,
    martingale_test,
    rollout_ratios,
    silent_share,
)

NAN, INF = math.nan, math.inf
PAGE = (Path(__file__).parents[2] / "docs/corrections.md").read_text("utf-8")


@pytest.mark.parametrize("kind", list(CorrectionKind))
def test_every_kind_has_defaults_survives_json_and_can_be_named(kind):
    config = CorrectionConfig(kind=kind.value)
    assert config.kind is kind
    content = json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))
    assert CorrectionConfig(**content) == config
    assert kind.value in CORRECTIONS
    assert len(CORRECTIONS) == len(CorrectionKind)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(({"kind": "token_tis", "cap": cap}, "cap: expected at least 1") for cap in (0.99, -1.0, NAN, INF)),
        ({"kind": "token_mask", "low": 1.1}, "low: expected 0 to 1"),
        ({"kind": "token_mask", "low": NAN}, "low: expected 0 to 1"),
        ({"kind": "cispo", "high": 0.9}, "high: expected at least 1"),
        ({"kind": "prefix_is", "step_cap": 0.5}, "step_cap: expected at least 1"),
        ({"kind": "k2_mask", "max_drift": -0.1}, "max_drift: expected at least 0"),
        ({"opsm_delta": -1.0}, "opsm_delta: expected at least 0"),
        ({"position_gain": INF}, "position_gain: expected at least 0 and finite, found inf"),
        ({"reference_kl": -0.1}, "reference_kl: expected at least 0"),
        ({"kind": "none", "cap": 2.0}, "'none' reads no bounds; found cap=2.0, leave it out"),
        ({"kind": "token_tis", "low": 0.5}, "low: correction 'token_tis' reads cap; found low=0.5"),
        (
            {"kind": "gspo", "anchor": "behaviour"},
            "trust region; expected kind 'ppo', found 'gspo'",
        ),
        ({"kind": "ppo", "anchor": "reference"}, "no fixed point"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(InvalidArgumentError, match=words):
        CorrectionConfig(**settings)


@pytest.mark.parametrize(
    ("modifier", "settings", "words"),
    [
        (DriftGate, {"block": 0}, "block: expected at least 1"),
        (DriftGate, {"rate": NAN}, "rate: expected at least 0"),
        (StalenessDecay, {"rate": -1.0, "drop_after": 3}, "rate: expected at least 0"),
        (StalenessDecay, {"rate": 1.0, "full_until": 4, "drop_after": 3}, r"expected 0 to drop_after \(3\)"),
    ],
    ids=str,
)
def test_modifiers_check_their_values(modifier, settings, words):
    with pytest.raises(InvalidArgumentError, match=words):
        modifier(**settings)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="sometimes"):
        CorrectionConfig(kind="sometimes")
    with pytest.raises(ValueError, match="often"):
        CorrectionConfig(normalise="often")
    assert CorrectionConfig(kind="ppo", anchor="behaviour").anchor is AdvantageAnchor.BEHAVIOUR


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, ""),
        ({"kind": "prefix_is"}, "behaviour"),
        ({"kind": "ppo"}, "behaviour advantage"),
        ({"kind": "gspo"}, "behaviour advantage"),
        ({"drift_gate": DriftGate()}, "behaviour"),
        ({"opsm_delta": 1e-4}, "behaviour advantage"),
        ({"position_gain": 0.5}, "advantage"),
        ({"reference_kl": 0.1}, "reference"),
        ({"staleness": StalenessDecay(rate=0.1, drop_after=4)}, "age"),
    ],
    ids=str,
)
def test_what_each_correction_needs(settings, needs):
    config = CorrectionConfig(**settings)
    every = ("behaviour", "advantage", "reference", "age")
    assert [name for name in every if getattr(config, f"needs_{name}")] == needs.split()


def test_k3_is_small_near_agreement_and_flat_far_from_it():
    gap = torch.tensor([0.0, 1e-3, -1e-3, 2.0, -2.0, 30.0, -500.0], dtype=torch.float32)
    student = (gap - 1.0).requires_grad_()
    value = k3(student, torch.full((7,), -1.0))
    exact = [math.expm1(-d) + d for d in gap.double().clamp(-20, 20).tolist()]
    assert value.tolist() == pytest.approx(exact, rel=2e-3)
    assert (value >= 0).all()
    slope = torch.autograd.grad(value.sum(), student)[0]
    assert slope.tolist() == pytest.approx(
        [0.0, 1e-3, -1e-3, -math.expm1(-2), -math.expm1(2), 0, 0], rel=1e-3
    )


def test_shares():
    weights = torch.tensor([2.0, 0.0, 1.0, 2.0, 0.0])
    kept = torch.tensor([True, True, True, True, False])
    mask, nothing = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    assert effective_share(weights, kept) == pytest.approx(25 / (4 * 9))
    assert effective_share(weights * 0, kept) == effective_share(weights, nothing) == 0.0
    assert capped_share(weights, kept, 2.0) == 0.5
    assert silent_share(weights, kept) == 0.25
    assert dropped_share(mask, kept) == pytest.approx(0.2)
    assert capped_share(weights, nothing, 2.0) == silent_share(weights, nothing) == 0.0
    assert dropped_share(nothing, kept) == 0.0


def test_chi_square_leaves_out_what_has_no_ratio():
    ratio = torch.tensor([math.log(2.0), math.log(0.5), NAN, 3.0])
    mask = torch.tensor([True, True, True, False])
    assert chi_square(ratio, mask) == pytest.approx((4 + 0.25) / 2 - 1)
    assert math.isnan(chi_square(ratio, torch.zeros(4, dtype=torch.bool)))


def drawn(n_rollouts, *, temperature=1.0, seed=0):
    """Log-ratios of a student on rollouts whose sampler drew at another temperature than it recorded."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 9, (n_rollouts,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
    recorded = torch.randn(int(length.sum()), 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    student = (1.2 * recorded + 0.2 * torch.randn(recorded.shape, generator=generator)).log_softmax(-1)
    true = (recorded / temperature).softmax(-1)
    token = torch.multinomial(true, 1, generator=generator)
    return (student - recorded).gather(-1, token)[:, 0], cu_seqlens


def test_the_martingale_test_sees_wrong_behaviour_log_probs_and_little_else():
    z = []
    for seed in range(200):
        ratio, cu_seqlens = drawn(60, seed=seed)
        z.append(martingale_test(*rollout_ratios(ratio, torch.ones_like(ratio).bool(), cu_seqlens)).z)
    assert abs(torch.tensor(z).mean().item()) < 0.3
    assert torch.tensor(z).std().item() == pytest.approx(1.0, abs=0.2)
    ratio, cu_seqlens = drawn(20_000, temperature=0.6)
    test = martingale_test(*rollout_ratios(ratio, torch.ones_like(ratio).bool(), cu_seqlens))
    assert abs(test.z) > 6


def test_the_martingale_test_takes_rollouts_as_clusters_and_batches_together():
    ratio = torch.tensor([2.0, 2.0, 0.5, 1.0, NAN, 4.0]).log()
    mask = torch.tensor([True, True, True, True, True, False])
    cu_seqlens = torch.tensor([0, 2, 2, 4, 6])
    total, n = rollout_ratios(ratio, mask, cu_seqlens)
    assert (total.tolist(), n.tolist()) == (pytest.approx([4.0, 0.0, 1.5, 0.0]), [2.0, 0.0, 2.0, 0.0])
    test = martingale_test(total, n)
    average = 5.5 / 4
    residual = (4 - 2 * average) ** 2 + (1.5 - 2 * average) ** 2
    assert test.mean == pytest.approx(average)
    assert test.stderr == pytest.approx(math.sqrt(residual * 2 / 1) / 4)
    assert test.z == pytest.approx((average - 1) / test.stderr)
    assert (test.n_tokens, test.n_rollouts) == (4, 2)
    parts = [rollout_ratios(ratio[a:b], mask[a:b], torch.tensor([0, b - a])) for a, b in [(0, 2), (2, 4)]]
    joined = martingale_test(*(torch.cat(side) for side in zip(*parts, strict=True)))
    assert joined == test


def test_the_martingale_test_says_nothing_without_evidence():
    assert math.isnan(martingale_test(torch.zeros(2), torch.zeros(2)).mean)
    one = martingale_test(torch.tensor([3.0]), torch.tensor([2.0]))
    assert (one.mean, one.stderr, one.z) == (1.5, INF, 0.0)
    equal = martingale_test(torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.0]))
    assert (equal.mean, equal.z) == (1.0, 0.0)
    assert martingale_test(torch.tensor([1.0, 0.5]), torch.tensor([2.0, 1.0])).z == -INF


def test_the_page_lists_every_kind_and_modifier_and_its_example_runs():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    bounds = {"kind", "cap", "low", "high", "step_cap", "max_drift"}
    modifiers = [f.name for f in dataclasses.fields(CorrectionConfig) if f.name not in bounds]
    assert sorted(rows) == sorted([*(kind.value for kind in CorrectionKind), *modifiers])
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(example, {})
