"""JSONL of NeMo-Aligner's knowledge distillation: top-k logits with the logsumexp of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from opd_store import FormatError
from opd_tools.converters.core.format import Format, ReadSettings
from opd_tools.converters.core.record import Contents, Record, Tally
from opd_tools.converters.core.source import Source
from opd_tools.converters.reading.json_rows import integers, name_of, numbers, padded, records, width

_FIELDS = {"tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", "log_sum_exp_logits"}


def detect(source: Source) -> bool:
    """Whether the first line has its fields."""
    first = source.first_json()
    return isinstance(first, dict) and set(first) >= _FIELDS


def read(source: Source, settings: ReadSettings) -> Contents:
    """Log-probs are logits minus their logsumexp; the tail follows from it too."""
    tally = Tally()
    return Contents(
        records=_records(source, tally),
        topk=width(_records(source, Tally()), settings),
        temperature=1.0,
        tally=tally,
    )


def _records(source: Source, tally: Tally) -> Iterator[Record]:
    def one(row: Any, where: str) -> Iterator[Record]:  # noqa: ANN401
        tokens, labels = (integers(row[name], where, name) for name in ("tokens", "labels"))
        ids, logits = padded(row["topk_token_ids"], row["topk_logits"], where)
        total = numbers(row["log_sum_exp_logits"], where, "log_sum_exp_logits")
        mask = numbers(row["loss_mask"], where, "loss_mask") != 0
        sizes = {len(tokens), len(labels), len(ids), len(total), len(mask)}
        if len(sizes) > 1:
            raise FormatError(f"{where}: fields of different lengths, {sorted(sizes)}")
        trained = np.flatnonzero(mask)
        if not len(trained):
            tally["rows without a token to train on, left out"] += 1
            return
        # Row t is about label t, which is token t + 1. What follows the last trained one is padding.
        first, end = int(trained[0]), int(trained[-1]) + 1
        if not np.array_equal(tokens[1:end], labels[: end - 1]):
            raise FormatError(f"{where}: labels are not the tokens one place later")
        logprob = logits[first:end] - total[first:end, None]
        inside = mask[first:end]
        yield Record(
            where=where,
            token_ids=np.append(tokens[:end], labels[end - 1]),
            prompt_len=first + 1,
            topk_ids=ids[first:end],
            topk_logprob=logprob,
            loss_mask=None if inside.all() else inside,
            sample_id=name_of(row.get("index")),
        )

    return records(source, one)


FORMAT = Format(
    name="nemo-aligner",
    title="NeMo-Aligner knowledge distillation (JSONL)",
    alignment="source: row t is about token t + 1, which is label t",
    keeps="token ids, loss mask, log-probs as logits minus their logsumexp, and the tail with it",
    loses="log-probs of tokens outside the top-k; rows of the prompt",
    tested="a file that its own code wrote, of our tensors, and files built from its documented layout",
    detect=detect,
    read=read,
)
