"""Rollouts end to end as a few large arrays: what a trainer's batch is made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import kernels, layout
from opd_store.batch import BatchView
from opd_store.cache import Cache
from opd_store.errors import InvalidArgumentError
from opd_store.rollout import SUPPORTS
from opd_store.schema import RESPONSE_LISTS, CacheSchema, PackedColumn

Allocate = Callable[[str, tuple[int, ...], Any], NDArray[Any]]
"""Makes the array for a named field: (name, shape, dtype) -> array to be filled."""


@dataclass(frozen=True, slots=True)
class Packed:
    """S rollouts end to end: T tokens, N response tokens, K ranks. A field that any of them lacks is None."""

    lengths: NDArray[np.int64]
    """[S] tokens of each rollout."""
    response_lengths: NDArray[np.int64]
    """[S] response tokens of each rollout."""
    token_ids: NDArray[np.uint32]
    """[T]."""
    loss_mask: NDArray[np.bool_] | None
    """[N]; all True for a rollout without one, None only if none of them has one."""
    teacher_logprob: NDArray[np.float32] | None
    """[N] nats, as are the next two."""
    behaviour_logprob: NDArray[np.float32] | None
    reference_logprob: NDArray[np.float32] | None
    topk_ids: NDArray[np.uint32] | None
    """[N, K]; NO_ID where a position has fewer ranks."""
    topk_logprob: NDArray[np.float32] | None
    """[N, K] nats; -inf where a position has fewer ranks."""
    log_tail: NDArray[np.float32] | None
    """[N] nats."""
    policy_version: NDArray[np.int64] | None
    """[S]."""


_LISTS, _TOPK = tuple(RESPONSE_LISTS), tuple(name for name in SUPPORTS["topk"] if name)
FIELDS = (*_LISTS, *_TOPK, "policy_version")
_WORD = 4
Run = tuple[BatchView, int, int]
"""Neighbours: their record batch, and which rows [first, end) of it they are."""


def gather(
    cache: Cache,
    rows: Sequence[int] | NDArray[np.int64],
    *,
    ranks: int | None = None,
    columns: Collection[str] = FIELDS,
    max_tokens: int | None = None,
    allocate: Allocate | None = None,
) -> Packed:
    """Read rollouts into packed arrays, in the given order.

    Args:
        rows: [S] row numbers, at least one.
        ranks: how many of the top-k ranks to read; the rest joins `log_tail`. None means all.
        columns: which of `FIELDS` to read; `token_ids` is always read.
        max_tokens: rollouts are cut after this many tokens; None for no limit.
        allocate: makes the arrays that are filled; None makes new ones.

    Raises:
        IndexError: no such row.
        InvalidArgumentError: more ranks than stored, an unknown column, or a prompt that `max_tokens` leaves
            no response to.
        IntegrityError, FormatError: a shard is damaged.
    """
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown:
        raise InvalidArgumentError(f"columns: {unknown[0]!r:.100} is not one of {', '.join(FIELDS)}")
    wanted = np.asarray(rows, np.int64)
    if not len(wanted):
        raise InvalidArgumentError("rows: expected one or more, found none")
    lengths, responses = cache.lengths(wanted, max_tokens=max_tokens)
    runs = cache.runs(wanted, ranks=ranks, columns=columns)
    if max_tokens is not None and (lengths < cache.row_tokens[wanted]).any():
        runs = _single_rows(runs)
    make = allocate or (lambda _, shape, dtype: np.empty(shape, dtype))
    fields: dict[str, Any] = dict.fromkeys(FIELDS)
    edges = [0, *itertools.accumulate(end - first for _, first, end in runs)]
    starts = _starts(lengths)
    fields["token_ids"] = _joined("token_ids", runs, starts, starts[edges], make)
    starts = _starts(responses)
    bounds = starts[edges]
    for name in _LISTS:
        if name in columns:
            fields[name] = _joined(name, runs, starts, bounds, make)
    if "policy_version" in columns:
        fields["policy_version"] = _policy_versions(runs, len(wanted), make)
    if cache.topk and ranks != 0 and not set(_TOPK).isdisjoint(columns):
        fields |= _topk(cache.schema, cache.topk if ranks is None else ranks, runs, starts, make)
    return Packed(lengths, responses, **fields)


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """[S + 1] where each rollout begins; last the sum."""
    starts = np.zeros(len(counts) + 1, np.int64)
    counts.cumsum(out=starts[1:])
    return starts


def _single_rows(runs: list[Run]) -> list[Run]:
    return [(view, row, row + 1) for view, first, end in runs for row in range(first, end)]


def _joined(
    name: str, runs: list[Run], starts: NDArray[np.int64], bounds: NDArray[np.int64], make: Allocate
) -> NDArray[Any] | None:
    """A list column of all rollouts, end to end.

    Args:
        starts: where each rollout begins; last the end.
        bounds: the same for each run.
    """
    gaps = [view.missing(name, first, end) for view, first, end in runs]
    is_mask = name == "loss_mask"
    has_gaps = any(gap is not None for gap in gaps)
    if has_gaps:
        if not is_mask or all(gap is not None and gap.all() for gap in gaps):
            return None
        runs, bounds = _single_rows(runs), starts
    found = [view.list_items(name) for view, _, _ in runs]
    items = [source for source, _ in found]
    target = make(name, (int(bounds[-1]),), np.dtype(np.bool_) if is_mask else items[0].dtype)
    into = target.view(np.uint8) if is_mask else target
    firsts = [offsets[first] for (_, offsets), (_, first, _) in zip(found, runs, strict=True)]
    counts = bounds[1:] - bounds[:-1]
    for number, (view, first, end) in enumerate(runs if has_gaps else ()):
        if view.missing(name, first, end) is not None:
            into[bounds[number] : bounds[number + 1]] = 1
            counts[number] = 0
    kernels.copy_rows(into, bounds[:-1], items, firsts, counts)
    return target


def _policy_versions(runs: list[Run], n_rollouts: int, make: Allocate) -> NDArray[np.int64] | None:
    found = []
    for view, first, end in runs:
        versions = view.policy_versions(first, end)
        if versions is None:
            return None
        found.append(versions)
    target = make("policy_version", (n_rollouts,), np.dtype(np.int64))
    np.concatenate(found, out=target)
    return target


def _topk(
    schema: CacheSchema, ranks: int, runs: list[Run], starts: NDArray[np.int64], make: Allocate
) -> dict[str, NDArray[Any]]:
    """Ids, log-probs and tails of every rollout, decoded to their places."""
    n_positions = int(starts[-1])
    ids = make("topk_ids", (n_positions, ranks), np.dtype(np.uint32))
    logprob = make("topk_logprob", (n_positions, ranks), np.dtype(np.float32))
    log_tail = make("log_tail", (n_positions,), np.dtype(np.float32))
    bands = schema.topk_columns(ranks)
    ends_with_band = bands[-1].rank_end == ranks
    may_copy = ends_with_band and schema.encoding == "plain"
    copied: list[tuple[Run, int]] = []
    number = 0
    for view, first, end in runs:
        if may_copy and view.are_proven(first, end, ranks):
            copied.append(((view, first, end), number))
            number += end - first
            continue
        for row in range(first, end):
            part = slice(starts[number], starts[number + 1])
            n = part.stop - part.start
            if ends_with_band and n == view.response_len(row):
                view.topk_into(row, bands, ids[part], logprob[part], log_tail[part])
            else:
                band = view.topk(row, ranks)
                ids[part], logprob[part], log_tail[part] = band.ids[:n], band.logprob[:n], band.log_tail[:n]
            number += 1
    if copied:
        _copy_plain(bands, copied, starts, ids, logprob, log_tail)
    return {"topk_ids": ids, "topk_logprob": logprob, "log_tail": log_tail}


def _copy_plain(
    bands: Sequence[PackedColumn],
    copied: list[tuple[Run, int]],
    starts: NDArray[np.int64],
    ids: NDArray[np.uint32],
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32],
) -> None:
    """Copy pages that were checked when they were first read: all rollouts of a band at once.

    Args:
        copied: runs, each with the number of its first rollout.
    """
    numbers = np.concatenate([np.arange(end - first) + at for (_, first, end), at in copied])
    places, counts = starts[numbers], starts[numbers + 1] - starts[numbers]
    # Whole pages lie here, also where a rollout is to be cut.
    sizes = np.concatenate([view.response_lens(first, end) for (view, first, end), _ in copied])
    for column in bands:
        part = slice(column.rank_start, column.rank_end)
        words: list[NDArray[np.uint32]] = []
        floats: list[NDArray[np.float32]] = []
        offsets = []
        for (view, first, end), _ in copied:
            as_words, as_floats, of_rows = view.plain_words(column.name)
            words += [as_words] * (end - first)
            floats += [as_floats] * (end - first)
            offsets.append(of_rows[first:end])
        bodies = (np.concatenate(offsets).astype(np.int64) + layout.PAGE_HEADER.size) // _WORD
        entries = sizes * (column.rank_end - column.rank_start)
        kernels.copy_rows(ids[:, part], places, words, bodies, counts)
        kernels.copy_rows(logprob[:, part], places, floats, bodies + entries, counts)
        if column is bands[-1]:
            kernels.copy_rows(log_tail, places, floats, bodies + 2 * entries, counts)
