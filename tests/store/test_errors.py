"""Errors: their classes, their words, and what is left after them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import json
import os
import pickle
import stat

import pytest
from store.caches import add, assert_holds, files, run_python, some_rollouts, write

import opd_store
from opd_store.testing import example_meta

CLASSES = [
    item
    for item in vars(opd_store).values()
    if inspect.isclass(item) and issubclass(item, opd_store.OpdError)
]
CONTEXT = {
    "sample_id": "s",
    "field": "reward",
    "position": 3,
    "expected": "a",
    "found": "b",
    "uri": "/c",
    "row": 7,
    "column": "label",
    "errno": errno.ENOSPC,
    "filename": "/c/d",
}


def make(kind: type[opd_store.OpdError]) -> opd_store.OpdError:
    """An error with every attribute its class takes."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("opd_store")]
    init = next((vars(base)["__init__"] for base in ours if "__init__" in vars(base)), None)
    names = inspect.signature(init).parameters.keys() & CONTEXT.keys() if init else ()
    return kind("what happened", **{name: CONTEXT[name] for name in names})


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_survive_pickling(kind):
    error = make(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error) == "what happened"
    assert copy.args == error.args
    assert vars(copy) == vars(error)
    for name in CONTEXT:
        assert getattr(copy, name, None) == getattr(error, name, None)


def test_the_tree():
    builtin = {
        "InvalidArgumentError": ValueError,
        "InvalidRolloutError": ValueError,
        "MismatchError": ValueError,
        "FormatError": ValueError,
        "IntegrityError": opd_store.FormatError,
        "UnsupportedVersionError": opd_store.FormatError,
        "CacheNotFoundError": FileNotFoundError,
        "CacheExistsError": FileExistsError,
        "StorageError": OSError,
    }
    assert {kind.__name__ for kind in CLASSES} == {*builtin, "OpdError", "CommitConflictError"}
    for name, base in builtin.items():
        assert issubclass(getattr(opd_store, name), base), name


def test_nothing_there(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        for call in (opd_store.open, opd_store.append, opd_store.verify):
            with pytest.raises(opd_store.CacheNotFoundError, match="no cache here") as caught:
                call(path)
            assert str(path) in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(opd_store.CacheNotFoundError):
        opd_store.open(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_already_there(tmp_path):
    write(tmp_path / "cache", [])
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/notes.txt").write_text("mine")
    for path in (tmp_path / "cache", tmp_path / "dir"):
        before = files(path)
        with pytest.raises(opd_store.CacheExistsError, match=r"already exists.*`append`") as caught:
            opd_store.create(path, meta=example_meta(100))
        assert str(path) in str(caught.value)
        assert files(path) == before


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(opd_store.OpdError, match="file"):
        opd_store.create(tmp_path / "file", meta=example_meta(100))
    with pytest.raises(opd_store.OpdError, match="file"):
        write(tmp_path / "file/cache", some_rollouts(1))
    assert (tmp_path / "file").read_text() == "mine"


META = dataclasses.replace(
    example_meta(100),
    teacher=opd_store.ModelInfo(name="one", revision="r1", dtype="bfloat16"),
    sampler=opd_store.SamplerInfo(temperature=0.5),
    extra={"a": "1"},
)
ONE = META.teacher
CHANGES = {
    "vocab_size": (dataclasses.replace(META, vocab_size=101), "101", "100"),
    "tokenizer_fingerprint": (
        dataclasses.replace(META, tokenizer_fingerprint="sha256:" + "0" * 64),
        "sha256:" + "0" * 64,
        "sha256:" + "5e" * 32,
    ),
    "teacher.name": (dataclasses.replace(META, teacher=dataclasses.replace(ONE, name="two")), "two", "one"),
    "teacher.revision": (
        dataclasses.replace(META, teacher=dataclasses.replace(ONE, revision=None)),
        "unknown",
        "r1",
    ),
    "teacher.engine": (
        dataclasses.replace(META, teacher=dataclasses.replace(ONE, engine="e")),
        "e",
        "unknown",
    ),
    "sampler.temperature": (
        dataclasses.replace(META, sampler=opd_store.SamplerInfo(temperature=0.6)),
        "0.6",
        "0.5",
    ),
    "chat_template_digest": (
        dataclasses.replace(META, chat_template_digest="sha256:" + "1" * 64),
        "sha256:" + "1" * 64,
        "unknown",
    ),
    "extra.a": (dataclasses.replace(META, extra={"a": "2"}), "2", "1"),
    "extra": (dataclasses.replace(META, extra={}), "unknown", "{'a': '1'}"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_cache_of_another_run(tmp_path, field):
    meta, expected, found = CHANGES[field]
    write(tmp_path / "cache", some_rollouts(1), meta=META)
    with pytest.raises(opd_store.MismatchError) as caught:
        opd_store.append(tmp_path / "cache", meta=meta)
    error = caught.value
    assert (error.field, error.expected, error.found) == (field, expected, found)
    for part in (field, expected, found, str(tmp_path / "cache")):
        assert part in str(error)
    opd_store.append(tmp_path / "cache", meta=META).close()


def test_another_creator_with_another_schema(tmp_path):
    """Two writers create the same cache; the slower one finds out when it commits."""
    slow = opd_store.create(tmp_path / "cache", meta=example_meta(100), topk=0)
    write(tmp_path / "cache", some_rollouts(1))
    slow.append_batch(some_rollouts(1, topk=0))
    with pytest.raises(opd_store.MismatchError) as caught:
        slow.commit()
    assert caught.value.field == "schema"
    assert "topk=3" in caught.value.found
    assert "topk=0" in caught.value.expected
    slow.close()
    assert_holds(opd_store.open(tmp_path / "cache"), some_rollouts(1))


def test_another_writer_committed_the_same_rollouts(tmp_path):
    values = some_rollouts(3)
    write(tmp_path / "cache", values[:1])
    slow = opd_store.append(tmp_path / "cache")
    slow.append_batch(values[1:])
    add(tmp_path / "cache", values[2:])
    with pytest.raises(opd_store.CommitConflictError, match="version 2, by another writer"):
        slow.commit()
    slow.close()
    add(tmp_path / "cache", values[1:])
    assert_holds(opd_store.open(tmp_path / "cache"), [values[0], values[2], values[1]])


@pytest.mark.parametrize("n_others", [1, 30])
def test_another_writer_committed_other_rollouts(tmp_path, n_others):
    """Also when the manifest in the way is longer than the own one."""
    values = some_rollouts(n_others + 2)
    write(tmp_path / "cache", values[:1])
    slow = opd_store.append(tmp_path / "cache")
    slow.append(values[1])
    add(tmp_path / "cache", values[2:])
    assert slow.commit().sequence == 3
    slow.close()
    assert_holds(opd_store.open(tmp_path / "cache"), [values[0], *values[2:], values[1]])


def test_a_pin_that_matches_no_version(tmp_path):
    write(tmp_path / "cache", [])
    pin = "sha256:" + "0" * 64
    with pytest.raises(opd_store.CacheNotFoundError, match=f"none of its 1 versions.*{pin}"):
        opd_store.open(f"{tmp_path}/cache@{pin}")


@pytest.mark.parametrize("pin", ["sha256:", "sha256:12", "sha256:" + "G" * 64, "sha256:" + "0" * 65])
def test_a_pin_that_is_none(tmp_path, pin):
    with pytest.raises(opd_store.InvalidArgumentError, match="64 hexadecimal digits"):
        opd_store.open(f"{tmp_path}/cache@{pin}")


@pytest.mark.parametrize("uri", ["ftp://h/c", "simplecache::s3://b/c", "FILE:///c", "c\0d"])
def test_another_protocol(uri):
    for call in (opd_store.open, lambda uri: opd_store.create(uri, meta=example_meta())):
        with pytest.raises(opd_store.InvalidArgumentError, match=r"Expected a local path|null character"):
            call(uri)


def test_a_pinned_version_cannot_be_written_to(tmp_path):
    version = write(tmp_path / "cache", [])
    for call in (opd_store.append, lambda uri: opd_store.create(uri, meta=example_meta())):
        with pytest.raises(opd_store.InvalidArgumentError, match="cannot be written to"):
            call(version.uri)


READ_ONLY = inspect.cleandoc("""
    import os, sys, opd_store
    from opd_store.testing import example_meta
    from store.caches import assert_holds, some_rollouts
    values = some_rollouts(3)
    os.setuid(65534)
    try:
        with opd_store.append(sys.argv[1]) as writer:
            writer.append_batch(values)
    except opd_store.StorageError as error:
        print(error.errno, error.filename, error)
    assert_holds(opd_store.open(sys.argv[1]), values[:2])
""")


def test_a_place_that_cannot_be_written(tmp_path):
    path = tmp_path / "cache"
    write(path, some_rollouts(2))
    directories = [p for p in (path, *path.iterdir(), *path.parents) if p.is_dir()]
    if os.getuid() == 0:
        # pytest's own, which only root may enter; with processes it is one level further up.
        base = next((p for p in tmp_path.parents if p.name.startswith("pytest-of-")), tmp_path.parents[1])
        for directory in directories:
            if directory.is_relative_to(base):
                directory.chmod(0o755)
        printed = run_python(READ_ONLY, path)
    else:
        modes = {directory: directory.stat().st_mode for directory in (path, path / "tmp")}
        for directory in modes:
            directory.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with contextlib.ExitStack() as stack:
            for directory, mode in modes.items():
                stack.callback(directory.chmod, mode)
            printed = run_python(READ_ONLY.replace("os.setuid(65534)", "pass"), path)
    number, filename, message = printed.split(" ", 2)
    assert int(number) in (errno.EACCES, errno.EROFS)
    assert filename.startswith(str(path))
    assert "cannot create" in message
    assert "What was committed before is intact" in message


FULL_DISK = inspect.cleandoc("""
    import json, resource, sys, opd_store
    from store.caches import some_rollouts
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        with opd_store.append(sys.argv[1], batch_bytes=20_000) as writer:
            writer.append_batch(some_rollouts(40, topk=20, response_len=100))
    except opd_store.StorageError as error:
        print(json.dumps([error.errno, error.filename, str(error)]))
""")


@pytest.mark.parametrize("limit", [0, 1, 1000, 1800, 10_000, 100_000, 600_000])
def test_a_full_disk(tmp_path, limit):
    """The limit strikes in the first write, in a later one, when a shard is closed, or in the index."""
    path = tmp_path / "cache"
    values = some_rollouts(40, topk=20, response_len=100)
    write(path, values[:1], topk=20)
    code, filename, message = json.loads(run_python(FULL_DISK, path, limit))
    assert code == errno.EFBIG
    assert filename.startswith(str(path))
    assert filename in message
    assert_holds(opd_store.open(path), values[:1])
    opd_store.append(path).close()
    assert not list((path / "tmp").iterdir())
    add(path, values)
    assert_holds(opd_store.open(path), values)


def test_a_writer_that_failed_refuses_further_use(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    values = some_rollouts(3)
    write(path, values[:1])
    writer = opd_store.append(path, batch_bytes=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        writer.append(values[1])
        with pytest.raises(opd_store.StorageError, match="No space left on device") as caught:
            writer.commit()
    assert caught.value.errno == errno.ENOSPC
    for call in (writer.commit, lambda: writer.append(values[2])):
        with pytest.raises(opd_store.OpdError, match="closed or failed earlier"):
            call()
    writer.close()
    add(path, values)
    assert_holds(opd_store.open(path), values)
