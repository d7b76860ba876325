"""One cache and one of each server for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud import servers
from store.caches import add, some_rollouts, write

AZURITE = Path(os.environ.get("AZURITE", "node_modules/azurite"))


@pytest.fixture(scope="session")
def local(tmp_path_factory) -> Path:
    """A cache of three versions; the first has three record batches of four parts."""
    path = tmp_path_factory.mktemp("local") / "cache"
    values = some_rollouts(60, topk=20, response_len=200)
    write(path, values[:45], topk=20, encoding="ladder/128", batch_bytes=200_000)
    add(path, values[45:50])
    add(path, values[50:])
    return path


def server(start):
    """A fixture: one such server for all tests."""

    @pytest.fixture(scope="session")
    def running(tmp_path_factory) -> Iterator[servers.Server]:
        with start(tmp_path_factory.mktemp("server")) as found:
            yield found

    return running


web = server(servers.web_server)
hub = server(servers.hub)
moto = server(servers.moto)
seaweedfs = server(servers.seaweedfs)
fake_gcs = server(servers.fake_gcs)


@pytest.fixture(scope="session")
def azurite(tmp_path_factory) -> Iterator[servers.Server]:
    if not AZURITE.exists():
        pytest.skip("no Azurite; `make test-cloud` installs it")
    with servers.azurite(tmp_path_factory.mktemp("azurite"), AZURITE) as server:
        yield server
