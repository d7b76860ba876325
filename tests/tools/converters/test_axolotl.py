"""Axolotl: how rows lie, what they were normalised to, Parquet, and the way back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tools.converters import samples
from tools.converters.converting import (
    by_name,
    changed,
    convert,
    converted,
    read,
    refused,
    require_equal,
)
from tools.converters.samples import TOPK, good_rollouts

import opd_store


def v1(line, rollout):
    """Rows of objects for the response only, under a field of any name."""
    rows = [
        [{"token": f"token_id:{i}", "logprob": float(p)} for i, p in zip(ids, values, strict=True)]
        for ids, values in zip(rollout.topk_ids, rollout.topk_logprob, strict=True)
    ]
    return {"input_ids": line["input_ids"], "vllm_logprobs": rows, "id": rollout.sample_id}


def label_aligned(line, rollout):
    """What axolotl's loader makes of a row for each token but the first: padded at the front."""
    for name in ("target_token_ids", "target_logprobs", "target_mask"):
        line[name] = [line[name][-1], *line[name][:-1]]
    return line


def without_labels(line, rollout):
    del line["labels"]
    return line


def right_padded(line, rollout):
    line["input_ids"] += [1, 1]
    line["labels"] += [-100, -100]
    line["attention_mask"] += [0, 0]
    for name, empty in (("target_token_ids", 0), ("target_logprobs", -1e9), ("target_mask", 0)):
        line[name] += [[empty]] * 2
    return line


@pytest.mark.parametrize("form", [v1, label_aligned, without_labels, right_padded])
def test_axolotl_forms(tmp_path, form):
    path, expected = changed(tmp_path, "axolotl", form)
    converted(None, path, tmp_path / "cache")
    found = by_name(tmp_path / "cache")
    assert found.keys() == expected.keys()
    for name, rollout in found.items():
        require_equal(rollout, expected[name], own=False)


def dense(late):
    """A row for every token, none empty: only the likeliest entries tell what rows are about."""

    def form(line, rollout):
        tokens = rollout.token_ids.tolist()
        before = [[token, (token + 1) % 38 + 3] for token in tokens[1 : rollout.prompt_len]]
        ids = before + rollout.topk_ids.tolist()
        values = [[-0.1, -3.0]] * len(before) + rollout.topk_logprob.tolist()
        extra = [[7, 8]]
        filler = [[-0.5, -2.0]]
        ids, values = (ids + extra, values + filler) if late else (extra + ids, filler + values)
        return {
            "input_ids": tokens,
            "target_token_ids": ids,
            "target_logprobs": values,
            "sample_id": rollout.sample_id,
        }

    return form


@pytest.mark.parametrize("late", [0, 1])
def test_axolotl_asks_the_rows_where_they_lie(tmp_path, late):
    path, expected = changed(tmp_path, "axolotl", dense(late))
    converted("axolotl", path, tmp_path / "cache")
    for name, rollout in by_name(tmp_path / "cache").items():
        was = expected[name]
        np.testing.assert_array_equal(rollout.topk_ids[was.prompt_len - 1 :], was.topk_ids)


def test_axolotl_renormalised_values_say_so(tmp_path):
    def prepared(line, rollout):
        before = rollout.prompt_len - 1
        whole = np.log(np.exp(rollout.topk_logprob.astype(float)).sum(axis=1))
        rows = (rollout.topk_logprob - whole[:, None]).tolist()
        line["target_logprobs"] = line["target_logprobs"][:before] + rows + [[-1e9]]
        return line

    path, expected = changed(tmp_path, "axolotl", prepared)
    lost = converted("axolotl", path, tmp_path / "cache")["lost"]
    assert any("renormalised" in what for what in lost)
    assert opd_store.open(tmp_path / "cache").meta.teacher.logprob_mode == "renormalised_topk"
    for name, rollout in by_name(tmp_path / "cache").items():
        assert (rollout.log_tail == -np.inf).all()
        assert rollout.teacher_logprob is None
        np.testing.assert_array_equal(rollout.topk_ids, expected[name].topk_ids)


def test_axolotl_from_parquet(tmp_path):
    path, expected = changed(tmp_path, "axolotl", lambda line, _: line)
    pq.write_table(pa.Table.from_pylist(read(path)), tmp_path / "a.parquet")
    assert converted(None, tmp_path / "a.parquet", tmp_path / "cache")["format"] == "axolotl"
    for name, rollout in by_name(tmp_path / "cache").items():
        require_equal(rollout, expected[name], own=False)


def no_rows_for_a_label(line, rollout):
    line["target_logprobs"][rollout.prompt_len] = [-1e9]
    line["target_token_ids"][rollout.prompt_len] = [0]
    return line


def too_many_rows(line, _):
    for name in ("target_token_ids", "target_logprobs", "target_mask"):
        line[name] += line[name][:1]
    return line


def holes(line, _):
    line["attention_mask"][0] = line["attention_mask"][-1] = 1
    line["attention_mask"][1] = 0
    return line


def no_tokens(line, _):
    del line["input_ids"]
    return line


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (no_rows_for_a_label, "rows are missing for tokens to train on"),
        (too_many_rows, "rows"),
        (holes, "one run of tokens"),
        (no_tokens, "neither input_ids nor messages"),
    ],
)
def test_axolotl_refusals(tmp_path, form, said):
    path, _ = changed(tmp_path, "axolotl", form)
    assert said in refused(convert("axolotl", path, tmp_path / "cache"), tmp_path / "cache")


def test_axolotl_round_trip(tmp_path):
    rollouts = [
        dataclasses.replace(rollout, loss_mask=np.arange(rollout.response_len) % 3 != 1)
        for rollout in good_rollouts()
    ]
    meta = opd_store.CacheMeta(vocab_size=samples.VOCAB, tokenizer_fingerprint="sha256:" + "0" * 64)
    with opd_store.create(tmp_path / "first", meta=meta, topk=TOPK, encoding="plain") as writer:
        writer.append_batch(rollouts)
    args = ("--to", "axolotl")
    result = convert(None, tmp_path / "first", tmp_path / "out.jsonl", *args)
    assert result.exit_code == 0, result.output
    first = read(tmp_path / "out.jsonl")[0]
    assert {len(value) for name, value in first.items() if name != "sample_id"} == {len(first["input_ids"])}
    converted(None, tmp_path / "out.jsonl", tmp_path / "again")
    expected = {rollout.sample_id: rollout for rollout in rollouts}
    for name, rollout in by_name(tmp_path / "again").items():
        require_equal(rollout, expected[name], own=False)
        np.testing.assert_array_equal(rollout.loss_mask, expected[name].loss_mask)
    result = convert(None, tmp_path / "first", tmp_path / "two.jsonl", *args, "--topk", 2)
    assert result.exit_code == 0, result.output
    assert max(len(row) for line in read(tmp_path / "two.jsonl") for row in line["target_token_ids"]) == 2
