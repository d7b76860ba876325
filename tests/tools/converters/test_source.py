"""Files as sources, and tokenizers by the bytes of their tokens."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from opd_tools.converters.core.record import NO_ENTRY
from opd_tools.converters.core.source import Source
from opd_tools.converters.reading.json_rows import integers, numbers, padded
from opd_tools.converters.reading.text import TextTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from opd_store import CacheNotFoundError, FormatError, InvalidArgumentError


def values(path):
    source = Source(str(path))
    return [pair for name in source.json_names() for pair in source.json_values(name)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("\n \n", []),
        ('{"a": 1}\n\n{"a": NaN}', [("line 1", {"a": 1}), ("line 3", {"a": float("nan")})]),
        ('{\n "a":\n 1}\n', [("line 1", {"a": 1})]),
        ("[1, 2]", [("line 1, item 0", 1), ("line 1, item 1", 2)]),
        ("\n[\n1,\n2]\n", [("line 2, item 0", 1), ("line 2, item 1", 2)]),
        ("[1]\n[2]\n", [("line 1, item 0", 1), ("line 2, item 0", 2)]),
    ],
)
def test_json_one_a_line_or_over_many_or_in_a_list(tmp_path, text, expected, packed):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = values(path)
    assert [where for where, _ in found] == [f"a.jsonl, {where}" for where, _ in expected]
    np.testing.assert_equal([value for _, value in found], [value for _, value in expected])
    assert Source(str(path)).first_json() == (expected[0][1] if expected else None)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": 1}\n{"a": ', "line 2"),
        ('{"a":\n 1\n', "line 3"),
        ("hello", "line 1"),
        ("[" * 99_999, "line 1"),
    ],
)
def test_what_is_no_json_is_refused_with_its_line(tmp_path, text, place):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(FormatError, match=rf"a\.jsonl, {place}: not JSON, or cut off"):
        values(tmp_path / "a.jsonl")


def test_a_line_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_tools.converters.core.source.MAX_LINE", 50)
    for text in ('{"a": 1}\n' + "[" + "1," * 60 + "1]\n", "[\n" + "1,\n" * 60 + "1]"):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(FormatError, match="more than 50 bytes"):
            values(tmp_path / "a.jsonl")


def test_files_of_a_directory_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 1):
        (tmp_path / f"part-{number}.jsonl").write_text(str(number))
    (tmp_path / "notes.txt").write_text("no JSON")
    assert [value for _, value in values(tmp_path)] == [1, 9, 10]


def test_a_source_is_told_from_another_by_either_end(tmp_path):
    path = tmp_path / "a.jsonl"
    digests = set()
    for change in (None, 0, 199_999):
        data = bytearray(b"x" * 200_000)
        if change is not None:
            data[change] = 0
        path.write_bytes(data)
        digests.add(Source(str(path)).digest())
    assert len(digests) == 3


def test_places_that_cannot_be_read(tmp_path):
    with pytest.raises(CacheNotFoundError, match="no such file"):
        Source(str(tmp_path / "nothing"))
    with pytest.raises(InvalidArgumentError, match="gopher"):
        Source("gopher://x/y")


def test_rows_of_any_length():
    ids, logprob = padded([[1, 2], None, [], [3]], [[-1, None], None, [], [-2.5]], "here")
    assert ids.tolist() == [[1, 2], [NO_ENTRY] * 2, [NO_ENTRY] * 2, [3, NO_ENTRY]]
    np.testing.assert_equal(logprob, [[-1, np.nan], [-np.inf] * 2, [-np.inf] * 2, [-2.5, -np.inf]])
    with pytest.raises(FormatError, match="here, row 1: 1 ids, but 2 log-probs"):
        padded([[1], [1]], [[-1], [-1, -2]], "here")
    with pytest.raises(FormatError, match="here: 1 rows of ids, but 2 of log-probs"):
        padded([[1]], [[-1], [-1]], "here")


@pytest.mark.parametrize("value", [["1"], [1.5], [True], [[1], [2, 3]], [None], {"a": 1}, "12", [1 << 70]])
def test_integers_are_integers(value):
    with pytest.raises(FormatError, match="here, ids: expected a list of integers"):
        integers(value, "here", "ids")


@pytest.mark.parametrize("value", [["1.5"], [[1.0], [2.0]], {"a": 1}, "1.5", [{}]])
def test_numbers_are_numbers(value):
    with pytest.raises(FormatError, match="here, p: expected a list of numbers"):
        numbers(value, "here", "p")


def saved(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return TextTokenizer(tmp_path / "tokenizer.json")


def test_spelling_of_a_byte_level_tokenizer(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: number for number, char in enumerate([*alphabet, "\u0120a", "\u0120aa"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("\u0120", "a"), ("\u0120a", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    found = saved(tmp_path, tokenizer)
    spelling = found.spelling()
    assert len(spelling) == 256 + 3
    assert all(len(ids) == 1 for ids in spelling.values())
    for word in ("a", " ", "\n", " a", " aa", "<|end|>"):
        ids = found.encode(word, "here")
        assert spelling[word.encode()] == tuple(ids)
        assert found.decode(ids) == word
    # A byte that is no character by itself.
    assert [spelling[bytes([byte])][0] for byte in "\u00e9".encode()] == found.encode(
        "\u00e9", "here"
    ).tolist()


def test_spelling_of_a_tokenizer_that_falls_back_to_bytes(tmp_path):
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocab |= {"\u2581": 257, "a": 258, "\u2581a": 259}
    model = models.BPE(vocab=vocab, merges=[("\u2581", "a")], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    spelling = saved(tmp_path, tokenizer).spelling()
    assert spelling[b" a"] == (259,)
    assert spelling[b"a"] == (258,)
    assert spelling[b"\xff"] == (256,)


def test_a_file_that_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(InvalidArgumentError, match=r"not a tokenizer\.json"):
        TextTokenizer(tmp_path / "tokenizer.json")
