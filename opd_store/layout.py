"""Every byte offset, name and limit of the format, written once. `spec/layout.json` mirrors this module."""

from __future__ import annotations

import re
import struct

FORMAT_NAME = "opd-store"
FORMAT_MAJOR = 1
FORMAT_MINOR = 0

PAGE_HEADER = struct.Struct("<BBHHHIIII")
"""encoding, flags, rank_start, rank_end, reserved, n_positions, body_bytes, parameter, crc32c: 24 bytes."""
PAGE_CRC_OFFSET = 20
PAGE_ALIGNMENT = 8
"""Pages are zero-padded to this multiple, so that every array in a mapped page is aligned."""

ARROW_MAGIC = b"ARROW1\0\0"
"""First eight bytes of an Arrow IPC file; the last six are `ARROW1`."""

DEFAULT_BAND_ENDS = (8, 16, 32, 64, 128)
"""Rank bands end here, cut at the cache's top-k."""

HASH_BYTES = 32
ROLLOUT_HASH_DOMAIN = b"opd-store rollout v1\0"
TOKENIZER_HASH_DOMAIN = b"opd-store tokenizer v1\0"

MANIFEST_DIR = "manifests"
INDEX_DIR = "index"
SHARD_DIR = "shards"
MANIFEST_NAME = re.compile(r"[0-9]{8}\.json")
BLOB_NAME = re.compile(r"[0-9a-f]{64}\.arrow")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
USER_COLUMN = re.compile(r"x_[a-z0-9_]{1,62}")
MAX_VERSION = 99_999_999

MAX_MANIFEST_BYTES = 1 << 20
MAX_JSON_DEPTH = 16
MAX_JSON_STRING = 4096
MAX_JSON_INT = (1 << 53) - 1
MAX_SEGMENTS = 64
MAX_TOPK = 4096
MAX_VOCAB = 1 << 24
MAX_ROLLOUT_TOKENS = 1 << 22
MAX_PAGE_BYTES = 1 << 27
MAX_BATCH_BYTES = 1 << 30
MAX_TEXT_BYTES = 4096
"""UTF-8 bytes of one sample_id, label, finish_reason or text user column value."""

PROBABILITY_TOLERANCE = 1e-3
"""How far the stored probabilities of one position may exceed 1 in sum: float32 log-probs of 4,096 ranks."""


def manifest_path(sequence: int) -> str:
    """Relative name of the manifest of version `sequence` (1-based)."""
    return f"{MANIFEST_DIR}/{sequence:08d}.json"


def band_ends(topk: int) -> tuple[int, ...]:
    """Default band ends for a cache of `topk` ranks: 20 gives (8, 16, 20), 0 gives ()."""
    if topk == 0:
        return ()
    return (*(end for end in DEFAULT_BAND_ENDS if end < topk), topk)
