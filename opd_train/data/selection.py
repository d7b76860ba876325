"""Which rollouts of which caches a stream takes, from their indexes alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from opd_store import Cache, InvalidArgumentError, InvalidRolloutError, MismatchError
from opd_train.data.order import Integers
from opd_train.data.plan import Rollouts

Rows = NDArray[np.int64] | Sequence[int]
_MOST_WEIGHT = 1000
_WEIGHT_STEPS = 1_000_000


class TooLong(StrEnum):
    """What becomes of a rollout that is longer than a batch or than the student's context."""

    ERROR = "error"
    """It is refused before the first batch."""
    TRUNCATE = "truncate"
    """Its first tokens are used; it is left out if they hold no response."""
    SKIP = "skip"
    """It is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Rollouts that take part, and what became of those that are too long."""

    rollouts: Rollouts
    n_skipped: int
    n_truncated: int


def check_alike(caches: Sequence[Cache], ranks: int | None) -> None:
    """Prove that caches can be mixed: one tokenizer, one vocabulary, one number of ranks.

    Raises:
        InvalidArgumentError: no cache, or more ranks than one of them stores.
        MismatchError: two of them differ, with both values.
    """
    if not caches:
        raise InvalidArgumentError("caches: expected at least one")
    for cache in caches:
        if ranks is not None and not 0 <= ranks <= cache.topk:
            raise InvalidArgumentError(
                f"{cache.uri}: ranks: expected 0..{cache.topk} (the stored top-k), found {ranks}"
            )
        for name in ("tokenizer_fingerprint", "vocab_size", "topk"):
            if name == "topk" and ranks is not None:
                continue
            expected, found = (getattr(c if name == "topk" else c.meta, name) for c in (caches[0], cache))
            if found != expected:
                raise MismatchError(
                    f"{name}: {caches[0].uri} has {expected}, {cache.uri} has {found}; "
                    + ("pass ranks" if name == "topk" else "such caches cannot be mixed"),
                    field=name,
                    expected=str(expected),
                    found=str(found),
                )


def exact_weights(weights: Sequence[float] | None, n_caches: int) -> tuple[Fraction, ...]:
    """How often rollouts of each cache come in an epoch, as the fractions that were meant (0.1 is 1/10).

    Raises:
        InvalidArgumentError: not one for each cache, or one out of range.
    """
    if weights is None:
        return (Fraction(1),) * n_caches
    if len(weights) != n_caches:
        raise InvalidArgumentError(
            f"weights: expected one for each of {n_caches} caches, found {len(weights)}"
        )
    found = []
    for weight in weights:
        exact = Fraction(weight).limit_denominator(_WEIGHT_STEPS) if math.isfinite(weight) else Fraction(0)
        if not 0 < exact <= _MOST_WEIGHT:
            raise InvalidArgumentError(
                f"weights: expected more than 0 and at most {_MOST_WEIGHT}, found {weight}"
            )
        found.append(exact)
    return tuple(found)


def select_rollouts(
    caches: Sequence[Cache],
    rows: Sequence[Rows | None],
    *,
    weights: tuple[Fraction, ...],
    context: int | None,
    batch_tokens: int,
    too_long: TooLong,
) -> Selection:
    """The rollouts that take part.

    Their digest is that of the cache if all rollouts of one cache do. Otherwise it is "sha256:" and the
    SHA-256 of, for each cache, its digest, a line feed, the number of its rows and the ascending row numbers,
    as 8-byte little-endian integers.

    Args:
        rows: for each cache, the rows that take part; None means all.
        batch_tokens: most tokens of a batch.

    Raises:
        InvalidArgumentError: a row that does not exist or comes twice, no rows at all, or a rollout that is
        longer than `batch_tokens`.
        InvalidRolloutError: a rollout is longer than `context`.
    """
    longest = min(batch_tokens, batch_tokens if context is None else context)
    digest = hashlib.sha256()
    whole = len(caches) == 1
    n_skipped = n_truncated = first_block = 0
    columns: list[list[Integers]] = [[], [], [], []]
    if len(rows) != len(caches):
        raise InvalidArgumentError(
            f"rows: expected one array for each of {len(caches)} caches, found {len(rows)}"
        )
    for number, (cache, wanted) in enumerate(zip(caches, rows, strict=True)):
        chosen = _checked_rows(cache, wanted)
        tokens = cache.row_tokens[chosen].astype(np.int64)
        over = tokens > longest
        if over.any():
            if too_long is TooLong.ERROR:
                _refuse(cache, int(chosen[np.argmax(tokens)]), int(tokens.max()), context, batch_tokens)
            keep = ~over
            if too_long is TooLong.TRUNCATE:
                prompt = tokens - cache.row_response_tokens[chosen]
                keep |= prompt < longest
                n_truncated += int(np.count_nonzero(over & keep))
            n_skipped += int(np.count_nonzero(~keep))
            chosen, tokens = chosen[keep], np.minimum(tokens[keep], longest)
        whole = whole and len(chosen) == len(cache)
        digest.update(f"{cache.digest}\n".encode() + len(chosen).to_bytes(8, "little"))
        digest.update(chosen.astype("<i8").tobytes())
        ends = np.cumsum(cache.batch_rows)
        block = np.searchsorted(ends, chosen, side="right") + first_block
        first_block += len(ends)
        for column, values in zip(
            columns, (np.full(len(chosen), number), chosen, block, tokens), strict=True
        ):
            column.append(values)
    source, row, block, tokens = (np.concatenate(column) for column in columns)
    if not len(row):
        where = ", ".join(cache.uri for cache in caches)
        if n_skipped:
            raise InvalidArgumentError(
                f"{where}: all rollouts are longer than {longest} tokens; nothing is left"
            )
        if any(wanted is not None for wanted in rows):
            raise InvalidArgumentError(f"{where}: the filter leaves nothing")
        raise InvalidArgumentError(f"{where}: 0 rollouts; there is nothing to stream")
    name = caches[0].digest if whole else f"sha256:{digest.hexdigest()}"
    rollouts = Rollouts(name, source, row, block, tokens, weights)
    return Selection(rollouts=rollouts, n_skipped=n_skipped, n_truncated=n_truncated)


def _checked_rows(cache: Cache, rows: Rows | None) -> Integers:
    if rows is None:
        return np.arange(len(cache))
    wanted = np.asarray(rows)
    if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
        raise InvalidArgumentError(
            f"rows: expected a list of row numbers, found {wanted.dtype} {wanted.shape}"
        )
    wanted = np.sort(wanted.astype(np.int64))
    if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < len(cache):
        wrong = wanted[0] if wanted[0] < 0 else wanted[-1]
        raise InvalidArgumentError(f"rows: expected 0..{len(cache) - 1} of {cache.uri}, found {wrong}")
    twice = np.flatnonzero(wanted[1:] == wanted[:-1])
    if len(twice):
        raise InvalidArgumentError(
            f"rows: {wanted[twice[0]]} of {cache.uri} comes twice; use weights for that"
        )
    return wanted


def _refuse(cache: Cache, row: int, n_tokens: int, context: int | None, batch_tokens: int) -> None:
    if context is not None and n_tokens > context:
        raise InvalidRolloutError(
            f"{cache.uri}: row {row} has {n_tokens} tokens, the student's context is {context}; use a "
            "student with a longer one, a cache of shorter rollouts, or too_long='truncate' or 'skip'",
            field="token_ids",
        )
    raise InvalidArgumentError(
        f"{cache.uri}: row {row} has {n_tokens} tokens, more than batch_tokens {batch_tokens}; raise "
        "batch_tokens, or pass too_long='truncate' or 'skip'"
    )
