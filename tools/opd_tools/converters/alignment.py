"""Which token a row is about, asked of the data: a shifted file trains without an error, and badly."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from opd_store import FormatError
from opd_tools.converters.record import Record

SHIFTS = (-1, 0, 1)
_LOOKED_AT = 4000
"""Positions that decide."""
_CLEARLY = 0.25
"""By how much more of its tokens another shift has to explain."""


def checked(records: Iterable[Record], *, name: str) -> Iterator[Record]:
    """The records, after the first few thousand positions proved to be where they should be.

    A teacher that scores what was sampled holds most of it likely, so that a row names the token it is about.
    Where it names the next or the last one instead, rows are off by one.

    Raises:
        FormatError: rows are about the neighbours of their tokens.
    """
    records = iter(records)
    held: deque[Record] = deque()
    hits = dict.fromkeys(SHIFTS, 0)
    seen = dict.fromkeys(SHIFTS, 0)
    for record in records:
        held.append(record)
        for shift, (found, looked_at) in _counts(record).items():
            hits[shift] += found
            seen[shift] += looked_at
        if seen[0] >= _LOOKED_AT:
            break
    require_aligned(hits, seen, name=name)
    while held:
        yield held.popleft()
    yield from records


def require_aligned(hits: dict[int, int], seen: dict[int, int], *, name: str) -> None:
    """Raise FormatError if another shift explains clearly more tokens than none."""
    shares = {shift: hits[shift] / max(1, seen[shift]) for shift in SHIFTS}
    best = max(SHIFTS, key=lambda shift: shares[shift])
    if seen[0] >= 16 and shares[best] > shares[0] + _CLEARLY:
        after = "next" if best > 0 else "previous"
        raise FormatError(
            f"{name}: rows are off by one: they hold {shares[0]:.0%} of their own tokens likely, but "
            f"{shares[best]:.0%} of the {after} ones; the file is aligned in another way than this format "
            "says (--shift moves rows)"
        )


def _counts(record: Record) -> dict[int, tuple[int, int]]:
    """By shift: how many tokens are the likeliest entry of their row, of how many."""
    if record.topk_ids is None or record.topk_logprob is None or not record.topk_ids.size:
        return {}
    likeliest = np.take_along_axis(
        record.topk_ids, np.nanargmax(np.nan_to_num(record.topk_logprob, nan=-np.inf), axis=1)[:, None], 1
    )[:, 0]
    tokens = np.asarray(record.token_ids)[record.prompt_len :]
    size = min(len(tokens), len(likeliest))
    counts = {}
    for shift in SHIFTS:
        rows = np.arange(max(0, -shift), size - max(0, shift))
        counts[shift] = (int((likeliest[rows] == tokens[rows + shift]).sum()), len(rows))
    return counts
