"""Manifests with a right checksum and wrong content: what Python's JSON parser lets pass is refused too."""

from __future__ import annotations

import hashlib
import json

import pytest
from store.caches import assert_holds, some_rollouts, write

import opd_store

FormatError, IntegrityError = opd_store.FormatError, opd_store.IntegrityError
Unsupported = opd_store.UnsupportedVersionError


def sealed(body: str | bytes) -> bytes:
    """A manifest with this content before its checksum line."""
    raw = body.encode() if isinstance(body, str) else body
    return raw + f',\n "checksum": "sha256:{hashlib.sha256(raw).hexdigest()}"\n}}\n'.encode()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A cache, its manifest file, and the manifest's text without the checksum line."""
    path = tmp_path_factory.mktemp("json") / "cache"
    write(path, some_rollouts(1))
    file = path / "manifests/00000001.json"
    text = file.read_text()
    return path, file, text[: text.index(',\n "checksum"')]


def outcome(place, data: bytes) -> type[Exception] | None:
    """The class of the error that opening, reading or looking up ends with."""
    path, file, _ = place
    intact = file.read_bytes()
    file.write_bytes(data)
    try:
        assert_holds(opd_store.open(path), some_rollouts(1))
    except opd_store.OpdError as error:
        found = error
    else:
        return None
    finally:
        file.write_bytes(intact)
    assert any(part in str(found) for part in ("00000001.json", "/index/", "/shards/"))
    assert len(str(found)) < 1000
    return type(found)


def test_the_checksum_line_is_reproduced(place):
    _, file, text = place
    assert sealed(text) == file.read_bytes()
    assert outcome(place, sealed(text)) is None


def nested(depth: int) -> str:
    return '{"a": ' * depth + '"b"' + "}" * depth


# (text replaced, by what, error)
EDITS = {
    "duplicate key": ('"sequence": 1', '"sequence": 1, "sequence": 1', FormatError),
    "duplicate key inside": ('"name": "example"', '"name": "example", "name": "example"', FormatError),
    "duplicate key by escape": ('"sequence": 1', '"sequence": 1, "\\u0073equence": 1', FormatError),
    "second checksum": ('"sequence": 1', '"sequence": 1, "checksum": "sha256:00"', FormatError),
    "NaN": ('"vocab_size": 100', '"vocab_size": NaN', FormatError),
    "Infinity": ('"vocab_size": 100', '"vocab_size": Infinity', FormatError),
    "-Infinity": ('"vocab_size": 100', '"vocab_size": -Infinity', FormatError),
    "float for int": ('"vocab_size": 100', '"vocab_size": 100.0', FormatError),
    "exponent for int": ('"vocab_size": 100', '"vocab_size": 1e2', FormatError),
    "float beyond float64": (
        '"name": "example"',
        '"name": "example", "logprob_temperature": 1e999',
        FormatError,
    ),
    "bool for int": ('"sequence": 1', '"sequence": true', FormatError),
    "int for bool": ('"unreleased": true', '"unreleased": 1', FormatError),
    "2**53": ('"vocab_size": 100', f'"vocab_size": {2**53}', FormatError),
    "10**400": ('"vocab_size": 100', f'"vocab_size": {10**400}', FormatError),
    "10**5000": ('"vocab_size": 100', '"vocab_size": 1' + "0" * 5000, FormatError),
    "-2**63": ('"sequence": 1', f'"sequence": {-(2**63)}', FormatError),
    "leading zero": ('"sequence": 1', '"sequence": 01', FormatError),
    "plus sign": ('"sequence": 1', '"sequence": +1', FormatError),
    "comment": ('"sequence": 1', '"sequence": 1 /* one */', FormatError),
    "trailing comma": ('"required_features": []', '"required_features": [,]', FormatError),
    "single quotes": ('"sequence"', "'sequence'", FormatError),
    # The outermost object is level 1, the innermost text level 16. Later versions may have other fields.
    "depth 16": ('"1.0"', f'"1.1", "other": {nested(14)}', None),
    "depth 17": ('"1.0"', f'"1.1", "other": {nested(15)}', FormatError),
    "depth 100000": ('"1.0"', f'"1.1", "other": {"[" * 100_000}{"]" * 100_000}', FormatError),
    "text of 4096": ('"example"', f'"{"é" * 4096}"', None),
    "text of 4097": ('"example"', f'"{"x" * 4097}"', FormatError),
    "key of 4097": ('"vocab_size"', f'"extra": {{"{"x" * 4097}": "y"}}, "vocab_size"', FormatError),
    "half a surrogate pair": ('"example"', '"\\ud800"', FormatError),
    "a surrogate pair": ('"example"', '"\\ud83d\\ude00"', None),
    "control character": ('"example"', '"exam\tple"', FormatError),
    "escaped control character": ('"example"', '"exam\\tple\\u0000"', None),
    "unknown field": ('"sequence": 1', '"sequence": 1, "colour": "red"', FormatError),
    "unknown field of meta": ('"vocab_size"', '"colour": "red", "vocab_size"', FormatError),
    "unknown field of schema": ('"topk"', '"colour": "red", "topk"', FormatError),
    "unknown field of a segment": ('"n_shards"', '"colour": "red", "n_shards"', FormatError),
    "missing field": ('"unreleased": true,', "", FormatError),
    "missing field of meta": ('"vocab_size": 100,', "", FormatError),
    "missing field of schema": ('"encoding": "plain",', "", FormatError),
    "missing field of a segment": ('"rows": 1,', "", FormatError),
    "another format": ('"opd-store"', '"other"', FormatError),
    "version 1": ('"1.0"', '"1"', FormatError),
    "version 1.0.0": ('"1.0"', '"1.0.0"', FormatError),
    "version 1.00": ('"1.0"', '"1.00"', FormatError),
    "version 01.0": ('"1.0"', '"01.0"', FormatError),
    "version 0.9": ('"1.0"', '"0.9"', FormatError),
    "version of other digits": ('"1.0"', '"\N{ARABIC-INDIC DIGIT ONE}.0"', FormatError),
    "version as a number": ('"1.0"', "1.0", FormatError),
    "version 2.0": ('"1.0"', '"2.0"', Unsupported),
    "version 1.1": ('"1.0"', '"1.1"', None),
    "required feature": ('"required_features": []', '"required_features": ["zip"]', Unsupported),
    "required feature that is none": ('"required_features": []', '"required_features": [1]', FormatError),
    "optional feature": ('"optional_features": []', '"optional_features": ["zip"]', None),
    "optional feature that is none": ('"optional_features": []', '"optional_features": [1]', FormatError),
    "later encoding": ('"plain"', '"cubic"', Unsupported),
    "sequence 0": ('"sequence": 1', '"sequence": 0', FormatError),
    "sequence 100000000": ('"sequence": 1', '"sequence": 100000000', FormatError),
    "first version with a parent": ('"parent": null', f'"parent": "sha256:{"0" * 64}"', FormatError),
    "second version without": ('"sequence": 1', '"sequence": 2', FormatError),
    "vocabulary of 0": ('"vocab_size": 100', '"vocab_size": 0', FormatError),
    "vocabulary too large": ('"vocab_size": 100', f'"vocab_size": {2**24 + 1}', FormatError),
    "vocabulary below top-k": ('"vocab_size": 100', '"vocab_size": 2', FormatError),
    "top-k without a band": ('"topk": 3', '"topk": 4', FormatError),
    "no name": ('"example"', "null", FormatError),
    "fingerprint": ('"sha256:5e5e', '"sha256:5E5E', FormatError),
    "file name": ('"shards": {\n    "sha256": "', '"shards": {\n    "sha256": "../', FormatError),
    "file of no bytes": (
        '"rollouts": {\n    "sha256"',
        '"rollouts": {\n    "n_bytes": 0, "sha256"',
        FormatError,
    ),
    "no rows": ('"rows": 1', '"rows": 0', FormatError),
    "negative tokens": ('"tokens": 5', '"tokens": -5', FormatError),
    "more rows than the table": ('"rows": 1', '"rows": 2', IntegrityError),
    "fewer tokens than the table": ('"tokens": 5', '"tokens": 4', IntegrityError),
    "a user column": ('"user_columns": {}', '"user_columns": {"x_a": "int64"}', FormatError),
    "a user column of no name": ('"user_columns": {}', '"user_columns": {"a": "int64"}', FormatError),
    "a user column of no type": ('"user_columns": {}', '"user_columns": {"x_a": "int32"}', FormatError),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edit(place, case):
    old, new, expected = EDITS[case]
    _, _, text = place
    assert text.count(old) >= 1
    assert outcome(place, sealed(text.replace(old, new, 1))) is expected


# Whole files, given the text before the checksum line.
FILES = {
    "byte order mark": (lambda text: sealed(b"\xef\xbb\xbf" + text.encode()), FormatError),
    "UTF-16": (lambda text: text.encode("utf-16"), IntegrityError),
    "Latin-1": (lambda text: sealed(text.replace("example", "é").encode("latin-1")), FormatError),
    "trailing newline": (lambda text: sealed(text) + b"\n", IntegrityError),
    "trailing space": (lambda text: sealed(text) + b" ", IntegrityError),
    "trailing zero": (lambda text: sealed(text) + b"\0", IntegrityError),
    "second document": (lambda text: sealed(text) + sealed(text), IntegrityError),
    "leading garbage": (lambda text: sealed("x" + text), FormatError),
    "leading space": (lambda text: sealed(" " + text), None),
    "Windows lines": (lambda text: sealed(text).replace(b"\n", b"\r\n"), IntegrityError),
    "no checksum": (lambda text: (text + "\n}\n").encode(), IntegrityError),
    "checksum in capitals": (lambda text: sealed(text)[:-66].upper() + sealed(text)[-66:], IntegrityError),
    "checksum of nothing": (
        lambda text: (text + f',\n "checksum": "sha256:{hashlib.sha256().hexdigest()}"\n}}\n').encode(),
        IntegrityError,
    ),
    "compact": (
        lambda text: json.dumps(json.loads(sealed(text)), separators=(",", ":")).encode(),
        IntegrityError,
    ),
    "empty": (lambda text: b"", IntegrityError),
    "null": (lambda text: b"null", IntegrityError),
    "only a checksum": (lambda text: sealed('{"format": "opd-store"'), FormatError),
    "larger than 1 MiB": (
        lambda text: sealed(text.replace("{", "{" + " " * (1 << 20), 1)),
        IntegrityError,
    ),
    "no object": (lambda text: sealed('{"a": [1]}'[:-1].replace("{", "[{", 1) + "}"), FormatError),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file(place, case):
    make, expected = FILES[case]
    assert outcome(place, make(place[2])) is expected


@pytest.mark.parametrize("case", ["version 1.1", "optional feature"])
def test_a_newer_cache_is_read_but_not_appended_to(place, case):
    """A version of ours would drop what the newer release added."""
    path, file, text = place
    intact = file.read_bytes()
    file.write_bytes(sealed(text.replace(*EDITS[case][:2], 1)))
    try:
        assert_holds(opd_store.open(path), some_rollouts(1))
        with pytest.raises(Unsupported, match="newer release"):
            opd_store.append(path)
    finally:
        file.write_bytes(intact)


@pytest.mark.parametrize("field", ["meta", "schema", "segments", "parent", "sequence", "required_features"])
@pytest.mark.parametrize("value", ["null", "[]", "{}", '""', "0", "false", "[[]]", "[{}]"])
def test_a_field_of_another_type(place, field, value):
    """Whatever JSON allows in a place, the outcome is an error of this project, or an empty cache."""
    content = json.loads(sealed(place[2]))
    del content["checksum"]
    content[field] = json.loads(value)
    if (field, value) in {("segments", "[]"), ("parent", "null"), ("required_features", "[]")}:
        return
    body = json.dumps(content, indent=1)[: -len("\n}")]
    assert outcome(place, sealed(body)) in (FormatError, Unsupported)
