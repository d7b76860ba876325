"""A cache as Axolotl trains on it: row t is about token t + 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from opd_store import NO_ID, Cache, InvalidArgumentError, Rollout
from opd_tools.converters.core.format import WriteSettings
from opd_tools.converters.trainers.axolotl_line import UNTRAINED


def write(cache: Cache, out: Path, settings: WriteSettings, on_progress: Callable[[int, int], None]) -> None:
    """One JSONL file as the trainer takes it: row t is about token t + 1, since it shifts labels only."""
    columns = ("topk_ids", "topk_logprob", "log_tail", "loss_mask", "sample_id")
    with out.open("w", encoding="ascii") as file:
        for done, rollout in enumerate(cache.scan(columns=columns, ranks=settings.ranks(cache)), 1):
            if rollout.topk_ids is None:
                raise InvalidArgumentError("axolotl: the cache has no top-k")
            file.write(_line(rollout))
            if done % 64 == 0 or done == len(cache):
                on_progress(done, len(cache))


def _line(rollout: Rollout) -> str:
    assert rollout.topk_ids is not None
    assert rollout.topk_logprob is not None
    size, first = len(rollout.token_ids), rollout.prompt_len - 1
    kept = rollout.topk_ids != NO_ID
    counts = kept.sum(axis=1).tolist()
    tokens = rollout.token_ids.tolist()
    mask = [True] * rollout.response_len if rollout.loss_mask is None else rollout.loss_mask.tolist()
    labels = [UNTRAINED] * rollout.prompt_len
    labels += [
        token if on else UNTRAINED for token, on in zip(tokens[rollout.prompt_len :], mask, strict=True)
    ]
    # Nine digits tell every float32; a row of the trainer's own padding where there is none.
    values = [[f"{value:.9g}" for value in row] for row in rollout.topk_logprob.tolist()]
    ids = [list(map(str, row)) for row in rollout.topk_ids.tolist()]

    def rows(cells: list[list[str]], empty: str) -> str:
        inner = [f"[{','.join(row[:count])}]" for row, count in zip(cells, counts, strict=True)]
        return f"[{','.join([f'[{empty}]'] * first + inner + [f'[{empty}]'])}]"

    on_off = [["1" if on else "0"] * count for on, count in zip(mask, counts, strict=True)]
    fields = {
        "input_ids": json.dumps(tokens),
        "labels": json.dumps(labels),
        "attention_mask": json.dumps([1] * size),
        "target_token_ids": rows(ids, "0"),
        "target_logprobs": rows(values, "-1e9"),
        "target_mask": rows(on_off, "0"),
    }
    if rollout.sample_id is not None:
        fields["sample_id"] = json.dumps(rollout.sample_id)
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}\n"
