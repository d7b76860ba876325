"""The passes of `torch_backend` as Triton kernels: logits are read once, then read and written once.

Formulas, with z = softcap * tanh(scale * raw / softcap) and g the gradient of the log-probs at the ids:

    dL/dz_v = -exp(z_v - lse) sum(g)                           v not among the ids
    dL/dz_v = sum of g at the places of v - exp(z_v - lse) sum(g)
    dL/draw_v = dL/dz_v * scale * (1 - (z_v / softcap)^2)

Ids are written after the rest, each with all that was added to it: repeated ids store the same value, so no
atomics are needed and results do not depend on an order. The start of a row is counted in 64 bits: rows times
columns may pass 2^31.
"""

import triton
import triton.language as tl


@triton.jit
def _logits(raw, scale, softcap, CAPPED: tl.constexpr):
    z = raw.to(tl.float32) * scale
    if CAPPED:
        # tanh by exp, which every backend has; exp may overflow to inf, which gives exactly 1.
        z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
    return z


@triton.jit
def _through_curve(grad, z, scale, softcap, CAPPED: tl.constexpr):
    grad = grad * scale
    if CAPPED:
        grad = grad * (1.0 - (z / softcap) * (z / softcap))
    return grad


@triton.jit
def statistics_kernel(
    raw,
    ids,
    top_out,
    sum_out,
    picked_out,
    n_columns,
    n_ids,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    raw += row * n_columns
    top = -float("inf")
    total = 0.0
    for start in range(0, n_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < n_columns
        z = _logits(tl.load(raw + column, mask=inside, other=0.0), scale, softcap, CAPPED)
        z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), axis=0)
        top = higher
    tl.store(top_out + row, top)
    tl.store(sum_out + row, total)
    for start in range(0, n_ids, IDS):
        k = start + tl.arange(0, IDS)
        place = tl.load(ids + row * n_ids + k, mask=k < n_ids, other=-1)
        inside = (place >= 0) & (place < n_columns)
        z = _logits(tl.load(raw + place, mask=inside, other=0.0), scale, softcap, CAPPED)
        tl.store(picked_out + row * n_ids + k, tl.where(inside, z, 0.0), mask=k < n_ids)


@triton.jit
def softmax_kernel(raw, lse, total, n_columns, scale, softcap, CAPPED: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = raw + row * n_columns + column
    inside = column < n_columns
    z = _logits(tl.load(place, mask=inside, other=0.0), scale, softcap, CAPPED)
    grad = _through_curve(-tl.load(total + row) * tl.exp(z - tl.load(lse + row)), z, scale, softcap, CAPPED)
    tl.store(place, grad.to(raw.dtype.element_ty), mask=inside)


@triton.jit
def scatter_kernel(
    raw,
    ids,
    logit,
    grad,
    lse,
    total,
    n_columns,
    n_ids,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    IDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    raw += row * n_columns
    ids += row * n_ids
    grad += row * n_ids
    for start in range(0, n_ids, IDS):
        k = start + tl.arange(0, IDS)
        place = tl.load(ids + k, mask=k < n_ids, other=-1)
        added = tl.zeros([IDS], tl.float32)
        for other_start in range(0, n_ids, IDS):
            j = other_start + tl.arange(0, IDS)
            other = tl.load(ids + j, mask=j < n_ids, other=-1)
            grad_j = tl.load(grad + j, mask=j < n_ids, other=0.0)
            added += tl.sum(tl.where(place[:, None] == other[None, :], grad_j[None, :], 0.0), axis=1)
        z = tl.load(logit + row * n_ids + k, mask=k < n_ids, other=0.0)
        found = added - tl.load(total + row) * tl.exp(z - tl.load(lse + row))
        found = _through_curve(found, z, scale, softcap, CAPPED)
        tl.store(raw + place, found.to(raw.dtype.element_ty), mask=(place >= 0) & (place < n_columns))
