"""Parquet and `datasets` directories of DistillKit (arcee-ai/DistillKit) and the config that decodes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import FormatError, InvalidArgumentError
from opd_tools.converters.core.format import Format, ReadSettings
from opd_tools.converters.core.record import OVERFULL, Contents, Record, Tally, Values
from opd_tools.converters.core.source import Source
from opd_tools.converters.reading.arrow_lists import Rows
from opd_tools.converters.reading.parquet import FEW_ROWS, n_rows, schema_of, tables
from opd_tools.converters.trainers.distillkit_codec import decode, decode_legacy
from opd_tools.converters.trainers.distillkit_config import (
    ALWAYS,
    CONFIG,
    MOST_CONFIG,
    NEW,
    Codec,
    LegacyCodec,
    codec_of,
)
from opd_tools.converters.trainers.distillkit_export import write

_LEGACY = ("packed_indices", "exact_values", "coeffs")
_RAW = ("token_ids", "top_values")
_LOOKED_AT = 4096
"""Positions that decide what the values are."""
_FEWEST = 16
"""With fewer than this nothing is decided."""


def detect(source: Source) -> bool:
    """Whether the tables have its columns."""
    schema = schema_of(source)
    return schema is not None and ALWAYS in schema.names and _layout(schema) is not None


def _layout(schema: pa.Schema) -> tuple[str, ...] | None:
    return next((columns for columns in (NEW, _LEGACY, _RAW) if set(columns) <= set(schema.names)), None)


def read(source: Source, settings: ReadSettings) -> Contents:
    """The compression config is the one beside the data, or `settings.config`.

    Raises:
        FormatError: no such columns.
        InvalidArgumentError: the config is missing, or is none for these columns.
    """
    schema = schema_of(source)
    layout = None if schema is None else _layout(schema)
    if schema is None or layout is None:
        raise FormatError(f"{source.uri}: no Parquet or Arrow files with the columns of DistillKit")
    codec = None if layout == _RAW else _codec(source, settings, layout)
    decoder = _Decoder(layout, codec)
    tally = Tally()
    values = _values_of(source, decoder) if layout != NEW else Values.LOGPROBS
    lost = ["no sampled token's own log-prob, no temperature, no teacher identity in the files"]
    if codec is not None and codec.exact_k < codec.k:
        lost.append(f"ranks {codec.exact_k + 1} to {codec.k} are a fit to the teacher's, not its values")
    if values is Values.RENORMALISED:
        lost.append("logits without their logsumexp: log-probs sum to 1 over the entries, no tail is known")
    if "labels" not in schema.names:
        lost.append("where the prompt ends: all tokens after the first count as response")
    return Contents(
        records=_records(source, schema, decoder, values, tally),
        topk=codec.k if codec is not None else _widest(source),
        values=values,
        lost=tuple(lost),
        total=None if "attention_mask" in schema.names else n_rows(source),
        tally=tally,
    )


def _codec(source: Source, settings: ReadSettings, layout: tuple[str, ...]) -> Codec | LegacyCodec:
    beside = [name for name in source.names if name.rpartition("/")[2] == CONFIG]
    if settings.config is not None:
        where = str(settings.config)
        with settings.config.open("rb") as file:
            data = file.read(MOST_CONFIG + 1)
    elif beside:
        where = source.shown(beside[0])
        with source.open(beside[0]) as file:
            data = file.read(MOST_CONFIG + 1)
    else:
        raise InvalidArgumentError(
            f"{source.uri}: no {CONFIG} beside the data; give --config with the compression config that the "
            "files were made with (the training config of DistillKit holds it as well)"
        )
    codec = codec_of(data, where)
    if isinstance(codec, LegacyCodec) != (layout == _LEGACY):
        raise InvalidArgumentError(
            f"{where}: a config of the {'legacy' if isinstance(codec, LegacyCodec) else 'newer'} codec, but "
            f"the files have the columns {', '.join(layout)}"
        )
    return codec


class _Decoder:
    """Top-k of rows of either layout."""

    def __init__(self, layout: tuple[str, ...], codec: Codec | LegacyCodec | None) -> None:
        self.layout = layout
        self.codec = codec

    def __call__(self, row: list[Any], where: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ids and values [N, k]. Raises FormatError."""
        if any(column is None for column in row):
            raise FormatError(f"{where}: null instead of {' or '.join(self.layout)}")
        columns = [np.asarray(column) for column in row]
        if isinstance(self.codec, Codec):
            return decode(columns[0].astype(np.uint8), columns[1].astype(np.uint8), self.codec, where)
        if isinstance(self.codec, LegacyCodec):
            return decode_legacy(columns[0], columns[1], columns[2], self.codec, where)
        return columns[0], columns[1].astype(np.float64)


def _batches(source: Source, columns: list[str]) -> Iterator[tuple[str, int, dict[str, Rows]]]:
    for file, start, batch in tables(source, columns):
        where = f"{file}, rows {start} to {start + len(batch) - 1}"
        yield file, start, {name: Rows(batch.column(name), f"{where}, {name}") for name in columns}


def _widest(source: Source) -> int:
    for file, _, batch in tables(source, ["token_ids"], FEW_ROWS):
        if widest := Rows(batch.column("token_ids"), file).widest():
            return widest
    return 0


def _values_of(source: Source, decoder: _Decoder) -> Values:
    """Legacy and raw files hold log-probs or logits and do not tell; probabilities of logits sum to more."""
    seen = 0
    for file, start, batch in tables(source, list(decoder.layout), FEW_ROWS):
        rows = [Rows(batch.column(name), file) for name in decoder.layout]
        for number in range(len(batch)):
            ids, values = decoder([column[number] for column in rows], f"{file}, row {start + number}")
            kept = np.where(ids < 0, -np.inf, values)
            with np.errstate(over="ignore"):
                if kept.size and (np.exp(kept).sum(axis=1) > 1 + OVERFULL).any():
                    return Values.RENORMALISED
            seen += len(values)
            if seen >= _LOOKED_AT:
                return Values.LOGPROBS
    return Values.LOGPROBS


def _records(
    source: Source, schema: pa.Schema, decoder: _Decoder, values: Values, tally: Tally
) -> Iterator[Record]:
    optional = [name for name in ("attention_mask", "labels") if name in schema.names]
    gaps = _Gaps(decoder.codec)
    for file, start, batch in tables(source, [ALWAYS, *decoder.layout, *optional]):
        place = f"{file}, rows {start} to {start + len(batch) - 1}"
        found = {name: Rows(batch.column(name), f"{place}, {name}") for name in batch.schema.names}
        for number in range(len(batch)):
            where = f"{file}, row {start + number}"
            tokens = found[ALWAYS][number]
            if tokens is None:
                raise FormatError(f"{where}: no {ALWAYS}")
            ids, logprob = decoder([found[name][number] for name in decoder.layout], where)
            gaps.look(logprob, where)
            if values is Values.LOGPROBS and decoder.codec is not None:
                ids, logprob = _possible(ids, logprob, decoder.codec, tally)
            other = {name: found[name][number] for name in optional}
            yield from _segments(where, tokens, ids, logprob, other, tally)


def _segments(
    where: str,
    tokens: NDArray[np.int64],
    ids: NDArray[np.int64],
    logprob: NDArray[np.float64],
    other: dict[str, NDArray[Any] | None],
    tally: Tally,
) -> Iterator[Record]:
    """One record, or one for each sequence of a packed row: its attention mask numbers them from 1."""
    size = len(tokens)
    if len(ids) not in (size - 1, size):
        raise FormatError(f"{where}: expected {size - 1} or {size} rows for {size} tokens, found {len(ids)}")
    mask, labels = other.get("attention_mask"), other.get("labels")
    for name, column in other.items():
        if column is not None and len(column) < size:
            raise FormatError(f"{where}, {name}: expected {size} values, found {len(column)}")
    bounds = [0, size] if mask is None else [0, *(np.flatnonzero(np.diff(mask[:size])) + 1).tolist(), size]
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        if mask is not None and mask[first] == 0:
            continue
        if end - first < 2:
            tally["sequences of one token, left out"] += 1
            continue
        if end <= len(ids):
            tally["rows about the token after the last one, which the file does not hold"] += 1
        trained = None if labels is None else np.asarray(labels[first:end]) >= 0
        prompt = 1 if trained is None or not trained.any() else max(1, int(trained.argmax()))
        loss_mask = None if trained is None else trained[prompt:]
        yield Record(
            where=where if len(bounds) == 2 else f"{where}, sequence {number}",
            token_ids=tokens[first:end],
            prompt_len=prompt,
            topk_ids=ids[first + prompt - 1 : end - 1],
            topk_logprob=logprob[first + prompt - 1 : end - 1],
            loss_mask=None if loss_mask is None or loss_mask.all() else loss_mask,
        )


def _possible(
    ids: NDArray[np.int64], logprob: NDArray[np.float64], codec: Codec | LegacyCodec, tally: Tally
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Without the fitted ranks where probabilities exceed 1: there the fit proves itself wrong."""
    if not codec.exact_k or codec.exact_k == codec.k:
        return ids, logprob
    with np.errstate(over="ignore", invalid="ignore"):
        mass = np.exp(logprob).sum(axis=1)
    wrong = ~(mass <= 1 + OVERFULL)
    if not wrong.any():
        return ids, logprob
    tally["positions whose fitted ranks are impossible: only the exact ones are kept"] += int(wrong.sum())
    ids, logprob = ids.copy(), logprob.copy()
    ids[wrong, codec.exact_k :] = -1
    logprob[wrong, codec.exact_k :] = -np.inf
    return ids, logprob


class _Gaps:
    """Whether log-probs were summed up that are no differences: gaps between ranks grow then.

    The other way round, differences taken for log-probs exceed 1 in sum.
    """

    def __init__(self, codec: Codec | LegacyCodec | None) -> None:
        self._exact_k = codec.exact_k if isinstance(codec, Codec) and codec.delta_encoding else 0
        self._grows: list[NDArray[np.bool_]] = []
        self._positions = 0

    def look(self, logprob: NDArray[np.float64], where: str) -> None:
        """Raises FormatError."""
        if self._exact_k < 4 or self._positions >= _LOOKED_AT:
            return
        gaps = -np.diff(logprob[:, : self._exact_k], axis=1)
        half = gaps.shape[1] // 2
        self._grows.append(gaps[:, half:].mean(axis=1) > gaps[:, :half].mean(axis=1))
        self._positions += len(gaps)
        if self._positions >= _FEWEST and np.concatenate(self._grows).mean() > 0.9:
            raise FormatError(
                f"{where}: gaps between log-probs grow from rank to rank; the compression config says "
                "delta_encoding: true, which these files do not have"
            )


FORMAT = Format(
    name="distillkit",
    title="DistillKit Parquet",
    alignment="source: row t is about token t + 1",
    keeps="token ids, the top-k with its exact ranks, and the mask that labels make",
    loses="the tail (1 - sum), the sampled tokens' own log-probs, behaviour log-probs, every scalar",
    tested="files that DistillKit's own compressor made",
    detect=detect,
    read=read,
    write=write,
)
