"""Checkpoints: what a run needs to go on exactly, as safetensors and JSON. No pickle.

    step-00000040/rank-00000.safetensors   what rank 0 held: weights, optimizer state, random state
                  rank-00001.safetensors   ...
                  trainer.json             the step, the state of every rank's source, and of each file its
                                           digest and which rows of which tensor are in it
                  opd.json                 which run this is

Weights that are not trained are not in it. A tensor is sharded along its first axis or not at all; then the
first rank writes it. So any number of ranks can go on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from opd_store import IntegrityError
from opd_train.models import CausalLM
from opd_train.training.distributed import World, is_sharded, local_part
from opd_train.training.export import save_model, trained_tensors
from opd_train.training.provenance import write_provenance
from opd_train.training.run_directory import checkpoints, write_directory

__all__ = ["load_checkpoint", "read_state", "save_checkpoint", "save_model"]

STATE_FILE = "trainer.json"
STATE_VERSION = 2


def save_checkpoint(
    lm: CausalLM,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    provenance: dict[str, Any],
    out: Path,
    step: int,
    *,
    world: World,
) -> None:
    """Write `out/step-XXXXXXXX`, and remove older checkpoints. Every rank calls it.

    Args:
        state: JSON values; "source" is this rank's, the rest is taken from the first rank.

    Raises:
        StorageError: the disk refused; the previous checkpoint is intact.
    """

    def write(temp: Path) -> dict[str, Any]:
        tensors, places = {}, {}
        for name, tensor in _all_tensors(lm, optimizer).items():
            if world.first or is_sharded(tensor):
                part, first_row = local_part(tensor, world)
                tensors[name] = part.detach().contiguous()
                places[name] = [list(tensor.shape), first_row, len(part) if part.ndim else 1]
        tensors |= _random_state(lm.device)
        path = temp / _file_name(world.rank)
        safetensors.torch.save_file(tensors, path)
        return {"sha256": _digest(path), "tensors": places, "source": state["source"]}

    def finish(temp: Path, written: list[dict[str, Any]]) -> None:
        content = {
            **state,
            "version": STATE_VERSION,
            "step": step,
            "source": [part.pop("source") for part in written],
            "files": written,
        }
        text = json.dumps({"sha256": _state_digest(content), "state": content}, indent=1, allow_nan=False)
        (temp / STATE_FILE).write_text(text + "\n", "utf-8")
        write_provenance(temp, provenance)

    write_directory(out / f"step-{step:08d}", write, finish, world=world)
    if world.first:
        for old_step, path in checkpoints(out):
            if old_step < step:
                shutil.rmtree(path, ignore_errors=True)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        IntegrityError: it cannot be read, was changed, or is of another version.
    """
    path = checkpoint / STATE_FILE
    try:
        content = json.loads(path.read_text("utf-8"))
        digest, state = content["sha256"], content["state"]
        version = state["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{path}: cannot be read ({error!s:.200}); delete {checkpoint} to start again"
        ) from error
    if version != STATE_VERSION:
        raise IntegrityError(f"{path}: not a trainer state of version {STATE_VERSION}")
    if _state_digest(state) != digest:
        raise IntegrityError(f"{path}: differs from what was written; delete {checkpoint} to start again")
    return state  # type: ignore[no-any-return]


def load_checkpoint(
    lm: CausalLM,
    optimizer: torch.optim.Optimizer,
    checkpoint: Path,
    state: dict[str, Any],
    *,
    world: World,
) -> None:
    """Put weights, optimizer state and random state back, in place. Every rank calls it.

    At the number of ranks that wrote it every bit is as it was; another number starts new random streams.

    Raises:
        IntegrityError: a file is missing or differs from what was written. Weights may have changed by then.
    """
    try:
        files = state["files"]
        _make_state(lm, optimizer, {name for part in files for name in part["tensors"]})
        with ExitStack() as stack:
            opened: dict[int, Any] = {}

            def file(rank: int) -> Any:  # noqa: ANN401
                if rank not in opened:
                    path = checkpoint / _file_name(rank)
                    if (found := _digest(path)) != files[rank]["sha256"]:
                        raise ValueError(f"{path.name} has SHA-256 {found}, not {files[rank]['sha256']}")
                    opened[rank] = stack.enter_context(safetensors.safe_open(path, framework="pt"))
                return opened[rank]

            wanted = _all_tensors(lm, optimizer)
            if (there := {name for part in files for name in part["tensors"]}) != wanted.keys():
                raise ValueError(f"{min(there ^ wanted.keys())} is in one of checkpoint and run only")
            for name, tensor in wanted.items():
                _fill(name, tensor, file, files, world)
            if len(files) == world.size:
                _set_random_state(lm.device, file(world.rank))
    except (
        *(OSError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError),
        safetensors.SafetensorError,
    ) as error:
        raise IntegrityError(
            f"{checkpoint}: cannot be read ({error!s:.300}); delete it to start again"
        ) from error


@torch.no_grad()
def _fill(
    name: str,
    tensor: Tensor,
    file: Callable[[int], Any],
    files: list[dict[str, Any]],
    world: World,
) -> None:
    """Copy this rank's rows of a tensor from the files that hold them."""
    own, first = local_part(tensor, world)
    n_missing = len(own) if own.ndim else 1
    for rank, part in enumerate(files):
        if name not in part["tensors"]:
            continue
        shape, begin, n_rows = part["tensors"][name]
        if shape != list(tensor.shape):
            raise ValueError(f"{name} has shape {shape} there, {list(tensor.shape)} here")
        if not own.ndim:
            own.copy_(file(rank).get_tensor(name))
            n_missing = 0
            continue
        low, high = max(first, begin), min(first + len(own), begin + n_rows)
        if low < high:
            own[low - first : high - first].copy_(file(rank).get_slice(name)[low - begin : high - begin])
            n_missing -= high - low
    if n_missing:
        raise ValueError(f"{name}: {n_missing} of its rows are in no file")


def _all_tensors(lm: CausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {f"student/{name}": tensor for name, tensor in trained_tensors(lm).items()}
    for name, parameter in lm.model.named_parameters():
        for field, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer/{name}/{field}"] = value
    return found


def _make_state(lm: CausalLM, optimizer: torch.optim.Optimizer, names: Collection[str]) -> None:
    """Zeros for the state that a checkpoint holds: a parameter that never had a gradient has none."""
    for name, parameter in lm.model.named_parameters():
        if f"optimizer/{name}/step" in names:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random/cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(device: torch.device, file: Any) -> None:  # noqa: ANN401
    torch.set_rng_state(file.get_tensor("random/cpu"))
    if device.type == "cuda":
        torch.cuda.set_rng_state(file.get_tensor("random/cuda"), device)


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
