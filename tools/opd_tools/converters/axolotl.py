"""Axolotl's knowledge distillation data: rows of `token_id:N` objects, or target_token_ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import NO_ID, Cache, FormatError, InvalidArgumentError, Rollout
from opd_tools.converters.alignment import Evidence
from opd_tools.converters.formats import Format, ReadSettings, WriteSettings
from opd_tools.converters.json_rows import integers, json_values, name_of, padded, records
from opd_tools.converters.normalise import FILLER
from opd_tools.converters.parquet import record_batches, schema_of
from opd_tools.converters.record import NO_ENTRY, Contents, Record, Tally, Values
from opd_tools.converters.source import Source
from opd_tools.converters.table_export import ranks_of
from opd_tools.converters.text import TextTokenizer

_BY_ID = "token_id:"
_UNTRAINED = -100
_LOOKED_AT = 4096
"""Positions that decide how rows lie, and whether they are renormalised."""
_FEWEST = 16
_EXACTLY_1 = 1e-4
"""How near 1 the probabilities of every row lie where they are renormalised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
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


def detect(source: Source) -> bool:
    """Whether the first line has target_token_ids, or a list of `token_id:N` rows; or a table the former."""
    schema = schema_of(source)
    if schema is not None:
        return {"input_ids", "target_token_ids", "target_logprobs"} <= set(schema.names)
    first = source.first_json()
    return isinstance(first, dict) and ("target_token_ids" in first or _v1_field(first) is not None)


def _v1_field(line: Mapping[str, Any]) -> str | None:
    """The field with rows of objects, whatever it is called."""
    for name, value in line.items():
        if isinstance(value, list):
            row = next((row for row in value if isinstance(row, list) and row), None)
            if row and isinstance(row[0], dict) and str(row[0].get("token", "")).startswith(_BY_ID):
                return name
    return None


def read(source: Source, settings: ReadSettings) -> Contents:
    """How rows lie, and whether they are renormalised, is asked of the first few thousand."""
    tally = Tally()
    topk, late, renormalised = _looked_at(source, settings)
    lost = ["the temperature that log-probs were rescaled to (kd_temperature) is not in the file"]
    if renormalised:
        lost.append("log-probs are renormalised over the entries: the tail is gone")
    return Contents(
        records=_records(source, settings, tally, late),
        topk=topk,
        values=Values.RENORMALISED if renormalised else Values.LOGPROBS,
        lost=tuple(lost),
        tally=tally,
    )


def _records(source: Source, settings: ReadSettings, tally: Tally, late: int) -> Iterator[Record]:
    def one(line: Any, where: str) -> Iterator[Record]:  # noqa: ANN401
        yield _record(parse(line, where), late, tally)

    parse = _parser(settings, tally)
    return records(source, one, _values)


def _values(source: Source) -> Iterator[tuple[str, Any]]:
    """Lines of JSON, or rows of the Parquet or Arrow files that `axolotl preprocess` leaves."""
    return json_values(source) if schema_of(source) is None else record_batches(source)


def _looked_at(source: Source, settings: ReadSettings) -> tuple[int, int, bool]:
    """From the first lines: entries of the widest row; 1 if row t is about token t + 1, 0 if about token t;
    whether probabilities are renormalised."""
    parse = _parser(settings, Tally())
    topk = positions = 0
    can_be: NDArray[np.bool_] = np.array([True, True])
    evidence = Evidence()
    off = full = 0
    first_place = ""

    def one(line: Any, where: str) -> Iterator[Any]:  # noqa: ANN401
        yield parse(line, where)

    for rows in records(source, one, _values):
        first_place = first_place or rows.where
        topk = max(topk, rows.ids.shape[1])
        filled = rows.filled
        if not rows.whole:
            can_be[1] = False
        elif rows.trained is not None:
            about = np.flatnonzero(rows.trained[1:]) + 1
            can_be &= [bool(filled[about].all()), bool(filled[about - 1].all())]
        elif not (filled[0] and filled[-1]):  # where both are, one of them is a dummy
            can_be &= [not filled[0], not filled[-1]]
        if can_be[1]:
            evidence.look(_record(rows, 1, Tally()))
        mass = np.exp(np.where(rows.ids == NO_ENTRY, -np.inf, np.minimum(rows.logprob, 1.0))).sum(axis=1)[
            filled
        ]
        full += len(mass)
        off += int((np.abs(mass - 1) > _EXACTLY_1).sum())
        positions += len(rows.tokens)
        if positions >= _LOOKED_AT and (settings.topk is None or settings.topk <= topk):
            break
    if not can_be.any():
        raise FormatError(
            f"{first_place}: rows are missing for tokens to train on, whether row t is about token t or t + 1"
        )
    # Where both can be, the trainer's own convention, unless the rows say otherwise.
    late = 0 if not can_be[1] or (can_be[0] and evidence.shift() == -1) else 1
    return topk, late, full >= _FEWEST and not off


def _record(rows: _Rows, late: int, tally: Tally) -> Record:
    size = len(rows.tokens)
    if rows.trained is not None and rows.trained[1:].any():
        prompt_len = int(np.argmax(rows.trained[1:])) + 1
    else:
        filled = rows.filled[1 - late : size - late]
        prompt_len = int(np.argmax(filled)) + 1
        tally["rollouts without a border between prompt and response: tokens with a row count"] += 1
    between = slice(prompt_len - late, size - late)
    mask = None if rows.trained is None else rows.trained[prompt_len:]
    return Record(
        where=rows.where,
        token_ids=rows.tokens,
        prompt_len=prompt_len,
        topk_ids=rows.ids[between],
        topk_logprob=rows.logprob[between],
        loss_mask=None if mask is None or mask.all() else mask,
        sample_id=rows.name,
    )


def _parser(settings: ReadSettings, tally: Tally) -> Callable[[Any, str], _Rows]:
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

    def parse(line: Any, where: str) -> _Rows:  # noqa: ANN401
        if not isinstance(line, dict):
            raise FormatError(f"{where}: expected an object, found {type(line).__name__}")
        tokens = tokens_of(line, where)
        if (field := _v1_field(line)) is not None:
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
        rows_of = _Rows(
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
    return np.asarray(labels != _UNTRAINED)


def _without_padding(rows: _Rows, line: Mapping[str, Any]) -> _Rows:
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
    return _Rows(
        where=rows.where,
        tokens=rows.tokens[kept],
        trained=None if rows.trained is None else rows.trained[kept],
        ids=rows.ids[kept],
        logprob=rows.logprob[kept],
        whole=rows.whole,
        name=rows.name,
    )


def write(cache: Cache, out: Path, settings: WriteSettings, on_progress: Callable[[int, int], None]) -> None:
    """One JSONL file as the trainer takes it: row t is about token t + 1, since it shifts labels only."""
    columns = ("topk_ids", "topk_logprob", "log_tail", "loss_mask", "sample_id")
    with out.open("w", encoding="ascii") as file:
        for done, rollout in enumerate(cache.scan(columns=columns, ranks=ranks_of(cache, settings.topk)), 1):
            if rollout.topk_ids is None:
                raise InvalidArgumentError("axolotl: the cache has no top-k")
            file.write(_line(rollout))
            if done % 64 == 0 or done == len(cache):
                on_progress(done, len(cache))


def _line(rollout: Rollout) -> str:
    assert rollout.topk_ids is not None
    assert rollout.topk_logprob is not None
    size, first = len(rollout.token_ids), rollout.prompt_len - 1
    kept = rollout.topk_ids != NO_ID
    counts = kept.sum(axis=1).tolist()
    tokens = rollout.token_ids.tolist()
    mask = [True] * rollout.response_len if rollout.loss_mask is None else rollout.loss_mask.tolist()
    labels = [_UNTRAINED] * rollout.prompt_len
    labels += [
        token if on else _UNTRAINED for token, on in zip(tokens[rollout.prompt_len :], mask, strict=True)
    ]
    # Nine digits tell every float32; a row of the trainer's own padding where there is none.
    values = [[f"{value:.9g}" for value in row] for row in rollout.topk_logprob.tolist()]
    ids = [list(map(str, row)) for row in rollout.topk_ids.tolist()]

    def rows(cells: list[list[str]], empty: str) -> str:
        inner = [f"[{','.join(row[:count])}]" for row, count in zip(cells, counts, strict=True)]
        return f"[{','.join([f'[{empty}]'] * first + inner + [f'[{empty}]'])}]"

    on_off = [["1" if on else "0"] * count for on, count in zip(mask, counts, strict=True)]
    fields = {
        "input_ids": json.dumps(tokens),
        "labels": json.dumps(labels),
        "attention_mask": json.dumps([1] * size),
        "target_token_ids": rows(ids, "0"),
        "target_logprobs": rows(values, "-1e9"),
        "target_mask": rows(on_off, "0"),
    }
    if rollout.sample_id is not None:
        fields["sample_id"] = json.dumps(rollout.sample_id)
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}\n"


FORMAT = Format(
    name="axolotl",
    title="Axolotl knowledge distillation data (JSONL; read also from Parquet and Arrow)",
    alignment="asked of the file: rows for the last tokens only are label-aligned; rows for all are "
    "source-aligned, row t about token t + 1, unless labels or the likeliest entries say label. Written: "
    "source",
    keeps="token ids, labels as a loss mask, log-probs of the entries",
    loses="the tail and log-probs of the tokens themselves, unless an entry has them; log-probs that Axolotl "
    "itself prepared are renormalised; behaviour log-probs",
    tested="files that its own loading code made, and files built from its documented layout",
    detect=detect,
    read=read,
    write=write,
)
