"""Losses that look at the top-k alone: the truncated sum and the renormalised divergences.

Axes: N = positions, V = vocabulary, K = ranks.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from train.loss_problems import kl, merged, on_cache, problem, stored, through_softmax

from opd_store import InvalidArgumentError
from opd_train.losses import (
    at_temperature,
    renormalised_forward_kl,
    renormalised_reverse_kl,
    topk_forward_kl,
    truncated_forward_kl,
)

SHAPES = [(1, 2, 1), (1, 7, 7), (3, 37, 1), (13, 101, 17), (2, 11, 10)]
RENORMALISED = {"forward": renormalised_forward_kl, "reverse": renormalised_reverse_kl}


def probabilities(*values):
    return torch.tensor([values], dtype=torch.float64).log()


def expected_renormalised(name, student, teacher, ids, temperature):
    """T^2 KL between softmaxes of the ids' log-probs over T, from probabilities."""
    p = torch.softmax(teacher.gather(-1, ids) / temperature, dim=-1).log()
    q = torch.softmax(student.gather(-1, ids) / temperature, dim=-1).log()
    return temperature**2 * (kl(p, q) if name == "forward" else kl(q, p))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", RENORMALISED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_renormalised_against_softmax_over_the_ids(shape, name, temperature):
    student, teacher, ids = problem(*shape)
    expected_logits = student.clone().requires_grad_()
    expected = expected_renormalised(name, expected_logits, teacher, ids, temperature)
    expected.sum().backward()
    logits = student.clone().requires_grad_()
    loss = functools.partial(RENORMALISED[name], temperature=temperature)
    found = on_cache(loss, logits, teacher, ids)
    found.sum().backward()
    assert (found >= -1e-12).all()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(logits.grad, expected_logits.grad, rtol=1e-10, atol=1e-12)
    if shape[2] == 1:
        assert (found == 0).all(), "one id has no proportions"


@pytest.mark.parametrize("shape", [(1, 5, 2), (37, 101, 8), (3, 11, 10)], ids=str)
@pytest.mark.parametrize("name", ["truncated", "forward", "reverse"])
def test_closed_form_gradient(name, shape):
    student, teacher, ids = problem(*shape)
    p = merged(teacher, ids)[:, :-1]
    if name == "truncated":
        loss, g = truncated_forward_kl, -p.exp()
    else:
        t = 1.3
        loss = functools.partial(RENORMALISED[name], temperature=t)
        p_T = torch.log_softmax(p / t, dim=-1)
        q_T = torch.log_softmax(student.gather(-1, ids) / t, dim=-1)
        g = t * (q_T.exp() - p_T.exp())
        if name == "reverse":
            g = t * q_T.exp() * (q_T - p_T - kl(q_T, p_T)[:, None])
    logits = student.clone().requires_grad_()
    on_cache(loss, logits, teacher, ids).sum().backward()
    expected = through_softmax(student, ids, g, torch.zeros(len(ids), 1, dtype=torch.float64))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-12)


def test_the_truncated_sum_can_be_negative_and_is_lowest_away_from_the_teacher():
    teacher, ids = probabilities(0.5, 0.3, 0.2), torch.tensor([[0, 1]])
    students = {
        "equal": probabilities(0.5, 0.3, 0.2),
        "all on the ranks": probabilities(0.625, 0.375 - 1e-12, 1e-12),
    }
    found = {name: on_cache(truncated_forward_kl, q, teacher, ids).item() for name, q in students.items()}
    assert found["equal"] == pytest.approx(0, abs=1e-12)
    assert found["all on the ranks"] == pytest.approx(0.8 * np.log(0.8), abs=1e-9)
    with_tail = {name: on_cache(topk_forward_kl, q, teacher, ids).item() for name, q in students.items()}
    assert with_tail["all on the ranks"] > with_tail["equal"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", RENORMALISED)
def test_renormalised_is_blind_to_the_mass_outside(name):
    teacher, ids = probabilities(0.6, 0.3, 0.1), torch.tensor([[0, 1]])
    # Same proportions, 99 % of the mass gone.
    logits = probabilities(0.006, 0.003, 0.991).requires_grad_()
    found = on_cache(RENORMALISED[name], logits, teacher, ids)
    found.sum().backward()
    assert found.item() == pytest.approx(0, abs=1e-12)
    assert logits.grad.abs().max() < 1e-12
    assert on_cache(topk_forward_kl, logits, teacher, ids).item() > 3


def test_renormalised_bounds_the_full_kl_from_neither_side():
    student, teacher, ids = problem(200, 17, 4)
    full = kl(teacher, torch.log_softmax(student, dim=-1))
    inside = on_cache(renormalised_forward_kl, student, teacher, ids)
    assert (inside > full).any()
    assert (inside < full).any()
    # The chain rule: the share of the ids, their proportions, the proportions of the rest.
    q, p = merged(torch.log_softmax(student, dim=-1), ids), merged(teacher, ids)
    mass = [torch.stack([x[:, :-1].logsumexp(dim=-1), x[:, -1]], dim=-1) for x in (p, q)]
    rest = [
        torch.log_softmax(x.scatter(-1, ids, -torch.inf), dim=-1).scatter(-1, ids, 0)
        for x in (teacher, student)
    ]
    outside = (rest[0].exp() * (rest[0] - rest[1])).sum(dim=-1)
    whole = kl(*mass) + mass[0][:, 0].exp() * inside + mass[0][:, 1].exp() * outside
    torch.testing.assert_close(whole, full, rtol=1e-9, atol=1e-12)


def test_the_factor_keeps_the_gradient_as_temperature_grows():
    # Towards a high temperature T^2 KL tends to half the variance of the log-ratios, whatever T is.
    student, teacher, ids = problem(5, 23, 6)
    gap = student.gather(-1, ids) - teacher.gather(-1, ids)
    limit = gap.var(dim=-1, correction=0) / 2
    for loss in RENORMALISED.values():
        found = on_cache(functools.partial(loss, temperature=1e4), student, teacher, ids)
        torch.testing.assert_close(found, limit, rtol=1e-2, atol=1e-6)


def test_at_temperature_keeps_ratios_and_padding():
    logprob = torch.tensor([[-1.0, -2.0, -torch.inf], [-0.5, -torch.inf, -torch.inf]])
    found = at_temperature(logprob, 2.0)
    assert found[0, 0] - found[0, 1] == pytest.approx(0.5)
    torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(2))
    assert torch.equal(found.isneginf(), logprob.isneginf())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_temperatures_are_refused(temperature):
    with pytest.raises(InvalidArgumentError, match=r"temperature: expected more than 0, found"):
        renormalised_forward_kl(torch.zeros(1, 1), torch.zeros(1, 1), temperature=temperature)


@pytest.mark.parametrize("name", RENORMALISED)
def test_padding_does_not_count_and_a_row_of_it_is_zero(name):
    student_logits, teacher, ids = problem(5, 37, 8)
    p, tail = stored(teacher, ids[:, :5])
    expected_logits = student_logits.clone().requires_grad_()
    q = torch.log_softmax(expected_logits, dim=-1).gather(-1, ids[:, :5])
    expected = RENORMALISED[name](q, p, tail)
    expected[1:].sum().backward()
    logits = student_logits.clone().requires_grad_()
    padded_p = torch.full((5, 8), -torch.inf, dtype=torch.float64)
    padded_p[1:, :5] = p[1:]
    padded_ids = torch.where(torch.arange(8) < 5, ids, 0)
    found = RENORMALISED[name](torch.log_softmax(logits, dim=-1).gather(-1, padded_ids), padded_p, tail)
    found.sum().backward()
    assert found[0] == 0
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.grad, expected_logits.grad, rtol=1e-12, atol=1e-12)
