"""What llama.cpp's server answers on /completion: `completion_probabilities`, before sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from opd_store import FormatError
from opd_tools.converters.core.format import Format, ReadSettings
from opd_tools.converters.core.record import Contents, Record, Tally
from opd_tools.converters.core.source import Source
from opd_tools.converters.reading.json_rows import (
    FINISH_REASONS,
    integers,
    name_of,
    numbers,
    padded,
    records,
    width,
)
from opd_tools.converters.servers.exchange import Prompts, exchange
from opd_tools.converters.servers.openai import response_of


def detect(source: Source) -> bool:
    """Whether the first response has `completion_probabilities`."""
    return isinstance(response_of(source.first_json()).get("completion_probabilities"), list)


def read(source: Source, settings: ReadSettings) -> Contents:
    """Log-probs are of the raw logits, at temperature 1; those after sampling are refused."""
    tally = Tally()
    return Contents(
        records=_records(source, settings, tally),
        topk=width(_records(source, settings, Tally()), settings),
        temperature=1.0,
        tally=tally,
    )


def _records(source: Source, settings: ReadSettings, tally: Tally) -> Iterator[Record]:
    prompts = Prompts(settings, tally)

    def one(value: Any, where: str) -> Iterator[Record]:  # noqa: ANN401
        said = exchange(value, where, tally)
        if said is None:
            return
        positions = said.body["completion_probabilities"]
        if not positions:
            tally["responses without a token, left out"] += 1
            return
        _require_raw(said.body, positions, where)
        rows = [position.get("top_logprobs") or [] for position in positions]
        ids, logprob = padded(
            [[entry["id"] for entry in row] for row in rows],
            [[entry["logprob"] for entry in row] for row in rows],
            where,
        )
        count = said.body.get("tokens_evaluated")
        prompt = prompts.of(said, {}, count=count if isinstance(count, int) else None)
        tokens = integers([position["id"] for position in positions], where, "ids")
        word = bool(said.body.get("stopping_word"))
        given = integers(said.body.get("tokens") or tokens.tolist(), where, "tokens")
        # Those that spell a stopping word have no probabilities.
        if not np.array_equal(given[: len(tokens)] if word else given, tokens):
            raise FormatError(f"{where}: tokens are not the ones of completion_probabilities")
        reason = FINISH_REASONS.get(str(said.body.get("stop_type")), "unknown")
        yield Record(
            where=where,
            token_ids=np.concatenate([prompt, tokens]),
            prompt_len=len(prompt),
            teacher_logprob=numbers([position["logprob"] for position in positions], where, "logprob"),
            topk_ids=ids if any(rows) else None,
            topk_logprob=logprob if any(rows) else None,
            sample_id=said.name or name_of(said.request.get("id_task")),
            finish_reason="unknown" if word else reason,
        )

    return records(source, one)


def _require_raw(body: Mapping[str, Any], positions: list[Any], where: str) -> None:
    first = positions[0]
    asked = (body.get("generation_settings") or {}).get("post_sampling_probs")
    if asked or "prob" in first or "top_probs" in first:
        raise FormatError(
            f"{where}: probabilities after sampling (post_sampling_probs), which are the sampler's and not "
            "the model's; ask again without it"
        )
    if "logprob" not in first:
        raise FormatError(
            f"{where}: completion_probabilities without token ids and log-probs, from a server before 2025"
        )


FORMAT = Format(
    name="llamacpp",
    title="llama.cpp server completions (JSON)",
    alignment="label: entry t of completion_probabilities is about generated token t",
    keeps="ids of generated tokens, their log-probs, top_logprobs, all before sampling at temperature 1",
    loses="the prompt's ids, unless the request has them: its text is encoded again",
    tested="files built from its documented layout",
    detect=detect,
    read=read,
)
