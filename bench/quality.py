"""What a stored teacher distribution lost: log-prob error and KL, in float64.

Pure functions over arrays, used by the programs of this folder.

Axes: P = positions, K = stored ranks. A teacher row is K log-probs and the log of the remaining probability,
one bucket more. Both sides are normalised over these K + 1 outcomes, so every KL here is of two true
distributions; merging outcomes into a bucket can only lower it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

SMALLEST_TAIL = float(np.finfo(np.float32).eps)
"""Floor of a rebuilt tail: float32 log-probs that sum to 1 leave a rest of this size, of either sign.

A kind choice for layouts without a tail. Their KL grows as the floor falls: with fp16 log-probs at K = 64, by
a fifth at 1e-8 and to twice at 1e-12.
"""


def max_error(teacher_PK: Floats, decoded_PK: Floats) -> float:
    """Largest absolute log-prob error, nats."""
    return float(np.abs(teacher_PK.astype(np.float64) - decoded_PK).max())


def rebuilt_log_tail(decoded_PK: Floats) -> NDArray[np.float64]:
    """[P] the tail of a reader who has none: log of 1 - the sum of decoded probabilities, floored."""
    rest = 1.0 - np.exp(decoded_PK.astype(np.float64)).sum(axis=1)
    return np.log(np.maximum(rest, SMALLEST_TAIL))


def kl(
    teacher_PK: Floats, teacher_tail_P: Floats, decoded_PK: Floats, decoded_tail_P: Floats | None = None
) -> NDArray[np.float64]:
    """[P] nats, KL(teacher || decoded) on K entries and the tail bucket.

    Args:
        teacher_PK, teacher_tail_P: natural logs.
        decoded_PK: the stored log-probs of the same ids, in the same order.
        decoded_tail_P: the stored tail. None: rebuilt from the decoded values.
    """
    if decoded_tail_P is None:
        decoded_tail_P = rebuilt_log_tail(decoded_PK)
    teacher = _normalised(teacher_PK, teacher_tail_P)
    decoded = _normalised(decoded_PK, decoded_tail_P)
    probability = np.exp(teacher)
    # 0 log 0 = 0: an empty teacher tail costs nothing, even against a decoded tail of -inf.
    gap = np.where(probability > 0, teacher - np.where(probability > 0, decoded, 0.0), 0.0)
    return np.einsum("pk,pk->p", probability, gap)


def _normalised(logprob_PK: Floats, log_tail_P: Floats) -> NDArray[np.float64]:
    """[P, K + 1] log-probs whose exp sums to 1, the tail last."""
    joined = np.concatenate([logprob_PK.astype(np.float64), log_tail_P.astype(np.float64)[:, None]], axis=1)
    top = joined.max(axis=1, keepdims=True)
    return joined - (top + np.log(np.exp(joined - top).sum(axis=1, keepdims=True)))
