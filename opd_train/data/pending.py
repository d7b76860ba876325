"""The top-k of a batch that is still in pages: joined, packed with the batch, put together on its device."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import NO_ID, Cache, InvalidRolloutError, LadderStreams, PageStreams
from opd_train.data.packing import Packing, aligned
from opd_train.data.pages import PageDecoder, Send, TopK, cat


@dataclass(frozen=True, slots=True)
class PendingTopK:
    """The top-k of a batch, still in pages."""

    runs: tuple[tuple[Cache, tuple[tuple[PageStreams, ...], ...]], ...]
    """Neighbours of one cache in the batch: for each band, its pages, joined where they can be."""
    kept: NDArray[np.int64] | None
    """[N] which of the positions of all pages belong to the batch; None for all."""

    @property
    def n_bytes(self) -> int:
        """Room for all arrays in a buffer."""
        sizes: list[int] = []

        def count(array: NDArray[Any]) -> NDArray[Any]:
            sizes.append(aligned(array.nbytes))
            return array

        self._mapped(count)
        return sum(sizes)

    def placed(self, packing: Packing) -> PendingTopK:
        """The same with every array in the buffer of a batch."""
        return self._mapped(packing.hold)

    def _mapped(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> PendingTopK:
        def on(page: PageStreams) -> PageStreams:
            return _combined([page], lambda arrays: change(arrays[0]))

        runs = tuple((cache, tuple(tuple(map(on, pages)) for pages in bands)) for cache, bands in self.runs)
        return PendingTopK(runs, None if self.kept is None else change(self.kept))

    def finish(self, decoders: Callable[[Cache], PageDecoder], send: Send) -> TopK:
        """Put together, with ids int32 and 0 where a row ends earlier.

        Args:
            decoders: gives the decoder of a cache.
            send: takes the arrays to the device of the decoders.
        """
        parts = [decoders(cache).assemble(bands, send) for cache, bands in self.runs]
        ids = cat([part.ids for part in parts], 0)
        ids = ids.masked_fill(ids == NO_ID, 0).int()
        logprob = cat([part.logprob for part in parts], 0)
        log_tail = cat([part.log_tail for part in parts], 0)
        if self.kept is None:
            return TopK(ids, logprob, log_tail)
        kept = send(self.kept)
        return TopK(ids[kept], logprob[kept], log_tail[kept])


def pending_topk(
    runs: Sequence[tuple[Cache, NDArray[np.int64]]], ranks: int | None, responses: NDArray[np.int64]
) -> PendingTopK:
    """Read the pages of rollouts, given as rows of caches in turn.

    Args:
        ranks: the end of a band; None means all.
        responses: [S] response tokens to keep of each.

    Raises:
        InvalidRolloutError: an id outside the vocabulary of its cache.
        IntegrityError, FormatError: a shard is damaged.
    """
    found, sizes = [], []
    for cache, rows in runs:
        pages = [cache.page_streams(row, ranks=ranks) for row in rows.tolist()]
        for row, bands in zip(rows.tolist(), pages, strict=True):
            _require_ids_below(cache.meta.vocab_size, bands, f"{cache.uri}: row {row}")
        sizes += [bands[0].shape.n_positions for bands in pages]
        found.append((cache, tuple(tuple(join_pages(band)) for band in zip(*pages, strict=True))))
    kept = None
    if (responses != sizes).any():
        starts = itertools.accumulate(sizes, initial=0)
        kept = np.concatenate([np.arange(n) + at for n, at in zip(responses, starts, strict=False)])
    return PendingTopK(tuple(found), kept)


def _require_ids_below(limit: int, bands: Sequence[PageStreams], where: str) -> None:
    """What goes through an id table comes out below the vocabulary; ids as they are may not."""
    for page in bands:
        values = page.ids.values
        as_they_are = page.id_table is None or not page.ids.mode
        if as_they_are and len(values) and int(values.max()) >= limit:
            raise InvalidRolloutError(
                f"{where}, topk_ids: id {values.max()} outside the vocabulary of {limit}",
                field="topk_ids",
            )


def join_pages(pages: Sequence[PageStreams]) -> list[PageStreams]:
    """Pages of one band as one page each time neighbours store their ids in the same way: a device then has
    a few large things to do instead of many small ones."""
    joined = []
    for _, group in itertools.groupby(pages, lambda page: page.ids.mode):
        same = list(group)
        if any(page.counts is not None for page in same):
            same = [dataclasses.replace(page, counts=_counts(page)) for page in same]
        whole = same[0] if len(same) == 1 else _combined(same, np.concatenate)
        positions = sum(page.shape.n_positions for page in same)
        shape = dataclasses.replace(whole.shape, n_positions=positions)
        joined.append(dataclasses.replace(whole, shape=shape))
    return joined


def _counts(page: PageStreams) -> NDArray[np.intp]:
    if page.counts is not None:
        return page.counts
    return np.full(page.shape.n_positions, page.shape.n_ranks, np.intp)


def _combined(
    pages: Sequence[PageStreams], join: Callable[[list[NDArray[Any]]], NDArray[Any]]
) -> PageStreams:
    """One page with the arrays of several of the same make."""

    def replaced(parts: Sequence[Any], *names: str, **more: Any) -> Any:  # noqa: ANN401
        arrays = {name: [getattr(part, name) for part in parts] for name in names}
        joined = {name: join(values) for name, values in arrays.items() if values[0] is not None}
        return dataclasses.replace(parts[0], **joined, **more)

    logprobs: list[Any] = [page.logprobs for page in pages]
    names = ("small", "more") if isinstance(logprobs[0], LadderStreams) else ("words",)
    steps = [replaced(same, *names) for same in zip(*(part.steps for part in logprobs), strict=True)]
    whole: PageStreams = replaced(
        pages,
        "counts",
        logprobs=replaced(logprobs, "log_tail", "heads", steps=steps),
        ids=replaced([page.ids for page in pages], "values", "lists", "escaped"),
    )
    return whole
