"""Log-probs at chosen ids, with the logits computed again in the backward pass.

Axes: N = chosen positions, H = hidden size, V = vocabulary, K = ids per position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from opd_train.head.pieces import Pieces, plain, product_dtype
from opd_train.head.sums import add_product_, product_
from opd_train.head.weights import HeadWeights, LmHead, check_arguments

_COLUMNS = 64
"""Pieces of the vocabulary are a multiple of this: products want their rows aligned."""


def topk_logprobs(hidden: Tensor, lm_head: LmHead, ids: Tensor, *, chunk: int = 1024) -> Tensor:
    """Log-probs at chosen ids; differentiable with respect to `hidden` and the head's weights.

    At most as many logits exist at a time as `chunk` positions have: the backward pass computes them again.
    Normalisation is over the whole vocabulary, in float32 (float64 for float64). Where a loss is a sum over
    positions, `fused_loss` saves the second computation.

    Args:
        hidden: [N, H] floating point, of the head's dtype, or any under autocast.
        lm_head: the head's weights, or a function to logits.
        ids: [N, K] int64, below V; they may repeat.
        chunk: positions per piece.

    Returns:
        [N, K] float32, nats. On a GPU, NaN where an id of a head given by its weights is not below V.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, or, on the CPU, ids outside the vocabulary.
    """
    check_arguments(hidden, lm_head, ids, chunk)
    if not isinstance(lm_head, HeadWeights):
        return _by_function(hidden, lm_head, ids, chunk)
    weight, bias = lm_head.weight, lm_head.bias
    found: Tensor = _TopkLogprobs.apply(hidden, weight, bias, ids, lm_head, chunk)  # type: ignore[no-untyped-call]
    return found


def _by_function(hidden: Tensor, lm_head: Callable[[Tensor], Tensor], ids: Tensor, chunk: int) -> Tensor:
    if not len(hidden):
        # Still part of the graph, so that a batch without a counted token has a gradient: zero.
        return hidden.new_zeros(ids.shape, dtype=torch.float32) + hidden.float().sum()

    def piece(hidden_nH: Tensor, ids_nK: Tensor) -> Tensor:
        logits_nV = lm_head(hidden_nH).float()
        return logits_nV.gather(-1, ids_nK) - torch.logsumexp(logits_nV, dim=-1, keepdim=True)

    pairs = zip(hidden.split(chunk), ids.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([piece(*pair) for pair in pairs])
    pieces = [checkpoint(piece, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    return torch.cat(pieces)


class _TopkLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        head: HeadWeights,
        chunk: int,
    ) -> Tensor:
        ctx.head, ctx.chunk, ctx.dtype = head, chunk, product_dtype(hidden)
        with plain(hidden.device):
            logprob, lse = _forward(Pieces.of(hidden, head, ids, ctx.dtype), chunk)
        ctx.save_for_backward(hidden, weight, bias, ids, logprob, lse)
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        hidden, _, _, ids, logprob, lse = ctx.saved_tensors
        with plain(hidden.device):
            pieces = Pieces.of(hidden, ctx.head, ids, ctx.dtype)
            gradients = _backward(pieces, logprob, lse, grad, ctx.chunk, ctx.needs_input_grad[:3])
            grad_hidden = None if gradients[0] is None else gradients[0].to(hidden.dtype)
        return grad_hidden, *gradients[1:], None, None, None


def _forward(pieces: Pieces, chunk: int) -> tuple[Tensor, Tensor]:
    n, v = len(pieces.hidden), len(pieces.weight)
    buffer = pieces.buffer(min(chunk, n), v)
    every = slice(0, n)
    top_N, sum_N = pieces.hidden.new_empty((2, n), dtype=pieces.dtype)
    picked_NK = pieces.hidden.new_empty(pieces.ids.shape, dtype=pieces.dtype)
    for start in range(0, n, chunk):
        rows = slice(start, min(n, start + chunk))
        raw = pieces.raw(buffer, rows, slice(0, v))
        top_N[rows], sum_N[rows], picked_NK[rows] = pieces.statistics(raw, rows)
    return pieces.logprob(top_N, sum_N, picked_NK, every)


def _backward(
    pieces: Pieces,
    logprob: Tensor,
    lse: Tensor,
    grad: Tensor,
    chunk: int,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by pieces of the vocabulary.

    With the log-sum-exp known, pieces may be columns. Then each row of the weight's gradient is one product
    over all positions, accumulated inside it, and only [N, H] has to be summed in float32.
    """
    (n, h), v = pieces.hidden.shape, len(pieces.weight)
    every, weight, bias = slice(0, n), pieces.head.weight, pieces.head.bias
    width = min(v, max(_COLUMNS, v * min(chunk, n) // max(n, 1) // _COLUMNS * _COLUMNS))
    buffer = pieces.buffer(n, width)
    grad_hidden = pieces.hidden.new_zeros((n, h), dtype=pieces.dtype) if needed[0] else None
    grad_weight = weight.new_empty(weight.shape) if needed[1] else None
    grad_bias = bias.new_empty(bias.shape) if bias is not None and needed[2] else None
    for start in range(0, v, width):
        columns = slice(start, min(v, start + width))
        raw = pieces.raw(buffer, every, columns)
        pieces.gradient_(raw, every, start, logprob, lse, grad)
        if grad_hidden is not None:
            add_product_(grad_hidden, raw, pieces.weight[columns])
        if grad_weight is not None:
            product_(grad_weight[columns], raw.t(), pieces.hidden)
        if grad_bias is not None:
            grad_bias[columns] = raw.sum(dim=0, dtype=pieces.dtype)
    return pieces.reduced(grad_hidden), grad_weight, grad_bias
