"""Prompts and rollouts from JSONL. Errors name file, line and field."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import CacheMeta, FormatError, InvalidArgumentError, InvalidRolloutError, Rollout
from opd_train.capture.sampling import Prompt
from opd_train.models import CausalLM

FINISH_REASONS = ("stop", "length", "abort", "unknown")
_ROLLOUT_FIELDS = {
    "id",
    "prompt_ids",
    "response_ids",
    "behaviour_logprob",
    "reference_logprob",
    "loss_mask",
    "finish_reason",
    "answer",
}


def read_prompts(path: str | os.PathLike[str], lm: CausalLM, *, limit: int | None = None) -> list[Prompt]:
    """Read prompts and turn them into token ids with the model's tokenizer.

    Each line is an object with one of `prompt_ids` (integers), `messages` (chat turns, through the model's
    template with a generation prompt) or `prompt` (text, encoded as it is); optionally `id` and `answer`
    (text or number).

    Raises:
        FormatError: the file is empty, or a line breaks these rules; names file, line and field.
        InvalidRolloutError: a prompt longer than the model's context.
        InvalidArgumentError: no such file.
    """
    prompts = []
    for number, row in _lines(Path(path)):
        where = f"{path}, line {number}"
        ids = _prompt_ids(row, lm, where)
        if not len(ids):
            raise FormatError(f"{where}, field prompt: expected at least one token, found none")
        if len(ids) >= lm.context:
            raise InvalidRolloutError(
                f"{where}, field prompt: {len(ids)} tokens, expected fewer than the context of {lm.context}; "
                "shorten it or leave it out"
            )
        if ids.max() >= lm.vocab_size:
            raise FormatError(f"{where}, field prompt_ids: id {ids.max()}, expected below {lm.vocab_size}")
        sample_id = _text(row, "id", where) or f"line-{number}"
        prompts.append(Prompt(ids=ids, sample_id=sample_id, label=_text(row, "answer", where)))
        if len(prompts) == limit:
            break
    if not prompts:
        raise FormatError(
            f"{path}: no prompts in it; expected one JSON object per line with prompt or messages"
        )
    return prompts


def read_rollouts(path: str | os.PathLike[str]) -> tuple[CacheMeta, list[Rollout]]:
    """Read rollouts that another sampler made.

    The first line describes them: `{"rollouts": 1, "tokenizer_fingerprint": "sha256:...", "vocab_size": ...}`
    and optionally `behaviour` and `sft_teacher` (fields of `ModelInfo`), `sampler` (of `SamplerInfo`) and
    `chat_template_digest`. Every other line is one rollout: `prompt_ids`, `response_ids`, and optionally
    `id`, `behaviour_logprob`, `reference_logprob` (one number per response token), `loss_mask`,
    `finish_reason`, `answer`.

    Raises:
        FormatError: names file, line and field.
        InvalidArgumentError: no such file.
    """
    lines = _lines(Path(path))
    _, head = next(lines, (0, {}))
    where = f"{path}, line 1"
    if head.pop("rollouts", None) != 1:
        raise FormatError(
            f'{where}, field rollouts: expected a head line with "rollouts": 1; see `opd score --help`'
        )
    meta = CacheMeta.from_json(head, where=where)
    rollouts = []
    seen: set[str | None] = set()
    for number, row in lines:
        rollout = _rollout(row, f"{path}, line {number}", f"line-{number}")
        if rollout.sample_id in seen:
            raise FormatError(f"{path}, line {number}, field id: {rollout.sample_id!r:.80} occurs twice")
        seen.add(rollout.sample_id)
        rollouts.append(rollout)
    if not rollouts:
        raise FormatError(f"{path}: no rollouts after the head line")
    return meta, rollouts


def _rollout(row: dict[str, Any], where: str, place: str) -> Rollout:
    prompt, response = _ids(row, "prompt_ids", where), _ids(row, "response_ids", where)
    if not len(prompt) or not len(response):
        empty = "response_ids" if len(prompt) else "prompt_ids"
        raise FormatError(f"{where}, field {empty}: expected at least one token, found none")
    unknown = sorted(row.keys() - _ROLLOUT_FIELDS)
    if unknown:
        raise FormatError(
            f"{where}: unknown field {unknown[0]!r:.80}; known are {', '.join(sorted(_ROLLOUT_FIELDS))}"
        )
    finish_reason = row.get("finish_reason") or "unknown"
    if finish_reason not in FINISH_REASONS:
        raise FormatError(
            f"{where}, field finish_reason: expected one of {', '.join(FINISH_REASONS)}, found "
            f"{finish_reason!r:.80}"
        )
    mask = _per_token(row, "loss_mask", (bool,), len(response), where)
    return Rollout(
        token_ids=np.concatenate([prompt, response]),
        prompt_len=len(prompt),
        behaviour_logprob=_logprobs(row, "behaviour_logprob", len(response), where),
        reference_logprob=_logprobs(row, "reference_logprob", len(response), where),
        loss_mask=None if mask is None else np.array(mask, np.bool_),
        sample_id=_text(row, "id", where) or place,
        finish_reason=finish_reason,
        label=_text(row, "answer", where),
    )


def _per_token(
    row: dict[str, Any], name: str, kinds: tuple[type, ...], size: int, where: str
) -> list[Any] | None:
    values = row.get(name)
    if values is None:
        return None
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if not isinstance(values, list) or not all(type(value) in kinds for value in values):
        raise FormatError(f"{where}, field {name}: expected a list of {wanted}, found {values!r:.80}")
    if len(values) != size:
        raise FormatError(f"{where}, field {name}: expected {size} values, found {len(values)}")
    return values


def _logprobs(row: dict[str, Any], name: str, size: int, where: str) -> NDArray[np.float32] | None:
    values = _per_token(row, name, (float, int), size, where)
    if values is None:
        return None
    for position, value in enumerate(values):
        if not -3e38 < value <= 0:
            raise FormatError(
                f"{where}, field {name}, position {position}: expected a finite log-prob <= 0, found {value}"
            )
    return np.array(values, np.float32)


def _text(row: dict[str, Any], name: str, where: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if type(value) not in (str, int, float):
        raise FormatError(f"{where}, field {name}: expected text or a number, found {value!r:.80}")
    return str(value)


def _encode(lm: CausalLM, text: str, where: str) -> NDArray[np.uint32]:
    # A prompt is what the model sees, so nothing is added to it.
    try:
        return np.array(lm.tokenizer(text, add_special_tokens=False)["input_ids"], np.uint32)
    except Exception as error:  # tokenizers raises bare exceptions for text it has no tokens for
        raise FormatError(f"{where}: the tokenizer of {lm.path} cannot encode it: {error!s:.200}") from error


def _prompt_ids(row: dict[str, Any], lm: CausalLM, where: str) -> NDArray[np.uint32]:
    given = [name for name in ("prompt_ids", "messages", "prompt") if name in row]
    if len(given) != 1:
        raise FormatError(
            f"{where}: expected exactly one of prompt_ids, messages and prompt, found {given or 'none'}"
        )
    if given == ["prompt_ids"]:
        return _ids(row, "prompt_ids", where)
    value = row[given[0]]
    if given == ["prompt"]:
        if not isinstance(value, str):
            raise FormatError(f"{where}, field prompt: expected text, found {value!r:.80}")
        return _encode(lm, value, f"{where}, field prompt")
    if lm.tokenizer.chat_template is None:
        raise FormatError(
            f"{where}, field messages: {lm.path} has no chat template; give prompt or prompt_ids"
        )
    try:
        text = lm.tokenizer.apply_chat_template(value, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program; whatever it raises is about this line
        raise FormatError(f"{where}, field messages: the chat template refuses it: {error}") from error
    return _encode(lm, text, f"{where}, field messages")


def _ids(row: dict[str, Any], name: str, where: str) -> NDArray[np.uint32]:
    value = row.get(name)
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 1 << 32 for i in value):
        raise FormatError(f"{where}, field {name}: expected a list of token ids, found {value!r:.80}")
    return np.array(value, np.uint32)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise FormatError(f"{path}, line {number}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise FormatError(
                        f"{path}, line {number}: expected a JSON object, found {line.strip()!r:.80}"
                    )
                yield number, row
    except OSError as error:
        raise InvalidArgumentError(f"{path}: cannot read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 ({error})") from error
