"""Distillation losses: pure functions of log-probs.

Axes: N = response tokens, K = stored top-k, M = distinct drawn ids. All log-probs are natural logs at
temperature 1, normalised over the whole vocabulary. Each function returns per-token values; the caller masks,
weights, sums and owns the denominator. `docs/losses.md` compares them.
"""

from opd_train.losses.divergences import (
    log_tail_of,
    topk_forward_kl,
    topk_jsd,
    topk_reverse_kl,
    truncated_forward_kl,
)
from opd_train.losses.draws import draw_weights, drawn_reverse_kl, random_sampling_kd
from opd_train.losses.mixing import mix_cross_entropy, mix_teachers
from opd_train.losses.renormalised import at_temperature, renormalised_forward_kl, renormalised_reverse_kl
from opd_train.losses.sampled import advantage, huber_logprob_loss, sampled_token_loss

__all__ = [
    "advantage",
    "at_temperature",
    "draw_weights",
    "drawn_reverse_kl",
    "huber_logprob_loss",
    "log_tail_of",
    "mix_cross_entropy",
    "mix_teachers",
    "random_sampling_kd",
    "renormalised_forward_kl",
    "renormalised_reverse_kl",
    "sampled_token_loss",
    "topk_forward_kl",
    "topk_jsd",
    "topk_reverse_kl",
    "truncated_forward_kl",
]
