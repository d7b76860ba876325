"""A writer killed at any moment: the version before it stays whole, and a second run completes the work."""

from __future__ import annotations

import errno
import io
import itertools
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from store.caches import assert_holds, files, some_rollouts

import opd_store
from opd_store.testing import example_meta

VALUES = some_rollouts(5)
OPTIONS = {"batch_bytes": 1, "shard_bytes": 6000}
CHUNK = 1500
"""Longest write, so that files are also left half written."""

Hook = Callable[[str, str], None]


def create_and_append(path: Path) -> opd_store.Version:
    """What is run, killed, and run again: continue the cache if there is one, start it otherwise."""
    try:
        writer = opd_store.append(path, **OPTIONS)
    except opd_store.CacheNotFoundError:
        writer = opd_store.create(path, meta=example_meta(100), topk=3, **OPTIONS)
    with writer:
        writer.append_batch(VALUES)
        return writer.commit()


def only_first(path: Path) -> None:
    with opd_store.create(path, meta=example_meta(100), topk=3, **OPTIONS) as writer:
        writer.append_batch(VALUES[:2])


def intercept(hook: Hook, patch: Callable[[object, str, object], None]) -> None:
    """Call `hook(operation, path)` before every operation that changes the disk."""

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def wrapped(target, *args, **kwargs):
            place = os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else os.fspath(target)
            hook(name, f"{place} {os.fspath(args[0])}" if name == "link" else place)
            return original(target, *args, **kwargs)

        patch(os, name, wrapped)

    for name in ("fsync", "link", "unlink", "mkdir", "rename", "replace", "rmdir", "truncate"):
        wrap(name)

    class Raw(io.FileIO):
        def write(self, data) -> int:
            hook("write", str(self.name))
            return super().write(memoryview(data)[:CHUNK])

    original_open = Path.open

    def path_open(self, mode="r", buffering=-1, **options):
        if mode in ("r", "rb"):
            return original_open(self, mode, buffering, **options)
        assert mode == "xb", f"a file opened as {mode}"
        hook("create", str(self))
        return io.BufferedWriter(Raw(self, "x"), buffering)

    patch(Path, "open", path_open)


def run_killed(path: Path, moment: int) -> tuple[bool, bool]:
    """Run in a child that kills itself before its operation number `moment`.

    Returns:
        Whether it was killed, and whether it had been told that its version is committed.
    """
    told, tell = os.pipe()
    with warnings.catch_warnings():
        # The other threads here are idle, and the child starts none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            counter = itertools.count(1)

            def hook(operation: str, place: str) -> None:
                if next(counter) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

            intercept(hook, setattr)
            create_and_append(path)
            os.write(tell, b"!")
            os._exit(0)
        finally:
            os._exit(1)
    os.close(tell)
    acknowledged = os.read(told, 1) == b"!"
    os.close(told)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status), acknowledged


@pytest.mark.parametrize("flow", ["create", "append"])
def test_killed_before_every_operation(tmp_path, flow):
    before = tmp_path / "before"
    if flow == "append":
        only_first(before)
    whole = tmp_path / "whole"
    if flow == "append":
        shutil.copytree(before, whole)
    expected = create_and_append(whole)
    expected_files = files(whole)

    seen = set()
    for moment in itertools.count(1):
        path = tmp_path / f"killed-{moment}"
        if flow == "append":
            shutil.copytree(before, path)
        killed, acknowledged = run_killed(path, moment)
        version = 0
        try:
            cache = opd_store.open(path)
        except opd_store.CacheNotFoundError:
            assert flow == "create"
        else:
            version = cache.version
            assert_holds(cache, VALUES if version == expected.sequence else VALUES[:2])
            assert opd_store.verify(path).problems == []
        if acknowledged:
            assert version == expected.sequence
        seen.add(version)

        assert create_and_append(path).digest == expected.digest
        assert files(path).items() >= expected_files.items()
        assert_holds(opd_store.open(path), VALUES)
        assert not list((path / "tmp").iterdir())
        shutil.rmtree(path)
        if not killed:
            assert acknowledged
            break
    assert moment > 25
    assert seen == {expected.sequence - 1, expected.sequence}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_refused_at_every_operation(tmp_path, code):
    """The same with an error in place of the kill: one class, and the place is named."""
    before = tmp_path / "before"
    only_first(before)
    for moment in itertools.count(1):
        path = tmp_path / f"refused-{moment}"
        shutil.copytree(before, path)
        counter = itertools.count(1)

        def hook(operation: str, place: str, counter=counter, moment=moment) -> None:
            if next(counter) == moment:
                raise OSError(code, os.strerror(code), place)

        with pytest.MonkeyPatch.context() as patch:
            intercept(hook, patch.setattr)
            refused = None
            try:
                create_and_append(path)
            except opd_store.StorageError as error:
                refused = error
            if next(counter) <= moment:
                break
        # Tidying up may fail without harm, and the cache is whole in every case.
        assert refused is None or (refused.errno == code and str(path) in str(refused))
        cache = opd_store.open(path)
        assert_holds(cache, VALUES if cache.version == 2 else VALUES[:2])
        create_and_append(path)
        assert_holds(opd_store.open(path), VALUES)
        assert not list((path / "tmp").iterdir())
        shutil.rmtree(path)
    assert moment > 25


def test_everything_is_durable_before_it_is_named(tmp_path, monkeypatch):
    """A file is flushed after its last write and before its link; its folder before the next commit."""
    log: list[tuple[str, str]] = []
    intercept(lambda operation, place: log.append((operation, place)), monkeypatch.setattr)
    path = tmp_path / "cache"
    create_and_append(path)
    monkeypatch.undo()

    unsynced_files: set[str] = set()
    unsynced_folders: set[str] = set()
    manifests = 0
    for operation, place in log:
        if operation == "write":
            unsynced_files.add(place)
        elif operation == "fsync":
            unsynced_files.discard(place)
            unsynced_folders.discard(place)
        elif operation == "mkdir":
            unsynced_folders.add(str(Path(place).parent))
        elif operation == "link":
            source, target = place.split()
            assert source not in unsynced_files, f"{target} was linked before its bytes were flushed"
            if "/manifests/" in target:
                manifests += 1
                assert not unsynced_folders, f"{target} was linked before {unsynced_folders}"
            unsynced_folders.add(str(Path(target).parent))
        else:
            assert operation in ("create", "unlink"), operation
    assert manifests == 1
    assert not unsynced_folders
    assert {place for operation, place in log if operation == "unlink"} == {
        place for operation, place in log if operation == "create"
    }


def test_a_shard_left_by_a_killed_writer_is_made_durable(tmp_path, monkeypatch):
    """Its link is there already, but nobody knows whether the folder was flushed."""
    whole = tmp_path / "whole"
    create_and_append(whole)
    path = tmp_path / "cache"
    shutil.copytree(whole, path)
    (path / "manifests/00000001.json").unlink()
    log: list[tuple[str, str]] = []
    intercept(lambda operation, place: log.append((operation, place)), monkeypatch.setattr)
    create_and_append(path)
    commit = next(
        i for i, (operation, place) in enumerate(log) if "/manifests/" in place and operation == "link"
    )
    for folder in ("shards", "index"):
        assert ("fsync", str(path / folder)) in log[:commit]


def test_a_commit_whose_acknowledgement_was_lost(tmp_path, monkeypatch):
    """A file system over a network may link, lose the reply, try again and report that the name is taken."""
    link = os.link
    lost = []

    def link_and_lose(source, target):
        link(source, target)
        if "/manifests/" in str(target):
            lost.append(target)
            raise FileExistsError(errno.EEXIST, "File exists", str(target))

    monkeypatch.setattr(os, "link", link_and_lose)
    version = create_and_append(tmp_path / "cache")
    assert len(lost) == version.sequence == 1
    assert_holds(opd_store.open(version.uri), VALUES)
    assert opd_store.verify(tmp_path / "cache").ok


def test_a_foreign_manifest_in_the_way_is_not_taken_for_the_own_one(tmp_path, monkeypatch):
    """The name is taken by other bytes: the writer continues from them, and overwrites nothing."""
    path = tmp_path / "cache"
    only_first(path)
    writer = opd_store.append(path, **OPTIONS)
    writer.append(VALUES[2])
    with opd_store.append(path, **OPTIONS) as other:
        other.append(VALUES[3])
    in_the_way = files(path)
    assert writer.commit().sequence == 3
    writer.close()
    assert files(path).items() >= in_the_way.items()
    assert_holds(opd_store.open(path), [*VALUES[:2], VALUES[3], VALUES[2]])
