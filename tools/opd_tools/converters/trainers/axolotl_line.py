"""One line of Axolotl's data: tokens, and rows for all of them or for the last ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError, InvalidArgumentError
from opd_tools.converters.core.format import ReadSettings
from opd_tools.converters.core.record import NO_ENTRY, Tally
from opd_tools.converters.core.support import FILLER
from opd_tools.converters.reading.json_rows import integers, name_of, padded
from opd_tools.converters.reading.text import TextTokenizer

_BY_ID = "token_id:"
UNTRAINED = -100
"""Label of a token that is not trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line: L tokens and L rows, which lie as the file has them."""

    where: str
    tokens: NDArray[np.int64]
    trained: NDArray[np.bool_] | None
    """[L] tokens to train on, None if the file does not tell."""
    ids: NDArray[np.int64]
    logprob: NDArray[np.float64]
    whole: bool
    """Whether there was a row for each token; else they are the last tokens' own."""
    name: str | None

    @property
    def filled(self) -> NDArray[np.bool_]:
        """[L] rows with at least one entry."""
        there = (self.ids != NO_ENTRY) & (self.logprob > FILLER)
        return np.asarray(there.any(axis=1))


def objects_field(line: Mapping[str, Any]) -> str | None:
    """The field with rows of objects, whatever it is called."""
    for name, value in line.items():
        if isinstance(value, list):
            row = next((row for row in value if isinstance(row, list) and row), None)
            if row and isinstance(row[0], dict) and str(row[0].get("token", "")).startswith(_BY_ID):
                return name
    return None


def parser(settings: ReadSettings, tally: Tally) -> Callable[[Any, str], Line]:
    """What makes a `Line` of a JSON value and its place.

    It raises FormatError for another layout, and InvalidArgumentError where text has no tokenizer.
    """
    tokenizer: TextTokenizer | None = None

    def tokens_of(line: Mapping[str, Any], where: str) -> NDArray[np.int64]:
        nonlocal tokenizer
        if line.get("input_ids") is not None:
            return integers(line["input_ids"], where, "input_ids")
        messages = next((value for value in line.values() if _is_messages(value)), None)
        if messages is None:
            raise FormatError(f"{where}: neither input_ids nor messages")
        if tokenizer is None:
            if settings.tokenizer is None:
                raise InvalidArgumentError(f"{where}: tokens are messages; give --tokenizer")
            tokenizer = TextTokenizer(settings.tokenizer)
        tally["conversations that were text, encoded again"] += 1
        return tokenizer.chat(messages, line.get("tools"), where, answer=False)

    def parse(line: Any, where: str) -> Line:  # noqa: ANN401
        if not isinstance(line, dict):
            raise FormatError(f"{where}: expected an object, found {type(line).__name__}")
        tokens = tokens_of(line, where)
        if (field := objects_field(line)) is not None:
            rows = [row or [] for row in line[field]]
            values = [[entry["logprob"] for entry in row] for row in rows]
            found = [[int(entry["token"].partition(":")[2]) for entry in row] for row in rows]
        elif "target_token_ids" in line:
            found = line["target_token_ids"]
            values = line["target_logprobs"] if "target_logprobs" in line else line["logprobs"]
        else:
            raise FormatError(f"{where}: neither target_token_ids nor rows of {_BY_ID}N")
        ids, logprob = padded(found, values, where)
        missing = len(tokens) - len(ids)
        if missing < 0:
            raise FormatError(f"{where}: {len(tokens)} tokens, but {len(ids)} rows")
        ids = np.pad(ids, ((missing, 0), (0, 0)), constant_values=NO_ENTRY)
        logprob = np.pad(logprob, ((missing, 0), (0, 0)), constant_values=-np.inf)
        rows_of = Line(
            where=where,
            tokens=tokens,
            trained=_trained(line, len(tokens), where),
            ids=ids,
            logprob=logprob,
            whole=not missing,
            name=name_of(line.get("sample_id"), line.get("id")),
        )
        return _without_padding(rows_of, line)

    return parse


def _is_messages(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _trained(line: Mapping[str, Any], size: int, where: str) -> NDArray[np.bool_] | None:
    if line.get("labels") is None:
        return None
    labels = integers(line["labels"], where, "labels")
    if len(labels) != size:
        raise FormatError(f"{where}: {size} tokens, but {len(labels)} labels")
    return np.asarray(labels != UNTRAINED)


def _without_padding(rows: Line, line: Mapping[str, Any]) -> Line:
    """Without the tokens that attention_mask leaves out at either end."""
    if line.get("attention_mask") is None:
        return rows
    attended = np.flatnonzero(integers(line["attention_mask"], rows.where, "attention_mask"))
    if len(attended) == len(rows.tokens):
        return rows
    if (
        not len(attended)
        or attended[-1] - attended[0] + 1 != len(attended)
        or attended[-1] >= len(rows.tokens)
    ):
        raise FormatError(f"{rows.where}: attention_mask does not cover one run of tokens")
    kept = slice(int(attended[0]), int(attended[-1]) + 1)
    return Line(
        where=rows.where,
        tokens=rows.tokens[kept],
        trained=None if rows.trained is None else rows.trained[kept],
        ids=rows.ids[kept],
        logprob=rows.logprob[kept],
        whole=rows.whole,
        name=rows.name,
    )
