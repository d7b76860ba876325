"""Which correction is used, and what it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from opd_store import InvalidArgumentError
from opd_train.corrections.ratios import MAX_LOG_RATIO

UNCAPPED = math.exp(MAX_LOG_RATIO)
"""A cap that never binds, since no weight exceeds it. Infinity would not survive JSON."""


class CorrectionKind(StrEnum):
    """How a token's loss is weighted. rho_t = pi_theta(a_t) / mu(a_t), mu the policy that sampled."""

    NONE = "none"
    """1: Lightning OPD as published (arXiv 2604.13010)."""
    TOKEN_IS = "token_is"
    """rho_t: the gradient of each state's reverse KL, states as the sampler visited them."""
    TOKEN_TIS = "token_tis"
    """min(rho_t, cap): truncated importance sampling (Ionides, J. Comput. Graph. Stat. 17(2), 2008)."""
    TOKEN_MASK = "token_mask"
    """rho_t, dropped outside [low, high]: IcePop, as in Ring-1T and slime."""
    CISPO = "cispo"
    """rho_t held within [low, high], never dropped (arXiv 2506.13585)."""
    PPO = "ppo"
    """Decoupled PPO: min(pi_prox / mu, cap) times the clipped pi_theta / pi_prox (arXiv 2110.00641)."""
    SEQUENCE_TIS = "sequence_tis"
    """min(prod rho, cap), the same for all tokens of a rollout (verl)."""
    SEQUENCE_MASK = "sequence_mask"
    """prod rho; rollouts where it lies outside [low, high] are dropped (verl)."""
    GSPO = "gspo"
    """The geometric mean of a rollout's rho, clipped as PPO does (arXiv 2507.18071)."""
    GEOMETRIC_MASK = "geometric_mask"
    """Rollouts whose geometric mean lies outside [low, high] are dropped (verl)."""
    K2_MASK = "k2_mask"
    """Rollouts whose mean of 1/2 (log rho)^2 exceeds max_drift are dropped (verl)."""
    K3_MASK = "k3_mask"
    """Rollouts whose mean of rho - 1 - log rho exceeds max_drift are dropped (verl)."""
    PREFIX_IS = "prefix_is"
    """min(rho_t * prod_{s<t} min(rho_s, step_cap), cap): per-decision weights, which also correct how often
    a state is visited. Uncapped: exactly the on-policy gradient."""


class Normalise(StrEnum):
    """By which mean over the batch the importance weights are divided, after truncation."""

    NONE = "none"
    TOKENS = "tokens"
    """The mean over kept tokens."""
    SEQUENCES = "sequences"
    """The mean over rollouts of each one's mean over its kept tokens."""


class AdvantageAnchor(StrEnum):
    """Under which policy the advantage log pi_T - log pi is taken."""

    CURRENT = "current"
    """The student being trained, at every step."""
    BEHAVIOUR = "behaviour"
    """The policy that sampled. Frozen, so only with the trust region of kind ppo."""
    REFERENCE = "reference"
    """The cached reference policy. Always refused; named so that the refusal can say why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftGate:
    """exp(-rate * |mean log rho of the block|), divided by its mean over kept tokens.

    Source: arXiv 2606.24084 for blocks, stop-gradient and normalisation; the exponential is our choice.
    """

    block: int = 64
    """Response positions per block."""
    rate: float = 1.0
    """Per nat."""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise InvalidArgumentError(f"drift_gate.block: expected at least 1, found {self.block}")
        _check("drift_gate.rate", self.rate, least=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class StalenessDecay:
    """1 up to an age of `full_until`, then exp(-rate * (age - full_until)); dropped beyond `drop_after`.

    Ages are optimizer updates between the policy that sampled a rollout and the student.
    """

    full_until: int = 0
    rate: float
    """Per update."""
    drop_after: int

    def __post_init__(self) -> None:
        _check("staleness.rate", self.rate, least=0.0)
        if not 0 <= self.full_until <= self.drop_after:
            raise InvalidArgumentError(
                f"staleness.full_until: expected 0 to drop_after ({self.drop_after}), found {self.full_until}"
            )


# What each kind reads, with its default. None: optional, the importance weight is then 1.
_PARAMETERS: dict[CorrectionKind, dict[str, float | None]] = {
    CorrectionKind.NONE: {},
    CorrectionKind.TOKEN_IS: {},
    CorrectionKind.TOKEN_TIS: {"cap": 2.0},
    CorrectionKind.TOKEN_MASK: {"low": 0.5, "high": 2.0},
    # The paper sets no lower bound; 1.28 is DAPO's upper clip.
    CorrectionKind.CISPO: {"low": 0.0, "high": 1.28},
    CorrectionKind.PPO: {"low": 0.8, "high": 1.2, "cap": 5.0},
    CorrectionKind.SEQUENCE_TIS: {"cap": 2.0},
    CorrectionKind.SEQUENCE_MASK: {"low": 0.0, "high": 10.0},
    CorrectionKind.GSPO: {"low": 1 - 3e-4, "high": 1 + 4e-4},
    CorrectionKind.GEOMETRIC_MASK: {"low": 0.999, "high": 1.001, "cap": None},
    CorrectionKind.K2_MASK: {"max_drift": 0.01, "cap": None},
    CorrectionKind.K3_MASK: {"max_drift": 0.01, "cap": None},
    CorrectionKind.PREFIX_IS: {"cap": 10.0, "step_cap": 2.0},
}
_POINTWISE = frozenset(
    {
        CorrectionKind.NONE,
        CorrectionKind.TOKEN_IS,
        CorrectionKind.TOKEN_TIS,
        CorrectionKind.TOKEN_MASK,
        CorrectionKind.CISPO,
        CorrectionKind.PPO,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionConfig:
    """Which correction, its bounds, and what else multiplies the weight.

    A bound left at None takes the kind's default; one that the kind does not read is refused. The modifiers
    below `normalise` go with every kind.
    """

    kind: CorrectionKind = CorrectionKind.NONE
    cap: float | None = None
    """Largest importance weight, at least 1; `UNCAPPED` for none. token_tis 2, sequence_tis 2, prefix_is 10,
    ppo 5 (of pi_prox / mu). For geometric_mask, k2_mask and k3_mask: kept tokens weigh min(rho_t, cap)
    instead of 1."""
    low: float | None = None
    """Lower bound of the ratio, 0 to 1. token_mask 0.5, cispo 0, ppo 0.8, sequence_mask 0, gspo 1 - 3e-4,
    geometric_mask 0.999."""
    high: float | None = None
    """Upper bound of the ratio, at least 1. token_mask 2, cispo 1.28, ppo 1.2, sequence_mask 10,
    gspo 1 + 4e-4, geometric_mask 1.001."""
    step_cap: float | None = None
    """prefix_is: largest factor that one earlier token contributes, at least 1; default 2."""
    max_drift: float | None = None
    """k2_mask, k3_mask: largest mean drift of a rollout, nats per token; default 0.01."""
    normalise: Normalise = Normalise.NONE
    drift_gate: DriftGate | None = None
    staleness: StalenessDecay | None = None
    opsm_delta: float | None = None
    """Off-policy sequence mask (DeepSeek-V3.2): tokens with a negative advantage weigh 0 in rollouts where
    the mean of -log rho exceeds this, nats. Off at None; slime uses 1e-4."""
    position_gain: float = 0.0
    """g of IW-OPD's 1 + g (1 - sum_{s<t} |A_s| / sum_s |A_s|) (arXiv 2606.22600); 0 is off."""
    reference_kl: float = 0.0
    """beta: the objective adds beta * `k3`(student, reference) to each token's loss; 0 is off."""
    anchor: AdvantageAnchor = AdvantageAnchor.CURRENT

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", CorrectionKind(self.kind))
        object.__setattr__(self, "normalise", Normalise(self.normalise))
        object.__setattr__(self, "anchor", AdvantageAnchor(self.anchor))
        reads = _PARAMETERS[self.kind]
        for name in ("cap", "low", "high", "step_cap", "max_drift"):
            if name in reads and getattr(self, name) is None:
                object.__setattr__(self, name, reads[name])
            elif name not in reads and getattr(self, name) is not None:
                raise InvalidArgumentError(
                    f"{name}: correction {self.kind.value!r} reads {', '.join(reads) or 'no bounds'}; "
                    f"found {name}={getattr(self, name)}, leave it out"
                )
        _check("cap", self.cap, least=1.0)
        # 1 lies within every bound, so that equal policies are left alone.
        _check("low", self.low, least=0.0, most=1.0)
        _check("high", self.high, least=1.0)
        _check("step_cap", self.step_cap, least=1.0)
        _check("max_drift", self.max_drift, least=0.0)
        _check("opsm_delta", self.opsm_delta, least=0.0)
        _check("position_gain", self.position_gain, least=0.0)
        _check("reference_kl", self.reference_kl, least=0.0)
        self._check_anchor()

    def _check_anchor(self) -> None:
        if self.anchor is AdvantageAnchor.REFERENCE:
            raise InvalidArgumentError(
                "anchor: an advantage frozen at the reference policy does not vanish where student and "
                "teacher agree, so training has no fixed point and diverges; use 'current'"
            )
        if self.anchor is AdvantageAnchor.BEHAVIOUR and self.kind is not CorrectionKind.PPO:
            raise InvalidArgumentError(
                f"anchor: an advantage frozen at the behaviour policy diverges without a trust region; "
                f"expected kind 'ppo', found {self.kind.value!r}; use anchor 'current' or kind 'ppo'"
            )

    @property
    def needs_behaviour(self) -> bool:
        """Whether the cache has to carry behaviour log-probs."""
        return (
            self.kind is not CorrectionKind.NONE or self.drift_gate is not None or self.opsm_delta is not None
        )

    @property
    def needs_advantage(self) -> bool:
        """Whether weights depend on the sampled tokens' advantage, and so on teacher log-probs of theirs."""
        return (
            self.kind in (CorrectionKind.PPO, CorrectionKind.GSPO)
            or self.opsm_delta is not None
            or self.position_gain > 0
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the cache has to carry reference log-probs."""
        return self.reference_kl > 0

    @property
    def needs_age(self) -> bool:
        """Whether the age of each rollout has to be known."""
        return self.staleness is not None

    @property
    def pointwise(self) -> bool:
        """Whether a token's weight depends on that token alone: any slice may then be weighted by itself."""
        return self.kind in _POINTWISE and self == without_modifiers(self)


def without_modifiers(config: CorrectionConfig) -> CorrectionConfig:
    """The same kind and bounds without what else multiplies its weights."""
    return replace(
        config,
        normalise=Normalise.NONE,
        drift_gate=None,
        staleness=None,
        opsm_delta=None,
        position_gain=0.0,
    )


def _check(name: str, value: float | None, *, least: float, most: float = math.inf) -> None:
    if value is not None and not (least <= value <= most and value < math.inf):
        wanted = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
        raise InvalidArgumentError(f"{name}: expected {wanted} and finite, found {value}")
