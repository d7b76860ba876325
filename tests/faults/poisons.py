"""Values that no teacher can have produced, put into rollouts that are otherwise fine."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from faults import corpus

from opd_store import Rollout
from opd_store.layout import NO_ID
from opd_store.rollout import SUPPORTS

EXACT = ("plain", "f32")
"""Encodings that can hold any float32; sums of steps cannot even say NaN, or a log-prob above zero."""
BAD_FLOATS = {
    "NaN": np.nan,
    "inf": np.inf,
    "above zero": 0.5,
    "just above zero": np.nextafter(np.float32(0), np.float32(1)),
}


class DoesNotApply(Exception):
    """This rollout has no place for this poison."""


@dataclass(frozen=True)
class Poisoned:
    """A rollout with one impossible value, and what has to be said about it."""

    rollout: Rollout
    columns: tuple[str, ...]
    position: int
    """-1 where the value belongs to no position."""
    always_refused: bool = False
    """Also without the check of values, since the row does not make sense."""


@dataclass
class Place:
    """Where to put it: arrays are copies, to be changed in place."""

    fields: dict[str, Any]
    kind: str
    encoding: str
    position: int
    rank: int

    def __post_init__(self) -> None:
        names = SUPPORTS[self.kind]
        self.ids, self.logprob, self.tail = (self.fields[name] for name in names[:3])
        self.draws = self.fields[names[3]] if names[3] else None
        self.present = int((self.ids[self.position] != NO_ID).sum())

    def need(self, *conditions: bool) -> None:
        if not all(conditions):
            raise DoesNotApply

    def inside(self, room: int = 1) -> int:
        """A rank with `room - 1` more present ones after it, the wanted one if possible."""
        self.need(self.present >= room)
        return min(self.rank, self.present - room)


def _float(value: float) -> Callable[[Place], str]:
    def put(place: Place) -> str:
        place.need(place.encoding in EXACT)
        place.logprob[place.position, place.inside()] = value
        return "logprob"

    return put


def _tail(value: float) -> Callable[[Place], str]:
    def put(place: Place) -> str:
        place.need(place.encoding in EXACT)
        place.tail[place.position] = value
        return "log_tail"

    return put


def _id(value: int) -> Callable[[Place], str]:
    def put(place: Place) -> str:
        place.ids[place.position, place.inside()] = value
        return "ids"

    return put


def _unsorted(place: Place) -> str:
    place.need(place.encoding in EXACT)
    at = place.inside(2)
    row = place.logprob[place.position]
    place.need(row[at] != row[at + 1])
    row[[at, at + 1]] = row[[at + 1, at]]
    return "logprob"


def _tie_with_falling_id(place: Place) -> str:
    at = place.inside(2)
    place.logprob[place.position, at] = place.logprob[place.position, at + 1]
    row = place.ids[place.position]
    row[[at, at + 1]] = max(row[at : at + 2]), min(row[at : at + 2])
    return "logprob"


def _duplicate(place: Place) -> str:
    at = place.inside(2)
    other = place.present - 1 if at == 0 else 0
    place.ids[place.position, at] = place.ids[place.position, other]
    return "ids or logprob"


def _too_probable(place: Place) -> str:
    place.inside()
    row = place.logprob[place.position]
    row[0] = max(row[0], np.float32(np.log(0.5)))
    place.tail[place.position] = np.log(0.7)
    return "logprob"


def _slightly_too_probable(place: Place) -> str:
    place.need(place.encoding in EXACT)
    place.inside()
    row = place.logprob[place.position, : place.present]
    row[:] = np.log(1.002 / place.present) if place.present > 1 else 0.0
    place.ids[place.position, : place.present].sort()
    place.tail[place.position] = -np.inf if place.present > 1 else np.log(0.002)
    return "logprob"


def _padding_without_cut(place: Place) -> str:
    place.need(place.kind == "topk", place.present == corpus.TOPK, not place.fields["ragged"])
    # Packed pages count the ids of a row, so only the last of them can be missing.
    at = place.rank if place.encoding == "plain" else corpus.TOPK - 1
    place.ids[place.position, at] = NO_ID
    place.logprob[place.position, at] = -np.inf
    return "ids"


def _padding_in_the_middle(place: Place) -> str:
    place.need(place.encoding == "plain", place.kind != "topk" or place.fields["ragged"])
    at = place.inside(2)
    place.ids[place.position, at] = NO_ID
    place.logprob[place.position, at] = -np.inf
    if place.draws is not None:
        place.draws[place.position, at] = 0
    return "ids"


def _padding_with_logprob(place: Place) -> str:
    place.need(place.encoding == "plain", place.present < place.ids.shape[1])
    place.logprob[place.position, place.present] = -1.0
    return "logprob"


def _nothing_at_all(place: Place) -> str:
    place.need(place.kind == "topk", place.fields["ragged"])
    place.ids[place.position] = NO_ID
    place.logprob[place.position] = -np.inf
    return "ids"


def _no_draws(place: Place) -> str:
    place.need(place.draws is not None)
    place.draws[place.position, place.inside()] = 0
    return "draws"


def _draws_of_padding(place: Place) -> str:
    place.need(place.draws is not None, place.encoding == "plain", place.present < place.ids.shape[1])
    place.draws[place.position, place.present] = 1
    return "draws"


IN_SUPPORT: dict[str, Callable[[Place], str]] = {
    **{f"log-prob {name}": _float(value) for name, value in BAD_FLOATS.items()},
    "log-prob -inf": _float(-np.inf),
    **{f"tail {name}": _tail(value) for name, value in BAD_FLOATS.items()},
    "id = vocab": _id(corpus.VOCAB),
    "id = 2**16 + vocab": _id((1 << 16) + corpus.VOCAB),
    "id = 2**31": _id(1 << 31),
    "id = 2**32 - 2": _id(NO_ID - 1),
    "unsorted": _unsorted,
    "tie with falling id": _tie_with_falling_id,
    "duplicate id": _duplicate,
    "sum of 1.2": _too_probable,
    "sum of 1.002": _slightly_too_probable,
    "padding without cut": _padding_without_cut,
    "padding in the middle": _padding_in_the_middle,
    "padding with a log-prob": _padding_with_logprob,
    "no id at all": _nothing_at_all,
    "no draws": _no_draws,
    "draws of padding": _draws_of_padding,
}
OUTSIDE_VOCAB = {name for name in IN_SUPPORT if name.startswith("id = ")}
IN_LISTS = {
    f"{field} {name}": (field, value)
    for field in ("teacher_logprob", "behaviour_logprob", "reference_logprob")
    for name, value in (BAD_FLOATS | {"-inf": -np.inf}).items()
}
TOKENS = {"token = vocab": corpus.VOCAB, "token = 2**31": 1 << 31, "token = 2**32 - 1": NO_ID}
FINISH_REASONS = {
    "finish_reason other": "eos",
    "finish_reason empty": "",
    "finish_reason in capitals": "STOP",
}
NATIVE = [*IN_LISTS, *TOKENS, *FINISH_REASONS, "loss_mask 2"]


def applicable(variant: str) -> list[tuple[str, str]]:
    """(poison, kind of support) of which rollouts of a variant can have some."""
    found = []
    for name, kind in itertools.product(IN_SUPPORT, SUPPORTS):
        for seed in range(20):
            with contextlib.suppress(DoesNotApply):
                poison(
                    corpus.rollout(variant, seed=seed), name, variant=variant, kind=kind, position=1, rank=0
                )
                found.append((name, kind))
                break
    return found


def poison(rollout: Rollout, name: str, *, variant: str, kind: str, position: int, rank: int) -> Poisoned:
    """Put one poison into a copy of a rollout. Raises DoesNotApply where it has none of that kind."""
    fields = {
        field.name: (value.copy() if isinstance(value, np.ndarray) else value)
        for field in dataclasses.fields(rollout)
        for value in [getattr(rollout, field.name)]
    }
    if name in IN_SUPPORT:
        if fields[SUPPORTS[kind][0]] is None:
            raise DoesNotApply
        chosen = corpus.VARIANTS[variant]
        place = Place(
            fields | {"ragged": chosen.get("ragged", False)}, kind, chosen["encoding"], position, rank
        )
        part = IN_SUPPORT[name](place)
        tail = "log_tail" if kind == "topk" else f"{kind}_log_tail"
        columns = tuple(tail if p == "log_tail" else f"{kind}_{p}" for p in part.split(" or "))
        return Poisoned(Rollout(**fields), columns, position)
    if name in IN_LISTS:
        field, value = IN_LISTS[name]
        fields[field][position] = value
        return Poisoned(Rollout(**fields), (field,), position)
    if name in TOKENS:
        # Of the prompt, of the response, or the last.
        at = min(rank, 1) * rollout.prompt_len + position
        fields["token_ids"][at] = TOKENS[name]
        return Poisoned(Rollout(**fields), ("token_ids",), at)
    if name == "loss_mask 2":
        fields["loss_mask"] = fields["loss_mask"].astype(np.uint8)
        fields["loss_mask"][position] = 2
        return Poisoned(Rollout(**fields), ("loss_mask",), -1, always_refused=True)
    fields["finish_reason"] = FINISH_REASONS[name]
    return Poisoned(Rollout(**fields), ("finish_reason",), -1)
