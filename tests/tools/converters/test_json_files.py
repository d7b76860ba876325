"""JSON that other projects' own code wrote (see make_json_files.py), and JSON however it lies."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tools.converters.converting import (
    by_name,
    changed,
    convert,
    converted,
    lines,
    read,
    refused,
)
from tools.converters.samples import SAMPLES, good_rollouts, save_tokenizer
from tools.converters.test_vllm import batch_line

import opd_store

FILES = Path(__file__).parent / "files" / "json"


@pytest.mark.parametrize("path", sorted(FILES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_files_of_the_projects_themselves(tmp_path, path):
    how = "sglang" if path.stem.startswith("sglang") else path.stem.removesuffix("-v1").removesuffix("-v2")
    assert (
        converted(None, path, tmp_path / "cache", "--tokenizer", save_tokenizer(tmp_path / "t.json"))[
            "format"
        ]
        == how
    )
    renormalised = how == "axolotl"
    found = by_name(tmp_path / "cache")
    expected = {row["sample_id"]: row for row in json.loads((FILES / "expected.json").read_text())}
    assert found.keys() == expected.keys()
    for name, rollout in found.items():
        row = expected[name]
        assert rollout.token_ids.tolist() == row["token_ids"]
        assert rollout.prompt_len == row["prompt_len"]
        assert rollout.topk_ids.tolist() == row["topk_ids"]
        wanted = np.array(row["topk_logprob"])
        if renormalised:
            wanted -= np.log(np.exp(wanted).sum(axis=1, keepdims=True))
        # Axolotl goes through probabilities in float32.
        np.testing.assert_allclose(rollout.topk_logprob, wanted, rtol=0, atol=2e-5 if renormalised else 1e-6)
        if how in ("sglang", "openai"):
            np.testing.assert_allclose(rollout.teacher_logprob, row["teacher_logprob"], atol=1e-6)


def test_requests_that_failed_are_left_out_and_counted(tmp_path):
    path, expected = changed(tmp_path, "vllm", batch_line)
    failed = [
        {"custom_id": "x", "response": None, "error": {"message": "too long"}},
        {"custom_id": "y", "response": {"status_code": 400, "body": {"message": "bad"}}, "error": None},
    ]
    lines(path, [*read(path)[:6], *failed, *read(path)[6:]])
    lost = converted("vllm", path, tmp_path / "cache")["lost"]
    assert lost["requests that failed, left out"] == 2
    assert by_name(tmp_path / "cache").keys() == expected.keys()


def test_only_failed_requests_are_no_cache(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"custom_id": "x", "response": None, "error": {"message": "no"}}])
    line = refused(convert("vllm", path, tmp_path / "cache"), tmp_path / "cache")
    assert "no rollout in it" in line
    assert "1 requests that failed" in line


@pytest.mark.parametrize("form", ["indented", "list", "gzip", "directory"])
def test_json_however_it_lies(tmp_path, form):
    good = SAMPLES["vllm"].write(tmp_path, good_rollouts())
    values, path = read(good), tmp_path / "other.json"
    if form == "indented":
        path.write_text(json.dumps(values[:1], indent=2))
        values = values[:1]
    elif form == "list":
        path.write_text(json.dumps(values))
    elif form == "gzip":
        path.write_bytes(gzip.compress(good.read_bytes()))
    else:
        path = tmp_path / "many"
        path.mkdir()
        for number, value in enumerate(values):
            (path / f"part-{number}.jsonl").write_text(json.dumps(value))
        (path / "README.md").write_text("no data")
    converted(None, path, tmp_path / "cache")
    names = [rollout.sample_id for rollout in opd_store.open(tmp_path / "cache").scan()]
    assert names == [value["response"]["id"] for value in values]


def test_a_damaged_gzip_file_is_refused(tmp_path):
    good = SAMPLES["vllm"].write(tmp_path, good_rollouts(60))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(good.read_bytes())[:-200])
    line = refused(convert("vllm", path, tmp_path / "cache"), tmp_path / "cache")
    assert "cut off" in line
