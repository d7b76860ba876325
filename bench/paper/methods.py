"""The compared ways to distil, and along which axes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from opd_train import CorrectionConfig, LossConfig, Objective
from opd_train.corrections import UNCAPPED, CorrectionKind, DriftGate

LR = 2e-4
STEPS, BATCH = 150, 128
RATES = (2e-5, LR, 1e-3)
LIVE = "live OPD, sampled token"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One training; seeds are counted apart."""

    name: str
    loss: LossConfig
    ranks: int = 0
    live: bool = False
    student: str = "near-of-teacher"
    teacher: str = "teacher"
    sampler: str = "full"
    lr: float = LR
    pair: int | None = None
    """Teacher and student are those of this seed, for all seeds; None gives each seed its own."""

    @property
    def key(self) -> str:
        """Names its results: equal for equal trainings, whatever they are called."""
        fields = asdict(self)
        del fields["name"]
        text = json.dumps([fields, STEPS, BATCH], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def weighted(kind: str, **bounds: float) -> LossConfig:
    """The sampled token under a correction."""
    return LossConfig(
        objective=Objective.LIGHTNING,
        correction=CorrectionConfig(kind=CorrectionKind(kind), **bounds),  # type: ignore[arg-type]
    )


def dense(objective: str, correction: CorrectionConfig | None = None) -> LossConfig:
    """A divergence on the top-k."""
    return LossConfig(objective=Objective(objective), correction=correction or CorrectionConfig())


SAMPLED = weighted("none")
PREFIX = CorrectionConfig(kind=CorrectionKind.PREFIX_IS)
LIVE_METHODS = (
    Method(name=LIVE, loss=SAMPLED, live=True),
    Method(name="live OPD, top-64 forward KL", loss=dense("forward_kl"), ranks=64, live=True),
    Method(name="live OPD, top-64 reverse KL", loss=dense("reverse_kl"), ranks=64, live=True),
)
CORRECTIONS = (
    Method(name="w = 1 (Lightning)", loss=SAMPLED),
    Method(name="w = 1, clip 1", loss=LossConfig(objective=Objective.LIGHTNING, clip=1.0)),
    Method(name="token IS", loss=weighted("token_is")),
    Method(name="token TIS, cap 2", loss=weighted("token_tis")),
    Method(
        name="token TIS, cap 2, clip 1",
        loss=LossConfig(
            objective=Objective.LIGHTNING,
            clip=1.0,
            correction=CorrectionConfig(kind=CorrectionKind.TOKEN_TIS),
        ),
    ),
    Method(
        name="token TIS, self-normalised",
        loss=LossConfig(
            objective=Objective.LIGHTNING,
            correction=CorrectionConfig(kind="token_tis", normalise="tokens"),  # type: ignore[arg-type]
        ),
    ),
    Method(name="token mask 0.5-2 (IcePop)", loss=weighted("token_mask")),
    Method(name="CISPO", loss=weighted("cispo")),
    Method(name="sequence TIS, cap 2", loss=weighted("sequence_tis")),
    Method(name="sequence mask", loss=weighted("sequence_mask")),
    Method(name="GSPO", loss=weighted("gspo", low=0.8, high=1.2)),
    Method(name="geometric mask 0.9-1.1", loss=weighted("geometric_mask", low=0.9, high=1.1)),
    Method(name="K3 mask 0.01", loss=weighted("k3_mask")),
    Method(name="prefix IS", loss=weighted("prefix_is")),
    Method(name="prefix IS, uncapped", loss=weighted("prefix_is", cap=UNCAPPED, step_cap=UNCAPPED)),
    Method(
        name="drift gate, rate 10",
        loss=LossConfig(
            objective=Objective.LIGHTNING,
            correction=CorrectionConfig(drift_gate=DriftGate(block=8, rate=10.0)),
        ),
    ),
    Method(
        name="off-policy sequence mask",
        loss=LossConfig(objective=Objective.LIGHTNING, correction=CorrectionConfig(opsm_delta=1e-4)),
    ),
    Method(
        name="IW-OPD position weights",
        loss=LossConfig(objective=Objective.LIGHTNING, correction=CorrectionConfig(position_gain=0.5)),
    ),
    Method(
        name="w = 1 + KL to reference, 0.1",
        loss=LossConfig(objective=Objective.LIGHTNING, correction=CorrectionConfig(reference_kl=0.1)),
    ),
)
TOPK_METHODS = (
    *(Method(name=f"top-{k} forward KL", loss=dense("forward_kl"), ranks=k) for k in (1, 8, 64)),
    *(Method(name=f"top-{k} reverse KL", loss=dense("reverse_kl"), ranks=k) for k in (1, 8, 64)),
    Method(name="top-64 JSD, 0.5", loss=dense("jsd"), ranks=64),
    Method(name="top-8 forward KL, no tail (truncated)", loss=dense("truncated_forward_kl"), ranks=8),
    Method(name="top-8 forward KL, renormalised", loss=dense("renormalised_forward_kl"), ranks=8),
    Method(name="top-64 forward KL, prefix IS", loss=dense("forward_kl", PREFIX), ranks=64),
    Method(name="top-64 reverse KL, prefix IS", loss=dense("reverse_kl", PREFIX), ranks=64),
)
_TIS, _TIGHT, _PREFIX_IS = CORRECTIONS[3], CORRECTIONS[4], CORRECTIONS[13]
_FORWARD, _REVERSE, _JSD = TOPK_METHODS[2], TOPK_METHODS[5], TOPK_METHODS[6]
DEFAULT = _JSD
"""What `opd train` does with a cache that has a top-k."""
CORE = (LIVE_METHODS[0], CORRECTIONS[0], _TIS, _TIGHT, _FORWARD, _REVERSE, _JSD)
"""What the axes are shown for."""
TRUNCATED = tuple(
    replace(method, sampler="truncated") for method in (CORRECTIONS[0], _TIS, _PREFIX_IS, _FORWARD, _REVERSE)
)
BY_RATE = tuple(replace(method, lr=lr) for lr in RATES if lr != LR for method in CORE)
BY_DISTANCE = tuple(
    replace(method, student=f"{distance}-of-teacher") for distance in ("weak", "strong") for method in CORE
)
CONSISTENCY = tuple(
    replace(method, student=f"near-of-{sft_teacher}", teacher=teacher)
    for sft_teacher in ("teacher", "other-teacher")
    for teacher in ("teacher", "other-teacher")
    for method in (LIVE_METHODS[0], CORRECTIONS[0], _TIS, _TIGHT, _PREFIX_IS, _FORWARD, _REVERSE, _JSD)
)
ONE_PAIR = tuple(
    replace(method, pair=0) for method in (*LIVE_METHODS[:2], CORRECTIONS[0], _TIS, _TIGHT, _FORWARD, _JSD)
)
GROUPS = {
    "main": (*LIVE_METHODS, *CORRECTIONS, *TOPK_METHODS),
    "truncated": TRUNCATED,
    "rate": BY_RATE,
    "distance": BY_DISTANCE,
    "consistency": CONSISTENCY,
    "one-pair": ONE_PAIR,
}
