"""Low-rank adapters (arXiv 2106.09685) through `peft`, put into the student's own layers.

The model's class, its body and its head stay what they are, so nothing else has to know of adapters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from opd_store import InvalidArgumentError
from opd_train.models import CausalLM
from opd_train.training.config import LoraConfig

ADAPTER_DIR = "adapter"
_NAME = "default"
_BASE = "base_layer."


def add_adapters(lm: CausalLM, config: LoraConfig, *, seed: int) -> None:
    """Put adapters into the student, in place; only they will be trained. They start as no change at all.

    Raises:
        InvalidArgumentError: no layer has such a name, or head or embedding has; or `peft` is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise InvalidArgumentError("LoRA needs peft: pip install 'opd-store[lora]'") from error
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets) or "all-linear",
        base_model_name_or_path=lm.info.name,
    )
    ends = (lm.model.get_output_embeddings(), lm.model.get_input_embeddings())
    for name, module in lm.model.named_modules():
        if module in ends and any(f".{name}".endswith(f".{target}") for target in config.targets):
            raise InvalidArgumentError(
                f"lora targets {list(config.targets)}: {name} cannot have an adapter; leave it out"
            )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # GPT-2's layers hold their weights transposed; peft sees that, says so and does the right thing.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(settings, lm.model, adapter_name=_NAME)
        except ValueError as error:
            raise InvalidArgumentError(f"lora targets {list(config.targets)}: {error!s:.300}") from error


def adapter_tensors(lm: CausalLM) -> dict[str, Tensor]:
    """The adapters' weights by the names of the live modules."""
    return {name: p for name, p in lm.model.named_parameters() if f".{_NAME}." in name and "lora_" in name}


@torch.no_grad()
def export_merged(lm: CausalLM, tensors: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """The student's weights with its adapters added in; the adapters themselves go to `directory/adapter`.

    Args:
        tensors: all of the model's, whole.

    Returns:
        Tensors under the names that the model had before it got adapters.
    """
    merged = {name.replace(_BASE, ""): tensor for name, tensor in tensors.items() if f".{_NAME}." not in name}
    for prefix, layer in _layers(lm.model):
        own = {
            name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")
        }
        with _with_tensors(layer, own):
            delta = layer.get_delta_weight(_NAME)
        name = f"{prefix}.weight"
        merged[name] = merged[name] + delta.to(merged[name])
    adapter = directory / ADAPTER_DIR
    adapter.mkdir()
    settings = copy.copy(lm.model.peft_config[_NAME])
    # A set of names is written in another order by every process.
    settings.target_modules = sorted(settings.target_modules)
    settings.save_pretrained(adapter)
    kept = {_peft_name(name): tensors[name].contiguous() for name in adapter_tensors(lm)}
    safetensors.torch.save_file(kept, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return merged


def read_adapters(lm: CausalLM, directory: Path) -> dict[str, Tensor]:
    """What `export_merged` wrote, by the names of the live modules. Raises KeyError for other adapters."""
    stored = safetensors.torch.load_file(directory / ADAPTER_DIR / "adapter_model.safetensors")
    return {name: stored[_peft_name(name)] for name in adapter_tensors(lm)}


def _peft_name(name: str) -> str:
    return "base_model.model." + name.replace(f".{_NAME}.", ".")


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


@contextmanager
def _with_tensors(layer: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the layer holds these instead of its own, which may be shards."""
    replaced = []
    for name in tensors:
        owner, _, last = name.rpartition(".")
        module = layer.get_submodule(owner)
        replaced.append((module, last, module._parameters.get(last)))
        module._parameters[last] = tensors[name]  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, last, parameter in replaced:
            module._parameters[last] = parameter
