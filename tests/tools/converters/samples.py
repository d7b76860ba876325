"""A good file of every format that is read, made of given rollouts, which tests then break.

`SAMPLES` has one entry a format that `opd convert` reads; a test fails where one is missing. Writers put down
whatever they are given, also what no teacher can have said, so that a test spoils rollouts instead of bytes.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tools.converters import binary_samples
from tools.converters.sizes import TOPK, VOCAB

from opd_store import NO_ID, Rollout


def save_tokenizer(path: Path) -> Path:
    """tokenizer.json with a token a character: <s>, </s>, a space, and letters."""
    vocab = {"<s>": 0, "</s>": 1, " ": 2} | {chr(ord("A") + i): i + 3 for i in range(VOCAB - 3)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path))
    return path


WORDS = ["<s>", "</s>", " ", *(chr(ord("A") + i) for i in range(VOCAB - 3))]
"""By id, what tokens of `save_tokenizer` spell."""


def text(ids: Any) -> str:
    """What ids spell; those that the tokenizer lacks spell what nothing does."""
    return "".join(WORDS[i] if 0 <= i < VOCAB else "\u00e9" for i in ids)


def good_rollouts(n: int = 12, *, seed: int = 0, topk: int = TOPK) -> list[Rollout]:
    """Rollouts of letters under a teacher that holds what was sampled likeliest three times of four."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(n):
        size, prompt = int(rng.integers(4, 14)), int(rng.integers(1, 5))
        tokens = rng.integers(3, VOCAB, prompt + size)
        logits = rng.normal(0, 2, (size, VOCAB))
        liked = rng.random(size) < 0.75
        logits[liked, tokens[prompt:][liked]] += 9
        logits -= np.log(np.exp(logits).sum(axis=1))[:, None]
        logits = logits.astype(np.float32)
        ids = np.argsort(-logits, axis=1, kind="stable")[:, :topk]
        logprob = np.take_along_axis(logits, ids, 1)
        mass = np.exp(logprob.astype(np.float64)).sum(axis=1)
        found.append(
            Rollout(
                token_ids=tokens.astype(np.uint32),
                prompt_len=prompt,
                teacher_logprob=logits[np.arange(size), tokens[prompt:]],
                topk_ids=ids.astype(np.uint32),
                topk_logprob=logprob,
                log_tail=np.log1p(-mass).astype(np.float32),
                sample_id=f"r{number}",
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How to write a file of a format, and what an importer gets back from it."""

    write: Callable[[Path, list[Rollout]], Path]
    """Given a new directory and rollouts; gives the path to convert."""
    topk: bool = True
    """Whether it holds a top-k."""
    own: bool = True
    """Whether it holds log-probs of the tokens themselves, also of those outside the top-k."""
    named: bool = True
    """Whether it has sample ids."""
    prompt_len: bool = True
    """Whether it tells prompt and response apart."""
    renormalised: bool = False
    """Whether only ratios within a row come back."""
    error: float = 1e-6
    """Nats that a log-prob may be off."""
    options: tuple[str, ...] = ()
    """More options of `opd convert`."""
    cannot: frozenset[str] = frozenset()
    """Faults of `test_bad_files.FAULTS` that the layout has no way to express."""
    needs_tokenizer: bool = False
    """Whether the tokens are text."""


def _rows(rollout: Rollout) -> list[list[tuple[int, float]]]:
    """Entries of each row, padding left out."""
    return [
        [(int(i), float(p)) for i, p in zip(ids, values, strict=True) if i != NO_ID]
        for ids, values in zip(rollout.topk_ids, rollout.topk_logprob, strict=True)
    ]


def _lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _vllm_row(token: int, own: float, row: list[tuple[int, float]]) -> dict[str, Any]:
    """The token first, then the likeliest: a dict as vLLM's `append_logprobs_for_next_position` makes it."""
    rank = next((place for place, (i, _) in enumerate(row, 1) if i == token), VOCAB)
    entries = {str(token): {"logprob": own, "rank": rank, "decoded_token": text([token])}}
    for place, (i, value) in enumerate(row, 1):
        # A repeated id ends up as one key, as in any dict.
        entries[str(i)] = {"logprob": value, "rank": place, "decoded_token": text([i])}
    return entries


def _vllm_rows(rollout: Rollout) -> list[dict[str, Any]]:
    return [
        _vllm_row(int(token), float(own), row)
        for token, own, row in zip(
            rollout.response_ids, rollout.teacher_logprob, _rows(rollout), strict=False
        )
    ]


def vllm(directory: Path, rollouts: list[Rollout]) -> Path:
    """/v1/completions with prompt_logprobs over prompt and response, as a line each."""
    lines = []
    for r in rollouts:
        unasked = [_vllm_row(int(t), -0.5, [(int(t), -0.5)]) for t in r.token_ids[1 : r.prompt_len]]
        choice = {
            "index": 0,
            "text": "A",
            "finish_reason": "length",
            "stop_reason": None,
            "prompt_logprobs": [None, *unasked, *_vllm_rows(r)],
            "prompt_token_ids": r.token_ids.tolist(),
        }
        body = {"id": r.sample_id, "object": "text_completion", "choices": [choice]}
        lines.append(
            {"request": {"model": "m", "max_tokens": 1}, "response": body, "prompt_len": r.prompt_len}
        )
    return _lines(directory / "vllm.jsonl", lines)


def sglang(directory: Path, rollouts: list[Rollout]) -> Path:
    """/generate with max_new_tokens 0 and logprob_start_len at the prompt's end."""
    lines = []
    for r in rollouts:
        start = r.prompt_len - 1
        own = [[None, int(r.token_ids[start]), None]]
        own += [[float(p), int(t), None] for p, t in zip(r.teacher_logprob, r.response_ids, strict=True)]
        meta = {
            "id": r.sample_id,
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(r.token_ids),
            "completion_tokens": 0,
            "input_token_logprobs": own,
            "input_top_logprobs": [None, *([[p, i, None] for i, p in row] for row in _rows(r))],
            "output_token_logprobs": [],
            "output_top_logprobs": [],
        }
        lines.append({"text": "", "meta_info": meta, "input_ids": r.token_ids.tolist()})
    return _lines(directory / "sglang.jsonl", lines)


def sglang_flat(rollout: Rollout) -> dict[str, Any]:
    """`input_top_logprobs_*` as return_flat_raw_top_logprobs_b64 gives them."""
    ids, values = rollout.topk_ids.astype("<i4"), rollout.topk_logprob.astype("<f4")
    return {
        "input_top_logprobs_val_flat_b64": base64.b64encode(values.tobytes()).decode(),
        "input_top_logprobs_idx_flat_b64": base64.b64encode(ids.tobytes()).decode(),
        "input_top_logprobs_val_flat_b64_dtype": "float32",
        "input_top_logprobs_idx_flat_b64_dtype": "int32",
        "input_top_logprobs_shape": list(ids.shape),
        "input_top_logprobs_null_prefix": 1,
    }


def llamacpp(directory: Path, rollouts: list[Rollout]) -> Path:
    """/completion with n_probs, the prompt given as ids."""
    lines = []
    for number, r in enumerate(rollouts):
        positions = [
            {
                "id": int(token),
                "token": text([token]),
                "bytes": list(text([token]).encode()),
                "logprob": float(own),
                "top_logprobs": [
                    {"id": i, "token": text([i]), "bytes": list(text([i]).encode()), "logprob": p}
                    for i, p in row
                ],
            }
            for token, own, row in zip(r.response_ids, r.teacher_logprob, _rows(r), strict=False)
        ]
        response = {
            "index": number,
            "content": text(r.response_ids),
            "tokens": r.response_ids.tolist(),
            "stop_type": "limit",
            "stopping_word": "",
            "tokens_evaluated": r.prompt_len,
            "generation_settings": {"post_sampling_probs": False, "temperature": 0.8},
            "completion_probabilities": positions,
        }
        request = {"prompt": r.token_ids[: r.prompt_len].tolist(), "n_probs": TOPK}
        lines.append({"request": request, "response": response, "sample_id": r.sample_id})
    return _lines(directory / "llamacpp.jsonl", lines)


def openai(directory: Path, rollouts: list[Rollout]) -> Path:
    """Lines of a batch output, with the prompts as text."""
    lines = []
    for r in rollouts:

        def entry(token: int, value: float) -> dict[str, Any]:
            return {"token": text([token]), "bytes": list(text([token]).encode()), "logprob": value}

        content = [
            entry(int(token), float(own)) | {"top_logprobs": [entry(i, p) for i, p in row]}
            for token, own, row in zip(r.response_ids, r.teacher_logprob, _rows(r), strict=False)
        ]
        body: dict[str, Any] = {
            "id": f"chatcmpl-{r.sample_id}",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "length",
                    "message": {"role": "assistant", "content": text(r.response_ids), "refusal": None},
                    "logprobs": {"content": content, "refusal": None},
                }
            ],
            "usage": {"prompt_tokens": r.prompt_len, "completion_tokens": 1, "total_tokens": 1},
        }
        lines.append(
            {
                "custom_id": r.sample_id,
                "response": {"status_code": 200, "request_id": "q", "body": body},
                "error": None,
                "prompt": text(r.token_ids[: r.prompt_len]),
            }
        )
    return _lines(directory / "openai.jsonl", lines)


def nemo(directory: Path, rollouts: list[Rollout]) -> Path:
    """compute_topk_logits.py: logits less their largest, with their logsumexp, padded to the longest."""
    longest = max(len(r.token_ids) for r in rollouts) - 1
    lines = []
    for r in rollouts:
        tokens = r.token_ids.tolist()
        pad = longest - len(tokens) + 1
        before = r.prompt_len - 1
        logits, total = [], []
        for row in _rows(r):
            top = max((p for _, p in row if math.isfinite(p) and p <= 0), default=0.0)
            logits.append([p - top for _, p in row])
            total.append(-top)
        filler, ids = [0.0] * TOPK, list(range(TOPK))
        lines.append(
            {
                "tokens": tokens[:-1] + [1] * pad,
                "labels": tokens[1:] + [1] * pad,
                "loss_mask": [0.0] * before + [1.0] * r.response_len + [0.0] * pad,
                "topk_logits": [filler] * before + logits + [filler] * pad,
                "topk_token_ids": [ids] * before + [[i for i, _ in row] for row in _rows(r)] + [ids] * pad,
                "log_sum_exp_logits": [3.0] * before + total + [3.0] * pad,
                "index": r.sample_id,
            }
        )
    return _lines(directory / "nemo.jsonl", lines)


def axolotl(directory: Path, rollouts: list[Rollout]) -> Path:
    """v2: a row for every token, about the next one."""
    lines = []
    for r in rollouts:
        before = r.prompt_len - 1
        values = [[p for _, p in row] for row in _rows(r)]
        ids = [[i for i, _ in row] for row in _rows(r)]
        lines.append(
            {
                "input_ids": r.token_ids.tolist(),
                "labels": [-100] * r.prompt_len + r.response_ids.tolist(),
                "attention_mask": [1] * len(r.token_ids),
                "target_token_ids": [[0]] * before + ids + [[0]],
                "target_logprobs": [[-1e9]] * before + values + [[-1e9]],
                "target_mask": [[0]] * before + [[1] * len(row) for row in ids] + [[0]],
                "sample_id": r.sample_id,
            }
        )
    return _lines(directory / "axolotl.jsonl", lines)


def lightning(directory: Path, rollouts: list[Rollout]) -> Path:
    """The Parquet that Lightning OPD trains on."""
    rows = [
        {
            "prompt": text(r.token_ids[: r.prompt_len]),
            "label": "0",
            "metadata": {
                "is_lightning_opd": True,
                "response_tokens": r.response_ids.tolist(),
                "loss_mask": [1] * r.response_len,
                "response": text(r.response_ids),
                "teacher_log_probs": r.teacher_logprob.astype(float).tolist(),
                "sample_id": r.sample_id,
            },
        }
        for r in rollouts
    ]
    path = directory / "lightning.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


SAMPLES = {
    # One row fewer than tokens is a layout of its own: that of rows about the tokens themselves.
    "axolotl": Sample(write=axolotl, own=False, cannot=frozenset({"rows missing"})),
    "lightning-opd": Sample(
        write=lightning,
        topk=False,
        needs_tokenizer=True,
        # It has no rows that could be off, and its lists are filled by Parquet itself.
        cannot=frozenset({"off by one", "row off by one"}),
    ),
    "llamacpp": Sample(write=llamacpp),
    "nemo-aligner": Sample(write=nemo, own=False),
    # No letter spells an id beyond the vocabulary.
    "openai": Sample(write=openai, needs_tokenizer=True, cannot=frozenset({"id beyond vocabulary"})),
    "sglang": Sample(write=sglang),
    "distillkit": Sample(write=binary_samples.distillkit, own=False, named=False),
    "jsonl": Sample(write=binary_samples.jsonl),
    # Any number is a logit.
    "maxtext": Sample(
        write=binary_samples.maxtext,
        **{"own": False, "named": False, "prompt_len": False, "renormalised": True},
        cannot=frozenset({"no log-probs"}),
    ),
    "megatron": Sample(write=binary_samples.megatron, own=False, named=False, prompt_len=False),
    "table": Sample(write=binary_samples.table),
    "torch-pile": Sample(write=binary_samples.torch_pile),
    # A dict has every id once.
    "vllm": Sample(write=vllm, cannot=frozenset({"duplicate ids"})),
}
