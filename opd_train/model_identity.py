"""Who a model directory is: digests of weights, tokenizer and chat template, and what it was trained on."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
import torch

import opd_store
from opd_store import FormatError, InvalidArgumentError

PROVENANCE_FILE = "opd.json"
"""Written beside every model we train: which teacher's samples or cache it was trained on."""
_WEIGHTS_DOMAIN = b"opd-store weights v1\0"


def weights_digest(directory: str | os.PathLike[str]) -> str:
    """`sha256:...` over the tensors in a directory's safetensors files, by name: dtype, shape and bytes.

    The weights count as they are stored, so the digest depends neither on how they are split into files nor
    on the dtype they are later run in.

    Raises:
        InvalidArgumentError: no safetensors files.
        FormatError: one that cannot be read.
    """
    files = _weight_files(Path(directory))
    hasher = hashlib.sha256(_WEIGHTS_DOMAIN)
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safetensors.safe_open(path, framework="pt")) for path in files]
            holders = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
            for name in sorted(holders):
                tensor = holders[name].get_tensor(name)
                header = f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0".encode()
                hasher.update(struct.pack("<I", len(header)) + header)
                hasher.update(struct.pack(f"<{1 + tensor.ndim}Q", tensor.ndim, *tensor.shape))
                hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    except (OSError, safetensors.SafetensorError) as error:
        raise FormatError(f"{directory}: its weights cannot be read: {error}; fetch it again") from error
    return "sha256:" + hasher.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers loads."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            return sorted(directory / Path(name).name for name in names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{index}: not an index of weights: {error!s:.200}; fetch it again") from error
    single = directory / "model.safetensors"
    if not single.is_file():
        raise InvalidArgumentError(
            f"{directory}: no model.safetensors; convert the weights (pickled ones are never opened)"
        )
    return [single]


def read_provenance(directory: Path) -> dict[str, Any]:
    """Content of `opd.json` in a model directory, {} if there is none."""
    try:
        value = json.loads((directory / PROVENANCE_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{directory / PROVENANCE_FILE}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{directory / PROVENANCE_FILE}: expected a JSON object")
    return value


def fingerprint_of(tokenizer: Any, directory: Path) -> str:  # noqa: ANN401
    """Of a loaded tokenizer. Raises InvalidArgumentError if it is not a fast one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InvalidArgumentError(
            f"{directory}: its tokenizer has no tokenizer.json form, so its identity cannot be recorded. "
            "Convert it with transformers' fast tokenizers."
        )
    return opd_store.tokenizer_fingerprint(backend.to_str())


def chat_template_digest(tokenizer: Any) -> str | None:  # noqa: ANN401
    """`sha256:...` of a tokenizer's chat template, None without one."""
    template = tokenizer.chat_template
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
