"""Importance weights against a slow version that loops over rollouts, and values that are not numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_store import InvalidArgumentError
from opd_train.corrections import (
    CorrectionConfig,
    CorrectionKind,
    DriftGate,
    Normalise,
    StalenessDecay,
    correction_weights,
)

NONE = CorrectionConfig()
TIS = CorrectionConfig(kind=CorrectionKind.TOKEN_TIS, cap=2.0)


# The slow version: plain floats, one rollout after another.


def bounded(value):
    return max(-20.0, min(20.0, value))


def mean(values):
    return sum(values) / len(values) if values else 0.0


def ppo_weight(ratio, advantage, config):
    """Gradient of min(r A, clip(r) A) with respect to log r, divided by A."""
    clipped = max(config.low, min(config.high, ratio))
    return ratio if ratio * advantage <= clipped * advantage else 0.0


@dataclasses.dataclass
class Token:
    student: float
    behaviour: float
    masked_in: bool
    advantage: float
    proximal: float | None
    counted: bool = False
    usable: bool = False
    ratio: float = 0.0
    weight: float = 0.0
    kept: bool = False


def prepare(token, config):
    token.counted = token.masked_in and math.isfinite(token.student)
    if config.needs_behaviour:
        token.counted &= math.isfinite(token.behaviour)
    token.usable = token.counted
    if config.needs_advantage:
        token.usable &= math.isfinite(token.advantage)
    if config.kind == "ppo" and token.proximal is not None:
        token.usable &= math.isfinite(token.proximal)
    token.ratio = (
        bounded(token.student - token.behaviour) if token.counted and config.needs_behaviour else 0.0
    )
    if not (token.usable and config.needs_advantage):
        token.advantage = 0.0


def kind_weights(config, rollout, dense):
    """Sets weight and kept of one rollout's tokens, before any modifier."""
    ratios = [token.ratio for token in rollout if token.counted]
    total, average = math.exp(bounded(sum(ratios))), math.exp(mean(ratios))
    k2 = mean([r * r / 2 for r in ratios])
    k3 = mean([math.exp(r) - 1 - r for r in ratios])
    history = 0.0
    for token in rollout:
        token.kept = token.usable
        rho = math.exp(token.ratio)
        if config.kind in ("token_is", "token_tis"):
            token.weight = min(rho, config.cap or math.inf)
        elif config.kind == "token_mask":
            token.weight, token.kept = rho, token.usable and config.low <= rho <= config.high
        elif config.kind == "cispo":
            token.weight = max(config.low, min(config.high, rho))
        elif config.kind == "ppo" and token.usable:
            prox = token.student if config.anchor == "current" else token.behaviour
            prox = prox if token.proximal is None else token.proximal
            outer = min(math.exp(bounded(prox - token.behaviour)), config.cap)
            token.weight = outer * ppo_weight(
                math.exp(bounded(token.student - prox)), token.advantage, config
            )
        elif config.kind == "sequence_tis":
            token.weight = min(total, config.cap)
        elif config.kind == "sequence_mask":
            token.weight, token.kept = total, token.usable and config.low <= total <= config.high
        elif config.kind == "gspo":
            token.weight = ppo_weight(average, token.advantage, config)
        elif config.kind in ("geometric_mask", "k2_mask", "k3_mask"):
            token.weight = min(rho, config.cap) if config.cap else 1.0
            if config.kind == "geometric_mask":
                token.kept &= config.low <= average <= config.high
            else:
                token.kept &= (k2 if config.kind == "k2_mask" else k3) <= config.max_drift
        elif config.kind == "prefix_is":
            own = 0.0 if dense else token.ratio
            token.weight = min(math.exp(bounded(history + own)), config.cap)
            history += min(token.ratio, math.log(config.step_cap))
        else:
            token.weight = 1.0


def slow_weights(config, rollouts, ages, *, dense):
    for rollout in rollouts:
        for token in rollout:
            prepare(token, config)
        kind_weights(config, rollout, dense)
    everything = [token for rollout in rollouts for token in rollout]
    divide = 0.0
    if config.normalise == "tokens":
        divide = mean([token.weight for token in everything if token.kept])
    elif config.normalise == "sequences":
        kept = [[token.weight for token in rollout if token.kept] for rollout in rollouts]
        divide = mean([mean(weights) for weights in kept if weights])
    for token in everything:
        token.weight /= divide if divide > 0 else 1.0
    for rollout, age in zip(rollouts, ages, strict=True):
        drift = -mean([token.ratio for token in rollout if token.counted])
        sizes = [min(abs(token.advantage), 20.0) for token in rollout]
        for position, token in enumerate(rollout):
            if config.opsm_delta is not None and token.advantage < 0 and drift > config.opsm_delta:
                token.weight = 0.0
            share = sum(sizes[:position]) / sum(sizes) if sum(sizes) else 0.0
            token.weight *= 1 + config.position_gain * (1 - share)
            if config.staleness is not None:
                late = max(0, age - config.staleness.full_until)
                token.weight *= math.exp(-config.staleness.rate * late)
                token.kept &= age <= config.staleness.drop_after
    if config.drift_gate is not None:
        factors = []
        for rollout in rollouts:
            for start in range(0, len(rollout), config.drift_gate.block):
                block = rollout[start : start + config.drift_gate.block]
                drift = abs(mean([token.ratio for token in block if token.counted]))
                factors += [math.exp(-config.drift_gate.rate * drift)] * len(block)
        middle = mean([f for f, token in zip(factors, everything, strict=True) if token.kept]) or 1.0
        for factor, token in zip(factors, everything, strict=True):
            token.weight *= factor / middle
    return [token.weight if token.kept else 0.0 for token in everything], [token.kept for token in everything]


# Bounds that no ratio of the strategies below hits exactly, since there rounding would decide.
KINDS = [
    NONE,
    CorrectionConfig(kind="token_is"),
    CorrectionConfig(kind="token_tis", cap=1.7),
    CorrectionConfig(kind="token_mask", low=0.51, high=1.93),
    CorrectionConfig(kind="cispo", low=0.3, high=1.28),
    CorrectionConfig(kind="ppo"),
    CorrectionConfig(kind="ppo", anchor="behaviour", low=0.71, high=1.57, cap=1.3),
    CorrectionConfig(kind="sequence_tis", cap=3.1),
    CorrectionConfig(kind="sequence_mask", low=0.013, high=9.7),
    CorrectionConfig(kind="gspo", low=0.87, high=1.13),
    CorrectionConfig(kind="geometric_mask", low=0.61, high=1.37),
    CorrectionConfig(kind="geometric_mask", low=0.61, high=1.37, cap=1.9),
    CorrectionConfig(kind="k2_mask", max_drift=0.23),
    CorrectionConfig(kind="k3_mask", max_drift=0.23, cap=2.3),
    CorrectionConfig(kind="prefix_is"),
    CorrectionConfig(kind="prefix_is", cap=1e6, step_cap=1.0),
]
MODIFIERS = {
    "plain": {},
    "tokens": {"normalise": Normalise.TOKENS},
    "sequences": {"normalise": Normalise.SEQUENCES},
    "drift_gate": {"drift_gate": DriftGate(block=2, rate=1.3)},
    "staleness": {"staleness": StalenessDecay(full_until=1, rate=0.4, drop_after=3)},
    "opsm": {"opsm_delta": 0.017},
    "position": {"position_gain": 0.5},
    "all": {
        "normalise": Normalise.SEQUENCES,
        "drift_gate": DriftGate(block=3),
        "staleness": StalenessDecay(rate=0.1, drop_after=3),
        "opsm_delta": 1e-4,
        "position_gain": 0.3,
        "reference_kl": 0.1,
    },
}
ODD = st.sampled_from([math.nan, math.inf, -math.inf, -1e30, -300.0, 0.0])


def case(config):
    return f"{config.kind}-{config.anchor}-{config.cap}"


LOGPROB = st.one_of(st.floats(-4, 0, width=32), st.floats(-4, 0, width=32), ODD)
# In steps: sums run through the whole batch, so a rollout's share is lost where all its advantages are below
# the rounding of another's.
ADVANTAGE = st.one_of(
    st.floats(-12, 12, width=32).map(lambda nats: round(nats * 2**16) / 2**16),
    st.sampled_from([math.nan, -math.inf, 0.0, 1e4]),
)
TOKEN = st.builds(
    Token,
    student=LOGPROB,
    behaviour=LOGPROB,
    masked_in=st.sampled_from([True, True, True, False]),
    advantage=ADVANTAGE,
    proximal=LOGPROB,
)
ROLLOUTS = st.lists(st.tuples(st.lists(TOKEN, max_size=7), st.integers(0, 4)), max_size=5)


def column(tokens, name, dtype=torch.float64):
    return torch.tensor([getattr(token, name) for token in tokens], dtype=dtype)


def fast_weights(config, rollouts, ages, *, dense, proximal, dtype=torch.float64):
    tokens = [token for rollout in rollouts for token in rollout]
    return correction_weights(
        config,
        column(tokens, "student", dtype).requires_grad_(),
        column(tokens, "behaviour", dtype),
        column(tokens, "masked_in", torch.bool),
        torch.tensor([0, *(len(rollout) for rollout in rollouts)]).cumsum(0).int(),
        advantage=column(tokens, "advantage", dtype),
        proximal_logprob=column(tokens, "proximal", dtype) if proximal else None,
        age=torch.tensor(ages, dtype=torch.int64),
        dense=dense,
    )


@pytest.mark.parametrize("config", KINDS, ids=case)
@settings(max_examples=60, deadline=None)
@given(
    modifiers=st.sampled_from(list(MODIFIERS.values())),
    drawn=ROLLOUTS,
    dense=st.booleans(),
    proximal=st.booleans(),
)
def test_weights_are_those_of_the_slow_version(config, modifiers, drawn, dense, proximal):
    config = dataclasses.replace(config, **modifiers)
    rollouts, ages = [rollout for rollout, _ in drawn], [age for _, age in drawn]
    weights, kept = fast_weights(config, rollouts, ages, dense=dense, proximal=proximal)
    assert not weights.requires_grad
    copies = [
        [dataclasses.replace(t, proximal=t.proximal if proximal else None) for t in rollout]
        for rollout in rollouts
    ]
    expected, expected_kept = slow_weights(config, copies, ages, dense=dense)
    assert kept.tolist() == expected_kept
    assert weights.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("config", KINDS, ids=case)
@settings(max_examples=20, deadline=None)
@given(drawn=ROLLOUTS)
def test_float32_weights_are_the_same_and_finite(config, drawn):
    rollouts, ages = [rollout for rollout, _ in drawn], [age for _, age in drawn]
    run = {"dense": False, "proximal": False}
    wide, wide_kept = fast_weights(config, rollouts, ages, **run)
    weights, kept = fast_weights(config, rollouts, ages, dtype=torch.float32, **run)
    assert weights.dtype == torch.float32
    assert torch.isfinite(weights).all()
    assert kept.equal(wide_kept)
    torch.testing.assert_close(weights.double(), wide, rtol=1e-6, atol=1e-7)


SPREAD = torch.tensor([0.0, 0.3, -0.2, 0.9, -1.1, 0.05, 0.4])
PLAIN = {
    "behaviour_logprob": torch.full((7,), -1.5),
    "loss_mask": torch.ones(7, dtype=torch.bool),
    "cu_seqlens": torch.tensor([0, 4, 4, 7]),
    "advantage": torch.tensor([1.0, -1.0, 0.5, -2.0, 1.0, 0.1, -0.3]),
    "age": torch.tensor([2, 0, 1]),
}


@pytest.mark.parametrize("modifiers", MODIFIERS.values(), ids=MODIFIERS.keys())
@pytest.mark.parametrize("config", KINDS, ids=case)
def test_pointwise_says_whether_a_slice_can_be_weighted_by_itself(config, modifiers):
    config = dataclasses.replace(config, **modifiers)

    def weigh(rows, advantage):
        return correction_weights(
            config,
            (SPREAD - 1.5)[rows],
            PLAIN["behaviour_logprob"][rows],
            PLAIN["loss_mask"][rows],
            torch.tensor([0, len(rows)]),
            advantage=advantage[rows],
            age=torch.tensor([len(rows)]),
        )

    # Seen over several advantages, since a clip or a gate may hide how a weight depends on its neighbours.
    same = True
    for seed in range(8):
        advantage = torch.randn(7, generator=torch.Generator().manual_seed(seed))
        whole = weigh(torch.arange(7), advantage)
        alone = [weigh(torch.tensor([row]), advantage) for row in range(7)]
        same &= whole[0].equal(torch.cat([w for w, _ in alone]))
        same &= whole[1].equal(torch.cat([kept for _, kept in alone]))
    if config.pointwise:
        assert same
    elif not modifiers or config.kind is CorrectionKind.TOKEN_IS:
        # Two things that each look at neighbours may cancel; one alone has to show.
        assert not same


def test_weights_are_never_those_of_a_neighbouring_rollout():
    for config in KINDS:
        whole, kept = correction_weights(config, SPREAD - 1.5, **PLAIN)
        for start, end in [(0, 4), (4, 7)]:
            part = {k: v[start:end] for k, v in PLAIN.items() if k not in ("cu_seqlens", "age")}
            cu_seqlens = torch.tensor([0, end - start])
            one, one_kept = correction_weights(
                config, (SPREAD - 1.5)[start:end], cu_seqlens=cu_seqlens, **part
            )
            assert one.equal(whole[start:end])
            assert one_kept.equal(kept[start:end])


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_clipped_weights_give_the_gradient_of_the_clipped_objective(kind):
    """-w A log pi_theta against autograd through -min(r A, clip(r) A) itself."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale):
        return scale * torch.randn(40, dtype=torch.float64, generator=generator)

    student = (draw(0.3) - 2).requires_grad_()
    behaviour, proximal, advantage = draw(0.3) - 2, draw(0.3) - 2, draw(1.0)
    cu_seqlens = torch.arange(0, 41, 5)
    config = CorrectionConfig(kind=kind, low=0.8, high=1.2)
    weights, kept = correction_weights(
        config,
        student,
        behaviour,
        torch.ones(40, dtype=torch.bool),
        cu_seqlens,
        advantage=advantage,
        proximal_logprob=proximal,
    )
    assert kept.all()
    assert 5 < (weights == 0).sum() < 35
    if kind == "ppo":
        outer, ratio = (proximal - behaviour).exp().clamp(max=5.0), (student - proximal).exp()
    else:
        mean_S = (student - behaviour).detach().reshape(8, 5).mean(dim=1)
        outer = torch.ones(40, dtype=torch.float64)
        ratio = mean_S.exp().repeat_interleave(5) * (student - student.detach()).exp()
    objective = -outer * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    expected = torch.autograd.grad(objective.sum(), student)[0]
    found = torch.autograd.grad((-weights * advantage * student).sum(), student)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def weigh(config, student, behaviour, mask=None):
    student = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    behaviour = None if behaviour is None else torch.tensor(behaviour, dtype=torch.float32)
    mask = torch.ones(len(student), dtype=torch.bool) if mask is None else torch.tensor(mask)
    weights, kept = correction_weights(config, student, behaviour, mask, torch.tensor([0, len(student)]))
    return weights.tolist(), kept.tolist()


@pytest.mark.parametrize("kind", list(CorrectionKind))
def test_equal_policies_give_weight_exactly_one(kind):
    values = torch.tensor([-0.1, -1.7, -33.3, 0.0, -1e-30, -2.0, -0.4])
    weights, kept = correction_weights(
        CorrectionConfig(kind=kind), values, **(PLAIN | {"behaviour_logprob": values})
    )
    assert weights.tolist() == [1.0] * 7
    assert kept.all()


def test_none_ignores_the_behaviour():
    expected = ([1.0, 1.0], [True, True])
    assert weigh(NONE, [-1.0, -9.0], None) == expected
    assert weigh(NONE, [-1.0, -9.0], [-5.0, float("nan")]) == expected


def test_a_tools_output_does_not_move_the_product_of_its_rollout():
    config = CorrectionConfig(kind="sequence_tis", cap=100.0)
    weights, kept = weigh(config, [-1.0, -7.0, -1.0], [-1.5, -0.5, -2.0], [True, False, True])
    assert weights == pytest.approx([math.exp(1.5), 0.0, math.exp(1.5)])
    assert kept == [True, False, True]


def test_huge_ratios_neither_overflow_nor_vanish_to_nan():
    assert weigh(TIS, [0.0, -3e38], [-3e38, 0.0])[0] == pytest.approx([2.0, math.exp(-20)], abs=1e-9)
    wide = CorrectionConfig(kind=CorrectionKind.TOKEN_TIS, cap=1e30)
    assert weigh(wide, [0.0], [-200.0])[0] == pytest.approx([math.exp(20)], rel=1e-5)
    product = CorrectionConfig(kind="sequence_tis", cap=1e30)
    assert weigh(product, [0.0] * 50, [-200.0] * 50)[0] == pytest.approx([math.exp(20)] * 50, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "missing", "remedy"),
    [
        (TIS, "behaviour_logprob", "score it again"),
        (CorrectionConfig(drift_gate=DriftGate()), "behaviour_logprob", "score it again"),
        (CorrectionConfig(kind="ppo"), "advantage", "teacher log-probs"),
        (CorrectionConfig(staleness=StalenessDecay(rate=0.1, drop_after=2)), "age", "policy version"),
    ],
)
def test_what_is_missing_is_an_error_that_says_so(config, missing, remedy):
    correction_weights(config, SPREAD - 1.5, **PLAIN)
    with pytest.raises(InvalidArgumentError, match=rf"needs {missing}, .*{remedy}"):
        correction_weights(config, SPREAD - 1.5, **(PLAIN | {missing: None}))
    with pytest.raises(InvalidArgumentError, match=rf"{missing}: expected shape"):
        correction_weights(config, SPREAD - 1.5, **(PLAIN | {missing: torch.zeros(1)}))


def test_offsets_of_other_tokens_are_refused():
    with pytest.raises(InvalidArgumentError, match="cu_seqlens: expected to end at 7 tokens, found 6"):
        correction_weights(NONE, SPREAD, **(PLAIN | {"cu_seqlens": torch.tensor([0, 6])}))
