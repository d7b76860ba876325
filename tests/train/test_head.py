"""Log-probs at chosen ids against a dense float64 log-softmax: values, gradients, and what is never held."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train.heads import CURVES, assert_close_to, problem, solve

from opd_store import InvalidArgumentError
from opd_train.head import HeadWeights, VocabShard, fused_loss, topk_logprobs

FORMS = ("function", "recompute", "fused")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# N, H, V, K: no positions, one, K = V, no ids, more ids than a kernel takes at a time, primes, many pieces.
SHAPES = [
    (0, 3, 5, 2),
    (1, 3, 2, 1),
    (1, 5, 7, 7),
    (3, 4, 5, 0),
    (5, 3, 7, 131),
    (13, 5, 37, 3),
    (11, 7, 331, 5),
]


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_equals_dense_in_value_and_in_every_gradient(form, shape, chunk):
    for name in ("all", "plain") if form != "function" else ("all",):
        exact = problem(*shape, CURVES[name])
        found = solve(exact.to(torch.float32), form, chunk)
        assert_close_to(solve(exact, "naive"), found, torch.float32, 30.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("form", ["recompute", "fused"])
def test_every_curve_in_every_dtype(form, curve, dtype):
    # The reference starts from the rounded weights: this is about the arithmetic.
    given = problem(11, 7, 331, 5, CURVES[curve]).to(dtype)
    exact = given.to(torch.float64)
    top = exact.logits(exact.hidden).abs().max().item()
    assert_close_to(solve(exact, "naive"), solve(given, form, 4), dtype, top)


@pytest.mark.parametrize("curve", CURVES)
def test_gradcheck(curve):
    given = problem(3, 2, 67, 4, CURVES[curve])

    def logprob(hidden, weight, bias=None):
        head = HeadWeights(weight=weight, bias=bias, scale=given.curve.scale, softcap=given.curve.softcap)
        return topk_logprobs(hidden, head, given.ids, chunk=2)

    assert torch.autograd.gradcheck(logprob, given.leaves)


@pytest.mark.parametrize("curve", CURVES)
def test_a_fused_loss_changes_as_its_gradient_says(curve):
    # gradcheck would walk over one graph many times.
    given = problem(3, 2, 67, 4, CURVES[curve])
    generator = torch.Generator().manual_seed(1)
    gradients, step = solve(given, "fused", 2)[1], 1e-5

    def value():
        with torch.no_grad():
            return fused_loss(given.hidden, given.head, given.ids, given.loss, chunk=2).loss

    for leaf, gradient in zip(given.leaves, gradients, strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        origin = leaf.detach().clone()
        values = []
        for sign in (1, -1):
            leaf.data = origin + sign * step * direction
            values.append(value())
        leaf.data = origin
        difference = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(difference, (gradient * direction).sum(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_repeated_ids_add_their_gradients(form):
    once = problem(2, 3, 5, 1).to(torch.float32)
    once.ids, once.outer = torch.tensor([[4], [2]]), torch.tensor([[2.0], [0.5]])
    thrice = once.to(torch.float32)
    thrice.ids, thrice.outer = torch.tensor([[4, 4, 4], [2, 0, 2]]), torch.tensor([[1, -1, 2], [1, 0, -0.5]])
    # Only the linear part: the other one counts each column.
    for given in (once, thrice):
        given.loss = lambda logprob, rows=slice(None), outer=given.outer: (outer[rows] * logprob).sum()
    for expected, found in zip(solve(once, form)[1], solve(thrice, form)[1], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_without_gradients_it_gives_the_same(form, chunk):
    given = problem(13, 5, 37, 3, CURVES["all"]).to(torch.float32)
    expected, _ = solve(given, "naive")
    lm_head = given.logits if form == "function" else given.head
    with torch.no_grad():
        if form == "fused":
            loss, found = fused_loss(given.hidden, lm_head, given.ids, given.loss, chunk=chunk)
            torch.testing.assert_close(loss, given.loss(expected))
            assert not loss.requires_grad
        else:
            found = topk_logprobs(given.hidden, lm_head, given.ids, chunk=chunk)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("form", ["recompute", "fused"])
def test_no_gradient_is_made_for_what_is_frozen(form, frozen):
    given = problem(5, 3, 37, 2, CURVES["bias"])
    expected = solve(given, "naive")[1]
    for place in frozen:
        given.leaves[place].requires_grad_(False)
    if form == "fused":
        loss = fused_loss(given.hidden, given.head, given.ids, given.loss, chunk=2).loss
    else:
        loss = given.loss(topk_logprobs(given.hidden, given.head, given.ids, chunk=2))
    with Made() as made:
        loss.backward()
    for place, leaf in enumerate(given.leaves):
        if place in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[place])
    if 1 in frozen:
        assert (37, 3) not in made.shapes


@pytest.mark.parametrize("form", ["recompute", "fused"])
def test_a_tied_weight_gets_both_gradients_and_two_uses_add_up(form):
    given = problem(6, 5, 37, 3)
    tokens = torch.tensor([0, 5, 5, 36, 1, 2])

    def loss(through):
        hidden = torch.tanh(given.weight[tokens])
        if through == "naive":
            return given.loss(torch.log_softmax(given.logits(hidden), -1).gather(-1, given.ids))
        if through == "fused":
            return fused_loss(hidden, given.head, given.ids, given.loss, chunk=4).loss
        return given.loss(topk_logprobs(hidden, given.head, given.ids, chunk=4))

    (expected,) = torch.autograd.grad(loss("naive"), given.weight)
    (found,) = torch.autograd.grad(0.5 * loss(form) + loss("recompute") - loss("fused") / 4, given.weight)
    torch.testing.assert_close(found, 1.25 * expected)


def test_a_graph_can_be_walked_twice_where_logits_are_computed_again():
    given = problem(5, 3, 37, 2).to(torch.bfloat16)
    loss = given.loss(topk_logprobs(given.hidden, given.head, given.ids))
    first = torch.autograd.grad(loss, given.leaves, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, given.leaves), strict=True):
        assert torch.equal(one, other)


def test_a_second_walk_over_a_fused_loss_is_refused():
    given = problem(5, 3, 37, 2)
    loss = fused_loss(given.hidden, given.head, given.ids, given.loss).loss
    torch.autograd.grad(loss, given.leaves, retain_graph=True)
    with pytest.raises(InvalidArgumentError, match="its gradient was taken before"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fused_loss_is_scaled_by_what_comes_in(dtype):
    given = problem(11, 7, 331, 5, CURVES["bias"]).to(dtype)
    expected = solve(given, "fused")[1]
    loss = fused_loss(given.hidden, given.head, given.ids, given.loss).loss
    found = torch.autograd.grad(loss / 3, given.leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, (other.double() / 3).to(dtype))


def test_a_head_changed_before_the_backward_pass_is_noticed():
    given = problem(5, 3, 37, 2)
    found = topk_logprobs(given.hidden, given.head, given.ids).sum()
    with torch.no_grad():
        given.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.mark.parametrize("form", ["recompute", "fused"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_autocast_multiplies_in_its_dtype_and_returns_gradients_in_the_leaves(form, dtypes):
    given = problem(11, 7, 331, 5, CURVES["all"]).to(torch.bfloat16).to(torch.float32)
    given.hidden = given.hidden.detach().to(dtypes[0]).requires_grad_()
    expected = solve(given.to(torch.bfloat16), form, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = solve(given, form, 4)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    for gradient, other, leaf in zip(found[1], expected[1], given.leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient.to(torch.bfloat16), other, rtol=2**-7, atol=1e-5)


def test_bfloat16_weight_gradients_are_summed_in_float32():
    # 4096 equal pieces: a bfloat16 sum would stop growing at 256 times one of them.
    n, h = 4096, 3
    hidden = torch.ones(n, h, dtype=torch.bfloat16)
    weight = torch.zeros(5, h, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(n, 1, dtype=torch.int64)
    fused_loss(hidden, HeadWeights(weight=weight), ids, lambda x, _: x.sum(), chunk=1).loss.backward()
    expected = n * (torch.eye(5)[0] - 0.2)[:, None].expand(5, h)
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2**-7, atol=0)


def test_log_probs_are_normalised_in_float32():
    given = problem(5, 4, 300, 1).to(torch.bfloat16)
    every = torch.arange(300).expand(5, 300)
    found = topk_logprobs(given.hidden, given.head, every, chunk=2)
    torch.testing.assert_close(found.double().exp().sum(-1), torch.ones(5).double(), rtol=0, atol=1e-5)


def test_columns_at_minus_infinity_have_no_probability():
    given = problem(4, 3, 9, 2, CURVES["bias"])
    with torch.no_grad():
        given.bias[:4] = -torch.inf
    given.ids = given.ids.clamp(min=4)
    for form in ("recompute", "fused"):
        assert_close_to(solve(given, "naive"), solve(given, form), torch.float64, 10.0)


@pytest.mark.parametrize("form", ["function", "fused"])
def test_loss_function_sees_every_position_once_and_in_order(form):
    given = problem(11, 3, 37, 2)
    seen = []

    def loss_fn(logprob, rows):
        seen.append((rows.start, rows.stop, logprob.detach().clone()))
        return given.loss(logprob, rows)

    lm_head = given.logits if form == "function" else given.head
    loss, logprob = fused_loss(given.hidden, lm_head, given.ids, loss_fn, chunk=4)
    assert [piece[:2] for piece in seen] == [(0, 4), (4, 8), (8, 11)]
    assert torch.equal(torch.cat([piece[2] for piece in seen]).to(logprob.dtype), logprob)
    assert not logprob.requires_grad
    torch.testing.assert_close(loss.double(), given.loss(solve(given, "naive")[0]))


def test_a_loss_without_gradient_gives_zeros():
    given = problem(3, 2, 5, 1)
    for loss_fn in (lambda x, _: x.detach().sum(), lambda x, _: torch.zeros((), requires_grad=True)):
        loss = fused_loss(given.hidden, given.head, given.ids, loss_fn).loss
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, given.leaves))


def id_of(tensor):
    return tensor.untyped_storage()._cdata


class Made(TorchDispatchMode):
    """Shapes of all tensors that any operation allocates, and the elements of the largest."""

    def __init__(self):
        super().__init__()
        self.shapes, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {id_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and id_of(tensor) not in given:
                self.shapes.add(tuple(tensor.shape))
                self.largest = max(self.largest, tensor.numel())
        return found


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_never_more_than_a_chunk_of_logits_exists(form, backward):
    n, h, v, chunk = 50, 4, 523, 8
    given = problem(n, h, v, 3, CURVES["all"]).to(torch.float32)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with Made() as made, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if form == "fused":
            loss = fused_loss(given.hidden, given.head, given.ids, given.loss, chunk=chunk).loss
        else:
            lm_head = given.logits if form == "function" else given.head
            loss = given.loss(topk_logprobs(given.hidden, lm_head, given.ids, chunk=chunk))
        if backward:
            loss.backward()
    assert made.largest <= chunk * v
    assert max(saved) <= max(n * h, v * h)


def bad_calls():
    given = problem(3, 4, 5, 2)
    hidden, weight, ids = given.hidden, given.weight, given.ids

    def call(hidden=hidden, head=given.head, ids=ids, chunk=2):
        yield lambda: topk_logprobs(hidden, head, ids, chunk=chunk)
        yield lambda: fused_loss(hidden, head, ids, given.loss, chunk=chunk)

    def head(**fields):
        yield lambda: HeadWeights(**{"weight": weight} | fields)

    return {
        "hidden: expected floating-point states": call(hidden=hidden.long()),
        r"hidden: expected .* found \[1, 3, 4\]": call(hidden=hidden[None]),
        "does not fit the head's weight": call(hidden=hidden[:, :3]),
        "its dtype torch.float32 is not the head's, torch.float64": call(hidden=hidden.float()),
        r"ids: expected \[3, K\] .* found \[2, 2\]": call(ids=ids[:2]),
        r"ids: expected .* found \[3\]": call(ids=ids[:, 0]),
        "ids: expected .* torch.int32": call(ids=ids.int()),
        "ids: found 5, expected 0 to 4": call(ids=ids + 5 - ids),
        "ids: found -1, expected 0 to 4": call(ids=ids - 1 - ids),
        "chunk: expected at least 1": call(chunk=0),
        "expected a floating-point weight": head(weight=weight.long()),
        r"weight \[V, H\], found \[5\]": head(weight=weight[:, 0]),
        r"bias \[5\] of torch.float64, found \[4\]": head(bias=weight[:4, 0]),
        r"bias \[5\] of torch.float64, found .* torch.float32": head(bias=weight[:, 0].float()),
        "scale other than 0, found 0": head(scale=0.0),
        "scale other than 0, found nan": head(scale=float("nan")),
        "soft-cap above 0 or None, found 0": head(softcap=0.0),
        "5 rows from id 3 do not fit a vocabulary of 7": head(shard=VocabShard(None, 3, 7)),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_calls_that_cannot_work_are_refused(message):
    for call in bad_calls()[message]:
        with pytest.raises(InvalidArgumentError, match=message):
            call()


@pytest.mark.parametrize("found", [1.0, torch.zeros(2)], ids=str)
@pytest.mark.parametrize("form", ["function", "fused"])
def test_a_loss_that_is_no_scalar_is_refused(form, found):
    given = problem(3, 4, 5, 2)
    lm_head = given.logits if form == "function" else given.head
    with pytest.raises(InvalidArgumentError, match="loss_fn: expected a scalar tensor"):
        fused_loss(given.hidden, lm_head, given.ids, lambda *_: found)
