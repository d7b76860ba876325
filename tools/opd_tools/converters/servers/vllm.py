"""What vLLM answers: prompt_logprobs over HTTP, request outputs as JSON, lines of the batch runner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError
from opd_tools.converters.core.format import Format, ReadSettings
from opd_tools.converters.core.record import NO_ENTRY, Contents, Record, Tally
from opd_tools.converters.core.source import Source
from opd_tools.converters.reading.json_rows import Rows, filled, integers, numbers, records, width
from opd_tools.converters.servers.exchange import Exchange, Prompts, exchange
from opd_tools.converters.servers.openai import (
    Spelling,
    choice_name,
    dicts_in,
    finish_reason,
    generated,
    prompt_count,
    response_of,
)

_FLAT = ("start_indices", "end_indices", "token_ids", "logprobs")


def detect(source: Source) -> bool:
    """Whether the first response has log-probs of its prompt, or log-probs by token id."""
    body = response_of(source.first_json())
    places = [body, *dicts_in(body.get("choices")), *dicts_in(body.get("outputs"))]
    if any(_is_rows(place.get("prompt_logprobs")) for place in places):
        return True
    return any(_is_rows(place.get("logprobs")) or _is_text_rows(place.get("logprobs")) for place in places)


def _is_rows(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, dict):
        return set(_FLAT) <= set(value)
    return isinstance(value, list) and any(isinstance(row, dict) and _is_row(row) for row in value)


def _is_row(row: Mapping[str, Any]) -> bool:
    return all(key.lstrip("-").isdigit() and isinstance(entry, dict) for key, entry in row.items())


def _is_text_rows(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, dict) and isinstance(value.get("token_logprobs"), list)


def read(source: Source, settings: ReadSettings) -> Contents:
    """A scored sequence is the prompt of its request; more than one generated token is a response to it."""
    tally = Tally()
    return Contents(
        records=_records(source, settings, tally),
        topk=width(_records(source, settings, Tally()), settings),
        lost=("whether the server ran with --logprobs-mode raw_logprobs, its default, is not in the file",),
        tally=tally,
    )


def _records(source: Source, settings: ReadSettings, tally: Tally) -> Iterator[Record]:
    prompts = Prompts(settings, tally)
    spelling = Spelling(prompts, tally)

    def one(value: Any, where: str) -> Iterator[Record]:  # noqa: ANN401
        said = exchange(value, where, tally)
        if said is None:
            return
        choices = said.body.get("choices") or said.body.get("outputs") or [{}]
        answers = [choice for choice in choices if _has_response(choice)]
        for choice in answers:
            if (record := _answer(said, choice, prompts, spelling, tally)) is not None:
                yield record
        for choice in () if answers else choices:
            rows = choice.get("prompt_logprobs")
            yield _scored(said, choice, rows or said.body.get("prompt_logprobs"), prompts, tally)
            if not rows:  # one prompt, whatever was generated after it
                break

    return records(source, one)


def _has_response(choice: Mapping[str, Any]) -> bool:
    """Whether more than the one token that a server has to generate has log-probs."""
    found = choice.get("logprobs")
    if isinstance(found, dict):
        found = found.get("content") or found.get("token_logprobs") or found.get("start_indices")
    return isinstance(found, list) and len(found) > 1


def _answer(
    said: Exchange, choice: Mapping[str, Any], prompts: Prompts, spelling: Spelling, tally: Tally
) -> Record | None:
    """A generated response with its log-probs."""
    where = said.where
    prompt = prompts.of(said, choice, count=prompt_count(said.body))
    if choice.get("prompt_logprobs") or said.body.get("prompt_logprobs"):
        tally["log-probs of prompt tokens, left out"] += len(prompt) - 1
    found = choice["logprobs"]
    if isinstance(found, dict) and "content" in found:
        return generated(said, choice, prompt, spelling, tally)
    if _is_text_rows(found):
        return generated(said, {**choice, "logprobs": _content(found, where)}, prompt, spelling, tally)
    tokens, rows, own = _rows(found, where)
    if choice.get("token_ids") is not None:
        tokens = integers(choice["token_ids"], where, "token_ids")
    if len(tokens) != len(own):
        raise FormatError(f"{where}: {len(tokens)} generated tokens, but {len(own)} rows")
    return Record(
        where=where,
        token_ids=np.concatenate([prompt, tokens]),
        prompt_len=len(prompt),
        teacher_logprob=own,
        topk_ids=None if rows is None else rows[0],
        topk_logprob=None if rows is None else rows[1],
        sample_id=choice_name(said, choice),
        finish_reason=finish_reason(choice, stop_is_there=True),
    )


def _scored(
    said: Exchange,
    choice: Mapping[str, Any],
    found: Any,  # noqa: ANN401
    prompts: Prompts,
    tally: Tally,
) -> Record:
    """A sequence that was scored as a prompt; the token that the server generated after it is nobody's."""
    where = said.where
    if not found:
        raise FormatError(
            f"{where}: neither prompt_logprobs nor more than one generated token with log-probs"
        )
    tokens = prompts.of(said, choice, count=prompt_count(said.body))
    owns, rows, own = _rows(found, where)
    if len(tokens) != len(own):
        raise FormatError(f"{where}: {len(tokens)} tokens, but {len(own)} rows of prompt_logprobs")
    if owns[0] != NO_ENTRY:
        raise FormatError(f"{where}: prompt_logprobs of the first token, which has none")
    prompt_len = said.request.get("prompt_len")
    if prompt_len is None:
        tally["rollouts without a border between prompt and response: all but the first token counts"] += 1
        prompt_len = 1
    if not isinstance(prompt_len, int) or not 1 <= prompt_len < len(tokens):
        raise FormatError(f"{where}: prompt_len {prompt_len!r:.40} of {len(tokens)} tokens")
    return Record(
        where=where,
        token_ids=tokens,
        prompt_len=prompt_len,
        # The first entry of a row is the token itself. Where it is another one, rows are about other tokens,
        # which shows later.
        teacher_logprob=np.where(owns == tokens, own, np.nan)[prompt_len:],
        topk_ids=None if rows is None else rows[0][prompt_len:],
        topk_logprob=None if rows is None else rows[1][prompt_len:],
        sample_id=choice_name(said, choice),
    )


def _content(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Log-probs of /v1/completions, which are by text, as those of chat completions."""
    if found["token_logprobs"][0] is None:
        raise FormatError(f"{where}: an echoed prompt; ask for prompt_logprobs instead, which has token ids")
    rows = found.get("top_logprobs") or [None] * len(found["tokens"])
    return {
        "content": [
            {
                "token": token,
                "logprob": own,
                "top_logprobs": [{"token": text, "logprob": value} for text, value in (row or {}).items()],
            }
            for token, own, row in zip(found["tokens"], found["token_logprobs"], rows, strict=True)
        ]
    }


def _rows(
    value: Any,  # noqa: ANN401
    where: str,
) -> tuple[NDArray[np.int64], Rows | None, NDArray[np.float64]]:
    """What a list of rows, nested or flat, holds.

    Returns:
        [R] the first id of each row, `NO_ENTRY` where it has none; [R, k] ids and log-probs without a first
        token that is not among the likeliest, None if only these were asked for; [R] log-probs of the first.
    """
    flat_ids, flat, ranks, sizes = (_flat if isinstance(value, dict) else _nested)(value, where)
    has = sizes > 0
    firsts = (np.cumsum(sizes) - sizes)[has]
    owns, own = np.full(len(sizes), NO_ENTRY, np.int64), np.full(len(sizes), np.nan)
    owns[has], own[has] = flat_ids[firsts], flat[firsts]
    # The token itself comes first. Its rank tells whether it is one of the likeliest, which follow.
    kept = np.ones(len(flat_ids), np.bool_)
    kept[firsts] = ~(ranks[firsts] > sizes[has])
    n_kept = sizes.copy()
    n_kept[has] -= ~kept[firsts]
    rows = filled(flat_ids[kept], flat[kept], n_kept, where) if (n_kept[has] > 0).all() else None
    return owns, rows, own


_Flat = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]


def _nested(value: Any, where: str) -> _Flat:  # noqa: ANN401
    keys: list[str] = []
    entries: list[Any] = []
    for row in value:
        if row:
            keys += row
            entries += row.values()
    if entries and isinstance(entries[0], list):  # objects dumped as lists of their fields
        logprobs, ranks = [entry[0] for entry in entries], [entry[1] for entry in entries]
    else:
        logprobs = [entry["logprob"] for entry in entries]
        ranks = [entry.get("rank") for entry in entries]
    return (
        np.array(list(map(int, keys)), np.int64),
        numbers(logprobs, where, "logprob"),
        numbers(ranks, where, "rank"),
        np.array([len(row or ()) for row in value], np.int64),
    )


def _flat(value: Mapping[str, Any], where: str) -> _Flat:
    starts, ends, ids = (integers(value[name], where, name) for name in _FLAT[:3])
    logprobs = numbers(value["logprobs"], where, "logprobs")
    sizes = ends - starts
    contiguous = len(starts) == len(ends) and (starts[1:] == ends[:-1]).all() and (sizes >= 0).all()
    if not contiguous or len(ids) != len(logprobs) or (len(ends) and (starts[0] or ends[-1] != len(ids))):
        raise FormatError(f"{where}: flat log-probs whose rows do not lie end to end")
    ranks = value.get("ranks")
    given = numbers(ranks, where, "ranks") if ranks else np.full(len(ids), np.nan)
    if len(given) != len(ids):
        raise FormatError(f"{where}: {len(given)} ranks of {len(ids)} entries")
    # A token that is among the likeliest is there twice in this form.
    first = np.zeros(len(ids), np.bool_)
    first[starts[sizes > 0]] = True
    row = np.repeat(np.arange(len(sizes)), sizes)
    same = np.zeros(len(ids), np.bool_)
    same[~first] = (ids == ids[starts[row]])[~first] if len(ids) else False
    same &= ~first
    sizes = sizes - np.bincount(row[same], minlength=len(sizes)).astype(np.int64)
    return ids[~same], logprobs[~same], given[~same], sizes


FORMAT = Format(
    name="vllm",
    title="vLLM responses and request outputs (JSON)",
    alignment="label: row t of prompt_logprobs is about token t of the prompt, row 0 is empty; rows of "
    "generated tokens are about these",
    keeps="token ids, log-probs of the tokens themselves, the likeliest ranks of each row",
    loses="log-probs of the prompt where there is a response; the border between prompt and response of a "
    "scored sequence, unless a line has prompt_len; the log-probs' mode",
    tested="files built from its documented layout",
    detect=detect,
    read=read,
)
