"""Damaged files: whatever changed, was cut or was lost, no reader returns a row of it.

Every bit of every file is tried. A flip is done in place, through a shared mapping of the file, so that
readers meet it the way they meet bit rot: on disk.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store.caches import add, assert_holds, files, hash_of, manifest, some_rollouts, write

import opd_store

VALUES = some_rollouts(4, topk=3, prompt_len=1, response_len=2)
DAMAGE = (opd_store.IntegrityError, opd_store.FormatError, opd_store.CacheNotFoundError)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Two shards, two bands; version 1 holds two rollouts, version 2, in the same segment, four."""
    path = tmp_path_factory.mktemp("damage") / "cache"
    write(path, VALUES[:2], topk=3, bands=(2, 3))
    add(path, VALUES[2:])
    (segment,) = manifest(path, 2)["segments"]
    assert segment["n_shards"] == 2
    return path


@pytest.fixture
def cache(intact, tmp_path):
    """A copy to damage."""
    shutil.copytree(intact, tmp_path / "cache")
    return tmp_path / "cache"


def newest(path: Path) -> dict[str, Path]:
    """The files of the newest version."""
    (segment,) = manifest(path, 2)["segments"]
    shards = sorted((path / "shards").iterdir())
    return {
        "manifest": path / "manifests/00000002.json",
        "shard table": path / f"index/{segment['shards']['sha256']}.arrow",
        "rollout table": path / f"index/{segment['rollouts']['sha256']}.arrow",
        "shard A": shards[0],
        "shard B": shards[1],
    }


def shard_row(path: Path, shard: Path) -> int:
    """First of the two rows of a shard, told by a sample_id in it."""
    return 0 if b"r0" in shard.read_bytes() else 2


def use(path: Path) -> None:
    """Read everything, and look everything up."""
    cache = opd_store.open(path)
    assert_holds(cache, VALUES)


def flips(path: Path) -> Iterator[int]:
    """Flip each bit of a file in turn, yield its number, flip it back."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for bit in range(8 * len(data)):
            data[bit // 8] ^= 1 << bit % 8
            yield bit
            data[bit // 8] ^= 1 << bit % 8


def undetected(path: Path, call: Callable[[int], object]) -> list[int]:
    """Bits whose flip `call` survives."""
    missed = []
    for bit in flips(path):
        try:
            call(bit)
        except DAMAGE:
            continue
        missed.append(bit)
    return missed


@pytest.mark.parametrize("name", ["manifest", "shard table"])
def test_every_bit_that_opening_reads(cache, name):
    assert undetected(newest(cache)[name], lambda bit: opd_store.open(cache)) == []
    use(cache)


def test_every_bit_of_the_rollout_table(cache):
    # Checked at its first use; a failed check is no use, so one cache can be asked again and again.
    opened = opd_store.open(cache)
    name = hash_of(VALUES[0])
    assert undetected(newest(cache)["rollout table"], lambda bit: opened.find(name)) == []
    assert opened.find(name) == 0


@pytest.mark.parametrize("name", ["shard A", "shard B"])
def test_every_bit_of_a_shard(cache, name):
    shard = newest(cache)[name]
    first = shard_row(cache, shard)
    opened: list[opd_store.Cache] = []

    def read(bit: int) -> None:
        # As above, but what was found intact is not read again: regions are whole 8-byte words.
        if bit % 64 == 0:
            opened[:] = [opd_store.open(cache)]
        for row in (first, first + 1):
            with pytest.raises(DAMAGE):
                opened[0].rollout(row)
        raise opd_store.IntegrityError("both rows are refused")

    assert undetected(shard, read) == []
    use(cache)


@pytest.mark.parametrize("name", ["shard A", "shard B"])
def test_the_other_shard_remains_readable(cache, name):
    shard = newest(cache)[name]
    for bit in flips(shard):
        if bit % 997 == 0:
            opened = opd_store.open(cache)
            survivors, messages = [], []
            for row in range(4):
                try:
                    survivors.append(opened[row].sample_id)
                except DAMAGE as error:
                    messages.append(str(error))
            assert survivors in (["r0", "r1"], ["r2", "r3"])
            assert all(str(shard) in message for message in messages)


@pytest.mark.parametrize("name", ["manifest", "shard table", "rollout table", "shard A", "shard B"])
def test_verify_reports_any_damage(cache, name):
    path = newest(cache)[name]
    for bit in flips(path):
        if bit % 101 == 0:
            try:
                report = opd_store.verify(cache)
            except DAMAGE:
                continue
            assert report.problems, bit
            assert all(isinstance(problem, DAMAGE) for problem in report.problems)
    assert opd_store.verify(cache).ok


def test_damage_of_an_older_manifest_is_reported_by_verify(cache):
    """The newest version does not depend on the bytes of the one before it, only on its digest."""
    for bit in flips(cache / "manifests/00000001.json"):
        if bit % 37 == 0:
            (problem,) = opd_store.verify(cache).problems
            assert isinstance(problem, opd_store.IntegrityError)
    use(cache)


@pytest.mark.parametrize("name", ["manifest", "shard table", "rollout table", "shard A", "shard B"])
def test_every_length_but_the_right_one(cache, name):
    path = newest(cache)[name]
    data = path.read_bytes()
    first = shard_row(cache, path)
    opened = opd_store.open(cache)
    # Once a file was refused, nothing of it is kept, so one open cache meets every length.
    call = {
        "manifest": lambda: opd_store.open(cache),
        "shard table": lambda: opd_store.open(cache),
        "rollout table": lambda: opened.find(hash_of(VALUES[0])),
        "shard A": lambda: opened[first],
        "shard B": lambda: opened[first],
    }[name]
    for length in range(len(data)):
        os.truncate(path, length)
        with pytest.raises(DAMAGE):
            call()
    for extra in (b"\0", b"\n", b" ", data[:1], b"\0\0", b"ARROW1", b"}\n\n", b"\0" * 4):
        path.write_bytes(data + extra)
        with pytest.raises(DAMAGE):
            use(cache)
        path.write_bytes(extra + data)
        with pytest.raises(DAMAGE):
            use(cache)
    path.write_bytes(data)
    use(cache)


@pytest.mark.parametrize("name", ["shard table", "rollout table", "shard A", "shard B"])
def test_a_missing_file(cache, name):
    path = newest(cache)[name]
    path.unlink()
    with pytest.raises(opd_store.IntegrityError, match="missing, although the manifest names it") as caught:
        use(cache)
    assert str(path) in str(caught.value)
    assert caught.value.uri == str(path)


def test_a_missing_manifest_goes_back_one_version(cache):
    """Without a pin nobody can know that there was a newer version; with one, it is missed."""
    digest = opd_store.open(cache).digest
    newest(cache)["manifest"].unlink()
    assert_holds(opd_store.open(cache), VALUES[:2])
    with pytest.raises(opd_store.CacheNotFoundError, match="none of its 1 versions"):
        opd_store.open(f"{cache}@{digest}")


@pytest.mark.parametrize("what", ["directory", "link to itself"])
@pytest.mark.parametrize("name", ["manifest", "shard table", "rollout table", "shard A"])
def test_something_else_in_its_place(cache, name, what):
    path = newest(cache)[name]
    path.unlink()
    if what == "directory":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.raises(opd_store.OpdError) as caught:
        use(cache)
    assert str(path) in str(caught.value)


def swap(left: Path, right: Path) -> None:
    data = left.read_bytes()
    left.write_bytes(right.read_bytes())
    right.write_bytes(data)


@pytest.mark.parametrize(
    ("left", "right"),
    [("shard A", "shard B"), ("shard table", "rollout table"), ("shard A", "rollout table")],
)
def test_swapped_files(cache, left, right):
    paths = newest(cache)
    swap(paths[left], paths[right])
    with pytest.raises(opd_store.IntegrityError):
        use(cache)


def test_a_renamed_manifest(cache):
    old = (cache / "manifests/00000001.json").read_bytes()
    (cache / "manifests/00000003.json").write_bytes(old)
    with pytest.raises(opd_store.IntegrityError, match=r"00000003\.json: holds version 1; it was renamed"):
        opd_store.open(cache)


def test_two_caches_mixed(cache, tmp_path):
    """Index files and shards of one cache under the manifest of another with equal counts."""
    other = tmp_path / "other"
    write(other, some_rollouts(2, seed=1, prompt_len=1, response_len=2), topk=3, bands=(2, 3))
    add(other, some_rollouts(2, seed=2, prompt_len=1, response_len=2))
    ours, theirs = newest(cache), newest(other)
    for name in ("shard table", "rollout table", "shard A"):
        data = ours[name].read_bytes()
        ours[name].write_bytes(theirs[name].read_bytes())
        with pytest.raises(opd_store.IntegrityError):
            use(cache)
        ours[name].write_bytes(data)
    shutil.copy(theirs["manifest"], ours["manifest"])
    with pytest.raises(opd_store.IntegrityError, match="missing"):
        use(cache)


def test_a_history_of_two_caches_is_reported_by_verify(cache, tmp_path):
    other = tmp_path / "other"
    write(other, some_rollouts(2, seed=1), topk=3, bands=(2, 3))
    shutil.copy(other / "manifests/00000001.json", cache / "manifests/00000001.json")
    (problem,) = opd_store.verify(cache).problems
    assert "but the next version names" in str(problem)
    (cache / "manifests/00000001.json").unlink()
    (problem,) = opd_store.verify(cache).problems
    assert isinstance(problem, opd_store.IntegrityError)
    assert "missing, although a later version names it" in str(problem)


def test_a_file_that_is_not_listed_is_ignored(cache):
    for name in ("shards", "index", "manifests"):
        (cache / name / "00000009.json.part").write_bytes(b"?")
        (cache / name / ("0" * 64 + ".arrow")).write_bytes(b"?")
    use(cache)
    assert opd_store.verify(cache).ok


def test_a_writer_does_not_build_on_damage(cache):
    """It reads what it appends to, and a damaged table stops it before it writes."""
    before = files(cache)
    path = newest(cache)["rollout table"]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(opd_store.IntegrityError):
        add(cache, some_rollouts(1, seed=5))
    path.write_bytes(before[str(path.relative_to(cache))])
    assert files(cache) == before
