"""What the student minimises, and the numbers that belong to it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from opd_store import InvalidArgumentError
from opd_train.corrections import CorrectionConfig, CorrectionKind, DriftGate, StalenessDecay


class Objective(StrEnum):
    """What the student minimises."""

    LIGHTNING = "lightning"
    """Clipped log-prob regression on the sampled token (arXiv 2604.13010)."""
    FORWARD_KL = "forward_kl"
    """KL(teacher || student) on the cached top-k, the tail as one bucket."""
    REVERSE_KL = "reverse_kl"
    """KL(student || teacher) on the same support."""
    JSD = "jsd"
    """Generalised Jensen-Shannon divergence on the same support; `beta` leads from the forward to the reverse
    KL."""
    TRUNCATED_FORWARD_KL = "truncated_forward_kl"
    """The top-k terms of the forward KL without a tail, as some trainers have it: no divergence."""
    RENORMALISED_FORWARD_KL = "renormalised_forward_kl"
    """Forward KL of both sides renormalised over the top-k: blind to the mass outside."""
    RENORMALISED_REVERSE_KL = "renormalised_reverse_kl"
    """Reverse KL of the same."""
    RANDOM_SAMPLING_KD = "random_sampling_kd"
    """Forward KL estimated from ids drawn from the teacher (arXiv 2503.16870)."""
    CROSS_ENTROPY = "cross_entropy"
    """-log pi_theta of the sampled token: supervised fine-tuning, no teacher log-probs needed."""

    @property
    def needs_topk(self) -> bool:
        """Whether the cache has to carry top-k."""
        return self in _TOPK

    @property
    def needs_draws(self) -> bool:
        """Whether the cache has to carry drawn ids."""
        return self is Objective.RANDOM_SAMPLING_KD

    @property
    def renormalised(self) -> bool:
        """Whether both sides are renormalised over the top-k, so that the mass outside is not read."""
        return self in _RENORMALISED

    @property
    def dense(self) -> bool:
        """Whether a position's loss is one of distributions, whichever token was drawn there."""
        return self.needs_topk or self.needs_draws


_TOPK = frozenset(
    {
        Objective.FORWARD_KL,
        Objective.REVERSE_KL,
        Objective.JSD,
        Objective.TRUNCATED_FORWARD_KL,
        Objective.RENORMALISED_FORWARD_KL,
        Objective.RENORMALISED_REVERSE_KL,
    }
)
_RENORMALISED = frozenset({Objective.RENORMALISED_FORWARD_KL, Objective.RENORMALISED_REVERSE_KL})


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What one token contributes to the loss."""

    objective: Objective
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    clip: float = 10.0
    """Largest advantage in nats, for objective "lightning" (arXiv 2604.13010, table 6)."""
    beta: float = 0.5
    """Of objective "jsd", between 0 and 1."""
    temperature: float = 1.0
    """Of both sides, for the renormalised objectives; the others know the distributions at 1 only."""
    chosen_ids: bool = False
    """Compare on the cache's chosen ids, such as the student's likeliest, instead of the teacher's top-k."""
    cross_entropy: float = 0.0
    """Share of -log pi_theta(sampled token) mixed in, 0 to 1."""
    teacher_weights: tuple[float, ...] = ()
    """Weight of the cache's own teacher and of each joined one, any scale; () is the own teacher alone."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", Objective(self.objective))
        object.__setattr__(self, "teacher_weights", tuple(self.teacher_weights))
        for name, value, most in (("clip", self.clip, math.inf), ("temperature", self.temperature, math.inf)):
            if not 0 < value < most:
                raise InvalidArgumentError(f"{name}: expected more than 0, found {value}")
        if not 0 < self.beta < 1:
            raise InvalidArgumentError(f"beta: expected between 0 and 1, found {self.beta}")
        if not 0 <= self.cross_entropy <= 1:
            raise InvalidArgumentError(f"cross_entropy: expected 0 to 1, found {self.cross_entropy}")
        if any(not 0 <= weight < math.inf for weight in self.teacher_weights):
            raise InvalidArgumentError(
                f"teacher_weights: expected 0 or more each, found {self.teacher_weights}"
            )
        if self.teacher_weights and not sum(self.teacher_weights):
            raise InvalidArgumentError("teacher_weights: expected one above 0")
        if self.temperature != 1 and not self.objective.renormalised:
            raise InvalidArgumentError(
                f"temperature: {self.temperature} with objective {self.objective.value!r}, which knows the "
                "teacher at temperature 1 only (a tail cannot be taken to another); use 1, or a renormalised "
                "objective"
            )
        if self.chosen_ids and not self.objective.needs_topk:
            raise InvalidArgumentError(
                f"chosen_ids: objective {self.objective.value!r} compares on no ids; leave it out"
            )
        if self.teacher_weights and (self.chosen_ids or self.objective.needs_draws):
            raise InvalidArgumentError(
                "teacher_weights: of joined teachers only sampled-token log-probs and top-k are read; "
                "use another objective, or one teacher"
            )
        if self.objective is not Objective.LIGHTNING and self.correction.kind in ("ppo", "gspo"):
            raise InvalidArgumentError(
                f"correction {self.correction.kind.value!r} clips by the sampled token's advantage, which "
                f"objective {self.objective.value!r} does not have; use prefix_is, a sequence kind or none"
            )

    @classmethod
    def from_json(cls, value: object, *, where: str) -> LossConfig:
        """From the fields as JSON values, those of the correction in an object of their own.

        Args:
            where: the file, for errors.

        Raises:
            InvalidArgumentError: an unknown or missing field, or a value out of range; names the field.
        """
        fields = _fields(cls, value, where)
        if "correction" in fields:
            correction = _fields(CorrectionConfig, fields["correction"], f"{where}: correction")
            for name, modifier in (("drift_gate", DriftGate), ("staleness", StalenessDecay)):
                if correction.get(name) is not None:
                    place = f"{where}: correction.{name}"
                    correction[name] = _made(modifier, _fields(modifier, correction[name], place), place)
            fields["correction"] = _made(CorrectionConfig, correction, f"{where}: correction")
        return _made(cls, fields, where)


def default_loss(*, topk: int) -> LossConfig:
    """What did best in `docs/results.md` with what a cache has.

    With a top-k the JSD on it, half way between the two KLs: level with a live teacher, and less harmed than
    the forward KL where the teacher is not the student's own. Without one the sampled token under truncated
    weights and a clip of 1 nat: level with a live teacher that is asked about that token.

    Args:
        topk: ranks there are; 0 for none.
    """
    if topk:
        return LossConfig(objective=Objective.JSD)
    correction = CorrectionConfig(kind=CorrectionKind.TOKEN_TIS)
    return LossConfig(objective=Objective.LIGHTNING, correction=correction, clip=1.0)


def require_topk(objective: Objective, *, topk: int) -> None:
    """Raise InvalidArgumentError for an objective that needs ranks where there are none."""
    if objective.needs_topk and not topk:
        raise InvalidArgumentError(
            f"objective {objective.value!r} needs top-k, but this cache stores none; score it with "
            "--topk, or use 'lightning'"
        )


_Config = TypeVar("_Config")


def _fields(config: type[Any], value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{where}: expected an object, found {value!r:.100}")
    known = {field.name for field in dataclasses.fields(config)}
    for name in value:
        if name not in known:
            raise InvalidArgumentError(f"{where}: {name!r:.100} is not one of {', '.join(sorted(known))}")
    return dict(value)


def _made(config: type[_Config], fields: dict[str, Any], where: str) -> _Config:
    try:
        return config(**fields)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{where}: {error!s:.200}") from error
