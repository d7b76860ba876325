"""How two rollouts with the same tokens differ, field by field. Nothing here reads or prints.

Axes: R = response tokens, K = ranks of both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import NO_ID, Rollout
from opd_store.rollout import SUPPORTS

_PAIRS_AT_ONCE = 1 << 22
_LEAST = 2.0**-149
LISTS = ("teacher_logprob", "behaviour_logprob", "reference_logprob")
TAILS = tuple(fields[2] for fields in SUPPORTS.values())
SCALARS = ("prompt_len", "sample_id", "finish_reason", "policy_version", "teacher", "reward", "label")


@dataclass(slots=True)
class FieldDifference:
    """What differs in one field, over all rollouts compared so far."""

    rollouts: int = 0
    """Rollouts in which it differs."""
    values: int = 0
    """Values that differ; one a rollout for scalars, and for a field that only one of them has."""
    largest: float = 0.0
    """Greatest absolute difference of two numbers."""
    rows: tuple[int, int] = (-1, -1)
    """Rows of both caches with the greatest difference, or with the first one where there is no greatest."""
    position: int = -1
    """Response position of it; -1 where the field has none."""
    shown: tuple[str, str] = ("", "")
    """Both values there."""


@dataclass(slots=True)
class Comparison:
    """Differences over all rollouts compared so far."""

    tolerance: float = 0.0
    """Absolute difference of log-probs and rewards up to which they count as equal."""
    rollouts: int = 0
    different: int = 0
    """Rollouts that differ in any field."""
    fields: dict[str, FieldDifference] = field(default_factory=dict)
    kl_positions: int = 0
    kl_sum: float = 0.0
    kl_largest: float = 0.0
    kl_rows: tuple[int, int] = (-1, -1)
    kl_position: int = -1

    @property
    def kl_mean(self) -> float | None:
        """Nats a position, a lower bound of KL(first || second); None where nothing has top-k."""
        return self.kl_sum / self.kl_positions if self.kl_positions else None

    def add(self, rows: tuple[int, int], first: Rollout, second: Rollout) -> None:
        """Compare two rollouts with equal tokens, read with as many ranks of each."""
        before = sum(found.rollouts for found in self.fields.values())
        for name in SCALARS:
            self._scalar(name, rows, getattr(first, name), getattr(second, name))
        for name in sorted(first.extra.keys() | second.extra.keys()):
            self._scalar(name, rows, first.extra.get(name), second.extra.get(name))
        # Where prompts end at different tokens, rows of lists are not about the same tokens.
        if first.prompt_len == second.prompt_len:
            for name in (*LISTS, *TAILS, "loss_mask"):
                left, right = getattr(first, name), getattr(second, name)
                if self._both(name, rows, left, right) and left is not None and right is not None:
                    self._numbers(name, rows, left, right, exact=name == "loss_mask")
            for fields in SUPPORTS.values():
                self._support(fields, rows, first, second)
            if first.topk_ids is not None and second.topk_ids is not None:
                self._kl(rows, first, second)
        self.rollouts += 1
        self.different += sum(found.rollouts for found in self.fields.values()) > before

    def _scalar(self, name: str, rows: tuple[int, int], left: object, right: object) -> None:
        if left == right:
            return
        size = 0.0
        if isinstance(left, int | float) and isinstance(right, int | float):
            size = abs(float(left) - float(right))
            if isinstance(left, float) and size <= self.tolerance:
                return
        self._note(name, rows, 1, size, -1, (_text(left), _text(right)))

    def _both(
        self, name: str, rows: tuple[int, int], left: NDArray[Any] | None, right: NDArray[Any] | None
    ) -> bool:
        """Whether both have a field; if only one has, that is a difference."""
        if (left is None) != (right is None):
            shown = ("present", "absent") if right is None else ("absent", "present")
            self._note(name, rows, 1, 0.0, -1, shown)
        return left is not None and right is not None

    def _numbers(
        self,
        name: str,
        rows: tuple[int, int],
        left: NDArray[Any],
        right: NDArray[Any],
        *,
        exact: bool = False,
    ) -> None:
        """Arrays [R] or [R, k] of equal shape."""
        if left.shape != right.shape:
            self._note(name, rows, 1, 0.0, -1, (f"shape {list(left.shape)}", f"shape {list(right.shape)}"))
            return
        differs = left != right
        if not differs.any():
            return
        with np.errstate(invalid="ignore"):
            size = np.abs(left.astype(np.float64) - right.astype(np.float64))
        size = np.where(differs, size, 0.0)
        differs &= size > (0.0 if exact else self.tolerance)
        if not differs.any():
            return
        at = np.unravel_index(int(np.where(differs, size, -1.0).argmax()), size.shape)
        values = (_text(left[at].item()), _text(right[at].item()))
        self._note(name, rows, int(differs.sum()), float(size[at]), int(at[0]), values)

    def _support(
        self, fields: tuple[str, str, str, str | None], rows: tuple[int, int], first: Rollout, second: Rollout
    ) -> None:
        ids_name, logprob_name, _, draws_name = fields
        left, right = getattr(first, ids_name), getattr(second, ids_name)
        if not self._both(ids_name, rows, left, right):
            return
        width = max(left.shape[1], right.shape[1])
        left, right = _padded(left, width, NO_ID), _padded(right, width, NO_ID)
        differs = left != right
        if self.tolerance and differs.any():
            differs &= ~self._are_near(first, second, fields)
        if differs.any():
            at = np.unravel_index(int(differs.argmax()), differs.shape)
            shown = (_id_text(int(left[at])), _id_text(int(right[at])))
            self._note(ids_name, rows, int(differs.sum()), 0.0, int(at[0]), shown)
        # Log-probs are compared rank by rank: ids that changed places have almost the same.
        for name, filler in ((logprob_name, -np.inf), (draws_name, 0)):
            if name is None:
                continue
            values = (_padded(getattr(side, name), width, filler) for side in (first, second))
            self._numbers(name, rows, *values, exact=name == draws_name)

    def _are_near(
        self, first: Rollout, second: Rollout, fields: tuple[str, str, str, str | None]
    ) -> NDArray[np.bool_]:
        """[R, k] whether the id at a rank of the first, and that of the second, only changed places.

        Rounding makes ties, whose ids are in another order, and at the last rank another one is kept.
        """
        tops = [_Top.of(side, fields) for side in (first, second)]
        width = max(top.ids.shape[1] for top in tops)
        near = np.ones((len(tops[0].ids), width), bool)
        for ours, theirs in (tops, tops[::-1]):
            at = (ours.ids[:, :, None] == theirs.ids[:, None, :]).argmax(axis=2)
            found = np.take_along_axis(theirs.ids, at, axis=1) == ours.ids
            there = np.take_along_axis(theirs.logprob, at, axis=1)
            # What is missing there has to be no likelier than the last one kept.
            limit = np.where(found, there, theirs.logprob.min(axis=1, keepdims=True))
            with np.errstate(invalid="ignore"):
                gap = np.where(found, np.abs(ours.logprob - limit), ours.logprob - limit)
            near[:, : ours.ids.shape[1]] &= (gap <= self.tolerance) | (ours.ids == NO_ID)
        return near

    def _kl(self, rows: tuple[int, int], first: Rollout, second: Rollout) -> None:
        kl = least_kl(first, second)
        self.kl_positions += len(kl)
        self.kl_sum += float(kl.sum())
        at = int(kl.argmax())
        if kl[at] > self.kl_largest or self.kl_position < 0:
            self.kl_largest, self.kl_rows, self.kl_position = float(kl[at]), rows, at

    def _note(
        self, name: str, rows: tuple[int, int], n: int, size: float, position: int, shown: tuple[str, str]
    ) -> None:
        found = self.fields.setdefault(name, FieldDifference())
        found.rollouts += 1
        found.values += n
        if found.rows == (-1, -1) or size > found.largest:
            found.largest, found.rows, found.position = size, rows, position
            found.shown = shown


def least_kl(first: Rollout, second: Rollout) -> NDArray[np.float64]:
    """[R] nats, the least that KL(first || second) over the whole vocabulary can be, after renormalising.

    Outcomes are the ids that both have, those that only the first one has as one, and the rest as one. To the
    second outcome the second rollout gives at most its tail, and at most its last rank for each id; within
    that the share that makes the KL least is taken. Merging outcomes can only lower a KL.

    Source: log-sum inequality, Cover & Thomas, Elements of Information Theory, 2nd ed., thm 2.7.1.
    """
    left, right = _Top.of(first, SUPPORTS["topk"]), _Top.of(second, SUPPORTS["topk"])
    kl = np.empty(len(left.ids))
    step = max(1, _PAIRS_AT_ONCE // (left.ids.shape[1] * right.ids.shape[1]))
    for start in range(0, len(kl), step):
        rows = slice(start, start + step)
        kl[rows] = _rows_kl(left.rows(rows), right.rows(rows))
    return kl


@dataclass(frozen=True, slots=True)
class _Top:
    """Top-k of some positions, in float64."""

    ids: NDArray[np.uint32]
    logprob: NDArray[np.float64]
    tail: NDArray[np.float64]
    """Probability outside."""

    @classmethod
    def of(cls, rollout: Rollout, fields: tuple[str, str, str, str | None]) -> _Top:
        ids, logprob, log_tail = (getattr(rollout, name) for name in fields[:3])
        return cls(ids, logprob.astype(np.float64), np.exp(log_tail.astype(np.float64)))

    def rows(self, rows: slice) -> _Top:
        return _Top(self.ids[rows], self.logprob[rows], self.tail[rows])


def _rows_kl(left: _Top, right: _Top) -> NDArray[np.float64]:
    same = (left.ids[:, :, None] == right.ids[:, None, :]) & (left.ids[:, :, None] != NO_ID)
    is_shared = same.any(axis=2)
    p, q_all = np.exp(left.logprob), np.exp(right.logprob)
    q = np.where(is_shared, np.take_along_axis(q_all, same.argmax(axis=2), axis=1), 0.0)
    p_total, q_total = p.sum(axis=1) + left.tail, q_all.sum(axis=1) + right.tail
    p_only = np.where(is_shared, 0.0, p).sum(axis=1) / p_total
    p_rest = left.tail / p_total
    # Summed apart, since little of it is left next to 1.
    q_outside = (np.where(same.any(axis=1), 0.0, q_all).sum(axis=1) + right.tail) / q_total
    n_only = ((left.ids != NO_ID) & ~is_shared).sum(axis=1)
    last = np.where(q_all > 0, q_all, np.inf).min(axis=1)
    most = np.minimum(right.tail, n_only * last) / q_total
    q_only = np.minimum(most, q_outside * p_only / np.maximum(p_only + p_rest, _LEAST))
    parts = _term(np.where(is_shared, p, 0.0) / p_total[:, None], q / q_total[:, None]).sum(axis=1)
    kl: NDArray[np.float64] = parts + _term(p_only, q_only) + _term(p_rest, q_outside - q_only)
    return np.maximum(kl, 0.0)


def _term(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """p log(p / q). What is stored as nothing is less than float32 can hold."""
    term: NDArray[np.float64] = p * (np.log(np.maximum(p, _LEAST)) - np.log(np.maximum(q, _LEAST)))
    return term


def _padded(values: NDArray[Any], width: int, filler: float) -> NDArray[Any]:
    """[R, width] with what stands where there is nothing."""
    missing = width - values.shape[1]
    return np.pad(values, ((0, 0), (0, missing)), constant_values=filler) if missing else values


def _id_text(token_id: int) -> str:
    return "none" if token_id == NO_ID else str(token_id)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.9g}"
    return "absent" if value is None else str(value)
