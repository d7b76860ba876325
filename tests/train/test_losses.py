"""Losses against float64 over the whole vocabulary, with gradients.

Axes: N = positions, V = vocabulary, K = ranks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import huber_loss

from opd_train import sampled_token_loss, topk_forward_kl, topk_reverse_kl
from opd_train.losses import advantage, log_tail_of

SHAPES = [(1, 2, 1), (1, 7, 7), (3, 37, 1), (5, 37, 8), (13, 101, 17), (2, 11, 10), (4, 23, 23)]
KLS = {"forward": topk_forward_kl, "reverse": topk_reverse_kl}


def problem(n, v, k, *, seed=0, scale=2.0):
    """Student logits and teacher log-probs [N, V], both float64, and the teacher's top ids [N, K]."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, v, generator=generator, dtype=torch.float64) * scale
    teacher = torch.log_softmax(torch.randn(n, v, generator=generator, dtype=torch.float64) * scale, dim=-1)
    return student, teacher, teacher.topk(k, dim=-1).indices


def merged(logprob, ids):
    """[N, K + 1] float64: log-probs at the ids, and of everything else in one bucket (none if K = V)."""
    ranks = logprob.gather(-1, ids)
    if ids.shape[1] == logprob.shape[1]:
        return ranks
    rest = logprob.scatter(-1, ids, -torch.inf)
    return torch.cat([ranks, torch.logsumexp(rest, dim=-1, keepdim=True)], dim=-1)


def reference_kl(name, student_logits, teacher, ids):
    student = merged(torch.log_softmax(student_logits, dim=-1), ids)
    teacher = merged(teacher, ids)
    first, second = (teacher, student) if name == "forward" else (student, teacher)
    return (first.exp() * (first - second)).sum(dim=-1)


def ours(name, student_logits, teacher, ids, dtype):
    """The loss of the package, on what a cache would hold."""
    student = torch.log_softmax(student_logits.to(dtype), dim=-1).gather(-1, ids)
    buckets = merged(teacher, ids).to(dtype)
    k = ids.shape[1]
    tail = buckets[:, k] if buckets.shape[1] > k else torch.full((len(ids),), -torch.inf, dtype=dtype)
    return KLS[name](student, buckets[:, :k], tail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_and_gradient_against_float64(shape, name, dtype):
    student, teacher, ids = problem(*shape)
    expected_logits = student.clone().requires_grad_()
    expected = reference_kl(name, expected_logits, teacher, ids)
    expected.sum().backward()
    logits = student.clone().requires_grad_()
    found = ours(name, logits, teacher, ids, dtype)
    found.sum().backward()
    # With K = V a tail of at most 1e-7 stands for the empty one.
    tolerance = 2e-5 if dtype == torch.float32 else (2e-6 if shape[1] == shape[2] else 1e-10)
    np.testing.assert_allclose(found.detach().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(logits.grad, expected_logits.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", KLS)
def test_all_ranks_give_the_full_kl(name):
    student, teacher, ids = problem(6, 19, 19)
    q = torch.log_softmax(student, dim=-1)
    first, second = (teacher, q) if name == "forward" else (q, teacher)
    full = (first.exp() * (first - second)).sum(dim=-1)
    torch.testing.assert_close(ours(name, student, teacher, ids, torch.float64), full, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 5),
    v=st.integers(2, 41),
    scale=st.floats(0.1, 12.0),
    share=st.floats(0.0, 1.0),
)
def test_between_zero_and_the_full_kl_and_rising_in_ranks(seed, n, v, scale, share):
    k = 1 + int(share * (v - 1))
    student, teacher, ids = problem(n, v, k, seed=seed, scale=scale)
    for name in KLS:
        part = ours(name, student, teacher, ids, torch.float64)
        more_ids = teacher.topk(min(k + 1, v), dim=-1).indices
        more = ours(name, student, teacher, more_ids, torch.float64)
        full = reference_kl(name, student, teacher, teacher.topk(v, dim=-1).indices)
        # Where the tails are below 1e-7 the floor costs at most that much, times the nats between them.
        slack = 1e-5 * (1 + full)
        assert (part >= -slack).all(), name
        # The reverse KL takes a teacher's tail for 1e-7 at least, which lowers it.
        floored = merged(teacher, more_ids)[:, -1] < np.log(1e-7)
        assert ((part <= more + slack) | (floored & (name == "reverse"))).all(), name
        assert (part <= full + slack).all(), name


@pytest.mark.parametrize("name", KLS)
def test_equal_policies_have_zero_kl_and_zero_gradient(name):
    student, _, ids = problem(7, 29, 5)
    logits = student.clone().requires_grad_()
    found = ours(name, logits, torch.log_softmax(student, dim=-1), ids, torch.float64)
    found.sum().backward()
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("shape", [(1, 5, 2), (37, 101, 8), (3, 11, 10)], ids=str)
def test_closed_form_gradient(name, shape):
    # dL/dz_v = s_v (g_t / q_t - G) outside the ranks and g_i - G q_i inside, G = sum g_i + g_t, where
    # g = -p for the forward KL and q (log(q / p) + 1) for the reverse, tail included.
    student, teacher, ids = problem(*shape)
    logits = student.clone().requires_grad_()
    ours(name, logits, teacher, ids, torch.float64).sum().backward()
    p, q = merged(teacher, ids), merged(torch.log_softmax(student, dim=-1), ids)
    g = -p.exp() if name == "forward" else q.exp() * (q - p + 1)
    total = g.sum(dim=-1, keepdim=True)
    expected = torch.softmax(student, dim=-1) * (g[:, -1:] / q[:, -1:].exp() - total)
    expected = expected.scatter(-1, ids, g[:, :-1] - total * q[:, :-1].exp())
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", KLS)
def test_the_tail_matters(name):
    # A student that agrees on the ranks' proportions but has moved half its mass outside them.
    teacher = torch.tensor([[0.6, 0.3, 0.05, 0.05]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.15, 0.3, 0.25]], dtype=torch.float64).log()
    found = ours(name, student, teacher, torch.tensor([[0, 1]]), torch.float64)
    p, q = (0.9, 0.45) if name == "forward" else (0.45, 0.9)
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert found.item() == pytest.approx(expected, abs=1e-9)


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


@pytest.mark.parametrize("name", KLS)
def test_extreme_log_probs_stay_finite(name):
    student = torch.tensor([[-1e-7, -80.0], [-60.0, -0.0], [-5e-8, -17.0]], requires_grad=True)
    teacher = torch.tensor([[-60.0, -0.0], [-1e-7, -80.0], [0.0, -20.0]])
    found = KLS[name](student, teacher, torch.tensor([-20.0, -100.0, -torch.inf]))
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(student.grad).all()


def test_the_sampled_token_loss_has_the_gradient_of_huber():
    generator = torch.Generator().manual_seed(0)
    student = -torch.rand(101, generator=generator, dtype=torch.float64) * 30
    teacher = -torch.rand(101, generator=generator, dtype=torch.float64) * 30
    for clip in (0.5, 10.0):
        left, right = student.clone().requires_grad_(), student.clone().requires_grad_()
        sampled_token_loss(left, teacher, torch.ones(101, dtype=torch.float64), clip=clip).sum().backward()
        huber_loss(right, teacher, delta=clip, reduction="sum").backward()
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-12, atol=1e-12)
        assert (left.grad.abs() <= clip).all()
        assert (left.grad.abs() == clip).sum() > 20, "the clip has to act somewhere"


def test_the_sampled_token_loss_is_w_a_log_pi():
    student = torch.tensor([-2.0, -1.0, -30.0], requires_grad=True)
    teacher = torch.tensor([-1.0, -4.0, -1.0])
    weight = torch.tensor([1.0, 0.5, 2.0], requires_grad=True)
    loss = sampled_token_loss(student, teacher, weight, clip=10.0)
    assert loss.tolist() == [2.0, -1.5, 600.0]
    loss.sum().backward()
    assert student.grad.tolist() == [-1.0, 1.5, -20.0]
    assert weight.grad is None, "weights are detached"


def test_the_advantage_is_detached_clipped_and_points_to_the_teacher():
    student = torch.tensor([-3.0, -1.0, -50.0], requires_grad=True)
    found = advantage(torch.tensor([-1.0, -2.0, 0.0]), student, clip=10.0)
    assert not found.requires_grad
    assert found.tolist() == [2.0, -1.0, 10.0]


def test_an_equal_policy_has_zero_sampled_token_loss():
    logprob = torch.tensor([-3.0, -0.1, 0.0], requires_grad=True)
    loss = sampled_token_loss(logprob, logprob.detach(), torch.ones(3), clip=10.0)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (logprob.grad == 0).all()


@pytest.mark.parametrize("name", KLS)
def test_rows_with_fewer_ranks_are_as_if_cut(name):
    student_logits, teacher, ids = problem(5, 37, 8)
    buckets = merged(teacher, ids[:, :5]).to(torch.float32)
    expected_logits = student_logits.clone().requires_grad_()
    short = torch.log_softmax(expected_logits, dim=-1).gather(-1, ids[:, :5])
    expected = KLS[name](short, buckets[:, :5].double(), buckets[:, 5].double())
    expected.sum().backward()
    logits = student_logits.clone().requires_grad_()
    # Padding is gathered at id 0, which is real and may even be the most likely.
    padded_ids = torch.where(torch.arange(8) < 5, ids, 0)
    padded = torch.log_softmax(logits, dim=-1).gather(-1, padded_ids)
    teacher_NK = torch.full((5, 8), -torch.inf, dtype=torch.float64)
    teacher_NK[:, :5] = buckets[:, :5]
    found = KLS[name](padded, teacher_NK, buckets[:, 5].double())
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.grad, expected_logits.grad, rtol=1e-12, atol=1e-12)
