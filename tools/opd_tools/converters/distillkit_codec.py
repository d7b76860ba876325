"""Compressed log-probs of DistillKit (arcee-ai/DistillKit, `distillkit/compression/`), decoded in float64.

Axes: N = positions, k = entries of a position, B = bytes of a position.

A position is `[exact_k values][coefficients]{[scale][packed residuals]}*`, little-endian, and beside it ids
of ceil(log2 d) bits each, the first bit highest. DistillKit decodes in the dtype of the exact values; float64
only differs by less rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError, InvalidArgumentError

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
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
        return _BYTES[self.scale_dtype] + -(-self.element_bits * self.num_elements // 8)


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
        terms = len(self.polynomial_terms) * _BYTES[self.term_dtype]
        return self.exact_k * _BYTES[self.exact_dtype] + terms + sum(b.n_bytes for b in self.residual_bins)


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


def codec_of(config: object, where: str) -> Codec | LegacyCodec:
    """The codec that a YAML document describes: a compression config, or a training config with one in it.

    Raises:
        InvalidArgumentError: neither, or impossible values.
    """
    found = _found(config)
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
    if value not in _BYTES:
        raise ValueError(f"a dtype: expected one of {', '.join(_BYTES)}, found {value!r:.50}")
    return str(value)


def _term(value: object) -> int | str:
    if value in ("sqrt", "exp") or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 32
    ):
        return value
    raise ValueError(f"polynomial_terms: expected powers, sqrt or exp, found {value!r:.50}")


def decode(
    logprobs: NDArray[np.uint8], ids: NDArray[np.uint8], codec: Codec, where: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and log-probs of some positions.

    Args:
        logprobs: [N, B] bytes of `compressed_logprobs`.
        ids: [N, B'] bytes of `bytepacked_indices`.

    Returns:
        ids [N, k] and log-probs [N, k], as the file orders them.

    Raises:
        FormatError: sizes that the config does not explain.
    """
    for name, found, expected in (
        ("compressed_logprobs", logprobs, codec.logprob_bytes),
        ("bytepacked_indices", ids, codec.id_bytes),
    ):
        if found.ndim != 2 or found.shape[1] != expected or len(found) != len(logprobs):
            raise FormatError(
                f"{where}, {name}: expected {expected} bytes a position with this compression config, found "
                f"{list(found.shape)}; give the config of these files with --config"
            )
    n_rows, at = len(logprobs), codec.exact_k * _BYTES[codec.exact_dtype]
    out = np.zeros((n_rows, codec.k))
    out[:, : codec.exact_k] = _floats(logprobs[:, :at], codec.exact_dtype)
    if codec.polynomial_terms:
        end = at + len(codec.polynomial_terms) * _BYTES[codec.term_dtype]
        coefficients = _floats(logprobs[:, at:end], codec.term_dtype)
        out[:, codec.exact_k :] = coefficients @ _terms(codec).T
        at = end
    place = codec.exact_k
    for one in codec.residual_bins:
        first = at + _BYTES[one.scale_dtype]
        at += one.n_bytes
        scale = _floats(logprobs[:, at - one.n_bytes : first], one.scale_dtype)
        steps = unpacked(logprobs[:, first:at], one.element_bits, one.num_elements)
        steps = 2 * steps - 1 if one.element_bits == 1 else steps - (1 << one.element_bits - 1)
        out[:, place : place + one.num_elements] += steps * scale
        place += one.num_elements
    if codec.delta_encoding:
        np.cumsum(out, axis=1, out=out)
    return unpacked(ids, codec.id_bits, codec.k), out


def decode_legacy(
    packed: NDArray[Any], exact: NDArray[Any], coefficients: NDArray[Any], codec: LegacyCodec, where: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and values [N, k] of the legacy columns `packed_indices`, `exact_values` and `coeffs`.

    Raises:
        FormatError: sizes that the config does not explain.
    """
    per_word = 64 // codec.id_bits
    words = -(-codec.k // per_word)
    left = codec.k - codec.exact_k
    n_terms = (codec.polynomial_degree + 1 + codec.with_sqrt_term) if left else 0
    for name, found, expected in (
        ("packed_indices", packed, words),
        ("exact_values", exact, codec.exact_k),
        ("coeffs", coefficients, n_terms),
    ):
        if found.shape != (len(packed), expected):
            raise FormatError(
                f"{where}, {name}: expected {expected} values a position with this compression config, found "
                f"{list(found.shape)}; give the config of these files with --config"
            )
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(codec.id_bits)
    mask = np.uint64((1 << codec.id_bits) - 1)
    ids = ((packed.astype(np.int64).view(np.uint64)[:, :, None] >> shifts) & mask).reshape(len(packed), -1)
    values = np.zeros((len(packed), codec.k))
    values[:, : codec.exact_k] = exact
    if left:
        t = np.arange(1.0, left + 1)
        sign = -1 if codec.invert_polynomial else 1
        terms = [t ** (sign * power) for power in range(codec.polynomial_degree + 1)]
        if codec.with_sqrt_term:
            terms.append(np.sqrt(t))
        values[:, codec.exact_k :] = np.asarray(coefficients, np.float64) @ np.stack(terms)
    return ids[:, : codec.k].astype(np.int64), values


def unpacked(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """[N, count] integers of so many bits each, the first bit highest, from [N, B] bytes."""
    if bits in (8, 16, 32):
        return data[:, : count * bits // 8].copy().view(f">u{bits // 8}").astype(np.int64)
    # Each integer lies in the five bytes from the one it begins in on, since it has at most 32 bits.
    first = np.arange(count, dtype=np.int64) * bits
    start, spare = first >> 3, 40 - bits - (first & 7)
    padded = np.zeros((len(data), data.shape[1] + 5), np.uint8)
    padded[:, : data.shape[1]] = data
    window = np.zeros((len(data), count), np.int64)
    for number in range(5):
        window <<= 8
        window |= padded[:, start + number]
    return (window >> spare) & ((1 << bits) - 1)


def packed(ids: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """[N, B] bytes of [N, k] integers; the opposite of `unpacked`."""
    places = np.arange(bits - 1, -1, -1)
    single = ((ids[:, :, None] >> places) & 1).astype(np.uint8)
    return np.packbits(single.reshape(len(ids), -1), axis=1)


def _terms(codec: Codec) -> NDArray[np.float64]:
    """[k - exact_k, terms] what the coefficients multiply."""
    left = codec.k - codec.exact_k
    t = np.linspace(0.0, 1.0, left) if codec.normalize_t else np.arange(float(left))
    with np.errstate(over="ignore", divide="ignore"):
        columns = [
            t**term if isinstance(term, int) else getattr(np, term)(t) for term in codec.polynomial_terms
        ]
    return np.stack(columns, axis=1)


def _floats(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    """[N, n] values of [N, B] bytes."""
    data = np.ascontiguousarray(data)
    if dtype == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return data.view({2: "<f2", 4: "<f4", 8: "<f8"}[_BYTES[dtype]]).astype(np.float64)
