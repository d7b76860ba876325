"""From the fields of one row of a table or pile to a record.

Axes: L = all tokens, R = response tokens, k = entries of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError
from opd_store.rollout import FINISH_REASONS
from opd_tools.converters.core.record import Record
from opd_tools.converters.reading.fields import FLAT, Fields

_ROWS = (
    *("topk_ids", "topk_logprob", "topk_logits", "all_logits"),
    *("logsumexp", "log_tail", "teacher_logprob"),
)
"""Rows of a teacher, which may be aligned in either way; what follows belongs to the tokens themselves."""
_OWN = ("behaviour_logprob", "reference_logprob", "loss_mask")
_MOST_LOGITS = 1 << 20
"""That are worked on at a time, in float64."""
_SCALARS = ("sample_id", "finish_reason", "policy_version", "reward", "label")


def to_record(row: Mapping[str, Any], fields: Fields, where: str) -> Record:
    """The record that the values of one row make.

    Args:
        row: field to value: arrays [L], [R], [R, k] (or flat), scalars; None for null.

    Raises:
        FormatError: sizes that do not fit together.
    """
    row = {field: value for field, value in row.items() if value is not None}
    tokens, prompt_len, mask = _tokens(row, where)
    kept = _not_padding(row, len(tokens), where)
    arrays: dict[str, NDArray[Any]] = {}
    for name in (*_ROWS, *_OWN):
        if name not in row:
            continue
        array = np.asarray(row[name])
        if fields.flat and name in FLAT and array.ndim == 1:
            if len(array) % fields.flat:
                raise FormatError(
                    f"{where}, {name}: {len(array)} values are not whole rows of {fields.flat} entries"
                )
            array = array.reshape(-1, fields.flat)
        aligned = fields.source_aligned and name in _ROWS
        arrays[name] = _placed(array, len(tokens), prompt_len, kept, aligned, f"{where}, {name}")
    tokens = tokens[kept]
    if "all_logits" in arrays:
        arrays |= likeliest(arrays["all_logits"], fields, where)
    if "loss_mask" in arrays:
        mask = arrays["loss_mask"] != 0
    elif mask is not None:
        mask = mask[kept][prompt_len:]
    record = Record(
        where=where,
        token_ids=tokens,
        prompt_len=prompt_len,
        topk_ids=arrays.get("topk_ids"),
        topk_logprob=_logprob(arrays, where),
        log_tail=arrays.get("log_tail"),
        teacher_logprob=arrays.get("teacher_logprob"),
        behaviour_logprob=arrays.get("behaviour_logprob"),
        reference_logprob=arrays.get("reference_logprob"),
        loss_mask=None if mask is None or mask.all() else mask,
    )
    if scalars := {name: row[name] for name in _SCALARS if name in row}:
        record = dataclasses.replace(record, **_scalars(scalars, where))
    return record


def _tokens(row: Mapping[str, Any], where: str) -> tuple[NDArray[Any], int, NDArray[np.bool_] | None]:
    """Token ids, tokens of the prompt, and [L] which of them are trained on where labels tell."""
    if "token_ids" in row:
        tokens = np.asarray(row["token_ids"])
        prompt_len = _integer(row.get("prompt_len", 0), f"{where}, prompt_len")
        if prompt_len < 0:
            raise FormatError(f"{where}, prompt_len: expected tokens of the prompt, found {prompt_len}")
    elif "prompt_ids" in row and "response_ids" in row:
        prompt = np.asarray(row["prompt_ids"])
        tokens = np.concatenate([prompt, np.asarray(row["response_ids"])])
        prompt_len = len(prompt)
    else:
        raise FormatError(f"{where}: no token ids in this row")
    mask = None
    for name in ("labels", "loss_mask"):
        found = np.asarray(row[name]) if name in row else None
        if found is not None and len(found) == len(tokens):
            mask = (found >= 0) if name == "labels" else (found != 0)
            if not prompt_len and mask.any():
                prompt_len = int(mask.argmax())
            break
    return tokens, max(1, prompt_len), mask


def _not_padding(row: Mapping[str, Any], size: int, where: str) -> slice:
    """The tokens that an attention mask leaves: padding may only be at the end."""
    mask = row.get("attention_mask")
    if mask is None:
        return slice(0, size)
    mask = np.asarray(mask)
    end = int((mask != 0).sum())
    if len(mask) != size or not (mask[:end] != 0).all():
        raise FormatError(
            f"{where}, attention_mask: expected {size} values, with zeros only after the last token; padding "
            "before a rollout or inside it has to be removed first"
        )
    return slice(0, end)


def _placed(
    array: NDArray[Any], size: int, prompt_len: int, kept: slice, source_aligned: bool, where: str
) -> NDArray[Any]:
    """[R, ...] the rows about response tokens: of the response alone, of every token, or of all but one."""
    end = kept.stop
    n_rows = len(array)
    if n_rows == size and source_aligned:
        return array[prompt_len - 1 : end - 1]
    if n_rows == size:
        return array[prompt_len:end]
    if n_rows == size - prompt_len:
        return array[: end - prompt_len]
    if n_rows == size - 1:
        return array[prompt_len - 1 : end - 1]
    raise FormatError(
        f"{where}: expected {size - prompt_len} rows (one a response token), {size - 1} or {size} (one a "
        f"token), found {n_rows}"
    )


def likeliest(logits: NDArray[Any], fields: Fields, where: str) -> dict[str, NDArray[Any]]:
    """The likeliest entries of [R, V] logits as log-probs, and the exact tail."""
    if logits.ndim != 2 or logits.shape[1] < fields.vocab_size:
        raise FormatError(
            f"{where}: expected rows of {fields.vocab_size} logits or more, found {list(logits.shape)}; if "
            "these are a top-k, say where the ids are with --column topk_ids=NAME"
        )
    kept = min(fields.kept, logits.shape[1])
    ids = np.empty((len(logits), kept), np.int64)
    logprob, tail = np.empty(ids.shape), np.empty(len(ids))
    rows = max(1, _MOST_LOGITS // logits.shape[1])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        values = logits[part].astype(np.float64)
        values -= values.max(axis=1, keepdims=True)
        values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
        order = np.argpartition(-values, kept - 1, axis=1)
        ids[part] = order[:, :kept]
        logprob[part] = np.take_along_axis(values, order[:, :kept], 1)
        with np.errstate(divide="ignore"):
            tail[part] = np.log(np.exp(np.take_along_axis(values, order[:, kept:], 1)).sum(axis=1))
    return {"topk_ids": ids, "topk_logprob": logprob, "log_tail": tail}


def _logprob(arrays: Mapping[str, NDArray[Any]], where: str) -> NDArray[Any] | None:
    if "topk_logprob" in arrays or "topk_logits" not in arrays:
        return arrays.get("topk_logprob")
    logits = arrays["topk_logits"]
    if "logsumexp" not in arrays:
        return logits
    total = arrays["logsumexp"]
    if len(total) != len(logits):
        raise FormatError(f"{where}, logsumexp: {len(total)} values for {len(logits)} rows of logits")
    return np.asarray(logits, np.float64) - np.asarray(total, np.float64)[:, None]


def _integer(value: Any, where: str) -> int:  # noqa: ANN401
    """A whole number, which tables with missing ones hold as a float. Raises FormatError."""
    if isinstance(value, str) or not float(value).is_integer():
        raise FormatError(f"{where}: expected an integer, found {value!s:.40}")
    return int(value)


def _number(value: Any, where: str) -> float:  # noqa: ANN401
    if isinstance(value, str):
        raise FormatError(f"{where}: expected a number, found {value!r:.40}")
    return float(value)


def _scalars(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in found.items():
        if name in ("sample_id", "label"):
            values[name] = str(value)
        elif name == "finish_reason":
            values[name] = value if value in FINISH_REASONS else "unknown"
        else:
            read = _integer if name == "policy_version" else _number
            values[name] = read(value, f"{where}, {name}")
    return values
