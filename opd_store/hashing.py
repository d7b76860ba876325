"""Digests that name things: rollouts, tokenizers, byte strings. Defined in `spec/hashing.md`."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any, TypeAlias

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from opd_store import layout
from opd_store.errors import FormatError, InvalidArgumentError

Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[Any] | pa.Buffer
"""Contiguous bytes, whoever owns them."""


def crc32c(data: Buffer, value: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of `data`, continued from `value`. Reads in place, makes no copy."""
    # The library refuses memoryview objects; a numpy view of the same bytes it takes.
    return int(google_crc32c.extend(value, np.frombuffer(data, np.uint8) if len(data) else b""))


def digest_to_raw(digest: str, *, what: str) -> bytes:
    """The 32 bytes of a `sha256:...` string.

    Raises:
        InvalidArgumentError: not of that form.
    """
    if not layout.DIGEST.fullmatch(digest):
        raise InvalidArgumentError(
            f"{what}: expected 'sha256:' and 64 hexadecimal digits, found {digest!r:.100}"
        )
    return bytes.fromhex(digest[len("sha256:") :])


def rollout_hash(token_ids: ArrayLike, tokenizer_fingerprint: str) -> bytes:
    """The name of a rollout, the same in every cache: 32 bytes.

    SHA-256 of a domain tag, the raw tokenizer fingerprint and the token ids as u32 little-endian. Neither the
    prompt boundary nor the teacher is in it, so any trainer that holds `input_ids` finds its row.

    Args:
        token_ids: [L] integers, prompt and response.
        tokenizer_fingerprint: `sha256:...`, see `tokenizer_fingerprint`.

    Raises:
        InvalidArgumentError: an id outside u32, or a malformed fingerprint.
    """
    fingerprint = digest_to_raw(tokenizer_fingerprint, what="tokenizer_fingerprint")
    ids = np.asarray(token_ids)
    in_range = ids.dtype == np.uint32 or not ids.size
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not (in_range or 0 <= ids.min() <= ids.max() < 1 << 32):
        raise InvalidArgumentError("token_ids: expected a one-dimensional array of integers in [0, 2**32)")
    ids = ids.astype("<u4", copy=False)
    return hashlib.sha256(layout.ROLLOUT_HASH_DOMAIN + fingerprint + ids.tobytes()).digest()


def tokenizer_fingerprint(tokenizer_json: bytes | str) -> str:
    """Fingerprint of a Hugging Face `tokenizer.json`: vocabulary, merges and special tokens, nothing else.

    Padding, truncation, post-processing and library version do not enter, because they change with use while
    the meaning of an id does not. Merges written as "a b" or ["a", "b"] give the same fingerprint.

    Args:
        tokenizer_json: the file's content.

    Returns:
        `sha256:...`.

    Raises:
        FormatError: not a tokenizer description with a vocabulary.
    """
    try:
        return _fingerprint(json.loads(tokenizer_json))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise FormatError(
            f"tokenizer.json: no usable vocabulary in it ({type(error).__name__}: {error!s:.200})"
        ) from error


def _fingerprint(description: dict[str, Any]) -> str:
    model: dict[str, Any] = description["model"]
    entries = model["vocab"]
    scored = not isinstance(entries, dict)
    pairs = (
        enumerate(token for token, _ in entries) if scored else ((i, token) for token, i in entries.items())
    )
    tokens: dict[int, str] = {int(i): str(token) for i, token in pairs}
    added = description.get("added_tokens") or []
    tokens.update({int(entry["id"]): str(entry["content"]) for entry in added})
    special = sorted(int(entry["id"]) for entry in added if entry.get("special"))
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]

    hasher = hashlib.sha256(layout.TOKENIZER_HASH_DOMAIN)

    def add(text: str) -> None:
        raw = text.encode("utf-8", "surrogatepass")
        hasher.update(struct.pack("<I", len(raw)) + raw)

    add(str(model.get("type")))
    hasher.update(struct.pack("<I", len(tokens)))
    for token_id in sorted(tokens):
        hasher.update(struct.pack("<I", token_id))
        add(tokens[token_id])
    hasher.update(struct.pack("<I", len(merges)))
    for left, right in merges:
        add(left)
        add(right)
    hasher.update(struct.pack(f"<I{len(special)}I", len(special), *special))
    if scored:
        hasher.update(struct.pack(f"<{len(entries)}d", *(float(score) for _, score in entries)))
    return "sha256:" + hasher.hexdigest()
