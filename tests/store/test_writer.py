"""Appending and committing: what is acknowledged, what is skipped, what is left behind."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import inspect
import itertools
import math
import os
import weakref

import pytest
from store import caches
from store.caches import add, assert_holds, files, manifest, run_python, some_rollouts, write

import opd_store
from opd_store.testing import example_meta


def test_the_same_rollout_is_stored_once(tmp_path):
    values = some_rollouts(3)
    with opd_store.create(tmp_path / "cache", meta=example_meta(100), topk=3, batch_bytes=1) as writer:
        assert writer.append(values[0])
        assert not writer.append(values[0])
        assert writer.append_batch([*values, *values]) == 2
        writer.commit()
        assert not writer.append(values[1])
    assert_holds(opd_store.open(tmp_path / "cache"), values)
    with opd_store.append(tmp_path / "cache") as writer:
        assert writer.append_batch(values) == 0
        # The same tokens by the same name are the same draw, whatever else is said about them.
        assert not writer.append(dataclasses.replace(values[2], reward=1.0, finish_reason="length"))
    assert_holds(opd_store.open(tmp_path / "cache"), values)


@pytest.mark.parametrize("commit_between", [False, True])
def test_another_sample_id_is_another_draw(tmp_path, commit_between):
    draws = [dataclasses.replace(some_rollouts(1)[0], sample_id=name) for name in ("a", "b", "", None)]
    path = tmp_path / "cache"
    with opd_store.create(path, meta=example_meta(100), topk=3) as writer:
        for draw in draws:
            assert writer.append(draw)
            if commit_between:
                writer.commit()
        assert writer.append_batch(draws) == 0
    with opd_store.append(path) as writer:
        assert writer.append_batch(draws) == 0
    assert_holds(opd_store.open(path), draws)


def test_commit_names_the_version(tmp_path):
    values = some_rollouts(4)
    path = tmp_path / "cache"
    first = write(path, values[:2])
    second = add(path, values[2:])
    assert (first.sequence, second.sequence) == (1, 2)
    assert second.uri == f"{path}@{second.digest}"
    assert opd_store.open(path).digest == second.digest
    assert opd_store.open(path).parent == first.digest
    assert_holds(opd_store.open(first.uri), values[:2])
    assert_holds(opd_store.open(second.uri), values)
    assert_holds(opd_store.open(f"file://{second.uri}"), values)


def test_an_open_cache_keeps_its_version(tmp_path):
    values = some_rollouts(6)
    write(tmp_path / "cache", values[:2])
    before = opd_store.open(tmp_path / "cache")
    add(tmp_path / "cache", values[2:4])
    between = opd_store.open(tmp_path / "cache")
    add(tmp_path / "cache", values[4:])
    assert_holds(before, values[:2])
    assert_holds(between, values[:4])
    assert before.find(caches.hash_of(values[5])) is None


def test_an_empty_first_version(tmp_path):
    version = write(tmp_path / "cache", [])
    cache = opd_store.open(tmp_path / "cache")
    assert (version.sequence, len(cache), cache.n_tokens, cache.n_shards, cache.n_bytes) == (1, 0, 0, 0, 0)
    assert cache.to_arrow().num_rows == 0
    assert opd_store.verify(tmp_path / "cache").ok
    add(tmp_path / "cache", some_rollouts(1))
    assert_holds(opd_store.open(tmp_path / "cache"), some_rollouts(1))


def test_commit_without_new_rollouts_changes_nothing(tmp_path):
    version = write(tmp_path / "cache", some_rollouts(2))
    before = files(tmp_path / "cache")
    with opd_store.append(tmp_path / "cache") as writer:
        assert writer.commit() == version
        writer.append_batch(some_rollouts(2))
        assert writer.commit() == version
    assert files(tmp_path / "cache") == before


def test_several_commits_of_one_writer(tmp_path):
    values = some_rollouts(9)
    with opd_store.create(tmp_path / "cache", meta=example_meta(100), topk=3) as writer:
        for row in range(8):
            writer.append(values[row])
            assert writer.commit().sequence == row + 1
        writer.append(values[8])
    assert opd_store.open(tmp_path / "cache").version == 9
    assert_holds(opd_store.open(tmp_path / "cache"), values)


def test_nothing_is_visible_before_the_first_commit(tmp_path):
    writer = opd_store.create(tmp_path / "cache", meta=example_meta(100), topk=3, batch_bytes=1)
    writer.append_batch(some_rollouts(3))
    with pytest.raises(opd_store.CacheNotFoundError):
        opd_store.open(tmp_path / "cache")
    writer.close()
    assert files(tmp_path / "cache") == {}
    assert not list((tmp_path / "cache/tmp").iterdir())
    write(tmp_path / "cache", some_rollouts(1))


def test_an_error_inside_the_context_commits_nothing(tmp_path):
    path = tmp_path / "cache"
    write(path, some_rollouts(1))
    writer = opd_store.append(path, batch_bytes=1)

    def interrupted():
        yield from some_rollouts(4)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), writer:
        writer.append_batch(interrupted())
    assert_holds(opd_store.open(path), some_rollouts(1))
    assert not list((path / "tmp").iterdir())
    with pytest.raises(opd_store.OpdError, match="closed or failed earlier"):
        writer.append(some_rollouts(2)[1])
    with pytest.raises(opd_store.OpdError, match="closed or failed earlier"):
        writer.commit()


def test_a_file_of_another_live_writer_is_left_alone(tmp_path):
    path = tmp_path / "cache"
    slow = opd_store.create(path, meta=example_meta(100), topk=3, batch_bytes=1)
    slow.append(some_rollouts(1)[0])
    assert len(list((path / "tmp").iterdir())) == 1
    opd_store.create(path, meta=example_meta(100), topk=3).close()
    slow.append_batch(some_rollouts(3))
    slow.commit()
    assert_holds(opd_store.open(path), some_rollouts(3))


def test_a_file_of_a_killed_writer_is_removed(tmp_path):
    path = tmp_path / "cache"
    run_python(
        inspect.cleandoc("""
            import os, sys, opd_store
            from opd_store.testing import example_meta
            from store.caches import some_rollouts
            writer = opd_store.create(sys.argv[1], meta=example_meta(100), topk=3, batch_bytes=1)
            writer.append(some_rollouts(1)[0])
            os._exit(0)
        """),
        path,
    )
    assert len(list((path / "tmp").iterdir())) == 1
    write(path, some_rollouts(2))
    assert not list((path / "tmp").iterdir())


WRITE_SLOWLY = inspect.cleandoc("""
    import gc, sys, time, opd_store
    from opd_store.testing import example_meta
    from store.caches import some_rollouts
    values = some_rollouts(30, topk=9, response_len=7)
    options = {"batch_bytes": 3000, "shard_bytes": 9000}
    writer = opd_store.create(
        sys.argv[1], meta=example_meta(100), topk=9, user_columns={"x_b": "bool", "x_a": "int64"}, **options
    )
    for i, value in enumerate(values[:20]):
        time.sleep(0.002 * (i % 3))
        gc.collect()
        writer.append(value)
        writer.append(values[0])
    writer.commit()
    writer.close()
    with opd_store.append(sys.argv[1], **options) as writer:
        for value in values:
            writer.append(value)
""")


def test_the_same_rollouts_give_the_same_bytes(tmp_path):
    values = some_rollouts(30, topk=9, response_len=7)
    columns = {"x_a": "int64", "x_b": "bool"}
    options = {"batch_bytes": 3000, "shard_bytes": 9000}
    for name in ("a", "b"):
        path = tmp_path / name
        write(path, values[:20], topk=9, user_columns=dict(sorted(columns.items())), **options)
        add(path, values[20:], **options)
    expected = files(tmp_path / "a")
    assert files(tmp_path / "b") == expected
    assert sum(name.startswith("shards/") for name in expected) > 2
    for seed in ("1", "2"):
        run_python(WRITE_SLOWLY, tmp_path / seed, PYTHONHASHSEED=seed, MALLOC_PERTURB_="165")
        assert files(tmp_path / seed) == expected


def test_segments_are_merged_and_rows_keep_their_order(tmp_path):
    values = some_rollouts(60)
    path = tmp_path / "cache"
    sizes = [3, 1, 1, 7, 1, 2, *[1] * 45]
    with opd_store.create(path, meta=example_meta(100), topk=3) as writer:
        start = 0
        for size in sizes:
            writer.append_batch(values[start : start + size])
            start += size
            sequence = writer.commit().sequence
            segments = manifest(path, sequence)["segments"]
            assert sum(segment["rows"] for segment in segments) == start
            assert len(segments) <= math.log2(start) + 1
            if len(segments) > 1:
                assert all(a["rows"] >= 2 * b["rows"] for a, b in itertools.pairwise(segments))
    assert_holds(opd_store.open(path), values)
    assert opd_store.verify(path).problems == []


def test_a_commit_rewrites_few_index_bytes(tmp_path):
    """Merging costs a logarithmic number of rewrites of each row, not one a commit."""
    values = some_rollouts(64, topk=0)
    path = tmp_path / "cache"
    write(path, [], topk=0)
    for value in values:
        add(path, [value])
    tables = [s["rollouts"] for i in range(2, 66) for s in manifest(path, i)["segments"]]
    written = sum(ref["n_bytes"] for ref in {t["sha256"]: t for t in tables}.values())
    empty_table = 800
    assert written < 64 * (empty_table + 40 * (math.log2(64) + 2))


MEASURE = inspect.cleandoc("""
    import dataclasses, resource, sys, opd_store
    from opd_store.testing import example_meta
    from store.caches import some_rollouts
    peak_kib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rollout = some_rollouts(1, topk=64, response_len=1000, vocab_size=5000)[0]
    writer = opd_store.create(
        sys.argv[1], meta=example_meta(5000), topk=64, batch_bytes=4 << 20, shard_bytes=32 << 20
    )
    append = lambda start, end: writer.append_batch(
        dataclasses.replace(rollout, sample_id=str(i)) for i in range(start, end)
    )
    append(0, 30)
    before = peak_kib()
    append(30, 270)
    writer.commit()
    writer.close()
    print(before, peak_kib(), opd_store.open(sys.argv[1]).n_bytes)
""")


def test_memory_is_bounded_by_the_record_batch(tmp_path):
    before, after, n_bytes = map(int, run_python(MEASURE, tmp_path / "cache").split())
    assert n_bytes > 30 * (4 << 20)
    assert (after - before) << 10 < 3 * (4 << 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 4097}, "topk: expected 0..4096, found 4097"),
        ({"topk": -1}, "topk: expected 0..4096, found -1"),
        ({"bands": (4,), "topk": 0}, r"bands, cut: expected none for topk=0, found \(4,\)"),
        ({"bands": (4, 2, 8), "topk": 8}, "rising ends, the last one 8"),
        ({"bands": (4, 9), "topk": 8}, "rising ends, the last one 8"),
        ({"bands": (0, 8), "topk": 8}, "rising ends"),
        ({"bands": (), "topk": 8}, "rising ends"),
        ({"encoding": "zip"}, "encoding: this release knows plain, f32, ladder16, .*; found 'zip'"),
        ({"user_columns": {"reward": "int64"}}, "'reward' .*name like x_domain"),
        ({"user_columns": {"x_a": "int32"}}, "'int32'.*one of bool, int64, float64, utf8"),
        ({"batch_bytes": 0}, r"batch_bytes: expected 1\.\.536870912"),
        ({"batch_bytes": (1 << 29) + 1}, "found 536870913"),
        ({"shard_bytes": 0}, "shard_bytes >= 1"),
    ],
)
def test_options_that_cannot_work(tmp_path, options, message):
    with pytest.raises(opd_store.InvalidArgumentError, match=message):
        opd_store.create(tmp_path / "cache", meta=example_meta(100), **options)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "meta",
    [
        dataclasses.replace(example_meta(), extra={"long": "x" * 4097}),
        dataclasses.replace(example_meta(), extra={f"k{i}": "x" * 4000 for i in range(300)}),
        dataclasses.replace(example_meta(), licence="\ud800"),
        dataclasses.replace(example_meta(), licence=5),
        dataclasses.replace(example_meta(), sampler=opd_store.SamplerInfo(temperature=math.nan)),
        dataclasses.replace(example_meta(), sampler=opd_store.SamplerInfo(seed=2**53)),
        dataclasses.replace(example_meta(), extra={"key": {"a": "b"}}),
    ],
    ids=["long text", "large", "surrogate", "number for text", "nan", "large seed", "nested"],
)
def test_a_description_that_no_reader_would_accept(tmp_path, meta):
    """Refused at once: a manifest nobody can read would be found only after the teacher ran."""
    with pytest.raises(opd_store.OpdError):
        opd_store.create(tmp_path / "cache", meta=meta)
    assert not (tmp_path / "cache").exists()


def test_writers_are_freed(tmp_path):
    """No reference cycle keeps a closed writer's batch in memory."""
    with opd_store.create(tmp_path / "cache", meta=example_meta(100), topk=3) as writer:
        writer.append_batch(some_rollouts(3))
    gone = weakref.ref(writer)
    del writer
    assert gone() is None


def test_what_was_removed_before_its_commit_is_not_acknowledged(tmp_path):
    """A writer that pauses for longer than `opd gc --min-age` must not name a shard that is gone."""
    writer = opd_store.create(
        tmp_path / "cache", meta=example_meta(100), topk=3, batch_bytes=1, shard_bytes=1
    )
    writer.append_batch(some_rollouts(2))
    sorted((tmp_path / "cache/shards").iterdir())[0].unlink()
    with pytest.raises(opd_store.StorageError, match="was removed before its version was committed"):
        writer.commit()
    with pytest.raises(opd_store.CacheNotFoundError):
        opd_store.open(tmp_path / "cache")


def test_leftovers_go_where_exclusive_locks_need_a_file_that_is_open_for_writing(tmp_path, monkeypatch):
    """As on NFS."""
    real = fcntl.flock

    def flock(file, operation):
        descriptor = file if isinstance(file, int) else file.fileno()
        if operation & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    write(tmp_path / "cache", some_rollouts(1))
    (tmp_path / "cache/tmp/left").touch()
    with opd_store.append(tmp_path / "cache", batch_bytes=1) as writer:
        assert list((tmp_path / "cache/tmp").iterdir()) == []
        writer.append(some_rollouts(1, seed=2)[0])
        (held,) = (tmp_path / "cache/tmp").iterdir()
        opd_store.append(tmp_path / "cache").close()
        assert held.exists()
