"""Parquet of Lightning OPD (jet-ai-projects/Lightning-OPD): log-probs of sampled tokens, a row a rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from opd_store import Cache, FormatError, InvalidArgumentError
from opd_tools.converters.core.format import Format, ReadSettings, WriteSettings
from opd_tools.converters.core.record import Contents, Record
from opd_tools.converters.core.source import Source
from opd_tools.converters.reading.arrow_lists import Rows, depth
from opd_tools.converters.reading.parquet import schema_of, tables
from opd_tools.converters.reading.text import TextTokenizer

_COLUMNS = {"prompt", "metadata"}
_FIELDS = {"response_tokens", "teacher_log_probs"}
_DEPTHS = {
    **{"prompt": 0, "label": 0, "sample_id": 0},
    **dict.fromkeys(("response_tokens", "teacher_log_probs", "student_log_probs", "loss_mask"), 1),
}
_NEEDED = {"prompt", *_FIELDS}


def detect(source: Source) -> bool:
    """Whether the Parquet files have its columns."""
    schema = schema_of(source)
    if schema is None or not _COLUMNS.issubset(schema.names):
        return False
    metadata = schema.field("metadata").type
    return pa.types.is_struct(metadata) and {metadata[i].name for i in range(metadata.num_fields)} >= _FIELDS


def read(source: Source, settings: ReadSettings) -> Contents:
    """Prompts are text in this format, so a tokenizer is needed."""
    if settings.tokenizer is None:
        raise InvalidArgumentError(
            "lightning-opd: prompts are text; give --tokenizer, the tokenizer.json they were sampled with"
        )
    return Contents(
        records=_records(source, TextTokenizer(settings.tokenizer)),
        topk=0,
        lost=("prompts were text and are encoded again: the response is exact, the prompt may differ",),
    )


def _records(source: Source, tokenizer: TextTokenizer) -> Iterator[Record]:
    for file, start, batch in tables(source):
        found = _columns(batch, f"{file}, rows {start} to {start + len(batch) - 1}")
        for number in range(len(batch)):
            where = f"{file}, row {start + number}"
            row = {name: column[number] for name, column in found.items()}
            response, teacher = row["response_tokens"], row["teacher_log_probs"]
            if response is None or teacher is None:
                raise FormatError(f"{where}: metadata without tokens or log-probs")
            prompt = tokenizer.encode(row["prompt"] or "", where)
            mask, label, sample_id = row.get("loss_mask"), row.get("label"), row.get("sample_id")
            yield Record(
                where=where,
                token_ids=np.concatenate([prompt, response]),
                prompt_len=len(prompt),
                teacher_logprob=teacher,
                behaviour_logprob=row.get("student_log_probs"),
                loss_mask=None if mask is None else mask != 0,
                label=None if label is None else str(label),
                sample_id=None if sample_id is None else str(sample_id),
            )


def _columns(batch: pa.RecordBatch, where: str) -> dict[str, Rows]:
    """Columns of the table and of its metadata. Raises FormatError: one is missing, or of another type."""
    found = {}
    metadata = batch.column("metadata") if "metadata" in batch.schema.names else None
    for name, levels in _DEPTHS.items():
        if name in ("prompt", "label"):
            column = batch.column(name) if name in batch.schema.names else None
        elif metadata is None or not pa.types.is_struct(metadata.type):
            raise FormatError(f"{where}: no struct column metadata")
        else:
            has = metadata.type.get_field_index(name) >= 0
            column = pc.struct_field(metadata, name) if has else None
        if column is None or pa.types.is_null(column.type):
            if name in _NEEDED:
                raise FormatError(f"{where}: no {name}")
            continue
        if depth(column.type) != levels:
            raise FormatError(f"{where}, {name}: a column of type {column.type!s:.60}")
        found[name] = Rows(column, f"{where}, {name}")
    return found


def write(cache: Cache, out: Path, settings: WriteSettings, on_progress: Callable[[int, int], None]) -> None:
    """One Parquet file. Prompts and responses become text as well."""
    if settings.tokenizer is None:
        raise InvalidArgumentError("lightning-opd: prompts are text; give --tokenizer")
    tokenizer = TextTokenizer(settings.tokenizer)
    metadata = pa.struct(
        {
            "is_lightning_opd": pa.bool_(),
            "response_tokens": pa.list_(pa.int64()),
            "loss_mask": pa.list_(pa.int64()),
            "response": pa.string(),
            "teacher_log_probs": pa.list_(pa.float64()),
            "student_log_probs": pa.list_(pa.float64()),
            "sample_id": pa.string(),
        }
    )
    schema = pa.schema({"prompt": pa.string(), "label": pa.string(), "metadata": metadata})
    columns = ("teacher_logprob", "behaviour_logprob", "loss_mask", "sample_id", "label")
    with pq.ParquetWriter(out, schema) as writer:
        rows: list[dict[str, Any]] = []
        for done, rollout in enumerate(cache.scan(columns=columns), 1):
            if rollout.teacher_logprob is None:
                raise InvalidArgumentError(f"lightning-opd: row {done - 1} has no teacher log-probs")
            mask = rollout.loss_mask
            ones = np.ones(rollout.response_len, np.int64)
            behaviour = rollout.behaviour_logprob
            rows.append(
                {
                    "prompt": tokenizer.decode(rollout.token_ids[: rollout.prompt_len]),
                    "label": "0" if rollout.label is None else rollout.label,
                    "metadata": {
                        "is_lightning_opd": True,
                        "response_tokens": rollout.response_ids,
                        "loss_mask": ones if mask is None else mask.astype(np.int64),
                        "response": tokenizer.decode(rollout.response_ids),
                        "teacher_log_probs": rollout.teacher_logprob.astype(np.float64),
                        "student_log_probs": None if behaviour is None else behaviour.astype(np.float64),
                        "sample_id": rollout.sample_id,
                    },
                }
            )
            if len(rows) == 256 or done == len(cache):
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
                on_progress(done, len(cache))


FORMAT = Format(
    name="lightning-opd",
    title="Lightning OPD Parquet",
    alignment="label: row t of the response is about its token t",
    keeps="response ids, teacher and student log-probs of the sampled token, loss mask, label",
    loses="prompt ids (text only); no top-k",
    tested="files built from its documented layout",
    detect=detect,
    read=read,
    write=write,
)
