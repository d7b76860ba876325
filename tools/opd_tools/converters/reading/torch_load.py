"""Strangers' `.pt` files: loaded with weights only in a process of its own, handed over as plain arrays."""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError, InvalidArgumentError

MOST_BYTES = 4 << 30
"""Of one file."""
_MOST_HEADER = 256 << 20
_DTYPES = {
    "|b1",
    "|u1",
    "|i1",
    *(f"<{kind}{size}" for kind in "iu" for size in (2, 4, 8)),
    "<f2",
    "<f4",
    "<f8",
}


class TorchLoader:
    """Loads `.pt` files, one after another, in a child that has limits on memory, CPU time and files.

    The child loads with `weights_only=True`, which calls nothing that a file names beyond what rebuilds
    tensors. It answers with arrays and JSON, never with pickles.
    """

    def __init__(self) -> None:
        """Raises InvalidArgumentError: torch is not installed."""
        if importlib.util.find_spec("torch") is None:
            raise InvalidArgumentError("reading .pt files needs torch; pip install 'opd-store[train]'")
        self._owner = os.getpid()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        # -I: nothing from the working directory or the environment is imported.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("torch_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    @property
    def is_alive(self) -> bool:
        """Whether it was started here and can load more."""
        return os.getpid() == self._owner and self._process.poll() is None

    def close(self) -> None:
        """End the child."""
        if os.getpid() != self._owner:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            # The child may be gone before it took everything.
            try:
                stream.close()
            except BrokenPipeError:
                continue
        self._errors.close()

    def load(self, data: bytes, where: str) -> Any:  # noqa: ANN401
        """What a file holds: dicts, lists, arrays, scalars; bfloat16 becomes float32.

        Raises:
            FormatError: not such a file, damaged, holding more than tensors, or beyond the limits.
        """
        if len(data) > MOST_BYTES:
            raise FormatError(f"{where}: {len(data)} bytes; .pt files are read up to {MOST_BYTES} bytes")
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(len(data).to_bytes(8, "little"))
            stdin.write(data)
            stdin.flush()
            header = json.loads(_exactly(stdout, _length(stdout)))
            fault = header.get("error")
            arrays = [_array(stdout, name, shape) for name, shape in header.get("arrays", [])]
            loaded = None if fault else _built(header["tree"], arrays)
        except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            self._errors.seek(0)
            told = self._errors.read(1 << 16).decode("utf-8", "replace").strip().splitlines()
            # What is left of its answer would be taken for the next one.
            self.close()
            raise FormatError(
                f"{where}: reading it ended the process that read it, by the limits on memory and time or a "
                f"fault of torch: {told[-1] if told else error!s:.200}"
            ) from error
        if fault:
            raise FormatError(f"{where}: cannot be read as tensors alone: {fault!s:.300}")
        return loaded


_loader: TorchLoader | None = None


def load(data: bytes, where: str) -> Any:  # noqa: ANN401
    """As `TorchLoader.load`, by one child of this process: importing torch takes longer than most files."""
    global _loader
    if _loader is None or not _loader.is_alive:
        _loader = TorchLoader()
        atexit.register(_loader.close)
    return _loader.load(data, where)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("no answer")
    return data


def _length(stream: IO[bytes]) -> int:
    size = int.from_bytes(_exactly(stream, 8), "little")
    if size > _MOST_HEADER:
        raise ValueError("a header without end")
    return size


def _array(stream: IO[bytes], name: str, shape: list[int]) -> NDArray[Any]:
    if name != "bfloat16" and name not in _DTYPES:
        raise ValueError(f"dtype {name!r:.20}")
    dtype = np.dtype(np.uint16 if name == "bfloat16" else name)
    count = math.prod(shape)
    if (
        any(not isinstance(size, int) or size < 0 for size in shape)
        or count * dtype.itemsize > 16 * MOST_BYTES
    ):
        raise ValueError("an impossible shape")
    found = np.frombuffer(_exactly(stream, count * dtype.itemsize), dtype).reshape(shape)
    if name == "bfloat16":
        return (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return found


def _built(tree: dict[str, Any], arrays: list[NDArray[Any]]) -> Any:  # noqa: ANN401
    ((kind, value),) = tree.items()
    if kind == "d":
        return {key: _built(item, arrays) for key, item in value}
    if kind == "l":
        return [_built(item, arrays) for item in value]
    return arrays[value] if kind == "a" else value
