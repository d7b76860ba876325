"""JSON lines of our own, a rollout a line in plain arrays: for `jq`, and for programs without Arrow."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import NO_ID, RENORMALISED_TOPK, Cache, FormatError, Rollout
from opd_store.rollout import Scalar
from opd_tools.converters.core.format import Format, ReadSettings, WriteSettings
from opd_tools.converters.core.record import Contents, Record, Values
from opd_tools.converters.core.source import Source
from opd_tools.converters.plain.table_export import known_error
from opd_tools.converters.reading.arrow_lists import padded

LAYOUT = "opd-rollout/1"
"""Value of `format` in every line."""
_ALIKE = ("values", "max_error")
"""What all lines have to agree on."""
_FLOATS = ("teacher_logprob", "behaviour_logprob", "reference_logprob")
_SCANNED = 1000
"""Lines whose `x_*` values tell the types of user columns."""
_TYPES = {bool: "bool", int: "int64", float: "float64", str: "utf8"}


def detect(source: Source) -> bool:
    """Whether the first line says so."""
    first = source.first_json()
    return isinstance(first, dict) and first.get("format") == LAYOUT


def read(source: Source, settings: ReadSettings) -> Contents:
    """Raises FormatError: other lines than ours."""
    del settings
    first = source.first_json()
    if not isinstance(first, dict) or first.get("format") != LAYOUT:
        raise FormatError(f"{source.uri}: no JSON lines with format {LAYOUT!r}")
    heads = (value for name in source.json_names() for _, value in source.json_values(name))
    columns: dict[str, str] = {}
    for value in islice(heads, _SCANNED):
        for name in value.keys() - columns.keys() if isinstance(value, dict) else ():
            if name.startswith("x_") and type(value[name]) in _TYPES:
                columns[name] = _TYPES[type(value[name])]
    topk = first.get("topk")
    renormalised = first.get("values") == Values.RENORMALISED
    return Contents(
        records=_records(source, columns, {name: first.get(name) for name in _ALIKE}),
        topk=topk if isinstance(topk, int) else 0,
        values=Values.RENORMALISED if renormalised else Values.LOGPROBS,
        max_error=known_error(first.get("max_error")),
        columns=columns,
    )


def _records(source: Source, columns: Mapping[str, str], head: Mapping[str, Any]) -> Iterator[Record]:
    for name in source.json_names():
        for where, value in source.json_values(name):
            if not isinstance(value, dict) or value.get("format") != LAYOUT:
                raise FormatError(f"{where}: no rollout; expected an object with format {LAYOUT!r}")
            if any(value.get(name) != stated for name, stated in head.items()):
                raise FormatError(
                    f"{where}: {' or '.join(_ALIKE)} is another than in the first line; this is a rollout of "
                    "another cache, convert them one by one"
                )
            try:
                yield _record(value, columns, where)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise FormatError(
                    f"{where}: a field is missing or of another type: {error!s:.100}"
                ) from error


def _record(line: dict[str, Any], columns: Mapping[str, str], where: str) -> Record:
    ids = logprob = None
    if line.get("topk_ids") is not None:
        ids = _rows(line["topk_ids"], np.int64, where)
        logprob = _rows(line["topk_logprob"], np.float64, where)
    floats = {name: _floats(line[name]) for name in _FLOATS if line.get(name) is not None}
    mask = line.get("loss_mask")
    extra: dict[str, Scalar] = {name: line[name] for name in columns if line.get(name) is not None}
    for name in ("sample_id", "label"):
        if not isinstance(line.get(name), str | None):
            raise TypeError(f"{name} is no text")
    return Record(
        where=where,
        token_ids=_integers(line["token_ids"]),
        prompt_len=_integer(line["prompt_len"]),
        topk_ids=ids,
        topk_logprob=logprob,
        log_tail=None if line.get("log_tail") is None else _floats(line["log_tail"], null=-np.inf),
        loss_mask=None if mask is None else _mask(mask),
        sample_id=line.get("sample_id"),
        finish_reason=line.get("finish_reason", "unknown"),
        policy_version=line.get("policy_version"),
        reward=line.get("reward"),
        label=line.get("label"),
        extra=extra,
        **floats,
    )


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an integer, found {value!r:.40}")
    return value


def _mask(values: list[Any]) -> NDArray[np.bool_]:
    found = np.asarray(values)
    if found.ndim != 1 or found.dtype.kind not in "bi" or not np.isin(found, (0, 1)).all():
        raise TypeError("expected a list of 0 and 1")
    return found.astype(np.bool_)


def _integers(values: list[Any]) -> NDArray[np.int64]:
    found = np.asarray(values)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise TypeError("expected a list of integers")
    return found.astype(np.int64)


def _floats(values: list[float | None], null: float = np.nan) -> NDArray[np.float64]:
    return np.asarray([null if value is None else value for value in values], np.float64)


def _rows(values: list[list[Any]], kind: type, where: str) -> NDArray[Any]:
    widths = np.fromiter(map(len, values), np.int64, len(values))
    flat = np.asarray([value for row in values for value in row])
    if flat.ndim != 1 or (len(flat) and flat.dtype.kind not in ("iu" if kind is np.int64 else "iuf")):
        raise TypeError("expected lists of numbers")
    return padded(flat.astype(kind), widths, where)


def write(cache: Cache, out: Path, settings: WriteSettings, on_progress: Callable[[int, int], None]) -> None:
    """One file, gzip if its name ends in .gz. Numbers have the digits that give the same float32 back."""
    head: dict[str, Any] = {"format": LAYOUT, "max_error": cache.max_error}
    topk = min(cache.topk, settings.topk or cache.topk)
    if topk:
        mode = None if cache.meta.teacher is None else cache.meta.teacher.logprob_mode
        values = Values.RENORMALISED if mode == RENORMALISED_TOPK else Values.LOGPROBS
        head |= {"topk": topk, "values": values.value}
    packed = out.name.removesuffix(".partial").endswith(".gz")
    with gzip.open(out, "wb", 6) if packed else out.open("wb") as file:
        for done, rollout in enumerate(cache.scan(ranks=settings.ranks(cache)), 1):
            file.write((_line(head, rollout) + "\n").encode())
            on_progress(done, len(cache))


def _line(head: Mapping[str, Any], rollout: Rollout) -> str:
    scalars = {
        **head,
        "sample_id": rollout.sample_id,
        "prompt_len": rollout.prompt_len,
        "finish_reason": rollout.finish_reason,
        "policy_version": rollout.policy_version,
        "reward": rollout.reward,
        "label": rollout.label,
        **rollout.extra,
    }
    mask = rollout.loss_mask
    scalars["token_ids"] = rollout.token_ids.tolist()
    scalars["loss_mask"] = None if mask is None else mask.astype(int).tolist()
    parts = [json.dumps({name: value for name, value in scalars.items() if value is not None})[:-1]]
    for name in (*_FLOATS, "log_tail"):
        values = getattr(rollout, name)
        if values is not None:
            parts.append(f'"{name}": [{", ".join(map(_shortest, values))}]')
    if rollout.topk_ids is not None and rollout.topk_logprob is not None:
        widths = (rollout.topk_ids != NO_ID).sum(axis=1).tolist()
        ids = [row[:width] for row, width in zip(rollout.topk_ids.tolist(), widths, strict=True)]
        rows = [
            f"[{', '.join(map(_shortest, row[:width]))}]"
            for row, width in zip(rollout.topk_logprob, widths, strict=True)
        ]
        parts += [f'"topk_ids": {json.dumps(ids)}', f'"topk_logprob": [{", ".join(rows)}]']
    return ", ".join(parts) + "}"


def _shortest(value: np.float32) -> str:
    """The fewest digits that are this float32 again; JSON has no infinity, and null stands for it."""
    return str(value) if value > -np.inf else "null"


FORMAT = Format(
    name="jsonl",
    title="JSON lines",
    alignment="label: row t of the response is about its token t",
    keeps="every field of a rollout bit for bit, top-k rows without padding, user columns",
    loses="ids chosen by the student and drawn from the teacher; which of several teachers scored a rollout",
    tested="round trips",
    detect=detect,
    read=read,
    write=write,
)
