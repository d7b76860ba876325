"""What a language-model head consists of, and what its functions accept.

Axes: N = positions, H = hidden size, V = vocabulary (of one shard, where it is split), K = ids per position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opd_store import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Which rows of the whole head a process of a vocabulary-parallel group holds.

    Every process of the group passes the same hidden states and ids, and gets the same log-probs and the same
    gradient of the hidden states. The gradient of the weights is that of its own rows.
    """

    group: dist.ProcessGroup
    first: int
    """Id of the shard's first row."""
    vocab_size: int
    """Rows of the whole head."""


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadWeights:
    """A head of the form softcap * tanh(scale * (h W^T + b) / softcap), or the same without soft-cap.

    Raises:
        InvalidArgumentError: shapes, dtypes or settings that no head has.
    """

    weight: Tensor
    """[V, H] floating point. May be tied to the embedding, or frozen: then no gradient is made for it."""
    bias: Tensor | None = None
    """[V], dtype of `weight`."""
    scale: float = 1.0
    """Cohere's `logit_scale`, or one over Granite's `logits_scaling`."""
    softcap: float | None = None
    """Gemma's `final_logit_softcapping`. The scale comes before it."""
    shard: VocabShard | None = None

    def __post_init__(self) -> None:
        weight, bias = self.weight, self.bias
        if weight.dim() != 2 or not weight.is_floating_point():
            raise InvalidArgumentError(
                f"head: expected a floating-point weight [V, H], found {_described(weight)}"
            )
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise InvalidArgumentError(
                f"head: expected a bias [{len(weight)}] of {weight.dtype}, found {_described(bias)}"
            )
        if not math.isfinite(self.scale) or not self.scale:
            raise InvalidArgumentError(f"head: expected a finite scale other than 0, found {self.scale}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise InvalidArgumentError(f"head: expected a soft-cap above 0 or None, found {self.softcap}")
        if self.shard is not None and not (
            0 <= self.shard.first <= self.shard.first + len(weight) <= self.shard.vocab_size
        ):
            raise InvalidArgumentError(
                f"head: {len(weight)} rows from id {self.shard.first} do not fit a vocabulary of "
                f"{self.shard.vocab_size}"
            )

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] float32 logits of these rows of the head, all at once and differentiable."""
        raw_NV = torch.nn.functional.linear(hidden_NH, self.weight, self.bias)
        logits_NV = self.scale * (raw_NV if raw_NV.dtype == torch.float64 else raw_NV.float())
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)

    @property
    def first(self) -> int:
        """Id of the first row."""
        return 0 if self.shard is None else self.shard.first

    @property
    def vocab_size(self) -> int:
        """Rows of the whole head."""
        return len(self.weight) if self.shard is None else self.shard.vocab_size


LmHead = Callable[[Tensor], Tensor] | HeadWeights
"""A description of a head, or [n, H] hidden states to [n, V] float32 logits, such as `CausalLM.logits`."""


def check_arguments(hidden: Tensor, lm_head: LmHead, ids: Tensor, chunk: int) -> None:
    """Refuse what cannot work.

    Ids on a GPU are not read, since that would wait for it: one outside the vocabulary gives NaN.

    Raises:
        InvalidArgumentError: the call cannot work.
    """
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise InvalidArgumentError(
            f"hidden: expected floating-point states [N, H], found {_described(hidden)}"
        )
    if ids.dim() != 2 or len(ids) != len(hidden) or ids.dtype != torch.int64:
        raise InvalidArgumentError(
            f"ids: expected [{len(hidden)}, K] of torch.int64, found {_described(ids)}"
        )
    if chunk < 1:
        raise InvalidArgumentError(f"chunk: expected at least 1 position, found {chunk}")
    if not isinstance(lm_head, HeadWeights):
        return
    weight = lm_head.weight
    if weight.shape[1] != hidden.shape[1] or weight.device != hidden.device:
        raise InvalidArgumentError(
            f"hidden: {_described(hidden)} does not fit the head's weight, {_described(weight)}"
        )
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise InvalidArgumentError(
            f"hidden: its dtype {hidden.dtype} is not the head's, {weight.dtype}; cast one, or use autocast"
        )
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= lm_head.vocab_size:
            raise InvalidArgumentError(
                f"ids: found {low if low < 0 else high}, expected 0 to {lm_head.vocab_size - 1}, "
                "the rows of the head"
            )


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
