"""What is measured of rollouts, and how it is summed up in bounded memory. Nothing here reads or prints.

Axes: S = rollouts of a chunk, N = their response tokens end to end, K = stored ranks, V = vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import NO_ID, Rollout
from opd_tools.show.histograms import Histogram

Floats = NDArray[np.float64]
MAX_GROUPS = 24
"""Values of a column that are told apart; the rest counts as "other"."""
OTHER = "(other)"
MAX_LOG_RATIO = 20.0
"""Nats; ratios beyond are taken as this, so that sums stay finite."""

_LENGTH, _NATS, _SHARE, _RATIO = (1.0, 2.0**22), (2.0**-20, 2.0**7), (2.0**-26, 1.0), (2.0**-16, 2.0**16)
POSITION_RANGES = {
    "teacher_surprise": _NATS,
    "behaviour_surprise": _NATS,
    "reference_surprise": _NATS,
    "entropy": _NATS,
    "ratio": _RATIO,
}
"""Measures of a response token, and between which values they are told apart."""
ROLLOUT_RANGES = {"tokens": _LENGTH, "response_tokens": _LENGTH, "rollout_ess": _SHARE}
"""Measures of a rollout."""


@dataclass(slots=True)
class Chunk:
    """Measures of a few rollouts."""

    lengths: NDArray[np.int64]
    """[S] response tokens of each."""
    rollouts: dict[str, Floats]
    """[S] each; NaN where unknown."""
    positions: dict[str, Floats]
    """[N] each; NaN where unknown."""
    missing_mass: dict[int, Floats]
    """k to [N], probability outside the first k ranks."""
    labels: dict[str, list[str]]
    """Column to [S] values as text."""

    def of(self, chosen: NDArray[np.bool_]) -> Chunk:
        """Only some rollouts."""
        at = np.repeat(chosen, self.lengths)
        return Chunk(
            self.lengths[chosen],
            {name: values[chosen] for name, values in self.rollouts.items()},
            {name: values[at] for name, values in self.positions.items()},
            {k: values[at] for k, values in self.missing_mass.items()},
            {
                name: [v for v, keep in zip(values, chosen, strict=True) if keep]
                for name, values in self.labels.items()
            },
        )


def supports_of(topk: int) -> list[int]:
    """1, 2, 4, ... and K: how many ranks the mass is told for."""
    return [*(k for k in (2**i for i in range(13)) if k < topk), topk] if topk else []


def measure(rollouts: Sequence[Rollout], *, vocab_size: int, labels: Sequence[str]) -> Chunk:
    """Measure rollouts that were read with all ranks.

    Args:
        rollouts: at least one.
        vocab_size: of the cache.
        labels: columns whose values are kept as text: "finish_reason", "teacher" or "x_*".
    """
    lengths = np.array([rollout.response_len for rollout in rollouts], np.int64)
    logprobs = {
        name: _joined(rollouts, lengths, f"{name}_logprob") for name in ("teacher", "behaviour", "reference")
    }
    positions = {f"{name}_surprise": np.abs(values) for name, values in logprobs.items()}
    log_ratio = np.clip(logprobs["teacher"] - logprobs["behaviour"], -MAX_LOG_RATIO, MAX_LOG_RATIO)
    positions["ratio"] = np.exp(log_ratio)
    missing_mass: dict[int, Floats] = {}
    if rollouts[0].topk_ids is not None:
        missing_mass = _topk(rollouts, vocab_size, logprobs["teacher"], positions)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    sums, squares = (np.add.reduceat(positions["ratio"] ** power, starts) for power in (1, 2))
    total = np.array([len(rollout.token_ids) for rollout in rollouts], np.float64)
    measured = {
        "tokens": total,
        "response_tokens": lengths.astype(np.float64),
        "rollout_ess": sums**2 / squares / lengths,
    }
    values = {name: [label(rollout, name) for rollout in rollouts] for name in labels}
    return Chunk(lengths, measured, positions, missing_mass, values)


def label(rollout: Rollout, column: str) -> str:
    """The value of a column as text."""
    value = rollout.extra.get(column) if column.startswith("x_") else getattr(rollout, column)
    return "(none)" if value is None else str(value)


def _joined(rollouts: Sequence[Rollout], lengths: NDArray[np.int64], name: str) -> Floats:
    """[N] a list of all rollouts end to end; NaN where one has none."""
    parts = (getattr(rollout, name) for rollout in rollouts)
    return np.concatenate(
        [
            np.full(n, np.nan) if part is None else part.astype(np.float64)
            for part, n in zip(parts, lengths.tolist(), strict=True)
        ]
    )


def _topk(
    rollouts: Sequence[Rollout], vocab_size: int, teacher_N: Floats, positions: dict[str, Floats]
) -> dict[int, Floats]:
    """Add what top-k tells to `positions`; k to the probability outside the first k ranks."""
    ids = np.concatenate([rollout.topk_ids for rollout in rollouts if rollout.topk_ids is not None])
    logprob = np.concatenate(
        [rollout.topk_logprob for rollout in rollouts if rollout.topk_logprob is not None]
    ).astype(np.float64)
    log_tail = np.concatenate([rollout.log_tail for rollout in rollouts if rollout.log_tail is not None])
    probability, tail = np.exp(logprob), np.exp(log_tail.astype(np.float64))
    known = np.where(probability > 0, -probability * np.where(np.isinf(logprob), 0.0, logprob), 0.0).sum(
        axis=1
    )
    # No id outside is likelier than the last one inside, and at best all of them are alike.
    n_kept = (ids != NO_ID).sum(axis=1)
    last = np.take_along_axis(logprob, np.maximum(n_kept - 1, 0)[:, None], axis=1)[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_mass = np.log(tail)
        most_even = log_mass - np.log(np.maximum(vocab_size - n_kept, 1))
        at_least = known + np.where(tail > 0, tail * -np.minimum(last, log_mass), 0.0)
        at_most = known + np.where(tail > 0, tail * -most_even, 0.0)
    positions["entropy_least"], positions["entropy_most"] = at_least, np.maximum(at_least, at_most)
    positions["entropy"] = (positions["entropy_least"] + positions["entropy_most"]) / 2
    sampled = np.concatenate([rollout.response_ids for rollout in rollouts])
    hit = ids == sampled[:, None]
    positions["is_first"] = hit[:, 0].astype(np.float64)
    positions["is_outside"] = (~hit.any(axis=1)).astype(np.float64)
    inside = np.where(hit, logprob, 0.0).sum(axis=1)
    positions["disagreement"] = np.where(hit.any(axis=1), np.abs(inside - teacher_N), np.nan)
    # Summed from the least likely up, so that little is lost next to 1.
    outside = tail[:, None] + np.cumsum(probability[:, ::-1], axis=1)[:, ::-1]
    topk = ids.shape[1]
    return {k: np.minimum(tail if k == topk else outside[:, k], 1.0) for k in supports_of(topk)}


@dataclass(slots=True)
class Stats:
    """Sums over rollouts."""

    rollouts: int = 0
    positions: int = 0
    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {
            name: Histogram(*limits) for name, limits in (POSITION_RANGES | ROLLOUT_RANGES).items()
        }
    )
    missing_mass: dict[int, Histogram] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of measures of which only the mean is told, and how many values "n_" + name had."""
    disagreement: float = 0.0
    """Nats, greatest distance of the teacher's log-prob from the top-k's entry for the same token."""

    def add(self, chunk: Chunk) -> None:
        """Add these rollouts."""
        self.rollouts += len(chunk.lengths)
        self.positions += int(chunk.lengths.sum())
        for name, values in (chunk.rollouts | chunk.positions).items():
            known = values[~np.isnan(values)]
            if name in self.histograms:
                self.histograms[name].add(known)
            elif name == "disagreement":
                self.disagreement = max(self.disagreement, float(known.max(initial=0.0)))
            else:
                self.sums[name] += float(known.sum())
                self.sums[f"n_{name}"] += len(known)
        for k, values in chunk.missing_mass.items():
            self.missing_mass.setdefault(k, Histogram(*_SHARE)).add(values)

    def mean(self, name: str) -> float | None:
        """Of a measure; None where no rollout has it."""
        if name in self.histograms:
            found = self.histograms[name]
            return found.mean if found.n else None
        n = self.sums[f"n_{name}"]
        return self.sums[name] / n if n else None

    @property
    def ess(self) -> float | None:
        """Effective sample size of the ratios teacher to behaviour policy, as a share of the tokens."""
        found = self.histograms["ratio"]
        return found.total**2 / found.squares / found.n if found.n else None


class Collector:
    """Adds up chunks, as a whole and by the values of some columns."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self.whole = Stats()
        self.groups: dict[str, dict[str, Stats]] = {name: {} for name in columns}
        """Column to value to sums, in the order of their appearance."""

    def add(self, chunk: Chunk) -> None:
        """Add these rollouts."""
        self.whole.add(chunk)
        for name in self.columns:
            found = self.groups[name]
            values = []
            for value in chunk.labels[name]:
                if value not in found:
                    if len(found) >= MAX_GROUPS:
                        value = OTHER
                    found.setdefault(value, Stats())
                values.append(value)
            given = np.array(values, object)
            for value in dict.fromkeys(values):
                found[value].add(chunk.of(given == value))


def summary(stats: Stats) -> dict[str, Any]:
    """Numbers for people and machines: name to number, or to a dictionary of such; absent where unknown."""
    found: dict[str, Any] = {"rollouts": stats.rollouts, "response positions": stats.positions}
    histograms = stats.histograms
    for name, title in (("tokens", "tokens a rollout"), ("response_tokens", "response tokens a rollout")):
        if not histograms[name].n:
            continue
        found[title] = {
            part: value if part == "mean" else round(value)
            for part, value in _range(histograms[name]).items()
        }
    for name in ("teacher", "behaviour", "reference"):
        histogram = histograms[f"{name}_surprise"]
        if histogram.n:
            found[f"{name} log-prob"] = {
                "mean": -histogram.mean,
                "median": -histogram.quantile(0.5),
                "5 % are below": -histogram.quantile(0.95),
                "least": -histogram.greatest,
            }
    entropy = histograms["entropy"]
    if entropy.n:
        found["entropy"] = {
            "mean, at least": stats.mean("entropy_least"),
            "mean, at most": stats.mean("entropy_most"),
            "median": entropy.quantile(0.5),
            "5 % are above": entropy.quantile(0.95),
            "greatest": entropy.greatest,
        }
        found["mass of k ranks"] = {str(k): 1 - h.mean for k, h in stats.missing_mass.items()}
        found["mass that 95 % of positions have"] = {
            str(k): 1 - h.quantile(0.95) for k, h in stats.missing_mass.items()
        }
        found["sampled token"] = {
            "is rank 1": stats.mean("is_first"),
            "is outside the top-k": stats.mean("is_outside"),
        }
        if histograms["teacher_surprise"].n:
            found["teacher log-prob against top-k"] = {"largest difference": stats.disagreement}
    if histograms["ratio"].n:
        found["ratio, teacher to behaviour"] = _range(histograms["ratio"])
        found["effective sample size"] = {
            "of all tokens": stats.ess,
            "median of rollouts": histograms["rollout_ess"].quantile(0.5),
        }
    return found


def _range(histogram: Histogram) -> dict[str, float]:
    return {
        "mean": histogram.mean,
        "least": histogram.least,
        "5 % are below": histogram.quantile(0.05),
        "median": histogram.quantile(0.5),
        "5 % are above": histogram.quantile(0.95),
        "greatest": histogram.greatest,
    }
