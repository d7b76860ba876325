"""Checkpoints: safetensors and JSON in a directory that appears whole or not at all. No pickle."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from opd_store import IntegrityError, StorageError
from opd_train.models import PROVENANCE_FILE, CausalLM

_STEP_NAME = re.compile(r"step-(\d{8})")
_PARTIAL_NAME = re.compile(r"\.(step-\d{8}|final)\.partial")
STATE_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
WEIGHTS_FILE = "student.safetensors"
RANDOM_FILE = "random.safetensors"
STATE_VERSION = 1


def save_model(lm: CausalLM, directory: Path, provenance: dict[str, Any]) -> None:
    """Write a Hugging Face directory, with tokenizer and `opd.json`, under a temporary name and rename it.

    Raises:
        StorageError: the disk refused; what was there before is intact.
    """
    _write_directory(directory, lambda temp: _write_model(lm, temp, provenance))


def save_checkpoint(
    lm: CausalLM,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    provenance: dict[str, Any],
    out: Path,
    step: int,
) -> None:
    """Write `out/step-XXXXXXXX`: weights, optimizer and whatever else is needed to go on exactly.

    Older checkpoints are removed.

    Raises:
        StorageError: the disk refused; the previous checkpoint is intact.
    """

    def write(temp: Path) -> None:
        # By the names of the live modules: transformers writes some architectures under other names.
        safetensors.torch.save_model(lm.model, str(temp / WEIGHTS_FILE))
        tensors, scalars = _flatten_optimizer(optimizer)
        safetensors.torch.save_file(tensors, temp / OPTIMIZER_FILE)
        safetensors.torch.save_file(_random_state(), temp / RANDOM_FILE)
        _write_provenance(temp, provenance)
        content = {"version": STATE_VERSION, "step": step, "optimizer": scalars, **state}
        (temp / STATE_FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")

    _write_directory(out / f"step-{step:08d}", write)
    for old_step, path in _checkpoints(out):
        if old_step < step:
            shutil.rmtree(path, ignore_errors=True)


def latest_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint below `out`, or None."""
    found = _checkpoints(out)
    return found[-1][1] if found else None


def remove_partial(out: Path) -> None:
    """Remove what a killed run was still writing below `out`."""
    for path in out.iterdir():
        if _PARTIAL_NAME.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        IntegrityError: it cannot be read, or is of another version.
    """
    path = checkpoint / STATE_FILE
    try:
        state = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{path}: cannot be read ({error}); delete {checkpoint} to start again"
        ) from error
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        raise IntegrityError(f"{path}: not a trainer state of version {STATE_VERSION}")
    return state


def load_tensors(
    lm: CausalLM, optimizer: torch.optim.Optimizer, checkpoint: Path, state: dict[str, Any]
) -> None:
    """Put weights, optimizer state and random state back, in place. Raises IntegrityError."""
    try:
        safetensors.torch.load_model(lm.model, checkpoint / WEIGHTS_FILE, device=str(lm.device))
        tensors = safetensors.torch.load_file(checkpoint / OPTIMIZER_FILE, device=str(lm.device))
        content = optimizer.state_dict()
        content["state"] = {}
        for name, tensor in tensors.items():
            index, _, field = name.partition(".")
            content["state"].setdefault(int(index), {})[field] = tensor.cpu() if field == "step" else tensor
        for group, scalars in zip(content["param_groups"], state["optimizer"], strict=True):
            group.update(scalars)
        optimizer.load_state_dict(content)
        _set_random_state(safetensors.torch.load_file(checkpoint / RANDOM_FILE))
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        raise IntegrityError(
            f"{checkpoint}: cannot be read ({error!s:.200}); delete it to start again"
        ) from error


def _random_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states.pop("cpu"))
    for device, state in states.items():
        torch.cuda.set_rng_state(state, device)


def _flatten_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    content = optimizer.state_dict()
    tensors = {
        f"{index}.{field}": value.contiguous()
        for index, fields in content["state"].items()
        for field, value in fields.items()
    }
    return tensors, [{"lr": group["lr"]} for group in content["param_groups"]]


def _checkpoints(out: Path) -> list[tuple[int, Path]]:
    if not out.is_dir():
        return []
    matches = ((_STEP_NAME.fullmatch(path.name), path) for path in out.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _write_model(lm: CausalLM, directory: Path, provenance: dict[str, Any]) -> None:
    lm.model.save_pretrained(directory, max_shard_size="1000GB")
    try:
        lm.tokenizer.save_pretrained(directory)
    except Exception as error:
        if type(error) is not Exception:
            raise
        # How tokenizers reports what the disk refuses.
        raise OSError(str(error)) from error
    _write_provenance(directory, provenance)


def _write_provenance(directory: Path, provenance: dict[str, Any]) -> None:
    text = json.dumps(provenance, indent=1, ensure_ascii=True, allow_nan=False, sort_keys=True)
    (directory / PROVENANCE_FILE).write_text(text + "\n", "utf-8")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a refusal of the disk into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write: {error.strerror or error}. Earlier checkpoints are intact.",
            errno=error.errno,
            filename=str(path),
        ) from error


def _write_directory(target: Path, write: Any) -> None:  # noqa: ANN401
    temp = target.parent / f".{target.name}.partial"
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        write(temp)
        for path in (*temp.rglob("*"), temp):
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        temp.rename(target)
        _sync(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temp, ignore_errors=True)
        raise StorageError(
            f"{target}: cannot write: {error}. Earlier checkpoints are intact; free space and run again.",
            errno=getattr(error, "errno", None),
            filename=str(target),
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
