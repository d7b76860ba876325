"""`topk_logprobs` against dense log-softmax, and what it never holds."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train.tiny_models import VOCAB, loaded

from opd_train import topk_logprobs


def softcapped(weight, bias):
    return lambda hidden: 5 * torch.tanh((hidden @ weight.T + bias) / 5)


def problem(n, h, v, k, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64)
    bias = torch.randn(v, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, v, (n, k), generator=generator)
    outer = torch.randn(n, k, generator=generator, dtype=torch.float64)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    return (*leaves, ids, outer.to(dtype))


SHAPES = [(1, 3, 2, 1), (1, 5, 7, 7), (13, 5, 37, 3), (17, 4, 11, 11), (7, 16, 101, 1)]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_dense_in_value_and_in_every_gradient(shape, chunk):
    exact = problem(*shape, dtype=torch.float64)
    dense = torch.log_softmax(softcapped(*exact[1:3])(exact[0]), dim=-1).gather(-1, exact[3])
    (dense * exact[4]).sum().backward()
    hidden, weight, bias, ids, outer = problem(*shape)
    found = topk_logprobs(hidden, softcapped(weight, bias), ids, chunk=chunk)
    assert found.dtype == torch.float32
    (found * outer).sum().backward()
    torch.testing.assert_close(found.double(), dense, rtol=1e-5, atol=1e-5)
    for mine, reference in zip((hidden, weight, bias), exact[:3], strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_without_gradients_it_gives_the_same(chunk):
    hidden, weight, bias, ids, _ = problem(13, 5, 37, 3)
    expected = topk_logprobs(hidden, softcapped(weight, bias), ids)
    with torch.no_grad():
        found = topk_logprobs(hidden, softcapped(weight, bias), ids, chunk=chunk)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_repeated_ids_add_their_gradients():
    hidden, weight, bias, _, _ = problem(2, 3, 5, 1)
    ids = torch.tensor([[4, 4], [0, 4]])
    topk_logprobs(hidden, softcapped(weight, bias), ids).sum().backward()
    twice = hidden.grad[0].clone()
    hidden.grad = None
    topk_logprobs(hidden, softcapped(weight, bias), ids[:1, :1].expand(2, 1)).sum().backward()
    torch.testing.assert_close(twice, 2 * hidden.grad[0])


class Largest(TorchDispatchMode):
    """Sizes of the largest tensor with a vocabulary axis that any operation makes."""

    def __init__(self, v):
        super().__init__()
        self.v, self.rows = v, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() and tensor.shape[-1:] == (self.v,):
                self.rows = max(self.rows, tensor.numel() // self.v)
        return found


@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_never_more_than_a_chunk_of_logits_exists(chunk, backward):
    n, h, v = 50, 4, 37
    hidden, weight, bias, ids, _ = problem(n, h, v, 3)
    saved, rows = [], []

    def head(hidden_nH):
        rows.append(len(hidden_nH))
        return softcapped(weight, bias)(hidden_nH)

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with Largest(v) as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = topk_logprobs(hidden, head, ids, chunk=chunk).sum()
        if backward:
            found.backward()
    assert max(rows) == chunk
    # h rows of [V] are the transposed weight and its gradient.
    assert largest.rows <= max(chunk, h)
    assert sum(rows) == n * (2 if backward else 1), "logits are computed again in the backward pass"
    assert max(saved, default=0) < chunk * v + n * h


def test_no_positions_give_nothing_and_a_zero_gradient():
    # A batch whose every token is masked is no reason to stop a run.
    hidden, weight, bias, _, _ = problem(3, 4, 5, 2)
    found = topk_logprobs(hidden[:0], softcapped(weight, bias), torch.zeros(0, 2, dtype=torch.int64))
    assert found.shape == (0, 2)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert (hidden.grad == 0).all()


def test_bfloat16_hidden_states_are_normalised_in_float32():
    hidden, weight, bias, _, _ = problem(5, 4, 300, 1)
    ids = torch.arange(300).expand(5, 300)
    head = softcapped(weight.bfloat16(), bias.bfloat16())
    found = topk_logprobs(hidden.bfloat16(), head, ids, chunk=2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().exp().sum(-1), torch.ones(5).double(), rtol=0, atol=1e-5)


def test_through_a_models_own_head_with_its_scales(models):
    for kind in ("gpt2", "gemma2", "cohere", "granite"):
        lm = loaded(models[kind])
        ids = torch.arange(11)[None] * 3 % VOCAB
        with torch.no_grad():
            expected = torch.log_softmax(lm.model(input_ids=ids).logits[0].double(), dim=-1)
        every = torch.arange(VOCAB).expand(11, VOCAB)
        found = topk_logprobs(lm.hidden(ids, None)[0], lm.logits, every, chunk=4)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)
        head = lm.model.get_output_embeddings().weight
        gradient = torch.autograd.grad(found[:, 0].sum(), head)[0]
        dense = torch.log_softmax(lm.model(input_ids=ids).logits[0], dim=-1)[:, 0].sum()
        torch.testing.assert_close(gradient, torch.autograd.grad(dense, head)[0], rtol=1e-4, atol=1e-5)
