"""What both forms of the head share: operands, pieces of logits, and the passes over them.

Axes: N = positions, H = hidden size, V = rows of this process's head, K = ids per position; n and v = rows
and columns of one piece of logits.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from opd_train.head import torch_backend
from opd_train.head.weights import HeadWeights


@functools.cache
def _triton_backend(device_type: str) -> ModuleType | None:
    """The kernels where they run: on a GPU, or on the CPU when Triton's interpreter is on."""
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from opd_train.head import triton_backend
    except ImportError:
        return None
    return triton_backend


@dataclass(frozen=True, eq=False)
class Pieces:
    """One call's operands in the dtype of its matrix products, and how to work on pieces of their product."""

    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    ids: Tensor
    """[N, K] counted from the shard's first row; those of other shards lie outside 0 to V - 1."""
    valid: Tensor
    """[N, K] whether an id is one of the whole vocabulary."""
    head: HeadWeights
    dtype: torch.dtype
    """Of sums and log-probs: float32, or float64 for float64."""

    @staticmethod
    def of(hidden: Tensor, head: HeadWeights, ids: Tensor, dtype: torch.dtype) -> Pieces:
        """Operands cast to `dtype`."""
        return Pieces(
            hidden.detach().to(dtype),
            head.weight.detach().to(dtype),
            None if head.bias is None else head.bias.detach().to(dtype),
            ids - head.first if head.first else ids,
            (ids >= 0) & (ids < head.vocab_size),
            head,
            torch.float64 if dtype == torch.float64 else torch.float32,
        )

    @property
    def _backend(self) -> ModuleType:
        found = None if self.dtype == torch.float64 else _triton_backend(self.hidden.device.type)
        return found or torch_backend

    @property
    def _curve(self) -> dict[str, float | None]:
        return {"scale": self.head.scale, "softcap": self.head.softcap}

    def buffer(self, rows: int, columns: int) -> Tensor:
        """Memory for pieces of up to this size."""
        return self.hidden.new_empty(rows * columns)

    def raw(self, buffer: Tensor, rows: slice, columns: slice) -> Tensor:
        """[n, v] raw logits of these positions and ids, bias included, in `buffer`."""
        hidden, weight = self.hidden[rows], self.weight[columns]
        out = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        if self.bias is None:
            return torch.mm(hidden, weight.t(), out=out)
        return torch.addmm(self.bias[columns], hidden, weight.t(), out=out)

    def statistics(self, raw_nV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """See `torch_backend.statistics`."""
        found: tuple[Tensor, Tensor, Tensor] = self._backend.statistics(raw_nV, self.ids[rows], **self._curve)
        return found

    def logprob(self, top_N: Tensor, sum_N: Tensor, picked_NK: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """[n, K] log-probs and [n] log-sum-exp over the whole vocabulary, from what each shard found."""
        if self.head.shard is not None:
            group, own_N = self.head.shard.group, top_N
            top_N = own_N.clone()
            dist.all_reduce(top_N, dist.ReduceOp.MAX, group=group)
            # One message: the owner of an id adds its logit, the others 0.
            sums = torch.cat([(sum_N * torch.exp(own_N - top_N))[:, None], picked_NK], dim=1)
            dist.all_reduce(sums, group=group)
            sum_N, picked_NK = sums[:, 0], sums[:, 1:]
        lse_N = top_N + sum_N.log()
        return (picked_NK - lse_N[:, None]).masked_fill(~self.valid[rows], torch.nan), lse_N

    def gradient_(
        self, raw_nv: Tensor, rows: slice, first: int, logprob_nK: Tensor, lse_n: Tensor, grad_nK: Tensor
    ) -> None:
        """Replace raw logits of the columns from `first` on by their gradient."""
        ids_nK = self.ids[rows]
        ids_nK = ids_nK - first if first else ids_nK
        logit_nK = logprob_nK + lse_n[:, None]
        self._backend.gradient_(raw_nv, ids_nK, logit_nK, lse_n, grad_nK, **self._curve)

    def reduced(self, grad_hidden: Tensor | None) -> Tensor | None:
        """The gradient of the hidden states, summed over the shards."""
        if grad_hidden is not None and self.head.shard is not None:
            dist.all_reduce(grad_hidden, group=self.head.shard.group)
        return grad_hidden


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of matrix products: that of autocast where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """Without autograd and autocast: dtypes are chosen here."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
