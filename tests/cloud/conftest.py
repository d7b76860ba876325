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


@pytest.fixture(scope="session")
def web(tmp_path_factory) -> Iterator[servers.WebServer]:
    with servers.web_server(tmp_path_factory.mktemp("web")) as server:
        yield server


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Iterator[servers.WebServer]:
    """A data set on something like Hugging Face."""
    with servers.web_server(tmp_path_factory.mktemp("hub"), servers.HubHandler) as server:
        server.options = {"endpoint": server.root, "token": servers.SECRET}
        server.root = "hf://datasets/user/name@main"
        yield server


@pytest.fixture(scope="session")
def moto(tmp_path_factory) -> Iterator[servers.Server]:
    with servers.moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory) -> Iterator[servers.Server]:
    with servers.seaweedfs(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(scope="session")
def fake_gcs(tmp_path_factory) -> Iterator[servers.Server]:
    with servers.fake_gcs(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture(scope="session")
def azurite(tmp_path_factory) -> Iterator[servers.Server]:
    if not AZURITE.exists():
        pytest.skip("no Azurite; `make test-cloud` installs it")
    with servers.azurite(tmp_path_factory.mktemp("azurite"), AZURITE) as server:
        yield server
