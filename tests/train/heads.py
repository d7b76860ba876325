"""Problems for the language-model head, their float64 solution, and the ways to solve them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_train.head import HeadWeights, fused_loss, topk_logprobs


@dataclass(frozen=True)
class Curve:
    """What a head does around its product."""

    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None


CURVES = {
    "plain": Curve(),
    "bias": Curve(bias=True),
    "softcap": Curve(softcap=1.5),
    "scale": Curve(scale=0.125),
    "all": Curve(bias=True, scale=-1.7, softcap=3.0),
}


@dataclass
class Problem:
    """Leaves with gradients, ids that may repeat, and the loss sum(outer * logprob + exp(logprob))."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    outer: Tensor
    curve: Curve

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]

    @property
    def head(self) -> HeadWeights:
        return HeadWeights(
            weight=self.weight, bias=self.bias, scale=self.curve.scale, softcap=self.curve.softcap
        )

    def logits(self, hidden: Tensor) -> Tensor:
        z = hidden @ self.weight.T
        z = self.curve.scale * (z if self.bias is None else z + self.bias)
        return z if self.curve.softcap is None else self.curve.softcap * torch.tanh(z / self.curve.softcap)

    def loss(self, logprob: Tensor, rows: slice = slice(None)) -> Tensor:
        return (self.outer[rows].to(logprob.dtype) * logprob + logprob.exp()).sum()

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Problem:
        """Its own leaves, rounded."""
        leaves = [
            None if leaf is None else leaf.detach().to(device, dtype).requires_grad_()
            for leaf in (self.hidden, self.weight, self.bias)
        ]
        return Problem(*leaves, self.ids.to(device), self.outer.to(device), self.curve)


def problem(
    n: int, h: int, v: int, k: int, curve: Curve = CURVES["plain"], *, seed: int = 0, device: str = "cpu"
) -> Problem:
    """Random float64 tensors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    ids = torch.randint(0, v, (n, k), generator=generator).to(device)
    drawn = Problem(draw(n, h), draw(v, h), draw(v) if curve.bias else None, ids, draw(n, k), curve)
    return drawn.to(torch.float64, device)


def solve(given: Problem, form: str, chunk: int = 1024, *, head: Any = None) -> tuple[Tensor, list[Tensor]]:
    """Log-probs, and the gradients of the loss with respect to every leaf.

    "naive" is the definition. "function" passes a function to logits, "recompute" the head's weights.
    """
    if form == "naive":
        logprob = torch.log_softmax(given.logits(given.hidden), dim=-1).gather(-1, given.ids)
        loss = given.loss(logprob)
    elif form == "fused":
        loss, logprob = fused_loss(given.hidden, head or given.head, given.ids, given.loss, chunk=chunk)
    else:
        lm_head = given.logits if form == "function" else head or given.head
        logprob = topk_logprobs(given.hidden, lm_head, given.ids, chunk=chunk)
        loss = given.loss(logprob)
    return logprob.detach(), list(torch.autograd.grad(loss, given.leaves, materialize_grads=True))


def assert_close_to(
    exact: tuple[Tensor, list[Tensor]], found: tuple[Tensor, list[Tensor]], dtype: torch.dtype, top: float
) -> None:
    """Log-probs in float32, each gradient in the dtype of its leaf, both near the float64 solution.

    `top` is the largest logit. bfloat16 keeps 8 bits: a logit is off by up to 2^-9 of itself, a log-prob by
    that of two logits, and a gradient, relative to its norm, by a few roundings of 2^-9.
    """
    wide = dtype == torch.float64
    value, relative = {
        torch.float64: (1e-12, 1e-12),
        torch.float32: (1e-5, 1e-5),
        torch.bfloat16: (2 * top * 2**-8, 2**-6),
    }[dtype]
    assert found[0].dtype == (torch.float64 if wide else torch.float32)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-6, atol=value)
    for gradient, expected in zip(found[1], exact[1], strict=True):
        assert gradient.dtype == dtype
        assert gradient.shape == expected.shape
        assert (gradient.double() - expected).norm() <= relative * expected.norm() + 1e-12
