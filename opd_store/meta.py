"""Identity and provenance of a cache: which models, tokenizer, sampler and data it came from.

Absent (`None`) means unknown. Nothing here is guessed: a field is filled by whoever knew it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from opd_store import layout
from opd_store.errors import FormatError, InvalidArgumentError
from opd_store.hashing import digest_to_raw

RENORMALISED_TOPK = "renormalised_topk"
"""`ModelInfo.logprob_mode` of log-probs that sum to 1 over the stored ranks, because what is outside was lost
before they came here. Their `log_tail` of -inf says nothing about the teacher."""

T = TypeVar("T")
_hints: Callable[[type], dict[str, Any]] = functools.cache(typing.get_type_hints)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """One model, as far as its log-probs depend on it."""

    name: str
    revision: str | None = None
    weights_digest: str | None = None
    """`sha256:...` over names, dtypes, shapes and bytes of all tensors; how models are compared."""
    dtype: str | None = None
    """Dtype the forward pass ran in, such as "bfloat16"."""
    quantisation: str | None = None
    engine: str | None = None
    engine_version: str | None = None
    logprob_temperature: float | None = None
    """Temperature the stored log-probs were computed at; 1.0 is the raw distribution."""
    logprob_mode: str | None = None
    """"raw" (before any sampling rule), "processed" (after temperature, top-p and the rest) or
    `RENORMALISED_TOPK`."""

    def __post_init__(self) -> None:
        if self.weights_digest is not None:
            digest_to_raw(self.weights_digest, what=f"weights_digest of {self.name!r:.80}")

    def to_json(self) -> dict[str, Any]:
        """A JSON object without the unknown fields."""
        return typing.cast(dict[str, Any], _dump(self))

    @classmethod
    def from_json(cls, value: object, *, where: str) -> ModelInfo:
        """Read a description from parsed JSON; `where` names its source in errors. Raises FormatError."""
        return _load(cls, value, where, allow_unknown=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerInfo:
    """How the behaviour policy turned logits into tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    engine: str | None = None
    engine_version: str | None = None

    @property
    def full_support(self) -> bool:
        """Whether every token could be sampled; truncated support is damage no importance weight repairs."""
        return self.top_p >= 1.0 and self.top_k is None and self.min_p is None


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheMeta:
    """What a trainer has to compare before it uses a cache."""

    vocab_size: int
    """Number of logits of the teacher; every stored id is below it."""
    tokenizer_fingerprint: str
    """`sha256:...` from `opd_store.tokenizer_fingerprint`."""
    teacher: ModelInfo | None = None
    """The model whose log-probs are stored; None for rollouts nobody scored yet."""
    other_teachers: tuple[ModelInfo, ...] = ()
    """Teachers of routes 1, 2, ... when rollouts are routed to several; `teacher` is route 0."""
    sft_teacher: ModelInfo | None = None
    """The model whose samples the behaviour policy was fine-tuned on."""
    behaviour: ModelInfo | None = None
    """The checkpoint that sampled the responses."""
    sampler: SamplerInfo | None = None
    reference: ModelInfo | None = None
    """The checkpoint behind `reference_logprob`: the behaviour checkpoint, raw, at temperature 1."""
    chat_template_digest: str | None = None
    chat_template_args: dict[str, str] = field(default_factory=dict)
    prompt_dataset: str | None = None
    prompt_revision: str | None = None
    truncation: str | None = None
    licence: str | None = None
    """Terms the teacher's outputs come under."""
    code_version: str | None = None
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= layout.MAX_VOCAB:
            raise InvalidArgumentError(f"vocab_size: expected 1..{layout.MAX_VOCAB}, found {self.vocab_size}")
        digest_to_raw(self.tokenizer_fingerprint, what="tokenizer_fingerprint")
        if self.chat_template_digest is not None:
            digest_to_raw(self.chat_template_digest, what="chat_template_digest")

    def to_json(self) -> dict[str, Any]:
        """A JSON object without the unknown fields."""
        return typing.cast(dict[str, Any], _dump(self))

    @classmethod
    def from_json(cls, value: object, *, where: str, allow_unknown: bool = False) -> CacheMeta:
        """Read what `to_json` wrote.

        Args:
            where: names the source in errors.
            allow_unknown: skip unknown fields, as a file of a newer minor version may have them.

        Raises:
            FormatError: a missing, unknown or wrongly typed field.
        """
        return _load(cls, value, where, allow_unknown)


def teacher_consistency(meta: CacheMeta) -> str:
    """Whether the student was fine-tuned on samples of the same teacher that scored the cache.

    Returns:
        "consistent" or "inconsistent" where both weight digests are known, else "unknown".

    Source: arXiv 2604.13010, thm 3.8: otherwise the offline objective has a bias that no drift bound removes.
    """
    if meta.teacher is None or meta.sft_teacher is None:
        return "unknown"
    digests = meta.teacher.weights_digest, meta.sft_teacher.weights_digest
    if None in digests:
        return "unknown"
    return "consistent" if digests[0] == digests[1] else "inconsistent"


def diff_meta(expected: CacheMeta, found: CacheMeta) -> list[tuple[str, str, str]]:
    """Fields in which two descriptions differ: (dotted name, expected, found) as text."""
    return _diff("", _dump(expected), _dump(found))


def _dump(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: _dump(item) for name, item in items if item is not None and item not in ((), {})}
    if isinstance(value, tuple):
        return [_dump(item) for item in value]
    return dict(sorted(value.items())) if isinstance(value, dict) else value


def _load(cls: type[T], value: object, where: str, allow_unknown: bool) -> T:
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected an object, found {type(value).__name__}")
    hints = _hints(cls)
    unknown = sorted(value.keys() - hints.keys())
    if unknown and not allow_unknown:
        raise FormatError(f"{where}: unknown field {unknown[0]!r:.100}; known are {', '.join(sorted(hints))}")
    fields = {
        name: _convert(hints[name], value[name], f"{where}.{name}", allow_unknown)
        for name in hints
        if name in value
    }
    try:
        return cls(**fields)
    except (TypeError, InvalidArgumentError) as error:
        raise FormatError(f"{where}: {error}") from error


def _convert(hint: Any, value: object, where: str, allow_unknown: bool) -> object:  # noqa: ANN401
    if isinstance(hint, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _load(hint, value, where, allow_unknown)
    origin = typing.get_origin(hint) or hint
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(typing.get_args(hint)[0], item, where, allow_unknown) for item in value)
    if origin is dict and isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        return dict(value)
    if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if origin in (int, str) and type(value) is origin:
        return value
    raise FormatError(f"{where}: expected {getattr(origin, '__name__', origin)}, found {value!r:.100}")


def _diff(prefix: str, expected: object, found: object) -> list[tuple[str, str, str]]:
    if isinstance(expected, dict) and isinstance(found, dict):
        names = sorted(expected.keys() | found.keys())
        pairs = ((f"{prefix}.{n}" if prefix else n, expected.get(n), found.get(n)) for n in names)
        return [row for name, a, b in pairs for row in _diff(name, a, b)]
    if expected == found:
        return []
    return [(prefix, _as_text(expected), _as_text(found))]


def _as_text(value: object) -> str:
    return "unknown" if value is None else str(value)
