"""Which token a row is about, asked of the data: a shifted file trains without an error, and badly."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError
from opd_tools.converters.core.normalise import require_rows, rows_between
from opd_tools.converters.core.record import NO_ENTRY, Record, Tally
from opd_tools.converters.core.support import FILLER

SHIFTS = (-1, 0, 1)
_LOOKED_AT = 4000
"""Positions that decide."""
_FEWEST = 16
"""With fewer than this nothing is decided."""
_CLEARLY = 0.25
"""By how much more of its tokens another shift has to explain."""
_EQUAL = 0.02
"""Nats between a token's own log-prob and its entry, both rounded to float16."""


class Evidence:
    """How many tokens each shift of the rows explains, over the records looked at."""

    def __init__(self) -> None:
        self.positions = 0
        self._seen = dict.fromkeys(SHIFTS, 0)
        self._likeliest = dict.fromkeys(SHIFTS, 0)
        self._with_own = dict.fromkeys(SHIFTS, 0)
        self._own = dict.fromkeys(SHIFTS, 0)

    def look(self, record: Record) -> None:
        """Take a record into account."""
        tokens = record.token_ids[record.prompt_len :]
        self.positions += len(tokens)
        if record.topk_ids is None or record.topk_logprob is None or not np.size(record.topk_ids):
            return
        ids = np.asarray(record.topk_ids)
        logprob = np.where(ids == NO_ENTRY, -np.inf, np.asarray(record.topk_logprob, np.float64))
        logprob = np.where(np.isnan(logprob), -np.inf, logprob)
        filled = logprob.max(axis=1) > FILLER
        likeliest = ids[np.arange(len(ids)), logprob.argmax(axis=1)]
        own = record.teacher_logprob
        for shift in SHIFTS:
            rows = np.flatnonzero(filled)
            rows = rows[(rows + shift >= 0) & (rows + shift < len(tokens))]
            about = tokens[rows + shift]
            self._seen[shift] += len(rows)
            self._likeliest[shift] += int((likeliest[rows] == about).sum())
            if own is not None:
                self._with_own[shift] += len(rows)
                self._own[shift] += _equal(ids[rows], logprob[rows], about, np.asarray(own)[rows + shift])

    def shift(self) -> int:
        """By how many tokens rows would have to be later; 0 unless another place is clearly better."""
        return _best(self._likeliest, self._seen)[0]

    def require(self, name: str) -> None:
        """Raise FormatError if rows are off by one."""
        shift, here, there = _best(self._own, self._with_own)
        if shift:
            raise FormatError(
                f"{name}: top-k rows are off by one: {here:.0%} of the tokens' own log-probs are found in "
                f"their own rows, but {there:.0%} in the {_NAMES[-shift]} ones; the file contradicts itself"
            )
        shift, here, there = _best(self._likeliest, self._seen)
        if shift:
            raise FormatError(
                f"{name}: rows are off by one: for {here:.0%} of them their own token is the likeliest, but "
                f"for {there:.0%} the {_NAMES[shift]} one is; the file is aligned in another way than this "
                f"format says (--shift {shift} moves rows to the {_NAMES[shift]} token)"
            )


_NAMES = {1: "next", -1: "previous"}


def checked(records: Iterable[Record], *, name: str) -> Iterator[Record]:
    """The records, after the first few thousand positions proved to be where they should be.

    A teacher that scores what was sampled holds most of it likely, so that a row names the token it is about.
    Where it names the next or the last one instead, rows are off by one. Where tokens have log-probs of their
    own beside the rows, these have to be the ones in the rows.

    Raises:
        FormatError: rows are about the neighbours of their tokens, or there is no row for each token.
    """
    records = iter(records)
    held: deque[Record] = deque()
    evidence = Evidence()
    for record in records:
        held.append(record)
        require_rows(record)
        evidence.look(record)
        if evidence.positions >= _LOOKED_AT:
            break
    evidence.require(name)
    while held:
        yield held.popleft()
    yield from records


def shifted(record: Record, shift: int, tally: Tally) -> Record | None:
    """Rows moved to the token `shift` places later; tokens that are left without a row become prompt, or go.

    A file whose row t is about token t + 1 although its format says t is read with shift 1. None where no row
    is left, which is counted.

    Raises:
        FormatError: there is no row for each token.
    """
    if not shift:
        return record
    require_rows(record)
    n_rows = len(record.token_ids) - record.prompt_len
    first, end = max(0, shift), n_rows + min(0, shift)
    if end <= first:
        tally["rollouts too short for --shift, left out"] += 1
        return None

    rows = {
        name: array[first - shift : end - shift]
        for name in ("topk_ids", "topk_logprob", "log_tail", "teacher_logprob")
        if (array := getattr(record, name)) is not None
    }
    return dataclasses.replace(rows_between(record, first, end), **rows)


def _equal(
    ids: NDArray[np.int64], logprob: NDArray[np.float64], tokens: NDArray[np.int64], own: NDArray[np.floating]
) -> int:
    """How many tokens have their own log-prob in their row."""
    rows, places = np.nonzero(ids == tokens[:, None])
    return int((np.abs(logprob[rows, places] - own[rows]) < _EQUAL).sum())


def _best(hits: dict[int, int], seen: dict[int, int]) -> tuple[int, float, float]:
    """The shift that explains clearly more than none does, or 0; and the shares of none and of it."""
    shares = {shift: hits[shift] / max(1, seen[shift]) for shift in SHIFTS}
    best = max(SHIFTS, key=lambda shift: shares[shift])
    if seen[0] < _FEWEST or shares[best] <= shares[0] + _CLEARLY:
        best = 0
    return best, shares[0], shares[best]
