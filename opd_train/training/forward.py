"""Running a model over a packed batch, up to the hidden states that predict its response tokens.

Axes: S = rollouts, N = response tokens, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opd_train.data.batches import TeacherBatch
from opd_train.models import CausalLM


def response_hidden(
    lm: CausalLM, batch: TeacherBatch, *, agree: Callable[[int], int] | None = None
) -> Tensor:
    """[N, H] the hidden states that predict each response token.

    Variable-length attention runs on the packed tokens; other implementations get padded rows, since a mask
    over packed rows would cost the square of the batch.

    Args:
        agree: given how many passes through the body this batch needs, how many are made; for sharded
            weights, which need equally many on every rank.
    """
    varlen = str(lm.model.config._attn_implementation).startswith("flash")
    return packed_hidden(lm, batch) if varlen else padded_hidden(lm, batch, agree=agree)


def packed_hidden(lm: CausalLM, batch: TeacherBatch) -> Tensor:
    """[N, H] from one row of all tokens and padding; positions that start again at 0 mark where rollouts
    begin."""
    hidden = lm.hidden(batch.input_ids[None], None, position_ids=batch.position_ids[None])[0]
    return hidden[batch.response_index - 1]


def padded_hidden(lm: CausalLM, batch: TeacherBatch, *, agree: Callable[[int], int] | None = None) -> Tensor:
    """[N, H] from padded rows, in groups of similar length: padding at most doubles the tokens."""
    pieces, places = [], []
    lengths = batch.lengths.tolist()
    groups = length_groups(lengths)
    n_passes = len(groups) if agree is None else agree(len(groups))
    for number in range(n_passes):
        # A pass more than this batch needs is one over its shortest rollout, none of whose tokens count.
        spare = number >= len(groups)
        rows = [min(range(len(lengths)), key=lengths.__getitem__)] if spare else groups[number]
        ids, mask, source, place = batch.padded_rows(rows)
        if spare:
            source, place = source[:0], place[:0]
        pieces.append(lm.hidden(ids, mask).flatten(0, 1)[source])
        places.append(place)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)[torch.cat(places).argsort()]


def length_groups(lengths: list[int]) -> list[list[int]]:
    """Rows by falling length, cut where a row is less than half as long as the first of its group."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if not groups or 2 * lengths[row] < lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return [sorted(group) for group in groups]
