"""`opd gc` removes what nothing refers to and nothing else; `opd log` tells what each version added."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time

import pytest
from opd_tools.rewrite import garbage
from store.caches import ROOT, add, assert_same, files, some_rollouts, write

import opd_store
from opd_store import IntegrityError, layout
from opd_store.storage import LocalStorage

VALUES = some_rollouts(9)


@pytest.fixture
def path(tmp_path):
    """Three versions, the index of the first two merged away."""
    for number in range(3):
        (write if not number else add)(tmp_path / "cache", VALUES[3 * number : 3 * number + 3])
    return tmp_path / "cache"


def leave(path, *, hours=48.0):
    """What killed writers left: an id table, a shard, index files, a temporary file; and somebody's files."""
    names = {f"shards/{'0' * 64}.arrow", f"index/{'1' * 64}.arrow", f"tables/{'2' * 64}.ids", "tmp/00"}
    foreign = {"README.md", "shards/notes.txt", "index/backup", "preview/0.parquet", "manifests/x.json"}
    for name in names | foreign:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"left")
        then = time.time() - hours * 3600
        os.utime(path / name, (then, then))
    return names


def told(done):
    return json.loads(done.ok().out)


def test_only_what_nothing_refers_to_goes(opd, path):
    whole = files(path)
    names = leave(path)
    before = files(path)
    shown = told(opd("gc", path, "--json"))
    assert {item["name"] for item in shown["files"]} == names
    assert (shown["bytes"], shown["deleted"]) == (16, False)
    assert files(path) == before
    assert "4 files, 16 bytes to be removed with --delete" in opd("gc", path).ok().out
    shown = told(opd("gc", path, "--delete", "--json"))
    assert {item["name"] for item in shown["files"]} == names
    assert set(before) - set(files(path)) == {name for name in names if not name.startswith("tmp/")}
    assert not (path / "tmp/00").exists()
    assert {name: data for name, data in files(path).items() if name in whole} == whole
    assert "0 files, 0 bytes removed" in opd("gc", path, "--delete").ok().out
    report = opd_store.verify(path)
    assert (report.versions, report.problems) == (3, [])
    first = opd_store.open(f"{path}@{opd_store.open(f'{path}@{opd_store.open(path).parent}').parent}")
    assert_same(first[0], VALUES[0])


def test_young_files_stay(opd, path):
    leave(path, hours=1)
    shown = told(opd("gc", path, "--delete", "--json"))
    # The lock of a dead writer's temporary file is gone, however young it is.
    assert [item["name"] for item in shown["files"]] == ["tmp/00"]
    assert len(shown["too_young"]) == 3
    assert len(told(opd("gc", path, "--delete", "--min-age", 0.5, "--json"))["files"]) == 3


def test_a_live_writer_is_not_disturbed(opd, path):
    writer = opd_store.append(path, batch_bytes=1)
    writer.append(some_rollouts(1, seed=4)[0])
    names = leave(path)
    opd("gc", path, "--delete", "--min-age", 0).refused(1, "a writer is at work")
    assert all((path / name).exists() for name in names)
    shown = told(opd("gc", path, "--min-age", 0, "--json"))
    assert len(shown["writers"]) == 1
    writer.commit()
    opd("gc", path, "--delete", "--min-age", 0).ok()
    assert opd_store.verify(path).problems == []


def test_a_shard_that_is_written_again_is_young(path):
    shard = path / opd_store.open(path).shards[0].path
    os.utime(shard, (1000, 1000))
    with LocalStorage(path).create_temp() as temp:
        temp.write(b"the same")
        assert not temp.publish(f"shards/{shard.name}")
    assert time.time() - shard.stat().st_mtime < 60


def test_what_is_committed_meanwhile_stays(path, tmp_path):
    """A writer that commits between the look and the removal keeps its files."""
    shutil.copytree(path, tmp_path / "other")
    add(tmp_path / "other", some_rollouts(2, seed=4))
    new = set(files(tmp_path / "other")) - set(files(path))
    for name in new:
        if not name.startswith("manifests/"):
            shutil.copy(tmp_path / "other" / name, path / name)
    storage = LocalStorage(path)
    kept = garbage.referenced(storage, list(garbage.read_manifests(storage).values()))
    found = garbage.find(storage, kept, min_age_s=0)
    assert {item.name for item in found.garbage} == {n for n in new if not n.startswith("manifests/")}
    removal = garbage.remove(storage, found.garbage, min_age_s=0)
    shutil.copy(tmp_path / "other/manifests/00000004.json", path / "manifests")
    assert list(removal) == []
    assert opd_store.verify(path).problems == []


def test_old_versions_go_when_that_is_asked(opd, path):
    cache = opd_store.open(path)
    before = files(path)
    shown = told(opd("gc", path, "--keep-versions", 1, "--min-age", 0, "--json"))
    assert shown["versions"] == [1, 2]
    assert files(path) == before
    shown = told(opd("gc", path, "--keep-versions", 1, "--min-age", 0, "--delete", "--json"))
    assert shown["files"]
    after = files(path)
    assert sorted(name for name in after if name.startswith("manifests/")) == [
        "manifests/00000002.removed",
        "manifests/00000003.json",
    ]
    assert after["manifests/00000002.removed"] == f"{cache.parent}\n".encode()
    report = opd_store.verify(path)
    assert (report.versions, report.problems, report.rollouts) == (1, [], 9)
    assert reference_reader().read_cache(path)["version"] == 3
    with pytest.raises(opd_store.CacheNotFoundError):
        opd_store.open(f"{path}@{cache.parent}")
    add(path, some_rollouts(1, seed=4))
    opd("gc", path, "--keep-versions", 1, "--delete").ok()
    assert [p.name for p in sorted((path / "manifests").iterdir())] == ["00000003.removed", "00000004.json"]
    assert opd_store.verify(path).problems == []
    assert told(opd("log", path, "--json"))[0]["added"] is None
    assert "not known" in opd("log", path).ok().out


def reference_reader():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "spec/reference_reader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("word", ["sha256:" + "0" * 64 + "\n", "", "CACHE"])
def test_only_the_right_word_excuses_a_missing_version(word, path):
    parent = opd_store.open(path).parent
    (path / "manifests/00000002.json").unlink()
    (path / "manifests/00000002.removed").write_text(parent if word == "CACHE" else word)
    (problem,) = opd_store.verify(path).problems
    assert isinstance(problem, IntegrityError)
    with pytest.raises(Exception, match="version 2"):
        reference_reader().read_cache(path)


@pytest.mark.parametrize("calls", range(4))
def test_killed_while_versions_go(calls, path, monkeypatch):
    """Whatever is left, the newest version and its history are whole, and the same call ends it."""
    storage = LocalStorage(path)
    remove, seen = garbage._remove, []

    def dying(target):
        if len(seen) == calls:
            raise KeyboardInterrupt
        seen.append(target)
        remove(target)

    monkeypatch.setattr(garbage, "_remove", dying)
    try:
        garbage.remove_versions(storage, garbage.read_manifests(storage), [1, 2])
    except KeyboardInterrupt:
        assert calls < 2
    monkeypatch.undo()
    report = opd_store.verify(path)
    assert report.problems == []
    dropped = [number for number in storage.versions() if number < 3]
    if dropped:
        garbage.remove_versions(storage, garbage.read_manifests(storage), dropped)
    assert storage.versions() == [3]
    assert opd_store.verify(path).problems == []


def test_of_two_removals_the_newer_one_is_remembered(path):
    """The first one was cut off after version 2, so that version 1 goes later."""
    storage = LocalStorage(path)
    garbage.remove_versions(storage, garbage.read_manifests(storage), [1, 2])
    data = files(path)
    shutil.rmtree(path)
    for number in range(3):
        (write if not number else add)(path, VALUES[3 * number : 3 * number + 3])
    (path / "manifests/00000002.json").unlink()
    (path / "manifests/00000002.removed").write_bytes(data["manifests/00000002.removed"])
    assert opd_store.verify(path).problems == []
    garbage.remove_versions(storage, garbage.read_manifests(storage), [1])
    assert [p.name for p in sorted((path / "manifests").iterdir())] == ["00000002.removed", "00000003.json"]
    assert opd_store.verify(path).problems == []


REFUSED = {
    "a url": ("memory://x", 2, "local"),
    "no cache": ("nothing", 2, "no cache here"),
    "a pin": (f"cache@sha256:{'0' * 64}", 2, "pinned"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, opd, path):
    uri, code, message = REFUSED[name]
    uri = uri if "://" in uri else path.with_name(uri)
    opd("gc", uri, "--delete").refused(code, message)


@pytest.mark.parametrize("name", ["manifests/00000001.json", "INDEX"])
def test_nothing_goes_while_something_is_damaged(name, opd, path):
    if name == "INDEX":
        name = opd_store.open(path).manifest.segments[0].shards.path
    (path / name).chmod(0o644)
    (path / name).write_bytes(b"damaged")
    names = leave(path)
    opd("gc", path, "--delete").refused(1, name)
    assert all((path / name).exists() for name in names)


def test_log(opd, path):
    found = told(opd("log", path, "--json"))
    cache = opd_store.open(path)
    assert [version["version"] for version in found] == [3, 2, 1]
    assert found[0]["digest"] == cache.digest
    assert [version["parent"] for version in found] == [found[1]["digest"], found[2]["digest"], None]
    assert [version["added"]["rollouts"] for version in found] == [3, 3, 3]
    assert [version["rollouts"] for version in found] == [9, 6, 3]
    assert sum(version["added"]["tokens"] for version in found) == cache.n_tokens
    assert sum(version["added"]["response_tokens"] for version in found) == cache.n_response_tokens
    lines = opd("log", path).ok().out.splitlines()
    assert [line.split()[1] for line in lines] == [version["digest"] for version in found]
    assert "+3 rollouts" in lines[0]
    assert told(opd("log", path, "--limit", 2, "--json")) == found[:2]
    assert told(opd("log", f"{path}@{found[1]['digest']}", "--json")) == found[1:]
    opd("log", f"{path}@sha256:{'0' * 64}").refused(2, "pinned digest")
    opd("log", path.with_name("nothing")).refused(2, "no cache here")
    assert layout.removed_path(7) == "manifests/00000007.removed"
