"""From hidden states to the few log-probs a loss needs, without ever holding [N, V].

Axes: N = chosen positions, H = hidden size, V = vocabulary, K = ids per position.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LmHead = Callable[[Tensor], Tensor]
"""[n, H] hidden states to [n, V] float32 logits, such as `CausalLM.logits`."""


def topk_logprobs(hidden: Tensor, lm_head: LmHead, ids: Tensor, *, chunk: int = 1024) -> Tensor:
    """Log-probs at chosen ids; differentiable with respect to `hidden` and the head's weights.

    Works through `chunk` positions at a time and computes their logits again in the backward pass, so that at
    most [chunk, V] exists. Normalisation is over the whole vocabulary, in float32.

    Args:
        hidden: [N, H] floating point.
        lm_head: maps hidden states to logits.
        ids: [N, K] int64, below V.
        chunk: positions per piece.

    Returns:
        [N, K] float32, nats.
    """
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
