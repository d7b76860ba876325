"""Every bit of every file of small caches in all encodings, flipped in turn: none is missed, none ignored.

Flips are done in place through a shared mapping, so that readers meet them on disk, and taken back. Reading
goes through `open`, rows and `find` as always. To stay affordable, the manifest is parsed once while other
files are damaged, and a cache is opened anew for each region of a shard and for each other file that it reads
later: a refusal keeps nothing, so that one opened cache meets every flip as a first read.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults import corpus
from store.caches import assert_same

import opd_store
from opd_store import cache as cache_module

DAMAGE = (opd_store.IntegrityError, opd_store.FormatError)
HASH = b"\x55" * 32
# Index and manifest do not depend on the encoding, but name an id table or not; shards and tables do.
INDEX_OF = ("plain", "ladder/32, by list, ragged, chosen, sampled")
TABLE_OF = ("ladder16, by frequency, sampled", "ladder/64, by list, chosen")
SHARD_OF = tuple(corpus.VARIANTS)
CASES = [
    *((variant, "shards") for variant in SHARD_OF),
    *((variant, "tables") for variant in TABLE_OF),
    *((variant, folder) for variant in INDEX_OF for folder in ("manifests", "index")),
]


@pytest.fixture(scope="module")
def caches():
    """Every variant, written once. Files are named by their content, so none is written twice."""
    with corpus.memory_folder() as folder:
        for variant in corpus.VARIANTS:
            corpus.write(place(folder, variant), variant, corpus.rollouts(variant))
        yield folder


def place(folder: Path, variant: str) -> Path:
    return folder / variant.replace("/", "-").replace(", ", "+")


def use(path: Path) -> list[opd_store.Rollout]:
    """Everything the public API reads of a cache."""
    cache = opd_store.open(path)
    found = list(cache)
    for row, rollout in enumerate(found):
        assert cache.find(cache.row_hash(row)) == row, rollout.sample_id
    return found


def assert_intact(path: Path, variant: str) -> None:
    expected = corpus.rollouts(variant)
    found = use(path)
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.token_ids.tobytes() == right.token_ids.tobytes()
        if corpus.VARIANTS[variant]["encoding"] in ("plain", "f32"):
            assert_same(left, right)


def missed(path: Path, start: int, end: int, call: Callable[[], object]) -> Iterator[str]:
    """Names the bits of bytes [start, end) whose flip `call` survives."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for byte in range(start, end):
            intact = data[byte]
            try:
                for bit in range(8):
                    data[byte] = intact ^ 1 << bit
                    try:
                        call()
                    except DAMAGE:
                        continue
                    yield f"{path.name}: byte {byte} bit {bit}"
            finally:
                data[byte] = intact


@pytest.fixture
def one_manifest(monkeypatch):
    """Parse the manifest once, while `on`: it stays as it is while other files are being damaged."""
    seen = {}
    switch = SimpleNamespace(on=True)

    def load(storage, pin=None, load=cache_module.load_manifest):
        if not switch.on:
            return load(storage, pin)
        key = (storage.uri, pin)
        if key not in seen:
            seen[key] = load(storage, pin)
        return seen[key]

    monkeypatch.setattr(cache_module, "load_manifest", load)
    return switch


@pytest.mark.parametrize("variant", SHARD_OF)
def test_shards(caches, variant, one_manifest):
    path = place(caches, variant)
    (info,) = opd_store.open(path).shards
    shard = path / info.path
    found = []
    row = 0
    for region in info.regions:
        opened = opd_store.open(path)

        def read(opened=opened, row=row):
            return opened.rollout(row)

        found += missed(shard, region.offset, region.offset + region.length, read)
        row += region.rows if row + region.rows < len(opened) else 0
    assert found == []
    assert sum(region.length for region in info.regions) == shard.stat().st_size
    assert_intact(path, variant)


@pytest.mark.parametrize("variant", INDEX_OF)
def test_manifests(caches, variant):
    path = place(caches, variant)
    (manifest,) = (path / "manifests").iterdir()
    assert list(missed(manifest, 0, manifest.stat().st_size, lambda: opd_store.open(path))) == []
    assert_intact(path, variant)


@pytest.mark.parametrize("variant", INDEX_OF)
def test_indexes(caches, variant, one_manifest):
    path = place(caches, variant)
    (segment,) = opd_store.open(path).manifest.segments
    shards = path / segment.shards.path
    assert list(missed(shards, 0, segment.shards.n_bytes, lambda: opd_store.open(path))) == []
    rollouts = path / segment.rollouts.path
    opened = opd_store.open(path)
    assert list(missed(rollouts, 0, segment.rollouts.n_bytes, lambda: opened.find(HASH))) == []
    assert sorted((path / "index").iterdir()) == sorted([shards, rollouts])
    assert_intact(path, variant)


@pytest.mark.parametrize("variant", TABLE_OF)
def test_id_tables(caches, variant, one_manifest):
    path = place(caches, variant)
    (table,) = (path / "tables").iterdir()
    opened = opd_store.open(path)
    assert list(missed(table, 0, table.stat().st_size, lambda: opened.id_table)) == []
    assert_intact(path, variant)


def test_number_of_flips(caches, record_testsuite_property, capsys):
    """What the tests above add up to; all of it is needed to say so."""
    flips = {
        case: sum(8 * file.stat().st_size for file in (place(caches, case[0]) / case[1]).iterdir())
        for case in CASES
    }
    total = sum(flips.values())
    record_testsuite_property("bits flipped", total)
    with capsys.disabled():
        print(f"\n{total:,} bits flipped in {len(flips)} folders of files, every one of them refused")
    assert total >= 300_000


@pytest.mark.parametrize("variant", corpus.VARIANTS)
def test_every_length_but_the_right_one(caches, variant, one_manifest):
    """Cut at every length, and made longer by up to four bytes at either end."""
    folders = [folder for name, folder in CASES if name == variant]
    with corpus.memory_folder() as folder:
        path = folder / "cache"
        shutil.copytree(place(caches, variant), path)
        for file in sorted(file for folder in folders for file in (path / folder).iterdir()):
            data = file.read_bytes()
            one_manifest.on = file.parent.name != "manifests"
            call = reader_of(path, file)
            for extra in range(1, 5):
                for more in (b"\0" * extra, b"\xff" * extra, data[:extra], data[-extra:]):
                    for changed in (data + more, more + data):
                        # A new file each time: a mapping of the old one must not see its end move.
                        replace(file, changed)
                        with pytest.raises(DAMAGE):
                            call()
            replace(file, data)
            for length in range(len(data) - 1, -1, -1):
                os.truncate(file, length)
                with pytest.raises(DAMAGE):
                    call()
            replace(file, data)
        assert_intact(path, variant)


def reader_of(path: Path, file: Path) -> Callable[[], object]:
    """The cheapest use of the public API that reads a file for the first time."""
    if file.parent.name == "manifests":
        return lambda: opd_store.open(path)
    opened = opd_store.open(path)
    if file.parent.name == "tables":
        return lambda: opened.id_table
    if file.parent.name == "shards":
        return lambda: opened.rollout(0, ranks=0, columns=())
    if file.stem == opened.manifest.segments[0].rollouts.sha256.hex():
        return lambda: opened.find(HASH)
    return lambda: opd_store.open(path)


def replace(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)
