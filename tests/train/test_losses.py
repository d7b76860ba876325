"""Divergences with a tail against float64 over the whole vocabulary, with gradients.

Axes: N = positions, V = vocabulary, K = ranks.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train.loss_problems import dense, merged, on_cache, problem, stored, through_softmax

from opd_store import InvalidArgumentError
from opd_train.losses import (
    log_tail_of,
    topk_forward_kl,
    topk_jsd,
    topk_reverse_kl,
    truncated_forward_kl,
)

SHAPES = [(1, 2, 1), (1, 7, 7), (3, 37, 1), (5, 37, 8), (13, 101, 17), (2, 11, 10), (4, 23, 23)]
LOSSES = {
    "forward": topk_forward_kl,
    "reverse": topk_reverse_kl,
    "jsd0.5": topk_jsd,
    "jsd0.3": functools.partial(topk_jsd, beta=0.3),
    "jsd0.9": functools.partial(topk_jsd, beta=0.9),
}


def closed_form(name, q, p):
    """g = dL/dlog q from log-probs of K + 1 outcomes."""
    if name.startswith("jsd"):
        beta = float(name[3:])
        return (1 - beta) * q.exp() * (q - (beta * p.exp() + (1 - beta) * q.exp()).log())
    return -p.exp() if name == "forward" else q.exp() * (q - p + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_against_float64(shape, name, dtype):
    student, teacher, ids = problem(*shape)
    expected_logits = student.clone().requires_grad_()
    q = merged(torch.log_softmax(expected_logits, dim=-1), ids)
    expected = dense(name, q, merged(teacher, ids))
    expected.sum().backward()
    logits = student.clone().requires_grad_()
    found = on_cache(LOSSES[name], logits, teacher, ids, dtype)
    found.sum().backward()
    # With K = V a tail of at most 1e-7 stands for the empty one.
    tolerance = 2e-5 if dtype == torch.float32 else (2e-6 if shape[1] == shape[2] else 1e-10)
    np.testing.assert_allclose(found.detach().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(logits.grad, expected_logits.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_all_ranks_give_the_full_divergence(name):
    student, teacher, ids = problem(6, 19, 19)
    full = dense(name, torch.log_softmax(student, dim=-1), teacher)
    torch.testing.assert_close(on_cache(LOSSES[name], student, teacher, ids), full, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 5),
    v=st.integers(2, 41),
    scale=st.floats(0.1, 12.0),
    share=st.floats(0.0, 1.0),
)
def test_between_zero_and_the_full_divergence_and_rising_in_ranks(seed, n, v, scale, share):
    k = 1 + int(share * (v - 1))
    student, teacher, ids = problem(n, v, k, seed=seed, scale=scale)
    more_ids = teacher.topk(min(k + 1, v), dim=-1).indices
    for name, loss in LOSSES.items():
        part = on_cache(loss, student, teacher, ids)
        more = on_cache(loss, student, teacher, more_ids)
        full = dense(name, torch.log_softmax(student, dim=-1), teacher)
        # Where the tails are below 1e-7 the floor costs at most that much, times the nats between them.
        slack = 1e-5 * (1 + full)
        assert (part >= -slack).all(), name
        # The reverse KL takes a teacher's tail for 1e-7 at least, which lowers it.
        floored = merged(teacher, more_ids)[:, -1] < np.log(1e-7)
        assert ((part <= more + slack) | (floored & (name == "reverse"))).all(), name
        assert (part <= full + slack).all(), name


@pytest.mark.parametrize("name", LOSSES)
def test_equal_policies_have_zero_divergence_and_zero_gradient(name):
    student, _, ids = problem(7, 29, 5)
    logits = student.clone().requires_grad_()
    found = on_cache(LOSSES[name], logits, torch.log_softmax(student, dim=-1), ids)
    found.sum().backward()
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(1, 5, 2), (37, 101, 8), (3, 11, 10), (2, 17, 1)], ids=str)
def test_closed_form_gradient(name, shape):
    student, teacher, ids = problem(*shape)
    logits = student.clone().requires_grad_()
    on_cache(LOSSES[name], logits, teacher, ids).sum().backward()
    g = closed_form(name, merged(torch.log_softmax(student, dim=-1), ids), merged(teacher, ids))
    expected = through_softmax(student, ids, g[:, :-1], g[:, -1:])
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["forward", "reverse"])
def test_the_tail_matters(name):
    # A student that agrees on the ranks' proportions but has moved half its mass outside them.
    teacher = torch.tensor([[0.6, 0.3, 0.05, 0.05]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.15, 0.3, 0.25]], dtype=torch.float64).log()
    found = on_cache(LOSSES[name], student, teacher, torch.tensor([[0, 1]]))
    p, q = (0.9, 0.45) if name == "forward" else (0.45, 0.9)
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_jsd_is_bounded_symmetric_at_a_half_and_tends_to_the_kls():
    student, teacher, ids = problem(11, 31, 6, scale=4.0)
    q, (p, tail) = torch.log_softmax(student, dim=-1).gather(-1, ids), stored(teacher, ids)
    forward, reverse = topk_forward_kl(q, p, tail), topk_reverse_kl(q, p, tail)
    for beta in (1e-6, 0.1, 0.5, 0.7, 1 - 1e-6):
        found = topk_jsd(q, p, tail, beta=beta)
        coin = -beta * np.log(beta) - (1 - beta) * np.log1p(-beta)
        assert (found >= 0).all()
        assert (found <= coin + 1e-12).all()
        # Swapping the models swaps the shares.
        swapped = topk_jsd(p, q, log_tail_of(q), beta=1 - beta)
        torch.testing.assert_close(found, swapped, rtol=1e-9, atol=1e-12)
    for beta, scale, expected in ((1e-6, 1e6, forward), (1 - 1e-6, 1e6, reverse)):
        limit = scale * topk_jsd(q, p, tail, beta=beta)
        torch.testing.assert_close(limit, expected, rtol=2e-2, atol=1e-3)
    assert (forward > 0.5).any(), "models this far apart tell a limit from a coincidence"


@pytest.mark.parametrize("beta", [-0.1, 0.0, 1.0, float("nan")])
def test_jsd_refuses_its_limits(beta):
    with pytest.raises(InvalidArgumentError, match=r"beta has to be between 0 and 1, found"):
        topk_jsd(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), beta=beta)


@pytest.mark.parametrize("loss", [topk_forward_kl, topk_reverse_kl, topk_jsd, truncated_forward_kl])
def test_what_has_a_tail_has_no_temperature(loss):
    student, teacher, ids = problem(2, 9, 3)
    args = torch.log_softmax(student, dim=-1).gather(-1, ids), *stored(teacher, ids)
    torch.testing.assert_close(loss(*args, temperature=1.0), loss(*args), rtol=0, atol=0)
    with pytest.raises(
        InvalidArgumentError, match=rf"{loss.__name__}: temperature 2\.0, but .* renormalised"
    ):
        loss(*args, temperature=2.0)


@pytest.mark.parametrize("log_tail", [-0.01, -1.0, -7.0, -12.0])
def test_log_tail_of_float32_keeps_its_digits(log_tail):
    rest = np.log1p(-np.exp(log_tail)) + np.log([0.5, 0.3, 0.2])
    found = log_tail_of(torch.tensor(rest, dtype=torch.float32)[None])
    # Rounding the largest log-prob to float32 moves the tail by 1e-7 of probability.
    assert found.item() == pytest.approx(log_tail, abs=3e-7 / np.exp(log_tail) + 1e-5)


@pytest.mark.parametrize("logprob", [[0.0, -np.inf], [1e-6, -20.0], [-0.6931471, -0.6931471]])
def test_log_tail_of_a_full_row_is_finite_with_finite_gradient(logprob):
    value = torch.tensor([logprob], dtype=torch.float32, requires_grad=True)
    tail = log_tail_of(value)
    tail.sum().backward()
    assert torch.isfinite(tail).all()
    assert torch.isfinite(value.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_probs_stay_finite(name):
    student = torch.tensor([[-1e-7, -80.0], [-60.0, -0.0], [-5e-8, -17.0]], requires_grad=True)
    teacher = torch.tensor([[-60.0, -0.0], [-1e-7, -80.0], [0.0, -20.0]])
    found = LOSSES[name](student, teacher, torch.tensor([-20.0, -100.0, -torch.inf]))
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", [*LOSSES, "truncated"])
def test_rows_with_fewer_ranks_are_as_if_cut(name):
    loss = (LOSSES | {"truncated": truncated_forward_kl})[name]
    student_logits, teacher, ids = problem(5, 37, 8)
    p, tail = stored(teacher, ids[:, :5])
    expected_logits = student_logits.clone().requires_grad_()
    expected = loss(torch.log_softmax(expected_logits, dim=-1).gather(-1, ids[:, :5]), p, tail)
    expected.sum().backward()
    logits = student_logits.clone().requires_grad_()
    # Padding is gathered at id 0, which is real and may even be the most likely.
    padded_ids = torch.where(torch.arange(8) < 5, ids, 0)
    padded_p = torch.full((5, 8), -torch.inf, dtype=torch.float64)
    padded_p[:, :5] = p
    found = loss(torch.log_softmax(logits, dim=-1).gather(-1, padded_ids), padded_p, tail)
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.grad, expected_logits.grad, rtol=1e-12, atol=1e-12)


def test_as_an_advantage_a_divergence_teaches_nothing():
    # The mean over the action of D grad log q(action) is D grad sum q = 0: detached, a value that does not
    # depend on the action has no gradient. As a differentiable loss the same value has one.
    student, teacher, ids = problem(3, 13, 4)
    logits = student.clone().requires_grad_()
    logprob = torch.log_softmax(logits, dim=-1)
    divergence = on_cache(topk_forward_kl, logits, teacher, ids)
    every_action = (logprob.exp().detach() * divergence.detach()[:, None] * logprob).sum()
    (as_advantage,) = torch.autograd.grad(every_action, logits, retain_graph=True)
    (as_loss,) = torch.autograd.grad(divergence.sum(), logits)
    assert as_advantage.abs().max() < 1e-15
    assert as_loss.abs().max() > 0.1
