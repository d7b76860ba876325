"""`opd filter`, `split`, `dedup`, `merge` and `join`: which rollouts, with every bit of them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opd_tools.rewrite.duplicates import occurrences
from store.caches import assert_same
from tools.rewrite.making import COLUMNS, make, meta, rich_rollouts, sample_ids

import opd_store
from opd_store import ModelInfo

EVERYTHING = list(range(12))


def assert_rows(path: object, source: object, rows: list[int]) -> None:
    """The cache holds these rows of another one, bit for bit, in every band."""
    found, old = opd_store.open(str(path)), opd_store.open(str(source))
    assert len(found) == len(rows)
    for place, row in enumerate(rows):
        for ranks in (4, 12):
            assert_same(found.rollout(place, ranks=ranks), old.rollout(row, ranks=ranks))
    assert found.max_error == old.max_error
    assert opd_store.verify(str(path)).problems == []


FILTERS = {
    "finish reason": (["--finish-reason", "stop"], [0, 4, 8]),
    "two of them": (["--finish-reason", "stop", "--finish-reason", "abort"], [0, 2, 4, 6, 8, 10]),
    "teacher": (["--teacher", 1], [1, 3, 5, 7, 9, 11]),
    "all tokens": (["--min-tokens", 22, "--max-tokens", 22, "--min-response-tokens", 20], EVERYTHING),
    "text": (["--where", "x_domain=code/py"], [1, 4, 7, 10]),
    "as in Python": (["--where", "x_domain==code/py", "--where", "x_level==4"], [4]),
    "beyond int64": (["--where", f"x_level<{2**70}", "--where", f"x_level!={-(2**70)}"], EVERYTHING),
    "a native column": (["--where", "finish_reason=stop", "--where", "teacher=0"], [0, 4, 8]),
    "not text": (["--where", "x_domain!=maths"], [i for i in EVERYTHING if i % 3]),
    "integer": (["--where", "x_level>=10"], [10, 11]),
    "range": (["--where", "x_level>2", "--where", "x_level<=5"], [3, 4, 5]),
    "bool": (["--where", "x_good=true"], [0, 2, 4, 6, 8, 10]),
    "not bool": (["--where", "x_good!=True"], [1, 3, 5, 7, 9, 11]),
    # x_score is i / 8.
    "float": (["--where", "x_score<0.5"], [0, 1, 3]),
    # float32(0.3) is above 0.3.
    "rounded": (["--where", "reward=0.3"], [3]),
    "has none": (["--where", "!reward"], [2, 5, 8, 11]),
    "has one": (["--where", "label"], [i for i in EVERYTHING if i % 3 != 1]),
    "limit": (["--where", "x_level>3", "--limit", 2], [4, 5]),
    "two columns": (["--where", "x_good=true", "--teacher", 0, "--where", "label=l6"], [6]),
    "empty text": (["--where", "label!="], [i for i in EVERYTHING if i % 3 != 1]),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filter(name, opd, source, tmp_path):
    options, rows = FILTERS[name]
    told = json.loads(opd("filter", source, tmp_path / "out", *options, "--json").ok().out)
    assert_rows(tmp_path / "out", source, rows)
    assert (told["rollouts"], told["rollouts_left_out"]) == (len(rows), 12 - len(rows))


def test_filter_by_files(opd, source, tmp_path):
    (tmp_path / "rows").write_text("7\n3\n\n5\n")
    hashes = [opd_store.open(source).row_hash(row).hex() for row in (5, 7, 9)]
    (tmp_path / "hashes").write_text("\n".join([*hashes, "0" * 64]))
    opd("filter", source, tmp_path / "a", "--rows", tmp_path / "rows").ok()
    assert_rows(tmp_path / "a", source, [3, 5, 7])
    opd("filter", source, tmp_path / "b", "--rows", tmp_path / "rows", "--hashes", tmp_path / "hashes").ok()
    assert_rows(tmp_path / "b", source, [5, 7])


def test_a_sample_is_the_same_each_time_and_of_any_version(opd, source, tmp_path):
    def drawn(name, *options, path=source):
        opd("filter", path, tmp_path / name, "--sample", 5, *options).ok()
        return sample_ids(tmp_path / name)

    first = drawn("a")
    assert len(set(first)) == 5
    assert first == [i for i in sample_ids(source) if i in first]
    assert drawn("b") == first
    assert drawn("c", "--seed", 1) != first
    make(tmp_path / "more", rich_rollouts(12) + rich_rollouts(1, seed=3))
    assert len(set(drawn("d", path=tmp_path / "more")) & set(first)) >= 4
    assert drawn("e", "--limit", 2) == first[:2]


BAD_FILTERS = {
    "nothing left": (["--where", "x_level>99"], 2, "none of its 12 rollouts"),
    "column": (["--where", "x_other=1"], 2, "x_other"),
    "no condition": (["--where", "=1"], 2, "COLUMN=VALUE"),
    "type": (["--where", "x_level=many"], 2, "int64"),
    "order of bools": (["--where", "x_good>=true"], 2, "true or false"),
    "bool": (["--where", "x_good=1"], 2, "bool"),
    "lists": (["--where", "token_ids=1"], 2, "token_ids"),
    "rows": (["--rows", "FILE"], 2, "line 2"),
    "hashes": (["--hashes", "FILE"], 2, "line 1"),
}


@pytest.mark.parametrize("name", BAD_FILTERS)
def test_bad_filters(name, opd, source, tmp_path):
    options, code, message = BAD_FILTERS[name]
    (tmp_path / "file").write_text("3\n-4\n")
    options = [tmp_path / "file" if option == "FILE" else option for option in options]
    opd("filter", source, tmp_path / "out", *options).refused(code, message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_row_that_does_not_exist(opd, source, tmp_path):
    (tmp_path / "file").write_text("12\n")
    opd("filter", source, tmp_path / "out", "--rows", tmp_path / "file").refused(2, "row 12", "12 rollouts")


def test_split(opd, source, tmp_path):
    done = opd("split", source, tmp_path / "train", tmp_path / "held", "--held-out", 0.4, "--json").ok()
    train, held = opd_store.split(opd_store.open(source), 0.4, seed=0)
    assert_rows(tmp_path / "train", source, train.tolist())
    assert_rows(tmp_path / "held", source, held.tolist())
    told = json.loads(done.out)
    assert [told[name]["rollouts"] for name in ("train", "held_out")] == [len(train), len(held)]
    shown = opd("split", source, tmp_path / "train", tmp_path / "held", "--held-out", 0.4).ok().out
    assert [line.partition("@")[0] for line in shown.splitlines()] == [
        str(tmp_path / name) for name in ("train", "held")
    ]


def test_split_by_a_column(opd, source, tmp_path):
    opd("split", source, tmp_path / "by", "--by", "x_domain").ok()
    names = {"maths": 0, "code%2Fpy": 1, "%2E%2E": 2}
    assert {path.name for path in (tmp_path / "by").iterdir()} == set(names)
    for name, remainder in names.items():
        assert_rows(tmp_path / "by" / name, source, [i for i in EVERYTHING if i % 3 == remainder])
    opd("split", source, tmp_path / "label", "--by", "label").ok()
    assert_rows(tmp_path / "label" / "+missing", source, [1, 4, 7, 10])


HOSTILE = [
    "..",
    ".",
    "",
    "/etc/passwd",
    "a\0b",
    "~",
    "-rf",
    "+missing",
    "%2E",
    "a\nb",
    "C:\\x",
    "\u202e",
    "x" * 200,
]


def test_split_by_hostile_values(opd, tmp_path):
    """Each becomes a directory of its own right below the one that was named."""
    values = rich_rollouts(len(HOSTILE) + 1)
    values = [
        dataclasses.replace(value, label=label) for value, label in zip(values, [*HOSTILE, None], strict=True)
    ]
    make(tmp_path / "source", values)
    opd("split", tmp_path / "source", tmp_path / "in/by", "--by", "label").ok()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "source"]
    found = list((tmp_path / "in/by").iterdir())
    assert len(found) == len(HOSTILE) + 1
    assert all(path.name.isascii() and path.name.isprintable() and "." not in path.name for path in found)
    assert {opd_store.open(path)[0].label for path in found} == {*HOSTILE, None}
    assert opd_store.open(tmp_path / "in/by/+missing")[0].label is None
    assert opd_store.open(tmp_path / "in/by/+empty")[0].label == ""
    make(tmp_path / "long", [dataclasses.replace(values[0], label="\u00fc" * 40)])
    opd("split", tmp_path / "long", tmp_path / "no", "--by", "label").refused(2, "40 characters")


BAD_SPLITS = {
    "one output": (["a"], "two new caches"),
    "the same": (["a", "a"], "twice"),
    "nothing held out": (["a", "b", "--held-out", "1e-9"], "no rollout"),
    "by and two": (["a", "b", "--by", "label"], "one DIRECTORY"),
    "by a list": (["a", "--by", "token_ids"], "token_ids"),
}


@pytest.mark.parametrize("name", BAD_SPLITS)
def test_bad_splits(name, opd, source, tmp_path):
    arguments, message = BAD_SPLITS[name]
    arguments = [str(tmp_path / a) if len(a) == 1 else a for a in arguments]
    opd("split", source, *arguments).refused(2, message)
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(0, 5)))
def test_occurrences(numbers):
    hashes = np.zeros((len(numbers), 32), np.uint8)
    hashes[:, 3] = numbers
    assert occurrences(hashes).tolist() == [numbers[:i].count(n) for i, n in enumerate(numbers)]


def test_dedup(opd, tmp_path):
    values = rich_rollouts(5)
    again = [dataclasses.replace(values[i], sample_id=f"again-{n}") for n, i in enumerate((1, 3, 1))]
    make(tmp_path / "source", [*values, *again])
    for keep, rows in ((1, [0, 1, 2, 3, 4]), (2, [0, 1, 2, 3, 4, 5, 6]), (3, list(range(8)))):
        done = opd("dedup", tmp_path / "source", tmp_path / f"{keep}", "--keep", keep, "--json").ok()
        assert_rows(tmp_path / f"{keep}", tmp_path / "source", rows)
        assert json.loads(done.out)["duplicates_left_out"] == 8 - len(rows)


def test_merge(opd, source, tmp_path):
    make(tmp_path / "b", rich_rollouts(3, seed=1), encoding="f32")
    make(tmp_path / "c", rich_rollouts(14))
    done = opd("merge", source, tmp_path / "b", tmp_path / "c", source, tmp_path / "out", "--json").ok()
    told = json.loads(done.out)
    assert (told["rollouts"], told["duplicates_left_out"]) == (12 + 3 + 2, 24)
    assert sample_ids(tmp_path / "out") == [*sample_ids(source), *sample_ids(tmp_path / "b"), "0-12", "0-13"]
    found = opd_store.open(tmp_path / "out")
    for row in EVERYTHING:
        assert_same(found[row], opd_store.open(source)[row])
    assert_same(found[15], opd_store.open(tmp_path / "c")[12])
    assert opd_store.verify(tmp_path / "out").problems == []
    assert found.encoding == "ladder/128"


def test_what_was_split_is_merged_again(opd, source, tmp_path):
    opd("split", source, tmp_path / "a", tmp_path / "b", "--held-out", 0.5).ok()
    opd("merge", tmp_path / "a", tmp_path / "b", tmp_path / "out").ok()
    rows = np.concatenate(opd_store.split(opd_store.open(source), 0.5))
    assert_rows(tmp_path / "out", source, rows.tolist())


def other_meta(**fields):
    return meta(other_teachers=(ModelInfo(name="second"),), **fields)


def test_caches_that_differ_are_merged_only_when_that_is_said(opd, source, tmp_path):
    teacher = ModelInfo(name="teacher", engine="x")
    make(tmp_path / "b", rich_rollouts(2, seed=1), meta=other_meta(teacher=teacher, licence="MIT", extra={}))
    args = ("merge", source, tmp_path / "b", tmp_path / "out")
    opd(*args).refused(1, "licence: unknown in", "--allow licence")
    opd(*args, "--allow", "licence").refused(1, "teacher.engine", "--allow teacher.engine")
    opd(*args, "--allow", "licence", "--allow", "teacher").ok()
    assert opd_store.open(tmp_path / "out").meta.licence is None
    fingerprint = "sha256:" + "0" * 64
    make(tmp_path / "c", rich_rollouts(2), meta=other_meta(tokenizer_fingerprint=fingerprint))
    args = ("merge", source, tmp_path / "c", tmp_path / "no", "--allow", "tokenizer_fingerprint")
    opd(*args).refused(1, "tokenizer_fingerprint")
    assert not (tmp_path / "no").exists()


OTHER_SCHEMAS = {
    "fewer ranks": ({"topk": 5, "bands": (5,)}, {"topk": 5}, [], "give --topk 5"),
    "chosen": ({"chosen": 2}, {"chosen": 2}, [], "has no chosen ids"),
    "column": ({"user_columns": COLUMNS | {"x_level": "float64"}}, {}, [], "x_level"),
}


@pytest.mark.parametrize("name", OTHER_SCHEMAS)
def test_schemas_that_do_not_fit(name, opd, source, tmp_path):
    options, shape, more, message = OTHER_SCHEMAS[name]
    make(tmp_path / "b", rich_rollouts(2, seed=1, **shape), **options)
    opd("merge", source, tmp_path / "b", tmp_path / "out", *more).refused(2, message)
    if name == "fewer ranks":
        opd("merge", source, tmp_path / "b", tmp_path / "out", "--topk", 5).ok()
        found = opd_store.open(tmp_path / "out")
        assert_same(found[13], opd_store.open(tmp_path / "b")[1])


def test_rows_of_different_length_are_merged(opd, source, tmp_path):
    make(tmp_path / "b", rich_rollouts(3, seed=1, ragged=True), cut=opd_store.Cut("given"))
    opd("merge", source, tmp_path / "b", tmp_path / "out").ok()
    found = opd_store.open(tmp_path / "out")
    for row, expected in enumerate([*opd_store.open(source), *opd_store.open(tmp_path / "b")]):
        assert_same(found[row], expected)


def test_join(opd, source, tmp_path):
    values = rich_rollouts(9, seed=0)
    # Another order, another prompt, one of its own, one twice.
    other = [values[i] for i in (7, 2, 5, 0)] + rich_rollouts(1, seed=9)
    other[2] = dataclasses.replace(
        rich_rollouts(9, prompt_len=3, response_len=19)[5], token_ids=values[5].token_ids
    )
    other.append(dataclasses.replace(values[7], sample_id="again"))
    make(tmp_path / "right", other, meta=meta(teacher=ModelInfo(name="big")), topk=12)
    told = json.loads(opd("join", source, tmp_path / "right", tmp_path / "out", "--json").ok().out)
    assert_rows(tmp_path / "out/left", source, [0, 2, 7])
    assert_rows(tmp_path / "out/right", tmp_path / "right", [3, 1, 0])
    counts = {name: count for name, count in told.items() if name not in ("left", "right")}
    assert counts == {"only_in_LEFT": 8, "only_in_RIGHT": 1, "with_another_prompt": 1} | {
        "again_in_LEFT": 0,
        "again_in_RIGHT": 1,
    }
    assert opd_store.open(tmp_path / "out/right").meta.teacher.name == "big"
    # What the trainer pairs by.
    left, right = (opd_store.open(tmp_path / "out" / side) for side in ("left", "right"))
    assert [rows.tolist() for rows in opd_store.join(left, right)] == [[0, 1, 2], [0, 1, 2]]
    shown = opd("join", source, tmp_path / "right", tmp_path / "out").ok()
    assert len(shown.out.splitlines()) == 2


def test_join_keeps_how_often_something_was_drawn(opd, tmp_path):
    """LEFT drew rollout 0 three times and rollout 1 once, RIGHT twice and three times, in another order."""
    values = rich_rollouts(3)

    def drawn(numbers):
        return [dataclasses.replace(values[n], sample_id=str(i)) for i, n in enumerate(numbers)]

    make(tmp_path / "left", drawn([0, 1, 0, 2, 0]))
    make(tmp_path / "right", drawn([1, 0, 1, 1, 0]))
    done = opd("join", tmp_path / "left", tmp_path / "right", tmp_path / "out", "--json").ok()
    assert_rows(tmp_path / "out/left", tmp_path / "left", [0, 1, 2])
    assert_rows(tmp_path / "out/right", tmp_path / "right", [1, 0, 4])
    told = json.loads(done.out)
    counts = {name: told[name] for name in told if name not in ("left", "right")}
    assert counts == {
        "only_in_LEFT": 1,
        "only_in_RIGHT": 0,
        "with_another_prompt": 0,
        "again_in_LEFT": 1,
        "again_in_RIGHT": 2,
    }


def test_join_with_routes(opd, source, tmp_path):
    values = rich_rollouts(3, seed=0)[1:] + rich_rollouts(2, seed=9)
    right = make(
        tmp_path / "right",
        values,
        meta=meta(teacher=ModelInfo(name="second"), other_teachers=(ModelInfo(name="big"),)),
    )
    opd("join", source, tmp_path / "right", tmp_path / "out", "--route").ok()
    found = opd_store.open(tmp_path / "out")
    assert [teacher.name for teacher in found.meta.other_teachers] == ["second", "big"]
    assert len(found) == 14
    for row in (2, 3):
        expected = dataclasses.replace(right[row], teacher={0: 1, 1: 2}[right[row].teacher])
        assert_same(found[10 + row], expected)
    assert opd_store.verify(tmp_path / "out").problems == []


def test_nothing_in_common(opd, source, tmp_path):
    make(tmp_path / "right", rich_rollouts(2, seed=9))
    opd("join", source, tmp_path / "right", tmp_path / "out").refused(2, "no rollout in common")
    other = meta(tokenizer_fingerprint="sha256:" + "0" * 64)
    make(tmp_path / "other", rich_rollouts(2, seed=9), meta=other)
    opd("join", source, tmp_path / "other", tmp_path / "out").refused(1, "tokenizer")
    assert not (tmp_path / "out").exists()
