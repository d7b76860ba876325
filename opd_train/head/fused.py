"""A loss that is a sum over positions, and its gradient, from one computation of the logits.

Axes: N = counted positions, H = hidden size, V = vocabulary, K = ids per position; n = positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_store import InvalidArgumentError
from opd_train.head.logprobs import topk_logprobs
from opd_train.head.pieces import Pieces, plain, product_dtype
from opd_train.head.sums import WeightGradient
from opd_train.head.weights import HeadWeights, LmHead, check_arguments

_ELEMENTS = 1 << 24
"""Of a gradient, scaled at a time."""

LossFunction = Callable[[Tensor, slice], Tensor]
"""[n, K] log-probs and the positions they belong to, to a scalar: the loss summed over these positions."""


class FusedLoss(NamedTuple):
    """What `fused_loss` returns."""

    loss: Tensor
    """Scalar with gradient, the sum over all chunks, float32."""
    logprob: Tensor
    """[N, K] float32, nats, detached: what weights and monitors need costs nothing more."""


def fused_loss(
    hidden: Tensor, lm_head: LmHead, ids: Tensor, loss_fn: LossFunction, *, chunk: int = 1024
) -> FusedLoss:
    """A summed loss of log-probs at chosen ids, whose gradient is computed along with its value.

    Per chunk: logits, log-probs, `loss_fn` and its gradient by ordinary autograd, then the logits become
    their own gradient in place. That is three matrix products where `topk_logprobs` needs four, and one
    [chunk, V] of logits. `backward` only multiplies by the incoming gradient, in place: it runs once, also
    with `retain_graph`. In 16 bits, a factor that is no power of two rounds the gradients once more; scale
    inside `loss_fn` where that matters.

    Args:
        hidden: [N, H] floating point, of the head's dtype, or any under autocast. Pass counted positions
            only: a masked one costs as much as any other.
        lm_head: the head's weights. A function to logits works too, at the cost of `topk_logprobs`.
        ids: [N, K] int64, below V; they may repeat.
        loss_fn: called once a chunk, in order. Its result may depend on the chunk's log-probs only: nothing
            else gets a gradient. It may keep what it computes.
        chunk: positions per piece. Each piece reads and writes the sum of the weight's gradient once, which
            for a large head costs time that larger pieces save.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, a loss that is no scalar, or, on the CPU, ids
            outside the vocabulary; in `backward`, the second time.
    """
    check_arguments(hidden, lm_head, ids, chunk)
    if not isinstance(lm_head, HeadWeights):
        logprob = topk_logprobs(hidden, lm_head, ids, chunk=chunk)
        # A zero that is part of the graph, so that no positions have a gradient: zero.
        loss = logprob[:0].sum()
        for rows in _chunks(len(hidden), chunk):
            loss = loss + _checked(loss_fn(logprob[rows], rows))
        return FusedLoss(loss, logprob.detach())
    leaves = (hidden, lm_head.weight, lm_head.bias)
    needed = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in leaves]
    dtype = product_dtype(hidden)
    with plain(hidden.device):
        pieces = Pieces.of(hidden, lm_head, ids, dtype)
        # The sweep's memory is free again by the time its sums are narrowed.
        loss, logprob, grad_hidden, grad_weight, grad_bias = _sweep(pieces, loss_fn, chunk, needed)
        gradients = (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.finish(),
            None if grad_bias is None else grad_bias.to(lm_head.weight.dtype),
        )
    if any(needed):
        loss = _Precomputed.apply(loss, *gradients, *leaves)  # type: ignore[no-untyped-call]
    return FusedLoss(loss, logprob)


def _sweep(
    pieces: Pieces, loss_fn: LossFunction, chunk: int, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor | None, WeightGradient | None, Tensor | None]:
    hidden, n, v = pieces.hidden, len(pieces.hidden), len(pieces.weight)
    buffer = pieces.buffer(min(chunk, n), v)
    loss = hidden.new_zeros((), dtype=pieces.dtype)
    logprob = hidden.new_empty(pieces.ids.shape, dtype=pieces.dtype)
    grad_hidden = torch.empty_like(hidden) if needed[0] else None
    grad_weight = WeightGradient(pieces.head.weight, pieces.dtype) if needed[1] else None
    grad_bias = hidden.new_zeros(v, dtype=pieces.dtype) if needed[2] else None
    for rows in _chunks(n, chunk):
        raw = pieces.raw(buffer, rows, slice(0, v))
        logprob[rows], lse = pieces.logprob(*pieces.statistics(raw, rows), rows)
        chunk_loss, grad = _loss_and_gradient(loss_fn, logprob[rows], rows, any(needed))
        loss += chunk_loss
        if grad is None:
            continue
        pieces.gradient_(raw, rows, 0, logprob[rows], lse, grad)
        if grad_hidden is not None:
            torch.mm(raw, pieces.weight, out=grad_hidden[rows])
        if grad_weight is not None:
            grad_weight.add(raw, hidden[rows])
        if grad_bias is not None:
            grad_bias += raw.sum(dim=0, dtype=pieces.dtype)
    return loss, logprob, pieces.reduced(grad_hidden), grad_weight, grad_bias


def _loss_and_gradient(
    loss_fn: LossFunction, logprob_nK: Tensor, rows: slice, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    if not with_gradient:
        return _checked(loss_fn(logprob_nK.detach(), rows)), None
    leaf = logprob_nK.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = _checked(loss_fn(leaf, rows))
    if not loss.requires_grad:
        return loss, torch.zeros_like(leaf)
    grad: Tensor | None = torch.autograd.grad(loss, leaf, allow_unused=True)[0]
    return loss.detach(), torch.zeros_like(leaf) if grad is None else grad


def _checked(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim():
        raise InvalidArgumentError(
            f"loss_fn: expected a scalar tensor, the sum over its positions, found {loss!r:.200}"
        )
    return loss


def _chunks(n: int, chunk: int) -> list[slice]:
    return [slice(start, min(n, start + chunk)) for start in range(0, n, chunk)]


class _Precomputed(torch.autograd.Function):
    """A value with the gradients that belong to it, which are scaled in place when they are asked for."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        loss: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        *leaves: Tensor | None,
    ) -> Tensor:
        del leaves
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        if ctx.gradients is None:
            raise InvalidArgumentError(
                "fused_loss: its gradient was taken before and is gone; call it again, or use topk_logprobs"
            )
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                _scale_(gradient, factor)
        return None, None, None, None, *gradients


def _scale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in float32: in 16 bits the factor would be rounded too."""
    for piece in gradient.view(-1).split(_ELEMENTS):
        piece.copy_(piece.to(factor.dtype) * factor)
