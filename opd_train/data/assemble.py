"""From rows of caches to batches: every value is decoded straight to its place in the batch.

Axes: S = rollouts, N = response tokens, K = ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from opd_store import NO_ID, Cache, InvalidArgumentError, MismatchError, gather
from opd_train.data.batches import LOGPROBS, TOPK, TeacherBatch, ids_below, packed_batch, response_bytes
from opd_train.data.packing import BufferPool, Packing
from opd_train.data.pending import pending_topk
from opd_train.data.supports import asked_for

Rows = NDArray[np.int64]
Allocate = Callable[[str, tuple[int, ...], Any], NDArray[Any]]
_OPTIONAL = (*LOGPROBS, *TOPK, "policy_version")
"""What a batch has if all of its rollouts have it."""


class _Run(NamedTuple):
    """Neighbours of one cache in a batch."""

    source: int
    cache: Cache
    rows: Rows
    first: int
    last: int


class BatchAssembler:
    """Makes batches of named rows. Threads may share it; each call fills a buffer of its own."""

    def __init__(
        self,
        caches: Sequence[Cache],
        *,
        ranks: int | None = None,
        vocab_size: int | None = None,
        max_tokens: int | None = None,
        multiple_of: int = 1,
        joined: Sequence[tuple[Cache, Rows]] = (),
        draws: bool = False,
        chosen: bool = False,
        device: torch.device | str = "cpu",
        device_decode: bool = False,
    ) -> None:
        """
        Args:
            caches: where rollouts are from, one or more of one tokenizer.
            ranks: how many of the cached top-k ranks to read; the rest joins `log_tail`. None means all.
            vocab_size: every id is proven below it; None means below the caches' own.
            max_tokens: rollouts are cut after so many tokens; None for no limit.
            multiple_of: batches are padded to a multiple of so many tokens.
            joined: other teachers' caches, each with the row there of every row of the first cache, int64
                [rows], -1 where it has none (`opd_store.join`). A batch with such a row has none of that
                teacher's values.
            draws, chosen: whether to read drawn, and chosen, ids; all caches need to have them then.
            device: where the batches will go; buffers are pinned if that is a CUDA device.
            device_decode: leave packed top-k in pages, for a `DeviceFeed` to put together on the device. Has
                no effect where a cache has nothing to decode, where `ranks` ends inside a band, or where
                `vocab_size` is smaller than a cache's, since ids are then proven on the CPU.

        Raises:
            InvalidArgumentError: no caches, caches of different top-k without `ranks`, without drawn or
                chosen ids where they are wanted, an argument out of range, or joined rows that do not fit.
            MismatchError: caches of different tokenizers.
        """
        if not caches:
            raise InvalidArgumentError("caches: expected one or more, found none")
        if multiple_of < 1 or (max_tokens is not None and max_tokens < 2):
            raise InvalidArgumentError(
                f"multiple_of and max_tokens: expected >= 1 and >= 2, found {multiple_of} and {max_tokens}"
            )
        self._caches, self._ranks = tuple(caches), ranks
        self._width = _common_width(self._caches, ranks)
        for cache in (*caches[1:], *(cache for cache, _ in joined)):
            _require_same_tokenizer(caches[0], cache)
        self._joined = [(cache, _checked_rows(caches, cache, rows)) for cache, rows in joined]
        own = min(cache.meta.vocab_size for cache in caches)
        self._vocab_size = own if vocab_size is None else vocab_size
        self._max_tokens, self._multiple_of = max_tokens, multiple_of
        self.device_decode = device_decode
        """May be turned off in a copy for another process. Internal to the package."""
        widths = [self._width, *(self._ranks_of(cache) for cache, _ in self._joined)]
        self._supports = {s: s.width(self._caches) for s in asked_for(draws=draws, chosen=chosen)}
        more = sum(support.response_bytes(width) for support, width in self._supports.items())
        self._response_bytes = sum(map(response_bytes, widths)) + more
        self.pool = BufferPool(pinned=torch.device(device).type == "cuda")
        """Where the buffers of the batches are from."""

    def prefetch(self, source: int | Rows, rows: Sequence[int] | Rows) -> None:
        """Ask the caches for what `assemble` will need, and return at once."""
        for run in self._runs(source, rows):
            columns = (*self._columns(run.cache), *(name for s in self._supports for name in s.columns))
            run.cache.prefetch(run.rows.tolist(), ranks=self._cache_ranks(run.cache), columns=columns)
            for cache, mapping in self._joined:
                theirs = mapping[run.rows]
                # Otherwise `assemble` will not ask for any.
                if theirs.min() >= 0:
                    columns = self._joined_columns(cache)
                    cache.prefetch(theirs.tolist(), ranks=self._cache_ranks(cache), columns=columns)

    def assemble(self, source: int | Rows, rows: Sequence[int] | Rows) -> TeacherBatch:
        """Read rollouts into a batch on the CPU.

        Args:
            source: which of the caches, one for all rows or one for each. Neighbours of one cache are read
                together.
            rows: [S] row numbers, in the order that the batch will have; at least one.

        Raises:
            IndexError: no such row.
            InvalidArgumentError: no rows, or a prompt that `max_tokens` leaves no response to.
            InvalidRolloutError: an id outside the vocabulary, with row and column.
            MismatchError: a joined rollout is not the same one.
            IntegrityError, FormatError: a shard is damaged.
        """
        runs = self._runs(source, rows)
        sizes = [run.cache.lengths(run.rows, max_tokens=self._max_tokens) for run in runs]
        lengths, responses = (np.concatenate(part) for part in zip(*sizes, strict=True))
        paged = self.device_decode and all(self._has_pages(run.cache) for run in runs)
        topk = (
            pending_topk([(run.cache, run.rows) for run in runs], self._ranks, responses) if paged else None
        )
        packing = Packing(
            self.pool,
            lengths,
            responses,
            multiple_of=self._multiple_of,
            response_bytes=self._response_bytes,
            more_bytes=0 if topk is None else topk.n_bytes,
        )
        complete: set[str] = {*_OPTIONAL}
        for run in runs:
            packing.row_ids[run.first : run.last] = run.rows
            packing.source_ids[run.first : run.last] = run.source
            complete &= self._read(run, packing, without_topk=paged)
            self._read_supports(run, packing)
        for name in {*_OPTIONAL} - complete:
            packing.drop(name)
        pending = () if topk is None else (topk.placed(packing),)
        for number, (cache, mapping) in enumerate(self._joined):
            self._join(f"joined.{number}.", cache, mapping, runs[0].rows, packing)
        return packed_batch(packing, len(self._joined), pending)

    def _runs(self, source: int | Rows, rows: Sequence[int] | Rows) -> list[_Run]:
        wanted = np.asarray(rows, np.int64)
        if not len(wanted):
            raise InvalidArgumentError("rows: expected one or more, found none")
        if isinstance(source, int) or len(self._caches) == 1:
            bounds, sources = [0, len(wanted)], [source if isinstance(source, int) else 0]
        else:
            bounds = [0, *(np.flatnonzero(np.diff(source)) + 1).tolist(), len(wanted)]
            sources = [int(source[first]) for first in bounds[:-1]]
        return [
            _Run(number, self._caches[number], wanted[first:last], first, last)
            for number, (first, last) in zip(sources, pairwise(bounds), strict=True)
        ]

    def _read(self, run: _Run, packing: Packing, *, without_topk: bool) -> set[str]:
        """Fill in the rollouts of one cache; the optional fields that all of them have."""
        columns = [name for name in self._columns(run.cache) if not (without_topk and name in TOPK)]
        tokens, responses = _places(packing, run.first, run.last)
        ids = packing.tokens[tokens]
        packed = gather(
            run.cache,
            run.rows,
            ranks=self._cache_ranks(run.cache),
            columns=columns,
            max_tokens=self._max_tokens,
            allocate=_allocate(run, packing, "", ids),
        )
        if packed.loss_mask is None:
            packing.loss_mask[responses] = True
        self._prove("token_ids", ids, packing.token_starts, run)
        if packed.topk_ids is not None:
            self._prove("topk_ids", packing.get("topk_ids")[responses], packing.response_starts, run)
        return {name for name in _OPTIONAL if getattr(packed, name) is not None}

    def _read_supports(self, run: _Run, packing: Packing) -> None:
        """Fill in drawn and chosen ids of the rollouts of one cache."""
        cache = run.cache
        _, responses = _places(packing, run.first, run.last)
        for support, width in self._supports.items():
            rollouts = [cache.rollout(row, columns=support.columns) for row in run.rows.tolist()]
            temperature = cache.schema.sampled_temperature
            support.place(packing, width, run.first, rollouts, temperature=temperature)
            name = support.fields[0]
            self._prove(name, packing.get(name)[responses], packing.response_starts, run)

    def _join(self, prefix: str, cache: Cache, mapping: Rows, rows: Rows, packing: Packing) -> None:
        """Fill in what another teacher said."""
        theirs = mapping[rows]
        if theirs.min() < 0:
            return
        ours = self._caches[0]
        lengths, responses = cache.lengths(theirs, max_tokens=self._max_tokens)
        tokens = np.empty(packing.n_tokens, np.uint32)
        expected = np.diff(packing.token_starts), np.diff(packing.response_starts)
        for what, one, other in zip(
            ("tokens", "response tokens"), expected, (lengths, responses), strict=True
        ):
            if (one != other).any():
                at = int(np.argmax(one != other))
                raise MismatchError(
                    f"row {rows[at]} of {ours.uri} has {one[at]} {what}, row {theirs[at]} of {cache.uri} has "
                    f"{other[at]}; rollouts that are joined have to be equal and have equal prompts",
                    field="token_ids" if what == "tokens" else "prompt_len",
                    expected=str(one[at]),
                    found=str(other[at]),
                )
        run = _Run(-1, cache, theirs, 0, len(theirs))
        packed = gather(
            cache,
            theirs,
            ranks=self._cache_ranks(cache),
            columns=self._joined_columns(cache),
            max_tokens=self._max_tokens,
            allocate=_allocate(run, packing, prefix, tokens),
        )
        if not np.array_equal(tokens, packing.tokens):
            at = int(np.argmax(tokens != packing.tokens))
            at = int(np.searchsorted(packing.token_starts, at, side="right")) - 1
            raise MismatchError(
                f"row {rows[at]} of {ours.uri} and row {theirs[at]} of {cache.uri} hold different tokens; "
                "pair them with `opd_store.join`",
                field="token_ids",
            )
        if packed.topk_ids is not None:
            self._prove("topk_ids", packing.get(prefix + "topk_ids"), packing.response_starts, run)
        for name in ("teacher_logprob", *TOPK):
            if getattr(packed, name) is None:
                packing.drop(prefix + name)

    def _prove(self, name: str, ids: NDArray[np.uint32], starts: Rows, run: _Run) -> None:
        """Make every id one that can be gathered, or refuse it."""
        cache = run.cache
        proven = cache.checks_values and self._vocab_size >= cache.meta.vocab_size
        if name == "topk_ids" and (cache.schema.cut is not None or not proven):
            ids[ids == NO_ID] = 0
        if not proven:
            starts = starts[run.first : run.last] - starts[run.first]
            ids_below(self._vocab_size, name, ids, starts, run.rows, f"{cache.uri}: ")

    def _columns(self, cache: Cache) -> tuple[str, ...]:
        return ("loss_mask", "policy_version", *LOGPROBS, *(TOPK if self._ranks_of(cache) else ()))

    def _joined_columns(self, cache: Cache) -> tuple[str, ...]:
        return ("teacher_logprob", *(TOPK if self._ranks_of(cache) else ()))

    def _cache_ranks(self, cache: Cache) -> int | None:
        """What to ask the cache for: no more than it has."""
        return self._ranks if self._ranks is None else min(self._ranks, cache.topk)

    def _ranks_of(self, cache: Cache) -> int:
        ranks = self._cache_ranks(cache)
        return cache.topk if ranks is None else ranks

    def _has_pages(self, cache: Cache) -> bool:
        """Whether a device can put the top-k together."""
        packed = cache.encoding != "plain" and self._ranks_of(cache) in cache.schema.bands
        return packed and self._vocab_size >= cache.meta.vocab_size


def _places(packing: Packing, first: int, last: int) -> tuple[slice, slice]:
    """Where the tokens, and the response tokens, of some rollouts are."""
    tokens, responses = packing.token_starts, packing.response_starts
    return slice(tokens[first], tokens[last]), slice(responses[first], responses[last])


def _allocate(run: _Run, packing: Packing, prefix: str, tokens: NDArray[np.uint32]) -> Allocate:
    _, responses = _places(packing, run.first, run.last)
    n_responses = int(packing.response_starts[-1])

    def allocate(name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:  # noqa: ANN401
        if name == "token_ids":
            place: NDArray[Any] = tokens
        elif name == "loss_mask":
            place = packing.loss_mask[responses]
        elif name == "policy_version":
            place = packing.place(name, packing.row_ids.shape, dtype)[run.first : run.last]
        else:
            place = packing.place(prefix + name, (n_responses, *shape[1:]), dtype)[responses]
        return place

    return allocate


def _common_width(caches: Sequence[Cache], ranks: int | None) -> int:
    """K of the batches."""
    widths = {cache.topk for cache in caches if cache.topk} or {0}
    if ranks is not None and not 0 <= ranks <= min(widths):
        raise InvalidArgumentError(f"ranks: expected 0..{min(widths)} (the stored top-k), found {ranks}")
    if ranks is None and len(widths) > 1:
        found = ", ".join(f"{cache.uri}: {cache.topk}" for cache in caches)
        raise InvalidArgumentError(f"ranks: the caches hold different top-k ({found}); say how many to read")
    return min(widths) if ranks is None else ranks


def _require_same_tokenizer(one: Cache, other: Cache) -> None:
    expected, found = one.meta.tokenizer_fingerprint, other.meta.tokenizer_fingerprint
    if expected != found:
        raise MismatchError(
            f"tokenizer_fingerprint: {one.uri} has {expected}, {other.uri} has {found}; a batch has one",
            field="tokenizer_fingerprint",
            expected=expected,
            found=found,
        )


def _checked_rows(caches: Sequence[Cache], cache: Cache, rows: Rows) -> Rows:
    if len(caches) > 1:
        raise InvalidArgumentError(f"joined: expected one cache to join to, found {len(caches)}")
    mapping = np.asarray(rows)
    fits = mapping.shape == (len(caches[0]),) and mapping.dtype.kind in "iu"
    if not fits or (mapping.size and not -1 <= mapping.min() <= mapping.max() < len(cache)):
        raise InvalidArgumentError(
            f"joined: expected for each of the {len(caches[0])} rows of {caches[0].uri} a row of {cache.uri} "
            f"in 0..{len(cache) - 1}, or -1; found {mapping.dtype} of shape {list(mapping.shape)}"
        )
    return mapping.astype(np.int64)
