"""Tables with any columns, and what a cache becomes in other formats and back."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import yaml
from click.testing import CliRunner
from opd_tools.converters.core.format import ReadSettings
from opd_tools.converters.core.record import Values
from opd_tools.converters.core.source import Source
from opd_tools.converters.plain import table, table_export
from opd_tools.converters.reading.arrow_lists import Rows
from opd_tools.main import main
from tools.converters.converting import FINGERPRINT, convert, converted, refused
from tools.converters.samples import good_rollouts
from tools.converters.sizes import TOPK, VOCAB

import opd_store
from opd_store import NO_ID, RENORMALISED_TOPK, CacheMeta, Cut, FormatError, InvalidArgumentError, ModelInfo

IDS = [[[4, 9], [7, 3], [2, 8]]]
LOGPROB = [[[-0.1, -3.0], [-0.2, -2.0], [-0.3, -1.9]]]
TOKENS = [[5, 4, 7, 2]]


def records(path, columns, stated=None):
    """What the importer makes of a table that was written to `path`."""
    settings = ReadSettings(vocab_size=10, columns=stated or {})
    pq.write_table(pa.table(columns), path)
    contents = table.read(Source(str(path)), settings)
    return contents, list(contents.records)


GOOD = {
    "usual names": ({"input_ids": TOKENS, "indices": IDS, "logprobs": LOGPROB}, {}),
    "stated names": (
        {"a": TOKENS, "b": IDS, "c": LOGPROB},
        {"token_ids": "a", "topk_ids": "b", "topk_logprob": "c"},
    ),
    "prompt and response": (
        {"prompt_ids": [[5]], "response_ids": [[4, 7, 2]], "topk_ids": IDS, "topk_logprob": LOGPROB},
        {},
    ),
    "source": (
        {"input_ids": TOKENS, "indices": [[*IDS[0], [1, 2]]], "logprobs": [[*LOGPROB[0], [-1.0, -2.0]]]},
        {"rows": "source"},
    ),
    "label": (
        {"input_ids": TOKENS, "indices": [[[1, 2], *IDS[0]]], "logprobs": [[[-1.0, -2.0], *LOGPROB[0]]]},
        {"rows": "label"},
    ),
    "nothing for the first token": (
        {"input_ids": TOKENS, "indices": [[None, *IDS[0]]], "logprobs": [[None, *LOGPROB[0]]]},
        {},
    ),
    "flat": (
        {
            "input_ids": TOKENS,
            "indices": [[4, 9, 7, 3, 2, 8]],
            "logprobs": np.reshape(LOGPROB, (1, 6)).tolist(),
        },
        {"k": "2"},
    ),
    "structs": (
        {"input_ids": TOKENS, "teacher": [{"ids": IDS[0], "lp": LOGPROB[0]}]},
        {"topk_ids": "teacher.ids", "topk_logprob": "teacher.lp"},
    ),
    "fixed size": (
        {
            "input_ids": TOKENS,
            "indices": pa.array(IDS, pa.list_(pa.list_(pa.int32(), 2))),
            "logprobs": pa.array(LOGPROB, pa.large_list(pa.list_(pa.float16()))),
        },
        {},
    ),
    "padded": (
        {
            "input_ids": [[*TOKENS[0], 0]],
            "attention_mask": [[1, 1, 1, 1, 0]],
            "indices": [[*IDS[0], [0, 0]]],
            "logprobs": [[*LOGPROB[0], [0.0, 0.0]]],
        },
        {},
    ),
    "logits and their logsumexp": (
        {
            "input_ids": TOKENS,
            "indices": IDS,
            "logits": [[[x + 7 for x in row] for row in LOGPROB[0]]],
            "logsumexp": [[7.0, 7.0, 7.0]],
        },
        {},
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_columns_are_found(tmp_path, name):
    columns, stated = GOOD[name]
    contents, (record,) = records(tmp_path / "a.parquet", columns, stated)
    assert (contents.topk, contents.values, record.prompt_len) == (2, Values.LOGPROBS, 1)
    assert record.token_ids.tolist() == TOKENS[0]
    np.testing.assert_array_equal(record.topk_ids, IDS[0])
    np.testing.assert_allclose(record.topk_logprob, LOGPROB[0], atol=1e-3)
    if "prompt_ids" not in columns:
        assert any("recognised by their names" in line for line in contents.lost) == (name != "stated names")


BAD = {
    "no tokens": ({"indices": IDS, "logprobs": LOGPROB}, {}, InvalidArgumentError, "--column token_ids=NAME"),
    "no values": ({"input_ids": TOKENS, "indices": IDS}, {}, InvalidArgumentError, "topk_logprob"),
    "nothing": ({"input_ids": TOKENS}, {}, InvalidArgumentError, "no log-probs"),
    "two": (
        {"input_ids": TOKENS, "tokens": TOKENS, "indices": IDS, "logprobs": LOGPROB},
        {},
        InvalidArgumentError,
        "could be any of input_ids, tokens",
    ),
    "unknown field": ({"input_ids": TOKENS}, {"tokenids": "a"}, InvalidArgumentError, "no such field"),
    "unknown column": ({"input_ids": TOKENS}, {"token_ids": "a"}, InvalidArgumentError, "no such column"),
    "rows": (GOOD["flat"][0], {"rows": "up", "k": "2"}, InvalidArgumentError, "rows=up"),
    "k": (GOOD["flat"][0], {"k": "two"}, InvalidArgumentError, "k=two"),
    "parts of rows": (GOOD["flat"][0], {"k": "4"}, FormatError, "whole rows of 4"),
    "too few rows": (
        {"input_ids": TOKENS, "indices": [IDS[0][:2]], "logprobs": [LOGPROB[0][:2]]},
        {},
        FormatError,
        "row 0, topk_ids: expected 3 rows",
    ),
    "null tokens": (
        {"input_ids": [[5, None]], "indices": IDS, "logprobs": LOGPROB},
        {},
        FormatError,
        "null among",
    ),
    "padding before": (
        GOOD["padded"][0] | {"attention_mask": [[0, 1, 1, 1, 1]]},
        {},
        FormatError,
        "padding before",
    ),
    "wider rows later": (
        {
            "input_ids": TOKENS * 33,
            "indices": [*IDS * 32, [[1, 2, 3]] * 3],
            "logprobs": [*LOGPROB * 32, [[-1.0, -2, -3]] * 3],
        },
        {},
        FormatError,
        "--topk 3",
    ),
    "three lists": (
        {"input_ids": TOKENS, "a": [IDS], "b": [LOGPROB]},
        {"topk_ids": "a", "topk_logprob": "b"},
        FormatError,
        "lists in lists in lists",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_columns_that_cannot_be_told_are_refused(tmp_path, name):
    columns, stated, error, said = BAD[name]
    with pytest.raises(error, match=said):
        records(tmp_path / "a.parquet", columns, stated)


def test_masks_and_labels_tell_where_the_response_is(tmp_path):
    base = {
        "input_ids": [[5, 6, 4, 7, 2]],
        "indices": [[[1, 2], *IDS[0]]],
        "logprobs": [[[-1.0, -2], *LOGPROB[0]]],
    }
    for extra in (
        {"labels": [[-100, -100, 4, -100, 2]]},
        {"loss_mask": [[0, 0, 1, 0, 1]]},
        {"prompt_len": [2], "response_mask": [[True, False, True]]},
    ):
        _, (record,) = records(tmp_path / "a.parquet", base | extra)
        assert record.prompt_len == 2
        assert record.loss_mask.tolist() == [True, False, True]
        np.testing.assert_array_equal(record.topk_ids, IDS[0])


def test_logits_without_their_logsumexp_have_no_tail(tmp_path):
    contents, _ = records(tmp_path / "a.parquet", {"input_ids": TOKENS, "indices": IDS, "logits": LOGPROB})
    assert contents.values is Values.RENORMALISED
    assert any("no tail" in line for line in contents.lost)


@pytest.mark.parametrize("form", ["file", "stream", "feather", "datasets", "splits"])
def test_arrow_files_and_datasets_directories(tmp_path, form):
    import datasets

    found = pa.table({"input_ids": TOKENS * 3, "indices": IDS * 3, "logprobs": LOGPROB * 3})
    if form == "feather":
        pyarrow.feather.write_feather(found, tmp_path / "a.feather")
    elif form in ("file", "stream"):
        new = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with new(str(tmp_path / "a.arrow"), found.schema) as writer:
            writer.write_table(found)
    else:
        dataset = datasets.Dataset(found)
        if form == "splits":
            dataset = datasets.DatasetDict({"test": dataset, "train": dataset})
        dataset.save_to_disk(str(tmp_path))
        # As a map over the rows leaves it.
        (tmp_path / ("train" if form == "splits" else "") / "cache-123.arrow").write_bytes(b"other")
    contents = table.read(Source(str(tmp_path)), ReadSettings(vocab_size=10))
    assert len(list(contents.records)) == (6 if form == "splits" else 3)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.list_(pa.int64())),
        pa.large_list(pa.list_(pa.int32())),
        pa.list_(pa.list_(pa.int8(), 2)),
        pa.list_(pa.list_(pa.int64(), 2), 2),
    ],
)
def test_nested_lists_are_what_python_makes_of_them(kind, offset):
    rows = [[[1, 2], [3, 4]], None, [[5, 6], [7, 8]], [[9, 9], [1, 1]], None, [[2, 2], None]]
    found = Rows(pa.array(rows, kind).slice(offset), "x")
    for number, row in enumerate(rows[offset:]):
        expected = row if row is None else [inner or [-1, -1] for inner in row]
        assert (None if found[number] is None else found[number].tolist()) == expected


# Out and back


@pytest.fixture
def cache(tmp_path):
    """Rows of different widths, user columns, -inf tails, absent and present columns."""
    meta = CacheMeta(vocab_size=VOCAB, tokenizer_fingerprint=FINGERPRINT, teacher=ModelInfo(name="T"))
    options = {
        "topk": TOPK,
        "encoding": "plain",
        "user_columns": {"x_n": "int64", "x_t": "utf8", "x_b": "bool"},
    }
    rng = np.random.default_rng(3)
    with opd_store.create(tmp_path / "cache", meta=meta, cut=Cut("given"), **options) as writer:
        for number, rollout in enumerate(good_rollouts(20)):
            ids, logprob, tail = rollout.topk_ids.copy(), rollout.topk_logprob.copy(), rollout.log_tail.copy()
            if number % 3:
                tail[0] = np.logaddexp(tail[0], np.logaddexp.reduce(logprob[0, 2:]))
                ids[0, 2:], logprob[0, 2:] = NO_ID, -np.inf
            if number % 5 == 0:
                logprob[-1] -= np.log(np.exp(logprob[-1].astype(np.float64)).sum()).astype(np.float32) + 1e-6
                tail[-1] = -np.inf
            size = rollout.response_len
            writer.append(
                dataclasses.replace(
                    rollout,
                    topk_ids=ids,
                    topk_logprob=logprob,
                    log_tail=tail,
                    behaviour_logprob=-rng.random(size).astype(np.float32) if number % 2 else None,
                    reference_logprob=-rng.random(size).astype(np.float32),
                    loss_mask=rng.random(size) < 0.5 if number % 4 == 1 else None,
                    finish_reason=("stop", "length", "abort", "unknown")[number % 4],
                    policy_version=number if number % 2 else None,
                    reward=number / 7 if number % 3 else None,
                    label="a\u00e9\n" if number % 3 else None,
                    extra={"x_n": -number, "x_b": number > 4} | ({"x_t": "t"} if number % 2 else {}),
                )
            )
    return opd_store.open(tmp_path / "cache")


def written(cache, to, out, *options):
    args = ["convert", cache.uri, str(out), "--to", to, *map(str, options)]
    result = CliRunner().invoke(main, args, prog_name="opd")
    assert result.exit_code == 0, result.output
    return out


def same(first, second, *, but=()):
    """Whether two rollouts have the same values, padding of a wider cache left out."""
    for field in dataclasses.fields(first):
        if field.name in but:
            continue
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, np.ndarray) and a.ndim == 2:
            kept = first.topk_ids != NO_ID
            assert (kept == (second.topk_ids != NO_ID)).all()
            a, b = a[kept], b[kept]
        if field.name == "loss_mask":
            a, b = (np.ones(first.response_len, bool) if mask is None else mask for mask in (a, b))
        np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.mark.parametrize(
    ("to", "name"), [("table", "a.parquet"), ("datasets", "d"), ("jsonl", "a.jsonl"), ("jsonl", "a.jsonl.gz")]
)
def test_everything_comes_back_bit_for_bit(tmp_path, cache, to, name):
    out = written(cache, to, tmp_path / name)
    result = converted("table" if to == "datasets" else to, out, tmp_path / "again")
    assert not {what for what in result["lost"] if "no " in what}
    again = opd_store.open(tmp_path / "again")
    assert len(again) == len(cache)
    for first, second in zip(cache, again, strict=True):
        same(first, second)
    # And once more from there: the same file.
    if to == "jsonl":
        second = written(again, to, tmp_path / f"2{name}")
        packed = name.endswith("gz")
        files = [
            gzip.decompress(path.read_bytes()) if packed else path.read_bytes() for path in (out, second)
        ]
        assert files[0] == files[1]


OURS = [("table", "a.parquet"), ("datasets", "d"), ("jsonl", "a.jsonl")]


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize(("to", "name"), OURS)
def test_what_a_cache_rounded_comes_back_as_it_is(tmp_path, to, name, renormalised):
    """Though its probabilities exceed 1; and what was absent, such as names and own log-probs, stays so."""
    mode = RENORMALISED_TOPK if renormalised else None
    meta = CacheMeta(
        vocab_size=VOCAB,
        tokenizer_fingerprint=FINGERPRINT,
        teacher=ModelInfo(name="T", logprob_mode=mode),
    )
    options = {"topk": TOPK, "encoding": "ladder/32", "cut": Cut("given")}
    with opd_store.create(tmp_path / "rounded", meta=meta, **options) as writer:
        for rollout in good_rollouts(9):
            total = np.logaddexp.reduce(rollout.topk_logprob.astype(np.float64), axis=1, keepdims=True)
            kept = rollout.topk_logprob - total if renormalised else rollout.topk_logprob
            tail = np.full_like(rollout.log_tail, -np.inf) if renormalised else rollout.log_tail
            absent = {"sample_id": None, "teacher_logprob": None}
            writer.append(
                dataclasses.replace(rollout, topk_logprob=kept.astype(np.float32), log_tail=tail, **absent)
            )
    cache = opd_store.open(tmp_path / "rounded")
    sums = [np.exp(r.topk_logprob.astype(float)).sum(axis=1) + np.exp(r.log_tail) for r in cache]
    assert np.concatenate(sums).max() > 1 + 1e-3
    out = written(cache, to, tmp_path / name)
    for encoding in ("ladder/32", "plain"):
        result = convert("table" if to == "datasets" else to, out, tmp_path / "a", "--encoding", encoding)
        lost = json.loads(result.stdout)["lost"]
        assert not [what for what in lost if "scaled" in what or "order" in what]
        again = opd_store.open(tmp_path / "a")
        assert again.max_error == cache.max_error > 0
        for first, second in zip(cache, again, strict=True):
            same(first, second)
        assert not opd_store.verify(tmp_path / "a").problems
        shutil.rmtree(tmp_path / "a")


@pytest.mark.parametrize("stated", ["nan", "inf", "-1", "x", "1e400"])
def test_an_impossible_error_is_none(stated):
    metadata = {"opd_meta": '{"teacher": null}', "opd_max_error": stated}
    assert table_export.origin_of(pa.schema({}, metadata)).max_error is None


@pytest.mark.parametrize(("to", "name"), [("table", "{}.parquet"), ("jsonl", "{}.jsonl")])
def test_files_of_different_caches_are_not_mixed(tmp_path, to, name, cache):
    other = tmp_path / "other"
    options = {"topk": TOPK, "encoding": "ladder/32", "user_columns": cache.schema.user_columns}
    with opd_store.create(other, meta=cache.meta, cut=Cut("given"), **options) as writer:
        writer.append(good_rollouts(1)[0])
    (tmp_path / "in").mkdir()
    for number, one in enumerate((cache, opd_store.open(other))):
        written(one, to, tmp_path / "in" / name.format(number))
    line = refused(convert(to, tmp_path / "in", tmp_path / "to"), tmp_path / "to")
    assert "another cache" in line


@pytest.mark.parametrize(("to", "name"), OURS)
def test_renormalised_values_stay_known_as_such(tmp_path, to, name):
    meta = CacheMeta(
        vocab_size=VOCAB,
        tokenizer_fingerprint=FINGERPRINT,
        teacher=ModelInfo(name="T", logprob_mode="renormalised_topk"),
    )
    with opd_store.create(tmp_path / "cache", meta=meta, topk=TOPK, encoding="plain") as writer:
        for rollout in good_rollouts(3):
            logprob = rollout.topk_logprob.astype(np.float64)
            logprob = (logprob - np.log(np.exp(logprob).sum(1))[:, None]).astype(np.float32)
            tail = np.full(len(logprob), -np.inf, np.float32)
            writer.append(dataclasses.replace(rollout, topk_logprob=logprob, log_tail=tail))
    out = written(opd_store.open(tmp_path / "cache"), to, tmp_path / name)
    converted("table" if to == "datasets" else to, out, tmp_path / "again")
    assert opd_store.open(tmp_path / "again").meta.teacher.logprob_mode == "renormalised_topk"


def test_distillkit_and_back(tmp_path, cache):
    out = written(cache, "distillkit", tmp_path / "d")
    assert yaml.safe_load((out / "compression_config.yaml").read_text())["exact_k"] == TOPK
    converted("distillkit", out, tmp_path / "again")
    for first, second in zip(cache, opd_store.open(tmp_path / "again"), strict=True):
        first_kept = first.loss_mask if first.loss_mask is not None else np.ones(first.response_len, bool)
        # Labels say where a prompt ends only as far as something is trained on.
        skip = second.prompt_len - first.prompt_len
        assert skip == (int(first_kept.argmax()) if first_kept.any() else 1 - first.prompt_len)
        kept = first.topk_ids[max(0, skip) :] != NO_ID
        np.testing.assert_array_equal(
            second.topk_ids[max(0, -skip) :][kept], first.topk_ids[max(0, skip) :][kept]
        )
        found = second.topk_logprob[max(0, -skip) :][kept]
        np.testing.assert_allclose(found, first.topk_logprob[max(0, skip) :][kept], rtol=0, atol=2e-6)


def test_distillkit_rows_hold_distinct_ids(tmp_path, cache):
    from opd_tools.converters.trainers import distillkit

    out = written(cache, "distillkit", tmp_path / "d")
    contents = distillkit.read(Source(str(out)), ReadSettings(vocab_size=VOCAB))
    for file in pq.read_table(out / "data_0.parquet").to_pylist():
        assert len(file["compressed_logprobs"]) == len(file["input_ids"]) - 1
    for record in contents.records:
        assert all(len(set(row)) == TOPK for row in record.topk_ids.tolist())


@pytest.mark.parametrize("topk", [None, 2])
def test_safetensors(tmp_path, cache, topk, monkeypatch):
    monkeypatch.setattr("opd_tools.converters.plain.safetensors_export._POSITIONS", 60)
    out = written(cache, "safetensors", tmp_path / "s", *(["--topk", topk] if topk else []))
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    assert json.loads((out / "meta.json").read_text())["vocab_size"] == VOCAB
    at = 0
    for file in files:
        found = safetensors.numpy.load_file(file)
        assert safetensors.torch.load_file(file).keys() == found.keys()
        for place in range(len(found["prompt_len"])):
            rollout = cache.rollout(at, ranks=topk)
            tokens = slice(*found["token_offsets"][place : place + 2])
            rows = slice(*found["row_offsets"][place : place + 2])
            np.testing.assert_array_equal(found["token_ids"][tokens], rollout.token_ids)
            ids = found["topk_ids"][rows]
            np.testing.assert_array_equal(ids.view(np.uint32), rollout.topk_ids)
            for name in ("topk_logprob", "log_tail", "teacher_logprob", "reference_logprob"):
                np.testing.assert_array_equal(found[name][rows], getattr(rollout, name))
            at += 1
        assert "behaviour_logprob" not in found
    assert at == len(cache)


def test_parquet_is_split_into_byte_planes(tmp_path, cache):
    group = pq.ParquetFile(written(cache, "table", tmp_path / "a.parquet")).metadata.row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    column = columns["topk_logprob.list.element.list.element"]
    assert "BYTE_STREAM_SPLIT" in column.encodings
    assert column.compression == "ZSTD"


def test_jsonl_is_strict_json_that_pandas_could_read(tmp_path, cache):
    def refuse(name):
        raise AssertionError(name)

    lines = written(cache, "jsonl", tmp_path / "a.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert any(None in line["log_tail"] for line in found)
    assert {line["format"] for line in found} == {"opd-rollout/1"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "no rollout"),
        ({"token_ids": "abc"}, "of another type"),
        ({"token_ids": [1.5, 2]}, "of another type"),
        ({"topk_ids": [["a"]]}, "of another type"),
        ({"topk_logprob": None}, "of another type"),
        ({"prompt_len": None}, "of another type"),
        ({"sample_id": 3}, "of another type"),
    ],
)
def test_jsonl_with_other_lines(tmp_path, cache, change, said):
    path = written(cache, "jsonl", tmp_path / "a.jsonl")
    lines = path.read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | change)
    path.write_text("\n".join(lines))
    line = refused(convert("jsonl", path, tmp_path / "again"), tmp_path / "again")
    assert said in line
    assert "line 5" in line


def test_a_file_is_not_written_over(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text("mine")
    result = CliRunner().invoke(main, ["convert", cache.uri, str(tmp_path / "a.jsonl"), "--to", "jsonl"])
    assert result.exit_code != 0
    assert (tmp_path / "a.jsonl").read_text() == "mine"
