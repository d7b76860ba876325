"""From a foreign record to a rollout: order, padding, fillers, the tail. What had to be given up is counted.

Axes: R = response tokens, k = entries of a foreign row, K = ranks kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_store import NO_ID, FormatError, Rollout
from opd_tools.converters.record import NO_ENTRY, Record, Tally, Values

FILLER = -900.0
"""Log-probs at or below it are fillers: -1e3 (Megatron), -9999 (vLLM), -1e9 (axolotl), -inf. float32 softmax
gives no probability below exp(-104)."""
_OVERFULL = 0.02
"""By how much probabilities may exceed 1 in sum: bfloat16 rounds a log-prob of -16 by up to 1/16 nat, but the
likely ones by far less. More is not rounding."""
_AGREES = 0.13
"""Nats that a token's own log-prob and its entry may be apart: two roundings to bfloat16 of log-probs to -16.
"""

Support = tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What the cache can hold."""

    vocab_size: int
    topk: int
    """Ranks kept; likelier ones stay. 0 for none."""
    values: Values


def to_rollout(record: Record, target: Target, tally: Tally) -> Rollout:
    """The rollout that a record describes.

    Raises:
        FormatError: values that no reading of the format explains; names file, row and position.
    """
    tokens = np.asarray(record.token_ids)
    if tokens.ndim != 1 or len(tokens) < 2 or not 1 <= record.prompt_len < len(tokens):
        raise FormatError(
            f"{record.where}: expected a prompt and a response of at least one token each, found "
            f"{tokens.size} tokens, {record.prompt_len} of them prompt"
        )
    if tokens.min() < 0 or tokens.max() >= target.vocab_size:
        at = int(((tokens < 0) | (tokens >= target.vocab_size)).argmax())
        raise FormatError(
            f"{record.where}, token {at}: id {tokens[at]} is not below the vocabulary size "
            f"{target.vocab_size}; is this the right tokenizer?"
        )
    size = len(tokens) - record.prompt_len
    for name in ("teacher_logprob", "topk_ids", "topk_logprob", "log_tail", "behaviour_logprob", "loss_mask"):
        array = getattr(record, name)
        if array is not None and len(array) != size:
            raise FormatError(
                f"{record.where}, {name}: expected {size} rows, one a response token, found {len(array)}"
            )
    support: Support | None = None
    teacher = record.teacher_logprob
    if record.topk_ids is not None and target.topk:
        ids, logprob = _sorted(record, target.vocab_size, tally)
        entry = _entry_of(tokens[record.prompt_len :], ids, logprob)
        teacher = _own(record, entry, tally) if target.values is Values.LOGPROBS else teacher
        support = _support(record, ids, logprob, target, tally)
    behaviour = _finite(record, "behaviour_logprob", record.behaviour_logprob, tally)
    return Rollout(
        token_ids=tokens.astype(np.uint32),
        prompt_len=record.prompt_len,
        teacher_logprob=_finite(record, "teacher_logprob", teacher, tally),
        behaviour_logprob=behaviour,
        loss_mask=record.loss_mask,
        topk_ids=None if support is None else support[0],
        topk_logprob=None if support is None else support[1],
        log_tail=None if support is None else support[2],
        # Without a name of its own a rollout would be taken for the one before it with the same tokens.
        sample_id=record.where if record.sample_id is None else record.sample_id,
        finish_reason=record.finish_reason,
        reward=record.reward,
        label=record.label,
        extra=record.extra,
    )


def _sorted(record: Record, vocab_size: int, tally: Tally) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """[R, k] ids and log-probs by falling log-prob, ties by rising id, `NO_ENTRY` and -inf at the end."""
    ids = np.asarray(record.topk_ids, np.int64)
    logprob = np.asarray(record.topk_logprob, np.float64)
    if ids.ndim != 2 or ids.shape != logprob.shape:
        raise FormatError(
            f"{record.where}: expected as many ids as log-probs, found shapes {list(ids.shape)} and "
            f"{list(logprob.shape)}"
        )
    absent = ids == NO_ENTRY
    if np.isnan(logprob[~absent]).any():
        raise FormatError(f"{record.where}, position {_first(np.isnan(logprob) & ~absent)}: log-prob NaN")
    filler = ~absent & (logprob <= FILLER)
    if filler.any():
        tally["entries that were fillers (-inf, -9999, ...), left out"] += int(filler.sum())
        absent |= filler
    wrong = ~absent & ((ids < 0) | (ids >= vocab_size))
    if wrong.any():
        raise FormatError(
            f"{record.where}, position {_first(wrong)}: id {ids[wrong][0]} is not below the vocabulary size "
            f"{vocab_size}; is this the right tokenizer?"
        )
    empty = absent.all(axis=1)
    if empty.any():
        raise FormatError(
            f"{record.where}, position {_first(empty)}: no entry at all; a loss mask has to cover such "
            "positions, or the file has to leave them out"
        )
    logprob = np.where(absent, -np.inf, logprob)
    ids = np.where(absent, NO_ENTRY, ids)
    if _is_ordered(ids, logprob):
        order = None
    else:
        order = np.lexsort((ids, -logprob), axis=-1)
        ids, logprob = np.take_along_axis(ids, order, 1), np.take_along_axis(logprob, order, 1)
        tally["positions whose entries were put in order"] += len(ids)
    return _distinct(record, ids, logprob, tally)


def _is_ordered(ids: NDArray[np.int64], logprob: NDArray[np.float64]) -> bool:
    with np.errstate(invalid="ignore"):
        falls = logprob[:, :-1] > logprob[:, 1:]
        ties = (logprob[:, :-1] == logprob[:, 1:]) & ((ids[:, :-1] < ids[:, 1:]) | (ids[:, 1:] == NO_ENTRY))
    return bool((falls | ties).all())


def _distinct(
    record: Record, ids: NDArray[np.int64], logprob: NDArray[np.float64], tally: Tally
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    by_id = np.sort(ids, axis=1)
    twice = ((by_id[:, 1:] == by_id[:, :-1]) & (by_id[:, 1:] != NO_ENTRY)).any(axis=1)
    if not twice.any():
        return ids, logprob
    ids, logprob = ids.copy(), logprob.copy()
    for row in np.flatnonzero(twice):
        seen: dict[int, float] = {}
        for place, (token, value) in enumerate(zip(ids[row].tolist(), logprob[row].tolist(), strict=True)):
            if token == NO_ENTRY:
                continue
            if token in seen:
                if seen[token] != value:
                    raise FormatError(
                        f"{record.where}, position {row}: id {token} twice, with log-probs {seen[token]:g} "
                        f"and {value:g}"
                    )
                ids[row, place], logprob[row, place] = NO_ENTRY, -np.inf
                tally["entries that were there twice, once left out"] += 1
            seen[token] = value
        kept = ids[row] != NO_ENTRY
        ids[row] = np.concatenate([ids[row][kept], ids[row][~kept]])
        logprob[row] = np.concatenate([logprob[row][kept], logprob[row][~kept]])
    return ids, logprob


def _entry_of(
    tokens: NDArray[np.int64], ids: NDArray[np.int64], logprob: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[R] log-prob of each token among its row's entries; NaN where it is not one."""
    found = ids == tokens[:, None]
    return np.where(found.any(axis=1), np.where(found, logprob, 0.0).sum(axis=1), np.nan)


def _own(record: Record, entry: NDArray[np.float64], tally: Tally) -> NDArray[np.floating]:
    """[R] the tokens' own log-probs: those given, else those of their entries."""
    given = record.teacher_logprob
    if given is None:
        return entry
    given = np.asarray(given, np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.abs(given - entry) > _AGREES
    if apart.any():
        tally["tokens whose own log-prob disagrees with their entry"] += int(apart.sum())
    return np.where(np.isnan(given), entry, given)


def _support(
    record: Record,
    ids: NDArray[np.int64],
    logprob: NDArray[np.float64],
    target: Target,
    tally: Tally,
) -> Support:
    mass = np.exp(logprob).sum(axis=1)
    logprob = np.minimum(logprob, 0.0)
    if target.values is Values.RENORMALISED:
        logprob = logprob - np.log(mass)[:, None] if not np.allclose(mass, 1, atol=1e-6) else logprob
        tail = np.full(len(ids), -np.inf)
    else:
        over = mass > 1 + _OVERFULL
        if over.any():
            at = _first(over)
            raise FormatError(
                f"{record.where}, position {at}: probabilities sum to {mass[at]:.4f}; these are no log-probs "
                "of one distribution (logits, another temperature, or a wrong decoding?)"
            )
        rounded = mass > 1
        if rounded.any():
            tally["positions whose rounded probabilities exceed 1, scaled down to it"] += int(rounded.sum())
            logprob = logprob - np.where(rounded, np.log(mass), 0.0)[:, None]
            mass = np.minimum(mass, 1.0)
        if record.log_tail is not None:
            tail = np.asarray(record.log_tail, np.float64)
        else:
            with np.errstate(divide="ignore"):
                tail = np.log1p(-mass)
            tally["tails computed as 1 - sum, as exact as the entries' rounding"] += len(tail)
    if ids.shape[1] > target.topk:
        cut = np.exp(logprob[:, target.topk :]).sum(axis=1)
        if target.values is Values.LOGPROBS:
            with np.errstate(divide="ignore"):
                tail = np.logaddexp(tail, np.log(cut))
        dropped = int((ids[:, target.topk :] != NO_ENTRY).sum())
        if dropped:
            tally[f"entries beyond rank {target.topk}, moved into the tail"] += dropped
        ids, logprob = ids[:, : target.topk], logprob[:, : target.topk]
    padded = np.where(ids == NO_ENTRY, NO_ID, ids).astype(np.uint32)
    return padded, _float32(logprob), _float32(np.minimum(tail, 0.0))


def _finite(
    record: Record, name: str, values: NDArray[np.floating] | None, tally: Tally
) -> NDArray[np.float32] | None:
    """The values, or None where one is missing: a column has all values of a rollout or none."""
    if values is None:
        return None
    values = np.asarray(values, np.float64)
    missing = np.isnan(values)
    if missing.any():
        tally[f"rollouts without {name}, since some tokens lack it"] += 1
        return None
    above = values > 1e-3
    if above.any():
        at = _first(above)
        raise FormatError(f"{record.where}, {name}, position {at}: a log-prob of {values[at]:g} is above 0")
    if (values <= FILLER).any():
        tally[f"rollouts without {name}, since some tokens have a filler for it"] += 1
        return None
    return _float32(np.minimum(values, 0.0))


def _float32(values: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


def _first(mask: NDArray[np.bool_]) -> int:
    """First row with anything set."""
    return int(np.argmax(mask.reshape(len(mask), -1).any(axis=1)))
