"""What each correction estimates, in expectation over every response of a small world, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from train.tabular import make_world, random_policy

from opd_store import InvalidArgumentError
from opd_train.corrections import (
    UNCAPPED,
    AdvantageAnchor,
    CorrectionConfig,
    CorrectionKind,
    chi_square,
    correction_weights,
    effective_share,
    k3,
    log_ratio,
    martingale_test,
    rollout_ratios,
)
from opd_train.losses import topk_forward_kl

WORLD = make_world()
TEACHER, BEHAVIOUR, OTHER = (random_policy(seed) for seed in (1, 2, 3))
PREFIX = CorrectionConfig(kind="prefix_is", cap=UNCAPPED, step_cap=UNCAPPED)
SEQUENCE = CorrectionConfig(kind="sequence_tis", cap=UNCAPPED)
ALL = torch.ones(len(WORLD.state_N), dtype=torch.bool)


@pytest.fixture
def student():
    return OTHER.clone().requires_grad_()


def advantage(student, *, clip=math.inf):
    return (WORLD.logprob(TEACHER) - WORLD.logprob(student)).detach().clamp(-clip, clip)


def weights(config, student, *, dense=False):
    """Through the real function, all responses as one batch."""
    log_student, log_behaviour = WORLD.logprob(student), WORLD.logprob(BEHAVIOUR)
    w, kept = correction_weights(
        config, log_student, log_behaviour, ALL, WORLD.cu_seqlens, advantage=advantage(student), dense=dense
    )
    assert w.dtype == torch.float64
    return torch.where(kept, w, 0.0)


def expected_gradient(loss_N, policy, student):
    """Of the loss summed over a response, responses drawn from `policy`."""
    return gradient((WORLD.visits(policy) * loss_N).sum(), student)


def gradient(value, student):
    return torch.autograd.grad(value, student, retain_graph=True)[0]


def surrogate(student, *, clip=math.inf):
    return -advantage(student, clip=clip) * WORLD.logprob(student)


def kl_by_state(first, second):
    log_first, log_second = (torch.log_softmax(policy, dim=-1) for policy in (first, second))
    return (log_first.exp() * (log_first - log_second)).sum(dim=-1)


def assert_same(found, expected):
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_the_world_is_whole():
    for policy in (TEACHER, BEHAVIOUR, OTHER):
        assert WORLD.logprob_of_sequences(policy).exp().sum().item() == pytest.approx(1.0, abs=1e-14)
        by_token = torch.zeros(WORLD.n_states, dtype=torch.float64).index_add(
            0, WORLD.state_N, WORLD.visits(policy)
        )
        torch.testing.assert_close(by_token, WORLD.state_visits(policy))


@pytest.mark.parametrize("config", [PREFIX, SEQUENCE], ids=["prefix_is", "sequence_tis"])
def test_uncapped_prefix_and_sequence_weights_give_the_on_policy_gradient(student, config):
    off_policy = expected_gradient(weights(config, student) * surrogate(student), BEHAVIOUR, student)
    assert_same(off_policy, expected_gradient(surrogate(student), student, student))


def test_uncapped_sequence_weights_give_the_gradient_of_the_sequence_kl(student):
    log_student = WORLD.logprob_of_sequences(student)
    gap = WORLD.logprob_of_sequences(TEACHER) - log_student
    found = expected_gradient(
        weights(SEQUENCE, student) * -gap.detach()[WORLD.rollout_N] * WORLD.logprob(student),
        BEHAVIOUR,
        student,
    )
    assert_same(found, gradient((log_student.exp() * -gap).sum(), student))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_dense_prefix_weights_give_the_state_weighted_kl_of_the_student(student, direction):
    kl_P = kl_by_state(student, TEACHER) if direction == "reverse" else kl_by_state(TEACHER, student)
    found = expected_gradient(weights(PREFIX, student, dense=True) * kl_P[WORLD.state_N], BEHAVIOUR, student)
    assert_same(found, gradient((WORLD.state_visits(student) * kl_P).sum(), student))


def test_token_weights_give_each_states_reverse_kl_where_the_sampler_went(student):
    config = CorrectionConfig(kind="token_is")
    found = expected_gradient(weights(config, student) * surrogate(student), BEHAVIOUR, student)
    kl = (WORLD.state_visits(BEHAVIOUR) * kl_by_state(student, TEACHER)).sum()
    assert_same(found, gradient(kl, student))


@pytest.mark.parametrize("clip", [math.inf, 0.5])
def test_no_weights_give_log_prob_regression(student, clip):
    found = expected_gradient(
        weights(CorrectionConfig(), student) * surrogate(student, clip=clip), BEHAVIOUR, student
    )
    gap = WORLD.logprob(TEACHER) - WORLD.logprob(student)
    if clip == math.inf:
        loss = gap.square() / 2
    else:
        assert ((gap.abs() > clip).sum() > 3) & ((gap.abs() < clip).sum() > 3)
        loss = torch.nn.functional.huber_loss(gap, torch.zeros_like(gap), reduction="none", delta=clip)
    assert_same(found, expected_gradient(loss, BEHAVIOUR, student))


@pytest.mark.parametrize("kind", list(CorrectionKind))
def test_equal_policies_are_left_alone(kind):
    student = BEHAVIOUR.clone().requires_grad_()
    for dense in (False, True):
        assert weights(CorrectionConfig(kind=kind), student, dense=dense).tolist() == [1.0] * len(ALL)


@pytest.mark.parametrize("kind", ["token_is", "prefix_is", "sequence_tis", "none"])
def test_the_teacher_is_a_fixed_point(kind):
    student = TEACHER.clone().requires_grad_()
    found = expected_gradient(
        weights(CorrectionConfig(kind=kind), student) * surrogate(student), BEHAVIOUR, student
    )
    assert found.abs().max() < 1e-15


def test_why_an_advantage_frozen_at_the_reference_is_refused():
    reference = TEACHER + random_policy(4, spread=0.3)
    frozen = WORLD.logprob(TEACHER) - WORLD.logprob(reference)
    at_teacher = TEACHER.clone().requires_grad_()
    pull = expected_gradient(-frozen * WORLD.logprob(at_teacher), reference, at_teacher)
    assert pull.abs().max() > 0.01

    def kl_after(steps, *, current):
        policy = reference.clone().requires_grad_()
        for _ in range(steps):
            gain = advantage(policy) if current else frozen
            step = expected_gradient(-gain * WORLD.logprob(policy), reference, policy)
            policy = (policy - 2.0 * step).detach().requires_grad_()
        gap = WORLD.logprob_of_sequences(policy) - WORLD.logprob_of_sequences(TEACHER)
        return (WORLD.logprob_of_sequences(policy).exp() * gap).sum().item()

    start = kl_after(0, current=True)
    assert kl_after(400, current=True) < start / 50
    assert kl_after(400, current=False) > 10 * start
    with pytest.raises(InvalidArgumentError, match="no fixed point and diverges"):
        CorrectionConfig(anchor=AdvantageAnchor.REFERENCE)


def test_a_topk_kl_as_a_detached_advantage_teaches_nothing(student):
    log_student, log_teacher = (torch.log_softmax(policy, dim=-1) for policy in (student, TEACHER))
    ids = log_teacher.topk(2, dim=-1).indices
    teacher_PK = log_teacher.gather(-1, ids)
    kl_P = topk_forward_kl(log_student.gather(-1, ids), teacher_PK, torch.log1p(-teacher_PK.exp().sum(-1)))
    assert gradient((WORLD.state_visits(student) * kl_P).sum(), student).abs().max() > 0.01
    as_advantage = kl_P.detach()[WORLD.state_N] * WORLD.logprob(student)
    assert expected_gradient(as_advantage, student, student).abs().max() < 1e-15


def test_k3_has_the_value_of_one_kl_and_the_gradient_of_the_other(student):
    rho = weights(CorrectionConfig(kind="token_is"), student)
    penalty = rho * k3(WORLD.logprob(student), WORLD.logprob(BEHAVIOUR))
    visits = WORLD.state_visits(BEHAVIOUR)
    value = (visits * kl_by_state(student, BEHAVIOUR)).sum()
    assert (WORLD.visits(BEHAVIOUR) * penalty).sum().item() == pytest.approx(value.item(), rel=1e-12)
    other_way = gradient((visits * kl_by_state(BEHAVIOUR, student)).sum(), student)
    assert_same(expected_gradient(penalty, BEHAVIOUR, student), other_way)


@pytest.fixture
def exact_sample():
    """A batch in which every response comes exactly as often as its sampler's probability says."""
    probs = torch.tensor([[1, 2, 1], [2, 1, 1], [1, 1, 2]], dtype=torch.float64).repeat(3, 1) / 4
    sampler = probs[: WORLD.n_states].log()
    counts = (64 * WORLD.logprob_of_sequences(sampler).exp()).round().long().tolist()
    assert sum(counts) == 64
    return (sampler, *WORLD.sample_of(counts))


def test_diagnostics_of_a_whole_sample_are_the_enumerated_ones(exact_sample, student):
    sampler, rows, cu_seqlens = exact_sample
    ratio = log_ratio(WORLD.logprob(student), WORLD.logprob(sampler))[rows]
    mask = torch.ones(len(rows), dtype=torch.bool)
    test = martingale_test(*rollout_ratios(ratio, mask, cu_seqlens))
    assert test.mean == pytest.approx(1.0, abs=1e-14)
    assert abs(test.z) < 1e-12
    assert (test.n_tokens, test.n_rollouts) == (len(rows), 64)

    visits = WORLD.state_visits(sampler)
    p, q = torch.softmax(student.detach(), dim=-1), torch.softmax(sampler, dim=-1)
    chi2 = ((visits * (p.square() / q).sum(-1)).sum() / visits.sum()).item() - 1.0
    assert chi_square(ratio, mask) == pytest.approx(chi2, rel=1e-12)
    assert effective_share(ratio.exp(), mask) == pytest.approx(1 / (1 + chi2), rel=1e-12)


def test_truncated_support_shows_as_a_mean_ratio_below_one_and_no_weight_repairs_it(student):
    truncated = BEHAVIOUR.clone()
    truncated[:, 2] = -math.inf
    seen = WORLD.visits(truncated) > 0
    log_student = WORLD.logprob(student).detach()
    log_behaviour = WORLD.logprob(truncated)
    w, kept = correction_weights(PREFIX, log_student, log_behaviour, ALL, WORLD.cu_seqlens)
    rho = log_ratio(log_student, log_behaviour)[seen].exp()
    visits = WORLD.visits(truncated)[seen]
    mean = ((visits * rho).sum() / visits.sum()).item()
    reach = WORLD.state_visits(truncated)
    mass = 1 - torch.softmax(student.detach(), dim=-1)[:, 2]
    assert mean == pytest.approx(((reach * mass).sum() / reach.sum()).item(), rel=1e-12)
    assert mean < 0.9
    # The corrected visits of the states behind token 2 stay zero, where the student goes often.
    corrected = torch.zeros(WORLD.n_states, dtype=torch.float64).index_add(
        0, WORLD.state_N[seen & kept], (WORLD.visits(truncated) * w)[seen & kept]
    )
    unseen = reach == 0
    assert corrected[unseen].sum() == 0
    assert WORLD.state_visits(student)[unseen].sum() > 0.3
