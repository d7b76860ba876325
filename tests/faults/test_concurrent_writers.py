"""Several writers of one cache: every commit is in one linear history, exactly once."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

from store.caches import ROOT, assert_same, hash_of, manifest, some_rollouts, write

import opd_store
from opd_store.testing import example_meta

WRITERS, COMMITS = 4, 10
WORKER = inspect.cleandoc("""
    import json, sys, opd_store
    from opd_store.testing import example_meta
    from store.caches import some_rollouts
    path, number, commits, start = sys.argv[1], *map(int, sys.argv[2:5])
    values = some_rollouts(1000)[start + number * commits:][:commits]
    writer = None
    if not start:
        writer = opd_store.create(path, meta=example_meta(100), topk=3)
    print("ready", flush=True)
    sys.stdin.readline()
    done = []
    for i, value in enumerate(values):
        # A writer of its own for every other commit, and one that goes on in between.
        if writer is None or i % 2:
            writer = opd_store.append(path)
        for _ in range(100):
            assert writer.append(value)
            try:
                version = writer.commit()
            except opd_store.CommitConflictError:
                writer = opd_store.append(path)
                continue
            break
        done.append([version.sequence, version.digest, value.sample_id])
    print(json.dumps(done))
""")


def run_together(path: Path, start: int) -> list[tuple[int, str, str]]:
    """(version, digest, sample_id) of every acknowledged commit."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER, str(path), str(i), str(COMMITS), str(start)],
            env=environment,
            **pipes,
        )
        for i in range(WRITERS)
    ]
    try:
        assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * WRITERS
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        outputs = [worker.communicate(timeout=60)[0] for worker in workers]
        assert [worker.returncode for worker in workers] == [0] * WRITERS
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return [tuple(commit) for output in outputs for commit in json.loads(output)]


def check(path: Path, commits: list[tuple[int, str, str]], values: list[opd_store.Rollout]) -> None:
    commits = sorted(commits)
    first = commits[0][0]
    assert [sequence for sequence, _, _ in commits] == list(range(first, first + WRITERS * COMMITS))
    cache = opd_store.open(path)
    assert cache.version == commits[-1][0]
    by_name = {value.sample_id: value for value in values}
    assert sorted(rollout.sample_id for rollout in cache) == sorted(by_name)
    for row, rollout in enumerate(cache):
        assert_same(rollout, by_name[rollout.sample_id])
        assert list(cache.find_all(hash_of(rollout))) == [row]
    # Rows are in commit order, and each acknowledged digest is the one on disk and in the next version.
    assert [rollout.sample_id for rollout in cache][-len(commits) :] == [name for _, _, name in commits]
    for sequence, digest, _ in commits:
        assert opd_store.open(f"{path}@{digest}").version == sequence
        if sequence < cache.version:
            assert manifest(path, sequence + 1)["parent"] == digest
    report = opd_store.verify(path)
    assert report.problems == []
    assert report.versions == cache.version
    opd_store.append(path).close()
    assert not list((path / "tmp").iterdir())


def test_concurrent_appends(tmp_path):
    values = some_rollouts(1000)[: 3 + WRITERS * COMMITS]
    write(tmp_path / "cache", values[:3])
    check(tmp_path / "cache", run_together(tmp_path / "cache", 3), values)


def test_concurrent_creators(tmp_path):
    """All find an empty place; one makes version 1, the others continue it."""
    values = some_rollouts(1000)[: WRITERS * COMMITS]
    check(tmp_path / "cache", run_together(tmp_path / "cache", 0), values)


def test_a_writer_that_is_tidied_away_while_it_starts(tmp_path, monkeypatch):
    """Between the creation of a temporary file and its lock, another writer may take it for a leftover."""
    path = tmp_path / "cache"
    write(path, some_rollouts(1))
    writer = opd_store.append(path, batch_bytes=1)
    flock, robbed = fcntl.flock, []

    def rob(file, operation):
        if operation == fcntl.LOCK_SH and not robbed:
            robbed.append(file.name)
            opd_store.append(path).close()
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", rob)
    assert writer.append(some_rollouts(2)[1])
    assert robbed
    assert not os.path.exists(robbed[0]) or len(list((path / "tmp").iterdir())) == 1
    assert writer.commit().sequence == 2
    writer.close()
    assert opd_store.verify(path).ok
    assert example_meta(100) == opd_store.open(path).meta
