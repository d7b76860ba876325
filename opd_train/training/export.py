"""The trained model as a Hugging Face directory, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_train.models import CausalLM, load_causal_lm
from opd_train.training.distributed import World, local_part, whole
from opd_train.training.lora import adapter_tensors, read_adapters
from opd_train.training.provenance import write_provenance
from opd_train.training.run_directory import write_directory

Export = Callable[[dict[str, Tensor], Path], dict[str, Tensor]]


def save_model(
    lm: CausalLM,
    directory: Path,
    provenance: dict[str, Any],
    *,
    world: World | None = None,
    export: Export | None = None,
) -> None:
    """Write a Hugging Face directory, with tokenizer and `opd.json`, under a temporary name and rename it.

    Args:
        world: the ranks that hold the weights, all of which call this; the first one writes.
        export: gets all tensors by name and the directory; what it returns is written as the model.

    Raises:
        StorageError: the disk refused; what was there before is intact.
    """
    world = world or World()
    tensors = whole_state(lm, world)

    def write(temp: Path) -> None:
        if world.first:
            _write_model(lm, temp, tensors if export is None else export(tensors, temp))
            write_provenance(temp, provenance)

    write_directory(directory, write, world=world)


def whole_state(lm: CausalLM, world: World) -> dict[str, Tensor]:
    """All of a model's tensors by name, tied ones as one; {} on all ranks but the first.

    Shards are gathered on the CPU; a model that is not sharded is not copied.
    """
    found: dict[str, Tensor] = {}
    gathered: dict[Tensor, Tensor] = {}
    for name, tensor in lm.model.state_dict(keep_vars=True).items():
        if world.size == 1:
            found[name] = tensor.detach()
            continue
        if tensor not in gathered:
            full = whole(tensor.detach())
            gathered[tensor] = full.cpu() if world.first else full.new_empty(0)
        if world.first:
            found[name] = gathered[tensor]
    return found


@torch.no_grad()
def load_trained(lm: CausalLM, directory: Path, *, adapters: bool, world: World) -> None:
    """Give a student the weights that `save_model` wrote, in place; sharded ones get this rank's rows.

    Args:
        adapters: the student has adapters, and only these are read.
    """
    tensors = read_adapters(lm, directory) if adapters else load_causal_lm(directory).model.state_dict()
    wanted = adapter_tensors(lm) if adapters else trained_tensors(lm)
    for name, tensor in wanted.items():
        own, first = local_part(tensor, world)
        own.copy_(tensors[name][first : first + len(own)] if own.ndim else tensors[name])


def trained_tensors(lm: CausalLM) -> dict[str, Tensor]:
    """By the names of the live modules: parameters that are trained, and buffers that belong to the model."""
    kept = lm.model.state_dict().keys()
    buffers = {name: buffer for name, buffer in lm.model.named_buffers() if name in kept}
    return {name: p for name, p in lm.model.named_parameters() if p.requires_grad} | buffers


def _write_model(lm: CausalLM, directory: Path, tensors: dict[str, Tensor]) -> None:
    lm.model.save_pretrained(directory, state_dict=tensors, max_shard_size="1000GB")
    try:
        lm.tokenizer.save_pretrained(directory)
    except Exception as error:
        if type(error) is not Exception:
            raise
        # How tokenizers reports what the disk refuses.
        raise OSError(str(error)) from error
