"""llama.cpp: prompts as text, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tools.converters.converting import (
    by_name,
    changed,
    convert,
    refused,
    require_equal,
)
from tools.converters.samples import save_tokenizer, text

import opd_store


def after_sampling(line, _):
    for position in line["response"]["completion_probabilities"]:
        position["prob"] = np.exp(position.pop("logprob"))
        position["top_probs"] = position.pop("top_logprobs")
    return line


def old_server(line, _):
    found = line["response"]["completion_probabilities"]
    line["response"]["completion_probabilities"] = [
        {"content": position["token"], "probs": [{"tok_str": "A", "prob": 1.0}]} for position in found
    ]
    return line


def other_tokens(line, _):
    line["response"]["tokens"][0] += 1
    return line


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (after_sampling, "after sampling"),
        (old_server, "without token ids"),
        (other_tokens, "not the ones of"),
    ],
)
def test_llamacpp_refusals(tmp_path, form, said):
    path, _ = changed(tmp_path, "llamacpp", form)
    assert said in refused(convert("llamacpp", path, tmp_path / "cache"), tmp_path / "cache")


def test_llamacpp_prompt_as_text(tmp_path):
    def bare(line, rollout):
        return line["response"] | {
            "prompt": text(rollout.token_ids[: rollout.prompt_len]),
            "stop_type": "eos",
        }

    path, expected = changed(tmp_path, "llamacpp", bare)
    assert "--tokenizer" in refused(convert("llamacpp", path, tmp_path / "cache"), tmp_path / "cache")
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    result = convert(
        "llamacpp",
        path,
        tmp_path / "cache",
        "--encoding",
        "plain",
        "--tokenizer",
        tokenizer,
    )
    assert result.exit_code == 0, result.output
    assert any("encoded again" in what for what in json.loads(result.stdout)["lost"])
    wanted = list(expected.values())
    for rollout, was in zip(by_name(tmp_path / "cache").values(), wanted, strict=True):
        require_equal(rollout, was)
        assert rollout.finish_reason == "stop"
    assert opd_store.open(tmp_path / "cache").meta.teacher.logprob_temperature == 1.0
