"""Loads what `bench/data.py` wrote, cuts it to fewer ranks and moves it to other vocabularies.

Axes: W = windows, L = tokens of a window, P = L - 1 positions, R = 128 stored ranks, K <= R ranks kept.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VOCAB_SIZE = 49_152
"""Ids of SmolLM2, the teacher of bench/data.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Teacher rows of whole windows. A window is one rollout: its pages are read and written alone."""

    label: str
    """What a table should call this data."""
    vocab_size: int
    token_ids: NDArray[np.uint32]
    """[W, L]. Row t of the others is about token t + 1; `token_ids[:, :-1]` holds what precedes each row."""
    ids: NDArray[np.uint32]
    """[W, P, K], rows sorted by falling log-prob, then rising id."""
    logprob: NDArray[np.float32]
    """[W, P, K] nats."""
    log_tail: NDArray[np.float64]
    """[W, P] nats, the probability outside the K ranks. Encoders are given it in float32."""

    @property
    def n_positions(self) -> int:
        """W * P."""
        return self.log_tail.size

    def rows(self) -> tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32]]:
        """All windows end to end, as encoders take them: ids [W * P, K], logprob, log_tail in float32."""
        topk = self.ids.shape[-1]
        log_tail = self.log_tail.astype(np.float32).reshape(-1)
        return self.ids.reshape(-1, topk), self.logprob.reshape(-1, topk), log_tail


def load(data_dir: Path, *, part: str = "eval", prefix: str = "", positions: int | None = None) -> Windows:
    """Complete windows of one part, in stored order (domains in turn).

    Args:
        part: "eval", or "train" for the windows that id tables are built from.
        prefix: "bf16_" for the logits rounded to bfloat16, kept for evaluation windows only.
        positions: stop at the first whole window that reaches so many.
    """
    done = int((data_dir / "done").read_text())
    n_eval = len(np.load(data_dir / "bf16_log_tail.npy", mmap_mode="r"))
    first, last = (0, min(done, n_eval)) if part == "eval" else (n_eval, done)
    n_positions = np.load(data_dir / "log_tail.npy", mmap_mode="r").shape[1]
    if positions is not None:
        last = min(last, first - -positions // n_positions)
    if first >= last:
        raise SystemExit(f"{data_dir}: no {part} windows yet; {done} are complete. Let bench/data.py go on.")

    def array(name: str) -> NDArray[np.generic]:
        return np.load(data_dir / f"{name}.npy", mmap_mode="r")[first:last]

    logits = "bfloat16" if prefix else "float32"
    found = Windows(
        label=f"SmolLM2-135M-Instruct, {logits} logits",
        vocab_size=VOCAB_SIZE,
        token_ids=np.array(array("token_ids")),
        ids=np.array(array(f"{prefix}ids")),
        logprob=np.array(array(f"{prefix}logprob")),
        log_tail=array(f"{prefix}log_tail").astype(np.float64),
    )
    return _sort_ties(found)


def keep_ranks(windows: Windows, topk: int) -> Windows:
    """The first `topk` ranks; the others join the tail in float64."""
    rest = np.logaddexp.reduce(windows.logprob[..., topk:].astype(np.float64), axis=-1)
    return dataclasses.replace(
        windows,
        ids=np.ascontiguousarray(windows.ids[..., :topk]),
        logprob=np.ascontiguousarray(windows.logprob[..., :topk]),
        log_tail=np.minimum(np.logaddexp(windows.log_tail, rest), 0.0),
    )


def remap_ids(windows: Windows, new_ids: NDArray[np.uint32], *, vocab_size: int, label: str) -> Windows:
    """The same log-probs under other ids: id i becomes new_ids[i]. `new_ids` is injective."""
    moved = dataclasses.replace(
        windows,
        label=label,
        vocab_size=vocab_size,
        token_ids=new_ids[windows.token_ids],
        ids=new_ids[windows.ids],
    )
    return _sort_ties(moved)


def _sort_ties(windows: Windows) -> Windows:
    """Equal log-probs in a row by rising id, as the format wants them. Rows without ties stay as they are."""
    tied = (windows.logprob[..., 1:] == windows.logprob[..., :-1]).any(axis=-1)
    order = np.lexsort((windows.ids[tied], -windows.logprob[tied]), axis=-1)
    ids = windows.ids.copy()
    ids[tied] = np.take_along_axis(windows.ids[tied], order, axis=-1)
    return dataclasses.replace(windows, ids=ids)
