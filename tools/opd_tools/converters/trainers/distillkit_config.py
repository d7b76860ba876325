"""Columns of DistillKit's files, and the compression configs that say what is in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_store import InvalidArgumentError

NEW = ("compressed_logprobs", "bytepacked_indices")
"""Columns of bytes, which only the config explains."""
ALWAYS = "input_ids"
CONFIG = "compression_config.yaml"
"""File beside the data."""
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MOST_CONFIG = 1 << 16
"""Bytes; the parser takes seconds for a megabyte."""
_MOST_DEPTH = 32
_MOST_ENTRIES = 1 << 16
_MOST_TERMS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Some residuals of the fit, quantised with one scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    @property
    def n_bytes(self) -> int:
        """Of the scale and the packed residuals."""
        return BYTES[self.scale_dtype] + -(-self.element_bits * self.num_elements // 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """DistillKit's `DistributionQuantizationConfig`, as far as a reader needs it."""

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    normalize_t: bool = False

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return max(1, math.ceil(math.log2(self.d)))

    @property
    def id_bytes(self) -> int:
        """Bytes of the ids of a position."""
        return -(-self.id_bits * self.k // 8)

    @property
    def logprob_bytes(self) -> int:
        """Bytes of the log-probs of a position."""
        terms = len(self.polynomial_terms) * BYTES[self.term_dtype]
        return self.exact_k * BYTES[self.exact_dtype] + terms + sum(b.n_bytes for b in self.residual_bins)


@dataclass(frozen=True, kw_only=True, slots=True)
class LegacyCodec:
    """DistillKit's `LegacyLogitCompressionConfig`: exact values and coefficients are columns of their own."""

    vocab_size: int
    k: int
    exact_k: int
    polynomial_degree: int = 0
    invert_polynomial: bool = True
    with_sqrt_term: bool = False

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return max(1, math.ceil(math.log2(self.vocab_size)))


def codec_of(data: bytes, where: str) -> Codec | LegacyCodec:
    """The codec that a YAML document describes: a compression config, or a training config with one in it.

    Raises:
        InvalidArgumentError: neither, impossible values, or a document that is too large, deep or clever.
    """
    found = _found(_parsed(data, where))
    if found is None:
        raise InvalidArgumentError(
            f"{where}: no compression config; expected d, k, exact_k, ... or, for the legacy codec, "
            "vocab_size, k, exact_k, polynomial_degree, ..., at the top or below logprob_compressor or "
            "legacy_logit_compression"
        )
    try:
        codec = _legacy(found) if "vocab_size" in found else _new(found)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{where}: compression config: {error!s:.200}") from error
    return codec


def _parsed(data: bytes, where: str) -> object:
    import yaml

    depth = 0
    try:
        if len(data) > MOST_CONFIG:
            raise ValueError(f"more than {MOST_CONFIG} bytes")
        for event in yaml.parse(data):
            # What an alias stands for may hold itself, or grow without end when it is shown.
            if isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read here; write values out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MOST_DEPTH:
                raise ValueError(f"nested more than {_MOST_DEPTH} deep")
        return yaml.safe_load(data)
    except (yaml.YAMLError, ValueError) as error:
        what = " ".join(str(error).split())
        raise InvalidArgumentError(f"{where}: not YAML that can be read: {what:.200}") from error


def _found(config: object) -> Mapping[str, Any] | None:
    if not isinstance(config, Mapping):
        return None
    if {"k", "exact_k"} <= config.keys() and ("d" in config or "vocab_size" in config):
        return config
    for name in ("logprob_compressor", "legacy_logit_compression", "teacher"):
        if (inner := _found(config.get(name))) is not None:
            return inner
    return None


def _new(found: Mapping[str, Any]) -> Codec:
    terms = tuple(_term(term) for term in found.get("polynomial_terms") or ())
    bins = tuple(
        Bin(
            scale_dtype=_dtype(one["scale_dtype"]),
            element_bits=_integer(one, "element_bits", 1, 32),
            num_elements=_integer(one, "num_elements", 1, _MOST_ENTRIES),
        )
        for one in found.get("residual_bins") or ()
    )
    codec = Codec(
        d=_integer(found, "d", 1, 1 << 31),
        k=_integer(found, "k", 1, _MOST_ENTRIES),
        exact_k=_integer(found, "exact_k", 0, _MOST_ENTRIES),
        exact_dtype=_dtype(found.get("exact_dtype", "float32")),
        polynomial_terms=terms,
        term_dtype=_dtype(found.get("term_dtype", "float32")),
        residual_bins=bins,
        delta_encoding=_boolean(found, "delta_encoding", default=True),
        normalize_t=_boolean(found, "normalize_t", default=False),
    )
    left = codec.k - codec.exact_k
    if left < 0 or len(terms) > _MOST_TERMS or sum(one.num_elements for one in bins) > left:
        raise ValueError("exact_k and the elements of residual_bins have to fit into k")
    if left and not terms and not bins:
        raise ValueError("exact_k below k needs polynomial_terms or residual_bins")
    return codec


def _legacy(found: Mapping[str, Any]) -> LegacyCodec:
    codec = LegacyCodec(
        vocab_size=_integer(found, "vocab_size", 1, 1 << 31),
        k=_integer(found, "k", 1, _MOST_ENTRIES),
        exact_k=_integer(found, "exact_k", 0, _MOST_ENTRIES),
        polynomial_degree=_integer(found, "polynomial_degree", 0, _MOST_TERMS),
        invert_polynomial=_boolean(found, "invert_polynomial", default=True),
        with_sqrt_term=_boolean(found, "with_sqrt_term", default=False),
    )
    if codec.exact_k > codec.k:
        raise ValueError("exact_k has to be at most k")
    return codec


def _integer(found: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = found[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: expected an integer in [{low}, {high}], found {value!r:.50}")
    return value


def _boolean(found: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = found.get(name, default)
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected true or false, found {value!r:.50}")
    return value


def _dtype(value: object) -> str:
    if value not in BYTES:
        raise ValueError(f"a dtype: expected one of {', '.join(BYTES)}, found {value!r:.50}")
    return str(value)


def _term(value: object) -> int | str:
    if value in ("sqrt", "exp") or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 32
    ):
        return value
    raise ValueError(f"polynomial_terms: expected powers, sqrt or exp, found {value!r:.50}")
