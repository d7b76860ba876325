"""Reads `.pt` files for `torch_load`, in a process that may do little. Run by path, never imported.

Speaks on standard input and output. Request: 8 bytes, the length of the file that follows. Answer: 8 bytes,
the length of a JSON header, the header, then the bytes of the arrays in it, one after another. Header:
`error`, or `tree` and `arrays` (dtype, shape). A tree is {"d": [[key, tree], ...]}, {"l": [tree, ...]},
{"a": number of the array} or {"v": a scalar}.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import resource
import sys
from typing import Any

import numpy as np
import torch

MEMORY = 2 << 30
"""Bytes of address space beyond what torch itself takes and twelve times the file."""
CPU_S = 60
"""CPU seconds of a file, and one more for each MiB."""
MOST_NODES = 1 << 20
MOST_DEPTH = 16
MOST_EXPANSION = 8
"""How much larger arrays may be than the file: a tensor of one value may claim any shape."""


def restrict(n_bytes: int) -> None:
    """Limits for reading a file of so many bytes; no new file may be written at all."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, taken + MEMORY + 12 * n_bytes)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + CPU_S + (n_bytes >> 20))
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


class Flattener:
    """A loaded object as a tree and arrays."""

    def __init__(self, most_bytes: int) -> None:
        self.arrays: list[tuple[str, np.ndarray[Any, Any]]] = []
        self._left = most_bytes
        self._nodes = 0

    def tree(self, value: object, depth: int = 0) -> dict[str, Any]:
        """Raises ValueError for anything but containers, tensors and scalars."""
        self._nodes += 1
        if depth > MOST_DEPTH or self._nodes > MOST_NODES:
            raise ValueError("too many nested or too many small values")
        if isinstance(value, torch.Tensor):
            return {"a": self._add(value)}
        if isinstance(value, dict):
            if not all(isinstance(key, str | int) for key in value):
                raise ValueError("a dict with keys that are neither text nor numbers")
            return {"d": [[str(key), self.tree(item, depth + 1)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            if (numbers := _numbers(value)) is not None:
                return {"a": self._add(numbers)}
            return {"l": [self.tree(item, depth + 1) for item in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"v": value}
        raise ValueError(f"a value of type {type(value).__name__}, which is no tensor, number, text or list")

    def _add(self, tensor: torch.Tensor) -> int:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise ValueError("a sparse, quantised or complex tensor")
        self._left -= tensor.numel() * tensor.element_size()
        if self._left < 0:
            raise ValueError("tensors that are much larger than the file")
        tensor = tensor.detach().cpu().contiguous()
        name = "bfloat16" if tensor.dtype == torch.bfloat16 else ""
        array = (tensor.view(torch.int16) if name else tensor).numpy()
        self.arrays.append((name or array.dtype.str, array))
        return len(self.arrays) - 1


def _numbers(value: list[Any] | tuple[Any, ...]) -> torch.Tensor | None:
    """A list of numbers as a tensor: a node each would be slow."""
    if len(value) < 2:
        return None
    if all(type(item) is int for item in value):
        return torch.tensor(value, dtype=torch.int64)
    if all(type(item) in (int, float) for item in value):
        return torch.tensor(value, dtype=torch.float64)
    return None


def answer(data: bytes) -> tuple[dict[str, Any], list[np.ndarray[Any, Any]]]:
    """The header for a file, and its arrays."""
    flattener = Flattener(MOST_EXPANSION * len(data) + (1 << 20))
    try:
        restrict(len(data))
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        tree = flattener.tree(loaded)
    except MemoryError:
        return {"error": "needs more memory than files of this size may"}, []
    except pickle.UnpicklingError as error:
        # The rest of torch's advice is how to run it nevertheless.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        return {"error": f"it names {named[1] if named else 'something'}, which is no tensor"}, []
    except Exception as error:  # whatever a damaged file makes torch raise
        return {
            "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:400]
        }, []
    arrays = [array for _, array in flattener.arrays]
    described = [[name, list(array.shape)] for name, array in flattener.arrays]
    return {"tree": tree, "arrays": described}, arrays


def serve() -> None:
    """Answer until standard input ends."""
    torch.set_num_threads(1)
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    # Whatever a library prints goes elsewhere.
    sys.stdout = sys.stderr
    while len(size := stdin.read(8)) == 8:
        header, arrays = answer(stdin.read(int.from_bytes(size, "little")))
        text = json.dumps(header).encode()
        stdout.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            stdout.write(array.tobytes())
        stdout.flush()


if __name__ == "__main__":
    serve()
