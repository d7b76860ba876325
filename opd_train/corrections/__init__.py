"""Corrections for the mismatch between the policy that sampled the cache and the student being trained."""

from opd_train.corrections.config import (
    UNCAPPED,
    AdvantageAnchor,
    CorrectionConfig,
    CorrectionKind,
    DriftGate,
    Normalise,
    StalenessDecay,
)
from opd_train.corrections.diagnostics import (
    MartingaleTest,
    capped_share,
    chi_square,
    dropped_share,
    effective_share,
    martingale_test,
    rollout_ratios,
    silent_share,
)
from opd_train.corrections.ratios import log_ratio
from opd_train.corrections.reference import k3
from opd_train.corrections.weights import correction_weights

__all__ = [
    "UNCAPPED",
    "AdvantageAnchor",
    "CorrectionConfig",
    "CorrectionKind",
    "DriftGate",
    "MartingaleTest",
    "Normalise",
    "StalenessDecay",
    "capped_share",
    "chi_square",
    "correction_weights",
    "dropped_share",
    "effective_share",
    "k3",
    "log_ratio",
    "martingale_test",
    "rollout_ratios",
    "silent_share",
]
