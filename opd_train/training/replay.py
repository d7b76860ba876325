"""What a step that failed leaves behind: which batches, from which state, so that it can be looked into."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import opd_store
from opd_store import FormatError, MismatchError, OpdError
from opd_train.data.batches import TeacherBatch
from opd_train.training.distributed import World
from opd_train.training.provenance import check_same_run, differences
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


def check_replay(
    path: Path, content: dict[str, Any], provenance: dict[str, Any], world: World
) -> dict[str, Any]:
    """The state of this rank's source that a report of `read_replay` names.

    Raises:
        MismatchError: the report is of another run, or of another number of ranks.
    """
    check_same_run(path, provenance, content["provenance"])
    sources: list[dict[str, Any]] = content["sources"]
    if len(sources) != world.size:
        raise MismatchError(
            f"{path}: of a run with {len(sources)} ranks, this one has {world.size}; start as many",
            field="world_size",
            expected=str(len(sources)),
            found=str(world.size),
        )
    return sources[world.rank]


def check_place(path: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise MismatchError if a source's state before the step is not the recorded one."""
    for name, there, here in differences(expected, json.loads(json.dumps(found))):
        raise MismatchError(
            f"{path}: source {name} was {there!r:.200} before the step, and is {here!r:.200} now; "
            "the run cannot be repeated with this checkpoint and source",
            field=name,
            expected=repr(there),
            found=repr(here),
        )


def _hashes(batch: TeacherBatch, tokenizer_fingerprint: str) -> list[str]:
    ids = batch.input_ids.cpu().numpy()
    starts, lengths = batch.cu_seqlens.tolist(), batch.lengths.tolist()
    return [
        opd_store.rollout_hash(ids[start : start + length], tokenizer_fingerprint).hex()
        for start, length in zip(starts, lengths, strict=False)
    ]
