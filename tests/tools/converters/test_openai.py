"""OpenAI chat completions: tokens by their bytes or ids, prompts as messages, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tools.converters.converting import (
    by_name,
    changed,
    convert,
    converted,
    refused,
    require_equal,
)
from tools.converters.samples import WORDS, save_tokenizer, text


def with_ids(line, rollout):
    """As vLLM answers return_tokens_as_token_ids: no text to go by."""
    body = line["response"]["body"]
    for position in body["choices"][0]["logprobs"]["content"]:
        for entry in (position, *position["top_logprobs"]):
            number = WORDS.index(bytes(entry["bytes"]).decode())
            entry |= {"token": f"token_id:{number}", "bytes": None}
    return line | {"prompt_token_ids": rollout.token_ids[: rollout.prompt_len].tolist()}


def test_openai_with_token_ids(tmp_path):
    path, expected = changed(tmp_path, "openai", with_ids)
    converted(None, path, tmp_path / "cache")
    for name, rollout in by_name(tmp_path / "cache").items():
        require_equal(rollout, expected[name])


def test_openai_leaves_out_what_is_spelt_alike(tmp_path, monkeypatch):
    from opd_tools.converters.reading.text import TextTokenizer

    spelling = TextTokenizer.spelling
    monkeypatch.setattr(TextTokenizer, "spelling", lambda self: spelling(self) | {b"B": (4, 40)})
    path, expected = changed(tmp_path, "openai", lambda line, _: line, n=40)
    lost = converted("openai", path, tmp_path / "cache")["lost"]
    sampled = {name for name, rollout in expected.items() if 4 in rollout.response_ids}
    assert sampled
    assert lost["rollouts with a token that is spelt like no id or like several, left out"] == len(sampled)
    found = by_name(tmp_path / "cache")
    assert found.keys() == expected.keys() - sampled
    for rollout in found.values():
        assert not (rollout.topk_ids == 4).any()
        mass = np.exp(rollout.topk_logprob).sum(axis=1) + np.exp(rollout.log_tail)
        np.testing.assert_allclose(mass, 1, atol=1e-6)


def no_prompt(line, _):
    del line["prompt"]
    return line


def messages_only(line, _):
    del line["prompt"]
    return line | {"messages": [{"role": "user", "content": "AB"}]}


def other_message(line, _):
    line["response"]["body"]["choices"][0]["message"]["content"] += "AAA"
    return line


def no_logprobs(line, _):
    line["response"]["body"]["choices"][0]["logprobs"] = None
    return line


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (no_prompt, "nothing says what the prompt was"),
        (messages_only, "chat template"),
        (other_message, "but the message is"),
        (no_logprobs, "without logprobs"),
    ],
)
def test_openai_refusals(tmp_path, form, said):
    path, _ = changed(tmp_path, "openai", form)
    assert said in refused(convert("openai", path, tmp_path / "cache"), tmp_path / "cache")


def test_openai_messages_with_a_chat_template(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}Z{% endif %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    path, _ = changed(tmp_path, "openai", messages_only)
    lost = converted("openai", path, tmp_path / "cache")["lost"]
    assert any("encoded again" in what for what in lost)
    for rollout in by_name(tmp_path / "cache").values():
        assert text(rollout.token_ids[: rollout.prompt_len]) == "AB Z"
    assert tokenizer.is_file()
