"""vLLM's forms: HTTP, offline, flat, generated, batch runner; and what is wrong with some."""

from __future__ import annotations

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
from tools.converters.samples import TOPK, WORDS, save_tokenizer


def request_output(line, rollout):
    """An offline RequestOutput whose fields somebody dumped."""
    choice = line["response"]["choices"][0]
    return {
        "request_id": rollout.sample_id,
        "prompt": None,
        "prompt_token_ids": choice["prompt_token_ids"],
        "prompt_logprobs": choice["prompt_logprobs"],
        "outputs": [{"index": 0, "text": "A", "token_ids": [5], "logprobs": None, "finish_reason": "length"}],
        "prompt_len": rollout.prompt_len,
    }


def batch_line(line, rollout):
    """A line of `vllm run-batch`, joined with its request."""
    choice = dict(line["response"]["choices"][0])
    ids = choice.pop("prompt_token_ids")
    return {
        "id": "vllm-1",
        "custom_id": rollout.sample_id,
        "response": {"status_code": 200, "request_id": "b", "body": {"id": "c", "choices": [choice]}},
        "error": None,
        "request": {"custom_id": rollout.sample_id, "method": "POST", "body": {"prompt": ids}},
        "prompt_len": rollout.prompt_len,
    }


def chat(line, rollout):
    """/v1/chat/completions: rows of the prompt beside the choices."""
    choice = line["response"]["choices"][0]
    return {
        "id": rollout.sample_id,
        "prompt_token_ids": choice["prompt_token_ids"],
        "prompt_logprobs": choice["prompt_logprobs"],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "A"}, "logprobs": None}],
        "prompt_len": rollout.prompt_len,
    }


def flat(line, rollout):
    """A RequestOutput with FlatLogprobs: the token first, then the likeliest, where it may be again."""
    fields = {"start_indices": [], "end_indices": [], "token_ids": [], "logprobs": [], "ranks": []}
    rows = line["response"]["choices"][0]["prompt_logprobs"]
    for place, row in enumerate(rows):
        fields["start_indices"].append(len(fields["token_ids"]))
        entries = [(int(i), e["logprob"], e["rank"]) for i, e in (row or {}).items()]
        if place >= rollout.prompt_len and entries[0][2] <= TOPK:
            ordered = sorted(entries, key=lambda entry: entry[2])
            entries = [entries[0], *ordered]
        for token, value, rank in entries:
            fields["token_ids"].append(token)
            fields["logprobs"].append(value)
            fields["ranks"].append(rank)
        fields["end_indices"].append(len(fields["token_ids"]))
    return request_output(line, rollout) | {"prompt_logprobs": fields | {"decoded_tokens": []}}


def generated(line, rollout):
    """A RequestOutput of a response that the model itself generated."""
    rows = line["response"]["choices"][0]["prompt_logprobs"][rollout.prompt_len :]
    return {
        "request_id": rollout.sample_id,
        "prompt_token_ids": rollout.token_ids[: rollout.prompt_len].tolist(),
        "prompt_logprobs": None,
        "outputs": [
            {
                "index": 0,
                "token_ids": rollout.response_ids.tolist(),
                "logprobs": rows,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
    }


def completion(line, rollout):
    """/v1/completions of a generated response, with return_tokens_as_token_ids and return_token_ids."""
    choice = generated(line, rollout)["outputs"][0]
    rows = [
        {f"token_id:{i}": float(p) for i, p in zip(ids, values, strict=True)}
        for ids, values in zip(rollout.topk_ids, rollout.topk_logprob, strict=True)
    ]
    choice["logprobs"] = {
        "tokens": [f"token_id:{token}" for token in rollout.response_ids],
        "token_logprobs": rollout.teacher_logprob.astype(float).tolist(),
        "top_logprobs": rows,
        "text_offset": [],
    }
    prompt = rollout.token_ids[: rollout.prompt_len].tolist()
    return {"id": rollout.sample_id, "choices": [choice | {"prompt_token_ids": prompt}]}


def completion_text(line, rollout):
    """The same by text, which the tokenizer has to tell apart."""
    line = completion(line, rollout)
    choice = line["choices"][0]
    found = choice["logprobs"]

    def spelt(name):
        return WORDS[int(name.removeprefix("token_id:"))]

    found["tokens"] = [spelt(name) for name in found["tokens"]]
    found["top_logprobs"] = [{spelt(name): p for name, p in row.items()} for row in found["top_logprobs"]]
    del choice["token_ids"]
    return line


@pytest.mark.parametrize("form", [completion, completion_text])
def test_vllm_completions(tmp_path, form):
    path, expected = changed(tmp_path, "vllm", form)
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    assert converted(None, path, tmp_path / "cache", "--tokenizer", tokenizer)["format"] == "vllm"
    for name, rollout in by_name(tmp_path / "cache").items():
        require_equal(rollout, expected[name])
        assert rollout.finish_reason == ("stop" if form is completion else "unknown")


@pytest.mark.parametrize("form", [request_output, batch_line, chat, flat, generated])
def test_vllm_forms(tmp_path, form):
    path, expected = changed(tmp_path, "vllm", form)
    assert converted(None, path, tmp_path / "cache")["format"] == "vllm"
    found = by_name(tmp_path / "cache")
    assert found.keys() == expected.keys()
    for name, rollout in found.items():
        # An entry of a token outside the likeliest would be a rank that it is not.
        require_equal(rollout, expected[name])
        assert rollout.finish_reason == ("stop" if form is generated else "unknown")


def test_vllm_without_a_border(tmp_path):
    path, expected = changed(tmp_path, "vllm", lambda line, _: line["response"])
    lost = converted("vllm", path, tmp_path / "cache")["lost"]
    assert lost["rollouts without a border between prompt and response: all but the first token counts"] == 12
    found = by_name(tmp_path / "cache")
    for name, rollout in found.items():
        assert rollout.prompt_len == 1
        np.testing.assert_array_equal(rollout.token_ids, expected[name].token_ids)


def test_vllm_log_probs_of_the_tokens_only(tmp_path):
    """prompt_logprobs=0: the one entry of a row is no rank."""

    def only_own(line, rollout):
        rows = line["response"]["choices"][0]["prompt_logprobs"]
        line["response"]["choices"][0]["prompt_logprobs"] = [
            row and dict([next(iter(row.items()))]) for row in rows
        ]
        return line

    path, expected = changed(tmp_path, "vllm", only_own)
    converted("vllm", path, tmp_path / "cache")
    for name, rollout in by_name(tmp_path / "cache").items():
        assert rollout.topk_ids is None
        np.testing.assert_array_equal(rollout.teacher_logprob, expected[name].teacher_logprob)


def without_ids(line, _):
    del line["response"]["choices"][0]["prompt_token_ids"]
    return line


def no_rows(line, _):
    line["response"]["choices"][0]["prompt_logprobs"] = None
    return line


def short_rows(line, _):
    line["response"]["choices"][0]["prompt_logprobs"].pop()
    return line


def text_keys(line, _):
    line["response"]["choices"][0]["prompt_logprobs"][1] = {"Hello": {"logprob": -1.0}}
    return line


def echoed(line, rollout):
    tokens = {"tokens": ["A", "B"], "token_logprobs": [None, -1.0], "top_logprobs": None}
    return {"prompt_token_ids": [3], "choices": [{"logprobs": tokens}]}


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (without_ids, "prompt_token_ids"),
        (no_rows, "neither prompt_logprobs nor"),
        (short_rows, "rows of prompt_logprobs"),
        (text_keys, "not laid out as this format is"),
        (echoed, "echoed prompt"),
    ],
)
def test_vllm_refusals(tmp_path, form, said):
    path, _ = changed(tmp_path, "vllm", form)
    assert said in refused(convert("vllm", path, tmp_path / "cache"), tmp_path / "cache")
