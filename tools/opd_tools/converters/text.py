"""Tokenizers, for formats that hold text, and the identity of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import opd_store
from opd_store import InvalidArgumentError


class TextTokenizer:
    """A tokenizer.json, through the `tokenizers` package."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidArgumentError: not such a file."""
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise InvalidArgumentError(f"{path}: not a tokenizer.json: {error!s:.200}") from error

    def encode(self, text: str, where: str) -> NDArray[np.int64]:
        """Ids of a text, with no special tokens added."""
        del where
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """Text of ids, special tokens included."""
        return str(self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False))


def tokenizer_file(path: Path) -> Path:
    """tokenizer.json itself, or the one in a model's directory. Raises InvalidArgumentError."""
    found = path / "tokenizer.json" if path.is_dir() else path
    if not found.is_file():
        raise InvalidArgumentError(
            f"--tokenizer: {found} is not there; give a tokenizer.json or its directory"
        )
    return found


def identity(path: Path) -> tuple[str, int]:
    """Fingerprint, and number of ids, of a tokenizer.json. Raises InvalidArgumentError."""
    data = path.read_bytes()
    try:
        content = json.loads(data)
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [token["id"] for token in content.get("added_tokens") or ()]
        size = max([*ids, *added]) + 1
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(f"{path}: not a tokenizer.json: {error!s:.200}") from error
    return opd_store.tokenizer_fingerprint(data), int(size)
