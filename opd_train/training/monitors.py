"""Alarms on a run's metrics: when the cached rollouts are too old for the student, and when a loss is blind.

An alarm is raised once, when the mean of the last steps passes its threshold, and cleared once, when it comes
back. Everything follows from the metrics alone, so a run that goes on from a checkpoint raises the same
alarms.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from opd_store import InvalidArgumentError

_RELEASE = 0.05
"""An alarm is cleared this share of its threshold on the good side, so that noise does not raise it again."""

_KL_FLOOR = 0.01
"""Nats. A divergence that doubles below it is noise."""
_MOST = sys.float_info.max
"""Before anything is known; infinity is no JSON."""


class AlarmKind(StrEnum):
    """What is wrong, and so what helps."""

    DRIFT = "drift"
    """The student has left the policy that sampled the rollouts."""
    CORRECTION = "correction"
    """The correction throws away or flattens much of the batch."""
    COVERAGE = "coverage"
    """The cached ranks hold too little probability."""
    DIVERGENCE = "divergence"
    """The student moves away from the teacher."""


ADVICE = {
    AlarmKind.DRIFT: "re-roll out now: sample and score new rollouts from this student, or stop here",
    AlarmKind.CORRECTION: "lower the learning rate or re-roll out; weights cannot repair this much drift",
    AlarmKind.COVERAGE: "score with a larger --topk; the loss does not see where the rest of the mass is",
    AlarmKind.DIVERGENCE: "lower the learning rate; the distance to the teacher grows instead of falling",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftConfig:
    """Thresholds on the means of the last steps. None turns one off."""

    ess_min: float | None = 0.5
    """Effective sample size of the ratios, as a share: below it, half of the tokens count for nothing."""
    chi2_max: float | None = 1.0
    """mean(rho^2) - 1. The gradient is off by at most G sigma sqrt(chi2) (arXiv 2604.13010, thm 3.5): at 1
    the bound is as large as the gradient's own scale. Where the mean ratio is 1 it is the same as `ess_min`
    0.5."""
    ratio_mean_min: float | None = 0.8
    """The mean ratio is 1 without drift, and falls where the student learns to avoid what was sampled. The
    paper's runs stay at 0.94 (figure 3a)."""
    ratio_mean_max: float | None = 1.25
    """The other side, 1 / 0.8: the student repeats what was sampled."""
    capped_max: float | None = 0.25
    """Share of tokens whose weight is at its cap: a quarter of the batch has lost its order."""
    dropped_max: float | None = 0.25
    """Share of tokens that the correction leaves out."""
    teacher_mass_min: float | None = 0.9
    """Teacher probability on the cached ranks. The tail is one bucket, whose inside no loss sees."""
    student_mass_min: float | None = 0.5
    """Student probability on the cached ranks."""
    kl_growth_max: float | None = 1.5
    """The divergence to the teacher, over the lowest it has been. `forward_kl`, else `reverse_kl`."""
    smooth_steps: int = 10
    """Values that a mean is over. Nothing is judged before there are so many."""

    def __post_init__(self) -> None:
        if self.smooth_steps < 1:
            raise InvalidArgumentError(f"smooth_steps: expected 1 or more, found {self.smooth_steps}")
        for rule in _RULES:
            limit = getattr(self, rule.field)
            if limit is not None and not 0 < limit < math.inf:
                raise InvalidArgumentError(f"{rule.field}: expected more than 0, found {limit}")


@dataclass(frozen=True, slots=True)
class _Rule:
    field: str
    metric: str
    kind: AlarmKind
    is_least: bool


_GROWTH = "kl_growth"
_RULES = (
    _Rule("ess_min", "ess", AlarmKind.DRIFT, True),
    _Rule("chi2_max", "chi2", AlarmKind.DRIFT, False),
    _Rule("ratio_mean_min", "ratio_mean", AlarmKind.DRIFT, True),
    _Rule("ratio_mean_max", "ratio_mean", AlarmKind.DRIFT, False),
    _Rule("capped_max", "capped", AlarmKind.CORRECTION, False),
    _Rule("dropped_max", "dropped", AlarmKind.CORRECTION, False),
    _Rule("teacher_mass_min", "teacher_mass", AlarmKind.COVERAGE, True),
    _Rule("student_mass_min", "student_mass", AlarmKind.COVERAGE, True),
    _Rule("kl_growth_max", _GROWTH, AlarmKind.DIVERGENCE, False),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """One threshold was passed, or is no longer."""

    kind: AlarmKind
    rule: str
    """The field of `DriftConfig`."""
    metric: str
    step: int
    value: float
    """Mean over the last `smooth_steps` values."""
    threshold: float
    raised: bool
    """False where it is cleared."""

    @property
    def advice(self) -> str:
        """What to do about it."""
        return ADVICE[self.kind]

    def __str__(self) -> str:
        if not self.raised:
            return (
                f"step {self.step}: {self.metric} is back at {self.value:.3g} (threshold {self.threshold:g})"
            )
        side = "below" if self.value < self.threshold else "above"
        return (
            f"step {self.step}: {self.kind} alarm: {self.metric} {self.value:.3g} is {side} "
            f"{self.threshold:g}; {self.advice}"
        )

    def to_json(self) -> dict[str, Any]:
        """As a row of `metrics.jsonl` holds it."""
        return {
            "kind": self.kind.value,
            "rule": self.rule,
            "metric": self.metric,
            "step": self.step,
            "value": self.value,
            "threshold": self.threshold,
            "raised": self.raised,
        }


class DriftMonitor:
    """Watches the metrics of a run, step by step."""

    def __init__(
        self, config: DriftConfig | None = None, *, on_alarm: Callable[[Alarm], None] | None = None
    ) -> None:
        """
        Args:
            on_alarm: called with every alarm whose state changes.
        """
        self.config = config or DriftConfig()
        self._on_alarm = on_alarm
        self._recent: dict[str, deque[float]] = {}
        self._lowest_kl = _MOST
        self._active: set[str] = set()

    @property
    def active(self) -> tuple[str, ...]:
        """Fields of `DriftConfig` whose alarms are raised now, in their order there."""
        return tuple(rule.field for rule in _RULES if rule.field in self._active)

    @property
    def has_drifted(self) -> bool:
        """Whether an alarm of kind DRIFT is raised."""
        return any(rule.field in self._active and rule.kind is AlarmKind.DRIFT for rule in _RULES)

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take in the metrics of a step, as `summarise` gives them.

        Returns:
            The alarms whose state changed: raised ones before cleared ones. Most often none.
        """
        found = []
        means = self._means(metrics)
        for rule in _RULES:
            limit, value = getattr(self.config, rule.field), means.get(rule.metric)
            if limit is None or value is None:
                continue
            was = rule.field in self._active
            bad = _is_bad(rule, limit, value, was=was)
            if bad != was:
                (self._active.add if bad else self._active.remove)(rule.field)
                found.append(
                    Alarm(
                        kind=rule.kind,
                        rule=rule.field,
                        metric=rule.metric,
                        step=step,
                        value=value,
                        threshold=limit,
                        raised=bad,
                    )
                )
        found.sort(key=lambda alarm: not alarm.raised)
        if self._on_alarm is not None:
            for alarm in found:
                self._on_alarm(alarm)
        return found

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in the steps of `metrics.jsonl` that a run goes on after, without a word about their
        alarms."""
        speak, self._on_alarm = self._on_alarm, None
        for row in rows:
            self.update(row["step"], row)
        self._on_alarm = speak

    def reset(self) -> None:
        """Forget the steps so far: the rollouts are new."""
        self._recent.clear()
        self._active.clear()
        self._lowest_kl = _MOST

    def state_dict(self) -> dict[str, Any]:
        """Everything that `update` depends on, as JSON values."""
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"recent": recent, "lowest_kl": self._lowest_kl, "active": list(self.active)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        size = self.config.smooth_steps
        self._recent = {str(k): deque(map(float, v), maxlen=size) for k, v in state["recent"].items()}
        self._lowest_kl = float(state["lowest_kl"])
        self._active = {str(name) for name in state["active"]}

    def _means(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Means of what has been seen often enough."""
        values = {rule.metric: metrics[rule.metric] for rule in _RULES if rule.metric in metrics}
        divergence = metrics.get("forward_kl", metrics.get("reverse_kl"))
        if divergence is not None:
            values[_GROWTH] = divergence
        size = self.config.smooth_steps
        means = {}
        for name, value in values.items():
            recent = self._recent.setdefault(name, deque(maxlen=size))
            recent.append(float(value))
            if len(recent) == size:
                means[name] = sum(recent) / size
        if _GROWTH in means:
            mean = means[_GROWTH]
            if math.isfinite(mean):
                self._lowest_kl = min(mean, self._lowest_kl)
            means[_GROWTH] = mean / max(self._lowest_kl, _KL_FLOOR)
        return means


def _is_bad(rule: _Rule, limit: float, value: float, *, was: bool) -> bool:
    # Written so that a value that is not a number passes every threshold.
    if rule.is_least:
        return not value >= limit * (1 + _RELEASE * was)
    return not value <= limit * (1 - _RELEASE * was)
