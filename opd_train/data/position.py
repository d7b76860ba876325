"""Where a stream stands, as JSON, and how the positions of all ranks become those of another world size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from opd_store import MismatchError
from opd_train.data.plan import EpochPlan, Planner, Stage

STATE_VERSION = 2
State = Mapping[str, Any]
_OF_WORKER = "it is of a DataLoader's worker; load it through that DataLoader"


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """What a rank has been given."""

    epoch: int = 0
    batches: int = 0
    """Batches of this epoch, or of its part since the world size last changed."""
    stages: tuple[Stage, ...] = ()
    """Earlier parts of this epoch and of later ones, at other world sizes, oldest first."""
    worker: tuple[int, int] | None = None
    """Which worker of how many of a `DataLoader` this is, once it has built a batch."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        stages = [[epoch, size, list(counts)] for epoch, size, counts in self.stages if epoch >= self.epoch]
        worker = None if self.worker is None else list(self.worker)
        return {"epoch": self.epoch, "batches": self.batches, "stages": stages, "worker": worker}


def resume(
    states: State | Sequence[State],
    *,
    identity: State,
    rank: int,
    world_size: int,
    planner: Planner,
    worker: tuple[int, int] | None,
) -> Position:
    """The position of a rank from its own state, or from those of all ranks of any world size.

    Args:
        identity: what has to be equal in all states; without rank and world size.
        worker: the worker that runs this, if any.

    Raises:
        MismatchError: another run, ranks that are missing or come twice, or states that are not of one
        moment, with both values.
    """
    found = [states] if isinstance(states, Mapping) else list(states)
    if not found:
        _mismatch("world_size", world_size, 0, "an empty list of states")
    for state in found:
        for name, value in {"version": STATE_VERSION, **identity}.items():
            if state.get(name) != value:
                _mismatch(name, value, state.get(name))
    positions = [_parse(state) for state in found]
    sizes = [_count(state, "world_size", 1) for state in found]
    ranks = [_count(state, "rank", 0) for state in found]
    if len(set(sizes)) > 1:
        other = next(size for size in sizes if size != sizes[0])
        _mismatch("world_size", sizes[0], other, "the states are of different world sizes")
    if isinstance(states, Mapping) and sizes[0] == world_size:
        if ranks[0] != rank:
            _mismatch("rank", rank, ranks[0])
        position = positions[0]
        if position.worker not in (None, worker):
            _mismatch("worker", worker, position.worker, _OF_WORKER)
    else:
        if sorted(ranks) != list(range(sizes[0])):
            if isinstance(states, Mapping):
                _mismatch(
                    "world_size", world_size, sizes[0], f"pass the list of all {sizes[0]} ranks' states"
                )
            _mismatch("rank", list(range(sizes[0])), sorted(ranks), "every rank has to come once")
        if (of_worker := next((p.worker for p in positions if p.worker is not None), None)) is not None:
            _mismatch("worker", None, of_worker, _OF_WORKER)
        positions = [
            position for _, position in sorted(zip(ranks, positions, strict=True), key=lambda x: x[0])
        ]
        position = positions[rank] if sizes[0] == world_size else _merged(positions, planner)
    _check_plan(position, planner, rank, world_size)
    return position


def _merged(positions: Sequence[Position], planner: Planner) -> Position:
    """One more stage: what ranks 0, 1, ... consumed. A rank may be in a later epoch than another."""
    slowest = min(positions, key=lambda position: position.epoch)
    for position in positions:
        expected = tuple(stage for stage in slowest.stages if stage[0] >= position.epoch)
        if position.stages != expected:
            _mismatch("stages", expected, position.stages, "the states are not of one moment")
    size = len(positions)
    stages = list(slowest.stages)
    for epoch in range(slowest.epoch, max(position.epoch for position in positions) + 1):
        plan = _plan(planner, epoch, size, slowest.stages)
        counts = [
            plan.n_batches(rank) if p.epoch > epoch else p.batches if p.epoch == epoch else 0
            for rank, p in enumerate(positions)
        ]
        stages.append((epoch, size, tuple(counts)))
    return Position(epoch=slowest.epoch, stages=tuple(stages))


def _check_plan(position: Position, planner: Planner, rank: int, world_size: int) -> None:
    for epoch in {position.epoch, *(stage[0] for stage in position.stages)}:
        available = _plan(planner, epoch, world_size, position.stages).n_batches(rank)
        if epoch == position.epoch and position.batches > available:
            _mismatch("batches", available, position.batches, "there are not so many")


def _plan(planner: Planner, epoch: int, world_size: int, stages: Sequence[Stage]) -> EpochPlan:
    try:
        return planner.plan(epoch, world_size, stages)
    except ValueError as error:
        _mismatch("stages", "batches that exist", stages, str(error))


def _parse(state: State) -> Position:
    worker = state.get("worker")
    if worker is not None and not (_counts(worker) and len(worker) == 2 and worker[0] < worker[1]):
        _mismatch("worker", "its number and how many there are", worker)
    stages = state.get("stages")
    if not isinstance(stages, list | tuple) or not all(
        isinstance(stage, list | tuple)
        and len(stage) == 3
        and _counts(stage[:2])
        and _counts(stage[2])
        and 0 < stage[1] == len(stage[2])
        for stage in stages
    ):
        _mismatch("stages", "triples of epoch, world size and batches consumed", stages)
    return Position(
        epoch=_count(state, "epoch", 0),
        batches=_count(state, "batches", 0),
        stages=tuple((epoch, size, tuple(counts)) for epoch, size, counts in stages),
        worker=None if worker is None else (worker[0], worker[1]),
    )


def _counts(values: object) -> bool:
    return isinstance(values, list | tuple) and all(type(value) is int and value >= 0 for value in values)


def _count(state: State, name: str, least: int) -> int:
    value = state.get(name)
    if type(value) is not int or value < least:
        _mismatch(name, f"an integer of {least} or more", value)
    return value


def _mismatch(name: str, expected: object, found: object, why: str = "") -> NoReturn:
    raise MismatchError(
        f"stream state: {name} is {found!r:.300}, this stream has {expected!r:.300}{why and '; '}{why}",
        field=name,
        expected=str(expected),
        found=str(found),
    )
