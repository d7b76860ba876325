"""What a published cache has to say about itself, and what it may not be published without."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from opd_store import Cache, CacheMeta, InvalidArgumentError, ModelInfo, teacher_consistency
from opd_tools.console import printable

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_MORE_SIZES = (
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)
_SEMANTIC = re.compile(r"v?\d+\.\d+\.\d+")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SAMPLED_BATCHES = 16


@dataclass(frozen=True, slots=True)
class Facts:
    """A cache in words and numbers. Texts come from files and are made printable by whoever writes them."""

    title: str
    url: str
    """Where it goes, without a pin."""
    digest: str
    tag: str
    """"" for none."""
    meta: CacheMeta
    rollouts: int
    tokens: int
    response_tokens: int
    n_bytes: int
    n_shards: int
    topk: int
    encoding: str
    max_error: float
    columns: dict[str, float]
    """Bytes a response token of every column that takes some, in up to 16 record batches."""
    consistency: str

    @property
    def teacher(self) -> ModelInfo:
        """The one that `require` asks for."""
        assert self.meta.teacher is not None
        return self.meta.teacher

    @property
    def licence(self) -> str:
        """The terms that `require` asks for."""
        return printable(self.meta.licence or "", None)

    @property
    def slug(self) -> str:
        """The title in letters, digits, dots and dashes."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.title).strip("-.")[:80] or "cache"

    @property
    def has_semantic_tag(self) -> bool:
        """Whether the tag is a version as v1.0.0 is one."""
        return _SEMANTIC.fullmatch(self.tag) is not None

    @property
    def link(self) -> str:
        """Address for people, else the one of the cache."""
        name = self.url.partition("://")[2].partition("@")[0]
        return f"https://huggingface.co/{name}" if self.url.startswith("hf://") else self.url

    @property
    def size_category(self) -> str:
        """As the Hub has them."""
        sizes = (*_SIZES, *_MORE_SIZES)
        return next((name for limit, name in sizes if self.rollouts < limit), "n>1B")

    @property
    def base_model(self) -> str | None:
        """The teacher, where its name can be one on the Hub."""
        return self.teacher.name if _HUB_NAME.fullmatch(self.teacher.name) else None

    @property
    def summary(self) -> str:
        """One sentence."""
        what = f"its top-{self.topk} log-probs" if self.topk else "its log-probs"
        return (
            f"{self.rollouts:,} rollouts with {self.response_tokens:,} response tokens, scored by "
            f"{printable(self.teacher.name)}: {what} at every position, as a cache of opd-store."
        )


def facts_of(cache: Cache, *, title: str, url: str, tag: str) -> Facts:
    """Read the index and a few record batches.

    Raises:
        FormatError, IntegrityError, StorageError: the cache is damaged, or cannot be read.
    """
    sizes, tokens = cache.column_bytes(batches=_SAMPLED_BATCHES)
    return Facts(
        title=title,
        url=url,
        digest=cache.digest,
        tag=tag,
        meta=cache.meta,
        rollouts=len(cache),
        tokens=cache.n_tokens,
        response_tokens=cache.n_response_tokens,
        n_bytes=cache.n_bytes,
        n_shards=cache.n_shards,
        topk=cache.topk,
        encoding=cache.encoding,
        max_error=cache.max_error,
        columns={name: size / max(tokens, 1) for name, size in sizes.items() if size},
        consistency=teacher_consistency(cache.meta),
    )


def require(meta: CacheMeta, where: str) -> None:
    """Refuse what nobody could use or cite.

    Raises:
        InvalidArgumentError: the licence or the identity of a teacher is unknown.
    """
    missing: list[str] = []
    if not (meta.licence or "").strip():
        missing.append("the licence of the teacher's outputs (--licence)")
    if meta.teacher is None or not meta.teacher.name.strip() or meta.teacher.name == "unknown":
        missing.append("the teacher (--teacher)")
    unknown: list[Any] = [meta.teacher, *meta.other_teachers]
    if any(model is not None and not (model.revision or model.weights_digest) for model in unknown):
        missing.append("which weights the teacher has (--teacher-revision or --teacher-digest)")
    elif meta.teacher is None:
        missing.append("its weights (--teacher-revision or --teacher-digest)")
    if missing:
        raise InvalidArgumentError(f"{where}: not published, as it does not say: {'; '.join(missing)}")
