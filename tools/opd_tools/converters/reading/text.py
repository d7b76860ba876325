"""Tokenizers, for formats that hold text, and the identity of one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import opd_store
from opd_store import FormatError, InvalidArgumentError


class TextTokenizer:
    """A tokenizer.json, through the `tokenizers` package."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidArgumentError: not such a file."""
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise InvalidArgumentError(f"{path}: not a tokenizer.json: {error!s:.200}") from error
        self._path = path
        self._chat: Any = None

    def encode(self, text: str, where: str, *, special: bool = False) -> NDArray[np.int64]:
        """Ids of a text, with the special tokens that its template adds if asked for. Raises FormatError."""
        try:
            return np.asarray(self._tokenizer.encode(text, add_special_tokens=special).ids, np.int64)
        except Exception as error:  # as above
            raise FormatError(f"{where}: text that cannot be encoded: {error!s:.200}") from error

    def chat(
        self,
        messages: list[Any],
        tools: Any,  # noqa: ANN401
        where: str,
        *,
        answer: bool = True,
    ) -> NDArray[np.int64]:
        """Ids of a conversation, up to where the assistant answers if `answer`.

        Raises:
            InvalidArgumentError: there is no chat template beside tokenizer.json.
            FormatError: the template refuses these messages.
        """
        if self._chat is None:
            import transformers

            directory = self._path.parent
            try:
                self._chat = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
            except (OSError, ValueError) as error:
                raise InvalidArgumentError(
                    f"{where}: messages need a chat template; give --tokenizer a directory with "
                    f"tokenizer_config.json beside tokenizer.json: {error!s:.200}"
                ) from error
        if self._chat.chat_template is None:
            raise InvalidArgumentError(
                f"{where}: messages need a chat template, and {self._path.parent} has none; add "
                "token ids to the file"
            )
        try:
            ids = self._chat.apply_chat_template(
                messages, tools=tools, add_generation_prompt=answer, return_dict=False
            )
        except Exception as error:  # whatever a template raises
            raise FormatError(f"{where}: the chat template refuses its messages: {error!s:.200}") from error
        return np.asarray(ids, np.int64)

    def spelling(self) -> dict[bytes, tuple[int, ...]]:
        """Bytes of every token, and the ids that have them."""
        described = json.loads(self._tokenizer.to_str())
        kinds = set(_types(described.get("decoder"))) | set(_types(described.get("pre_tokenizer")))
        special = {token["id"]: token["content"] for token in described.get("added_tokens") or ()}
        spelt: dict[bytes, list[int]] = {}
        fallback: dict[bytes, list[int]] = {}
        for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if number in special:
                spelt.setdefault(special[number].encode(), []).append(number)
            elif "ByteFallback" in kinds and _BYTE.fullmatch(token):
                fallback.setdefault(bytes.fromhex(token[3:5]), []).append(number)
            elif "ByteLevel" in kinds:
                if all(char in _FROM_BYTE_LEVEL for char in token):
                    spelt.setdefault(bytes(_FROM_BYTE_LEVEL[char] for char in token), []).append(number)
            else:
                spelt.setdefault(token.replace("\u2581", " ").encode(), []).append(number)
        # A tokenizer falls back to bytes only where it has no piece, so that a piece is what was meant.
        return {text: tuple(ids) for text, ids in {**fallback, **spelt}.items()}

    def decode(self, ids: ArrayLike) -> str:
        """Text of ids, special tokens included."""
        return str(self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False))


def _types(part: Any) -> Iterator[str]:  # noqa: ANN401
    """Types of a tokenizer's part and of all parts in it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in (*(part.get("decoders") or ()), *(part.get("pretokenizers") or ())):
            yield from _types(inner)


def _byte_level() -> dict[str, int]:
    """GPT-2's characters for bytes: themselves where they print, from U+0100 on where they do not."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_FROM_BYTE_LEVEL = _byte_level()
_BYTE = re.compile("<0x[0-9A-F]{2}>")


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
