"""Parquet of Lightning OPD (jet-ai-projects/Lightning-OPD): log-probs of sampled tokens, a row a rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opd_store import Cache, FormatError, InvalidArgumentError
from opd_tools.converters.formats import Format, ReadSettings, WriteSettings
from opd_tools.converters.parquet import record_batches, schema_of
from opd_tools.converters.record import Contents, Record
from opd_tools.converters.source import Source
from opd_tools.converters.text import TextTokenizer

_COLUMNS = {"prompt", "metadata"}
_FIELDS = {"response_tokens", "teacher_log_probs"}


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
    for where, row in record_batches(source):
        metadata = row.get("metadata") or {}
        try:
            response = np.asarray(metadata["response_tokens"], np.int64)
            teacher = np.asarray(metadata["teacher_log_probs"], np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{where}: metadata without tokens or log-probs: {error!s:.100}") from error
        prompt = tokenizer.encode(row.get("prompt") or "", where)
        mask: NDArray[np.bool_] | None = None
        if metadata.get("loss_mask") is not None:
            mask = np.asarray(metadata["loss_mask"]) != 0
        behaviour = metadata.get("student_log_probs")
        yield Record(
            where=where,
            token_ids=np.concatenate([prompt, response]),
            prompt_len=len(prompt),
            teacher_logprob=teacher,
            behaviour_logprob=None if behaviour is None else np.asarray(behaviour, np.float64),
            loss_mask=mask,
            label=row.get("label"),
            sample_id=metadata.get("sample_id"),
        )


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
