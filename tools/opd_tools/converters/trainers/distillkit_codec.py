"""Compressed log-probs of DistillKit (arcee-ai/DistillKit, `distillkit/compression/`), decoded in float64.

Axes: N = positions, k = entries of a position, B = bytes of a position.

A position is `[exact_k values][coefficients]{[scale][packed residuals]}*`, little-endian, and beside it ids
of ceil(log2 d) bits each, the first bit highest. DistillKit decodes in the dtype of the exact values; float64
only differs by less rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError
from opd_tools.converters.trainers.distillkit_config import BYTES, Codec, LegacyCodec


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
    n_rows, at = len(logprobs), codec.exact_k * BYTES[codec.exact_dtype]
    out = np.zeros((n_rows, codec.k))
    out[:, : codec.exact_k] = _floats(logprobs[:, :at], codec.exact_dtype)
    if codec.polynomial_terms:
        end = at + len(codec.polynomial_terms) * BYTES[codec.term_dtype]
        coefficients = _floats(logprobs[:, at:end], codec.term_dtype)
        out[:, codec.exact_k :] = coefficients @ _terms(codec).T
        at = end
    place = codec.exact_k
    for one in codec.residual_bins:
        first = at + BYTES[one.scale_dtype]
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
    return data.view({2: "<f2", 4: "<f4", 8: "<f8"}[BYTES[dtype]]).astype(np.float64)
