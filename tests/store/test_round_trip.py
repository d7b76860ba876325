"""What goes in comes out: every column, through the public names only."""

from __future__ import annotations

import dataclasses
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from store.caches import (
    ARRAYS,
    VOCAB,
    add,
    assert_holds,
    assert_same,
    files,
    hash_of,
    some_rollouts,
    write,
)

import opd_store
from opd_store import Rollout
from opd_store.testing import example_meta, random_rollout, rollouts

USER_COLUMNS = {"x_flag": "bool", "x_count": "int64", "x_score": "float64", "x_text": "utf8"}
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
# The size of a text is counted in UTF-8 bytes.
LONGEST_TEXT = "é" * 2048
USER_VALUES = {
    "x_flag": st.booleans(),
    "x_count": st.integers(-(2**63), 2**63 - 1),
    "x_score": st.floats(allow_nan=False),
    "x_text": TEXT,
}
SCALAR_VALUES = {
    "sample_id": st.none() | TEXT,
    "finish_reason": st.sampled_from(["stop", "length", "abort", "unknown"]),
    "policy_version": st.none() | st.integers(-(2**53) + 1, 2**53 - 1),
    "teacher": st.integers(0, 2**16 - 1),
    "reward": st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
    "label": st.none() | TEXT,
    "extra": st.fixed_dictionaries({}, optional=USER_VALUES),
}
ABSENT = st.sets(st.sampled_from(["loss_mask", "teacher_logprob", "behaviour_logprob", "reference_logprob"]))


@st.composite
def full_rollouts(draw: st.DrawFn, topk: int) -> Rollout:
    rollout = draw(rollouts(vocab_size=VOCAB, topk=topk))
    scalars = {name: draw(values) for name, values in SCALAR_VALUES.items()}
    return dataclasses.replace(rollout, **scalars, **dict.fromkeys(draw(ABSENT)))


def without_repeats(values: list[Rollout]) -> list[Rollout]:
    return list({(hash_of(r), r.sample_id): r for r in reversed(values)}.values())[::-1]


@settings(deadline=None, max_examples=30)
@given(data=st.data(), topk=st.sampled_from([0, 1, 3, 20]))
def test_everything_comes_back(data, topk):
    values = without_repeats(data.draw(st.lists(full_rollouts(topk), max_size=6)))
    cut = data.draw(st.integers(0, len(values)))
    options = {"batch_bytes": data.draw(st.sampled_from([1, 2000])), "shard_bytes": 4000}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "cache"
        write(path, values[:cut], topk=topk, user_columns=USER_COLUMNS, **options)
        add(path, values[cut:], **options)
        cache = opd_store.open(path)
        assert_holds(cache, values)
        assert cache.n_tokens == sum(len(r.token_ids) for r in values)
        assert cache.n_response_tokens == sum(r.response_len for r in values)
        assert opd_store.verify(path).problems == []


@settings(deadline=None, max_examples=25)
@given(
    rollout=rollouts(vocab_size=VOCAB, topk=9),
    bands=st.sets(st.integers(1, 8)).map(lambda ends: (*sorted(ends), 9)),
)
@example(rollout=some_rollouts(1, topk=9, decimals=0)[0], bands=(1, 2, 3, 4, 5, 6, 7, 8, 9))
def test_any_bands(rollout, bands):
    with tempfile.TemporaryDirectory() as name:
        write(Path(name) / "cache", [rollout], topk=9, bands=bands)
        cache = opd_store.open(Path(name) / "cache")
        assert cache.schema.bands == bands
        assert_same(cache[0], rollout)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16, np.uint64, ">u4"])
def test_ids_of_any_integer_dtype(tmp_path, dtype):
    rollout = some_rollouts(1)[0]
    ids = {name: getattr(rollout, name).astype(dtype) for name in ("token_ids", "topk_ids")}
    write(tmp_path / "cache", [dataclasses.replace(rollout, **ids)])
    assert_same(opd_store.open(tmp_path / "cache")[0], rollout)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_logprobs_of_any_float_dtype(tmp_path, dtype):
    # Powers of two survive float16.
    rollout = dataclasses.replace(
        some_rollouts(1, topk=0)[0], teacher_logprob=np.array([-0.5, -0.0, -8], dtype), topk_ids=None
    )
    write(tmp_path / "cache", [rollout], topk=0)
    assert_same(opd_store.open(tmp_path / "cache")[0], rollout)


def test_the_sign_of_zero_is_data(tmp_path):
    zeros = np.array([-0.0, 0.0, -0.0], np.float32)
    rollout = dataclasses.replace(some_rollouts(1, topk=0)[0], teacher_logprob=zeros)
    write(tmp_path / "cache", [rollout], topk=0)
    assert opd_store.open(tmp_path / "cache")[0].teacher_logprob.tobytes() == zeros.tobytes()


def test_texts_up_to_the_limit(tmp_path):
    rollout = dataclasses.replace(some_rollouts(1)[0], sample_id=LONGEST_TEXT, label="", extra={"x_t": "\0"})
    write(tmp_path / "cache", [rollout], user_columns={"x_t": "utf8"})
    assert_same(opd_store.open(tmp_path / "cache")[0], rollout)


def test_absent_columns_stay_absent(tmp_path):
    bare = Rollout(token_ids=np.array([1, 2], np.uint32), prompt_len=1)
    full = some_rollouts(1, topk=0)[0]
    write(tmp_path / "cache", [bare, full, dataclasses.replace(bare, sample_id="b")], topk=0)
    cache = opd_store.open(tmp_path / "cache")
    assert_holds(cache, [bare, full, dataclasses.replace(bare, sample_id="b")])
    assert all(getattr(cache[0], name) is None for name in ARRAYS if name != "token_ids")
    assert all(getattr(cache[0], name) is None for name in ("reward", "label", "sample_id", "policy_version"))


def test_rows_of_several_batches_shards_and_versions(tmp_path):
    values = some_rollouts(40)
    write(tmp_path / "cache", values[:15], batch_bytes=300, shard_bytes=6000)
    add(tmp_path / "cache", values[15:30], batch_bytes=1, shard_bytes=1)
    add(tmp_path / "cache", values[30:])
    cache = opd_store.open(tmp_path / "cache")
    assert cache.version == 3
    assert cache.n_shards > 17
    assert_holds(cache, values)
    for row in (0, 14, 15, 29, 30, 39):
        assert_same(cache[row], values[row])
        assert_same(cache[row - 40], values[row])
        assert_same(cache[np.int64(row)], values[row])
        assert cache.row_hash(row) == hash_of(values[row])
    for row in (40, -41):
        with pytest.raises(IndexError, match=f"row {row} of 40"):
            cache[row]


def test_more_batches_than_are_kept_parsed(tmp_path):
    values = some_rollouts(300, topk=0)
    write(tmp_path / "cache", values, topk=0, batch_bytes=1)
    cache = opd_store.open(tmp_path / "cache")
    for row in (*range(300), 0, 299):
        assert_same(cache[row], values[row])


def test_sizes(tmp_path):
    write(tmp_path / "cache", some_rollouts(5), shard_bytes=1, batch_bytes=1)
    cache = opd_store.open(tmp_path / "cache")
    stored = files(tmp_path / "cache")
    assert cache.n_bytes == sum(len(data) for name, data in stored.items() if not name.endswith(".json"))
    assert cache.n_shards == sum(name.startswith("shards/") for name in stored)
    assert (cache.n_tokens, cache.n_response_tokens) == (25, 15)


def test_the_description_comes_back(tmp_path):
    meta = opd_store.CacheMeta(
        vocab_size=VOCAB,
        tokenizer_fingerprint="sha256:" + "1a" * 32,
        teacher=opd_store.ModelInfo(name="t", weights_digest="sha256:" + "2b" * 32, logprob_temperature=1.0),
        other_teachers=(opd_store.ModelInfo(name="u"), opd_store.ModelInfo(name="\N{SNOWMAN}")),
        sampler=opd_store.SamplerInfo(temperature=0.7, top_k=5, stop_token_ids=(1, 2)),
        chat_template_args={"enable_thinking": "false"},
        extra={"": "\x1b[31m"},
    )
    write(tmp_path / "cache", [], meta=meta, topk=20, user_columns={"x_b": "bool", "x_a": "utf8"})
    cache = opd_store.open(tmp_path / "cache")
    assert cache.meta == meta
    assert opd_store.diff_meta(meta, cache.meta) == []
    assert cache.schema == opd_store.CacheSchema(
        topk=20, bands=(20,), encoding="plain", user_columns={"x_a": "utf8", "x_b": "bool"}
    )
    assert (cache.topk, cache.encoding, cache.parent, len(cache), list(cache)) == (20, "plain", None, 0, [])


def test_find_and_find_all(tmp_path):
    one, two = some_rollouts(2)
    draws = [dataclasses.replace(one, sample_id=name) for name in ("a", "b", None)]
    write(tmp_path / "cache", [draws[0], two, draws[1]], shard_bytes=1, batch_bytes=1)
    # Larger than the first segment, so that both are merged; the one after it is not.
    add(tmp_path / "cache", [*some_rollouts(8, seed=1), draws[2]])
    add(tmp_path / "cache", [dataclasses.replace(one, sample_id="c")])
    cache = opd_store.open(tmp_path / "cache")
    assert list(cache.find_all(hash_of(one))) == [0, 2, 11, 12]
    assert cache.find(hash_of(one)) == 0
    assert cache.find(hash_of(two)) == 1
    for unknown in (bytes(32), b"\xff" * 32, hash_of(some_rollouts(1, seed=9)[0])):
        assert cache.find(unknown) is None
        assert list(cache.find_all(unknown)) == []


def test_scan_of_some_columns(tmp_path):
    values = [
        dataclasses.replace(r, reward=0.5, label="l", extra={"x_n": 4}) for r in some_rollouts(4, topk=9)
    ]
    write(tmp_path / "cache", values, topk=9, user_columns={"x_n": "int64"}, batch_bytes=600)
    cache = opd_store.open(tmp_path / "cache")
    for rollout, value in zip(cache.scan(columns=["teacher_logprob", "label"]), values, strict=True):
        only = Rollout(
            token_ids=value.token_ids,
            prompt_len=value.prompt_len,
            teacher_logprob=value.teacher_logprob,
            label="l",
        )
        assert_same(rollout, only)
    assert all(r.topk_ids is not None and not r.extra for r in cache.scan(columns=["log_tail"]))
    assert all(r.topk_ids is None and r.reward == 0.5 for r in cache.scan(ranks=0))
    assert [r.topk_ids.shape for r in cache.scan(ranks=2, columns=["topk_ids"])] == [(3, 2)] * 4
    assert next(cache.scan(columns=["x_n"])).extra == {"x_n": 4}
    assert_same(cache.rollout(2, columns=[]), Rollout(token_ids=values[2].token_ids, prompt_len=2))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"ranks": 10}, r"ranks: expected 0\.\.9 .* found 10"),
        ({"ranks": -1}, "found -1"),
        ({"columns": ["reward", "rewards"]}, "'rewards' is not one of behaviour_logprob"),
        ({"columns": ["rollout_hash"]}, "'rollout_hash' is not one of"),
    ],
)
def test_a_selection_that_cannot_work(tmp_path, selection, message):
    write(tmp_path / "cache", some_rollouts(1, topk=9), topk=9)
    cache = opd_store.open(tmp_path / "cache")
    for call in (lambda: list(cache.scan(**selection)), lambda: cache.rollout(0, **selection)):
        with pytest.raises(opd_store.InvalidArgumentError, match=message):
            call()


def test_to_arrow(tmp_path):
    values = [dataclasses.replace(r, extra={"x_s": str(i)}) for i, r in enumerate(some_rollouts(5, topk=9))]
    values[3] = dataclasses.replace(values[3], loss_mask=None, extra={})
    write(tmp_path / "cache", values, topk=9, user_columns={"x_s": "utf8"}, batch_bytes=500)
    cache = opd_store.open(tmp_path / "cache")
    table = cache.to_arrow()
    assert table.num_rows == 5
    assert table["x_s"].to_pylist() == ["0", "1", "2", None, "4"]
    assert table["sample_id"].to_pylist() == [f"r{i}" for i in range(5)]
    assert table["loss_mask"][3].as_py() is None
    for row, value in enumerate(values):
        for name in ("token_ids", "teacher_logprob", "topk_ids", "topk_logprob", "log_tail"):
            found = table[name][row].values.to_numpy()
            assert found.tobytes() == getattr(value, name).tobytes(), name
    part = cache.to_arrow(rows=[4, 0, 0], ranks=2, columns=["topk_ids"])
    assert set(part.column_names) == {"token_ids", "prompt_len", "topk_ids"}
    assert part["topk_ids"].to_pylist() == [cache[i].topk_ids[:, :2].ravel().tolist() for i in (4, 0, 0)]


def test_a_pickled_cache_is_pinned(tmp_path):
    values = some_rollouts(3)
    write(tmp_path / "cache", values[:2])
    cache = opd_store.open(tmp_path / "cache")
    add(tmp_path / "cache", values[2:])
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.version, copy.digest, copy.uri) == (1, cache.digest, cache.uri)
    assert_holds(copy, values[:2])


def test_reading_leaves_no_trace(tmp_path):
    write(tmp_path / "cache", some_rollouts(3))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    list(opd_store.open(tmp_path / "cache"))
    assert opd_store.verify(tmp_path / "cache").ok
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_verify_counts_what_it_read(tmp_path):
    write(tmp_path / "cache", some_rollouts(5), shard_bytes=1, batch_bytes=1)
    add(tmp_path / "cache", some_rollouts(3, seed=1))
    calls: list[tuple[int, int]] = []
    report = opd_store.verify(tmp_path / "cache", on_progress=lambda *call: calls.append(call))
    assert (report.ok, report.versions, report.shards) == (True, 2, 6)
    assert (report.rollouts, report.response_tokens) == (8, 24)
    assert report.digest == opd_store.open(tmp_path / "cache").digest
    assert calls[-1] == (8, 8)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_example_rollouts_keep_the_rules(tmp_path):
    rng = np.random.default_rng(0)
    values = [random_rollout(rng, vocab_size=40, topk=k, decimals=2) for k in (40, 40)]
    write(tmp_path / "cache", values, topk=40, meta=example_meta(40))
    assert opd_store.verify(tmp_path / "cache").ok
