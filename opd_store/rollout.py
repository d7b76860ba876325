"""One rollout as the library hands it around, and the check that its values are possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opd_store import layout
from opd_store.errors import InvalidRolloutError

Scalar = str | int | float | bool
FINISH_REASONS = ("stop", "length", "abort", "unknown")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A prompt, a sampled response, and what models said about it.

    Let L be all tokens, R = L - prompt_len those of the response, K the stored top-k. Every row is
    label-aligned: row t of a response array is about token prompt_len + t, given the tokens before it. Absent
    is None, never zeros. Arrays read from a cache are read-only views of the mapped file where the encoding
    allows it.
    """

    token_ids: NDArray[np.uint32]
    """[L] prompt and response, exactly as sampled, stop token included."""
    prompt_len: int
    """Tokens of the prompt, at least 1."""
    teacher_logprob: NDArray[np.float32] | None = None
    """[R] nats, the teacher's log-prob of the sampled token at temperature 1."""
    behaviour_logprob: NDArray[np.float32] | None = None
    """[R] nats, of the sampled token under the distribution it was drawn from (processed)."""
    reference_logprob: NDArray[np.float32] | None = None
    """[R] nats, of the sampled token under the same weights, raw, at temperature 1."""
    loss_mask: NDArray[np.bool_] | None = None
    """[R] which tokens to train on; None means all."""
    topk_ids: NDArray[np.uint32] | None = None
    """[R, K] the teacher's most likely tokens, by falling log-prob, ties by rising id."""
    topk_logprob: NDArray[np.float32] | None = None
    """[R, K] nats, temperature 1, normalised over the whole vocabulary."""
    log_tail: NDArray[np.float32] | None = None
    """[R] nats, log of the teacher's probability outside the top-k; -inf where nothing is left."""
    sample_id: str | None = None
    finish_reason: str = "unknown"
    """"stop" (a stop token was sampled, and is the last token), "length", "abort" or "unknown"."""
    policy_version: int | None = None
    teacher: int = 0
    """Which teacher scored it: 0 is `CacheMeta.teacher`, i > 0 is `CacheMeta.other_teachers[i - 1]`."""
    reward: float | None = None
    label: str | None = None
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    """Values of the user columns `x_*` declared when the cache was created."""

    @property
    def response_len(self) -> int:
        """R, the number of sampled tokens."""
        return len(self.token_ids) - self.prompt_len

    @property
    def response_ids(self) -> NDArray[np.uint32]:
        """[R] the sampled tokens."""
        return self.token_ids[self.prompt_len :]


def checked(rollout: Rollout, *, vocab_size: int, topk: int) -> Rollout:
    """The rollout with its arrays in the dtypes of the format, proven possible.

    Args:
        vocab_size: ids have to be below it.
        topk: K of the cache; 0 for a cache without top-k.

    Raises:
        InvalidRolloutError: names the rollout, field, position, what was expected and what was found.
    """
    name = repr(rollout.sample_id)[:100] if rollout.sample_id is not None else "without sample_id"

    def refuse(field_name: str, expected: str, found: object, position: int = -1) -> NoReturn:
        place = f", position {position}" if position >= 0 else ""
        raise InvalidRolloutError(
            f"rollout {name}, field {field_name}{place}: expected {expected}, found {found!s:.100}",
            sample_id=rollout.sample_id or "",
            field=field_name,
            position=position,
        )

    def array_of(field_name: str, value: ArrayLike) -> NDArray[Any]:
        try:
            return np.asarray(value)
        except ValueError as error:
            refuse(field_name, "an array of numbers", error)

    def integer(field_name: str, value: object, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value < high:
            refuse(field_name, f"an integer in [{low}, {high})", repr(value))
        return int(value)

    def ids_of(field_name: str, value: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.uint32]:
        ids = array_of(field_name, value)
        if ids.shape != shape or ids.dtype.kind not in "iu":
            refuse(field_name, f"integers of shape {list(shape)}", f"{ids.dtype} of shape {list(ids.shape)}")
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            wrong = (ids < 0) | (ids >= vocab_size)
            at = int(np.argmax(wrong.reshape(len(ids), -1).any(axis=1)))
            found = int(ids[wrong][0])
            refuse(field_name, f"ids in [0, vocab_size {vocab_size})", found, at)
        return np.ascontiguousarray(ids, np.uint32)

    def logprobs_of(
        field_name: str, value: ArrayLike, shape: tuple[int, ...], low: float
    ) -> NDArray[np.float32]:
        values = array_of(field_name, value)
        if values.shape != shape or values.dtype.kind != "f":
            refuse(
                field_name, f"floats of shape {list(shape)}", f"{values.dtype} of shape {list(values.shape)}"
            )
        with np.errstate(over="ignore"):  # becomes -inf or inf, and is refused below where it is wrong
            values = np.ascontiguousarray(values, np.float32)
        # NaN makes the comparison false.
        if not low <= values.min(initial=0) <= values.max(initial=low) <= 0:
            wrong = ~((values <= 0) & (values >= low))
            at = int(np.argmax(wrong.reshape(len(values), -1).any(axis=1)))
            refuse(field_name, "log-probs that are finite and <= 0", values[wrong][0], at)
        return values

    tokens = array_of("token_ids", rollout.token_ids)
    if tokens.ndim != 1 or not 2 <= len(tokens) <= layout.MAX_ROLLOUT_TOKENS:
        refuse("token_ids", f"2 to {layout.MAX_ROLLOUT_TOKENS} tokens in one dimension", list(tokens.shape))
    tokens = ids_of("token_ids", tokens, tokens.shape)
    # At least one token of prompt and one of response.
    prompt_len = integer("prompt_len", rollout.prompt_len, 1, len(tokens))
    size = len(tokens) - prompt_len

    lowest = float(np.finfo(np.float32).min)
    logprobs = {
        field_name: logprobs_of(field_name, value, (size,), lowest)
        for field_name in ("teacher_logprob", "behaviour_logprob", "reference_logprob")
        if (value := getattr(rollout, field_name)) is not None
    }
    mask = None
    if rollout.loss_mask is not None:
        mask = array_of("loss_mask", rollout.loss_mask)
        if mask.shape != (size,) or mask.dtype != np.bool_:
            refuse("loss_mask", f"bool of shape [{size}]", f"{mask.dtype} of shape {list(mask.shape)}")

    topk_ids = topk_logprob = log_tail = None
    if topk:
        for field_name in ("topk_ids", "topk_logprob", "log_tail"):
            if getattr(rollout, field_name) is None:
                refuse(field_name, f"an array, since the cache stores the top {topk}", None)
        assert rollout.topk_ids is not None
        assert rollout.topk_logprob is not None
        assert rollout.log_tail is not None
        topk_ids = ids_of("topk_ids", rollout.topk_ids, (size, topk))
        topk_logprob = logprobs_of("topk_logprob", rollout.topk_logprob, (size, topk), lowest)
        log_tail = logprobs_of("log_tail", rollout.log_tail, (size,), -np.inf)
        if (found := topk_problem(topk_ids, topk_logprob, log_tail)) is not None:
            refuse(*found)
    elif rollout.topk_ids is not None or rollout.topk_logprob is not None or rollout.log_tail is not None:
        refuse("topk_ids", "None, since the cache was created with topk=0", "an array")

    if rollout.finish_reason not in FINISH_REASONS:
        refuse("finish_reason", f"one of {', '.join(FINISH_REASONS)}", rollout.finish_reason)
    for field_name in ("sample_id", "label"):
        value = getattr(rollout, field_name)
        if value is not None and not is_text(value):
            refuse(field_name, f"text of at most {layout.MAX_TEXT_BYTES} bytes of UTF-8", repr(value))
    policy_version = rollout.policy_version
    if policy_version is not None:
        policy_version = integer("policy_version", policy_version, -layout.MAX_JSON_INT, 1 << 53)
    reward = rollout.reward
    if reward is not None:
        number = isinstance(reward, int | float | np.integer | np.floating) and not isinstance(reward, bool)
        if not number or not abs(reward) <= float(np.finfo(np.float32).max):
            refuse("reward", "a finite float32", repr(reward))
        reward = float(reward)
    return Rollout(
        token_ids=tokens,
        prompt_len=prompt_len,
        loss_mask=mask,
        topk_ids=topk_ids,
        topk_logprob=topk_logprob,
        log_tail=log_tail,
        sample_id=rollout.sample_id,
        finish_reason=rollout.finish_reason,
        policy_version=policy_version,
        teacher=integer("teacher", rollout.teacher, 0, 1 << 16),
        reward=reward,
        label=rollout.label,
        extra=rollout.extra,
        **logprobs,
    )


def is_text(value: object) -> bool:
    """Whether a value is text that a column can hold: at most MAX_TEXT_BYTES of UTF-8."""
    try:
        return isinstance(value, str) and len(value.encode()) <= layout.MAX_TEXT_BYTES
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def topk_problem(
    ids: NDArray[np.uint32], logprob: NDArray[np.float32], log_tail: NDArray[np.float32]
) -> tuple[str, str, object, int] | None:
    """The first rule that rows of top-k break: (field, expected, found, position), or None.

    Args:
        ids, logprob: [R, K]. Values are finite or checked otherwise.
        log_tail: [R].
    """
    falling = np.diff(logprob, axis=1)
    tie_order = (falling == 0) & (ids[:, 1:] <= ids[:, :-1])
    wrong = ((falling > 0) | tie_order).any(axis=1)
    if wrong.any():
        at = int(np.argmax(wrong))
        return "topk_logprob", "falling log-probs, ties by rising id", f"ids {ids[at]}, {logprob[at]}", at
    in_order = np.sort(ids, axis=1)
    wrong = (in_order[:, 1:] == in_order[:, :-1]).any(axis=1)
    if wrong.any():
        at = int(np.argmax(wrong))
        return "topk_ids", "distinct ids", ids[at], at
    total = np.exp(logprob.astype(np.float64)).sum(axis=1) + np.exp(log_tail.astype(np.float64))
    wrong = total > 1 + layout.PROBABILITY_TOLERANCE
    if wrong.any():
        at = int(np.argmax(wrong))
        return (
            "topk_logprob",
            f"probabilities and tail of at most 1 + {layout.PROBABILITY_TOLERANCE}",
            total[at],
            at,
        )
    return None
