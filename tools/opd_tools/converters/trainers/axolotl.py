"""Axolotl's knowledge distillation data: rows of `token_id:N` objects, or target_token_ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError
from opd_tools.converters.core.alignment import Evidence
from opd_tools.converters.core.format import Format, ReadSettings
from opd_tools.converters.core.record import NO_ENTRY, Contents, Record, Tally, Values
from opd_tools.converters.core.source import Source
from opd_tools.converters.reading.json_rows import json_values, records
from opd_tools.converters.reading.parquet import record_batches, schema_of
from opd_tools.converters.trainers.axolotl_export import write
from opd_tools.converters.trainers.axolotl_line import Line, objects_field, parser

_LOOKED_AT = 4096
"""Positions that decide how rows lie, and whether they are renormalised."""
_FEWEST = 16
_EXACTLY_1 = 1e-4
"""How near 1 the probabilities of every row lie where they are renormalised."""


def detect(source: Source) -> bool:
    """Whether the first line has target_token_ids, or a list of `token_id:N` rows; or a table the former."""
    schema = schema_of(source)
    if schema is not None:
        return {"input_ids", "target_token_ids", "target_logprobs"} <= set(schema.names)
    first = source.first_json()
    return isinstance(first, dict) and ("target_token_ids" in first or objects_field(first) is not None)


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

    parse = parser(settings, tally)
    return records(source, one, _values)


def _values(source: Source) -> Iterator[tuple[str, Any]]:
    """Lines of JSON, or rows of the Parquet or Arrow files that `axolotl preprocess` leaves."""
    return json_values(source) if schema_of(source) is None else record_batches(source)


def _looked_at(source: Source, settings: ReadSettings) -> tuple[int, int, bool]:
    """From the first lines: entries of the widest row; 1 if row t is about token t + 1, 0 if about token t;
    whether probabilities are renormalised."""
    parse = parser(settings, Tally())
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


def _record(rows: Line, late: int, tally: Tally) -> Record:
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
