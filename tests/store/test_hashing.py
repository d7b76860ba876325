"""Names of rollouts and tokenizers."""

from __future__ import annotations

import copy
import hashlib
import json

import numpy as np
import pytest

import opd_store

FINGERPRINT = "sha256:" + "5e" * 32
BPE = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 0, "content": "<s>", "special": True, "lstrip": False},
        {"id": 5, "content": "<x>", "special": False},
    ],
    "model": {
        "type": "BPE",
        "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "\u0120a": 4},
        "merges": ["a b", "\u0120 a"],
    },
}
UNIGRAM = {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5], ["b", -2.0]]}}


def fingerprint(description: object) -> str:
    return opd_store.tokenizer_fingerprint(json.dumps(description))


def changed(description: dict, **parts: object) -> dict:
    """A copy with some top-level parts replaced, and the model's by `model__name`."""
    result = copy.deepcopy(description)
    for name, value in parts.items():
        if name.startswith("model__"):
            result["model"][name.removeprefix("model__")] = value
        else:
            result[name] = value
    return result


def test_known_rollout_hash():
    """From the definition: tag, 32 bytes of fingerprint, then u32 little-endian ids."""
    ids = [1, 2, 2**32 - 1]
    found = opd_store.rollout_hash(ids, FINGERPRINT)
    raw = b"opd-store rollout v1\0" + b"\x5e" * 32 + b"\x01\0\0\0\x02\0\0\0\xff\xff\xff\xff"
    assert found == hashlib.sha256(raw).digest()
    assert found.hex() == "55da3d6d2f3eb1330618a41b4dac328b76fcfdfa7c8e8c707ee19dcbb617d633"


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.uint16, ">u4", np.int8])
def test_the_dtype_does_not_matter(dtype):
    ids = np.array([1, 2, 100], dtype)
    assert opd_store.rollout_hash(ids, FINGERPRINT) == opd_store.rollout_hash([1, 2, 100], FINGERPRINT)
    assert opd_store.rollout_hash(np.repeat(ids, 2)[::2], FINGERPRINT) == opd_store.rollout_hash(
        ids, FINGERPRINT
    )


def test_every_part_of_a_rollout_matters():
    hashes = [
        opd_store.rollout_hash(np.array(ids, np.uint32), f)
        for ids in ([0], [0, 0], [1, 2], [2, 1], [258])
        for f in (FINGERPRINT, "sha256:" + "5f" * 32)
    ]
    assert len(set(hashes)) == len(hashes)
    assert {len(h) for h in hashes} == {32}


@pytest.mark.parametrize(
    "ids", [[-1], [2**32], [1.0], [[1]], np.array([[1]], np.uint32), np.uint32(1), ["a"], [True]]
)
def test_ids_that_are_none(ids):
    with pytest.raises(opd_store.InvalidArgumentError, match="one-dimensional array of integers"):
        opd_store.rollout_hash(ids, FINGERPRINT)


@pytest.mark.parametrize("text", ["", "5e" * 32, "sha256:" + "5E" * 32, "sha512:" + "5e" * 32, "sha256:5e"])
def test_a_fingerprint_that_is_none(text):
    with pytest.raises(opd_store.InvalidArgumentError, match="tokenizer_fingerprint"):
        opd_store.rollout_hash([1], text)


def test_known_tokenizer_fingerprint():
    """A change here changes the name of every rollout ever stored."""
    assert fingerprint(BPE) == "sha256:f3878f360b0f4b219d281721c1a8d798ebe6b1ce658561e96b7e6bebd5127702"
    assert fingerprint(UNIGRAM) == "sha256:a3f28a4cc493261715d98775ae35cfc3b381a416f28ccffd58bb836617de8894"


@pytest.mark.parametrize(
    "same",
    [
        changed(BPE, padding={"strategy": "BatchLongest", "pad_id": 0}),
        changed(BPE, truncation={"max_length": 512}, version="2.0"),
        changed(BPE, post_processor={"type": "ByteLevel"}, decoder=None),
        changed(BPE, model__merges=[["a", "b"], ["\u0120", "a"]]),
        changed(BPE, model__vocab=dict(reversed(BPE["model"]["vocab"].items()))),
        changed(BPE, model__dropout=0.1),
        changed(BPE, added_tokens=BPE["added_tokens"][::-1]),
    ],
    ids=["padding", "truncation", "post-processor", "merge pairs", "vocabulary order", "dropout", "added"],
)
def test_what_does_not_matter(same):
    assert fingerprint(same) == fingerprint(BPE)


@pytest.mark.parametrize(
    "other",
    [
        changed(BPE, added_tokens=[]),
        changed(BPE, added_tokens=[{**BPE["added_tokens"][0], "special": False}, BPE["added_tokens"][1]]),
        changed(BPE, added_tokens=[BPE["added_tokens"][0], {**BPE["added_tokens"][1], "special": True}]),
        changed(BPE, added_tokens=[*BPE["added_tokens"], {"id": 6, "content": "<y>", "special": False}]),
        changed(BPE, added_tokens=[BPE["added_tokens"][0], {**BPE["added_tokens"][1], "content": "<z>"}]),
        changed(BPE, model__merges=["\u0120 a", "a b"]),
        changed(BPE, model__merges=["a b"]),
        changed(BPE, model__vocab={**BPE["model"]["vocab"], "a": 2, "b": 1}),
        changed(BPE, model__vocab={**BPE["model"]["vocab"], "c": 6}),
        changed(BPE, model__type="WordPiece"),
    ],
    ids=[
        "no added tokens",
        "not special",
        "special",
        "one more",
        "other text",
        "merge order",
        "fewer merges",
        "swapped ids",
        "larger vocabulary",
        "model",
    ],
)
def test_what_matters(other):
    assert fingerprint(other) != fingerprint(BPE)


def test_scores_matter():
    other = changed(UNIGRAM, model__vocab=[["<unk>", 0.0], ["a", -1.5], ["b", -2.5]])
    assert fingerprint(other) != fingerprint(UNIGRAM)


def test_merges_with_a_space_inside():
    """`a  b` splits at its first space, so the right half is ` b`."""
    one = changed(BPE, model__merges=["a  b"])
    two = changed(BPE, model__merges=[["a", " b"]])
    assert fingerprint(one) == fingerprint(two)


def test_bytes_and_text_are_the_same():
    text = json.dumps(BPE)
    escaped = json.dumps(BPE, ensure_ascii=False, indent=2)
    assert opd_store.tokenizer_fingerprint(text.encode()) == opd_store.tokenizer_fingerprint(escaped)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        '{"model": null}',
        '{"model": {}}',
        '{"model": {"vocab": null}}',
        '{"model": {"vocab": ["a"]}}',
        '{"model": {"vocab": {"a": "x"}}}',
        '{"model": {"vocab": {"a": -1}}}',
        '{"model": {"vocab": {"a": 4294967296}}}',
        '{"model": {"vocab": {"a": 0}, "merges": [["a"]]}}',
        '{"model": {"vocab": {"a": 0}, "merges": ["a"]}}',
        '{"model": {"vocab": {"a": 0}, "merges": [1]}}',
        '{"model": {"vocab": {"a": 0}, "merges": [[1, 2]]}}',
        '{"model": {"vocab": [["a", "x"]]}}',
        '{"model": {"vocab": {"a": 0}}, "added_tokens": [1]}',
        '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": -5, "content": "", "special": true}]}',
        "[" * 100_000,
        b"\xff\xfe\x00",
    ],
)
def test_what_is_no_tokenizer(text):
    with pytest.raises(opd_store.FormatError, match=r"tokenizer\.json"):
        opd_store.tokenizer_fingerprint(text)
