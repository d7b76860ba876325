"""The ways to a loss on top-k log-probs that bench/head.py compares: value and both gradients.

The loss is KL(teacher || student) on K ids and the tail, summed over positions. Two peers have no loss on
top-k and do less: one label a position, the nearest they have.

Axes: N = positions, H = hidden size, V = vocabulary, K = ids per position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_train.head import HeadWeights, fused_loss, topk_logprobs
from opd_train.losses import topk_forward_kl

Gradients = tuple[Tensor, Tensor]
"""Of the hidden states and of the weight."""


class Unavailable(Exception):
    """A peer that does not run here, and why."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One problem; `hidden` and `weight` are leaves with gradients."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    """[N, K]; the first column is the label of losses that know only one."""
    teacher: Tensor
    """[N, K] log-probs that leave a tail."""
    log_tail: Tensor
    chunk: int

    def loss(self, logprob_nK: Tensor, rows: slice = slice(None)) -> Tensor:
        """Summed over the positions of `rows`."""
        return topk_forward_kl(logprob_nK, self.teacher[rows], self.log_tail[rows]).sum()

    def gradients(self, loss: Tensor) -> Gradients:
        """Through autograd."""
        found = torch.autograd.grad(loss, (self.hidden, self.weight))
        return found[0], found[1]

    def first(self, n: int, dtype: torch.dtype | None = None) -> Task:
        """The first `n` positions, in leaves of their own."""
        leaves = [leaf.detach().to(dtype or leaf.dtype) for leaf in (self.hidden[:n], self.weight)]
        hidden, weight = (leaf.clone().requires_grad_() for leaf in leaves)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        teacher, log_tail = self.teacher[:n].to(wide), self.log_tail[:n].to(wide)
        return Task(
            hidden=hidden,
            weight=weight,
            ids=self.ids[:n],
            teacher=teacher,
            log_tail=log_tail,
            chunk=self.chunk,
        )


def make_task(
    n: int, h: int, v: int, k: int, *, chunk: int, dtype: torch.dtype, device: str, seed: int
) -> Task:
    """Logits of unit variance; a teacher with nine tenths of its mass on K random ids, falling with rank."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    mass = torch.softmax(-torch.arange(k, device=device) / 8 + 0.5 * draw(n, k), dim=-1)
    return Task(
        hidden=draw(n, h).to(dtype).requires_grad_(),
        weight=(draw(v, h) / h**0.5).to(dtype).requires_grad_(),
        ids=torch.randint(v, (n, k), generator=generator, device=device),
        teacher=(0.9 * mass).log(),
        log_tail=torch.full((n,), 0.1, device=device).log(),
        chunk=chunk,
    )


def gemms(task: Task) -> Gradients:
    """The three products alone, on one piece: what every form has to do."""
    with torch.no_grad():
        logits = task.hidden @ task.weight.t()
        return logits @ task.weight, logits.t() @ task.hidden


def naive(task: Task) -> Gradients:
    """log_softmax of all logits in float32."""
    return task.gradients(_dense(task.hidden, task.weight, task))


def _dense(hidden: Tensor, weight: Tensor, task: Task) -> Tensor:
    logits = hidden @ weight.t()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return task.loss(torch.log_softmax(wide, dim=-1).gather(-1, task.ids))


_compiled: Callable[..., Tensor] | None = None


def compiled(task: Task) -> Gradients:
    """The same through torch.compile."""
    global _compiled
    if _compiled is None:
        _compiled = torch.compile(_dense, dynamic=False)
    return task.gradients(_compiled(task.hidden, task.weight, task))


def checkpointed(task: Task) -> Gradients:
    """Chunks of logits by a function, computed again by autograd."""
    logprob = topk_logprobs(task.hidden, lambda hidden: hidden @ task.weight.t(), task.ids, chunk=task.chunk)
    return task.gradients(task.loss(logprob))


def recompute(task: Task) -> Gradients:
    """Ours: `topk_logprobs` with the head's weights."""
    logprob = topk_logprobs(task.hidden, HeadWeights(weight=task.weight), task.ids, chunk=task.chunk)
    return task.gradients(task.loss(logprob))


def fused(task: Task) -> Gradients:
    """Ours: `fused_loss`."""
    head = HeadWeights(weight=task.weight)
    return task.gradients(fused_loss(task.hidden, head, task.ids, task.loss, chunk=task.chunk).loss)


def trl(task: Task) -> Gradients:
    """TRL's chunked log-prob of one label a position."""
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError as error:
        raise Unavailable(f"trl: {error}") from error
    arguments = (task.hidden, task.weight, None, task.ids[:, 0].contiguous(), 1.0, 32_768, None, 1.0, ())
    return task.gradients(-ChunkedLogProbFunction.apply(*arguments)[0].sum())


def liger(task: Task) -> Gradients:
    """Liger's fused linear cross-entropy of one label a position."""
    if task.hidden.device.type != "cuda":
        raise Unavailable("liger-kernel: needs a GPU")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise Unavailable(f"liger-kernel: {error}") from error
    loss_fn = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return task.gradients(loss_fn(task.weight, task.hidden, task.ids[:, 0].contiguous()))


BARE = "bare products"
NAIVE, COMPILED = "naive", "naive, torch.compile"
FUSED, RECOMPUTE = "ours: fused_loss", "ours: topk_logprobs"
FORMS: dict[str, Callable[[Task], Gradients]] = {
    BARE: gemms,
    NAIVE: naive,
    COMPILED: compiled,
    "chunks, checkpoint": checkpointed,
    "TRL, one label": trl,
    "Liger, one label": liger,
    RECOMPUTE: recompute,
    FUSED: fused,
}
SAME_LOSS = (NAIVE, COMPILED, "chunks, checkpoint", RECOMPUTE, FUSED)
"""Forms whose gradients can be compared with the reference."""
