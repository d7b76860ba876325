"""Reading prompts and rollouts: every fault is named by file, line and field."""

from __future__ import annotations

import json

import numpy as np
import pytest
from train.tiny_models import (
    CONTEXT,
    TEMPLATE,
    VOCAB,
    loaded,
    random_rollouts,
    rollouts_jsonl,
    save_tiny,
    tiny_tokenizer,
    write_jsonl,
)

from opd_store import FormatError, InvalidArgumentError, InvalidRolloutError
from opd_train import load_causal_lm, read_prompts, read_rollouts


@pytest.fixture(scope="module")
def lm(models):
    return loaded(models["llama"])


def test_prompts_of_every_form(tmp_path):
    lm = load_causal_lm(save_tiny(tmp_path / "model", tokenizer=tiny_tokenizer(template=TEMPLATE)))
    rows = [
        {"prompt": "abc", "id": "text", "answer": 7},
        {"prompt_ids": [5, 6, VOCAB - 1]},
        {"messages": [{"role": "user", "content": "ba"}], "id": 12, "answer": "x"},
    ]
    found = read_prompts(write_jsonl(tmp_path / "prompts.jsonl", rows), lm)
    ids = [prompt.ids.tolist() for prompt in found]
    # Nothing is added to a text: no <s> in front. The template writes "u:ba a:".
    assert ids[0] == [4, 5, 6]
    assert ids[1] == [5, 6, VOCAB - 1]
    assert ids[2] == lm.tokenizer.convert_tokens_to_ids(list("u:ba a:"))
    assert [prompt.sample_id for prompt in found] == ["text", "line-2", "12"]
    assert [prompt.label for prompt in found] == ["7", None, "x"]
    assert [len(prompt.ids) for prompt in read_prompts(tmp_path / "prompts.jsonl", lm, limit=2)] == [3, 3]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("1" * 5000, "line 2: not JSON"),
        ("7", "line 2: expected a JSON object"),
        ("{}", "line 2: expected exactly one of prompt_ids, messages and prompt, found none"),
        ('{"prompt": "a", "prompt_ids": [4]}', "line 2: expected exactly one"),
        ('{"prompt": 5}', "line 2, field prompt: expected text, found 5"),
        ('{"prompt": ""}', "line 2, field prompt: expected at least one token"),
        ('{"prompt_ids": []}', "line 2, field prompt: expected at least one token"),
        ('{"prompt_ids": "ab"}', "line 2, field prompt_ids: expected a list of token ids, found 'ab'"),
        ('{"prompt_ids": [1, true]}', "line 2, field prompt_ids: expected a list of token ids"),
        ('{"prompt_ids": [1.5]}', "line 2, field prompt_ids: expected a list of token ids"),
        ('{"prompt_ids": [-1]}', "line 2, field prompt_ids: expected a list of token ids"),
        ('{"prompt_ids": [4294967296]}', "line 2, field prompt_ids: expected a list of token ids"),
        (f'{{"prompt_ids": [1, {VOCAB}]}}', f"line 2, field prompt_ids: id {VOCAB}, expected below {VOCAB}"),
        ('{"messages": [{"role": "user"}]}', "line 2, field messages: .*llama has no chat template"),
    ],
)
def test_a_bad_prompt_is_named(lm, tmp_path, line, problem):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "ab"}\n' + line + "\n")
    with pytest.raises(FormatError, match=f"{path}, {problem}"):
        read_prompts(path, lm)


def test_a_prompt_longer_than_the_context(lm, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a" * CONTEXT}])
    with pytest.raises(InvalidRolloutError, match=f"line 1, field prompt: {CONTEXT} tokens.*{CONTEXT}"):
        read_prompts(path, lm)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_an_empty_file(lm, tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(FormatError, match="no prompts in it"):
        read_prompts(tmp_path / "p.jsonl", lm)


def test_not_text_and_not_there(lm, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(FormatError, match="not UTF-8"):
        read_prompts(tmp_path / "p.jsonl", lm)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(InvalidArgumentError, match=f"{path}: cannot read"):
            read_prompts(path, lm)


def test_a_chat_template_that_refuses(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    lm = load_causal_lm(save_tiny(tmp_path / "model", tokenizer=tiny_tokenizer(template=template)))
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(FormatError, match=r"line 1, field messages: .*roles must alternate"):
        read_prompts(path, lm)


def test_rollouts_come_back_as_written(lm, tmp_path):
    rollouts = random_rollouts(5)
    path = rollouts_jsonl(tmp_path / "r.jsonl", lm, rollouts, sampler={"temperature": 0.8})
    meta, found = read_rollouts(path)
    assert (meta.tokenizer_fingerprint, meta.vocab_size) == (lm.tokenizer_fingerprint, VOCAB)
    assert meta.sampler.temperature == 0.8
    for left, right in zip(found, rollouts, strict=True):
        np.testing.assert_array_equal(left.token_ids, right.token_ids)
        assert (left.prompt_len, left.sample_id) == (right.prompt_len, right.sample_id)
        np.testing.assert_array_equal(left.behaviour_logprob, right.behaviour_logprob)


GOOD = {"prompt_ids": [4, 5], "response_ids": [6, 7, 8]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"response_ids": []}, "field response_ids: expected at least one token, found none"),
        ({"prompt_ids": []}, "field prompt_ids: expected at least one token, found none"),
        ({"response_ids": None}, "field response_ids: expected a list of token ids, found None"),
        ({"behaviour_logprob": [-1.0]}, "field behaviour_logprob: expected 3 values, found 1"),
        ({"reference_logprob": -1.0}, "field reference_logprob: expected a list of float or int, found -1.0"),
        ({"behaviour_logprob": [-1.0, [2], 3]}, "field behaviour_logprob: expected a list of float or int"),
        ({"behaviour_logprob": ["x", "y", "z"]}, "field behaviour_logprob: expected a list of float or int"),
        ({"loss_mask": [True, False]}, "field loss_mask: expected 3 values, found 2"),
    ],
)
def test_a_bad_rollout_is_named(lm, tmp_path, change, problem):
    path = rollouts_jsonl(tmp_path / "r.jsonl", lm, [])
    with path.open("a") as file:
        file.write(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(FormatError, match=f"{path}, line 3, {problem}"):
        read_rollouts(path)


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        ({"prompt_ids": [1], "response_ids": [2]}, "line 1, field rollouts: expected a head line"),
        ({"rollouts": 2}, "line 1, field rollouts"),
        ({"rollouts": 1, "vocab_size": 5}, "line 1.*tokenizer_fingerprint"),
        ({"rollouts": 1, "vocab_size": "5", "tokenizer_fingerprint": "sha256:" + "0" * 64}, "vocab_size"),
        ({"rollouts": 1, "vocab_size": 5, "tokenizer_fingerprint": "sha256:0"}, "tokenizer_fingerprint"),
        ({"rollouts": 1, "colour": "red"}, "colour"),
    ],
)
def test_a_bad_head_line_is_named(tmp_path, head, problem):
    path = write_jsonl(tmp_path / "r.jsonl", [head, GOOD])
    with pytest.raises(FormatError, match=f"{path}.*{problem}"):
        read_rollouts(path)


def test_no_rollouts(lm, tmp_path):
    with pytest.raises(FormatError, match="no rollouts after the head line"):
        read_rollouts(rollouts_jsonl(tmp_path / "r.jsonl", lm, []))
    (tmp_path / "empty").write_text("")
    with pytest.raises(FormatError, match="line 1, field rollouts"):
        read_rollouts(tmp_path / "empty")
