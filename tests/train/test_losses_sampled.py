"""Losses on sampled tokens and drawn ids, and mixtures of losses.

Axes: N = positions, V = vocabulary, M = drawn ids.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import huber_loss
from train.loss_problems import kl, problem

from opd_store import InvalidArgumentError
from opd_train.losses import (
    advantage,
    draw_weights,
    drawn_reverse_kl,
    huber_logprob_loss,
    mix_cross_entropy,
    mix_teachers,
    random_sampling_kd,
    sampled_token_loss,
)


@pytest.mark.parametrize("clip", [0.5, 10.0])
def test_the_sampled_token_loss_has_the_gradient_of_huber(clip):
    generator = torch.Generator().manual_seed(0)
    student, teacher, weight = -30 * torch.rand(3, 101, generator=generator, dtype=torch.float64)
    weight = torch.where(torch.arange(101) % 2 == 0, 1.0, weight.abs())
    grads, values = [], []
    for loss in (sampled_token_loss, huber_logprob_loss):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, weight, clip=clip)
        value.sum().backward()
        grads.append(leaf.grad)
        values.append(value.detach())
    leaf = student.clone().requires_grad_()
    expected = huber_loss(leaf, teacher, delta=clip, reduction="none")
    (weight * expected).sum().backward()
    torch.testing.assert_close(values[1], weight * expected.detach(), rtol=1e-12, atol=1e-12)
    for grad in grads:
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-12, atol=1e-12)
    at_clip = (grads[0] / weight).abs()
    assert (at_clip <= clip * (1 + 1e-12)).all()
    assert (at_clip > clip * (1 - 1e-12)).sum() > 20, "the clip has to act somewhere"


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


@pytest.mark.parametrize("loss", [sampled_token_loss, huber_logprob_loss])
def test_an_equal_policy_has_zero_loss_and_gradient(loss):
    logprob = torch.tensor([-3.0, -0.1, 0.0], requires_grad=True)
    value = loss(logprob, logprob.detach(), torch.ones(3), clip=10.0)
    value.sum().backward()
    assert (value == 0).all()
    assert (logprob.grad == 0).all()


def test_drawn_from_mu_and_weighted_the_sampled_token_descends_the_reverse_kl():
    # E_mu[(q / mu) A grad log q] = -grad KL(q || p), summed over every token there is.
    student, teacher, _ = problem(4, 11, 1)
    behaviour = torch.log_softmax(problem(4, 11, 1, seed=1)[0], dim=-1)
    logits = student.clone().requires_grad_()
    q = torch.log_softmax(logits, dim=-1)
    weight = (q.detach() - behaviour).exp()
    loss = sampled_token_loss(q.flatten(), teacher.flatten(), weight.flatten(), clip=100.0)
    (behaviour.exp().flatten() * loss).sum().backward()
    expected = student.clone().requires_grad_()
    kl(torch.log_softmax(expected, dim=-1), teacher).sum().backward()
    torch.testing.assert_close(logits.grad, expected.grad, rtol=1e-10, atol=1e-12)


def outcomes(proposal, n_draws):
    """Every outcome of so many draws: probability, ids [1, M] and counts [1, M] of the distinct ids."""
    for drawn in itertools.combinations_with_replacement(range(len(proposal)), n_draws):
        ids, counts = torch.tensor(drawn).unique(return_counts=True)
        ways = math.factorial(n_draws) // math.prod(map(math.factorial, counts.tolist()))
        yield ways * math.prod(proposal[list(drawn)].tolist()), ids[None], counts.int()[None]


def expectation(loss, logits, teacher, n_draws, temperature=1.0):
    """Mean value and gradient of a loss over every way to draw from the teacher at a temperature."""
    proposal = torch.log_softmax(teacher / temperature, dim=-1)
    value, grad = 0.0, torch.zeros_like(logits)
    for probability, ids, counts in outcomes(proposal.exp(), n_draws):
        leaf = logits.clone().requires_grad_()
        q = torch.log_softmax(leaf, dim=-1)
        weight = draw_weights(teacher[ids], counts, temperature=temperature)
        found = loss(q[ids], teacher[ids], weight)
        found.sum().backward()
        value += probability * found.item()
        grad += probability * leaf.grad
    return value, grad


@pytest.mark.parametrize("n_draws", [1, 2, 4])
def test_random_sampling_kd_is_the_full_forward_kl_on_average(n_draws):
    student, teacher, _ = problem(1, 5, 1)
    found, grad = expectation(random_sampling_kd, student[0], teacher[0], n_draws)
    expected = kl(teacher, torch.log_softmax(student, dim=-1)).item()
    assert found == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(grad, (student.softmax(-1) - teacher.exp())[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.8, 1.25])
def test_other_proposals_lose_their_bias_with_more_draws(temperature):
    student, teacher, _ = problem(1, 4, 1, scale=1.0)
    expected = (student.softmax(-1) - teacher.exp())[0]
    errors = []
    for n_draws in (1, 3, 6):
        _, grad = expectation(random_sampling_kd, student[0], teacher[0], n_draws, temperature)
        errors.append((grad - expected).norm().item())
    assert errors[0] > 2 * errors[1] > 2.5 * errors[2] > 0, errors


def test_random_sampling_kd_with_many_draws_at_a_real_vocabulary():
    # 5 standard errors: one gradient entry is a mean of n draws of variance p (1 - p).
    n, v = 200_000, 97
    student, teacher, _ = problem(1, v, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(teacher[0].exp(), n, replacement=True, generator=generator)
    ids, counts = drawn.unique(return_counts=True)
    logits = student.clone().requires_grad_()
    weight = draw_weights(teacher[:, ids], counts[None])
    random_sampling_kd(torch.log_softmax(logits, dim=-1)[:, ids], teacher[:, ids], weight).sum().backward()
    p = teacher.exp()
    error = (logits.grad - (student.softmax(-1) - p)).abs()
    assert (error <= 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()


@pytest.mark.parametrize("n_draws", [1, 3])
def test_drawn_reverse_kl_is_the_full_gradient_on_average(n_draws):
    student, teacher, _ = problem(1, 5, 1, scale=1.0)
    _, grad = expectation(lambda *args: drawn_reverse_kl(*args, clip=100.0), student[0], teacher[0], n_draws)
    leaf = student.clone().requires_grad_()
    kl(torch.log_softmax(leaf, dim=-1), teacher).sum().backward()
    torch.testing.assert_close(grad, leaf.grad[0], rtol=1e-10, atol=1e-12)


def test_one_draw_is_the_sampled_token_loss_under_truncated_weights():
    generator = torch.Generator().manual_seed(1)
    student, teacher = -12 * torch.rand(2, 41, generator=generator, dtype=torch.float64)
    weight = (student - teacher).exp().clamp(max=2.0)
    expected = sampled_token_loss(student, teacher, weight, clip=3.0)
    one = torch.ones(41, 1, dtype=torch.float64)
    found = drawn_reverse_kl(student[:, None], teacher[:, None], one, clip=3.0, cap=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.isfinite(drawn_reverse_kl(torch.zeros(1, 1), torch.full((1, 1), -1e4), torch.ones(1, 1)))


def test_draw_weights_divide_by_the_proposal_and_skip_padding():
    teacher = torch.tensor([[0.5, 0.25, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 0.0]]).log()
    draws = torch.tensor([[3, 1, 0], [7, 0, 0], [0, 0, 0]], dtype=torch.int32)
    expected = torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(draw_weights(teacher, draws), expected)
    # At temperature 2 the proposal goes as p^(1/2), so draws count p^(1/2).
    flat = draw_weights(teacher, draws, temperature=2.0)
    share = 3 * 0.5**0.5 / (3 * 0.5**0.5 + 0.25**0.5)
    torch.testing.assert_close(flat[0], torch.tensor([share, 1 - share, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padding_in_draws_adds_nothing_and_leaves_gradients_finite(dtype):
    student = torch.tensor([[-1.0, -2.0, -0.3], [-1.0, -2.0, -0.3]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-0.5, -1.5, -torch.inf], [-torch.inf] * 3], dtype=dtype)
    draws = torch.tensor([[2, 1, 0], [0, 0, 0]], dtype=torch.int32)
    short = student.detach()[:1, :2].clone().requires_grad_()
    weight = draw_weights(teacher, draws, temperature=1.5)
    for loss in (random_sampling_kd, drawn_reverse_kl):
        (found_grad,) = torch.autograd.grad(loss(student, teacher, weight).sum(), student)
        (short_grad,) = torch.autograd.grad(loss(short, teacher[:1, :2], weight[:1, :2]).sum(), short)
        torch.testing.assert_close(found_grad[:1, :2], short_grad)
        assert (found_grad[0, 2:] == 0).all()
        assert (found_grad[1] == 0).all()


def test_mixing_with_cross_entropy():
    loss, logprob = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, -0.5], requires_grad=True)
    found = mix_cross_entropy(loss, logprob, share=0.25)
    assert found.tolist() == [1.5, 1.625]
    found.sum().backward()
    assert logprob.grad.tolist() == [-0.25, -0.25]
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidArgumentError, match=r"share has to be from 0 to 1"):
            mix_cross_entropy(loss, logprob, share=share)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_mixing_teachers_descends_to_their_mixture_or_product(direction):
    weights = (3.0, 1.0)
    student, first, _ = problem(6, 13, 1)
    second = problem(6, 13, 1, seed=5)[1]
    if direction == "forward":
        target = torch.logaddexp(first + math.log(0.75), second + math.log(0.25))
    else:
        target = torch.log_softmax(0.75 * first + 0.25 * second, dim=-1)
    grads = []
    for teachers, shares in (([first, second], weights), ([target], (1.0,))):
        leaf = student.clone().requires_grad_()
        q = torch.log_softmax(leaf, dim=-1)
        pairs = [(p, q) if direction == "forward" else (q, p) for p in teachers]
        mix_teachers([kl(*pair) for pair in pairs], shares).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_a_teacher_of_weight_zero_is_not_heard():
    losses = [torch.tensor([1.0, float("nan"), 5.0]), torch.tensor([3.0, 3.0, float("inf")])]
    found = mix_teachers(losses, [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 4.0, 0.0])])
    assert found.tolist() == [2.0, 3.0, 5.0]
    assert mix_teachers([torch.ones(2)], [torch.tensor([0.0, 2.0])]).tolist() == [0.0, 1.0]
    for losses, weights in (([], []), ([torch.ones(1)], [1.0, 1.0]), ([torch.ones(1)], [-1.0])):
        with pytest.raises(InvalidArgumentError, match="mix_teachers"):
            mix_teachers(losses, weights)
