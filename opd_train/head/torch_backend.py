"""The two passes over a piece of logits in plain torch: the reference, on any device.

A piece is what a matrix product left: [n, v] raw logits in the head's dtype. Ids are counted from the piece's
first column; those outside it belong to another piece. Arithmetic is in float32, or float64 for float64.

Axes: n = rows of the piece, v = its columns, K = ids per row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements whose temporaries exist at a time. Smaller blocks are no faster on one thread, and on several each
# operation waits for the slowest: on a busy machine 2^18 took seven times as long.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 22, 1 << 26


def statistics(
    raw_nv: Tensor, ids_nK: Tensor, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a log-softmax needs of a piece.

    Returns:
        [n] largest logit, [n] sum of exp(logit - largest), [n, K] logits at the ids, 0 where not in the
        piece.
    """
    tops, sums, picked = [], [], []
    for rows in _blocks(raw_nv):
        z = _logits(raw_nv[rows], scale, softcap)
        top = z.amax(dim=-1)
        # A shard may hold nothing but padding, at -inf.
        shift = top.masked_fill(top.isneginf(), 0.0)
        tops.append(top)
        sums.append((z - shift[:, None]).exp_().sum(dim=-1))
        inside, place = _places(ids_nK[rows], z.shape[1])
        picked.append(torch.where(inside, z.gather(-1, place), 0.0))
    return torch.cat(tops), torch.cat(sums), torch.cat(picked)


def gradient_(
    raw_nv: Tensor,
    ids_nK: Tensor,
    logit_nK: Tensor,
    lse_n: Tensor,
    grad_nK: Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """Replace raw logits by their gradient: scatter(g) - softmax * sum(g), times the slope.

    Args:
        logit_nK: logits at the ids; not read here.
        lse_n: log of the sum of exp(logit) over the whole vocabulary.
        grad_nK: gradient of the log-probs at the ids. Repeated ids add up.
    """
    del logit_nK
    for rows in _blocks(raw_nv):
        z, grad_K = _logits(raw_nv[rows], scale, softcap), grad_nK[rows]
        grad = (z - lse_n[rows, None]).exp_().mul_(-grad_K.sum(dim=-1, keepdim=True))
        inside, place = _places(ids_nK[rows], z.shape[1])
        grad.scatter_add_(-1, place, torch.where(inside, grad_K, 0.0))
        if softcap is not None:
            grad *= 1 - (z / softcap) ** 2
        raw_nv[rows] = grad.mul_(scale)


def _blocks(raw_nv: Tensor) -> Iterator[slice]:
    elements = _CPU_ELEMENTS if raw_nv.device.type == "cpu" else _GPU_ELEMENTS
    rows = max(1, elements // max(1, raw_nv.shape[1]))
    for start in range(0, len(raw_nv), rows):
        yield slice(start, start + rows)


def _logits(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = raw if raw.dtype == torch.float64 else raw.float()
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _places(ids: Tensor, n_columns: int) -> tuple[Tensor, Tensor]:
    return (ids >= 0) & (ids < n_columns), ids.clamp(0, n_columns - 1)
