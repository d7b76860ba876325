"""A cache in a bucket is the cache on the disk: one contract for every place, through the public names."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from cloud import places
from cloud.fault_proxy import Fault, FaultProxy
from cloud.servers import s3_options
from store.caches import assert_same
from torch.utils.data import DataLoader

import opd_store
from opd_store.cache import Cache
from opd_store.storage import Retry, resolve
from opd_store.versions import load_manifest
from opd_train import CacheStream

QUICK = Retry(tries=4, deadline_s=10, attempt_s=0.4, first_delay_s=0.001, max_delay_s=0.01)
PASSING = [fault for fault in Fault if fault.is_passing]


def epoch(cache, **options):
    return list(CacheStream(cache, **({"batch_tokens": 1500, "window": 2, "seed": 3} | options)))


def assert_same_batches(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name, tensor in one.tensors().items():
            assert tensor.equal(other.tensors()[name]), name


class ReaderContract:
    """`place` is (address, storage options) of a copy of the cache `local`."""

    @pytest.fixture
    def open_it(self, place):
        return lambda **more: opd_store.open(place[0], storage_options=place[1], **more)

    @pytest.fixture
    def here(self, local):
        return opd_store.open(local)

    def test_what_it_is(self, open_it, here):
        cache = open_it()
        assert (cache.digest, cache.version, len(cache)) == (here.digest, 3, len(here))
        assert cache.meta == here.meta
        assert cache.schema == here.schema
        assert cache.row_tokens.tolist() == here.row_tokens.tolist()
        assert cache.id_table == here.id_table

    def test_every_rollout(self, open_it, here):
        cache = open_it()
        for ranks in (None, 8, 3, 0):
            for found, expected in zip(cache.scan(ranks=ranks), here.scan(ranks=ranks), strict=True):
                assert_same(found, expected)
        assert_same(cache[-1], here[-1])
        assert cache.find(here.row_hash(20)) == here.find(here.row_hash(20))
        assert opd_store.verify(cache.uri, **self._access(cache)).ok

    def _access(self, cache):
        options = getattr(cache._storage, "_options", None)
        return {"storage_options": options}

    def test_packed_rows(self, open_it, here):
        rows = np.array([44, 0, 7, 51, 7])
        for ranks in (None, 8):
            one, other = (opd_store.gather(cache, rows, ranks=ranks) for cache in (open_it(), here))
            for name in opd_store.Packed.__dataclass_fields__:
                left, right = getattr(one, name), getattr(other, name)
                assert (left is None) == (right is None), name
                assert left is None or left.tobytes() == right.tobytes(), name

    def test_filters(self, open_it, here):
        for chosen in (
            {"finish_reason": "stop"},
            {"min_tokens": 204, "teacher": 0},
            {"hashes": {here.row_hash(3), here.row_hash(50)}},
        ):
            found = opd_store.select(open_it(), **chosen)
            assert found.tolist() == opd_store.select(here, **chosen).tolist()
        for one, other in zip(opd_store.split(open_it(), 0.3), opd_store.split(here, 0.3), strict=True):
            assert one.tolist() == other.tolist()

    def test_streams(self, open_it, here):
        expected = epoch(here)
        for options in ({"workers": 0}, {"workers": 2}):
            assert_same_batches(epoch(open_it(), **options), expected)

    def test_a_stream_goes_on_elsewhere(self, open_it, here):
        expected = epoch(here)
        stream = CacheStream(open_it(), batch_tokens=1500, window=2, seed=3)
        found = [stream.next_batch() for _ in range(3)]
        other = CacheStream(here, batch_tokens=1500, window=2, seed=3)
        other.load_state_dict(stream.state_dict())
        stream.close()
        assert_same_batches([*found, *other], expected)

    def test_pins(self, open_it, place, here):
        first = opd_store.open(f"{place[0]}@{here.parent}", storage_options=place[1])
        assert (first.version, first.digest) == (2, here.parent)
        with pytest.raises(opd_store.CacheNotFoundError, match="none of its 3 versions has the pinned"):
            opd_store.open(f"{place[0]}@sha256:{'0' * 64}", storage_options=place[1])
        with pytest.raises(opd_store.CacheNotFoundError, match=r"no cache here|no such bucket"):
            opd_store.open(f"{place[0]}/nothing", storage_options=place[1])

    def test_it_passes_through_pickle(self, open_it, here):
        cache = pickle.loads(pickle.dumps(open_it()))
        assert_same(cache[5], here[5])


class TestLocal(places.Local, ReaderContract):
    pass


class RemoteReaderContract(ReaderContract):
    def test_only_what_is_wanted_is_fetched(self, open_it, here):
        cache = open_it()
        shards = cache.shards
        batches = [info.parts(number) for info in shards for number in range(info.n_batches)]
        for options, n_parts in (({}, 4), ({"ranks": 8}, 3), ({"ranks": 0}, 2)):
            cache = open_it()
            _ = cache.id_table
            requests, n_bytes = cache.stats.requests, cache.stats.n_bytes
            epoch(cache, **options)
            assert cache.stats.requests - requests == len(batches)
            needed = sum(part.length for parts in batches for part in parts[:n_parts])
            assert cache.stats.n_bytes - n_bytes == needed
        cache = open_it()
        n_bytes = cache.stats.n_bytes
        cache.column("finish_reason")
        assert cache.stats.n_bytes - n_bytes == sum(parts[0].length for parts in batches)

    def test_opening_reads_manifest_and_index_only(self, open_it, here):
        cache = open_it()
        assert cache.stats.requests <= 4 + len(cache.manifest.segments) + 8
        assert cache.stats.n_bytes < here.n_bytes / 10

    def test_a_directory_that_keeps_it(self, open_it, here, tmp_path):
        expected = epoch(here)
        assert_same_batches(epoch(open_it(cache_dir=tmp_path / "kept")), expected)
        again = open_it(cache_dir=tmp_path / "kept")
        opened = again.stats.requests
        assert_same_batches(epoch(again), expected)
        # Neither record batches nor the id table.
        assert again.stats.requests == opened
        for file in (tmp_path / "kept").iterdir():
            data = bytearray(file.read_bytes())
            data[len(data) // 3] ^= 1
            file.write_bytes(data)
        assert_same_batches(epoch(open_it(cache_dir=tmp_path / "kept")), expected)


class TestMemory(places.Memory, RemoteReaderContract):
    pass


class TestWeb(places.Web, RemoteReaderContract):
    pass


class TestHub(places.Hub, RemoteReaderContract):
    pass


class TestMoto(places.Moto, RemoteReaderContract):
    pass


class TestSeaweedFS(places.SeaweedFS, RemoteReaderContract):
    pass


class TestFakeGcs(places.FakeGcs, RemoteReaderContract):
    pass


@pytest.mark.cloud
class TestAzurite(places.Azurite, RemoteReaderContract):
    pass


@pytest.fixture
def behind_a_proxy(moto, local):
    """Opens the cache through a proxy, with short delays."""
    moto.put(local, "cache")
    with FaultProxy(("127.0.0.1", moto.port)) as proxy:

        def open_it() -> Cache:
            options = s3_options(proxy.port)
            storage, _ = resolve("s3://bucket/cache", storage_options=options, retry=QUICK)
            return Cache(storage, *load_manifest(storage))

        yield proxy, open_it


@pytest.mark.parametrize("first", range(4))
def test_a_stream_over_a_bad_network(behind_a_proxy, local, first):
    """Every third request goes wrong, each in another way."""
    proxy, open_it = behind_a_proxy
    faults = itertools.cycle(PASSING[first:] + PASSING[:first])
    proxy.arm({number: next(faults) for number in range(1 + first % 3, 60, 3)})
    assert_same_batches(epoch(open_it(), workers=first), epoch(opd_store.open(local)))
    assert sum(request.fault is not None for request in proxy.log) >= 4


@pytest.mark.parametrize("fault", [fault for fault in Fault if not fault.is_passing])
def test_a_stream_that_breaks_goes_on_where_it_was(behind_a_proxy, local, fault):
    proxy, open_it = behind_a_proxy
    expected = epoch(opd_store.open(local))
    stream = CacheStream(open_it(), batch_tokens=1500, window=2, seed=3)
    found = []
    proxy.arm({number: fault for number in range(3, 6)})
    errors = []
    while (position := len(found)) < len(expected) and len(errors) < 20:
        try:
            found.append(stream.next_batch())
        except opd_store.StorageError as error:
            errors.append(error)
            assert stream.state_dict()["batches"] == position
    assert_same_batches(found, expected)
    assert errors
    assert all(".arrow" in str(error) or "tables/" in str(error) for error in errors)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_read_for_themselves(seaweedfs, local, method):
    """After the parent has connections of its own."""
    cache = opd_store.open(seaweedfs.put(local, "cache"), storage_options=seaweedfs.options)
    expected = epoch(cache, workers=0)
    stream = CacheStream(cache, batch_tokens=1500, window=2, seed=3)
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context=method)
    assert_same_batches(list(loader), expected)
