"""Where commands put new caches: whole or not at all, once, and going on after whatever happened."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import shutil
import subprocess
import sys

import fsspec
import pytest
from opd_tools import destination
from opd_tools.destination import REQUEST, build, build_from, partial_path, request
from opd_tools.share import transfer
from store.caches import VOCAB, assert_holds, files, some_rollouts
from tools.commands import ENVIRONMENT

import opd_store
from opd_store import (
    CacheExistsError,
    CacheMeta,
    FormatError,
    IntegrityError,
    InvalidArgumentError,
    InvalidRolloutError,
    StorageError,
)
from opd_store.testing import FINGERPRINT

VALUES = some_rollouts(12)


def meta(key="one", **extra):
    return CacheMeta(vocab_size=VOCAB, tokenizer_fingerprint=FINGERPRINT, extra={REQUEST: key, **extra})


def make(uri, rollouts=VALUES, *, key="one", **options):
    options = {"topk": 3, "commit_every": 4, "access": {}} | options
    return build(str(uri), lambda: iter(rollouts), meta=meta(key), **options)


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


class Stop(Exception):
    """What a kill is to the code, but that `finally` still runs."""


def test_made_once_and_found_again(tmp_path):
    version, existed = make(tmp_path / "out")
    assert (version.sequence, version.uri, existed) == (1, f"{tmp_path / 'out'}@{version.digest}", False)
    assert_holds(opd_store.open(version.uri), VALUES)
    assert opd_store.verify(version.uri).problems == []
    before = files(tmp_path / "out")
    assert make(tmp_path / "out", iter(())) == (version, True)
    assert files(tmp_path / "out") == before
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("uri", ["out", "out/", "./out", "file://{}/out", "{}/x/../out"])
def test_spellings_of_one_place(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = uri.format(tmp_path)
    version, existed = make(uri)
    assert not existed
    assert version.uri == f"{uri}@{version.digest}"
    assert make(tmp_path / "out")[1]
    assert left(tmp_path) == ["out"]


def test_the_working_directory_can_be_one(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make(".")
    assert len(opd_store.open(tmp_path / "here")) == 12


@pytest.mark.parametrize("commit_every", [4, 100, None])
def test_going_on_ends_in_the_same_bytes(commit_every, tmp_path, monkeypatch):
    for name in ("create", "append"):
        monkeypatch.setattr(opd_store, name, functools.partial(getattr(opd_store, name), batch_bytes=500))

    def cut_off(end):
        yield from VALUES[:end]
        raise Stop

    options = {"commit_every": commit_every, "shard_bytes": 3000}
    make(tmp_path / "expected", **options)
    for end in (1, 5, 8, 11):
        with pytest.raises(Stop):
            make(tmp_path / "out", cut_off(end), **options)
        assert not (tmp_path / "out").exists()
        assert left(tmp_path) == ["expected", "out.partial"]
    assert not make(tmp_path / "out", **options)[1]
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert left(tmp_path) == ["expected", "out"]


def test_what_knows_how_far_it_was_starts_there(tmp_path):
    seen = []

    def additions(there):
        seen.append(there)
        for rollout in VALUES[there:]:
            if len(seen) == 1 and rollout is VALUES[9]:
                raise Stop
            yield lambda writer, rollout=rollout: writer.append(rollout)

    options = {"meta": meta(), "access": {}, "topk": 3, "commit_every": 4}
    with pytest.raises(Stop):
        build_from(str(tmp_path / "out"), additions, **options)
    counts = []
    build_from(str(tmp_path / "out"), additions, on_progress=counts.append, **options)
    assert seen == [0, 8]
    assert counts == [1, 2, 3, 4]
    assert_holds(opd_store.open(tmp_path / "out"), VALUES)


MOMENTS = ["snapshot", "rename", "after rename", "rmtree"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_gets_its_place(moment, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise Stop

    make(tmp_path / "expected")
    with monkeypatch.context() as patched:
        if moment == "snapshot":
            patched.setattr(destination, "snapshot", stop)
        elif moment == "rename":
            patched.setattr("pathlib.Path.rename", stop)
        elif moment == "after rename":
            patched.setattr(destination, "_sync", stop)
        else:
            rmtree = shutil.rmtree

            def half(path, **_):
                if path.name == "out.partial":
                    rmtree(path / "manifests")
                    raise Stop

            patched.setattr(shutil, "rmtree", half)
        with pytest.raises(Stop):
            make(tmp_path / "out", final_meta=lambda: meta(lost="much"))
    done = (tmp_path / "out").exists()
    assert done == (moment in ("after rename", "rmtree"))
    assert make(tmp_path / "out", final_meta=lambda: meta(lost="much"))[1] == done
    assert left(tmp_path) == ["expected", "out"]
    assert opd_store.open(tmp_path / "out").meta.extra["lost"] == "much"
    assert opd_store.verify(tmp_path / "out").problems == []


TAKEN = {
    "another request": lambda path: make(path, key="two"),
    "somebody's cache": lambda path: opd_store.create(path, meta=meta()).commit(),
    "a directory": lambda path: (path / "x").mkdir(parents=True),
    "a file": lambda path: path.touch(),
    "a request under way": lambda path: begun(path, "two"),
}


def begun(path, key):
    def cut_off():
        yield from VALUES[:5]
        raise Stop

    with pytest.raises(Stop):
        make(path, cut_off(), key=key)


@pytest.mark.parametrize("name", [name for name in TAKEN if name != "somebody's cache"])
def test_a_taken_place_is_refused_and_left_alone(name, tmp_path):
    TAKEN[name](tmp_path / "out")
    before = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CacheExistsError, match="out"):
        make(tmp_path / "out")
    assert {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_empty_directory_is_not_taken(tmp_path):
    (tmp_path / "out").mkdir()
    assert not make(tmp_path / "out")[1]


def test_a_pinned_address_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="pinned"):
        make(f"{tmp_path}/out@sha256:{'0' * 64}")
    assert left(tmp_path) == []


FAULTS = {
    "format": (FormatError("row 3 of x"), False),
    "rollout": (InvalidRolloutError("x"), False),
    "argument": (InvalidArgumentError("x"), False),
    "damage": (IntegrityError("shard x"), True),
    "disk": (StorageError("full", errno=errno.ENOSPC), True),
}


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_half_written_stays_unless_going_on_helps(name, tmp_path):
    error, kept = FAULTS[name]

    def failing():
        yield from VALUES[:6]
        raise error

    with pytest.raises(type(error)):
        make(tmp_path / "out", failing())
    assert left(tmp_path) == (["out.partial"] if kept else [])
    make(tmp_path / "out")
    assert left(tmp_path) == ["out"]


def test_an_impossible_schema_leaves_nothing(tmp_path):
    with pytest.raises(InvalidArgumentError):
        make(tmp_path / "out", bands=(2, 1))
    assert left(tmp_path) == []


@pytest.mark.parametrize("n_bytes", [0, 200, 3000])
def test_a_full_disk_at_every_file(n_bytes, tmp_path):
    code = f"""
import resource, sys
sys.path.insert(0, "tests")
from tools import test_destination as t
resource.setrlimit(resource.RLIMIT_FSIZE, ({n_bytes}, {n_bytes}))
try:
    t.make(sys.argv[1])
except t.StorageError as error:
    print(error.errno)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        env={**os.environ, **ENVIRONMENT},
        cwd=ENVIRONMENT["PYTHONPATH"].split(os.pathsep)[0],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == f"{errno.EFBIG}\n", done.stderr
    assert not (tmp_path / "out").exists()
    make(tmp_path / "out")
    assert left(tmp_path) == ["out"]


def test_no_locks_on_this_file_system(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(StorageError, match=r"out\.partial\.lock: cannot lock: No locks available"):
        make(tmp_path / "out")
    monkeypatch.undo()
    make(tmp_path / "out")
    assert left(tmp_path) == ["out"]


def test_somebody_elses_directory_beside_it_is_not_touched(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis").touch()
    with pytest.raises(CacheExistsError):
        make(tmp_path / "out")
    (tmp_path / "out.partial").rename(tmp_path / "other")
    make(tmp_path / "out")
    (tmp_path / "other").rename(tmp_path / "out.partial")
    (tmp_path / "out.partial.lock").touch()
    assert make(tmp_path / "out")[1]
    assert left(tmp_path) == ["out", "out.partial"]
    assert (tmp_path / "out.partial/thesis").exists()


def test_a_directory_that_cannot_be_removed_costs_room_alone(tmp_path, monkeypatch):
    """As on NFS, where a file that is mapped stays under another name."""
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy")))
        version, existed = make(tmp_path / "out")
    assert not existed
    assert_holds(opd_store.open(version.uri), VALUES)
    assert make(tmp_path / "out") == (version, True)
    assert left(tmp_path) == ["out"]


def test_two_at_once(tmp_path):
    def nested():
        yield from VALUES[:6]
        with pytest.raises(CacheExistsError, match="another command is at work"):
            make(tmp_path / "out")
        yield from VALUES[6:]

    make(tmp_path / "out", nested())
    assert_holds(opd_store.open(tmp_path / "out"), VALUES)
    assert left(tmp_path) == ["out"]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    yield f"memory://{tmp_path.name}/out"
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_a_url(bucket, tmp_path):
    version, existed = make(bucket)
    assert (version.uri, existed) == (f"{bucket}@{version.digest}", False)
    assert_holds(opd_store.open(version.uri), VALUES)
    assert opd_store.verify(version.uri).problems == []
    assert make(bucket) == (version, True)
    assert list((tmp_path / "home/opd/building").iterdir()) == []
    with pytest.raises(CacheExistsError):
        make(bucket, key="two")


def test_an_upload_that_breaks_off_goes_on(bucket, tmp_path, monkeypatch):
    put, calls = transfer.upload, itertools.count()

    def breaking(*args, **kwargs):
        if next(calls) == 0:
            raise StorageError("unreachable")
        return put(*args, **kwargs)

    monkeypatch.setattr(transfer, "upload", breaking)
    with pytest.raises(StorageError):
        make(bucket)
    assert len(opd_store.open(partial_path(bucket))) == 12
    assert not make(bucket, iter(VALUES))[1]
    assert_holds(opd_store.open(bucket), VALUES)
    assert list((tmp_path / "home/opd/building").iterdir()) == []


def test_requests_differ_in_every_part():
    parts = [("a", "b"), ("a", "b", ""), ("ab",), ("b", "a"), ("a", 1), ("a", 1.0), ("a", None)]
    assert len({request(*some) for some in parts}) == len(parts)
