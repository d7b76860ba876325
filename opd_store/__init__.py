"""The cache: a versioned, checked, memory-mapped store of teacher log-probs. Never imports torch."""

from opd_store.cache import Cache
from opd_store.cache import open_cache as open
from opd_store.consistency import ConsistencyReport, check_consistency
from opd_store.create import append, create
from opd_store.encodings import (
    ENCODINGS,
    FloatStreams,
    IdTable,
    LadderStreams,
    PageShape,
    PageStreams,
    build_id_table,
)
from opd_store.errors import (
    CacheExistsError,
    CacheNotFoundError,
    CommitConflictError,
    FormatError,
    IntegrityError,
    InvalidArgumentError,
    InvalidRolloutError,
    MismatchError,
    OpdError,
    StorageError,
    UnsupportedVersionError,
)
from opd_store.gather import Packed, gather
from opd_store.hashing import rollout_hash, tokenizer_fingerprint
from opd_store.layout import NO_ID
from opd_store.meta import (
    RENORMALISED_TOPK,
    CacheMeta,
    ModelInfo,
    SamplerInfo,
    diff_meta,
    teacher_consistency,
)
from opd_store.rollout import Rollout
from opd_store.schema import CacheSchema, Cut
from opd_store.select import join, select, split
from opd_store.snapshot import snapshot
from opd_store.verify import VerifyReport, verify
from opd_store.writer import Version, Writer

__version__ = "0.1.0"

__all__ = [
    "ENCODINGS",
    "NO_ID",
    "RENORMALISED_TOPK",
    "Cache",
    "CacheExistsError",
    "CacheMeta",
    "CacheNotFoundError",
    "CacheSchema",
    "CommitConflictError",
    "ConsistencyReport",
    "Cut",
    "FloatStreams",
    "FormatError",
    "IdTable",
    "IntegrityError",
    "InvalidArgumentError",
    "InvalidRolloutError",
    "LadderStreams",
    "MismatchError",
    "ModelInfo",
    "OpdError",
    "Packed",
    "PageShape",
    "PageStreams",
    "Rollout",
    "SamplerInfo",
    "StorageError",
    "UnsupportedVersionError",
    "VerifyReport",
    "Version",
    "Writer",
    "append",
    "build_id_table",
    "check_consistency",
    "create",
    "diff_meta",
    "gather",
    "join",
    "open",
    "rollout_hash",
    "select",
    "snapshot",
    "split",
    "teacher_consistency",
    "tokenizer_fingerprint",
    "verify",
]
