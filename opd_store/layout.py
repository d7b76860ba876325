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
PAGE_RAGGED = 1
"""Flag: some rows of the page have fewer ranks than the band, and the body starts with their counts."""
PAGE_USES_TABLE = 2
"""Flag: the ids refer to the cache's id table, whose digest is part of the checksum."""
PAGE_FLAGS = PAGE_RAGGED | PAGE_USES_TABLE
PAGE_KIND_SHIFT = 4
"""The upper four bits of the flags are the kind of support."""
KIND_TOPK, KIND_CHOSEN, KIND_SAMPLED = range(3)
PAGE_ALIGNMENT = 8
"""Pages are zero-padded to this multiple, so that every array in a mapped page is aligned."""

ARROW_MAGIC = b"ARROW1\0\0"
"""First eight bytes of an Arrow IPC file; the last six are `ARROW1`."""

NATIVE_PARTS = 2
"""Parts of a record batch before those of packed columns: scalars, lists. Each packed column is a part."""

NO_ID = 0xFFFFFFFF
"""Id of padding, where a row has fewer ranks than its neighbours; its log-prob is -inf."""
ID_TABLE_MAGIC = b"OPDIDS1\0"

DEFAULT_BAND_ENDS = (8, 64)
"""Rank bands end here, cut at the cache's top-k. Each further band costs 2 to 3 bytes a position."""

HASH_BYTES = 32
ROLLOUT_HASH_DOMAIN = b"opd-store rollout v1\0"
TOKENIZER_HASH_DOMAIN = b"opd-store tokenizer v1\0"

MANIFEST_DIR = "manifests"
INDEX_DIR = "index"
SHARD_DIR = "shards"
TABLE_DIR = "tables"
TABLE_SUFFIX = ".ids"
MANIFEST_NAME = re.compile(r"[0-9]{8}\.json")
BLOB_NAME = re.compile(r"[0-9a-f]{64}\.(arrow|ids)")
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
MAX_DECODED_BYTES = 1 << 26
"""12 bytes an entry and 4 a position: what decoding a compressed page may allocate for its result."""
MAX_ID_TABLE_BYTES = 1 << 26
MAX_BATCH_BYTES = 1 << 30
MAX_TEXT_BYTES = 4096
"""UTF-8 bytes of one sample_id, label, finish_reason or text user column value."""

PROBABILITY_TOLERANCE = 1e-3
"""How far the probabilities of one position may exceed 1 in sum: float32 log-probs of 4,096 ranks."""
READER_SLACK = 1e-6
"""What readers allow beyond that, since tails of inner bands are summed and rounded by the writer."""
LARGEST_SUM_ERROR = 0.0625
"""Of a cache's `max_error`, nats, what counts for the sum of probabilities at most: that of four roundings to
`ladder/32`."""


def manifest_path(sequence: int) -> str:
    """Relative name of the manifest of version `sequence` (1-based)."""
    return f"{MANIFEST_DIR}/{sequence:08d}.json"


def removed_path(sequence: int) -> str:
    """Relative name of the file that says that versions up to `sequence` were removed on purpose."""
    return f"{MANIFEST_DIR}/{sequence:08d}.removed"


def band_ends(topk: int) -> tuple[int, ...]:
    """Default band ends for a cache of `topk` ranks: 20 gives (8, 20), 0 gives ()."""
    if topk == 0:
        return ()
    return (*(end for end in DEFAULT_BAND_ENDS if end < topk), topk)
