"""The contract on every storage and server."""

from __future__ import annotations

import pytest
from cloud import places
from cloud.contract import RemoteContract, StorageContract

import opd_store
from opd_store.storage import resolve


class TestLocal(places.Local, StorageContract):
    pass


class TestFileUrl(StorageContract):
    @pytest.fixture
    def place(self, local):
        return f"file://{local}", None


class TestMemory(places.Memory, RemoteContract):
    pass


class TestWeb(places.Web, RemoteContract):
    start_methods = ("fork", "forkserver", "spawn")


class TestWebWithRedirects(RemoteContract):
    """To the same host, which are followed."""

    @pytest.fixture
    def place(self, local, web):
        return web.put(local, "cache").replace(web.root, f"{web.root}/moved"), {}


class TestHub(places.Hub, RemoteContract):
    def test_no_such_repository(self, hub):
        storage, _ = resolve("hf://datasets/user/other/cache", storage_options=hub.options)
        with pytest.raises(opd_store.CacheNotFoundError, match="no such bucket or repository"):
            storage.versions()


class TestMoto(places.Moto, RemoteContract):
    start_methods = ("fork", "forkserver", "spawn")


class TestSeaweedFS(places.SeaweedFS, RemoteContract):
    pass


class TestFakeGcs(places.FakeGcs, RemoteContract):
    pass


@pytest.mark.cloud
class TestAzurite(places.Azurite, RemoteContract):
    pass
