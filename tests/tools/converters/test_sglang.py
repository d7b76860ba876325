"""SGLang's forms: nested and flat rows, inputs and outputs; and what is wrong with some."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from tools.converters import samples
from tools.converters.converting import (
    by_name,
    changed,
    convert,
    converted,
    refused,
    require_equal,
)
from tools.converters.samples import TOPK

import opd_store


def whole_input(line, rollout):
    """Scored from the first token on, without a border."""
    meta = line["meta_info"]
    before = rollout.token_ids[: rollout.prompt_len - 1].tolist()
    meta["input_token_logprobs"][0][0] = -1.0
    unasked = [[None if at == 0 else -1.0, token, None] for at, token in enumerate(before)]
    rows = [None if at == 0 else [[-1.0, token, None]] for at, token in enumerate(before)]
    if not before:
        meta["input_token_logprobs"][0][0] = None
        rows_here = meta["input_top_logprobs"]
    else:
        rows_here = [
            [[-1.0, int(rollout.token_ids[rollout.prompt_len - 1]), None]],
            *meta["input_top_logprobs"][1:],
        ]
    meta["input_token_logprobs"] = unasked + meta["input_token_logprobs"]
    meta["input_top_logprobs"] = rows + rows_here
    del line["input_ids"]
    return line


def flat_b64(line, rollout):
    del line["meta_info"]["input_top_logprobs"]
    line["meta_info"] |= samples.sglang_flat(rollout)
    return line


def flat_lists(line, rollout):
    del line["meta_info"]["input_top_logprobs"]
    line["meta_info"] |= {
        "input_top_logprobs_val_flat": rollout.topk_logprob.astype(float).ravel().tolist(),
        "input_top_logprobs_idx_flat": rollout.topk_ids.ravel().tolist(),
        # The first releases counted the empty row.
        "input_top_logprobs_shape": [rollout.response_len + 1, TOPK],
        "input_top_logprobs_null_prefix": 1,
    }
    return line


def sglang_generated(line, rollout):
    meta = line["meta_info"]
    meta["output_token_logprobs"] = meta["input_token_logprobs"][1:]
    meta["output_top_logprobs"] = meta["input_top_logprobs"][1:]
    meta["finish_reason"] = {"type": "stop", "matched": int(rollout.token_ids[-1])}
    prompt = rollout.token_ids[: rollout.prompt_len].tolist()
    meta["input_token_logprobs"] = [[None, prompt[-1], None]]
    meta["input_top_logprobs"] = [None]
    request = {"input_ids": prompt, "sampling_params": {"temperature": 0.7}}
    return {"request": request, "response": {"meta_info": meta, "text": ""}}


@pytest.mark.parametrize("form", [whole_input, flat_b64, flat_lists, sglang_generated])
def test_sglang_forms(tmp_path, form):
    path, expected = changed(tmp_path, "sglang", form)
    lost = converted(None, path, tmp_path / "cache")["lost"]
    found = by_name(tmp_path / "cache")
    assert found.keys() == expected.keys()
    teacher = opd_store.open(tmp_path / "cache").meta.teacher
    assert teacher.logprob_temperature == (0.7 if form is sglang_generated else None)
    for name, rollout in found.items():
        if form is whole_input:
            assert rollout.prompt_len == 1
            np.testing.assert_array_equal(rollout.token_ids, expected[name].token_ids)
            np.testing.assert_array_equal(
                rollout.topk_ids[expected[name].prompt_len - 1 :], expected[name].topk_ids
            )
            assert any("border" in what for what in lost)
        else:
            require_equal(rollout, expected[name])
            assert rollout.finish_reason == ("stop" if form is sglang_generated else "unknown")


def lacks_input(line, _):
    del line["input_ids"]
    return line


def other_input(line, _):
    line["input_ids"][-1] += 1
    return line


def damaged_base64(line, rollout):
    line = flat_b64(line, rollout)
    line["meta_info"]["input_top_logprobs_val_flat_b64"] += "!"
    return line


def short_base64(line, rollout):
    line = flat_b64(line, rollout)
    line["meta_info"]["input_top_logprobs_val_flat_b64"] = base64.b64encode(b"1234").decode()
    return line


def strange_dtype(line, rollout):
    line = flat_b64(line, rollout)
    line["meta_info"]["input_top_logprobs_val_flat_b64_dtype"] = "object"
    return line


def other_temperature(line, rollout):
    line = sglang_generated(line, rollout)
    line["request"]["sampling_params"]["temperature"] = 0.5 + 0.1 * rollout.prompt_len
    return line


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lacks_input, "logprob_start_len 0, or add input_ids"),
        (other_input, "not the tokens of input_token_logprobs"),
        (damaged_base64, "is damaged"),
        (short_base64, "1 log-probs and"),
        (strange_dtype, "dtype 'object'"),
        (other_temperature, "but the first response at"),
    ],
)
def test_sglang_refusals(tmp_path, form, said):
    path, _ = changed(tmp_path, "sglang", form)
    assert said in refused(convert("sglang", path, tmp_path / "cache"), tmp_path / "cache")


def test_sglang_without_a_request_has_no_temperature(tmp_path):
    def bare(line, rollout):
        line = sglang_generated(line, rollout)
        return line["response"] | {"input_ids": line["request"]["input_ids"]}

    path, _ = changed(tmp_path, "sglang", bare)
    lost = converted("sglang", path, tmp_path / "cache")["lost"]
    assert any("temperature" in what for what in lost)
    assert opd_store.open(tmp_path / "cache").meta.teacher.logprob_temperature is None
