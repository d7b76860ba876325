"""Several processes that train one student: who is who, what they tell each other, and sharded weights.

Weights are sharded along their first axis with FSDP2, each decoder layer for itself; the head, which is
applied apart from the body, is gathered once a batch. Needs torch 2.9 or later where there are several ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opd_store import InvalidArgumentError
from opd_train.models import CausalLM

if TYPE_CHECKING:
    # Loaded where there are several ranks only: it takes as long as the rest of this package.
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those that train together. The default is a process of its own."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    """Where this rank works; None leaves it to the caller."""
    mesh: DeviceMesh | None = None
    """One axis of all ranks; None with one rank."""

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401
        """Every rank's JSON value, in the order of ranks. All ranks have to call it."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.cat([data, data.new_zeros(longest - len(data))]))
        return [json.loads(bytes(t[: int(n)].numpy())) for t, n in zip(texts, sizes, strict=True)]

    def sum(self, sums: dict[str, float]) -> dict[str, float]:
        """The sums over all ranks, added in the order of ranks; a rank may lack some of the names."""
        total: dict[str, float] = {}
        for other in self.gather(sums):
            for name, value in other.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def max(self, value: int) -> int:
        """The largest value of any rank."""
        return max(map(int, self.gather(value)))


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """The ranks that torchrun started, and leave them at the end; without torchrun a world of one.

    Args:
        device: "cpu", or "cuda" or "auto" for the GPU of this rank's number on its machine.

    Raises:
        InvalidArgumentError: one particular GPU for all ranks, or a GPU this machine does not have.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    kind = device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"device {device!r}: with {size} ranks expected auto, cpu or cuda")
    own = torch.device("cpu")
    if kind == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise InvalidArgumentError(
                f"rank {local} of this machine: it has {torch.cuda.device_count()} GPUs; "
                "start as many processes as there are GPUs"
            )
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    from torch.distributed.device_mesh import init_device_mesh

    # What ranks tell each other as JSON stays on the CPU, and so never waits for a GPU.
    dist.init_process_group("gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        mesh = init_device_mesh(kind, (size,))
        yield World(rank=dist.get_rank(), size=size, device=own, mesh=mesh)
    finally:
        dist.destroy_process_group()


def shard(lm: CausalLM, world: World) -> None:
    """Divide the weights among the ranks, in place, and move this rank's part to its device.

    The body becomes FSDP modules that sum gradients over ranks (the caller divides by the count of tokens).
    What is outside the body (the head) becomes sharded tensors without hooks, see `whole_head`; tied weights
    stay tied. Every rank has to hold the same weights.
    """
    if world.mesh is None:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    model, body = lm.model, lm.model.base_model
    names_of_body = {parameter: name for name, parameter in body.named_parameters()}
    inside = set(body.modules())
    outside = [
        (module, name, parameter)
        for module in model.modules()
        if module not in inside
        for name, parameter in module.named_parameters(recurse=False)
    ]
    blocks = set(model._no_split_modules or ())
    for module in list(body.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=world.mesh)
    fully_shard(body, mesh=world.mesh)
    for module in body.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Dividing by one in the collective itself is something that gloo cannot do.
            module.set_force_sum_reduction_for_comms(True)
    sharded: dict[nn.Parameter, nn.Parameter] = {}
    for module, name, parameter in outside:
        if parameter in names_of_body:
            module._parameters[name] = body.get_parameter(names_of_body[parameter])
            continue
        if parameter not in sharded:
            part = distribute_tensor(parameter.detach(), world.mesh, [Shard(0)])
            sharded[parameter] = nn.Parameter(part, requires_grad=parameter.requires_grad)
        module._parameters[name] = sharded[parameter]


@contextmanager
def whole_head(lm: CausalLM) -> Iterator[None]:
    """Inside, the weights outside the body are whole tensors, through which gradients reach the shards.

    Gathered once, also where the head runs in many chunks. Backward has to be inside too, since a chunk may
    be computed again there. Without sharded weights this does nothing.
    """
    inside = set(lm.model.base_model.modules())
    replaced: list[tuple[nn.Module, str, Any]] = []
    gathered: dict[Tensor, Tensor] = {}
    for module in lm.model.modules():
        if module in inside:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if is_sharded(parameter):
                if parameter not in gathered:
                    gathered[parameter] = _whole_with_gradient(parameter)
                replaced.append((module, name, parameter))
    try:
        for module, name, parameter in replaced:
            module._parameters[name] = gathered[parameter]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def _whole_with_gradient(parameter: Any) -> Tensor:  # noqa: ANN401
    from torch.distributed.tensor import Partial

    # Every rank's gradient is of its own batch, and they add up.
    return parameter.full_tensor(grad_placements=[Partial()])  # type: ignore[no-any-return]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of it (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor that ranks hold parts of, on every rank; all of them have to call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_part(tensor: Tensor, world: World) -> tuple[Tensor, int]:
    """What of a tensor this rank holds, and at which row of the whole it begins."""
    if not is_sharded(tensor):
        return tensor, 0
    # As torch.chunk divides: all parts but the last are equally long.
    n_rows = -(-tensor.shape[0] // world.size)
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part, min(world.rank * n_rows, tensor.shape[0])
