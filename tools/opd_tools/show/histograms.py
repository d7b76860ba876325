"""Distributions in bounded memory: counts in bins of equal ratio, for values that are at least 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PER_OCTAVE = 16
"""Bins from one power of two to the next, so quantiles are right to 4 %."""


class Histogram:
    """Counts of non-negative values, with exact count, mean, spread, least and greatest.

    Bin 0 is [0, low), the last one [high, inf), those between are of equal ratio.
    """

    def __init__(self, low: float, high: float) -> None:
        """
        Args:
            low, high: powers of two; what is outside counts as one bin each.
        """
        octaves = round(np.log2(high) - np.log2(low))
        inner = low * 2 ** (np.arange(octaves * PER_OCTAVE + 1) / PER_OCTAVE)
        self.edges: NDArray[np.float64] = np.array([0.0, *inner, np.inf])
        """[bins + 1]."""
        self.counts = np.zeros(len(self.edges) - 1, np.int64)
        """[bins]."""
        self._low, self._n_bins = low, len(self.counts)
        self.n = 0
        self.total = self.squares = 0.0
        self.least, self.greatest = np.inf, -np.inf

    def add(self, values: NDArray[np.floating] | NDArray[np.integer]) -> None:
        """Count these values of any shape; all of them finite and at least 0."""
        given = np.asarray(values, np.float64).ravel()
        if not given.size:
            return
        with np.errstate(divide="ignore"):
            place = np.floor((np.log2(given) - np.log2(self._low)) * PER_OCTAVE) + 1
        bins = np.clip(place, 0, self._n_bins - 1).astype(np.int64)
        self.counts += np.bincount(bins, minlength=self._n_bins)
        self.n += given.size
        self.total += float(given.sum())
        self.squares += float(np.square(given).sum())
        self.least = min(self.least, float(given.min()))
        self.greatest = max(self.greatest, float(given.max()))

    @property
    def mean(self) -> float:
        """Of all values; nan of none."""
        return self.total / self.n if self.n else float("nan")

    def quantile(self, share: float) -> float:
        """The value below which this share of the values lies, to the width of a bin; nan of none."""
        if not self.n:
            return float("nan")
        wanted = share * self.n
        ends = np.cumsum(self.counts)
        at = int(np.searchsorted(ends, wanted, side="left"))
        at = min(at, self._n_bins - 1)
        before = ends[at] - self.counts[at]
        inside = (wanted - before) / max(self.counts[at], 1)
        left = max(self.edges[at], self.least)
        right = min(self.edges[at + 1], self.greatest)
        return float(left + (right - left) * np.clip(inside, 0.0, 1.0))

    def coarse(self, per_octave: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Edges [m + 1] and counts [m] of wider bins, without the empty ones at both ends; for drawing.

        Args:
            per_octave: a divisor of `PER_OCTAVE`.
        """
        step = PER_OCTAVE // per_octave
        starts = np.array([0, *range(1, self._n_bins - 1, step), self._n_bins - 1])
        counts = np.add.reduceat(self.counts, starts)
        # The open bins at both ends get the width of their neighbours.
        inner = self.edges[starts[1:]]
        ratio = 2.0 ** (1 / per_octave)
        edges = np.array([inner[0] / ratio, *inner, inner[-1] * ratio])
        used = np.flatnonzero(counts)
        if not len(used):
            return edges[:1], counts[:0]
        first, end = int(used[0]), int(used[-1]) + 1
        return edges[first : end + 1], counts[first:end]
