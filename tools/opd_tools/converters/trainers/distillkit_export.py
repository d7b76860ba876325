"""A cache as DistillKit reads it: exact ranks, nothing fitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opd_store import NO_ID, Cache, InvalidArgumentError, Rollout
from opd_tools.converters.core.format import WriteSettings
from opd_tools.converters.trainers.distillkit_codec import packed
from opd_tools.converters.trainers.distillkit_config import ALWAYS, CONFIG, NEW, Codec

_FILLER = -1e4
"""Log-prob of entries that a position does not have, in files we write: probability 0 in every dtype."""


def write(cache: Cache, out: Path, settings: WriteSettings, on_progress: Callable[[int, int], None]) -> None:
    """A directory of data_0.parquet and compression_config.yaml: exact_k = k, float32, nothing fitted.

    Positions of the prompt, which DistillKit needs and a cache does not have, get entries of probability 0,
    and so do entries that a shorter row lacks; `labels` are -100 where nothing is to be trained on.
    """
    import yaml

    k = min(cache.topk, settings.topk or cache.topk)
    if not k:
        raise InvalidArgumentError("distillkit: the cache has no top-k")
    out.mkdir()
    codec = Codec(d=cache.meta.vocab_size, k=k, exact_k=k, delta_encoding=False)
    config = {
        **{"d": codec.d, "k": k, "exact_k": k, "exact_dtype": "float32", "polynomial_terms": None},
        **{"term_dtype": "float32", "residual_bins": [], "delta_encoding": False, "error_diffusion": False},
        "normalize_t": False,
    }
    (out / CONFIG).write_text(yaml.safe_dump(config), "utf-8")
    nested = pa.list_(pa.list_(pa.uint8()))
    schema = pa.schema(
        {ALWAYS: pa.list_(pa.uint64()), **dict.fromkeys(NEW, nested), "labels": pa.list_(pa.int64())}
    )
    columns = {"topk_ids", "topk_logprob", "log_tail", "loss_mask"}
    with pq.ParquetWriter(out / "data_0.parquet", schema) as writer:
        for done, rollout in enumerate(cache.scan(ranks=settings.ranks(cache), columns=columns), 1):
            writer.write_batch(pa.record_batch(_row(rollout, codec), schema=schema))
            on_progress(done, len(cache))


def _row(rollout: Rollout, codec: Codec) -> list[pa.Array]:
    assert rollout.topk_ids is not None
    assert rollout.topk_logprob is not None
    ids = np.full((len(rollout.token_ids) - 1, codec.k), NO_ID, np.uint32)
    logprob = np.full(ids.shape, _FILLER, np.float32)
    first, width = rollout.prompt_len - 1, rollout.topk_ids.shape[1]
    ids[first:, :width] = rollout.topk_ids
    logprob[first:, :width] = np.maximum(rollout.topk_logprob, np.float32(_FILLER))
    labels = rollout.token_ids.astype(np.int64)
    labels[: rollout.prompt_len] = -100
    if rollout.loss_mask is not None:
        labels[rollout.prompt_len :][~rollout.loss_mask] = -100
    values = logprob.view(np.uint8).reshape(len(ids), -1)
    return [
        pa.array([rollout.token_ids.astype(np.uint64)], pa.list_(pa.uint64())),
        _bytes(values),
        _bytes(packed(_filled(ids).astype(np.int64), codec.id_bits)),
        pa.array([labels], pa.list_(pa.int64())),
    ]


def _filled(ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ids with others in place of `NO_ID` that their row does not have: DistillKit needs distinct ones."""
    absent = ids == NO_ID
    if not absent.any():
        return ids
    ids = ids.copy()
    for row in np.flatnonzero(absent.any(axis=1)):
        free = np.setdiff1d(np.arange(2 * ids.shape[1], dtype=np.uint32), ids[row])
        ids[row, absent[row]] = free[: int(absent[row].sum())]
    return ids


def _bytes(data: NDArray[np.uint8]) -> pa.Array:
    """One row of a column of lists of bytes a position."""
    rows = pa.array(np.arange(len(data) + 1, dtype=np.int32) * data.shape[1])
    inner = pa.ListArray.from_arrays(rows, pa.array(data.ravel()))
    return pa.ListArray.from_arrays(pa.array([0, len(data)], pa.int32()), inner)
