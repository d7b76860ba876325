"""What a run leaves behind when it cannot go on: which batches, from which state, and which settings help."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import opd_store
from opd_store import FormatError, OpdError
from opd_train.data.batches import TeacherBatch
from opd_train.training.config import DistillConfig
from opd_train.training.distributed import World
from opd_train.training.run_directory import latest_checkpoint, write_json

REPLAY_VERSION = 1


def write_replay(
    out: Path,
    step: int,
    *,
    reason: str,
    provenance: dict[str, Any],
    sums: Mapping[str, float],
    source: dict[str, Any],
    batches: Sequence[TeacherBatch],
    tokenizer_fingerprint: str,
    world: World,
) -> Path:
    """Write `out/replay-step-XXXXXXXX.json` about a step that failed. Every rank calls it.

    Args:
        step: counted from 1.
        provenance: of the run: its config with the seed, student and source.
        sums: those of the step over all ranks; NaN and infinities become strings, since JSON has none.
        source: this rank's state before its first batch, or before those drawn ahead for several steps.
        batches: this rank's batches of the step. Their rollouts are named by row and by hash.

    Raises:
        StorageError: the disk refused.
    """
    rollouts = [
        {"source": number, "row": row, "rollout_hash": digest}
        for batch in batches
        for number, row, digest in zip(
            batch.source_ids.tolist(),
            batch.row_ids.tolist(),
            _hashes(batch, tokenizer_fingerprint),
            strict=True,
        )
    ]
    ranks = world.gather({"source": source, "rollouts": rollouts})
    path = out / f"replay-step-{step:08d}.json"
    if world.first:
        newest = latest_checkpoint(out)
        content = {
            "version": REPLAY_VERSION,
            "step": step,
            "reason": reason,
            "checkpoint": newest and newest.name,
            "sums": {name: value if math.isfinite(value) else str(value) for name, value in sums.items()},
            "ranks": ranks,
            "provenance": provenance,
        }
        write_json(path, content)
    return path


def read_replay(path: Path) -> dict[str, Any]:
    """What a replay needs of a report: "step", "provenance" and "sources", of each rank its source's state.

    Raises:
        FormatError: not such a file.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if (version := content["version"]) != REPLAY_VERSION:
            raise FormatError(f"{path}: expected replay version {REPLAY_VERSION}, found {version!r:.40}")
        read = {"step": int(content["step"]), "provenance": content["provenance"]}
        return {**read, "sources": [rank["source"] for rank in content["ranks"]]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, OpdError):
            raise
        raise FormatError(f"{path}: not a replay file ({error!s:.200})", uri=str(path)) from error


def out_of_memory(
    step: int,
    config: DistillConfig,
    source: Mapping[str, Any],
    batches: Sequence[TeacherBatch],
    error: torch.OutOfMemoryError,
) -> OpdError:
    """The error to raise: what the settings are that decide about memory, and which way to turn them."""
    batch_tokens = source.get("batch_tokens")
    found = f" (its last batch has {batches[-1].n_padded_tokens} tokens)" if batches else ""
    reason = str(error).partition("\n")[0]
    return OpdError(
        f"step {step}: out of memory{found}: {reason:.300}. These go on from the last checkpoint: "
        f"gradient_checkpointing (is {'on' if config.gradient_checkpointing else 'off, turn it on'}), "
        f"head_chunk (is {config.head_chunk}, halve it). This needs another output directory: "
        f"batch_tokens (is {'unknown' if batch_tokens is None else batch_tokens}, halve it) with accumulate "
        f"(is {config.accumulate}, double it), which together leave a step as large as it is"
    )


def _hashes(batch: TeacherBatch, tokenizer_fingerprint: str) -> list[str]:
    ids = batch.input_ids.cpu().numpy()
    starts, lengths = batch.cu_seqlens.tolist(), batch.lengths.tolist()
    return [
        opd_store.rollout_hash(ids[start : start + length], tokenizer_fingerprint).hex()
        for start, length in zip(starts, lengths, strict=False)
    ]
