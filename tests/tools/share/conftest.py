"""One cache, one of each server, and the command in this process."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner, Result
from cloud import servers
from cloud.conftest import AZURITE
from opd_tools.main import main
from store.caches import VOCAB, add, some_rollouts, write
from tools.share.hub_server import HubServer, hub_server

from opd_store import ModelInfo
from opd_store.testing import example_meta

REPO = "hf://datasets/user/name"
TEACHER = ModelInfo(name="org/teacher-7B", revision="abc123", engine="vllm")


@pytest.fixture(scope="session")
def local(tmp_path_factory) -> Path:
    """A cache of three versions in three shards, which may be published. Never written to by a test."""
    path = tmp_path_factory.mktemp("share") / "cache"
    values = some_rollouts(40, topk=20, response_len=60)
    meta = dataclasses.replace(example_meta(VOCAB), licence="apache-2.0", teacher=TEACHER)
    write(path, values[:20], topk=20, encoding="ladder/128", meta=meta)
    add(path, values[20:30])
    add(path, values[30:])
    return path


def server(start):
    """A fixture: one such server for all tests."""

    @pytest.fixture(scope="session")
    def running(tmp_path_factory) -> Iterator[servers.Server]:
        with start(tmp_path_factory.mktemp("server")) as found:
            yield found

    return running


moto = server(servers.moto)
seaweedfs = server(servers.seaweedfs)
fake_gcs = server(servers.fake_gcs)


@pytest.fixture(scope="session")
def azurite(tmp_path_factory) -> Iterator[servers.Server]:
    if not AZURITE.exists():
        pytest.skip("no Azurite; `make test-cloud` installs it")
    with servers.azurite(tmp_path_factory.mktemp("azurite"), AZURITE) as found:
        yield found


@pytest.fixture
def hub(monkeypatch) -> Iterator[HubServer]:
    """A fresh one for every test."""
    # huggingface_hub 2.4 uploads in a way that httpx deprecates.
    warnings.filterwarnings("ignore", message="Use 'content=", category=DeprecationWarning)
    # The server here knows no Xet.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with hub_server() as found:
        yield found


@pytest.fixture(
    params=[
        "directory",
        "memory",
        "moto",
        "seaweedfs",
        "fake_gcs",
        "hub",
        pytest.param("azurite", marks=pytest.mark.cloud),
    ]
)
def place(request, tmp_path) -> tuple[str, dict[str, object]]:
    """An address that nothing is at, and what `opd_store.open` needs for it."""
    name = f"{tmp_path.name}-{abs(hash(tmp_path))}"
    if request.param == "directory":
        return str(tmp_path / "published"), {}
    if request.param == "memory":
        return f"memory://{name}", {"storage_options": {}}
    found = request.getfixturevalue(request.param)
    url = REPO if request.param == "hub" else f"{found.root}/{name}"
    return url, {"storage_options": found.options}


def opd(*args: object, access: dict[str, object] | None = None) -> Result:
    """Run a command here, with these storage options."""
    options = (access or {}).get("storage_options") or {}
    assert isinstance(options, dict)
    given = [part for name, value in options.items() for part in ("--storage-option", f"{name}={value}")]
    return CliRunner().invoke(main, [*map(str, args), *given], catch_exceptions=False)


def ok(result: Result) -> Result:
    """The same, if it succeeded."""
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result, code: int, *parts: str) -> None:
    """It ended with one line that has all the parts."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("publishing:", "pulling:"))]
    assert len(lines) == 1, result.output
    for part in parts:
        assert part in lines[0], lines[0]
