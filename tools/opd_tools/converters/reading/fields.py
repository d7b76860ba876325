"""Fields of a rollout under the names people give them, for formats that fix no names: tables, `.pt` piles.

Axes: L = all tokens, R = response tokens, k = entries of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opd_store import InvalidArgumentError
from opd_tools.converters.core.format import ReadSettings
from opd_tools.converters.core.record import Values

SCALAR, LIST, NESTED = 0, 1, 2

_NAMES: dict[str, tuple[int, tuple[str, ...]]] = {
    "token_ids": (LIST, ("token_ids", "input_ids", "tokens", "inputs")),
    "prompt_ids": (LIST, ("prompt_ids", "prompt_token_ids")),
    "response_ids": (
        LIST,
        ("response_ids", "completion_ids", "response_token_ids", "response_tokens", "output_ids"),
    ),
    "prompt_len": (SCALAR, ("prompt_len", "prompt_length", "num_prompt_tokens")),
    "labels": (LIST, ("labels",)),
    "attention_mask": (LIST, ("attention_mask",)),
    "loss_mask": (LIST, ("loss_mask", "response_mask", "completion_mask")),
    "topk_ids": (
        NESTED,
        (
            *("topk_ids", "topk_indices", "topk_token_ids", "top_k_ids", "top_k_indices", "top_ids"),
            *("top_indices", "teacher_topk_ids", "teacher_topk_indices", "teacher_ids", "indices", "ids"),
            "token_ids",
        ),
    ),
    "topk_logprob": (
        NESTED,
        (
            *("topk_logprob", "topk_logprobs", "topk_log_probs", "top_k_logprobs", "top_k_log_probs"),
            *("top_logprobs", "top_log_probs", "teacher_topk_logprobs", "teacher_topk_log_probs"),
            *("teacher_logprobs", "teacher_log_probs", "logprobs", "log_probs"),
        ),
    ),
    "topk_logits": (
        NESTED,
        ("topk_logits", "top_k_logits", "top_logits", "teacher_topk_logits", "logits"),
    ),
    "all_logits": (NESTED, ("logits", "teacher_logits")),
    "logsumexp": (LIST, ("logsumexp", "log_sum_exp", "log_sum_exp_logits", "lse")),
    "log_tail": (LIST, ("log_tail", "log_tails")),
    "teacher_logprob": (
        LIST,
        (
            *("teacher_logprob", "teacher_logprobs", "teacher_log_probs", "token_logprobs"),
            *("logprobs", "log_probs"),
        ),
    ),
    "behaviour_logprob": (
        LIST,
        (
            *("behaviour_logprob", "behavior_logprob", "behaviour_logprobs", "behavior_logprobs"),
            *("rollout_logprobs", "rollout_log_probs", "old_logprobs", "old_log_probs"),
            *("student_logprobs", "student_log_probs", "sampling_logprobs"),
        ),
    ),
    "reference_logprob": (LIST, ("reference_logprob", "ref_logprobs", "ref_log_probs", "ref_log_prob")),
    "sample_id": (SCALAR, ("sample_id", "id", "uid", "request_id")),
    "finish_reason": (SCALAR, ("finish_reason",)),
    "policy_version": (SCALAR, ("policy_version",)),
    "reward": (SCALAR, ("reward",)),
    "label": (SCALAR, ("label",)),
}
SETTINGS = ("k", "rows")
"""Stated like fields, but no columns: entries of a row of a flat list, and which token a row is about."""
FLAT = ("topk_ids", "topk_logprob", "topk_logits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """Where the fields of a rollout are."""

    names: Mapping[str, str]
    """Field to column."""
    guessed: tuple[str, ...]
    """FIELD=NAME that nobody stated."""
    source_aligned: bool
    """Whether a file's row t, of as many rows as tokens, is about token t + 1."""
    flat: int = 0
    """Entries of a row where lists are flat; 0 where they are nested."""
    kept: int = 0
    """Entries to keep of rows of all logits; 0 where rows are a top-k."""
    vocab_size: int = 0

    @property
    def values(self) -> Values:
        """What the numbers of the top-k are."""
        known = "topk_logits" not in self.names or "logsumexp" in self.names
        return Values.LOGPROBS if known else Values.RENORMALISED

    @property
    def lost(self) -> tuple[str, ...]:
        """For `Contents.lost`."""
        lines = []
        if self.guessed:
            lines.append(
                f"columns were recognised by their names, nobody stated them: {', '.join(self.guessed)}"
            )
        if "prompt_len" not in self.names and not {"labels", "loss_mask", "prompt_ids"} & self.names.keys():
            lines.append("where the prompt ends: all tokens after the first count as response")
        if self.values is Values.RENORMALISED:
            lines.append(
                "logits without their logsumexp: log-probs sum to 1 over the entries, no tail is known"
            )
        return tuple(lines)


def resolve(
    depths: Mapping[str, int], settings: ReadSettings, where: str, *, source_aligned: bool = False
) -> Fields:
    """Which column holds which field.

    Args:
        depths: columns to how deep their lists are nested.
        settings: with FIELD=NAME as the user stated, and `SETTINGS`, among its columns.
        source_aligned: unless it says rows=label or rows=source.

    Raises:
        InvalidArgumentError: a field or column that is not there, several columns that a field could be in,
            nothing to convert, or all logits without a word on how many to keep.
    """
    columns = settings.columns
    stated = {field: name for field, name in columns.items() if field not in SETTINGS}
    for field, name in stated.items():
        if field not in _NAMES:
            known = ", ".join((*_NAMES, *SETTINGS))
            raise InvalidArgumentError(f"--column {field}={name}: no such field; known are {known}")
        if name not in depths:
            raise InvalidArgumentError(
                f"--column {field}={name}: {where} has no such column of numbers, but {_list(depths)}"
            )
    flat = _flat(columns)
    names, guessed = dict(stated), []
    for field, (wanted, candidates) in _NAMES.items():
        if field in stated:
            continue
        levels = LIST if flat and field in FLAT else wanted
        found = [
            name
            for name in candidates
            if depths.get(name) == levels and name not in names.values() and not _taken(field, names)
        ]
        if len(found) > 1:
            raise InvalidArgumentError(
                f"{where}: {field} could be any of {', '.join(found)}; say which with --column "
                f"{field}={found[0]}"
            )
        if found:
            names[field] = found[0]
            if field != found[0]:
                guessed.append(f"{field}={found[0]}")
    _require(names, depths, where)
    alignment = columns.get("rows", "source" if source_aligned else "label")
    if alignment not in ("label", "source"):
        raise InvalidArgumentError(
            f"--column rows={alignment:.20}: expected label (row t is about token t) or source (about token "
            "t + 1)"
        )
    if "all_logits" in names and settings.topk is None:
        raise InvalidArgumentError(
            f"{where}: rows of all logits; state how many to keep, such as --topk 64; the tail is exact"
        )
    return Fields(
        names=names,
        guessed=tuple(guessed),
        source_aligned=alignment == "source",
        flat=flat,
        kept=settings.topk or 0 if "all_logits" in names else 0,
        vocab_size=settings.vocab_size,
    )


def _flat(columns: Mapping[str, str]) -> int:
    text = columns.get("k", "0")
    if not text.isdecimal() or not int(text) < 1 << 20:
        raise InvalidArgumentError(f"--column k={text:.20}: expected how many entries a row has, such as 16")
    return int(text)


def _taken(field: str, names: Mapping[str, str]) -> bool:
    """Fields that are not looked for, since another says the same or lacks its ids."""
    if field == "topk_logits":
        return "topk_logprob" in names or "topk_ids" not in names
    if field == "all_logits":
        return "topk_logprob" in names or "topk_ids" in names
    return field in ("prompt_ids", "response_ids") and "token_ids" in names


def _require(names: Mapping[str, str], depths: Mapping[str, int], where: str) -> None:
    if "token_ids" not in names and not {"prompt_ids", "response_ids"} <= names.keys():
        raise InvalidArgumentError(
            f"{where}: no token ids found; say where with --column token_ids=NAME, or with prompt_ids= and "
            f"response_ids=. Columns: {_list(depths)}"
        )
    has_values = "topk_logprob" in names or "topk_logits" in names
    if has_values != ("topk_ids" in names):
        missing = "topk_logprob" if "topk_ids" in names else "topk_ids"
        raise InvalidArgumentError(
            f"{where}: a top-k needs ids and log-probs; say where the other is with --column {missing}=NAME "
            f"(lists that are not nested also need --column k=16). Columns: {_list(depths)}"
        )
    if not has_values and not {"teacher_logprob", "all_logits"} & names.keys():
        raise InvalidArgumentError(
            f"{where}: no log-probs found; say where with --column topk_ids=NAME and topk_logprob=NAME, or "
            f"teacher_logprob=NAME. Columns: {_list(depths)}"
        )


def _list(depths: Mapping[str, int]) -> str:
    return ", ".join(sorted(depths))[:300] or "none"
