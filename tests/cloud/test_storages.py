"""The contract on every storage and server."""

from __future__ import annotations

import gc
import multiprocessing
import weakref

import pytest
from cloud.contract import RemoteContract, StorageContract
from cloud.servers import Server

import opd_store
from opd_store.storage import resolve

MEMORY = Server("memory://root")


class TestLocal(StorageContract):
    @pytest.fixture
    def place(self, local):
        return str(local), None


class TestFileUrl(StorageContract):
    @pytest.fixture
    def place(self, local):
        return f"file://{local}", None


class TestMemory(RemoteContract):
    @pytest.fixture
    def place(self, local):
        return MEMORY.put(local, "cache"), {}


class TestWeb(RemoteContract):
    start_methods = ("fork", "forkserver", "spawn")

    @pytest.fixture
    def place(self, local, web):
        return web.put(local, "cache"), {}


def collect(refs, pipe):
    gc.collect()
    pipe.send([ref() is not None for ref in refs])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_closes_nothing_of_its_parent(local, web):
    """For each file system that is collected in a child, fsspec would wait a second."""
    address, refs = web.put(local, "cache"), []
    gc.disable()
    try:
        for _ in range(3):
            storage, _ = resolve(address)
            storage.versions()
            refs.append(weakref.ref(storage._process().session._transport.fs))
        del storage
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=collect, args=(refs, theirs))
        process.start()
        assert ours.poll(30)
        assert ours.recv() == [True] * 3
        process.join(30)
    finally:
        gc.enable()


class TestWebWithRedirects(RemoteContract):
    """To the same host, which are followed."""

    @pytest.fixture
    def place(self, local, web):
        return web.put(local, "cache").replace(web.root, f"{web.root}/moved"), {}


class TestHub(RemoteContract):
    @pytest.fixture
    def place(self, local, hub):
        return hub.put(local, "cache"), hub.options

    def test_no_such_repository(self, hub):
        storage, _ = resolve("hf://datasets/user/other/cache", storage_options=hub.options)
        with pytest.raises(opd_store.CacheNotFoundError, match="no such bucket or repository"):
            storage.versions()


class TestMoto(RemoteContract):
    start_methods = ("fork", "forkserver", "spawn")

    @pytest.fixture
    def place(self, local, moto):
        return moto.put(local, "cache"), moto.options


class TestSeaweedFS(RemoteContract):
    @pytest.fixture
    def place(self, local, seaweedfs):
        return seaweedfs.put(local, "cache"), seaweedfs.options


class TestFakeGcs(RemoteContract):
    @pytest.fixture
    def place(self, local, fake_gcs):
        return fake_gcs.put(local, "cache"), fake_gcs.options


@pytest.mark.cloud
class TestAzurite(RemoteContract):
    @pytest.fixture
    def place(self, local, azurite):
        return azurite.put(local, "cache"), azurite.options
