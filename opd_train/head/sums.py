"""Products and sums of products that are wider than their operands.

Axes: n = positions of one piece, H = hidden size, V = rows of the head.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_ROWS = 1024
"""Rows that are narrowed at a time."""


def product_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, in the dtype of `out`, which may be wider."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        add_product_(out.zero_(), left, right)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated in the dtype of `total`, which may be wider."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _accumulates_wider(left.device.type):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


@functools.cache
def _accumulates_wider(device_type: str) -> bool:
    """Whether addmm takes bfloat16 and adds to float32: on GPUs, from torch 2.8 on."""
    one = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
    total = torch.zeros(16, 16, device=device_type)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (TypeError, NotImplementedError, RuntimeError):
        return False
    return True


class WeightGradient:
    """[V, H] sum of products in float32, handed out in the weight's dtype: the memory of one float32 copy.

    A sum in 16 bits would lose most of what many small pieces add, and a float32 sum beside its 16-bit copy
    would be the largest thing in memory. So half of the sum lives in the memory of the copy, and `finish`
    narrows it in place, last rows first: what it writes lies behind all it still has to read.
    """

    def __init__(self, weight_VH: Tensor, dtype: torch.dtype) -> None:
        v, h = weight_VH.shape
        self._out = torch.zeros_like(weight_VH, memory_format=torch.contiguous_format)
        self._parts = [self._out]
        if weight_VH.dtype != dtype:
            last = v // 2
            inside = self._out.view(-1)[: 2 * last * h].view(dtype).view(last, h)
            self._parts = [self._out.new_zeros((v - last, h), dtype=dtype), inside]

    def add(self, grad_nV: Tensor, hidden_nH: Tensor) -> None:
        """Add grad^T @ hidden."""
        sizes = [len(part) for part in self._parts]
        for part, columns in zip(self._parts, grad_nV.split(sizes, dim=1), strict=True):
            add_product_(part, columns.t(), hidden_nH)

    def finish(self) -> Tensor:
        """The sum. Nothing can be added afterwards."""
        if len(self._parts) == 2:
            first, inside = self._parts
            for start in reversed(range(0, len(inside), _ROWS)):
                rows = inside[start : start + _ROWS].to(self._out.dtype)
                self._out[len(first) + start :][: len(rows)] = rows
            self._out[: len(first)] = first
        self._parts = []
        return self._out
