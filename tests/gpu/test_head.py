"""The head on a GPU: compiled kernels, products that add to float32, and no waiting for the device."""

from __future__ import annotations

import pytest
import torch
from train.heads import CURVES, assert_close_to, problem, solve

from opd_train.head import HeadWeights, fused_loss, pieces, topk_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
SHAPES = [(0, 8, 5, 2), (1, 8, 2, 1), (13, 8, 37, 3), (11, 16, 9001, 131), (300, 64, 50257, 17)]


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(params=["triton", "torch"])
def backend(request, monkeypatch):
    """Each backend in turn."""
    if request.param == "torch":
        monkeypatch.setattr(pieces, "_triton_backend", lambda _: None)
    else:
        pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("curve", ["plain", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["recompute", "fused"])
@pytest.mark.usefixtures("backend")
def test_equals_dense_in_value_and_in_every_gradient(form, shape, curve, dtype):
    given = problem(*shape, CURVES[curve], device="cuda").to(dtype, "cuda")
    exact = given.to(torch.float64, "cuda")
    top = exact.logits(exact.hidden).abs().amax().item() if shape[0] else 1.0
    assert_close_to(solve(exact, "naive"), solve(given, form, 128), dtype, top)


def test_the_kernels_do_what_plain_torch_does():
    pytest.importorskip("triton")
    from train import head_kernels

    for dtype in head_kernels.DTYPES:
        for shape in head_kernels.SHAPES:
            for curve in ("plain", "all"):
                head_kernels.test_kernels_do_what_plain_torch_does("cuda", dtype, shape, curve)
    head_kernels.test_columns_at_minus_infinity("cuda")
    head_kernels.test_nan_is_not_lost("cuda")


def test_offsets_pass_two_to_the_31():
    triton_backend = pytest.importorskip("opd_train.head.triton_backend")
    n, v = 16_400, 131_072
    raw = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    raw[-1, 5] = 4.0
    ids = torch.full((n, 1), 5, device="cuda")
    top, total, picked = triton_backend.statistics(raw, ids, scale=1.0, softcap=None)
    assert picked[-1].item() == 4.0
    assert top[-1].item() == 4.0
    triton_backend.gradient_(
        raw, ids, picked, top + total.log(), torch.ones(n, 1, device="cuda"), scale=1.0, softcap=None
    )
    share = 1 / (v - 1 + torch.tensor(4.0).exp())
    torch.testing.assert_close(raw[-1, 6].float().cpu(), -share, rtol=2**-8, atol=0)
    torch.testing.assert_close(
        raw[-1, 5].float().cpu(), 1 - share * torch.tensor(4.0).exp(), rtol=2**-8, atol=0
    )


def test_products_add_to_float32_without_a_wider_copy():
    # bfloat16 sums stop growing at 256 equal pieces.
    hidden = torch.ones(4096, 64, dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(128, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    ids = torch.zeros(4096, 1, dtype=torch.int64, device="cuda")
    fused_loss(hidden, HeadWeights(weight=weight), ids, lambda x, _: x.sum(), chunk=1).loss.backward()
    expected = 4096 * (torch.eye(128, device="cuda")[0] - 1 / 128)[:, None].expand(128, 64)
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("form", ["recompute", "fused"])
def test_memory_is_that_of_the_gradients_and_one_chunk(form):
    n, h, v, chunk = 2048, 256, 64_000, 128
    given = problem(n, h, v, 8).to(torch.bfloat16, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    solve(given, form, chunk)
    extra = torch.cuda.max_memory_allocated() - before
    # Float32 sums of both gradients, a chunk, and a fifth for what else there is.
    assert extra < 1.2 * (4 * v * h + 4 * n * h + 2 * chunk * v) + 2**24


def test_ids_are_not_waited_for_and_a_wrong_one_gives_nan():
    given = problem(4, 8, 37, 2).to(torch.float32, "cuda")
    topk_logprobs(given.hidden, given.head, given.ids)  # compiles
    ids = given.ids.clone()
    ids[1, 1], ids[2, 0] = 37, -1
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = topk_logprobs(given.hidden, given.head, ids)
        fused = fused_loss(given.hidden, given.head, ids, lambda x, _: x.sum())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for logprob in (found, fused.logprob):
        assert logprob.isnan().nonzero().tolist() == [[1, 1], [2, 0]]
    assert fused.loss.isnan()
