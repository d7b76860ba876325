"""One rollout as the library hands it around, and the check that its values are possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opd_store import layout
from opd_store.errors import InvalidArgumentError, InvalidRolloutError
from opd_store.values import LOWEST, Problem, ids_problem, logprobs_problem, support_problem

Scalar = str | int | float | bool
FINISH_REASONS = ("stop", "length", "abort", "unknown")
SUPPORTS = {
    "topk": ("topk_ids", "topk_logprob", "log_tail", None),
    "chosen": ("chosen_ids", "chosen_logprob", "chosen_log_tail", None),
    "sampled": ("sampled_ids", "sampled_logprob", "sampled_log_tail", "sampled_draws"),
}
"""Kind of support to the fields of a rollout: ids, log-probs, tail, draws."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A prompt, a sampled response, and what models said about it.

    Let L be all tokens, R = L - prompt_len those of the response, K the stored top-k. Every row is
    label-aligned: row t of a response array is about token prompt_len + t, given the tokens before it. Absent
    is None, never zeros. Rows of ids may be shorter than their neighbours where the cache allows it; they end
    in padding, id 0xFFFFFFFF with log-prob -inf. Arrays read from a cache are read-only views of the mapped
    file where the encoding allows it.
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
    chosen_ids: NDArray[np.uint32] | None = None
    """[R, C] ids that somebody else chose, such as the student's own top-k, in the teacher's order."""
    chosen_logprob: NDArray[np.float32] | None = None
    """[R, C] nats, the teacher's."""
    chosen_log_tail: NDArray[np.float32] | None = None
    """[R] nats, log of the teacher's probability outside the chosen ids."""
    sampled_ids: NDArray[np.uint32] | None = None
    """[R, S] distinct ids drawn from the teacher (random-sampling KD), in the teacher's order."""
    sampled_logprob: NDArray[np.float32] | None = None
    """[R, S] nats, the teacher's at temperature 1, whatever the draws were made at."""
    sampled_log_tail: NDArray[np.float32] | None = None
    """[R] nats, log of the teacher's probability outside the drawn ids."""
    sampled_draws: NDArray[np.uint32] | None = None
    """[R, S] how often each id was drawn."""
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

    def ragged_topk(self) -> tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.int64]]:
        """The top-k without padding: ids [n], log-probs [n], offsets [R + 1] of the rows.

        Raises:
            InvalidArgumentError: this rollout has no top-k.
        """
        if self.topk_ids is None or self.topk_logprob is None:
            raise InvalidArgumentError("topk_ids: this rollout has none")
        present = self.topk_ids != layout.NO_ID
        offsets = np.zeros(len(present) + 1, np.int64)
        np.cumsum(present.sum(axis=1), out=offsets[1:])
        return self.topk_ids[present], self.topk_logprob[present], offsets


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportSizes:
    """How many ids a position of a cache may hold."""

    topk: int = 0
    ragged: bool = False
    """Whether a position may have fewer than `topk` ranks."""
    chosen: int = 0
    sampled: int = 0


def checked(
    rollout: Rollout,
    *,
    vocab_size: int,
    sizes: SupportSizes,
    tolerance: float = layout.PROBABILITY_TOLERANCE,
) -> Rollout:
    """The rollout with its arrays in the dtypes of the format, proven possible.

    Args:
        vocab_size: ids have to be below it.
        sizes: what the cache holds; shorter rows are padded to it.
        tolerance: how far the probabilities of one position may exceed 1 in sum.

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

    def require(problem: Problem | None) -> None:
        if problem is not None:
            refuse(*problem)

    def array_of(field_name: str, value: ArrayLike) -> NDArray[Any]:
        try:
            return np.asarray(value)
        except ValueError as error:
            refuse(field_name, "an array of numbers", error)

    def integer(field_name: str, value: object, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value < high:
            refuse(field_name, f"an integer in [{low}, {high})", repr(value))
        return int(value)

    def integers(field_name: str, value: ArrayLike, *shape: int) -> NDArray[np.uint32]:
        array = array_of(field_name, value)
        if array.shape != shape or array.dtype.kind not in "iu":
            refuse(
                field_name, f"integers of shape {list(shape)}", f"{array.dtype} of shape {list(array.shape)}"
            )
        if array.size and not 0 <= array.min() <= array.max() <= layout.NO_ID:
            require(ids_problem(field_name, array, vocab_size))
        return np.ascontiguousarray(array, np.uint32)

    def floats(field_name: str, value: ArrayLike, *shape: int) -> NDArray[np.float32]:
        values = array_of(field_name, value)
        if values.shape != shape or values.dtype.kind != "f":
            refuse(
                field_name, f"floats of shape {list(shape)}", f"{values.dtype} of shape {list(values.shape)}"
            )
        with np.errstate(over="ignore"):  # becomes -inf or inf, and is refused below where it is wrong
            return np.ascontiguousarray(values, np.float32)

    tokens = array_of("token_ids", rollout.token_ids)
    if tokens.ndim != 1 or not 2 <= len(tokens) <= layout.MAX_ROLLOUT_TOKENS:
        refuse("token_ids", f"2 to {layout.MAX_ROLLOUT_TOKENS} tokens in one dimension", list(tokens.shape))
    tokens = integers("token_ids", tokens, *tokens.shape)
    require(ids_problem("token_ids", tokens, vocab_size))
    # At least one token of prompt and one of response.
    prompt_len = integer("prompt_len", rollout.prompt_len, 1, len(tokens))
    size = len(tokens) - prompt_len

    arrays: dict[str, NDArray[Any]] = {}
    for field_name in ("teacher_logprob", "behaviour_logprob", "reference_logprob"):
        if (value := getattr(rollout, field_name)) is not None:
            arrays[field_name] = floats(field_name, value, size)
            require(logprobs_problem(field_name, arrays[field_name], LOWEST))
    if rollout.loss_mask is not None:
        mask = array_of("loss_mask", rollout.loss_mask)
        if mask.shape != (size,) or mask.dtype != np.bool_:
            refuse("loss_mask", f"bool of shape [{size}]", f"{mask.dtype} of shape {list(mask.shape)}")
        arrays["loss_mask"] = mask

    for kind, (ids_field, logprob_field, tail_field, draws_field) in SUPPORTS.items():
        fields = [ids_field, logprob_field, tail_field, *([draws_field] if draws_field else [])]
        width: int = getattr(sizes, kind)
        given = [getattr(rollout, field_name) for field_name in fields]
        if not width:
            for field_name, value in zip(fields, given, strict=True):
                if value is not None:
                    refuse(field_name, f"None, since the cache was created with {kind}=0", "an array")
            continue
        for field_name, value in zip(fields, given, strict=True):
            if value is None:
                refuse(field_name, f"an array, since the cache was created with {kind}={width}", None)
        ragged = kind != "topk" or sizes.ragged
        found = np.shape(array_of(ids_field, given[0]))
        columns = found[1] if ragged and len(found) == 2 and 0 < found[1] < width else width
        ids = integers(ids_field, given[0], size, columns)
        logprob = floats(logprob_field, given[1], size, columns)
        log_tail = floats(tail_field, given[2], size)
        draws = integers(fields[3], given[3], size, columns) if draws_field else None
        require(
            support_problem(
                kind,
                ids,
                logprob,
                log_tail,
                draws=draws,
                vocab_size=vocab_size,
                ragged=ragged,
                tolerance=tolerance,
            )
        )
        room = ((0, 0), (0, width - columns))
        if columns < width:
            ids = np.pad(ids, room, constant_values=layout.NO_ID)
            logprob = np.pad(logprob, room, constant_values=-np.inf)
        arrays |= {ids_field: ids, logprob_field: logprob, tail_field: log_tail}
        if draws is not None:
            arrays[fields[3]] = np.pad(draws, room)

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
        sample_id=rollout.sample_id,
        finish_reason=rollout.finish_reason,
        policy_version=policy_version,
        teacher=integer("teacher", rollout.teacher, 0, 1 << 16),
        reward=reward,
        label=rollout.label,
        extra=rollout.extra,
        **arrays,
    )


def is_text(value: object) -> bool:
    """Whether a value is text that a column can hold: at most MAX_TEXT_BYTES of UTF-8."""
    try:
        return isinstance(value, str) and len(value.encode()) <= layout.MAX_TEXT_BYTES
    except UnicodeEncodeError:  # half a surrogate pair
        return False
