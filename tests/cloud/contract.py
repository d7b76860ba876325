"""What every storage promises. A subclass gives the place: `TestX(RemoteContract)` with a fixture `place`."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import pickle

import pytest

import opd_store
from opd_store import layout
from opd_store.index import decode_shard_table
from opd_store.shard import part_slices
from opd_store.storage import LocalStorage, resolve
from opd_store.versions import load_manifest


def local_index(path):
    """The manifest of a local cache and all of its shards."""
    storage = LocalStorage(path)
    manifest, digest = load_manifest(storage)
    shards = []
    for segment in manifest.segments:
        ref = segment.shards
        buffer = storage.load(ref.path, ref.n_bytes, ref.sha256)
        shards += decode_shard_table(buffer, manifest.schema.n_parts, where=ref.path)
    return manifest, digest, shards


def digest_of(storage, info):
    """SHA-256 of all record batches of a shard."""
    source = storage.open_shard(info)
    hasher = hashlib.sha256()
    for number in range(info.n_batches):
        hasher.update(source.batch(number, tuple(range(info.n_parts))))
    return hasher.hexdigest()


def child(storage, info, pipe):
    """Reads in another process."""
    try:
        pipe.send((storage.versions(), digest_of(storage, info)))
    except BaseException as error:
        pipe.send(repr(error))


def digest_in_child(method, storage, info):
    """What `child` finds in a process that was started in this way."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(storage, info, theirs))
    process.start()
    assert ours.poll(30), "the child hangs"
    found = ours.recv()
    process.join(30)
    return found


class StorageContract:
    """For local and remote ones. `place` is (address, storage options) of a copy of the cache `local`."""

    @pytest.fixture
    def storage(self, place):
        address, options = place
        storage, pin = resolve(address, storage_options=options)
        assert pin is None
        return storage

    def test_versions(self, storage, place):
        assert storage.versions() == [1, 2, 3]
        other, pin = resolve(f"{place[0]}/nothing@sha256:{'0' * 64}", storage_options=place[1])
        assert other.versions() == []
        assert pin == "sha256:" + "0" * 64
        with pytest.raises(opd_store.CacheNotFoundError, match="nothing"):
            load_manifest(other)

    def test_the_manifest(self, storage, local):
        assert load_manifest(storage) == local_index(local)[:2]

    def test_a_small_file(self, storage, local):
        name = layout.manifest_path(2)
        data = (local / name).read_bytes()
        assert storage.read(name, len(data)) == data
        assert storage.describe(name) == f"{storage.uri}/{name}"
        with pytest.raises(
            opd_store.IntegrityError, match=f"{name}: larger than the limit of {len(data) - 1}"
        ):
            storage.read(name, len(data) - 1)
        with pytest.raises(opd_store.CacheNotFoundError, match=r"00000009.json: no such file"):
            storage.read(layout.manifest_path(9), 100)

    def test_a_whole_file(self, storage, local):
        _, _, shards = local_index(local)
        for info in shards:
            expected = (local / info.path).read_bytes()
            assert storage.load(info.path, info.n_bytes, info.sha256).to_pybytes() == expected
            assert storage.map(info.path).to_pybytes() == expected

    def test_a_file_that_is_not_the_one(self, storage, local):
        _, _, shards = local_index(local)
        info = shards[0]
        with pytest.raises(opd_store.IntegrityError, match=r"not the .* bytes with the digest in its name"):
            storage.load(info.path, info.n_bytes, b"x" * 32)
        missing = f"shards/{'0' * 64}.arrow"
        for call in (lambda: storage.load(missing, 10, b"x" * 32), lambda: storage.map(missing)):
            with pytest.raises(
                opd_store.IntegrityError, match="missing, although the manifest names it"
            ) as at:
                call()
            assert at.value.uri == f"{storage.uri}/{missing}"


class RemoteContract(StorageContract):
    """For those that fetch."""

    start_methods = ("fork",)

    def test_every_choice_of_parts(self, storage, local):
        _, _, shards = local_index(local)
        info = shards[0]
        assert (info.n_batches, info.n_parts) == (3, 4)
        data = (local / info.path).read_bytes()
        source = storage.open_shard(info)
        others = [others for n in range(4) for others in itertools.combinations(range(1, 4), n)]
        for number, chosen in itertools.product(range(3), others):
            slices = part_slices(info, number)
            start, end = slices[0][0], slices[-1][0] + slices[-1][1]
            before = storage.stats.requests
            buffer = source.batch(number, (0, *chosen))
            # Parts 1 and 2 are more than a gap together.
            assert storage.stats.requests - before == (2 if chosen == (3,) else 1)
            assert buffer.size == end - start
            assert not buffer.is_mutable
            for offset, length, _ in (slices[part] for part in (0, *chosen)):
                found = buffer.slice(offset - start, length)
                assert found.to_pybytes() == data[offset : offset + length]

    def test_prefetch(self, storage, local):
        _, _, (info, *_) = local_index(local)
        source = storage.open_shard(info)
        for number in (0, 1, 0):
            source.prefetch(number, (0, 1))
        expected = [part_slices(info, number) for number in (0, 1)]
        buffers = [source.batch(number, (0, 1)) for number in (0, 1)]
        assert storage.stats.requests == 2
        assert storage.stats.n_bytes == sum(part[1] for parts in expected for part in parts[:2])
        data = (local / info.path).read_bytes()
        for buffer, parts in zip(buffers, expected, strict=True):
            n_bytes = parts[0][1] + parts[1][1]
            assert buffer.slice(0, n_bytes).to_pybytes() == data[parts[0][0] : parts[0][0] + n_bytes]

    def test_what_is_missing_or_cut(self, storage, local, place):
        _, _, (info, *_) = local_index(local)
        other, _ = resolve(f"{place[0]}/nothing", storage_options=place[1])
        other.open_shard(info).prefetch(0, (0,))
        with pytest.raises(opd_store.IntegrityError, match="missing, although the manifest names it"):
            other.open_shard(info).batch(0, (0,))

    def test_pickling(self, storage, local):
        _, _, (info, *_) = local_index(local)
        expected = digest_of(storage, info)
        copy = pickle.loads(pickle.dumps(storage))
        assert copy.uri == storage.uri
        assert digest_of(copy, info) == expected

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    def test_other_processes(self, storage, local):
        """After the parent made connections and while it has a prefetch under way."""
        _, _, (info, *_) = local_index(local)
        expected = [1, 2, 3], digest_of(storage, info)
        storage.open_shard(info).prefetch(0, (0, 1, 2, 3))
        for method in self.start_methods:
            assert digest_in_child(method, storage, info) == expected
        assert digest_of(storage, info) == expected[1]
