"""Intact parts in the wrong place: shards, record batches and pages of one cache in another."""

from __future__ import annotations

import itertools
import mmap
import shutil

import numpy as np
import pytest
from faults import corpus

import opd_store
from fuzz.structure import pieces_of, seal_cache, with_pages

DAMAGE = (opd_store.IntegrityError, opd_store.FormatError)


@pytest.fixture(scope="module")
def folder():
    with corpus.memory_folder() as path:
        yield path


def pair(folder, variant):
    """Two caches that differ in nothing but their rollouts, with a record batch for each of two rows."""
    places = []
    for seed in (1, 2):
        path = folder / f"{variant.replace('/', '-')}-{seed}"
        if not path.exists():
            corpus.write(path, variant, corpus.rollouts(variant, seed=seed), batch_bytes=1)
        places.append(path)
    return places


def copy(path, folder):
    shutil.rmtree(folder / "damaged", ignore_errors=True)
    shutil.copytree(path, folder / "damaged")
    return folder / "damaged"


def use(path):
    cache = opd_store.open(path)
    for row, rollout in enumerate(cache):
        assert cache.find(cache.row_hash(row)) == row, rollout


@pytest.mark.parametrize("variant", corpus.VARIANTS)
@pytest.mark.parametrize("what", ["shards", "index", "tables", "manifests"])
def test_files_of_another_cache(folder, tmp_path, variant, what):
    ours, theirs = pair(folder, variant)
    if not (ours / what).exists():
        return
    names = [sorted((path / what).iterdir()) for path in (ours, theirs)]
    for left, right in itertools.product(*names):
        if left.read_bytes() == right.read_bytes():
            # Both were given the same id table.
            assert what == "tables"
            continue
        damaged = copy(ours, tmp_path)
        target = damaged / left.relative_to(ours)
        target.unlink()
        target.write_bytes(right.read_bytes())
        with pytest.raises(DAMAGE):
            use(damaged)


@pytest.mark.parametrize("variant", corpus.VARIANTS)
def test_regions(folder, tmp_path, variant):
    """Record batches exchanged within a shard and between shards, in place, as far as they fit."""
    ours, theirs = pair(folder, variant)
    (info,), (other,) = opd_store.open(ours).shards, opd_store.open(theirs).shards
    data = {ours: (ours / info.path).read_bytes(), theirs: (theirs / other.path).read_bytes()}
    n_swaps = 0
    regions = [(ours, region) for region in info.regions] + [(theirs, region) for region in other.regions]
    for target, (owner, source) in itertools.product(info.regions, regions):
        part = data[owner][source.offset : source.offset + source.length]
        size = min(len(part), target.length)
        place = slice(target.offset, target.offset + size)
        if data[ours][place] == part[:size]:
            continue
        damaged = copy(ours, tmp_path)
        with (damaged / info.path).open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            mapped[place] = part[:size]
        with pytest.raises(opd_store.IntegrityError):
            use(damaged)
        n_swaps += 1
    assert n_swaps > 8


@pytest.mark.parametrize("variant", corpus.VARIANTS)
def test_pages_in_place(folder, tmp_path, variant):
    """A page over another one in the mapped file: the region's checksum tells."""
    ours, _ = pair(folder, variant)
    cache = opd_store.open(ours)
    (info,) = cache.shards
    data = (ours / info.path).read_bytes()
    pages = [
        page
        for number in range(2)
        for column in cache.schema.packed_columns()
        for page in cache.shard_reader(0).batch(number).column(column.name).to_pylist()
    ]
    for left, right in itertools.permutations(pages, 2):
        size = min(len(left), len(right))
        if left[:size] == right[:size]:
            continue
        assert data.count(left) == 1
        damaged = copy(ours, tmp_path)
        with (damaged / info.path).open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            at = data.index(left)
            mapped[at : at + size] = right[:size]
        with pytest.raises(opd_store.IntegrityError):
            use(damaged)


@pytest.mark.parametrize("variant", corpus.VARIANTS)
def test_pages_of_another_rollout_in_a_sealed_shard(tmp_path, variant):
    """Somebody who makes new digests can do this; the page's own checksum says whose it was."""
    with corpus.memory_folder() as folder:
        corpus.write(folder / "intact", variant, corpus.rollouts(variant))
        head, _, footer = pieces_of(folder / "intact")
        cache = opd_store.open(folder / "intact")
        batch = cache.shard_reader(0).batch(0)
        for column in cache.schema.packed_columns():
            pages = batch.column(column.name).to_pylist()
            swapped = with_pages(batch, column.name, pages[::-1]).serialize().to_pybytes()
            path = folder / column.name
            seal_cache(path, folder / "intact", pieces=[head, swapped, footer])
            problems = opd_store.verify(path).problems
            found = [problem for problem in problems if "page checksum" in str(problem)]
            assert len(found) == 2, problems
            assert all(column.name in str(problem) for problem in found)


def test_another_id_table_in_a_sealed_cache(tmp_path):
    """Ids would come out as other ids: the table's digest is in the checksum of every page that uses it."""
    variant = "ladder/64, by list, chosen"
    corpus.write(tmp_path / "intact", variant, corpus.rollouts(variant))
    table = corpus.table(2)
    other = opd_store.IdTable(np.roll(table.by_rank, 1), np.roll(table.lists, 1, axis=0))
    seal_cache(tmp_path / "hostile", tmp_path / "intact", table=other.to_bytes())
    problems = opd_store.verify(tmp_path / "hostile").problems
    assert len([problem for problem in problems if "page checksum" in str(problem)]) == 2
