"""What SGLang's /generate answers: log-probs in `meta_info`, rows nested or flat."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError
from opd_tools.converters.core.format import Format, ReadSettings
from opd_tools.converters.core.record import Contents, Record, Tally
from opd_tools.converters.core.source import Source
from opd_tools.converters.reading.json_rows import (
    FINISH_REASONS,
    Rows,
    filled,
    integers,
    name_of,
    numbers,
    padded,
    records,
    width,
)
from opd_tools.converters.servers.exchange import Exchange, exchange
from opd_tools.converters.servers.openai import response_of


def detect(source: Source) -> bool:
    """Whether the first response has SGLang's log-probs."""
    meta = response_of(source.first_json()).get("meta_info")
    return isinstance(meta, dict) and not {"input_token_logprobs", "output_token_logprobs"}.isdisjoint(meta)


def read(source: Source, settings: ReadSettings) -> Contents:
    """A scored sequence is the input; more than one generated token is a response to it."""
    tally = Tally()
    generated, temperature = _generation(source)
    return Contents(
        records=_records(source, tally, temperature),
        topk=width(_records(source, Tally(), temperature), settings),
        temperature=temperature,
        lost=(
            ("the temperature that log-probs of generated tokens are at is not in the file",)
            if generated and temperature is None
            else ()
        ),
        tally=tally,
    )


def _generation(source: Source) -> tuple[bool, float | None]:
    """Whether the first response was generated, and at which temperature its log-probs are."""

    def one(value: Any, where: str) -> Iterator[tuple[bool, float | None]]:  # noqa: ANN401
        said = exchange(value, where, Tally())
        if said is not None:
            generated = _is_generated(said.body["meta_info"])
            yield generated, _temperature(said) if generated else None

    return next(records(source, one), (False, None))


def _temperature(said: Exchange) -> float | None:
    sampling = said.request.get("sampling_params")
    value = sampling.get("temperature", 1.0) if isinstance(sampling, dict) else None
    # Greedy decoding scales nothing.
    return None if value is None else float(value) or 1.0


def _is_generated(meta: Mapping[str, Any]) -> bool:
    return len(meta.get("output_token_logprobs") or ()) > 1


def _records(source: Source, tally: Tally, temperature: float | None) -> Iterator[Record]:
    def one(value: Any, where: str) -> Iterator[Record]:  # noqa: ANN401
        said = exchange(value, where, tally)
        if said is None:
            return
        meta = said.body["meta_info"]
        if not _is_generated(meta):
            yield _scored(said, meta, tally)
            return
        if temperature is not None and _temperature(said) != temperature:
            raise FormatError(
                f"{where}: sampled at temperature {_temperature(said)}, but the first response at "
                f"{temperature}; convert them one by one"
            )
        yield _answer(said, meta)

    return records(source, one)


def _scored(said: Exchange, meta: Mapping[str, Any], tally: Tally) -> Record:
    own, ids = _tokens(meta["input_token_logprobs"], said.where)
    sequence = _input_ids(said, meta, ids)
    missing = len(sequence) - len(ids)
    if not np.isnan(own[:1]).all():
        raise FormatError(f"{said.where}: input_token_logprobs has a log-prob of its first token")
    rows = _rows(meta, "input", said.where, len(ids))
    first = 1
    prompt_len = said.request.get("prompt_len")
    if prompt_len is None:
        prompt_len = missing + first
        if not missing:
            tally[
                "rollouts without a border between prompt and response: all but the first token counts"
            ] += 1
    if not isinstance(prompt_len, int) or not missing + first <= prompt_len < len(sequence):
        raise FormatError(f"{said.where}: prompt_len {prompt_len!r:.40} of {len(sequence)} tokens")
    start = prompt_len - missing
    return Record(
        where=said.where,
        token_ids=sequence,
        prompt_len=prompt_len,
        teacher_logprob=own[start:],
        topk_ids=None if rows is None else rows[0][start:],
        topk_logprob=None if rows is None else rows[1][start:],
        sample_id=_name(said, meta),
    )


def _answer(said: Exchange, meta: Mapping[str, Any]) -> Record:
    own, ids = _tokens(meta["output_token_logprobs"], said.where)
    _, known = _tokens(meta.get("input_token_logprobs") or (), said.where)
    prompt = _input_ids(said, meta, known)
    rows = _rows(meta, "output", said.where, len(ids))
    finish = meta.get("finish_reason")
    finish = finish if isinstance(finish, dict) else {"type": finish}
    reason = FINISH_REASONS.get(str(finish.get("type")), "unknown")
    if reason == "stop" and finish.get("matched") != ids[-1]:
        reason = "unknown"  # a stop string, or a stop token that was left out
    return Record(
        where=said.where,
        token_ids=np.concatenate([prompt, ids]),
        prompt_len=len(prompt),
        teacher_logprob=own,
        topk_ids=None if rows is None else rows[0],
        topk_logprob=None if rows is None else rows[1],
        sample_id=_name(said, meta),
        finish_reason=reason,
    )


def _name(said: Exchange, meta: Mapping[str, Any]) -> str | None:
    return said.name or name_of(meta.get("id"))


def _tokens(value: Any, where: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:  # noqa: ANN401
    """Log-probs, NaN where there is none, and ids of [log-prob, id, text] triples."""
    own = numbers([entry[0] for entry in value], where, "log-prob")
    return own, integers([entry[1] for entry in value], where, "token ids")


def _input_ids(said: Exchange, meta: Mapping[str, Any], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """All ids of the input, of which `known` are the last."""
    given = said.request.get("input_ids")
    count = meta.get("prompt_tokens")
    if given is not None:
        ids = integers(given, said.where, "input_ids")
        if len(known) and not np.array_equal(ids[len(ids) - len(known) :], known):
            raise FormatError(f"{said.where}: input_ids are not the tokens of input_token_logprobs")
        return ids
    if not len(known) or (count is not None and count != len(known)):
        raise FormatError(
            f"{said.where}: {len(known)} tokens of the input are in the file, of {count or 'more'}; ask with "
            "logprob_start_len 0, or add input_ids to each line"
        )
    return known


def _rows(meta: Mapping[str, Any], side: str, where: str, size: int) -> Rows | None:
    """[size, k] ids and log-probs of one side, None where no top-k was asked for."""
    nested = meta.get(f"{side}_top_logprobs")
    shape = meta.get(f"{side}_top_logprobs_shape")
    if shape is not None:
        rows = _flat(meta, side, where, size)
    elif nested is not None:
        ids = [None if row is None else [entry[1] for entry in row] for row in nested]
        rows = padded(ids, [None if row is None else [entry[0] for entry in row] for row in nested], where)
    else:
        return None
    if len(rows[0]) != size:
        raise FormatError(f"{where}: {size} tokens, but {len(rows[0])} rows of {side}_top_logprobs")
    return rows


def _flat(meta: Mapping[str, Any], side: str, where: str, size: int) -> Rows:
    def array(name: str, dtype: str) -> NDArray[Any]:
        value = meta.get(f"{side}_top_logprobs_{name}_flat")
        if value is not None:
            return numbers(value, where, name) if name == "val" else integers(value, where, name)
        stated = meta.get(f"{side}_top_logprobs_{name}_flat_b64_dtype", dtype)
        if stated not in (dtype, dtype.replace("32", "64")):
            raise FormatError(f"{where}: {side}_top_logprobs_{name}_flat_b64 of dtype {stated!r:.40}")
        try:
            data = base64.b64decode(meta[f"{side}_top_logprobs_{name}_flat_b64"], validate=True)
            return np.frombuffer(data, np.dtype(stated).newbyteorder("<"))
        except (binascii.Error, ValueError) as error:
            raise FormatError(f"{where}: {side}_top_logprobs_{name}_flat_b64 is damaged: {error}") from error

    values, ids = array("val", "float32"), array("idx", "int32")
    rows, k = integers(meta[f"{side}_top_logprobs_shape"], where, "shape")
    nulls = int(meta.get(f"{side}_top_logprobs_null_prefix") or 0)
    # Older releases count the rows without entries in the shape as well.
    if len(values) == max(0, rows - nulls) * k and len(values) != rows * k:
        rows -= nulls
    if len(values) != len(ids) or len(values) != rows * k or min(rows, k, nulls) < 0 or nulls + rows != size:
        raise FormatError(
            f"{where}: {len(values)} log-probs and {len(ids)} ids for {nulls} + {rows} rows of {k} in "
            f"{side}_top_logprobs, for {size} tokens"
        )
    sizes = np.array([0] * nulls + [int(k)] * int(rows), np.int64)
    return filled(ids.astype(np.int64), values.astype(np.float64), sizes, where)


FORMAT = Format(
    name="sglang",
    title="SGLang responses (JSON)",
    alignment="label: entry t of input_token_logprobs and input_top_logprobs is about token t of the input, "
    "the first is empty; entries of output_* are about generated tokens",
    keeps="token ids, log-probs of the tokens themselves, top_logprobs",
    loses="the border between prompt and response of a sequence scored from its first token, unless a line "
    "has prompt_len; log-probs of the input where there is a response; the temperature of generated tokens' "
    "log-probs, unless the request is there",
    tested="files whose flat rows its own code made; nested rows are built from its documented layout",
    detect=detect,
    read=read,
)
