"""The passes of `torch_backend` by Triton kernels, for contiguous raw logits of up to 32 bits on a GPU.

Kernels are compiled on first use; with TRITON_INTERPRET=1 they run on the CPU.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from opd_train.head import triton_kernels as kernels

_COLUMNS, _IDS = 4096, 64
# Fused multiply-add is named because Triton 3.9 warns that its default will change.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def statistics(
    raw_nv: Tensor, ids_nK: Tensor, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch_backend.statistics`."""
    n, v = raw_nv.shape
    top_n, sum_n = raw_nv.new_empty((2, n), dtype=torch.float32)
    picked_nK = raw_nv.new_empty(ids_nK.shape, dtype=torch.float32)
    if n:
        with torch.cuda.device_of(raw_nv):
            kernels.statistics_kernel[(n,)](
                raw_nv,
                ids_nK.contiguous(),
                top_n,
                sum_n,
                picked_nK,
                v,
                ids_nK.shape[1],
                scale,
                softcap or 0.0,
                CAPPED=softcap is not None,
                COLUMNS=_COLUMNS,
                IDS=_IDS,
                **_OPTIONS,
            )
    return top_n, sum_n, picked_nK


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
    """See `torch_backend.gradient_`."""
    (n, v), k = raw_nv.shape, ids_nK.shape[1]
    if not n:
        return
    total_n, lse_n = grad_nK.sum(dim=-1), lse_n.contiguous()
    curve = {"scale": scale, "softcap": softcap or 0.0, "CAPPED": softcap is not None}
    with torch.cuda.device_of(raw_nv):
        kernels.softmax_kernel[(n, triton.cdiv(v, _COLUMNS))](
            raw_nv, lse_n, total_n, v, **curve, COLUMNS=_COLUMNS, **_OPTIONS
        )
        if k:
            kernels.scatter_kernel[(n,)](
                raw_nv,
                ids_nK.contiguous(),
                logit_nK.contiguous(),
                grad_nK.contiguous(),
                lse_n,
                total_n,
                v,
                k,
                **curve,
                IDS=_IDS,
                **_OPTIONS,
            )
