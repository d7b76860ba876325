"""What importers hand over: one foreign rollout, its rows label-aligned, otherwise as the file has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError
from opd_store.rollout import Scalar

NO_ENTRY = -1
"""Fills up `Record.topk_ids` where a row has fewer entries than others."""
OVERFULL = 0.02
"""By how much probabilities may exceed 1 in sum through rounding: bfloat16 moves a log-prob by at most 1/256
of it, and the sum by at most 1/256 of the entropy, which stays below 5 nats where top-k is of use."""


_MOST_CELLS = 1 << 24
"""Cells that rows of different lengths may fill up, so that a small file cannot ask for much memory."""


class Tally(Counter[str]):
    """How often something had to be given up, by what it is; printed, and kept in the provenance."""


class Values(StrEnum):
    """What the numbers of a top-k are."""

    LOGPROBS = "logprobs"
    """Normalised over the vocabulary: what is missing from 1 is the tail."""
    RENORMALISED = "renormalised"
    """Normalised over the kept entries, or logits without their logsumexp: nobody knows the tail."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One rollout of a foreign file, before it is checked.

    L are all tokens, R = L - prompt_len those of the response, k the most entries of any row. Row t is about
    token prompt_len + t, given the tokens before it: whoever makes a record has undone the file's alignment.
    None is what the file does not have.
    """

    where: str
    """File and row, for errors."""
    token_ids: NDArray[np.int64]
    """[L] as the file has them; the range is checked later."""
    prompt_len: int = 1
    """1 where the file does not tell: the first token has no row, all after it counts as sampled."""
    teacher_logprob: NDArray[np.floating] | None = None
    """[R] of the tokens themselves, where the file has it beside the entries; NaN where a row lacks it."""
    topk_ids: NDArray[np.int64] | None = None
    """[R, k] in any order; `NO_ENTRY` is no entry. Rows without any at the start count as prompt, those at
    the end go with their tokens; one in between is an error."""
    topk_logprob: NDArray[np.floating] | None = None
    """[R, k] what the file says, decoded in float64 where it has to be decoded."""
    log_tail: NDArray[np.floating] | None = None
    """[R] where the file has it, such as from a logsumexp."""
    behaviour_logprob: NDArray[np.floating] | None = None
    reference_logprob: NDArray[np.floating] | None = None
    loss_mask: NDArray[np.bool_] | None = None
    sample_id: str | None = None
    finish_reason: str = "unknown"
    policy_version: int | None = None
    reward: float | None = None
    label: str | None = None
    extra: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """A foreign file that was opened."""

    records: Iterator[Record]
    """Read as they are asked for."""
    topk: int
    """Most entries a row has; 0 for none."""
    values: Values = Values.LOGPROBS
    temperature: float | None = None
    """That the file states the log-probs are at; None if it does not tell."""
    lost: tuple[str, ...] = ()
    """What this file does not have, or has only approximately, in a line each."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """`x_*` user columns of the records, with their types."""
    total: int | None = None
    """Records, where that is known without reading them."""
    overfull: float = OVERFULL
    """By how much probabilities of a position may exceed 1 in sum, to be scaled down; more is an error.
    Higher for a codec that is known to lose more than rounding does."""
    max_error: float | None = None
    """Nats by which values were rounded in the cache that was exported to this file; then they are taken as
    they are: nothing is scaled, and nothing derived. None for all other files."""
    tally: Tally = field(default_factory=Tally)
    """What the importer itself had to give up; grows while `records` are read."""


def require_even(sizes: NDArray[np.int64], where: str) -> None:
    """Raise FormatError if rows of these sizes, filled up to the largest one, would take far more room."""
    entries, widest = int(sizes.sum()), int(sizes.max(initial=0))
    if len(sizes) * widest > max(_MOST_CELLS, 4 * entries):
        raise FormatError(
            f"{where}: {entries} entries in {len(sizes)} rows, one of which has {widest}; shorten the "
            "longest rows"
        )
