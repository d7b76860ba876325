"""The Triton kernels against `torch_backend`. Run by test_head_triton.py in the interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from train.heads import CURVES

from opd_train.head import torch_backend, triton_backend

# And what a gradient may be off by, relative to the row's largest. The interpreter
# cuts off to bfloat16 where a GPU rounds.
DTYPES = {torch.float32: 3e-6, torch.bfloat16: 2**-7}
# n, v, K: less than a block of columns, one more, two and a rest; one and two blocks of ids, and none.
SHAPES = [(1, 1, 1), (3, 331, 5), (2, 4097, 64), (2, 9001, 131), (3, 7, 0)]


@pytest.fixture
def device():
    return "cpu"


def piece(shape, dtype, device):
    """Raw logits, and ids of which some repeat and some belong to the pieces before and after."""
    n, v, k = shape
    generator = torch.Generator().manual_seed(sum(shape))
    raw = (4 * torch.randn(n, v, generator=generator)).to(device, dtype)
    ids = torch.randint(-v // 4 - 1, v + v // 4 + 1, (n, k), generator=generator)
    if k > 2:
        ids[:, 0], ids[:, 1], ids[:, -1] = v - 1, 0, v - 1
    return raw, ids.to(device), torch.randn(n, k, generator=generator).to(device)


@pytest.mark.parametrize("curve", ["plain", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_do_what_plain_torch_does(device, dtype, shape, curve):
    options = {"scale": CURVES[curve].scale, "softcap": CURVES[curve].softcap}
    raw, ids, grad = piece(shape, dtype, device)
    found = triton_backend.statistics(raw, ids, **options)
    expected = torch_backend.statistics(raw.double(), ids, **options)
    for mine, reference in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-5)
    lse = (expected[0] + expected[1].log()).float()
    exact = raw.double()
    torch_backend.gradient_(exact, ids, expected[2], lse.double(), grad.double(), **options)
    # Columns that belong to other shards weigh in the log-sum-exp, and in nothing else.
    triton_backend.gradient_(raw, ids, expected[2].float(), lse, grad, **options)
    error = (raw.double() - exact).abs()
    if k := ids.shape[1]:
        error /= torch.cat([exact, grad], dim=1).abs().amax(dim=-1, keepdim=True)
    assert error.max() <= DTYPES[dtype] * (k > 0)


def test_columns_at_minus_infinity(device):
    raw = torch.full((2, 5000), -torch.inf, device=device)
    raw[1, 4999] = 3.0
    ids = torch.tensor([[4999], [4999]], device=device)
    top, total, picked = triton_backend.statistics(raw, ids, scale=1.0, softcap=None)
    assert top.tolist() == [-torch.inf, 3.0]
    assert total.tolist() == [0.0, 1.0]
    assert picked.tolist() == [[-torch.inf], [3.0]]
    lse = torch.tensor([0.0, 3.0], device=device)
    triton_backend.gradient_(raw, ids, picked, lse, torch.ones_like(picked), scale=1.0, softcap=None)
    assert raw[1].tolist() == [0.0] * 5000, "a certain outcome has no gradient, an impossible one neither"


def test_nan_is_not_lost(device):
    raw = torch.zeros(1, 9001, device=device)
    raw[0, 4500] = torch.nan
    _, total, _ = triton_backend.statistics(
        raw, torch.zeros(1, 1, dtype=torch.int64, device=device), scale=1.0, softcap=None
    )
    assert total.isnan().all()
