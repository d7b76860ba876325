"""Decode top-k pages on a device: compact streams cross the bus, gathers and a running sum do the rest.

The same bits come out as from `opd_store` on the CPU. Everything that could go wrong was proven when the page
was parsed, so that no index can leave its table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_store import (
    NO_ID,
    Cache,
    FloatStreams,
    IdTable,
    InvalidArgumentError,
    LadderStreams,
    PageShape,
    PageStreams,
)

Send = Callable[[NDArray[Any]], Tensor]
"""Takes uint8 or signed integers to a device. What it gives is not written to."""

# Axes: P = response positions of one rollout, k = ranks of a page, n = entries of a page without padding.
_SIGN = -(1 << 31)
_ESCAPE = 255


@dataclass(frozen=True, slots=True)
class TopK:
    """The top-k of one rollout on a device."""

    ids: Tensor
    """[P, K] int64; 0xFFFFFFFF where a row ends earlier."""
    logprob: Tensor
    """[P, K] float32, nats; -inf where a row ends earlier."""
    log_tail: Tensor
    """[P] float32, nats, the teacher's probability outside the K ranks."""


class PageDecoder:
    """Decodes the packed pages of one cache. Holds its id table on the device."""

    def __init__(self, cache: Cache, device: str | torch.device = "cpu") -> None:
        """Copy the id table to the device.

        Raises:
            InvalidArgumentError: the cache has no packed top-k; `plain` pages are copied as they are.
        """
        if not cache.topk or cache.encoding == "plain":
            raise InvalidArgumentError(
                f"{cache.uri}: top-{cache.topk} in {cache.encoding} has nothing to decode"
            )
        self._cache, self._device = cache, torch.device(device)
        self._table: tuple[Tensor, Tensor] | None = None
        if cache.id_table is not None:
            self._table = self._upload_table(cache.id_table)

    def _upload_table(self, table: IdTable) -> tuple[Tensor, Tensor]:
        arrays = (table.by_rank, table.padded_lists)
        by_rank, lists = (_widened(array, self._send).long() for array in arrays)
        return by_rank, lists

    def _send(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.array(array, copy=True)).to(self._device)

    def topk(self, row: int, ranks: int | None = None) -> TopK:
        """The first `ranks` ranks of one rollout; None means all.

        Raises:
            InvalidArgumentError: `ranks` is not the end of a band, where the tail would have to be summed.
            IntegrityError, FormatError: the shard is damaged.
        """
        wanted = self._cache.topk if ranks is None else ranks
        if wanted not in self._cache.schema.bands:
            ends = ", ".join(map(str, self._cache.schema.bands))
            raise InvalidArgumentError(f"ranks: expected the end of a band ({ends}), found {wanted}")
        return self.assemble([[page] for page in self._cache.page_streams(row, ranks=wanted)])

    def assemble(self, bands: Sequence[Sequence[PageStreams]], send: Send | None = None) -> TopK:
        """Rollouts end to end: for each band from the first on, its pages one after another."""
        whole = [[self.decode(page, send) for page in pages] for pages in bands]
        ids = cat([cat([page.ids for page in pages], 0) for pages in whole], 1)
        logprob = cat([cat([page.logprob for page in pages], 0) for pages in whole], 1)
        return TopK(ids, logprob, cat([page.log_tail for page in whole[-1]], 0))

    def decode(self, page: PageStreams, send: Send | None = None) -> TopK:
        """One page of this cache, or several that were joined.

        Args:
            send: takes arrays to the device; None copies each.
        """

        def get(array: NDArray[Any]) -> Tensor:
            return _widened(array, send or self._send)

        present = None
        if page.counts is not None:
            columns = torch.arange(page.shape.n_ranks, device=self._device)
            present = columns < get(page.counts)[:, None]
        if isinstance(page.logprobs, LadderStreams):
            logprob, log_tail = self._ladder(page, page.logprobs, present, get)
        else:
            logprob, log_tail = self._floats(page, page.logprobs, present, get)
        return TopK(self._ids(page, present, get), logprob, log_tail)

    def _floats(
        self, page: PageStreams, parsed: FloatStreams, present: Tensor | None, get: Send
    ) -> tuple[Tensor, Tensor]:
        # Words are of 32 bits, whose highest is no sign yet: they wrap.
        parts = [(steps.start, steps.end, get(steps.words).int()) for steps in parsed.steps]
        words_Pk = self._running(page.shape, get(parsed.heads).int(), parts, present)
        logprob = (words_Pk ^ _SIGN).view(torch.float32)
        if present is not None:
            logprob[~present] = -torch.inf
        return logprob, (get(parsed.log_tail).int() ^ _SIGN).view(torch.float32)

    def _ladder(
        self, page: PageStreams, parsed: LadderStreams, present: Tensor | None, get: Send
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for steps in parsed.steps:
            values = get(steps.small).int()
            if len(steps.more):
                values[values == _ESCAPE] += get(steps.more).int()
            parts.append((steps.start, steps.end, values))
        units_Pk = self._running(page.shape, get(parsed.heads).int(), parts, present)
        logprob = _from_units(units_Pk, page.scale)
        if present is not None:
            logprob[~present] = -torch.inf
        tail = get(parsed.log_tail).int()
        log_tail = _from_units(tail.clamp(min=1) - 1, page.scale)
        log_tail[tail == 0] = -torch.inf
        return logprob, log_tail

    def _running(
        self,
        shape: PageShape,
        heads: Tensor,
        parts: list[tuple[int, int, Tensor]],
        present: Tensor | None,
    ) -> Tensor:
        """[P, k] int32 running sums of steps from the first rank on, modulo 2^32."""
        sums_Pk = torch.zeros(shape.n_positions, shape.n_ranks, dtype=torch.int32, device=self._device)
        if present is None:
            sums_Pk[:, 0] = heads
        else:
            sums_Pk[present[:, 0], 0] = heads
        for start, end, values in parts:
            columns = slice(start - shape.rank_start, end - shape.rank_start)
            if present is None:
                sums_Pk[:, columns] = values.view(shape.n_positions, end - start)
            else:
                sums_Pk[:, columns][present[:, columns]] = values
        return sums_Pk.cumsum(1, dtype=torch.int32)

    def _ids(self, page: PageStreams, present: Tensor | None, get: Send) -> Tensor:
        parsed = page.ids
        values = get(parsed.values).long()
        if page.id_table is not None and self._table is not None and parsed.mode:
            by_rank, lists = self._table
            if parsed.lists is None or parsed.escaped is None:
                values = by_rank[values]
            else:
                base = get(parsed.lists).long() * (_ESCAPE + 1)
                if page.counts is None:
                    base = base.repeat_interleave(page.shape.n_ranks)
                else:
                    base = base.repeat_interleave(get(page.counts))
                escaped = values == _ESCAPE
                values = lists[base + values]
                values[escaped] = by_rank[get(parsed.escaped).long()]
        return _padded(values, present, page, NO_ID)


def _widened(array: NDArray[Any], send: Send) -> Tensor:
    """Unsigned integers on a device, in a type that holds them and that torch computes with."""
    if array.dtype == np.uint16:
        return send(array.view(np.int16)).int() & 0xFFFF
    if array.dtype == np.uint32:
        return send(array.view(np.int32)).long() & 0xFFFFFFFF
    return send(array)


def cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _from_units(units: Tensor, scale: int) -> Tensor:
    if scale:
        return 0.0 - units.float() * (1.0 / scale)
    return 0.0 - units.to(torch.int16).view(torch.float16).float()


def _padded(values: Tensor, present: Tensor | None, page: PageStreams, padding: float) -> Tensor:
    size = (page.shape.n_positions, page.shape.n_ranks)
    if present is None:
        return values.view(size)
    padded = torch.full(size, padding, dtype=values.dtype, device=values.device)
    padded[present] = values
    return padded
