"""One version of a cache as a cache of its own: the same files, another history."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest
from store.caches import VOCAB, add, assert_holds, files, some_rollouts, write

import opd_store
from opd_store import CacheExistsError, IntegrityError, InvalidArgumentError, MismatchError, StorageError
from opd_store.testing import example_meta


@pytest.fixture
def values():
    return some_rollouts(9)


@pytest.fixture
def source(tmp_path, values):
    write(tmp_path / "source", values[:4], encoding="ladder/64", id_table="auto")
    add(tmp_path / "source", values[4:6])
    add(tmp_path / "source", values[6:])
    return opd_store.open(tmp_path / "source")


def no_links(*_, **__):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("links", [True, False])
def test_it_holds_what_the_version_holds_and_nothing_else(links, source, values, tmp_path, monkeypatch):
    if not links:
        link = os.link
        # Only from one cache to another: within one, links are what commits.
        monkeypatch.setattr(os, "link", lambda a, b: no_links() if str(source.uri) in str(a) else link(a, b))
    version = opd_store.snapshot(source, tmp_path / "new")
    monkeypatch.undo()
    found = opd_store.open(version.uri)
    assert (found.version, found.parent, found.digest) == (1, None, version.digest)
    assert (found.meta, found.schema, found.n_bytes) == (source.meta, source.schema, source.n_bytes)
    assert found.max_error == source.max_error > 0
    expected = [source[row] for row in range(len(source))]
    assert_holds(found, expected)
    assert opd_store.verify(version.uri).problems == []
    old, new = files(tmp_path / "source"), files(tmp_path / "new")
    # The files of versions before are not among them.
    assert set(new) < set(old)
    name = next(name for name in new if name.startswith("shards/"))
    assert os.path.samefile(tmp_path / "source" / name, tmp_path / "new" / name) == links
    add(tmp_path / "new", some_rollouts(1, seed=5))
    assert len(opd_store.open(tmp_path / "source")) == 9


def test_the_newest_version_and_a_pinned_one_differ(source, tmp_path):
    first = opd_store.open(f"{source.uri}@{opd_store.open(f'{source.uri}@{source.parent}').parent}")
    digests = {opd_store.snapshot(c, tmp_path / n).digest for n, c in {"a": source, "b": first}.items()}
    assert len(digests) == 2
    assert len(opd_store.open(tmp_path / "b")) == 4


def test_other_provenance(source, tmp_path):
    meta = dataclasses.replace(source.meta, licence="CC0", extra={"a": "b"})
    opd_store.snapshot(source, tmp_path / "new", meta=meta)
    assert opd_store.open(tmp_path / "new").meta == meta
    again = opd_store.snapshot(source, tmp_path / "again", meta=meta)
    assert again.digest == opd_store.open(tmp_path / "new").digest


REFUSED = {
    "vocabulary": dataclasses.replace(example_meta(VOCAB), vocab_size=VOCAB + 1),
    "tokenizer": dataclasses.replace(example_meta(VOCAB), tokenizer_fingerprint="sha256:" + "0" * 64),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_identity_is_refused(name, source, tmp_path):
    with pytest.raises(MismatchError):
        opd_store.snapshot(source, tmp_path / "new", meta=REFUSED[name])
    assert not (tmp_path / "new").exists()


def test_a_taken_place_and_an_unreadable_meta_are_refused(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for place in ("full", "source"):
        with pytest.raises(CacheExistsError):
            opd_store.snapshot(source, tmp_path / place)
    with pytest.raises(InvalidArgumentError, match="no reader would accept it"):
        opd_store.snapshot(
            source, tmp_path / "new", meta=dataclasses.replace(source.meta, licence="x" * 5000)
        )
    with pytest.raises(InvalidArgumentError, match="local directory"):
        opd_store.snapshot(source, "memory://new")


def test_a_missing_shard_is_named(source, tmp_path):
    shard = tmp_path / "source" / source.shards[1].path
    shard.unlink()
    with pytest.raises(IntegrityError, match=shard.name):
        opd_store.snapshot(source, tmp_path / "new")
    assert not (tmp_path / "new/manifests").exists()


def test_a_full_disk_leaves_no_version(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StorageError) as caught:
        opd_store.snapshot(source, tmp_path / "new")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    with pytest.raises(opd_store.CacheNotFoundError):
        opd_store.open(tmp_path / "new")
    opd_store.snapshot(source, tmp_path / "new")
