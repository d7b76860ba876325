"""The disk cache: only ever a faster way to the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import stat

import pyarrow as pa
import pytest
from cloud.contract import local_index

import opd_store
from opd_store.storage import resolve
from opd_store.storage.disk_cache import DiskCache

ALL = (0, 1, 2, 3)


@pytest.fixture
def info(local):
    return local_index(local)[2][0]


@pytest.fixture
def connect(local, web, tmp_path):
    """Storages with the same cache directory."""
    address = web.put(local, "cache")
    return lambda **options: resolve(address, cache_dir=tmp_path / "kept", **options)[0]


def used(directory) -> int:
    return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(directory))


def test_the_second_time_nothing_is_fetched(connect, info, local, tmp_path):
    first = connect()
    expected = [first.open_shard(info).batch(0, parts).to_pybytes() for parts in (ALL, (0, 1), (0, 3))]
    whole = first.load(info.path, info.n_bytes, info.sha256).to_pybytes()
    assert whole == (local / info.path).read_bytes()
    for second in (connect(), pickle.loads(pickle.dumps(first))):
        second.open_shard(info).prefetch(0, ALL)
        found = [second.open_shard(info).batch(0, parts) for parts in (ALL, (0, 1), (0, 3))]
        assert [buffer.to_pybytes() for buffer in found] == expected
        assert not any(buffer.is_mutable for buffer in found)
        assert second.load(info.path, info.n_bytes, info.sha256).to_pybytes() == whole
        assert second.stats.requests == 0
    names = sorted(path.name for path in (tmp_path / "kept").iterdir())
    digest = info.sha256.hex()
    assert names == [digest, f"{digest}.0.3", f"{digest}.0.9", f"{digest}.0.f"]
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty"])
def test_a_damaged_file_is_fetched_again(connect, info, tmp_path, damage):
    storage = connect()
    expected = storage.open_shard(info).batch(1, (0, 1)).to_pybytes()
    storage.load(info.path, info.n_bytes, info.sha256)
    for path in (tmp_path / "kept").iterdir():
        data = path.read_bytes()
        middle = len(data) // 8
        path.write_bytes(
            {
                "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
                "cut": data[:-1],
                "longer": data + b"x",
                "empty": b"",
            }[damage]
        )
    before = storage.stats.requests
    for n_requests in (2, 0):
        assert storage.open_shard(info).batch(1, (0, 1)).to_pybytes() == expected
        assert storage.load(info.path, info.n_bytes, info.sha256).size == info.n_bytes
        assert storage.stats.requests - before == n_requests
        before = storage.stats.requests


def test_what_others_put_there_is_left_alone(connect, info, tmp_path):
    """Links, directories, pipes and other names are neither followed nor deleted, also when room is made."""
    kept = tmp_path / "kept"
    kept.mkdir()
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    digest = info.sha256.hex()
    (kept / digest).symlink_to(target)
    (kept / f"{digest}.0.f").symlink_to(tmp_path / "does-not-exist")
    (kept / f"{digest}.1.f").mkdir()
    os.mkfifo(kept / f"{digest}.2.f")
    (kept / "notes.txt").write_bytes(b"n" * 100_000)
    (kept / f"{'0' * 64}.0.1").symlink_to(target)
    before = {path.name: path.lstat().st_ino for path in kept.iterdir()}
    for _ in range(2):
        storage = connect(cache_bytes=100_000)
        for number in range(3):
            assert storage.open_shard(info).batch(number, ALL).size
            assert storage.open_shard(info).batch(number, (0,)).size
        storage.load(info.path, info.n_bytes, info.sha256)
    after = {path.name: path.lstat().st_ino for path in kept.iterdir()}
    assert before.items() <= after.items()
    assert target.read_bytes() == b"precious"
    assert not (tmp_path / "does-not-exist").exists()
    assert not [name for name in after if name.endswith(".tmp")]


def test_the_least_recently_used_goes(tmp_path):
    cache = DiskCache(str(tmp_path), 10 * 4096)
    keys = [f"{number:064x}" for number in range(30)]
    for number, key in enumerate(keys):
        cache.put(key, 4096, [(0, bytes([number]) * 4096)])
        assert used(tmp_path) <= 10 * 4096
        assert cache.get(keys[0], 4096, lambda _: True) is not None
    left = {path.name for path in tmp_path.iterdir()}
    assert {keys[0], *keys[-8:]} <= left
    assert not left & set(keys[1:15])


def test_holes_take_no_room(tmp_path):
    cache = DiskCache(str(tmp_path), 1 << 20)
    buffer = cache.put("0" * 64, 1 << 30, [(0, b"a"), (1 << 29, b"b")])
    assert buffer.size == 1 << 30
    assert buffer.slice(1 << 29, 2).to_pybytes() == b"b\0"
    assert used(tmp_path) <= 3 * 4096
    assert cache.put("1" * 64, 1 << 21, [(0, bytes(1 << 21))]) is None


def fill(directory: str, seed: int) -> None:
    cache = DiskCache(directory, 16 * 4096)
    for number in range(200):
        value = (seed * 7 + number) % 40
        key = f"{value:064x}"

        def is_right(data: pa.Buffer, value: int = value) -> bool:
            return data.to_pybytes() == bytes([value]) * 8192

        if cache.get(key, 8192, is_right) is None:
            made = cache.put(key, 8192, [(0, bytes([value]) * 8192)])
            if made is None or not is_right(made):
                os._exit(1)


def test_many_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(str(tmp_path), seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    for path in tmp_path.iterdir():
        assert path.read_bytes() == bytes([int(path.name, 16)]) * 8192
    # Each may be one file late to see what the others wrote.
    assert used(tmp_path) <= (16 + 4 * 2) * 4096


def test_a_disk_that_says_no(connect, info, local, tmp_path, monkeypatch):
    """Full, read-only or a file in the way: one warning, and the same bytes."""
    (tmp_path / "kept").write_bytes(b"in the way")
    storage = connect()
    with pytest.warns(RuntimeWarning, match="kept: cannot keep fetched data: .* Reading goes on") as caught:
        found = [storage.open_shard(info).batch(number, ALL) for number in range(3)]
    assert len(caught) == 1
    data = (local / info.path).read_bytes()
    for number, buffer in enumerate(found):
        start = info.parts(number)[0].offset
        assert buffer.to_pybytes() == data[start : start + buffer.size]
    (tmp_path / "kept").unlink()
    full = connect()

    def no_space(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", no_space)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert full.open_shard(info).batch(0, ALL).equals(found[0])
    assert not list((tmp_path / "kept").iterdir())


def test_no_room_at_all(tmp_path):
    with pytest.raises(opd_store.InvalidArgumentError, match="cache_bytes: expected more than 0"):
        DiskCache(str(tmp_path), 0)
