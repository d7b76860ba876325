"""Weights of sampled tokens, and which of them count.

Axes: N = response tokens end to end, S = rollouts. rho_t = pi_theta(a_t) / mu(a_t), mu the policy that
sampled, as it really drew (processed log-probs). Pure functions; no logging, no collectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_store import InvalidArgumentError
from opd_train.corrections import gates
from opd_train.corrections.config import UNCAPPED, AdvantageAnchor, CorrectionConfig, CorrectionKind
from opd_train.corrections.ratios import (
    Groups,
    bounded_exp,
    counted_log_ratio,
    prefix_sum,
    rollouts_of,
)


def correction_weights(
    config: CorrectionConfig,
    student_logprob: Tensor,
    behaviour_logprob: Tensor | None,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    advantage: Tensor | None = None,
    proximal_logprob: Tensor | None = None,
    age: Tensor | None = None,
    dense: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights of the sampled tokens, and which of them count.

    Tokens that are masked, or have a needed value that is not finite, are not kept; their log-ratio counts as
    0 in products over their rollout, and they are left out of means. Log-ratios are held to +-20 per token,
    and their sums again before exp().

    Normalisation, drift gate and sequence means look at this batch alone, not at others of the same step.

    Args:
        student_logprob: [N], nats, of the sampled token under the current student.
        behaviour_logprob: [N], nats, as processed by the sampler; None where the cache has none.
        loss_mask: [N] bool.
        cu_seqlens: [S + 1] integers, where each rollout's tokens start; first 0, last N.
        advantage: [N], nats, of the sampled token. Needed if `config.needs_advantage`.
        proximal_logprob: [N], nats, under the policy that kind ppo clips around. None: the current student,
            so that nothing is clipped; with the anchor "behaviour" the policy that sampled, plain PPO.
        age: [S] optimizer updates since each rollout's policy. Needed if `config.needs_age`.
        dense: the loss at a position does not depend on the token drawn there (a KL over the distribution):
            prefix weights then leave out the position's own ratio.

    Returns:
        weights: [N] detached, 0 where not kept; float64 for float64 log-probs, else float32.
        kept: [N] bool. The others leave the denominator too.

    Raises:
        InvalidArgumentError: something the config needs is missing, or lengths differ.
    """
    tokens = _gather(
        config, student_logprob, behaviour_logprob, loss_mask, cu_seqlens, advantage, proximal_logprob
    )
    rollouts, log_rho = tokens.rollouts, tokens.log_rho
    weight, kept = _importance(config, tokens, dense=dense)
    weight = gates.normalised(weight, kept, rollouts, config.normalise)
    if config.opsm_delta is not None:
        weight = weight * gates.opsm(log_rho, tokens.counted, tokens.advantage, rollouts, config.opsm_delta)
    if config.position_gain > 0:
        weight = weight * gates.position_weight(
            tokens.advantage, tokens.usable, cu_seqlens, rollouts, config.position_gain
        )
    if config.staleness is not None:
        factor, young = gates.staleness(_needed(age, "age", config, len(cu_seqlens) - 1), config.staleness)
        weight, kept = weight * rollouts.spread(factor), kept & rollouts.spread(young)
    if config.drift_gate is not None:
        weight = weight * gates.drift_gate(
            log_rho, tokens.counted, kept, cu_seqlens, rollouts, config.drift_gate
        )
    dtype = torch.promote_types(student_logprob.dtype, torch.float32)
    return torch.where(kept, weight, 0.0).to(dtype), kept


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What the kinds read, in float64; values a config does not need are zeros."""

    rollouts: Groups
    cu_seqlens: Tensor
    counted: Tensor
    """[N] bool: has a log-ratio."""
    usable: Tensor
    """[N] bool: has everything the config needs."""
    log_rho: Tensor
    """[N] log pi_theta / mu."""
    log_proximal: Tensor
    """[N] log pi_prox / mu."""
    log_step: Tensor
    """[N] log pi_theta / pi_prox."""
    advantage: Tensor


def _gather(
    config: CorrectionConfig,
    student_logprob: Tensor,
    behaviour_logprob: Tensor | None,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    advantage: Tensor | None,
    proximal_logprob: Tensor | None,
) -> _Tokens:
    student = student_logprob.detach()
    n = len(student)
    counted = loss_mask & torch.isfinite(student)
    zeros = torch.zeros(n, dtype=torch.float64, device=student.device)
    log_rho = log_proximal = log_step = gains = zeros
    if config.needs_behaviour:
        behaviour = _needed(behaviour_logprob, "behaviour_logprob", config, n)
        counted = counted & torch.isfinite(behaviour)
        log_rho = log_proximal = counted_log_ratio(student, behaviour, counted)
    usable = counted
    if config.needs_advantage:
        given = _needed(advantage, "advantage", config, n)
        usable = usable & torch.isfinite(given)
        gains = torch.where(usable, given.double(), 0.0)
    if proximal_logprob is not None and config.kind is CorrectionKind.PPO:
        proximal = _needed(proximal_logprob, "proximal_logprob", config, n)
        usable = usable & torch.isfinite(proximal)
        log_proximal = counted_log_ratio(proximal, behaviour, usable)
        log_step = counted_log_ratio(student, proximal, usable)
    elif config.anchor is AdvantageAnchor.BEHAVIOUR:
        log_proximal, log_step = zeros, log_rho
    return _Tokens(
        rollouts_of(cu_seqlens, n), cu_seqlens, counted, usable, log_rho, log_proximal, log_step, gains
    )


# What to do about a value that is not there.
_REMEDIES = {
    "behaviour_logprob": "which this cache does not carry; score it again with the sampler's model",
    "advantage": "which takes the sampled tokens' teacher log-probs; score the rollouts again",
    "age": "which takes the policy version of each rollout; record it when sampling",
}


def _needed(value: Tensor | None, name: str, config: CorrectionConfig, length: int) -> Tensor:
    if value is None:
        raise InvalidArgumentError(
            f"correction {config.kind.value!r} needs {name}, {_REMEDIES[name]}, or use a correction without, "
            "such as kind 'none'"
        )
    if value.shape != (length,):
        raise InvalidArgumentError(f"{name}: expected shape [{length}], found {list(value.shape)}")
    return value.detach()


def _importance(config: CorrectionConfig, tokens: _Tokens, *, dense: bool) -> tuple[Tensor, Tensor]:
    """[N] weight of the kind, and [N] which tokens it keeps."""
    log_rho, usable = tokens.log_rho, tokens.usable
    cap = UNCAPPED if config.cap is None else config.cap
    low = 0.0 if config.low is None else config.low
    high = UNCAPPED if config.high is None else config.high
    rho = bounded_exp(log_rho)
    match config.kind:
        case CorrectionKind.NONE:
            return torch.ones_like(rho), usable
        case CorrectionKind.TOKEN_IS | CorrectionKind.TOKEN_TIS:
            return rho.clamp(max=cap), usable
        case CorrectionKind.TOKEN_MASK:
            return rho, usable & gates.within(log_rho, low, high)
        case CorrectionKind.CISPO:
            return rho.clamp(low, high), usable
        case CorrectionKind.PPO:
            step = bounded_exp(tokens.log_step)
            passes = gates.unclipped(tokens.log_step, tokens.advantage, low, high)
            return bounded_exp(tokens.log_proximal).clamp(max=cap) * step * passes, usable
        case CorrectionKind.PREFIX_IS:
            return _prefix_product(config, tokens, dense=dense).clamp(max=cap), usable
        case _:
            return _rollout_importance(config, tokens, cap=cap, low=low, high=high)


def _prefix_product(config: CorrectionConfig, tokens: _Tokens, *, dense: bool) -> Tensor:
    assert config.step_cap is not None
    factors = tokens.log_rho.clamp(max=math.log(config.step_cap))
    before = prefix_sum(factors, tokens.cu_seqlens, tokens.rollouts)
    return bounded_exp(before if dense else before + tokens.log_rho)


def _rollout_importance(
    config: CorrectionConfig, tokens: _Tokens, *, cap: float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Kinds that look at a rollout as a whole."""
    log_rho, usable, rollouts = tokens.log_rho, tokens.usable, tokens.rollouts
    product = rollouts.spread(rollouts.sum(log_rho))
    mean = rollouts.spread(rollouts.mean(log_rho, tokens.counted))
    # For the masks that only choose rollouts: 1, or the token's own ratio where a cap is given.
    chosen = torch.ones_like(log_rho) if config.cap is None else bounded_exp(log_rho).clamp(max=cap)
    match config.kind:
        case CorrectionKind.SEQUENCE_TIS:
            return bounded_exp(product).clamp(max=cap), usable
        case CorrectionKind.SEQUENCE_MASK:
            return bounded_exp(product), usable & gates.within(product, low, high)
        case CorrectionKind.GSPO:
            # Its ratio's value is the mean's, its gradient each token's own: sg[s] pi_theta / sg[pi_theta].
            passes = gates.unclipped(mean, tokens.advantage, low, high)
            return bounded_exp(mean) * passes, usable
        case CorrectionKind.GEOMETRIC_MASK:
            return chosen, usable & gates.within(mean, low, high)
        case CorrectionKind.K2_MASK | CorrectionKind.K3_MASK:
            estimate = gates.k2_drift if config.kind is CorrectionKind.K2_MASK else gates.k3_drift
            assert config.max_drift is not None
            drift = rollouts.spread(estimate(log_rho, tokens.counted, rollouts))
            return chosen, usable & (drift <= config.max_drift)
        case _:
            raise AssertionError(config.kind)
