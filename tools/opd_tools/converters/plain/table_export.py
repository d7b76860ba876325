"""A cache as tables: Parquet with native columns, and a directory that `datasets.load_from_disk` opens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import opd_store
from opd_store import NO_ID, RENORMALISED_TOPK, Cache, InvalidArgumentError, Rollout
from opd_store.schema import USER_TYPES
from opd_tools.converters.core.format import Format, WriteSettings

_POSITIONS = 1 << 16
"""Response positions of a row group or record batch: 16 MiB at 32 ranks."""
_SHARD_BYTES = 256 << 20
_LISTS = {
    "token_ids": pa.uint32(),
    "loss_mask": pa.bool_(),
    "teacher_logprob": pa.float32(),
    "behaviour_logprob": pa.float32(),
    "reference_logprob": pa.float32(),
    "log_tail": pa.float32(),
}
_TOPK = {"topk_ids": pa.uint32(), "topk_logprob": pa.float32()}
_SCALARS = {
    "sample_id": pa.string(),
    "prompt_len": pa.int64(),
    "finish_reason": pa.string(),
    "policy_version": pa.int64(),
    "teacher": pa.int64(),
    "reward": pa.float32(),
    "label": pa.string(),
}
Progress = Callable[[int, int], None]


def table_schema(cache: Cache) -> pa.Schema:
    """Columns of the tables that a cache becomes, with its identity as metadata."""
    lists = {name: pa.list_(kind) for name, kind in _LISTS.items() if name != "log_tail" or cache.topk}
    topk = {name: pa.list_(pa.list_(kind)) for name, kind in _TOPK.items()} if cache.topk else {}
    users = {name: USER_TYPES[kind] for name, kind in sorted(cache.schema.user_columns.items())}
    about = {
        "opd_meta": json.dumps(cache.meta.to_json(), sort_keys=True),
        "opd_source": cache.uri,
        "opd_max_error": repr(cache.max_error),
    }
    return pa.schema({**_SCALARS, **lists, **topk, **users}, about)


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The cache that a table was exported from, as far as reading it back depends on it."""

    renormalised: bool = False
    """Whether log-probs sum to 1 over the ranks that were kept."""
    max_error: float | None = None
    """Of the cache; None for tables that are not ours."""


def origin_of(schema: pa.Schema) -> Origin:
    """What the metadata of a table says about where it is from."""
    metadata = schema.metadata or {}
    try:
        teacher = json.loads(metadata[b"opd_meta"]).get("teacher") or {}
        return Origin(
            renormalised=teacher.get("logprob_mode") == RENORMALISED_TOPK,
            max_error=known_error(float(metadata.get(b"opd_max_error", b"nan"))),
        )
    except (ValueError, KeyError, AttributeError, RecursionError):
        return Origin()


def known_error(stated: object) -> float | None:
    """The `max_error` that one of our files states; None if that is none."""
    is_number = isinstance(stated, int | float) and not isinstance(stated, bool)
    return float(stated) if is_number and 0 <= stated < math.inf else None  # type: ignore[arg-type, operator]


def batches(cache: Cache, ranks: int | None, on_progress: Progress) -> Iterator[pa.RecordBatch]:
    """The cache as record batches of `table_schema`."""
    schema = table_schema(cache)
    held: list[Rollout] = []
    positions = 0
    for done, rollout in enumerate(cache.scan(ranks=ranks), 1):
        held.append(rollout)
        positions += rollout.response_len
        if positions >= _POSITIONS:
            yield _batch(held, schema)
            on_progress(done, len(cache))
            held, positions = [], 0
    if held:
        yield _batch(held, schema)
        on_progress(len(cache), len(cache))


def _batch(rollouts: list[Rollout], schema: pa.Schema) -> pa.RecordBatch:
    arrays = []
    for column in schema:
        name = column.name
        if name in _TOPK:
            arrays.append(_nested([getattr(rollout, name) for rollout in rollouts], rollouts, column.type))
        elif name in _LISTS:
            arrays.append(_list([getattr(rollout, name) for rollout in rollouts], column.type))
        elif name.startswith("x_"):
            arrays.append(pa.array([rollout.extra.get(name) for rollout in rollouts], column.type))
        else:
            arrays.append(pa.array([getattr(rollout, name) for rollout in rollouts], column.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _list(values: list[NDArray[Any] | None], kind: pa.DataType) -> pa.Array:
    offsets = _offsets([0 if value is None else len(value) for value in values])
    present = [value for value in values if value is not None]
    items = pa.array(np.concatenate(present), kind.value_type) if present else pa.array([], kind.value_type)
    mask = pa.array([value is None for value in values]) if len(present) < len(values) else None
    return pa.ListArray.from_arrays(offsets, items, type=kind, mask=mask)


def _nested(values: list[NDArray[Any] | None], rollouts: list[Rollout], kind: pa.DataType) -> pa.Array:
    """[rollouts][rows][entries], rows without their padding."""
    flat, widths = [], []
    for value, rollout in zip(values, rollouts, strict=True):
        assert value is not None
        assert rollout.topk_ids is not None
        kept = rollout.topk_ids != NO_ID
        widths.append(kept.sum(axis=1))
        flat.append(value.ravel() if kept.all() else value[kept])
    items = pa.array(np.concatenate(flat), kind.value_type.value_type)
    rows = pa.ListArray.from_arrays(_offsets(np.concatenate(widths)), items, type=kind.value_type)
    return pa.ListArray.from_arrays(_offsets([len(width) for width in widths]), rows, type=kind)


def _offsets(lengths: Any) -> pa.Array:  # noqa: ANN401
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.array(offsets)


def write(cache: Cache, out: Path, settings: WriteSettings, on_progress: Progress) -> None:
    """One Parquet file, floats and ids split into byte planes, zstd."""
    schema = table_schema(cache)
    split = [f"{name}.list.element" for name in _LISTS if name in schema.names and name != "loss_mask"]
    split += [f"{name}.list.element.list.element" for name in _TOPK if name in schema.names]
    texts = [column.name for column in schema if pa.types.is_string(column.type)]
    with pq.ParquetWriter(
        out, schema, compression="zstd", use_dictionary=texts, use_byte_stream_split=split
    ) as writer:
        for batch in batches(cache, settings.ranks(cache), on_progress):
            writer.write_batch(batch)


def write_datasets(cache: Cache, out: Path, settings: WriteSettings, on_progress: Progress) -> None:
    """Arrow files and the two JSON files of `Dataset.save_to_disk`.

    Raises:
        InvalidArgumentError: the `datasets` package is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise InvalidArgumentError(
            "datasets: writing such a directory needs the package; pip install 'opd-store[convert]'"
        ) from error
    out.mkdir()
    schema = table_schema(cache)
    features = datasets.Features.from_arrow_schema(schema.remove_metadata())
    info = datasets.DatasetInfo(
        features=features, description=f"Teacher log-probs converted by opd-store {opd_store.__version__}"
    )
    stored = features.arrow_schema
    stored = stored.with_metadata({**(stored.metadata or {}), **(schema.metadata or {})})
    parts = _write_parts(batches(cache, settings.ranks(cache), on_progress), out, stored)
    names = []
    for number, part in enumerate(parts):
        names.append(f"data-{number:05d}-of-{len(parts):05d}.arrow")
        part.rename(out / names[-1])
    info.write_to_directory(str(out))
    state: dict[str, object] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": opd_store.__version__,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (out / "state.json").write_text(json.dumps(state, indent=2), "utf-8")
    (out / "opd_meta.json").write_text(json.dumps(cache.meta.to_json(), indent=2, sort_keys=True), "utf-8")


def _write_parts(found: Iterator[pa.RecordBatch], out: Path, schema: pa.Schema) -> list[Path]:
    parts: list[Path] = []
    writer: pa.ipc.RecordBatchStreamWriter | None = None
    n_bytes = 0
    try:
        for batch in found:
            if writer is None or n_bytes >= _SHARD_BYTES:
                if writer is not None:
                    writer.close()
                parts.append(out / f"part-{len(parts)}")
                writer, n_bytes = pa.ipc.new_stream(str(parts[-1]), schema), 0
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
            n_bytes += batch.nbytes
    finally:
        if writer is not None:
            writer.close()
    return parts


DATASETS = Format(
    name="datasets",
    title="Hugging Face datasets directory",
    alignment="label: row t of the response is about its token t",
    keeps="every field of a rollout, top-k rows without padding, user columns",
    loses="ids that the student chose and ids drawn from the teacher; it is read as a table",
    tested="datasets.load_from_disk",
    write=write_datasets,
)
