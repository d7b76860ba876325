"""A cache as safetensors files: rollouts end to end in a few flat tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opd_store import NO_ID, Cache, InvalidArgumentError, Rollout
from opd_tools.converters.core.format import Format, WriteSettings

_POSITIONS = 1 << 20
"""Response positions of a file: 128 MiB at 16 ranks."""
_ROWS = ("teacher_logprob", "behaviour_logprob", "reference_logprob", "log_tail", "topk_ids", "topk_logprob")


def write(cache: Cache, out: Path, settings: WriteSettings, on_progress: Callable[[int, int], None]) -> None:
    """A directory of rollouts-00000.safetensors, ... and meta.json.

    Tensors of a file with n rollouts, T tokens, P response tokens and K ranks: token_ids int32 [T];
    token_offsets int64 [n + 1]; row_offsets int64 [n + 1] into everything of P rows; prompt_len int32 [n];
    teacher_logprob, behaviour_logprob, reference_logprob, log_tail float32 [P], where every rollout has it;
    loss_mask bool [P]; topk_ids int32 [P, K], -1 for none; topk_logprob float32 [P, K], -inf for none.

    Raises:
        InvalidArgumentError: the `safetensors` package is not installed.
    """
    try:
        import safetensors.numpy
    except ImportError as error:
        raise InvalidArgumentError(
            "safetensors: writing needs the package; pip install 'opd-store[convert]'"
        ) from error
    out.mkdir()
    held: list[Rollout] = []
    positions = number = 0
    for done, rollout in enumerate(cache.scan(ranks=settings.ranks(cache)), 1):
        held.append(rollout)
        positions += rollout.response_len
        if positions >= _POSITIONS or done == len(cache):
            ids = json.dumps([rollout.sample_id for rollout in held])
            metadata = {"format": "opd-rollouts/1", "sample_ids": ids}
            safetensors.numpy.save_file(
                tensors(held), out / f"rollouts-{number:05d}.safetensors", metadata=metadata
            )
            held, positions, number = [], 0, number + 1
            on_progress(done, len(cache))
    (out / "meta.json").write_text(json.dumps(cache.meta.to_json(), indent=2, sort_keys=True), "utf-8")


def tensors(rollouts: list[Rollout]) -> dict[str, NDArray[np.generic]]:
    """The tensors of a file."""
    found: dict[str, NDArray[np.generic]] = {
        "token_ids": np.concatenate([rollout.token_ids for rollout in rollouts]).astype(np.int32),
        "token_offsets": _offsets([len(rollout.token_ids) for rollout in rollouts]),
        "row_offsets": _offsets([rollout.response_len for rollout in rollouts]),
        "prompt_len": np.array([rollout.prompt_len for rollout in rollouts], np.int32),
        "loss_mask": np.concatenate([_mask(rollout) for rollout in rollouts]),
    }
    for name in _ROWS:
        present = [value for rollout in rollouts if (value := getattr(rollout, name)) is not None]
        if len(present) == len(rollouts):
            found[name] = np.concatenate(present)
    if "topk_ids" in found:
        ids = found["topk_ids"]
        found["topk_ids"] = np.where(ids == NO_ID, np.int32(-1), ids.astype(np.int32))
    return found


def _mask(rollout: Rollout) -> NDArray[np.bool_]:
    return np.ones(rollout.response_len, np.bool_) if rollout.loss_mask is None else rollout.loss_mask


def _offsets(lengths: list[int]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


FORMAT = Format(
    name="safetensors",
    title="safetensors",
    alignment="label: row t of the response is about its token t",
    keeps="token ids, prompt lengths, masks, log-probs of sampled tokens, top-k and tail, sample ids",
    loses="every other scalar, user columns, ids chosen by the student and drawn from the teacher",
    tested="safetensors.torch and safetensors.numpy",
    write=write,
)
